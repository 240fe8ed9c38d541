"""Follow activation checkpointing: what a checkpointed region saved is recomputed when it is read.

``torch.utils.checkpoint`` saves the inputs of a *region* of a network instead of its activations. Where the region's
nodes are asked for what they saved, torch runs the region again. It gives each recomputed tensor away once in a
backward pass. Here nodes are read more often: by transfers and rules, by the engine that runs the nodes, and after the
pass. So within :meth:`Regions.reading` a recomputed tensor can be read again, for as long as its region is *held*. One
region is held at a time, together with the regions around it. Reading from another region drops the one before, so no
more memory is needed than checkpointing promises.

The reentrant kind of checkpointing (``use_reentrant=True``) hides a region behind one node that is not divided further.
Within :meth:`Regions.followed` such a region is checkpointed in the other way, which computes the same. One thing
differs: torch gives no gradients to the parameters of a reentrant region whose inputs need none. Here they have theirs.

torch has no public interface for this. The names of torch that are used here are the same from 2.11 on. Where one of
them is missing, checkpointing is refused as it is outside of these contexts.
"""

from __future__ import annotations

import copy
import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint as torch_checkpoint

from .fast_layers import FastLayers
from .graph import UnsupportedError
from .process_wide import ProcessWide
from .random_state import drawn, random_state

_Hook: type[saved_tensors_hooks] = getattr(torch_checkpoint, "_checkpoint_hook", saved_tensors_hooks)
_Reentrant = torch_checkpoint.CheckpointFunction
_can_follow = hasattr(torch_checkpoint, "_checkpoint_hook") and hasattr(torch._C, "_set_graph_exec_group")

# The regions that new ones belong to; False where none are made. None leaves checkpointing as it is.
_following: ContextVar[Regions | bool | None] = ContextVar("regions", default=None)


