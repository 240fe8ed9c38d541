"""Checks of the emulated CUDA kernels that each return a relative error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import ConvCase
from op_checks import (
    DTYPES,
    conv_gradients,
    filter_sums,
    guarded,
    outer_gradients,
    prod_gradients,
    scatter_gradients,
)
from torch import Tensor

from t2v_fast import ops


def difference(got: Tensor, want: Tensor) -> float:
    """Relative error; infinite if a value is missing or not finite."""
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")


def conv_check(case: ConvCase, path: str, dtype: torch.dtype) -> Callable[[], float]:
    x = guarded((case.n, case.c, *case.size), dtype, 1)
    g = guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2, "channels_last")
    gradients = conv_gradients(case, x, g)

    def run() -> float:
        if path != "elementwise":
            return difference(ops.sq_conv(x, g, *case.geometry, path), filter_sums(gradients))
        out = torch.zeros(gradients.shape[1:], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        ops.sq_conv_acc_(out, x, g, torch.ones(len(g), dtype=out.dtype), *case.geometry[1:])
        return difference(out, gradients.square().sum(0))

    return run


def tokens_first_check(path: str, dtype: torch.dtype) -> Callable[[], float]:
    """Tokens whose examples lie side by side, as in torch's multi-head attention. The kernels read them in place."""
    x = guarded((3, 70, 40), dtype, 1, "tokens_first")
    g = guarded((3, 70, 72), dtype, 2, "tokens_first")
    gradients = outer_gradients(x, g)

    def run() -> float:
        if path != "elementwise":
            return difference(ops.sq_outer(x, g, path), filter_sums(gradients))
        out = torch.zeros(gradients.shape[1:], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        ops.sq_outer_acc_(out, x, g, torch.ones(len(g), dtype=out.dtype))
        return difference(out, gradients.square().sum(0))

    return run


# Several tiles along every axis, and more steps in depth than stages.
TILED = ConvCase("tiled", 2, 40, (9, 10), 72)


# Few examples of a large image, whose positions are split over blocks; and three channels, which are padded to four.
STEM = ConvCase("stem", 1, 3, (66, 64), 12, (7, 7), (2, 2), (3, 3))


DEPTHWISE = ConvCase("depthwise", 2, 48, (16, 15), 48, groups=48)


def scatter_check() -> float:
    index = torch.randint(-1, 5, (2, 9), generator=torch.Generator().manual_seed(1))
    g = guarded((4, 9, 300), torch.float32, 2)
    return difference(ops.sq_scatter(index, g, 5), filter_sums(scatter_gradients(index, g, 5)))


def prod_check(*shift_shape: int) -> Callable[[], float]:
    """Of g times x, which has more positions than are read at once."""
    x, g = guarded((2, 200, 12), torch.float32, 1), guarded((4, 200, 12), torch.float32, 2)
    shift = guarded(shift_shape, torch.float32, 3) if shift_shape else None
    return lambda: difference(ops.sq_norm(g, x, shift)[0], prod_gradients(g, x, shift, None).square())


def bias_check() -> float:
    """Of few channels at many positions, which are split over blocks."""
    g = guarded((1, 5000, 4), torch.float32, 1)
    return difference(ops.sq_prod(g), prod_gradients(g, None, None, None).square())


CHECKS = {
    **{
        f"{path} {str(dtype).removeprefix('torch.')}": conv_check(TILED, path, dtype)
        for path in ("explicit", "gram", "elementwise")
        for dtype in DTYPES
    },
    **{
        f"tokens first, {path} {str(dtype).removeprefix('torch.')}": tokens_first_check(path, dtype)
        for path in ("explicit", "gram", "elementwise")
        for dtype in (torch.float32, torch.bfloat16)
    },
    "stem": conv_check(STEM, "explicit", torch.bfloat16),
    "stem, elementwise": conv_check(STEM, "elementwise", torch.float16),
    "depthwise": conv_check(DEPTHWISE, "explicit", torch.float32),
    "scatter": scatter_check,
    "prod": prod_check(),
    "prod, shifted by position": prod_check(2, 200, 1),
    "prod, bias": bias_check,
}
