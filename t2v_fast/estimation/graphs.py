"""CUDA graphs of the passes of a batch: one graph for the forward pass, one for the backward passes and the squares.

A replay launches all kernels of a captured pass at once, without the host's work for each of them. This is for networks
whose kernels are so short that the host binds. :class:`Passes` runs each pass as it is, and :class:`GraphedPasses`
replays it where that is possible.

**Both graphs are functions of static buffers.** Inputs, cotangents and weights of the examples are copied into buffers
before a replay, and logits and squares are read from buffers after it. A graph adds to nothing that outlives the
replay. So a replay can be repeated, and compared with the passes as they are. These things happen on the host or change
from batch to batch, and stay outside of the graphs:

- the loader, the copy of the inputs from pinned memory, and the checks that inputs and logits are finite,
- the count of the examples, their weights, probabilities and masks (:class:`t2v_fast.estimation.batches.Schedule`),
- the random signs and labels, which the host draws for each batch, and the cotangents that are made of them,
- the running sums (:mod:`t2v_fast.estimation.moments`), whose sums of weights are numbers of the host,
- the self-check, which runs examples as they are.

The recorder sets two things on the host in each backward pass: its ``unused`` and its ``skipped`` parameters. They are
set anew after a replay. What follows from shapes alone is captured as it was: the taps, the routes, and the paths that
the planner chose.

**When graphs are captured.** At once if the caller asks for them. By default as soon as the device has waited for the
host for some batches (:attr:`t2v_fast.estimation.deferred.DeferredChecks.host_binds`), so that a small task pays
nothing for them.

**What a batch meets.** Batches are of one kind if the shapes, strides and dtypes of their inputs, the number of
cotangents and torch's settings are equal. The first batch of a kind is run as it is. The second is run as it is, and
then captured. The third is run as it is and replayed as well. The graphs are trusted if logits and squares agree to the
rounding of their dtype, and from then on batches are only replayed. All of this is repeated for whatever is captured
anew. The batches that the self-check looks at (the 4th, 8th, 16th and so on) are run as they are, replayed and compared
again. An error is raised if graphs that were trusted differ there.

**What is never captured** is run as it is. A log line says why; it is a warning if the caller asked for graphs. These
are networks that are not on one CUDA device, that several processes share, that have hooks or checkpointed regions, and
rows of packed sequences. The same holds for whatever :class:`t2v_fast.estimation.graph_obstacles.Watch` finds in a
pass. It also holds where a pass changes attributes of the network or draws random numbers, where the capture fails, and
where the third batch differs.

**Stale addresses.** :class:`t2v_fast.estimation.graph_obstacles.Snapshot` compares the network's objects, modes and
addresses with those of the capture before each replay. Where one differs, all graphs are dropped, and the batch is run
as it is. Graphs last for one call of :func:`t2v_fast.fisher`.

The tests run it on a tape of operators that stands in for the graphs of a card; ``python -m bench.gpu`` runs it on one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..gradients import network_state
from ..gradients.fast_forward import FastNetwork
from ..gradients.random_state import drawn, random_state
from ..gradients.recorder import FisherRecorder
from ..ops import gpu_specs, planner
from ..ops.asynchronous import to_device
from ..spans import stage
from .graph_obstacles import HookWatch, Snapshot, Watch, hooked
from .self_check import SelfCheckError

log = logging.getLogger(__name__)

MOST_KEPT = 4  # kinds of batches whose graphs are kept at once; each keeps the memory of its activations
MOST_CAPTURES = 16  # of one call: capturing takes as long as some three batches
# How far replays may differ from the passes as they are, relative to the norm. Most are equal to the last bit; kernels
# that add in any order differ by rounding. What is stale, frozen or missing differs by far more.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

Squares = list[dict[str, Tensor]]  # of each group of cotangents, by parameter
Result = TypeVar("Result")


class Passes:
    """The forward and backward passes of a network, run as they are.

    Args:
        recorder: The recorder of the network.
    """

    def __init__(self, recorder: FisherRecorder) -> None:
        self.recorder = recorder

    @contextmanager
    def of(self, forward: Callable[[nn.Module, Any], Tensor]) -> Iterator[None]:
        """A context in which the forward passes are those of ``forward(model, inputs)``."""
        yield

    def replay(self, inputs: Any, segments: Tensor | None, checked: bool, host_binds: bool) -> Tensor | None:
        """Return the logits of a batch from a graph, without an autograd graph; None where the batch is run as it is.

        Args:
            inputs: The inputs of the batch, on the device.
            segments: The examples of a packed row, as for :meth:`t2v_fast.FisherRecorder.backward`.
            checked: Whether the self-check needs the batch to be run as it is.
            host_binds: Whether the device has waited for the host, so that a replay would be faster.
        """
        return None

    def squares(
        self,
        logits: Tensor,
        u: Tensor,
        groups: Sequence[int] | None = None,
        weights: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Squares:
        """Return the squares of per-example gradients, for each group of cotangents.

        Args:
            logits: The logits of the batch, replayed or not.
            u: Cotangents [K, N, ...] of the logits.
            groups: The number of cotangents of each group; None for one group.
            weights: As for :meth:`t2v_fast.FisherRecorder.backward`, for one group.
            segments: As for :meth:`t2v_fast.FisherRecorder.backward`.
        """
        return self._as_they_are(logits, u, groups, weights, segments)

    def _as_they_are(
        self,
        logits: Tensor,
        u: Tensor,
        groups: Sequence[int] | None,
        weights: Tensor | None = None,
        segments: Tensor | None = None,
        retain_graph: bool = False,
    ) -> Squares:
        if groups is None:
            return [self.recorder.backward(logits, u, weights, retain_graph, segments)]
        return list(self.recorder.backward_groups(logits, u, groups, retain_graph))


class CudaCapture:
    """All that graphs need of torch.cuda. Captures run on a stream of their own, as CUDA demands.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pool(self) -> Any:
        """A pool of memory. Its blocks serve graphs that are replayed in the order in which they were captured."""
        return torch.cuda.graph_pool_handle()

    def aside(self, run: Callable[[], Result]) -> Result:
        """Run something on the stream of the captures, which lets libraries allocate what they need there."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = run()
        current.wait_stream(self._stream)
        return found

    def capture(self, run: Callable[[], Result], pool: Any) -> tuple[Callable[[], None], Result]:
        """Capture what a function launches. Return the replay, and what the function has returned.

        Nothing is computed: tensors that the function has returned are filled by each replay.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        # Other threads, such as those of a loader, may ask CUDA for memory meanwhile.
        mode = "thread_local"
        with torch.cuda.device(self.device):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
                    found = run()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own stream the current one
        return graph.replay, found