class Regions:
    """The checkpointed regions of the forward passes that run within :meth:`followed`.

    Attributes:
        recomputations: How often a region was run again to read from it.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> regions, x = Regions(), torch.ones(2, requires_grad=True)
        >>> with regions.followed():
        ...     y = checkpoint(lambda x: x.sin().exp(), x, use_reentrant=True)
        >>> with regions.reading():
        ...     pairs = [(y.grad_fn._saved_result, y.grad_fn.next_functions[0][0]._saved_self) for _ in range(3)]
        >>> regions.recomputations
        1
    """

    def __init__(self) -> None:
        self.recomputations = 0
        self._alive: WeakSet[_Region] = WeakSet()  # the outermost regions, as long as their graphs are kept
        self._innermost: _Region | None = None  # the region whose forward pass runs
        self._held: _Region | None = None
        self._key: Any = None  # under which torch files what it recomputes, within ``reading``
        self._running = 0  # regions that are being recomputed, one within the other
        self._failure: UnsupportedError | None = None

    @contextmanager
    def followed(self) -> Iterator[Regions]:
        """Follow the regions of the forward passes of this thread. Yield the regions to read from.

        Within the context of other regions, those take the new ones too.
        """
        before = _following.get()
        regions = before if isinstance(before, Regions) else self
        with _patched if _can_follow else nullcontext(), _set(regions):
            yield regions

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let what regions have saved be read any number of times. The last region is dropped at the end.

        Raises:
            UnsupportedError: A region could not be recomputed, even where the reader has ignored the error.
        """
        if self._key is not None:
            yield
            return
        self._key, self._failure = object(), None
        try:
            yield
        except Exception as error:
            if self._failure is not None and error is not self._failure:
                raise self._failure from error
            raise
        else:
            if self._failure is not None:
                raise self._failure
        finally:
            self._hold(None)
            self._key = self._failure = None

    @property
    def holding(self) -> bool:
        """Whether activations were recomputed last from a region, which is held."""
        return self._held is not None

    @property
    def alive(self) -> bool:
        """Whether a region's graph is kept, which would be recomputed to be read."""
        return bool(self._alive)

    def region_of(self) -> Callable[[Node], object | None]:
        """A function that gives the outermost region of a node, or None for a node outside of all regions.

        A leaf counts as outside: it has no number.
        """
        # A region is what one thread computed between two points of time, and autograd numbers the nodes in order.
        regions = sorted((r for r in self._alive), key=lambda region: region.begin)
        begins = [region.begin for region in regions]

        def find(node: Node) -> object | None:
            at = bisect_right(begins, number := node._sequence_nr()) - 1
            return regions[at] if at >= 0 and number < regions[at].end else None

        return find

    def _read(self, region: _Region, holder: Any, unpack: Callable[[Any], Tensor]) -> Tensor:
        """What a node of a region has saved."""
        if self._key is None:  # a backward pass of plain autograd, which reads each tensor once
            with region.as_before():
                return unpack(holder)
        t = region.kept.get(holder)
        if t is None:
            self._hold(region)
            t = self._unpacked(region, holder, unpack)
            self._hold(region)  # the regions around it were read for its inputs
            region.kept[holder] = t
        if t._version > getattr(holder, "version", t._version):
            raise self._failed(
                region,
                "reads a parameter that was changed in place after the forward pass, or changes a tensor in place that "
                "a gradient needs",
            )
        return t

    def _hold(self, region: _Region | None) -> None:
        """Drop what was recomputed, except of a region and the regions around it."""
        while self._held is not None and (region is None or not region.is_within(self._held)):
            self._held.drop(self._key)
            self._held = self._held.parent
        self._held = region

    def _unpacked(self, region: _Region, holder: Any, unpack: Callable[[Any], Tensor]) -> Tensor:
        """Let torch give a saved tensor, which recomputes the region if it is not held."""
        key, runs = self._key, not region.frame.is_recomputed.get(self._key)
        group, before = torch._C._get_graph_exec_group(), random_state() if runs else {}
        torch._C._set_graph_exec_group(key)
        self._running += 1
        try:
            with region.as_before() if runs else nullcontext():
                t = unpack(holder)
        except Exception as error:
            region.drop(key)
            if error is self._failure:  # a region around this one has failed
                raise
            raise self._failed(region, f"fails when it is recomputed ({_first_line(error)})") from error
        finally:
            self._running -= 1
            torch._C._set_graph_exec_group(group)
        if runs:
            self.recomputations += 1
            if (generator := drawn(before, random_state())) is not None:
                raise self._failed(
                    region,
                    f"draws other random numbers from {generator} when it is recomputed: keep the default "
                    "preserve_rng_state=True, draw with torch, or call eval() on the network",
                )
        return t

    def _failed(self, region: _Region, why: str) -> UnsupportedError:
        if self._failure is None:
            self._failure = UnsupportedError(
                f"activation checkpointing: the region {region.name!r} {why}. A region must compute the same each "
                "time, also more often than a training step asks for. Otherwise switch checkpointing off for it"
            )
        return self._failure


class _Region:
    """One region, with what torch knows of it (its *frame*)."""

    def __init__(self, frame: Any, parent: _Region | None) -> None:
        self.frame, self.parent = frame, parent
        self.kept: dict[Any, Tensor] = {}  # what was read, while the region is held
        self.begin = self.end = 0  # the numbers of the first node, and of the first one after the region
        modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, FastLayers)]
        self._layers = modes[-1] if modes else None

    @property
    def name(self) -> str:
        """The name of the function, or of the module's class."""
        function = _captured(self.frame.recompute_fn, "fn")
        while (inner := getattr(function, "func", None) or getattr(function, "__wrapped__", None)) is not None:
            function = inner  # of a partial function, or of one with a decorator
        function = getattr(function, "__self__", function)  # the module of a method
        return getattr(function, "__qualname__", type(function).__name__)

    def is_within(self, other: _Region) -> bool:
        """Whether the region is another one, or lies within it."""
        region: _Region | None = self
        while region is not None and region is not other:
            region = region.parent
        return region is not None

    def drop(self, key: object) -> None:
        """Drop all that was recomputed of the region."""
        self.kept.clear()
        for reference in self.frame.weak_holders:
            if (holder := reference()) is not None:
                holder.handles.pop(key, None)
        for by_key in (self.frame.recomputed, self.frame.recomp_counter, self.frame.is_recomputed):
            by_key.pop(key, None)

    def as_before(self) -> AbstractContextManager:
        """A context in which the region computes with the layers of its forward pass, and may do so again."""
        contexts = ExitStack()
        if self._layers is not None and self._layers not in _get_current_function_mode_stack():
            contexts.enter_context(self._layers)
            contexts.callback(self._layers.forget)
        # Selective checkpointing gives each kept tensor away once, and forgets it.
        storage = getattr(_captured(self.frame.recompute_fn, "recompute_context"), "storage", None)
        if isinstance(storage, dict):
            contexts.callback(storage.update, {key: copy.copy(entries) for key, entries in storage.items()})
        return contexts


