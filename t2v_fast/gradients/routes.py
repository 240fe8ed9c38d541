"""Choose how each wanted parameter gets its squares: from factors, from summed gradients, by plain autograd, or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .graph import Taps, UnsupportedError, Use
from .ownership import dense
from .rules import unsupported_reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientRoutes:
    """The wanted parameters of one graph, by the route to their squares."""

    single: frozenset[str]  # from the factors of the parameter's one use
    summed: frozenset[str]  # from the summed gradients of several uses, or of tensors computed from the parameter
    plain: frozenset[str]  # by plain autograd, one example at a time
    skipped: frozenset[str]  # no squares


def routes_of(taps: Taps, unsupported: str, reported: set[str]) -> GradientRoutes:
    """Choose a route for each parameter that has a use or an unknown owner.

    ``unsupported`` is the recorder's setting, for parameters that need a slower route. ``reported`` has the parameters
    whose slower route has been logged; others are logged and added.

    Raises UnsupportedError where no route leads to an exact answer, or ``unsupported`` allows none.
    """
    count: dict[str, int] = {}
    direct: dict[str, bool] = {}
    plain: set[str] = set()
    skipped: set[str] = set()

    def take_slower_route(who: str, why: str, names: Iterable[str]) -> None:
        if unsupported == "error":
            raise UnsupportedError(
                f"the parameter {who} {why}; pass unsupported='exact' to form its gradients for each example, which "
                "takes two or three times as long as a training step, or leave it out with unsupported='skip' or "
                "parameters=..."
            )
        if unsupported == "skip":
            skipped.update(names)
        for name in names:
            if name not in reported:
                reported.add(name)
                log.info("the parameter %s %s: %s", who, why, unsupported)

    for use in taps:
        why = unsupported_reason(use)
        if why is not None:
            raise UnsupportedError(f"the parameter {use} {why}; leave it out with parameters=...")
        for name in use.parameters:
            count[name] = count.get(name, 0) + 1
            direct[name] = use.direct
        if not use.rearranged and use.is_weight:
            through = ", ".join(sorted(use.between))
            take_slower_route(str(use), f"is transformed before use (by {through})", use.parameters)
    for name, why in taps.unknown.items():
        take_slower_route(repr(name), f"is out of reach: {why}", (name,))
        plain.add(name)
    rest = count.keys() - plain - skipped
    single = {name for name in rest if count[name] == 1 and direct[name]}
    return GradientRoutes(frozenset(single), frozenset(rest - single), frozenset(plain - skipped), frozenset(skipped))


def onward(use: Use, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """The map from gradients [k, entries] of a node's input to those of a parameter that the input is computed from."""
    if use.direct:
        return lambda t: t

    def pull(t: Tensor) -> Tensor:
        child, number = use.node.next_functions[use.slot]
        assert child is not None  # parameters enter this input
        dtype = child._input_metadata[number].dtype
        gradients = t.view(-1, *use.shape).to(dtype)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            (g,) = torch.autograd.grad([use.source], [parameter], [gradients], is_grads_batched=True, **options)
        except (RuntimeError, NotImplementedError):  # a function that does not support batched gradients
            each = [torch.autograd.grad([use.source], [parameter], [g], **options)[0] for g in gradients]
            g = torch.stack([dense(part) for part in each])
        return g.reshape(len(g), parameter.numel()).to(t.dtype)

    return pull
