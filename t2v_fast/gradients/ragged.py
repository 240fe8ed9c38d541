"""Factors of examples with very different numbers of positions, such as packed sequences of different lengths.

Factors have as many positions for each example as the longest one has. Where that would be mostly padding, examples of
similar length get factors of their own, so that memory and work grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import planner
from .factors import Factors, Reuse
from .grouped import concatenated
from .owners import ListedRows, Owned, Owner, PaddedRows

PADDED = 1.5  # how many positions, padding among them, may come on one that belongs to an example


def groups_of(owner: Owner, n: int) -> list[tuple[Tensor, Owned]] | None:
    """Divide the examples into groups of similar length: their numbers, and the owner of a tensor that is theirs alone.

    None where one group serves all.
    """
    if not isinstance(owner, Owned) or not isinstance(owner.rows, ListedRows):
        return None
    listed = owner.rows.listed
    counts = torch.bincount(listed[listed >= 0], minlength=n)
    if int(counts.max()) * n <= PADDED * int(counts.sum()):
        return None
    sizes = counts.clamp_min(1).double().log2().floor()
    groups = []
    for size in sizes.unique():
        examples = (sizes == size).nonzero()[:, 0]
        number = torch.full((n + 1,), -1)  # the last is for positions of nobody
        number[examples] = torch.arange(len(examples))
        groups.append((examples, Owned(owner.axis, PaddedRows(number[listed]))))
    return groups if len(groups) > 1 else None


@dataclass(eq=False)
class Ragged(Factors):
    """Factors for groups of examples, each with the numbers of its examples."""

    groups: Sequence[tuple[Tensor, Factors]]

    @property
    def g(self) -> Tensor | None:
        """A cotangent, whose precision is that of all."""
        return getattr(self.groups[0][1], "g", None)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        found = [part.filter_sums(Reuse(reuse.cotangents)) for _, part in self.groups]
        return torch.cat(found)[self._order().to(found[0].device)]

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        for examples, part in self.groups:
            part.accumulate_(out, weight[examples.to(weight.device)])

    def gradients(self, start: int, stop: int) -> Tensor:
        places = {int(e): (part, k) for examples, part in self.groups for k, e in enumerate(examples)}
        each = (places[e] for e in range(start, stop))
        return torch.cat([part.gradients(k, k + 1) for part, k in each])

    def exchanged(self) -> Factors | None:
        parts = [(examples, part.exchanged()) for examples, part in self.groups]
        return None if any(part is None for _, part in parts) else Ragged(parts)

    def joined(self, others: Sequence[Factors]) -> Factors | None:
        """Join these factors with those of other uses of the parameter, as :func:`concatenated`."""
        parts = []
        for k, (examples, part) in enumerate(self.groups):
            rest = [f.groups[k] for f in others if isinstance(f, Ragged) and len(f.groups) == len(self.groups)]
            if len(rest) < len(others) or not all(torch.equal(examples, theirs) for theirs, _ in rest):
                return None
            parts.append((examples, concatenated([part, *(f for _, f in rest)])))
        return None if any(part is None for _, part in parts) else Ragged(parts)

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        works = [part.work(cotangents) for _, part in self.groups]
        flops, moved = (sum(getattr(w, key) for _, w in works) for key in ("flops", "bytes"))
        return ", ".join(dict.fromkeys(path for path, _ in works)), planner.Work((), (), flops, moved)

    def _order(self) -> Tensor:
        return torch.cat([examples for examples, _ in self.groups]).argsort()
