"""Run a network faster, with the same results: channels-last images, faster layers, and on a CPU kept memory."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import ops
from .fast_layers import FastLayers
from .members import modules_of, parameters_of
from .ownership import nodes_of
from .tensor_parallel import is_distributed

log = logging.getLogger(__name__)

# Nodes in whose backward pass torch 2.13 crashes for channels-last images if the input needs no gradient.
_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
CRASHING = frozenset({"NativeGroupNormBackward0"}) if _TORCH < (2, 14) else frozenset()

# Seconds for which the memory of a call stays in the process, so that the next call need not ask for it again.
LINGER = 5.0

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)

# A thread that has the lock may collect garbage, which ends the contexts of objects that are deleted.
_lock = threading.RLock()
_contexts = 0
_kept = False  # whether freed memory stays in the process
_until = 0.0  # when to give it back, unless a context begins before
_release: threading.Timer | None = None  # looks whether to give kept memory back, at this time:
_looks_at = math.inf


def kept_memory() -> AbstractContextManager[None]:
    """Keep freed memory in the process until the last of these contexts ends, and give it back to the system then.

    Otherwise glibc gives large blocks back when they are freed and requests them again for the next batch, and the
    system clears every page again. Within the context, a batch reuses the blocks of the batch before.

    The context has no effect without the compiled extension, with allocators other than glibc's, and where the
    environment configures glibc's allocator (MALLOC_..., GLIBC_TUNABLES).

    Example:
        >>> with kept_memory():
        ...     for _ in range(2):
        ...         batch = torch.zeros(8, 3, 32, 32)
    """
    return _kept_for(0)


def lingering_memory() -> AbstractContextManager[None]:
    """As :func:`kept_memory`, but keep the memory for ``LINGER`` seconds more after the last context has ended.

    A context that begins in this time reuses the memory. Otherwise a call over one batch spends up to a third of its
    time on new pages.

    Example:
        >>> for _ in range(2):
        ...     with lingering_memory():
        ...         batch = torch.zeros(8, 3, 32, 32)
    """
    return _kept_for(LINGER)


@contextmanager
def _kept_for(linger: float) -> Iterator[None]:
    global _contexts, _until
    with _lock:
        _contexts += 1
        _keep(True)
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if _contexts == 0 and not linger:
                _keep(False)
            elif _contexts == 0:
                _until = monotonic() + linger
                if _looks_at > _until:
                    _look_again(linger)


def _look_again(after: float) -> None:
    """Look after some seconds whether to give kept memory back.

    One timer serves all contexts of these seconds, because to start a thread takes longer than a small batch.
    """
    global _release, _looks_at
    if _release is not None:
        _release.cancel()
    _release, _looks_at = threading.Timer(after, _give_back_memory), monotonic() + after
    _release.daemon = True
    _release.start()


def _give_back_memory() -> None:
    """Give kept memory back to the system, unless a context is open or has begun meanwhile."""
    global _release, _looks_at
    with _lock:
        if threading.current_thread() is not _release:
            return
        _release, _looks_at = None, math.inf
        if _contexts == 0 and (left := _until - monotonic()) > 0:
            _look_again(left)
        elif _contexts == 0:
            _keep(False)


def _after_fork() -> None:
    """A child process has no timer: restore the allocator's usual behaviour there."""
    global _lock, _release, _looks_at
    _lock = threading.RLock()
    _release, _looks_at = None, math.inf
    if _contexts == 0:
        _keep(False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _keep(keep: bool) -> None:
    global _kept
    if keep == _kept:
        return
    _kept = keep
    by_user = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not by_user:
        ops.keep_freed_memory(keep)


class FastNetwork:
    """A forward function that uses :class:`~t2v_fast.gradients.fast_layers.FastLayers` and channels-last images.

    Within the context, channels-last copies replace the weights of the convolutions that torch computes, so that torch
    does not copy them for every batch. The model gets its own weights back at the end. If the network refuses
    channels-last images, or torch crashes on them, the images and the weights are left in their format. Norms and
    poolings gain most: see docs/performance.md.

    Args:
        model: The network.
        forward: Called as ``forward(model, inputs)`` to run the network.
        channels_last: Whether to try channels-last images [N, C, H, W].

    Attributes:
        works: Whether the network takes channels-last images; None until it has been tried.
        observe: Called with the inputs of each pass. The network runs within the context that it returns, which sees
            the calls that the network makes, before the faster layers do.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        >>> with FastNetwork(model, lambda model, inputs: model(inputs)) as run:
        ...     logits = run(model, torch.randn(2, 3, 5, 5))
        >>> tuple(logits.shape), run.works
        ((2, 36), True)
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor], channels_last: bool = True
    ) -> None:
        self.model, self.forward = model, forward
        self.works: bool | None = None if channels_last else False
        self.observe: Callable[[Any], AbstractContextManager[Any]] = nullcontext
        self._on_cpu = all(p.device.type == "cpu" for p in parameters_of(model))
        self._layers = FastLayers(self._put_back, self._on_cpu)
        self._layers.read = self._make_channels_last
        # By the weight's id: the weight, its own data, the channels-last copy, and the weight's version then.
        self._own: dict[int, tuple[Tensor, Tensor, Tensor, int]] = {}

    def __enter__(self) -> FastNetwork:
        # On a CPU, the fast layers say which convolutions torch computes, when they run for the first time.
        kinds = (nn.ConvTranspose2d,) if self._layers.sees_convolutions and self._on_cpu else _CONVOLUTIONS
        for module in modules_of(self.model) if self.works is None else ():
            # A weight that is computed from other tensors is not a parameter of its module.
            if isinstance(module, kinds) and (weight := module._parameters.get("weight")) is not None:
                self._make_channels_last(weight)
        return self

    def _make_channels_last(self, weight: Tensor) -> None:
        """Replace the memory of a weight by a channels-last copy, if the weight is a parameter in torch's usual format.

        This may happen within a forward pass. What the graph has saved of the weight before has the same values.
        """
        if self.works is False or id(weight) in self._own or id(weight) in self._layers.written:
            return
        usual = weight.dim() == 4 and weight.is_contiguous() and not weight.is_inference()
        if usual and isinstance(weight, nn.Parameter):
            own, copy = weight.data, weight.data.contiguous(memory_format=torch.channels_last)
            weight.data = copy
            self._own[id(weight)] = weight, own, copy, weight._version

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        """Give all weights their own memory back."""
        for key in list(self._own):
            self._give_back(key)

    def _put_back(self, weight: Tensor) -> None:
        """Give a weight its own memory back, because a matrix replaces the weight."""
        if id(weight) in self._own:
            self._give_back(id(weight))

    def _give_back(self, key: int) -> None:
        """Give a weight its own memory back, with what the network has written to the copy."""
        weight, own, copy, version = self._own.pop(key)
        if weight.data.data_ptr() != copy.data_ptr():  # the network has given the weight other memory
            return
        if key in self._layers.written or weight._version != version:
            own.copy_(copy)
        weight.data = own

    def _run(self, model: nn.Module, inputs: Any) -> Tensor:
        """Run the network with fast layers; run it again if it wrote over the output of an in-place layer."""
        with self._layers, self.observe(inputs):
            output = self.forward(model, inputs)
        if not self._layers.overwritten():
            return output
        with self._layers, self.observe(inputs):  # the in-place layer is now torch's own
            return self.forward(model, inputs)

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        if self.works is False:
            return self._run(model, inputs)
        try:
            output = self._run(model, tree_map(_images_channels_last, inputs))
        except RuntimeError as error:  # also in a later pass, where weights have another format than in the first
            return self._run_unchanged(model, inputs, error)
        if self.works is None and self._on_cpu and (found := _crashing(output)):
            return self._run_unchanged(model, inputs, f"torch {torch.__version__} crashes in {', '.join(found)}")
        self.works = True
        return output

    def settled(self, model: nn.Module, inputs: Any) -> Tensor:
        """Run the network in the memory format that an earlier call has settled on, without a second try.

        Args:
            model: The network.
            inputs: The inputs of a batch.

        Returns:
            The network's output.
        """
        return self._run(model, tree_map(_images_channels_last, inputs) if self.works else inputs)

    def _run_unchanged(self, model: nn.Module, inputs: Any, why: object) -> Tensor:
        """Run the network on inputs and weights in their own memory format, now and from now on."""
        self._restore()
        output = self._run(model, inputs)  # raises the same error if the memory format is not the cause
        log.info("the network does not take channels-last images: %s", why)
        self.works = False
        return output


def _crashing(output: Any) -> set[str]:
    """The nodes in the graph of an output that torch crashes in."""
    if not CRASHING or not isinstance(output, Tensor):
        return set()
    return {node.name() for node in nodes_of(output)} & CRASHING


def _images_channels_last(t: Any) -> Any:
    """Images [N, C, H, W] in channels-last format; anything else unchanged."""
    images = isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point()
    return t.contiguous(memory_format=torch.channels_last) if images else t


@contextmanager
def fast_forward(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Tensor],
    device: str | torch.device,
    channels_last: bool = True,
) -> Iterator[Callable[[nn.Module, Any], Tensor]]:
    """Make a forward function as fast as the device allows, for a loop over batches.

    On a CPU the function is a :class:`FastNetwork`, within :func:`lingering_memory`. On a CUDA device it is a
    :class:`FastNetwork` if ``channels_last`` is set, because the kernels there read channels-last images without a
    copy. Otherwise the function is ``forward``.

    Args:
        model: The network.
        forward: Called as ``forward(model, inputs)`` to run the network.
        device: The device of the network.
        channels_last: Whether to try channels-last images.

    Returns:
        A context whose value is the function to call in place of ``forward``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        >>> with fast_forward(model, lambda model, images: model(images), "cpu") as forward:
        ...     logits = [forward(model, torch.randn(2, 3, 5, 5)) for _ in range(3)]
        >>> tuple(logits[0].shape)
        (2, 2)
    """
    kind = torch.device(device).type
    if any(map(is_distributed, parameters_of(model))):  # processes share the weights, which have a memory of their own
        yield forward
        return
    if kind != "cpu" and not (kind == "cuda" and channels_last):
        yield forward
        return
    memory = lingering_memory() if kind == "cpu" else nullcontext()
    with memory, FastNetwork(model, forward, channels_last) as run:
        yield run