@dataclass
class _Backward:
    """The graph of the backward passes of some cotangents, and its static buffers."""

    u: Tensor
    weights: Tensor | None
    replay: Callable[[], None]
    values: Squares
    unused: frozenset[str]
    skipped: frozenset[str]
    trusted: bool = False

    def run(self, recorder: FisherRecorder, u: Tensor, weights: Tensor | None) -> Squares:
        """Replay the graph. The values are overwritten by the next replay."""
        self.load(u, weights)
        self.replay()
        recorder.unused, recorder.skipped = self.unused, self.skipped
        return self.values

    def load(self, u: Tensor, weights: Tensor | None) -> None:
        self.u.copy_(u)
        if self.weights is not None and weights is not None:
            self.weights.copy_(to_device(weights, self.weights.device))


@dataclass
class _Captured:
    """The graph of the forward pass of one kind of batch, its static inputs, and the graphs of its backward passes."""

    inputs: Any
    replay: Callable[[], None]
    output: Tensor  # with its autograd graph, which keeps the activations for further captures
    snapshot: Snapshot
    pool: Any
    trusted: bool = False
    backwards: dict[Any, _Backward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.logits = self.output.detach()

    def load(self, inputs: Any) -> None:
        for static, t in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(t, Tensor):
                static.copy_(t)


@dataclass
class _Kind:
    """Batches whose inputs look alike."""

    met: int = 0
    captured: _Captured | None = None


class GraphedPasses(Passes):
    """The passes of a network, replayed from CUDA graphs where that is possible. See the module for when it is.

    Args:
        recorder: The recorder of the network.
        asked: Whether the caller asked for graphs. If not, none is captured before the host binds, because a capture
            takes as long as some batches, and a graph keeps the memory of its activations.

    Attributes:
        reason: Why no graph is used; None while graphs are used.
        batches: The number of batches.
        replayed: The number of batches whose passes were only replayed.
        captures: The number of graphs that were captured.
    """

    def __init__(self, recorder: FisherRecorder, asked: bool = True) -> None:
        super().__init__(recorder)
        self._asked = self._begun = asked
        self.reason: str | None = None
        self.batches = self.replayed = self.captures = 0
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()  # the latest one last
        self._now: _Kind | None = None  # of the batch whose squares come next
        self._inputs: Any = None  # of that batch, where its passes are to be captured or compared
        self._capture: CudaCapture | None = None

    @contextmanager
    def of(self, forward: Callable[[nn.Module, Any], Tensor]) -> Iterator[None]:
        """A context in which the forward passes are those of ``forward(model, inputs)``. Its graphs end with it."""
        self._forward = self._own = forward
        if isinstance(forward, FastNetwork):
            self._forward, self._own = forward.settled, forward.forward
        tensors = [*self.recorder.model.parameters(), *self.recorder.model.buffers()]
        self._device = tensors[0].device
        if self.recorder.divided:
            self.refuse("several processes share the network's parameters")
        elif others := sorted({str(t.device) for t in tensors if t.device.type != "cuda" or t.device != self._device}):
            self.refuse(f"the network has tensors on {' and '.join(others)}, and graphs are for one CUDA device")
        try:
            yield
        finally:
            self._drop()
            if self._begun:
                log.info(
                    "CUDA graphs: %d of %d batches were replayed, from %d captured graphs",
                    *(self.replayed, self.batches, self.captures),
                )

    def refuse(self, reason: str, detail: str = "") -> None:
        """Use no graph from now on. Say why, with a detail, unless this reason was logged for this network before."""
        self.reason = reason + detail
        self._drop()
        if network_state.state_of(self.recorder.model).is_first(f"no CUDA graphs: {reason}"):
            log.log(logging.WARNING if self._asked else logging.INFO, "no CUDA graphs are used: %s", self.reason)

    def replay(self, inputs: Any, segments: Tensor | None, checked: bool, host_binds: bool) -> Tensor | None:
        self.batches += 1
        self._now = self._inputs = None
        self._begun = self._begun or host_binds
        if not self._begun:
            return None
        if segments is not None and self.reason is None:
            self.refuse("the sequences of packed rows differ from batch to batch")
        if self.reason is not None or (key := self._key(inputs)) is None:
            return None
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if kind.captured is not None and not kind.captured.snapshot.holds():
            log.info("the network has changed: its CUDA graphs are captured anew")
            self._drop()
            kind = self._kinds[key] = _Kind()
        kind.met += 1
        self._now = kind
        if kind.captured is not None and kind.captured.trusted and not checked:
            kind.captured.load(inputs)
            kind.captured.replay()
            return kind.captured.logits
        if kind.met > 1:
            self._inputs = inputs
        return None

    def squares(
        self,
        logits: Tensor,
        u: Tensor,
        groups: Sequence[int] | None = None,
        weights: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Squares:
        kind, inputs = self._now, self._inputs
        self._now = self._inputs = None
        captured = None if kind is None else kind.captured
        key = (u.shape, u.dtype, u.device, None if groups is None else tuple(groups), weights is not None)
        if captured is not None and logits is captured.logits:
            backward = captured.backwards.get(key)
            if backward is not None and backward.trusted:
                self.replayed += 1
                return backward.run(self.recorder, u, weights)
            inputs = captured.inputs
            logits = self._forward(self.recorder.model, inputs)
        found = self._as_they_are(logits, u, groups, weights, segments)
        if kind is not None and inputs is not None and self.recorder.observer is None:
            with stage("check", whole=True):
                try:
                    self._learn(kind, inputs, logits.detach(), found, u, groups, weights, key)
                except SelfCheckError:
                    raise
                except Exception as error:  # whatever a capture, or the memory for it, may fail with
                    said = (str(error).splitlines() or [""])[0]
                    self.refuse(f"a capture failed ({type(error).__name__}: {said})")
        return found

    def _learn(
        self,
        kind: _Kind,
        inputs: Any,
        logits: Tensor,
        found: Squares,
        u: Tensor,
        groups: Sequence[int] | None,
        weights: Tensor | None,
        key: Any,
    ) -> None:
        """Capture the passes of a batch that was run as it is, or compare a replay with what was ``found`` for it."""
        captured = kind.captured
        if captured is not None and key in captured.backwards:
            self._compare(captured, captured.backwards[key], inputs, logits, found, u, weights)
        elif self.captures < MOST_CAPTURES:
            kind.captured = self._captured(captured, inputs, u, groups, weights, key)
            others = [k for k in self._kinds.values() if k.captured is not None]
            for other in others[:-MOST_KEPT]:  # those that were met the longest time ago
                other.met, other.captured = 0, None
        else:  # a captured forward pass without its backward passes would only be run twice
            kind.captured = None

    def _captured(
        self,
        captured: _Captured | None,
        inputs: Any,
        u: Tensor,
        groups: Sequence[int] | None,
        weights: Tensor | None,
        key: Any,
    ) -> _Captured | None:
        """Capture the backward passes of a batch, and its forward pass unless that is captured already."""
        model, recorder = self.recorder.model, self.recorder
        if (why := hooked(model)) is not None:
            self.refuse(why)
            return None
        capture = self._capture = self._capture or CudaCapture(self._device)
        static = captured.inputs if captured is not None else tree_map(_like, inputs)
        own = torch.empty_like(u)
        w = None if weights is None else torch.empty(weights.shape, dtype=weights.dtype, device=u.device)
        snapshot = Snapshot(model)

        def squares(output: Tensor) -> Squares:
            return self._as_they_are(output, own, groups, w, retain_graph=True)

        buffers = [t for t in (*tree_leaves(static), own, w) if isinstance(t, Tensor)]
        for t, value in zip(tree_leaves(static), tree_leaves(inputs), strict=True):
            if isinstance(t, Tensor) and captured is None:
                t.copy_(value)
        own.copy_(u)
        if w is not None and weights is not None:
            w.copy_(to_device(weights, w.device))
        if (why := self._obstacle(capture, snapshot, static, buffers, squares)) is not None:
            self.refuse(why)
            return None
        if captured is None:
            pool = capture.pool()
            replay, output = capture.capture(lambda: self._forward(model, static), pool)
            captured = _Captured(static, replay, output, snapshot, pool)
            self.captures += 1
        output = captured.output
        replay, values = capture.capture(lambda: squares(output), captured.pool)
        self.captures += 1
        captured.backwards[key] = _Backward(own, w, replay, values, recorder.unused, recorder.skipped)
        if not captured.snapshot.holds():
            self.refuse("a pass changes attributes or the memory of the network")
            return None
        return captured

    def _obstacle(
        self,
        capture: CudaCapture,
        snapshot: Snapshot,
        static: Any,
        buffers: list[Tensor],
        squares: Callable[[Tensor], Squares],
    ) -> str | None:
        """Run the passes on the stream of the captures, and say what stands in the way of a capture."""
        model, watch = self.recorder.model, Watch(self._device, [*snapshot.tensors, *buffers])
        hooks = HookWatch()
        checkpointed = False

        def passes() -> None:
            nonlocal checkpointed
            with watch:
                with hooks:
                    output = self._forward(model, static)
                checkpointed = self.recorder.regions.alive
                squares(output)

        random, signature = random_state(), network_state.signature_of(model, self._own)
        capture.aside(passes)
        if checkpointed:
            return "activation checkpointing runs parts of the network again"
        if (obstacle := watch.obstacle or hooks.obstacle) is not None:
            return obstacle
        if (generator := drawn(random, random_state())) is not None:
            return f"a pass draws random numbers from {generator}"
        if signature != network_state.signature_of(model, self._own) or not snapshot.holds():
            return "a pass changes attributes or the memory of the network"
        return None

    def _compare(
        self,
        captured: _Captured,
        backward: _Backward,
        inputs: Any,
        logits: Tensor,
        found: Squares,
        u: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Trust the graphs if their replay gives what the passes as they are have given, to rounding.

        Raises:
            SelfCheckError: Graphs that were trusted before give something else.
        """
        if inputs is not captured.inputs:
            captured.load(inputs)
        captured.replay()
        got = backward.run(self.recorder, u, weights)
        pairs = [("the logits", captured.logits, logits)]
        for one, other in zip(got, found, strict=True):
            if one.keys() != other.keys():
                self.refuse("a replay has the squares of other parameters")
                return
            pairs += [(f"the squares of {name!r}", one[name], other[name]) for name in other]
        dtype = max((t.dtype for t in (logits, *captured.snapshot.tensors) if t.dtype in TOLERANCE), key=_coarseness)
        # Where the true gradient is zero (a bias before a norm), the squares are rounding errors of larger gradients.
        largest = max((float(plain.max()) for _, _, plain in pairs[1:] if plain.numel()), default=0.0)
        floor = (32 * _coarseness(dtype)) ** 2 * largest
        for name, replayed, plain in pairs:
            if not bool(plain.isfinite().all()):
                return  # such a batch ends in an error; if it does not, the next one tells
            apart, size = float((replayed.double() - plain.double()).norm()), float(plain.double().norm())
            least = 0.0 if replayed is captured.logits else floor * plain.numel() ** 0.5
            if not apart <= TOLERANCE[dtype] * size + least:
                change, by = f"a replay changes {name}", f" by {apart / max(size, 1e-300):.2g} relative"
                if backward.trusted or (
                    captured.trusted and replayed is captured.logits
                ):  # batches before this one may be wrong, too
                    raise SelfCheckError(f"{change}{by}, although the replay of an earlier batch did not: {_WITHOUT}")
                self.refuse(change, by)
                return
        captured.trusted = backward.trusted = True

    def _key(self, inputs: Any) -> Any:
        """What tells batches apart, beside their contents; None where graphs cannot be used at all."""
        leaves, structure = tree_flatten(inputs)
        tokens: list[Any] = [structure]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self._device or leaf.layout != torch.strided or leaf.requires_grad:
                    self.refuse(f"an input {list(leaf.shape)} is on {leaf.device}, is not strided or needs a gradient")
                    return None
                tokens += (leaf.shape, leaf.stride(), leaf.dtype)
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                tokens += (type(leaf), leaf)
            else:
                self.refuse(f"an input is a {type(leaf).__name__}, in which a change would not be noticed")
                return None
        return (*tokens, *_settings())

    def _drop(self) -> None:
        """Drop all graphs and their memory."""
        self._kinds.clear()
        self._now = self._inputs = None


_WITHOUT = "the network does something else than it did then; pass cuda_graphs=False"


def _like(t: Any) -> Any:
    return torch.empty_like(t) if isinstance(t, Tensor) else t


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _settings() -> tuple[Any, ...]:
    """Settings that decide which kernels run."""
    return (
        *planner.forced(),
        gpu_specs.allows_tf32(),
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
