"""How a network runs faster on a CPU, with the same results: other layers, another memory format, kept memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import ops
from .fast_layers import FastLayers
from .ownership import nodes_of

log = logging.getLogger(__name__)

# Nodes whose backward pass torch 2.13 crashes in for channels-last images, where the input needs no gradient.
_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
CRASHING = frozenset({"NativeGroupNormBackward0"}) if _TORCH < (2, 14) else frozenset()

_lock = threading.Lock()
_contexts = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """What is freed stays with the process until the last of these contexts ends; then it goes back to the system.

    glibc gives large blocks back when they are freed and asks for them again for the next batch, and the system clears
    every page anew; kept, a batch's blocks are the next one's. Nothing happens without the compiled extension, with
    other allocators, and where the environment sets glibc's up (MALLOC_..., GLIBC_TUNABLES).
    """
    global _contexts
    with _lock:
        _contexts += 1
        if _contexts == 1:
            _keep(True)
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if _contexts == 0:
                _keep(False)


def _keep(keep: bool) -> None:
    by_user = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not by_user:
        ops.keep_freed_memory(keep)


class FastNetwork:
    """A forward function with :class:`FastLayers`, and channels-last images [N, C, H, W] unless the network refuses.

    ``with FastNetwork(model, forward) as run: run(model, inputs)``. Within the context the weights of convolutions are
    channels-last copies, which would otherwise be made for every batch; the model has its own back at the end. Norms
    and poolings gain most: see docs/performance.md.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor], channels_last: bool = True
    ) -> None:
        self.model, self.forward = model, forward
        self.works: bool | None = None if channels_last else False
        self._layers = FastLayers(self._put_back)
        # By the weight's id: the weight, its own data, the copy, and the weight's version at that time.
        self._own: dict[int, tuple[nn.Parameter, Tensor, Tensor, int]] = {}

    def __enter__(self) -> FastNetwork:
        for module in self.model.modules() if self.works is None else ():
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                continue
            # A weight that is computed from others is no parameter of its module.
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_contiguous():
                if id(weight) in self._own:
                    continue
                own, copy = weight.data, weight.data.contiguous(memory_format=torch.channels_last)
                weight.data = copy
                self._own[id(weight)] = weight, own, copy, weight._version
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for key in list(self._own):
            self._give_back(key)

    def _put_back(self, weight: Tensor) -> None:
        """The weight of a layer that has a matrix instead needs no copy."""
        if id(weight) in self._own:
            self._give_back(id(weight))

    def _give_back(self, key: int) -> None:
        """The weight's own memory, with what the network has written to the copy since."""
        weight, own, copy, version = self._own.pop(key)
        if weight.data.data_ptr() != copy.data_ptr():  # the network has given it other memory
            return
        if key in self._layers.written or weight._version != version:
            own.copy_(copy)
        weight.data = own

    def _run(self, model: nn.Module, inputs: Any) -> Tensor:
        with self._layers:
            output = self.forward(model, inputs)
        if not self._layers.overwritten():
            return output
        with self._layers:  # which leave it to torch now
            return self.forward(model, inputs)

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        if self.works is False:
            return self._run(model, inputs)
        try:
            output = self._run(model, tree_map(_images_channels_last, inputs))
        except RuntimeError as error:
            if self.works:
                raise
            return self._as_they_come(model, inputs, error)
        if self.works is None and (found := _crashing(output)):
            return self._as_they_come(model, inputs, f"torch {torch.__version__} crashes in {', '.join(found)}")
        self.works = True
        return output

    def _as_they_come(self, model: nn.Module, inputs: Any, why: object) -> Tensor:
        self._restore()
        output = self._run(model, inputs)  # raises the same, where the memory format is not the cause
        log.info("the network does not take channels-last images: %s", why)
        self.works = False
        return output


def _crashing(output: Any) -> set[str]:
    if not CRASHING or not isinstance(output, Tensor):
        return set()
    return {node.name() for node in nodes_of(output)} & CRASHING


def _images_channels_last(t: Any) -> Any:
    images = isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point()
    return t.contiguous(memory_format=torch.channels_last) if images else t


@contextmanager
def fast_forward(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Tensor],
    device: str | torch.device,
    channels_last: bool = True,
) -> Iterator[Callable[[nn.Module, Any], Tensor]]:
    """The forward function, as fast as the device runs it for batch after batch."""
    if torch.device(device).type != "cpu":
        yield forward
        return
    with kept_memory(), FastNetwork(model, forward, channels_last) as run:
        yield run
