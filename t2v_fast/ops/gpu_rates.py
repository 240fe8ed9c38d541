"""Measuring the rates that the GPU kernels achieve on a card.

:func:`measure` times a handful of layers, takes some seconds, and keeps the rates in the folder of measured costs
(``$T2V_FAST_CACHE``, or ``~/.cache/t2v_fast``). :func:`rates` returns them, or estimates for a card without any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from . import dispatch, gpu_specs, planner, primitives
from .gpu_estimates import BACKENDS, LARGE, Rates, _rates, estimates, rates, rates_file, rates_key
from .gpu_specs import GpuWork

__all__ = ["measure", "rates"]

log = logging.getLogger(__name__)

BATCH, LARGE_BATCH = 32, 64  # examples with which layers are timed, and large layers


def let_the_host_run_ahead() -> None:
    """Keep the device busy for some two milliseconds, so that the gaps between launches are not timed."""
    torch.cuda._sleep(4_000_000)


def by_events(run: Callable[[], object], repeats: int = 5) -> float:
    """The median seconds of a call by CUDA events, after two calls that warm up and compile."""
    times = []
    for repeat in range(repeats + 2):
        let_the_host_run_ahead()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))


def measure(
    device: torch.device | str = "cuda", seconds_of: Callable[[Callable[[], object]], float] = by_events
) -> Rates:
    """Measure the rates of a device, and keep them for the planner.

    Takes about ten seconds, most of them for compiling Triton kernels. Half precision is measured with bfloat16. Exact
    float32 and TF32 are measured whatever torch's setting is. float64 is not measured.

    Args:
        device: A CUDA device.
        seconds_of: Returns the seconds that a call takes on the device.

    Returns:
        The measured rates. Backends that cannot run keep their estimates.
    """
    device = torch.device(device)
    name, estimated = torch.cuda.get_device_name(device), estimates(gpu_specs.card_of(device))
    products: dict[tuple[str, str, str], float] = {}
    before = "high" if gpu_specs.allows_tf32() else "highest"
    try:
        for kind, dtype, precision in (
            ("half", torch.bfloat16, "highest"),
            ("tf32", torch.float32, "high"),
            ("float32", torch.float32, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            for backend in BACKENDS:
                if dispatch.backend_status()[backend] != "available":
                    continue

                def seconds(
                    conv: planner.Conv, path: str, batch: int, dtype: torch.dtype = dtype, backend: str = backend
                ) -> tuple[GpuWork, float]:
                    x = _images(batch, conv.channels, conv.size, dtype, device)
                    g = _images(batch, conv.filters, conv.out_size, dtype, device)
                    with dispatch.use_backend(backend):
                        spent = seconds_of(lambda: primitives.sq_conv(x, g, *conv.arguments, path))
                    return planner.gpu_work(conv, path, x.element_size()), spent / batch

                total = [seconds(conv, "explicit", BATCH) for conv in planner.EXPLICIT_SAMPLES]
                flops = sum(work.flops for work, _ in total)
                products[backend, kind, "explicit"] = flops / sum(spent for _, spent in total) / 1e12
                for names, samples, batch in (
                    (tuple(LARGE), planner.GRAM_SAMPLES, BATCH),
                    (tuple(LARGE.values()), planner.LARGE_GRAM_SAMPLES, LARGE_BATCH),
                ):
                    grams = [seconds(conv, "gram", batch) for conv in samples]
                    counts = np.array([(work.flops, work.sum_flops) for work, _ in grams])
                    units = planner.fit(counts, np.array([spent for _, spent in grams]))
                    # A cost of zero says that the samples cannot tell: then both kinds of product share the time.
                    together = counts.sum() / sum(spent for _, spent in grams)
                    for kernel, unit in zip(names, units, strict=True):
                        products[backend, kind, kernel] = float(1 / unit if unit and units.all() else together) / 1e12
        bandwidth = _bandwidth(device, seconds_of)
    finally:
        torch.set_float32_matmul_precision(before)
    found = Rates({**estimated.products, **products}, bandwidth, measured=True)
    text = {"key": rates_key(name), "products": {", ".join(k): v for k, v in products.items()}, "bandwidth": bandwidth}
    path = rates_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(text, indent=1).encode())
    except OSError as error:
        log.warning("the measured rates cannot be kept in %s (%s): the planner uses estimates", path, error)
    _rates.cache_clear()
    planner.best_on_gpu.cache_clear()
    return found


def _images(n: int, channels: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    own = torch.Generator().manual_seed(0)  # the user's generators stay as they are
    images = torch.randn(n, channels, *size, generator=own)
    return images.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _bandwidth(device: torch.device, seconds_of: Callable[[Callable[[], object]], float]) -> float:
    """GB/s at which a norm's sums are computed from an input and a cotangent that do not fit the caches."""
    x, g = (torch.ones(64, 3136, 256, device=device) for _ in range(2))
    return 2 * x.numel() * x.element_size() / seconds_of(lambda: primitives.sq_norm(g, x)) / 1e9
