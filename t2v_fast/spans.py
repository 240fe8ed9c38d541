"""Where the time of a task goes: a clock that charges every moment to one stage.

A :class:`Spans` is collected within :func:`collect`, and code that is worth a line of its own runs within
:class:`stage`. Stages may be nested: the inner one takes its time from the outer one, so the seconds of all stages add
up to the whole. Without a collector a stage does nothing.

How the passes through a network divide into kinds of layers is measured in a few of them only
(:func:`forward_by_kind`, :func:`backward_by_kind`), because hooks on every layer cost more than the clock may. A budget
decides which: the hooks take at most :data:`SHARE` of the time of all passes.

On a GPU the clock shows the time of the host, which launches kernels and then waits where it needs a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from torch import nn
from torch.autograd.graph import Node

REST = "rest"  # what no stage takes
KINDS = ("convolution", "linear", "norm", "embedding", "other")
SHARE = 0.003  # of the time of the passes that may be spent on dividing them into kinds of layers
HOOK = 2e-6  # seconds that the call of a hook takes, about

_active: ContextVar[Spans | None] = ContextVar("spans", default=None)


class Spans:
    """Seconds by stage, counts by name, and how the time of a pass grows with the size of its batch.

    Attributes:
        seconds: The seconds of each stage. ``forward.linear`` is the part of ``forward`` in linear layers, in those
            passes that were divided; ``forward`` alone is the time of the other passes.
        counts: Numbers of events, such as decoded images.
        sizes: For ``"forward"`` and ``"backward"``: the sums of 1, n, n^2, t, n t and t^2 over all passes, with n
            examples and t seconds each.
        shared: How many tasks shared the work, of which this is one task's part.
    """

    __slots__ = ("_since", "_stage", "counts", "seconds", "shared", "sizes")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.sizes: dict[str, list[float]] = {}
        self.shared = 1
        self._stage, self._since = REST, perf_counter()

    def switch(self, name: str) -> str:
        """Charge the time since the last switch to the stage that ends, begin stage ``name``, and return the former."""
        now, former = perf_counter(), self._stage
        self.seconds[former] = self.seconds.get(former, 0.0) + now - self._since
        self._stage, self._since = name, now
        return former

    def add_size(self, name: str, n: int, seconds: float) -> None:
        """Note that a pass over n examples took so long."""
        sums = self.sizes.setdefault(name, [0.0] * 6)
        for k, term in enumerate((1, n, n * n, seconds, n * seconds, seconds * seconds)):
            sums[k] += term

    def add(self, other: Spans) -> None:
        """Add what another clock has measured."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for name, more in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + more
        for name, sums in other.sizes.items():
            mine = self.sizes.get(name, [0.0] * len(sums))
            self.sizes[name] = [a + b for a, b in zip(mine, sums, strict=True)]

    def part(self, tasks: int) -> Spans:
        """The part of one of the tasks that shared the work."""
        found = Spans()
        found.seconds = {stage: s / tasks for stage, s in self.seconds.items()}
        found.sizes = {name: [v / tasks for v in sums] for name, sums in self.sizes.items()}
        found.counts = {name: c / tasks for name, c in self.counts.items()}
        found.shared = tasks
        return found

    def __getstate__(self) -> tuple:
        return self.seconds, self.counts, self.sizes, self.shared

    def __setstate__(self, state: tuple) -> None:
        self.seconds, self.counts, self.sizes, self.shared = state
        self._stage, self._since = REST, perf_counter()


@contextlib.contextmanager
def collect() -> Iterator[Spans]:
    """Collect the stages of this context. An outer collector does not see them."""
    spans = Spans()
    token = _active.set(spans)
    try:
        yield spans
    finally:
        _active.reset(token)
        spans.switch(REST)


class stage:
    """Charge the time of the body to a stage. ``whole`` charges all of it, with the stages in it."""

    __slots__ = ("_former", "_spans", "_token", "name", "whole")

    def __init__(self, name: str, whole: bool = False) -> None:
        self.name, self.whole = name, whole

    def __enter__(self) -> None:
        self._spans = spans = _active.get()
        if spans is not None:
            self._former = spans.switch(self.name)
            if self.whole:
                self._token = _active.set(None)

    def __exit__(self, *error: object) -> None:
        if self._spans is not None:
            if self.whole:
                _active.reset(self._token)
            self._spans.switch(self._former)


def count(name: str, more: int = 1) -> None:
    """Count events."""
    spans = _active.get()
    if spans is not None:
        spans.counts[name] = spans.counts.get(name, 0) + more


