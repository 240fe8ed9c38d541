"""From the cotangents at the taps of one graph to sums of squares by parameter.

:class:`Squares` runs the backward passes of a batch. In a pass, it computes the squares at each tap as soon as the
cotangent is there. The squares of a parameter with several uses wait until all its gradients can be summed.

The cotangents of several passes share an op at taps where they are small: the op then takes all of them, one after
the other along the axis of the examples. To start an op takes longer there than its arithmetic.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..ops.asynchronous import to_device
from ..ops.reference import accumulate_dtype
from ..spans import backward_by_kind
from .checkpointing import Regions
from .factors import Called, Factors, Formed, Reuse, Summed, bytes_of
from .graph import Taps, Use, backpropagate, bias_slot, onward
from .grouped import Grouped, concatenated
from .routes import GradientRoutes
from .rules import takes_passes_together
from .tensor_parallel import check_transformed, factors_of_use

MAX_TOGETHER = 2**16  # the most entries of cotangents that wait at a tap for those of the next passes


class Recording(Protocol):
    """What :class:`Squares` asks of a :class:`~t2v_fast.gradients.recorder.FisherRecorder`."""

    granularity: str
    parameters: dict[str, nn.Parameter]
    filter_axes: dict[str, int]
    observer: Callable[[Use, Factors, int, float, float], None] | None
    before_last: Callable[[dict[str, Tensor]], None] | None
    regions: Regions

    @property
    def leaves(self) -> dict[str, Tensor]: ...

    def reading(self) -> AbstractContextManager[None]: ...

    def zeros(self, name: str, n: int) -> Tensor: ...

    def reuse_at(self, uses: Sequence[Use], cotangents: int, single: Set[str]) -> Reuse: ...


class Squares:
    """The sums of squares that the backward passes through one graph add up.

    Args:
        recorder: The recorder, whose settings hold.
        output: The output [N, ...] of the network.
        n: The number of examples.
        taps: The taps of the graph.
        routes: The routes of the parameters.
        cotangents: The number of backward passes.
        weights: Weights [N] of the examples in the sums of granularity ``"parameter"``; one each if None.
        totals: Sums of earlier batches. Squares that cost no digits there are added to them in place.
    """

    def __init__(
        self,
        recorder: Recording,
        output: Tensor,
        n: int,
        taps: Taps,
        routes: GradientRoutes,
        cotangents: int,
        weights: Tensor | None,
        totals: Mapping[str, Tensor],
    ) -> None:
        self.recorder, self.output, self.n, self.taps, self.routes = recorder, output, n, taps, routes
        self._summed_up = recorder.granularity == "parameter"
        self._totals = totals
        self._weights = None if weights is None else to_device(weights, output.device)
        self._weights_of: dict[tuple, Tensor] = {}  # by device, type and number of passes
        self._sums: dict[str, Tensor] = {}
        self._reuse = {node: recorder.reuse_at(uses, cotangents, routes.single) for node, uses in taps.uses.items()}
        self._together: Set[Node] = {node for node in taps.uses if self._can_wait(node)} if cotangents > 1 else set()
        self._waiting: dict[Node, list[Tensor]] = {}  # cotangents of passes that are computed with those of later ones
        self._passes_left = 0  # of the group, after the present one
        # Of the present pass:
        self._kept: dict[str, list[tuple[Use, Factors]]] = {}  # factors of the summed parameters
        self._missing: Counter[str] = Counter()  # how many uses of a summed parameter are still to come
        self._later: list[tuple[Use, Factors]] = []  # factors that can be computed only after the pass
        self._begin: Callable[[Node], None] = lambda node: None

    def add(self, cotangent: Tensor, left: int, retain_graph: bool) -> None:
        """Backpropagate one cotangent.

        Args:
            cotangent: The cotangent of the output, in its shape.
            left: How many passes :meth:`add` will be called for until :meth:`take`, after this one.
            retain_graph: Whether to keep the graph for another pass.
        """
        self._passes_left = left
        self._kept, self._later = {}, []
        if self.routes.summed:
            self._missing = Counter(name for use in self.taps for name in self.routes.summed & {*use.parameters})
        with backward_by_kind(self.taps.order, self.n) as self._begin:
            backpropagate(self.output, cotangent, self.taps, self._visit, retain_graph)
            if not (self._later or self._kept or (self._waiting and not left)):
                return
            with torch.no_grad(), self.recorder.reading():
                for use, factors in self._later:
                    self._begin(use.node)
                    if use.parameter in self.routes.single:
                        self._add(use, factors, self._reuse[use.node])
                for name, found in self._kept.items():
                    self._begin(found[0][0].node)
                    self._add_summed(name, found)
                for node in list(self._waiting) if not left else ():  # which the last pass has not reached
                    self._begin(node)
                    self._visit_together(node)

    def so_far(self) -> dict[str, Tensor]:
        """Return a copy of the sums of the passes since the last call of :meth:`take`."""
        return {name: q.clone() for name, q in self._sums.items()}

    def take(self) -> dict[str, Tensor]:
        """Return the sums of the passes since the last call, without what was added to the totals."""
        sums, self._sums = self._sums, {}
        return sums

    def _can_wait(self, node: Node) -> bool:
        """Whether an op at this tap can take the cotangents of several passes together."""
        recorder, uses = self.recorder, self.taps.uses[node]
        if recorder.observer is not None or recorder.before_last is not None or recorder.regions.holding:
            return False  # an op is watched, or the sums of all but the last pass are wanted
        return all(
            use.parameter in self.routes.single
            and takes_passes_together(use)
            and use.shape[:: -1 if use.transposed else 1] == tuple(recorder.parameters[use.parameter].shape)
            and (self._summed_up or recorder.filter_axes[use.parameter] == 0)
            for use in uses
        )

    def _visit(self, node: Node, cotangents: tuple[Tensor | None, ...]) -> None:
        if all(g is None for g in cotangents):
            if self._passes_left or node not in self._waiting:
                return
            with self.recorder.reading():
                self._begin(node)
                self._visit_together(node)  # as long as the node has its saved tensors
            return
        with self.recorder.reading():
            self._begin(node)
            g = cotangents[0]
            if node in self._together and g is not None and g.device.type == "cpu":
                waiting = self._waiting.get(node, [])
                if waiting or (g.numel() * (self._passes_left + 1) <= MAX_TOGETHER and self._passes_left):
                    self._waiting[node] = [*waiting, g]
                    if not self._passes_left:
                        self._visit_together(node)
                    return
            self._uses_at(node, cotangents)

    def _visit_together(self, node: Node) -> None:
        waiting = self._waiting.pop(node)
        self._uses_at(node, (torch.cat(waiting),), len(waiting))

    def _uses_at(self, node: Node, cotangents: tuple[Tensor | None, ...], passes: int = 1) -> None:
        """Compute the squares at a tap from the cotangents of one pass, or of several ``passes`` together."""
        recorder, routes, of_node = self.recorder, self.routes, self._reuse[node]
        for use in self.taps.uses[node]:
            single = use.parameter in routes.single
            if single and of_node.bias is not None and self._is_bias(use):
                q, of_node.bias = of_node.bias, None  # computed with the layer's weight
                self._add_filter_sums(use.parameter, q)
                continue
            factors = factors_of_use(use, cotangents, self.n, alone=single)
            if type(factors) is Called:
                self._later.append((use, factors))
            elif single:
                self._add(use, factors, of_node, passes, self._totals)
                continue
            for name in routes.summed.intersection(use.parameters):
                self._kept.setdefault(name, []).append((use, factors))
                if recorder.regions.holding and use.direct:
                    self._kept[name] = self._without_activations(self._kept[name], name)
                self._missing[name] -= 1
                if not self._missing[name] and not any(isinstance(f, Called) for _, f in self._kept[name]):
                    self._add_summed(name, self._kept.pop(name))
        if recorder.regions.holding:
            of_node.gram = None  # the next cotangent computes it again, as the activations

    def _add_summed(self, name: str, found: Sequence[tuple[Use, Factors]]) -> None:
        """Add the squares of the gradients of a parameter, summed over all its uses."""
        whole = None
        in_place = [use.direct or (use.stack is not None and isinstance(f, Grouped)) for use, f in found]
        if all(in_place) and not any(isinstance(f, Formed) for _, f in found):
            whole = concatenated([f for _, f in found])
        if whole is None:
            p = self.recorder.leaves[name]
            check_transformed(name, p)
            parts = [
                (f, (lambda t: t) if own else onward(use, p)) for own, (use, f) in zip(in_place, found, strict=True)
            ]
            whole = Summed(parts, tuple(p.shape), self.n, self.recorder.filter_axes[name])
        use = replace(found[0][0], parameters=(name,))
        self._add(use, whole, Reuse(self._reuse[use.node].cotangents))

    def _add(
        self, use: Use, factors: Factors, reuse: Reuse, passes: int = 1, totals: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add the squares that follow from a use's factors to the sums of its parameter, or to its total."""
        recorder, name = self.recorder, use.parameter
        p = recorder.parameters[name]
        if not p.numel():
            return
        start = 0.0 if recorder.observer is None else time.perf_counter()
        if self._summed_up:
            if totals and name in totals and factors.adds_once:
                out = totals[name]
            elif name in self._sums:
                out = self._sums[name]
            else:
                out = self._sums[name] = recorder.zeros(name, self.n)
            g = getattr(factors, "g", None)  # its precision differs where the parameter is cast before use
            dtype = out.dtype if g is None else accumulate_dtype(g.dtype)
            weights = self._weights_on(out.device, dtype, passes)
            if dtype == out.dtype:
                factors.accumulate_(out, weights)
            else:
                own = torch.zeros_like(out, dtype=dtype)
                factors.accumulate_(own, weights)
                out += own
        else:
            factors, q = self._filter_sums(name, factors, reuse)
            self._add_filter_sums(name, q)
        if recorder.observer is not None:
            recorder.observer(use, factors, reuse.cotangents, start, time.perf_counter())

    def _weights_on(self, device: torch.device, dtype: torch.dtype, passes: int) -> Tensor:
        """The weights of the examples, once for each of several passes."""
        key = device, dtype, passes
        if key not in self._weights_of:
            own = self._weights
            each = torch.ones(self.n, device=device, dtype=dtype) if own is None else own.to(device, dtype)
            self._weights_of[key] = each if passes == 1 else each.repeat(passes)
        return self._weights_of[key]

    def _filter_sums(self, name: str, factors: Factors, reuse: Reuse) -> tuple[Factors, Tensor]:
        """The sums of squares over each filter, [passes N, filters], and the factors that gave them."""
        p, axis = self.recorder.parameters[name], self.recorder.filter_axes[name]
        filters = p.shape[axis] if p.dim() else 1
        if type(factors) is Called:
            factors = self._formed(factors, name)
        elif axis != 0 and not isinstance(factors, Summed):
            factors = factors.along(axis, p.dim()) or self._formed(factors, name)
        q = factors.filter_sums(reuse)
        if q.shape[1] % filters:  # the layer sees the parameter through a view with fewer and longer rows
            factors = self._formed(factors, name)
            q = factors.filter_sums(reuse)
        if q.shape[1] != filters:
            q = q.unflatten(1, (filters, -1)).sum(2)
        return factors, q

    def _add_filter_sums(self, name: str, q: Tensor) -> None:
        if len(q) != self.n:  # of several passes
            q = q.unflatten(0, (-1, self.n)).sum(0)
        # The first q becomes the sum itself: adding it to zeros would cost as much as a small op.
        self._sums[name] = self._sums[name].add_(q) if name in self._sums else q

    def _is_bias(self, use: Use) -> bool:
        """Whether the filter sums of a bias, computed with those of its layer's weight, are those of this parameter."""
        plain = use.slot == bias_slot(use.node) and use.direct and not use.between and self.recorder.observer is None
        return plain and self.recorder.parameters[use.parameter].dim() == 1

    def _without_activations(self, found: list[tuple[Use, Factors]], name: str) -> list[tuple[Use, Factors]]:
        """Form the gradients of uses in checkpointed regions, where these take less memory than the activations."""
        direct = [pair for pair in found if pair[0].direct and not isinstance(pair[1], Called)]
        g, n = self.recorder.parameters[name], self.n
        if sum(bytes_of(factors) for _, factors in direct) <= 2 * n * g.numel() * g.element_size() or len(direct) < 2:
            return found
        rest = [pair for pair in found if not any(pair is other for other in direct)]
        return [(direct[0][0], Formed.of([factors for _, factors in direct], n)), *rest]

    def _formed(self, factors: Factors, name: str) -> Summed:
        """The same gradients, computed before they are squared, so that the filters may lie along any axis."""
        recorder = self.recorder
        shape = tuple(recorder.parameters[name].shape)
        return Summed([(factors, lambda t: t)], shape, self.n, recorder.filter_axes[name])
