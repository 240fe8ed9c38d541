"""Merge fine-tuned models by their Fishers, or by arithmetic of task vectors.

A model is given by its parameters, {name: tensor}: ``dict(model.named_parameters())`` or a state dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def fisher_merge(
    models: Sequence[Parameters],
    fishers: Sequence[Parameters],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
) -> dict[str, Tensor]:
    """Average models, with each parameter weighted by its Fisher (Matena and Raffel, 2022, equation 4).

    Each model's Fisher is first divided by its mean. Otherwise the least confident model would decide everything.

    Args:
        models: The parameters of each model.
        fishers: The Fisher of each model, in the parameters' shapes, from :func:`~t2v_fast.adapters.fim.fim_diag`. A
            parameter without a Fisher, such as a buffer, gets the plain mean of the models.
        weights: The weight of each model; equal by default.
        floor: Added to every Fisher, as a fraction of the model's mean, so that entries that no task needs are averaged
            plainly.

    Returns:
        The merged parameters. Those that are not floating-point numbers are the first model's.

    Raises:
        ValueError: If the numbers of models and Fishers differ, or names or shapes differ.

    Example:
        >>> models = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
        >>> fishers = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]
        >>> fisher_merge(models, fishers, floor=0)
        {'w': tensor([0.2500, 0.7500])}
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or len(models) != len(fishers) or len(models) != len(weights):
        raise ValueError(f"{len(models)} models, {len(fishers)} Fishers, {len(weights)} weights: expected one of each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights are {weights}, expected numbers of at least 0, one of them above 0")
    _check_same(models)
    scales = []
    for index, found in enumerate(fishers):
        for name, value in found.items():
            if name in models[0] and value.shape != models[0][name].shape:
                raise ValueError(
                    f"the Fisher of {name!r} of model {index} is {list(value.shape)}, expected the parameter's "
                    f"{list(models[0][name].shape)}: compute it with granularity 'parameter'"
                )
        total = sum(float(value.double().sum()) for value in found.values())
        count = sum(value.numel() for value in found.values())
        if not total > 0:
            raise ValueError(f"the Fisher of model {index} is {total} in all, expected a positive number")
        scales.append(total / count)
    merged = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            merged[name] = first.detach().clone()
            continue
        importance = [
            weight * (found[name].double() / scale + floor if name in found else torch.ones_like(first).double())
            for found, scale, weight in zip(fishers, scales, weights, strict=True)
        ]
        top = sum(f * model[name].detach().double() for f, model in zip(importance, models, strict=True))
        merged[name] = cast(Tensor, top / sum(importance)).to(first.dtype)
    return merged


def task_vector(pretrained: Parameters, finetuned: Parameters) -> dict[str, Tensor]:
    """Compute what fine-tuning added to each parameter (Ilharco et al., 2022).

    Args:
        pretrained: The parameters before fine-tuning.
        finetuned: The parameters after fine-tuning.

    Returns:
        theta_finetuned - theta_pretrained, for the parameters that are floating-point numbers.

    Raises:
        ValueError: If names or shapes differ.
    """
    _check_same([pretrained, finetuned])
    return {
        name: finetuned[name].detach() - value.detach()
        for name, value in pretrained.items()
        if value.is_floating_point()
    }


def apply_task_vectors(
    pretrained: Parameters, vectors: Sequence[Parameters], coefficients: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Compute theta_pretrained + sum_t coefficient_t vector_t.

    Args:
        pretrained: The parameters before fine-tuning.
        vectors: Task vectors, from :func:`task_vector`.
        coefficients: A number for each vector, by default 1: up to 1 to add a task, negative to forget one.

    Returns:
        The new parameters.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> before, after = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
        >>> apply_task_vectors(before, [task_vector(before, after)], [0.5])
        {'w': tensor([2.])}
    """
    coefficients = [1.0] * len(vectors) if coefficients is None else list(coefficients)
    if len(coefficients) != len(vectors):
        raise ValueError(f"{len(vectors)} task vectors but {len(coefficients)} coefficients")
    floating = {name: value for name, value in pretrained.items() if value.is_floating_point()}
    _check_same([floating, *vectors])
    result = {name: value.detach().clone() for name, value in pretrained.items()}
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        for name, value in vector.items():
            result[name] += coefficient * value
    return result


def _check_same(models: Sequence[Parameters]) -> None:
    first = models[0]
    for index, model in enumerate(models[1:], 1):
        if different := first.keys() ^ model.keys():
            raise ValueError(f"model {index} differs from the first in having or lacking {min(different)!r}")
        for name, value in first.items():
            if model[name].shape != value.shape:
                raise ValueError(
                    f"{name!r} is {list(model[name].shape)} in model {index}, expected {list(value.shape)}"
                )
