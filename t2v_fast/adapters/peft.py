"""Ranks for LoRA (Hu et al., 2022) from Fisher scores of modules, as PEFT's ``rank_pattern`` takes them.

A module whose weights have a large Fisher information changes the predictions most when it changes. PEFT takes a rank
for each module, and these functions share out a budget of trainable parameters by the scores::

    scores = module_scores(model, loader, ["q_proj", "v_proj"])
    patterns = rank_pattern(model, scores, r=8)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(scores), **patterns)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..estimation.estimator import fisher
from .fim import evaluating

ALL_LINEAR = "all-linear"


def module_scores(
    model: nn.Module,
    loader: Iterable[Any],
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    estimator: str = "deflated",
    samples: int = 2,
    device: str | torch.device | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Compute the mean diagonal Fisher of each target module's weight.

    The model runs in evaluation mode and is left in its own mode. Its parameters may be frozen. Nothing of the size of
    a gradient is kept.

    Args:
        model: The base model, before PEFT wraps it: from inputs to logits [N, C] or [N, T, C], or to an object that has
            them as ``logits``, as models of ``transformers`` do.
        loader: Batches, as for :func:`t2v_fast.fisher`: mappings are passed to the model as keyword arguments, without
            their entry "labels". Padding counts nothing where there is an ``attention_mask``.
        target_modules: The modules, as in ``LoraConfig``: names or ends of names (``"q_proj"``), or a regular
            expression for whole names, or ``"all-linear"`` for all linear layers but the output head.
        estimator: Chooses the cotangents, as in :func:`t2v_fast.fisher`. ``"empirical"`` scores with the labels of the
            data; pass ``shift_labels=True`` for labels of causal models that are the tokens themselves.
        samples: Cotangents, each of which costs one backward pass for a batch.
        device: The device of the batches, by default that of the model.
        seed: The seed of random cotangents.
        options: More arguments of :func:`t2v_fast.fisher`.

    Returns:
        The score of each module, by the module's full name, in the model's order.

    Raises:
        ValueError: No module matches, or a module that matches has no weight matrix, or PEFT has wrapped the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> list(module_scores(model, [torch.randn(6, 4)], ["0", "2"]))
        ['0', '2']
    """
    _check_base(model)
    modules = _targets(model, target_modules)
    with evaluating(model):
        found = fisher(
            model,
            loader,
            estimator,
            samples,
            "tensor",
            parameters=[f"{name}.weight" for name in modules],
            device=device or next(model.parameters()).device,
            seed=seed,
            **options,
        )
    return {name: float(found[f"{name}.weight"]) for name in modules}


