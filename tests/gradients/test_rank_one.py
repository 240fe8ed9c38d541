"""Gradients of rank one, whose squares are one matrix product, against the ops that square each gradient."""

from __future__ import annotations

import pytest
import torch

from t2v_fast import ops
from t2v_fast.gradients.factors import Convolution, Outer

GEOMETRIES = [  # input side, kernel, stride, padding, dilation
    (3, (3, 3), (1, 1), (0, 0), (1, 1)),
    (4, (3, 3), (4, 4), (1, 1), (1, 1)),
    (3, (2, 2), (1, 1), (0, 0), (2, 2)),
    (1, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, (1, 1), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("cotangents", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_layers_with_one_position(dtype: torch.dtype, cotangents: int) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(5, 1, 4, dtype=dtype), torch.randn(5 * cotangents, 1, 3, dtype=dtype)
    total = torch.float64 if dtype is torch.float64 else torch.float32
    weight = torch.rand(5 * cotangents, dtype=total)
    want, got = torch.ones(3, 4, dtype=total), torch.ones(3, 4, dtype=total)
    ops.sq_outer_acc_(want, x, g, weight)
    Outer(x=x, g=g).accumulate_(got, weight)
    torch.testing.assert_close(got, want, rtol=1e-5 if total is torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_with_one_output_pixel(geometry: tuple) -> None:
    side, *rest = geometry
    torch.manual_seed(0)
    x, g, weight = torch.randn(5, 2, side, side).double(), torch.randn(5, 3, 1, 1).double(), torch.rand(5).double()
    want, got = torch.zeros(3, 2, *rest[0]).double(), torch.zeros(3, 2, *rest[0]).double()
    ops.sq_conv_acc_(want, x, g, weight, *rest[1:], 1)
    Convolution(x=x, g=g, geometry=(*rest, 1)).accumulate_(got, weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
