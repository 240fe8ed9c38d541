"""Rates of GPU kernels on pretended cards: measured, kept, estimated, and what follows from them."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from t2v_fast import ops
from t2v_fast.ops import dispatch, gpu_estimates, gpu_rates, gpu_specs, planner, primitives
from t2v_fast.ops.planner import Conv

CARD = "NVIDIA H100 80GB HBM3"
DEVICE = torch.device("meta")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A card for which nothing has been measured, and on which both backends can run."""
    monkeypatch.setenv("T2V_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status = {name: "available" for name in ops.BACKENDS if name != "auto"}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    monkeypatch.setattr(dispatch, "_missing_on_gpu", lambda backend: None)
    monkeypatch.setattr(dispatch, "gpu_backend", lambda: "cuda")
    caches = (gpu_estimates._rates, planner.best_on_gpu)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def pretend(truth: gpu_estimates.Rates, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], float]:
    """Let the ops take the time that they have at the rates of ``truth``; nothing is computed."""

    def sq_conv(x, g, kernel, stride, padding, dilation, groups, path):
        conv = Conv(x.shape[1], tuple(x.shape[2:]), g.shape[1], kernel, stride, padding, dilation, groups)
        work = planner.gpu_work(conv, path, x.element_size())
        kind, backend = gpu_specs.rate_of(x.dtype), dispatch._backend.get()
        return len(x) * truth.seconds(work, backend, kind, path)

    def sq_norm(g, x):
        return 2 * x.numel() * 4 / truth.bandwidth / 1e9

    monkeypatch.setattr(primitives, "sq_conv", sq_conv)
    monkeypatch.setattr(primitives, "sq_norm", sq_norm)
    return lambda run: run()


def fast_cuda() -> gpu_estimates.Rates:
    """Other rates than the estimates: CUDA leads in every kind. Bandwidth never binds."""
    estimated = gpu_estimates.estimates(gpu_specs.named("H100"))
    products = {k: v * (5 if k[0] == "cuda" else 0.5) for k, v in estimated.products.items()}
    return gpu_estimates.Rates(products, 1e6, True)


def test_estimates_are_below_the_published_rates() -> None:
    for card in gpu_specs.CARDS:
        found = gpu_estimates.estimates(card)
        assert not found.measured
        assert found.bandwidth < card.bandwidth
        assert {key[:2] for key in found.products} == {
            (b, k) for b in gpu_estimates.BACKENDS for k in gpu_estimates.KINDS
        }
        assert all(0 < rate < 0.7 * getattr(card, key[1]) for key, rate in found.products.items())


