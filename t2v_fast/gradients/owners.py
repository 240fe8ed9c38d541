"""Which example owns which entries of a tensor: the possible answers, and how to merge two of them.

Example n *owns* an entry of a tensor if a cotangent of row n of the network's output can reach the entry in a backward
pass, and a cotangent of no other row can. An *owner* (:class:`Owned`, :class:`Scattered`, :class:`Crossed` or
:class:`Sole`) describes who owns each entry of a tensor. A tensor whose entries have no single owner is :class:`Shared`
or :class:`Unknown`, or examples are :class:`Interacting` in it. A *state* is any of these answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.asynchronous import to_device

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowLayout:
    """Positions along an axis in a regular order: example n owns the positions (a, n, b) of [outer, N, inner]."""

    outer: int = 1
    inner: int = 1

    def owners(self, n: int) -> Tensor:
        """The example that owns each position, [outer * N * inner]."""
        return torch.arange(n).repeat_interleave(self.inner).repeat(self.outer)

    def split(self, t: Tensor, n: int, fill: float = 0) -> Tensor:
        """Arrange [outer * N * inner, ...] as [N, outer * inner, ...], in a view where the strides allow one."""
        if self.outer == self.inner == 1:
            return t.unsqueeze(1)
        t = t.unflatten(0, (self.outer, n, self.inner))  # [A, N, B, ...]
        return t[0] if self.outer == 1 else t.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class ListedRows:
    """Positions along an axis in any order: each position has its own owner or none."""

    listed: Tensor  # [S], on the CPU: the example that owns each position, or -1 for none

    def owners(self, n: int) -> Tensor:
        """The example that owns each position, or -1 for none, [S]."""
        return self.listed

    def split(self, t: Tensor, n: int, fill: float = 0) -> Tensor:
        """Arrange [S, ...] as [N, most positions of an example, ...]; examples with fewer positions end in ``fill``."""
        order = self.listed.argsort(stable=True)
        owners = self.listed[order]
        counts = torch.bincount(owners[owners >= 0], minlength=n)
        nobodys = int((owners < 0).sum())
        place = torch.arange(len(order)) - nobodys - (counts.cumsum(0) - counts)[owners.clamp_min(0)]
        index = torch.full((n, max(1, int(counts.max()))), len(t))
        index[owners[nobodys:], place[nobodys:]] = order[nobodys:]
        filled = torch.cat([t, t.new_full((1, *t.shape[1:]), fill)])
        return filled[to_device(index, t.device)]


class PaddedRows(ListedRows):
    """Rows that are to be padded to the most of an example, where a rule could also take them as they lie."""


Rows = RowLayout | ListedRows
EACH = RowLayout()  # example n owns position n


@dataclass(frozen=True)
class Owned:
    """One example owns all entries at one position along ``axis``; ``rows`` tells which."""

    axis: int
    rows: Rows

    def field(self, dims: int, n: int) -> Tensor:
        """The example that owns each entry (-1 for none), in a shape that broadcasts to a tensor with ``dims`` axes."""
        return along(self.rows.owners(n), self.axis, dims)


@dataclass(frozen=True, eq=False)
class Scattered:
    """Each entry has an owner of its own."""

    each: Tensor  # broadcasts to the tensor: the example that owns each entry, or -1 for none

    def field(self, dims: int, n: int) -> Tensor:
        """As :meth:`Owned.field`."""
        return self.each


@dataclass(frozen=True, eq=False)
class Crossed:
    """Entries [..., T, S] of attention weights or scores belong to the owner of the query if it is that of the key.

    Nobody owns the other entries: no gradient reaches them.
    """

    queries: Tensor  # [T], the example that owns each query, or -1
    keys: Tensor  # [S]

    def field(self, dims: int, n: int) -> Tensor:
        """As :meth:`Owned.field`."""
        queries, keys = along(self.queries, dims - 2, dims), along(self.keys, dims - 1, dims)
        return torch.where(queries == keys, queries, -1)


@dataclass(frozen=True)
class Sole:
    """One example owns all entries."""

    example: int

    def field(self, dims: int, n: int) -> Tensor:
        """As :meth:`Owned.field`."""
        return torch.tensor(self.example)


@dataclass(frozen=True)
class Shared:
    """All examples use all entries: the tensor is a parameter, or is computed once for all examples."""

    by_loops: bool = False  # several nodes use the tensor, and each of these nodes belongs to one example


@dataclass(frozen=True)
class Unknown:
    """Nothing is known about the owners; ``reason`` names the node that hides them."""

    reason: str


@dataclass(frozen=True)
class Interacting:
    """Cotangents of several examples reach the same entries, although not all examples use all of the tensor."""

    reason: str


Owner = Owned | Scattered | Crossed | Sole
OWNERS = (Owned, Scattered, Crossed, Sole)
State = Owned | Scattered | Crossed | Sole | Shared | Unknown | Interacting
SHARED, BY_LOOPS = Shared(), Shared(by_loops=True)


def along(values: Tensor, axis: int, dims: int) -> Tensor:
    """Values along an axis, in a shape that broadcasts to a tensor with ``dims`` axes."""
    return values.view(*(len(values) if a == axis else 1 for a in range(dims)))


def owner_along(axis: int, owners: Tensor, n: int) -> Owned | Sole | None:
    """The simplest owner that says the same as a list of owners along an axis; None where nobody owns anything."""
    if not len(owners) or int(owners.amax()) < 0:
        return None
    complete = int(owners.amin()) >= 0
    if complete and bool((owners == owners[0]).all()):
        return Sole(int(owners[0]))
    if complete and len(owners) % n == 0 and int(owners[0]) == 0:
        inner = int((owners != 0).int().argmax())
        if len(owners) % (n * inner) == 0:
            regular = RowLayout(len(owners) // (n * inner), inner)
            if torch.equal(regular.owners(n), owners):
                return Owned(axis, EACH if regular == EACH else regular)
    return Owned(axis, ListedRows(owners))


def owners_of_field(field: Tensor, n: int, exact: bool = False) -> Owner | None:
    """The simplest owner that says the same as a field of owners (-1 for none).

    Entries without an owner may be given the owner of other entries at the same position along an axis, unless
    ``exact`` is set.
    """
    if not field.numel() or int(field.amax()) < 0:
        return None
    if field.dim() == 0:
        return Sole(int(field))
    for axis in range(field.dim()):
        first = field.narrow(axis, 0, 1)
        if field.shape[axis] > 1 and bool((field == first).all()):
            field = first
    wide = [axis for axis in range(field.dim()) if field.shape[axis] > 1]
    if len(wide) > 1:
        if exact:
            return Scattered(field)
        # If one axis alone tells the owners of all owned entries, the entries without an owner may follow it too.
        least, found = field.masked_fill(field < 0, n), []
        for axis in wide:
            rest = [a for a in range(field.dim()) if a != axis]
            most = field.amax(rest)
            if bool(((least.amin(rest) == most) | (most < 0)).all()):
                found.append(owner_along(axis, most, n))
        return found[0] if len(found) == 1 else Scattered(field)
    return owner_along(wide[0] if wide else 0, field.reshape(-1), n)


def list_along(state: Owner, axis: int, size: int, n: int) -> Tensor | None:
    """The owners along an axis of this size; None where they do not lie along the axis."""
    if isinstance(state, Sole):
        return torch.full((size,), state.example)
    return state.rows.owners(n) if isinstance(state, Owned) and state.axis == axis else None


def is_complete(state: Owner) -> bool:
    """Whether every entry has an owner."""
    if isinstance(state, Sole) or (isinstance(state, Owned) and isinstance(state.rows, RowLayout)):
        return True
    if isinstance(state, Crossed):
        return False
    return int((state.rows.listed if isinstance(state, Owned) else state.each).amin()) >= 0


def merge(a: State | None, b: State | None, shape: Callable[[], Shape], n: int) -> State | None:
    """The state of a tensor with two uses, from the states ``a`` and ``b`` that the uses give it."""
    if a is b or b is None:
        return a
    if a is None:
        return b
    for kind in (Interacting, Unknown):
        for state in (a, b):
            if isinstance(state, kind):
                return state
    if isinstance(a, Shared) or isinstance(b, Shared):
        if isinstance(a, Shared) and isinstance(b, Shared):
            return a if a == b else SHARED
        shared, other = (a, b) if isinstance(a, Shared) else (b, a)
        return shared if shared.by_loops and isinstance(other, Sole) else Interacting(USED_BOTH_WAYS)
    if a == b:
        return a
    if isinstance(a, Sole) and isinstance(b, Sole):
        return BY_LOOPS
    dims = len(shape())
    first, second = torch.broadcast_tensors(a.field(dims, n), b.field(dims, n))
    if bool(((first >= 0) & (second >= 0) & (first != second)).any()):
        return Interacting(
            "examples interact: entries of a tensor belong to one of them in one use, to another in the next "
            "(unsupported='exact' tells them apart, if no example's output depends on another)"
        )
    # An axis of size one in the field stands for the whole axis.
    return owners_of_field(torch.maximum(first, second), n)


USED_BOTH_WAYS = "examples interact: a tensor is used by all of them in one place, and by each for itself in another"
