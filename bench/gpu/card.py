"""Precisions, and the times of the device and of the host. Also what stands in for a card in a rehearsal."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from t2v_fast import ops
from t2v_fast.ops import gpu_rates, gpu_specs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = {"bfloat16": torch.bfloat16, "TF32": torch.float32, "float32": torch.float32}  # what products are made of


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Multiply float32 in TF32 or exactly, in matrix products and in cuDNN's convolutions alike."""
    matrices, convolutions = gpu_specs.allows_tf32(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if kind == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "TF32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if matrices else "highest")
        torch.backends.cudnn.allow_tf32 = convolutions


def backends(device: torch.device) -> list[str]:
    """The backends of the ops that run on a device; in a rehearsal one, so that no extension is needed."""
    status = ops.backend_status()
    if device.type == "cuda":
        return [name for name in ("cuda", "triton") if status[name] == "available"]
    return ["cpu" if status["cpu"] == "available" else "reference"]


def seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """The device's median time of a call, after three calls that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        gpu_rates.let_the_host_run_ahead()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def apart(run: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """The times of a call in milliseconds, with the device and the host apart, and the peak memory.

    ``ms`` is the time of one of many calls in a row, so that it is the longer of the two. ``host`` is the time until a
    call returns to a host whose device is idle. ``busy`` sums up the kernels' times.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    host = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    found = {"ms": start.elapsed_time(end) / repeats, "host": 1e3 * statistics.median(host)}
    found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found | {"busy": busy(run)}


def busy(run: Callable[[], object]) -> float:
    """The sum of the times of the kernels of one call in milliseconds; on a CPU, of its operators."""
    return sum(_kernels(run).values())


def longest(run: Callable[[], object], count: int) -> dict[str, float]:
    """The kernels of one call that take longest, and the rest: milliseconds by how often each ran and its name."""
    found = sorted(_kernels(run).items(), key=lambda item: -item[1])
    return dict(found[:count]) | {"the rest": sum(spent for _, spent in found[count:])}


def _kernels(run: Callable[[], object]) -> dict[str, float]:
    on_gpu = torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities() and torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        name = f"{event.count} x {event.key[:100]}"
        found[name] = found.get(name, 0.0) + getattr(event, field) / 1e3
    return found


@contextmanager
def messages_of(name: str) -> Iterator[list[str]]:
    """Collect the messages of a logger."""
    logger, messages, handler = logging.getLogger(name), [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def rotated(make: Callable[[], tuple[Tensor, ...]], least: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield copies of some inputs in turn, of ``least`` bytes in all, so that they do not stay in the cache."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    copies = [first, *(make() for _ in range(min(31, least // size)))]
    while True:
        yield from copies


# ---- a rehearsal


class _Event:
    def __init__(self, **options: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Graph:
    """A graph that captured nothing: the call itself gives the result."""

    def replay(self) -> None:
        pass


@contextmanager
def rehearsing() -> Iterator[None]:
    """Let the functions of ``torch.cuda`` that the scripts call run on a machine without a GPU."""
    stand_ins: dict[str, Any] = {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "set_sync_debug_mode": lambda mode: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "a rehearsal on a CPU",
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield
