"""The choice of a path for each layer, by a cost model whose unit costs are measured once on each machine.

Every path of ``sq_conv`` does a known amount of work (:func:`work`): multiply-adds of whole vectors, results that are
squared or stored, and elements that are moved. The cost of a unit of each is fitted to a short measurement
(:func:`calibrate`, about a second) and kept in a file. :func:`choose` returns the path with the least predicted time. A
linear layer over S tokens counts as a 1x1 convolution of an image of S pixels.

The file is in ``$T2V_FAST_CACHE``, or in ``~/.cache/t2v_fast``. Deleting the file repeats the measurement.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import itertools
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..files import write_atomically
from . import dispatch, gpu_estimates, gpu_specs, primitives
from .cache import cache_folder
from .checks import CONV_PATHS
from .geometry import conv_output_size, gram_by_pixels, winograd_fits

log = logging.getLogger(__name__)

Pair = tuple[int, int]
LARGEST_GRAM = 1 << 20  # most elements of a Gram matrix that fit the cache of a core


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution, or of a linear layer over tokens."""

    channels: int
    size: Pair
    filters: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def out_size(self) -> Pair:
        size = conv_output_size(self.size, self.kernel_size, self.stride, self.padding, self.dilation)
        return cast(Pair, tuple(size))

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels > 1

    @property
    def arguments(self) -> tuple[Pair, Pair, Pair, Pair, int]:
        """The arguments of :func:`t2v_fast.ops.sq_conv` after ``x`` and ``g``."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    @property
    def gram_numel(self) -> int:
        """Number of elements in the Gram matrices of one example."""
        return self.groups * math.prod(self.out_size) ** 2

    def paths(self, elementwise: bool = False) -> tuple[str, ...]:
        """The paths that can compute this layer's sums over filters, or its elementwise squares."""
        if self.depthwise:
            return ("explicit",)
        paths = ["explicit"]
        if not elementwise and math.prod(self.size) ** 2 <= LARGEST_GRAM:
            paths.append("gram")
        if winograd_fits(self.kernel_size, self.stride, self.dilation, self.groups):
            paths.append("winograd")
        return tuple(paths)


# Up to this number of positions, the CPU kernels evaluate quadratic forms column by column, at a different unit cost.
FEW_POSITIONS = dispatch.few_positions()


@dataclass(frozen=True)
class Work:
    """The work of one path for one example, in units of the cost model and as flops and bytes.

    The cost model predicts a time from the counts in ``once`` (the work for an example) and ``each`` (the work for each
    of its cotangents); the unit of each entry has one cost on a machine. Reports of throughput need ``flops`` (2 for
    each multiply-add) and ``bytes`` (the least that the path reads and writes, in the inputs' dtype) for the whole
    example. Both describe the same work, so they are computed together. Work that is only reported, because there is no
    choice of a path, leaves ``once`` and ``each`` empty.
    """

    once: tuple[float, ...]
    each: tuple[float, ...]
    flops: float
    bytes: float


