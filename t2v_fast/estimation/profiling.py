"""Measure where the time of a Fisher goes: layer by layer, against the network alone and against the machine.

::

    report = profile(model, images)
    print(report)  # a table
    report.save_json("profile.json")
    report.save_trace("trace.json")
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import io
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..files import write_atomically
from ..gradients.factors import Factors
from ..gradients.graph import Use, backpropagate
from ..gradients.recorder import FisherRecorder, ParameterFilter
from ..gradients.refusals import taps_of
from ..ops import planner
from .cotangents import check_estimator, cotangents
from .likelihoods import Likelihood

MIB = 2**20


@dataclass(frozen=True)
class LayerProfile:
    """The cost of one parameter in the Fisher of a batch."""

    parameter: str
    node: str  # the name of the autograd node
    path: str  # explicit, gram or winograd; "pass" for norms and biases, whose operands are read once
    flops: float  # for the batch, on the path taken
    bytes: float  # the fewest that have to be moved
    seconds: float  # median over the rounds
    predicted: float | None  # seconds by the planner, on all threads; None where there is no choice


@dataclass(frozen=True)
class Machine:
    """Measured rates of all threads: of a large matrix product, and of a copy larger than the caches."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Profile:
    """The result of :func:`profile`. Times are medians in seconds for one batch.

    Memory is in bytes, above what was in use before.
    """

    examples: int
    cotangents: int
    dtype: str
    threads: int
    estimator: str
    layers: tuple[LayerProfile, ...]
    forward: float
    backward: float  # all backward passes, with the Fisher's ops
    fisher: float  # forward, cotangents and all backward passes
    floor: float  # forward and as many backward passes, without weight gradients
    step: float  # forward and one full backward pass
    peak_memory: dict[str, int | None]  # for "fisher" and "step"; None where it cannot be measured
    machine: Machine
    events: tuple[tuple[str, str, float, float], ...] = field(repr=False)  # of one batch: (name, kind, start, end)

    @property
    def images_per_second(self) -> float:
        """The examples of the batch divided by the time of its Fisher."""
        return self.examples / self.fisher

    def totals(self) -> dict[str, float | None]:
        """Return the rate, and the ratios of times and of peak memory. None where memory cannot be measured."""
        memory, step = self.peak_memory["fisher"], self.peak_memory["step"]
        return {
            "images_per_second": self.images_per_second,
            "fisher_over_floor": self.fisher / self.floor,
            "fisher_over_step": self.fisher / self.step,
            "peak_memory_over_step": None if memory is None or not step else memory / step,
        }

    def _share(self, layer: LayerProfile) -> float:
        """Return the layer's rate relative to what the machine allows at the layer's flops per byte."""
        attainable = max(layer.flops / self.machine.flops_per_second, layer.bytes / self.machine.bytes_per_second)
        return attainable / layer.seconds

    def table(self, slowest: int | None = None) -> Table:
        """Return a table of the layers in the order of the backward pass, or of the ``slowest`` ones, slowest first."""
        layers: Sequence[LayerProfile] = self.layers
        if slowest is not None:
            layers = sorted(layers, key=lambda layer: -layer.seconds)[:slowest]
        table = Table("parameter", "path")
        for column in ("GFLOP", "MiB", "ms", "predicted ms", "GFLOP/s", "of peak"):
            table.add_column(column, justify="right")
        for layer in layers:
            table.add_row(
                Text(layer.parameter),
                layer.path,
                f"{layer.flops / 1e9:.3f}",
                f"{layer.bytes / MIB:.1f}",
                f"{1e3 * layer.seconds:.2f}",
                "" if layer.predicted is None else f"{1e3 * layer.predicted:.2f}",
                f"{layer.flops / layer.seconds / 1e9:.0f}",
                f"{100 * self._share(layer):.0f} %",
            )
        return table

    def summary(self) -> str:
        """Return the totals in a few lines of text."""
        ops_seconds = sum(layer.seconds for layer in self.layers)
        lines = [
            f"{self.images_per_second:.1f} images/s: {self.examples} images, {self.dtype}, {self.threads} threads, "
            f"{self.estimator} with {self.cotangents} cotangents an image",
            f"fisher {1e3 * self.fisher:.1f} ms, of which forward {1e3 * self.forward:.1f} and the ops "
            f"{1e3 * ops_seconds:.1f}; floor {1e3 * self.floor:.1f}, training step {1e3 * self.step:.1f}",
            f"fisher / floor {self.fisher / self.floor:.2f}, fisher / step {self.fisher / self.step:.2f}",
            f"machine: {self.machine.flops_per_second / 1e9:.0f} GFLOP/s, "
            f"{self.machine.bytes_per_second / 1e9:.1f} GB/s (measured)",
        ]
        memory = [f"{name} {used / MIB:.0f} MiB" for name, used in self.peak_memory.items() if used is not None]
        if memory:
            lines.append(f"peak memory over the model: {', '.join(memory)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, highlight=False).print(self.table())
        return text.getvalue() + self.summary()

    def as_dict(self) -> dict[str, Any]:
        """Return all measurements and the totals as JSON values."""
        content = asdict(self)
        del content["events"]
        return {**content, "totals": self.totals()}

    def save_json(self, path: str | os.PathLike) -> None:
        """Write :meth:`as_dict`."""
        write_atomically(path, json.dumps(self.as_dict(), indent=1).encode())

    def save_roofline(self, path: str | os.PathLike) -> None:
        """Former name of ``t2v_fast.analysis.plot.roofline(profile, path)``."""
        warnings.warn(
            "Profile.save_roofline(path) is now t2v_fast.analysis.plot.roofline(profile, path)",
            DeprecationWarning,
            stacklevel=2,
        )
        importlib.import_module("t2v_fast.analysis.plot").roofline(self, path)

    def save_trace(self, path: str | os.PathLike) -> None:
        """Write one batch in Chrome's trace format, for chrome://tracing or ui.perfetto.dev."""
        first = min(start for _, _, start, _ in self.events)
        events = [
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": 1e6 * (start - first),
                "dur": 1e6 * (end - start),
                "pid": 0,
                "tid": 0,
            }
            for name, kind, start, end in self.events
        ]
        write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def profile(
    model: nn.Module,
    inputs: Tensor,
    estimator: str = "deflated",
    samples: int = 2,
    *,
    likelihood: str | Likelihood = "softmax",
    labels: Tensor | None = None,
    parameters: ParameterFilter = None,
    forward: Callable[[nn.Module, Any], Tensor] = lambda model, x: model(x),
    rounds: int = 5,
) -> Profile:
    """Measure the Fisher of one batch, layer by layer, and the network alone, in alternating rounds.

    Args:
        model: The network.
        inputs: One batch, [N, ...].
        estimator: As for :func:`t2v_fast.fisher`, except ``"batch_mean"``.
        samples: As for :func:`t2v_fast.fisher`.
        likelihood: As for :func:`t2v_fast.fisher`.
        labels: The labels of the batch, for ``estimator="empirical"``.
        parameters: As for :func:`t2v_fast.fisher`.
        forward: As for :func:`t2v_fast.fisher`.
        rounds: The number of measured rounds. One more round comes first and is not measured.

    Returns:
        The measurements.

    Raises:
        UnsupportedError: A parameter has no exact per-example gradient.
        ValueError: ``rounds`` is below one, or another argument is not valid.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = profile(model, torch.randn(2, 4), rounds=1)  # doctest: +SKIP
        >>> print(report.summary())  # doctest: +SKIP
    """
    check_estimator(estimator, samples)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    recorder = FisherRecorder(model, parameters)
    measured = _Rounds(
        recorder, inputs, forward, lambda logits: cotangents(logits, estimator, samples, likelihood, labels)
    )
    with torch.enable_grad(), recorder:
        for index in range(rounds + 1):
            measured.run(first=index == 0)
    return Profile(
        examples=inputs.shape[0],
        cotangents=measured.cotangents,
        dtype=str(next(iter(recorder.parameters.values())).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        estimator=estimator,
        layers=measured.layers(),
        **{name: statistics.median(seconds[1:]) for name, seconds in measured.seconds.items()},
        peak_memory=measured.memory,
        machine=measure_machine(),
        events=tuple(measured.events),
    )


class _Rounds:
    """The measurements of :func:`profile`. Each round runs the Fisher, the floor and a training step of one batch."""

    def __init__(
        self,
        recorder: FisherRecorder,
        inputs: Tensor,
        forward: Callable[[nn.Module, Any], Tensor],
        directions: Callable[[Tensor], Tensor],
    ) -> None:
        self.recorder, self.inputs, self.directions = recorder, inputs, directions
        self.logits = lambda: forward(recorder.model, inputs)
        self.cotangents = 0
        self.seconds: dict[str, list[float]] = {k: [] for k in ("forward", "backward", "fisher", "floor", "step")}
        self.memory: dict[str, int | None] = {}
        self.events: list[tuple[str, str, float, float]] = []  # of the last round
        self._work: dict[str, tuple[str, str, planner.Work, float | None]] = {}
        self._layer_seconds: list[dict[str, float]] = []
        self._observed: list[tuple[str, float, float]] = []  # in this round
        recorder.observer = self._observe

    def run(self, first: bool) -> None:
        """Run one round. The first one measures memory, and its times are not used."""
        self._observed.clear()
        if first:
            self.memory["fisher"] = _peak_memory(self._fisher, self.inputs.device)
        else:
            self._fisher()
        spent: dict[str, float] = {}
        for name, start, end in self._observed:
            spent[name] = spent.get(name, 0.0) + end - start
            self.events.append((f"{name} ({self._work[name][1]})", "fisher", start, end))
        self._layer_seconds.append(spent)
        self._floor()
        if first:
            self.memory["step"] = _peak_memory(self._step, self.inputs.device)
        else:
            self._step()

    def layers(self) -> tuple[LayerProfile, ...]:
        """Return each parameter's cost, with median times."""
        n, layers = self.inputs.shape[0], []
        for name, (node, path, todo, predicted) in self._work.items():
            spent = statistics.median(each.get(name, 0.0) for each in self._layer_seconds[1:])
            layers.append(LayerProfile(name, node, path, n * todo.flops, n * todo.bytes, spent, predicted))
        return tuple(layers)

    def _observe(self, use: Use, factors: Factors, cotangents_: int, start: float, end: float) -> None:
        # The factors are not kept: they hold every layer's cotangent, which would count as peak memory.
        if use.parameter not in self._work:
            predicted = factors.predict(cotangents_)
            predicted = None if predicted is None else predicted * self.inputs.shape[0]
            self._work[use.parameter] = (use.node.name(), *factors.work(cotangents_), predicted)
        self._observed.append((use.parameter, start, end))

    def _fisher(self) -> None:
        """Run one forward pass and the backward passes of the Fisher."""
        start = time.perf_counter()
        logits = self.logits()
        middle = time.perf_counter()
        u = self.directions(logits)
        self.cotangents = u.numel() // logits.numel()
        between = time.perf_counter()
        self.recorder.backward(logits, u)
        end = time.perf_counter()
        self.events = [("forward", "network", start, middle), ("backward", "network", between, end)]
        self.seconds["forward"].append(middle - start)
        self.seconds["backward"].append(end - between)
        self.seconds["fisher"].append(end - start)

    def _floor(self) -> None:
        """Run one forward pass and as many backward passes as the Fisher has, without weight gradients."""
        start, count = time.perf_counter(), self.cotangents
        logits = self.logits()
        with self.recorder.regions.reading():
            taps = taps_of(logits, self.recorder.parameters)
        for k in range(count):
            backpropagate(logits, torch.ones_like(logits), taps, lambda node, g: None, retain_graph=k + 1 < count)
        self.seconds["floor"].append(time.perf_counter() - start)

    def _step(self) -> None:
        """Run one forward pass and one full backward pass, as a training step does."""
        start = time.perf_counter()
        wanted = list(self.recorder.parameters.values())
        torch.autograd.grad(self.logits().sum(), wanted, allow_unused=True)
        self.seconds["step"].append(time.perf_counter() - start)


@functools.cache
def measure_machine() -> Machine:
    """Measure the peak rates in float32 of all of torch's threads: the best of a few runs."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = planner.fastest(lambda: a @ b, 10)
    big = torch.empty(32 * MIB)
    copy = torch.empty_like(big)
    moved = planner.fastest(lambda: copy.copy_(big), 5)
    return Machine(2 * 1024**3 / product, 2 * 4 * big.numel() / moved)


def _peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak memory of ``run`` above what was in use before, in bytes, or None where it is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:  # Linux: return freed memory to the system, so that its reuse counts, and reset the high-water mark
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        run()
        return None
    run()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