def test_measured_rates_are_found_again(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = fast_cuda()
    assert not gpu_rates.rates(DEVICE).measured
    precision = torch.get_float32_matmul_precision()
    measured = gpu_rates.measure(DEVICE, pretend(truth, monkeypatch))
    assert torch.get_float32_matmul_precision() == precision
    for key, rate in truth.products.items():
        want = rate if key[1] != "float64" else gpu_estimates.estimates(gpu_specs.named("H100")).products[key]
        assert measured.products[key] == pytest.approx(want, rel=1e-6), key
    assert measured.bandwidth == pytest.approx(1e6)
    (file,) = card.iterdir()
    assert json.loads(file.read_text())["key"]["card"] == CARD
    kept = gpu_rates.rates(DEVICE)
    assert kept == measured
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert not gpu_rates.rates(DEVICE).measured  # another card has a file of its own


def test_the_planner_and_the_backend_follow_the_rates(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        is_cuda, dtype, device = True, torch.bfloat16, DEVICE

        def element_size(self) -> int:
            return 2

    conv = Conv(768, (1, 197), 3072)
    assert dispatch.backend_for(Cuda(), "explicit") == "triton"  # which leads in half precision on an H200
    assert dispatch.backend_for(Cuda(), "gram") == "cuda"
    Cuda.dtype = torch.float32
    assert dispatch.backend_for(Cuda(), "explicit") == "cuda"
    Cuda.dtype = torch.bfloat16
    assert planner.choose(conv, Cuda()) == "gram"
    truth = fast_cuda()
    slow_grams = {k: v * (1e-3 if k[2] != "explicit" else 1) for k, v in truth.products.items()}
    gpu_rates.measure(DEVICE, pretend(gpu_estimates.Rates(slow_grams, 1e6, True), monkeypatch))
    assert dispatch.backend_for(Cuda()) == "cuda"
    assert planner.choose(conv, Cuda()) == "explicit"


def test_large_layers_have_rates_of_their_own(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = fast_cuda()
    large = {k: v * (3 if k[2].startswith("large") else 1) for k, v in truth.products.items()}
    measured = gpu_rates.measure(DEVICE, pretend(gpu_estimates.Rates(large, 1e6, True), monkeypatch))
    for kernel, name in gpu_estimates.LARGE.items():
        small = measured.products["cuda", "half", kernel]
        assert measured.products["cuda", "half", name] == pytest.approx(3 * small, rel=1e-6)
    for conv, factor in ((Conv(768, (1, 197), 3072), 3), (Conv(768, (1, 197), 2304), 3), (Conv(768, (1, 197), 768), 1)):
        work = planner.gpu_work(conv, "gram", 2)
        at_small_rates = truth.seconds(work, "cuda", "half", "gram")
        assert measured.seconds(work, "cuda", "half", "gram") == pytest.approx(at_small_rates / factor, rel=1e-6)
    # Of a backend that is faster in small layers only, and slower by more in large ones.
    products = measured.products | {("triton", "half", k): 1e3 for k in ("gram", "forms")}
    products |= {("triton", "half", k): 1.0 for k in gpu_estimates.LARGE.values()}
    assert gpu_estimates.Rates(products, 1e6, True).leader("half", "gram") == "cuda"


def test_layers_count_as_the_samples_that_are_nearest() -> None:
    """From half way between the samples' sizes on, layers are large."""

    def mean(samples: tuple[Conv, ...]) -> float:
        works = [planner.gpu_work(conv, "gram", 2) for conv in samples]
        return statistics.geometric_mean(work.flops + work.sum_flops for work in works)

    means = mean(planner.GRAM_SAMPLES), mean(planner.LARGE_GRAM_SAMPLES)
    assert pytest.approx(statistics.geometric_mean(means), rel=0.01) == gpu_estimates.LARGE_FLOPS


def test_rates_of_an_earlier_measurement_are_not_read(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(gpu_estimates, "MEASUREMENT", "1")
        gpu_rates.measure(DEVICE, pretend(fast_cuda(), earlier))
        assert gpu_rates.rates(DEVICE).measured
    gpu_estimates._rates.cache_clear()
    assert not gpu_rates.rates(DEVICE).measured


def test_images_stay_with_the_extension(card: Path) -> None:
    x, g = torch.ones(1, 3, 4, 4, dtype=torch.bfloat16), torch.ones(1, 8, 4, 4, dtype=torch.bfloat16)
    out = torch.zeros(8, 3, 3, 3)
    assert not dispatch._runs_triton("sq_conv", (x, g, "explicit"))
    assert not dispatch._runs_triton("sq_conv_acc_", (out, x, g))
    assert dispatch._runs_triton("sq_conv", (g, g, "explicit"))
    assert dispatch._runs_triton("sq_conv_acc_", (out, g, g))  # the accumulator's type does not count
    assert not dispatch._runs_triton("sq_conv", (g.float(), g.float(), "explicit"))

    class Traced(torch.Tensor):
        pass

    assert not dispatch._runs_triton("sq_conv", (g.as_subclass(Traced), g, "explicit"))


def test_each_path_runs_on_the_backend_that_leads_there(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the planner compares the paths so. What memory bounds stays with the extension, if there is one."""
    products = dict.fromkeys(fast_cuda().products, 1.0)
    products |= {("triton", "half", "explicit"): 8.0, ("cuda", "half", "gram"): 2.0, ("cuda", "half", "forms"): 2.0}
    rates = gpu_estimates.Rates(products, 1e6, True)
    monkeypatch.setattr(gpu_estimates, "rates", lambda device: rates)
    x, g = torch.ones(2, 5, 8, dtype=torch.bfloat16), torch.ones(2, 5, 4, dtype=torch.bfloat16)
    gram, image, geometry = torch.ones(2, 1, 5, 5), torch.ones(2, 8, 4, 4, dtype=torch.bfloat16), ((1, 1), (0, 0), 1)
    for name, args, triton in (
        ("sq_outer", (x, g, "explicit"), True),
        ("sq_outer", (x, g, "gram"), False),
        ("sq_linear", (x, g, None), False),
        ("sq_gram", (gram, image), False),
        ("conv_gram", (image, (1, 1), *geometry), False),
        ("sq_conv", (image, image, (1, 1), *geometry, "winograd"), True),  # which GPUs run as "explicit"
        ("sq_conv_acc_", (torch.ones(8, 8, 1, 1), image, image, torch.ones(2), *geometry, "explicit"), True),
        ("sq_norm", (g, g, None, None), False),
        ("sq_scatter", (torch.zeros(2, 5, dtype=torch.long), g, 3), False),
    ):
        assert dispatch._runs_triton(name, args) == triton, name
    monkeypatch.setattr(dispatch, "gpu_backend", lambda: "triton")  # the extension has no CUDA kernels
    assert dispatch._runs_triton("sq_norm", (g, g, None, None))
    assert dispatch._runs_triton("sq_outer", (x, g, "gram"))
    conv = Conv(64, (1, 64), 64)
    works = {path: planner.gpu_work(conv, path, 2) for path in ("explicit", "gram")}
    want = min(works, key=lambda p: rates.seconds(works[p], "triton" if p == "explicit" else "cuda", "half", p))
    assert planner.best_on_gpu(conv, DEVICE, 2, ("triton", "cuda"), "half", 1, False) == want
    assert planner.best_on_gpu(conv, DEVICE, 2, ("cuda", "cuda"), "half", 1, False) == "gram" != want


def test_a_backend_that_cannot_run_keeps_its_estimates(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = dispatch.backend_status() | {"triton": "Triton's kernels did not load"}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    measured = gpu_rates.measure(DEVICE, pretend(fast_cuda(), monkeypatch))
    estimated = gpu_estimates.estimates(gpu_specs.named("H100"))
    for key, rate in measured.products.items():
        assert (rate == estimated.products[key]) == (key[0] == "triton" or key[1] == "float64"), key


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1, "products": {"a": -1}, "bandwidth": 1}'])
def test_a_broken_file_gives_estimates(card: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    gpu_estimates.rates_file(CARD).write_text(text)
    with caplog.at_level(logging.WARNING):
        found = gpu_rates.rates(DEVICE)
    assert not found.measured
    assert "estimates" in caplog.text or '"key"' in text


def test_a_failure_leaves_the_setting_and_no_file(card: Path) -> None:
    precision = torch.get_float32_matmul_precision()

    def fails(run: Callable[[], object]) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_rates.measure(DEVICE, fails)
    assert torch.get_float32_matmul_precision() == precision
    assert list(card.iterdir()) == []


def test_times_are_of_products_or_of_memory() -> None:
    found = gpu_estimates.estimates(gpu_specs.named("H100"))
    rate = found.products["cuda", "half", "gram"] * 1e12
    forms = found.products["cuda", "half", "forms"] * 1e12
    assert found.seconds(gpu_specs.GpuWork(rate, forms, 0), "cuda", "half", "gram") == pytest.approx(2)
    assert found.seconds(gpu_specs.GpuWork(1, 1, 1e9 * found.bandwidth), "cuda", "half", "gram") == pytest.approx(1)
