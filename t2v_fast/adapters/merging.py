"""Merge fine-tuned models by their Fishers, or by arithmetic of task vectors.

A model is given by its parameters, {name: tensor}: ``dict(model.named_parameters())`` or a state dict. Models that do
not fit into memory are given by their checkpoints (:func:`merge_checkpoints`).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import Checkpoint, Entry, empty_folder, write_file, write_index

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
    weights = _weights(len(models), len(fishers), weights)
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
        merged[name] = _mean([model[name] for model in models], importance).to(first.dtype)
    return merged


def merge_unscaled(
    models: Sequence[Parameters],
    fishers: Sequence[Parameters],
    weights: Sequence[float] | None = None,
    minimum: float = 1e-8,
) -> dict[str, Tensor]:
    """Average models by their Fishers as they are, like ``diagonal_fisherMerging`` of r-three/mats.

    :func:`fisher_merge` divides each Fisher by its mean first, so that models of different confidence count the same.

    Args:
        models: The parameters of each model.
        fishers: The Fisher of each model, in the parameters' shapes and for all of them.
        weights: The weight of each model; equal by default. With two models and ``model_lambda`` there, pass
            ``[model_lambda, 1 - model_lambda]``.
        minimum: Smaller Fisher values are replaced by this one.

    Returns:
        The merged parameters, in the dtype of the first model's.

    Raises:
        ValueError: If the numbers of models and Fishers differ, or names or shapes differ.

    Example:
        >>> models = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
        >>> merge_unscaled(models, [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}])
        {'w': tensor([0.2500, 0.5000])}
    """
    weights = _weights(len(models), len(fishers), weights)
    _check_same(models)
    merged = {}
    for name, first in models[0].items():
        for index, found in enumerate(fishers):
            if name not in found or found[name].shape != first.shape:
                given = list(found[name].shape) if name in found else "missing"
                raise ValueError(f"the Fisher of {name!r} of model {index} is {given}, expected {list(first.shape)}")
        importance = [w * found[name].double().clamp_min(minimum) for w, found in zip(weights, fishers, strict=True)]
        merged[name] = _mean([model[name] for model in models], importance).to(first.dtype)
    return merged


def _weights(models: int, fishers: int, weights: Sequence[float] | None) -> list[float]:
    """Return the weights of models, or raise ValueError where the numbers of models, Fishers and weights differ."""
    weights = [1.0] * models if weights is None else list(weights)
    if not models or models != fishers or models != len(weights):
        raise ValueError(f"{models} models, {fishers} Fishers, {len(weights)} weights: expected one of each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights are {weights}, expected numbers of at least 0, one of them above 0")
    return weights


def _mean(values: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """Return the mean of a parameter over models, weighted entry by entry, in float64."""
    products = (_float64(value).mul_(f) for f, value in zip(importance, values, strict=True))
    top = next(products)
    for product in products:
        top.add_(product)
    return top.div_(sum(importance[1:], importance[0]))


def _float64(t: Tensor) -> Tensor:
    """Return a copy in float64, which may be written to: new memory takes longer than the arithmetic."""
    return t.detach().to(torch.float64, copy=True)


def merge_checkpoints(
    models: Sequence[str | os.PathLike],
    fishers: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    minimum: float = 0.0,
    normalize: bool = True,
) -> list[Path]:
    """Average checkpoints by their Fishers, as :func:`fisher_merge` does, without any whole model in memory.

    Tensors are read, averaged and written in pieces of some hundred thousand entries. The output has the files, names
    and dtypes of the first model. Its other files, such as the configuration and the tokenizer, are copied.

    Args:
        models: Safetensors files, or folders with one or more of them and an index.
        fishers: The Fishers in the same form, with the same names, as ``t2v-fast fisher`` writes them. A Fisher by
            filter, [O] for a parameter [O, ...], counts for all entries of the filter. A tensor that no Fisher has gets
            the plain mean.
        output: A new folder for the merged checkpoint.
        weights: The weight of each model; equal by default.
        floor: Added to every Fisher, as a fraction of the model's mean, or as it is without ``normalize``.
        minimum: Smaller Fisher values are replaced by this one, before anything else.
        normalize: Divide each Fisher by its mean over all entries. r-three/mats does not:
            ``normalize=False, floor=0, minimum=1e-8`` gives its average.

    Returns:
        The files.

    Raises:
        FileExistsError: If the output has a checkpoint already.
        ValueError: If the models' names or shapes differ, a Fisher does not fit its parameter, has a name that the
            models lack, has negative or infinite values or no positive one, or a tensor has no weight at all or is not
            finite.
    """
    weights = _weights(len(models), len(fishers), weights)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint(path)) for path in models]
        given = [stack.enter_context(Checkpoint(path)) for path in fishers]
        for path, checkpoint, found in zip(fishers, opened, given, strict=True):
            _check_fits(opened[0], checkpoint, found, path)
        scales = [_total(found, opened[0], minimum, path) for found, path in zip(given, fishers, strict=True)]
        scales = scales if normalize else [1.0] * len(scales)
        first, folder = opened[0], empty_folder(output)

        def merged(name: str) -> Iterator[Tensor]:
            entry = first.entries[name]
            for part in entry.pieces():
                values = [checkpoint.read(name, part) for checkpoint in opened]
                if not entry.dtype.is_floating_point:
                    yield values[0]
                    continue
                importance = [
                    _scaled(_piece(found, name, entry, part).clamp_min_(minimum), scale, floor).mul_(weight)
                    if name in found.entries
                    else torch.full_like(values[0], weight, dtype=torch.float64)
                    for found, scale, weight in zip(given, scales, weights, strict=True)
                ]
                mean = _mean(values, importance)
                # The sum tells with one look at each entry, unless it overflows.
                if not math.isfinite(float(mean.sum())) and not bool(mean.isfinite().all()):
                    for path, value in zip(models, values, strict=True):
                        if not bool(value.isfinite().all()):
                            raise ValueError(f"{name!r} in {path} has values that are not finite")
                    raise ValueError(f"{name!r} has entries that all Fishers give no weight: raise floor or minimum")
                yield mean.to(entry.dtype)

        for file, names in first.files.items():
            pieces = (piece for name in names for piece in merged(name))
            write_file(folder / file, {name: first.entries[name] for name in names}, pieces)
        write_index(folder, first.files, first.entries)
        if first.path.is_dir():
            for path in first.path.iterdir():
                if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
        return [folder / file for file in first.files]


def _check_fits(first: Checkpoint, model: Checkpoint, fisher: Checkpoint, path: str | os.PathLike) -> None:
    """Raise ValueError where a checkpoint differs from the first, or its Fisher from its parameters."""
    if different := first.entries.keys() ^ model.entries.keys():
        raise ValueError(f"{model.path} differs from {first.path} in having or lacking {min(different)!r}")
    for name, entry in first.entries.items():
        if (shape := model.entries[name].shape) != entry.shape:
            raise ValueError(f"{name!r} is {list(shape)} in {model.path}, expected {list(entry.shape)}")
    for name, found in fisher.entries.items():
        if name not in first.entries:
            raise ValueError(f"{path} has a Fisher of {name!r}, which {first.path} lacks: were both named alike?")
        shape = first.entries[name].shape
        if found.shape not in (shape, shape[:1]):
            raise ValueError(
                f"the Fisher of {name!r} in {path} is {list(found.shape)}, expected the parameter's {list(shape)} or "
                f"one number for each filter, {list(shape[:1])}"
            )


def _piece(fisher: Checkpoint, name: str, entry: Entry, part: slice) -> Tensor:
    """Return a piece of a Fisher in float64, in a shape that broadcasts to the parameter's piece."""
    value = _float64(fisher.read(name, part))
    return value if value.dim() == len(entry.shape) else value.view(-1, *[1] * (len(entry.shape) - 1))


