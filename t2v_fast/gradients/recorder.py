"""FisherRecorder: per-example squared gradients of a forward pass that the caller runs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..ops.reference import accumulate_dtype
from .factors import Called, Factors, Reuse, Summed, concatenated
from .graph import Taps, UnsupportedError, Use, backpropagate, fix_batch_norm_gradients, random_layer
from .ownership import dense
from .rules import factors_of, has_rule, problem, taps_of

log = logging.getLogger(__name__)

GRANULARITIES = ("filter", "parameter", "tensor")
UNSUPPORTED = ("error", "exact", "skip")
ParameterFilter = Iterable[str] | Callable[[str, nn.Parameter], bool] | None
FilterAxis = Mapping[str, int] | Callable[[str, nn.Parameter], int] | None


def select_parameters(model: nn.Module, parameters: ParameterFilter = None) -> dict[str, nn.Parameter]:
    """The wanted parameters by name, in the given or the model's order.

    ``parameters``: names, or a function of name and parameter; None takes every floating-point parameter, frozen or
    not. A shared parameter goes by its first name. Raises ValueError for an unknown name and for an empty choice.
    """
    everything = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if isinstance(parameters, str):
        raise ValueError(f"parameters is the string {parameters!r}, expected a list of names: [{parameters!r}]")
    if parameters is None:
        chosen = everything
    elif callable(parameters):
        chosen = {name: p for name, p in everything.items() if parameters(name, p)}
    else:
        names = list(parameters)
        unknown = [name for name in names if name not in everything]
        if unknown:
            raise ValueError(
                f"the model has no floating-point parameter {unknown[0]!r}; it has {', '.join(everything)}"
            )
        chosen = {name: everything[name] for name in names}
    if not chosen:
        raise ValueError("no parameter is left to compute a Fisher of: check the model and parameters=...")
    return chosen


def filter_axes_of(parameters: Mapping[str, nn.Parameter], filter_axis: FilterAxis) -> dict[str, int]:
    """The axis of each parameter along which its filters lie."""
    if filter_axis is None:
        return dict.fromkeys(parameters, 0)
    if isinstance(filter_axis, Mapping):
        if unknown := [name for name in filter_axis if name not in parameters]:
            raise ValueError(f"filter_axis names {unknown[0]!r}, which is none of {', '.join(parameters)}")
        axes = {name: filter_axis.get(name, 0) for name in parameters}
    else:
        axes = {name: filter_axis(name, p) for name, p in parameters.items()}
    for name, axis in axes.items():
        if not isinstance(axis, int) or not 0 <= axis < max(1, parameters[name].dim()):
            raise ValueError(
                f"filter_axis is {axis} for {name!r} {list(parameters[name].shape)}, expected one of its axes from 0"
            )
    return axes


@dataclass(frozen=True)
class _GradientRoutes:
    """How each wanted parameter of one graph gets its squares."""

    single: frozenset[str]  # one use, whose factors are the parameter's own
    summed: frozenset[str]  # from the gradients of several uses, or of what the parameter is computed into
    plain: frozenset[str]  # by plain autograd, an example at a time
    skipped: frozenset[str]


class FisherRecorder:
    """Squares of per-example gradients inside the backward pass of your own loop.

    >>> with FisherRecorder(model) as recorder:
    ...     logits = model(images)  # [N, C]
    ...     q = recorder.backward(logits, cotangents(logits))  # {name: [N, filters]}

    For the duration, exactly the wanted parameters require gradients; what they required before is restored on exit.
    ``parameters`` as in :func:`select_parameters`. ``granularity``: ``"filter"`` (mean of the squares over all axes of
    a parameter but the first), ``"tensor"`` (over all), ``"parameter"`` (no mean, but summed over examples).
    ``filter_axis``: the axis of the filters where it is not the first, by parameter name or as a function of name and
    parameter (GPT-2's Conv1D holds its output features along axis 1).

    A parameter that is used several times, or of which parts are used, is exact: its gradients are summed before they
    are squared. So is one that enters a layer without a rule, whose own backward function then forms the gradients of
    one example after the other, and one that a table or a scale is computed from. ``unsupported`` says what becomes of
    a parameter that the weight of a convolution or a linear layer is computed from (standardised or normalised
    weights), and of one below a function whose inputs cannot be told apart by example: ``"error"`` raises
    UnsupportedError; ``"exact"`` forms the weight's gradients for each example and takes them through the
    transformation, or else runs plain autograd for each example in turn; ``"skip"`` leaves the parameter out.

    Where one example reads a part of another's activations they are taken to interact; ``"exact"`` finds out entry by
    entry who owns what, as :func:`t2v_fast.fisher` does.

    What row n of the output owes to the parameters is exact for the batch as it is. That example n would have the same
    output alone is seen only as far as the graph shows it; :func:`t2v_fast.fisher` runs examples alone to find out.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: ParameterFilter = None,
        granularity: str = "filter",
        *,
        unsupported: str = "error",
        filter_axis: FilterAxis = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if unsupported not in UNSUPPORTED:
            raise ValueError(f"unsupported is {unsupported!r}, expected one of {', '.join(UNSUPPORTED)}")
        self.model = model
        self.granularity = granularity
        self.unsupported = unsupported
        self.parameters = select_parameters(model, parameters)
        self.filter_axes = filter_axes_of(self.parameters, filter_axis)
        self.unused: frozenset[str] = frozenset()  # wanted parameters that the last output did not depend on
        self.skipped: frozenset[str] = frozenset()  # those that unsupported="skip" left out of it
        # Whether the caller runs examples alone to see that they do not interact, as fisher() does.
        self.verified = False
        # Called after each op with the use, its factors, the number of cotangents, and its first and last second.
        self.observer: Callable[[Use, Factors, int, float, float], None] | None = None
        self._said: set[str] = set()
        self._looked = False  # for random layers, since the context was entered
        self._required: list[tuple[nn.Parameter, bool]] | None = None

    def __enter__(self) -> FisherRecorder:
        if self._required is not None:
            raise RuntimeError("this recorder is in use: its context was entered before and has not been left")
        for name, p in self.parameters.items():
            if p._backward_hooks:
                raise UnsupportedError(
                    f"the parameter {name!r} has a hook on its gradient (register_hook), which squares of per-example "
                    "gradients do not pass through: remove the hook, or leave the parameter out with parameters=..."
                )
        self._looked = False
        self._required = [(p, p.requires_grad) for p in self.model.parameters()]
        wanted = {id(p) for p in self.parameters.values()}
        for p, _ in self._required:
            p.requires_grad_(id(p) in wanted)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for p, required in self._required:
            p.requires_grad_(required)
        self._required = None

    def backward(
        self, output: Tensor, cotangents: Tensor, weights: Tensor | None = None, retain_graph: bool = False
    ) -> dict[str, Tensor]:
        """Backpropagate ``cotangents`` and return the squared per-example gradients, summed over the cotangents.

        ``output`` [N, ...] from the model's forward, ``cotangents`` of the same shape or [K, N, ...]. Returns, for
        each parameter of shape [O, ...], per-example values [N, O] (``"filter"``), [N] (``"tensor"``), or for
        ``"parameter"`` the sum over examples with ``weights`` [N] (default one), in the parameter's shape. A
        parameter that the output does not depend on gets zeros, and is listed in :attr:`unused`.

        Raises UnsupportedError, naming the parameter, where no exact answer exists, and ValueError for bad shapes.
        """
        if not isinstance(output, Tensor) or not output.dim():
            what = f"{list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the output is {what}, expected a tensor [N, ...] with the examples along its first axis")
        if cotangents.shape == output.shape:
            cotangents = cotangents[None]
        (found,) = self._backward(output, cotangents, [len(cotangents)], weights, retain_graph)
        return found

    def check(self, output: Tensor) -> None:
        """Raise UnsupportedError where :meth:`backward` would, by the graph of ``output`` alone."""
        self._routes(self._taps(output))

    def backward_groups(self, output: Tensor, cotangents: Tensor, groups: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """As :meth:`backward`, with sums of their own for the first ``groups[0]`` of the cotangents [K, N, ...], for
        the next ``groups[1]``, and so on, one after the other as they are asked for. What depends on the layers' inputs
        alone is computed once for all groups.
        """
        if sum(groups) != len(cotangents) or min(groups, default=0) < 1:
            raise ValueError(f"groups are {list(groups)}, expected whole numbers that add up to {len(cotangents)}")
        return self._backward(output, cotangents, groups, None, False)

    def _backward(
        self, output: Tensor, cotangents: Tensor, groups: Sequence[int], weights: Tensor | None, retain_graph: bool
    ) -> Iterator[dict[str, Tensor]]:
        if self._required is None:
            raise RuntimeError(
                "FisherRecorder.backward outside its context: use `with FisherRecorder(model) as recorder:`"
            )
        if cotangents.shape[1:] != output.shape or not len(cotangents):
            raise ValueError(
                f"cotangents are {list(cotangents.shape)}, expected {list(output.shape)} or [K >= 1, ...] of them"
            )
        if not self._looked:
            self._looked = True
            if (layer := random_layer(self.model)) is not None:
                raise UnsupportedError(
                    f"the layer {layer} is in training mode and draws random numbers: call eval() on the network"
                )
        n = output.shape[0]
        if weights is not None and (self.granularity != "parameter" or list(weights.shape) != [n]):
            raise ValueError(
                f"weights are {list(weights.shape)} at granularity {self.granularity!r}, expected [{n}] at 'parameter' "
                "(other values are per example: weigh those)"
            )
        if output.grad_fn is None:
            raise ValueError(
                "the output has no autograd graph: run the forward inside the recorder, with gradients enabled"
            )
        taps = self._taps(output)
        fix_batch_norm_gradients(taps.order)
        routes = self._routes(taps)
        tapped = taps.of(routes.single | routes.summed)
        self.unused, self.skipped = taps.unused, routes.skipped
        sums: dict[str, Tensor] = {}
        w = torch.ones(n) if weights is None else weights
        reuse = {
            node: Reuse(len(cotangents), sum(use.parameter in routes.single for use in uses))
            for node, uses in tapped.uses.items()
        }
        called = not all(map(has_rule, tapped))
        ends = set(accumulate(groups))
        first = 0
        for k, cotangent in enumerate(cotangents, 1):
            more = retain_graph or bool(routes.plain) or called or k < len(cotangents)
            if tapped.uses:
                self._pass(output, cotangent, tapped, routes, sums, w, reuse, more)
            if k in ends:
                if routes.plain:
                    sums |= self._one_by_one(output, cotangents[first:k], routes.plain, w)
                found = {name: sums[name] if name in sums else self._zeros(name, n) for name in self.parameters}
                yield self._means({name: q for name, q in found.items() if name not in routes.skipped})
                sums.clear()
                first = k

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """The square of one gradient of a parameter, at the recorder's granularity."""
        square = gradient.square()
        if self.granularity == "parameter":
            return square
        if self.granularity == "tensor":
            return square.sum() / max(1, square.numel())
        rows = self._rows(name, square)
        return rows.sum(1) / max(1, rows.shape[1])

    def _rows(self, name: str, t: Tensor) -> Tensor:
        """Something of a parameter's shape as [filters, entries of each]."""
        if t.dim() == 0:
            return t.reshape(1, 1)
        t = t.movedim(self.filter_axes[name], 0)
        return t.reshape(len(t), math.prod(t.shape[1:]))

    def _taps(self, output: Tensor) -> Taps:
        return taps_of(output, self.parameters, self.verified or self.unsupported == "exact")

    def _routes(self, taps: Taps) -> _GradientRoutes:
        count: dict[str, int] = {}
        direct: dict[str, bool] = {}
        alone: set[str] = set()
        refused: set[str] = set()
        for use in taps:
            why = problem(use)
            if why is not None:
                raise UnsupportedError(f"the parameter {use} {why}; leave it out with parameters=...")
            for name in use.parameters:
                count[name] = count.get(name, 0) + 1
                direct[name] = use.direct
            if not use.rearranged and use.is_weight:
                through = ", ".join(sorted(use.between))
                self._refuse(str(use), f"is transformed before use (by {through})", use.parameters, refused)
        for name, why in taps.unknown.items():
            self._refuse(repr(name), f"is out of reach: {why}", (name,), refused)
            alone.add(name)
        rest = count.keys() - alone - refused
        own = {n for n in rest if count[n] == 1 and direct[n]}
        return _GradientRoutes(frozenset(own), frozenset(rest - own), frozenset(alone - refused), frozenset(refused))

    def _refuse(self, who: str, why: str, names: Iterable[str], refused: set[str]) -> None:
        """What becomes of parameters that take longer: an error, or left out, or just said once."""
        if self.unsupported == "error":
            raise UnsupportedError(
                f"the parameter {who} {why}; pass unsupported='exact' to form its gradients for each example, which "
                "takes two or three times as long as a training step, or leave it out with unsupported='skip' or "
                "parameters=..."
            )
        if self.unsupported == "skip":
            refused.update(names)
        for name in names:
            if name not in self._said:
                self._said.add(name)
                log.info("the parameter %s %s: %s", who, why, self.unsupported)

    def _pass(
        self,
        output: Tensor,
        cotangent: Tensor,
        taps: Taps,
        routes: _GradientRoutes,
        sums: dict[str, Tensor],
        weights: Tensor,
        reuse: Mapping[Node, Reuse],
        retain_graph: bool,
    ) -> None:
        """Backpropagate one cotangent, and add the squares of single and summed parameters to ``sums``."""
        n = output.shape[0]
        kept: dict[str, list[tuple[Use, Factors]]] = {}
        later: list[tuple[Use, Factors]] = []

        def visit(node: Node, cotangents: tuple[Tensor | None, ...]) -> None:
            for use in taps.uses[node]:
                factors = factors_of(use, cotangents, n)
                if isinstance(factors, Called):
                    later.append((use, factors))
                elif use.parameter in routes.single:
                    self._add(use, factors, sums, weights, reuse[node])
                    continue
                for name in routes.summed.intersection(use.parameters):
                    kept.setdefault(name, []).append((use, factors))

        backpropagate(output, cotangent, taps, visit, retain_graph)
        with torch.no_grad():
            for use, factors in later:
                if use.parameter in routes.single:
                    self._add(use, factors, sums, weights, reuse[use.node])
            for name, found in kept.items():
                whole = None
                if all(use.direct for use, _ in found):
                    whole = concatenated([factors for _, factors in found])
                if whole is None:
                    p = self.parameters[name]
                    parts = [(factors, _onward(use, p)) for use, factors in found]
                    whole = Summed(parts, tuple(p.shape), n, self.filter_axes[name])
                use = replace(found[0][0], parameters=(name,))
                self._add(use, whole, sums, weights, Reuse(reuse[use.node].cotangents))

    def _add(self, use: Use, factors: Factors, sums: dict[str, Tensor], weights: Tensor, reuse: Reuse) -> None:
        name = use.parameter
        p, axis = self.parameters[name], self.filter_axes[name]
        if not p.numel():
            return
        start = time.perf_counter()
        if self.granularity == "parameter":
            if name not in sums:
                sums[name] = self._zeros(name, len(weights))
            g = getattr(factors, "g", None)  # of another precision where the parameter is cast before use
            dtype = sums[name].dtype if g is None else accumulate_dtype(g.dtype)
            if dtype == sums[name].dtype:
                factors.accumulate_(sums[name], weights.to(p.device, dtype))
            else:
                own = torch.zeros_like(sums[name], dtype=dtype)
                factors.accumulate_(own, weights.to(p.device, dtype))
                sums[name] += own
        else:
            filters = p.shape[axis] if p.dim() else 1
            if isinstance(factors, Called):
                factors = self._formed(factors, name, len(weights))
            elif axis != 0 and not isinstance(factors, Summed):
                factors = (factors.exchanged() if p.dim() == 2 else None) or self._formed(factors, name, len(weights))
            q = factors.filter_sums(reuse)
            if q.shape[1] % filters:  # the layer sees the parameter by a view with fewer and longer rows
                factors = self._formed(factors, name, len(weights))
                q = factors.filter_sums(reuse)
            if q.shape[1] != filters:
                q = q.unflatten(1, (filters, -1)).sum(2)
            # Adding the first to zeros would cost as much as a small op.
            sums[name] = sums[name].add_(q) if name in sums else q
        if self.observer is not None:
            self.observer(use, factors, reuse.cotangents, start, time.perf_counter())

    def _formed(self, factors: Factors, name: str, n: int) -> Summed:
        """The same by gradients that are formed, whose filters may lie along any axis."""
        return Summed([(factors, lambda t: t)], tuple(self.parameters[name].shape), n, self.filter_axes[name])

    def plain_gradients(
        self, output: Tensor, cotangent: Tensor, example: int, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """Gradients of parameters by plain autograd, of one example's part of a cotangent; the graph is kept."""
        names = list(names)
        single = torch.zeros_like(cotangent)
        single[example] = cotangent[example]
        wanted = [self.parameters[name] for name in names]
        gradients = torch.autograd.grad(
            [output], wanted, [single], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return {name: dense(g) for name, g in zip(names, gradients, strict=True)}

    def _one_by_one(
        self, output: Tensor, cotangents: Tensor, names: Iterable[str], weights: Tensor
    ) -> dict[str, Tensor]:
        """The squares of parameters by plain autograd, an example and a cotangent at a time."""
        totals = {name: self._zeros(name, len(weights)) for name in names}
        for e in range(output.shape[0]):
            for cotangent in cotangents:
                for name, g in self.plain_gradients(output, cotangent, e, totals).items():
                    square = g.to(totals[name].dtype).square()
                    if self.granularity == "parameter":
                        totals[name] += float(weights[e]) * square
                    else:
                        totals[name][e] += self._rows(name, square).sum(1)
        return totals

    def _zeros(self, name: str, n: int) -> Tensor:
        p = self.parameters[name]
        shape = p.shape if self.granularity == "parameter" else (n, p.shape[self.filter_axes[name]] if p.dim() else 1)
        return torch.zeros(shape, dtype=accumulate_dtype(p.dtype), device=p.device)

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of squares at the recorder's granularity; those over filters are divided in place."""
        if self.granularity == "parameter":
            return sums
        sizes = {name: self.parameters[name].numel() for name in sums}
        if self.granularity == "tensor":
            return {name: q.sum(1) / max(1, sizes[name]) for name, q in sums.items()}
        if sums:  # in one call for all: a small op between large ones takes most of its time to be called
            torch._foreach_div_(
                list(sums.values()), [max(1, sizes[name]) / max(1, q.shape[1]) for name, q in sums.items()]
            )
        return sums


def _onward(use: Use, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """From gradients [k, numbers] of what enters a layer to those of a parameter that it is computed from."""
    if use.direct:
        return lambda t: t

    def pull(t: Tensor) -> Tensor:
        child, number = use.node.next_functions[use.slot]
        dtype = child._input_metadata[number].dtype
        gradients = t.view(-1, *use.shape).to(dtype)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            (g,) = torch.autograd.grad([use.source], [parameter], [gradients], is_grads_batched=True, **options)
        except (RuntimeError, NotImplementedError):  # a function that knows no batches of gradients
            each = [torch.autograd.grad([use.source], [parameter], [g], **options)[0] for g in gradients]
            g = torch.stack([dense(part) for part in each])
        return g.reshape(len(g), parameter.numel()).to(t.dtype)

    return pull
