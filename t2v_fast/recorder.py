"""FisherRecorder: per-example squared gradients of a forward pass that the caller runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .graph import Layouts, Taps, Use, backpropagate, find_taps
from .reference import accumulate_dtype
from .rules import RULES, Factors, Reuse, check_supported, rows_of

GRANULARITIES = ("filter", "parameter", "tensor")
ParameterFilter = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def select_parameters(model: nn.Module, parameters: ParameterFilter = None) -> dict[str, nn.Parameter]:
    """The wanted parameters by name, in the given or the model's order.

    ``parameters``: names, or a function of name and parameter; None takes every floating-point parameter, frozen or
    not. A shared parameter goes by its first name. Raises ValueError for an unknown name and for an empty choice.
    """
    everything = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
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


class FisherRecorder:
    """Squares of per-example gradients inside the backward pass of your own loop.

    >>> with FisherRecorder(model) as recorder:
    ...     logits = model(images)  # [N, C]
    ...     q = recorder.backward(logits, cotangents(logits))  # {name: [N, filters]}

    For the duration, exactly the wanted parameters require gradients; what they required before is restored on exit.
    ``parameters`` as in :func:`select_parameters`. ``granularity``: ``"filter"`` (mean of the squares over all axes of
    a parameter but the first), ``"tensor"`` (over all), ``"parameter"`` (no mean, but summed over examples).
    """

    def __init__(self, model: nn.Module, parameters: ParameterFilter = None, granularity: str = "filter") -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        self.model = model
        self.granularity = granularity
        self.parameters = select_parameters(model, parameters)
        self.unused: frozenset[str] = frozenset()  # wanted parameters that the last output did not depend on
        # Called after each op with the use, its factors, the number of cotangents, and its first and last second.
        self.observer: Callable[[Use, Factors, int, float, float], None] | None = None
        self._layouts = Layouts()
        self._required: list[tuple[nn.Parameter, bool]] | None = None

    def __enter__(self) -> FisherRecorder:
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
        if self._required is None:
            raise RuntimeError(
                "FisherRecorder.backward outside its context: use `with FisherRecorder(model) as recorder:`"
            )
        if cotangents.shape == output.shape:
            cotangents = cotangents[None]
        if cotangents.shape[1:] != output.shape or not len(cotangents):
            raise ValueError(
                f"cotangents are {list(cotangents.shape)}, expected {list(output.shape)} or [K >= 1, ...] of them"
            )
        n = output.shape[0]
        if weights is not None and (self.granularity != "parameter" or list(weights.shape) != [n]):
            raise ValueError(
                f"weights {list(weights.shape)}: expected [{n}], and granularity 'parameter' "
                f"(the values of {self.granularity!r} are per example: weigh those)"
            )
        if output.grad_fn is None:
            raise ValueError(
                "the output has no autograd graph: run the forward inside the recorder, with gradients enabled"
            )
        taps = find_taps(output, self.parameters)
        check_supported(taps)
        self._layouts.probe(output, taps, self._rows)
        self.unused = taps.unused
        sums: dict[str, Tensor] = {}
        visit = self._visitor(taps, n, sums, weights, len(cotangents))
        for k, cotangent in enumerate(cotangents):
            backpropagate(output, cotangent, taps, visit, retain_graph or k + 1 < len(cotangents))
        return {
            name: self._mean(name, sums[name] if name in sums else self._zeros(name, n)) for name in self.parameters
        }

    def _rows(self, use: Use, g: Tensor) -> Tensor:
        return rows_of(use, g, self.parameters[use.parameter])

    def _zeros(self, name: str, n: int) -> Tensor:
        p = self.parameters[name]
        shape = p.shape if self.granularity == "parameter" else (n, p.shape[0] if p.dim() else 1)
        return torch.zeros(shape, dtype=accumulate_dtype(p.dtype), device=p.device)

    def _visitor(
        self, taps: Taps, n: int, sums: dict[str, Tensor], weights: Tensor | None, cotangents: int
    ) -> Callable[[Node, Tensor], None]:
        reuse = {node: Reuse(cotangents, len(uses)) for node, uses in taps.uses.items()}

        def visit(node: Node, g: Tensor) -> None:
            for use in taps.uses[node]:
                layout = self._layouts.get(use.parameter, self._rows(use, g).shape[0], n)
                factors = RULES[node.name()].factors(use, g, layout, n, self.parameters[use.parameter])
                start = time.perf_counter()
                if self.granularity != "parameter":
                    q = factors.filter_sums(reuse[node])
                    # Adding the first to zeros would cost as much as a small op.
                    sums[use.parameter] = sums[use.parameter].add_(q) if use.parameter in sums else q
                else:
                    if use.parameter not in sums:
                        sums[use.parameter] = self._zeros(use.parameter, n)
                    out = sums[use.parameter]
                    w = torch.ones(n) if weights is None else weights
                    factors.accumulate_(out, w.to(out.device, out.dtype))
                if self.observer is not None:
                    self.observer(use, factors, cotangents, start, time.perf_counter())

        return visit

    def _mean(self, name: str, q: Tensor) -> Tensor:
        p = self.parameters[name]
        if self.granularity == "filter":
            return q / (p.numel() // q.shape[1])
        if self.granularity == "tensor":
            return q.sum(1) / p.numel()
        return q
