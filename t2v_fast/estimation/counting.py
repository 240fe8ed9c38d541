"""Notice layers that count over the tokens of all examples, such as routers of experts with a capacity.

A router with a capacity numbers the tokens of the whole batch that want an expert (``cumsum``), and drops those beyond
the capacity; or an expert chooses the best tokens of the batch (``topk``). What an example gets then depends on the
others, in some batches and not in the next. The numbers need no gradient, so the autograd graph does not show them.

A sort of the scores of all tokens ranks them, too. A sort of whole numbers may do no more than bring the tokens of an
expert together, as grouped products need it. Tokens are lost there only if whole numbers are compared with a capacity
afterwards, or if some rows are read more often than others (:func:`reads_unevenly`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from ..gradients.graph import views_of
from ..gradients.members import modules_of, name_of
from ..gradients.ownership import nodes_of

_AXIS = {"cumsum": 1, "topk": 2, "sort": 1, "argsort": 1, "msort": None}  # the place of the axis among the arguments
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"})
_BRINGING_TOGETHER = "sort of whole numbers"
_COMPARING = "comparison of whole numbers"


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
        name = getattr(func, "__name__", "").strip("_")
        of = args[0] if args else kwargs.get("input")
        if not isinstance(of, Tensor) or not of.dim():
            return func(*args, **kwargs)
        whole = not of.is_floating_point() and of.dtype != torch.bool
        if name in _AXIS:
            place = _AXIS[name]
            axis = (
                0 if place is None else args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis", -1))
            )
            if isinstance(axis, int) and -of.dim() <= axis < of.dim():
                kind = _BRINGING_TOGETHER if whole and name.endswith("sort") else name
                self.counts.append(Count(kind, of.shape[axis], _calling_layer()))
        elif name in _COMPARISONS and whole:
            self.counts.append(Count(_COMPARING, of.numel(), _calling_layer()))
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
    longer = _longer(whole, some)
    compares = any(count.operator == _COMPARING for count in longer)
    counts = (c for c in longer if c.operator != _COMPARING and (compares or c.operator != _BRINGING_TOGETHER))
    return next(counts, None)


def sorting_over_examples(whole: Sequence[Count], some: Sequence[Count]) -> bool:
    """Whether whole numbers are sorted along a longer axis where there are more examples."""
    return any(count.operator == _BRINGING_TOGETHER for count in _longer(whole, some))


def _longer(whole: Sequence[Count], some: Sequence[Count]) -> list[Count]:
    """The calls whose axis is not as long among some of the examples."""
    pairs: list[tuple[Count, Count]] = []
    for operator in dict.fromkeys(count.operator for count in whole):
        pairs += zip(*([c for c in counts if c.operator == operator] for counts in (whole, some)), strict=False)
    return [a for a, b in pairs if a.layer is b.layer and a.size != b.size]


def may_mix_tokens(counting: str | None, sorting: bool, logits: Tensor) -> bool:
    """Whether each example of a batch must be compared alone, because the tokens of all may be counted or sorted.

    Args:
        counting: The layer that counts over the tokens of all examples, if there is one.
        sorting: Whether whole numbers of all examples are sorted.
        logits: The logits of the batch.
    """
    return counting is not None or (sorting and reads_unevenly(logits))


def reads_unevenly(output: Tensor) -> bool:
    """Whether a network reads some rows of an activation more often by their numbers than others.

    A router that sends each token to as many experts reads all rows equally often, unless it drops tokens.
    """
    reads: dict[tuple[Node, int], Tensor] = {}
    node: Any  # whose fields torch's types do not list
    for node in nodes_of(output):
        name = node.name()
        if name == "IndexBackward0":
            indices, axis = list(node._saved_indices), 0
        elif name == "IndexSelectBackward0":
            indices, axis = [node._saved_index], node._saved_dim
        else:
            continue
        child, number = node.next_functions[0]
        if child is None or views_of(child) is not None or len(indices) != 1 or indices[0] is None or axis:
            continue
        rows, index = child._input_metadata[number].shape[0], indices[0]
        index = index.nonzero() if index.dtype == torch.bool else index
        read = torch.bincount(index.reshape(-1).long() % rows, minlength=rows)
        reads[child, number] = reads[child, number] + read if (child, number) in reads else read
    return any(bool((read != read[0]).any()) for read in reads.values())


def capacity_of(layer: nn.Module) -> str | None:
    """The name of an attribute of a layer that is a capacity, with its value; None if there is none."""
    attributes = vars(layer)
    if "capacity" not in " ".join(attributes).lower():  # in most layers, and to look at each name takes long
        return None
    for name, value in attributes.items():
        if "capacity" not in name.lower():
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return f"{name}={value}"
    return None


def layer_with_capacity(network: nn.Module) -> nn.Module | None:
    """The first module of a network that has a capacity."""
    return next((layer for layer in modules_of(network) if capacity_of(layer) is not None), None)


def described(network: nn.Module, layer: nn.Module | None) -> str:
    """A layer's name and class, for a message."""
    name = name_of(network, layer)
    if layer is None or name is None:
        return "the network"
    capacity = capacity_of(layer)
    return f"the layer {name!r} ({type(layer).__name__}{'' if capacity is None else ', ' + capacity})"


def is_half(dtype: torch.dtype) -> bool:
    """Whether values of a type are rounded too coarsely to tell a dropped token from rounding."""
    return dtype.itemsize < 4
