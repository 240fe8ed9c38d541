"""Who owns the entries of a tensor: the answers, and how two of them go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowLayout:
    """Positions of an axis in a regular order: position (a, n, b) of [outer, N, inner] belongs to example n."""

    outer: int = 1
    inner: int = 1

    def owners(self, n: int) -> Tensor:
        """The owner of each position, [outer * N * inner]."""
        return torch.arange(n).repeat_interleave(self.inner).repeat(self.outer)

    def split(self, t: Tensor, n: int, fill: float = 0) -> Tensor:
        """[outer * N * inner, ...] -> [N, outer * inner, ...], a view where strides allow."""
        if self.outer == self.inner == 1:
            return t.unsqueeze(1)
        t = t.unflatten(0, (self.outer, n, self.inner))  # [A, N, B, ...]
        return t[0] if self.outer == 1 else t.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class ListedRows:
    """Positions of an axis in any order, with the owner of each; -1 where no example owns it."""

    listed: Tensor  # [S], on the CPU

    def owners(self, n: int) -> Tensor:
        return self.listed

    def split(self, t: Tensor, n: int, fill: float = 0) -> Tensor:
        """[S, ...] -> [N, most positions of an example, ...]: those who have fewer get ``fill`` behind them."""
        order = self.listed.argsort(stable=True)
        owners = self.listed[order]
        counts = torch.bincount(owners[owners >= 0], minlength=n)
        nobodys = int((owners < 0).sum())
        place = torch.arange(len(order)) - nobodys - (counts.cumsum(0) - counts)[owners.clamp_min(0)]
        index = torch.full((n, max(1, int(counts.max()))), len(t))
        index[owners[nobodys:], place[nobodys:]] = order[nobodys:]
        filled = torch.cat([t, t.new_full((1, *t.shape[1:]), fill)])
        return filled[index.to(t.device)]


Rows = RowLayout | ListedRows
EACH = RowLayout()  # position n belongs to example n


@dataclass(frozen=True)
class Owned:
    """The entries at one position of ``axis`` belong to one example, by ``rows``."""

    axis: int
    rows: Rows

    def field(self, dims: int, n: int) -> Tensor:
        """The owner of each entry of a tensor of ``dims`` axes, -1 for none, of a shape that broadcasts to it."""
        return along(self.rows.owners(n), self.axis, dims)


@dataclass(frozen=True, eq=False)
class Scattered:
    """Each entry has an owner of its own: ``each`` broadcasts to the tensor and holds -1 where no example owns it."""

    each: Tensor

    def field(self, dims: int, n: int) -> Tensor:
        return self.each


@dataclass(frozen=True)
class Sole:
    """All entries belong to one example."""

    example: int

    def field(self, dims: int, n: int) -> Tensor:
        return torch.tensor(self.example)


@dataclass(frozen=True)
class Shared:
    """Every example may own every entry: a parameter, or something that is computed once for all examples."""

    by_loops: bool = False  # seen by several examples' own nodes, each of which owns it alone


@dataclass(frozen=True)
class Unknown:
    """Nothing is known, because of the node that is named."""

    reason: str


@dataclass(frozen=True)
class Interacting:
    """Different examples own the same entries."""

    reason: str


Owner = Owned | Scattered | Sole
OWNERS = (Owned, Scattered, Sole)
State = Owned | Scattered | Sole | Shared | Unknown | Interacting
SHARED, BY_LOOPS = Shared(), Shared(by_loops=True)


def along(values: Tensor, axis: int, dims: int) -> Tensor:
    """Values along an axis, of a shape that broadcasts to a tensor of ``dims`` axes."""
    return values.view(*(len(values) if a == axis else 1 for a in range(dims)))


def owned(axis: int, owners: Tensor, n: int) -> Owned | Sole | None:
    """The simplest form of a list of owners along an axis; None where nobody owns anything."""
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
    """The simplest form of the owner of each entry (-1: none), of one axis if that tells it.

    ``exact``: entries without an owner are not given those of others at the same position of an axis.
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
        # Where one axis alone tells the owners of all entries that have one, the others may have the same.
        least, found = field.masked_fill(field < 0, n), []
        for axis in wide:
            rest = [a for a in range(field.dim()) if a != axis]
            most = field.amax(rest)
            if bool(((least.amin(rest) == most) | (most < 0)).all()):
                found.append(owned(axis, most, n))
        return found[0] if len(found) == 1 else Scattered(field)
    return owned(wide[0] if wide else 0, field.reshape(-1), n)


def list_along(state: Owner, axis: int, size: int, n: int) -> Tensor | None:
    """Owners along an axis of that size, if they lie along it."""
    if isinstance(state, Sole):
        return torch.full((size,), state.example)
    return state.rows.owners(n) if isinstance(state, Owned) and state.axis == axis else None


def is_complete(state: Owner) -> bool:
    """Whether each entry has an owner."""
    if isinstance(state, Sole) or (isinstance(state, Owned) and isinstance(state.rows, RowLayout)):
        return True
    return int((state.rows.listed if isinstance(state, Owned) else state.each).amin()) >= 0


def merge(a: State | None, b: State | None, shape: Callable[[], Shape], n: int) -> State | None:
    """The state of a tensor that has two uses."""
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
    # Axes of size one in the field stand for whole axes.
    return owners_of_field(torch.maximum(first, second), n)


USED_BOTH_WAYS = "examples interact: a tensor is used by all of them in one place, and by each for itself in another"