class _Budget:
    """Decides which passes are divided by kinds of layers."""

    def __init__(self) -> None:
        self.watched = self.spent = 0.0

    @property
    def due(self) -> bool:
        # Never the first pass of a process, in which everything is found and allocated.
        return self.watched > 0 and self.spent <= SHARE * self.watched


_budgets = {"forward": _Budget(), "backward": _Budget()}


@contextlib.contextmanager
def _pass(name: str, n: int, spans: Spans) -> Iterator[bool]:
    """Time one pass over n examples; yield whether this pass is divided."""
    budget = _budgets[name]
    divided = budget.due
    former = spans.switch(f"{name}.other" if divided else name)
    start = spans._since
    try:
        yield divided
    finally:
        spans.switch(former)
        seconds = spans._since - start
        budget.watched += seconds
    if not divided:
        spans.add_size(name, n, seconds)


# Without a collector a pass has one of these contexts, since those with a generator take as long as a small op.
_NO_FORWARD = contextlib.nullcontext()
_NO_BACKWARD: contextlib.AbstractContextManager[Callable[[Node], None]] = contextlib.nullcontext(lambda node: None)


def forward_by_kind(model: nn.Module, n: int) -> contextlib.AbstractContextManager[None]:
    """Charge the body, a forward pass over n examples, to ``forward``, and now and then to the kinds of layers."""
    spans = _active.get()
    return _NO_FORWARD if spans is None else _forward_by_kind(model, n, spans)


@contextlib.contextmanager
def _forward_by_kind(model: nn.Module, n: int, spans: Spans) -> Iterator[None]:
    with _pass("forward", n, spans) as divided:
        if not divided:
            yield
            return
        start = perf_counter()
        formers: list[str] = []

        def enter(name: str) -> Callable:
            return lambda *_: formers.append(spans.switch(name))

        def leave(*_: Any) -> None:
            spans.switch(formers.pop())

        begins = {kind: enter(f"forward.{kind}") for kind in KINDS}
        handles = []
        for module in model.modules():
            if (kind := kind_of_module(module)) != "other":
                handles += [module.register_forward_pre_hook(begins[kind]), module.register_forward_hook(leave)]
        hooked = perf_counter()
        try:
            yield
        finally:
            done = perf_counter()
            for handle in handles:
                handle.remove()
            _budgets["forward"].spent += hooked - start + perf_counter() - done + HOOK * len(handles)


def backward_by_kind(nodes: Sequence[Node], n: int) -> contextlib.AbstractContextManager[Callable[[Node], None]]:
    """Charge the body, a backward pass through a graph, to ``backward``, and now and then to the kinds of layers.

    The context's value is a function that begins the time of a node. A hook calls it for each of ``nodes`` that the
    pass runs; the caller calls it for the nodes at which the pass ends, whose hooks are not called.
    """
    spans = _active.get()
    return _NO_BACKWARD if spans is None else _backward_by_kind(nodes, n, spans)


@contextlib.contextmanager
def _backward_by_kind(nodes: Sequence[Node], n: int, spans: Spans) -> Iterator[Callable[[Node], None]]:
    with _pass("backward", n, spans) as divided:
        if not divided:
            yield lambda node: None
            return
        start = perf_counter()

        def begin(kind: str) -> Callable[[Any], None]:
            return lambda _: (spans.switch(f"backward.{kind}"), None)[1]

        begins = {kind: begin(kind) for kind in KINDS}
        handles = [node.register_prehook(begins[kind_of_node(node.name())]) for node in nodes]
        hooked = perf_counter()
        try:
            yield lambda node: begins[kind_of_node(node.name())](node)
        finally:
            done = perf_counter()
            for handle in handles:
                handle.remove()
            _budgets["backward"].spent += hooked - start + perf_counter() - done + HOOK * len(handles)


def kind_of_module(module: nn.Module) -> str:
    """The kind of a layer, one of :data:`KINDS`; ``other`` for a module that is not one of them itself."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return "linear"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    return "norm" if "Norm" in type(module).__name__ else "other"


def kind_of_node(name: str) -> str:
    """The kind of the layer that an autograd node belongs to, by the node's name.

    >>> kind_of_node("WinogradConvolutionBackward"), kind_of_node("AddmmBackward0"), kind_of_node("AddBackward0")
    ('convolution', 'linear', 'other')
    """
    if "Convolution" in name or "Depthwise" in name:
        return "convolution"
    if "Linear" in name or name.startswith(("AddmmBackward", "MmBackward", "GroupedMmBackward")):
        return "linear"
    if "Embedding" in name:
        return "embedding"
    return "norm" if "Norm" in name and "Linalg" not in name else "other"