def _with_version(pack: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A hook that saves tensors as ``pack``, and keeps how often they were changed in place until then.

    torch notices later changes of a saved tensor, but not of one that is recomputed. Only activations and parameters
    count, and not the statistics that a layer updates.
    """

    @functools.wraps(pack)
    def with_version(t: Tensor) -> Any:
        holder = pack(t)
        if t.requires_grad or isinstance(t if t._base is None else t._base, nn.Parameter):
            holder.version = t._version
        return holder

    return with_version


class _RegionHook(_Hook):  # type: ignore[misc, valid-type]
    """torch's hooks of a region, whose saved tensors are read through :class:`Regions`."""

    def __init__(self, frame: Any, regions: Regions) -> None:
        super().__init__(frame)
        self.regions, self.region = regions, _Region(frame, regions._innermost)
        # The graph keeps this function, which must not lead back to the graph, nor to itself.
        self.pack_hook = _with_version(self.pack_hook)  # type: ignore[has-type]
        region, unpack = self.region, self.unpack_hook  # type: ignore[has-type]
        self.unpack_hook = lambda holder: regions._read(region, holder, unpack)

    def __enter__(self) -> _RegionHook:
        self.region.begin = torch.autograd._get_sequence_nr()
        self.regions._innermost = self.region
        super().__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.regions._innermost = self.region.parent
        self.region.end = torch.autograd._get_sequence_nr()
        if self.region.parent is None:
            self.regions._alive.add(self.region)


class _NotReentrant(_Reentrant):
    """Stands for torch's reentrant checkpointing, where regions are followed."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        regions = _following.get()
        if regions is None:
            return _Reentrant.apply(function, preserve_rng_state, *args)

        if not isinstance(regions, Regions):
            return function(*args)

        # A tensor that is given twice is one tensor when the region runs again, too: attention looks at this.
        places = {id(arg): k for k, arg in reversed(list(enumerate(args)))}
        given = [places[id(arg)] for arg in args]

        @functools.wraps(function, updated=())
        def run(*args: Any) -> Any:  # also where another thread recomputes it
            with _set(regions):
                return function(*(args[k] for k in given))

        return torch_checkpoint.checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _hook_of(frame: Any) -> AbstractContextManager:
    """Stands for torch's hooks of a region. A region within one that is recomputed ends with the recomputation."""
    regions = _following.get()
    if regions is False:
        return nullcontext()
    if not isinstance(regions, Regions) or regions._running:
        return _Hook(frame)  # type: ignore[call-arg]
    return _RegionHook(frame, regions)


@contextmanager
def not_checkpointed() -> Iterator[None]:
    """Within this context, regions of activation checkpointing are computed and kept as any other layers."""
    with _patched if _can_follow else nullcontext(), _set(False):
        yield


@contextmanager
def _set(regions: Regions | bool) -> Iterator[None]:
    before = _following.get()
    _following.set(regions)
    try:
        yield
    finally:
        _following.set(before)


def _captured(function: Callable, variable: str) -> Any:
    """A variable that a function has taken from around it; None if there is none of this name."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        return cells[variable].cell_contents
    except (KeyError, ValueError):  # ValueError: the variable has no value
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _replaced() -> Iterator[None]:
    """Let torch.utils.checkpoint make regions that can be followed, where a thread asks for it."""
    ours = {"_checkpoint_hook": _hook_of, "CheckpointFunction": _NotReentrant}
    before = {name: getattr(torch_checkpoint, name) for name in ours}
    for name, own in ours.items():
        setattr(torch_checkpoint, name, own)
    try:
        yield
    finally:
        for name, own in ours.items():
            if getattr(torch_checkpoint, name) is own:  # otherwise someone else has replaced it meanwhile
                setattr(torch_checkpoint, name, before[name])


_patched = ProcessWide(_replaced)
