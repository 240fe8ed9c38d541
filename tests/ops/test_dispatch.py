"""The choice of a backend: what runs, what is logged, and what a forced backend refuses."""

from __future__ import annotations

import pytest
import torch

from t2v_fast import ops
from t2v_fast.ops import dispatch


def test_forcing_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu': expected one of auto"), ops.use_backend("gpu"):
        pass
    monkeypatch.setattr(dispatch, "_missing", "no compiler was found")
    assert "no compiler was found" in ops.backend_status()["cpu"]
    with monkeypatch.context() as patch:  # an extension that loaded but does not fit is not used either
        patch.setattr(dispatch.reference, "sq_prod", lambda *_: "the reference")
        assert ops.sq_prod(torch.ones(1, 2, 3)) == "the reference"
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for .* no compiler was found"), ops.use_backend("cpu"):
        pass


def test_backends_for_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """CUDA kernels come first, then Triton's, then the reference. The log says which one was chosen and why."""
    reasons = {"cuda": "the compiled extension was built without CUDA", "triton": None}
    monkeypatch.setattr(dispatch, "_missing_on_gpu", reasons.__getitem__)
    caplog.set_level("INFO", logger="t2v_fast.ops")
    for triton, cuda, chosen in (
        (None, "built without", "triton"),
        (None, None, "cuda"),
        ("no Triton", "x", "reference"),
    ):
        reasons.update(triton=triton, cuda=cuda)
        ops.gpu_backend.cache_clear()
        caplog.clear()
        assert ops.gpu_backend() == ops.gpu_backend() == chosen
        (record,) = caplog.records
        assert chosen in record.message
        assert all(why in record.message for why in (cuda, triton) if why and chosen != "cuda")
    ops.gpu_backend.cache_clear()


def test_forcing_a_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("cuda", "triton"):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "_missing_on_gpu", {"cuda": "no CUDA here", "triton": "no Triton here"}.__getitem__)
            with pytest.raises(RuntimeError, match=f"'{backend}' was asked for but cannot run: no"):
                ops.use_backend(backend).__enter__()
            patch.setattr(dispatch, "_missing_on_gpu", lambda name: None)
            if backend == "triton":
                pytest.importorskip("triton", reason="this torch comes without Triton")
                patch.setattr(dispatch._triton(), "interpreted", lambda: False)
            with (
                ops.use_backend(backend),
                pytest.raises(RuntimeError, match=f"{backend!r} was asked for, but .* on cpu"),
            ):
                ops.sq_prod(torch.ones(1, 2, 3))