def rank_pattern(
    model: nn.Module,
    scores: Mapping[str, float],
    r: int = 8,
    *,
    lora_alpha: float | None = None,
    minimum: int = 1,
    maximum: int | None = None,
    power: float = 1.0,
    budget: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Share out ranks among modules by their scores, within a budget of trainable parameters.

    Ranks are proportional to ``score ** power`` between ``minimum`` and ``maximum``, and as large as the budget allows.
    A module of I inputs and O outputs has (I + O) times its rank trainable parameters.

    Args:
        model: The base model.
        scores: A score of at least 0 for each module, by full name, as :func:`module_scores` returns them.
        r: The rank of ``LoraConfig``, which the budget is compared with.
        lora_alpha: The ``lora_alpha`` of ``LoraConfig``. If given, each module's alpha is scaled with its rank, so that
            alpha / rank, the scale of its update, is the same for all.
        minimum: The least rank of a module, at least 1.
        maximum: The largest rank of a module, by default 4 r, and never more than the module's own rank, min(I, O).
        power: 0 gives all modules the same rank; 0.5 spreads ranks less than the scores are spread.
        budget: The number of trainable parameters, by default as many as with rank ``r`` everywhere.

    Returns:
        ``{"rank_pattern": {...}}``, and ``"alpha_pattern"`` as well if ``lora_alpha`` is given: arguments of
        ``LoraConfig``. Each key is a pattern that fits one module only.

    Raises:
        ValueError: A name is no module with a weight matrix, a score is negative or not finite, or the budget is too
            small for the least rank everywhere.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> rank_pattern(model, {"0": 3.0, "2": 1.0}, r=2)
        {'rank_pattern': {'^0': 3, '^2': 1}}
    """
    if not scores:
        raise ValueError("scores is empty: expected a score for each target module")
    if bad := [name for name, score in scores.items() if not (math.isfinite(score) and score >= 0)]:
        raise ValueError(f"the score of {bad[0]!r} is {scores[bad[0]]}, expected a finite number of at least 0")
    if minimum < 1 or r < 1:
        raise ValueError(f"minimum is {minimum} and r is {r}, expected at least 1: leave modules out of target_modules")
    _check_base(model)
    modules = dict(model.named_modules())
    shapes = {name: _shape(name, modules.get(name)) for name in scores}
    costs = {name: sum(shape) for name, shape in shapes.items()}
    most = {name: min(*shape, 4 * r if maximum is None else maximum) for name, shape in shapes.items()}
    least = {name: min(minimum, most[name]) for name in scores}
    budget = r * sum(costs.values()) if budget is None else budget
    if (needed := sum(costs[name] * least[name] for name in scores)) > budget:
        raise ValueError(f"budget is {budget} parameters, but rank {minimum} everywhere has {needed}")
    ranks = _ranks({name: score**power for name, score in scores.items()}, costs, least, most, budget)
    keys = {name: f"^{re.escape(name)}" for name in scores}
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {keys[name]: rank for name, rank in ranks.items()}}
    if lora_alpha is not None:
        patterns["alpha_pattern"] = {keys[name]: lora_alpha * rank / r for name, rank in ranks.items()}
    return patterns


def _ranks(
    shares: Mapping[str, float],
    costs: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Return whole ranks between ``least`` and ``most``, proportional to ``shares``, that cost at most ``budget``."""

    def at(scale: float) -> dict[str, float]:
        return {name: min(max(scale * share, least[name]), most[name]) for name, share in shares.items()}

    low, high = 0.0, max(most.values()) / min((s for s in shares.values() if s > 0), default=1.0)
    for _ in range(200):  # the cost grows with the scale
        middle = (low + high) / 2
        fits = sum(costs[name] * rank for name, rank in at(middle).items()) <= budget
        low, high = (middle, high) if fits else (low, middle)
    wished = at(low)
    ranks = {name: math.floor(rank + 1e-9) for name, rank in wished.items()}
    spare = budget - sum(costs[name] * rank for name, rank in ranks.items())
    for name in sorted(ranks, key=lambda name: ranks[name] - wished[name]):  # the largest remainder first
        if costs[name] <= spare and ranks[name] < most[name] and wished[name] > ranks[name] + 1e-9:
            ranks[name] += 1
            spare -= costs[name]
    return ranks


def _check_base(model: nn.Module) -> None:
    """Raise ValueError where PEFT has wrapped the model: names are others then, and adapters are modules, too."""
    wrapped = next(
        (name for name, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module)), ""
    )
    if wrapped or (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        where = f" (at {wrapped!r})" if wrapped else ""
        raise ValueError(
            f"PEFT has put adapters into this {type(model).__name__}{where}, whose modules have other names than those "
            "of the base model: pass the base model before PEFT wraps it, or the result of model.unload(), or that of "
            "model.merge_and_unload() with what the adapters have learned"
        )


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Return the full names of the target modules, in the model's order."""
    named = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [name for name, m in named.items() if _is_linear(m) and m is not head]
    elif isinstance(target_modules, str):
        found = [name for name in named if re.fullmatch(target_modules, name)]
    else:
        wanted = tuple(target_modules)
        found = [name for name in named if name in wanted or name.endswith(tuple(f".{w}" for w in wanted))]
    if not found:
        raise ValueError(f"no module matches target_modules={target_modules!r}; the model has {', '.join(named)}")
    for name in found:
        _shape(name, named[name])
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' own linear layer


def _shape(name: str, module: nn.Module | None) -> tuple[int, int]:
    """Return the two sides of a module's weight matrix; of a convolution's, its filters and the entries of one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or not weight.is_floating_point():
        what = "no module" if module is None else f"a {type(module).__name__} without a floating-point weight matrix"
        raise ValueError(f"{name!r} is {what}: expected a linear layer, an embedding or a convolution")
    return weight.shape[0], weight[0].numel()
