"""Factors of per-example gradients, in the form that :mod:`t2v_fast.ops` takes.

The per-example gradient of a weight is a sum over positions of products, for instance G_n = sum_s g x^T for a linear
layer with input x [N, S, I] and cotangent g [N, S, O]. The *factors* of G_n are these tensors. Each class below stands
for one form of product, and computes the squares of G_n from the factors, in most forms without forming G_n itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from .. import ops
from ..ops import planner, reference
from ..ops.asynchronous import to_device
from .owners import Owner, Shape
from .ownership import call_node, dense

MAX_GRADIENT_ENTRIES = 2**24  # entries of per-example gradients held at once, in the forms that hold them


@dataclass
class Plan:
    """The path that the planner chose for a layer, and everything that the choice depends on."""

    key: tuple | None = None
    path: str = ""
    keeps_gram: bool = False  # whether the Gram matrices are kept for the next cotangents


@dataclass
class Reuse:
    """Values that are computed once at a node, for several cotangents of a batch or for several parameters."""

    cotangents: int = 1  # the number of cotangents of the batch
    parameters: int = 1  # the number of wanted parameters that enter the node
    gram: Tensor | None = None  # Gram matrices of the layer's input, for all cotangents
    bias: Tensor | None = None  # filter sums of a bias, computed with those of its layer's weight, for this cotangent
    plan: Plan = field(default_factory=Plan, init=False)  # the recorder keeps it from batch to batch


class Factors(ABC):
    """The factors of a parameter's per-example gradients G_n, for N examples.

    The classes are not frozen, because a frozen object takes three times as long to make, and a pass makes hundreds.
    """

    @abstractmethod
    def filter_sums(self, reuse: Reuse) -> Tensor:
        """Sums of squares over each filter, or over equal parts of each: q [N, multiple of the number of filters]."""

    @abstractmethod
    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        """out += sum_n weight[n] G_n^2, where ``out`` is contiguous and has as many entries as the parameter."""

    @property
    def adds_once(self) -> bool:
        """Whether :meth:`accumulate_` adds the sum over all examples, and not the squares of one after the other.

        Then ``out`` may hold the sums of many batches without a loss of precision.
        """
        return False

    @abstractmethod
    def gradients(self, start: int, stop: int) -> Tensor:
        """The gradients G_n of examples ``start`` to ``stop``, [stop - start, entries of the parameter]."""

    @abstractmethod
    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        """The path that :meth:`filter_sums` takes, and its work for one example and all its cotangents."""

    def predict(self, cotangents: int) -> float | None:
        """Seconds that the planner predicts for one example and all its cotangents; None where it predicts nothing."""
        return None

    def along(self, axis: int, dims: int) -> Factors | None:
        """Factors whose filters lie along another axis than the first of ``dims``; None where no form fits."""
        return self.exchanged() if (axis, dims) == (1, 2) else None

    def exchanged(self) -> Factors | None:
        """Factors of the transposed gradients, with the filters along the second axis; None where no form fits."""
        return None


class _Layer(Factors):
    """A convolution of x [N, C, H, W] with cotangent g [N, O, Ho, Wo], or a linear layer treated as one.

    ``of_input`` is true if x is the layer's input, whose Gram matrix serves all cotangents. Otherwise x is the
    cotangent and g is the input.
    """

    @property
    @abstractmethod
    def conv(self) -> planner.Conv:
        """The geometry that the planner sees."""

    @abstractmethod
    def images(self, t: Tensor) -> Tensor:
        """x or g as images."""

    @abstractmethod
    def sums(self, path: str) -> Tensor:
        """Sums of squares over each filter, q [N, filters], by one path."""

    def path(self, cotangents: int) -> str:
        """The path that the planner chooses for a number of cotangents."""
        return planner.choose(self.conv, self.x, cotangents)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        plan, path = self._planned(reuse)
        if plan.keeps_gram:
            return ops.sq_gram(self._kept_gram(reuse), self.images(self.g))
        return self.sums(path)

    def _kept_gram(self, reuse: Reuse) -> Tensor:
        """The Gram matrices of the input, which serve all cotangents."""
        if reuse.gram is None:
            reuse.gram = ops.conv_gram(self.images(self.x), *self.conv.arguments)
        return reuse.gram

    def _planned(self, reuse: Reuse) -> tuple[Plan, str]:
        """The plan of this layer, made anew only if something that the choice depends on has changed."""
        plan, x = reuse.plan, self.x
        key = (
            x.shape,
            self.g.shape,
            x.dtype,
            x.device,
            self.geometry,
            self.of_input,
            reuse.cotangents,
            planner.forced(),
        )
        if plan.key != key:
            path = self.path(reuse.cotangents)
            # Keep the Gram matrices for the next cotangent only if they take no more memory than the layer itself. An
            # empty text has no position, and so no Gram matrix.
            again = path == "gram" and self.of_input and reuse.cotangents > 1
            keeps = again and 0 < self.conv.gram_numel * len(x) <= x.numel() + self.g.numel()
            plan.key, plan.path, plan.keeps_gram = key, path, keeps
        return plan, plan.path

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        path = self.path(cotangents)
        return path, planner.work(self.conv, path, self.x.element_size(), cotangents)

    def predict(self, cotangents: int) -> float | None:
        return planner.predict(self.conv, self.x, self.path(cotangents), cotangents)


@dataclass(eq=False)
class Outer(_Layer):
    """G_n = sum_s g x^T of a linear layer; the parameter is [O, I]."""

    x: Tensor  # [N, S, I]
    g: Tensor  # [N, S, O]
    of_input: bool = True
    geometry: ClassVar[tuple] = ()

    @property
    def conv(self) -> planner.Conv:
        return planner.Conv(self.x.shape[2], (1, self.x.shape[1]), self.g.shape[2])

    def path(self, cotangents: int) -> str:
        # With one token the gradient has rank one, which sq_outer squares faster than any path of a convolution.
        return "explicit" if self.x.shape[1] == 1 else super().path(cotangents)

    def images(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).unsqueeze(2)

    def sums(self, path: str) -> Tensor:
        return ops.sq_outer(self.x, self.g, path)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        if self.of_input and reuse.parameters > 1 and ops.fuses_bias(self.x, self.g):
            plan, path = self._planned(reuse)
            if path == "gram":
                gram = self._kept_gram(reuse) if plan.keeps_gram else None
                q, reuse.bias = ops.sq_linear(self.x, self.g, path, gram).unbind()
                return q
        return super().filter_sums(reuse)

    @property
    def adds_once(self) -> bool:
        return self.x.shape[1] == 1 and self.x.device.type == "cpu"

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        out = out.view(self.g.shape[2], self.x.shape[2])
        if self.adds_once:
            accumulate_rank_one_(out, self.x[:, 0], self.g[:, 0], weight)
        else:
            ops.sq_outer_acc_(out, self.x, self.g, weight)

    def gradients(self, start: int, stop: int) -> Tensor:
        x, g = (reference.widen(t[start:stop]) for t in (self.x, self.g))
        return (g.mT @ x).flatten(1)

    def exchanged(self) -> Factors | None:
        return Outer(self.g, self.x, not self.of_input)


def accumulate_rank_one_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """Add the weighted squares of gradients g x^T to ``out`` [O, I], from x [N, I], g [M, O] and weights [M].

    A square of a product is a product of squares, so one matrix product serves all examples.
    """
    squares = reference.widen(g).square().mul_(weight.unsqueeze(1))
    if len(g) > len(x):
        squares = squares.unflatten(0, (-1, len(x))).sum(0)
    out.addmm_(squares.T, reference.widen(x).square())


@dataclass(eq=False)
class Convolution(_Layer):
    """G_n of a 2-d convolution; the parameter is [O, C / groups, *kernel]."""

    x: Tensor  # [N, C, H, W]
    g: Tensor  # [N, O, Ho, Wo]
    geometry: tuple  # kernel_size, stride, padding, dilation, groups
    of_input: bool = True

    @property
    def conv(self) -> planner.Conv:
        return planner.Conv(self.x.shape[1], tuple(self.x.shape[2:]), self.g.shape[1], *self.geometry)

    def images(self, t: Tensor) -> Tensor:
        return t

    def sums(self, path: str) -> Tensor:
        return ops.sq_conv(self.x, self.g, *self.geometry, path)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        kernel_size, stride, padding, dilation, groups = self.geometry
        rest = stride, padding, dilation, groups
        if self.g.shape[2:].numel() == 1 and groups == 1 and self.x.device.type == "cpu":
            patches = F.unfold(reference.widen(self.x), kernel_size, dilation, padding, stride)[:, :, 0]
            accumulate_rank_one_(out.view(self.g.shape[1], -1), patches, self.g[:, :, 0, 0], weight)
            return
        out = out.view(self.g.shape[1], -1, *kernel_size)
        ops.sq_conv_acc_(out, self.x, self.g, weight, *rest, planner.choose(self.conv, self.x, elementwise=True))

    def gradients(self, start: int, stop: int) -> Tensor:
        return torch.stack(
            [t.flatten() for t in reference.conv_gradients(self.x[start:stop], self.g[start:stop], *self.geometry)]
        )


@dataclass(eq=False)
class Product(Factors):
    """G_n = sum_s g (x - shift) scale, or sum_s g for a bias; C counts all entries of the parameter, in their order."""

    g: Tensor  # [N, S, C]
    x: Tensor | None = None  # [N, S, C]
    shift: Tensor | None = None
    scale: Tensor | None = None
    norm: bool = False  # whether the parameter is the weight of a norm, or its bias, which is visited after the weight

    def filter_sums(self, reuse: Reuse) -> Tensor:
        if self.norm and self.x is None and reuse.bias is not None:
            q, reuse.bias = reuse.bias, None
            return q
        if self.norm and self.x is not None and reuse.parameters > 1:
            q, reuse.bias = ops.sq_norm(self.g, self.x, self.shift, self.scale).unbind()
            return q
        return ops.sq_prod(self.g, self.x, self.shift, self.scale)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        ops.sq_prod_acc_(out.view(-1), self.g, weight, self.x, self.shift, self.scale)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.terms(start, stop).sum(1)

    def terms(self, start: int, stop: int) -> Tensor:
        """The terms of the sum over positions, [stop - start, S, C]."""
        g = reference.widen(self.g[start:stop])
        if self.x is None:
            return g
        x = self.x[start:stop].to(g.dtype)
        for t, combine in ((self.shift, torch.sub), (self.scale, torch.mul)):
            if t is not None:
                x = combine(x, t[start:stop] if t.dim() == 3 and len(t) > 1 else t)
        return g * x

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        n = self.g[0].numel() * cotangents
        operands = 1 if self.x is None else 2
        return "pass", planner.Work((), (), n * operands, n * operands * self.g.element_size())


@dataclass(eq=False)
class Stacked(Factors):
    """G_n of a 3-d convolution as 2-d ones, one per slice of the kernel; the parameter is [O, C / groups, *kernel].

    A slice that sees nothing but padding is None. At least one slice is not None.
    """

    slices: Sequence[Convolution | None]

    @property
    def seen(self) -> list[Convolution]:
        """The slices that see more than padding."""
        return [part for part in self.slices if part is not None]

    def filter_sums(self, reuse: Reuse) -> Tensor:
        return sum(part.sums(part.path(1)) for part in self.seen)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        first = self.seen[0]
        out = out.view(first.g.shape[1], -1, len(self.slices), *first.geometry[0])
        for k, part in enumerate(self.slices):
            if part is None:
                continue
            squares = torch.zeros_like(out[:, :, k], memory_format=torch.contiguous_format)
            part.accumulate_(squares, weight)
            out[:, :, k] += squares

    def gradients(self, start: int, stop: int) -> Tensor:
        first = self.seen[0]
        shape = (stop - start, first.g.shape[1], -1, *first.geometry[0])
        some = {k: part.gradients(start, stop).view(shape) for k, part in enumerate(self.slices) if part is not None}
        zero = torch.zeros_like(next(iter(some.values())))
        return torch.stack([some.get(k, zero) for k in range(len(self.slices))], 3).flatten(1)

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        path, work = self.seen[0].work(cotangents)
        return path, planner.Work((), (), work.flops * len(self.seen), work.bytes * len(self.seen))

    def predict(self, cotangents: int) -> float | None:
        seconds = [part.predict(cotangents) for part in self.seen]
        return None if None in seconds else sum(seconds)


@dataclass(eq=False)
class Scatter(Factors):
    """G_n = rows of g, summed by index: the parameter is a table [rows, D]. Negative indices are left out."""

    index: Tensor  # [N, S], int64
    g: Tensor  # [N, S, D]
    rows: int

    def filter_sums(self, reuse: Reuse) -> Tensor:
        return ops.sq_scatter(self.index, self.g, self.rows)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        ops.sq_scatter_acc_(out.view(self.rows, -1), self.index, self.g, weight)

    def gradients(self, start: int, stop: int) -> Tensor:
        index, g = self.index[start:stop], self.g[start:stop]
        return torch.stack([t.flatten() for t in reference.scatter_gradients(index, g, self.rows)])

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        n = self.g[0].numel() * cotangents
        return "pass", planner.Work((), (), 2 * n, n * self.g.element_size())


@dataclass(eq=False)
class Summed(Factors):
    """G_n = the sum over several uses of a parameter, or the gradient that a use passes on to a parameter behind it.

    Each part is a use's factors, with the map from the use's gradients [k, entries of the input] to those of the
    parameter [k, entries]. G_n is formed and then squared, for a chunk of examples at a time.
    """

    parts: Sequence[tuple[Factors, Callable[[Tensor], Tensor]]]
    shape: tuple[int, ...]  # of the parameter
    examples: int
    axis: int = 0  # the axis of the filters

    def gradients(self, start: int, stop: int) -> Tensor:
        return sum(onward(part.gradients(start, stop)) for part, onward in self.parts)

    def _chunks(self) -> Sequence[tuple[int, int]]:
        step = max(1, MAX_GRADIENT_ENTRIES // max(1, math.prod(self.shape)))
        return [(start, min(start + step, self.examples)) for start in range(0, self.examples, step)]

    def filter_sums(self, reuse: Reuse) -> Tensor:
        squares = [self.gradients(*chunk).square_().view(-1, *(self.shape or (1,))) for chunk in self._chunks()]
        return torch.cat([s.movedim(self.axis + 1, 1).flatten(2).sum(2) if s.dim() > 2 else s for s in squares])

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        for start, stop in self._chunks():
            squares = self.gradients(start, stop).square_()
            out.view(-1).add_(weight[start:stop].to(squares.dtype) @ squares)

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        inner = [part.work(cotangents)[1] for part, _ in self.parts]
        return "gradients", planner.Work((), (), sum(w.flops for w in inner), sum(w.bytes for w in inner))


@dataclass(eq=False)
class Formed(Factors):
    """G_n that was computed before, for all uses so far of a parameter."""

    formed: Tensor  # [N, entries of the parameter]

    @classmethod
    def of(cls, factors: Sequence[Factors], examples: int) -> Formed:
        """Add up the gradients of several uses, and let go of their activations."""
        total = torch.clone(factors[0].gradients(0, examples))
        for other in factors[1:]:
            total += other.gradients(0, examples)
        return cls(total)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.formed[start:stop]

    def _summed(self) -> Summed:
        return Summed([(self, lambda t: t)], tuple(self.formed.shape[1:]), len(self.formed))

    def filter_sums(self, reuse: Reuse) -> Tensor:
        return self._summed().filter_sums(reuse)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        self._summed().accumulate_(out, weight)

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        return "gradients", planner.Work((), (), 0, 0)


@dataclass(eq=False)
class Called(Factors):
    """G_n as the autograd node computes it, called with the cotangents of one example after the other.

    Compute it after the backward pass, with a graph that the pass has kept. During a pass, a node computes only the
    gradients that the pass asks for.
    """

    node: Node
    slot: int
    shape: Shape  # of the input
    cotangents: Sequence[Tensor | None]  # of each output of the node
    owners: Sequence[Owner | None]
    examples: int
    exchange: bool = False  # whether the input is the parameter, a matrix, transposed

    def gradients(self, start: int, stop: int) -> Tensor:
        template = next(g for g in self.cotangents if g is not None)
        rows = torch.zeros(
            stop - start,
            math.prod(self.shape),
            dtype=reference.accumulate_dtype(template.dtype),
            device=template.device,
        )
        # Who owns which entries, and the same beside the cotangents: the host need not wait to know who has any.
        known = [
            None if g is None or owner is None else owner.field(g.dim(), self.examples)
            for g, owner in zip(self.cotangents, self.owners, strict=True)
        ]
        there = [
            None if g is None or entries is None else to_device(entries, g.device)
            for g, entries in zip(self.cotangents, known, strict=True)
        ]
        for row, example in zip(rows, range(start, stop), strict=True):
            own = [
                torch.where(of == example, g, 0) if entries is not None and bool((entries == example).any()) else None
                for g, entries, of in zip(self.cotangents, known, there, strict=True)
            ]
            if any(g is not None for g in own):
                found = call_node(self.node, own)[self.slot]
                if found is not None:
                    found = dense(found)
                    row.copy_((found.mT if self.exchange else found).reshape(-1))
        return rows

    def _formed(self) -> Summed:
        """The same gradients as the only part of a sum."""
        return Summed([(self, lambda t: t)], self.shape, self.examples)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        return self._formed().filter_sums(reuse)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        self._formed().accumulate_(out, weight)

    def work(self, cotangents: int) -> tuple[str, planner.Work]:
        return "node by example", planner.Work((), (), 0, 0)


def bytes_of(factors: Factors) -> int:
    """The memory of the tensors that factors hold."""
    held = [value for value in vars(factors).values() if isinstance(value, Tensor)]
    inner = [f for value in vars(factors).values() if isinstance(value, (list, tuple)) for f in value]
    return sum(t.numel() * t.element_size() for t in held) + sum(bytes_of(f) for f in inner if isinstance(f, Factors))
