"""Find which matrices of a stack of weights a matrix product reads, such as the weights [E, O, I] of E experts.

A product may read all matrices of the stack, one of them, or one for each of its rows. Views and transposes may lie in
between. They are followed here by sizes and strides, as torch follows them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .owners import Owned, Shape, Sole
from .ownership import Ownership
from .transfers import kind_of, output_shape, saved_axis, signed

# Products of groups of rows with a matrix for each group; their second input is the stack.
GROUPED_PRODUCTS = frozenset({"GroupedMm", "GeneratedBackwardFor_transformers_grouped_mm_fallback_default"})
# Products with a matrix or a stack, and the number of the first input that may be one.
_FIRST_MATRIX = {"Mm": 0, "Bmm": 0, "Addmm": 1, "OneDnnLinear": 1, **dict.fromkeys(GROUPED_PRODUCTS, 1)}
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
    chosen: Tensor | None = None  # the matrices that are looked up along the first axis, whose stride counts them then


@dataclass
class Read:
    """An input of a product that reads matrices of a stack."""

    variable: Tensor  # the parameter
    stack: Stack
    path: list[Node]  # the nodes between the product and the parameter
    alone: bool = False  # whether such products alone read what these nodes show, and may be taps in their place


def stacks_of(ownership: Ownership) -> tuple[dict[tuple[Node, int], Read], set[Node]]:
    """The inputs of products that read matrices of a stack, by node and slot, and nodes that need no taps of their own.

    A node that picks matrices belongs to an example if only one example uses what it picks, as in ``weight[index]``
    with an index for each row. A tap at the product costs less than one at this node: the gradients of the picked
    matrices are never formed.
    """
    reads: dict[tuple[Node, int], Read] = {}
    readers: dict[Node, set[Node]] = {}  # of the nodes on the paths: the nodes that such a path comes from
    for node, (owner, *_) in ownership.owners.items():
        kind = kind_of(node.name())
        if kind not in _FIRST_MATRIX or not isinstance(owner, (Owned, Sole)):
            continue
        for slot in range(_FIRST_MATRIX[kind], min(len(node.next_functions), 3)):
            read = _read(node, kind, slot)
            if read is None or (kind == "Bmm" and isinstance(owner, Owned) and owner.axis != 0):
                continue
            reads[node, slot] = read
            for consumer, step in pairwise([node, *read.path]):
                readers.setdefault(step, set()).add(consumer)
    reached = {node for node, _ in ownership.states} if readers else ()
    consumers = Counter(child for node in reached for child, _ in node.next_functions if child in readers)
    for read in reads.values():
        read.alone = all(consumers[step] == len(readers[step]) for step in read.path)
    return reads, {step for read in reads.values() if read.alone for step in read.path}


def _read(node: Node, kind: str, slot: int) -> Read | None:
    """What an input of a product reads of a stack; None where it reads none."""
    whole = kind in GROUPED_PRODUCTS
    if whole and (slot != 1 or len(output_shape(node)) != 2):
        return None
    path: list[tuple[Node, int]] = []
    picked = whole
    child, number = node.next_functions[slot]
    while child is not None and (variable := getattr(child, "variable", None)) is None:
        step = kind_of(child.name())
        if step not in _FOLLOWED or (step in _PICKING and picked):
            return None
        picked = picked or step in _PICKING
        path.append((child, number))
        child, number = child.next_functions[0]
    if child is None or not picked or not 2 <= variable.dim() <= 3 or not variable.numel():
        return None
    entries: _Entries | None = _Entries(list(variable.shape), list(_contiguous(variable.shape)))
    for of, number in reversed(path):
        entries = _follow(of, number, entries)
        if entries is None:
            return None
    stack = _stack(variable, entries, kind)
    return None if stack is None else Read(variable, stack, [of for of, _ in path])


def _stack(variable: Tensor, entries: _Entries, kind: str) -> Stack | None:
    """The stack that a product of this kind reads."""
    columns = variable.shape[-1]
    shape, strides, offset, chosen = entries
    single = kind in ("Mm", "Addmm", "OneDnnLinear")
    if len(shape) != (2 if single else 3) or (single == (chosen is not None) and kind not in GROUPED_PRODUCTS):
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
    return Stack(count, offset // size if single else chosen, transposed)


def _follow(node: Node, number: int, entries: _Entries) -> _Entries | None:
    """The entries that an output of a node shows, from those of its input."""
    kind, (shape, strides, offset, chosen) = kind_of(node.name()), entries
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
        return _Entries([shape[a] for a in order], [strides[a] for a in order], offset, chosen)
    if kind in _RESHAPED:
        wanted = output_shape(node)
        if math.prod(wanted) != math.prod(shape):
            return None
        try:
            seen = torch.empty_strided(shape, strides, device="meta").view(wanted)
        except RuntimeError:  # the entries must be copied
            return None
        return _Entries(list(seen.shape), list(seen.stride()), offset, chosen)
    if kind in ("Select", "Unbind"):
        axis = saved_axis(node._saved_dim, dims)
        at = number if kind == "Unbind" else node._saved_index
        offset += signed(int(at)) % shape[axis] * strides[axis]
        return _Entries(shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :], offset, chosen)
    found = [node._saved_index] if kind == "IndexSelect" else list(node._saved_indices)
    if len(found) != 1 or found[0] is None or found[0].dtype in (torch.bool, torch.uint8):
        return None
    if (kind == "IndexSelect" and saved_axis(node._saved_dim, dims)) or offset or dims != 3:
        return None
    (where,) = found
    inner = [stride * strides[0] for stride in _contiguous(where.shape)]
    return _Entries([*where.shape, *shape[1:]], [*inner, *strides[1:]], 0, where.reshape(-1) % shape[0])


def _contiguous(shape: Shape) -> Shape:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
