"""Find which matrices of a stack of weights a matrix product reads, such as the weights [E, O, I] of E experts.

A product may read all matrices of the stack, one of them, or one for each of its rows. Views and transposes may lie in
between. They are followed here by sizes and strides, as torch follows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .owners import Shape
from .transfers import kind_of, output_shape, saved_axis, signed

# Products of groups of rows with a matrix for each group; their second input is the stack.
GROUPED_PRODUCTS = frozenset({"GroupedMm", "GeneratedBackwardFor_transformers_grouped_mm_fallback_default"})
# Other products with a matrix, and the number of the first input that may be one.
_PRODUCTS = {"Mm": 0, "Bmm": 0, "Addmm": 1}
_UNCHANGED = frozenset({"Clone", "ToCopy", "Alias"})
_RESHAPED = frozenset({"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand"})
_PICKING = frozenset({"Select", "Unbind", "Index", "IndexSelect"})
_FOLLOWED = _UNCHANGED | _RESHAPED | _PICKING | {"T", "Transpose", "Permute"}


@dataclass(frozen=True, eq=False)
class Stack:
    """The matrices that a product reads: a parameter is a stack of ``count`` of them.

    ``index`` is the number of the one matrix, or of the matrix of each row of a batched product; None if the product
    reads the whole stack.
    """

    count: int
    index: int | Tensor | None
    transposed: bool  # whether the product sees the matrices transposed


class _Entries(NamedTuple):
    """Which entries of the parameter a tensor shows."""

    shape: list[int]
    strides: list[int]
    offset: int = 0
    index: Tensor | None = None  # looked up along the first axis, whose stride counts looked-up matrices then


def stack_of(node: Node, slot: int, passed: Callable[[Node], bool]) -> tuple[Tensor, Stack, frozenset[str]] | None:
    """The parameter, the stack and the names of the nodes in between, if an input of a product reads such matrices.

    ``passed(node)`` says whether the product may stand for a node in between. None where the input reads no stack.
    """
    kind = kind_of(node.name())
    whole = kind in GROUPED_PRODUCTS
    if whole and (slot != 1 or len(output_shape(node)) != 2):
        return None
    if not whole and slot < _PRODUCTS.get(kind, math.inf):
        return None
    path: list[tuple[Node, int]] = []
    picked = whole
    child, number = node.next_functions[slot]
    while child is not None and (variable := getattr(child, "variable", None)) is None:
        kind = kind_of(child.name())
        if kind not in _FOLLOWED or (kind in _PICKING and picked):
            return None
        picked = picked or kind in _PICKING
        path.append((child, number))
        child, number = child.next_functions[0]
    if child is None or not picked or not 2 <= variable.dim() <= 3 or not variable.numel():
        return None
    if not all(passed(step) for step, _ in path):
        return None
    entries = _Entries(list(variable.shape), list(_contiguous(variable.shape)))
    for step, number in reversed(path):
        found = _follow(step, number, entries)
        if found is None:
            return None
        entries = found
    stack = _stack(variable, entries, kind_of(node.name()))
    return None if stack is None else (variable, stack, frozenset(step.name() for step, _ in path))


def _stack(variable: Tensor, entries: _Entries, kind: str) -> Stack | None:
    """The stack that a product of this kind reads."""
    columns = variable.shape[-1]
    shape, strides, offset, index = entries
    single = kind in ("Mm", "Addmm")
    if len(shape) != (2 if single else 3) or single == (index is not None) and kind not in GROUPED_PRODUCTS:
        return None
    size = math.prod(shape[-2:])
    if not size or variable.numel() % size or (variable.dim() == 3 and size != math.prod(variable.shape[1:])):
        return None
    if size % columns or (not single and shape[0] > 1 and strides[0] != size) or offset % size:
        return None
    steps = tuple(stride for n, stride in zip(shape[-2:], strides[-2:], strict=True) if n > 1)
    rows = size // columns
    straight = tuple(step for n, step in ((rows, columns), (columns, 1)) if n > 1)
    across = straight[::-1]
    if tuple(shape[-2:]) == (rows, columns) and steps == straight:
        transposed = False
    elif tuple(shape[-2:]) == (columns, rows) and steps == across:
        transposed = True
    else:
        return None
    count = variable.numel() // size
    if kind in GROUPED_PRODUCTS:
        return Stack(count, None, transposed) if offset == 0 and shape[0] == count else None
    return Stack(count, offset // size if single else index, transposed)


def _follow(node: Node, number: int, entries: _Entries) -> _Entries | None:
    """The entries that an output of a node shows, from those of its input."""
    kind, (shape, strides, offset, index) = kind_of(node.name()), entries
    dims = len(shape)
    if kind in _UNCHANGED:
        return entries
    if kind in ("T", "Transpose", "Permute"):
        order = list(range(dims))
        if kind == "Permute":
            order = [saved_axis(a, dims) for a in node._saved_dims]
        elif dims > 1:
            a, b = (0, 1) if kind == "T" else (saved_axis(d, dims) for d in (node._saved_dim0, node._saved_dim1))
            order[a], order[b] = b, a
        return _Entries([shape[a] for a in order], [strides[a] for a in order], offset, index)
    if kind in _RESHAPED:
        wanted = output_shape(node)
        if math.prod(wanted) != math.prod(shape):
            return None
        try:
            seen = torch.empty_strided(shape, strides, device="meta").view(wanted)
        except RuntimeError:  # the entries must be copied
            return None
        return _Entries(list(seen.shape), list(seen.stride()), offset, index)
    if kind in ("Select", "Unbind"):
        axis = saved_axis(node._saved_dim, dims)
        at = number if kind == "Unbind" else node._saved_index
        offset += signed(int(at)) % shape[axis] * strides[axis]
        return _Entries(shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :], offset, index)
    found = [node._saved_index] if kind == "IndexSelect" else list(node._saved_indices)
    if len(found) != 1 or found[0] is None or found[0].dtype in (torch.bool, torch.uint8):
        return None
    if kind == "IndexSelect" and saved_axis(node._saved_dim, dims) or offset or dims != 3:
        return None
    (where,) = found
    inner = [stride * strides[0] for stride in _contiguous(where.shape)]
    return _Entries([*where.shape, *shape[1:]], [*inner, *strides[1:]], 0, where.reshape(-1) % shape[0])


def _contiguous(shape: Shape) -> Shape:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

