"""Fit the linear heads of tasks to cached features, and choose their weight decay by cross-validation."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .head_solvers import HeadTask, Losses, Optimum, adam, lbfgs, newton, sigmoid_losses, softmax_losses, weights_of

METHODS = ("newton", "lbfgs", "adam")
DEFAULTS = {"newton": (100, 1e-10), "lbfgs": (3000, 1e-7), "adam": (0, 0.0)}  # max_iterations, tolerance
CROSS_VALIDATED = "cv"
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the weight decays that cross-validation chooses from
FOLDS = 5
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures; far beyond these, weights or their Fisher leave the range of float32


@dataclass(frozen=True)
class HeadFit:
    """A fitted head, and how well it fits."""

    linear: nn.Linear  # float32
    loss: float  # weighted mean loss of the fit, without the penalty
    accuracy: float  # unweighted; for sigmoid the mean over all labels
    mean_top_probability: float  # unweighted mean of the likeliest class; for sigmoid of each label's likelier value
    iterations: int  # Newton or L-BFGS iterations, or optimiser steps
    converged: bool
    weight_decay: float  # as given, or as chosen by cross-validation


def fit_head(
    features: Tensor, labels: Tensor, *, num_classes: int, weights: Tensor | None = None, **options: Any
) -> HeadFit:
    """Fit ``nn.Linear(D, num_classes)`` to one task: :func:`fit_heads` with one task.

    Args:
        features: [N, D].
        labels: integers [N]; for sigmoid [N, C] between 0 and 1.
        num_classes: the number of classes, or of labels for sigmoid.
        weights: [N] weights of the examples, equal by default.
        **options: as for :func:`fit_heads`.

    Returns:
        The fitted head.

    Raises:
        ValueError: as :func:`fit_heads`.

    Example:
        >>> import torch
        >>> features, labels = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> fit = fit_head(features, labels, num_classes=2, weight_decay=0.1)
        >>> fit.accuracy, fit.converged
        (1.0, True)
    """
    return fit_heads(features, {"": HeadTask(labels, num_classes, weights)}, **options)[""]


def fit_heads(
    features: Tensor,
    tasks: Mapping[str, HeadTask],
    *,
    likelihood: str = "softmax",
    method: str = "newton",
    weight_decay: float | str = 1e-4,
    temperature: float = 1.0,
    seed: int = 0,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    learning_rate: float = 4e-4,
    epochs: int = 10,
    batch_size: int = 64,
    draws: int = 10_000,
) -> dict[str, HeadFit]:
    """Fit ``nn.Linear(D, C)`` to each of several tasks on the same features.

    ``"newton"`` and ``"lbfgs"`` minimise sum_n a_n l_n + weight_decay / 2 |W|^2 in float64. The a_n are the task's
    weights divided by their sum, by default 1/N. The loss l_n is the cross entropy, for ``"sigmoid"`` summed over the
    labels. The bias is not penalised; for softmax under ``"newton"`` it sums to zero. The objective is strictly convex
    in W, so the optimum depends neither on the seed nor on the start. A warning names a task whose head does not
    converge in ``max_iterations``.

    - ``"newton"`` (Newton with conjugate gradients) stops when the gradient's norm is below ``tolerance`` (1e-10) times
      the root mean square of the features, centred and with a one for the bias. That takes about ten iterations;
      ``max_iterations`` (100) is the limit. All tasks share one factorisation of the features and all products with
      them.
    - ``"lbfgs"`` stops when no entry of the gradient, in scaled variables, exceeds ``tolerance`` (1e-7), after at most
      ``max_iterations`` (3000). It is slower, because confident heads are ill-conditioned.
    - ``"adam"`` is the schedule of the public Task2Vec code, which stops early by design: ``epochs`` of ``draws``
      draws with replacement, in proportion to the weights, in batches, with an L2 penalty on weights and bias, from a
      random start.

    Args:
        features: [N, D], shared by all tasks.
        tasks: the labels and weights of each task, by its name.
        likelihood: ``"softmax"`` (one class for each example) or ``"sigmoid"`` (C labels for each example).
        method: ``"newton"``, ``"lbfgs"`` or ``"adam"``.
        weight_decay: the penalty, or ``"cv"`` for the value of :data:`GRID` that :func:`cross_validate` finds best for
            each task.
        temperature: divide the fitted weights and bias by this number, from 1e-6 to 1e6. The classes keep their order.
            Far above 1, every class is nearly as likely as the others in every example; ``docs/selection.md`` says when
            that helps.
        seed: seed of ``"adam"`` and of the cross-validation.
        max_iterations: see above.
        tolerance: see above.
        learning_rate: of ``"adam"``.
        epochs: of ``"adam"``.
        batch_size: of ``"adam"``.
        draws: examples that ``"adam"`` draws in an epoch.

    Returns:
        The fitted head of each task, by its name.

    Raises:
        ValueError: names the task, if it has a name, and what is wrong: features that are not finite, no example,
            fewer than two classes, a class without weight, a label that all or no examples have, or no penalty where
            the optimum needs one.
    """
    _check_options(likelihood, method, weight_decay)
    if isinstance(temperature, (str, bool)) or not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature is {temperature!r}, expected a number from {COLDEST:g} to {HOTTEST:g}")
    _check_features(features)
    fits: dict[str, HeadFit] = {}
    if weight_decay == CROSS_VALIDATED:  # each task gets its own penalty
        options: dict[str, Any] = {"likelihood": likelihood, "method": method}
        options |= {"max_iterations": max_iterations, "tolerance": tolerance, "temperature": temperature}
        for name, task in tasks.items():
            best = _best(name, features, task, likelihood, seed)
            fits |= fit_heads(features, {name: task}, weight_decay=best, **options)
        return fits
    assert not isinstance(weight_decay, str)  # no other text passed the check of the options
    checked = [_checked(name, task, len(features), likelihood) for name, task in tasks.items()]
    default_iterations, default_tolerance = DEFAULTS[method]
    max_iterations = default_iterations if max_iterations is None else max_iterations
    tolerance = default_tolerance if tolerance is None else tolerance
    losses = softmax_losses if likelihood == "softmax" else sigmoid_losses
    x = features.double()
    if method == "newton":
        found = newton(x, checked, weight_decay, max_iterations, tolerance, softmax=likelihood == "softmax")
    elif method == "lbfgs":
        found = lbfgs(x, checked, losses, weight_decay, max_iterations, tolerance)
    else:
        found = [
            adam(features.float(), task, losses, weight_decay, seed, learning_rate, epochs, batch_size, draws)
            for task in checked
        ]
    for name, task, optimum in zip(tasks, checked, found, strict=True):
        if optimum.shortfall:
            _warn(name, optimum)
        cooled = replace(optimum, weight=optimum.weight / temperature, bias=optimum.bias / temperature)
        fits[name] = _head_fit(x, task, cooled, losses, likelihood, weight_decay)
    return fits


def _head_fit(
    x: Tensor, task: HeadTask, optimum: Optimum, losses: Losses, likelihood: str, weight_decay: float
) -> HeadFit:
    linear = nn.Linear(x.shape[1], task.num_classes)
    with torch.no_grad():
        linear.weight.copy_(optimum.weight)
        linear.bias.copy_(optimum.bias)
        logits = F.linear(x, optimum.weight.double(), optimum.bias.double())
        loss = float((weights_of(task) * losses(logits, task.labels)).sum())
        hits = logits.argmax(1) == task.labels if likelihood == "softmax" else (logits > 0) == (task.labels > 0.5)
        p = logits.softmax(1) if likelihood == "softmax" else logits.abs().sigmoid()
        top = p.amax(1) if likelihood == "softmax" else p
    accuracy, likeliest = float(hits.double().mean()), float(top.mean())
    return HeadFit(linear, loss, accuracy, likeliest, optimum.iterations, optimum.converged, weight_decay)


def _warn(name: str, optimum: Optimum) -> None:
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename == __file__:  # the warning points at the caller
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{_of(name)}the head did not converge: after {optimum.iterations} iterations {optimum.shortfall}; "
        "raise max_iterations or weight_decay",
        stacklevel=level,
    )


def _of(name: str) -> str:
    return f"task {name!r}: " if name else ""


def cross_validate(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    weights: Tensor | None = None,
    likelihood: str = "softmax",
    grid: Sequence[float] = GRID,
    folds: int = FOLDS,
    seed: int = 0,
) -> dict[float, float]:
    """Measure the held-out loss of ``"newton"`` heads for several weight decays.

    The examples of each class are spread evenly over ``folds`` parts, in an order drawn by ``seed``. The only example
    of a class is never held out. With ``"sigmoid"`` the parts are drawn without regard to the labels; a label that is
    constant in the other parts does not count in a part.

    Args:
        features: [N, D].
        labels: as for :func:`fit_head`.
        num_classes: as for :func:`fit_head`.
        weights: as for :func:`fit_head`.
        likelihood: as for :func:`fit_head`.
        grid: the weight decays.
        folds: the number of parts, at least 2.
        seed: seed of the order of the examples.

    Returns:
        The weighted mean loss of the held-out examples, by weight decay.

    Raises:
        ValueError: as :func:`fit_head`, and for fewer than two folds, or where no example can be held out.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}, expected at least 2")
    for weight_decay in grid:
        _check_options(likelihood, "newton", weight_decay)
    _check_features(features)
    weights = weights_of(_checked("", HeadTask(labels, num_classes, weights), len(features), likelihood))
    kept = weights > 0
    features, labels, weights = (t[kept].cpu() for t in (features, labels, weights))
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    single = torch.zeros(len(weights), dtype=torch.bool)
    if likelihood == "softmax":
        order = order[labels[order].argsort(stable=True)]
        single = (torch.bincount(labels.long(), minlength=num_classes) == 1)[labels.long()]
    part = torch.empty_like(order)
    part[order] = torch.arange(len(order)) % folds  # examples of one class follow each other
    part[single] = folds  # never held out
    losses = softmax_losses if likelihood == "softmax" else sigmoid_losses
    totals, mass = dict.fromkeys(grid, 0.0), 0.0
    for k in range(folds):
        inside, held_out = part != k, part == k
        targets, classes = labels.long() if likelihood == "softmax" else labels, num_classes
        if likelihood == "sigmoid":
            seen = labels[inside]
            varied = ~((seen == 0).all(0) | (seen == 1).all(0))
            targets, classes = labels[:, varied], int(varied.sum())
        if not held_out.any() or not classes:
            continue
        mass += float(weights[held_out].sum())
        for weight_decay in grid:
            fit = fit_head(
                features[inside],
                targets[inside],
                num_classes=classes,
                weights=weights[inside],
                likelihood=likelihood,
                weight_decay=weight_decay,
                tolerance=1e-6,
            )
            logits = fit.linear(features[held_out].float()).detach().double()
            totals[weight_decay] += float(weights[held_out] @ losses(logits, targets[held_out]))
    if not mass:
        raise ValueError("no example can be held out for cross-validation: every class has only one")
    return {weight_decay: total / mass for weight_decay, total in totals.items()}


