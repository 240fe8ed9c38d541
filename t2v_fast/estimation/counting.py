"""Notice layers that count over the tokens of all examples, such as routers of experts with a capacity.

A router with a capacity numbers the tokens of the whole batch that want an expert (``cumsum``), and drops those beyond
the capacity; or an expert chooses the best tokens of the batch (``topk``). What an example gets then depends on the
others, in some batches and not in the next. The numbers need no gradient, so the autograd graph does not show them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_COUNTING = frozenset({"cumsum", "cumsum_", "topk"})


class Count(NamedTuple):
    """One call of an operator that counts along an axis."""

    operator: str
    size: int  # of the axis
    layer: nn.Module | None  # that called the operator


class Counting(TorchFunctionMode):
    """Record the calls of operators that count, within a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Count] = []

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _COUNTING and args and isinstance(args[0], Tensor) and args[0].dim():
            place = 2 if name == "topk" else 1
            axis = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis", -1))
            if isinstance(axis, int) and -args[0].dim() <= axis < args[0].dim():
                self.counts.append(Count(name.rstrip("_"), args[0].shape[axis], _calling_layer()))
        return func(*args, **kwargs)


def _calling_layer() -> nn.Module | None:
    """The innermost module whose method is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def counting_over_examples(whole: Sequence[Count], some: Sequence[Count]) -> Count | None:
    """The first call that counts along a longer axis where there are more examples; None if there is none."""
    pairs = zip(whole, some, strict=False)
    return next((a for a, b in pairs if a.operator == b.operator and a.layer is b.layer and a.size != b.size), None)


def capacity_of(layer: nn.Module) -> str | None:
    """The name of an attribute of a layer that is a capacity, with its value; None if there is none."""
    for name, value in vars(layer).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "capacity" in name.lower() and number and value > 0:
            return f"{name}={value}"
    return None


def layer_with_capacity(network: nn.Module) -> nn.Module | None:
    """The first module of a network that has a capacity."""
    return next((layer for layer in network.modules() if capacity_of(layer) is not None), None)


def described(network: nn.Module, layer: nn.Module | None) -> str:
    """A layer's name and class, for a message."""
    name = next((name for name, of in network.named_modules() if of is layer), None)
    if layer is None or name is None:
        return "the network"
    capacity = capacity_of(layer)
    return f"the layer {name!r} ({type(layer).__name__}{'' if capacity is None else ', ' + capacity})"


def is_half(dtype: torch.dtype) -> bool:
    """Whether values of a type are rounded too coarsely to tell a dropped token from rounding."""
    return dtype.itemsize < 4