def _scaled(fisher: Tensor, scale: float, floor: float) -> Tensor:
    """Divide a Fisher by its scale and add the floor, in place."""
    fisher = fisher if scale == 1 else fisher.div_(scale)
    return fisher.add_(floor) if floor else fisher


def _total(fisher: Checkpoint, model: Checkpoint, minimum: float, path: str | os.PathLike) -> float:
    """Return the mean of a Fisher over the parameters' entries. Raise ValueError where it is no Fisher."""
    total, count = 0.0, 0
    for name, found in fisher.entries.items():
        entry = model.entries[name]
        repeats = 1 if found.shape == entry.shape else max(1, Entry(entry.dtype, entry.shape[1:]).numel)
        for part in found.pieces():
            value = fisher.read(name, part)
            if not value.numel():
                continue
            low, high = map(float, value.aminmax())  # NaN where there is one
            if not (low >= 0 and high < math.inf):
                raise ValueError(f"the Fisher of {name!r} in {path} has values that are negative or not finite")
            value = value if low >= minimum else value.double().clamp_min(minimum)
            total += float(value.sum(dtype=torch.float64)) * repeats
            count += value.numel() * repeats
    if not total > 0:
        raise ValueError(f"the Fisher in {path} is {total} in all, expected a positive number")
    return total / count


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
