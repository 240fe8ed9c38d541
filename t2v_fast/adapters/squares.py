"""Sums of squared gradients over a loader, for adapters whose directions are not those of an estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.batches import Forward, forward_passes
from ..estimation.diagonal import check_finite
from ..gradients.recorder import FisherRecorder, ParameterFilter

Directions = Callable[[Tensor, Tensor | None], Tensor]


def summed_squares(
    model: nn.Module,
    loader: Iterable[Any],
    directions: Directions,
    *,
    parameters: ParameterFilter = None,
    device: str | torch.device | None = None,
    forward: Forward = lambda model, inputs: model(inputs),
    unsupported: str = "error",
    self_check: bool = True,
    watch: Callable[[Tensor], None] = lambda outputs: None,
) -> tuple[dict[str, Tensor], int]:
    """Sum the squares of per-example gradients over all examples of a loader.

    :func:`t2v_fast.fisher` also estimates standard errors, in float64 and on the CPU. An adapter that returns none of
    them saves their time with this function, which adds up in place, on the device of the parameters.

    Args:
        model: The model, in the mode that the caller wants.
        loader: Batches of (inputs, labels, ...), as for :func:`t2v_fast.fisher`.
        directions: ``directions(outputs, labels)`` returns the cotangents, [N, C] or [K, N, C], of a batch's outputs.
        parameters: The parameters, as for :class:`t2v_fast.FisherRecorder`.
        device: Where inputs are moved to; by default where the first parameter is.
        forward: Runs the model: ``forward(model, inputs)`` returns the outputs.
        unsupported: As for :class:`t2v_fast.FisherRecorder`.
        self_check: As for :func:`t2v_fast.fisher`.
        watch: Called with the outputs of each batch, with their autograd graph.

    Returns:
        The sums of squares in the parameters' shapes, by name, and the number of examples.

    Raises:
        ValueError: The loader gave no example, a sum is not finite, or an argument does not fit.
        UnsupportedError: A parameter has no exact per-example gradient.
        SelfCheckError: The self-check failed.

    Example:
        >>> model = nn.Linear(3, 2, bias=False)
        >>> x = torch.eye(3)
        >>> sums, n = summed_squares(model, [(x, None)], lambda outputs, labels: torch.ones_like(outputs))
        >>> sums["weight"].tolist(), n
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 3)
    """
    recorder = FisherRecorder(model, parameters, "parameter", unsupported=unsupported)
    if device is None:
        device = next(iter(recorder.parameters.values())).device
    sums: dict[str, Tensor] = {}
    examples = 0
    with forward_passes(recorder, forward, device, self_check=self_check) as batches:
        for batch in batches(loader):
            watch(batch.logits)
            labels = None if batch.labels is None else batch.labels.to(device)
            recorder.backward(batch.logits, directions(batch.logits.detach(), labels), into=sums)
            examples += batch.size
    if not examples:
        raise ValueError("the loader gave no example")
    for name, total in sums.items():
        check_finite(name, total)
    return sums, examples


def in_type_of(name: str, values: Tensor, parameter: Tensor) -> Tensor:
    """Return the values of a parameter on its device and in its type. Raise ValueError where the type is too small."""
    found = values.to(parameter)
    if found.dtype != values.dtype:
        check_finite(name, found)
    return found
