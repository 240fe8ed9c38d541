"""The Triton kernel that copies boxes of images, in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import ConvCase
from op_checks import assert_close, conv_gradients, filter_sums, guarded

from t2v_fast import ops

pytest.importorskip("triton", reason="this torch comes without Triton")
from t2v_fast.kernels import sq_conv_boxes
from t2v_fast.kernels.sq_conv_geometry import conv_geometry

CASES = [
    ConvCase("3x3", 2, 40, (9, 7), 48),
    ConvCase("1x1", 2, 64, (5, 12), 32, (1, 1), padding=(0, 0)),
    ConvCase("dilated", 1, 32, (9, 9), 40, padding=(2, 1), dilation=(2, 2)),
    ConvCase("tokens", 2, 32, (1, 70), 72, (1, 1), padding=(0, 0), cotangents=2),
    ConvCase("5x3", 2, 32, (8, 8), 32, (5, 3), padding=(3, 0)),
    ConvCase("larger_than_the_image", 2, 32, (2, 2), 32, (5, 5), padding=(2, 2)),
    ConvCase("several_tiles", 2, 136, (11, 10), 144),
]


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def inputs(case: ConvCase, dtype: torch.dtype, layout: str = "channels_last") -> tuple[torch.Tensor, torch.Tensor]:
    """x and g, in buffers of NaN: reading outside an image shows."""
    x = guarded((case.n, case.c, *case.size), dtype, 1, layout)
    return x, guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: ConvCase, dtype: torch.dtype, tf32: None) -> None:
    x, g = inputs(case, dtype)
    geometry = conv_geometry(x, *case.geometry)
    assert sq_conv_boxes.fits_boxes(geometry, g)
    q = sq_conv_boxes.boxes_sums(geometry, g)
    assert_close(q, filter_sums(conv_gradients(case, x, g)), dtype, case.out_size[0] * case.out_size[1])
    assert torch.equal(q, sq_conv_boxes.boxes_sums(geometry, g))
    with ops.use_backend("triton"):
        assert torch.equal(q, ops.sq_conv(x, g, *case.geometry))  # the op takes this kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_candidate(dtype: torch.dtype, tf32: None) -> None:
    case = CASES[-1]
    x, g = inputs(case, dtype)
    geometry, want = conv_geometry(x, *case.geometry), filter_sums(conv_gradients(case, x, g))
    candidates = sq_conv_boxes.boxes_blocks(x.element_size(), case.o, case.c, *case.out_size)
    assert len(candidates) == 3
    for blocks in candidates:
        assert blocks[2] * blocks[3] == 128 // x.element_size()
        assert_close(sq_conv_boxes._boxes(geometry, g, blocks), want, dtype, 110)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(case: ConvCase, dtype: torch.dtype = torch.bfloat16, layout: str = "channels_last") -> bool:
        x, g = inputs(case, dtype, layout)
        return sq_conv_boxes.fits_boxes(conv_geometry(x, *case.geometry), g)

    assert fits(CASES[0])
    assert not fits(CASES[0], torch.float32)  # exact products
    assert not fits(CASES[0], torch.float64)
    assert not fits(CASES[0], layout="contiguous")
    assert not fits(CASES[0], layout="sliced")
    assert not fits(ConvCase("odd_channels", 2, 33, (7, 7), 32))  # rows of pixels are not aligned
    assert not fits(ConvCase("few_channels", 2, 16, (7, 7), 32))
    assert not fits(ConvCase("strided", 2, 32, (7, 7), 32, stride=(2, 2)))
    assert not fits(ConvCase("grouped", 2, 64, (7, 7), 64, groups=2))
    monkeypatch.setattr(sq_conv_boxes, "interpreted", lambda: False)
    assert not fits(CASES[0])  # a CPU


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_cards(capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sq_conv_boxes._card_has_boxes.__wrapped__(torch.device("cuda")) == has
    monkeypatch.delattr(sq_conv_boxes.tl, "make_tensor_descriptor")
    assert not sq_conv_boxes._card_has_boxes.__wrapped__(torch.device("cuda"))
