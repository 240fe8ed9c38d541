"""The geometry of convolutions, shared by the ops, the planner and the kernels in Python."""

from __future__ import annotations

from collections.abc import Sequence


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial output size of a convolution, one entry per spatial axis."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def per_axis(given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each of so many axes, of one for all or one each."""
    given = (given,) if isinstance(given, int) else tuple(given)
    return given * axes if len(given) == 1 else given


def gram_by_pixels(pixels: int, positions: int, channels: int, taps: int) -> bool:
    """Whether GPUs get the patches' Gram matrix of a group cheaper from the pixels' than from the patches.

    By multiply-adds, where an entry that is gathered counts as 16: it moves 4 bytes from cache.
    """
    return pixels**2 * channels + 16 * taps * positions**2 < positions**2 * channels * taps