def _best(name: str, features: Tensor, task: HeadTask, likelihood: str, seed: int) -> float:
    """The weight decay of ``GRID`` with the smallest held-out loss."""
    try:
        held_out = cross_validate(
            features,
            task.labels,
            num_classes=task.num_classes,
            weights=task.weights,
            likelihood=likelihood,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(f"{_of(name)}{error}") from None
    return min(held_out, key=held_out.__getitem__)


def _check_options(likelihood: str, method: str, weight_decay: float | str) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown head method {method!r}: expected one of {', '.join(METHODS)}")
    if likelihood not in ("softmax", "sigmoid"):
        raise ValueError(f"a head has likelihood 'softmax' or 'sigmoid', got {likelihood!r}")
    if weight_decay == CROSS_VALIDATED and method != "adam":
        return
    if isinstance(weight_decay, str):
        expected = "a number: it stops early" if method == "adam" else f"a number above 0 or {CROSS_VALIDATED!r}"
        raise ValueError(f"weight_decay is {weight_decay!r}, of {method!r} expected {expected}")
    if not 0 <= weight_decay < math.inf or (weight_decay == 0 and method != "adam"):
        raise ValueError(
            f"weight_decay is {weight_decay}, expected above 0: without it separable classes have no optimum"
        )


def _check_features(features: Tensor) -> None:
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features are {list(features.shape)}, expected [N, D] with N and D of at least 1")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the features of example {bad} are not finite: the probe overflows on it")


