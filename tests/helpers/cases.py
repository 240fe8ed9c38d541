"""The geometries that every backend is tested on, and bench/ measures."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvCase:
    """One convolution: N images [C, H, W], O filters."""

    name: str
    n: int
    c: int
    size: Pair
    o: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    cotangents: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, Pair, int]:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    @property
    def out_size(self) -> Pair:
        h, w = (
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, k, t, p, d in zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return h, w


CONVOLUTIONS = [
    ConvCase("3x3", 3, 5, (7, 6), 9),
    ConvCase("3x3_wide", 2, 33, (9, 5), 37),
    ConvCase("3x3_one_channel", 2, 1, (6, 5), 4),
    ConvCase("3x3_no_padding", 2, 4, (5, 8), 3, padding=(0, 0)),
    ConvCase("3x3_much_padding", 2, 3, (4, 3), 5, padding=(3, 2)),
    ConvCase("3x3_strided", 3, 6, (9, 8), 7, stride=(2, 2)),
    ConvCase("3x3_stride_of_each_axis", 2, 4, (11, 9), 5, stride=(3, 1), padding=(1, 0)),
    ConvCase("3x3_stride_beyond_kernel", 2, 4, (12, 11), 5, stride=(4, 5), padding=(0, 0)),
    ConvCase("3x3_dilated", 2, 5, (9, 8), 6, padding=(2, 3), dilation=(2, 3)),
    ConvCase("3x3_grouped", 2, 6, (7, 6), 9, groups=3),
    ConvCase("3x3_grouped_dilated", 2, 8, (9, 9), 8, groups=4, dilation=(2, 2), padding=(2, 2), stride=(2, 1)),
    ConvCase("depthwise", 3, 19, (8, 7), 19, groups=19),
    ConvCase("depthwise_multiplier", 2, 5, (8, 7), 15, groups=5, stride=(2, 2)),
    ConvCase("depthwise_5x5_dilated", 2, 6, (9, 9), 6, (5, 5), groups=6, padding=(4, 4), dilation=(2, 2)),
    ConvCase("1x1", 3, 20, (5, 4), 13, (1, 1), padding=(0, 0)),
    ConvCase("1x1_strided", 2, 7, (6, 5), 17, (1, 1), (2, 2), (0, 0)),
    ConvCase("1x1_padded", 2, 3, (3, 3), 4, (1, 1), padding=(1, 1)),
    ConvCase("stem_7x7", 2, 3, (17, 15), 14, (7, 7), (2, 2), (3, 3)),
    ConvCase("stem_7x7_of_vectors", 2, 3, (17, 15), 48, (7, 7), (2, 2), (3, 3), cotangents=2),
    ConvCase("stem_3x3_of_vectors", 1, 3, (8, 9), 32, stride=(2, 2)),
    ConvCase("3x3_dilated_of_vectors", 1, 24, (6, 7), 16, padding=(2, 2), dilation=(2, 2)),
    ConvCase("patches_4x4", 2, 3, (9, 8), 6, (4, 4), (4, 4), (0, 0)),
    ConvCase("1x5", 2, 4, (4, 9), 5, (1, 5), padding=(0, 2)),
    ConvCase("4x2_even", 2, 3, (6, 7), 5, (4, 2), padding=(2, 1)),
    ConvCase("kernel_larger_than_image", 2, 3, (2, 2), 4, (5, 5), padding=(2, 2)),
    ConvCase("whole_image", 2, 3, (4, 5), 6, (4, 5), padding=(0, 0)),
    ConvCase("one_pixel", 2, 3, (1, 1), 4, (1, 1), padding=(0, 0)),
    ConvCase("one_filter", 2, 3, (5, 5), 1),
    ConvCase("one_example", 1, 16, (6, 6), 40),
    ConvCase("empty_batch", 0, 3, (5, 5), 4),
    ConvCase("three_cotangents", 2, 5, (6, 7), 8, cotangents=3),
    ConvCase("three_cotangents_depthwise", 2, 4, (6, 7), 4, groups=4, cotangents=3),
    ConvCase("three_cotangents_grouped", 2, 6, (5, 6), 8, groups=2, cotangents=3),
    ConvCase("wide_rows", 2, 20, (18, 21), 35, padding=(1, 2)),
    ConvCase("channels_a_page_apart", 1, 17, (32, 32), 18),
    ConvCase("1x1_channels_a_page_apart", 2, 18, (32, 32), 17, (1, 1), padding=(0, 0)),
    ConvCase("depthwise_one_example", 1, 37, (20, 5), 37, groups=37),
    ConvCase("padding_beyond_the_kernel", 1, 2, (3, 3), 3, (2, 2), (3, 3), (4, 4)),
]


@dataclass(frozen=True)
class OuterCase:
    """One linear layer: N examples of S tokens, I inputs, O outputs."""

    name: str
    n: int
    s: int
    i: int
    o: int
    cotangents: int = 1

    def __str__(self) -> str:
        return self.name


OUTERS = [
    OuterCase("one_token", 4, 1, 9, 7),
    OuterCase("few_tokens", 3, 5, 33, 26),
    OuterCase("many_tokens", 2, 40, 6, 11),
    OuterCase("square", 3, 16, 16, 16),
    OuterCase("wide", 2, 7, 130, 3),
    OuterCase("one_feature", 3, 4, 1, 1),
    OuterCase("empty_batch", 0, 3, 4, 5),
    OuterCase("no_tokens", 2, 0, 4, 5),
    OuterCase("tokens_a_page_apart", 2, 512, 19, 18),
    OuterCase("three_cotangents", 2, 6, 8, 9, cotangents=3),
    OuterCase("three_cotangents_one_token", 2, 1, 8, 9, cotangents=3),
]
