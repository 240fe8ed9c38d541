"""The planner's unit costs on GPUs."""

from __future__ import annotations

import logging

import pytest
import torch

from t2v_fast.ops import dispatch, gpu_estimates, gpu_specs, planner
from t2v_fast.ops.planner import Conv

LARGE = Conv(64, (56, 56), 64, (3, 3), padding=(1, 1))
SMALL = Conv(512, (7, 7), 512, (3, 3), padding=(1, 1))


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_names(device: str, card: str) -> None:
    assert gpu_specs.named(device).name == card


def test_an_unknown_card_is_taken_for_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert gpu_specs._card("NVIDIA Z9").name == "A100"
    assert "NVIDIA Z9 is not listed" in caplog.text


def test_work() -> None:
    explicit = planner.gpu_work(LARGE, "explicit")
    assert explicit.flops == 2 * 64 * 576 * 56 * 56
    assert explicit.bytes == 4 * 2 * 64 * 56 * 56
    assert planner.gpu_work(LARGE, "explicit", cotangents=3).flops == 3 * explicit.flops
    tokens = planner.gpu_work(Conv(96, (1, 64), 128), "gram", cotangents=2)  # 3 of 4 tiles of 32 x 32
    assert (tokens.flops, tokens.sum_flops) == (2 * 3 * 32**2 * 96, 2 * 2 * 3 * 32**2 * 128)
    depthwise = planner.gpu_work(Conv(64, (10, 10), 64, (3, 3), padding=(1, 1), groups=64), "explicit")
    assert (depthwise.flops, depthwise.sum_flops) == (0, 2 * 64 * 9 * 100)
    strided = Conv(16, (56, 56), 32, (3, 3), (4, 4), (1, 1))
    assert planner.gpu_work(strided, "gram").bytes == planner.gpu_work(strided, "explicit").bytes  # K from the patches


def test_limits() -> None:
    card = gpu_specs.named("A100")
    assert card.seconds(gpu_specs.GpuWork(19.5e12, 0, 0), "float32") == 1
    assert card.seconds(gpu_specs.GpuWork(312e12, 19.5e12, 1), "half") == 2  # sums are multiplied exactly
    assert card.seconds(gpu_specs.GpuWork(0, 0, 2039e9), "tf32") == 1


def test_either_setting_allows_tf32(tf32_by_backend: None) -> None:
    assert gpu_specs.rate_of(torch.float32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert gpu_specs.rate_of(torch.float32) == "float32"
    for precision, rate in {"high": "tf32", "medium": "tf32", "highest": "float32"}.items():
        torch.set_float32_matmul_precision(precision)
        assert gpu_specs.rate_of(torch.float32) == rate


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        """The attributes of a CUDA tensor that the planner reads."""

        is_cuda, dtype, device = True, torch.float32, torch.device("cuda")

        def element_size(self) -> int:
            return 4

    planner.best_on_gpu.cache_clear()
    monkeypatch.setattr(gpu_estimates, "rates", lambda device: gpu_estimates.estimates(gpu_specs.named("H100")))
    monkeypatch.setattr(dispatch, "gpu_backend", lambda: "triton")
    assert planner.choose(LARGE, Cuda()) == "explicit"
    assert planner.choose(SMALL, Cuda()) == "gram"
    assert planner.choose(SMALL, Cuda(), elementwise=True) == "explicit"
    rate = gpu_estimates.estimates(gpu_specs.named("H100")).products["triton", "float32", "explicit"]
    assert planner.predict(LARGE, Cuda(), "explicit") == pytest.approx(2 * 64 * 576 * 56 * 56 / rate / 1e12)
    assert rate < 67  # the published rate
    monkeypatch.setattr(dispatch, "gpu_backend", lambda: "reference")
    assert planner.choose(SMALL, Cuda()) == "explicit"
    assert planner.predict(SMALL, Cuda(), "gram") is None
    planner.best_on_gpu.cache_clear()