def _checked(name: str, task: HeadTask, n: int, likelihood: str) -> HeadTask:
    """Check a task; return it with labels as the losses take them, and float64 weights that sum to one."""
    weights = torch.ones(n, dtype=torch.float64) if task.weights is None else task.weights
    try:
        if list(weights.shape) != [n] or not ((weights >= 0) & weights.isfinite()).all():
            raise ValueError(f"weights are {list(weights.shape)}, expected [{n}] finite numbers of at least 0")
        (_check_classes if likelihood == "softmax" else _check_multilabel)(task.labels, task.num_classes, weights)
    except ValueError as error:
        raise ValueError(f"{_of(name)}{error}") from None
    labels = task.labels.long() if likelihood == "softmax" else task.labels.double()
    return HeadTask(labels, task.num_classes, weights.double() / weights.double().sum())


def _check_classes(labels: Tensor, num_classes: int, weights: Tensor) -> None:
    if list(labels.shape) != [len(weights)] or labels.is_floating_point():
        raise ValueError(f"labels are {list(labels.shape)} {labels.dtype}, expected integers [{len(weights)}]")
    if num_classes < 2:
        raise ValueError(f"a task needs at least two classes, got {num_classes}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    labels = labels.long()
    counts = torch.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(f"class {int((counts == 0).nonzero()[0])} of {num_classes} has no example")
    mass = torch.bincount(labels, weights=weights.double(), minlength=num_classes)
    if not mass.all():
        raise ValueError(f"the examples of class {int((mass == 0).nonzero()[0])} of {num_classes} all have weight 0")


def _check_multilabel(labels: Tensor, num_classes: int, weights: Tensor) -> None:
    if list(labels.shape) != [len(weights), num_classes]:
        raise ValueError(f"labels are {list(labels.shape)}, expected [{len(weights)}, {num_classes}]")
    labels = labels.double()
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels of a sigmoid head must lie between 0 and 1")
    weighed = labels[weights > 0]
    constant = (weighed == 0).all(0) | (weighed == 1).all(0)
    if constant.any():
        raise ValueError(
            f"label {int(constant.nonzero()[0])} of {num_classes} is the same in every example of non-zero weight: "
            "the head has no optimum for it; leave the label out"
        )
