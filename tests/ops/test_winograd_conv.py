"""The Winograd convolution layer against torch in float64, also with values at the limits of each dtype."""

from __future__ import annotations

import pytest
import torch
from op_checks import OPERATOR_ERROR, VARIANTS, guarded, variant
from torch import Tensor
from torch.nn import functional as F

from t2v_fast import ops


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [v for v in VARIANTS if v != "emulated"])
def test_winograd_conv(name: str, dtype: torch.dtype, layout: str, transposed: bool) -> None:
    """Odd sizes and whole vectors, more tiles than one part holds, and several threads."""
    cases = [(2, 5, 7, 9, 3), (1, 32, 64, 4, 4), (3, 17, 33, 13, 6), (2, 128, 96, 30, 29), (4, 520, 40, 8, 5)]
    for k, (n, c, o, high, wide) in enumerate(cases):
        x = guarded((n, c, high, wide), dtype, k, layout)
        weight = guarded((c, o, 3, 3) if transposed else (o, c, 3, 3), dtype, k + 1, layout)
        bias = None if k % 2 else guarded((o,), dtype, k + 2)
        padding = [(0, 1), (1, 1), (2, 0), (1, 1), (2, 2)][k]
        convolution = F.conv_transpose2d if transposed else F.conv2d
        want = convolution(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
        results = []
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with variant(name):
                    results.append(ops.winograd_conv(x, weight, bias, padding, transposed))
            finally:
                torch.set_num_threads(before)
        got = results[0]
        assert got.shape == want.shape
        assert got.dtype == dtype
        bound = {torch.float64: 1e-14, torch.float32: 8e-6, torch.bfloat16: 4e-3}[dtype] * float(want.abs().max())
        if name == "reference":
            # Plain torch's own error. Without instructions for bfloat16, torch rounds a transposed convolution after
            # every tap. The kernels must meet a tighter bound: they round each result once.
            plain = convolution(x, weight, bias, padding=padding)
            bound = max(bound, 2 * float((plain.double() - want).abs().max()))
        assert float((got.double() - want).abs().max()) < bound
        if name.startswith("cpu"):  # neither the division of the work nor the rest of the batch changes a result
            assert results[1].equal(got)
            with variant(name):
                assert ops.winograd_conv(x[1:], weight, bias, padding, transposed).equal(got[1:])


def test_winograd_conv_checks_its_arguments() -> None:
    x, w = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3)
    for arguments, message in (
        ((x[0], w), "N, C, H, W"),
        ((x, w[:, :, :2]), "3x3"),
        ((x, w[:, :3]), "4 channels"),
        ((x, w, None, (1, 1), True), "4 channels"),
        ((x.half(), w.half()), "float32"),
        ((x, w.double()), "float32"),
        ((x, w, torch.randn(4)), r"\[5\]"),
        ((x, w, None, (-1, 0)), "padding"),
        ((x[:, :, :2], w), "spatial size"),
        ((torch.randn(2, 5, 6, 6), w, None, (3, 0), True), "padding"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.winograd_conv(*arguments)
        full = (*arguments, *(None, (0, 0), False)[len(arguments) - 2 :])
        with pytest.raises(OPERATOR_ERROR, match="winograd_conv"):
            torch.ops.t2v_fast.winograd_conv(*full)


@pytest.mark.parametrize("name", [v for v in VARIANTS if v.startswith("cpu")])
def test_winograd_conv_keeps_what_is_not_finite(name: str) -> None:
    """Results of NaN, infinite and overflowing inputs are not finite, and the other images don't change."""
    x, w = torch.randn(2, 32, 8, 8).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
    with variant(name):
        clean = ops.winograd_conv(x, w, None, (1, 1))
        for bad in (float("nan"), float("inf"), 3e38):
            spoilt = x.clone()
            spoilt[1, 5, 2, 2] = bad
            got = ops.winograd_conv(spoilt, w, None, (1, 1))
            assert not got[1, :, 2, 2].isfinite().any()
            assert got[0].equal(clean[0])


def of_size(x: float, w: float) -> tuple[Tensor, Tensor]:
    return (x * torch.randn(2, 96, 8, 8)).bfloat16(), (w * torch.randn(32, 96, 3, 3)).bfloat16()


def along_a_row() -> tuple[Tensor, Tensor]:
    """Patches and kernels that equal a row of the transform in every channel, which gives the largest products."""
    near, far = 2 / 3, 3 / 2
    row = torch.tensor([0.0, -near * far**2, -(far**2), near, 1.0, 0.0])
    taps = torch.tensor([1.0, near, near**2])
    patch = torch.zeros(2, 64, 10, 10)
    patch[:, :, 3:9, 3:9] = torch.outer(row, row)  # the pixels of the second tile of each axis
    return patch[:, :, :9, :9].bfloat16(), torch.outer(taps, taps).expand(32, 64, 3, 3).bfloat16()


EXTREMES = {
    "small": lambda: of_size(1e-20, 1e-10),
    "smaller": lambda: of_size(1e-28, 1e3),
    "large": lambda: of_size(1e20, 1e10),
    "larger": lambda: of_size(1e28, 1e-25),
    "along a row": along_a_row,
    "one channel": lambda: (of_size(1, 1)[0] * torch.eye(96)[5].view(1, 96, 1, 1), of_size(1, 1)[1]),
    "some channels": lambda: (of_size(1, 1)[0] * (torch.arange(96) > 90).view(1, 96, 1, 1), of_size(1, 1)[1]),
    "some filters": lambda: (of_size(1, 1)[0], of_size(1, 1)[1] * torch.logspace(-20, 10, 32).view(32, 1, 1, 1)),
    "nothing": lambda: (torch.zeros(2, 96, 8, 8).bfloat16(), of_size(1, 1)[1]),
    "no weight": lambda: (of_size(1, 1)[0], torch.zeros(32, 96, 3, 3).bfloat16()),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", [v for v in VARIANTS if v.startswith("cpu")])
def test_winograd_conv_in_extremes(name: str, case: str) -> None:
    """Fixed point has a unit for each tile and each filter, and no sum overflows."""
    torch.manual_seed(0)
    x, w = (t.bfloat16() for t in EXTREMES[case]())
    want = F.conv2d(x.double(), w.double(), None, 1, 1)
    with variant(name):
        error = (ops.winograd_conv(x, w, None, (1, 1)).double() - want).abs().amax((0, 2, 3))
    assert (error <= 8e-3 * want.abs().amax((0, 2, 3))).all()


def test_winograd_conv_of_nothing() -> None:
    assert ops.winograd_conv(torch.randn(0, 4, 6, 6), torch.randn(5, 4, 3, 3)).shape == (0, 5, 4, 4)
    got = ops.winograd_conv(torch.randn(2, 0, 6, 6), torch.randn(5, 0, 3, 3), torch.arange(5.0))
    assert got.equal(torch.arange(5.0).view(5, 1, 1).expand(2, 5, 4, 4))
    torch.library.opcheck(
        torch.ops.t2v_fast.winograd_conv, (torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3), None, (1, 1), False)
    )