def work(conv: Conv, path: str, itemsize: int = 4, cotangents: int = 1, width: int = 16) -> Work:
    """The work of one path. ``width`` is the number of elements in a vector."""
    c, o, groups = conv.channels, conv.filters, conv.groups
    (h, w), (ho, wo), (kh, kw) = conv.size, conv.out_size, conv.kernel_size
    positions, pixels = ho * wo, h * w
    moved = itemsize * (c * pixels + cotangents * o * positions)
    each: tuple[float, ...]

    def vectors(count: int) -> int:
        return -(-count // width)

    if path == "explicit" and conv.depthwise:
        results = kh * kw * vectors(c) * (o // c)
        return Work(
            (0, 0, c * pixels, 1),
            (results * positions, results, o * positions, 0),
            2.0 * o * kh * kw * positions,
            moved,
        )
    if path == "explicit":
        whole_rows = groups == 1 and conv.dilation[1] == 1  # a kernel row and its channels are contiguous
        columns = kh * vectors(kw * c) if whole_rows else kh * kw * vectors(c // groups)
        padded = ((ho - 1) * conv.stride[0] + (kh - 1) * conv.dilation[0] + 1) * (
            (wo - 1) * conv.stride[1] + (kw - 1) * conv.dilation[1] + 1
        )
        flops = 2.0 * o * (c // groups) * kh * kw * positions * cotangents
        return Work((0, 0, c * padded, 1), (o * columns * positions, o * columns, o * positions, 0), flops, moved)
    if path == "winograd":
        tiles = math.ceil(ho / 4) * math.ceil(wo / 4)
        flops = 72.0 * tiles * o * c * cotangents
        each = (36 * tiles * o * vectors(c), 36 * o * vectors(c), 36 * tiles * vectors(o), 0)
        return Work((0, 0, 36 * tiles * vectors(c), 1), each, flops, moved)
    patches = conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.stride != (1, 1)
    shifts = ((ho * w) ** 2 * kh + positions**2 * kw) / 2 * groups if patches else 0
    flops = pixels**2 * c + 2 * shifts + cotangents * o * positions**2
    once = (pixels**2 / width * c / 2, shifts, 0, 0, c * pixels, 1)
    forms = positions**2 / width * o / 2
    each = (0, 0, forms, 0, 0, 0) if positions <= FEW_POSITIONS else (0, 0, 0, forms, o * positions, 0)
    return Work(once, each, float(flops), moved)


def gpu_work(conv: Conv, path: str, itemsize: int = 4, cotangents: int = 1) -> gpu_specs.GpuWork:
    """The work of one path for one example in the GPU kernels: whole tiles, and Gram tiles that stay on the chip."""
    tile = 32
    c, o = conv.channels // conv.groups, conv.filters // conv.groups
    positions, pixels, taps = math.prod(conv.out_size), math.prod(conv.size), math.prod(conv.kernel_size)
    moved = itemsize * (conv.channels * pixels + cotangents * conv.filters * positions)
    if conv.depthwise:
        return gpu_specs.GpuWork(0.0, 2.0 * cotangents * conv.filters * taps * positions, moved)

    def whole(n: int) -> int:
        return -(-n // tile) * tile

    if path == "explicit":
        return gpu_specs.GpuWork(2.0 * cotangents * conv.groups * whole(o) * whole(c * taps) * positions, 0.0, moved)

    def half(n: int) -> int:  # entries in one half of a symmetric matrix, in whole tiles
        tiles = whole(n) // tile
        return tiles * (tiles + 1) // 2 * tile**2

    forms = 2.0 * cotangents * whole(o) * half(positions)
    if taps == 1 and pixels == positions:
        return gpu_specs.GpuWork(2.0 * conv.groups * half(positions) * whole(c), conv.groups * forms, moved)
    if gram_by_pixels(pixels, positions, c, taps):
        workspace = 4 * (pixels**2 + taps * half(positions))  # the pixels' matrix, and what is gathered from it
        by_pixels = 2.0 * half(pixels) * whole(c)
        return gpu_specs.GpuWork(conv.groups * by_pixels, conv.groups * forms, moved + conv.groups * workspace)
    direct = 2.0 * half(positions) * whole(c * taps)
    return gpu_specs.GpuWork(conv.groups * direct, conv.groups * forms, moved)


# Geometries on which the unit costs are measured. Each kind of work dominates in some of them.
_SAMPLES = {
    "explicit": (
        Conv(64, (28, 28), 64, (3, 3), padding=(1, 1)),
        Conv(128, (14, 14), 128, (3, 3), padding=(1, 1)),
        Conv(256, (7, 7), 128, (3, 3), padding=(1, 1)),
        Conv(256, (2, 2), 256, (3, 3), padding=(1, 1)),
        Conv(3, (64, 64), 32, (7, 7), (2, 2), (3, 3)),
        Conv(64, (28, 28), 128),
        Conv(256, (8, 8), 512),
        Conv(32, (40, 40), 16),
        Conv(96, (3, 3), 24),
    ),
    "winograd": (
        Conv(64, (28, 28), 64, (3, 3), padding=(1, 1)),
        Conv(64, (12, 12), 128, (3, 3), padding=(1, 1)),
        Conv(128, (14, 14), 128, (3, 3), padding=(1, 1)),
        Conv(256, (4, 4), 128, (3, 3), padding=(1, 1)),
        Conv(32, (40, 40), 16, (3, 3), padding=(1, 1)),
    ),
    "gram": (
        Conv(64, (16, 16), 64, (3, 3), padding=(1, 1)),
        Conv(256, (8, 8), 256, (3, 3), padding=(1, 1)),
        Conv(256, (14, 14), 64),
        Conv(32, (14, 14), 512),
        Conv(512, (4, 4), 512),
        Conv(768, (7, 7), 768),
        Conv(64, (8, 8), 64, (3, 3), (2, 2), (1, 1)),
        Conv(64, (3, 3), 32, (3, 3), padding=(1, 1)),
        Conv(16, (20, 20), 16, (3, 3), padding=(1, 1)),
        Conv(256, (24, 24), 128, (3, 3), (2, 2), (1, 1)),
        Conv(64, (8, 8), 256),
    ),
    "depthwise": (
        Conv(96, (28, 28), 96, (3, 3), padding=(1, 1), groups=96),
        Conv(96, (14, 14), 96, (7, 7), padding=(3, 3), groups=96),
        Conv(384, (7, 7), 384, (3, 3), padding=(1, 1), groups=384),
        Conv(384, (14, 14), 384, (3, 3), (2, 2), padding=(1, 1), groups=384),
        Conv(64, (3, 3), 64, (3, 3), padding=(1, 1), groups=64),
    ),
}


# Geometries on which gpu_rates.measure() times the explicit path; and the Gram path, with more products of inputs or
# more forms. Large layers keep a card busier: those of a ViT-B/16 have rates of their own.
EXPLICIT_SAMPLES = (
    Conv(64, (56, 56), 64, (3, 3), padding=(1, 1)),
    Conv(128, (28, 28), 128, (3, 3), padding=(1, 1)),
    Conv(512, (14, 14), 256),
)
GRAM_SAMPLES = (Conv(3072, (1, 192), 256), Conv(256, (1, 192), 3072), Conv(768, (1, 192), 768))
LARGE_GRAM_SAMPLES = (Conv(768, (1, 197), 3072), Conv(3072, (1, 197), 768))


def _kernel(conv: Conv, path: str) -> str:
    return "depthwise" if conv.depthwise else path


@dataclass(frozen=True)
class Costs:
    """Seconds for each unit of :class:`Work` on one machine, by kernel."""

    width: int
    seconds: Mapping[str, tuple[float, ...]]

    def predict(self, conv: Conv, path: str, cotangents: int = 1) -> float:
        """Predict the seconds for one example on one thread."""
        todo = work(conv, path, cotangents=cotangents, width=self.width)
        unit = self.seconds[_kernel(conv, path)]
        return sum(s * (a + cotangents * b) for s, a, b in zip(unit, todo.once, todo.each, strict=True))

    def best(self, conv: Conv, cotangents: int = 1, elementwise: bool = False) -> str:
        """Return the path with the least predicted time."""
        return min(conv.paths(elementwise), key=lambda path: self.predict(conv, path, cotangents))


def calibrate(dtype: torch.dtype = torch.float32, repeats: int = 5) -> Costs:
    """Measure the unit costs of the compiled kernels for ``dtype``, on one thread.

    A measured batch has enough examples that their operands don't stay in the innermost caches, as in a network. One
    thread is used because several threads wait for whichever has lost its processor, so their time would depend on the
    load of the machine.
    """
    width = dispatch.vector_width(dtype)
    seconds = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, g = (_images(1, 64, (28, 28), torch.float32) for _ in range(2))
        for _ in range(20):  # an idle processor needs some milliseconds to reach its full clock rate
            primitives.sq_conv(x, g, (3, 3), (1, 1), (1, 1), (1, 1), 1, "explicit")
        for kernel, samples in _SAMPLES.items():
            counts, times = [], []
            for conv in samples:
                path = "explicit" if kernel == "depthwise" else kernel
                elements = conv.channels * math.prod(conv.size) + conv.filters * math.prod(conv.out_size)
                n = max(1, min(64, (1 << 19) // elements))
                x = _images(n, conv.channels, conv.size, dtype)
                g = _images(n, conv.filters, conv.out_size, dtype)
                run = functools.partial(primitives.sq_conv, x, g, *conv.arguments, path)
                times.append(fastest(run, repeats) / n)
                todo = work(conv, path, width=width)
                counts.append(np.add(todo.once, todo.each))
            seconds[kernel] = tuple(fit(np.array(counts), np.array(times)).tolist())
    finally:
        torch.set_num_threads(threads)
    return Costs(width, seconds)


def _images(n: int, channels: int, size: Pair, dtype: torch.dtype) -> Tensor:
    """Random images, channels-last like those that fisher() passes on a CPU. The user's generator stays as it is."""
    own = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, *size, generator=own).to(dtype).contiguous(memory_format=torch.channels_last)


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of ``repeats`` calls, after one call that is not timed."""
    run()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def fit(counts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Nonnegative costs that minimise the squared relative errors of ``counts @ costs`` against ``times``."""
    rows = counts / times[:, None]
    used = np.flatnonzero(rows.max(0))
    rows = rows[:, used] / (scale := rows[:, used].max(0))
    best, least = np.zeros(len(used)), math.inf
    for size in range(1, len(used) + 1):  # the sets of nonzero costs are few enough to try all of them
        for chosen in map(list, itertools.combinations(range(len(used)), size)):
            solution = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)[0]
            error = np.square(rows[:, chosen] @ solution - 1).sum()
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(len(used)), error
                best[chosen] = solution
    costs = np.zeros(counts.shape[1])
    costs[used] = best / scale
    return costs


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(dtype: torch.dtype) -> dict[str, str | int]:
    """Return everything that the unit costs depend on."""
    return {
        "processor": _processor(),
        "instruction_set": dispatch.cpu_capability(),
        "torch": torch.__version__,
        "build": dispatch.build_id(),
        "model": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],  # the cost model is this file
        "dtype": str(dtype).removeprefix("torch."),
    }


def costs(dtype: torch.dtype) -> Costs:
    """Return the unit costs of this machine: from memory, from the file, or measured now and written to the file."""
    return _costs(dtype, dispatch.cpu_capability())


@functools.cache
def _costs(dtype: torch.dtype, capability: str) -> Costs:
    key = machine(dtype)
    path = cache_folder() / f"costs-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    try:
        stored = json.loads(path.read_text())
        found = Costs(int(stored["width"]), {k: tuple(map(float, v)) for k, v in stored["seconds"].items()})
        if stored["machine"] == key and found.seconds.keys() == _SAMPLES.keys():
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): measuring again", path, error)
    measured = calibrate(dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": key, "width": measured.width, "seconds": measured.seconds}, indent=1)
        write_atomically(path, text.encode())
    except OSError as error:
        log.warning("the measured costs cannot be kept in %s (%s): every process measures them", path, error)
    return measured


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("t2v_fast_path", default=None)


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Use ``path`` for every layer that the path can compute, and the explicit path for the others.

    Args:
        path: One of :data:`t2v_fast.ops.CONV_PATHS`.

    Raises:
        ValueError: The path is unknown.

    Example:
        >>> import torch
        >>> from t2v_fast.ops import planner
        >>> layer = planner.Conv(channels=8, size=(6, 6), filters=4, kernel_size=(3, 3))
        >>> with planner.force("gram"):
        ...     planner.choose(layer, torch.empty(1, 8, 6, 6))
        'gram'
    """
    if path not in CONV_PATHS:
        raise ValueError(f"unknown path {path!r}: expected one of {', '.join(CONV_PATHS)}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> tuple[str | None, str]:
    """Return the path that :func:`force` sets in this context, if any, and the backend that ``use_backend`` sets."""
    return _forced.get(), dispatch.forced_backend()


@functools.cache
def _best(conv: Conv, dtype: torch.dtype, capability: str, cotangents: int, elementwise: bool) -> str:
    return _costs(dtype, capability).best(conv, cotangents, elementwise)


def _seconds_on_gpu(
    conv: Conv, device: torch.device, itemsize: int, backend: str, kind: str, path: str, k: int
) -> float:
    """The time of a path for one example with ``k`` cotangents."""
    return gpu_estimates.rates(device).seconds(gpu_work(conv, path, itemsize, k), backend, kind, path)


@functools.cache
def best_on_gpu(
    conv: Conv,
    device: torch.device,
    itemsize: int,
    backends: tuple[str, str],
    kind: str,
    cotangents: int,
    elementwise: bool,
) -> str:
    """The path that takes the least time on a device; cached until the device's rates are measured.

    ``backends`` are those of the explicit path and of the Gram path.
    """
    by_path = dict(zip(("explicit", "gram"), backends, strict=True))  # GPUs run "winograd" as "explicit"
    paths = [path for path in conv.paths(elementwise) if path in by_path]
    return min(paths, key=lambda path: _seconds_on_gpu(conv, device, itemsize, by_path[path], kind, path, cotangents))


def choose(conv: Conv, x: Tensor, cotangents: int = 1, elementwise: bool = False) -> str:
    """Choose the path for a layer.

    Args:
        conv: The geometry of the layer.
        x: Input of the layer, which tells the device and the dtype.
        cotangents: Number of cotangents of each example that the caller will pass.
        elementwise: Whether squares of single parameters are computed instead of sums over filters.

    Returns:
        ``"explicit"``, ``"gram"`` or ``"winograd"``.
    """
    if (forced := _forced.get()) is not None:
        return forced if forced in conv.paths(elementwise) else "explicit"
    if x.is_cuda and dispatch.backend_for(x) != "reference":
        kind = gpu_specs.rate_of(x.dtype)
        backends = dispatch.backend_for(x, "explicit"), dispatch.backend_for(x, "gram")
        return best_on_gpu(conv, x.device, x.element_size(), backends, kind, cotangents, elementwise)
    if not dispatch.uses_cpu_extension(x):
        return "explicit"  # the reference ops have one path only
    return _best(conv, x.dtype, dispatch.cpu_capability(), cotangents, elementwise)


def predict(conv: Conv, x: Tensor, path: str, cotangents: int = 1) -> float | None:
    """Predict the seconds for one example, or return None for the reference ops.

    On a CPU the prediction is for all threads, each of which computes examples of its own.
    """
    if x.is_cuda and dispatch.backend_for(x) != "reference":
        path, kind = "explicit" if path == "winograd" else path, gpu_specs.rate_of(x.dtype)
        backend = dispatch.backend_for(x, path)
        return _seconds_on_gpu(conv, x.device, x.element_size(), backend, kind, path, cotangents)
    if not dispatch.uses_cpu_extension(x):
        return None
    return costs(x.dtype).predict(conv, path, cotangents) / torch.get_num_threads()


def explanation(calls: Iterable[tuple[str, str, float | None, float]]) -> Table:
    """Return a table of calls and their totals.

    A call is (parameter, path, predicted seconds or None, measured seconds). Norms and biases, which are read once
    (path ``"pass"``), are left out. The total of the measured times has the calls with a prediction, as the total of
    the predicted ones; the calls without one have a row each.
    """
    table = Table("parameter", "path", show_footer=True)
    calls = [call for call in calls if call[1] != "pass"]
    known = [(predicted, measured) for _, _, predicted, measured in calls if predicted is not None]
    for title, total in (
        ("predicted ms", sum(predicted for predicted, _ in known)),
        ("measured ms", sum(measured for _, measured in known)),
    ):
        table.add_column(title, footer=f"{1e3 * total:.2f}", justify="right")
    for name, path, predicted, measured in calls:
        table.add_row(Text(name), path, "" if predicted is None else f"{1e3 * predicted:.2f}", f"{1e3 * measured:.2f}")
    return table
