"""The factors of a table that is looked up, and is also the weight of a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import planner, reference
from .factors import Factors, Outer, Reuse, Scatter

TIED_ROWS = 512  # rows of a tied table's gradient that are formed at once


@dataclass(frozen=True)
class Tied(Factors):
    """G_n of a table [rows, D] that is looked up, and is also the weight of a linear layer: a language model's head.

    A row that example n looks up is formed from both uses and then squared, for :data:`TIED_ROWS` positions at a time.
    All other rows are those of the linear layer alone. So no gradient of the table's size is formed.
    """

    layer: Outer
    table: Scatter

    def filter_sums(self, reuse: Reuse) -> Tensor:
        q = F.pad(self.layer.filter_sums(reuse), (0, 1))  # the last column is for positions that count elsewhere
        for n in range(len(self.table.index)):
            for row, gradient in self._looked_up(n):
                q[n].index_copy_(0, row, gradient.square().sum(1).to(q.dtype))
        return q[:, :-1]

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        rows = self.table.rows
        index = self.table.index
        g = F.pad(self.layer.g, (0, 1))
        g.scatter_(2, torch.where(index < 0, rows, index)[:, None].expand(-1, g.shape[1], -1), 0)
        replace(self.layer, g=g[:, :, :-1]).accumulate_(out, weight)
        for n in range(len(index)):
            for row, gradient in self._looked_up(n):
                once = (row < rows)[:, None]
                squares = torch.where(once, gradient.square() * weight[n], 0).to(out.dtype)
                out.view(rows, -1).index_add_(0, torch.where(once[:, 0], row, 0), squares)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.layer.gradients(start, stop).add_(self.table.gradients(start, stop))

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        return self.layer.work(cotangents)

    def predict(self, cotangents: int) -> float | None:
        return self.layer.predict(cotangents)

    def _looked_up(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The gradients [B, D] of the rows that positions of example n look up, and the numbers of these rows [B].

        A position whose row was looked up before, or that looks nothing up, gets the number ``rows``.
        """
        index, rows = self.table.index[n], self.table.rows
        x, scattered = (reference.widen(t[n]) for t in (self.layer.x, self.table.g))
        for start in range(0, len(index), TIED_ROWS):
            here = index[start : start + TIED_ROWS]
            same = here[:, None] == index  # [B, S]
            counts = (here >= 0) & ~same.tril(start - 1).any(1)  # no earlier position looks the row up
            g = self.layer.g[n].index_select(1, here.clamp_min(0))  # [S of the layer, B]
            gradient = reference.widen(g).mT @ x
            gradient.addmm_(same.to(gradient.dtype), scattered.to(gradient.dtype))
            yield torch.where(counts, here, rows), gradient


def tied(layer: Factors | None, table: Factors | None) -> Tied | None:
    """Join a linear layer and the lookups of a table with the same entries; None where sums of gradients are better."""
    if not isinstance(layer, Outer) or not isinstance(table, Scatter):
        return None
    fits = layer.g.shape[2] == table.rows and layer.x.shape[2] == table.g.shape[2] and len(layer.g) == len(table.g)
    return Tied(layer, table) if fits and table.index.shape[1] < table.rows else None
