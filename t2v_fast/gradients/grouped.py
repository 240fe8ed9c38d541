"""Factors of weights whose rows belong to examples in any order, and of the matrices of a mixture of experts.

In a mixture of experts, each expert sees some tokens of some examples. The per-example gradient of an expert's matrix
is a sum over the rows of one expert and one example: a *segment*. Segments differ in length, and most are short.
:class:`Grouped` sorts the rows by segment, and squares all segments in one call, without padding.

The matrices of the experts lie in a *stack* [E, ...], which a network reads in three ways: by products with all of the
stack that know where each expert's rows end (``torch.nn.functional.grouped_mm``), by a product with one matrix
(``weight[e]``), or by products with a matrix for each row (``weight[index]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..ops import planner, reference
from .factors import Factors, Outer, Product, Reuse, Scatter
from .owners import ListedRows, Owned, Owner, PaddedRows
from .tied import tied


@dataclass(frozen=True)
class Segments:
    """Rows in the order of their segments: expert by expert, and example by example for each expert."""

    order: Tensor | None  # the row at each place; None if the rows are in this order already
    offsets: Tensor  # [E N + 1]: where each segment starts and ends

    @classmethod
    def of(cls, key: Tensor, count: int) -> Segments:
        """Sort rows by their segment; ``key`` [R] has numbers below ``count``, and ``count`` for rows of nobody."""
        offsets = torch.bincount(key, minlength=count + 1)[:count].cumsum(0)
        offsets = torch.cat([offsets.new_zeros(1), offsets])
        sorted_already = len(key) < 2 or bool((key[1:] >= key[:-1]).all())
        return cls(None if sorted_already else key.argsort(stable=True), offsets)

    def arrange(self, t: Tensor) -> Tensor:
        """Rows of a tensor [R, ...] in the order of the segments."""
        return t if self.order is None else t.index_select(0, self.order.to(t.device))


@dataclass(eq=False)
class Grouped(Factors):
    """G_n = sum of g x^T over the rows of example n, for each of E experts; the parameter is [E, O, I].

    A linear layer whose rows lie in any order is the case of one expert.
    """

    x: Tensor  # [R, I]
    g: Tensor  # [R, O]
    key: Tensor  # [R], on the CPU: expert * N + example, or E N for a row of nobody
    examples: int
    experts: int = 1
    filters: str = "rows"  # of the parameter: the rows of all matrices, or "outputs" or "inputs" over all experts

    @cached_property
    def segments(self) -> Segments:
        """The rows by segment."""
        return Segments.of(self.key, self.experts * self.examples)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.segments.arrange(self.x), self.segments.arrange(self.g), self.segments.offsets.to(self.g.device)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        x, g, offsets = self._operands()
        if self.filters == "inputs":
            x, g = g, x
        q = ops.sq_grouped(x, g, offsets).view(self.experts, self.examples, g.shape[1])
        return q.transpose(0, 1).flatten(1) if self.filters == "rows" else q.sum(0)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        x, g, offsets = self._operands()
        groups = torch.arange(self.experts + 1, device=g.device) * self.examples
        out = out.view(self.experts, g.shape[1], x.shape[1])
        ops.sq_grouped_acc_(out, x, g, offsets, groups, weight.repeat(self.experts))

    def gradients(self, start: int, stop: int) -> Tensor:
        x, g = (reference.widen(t) for t in (self.x, self.g))
        found = x.new_zeros(stop - start, self.experts, g.shape[1], x.shape[1])
        owned = self.key < self.experts * self.examples
        for segment in self.key[owned].unique().tolist():
            expert, example = divmod(segment, self.examples)
            if start <= example < stop:
                rows = (self.key == segment).nonzero()[:, 0].to(x.device)
                found[example - start, expert] = g[rows].T @ x[rows]
        return found.flatten(1)

    def along(self, axis: int, dims: int) -> Factors | None:
        if axis == dims - 1:
            return replace(self, filters="inputs")
        return replace(self, filters="outputs") if (axis, dims) == (1, 3) else None

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        rows, outputs, inputs = self.segments.offsets.diff(), self.g.shape[1], self.x.shape[1]
        flops = torch.minimum(2 * rows * outputs * inputs, rows**2 * (outputs + inputs)).sum()
        read = len(self.key) * (outputs + inputs) * self.g.element_size()
        share = cotangents / max(1, self.examples)
        return "segments", planner.Work((), (), int(flops * share), int(read * share))


def grouped(x: Tensor, g: Tensor, owner: Owner, n: int, experts: Tensor | int = 0, count: int = 1) -> Grouped:
    """The factors of rows x [R, I] and g [R, O] that examples own along the first axis.

    ``experts`` is the number of the expert of each row, below ``count``, or ``count`` where a row has no expert.
    """
    owners = owner.rows.owners(n) if isinstance(owner, Owned) else torch.full((len(g),), owner.example)
    key = experts * n + owners
    return Grouped(x, g, key.masked_fill((owners < 0) | (key >= count * n), count * n), n, count)


def is_listed(owner: Owner) -> bool:
    """Whether the rows of an axis lie in no regular order, so that examples may have different numbers of them."""
    listed = isinstance(owner, Owned) and isinstance(owner.rows, ListedRows)
    return listed and not isinstance(owner.rows, PaddedRows)


def _joined(factors: Sequence[Factors]) -> Grouped | None:
    """Join the factors of several uses, at least one of which is :class:`Grouped`; None where their forms differ."""
    first = next(f for f in factors if isinstance(f, Grouped))
    parts: list[Grouped] = []
    for f in factors:
        if isinstance(f, Outer) and first.experts == 1:
            key = torch.arange(f.x.shape[0]).repeat_interleave(f.x.shape[1])
            f = Grouped(f.x.flatten(0, 1), f.g.flatten(0, 1), key, f.x.shape[0])
        if not isinstance(f, Grouped) or f.experts != first.experts:
            return None
        if (f.x.shape[1], f.g.shape[1]) != (first.x.shape[1], first.g.shape[1]):
            return None
        parts.append(f)
    parts.sort(key=lambda f: int(f.key[0]) if len(f.key) else 0)  # a loop over experts is in this order then
    x, g, key = (torch.cat([getattr(f, name) for f in parts]) for name in ("x", "g", "key"))
    return Grouped(x, g, key, first.examples, first.experts)


def concatenated(factors: Sequence[Factors]) -> Factors | None:
    """Join the factors of several uses into those of one use with all positions; None where their forms differ."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if any(isinstance(f, Grouped) for f in factors):
        return _joined(factors)
    if (joined := getattr(first, "joined", None)) is not None:
        return joined(factors[1:])
    kinds = {type(f) for f in factors}
    if kinds == {Outer, Scatter}:
        return tied(*(concatenated([f for f in factors if isinstance(f, kind)]) for kind in (Outer, Scatter)))
    if len(kinds) > 1 or len({f.g.shape[2:] for f in factors if isinstance(f, (Outer, Scatter))}) > 1:
        return None  # one of the layers sees the parameter in another shape
    if all(isinstance(f, Outer) and f.of_input == first.of_input and f.x.shape[2] == first.x.shape[2] for f in factors):
        return Outer(torch.cat([f.x for f in factors], 1), torch.cat([f.g for f in factors], 1), first.of_input)
    if all(isinstance(f, Scatter) and f.rows == first.rows for f in factors):
        return Scatter(torch.cat([f.index for f in factors], 1), torch.cat([f.g for f in factors], 1), first.rows)
    if all(isinstance(f, Product) for f in factors):
        return Product(torch.cat([f.terms(0, len(f.g)) for f in factors], 1))
    return None
