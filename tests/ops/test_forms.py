"""Quadratic forms of half-precision cotangents, whose Gram matrices are split into terms, against float64."""

from __future__ import annotations

import pytest
import torch
from op_checks import variant

from t2v_fast import ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cancel", [False, True], ids=["independent", "cancelling"])
@pytest.mark.parametrize("positions", [9, 63, 64, 100])
@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_terms_keep_what_the_inputs_have(backend: str, positions: int, cancel: bool, dtype: torch.dtype) -> None:
    """The forms are far closer to the truth than plain torch is, also where the sum over positions cancels."""
    if backend == "triton":
        pytest.importorskip("triton", reason="this torch comes without Triton")
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, positions, size, generator=generator, dtype=torch.float64) for size in (96, 32))
    if cancel:
        x, g = x.relu() + 1, g - g.mean(1, keepdim=True)
    x, g = x.to(dtype), g.to(dtype)
    truth = torch.einsum("nso,nsi->noi", g.double(), x.double()).square().sum(2)
    plain = torch.einsum("nso,nsi->noi", g, x).square().sum(2)
    with variant(backend):
        found = ops.sq_outer(x, g, "gram")
        assert torch.equal(found, ops.sq_outer(x, g, "gram"))

    def error(q: torch.Tensor) -> float:
        return float(((q.double() - truth) / truth).abs().max())

    assert error(found) <= error(plain) / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_extreme_gram_matrices(backend: str, value: float, dtype: torch.dtype) -> None:
    """A value that is not finite shows in every form that it enters, and large ones do not overflow."""
    if backend == "triton":
        pytest.importorskip("triton", reason="this torch comes without Triton")
    gram, g = torch.eye(5).reshape(1, 1, 5, 5), torch.ones(1, 3, 1, 5, dtype=dtype)
    gram[0, 0, 0, 2] = value
    g[0, 1, 0, 2] = 0.5
    with variant(backend):
        q = ops.sq_gram(gram, g)[0]
    if value == 1e30:
        torch.testing.assert_close(q, torch.tensor([1e30, 5e29, 1e30]), rtol=1e-6, atol=0)
    else:
        assert not q.isfinite().any()
