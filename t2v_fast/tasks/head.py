"""Fit the linear heads of tasks on cached features."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = ("newton", "lbfgs", "adam")
DEFAULTS = {"newton": (100, 1e-10), "lbfgs": (3000, 1e-7), "adam": (0, 0.0)}  # max_iterations, tolerance
CROSS_VALIDATED = "cv"
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the weight decays that cross-validation chooses from
FOLDS = 5
PAD = 4  # see _product
MAX_LOGITS = 1 << 22  # float64: 32 MiB for each of a few arrays
MAX_HALVINGS = 28

Losses = Callable[[Tensor, Tensor], Tensor]  # of logits [N, C] and labels: [N]


@dataclass(frozen=True)
class HeadFit:
    """A fitted head and how it went."""

    linear: nn.Linear  # float32
    loss: float  # weighted mean loss of the fit, without the penalty
    accuracy: float  # unweighted: of the label, for sigmoid of all labels
    mean_top_probability: float  # unweighted: of the likeliest label, for sigmoid of the likelier value of each label
    iterations: int  # Newton or L-BFGS iterations, or optimiser steps
    converged: bool
    weight_decay: float  # given, or chosen by cross-validation


@dataclass(frozen=True)
class HeadTask:
    """What a head is fitted to."""

    labels: Tensor  # [N] integers, for sigmoid [N, C] between 0 and 1
    num_classes: int
    weights: Tensor | None = None  # [N] of the examples, by default equal


def fit_head(
    features: Tensor, labels: Tensor, *, num_classes: int, weights: Tensor | None = None, **options: Any
) -> HeadFit:
    """Fit ``nn.Linear(D, num_classes)`` on features [N, D]: :func:`fit_heads` of one task, with its ``options``."""
    return fit_heads(features, {"": HeadTask(labels, num_classes, weights)}, **options)[""]


def fit_heads(
    features: Tensor,
    tasks: Mapping[str, HeadTask],
    *,
    likelihood: str = "softmax",
    method: str = "newton",
    weight_decay: float | str = 1e-4,
    seed: int = 0,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    learning_rate: float = 4e-4,
    epochs: int = 10,
    batch_size: int = 64,
    draws: int = 10_000,
) -> dict[str, HeadFit]:
    """Fit ``nn.Linear(D, C)`` to each task on the same features [N, D]: for each name what :func:`fit_head` gives.

    ``"newton"`` and ``"lbfgs"`` minimise sum_n a_n l_n + weight_decay / 2 |W|^2 in float64; a_n are the task's weights
    divided by their sum, by default 1/N; l_n is the cross entropy, for ``"sigmoid"`` summed over labels. The bias is
    not penalised (it sums to zero for softmax under ``"newton"``). The objective is strictly convex in W, so the
    optimum depends on neither seed nor start. Warns, naming the task, if ``max_iterations`` do not suffice.

    - ``"newton"`` (Newton with conjugate gradients): until the gradient's norm is ``tolerance`` (1e-10) times the root
      mean square of the features, centred and with a one for the bias: some ten of at most ``max_iterations`` (100).
      All tasks share one factorisation of the features, and every product with them.
    - ``"lbfgs"``: until no entry of the gradient, in scaled variables, exceeds ``tolerance`` (1e-7), in at most
      ``max_iterations`` (3000). Slower: confident heads are too ill-conditioned for it.

    ``"adam"`` is the public Task2Vec code's schedule, stopped early by design: ``epochs`` of ``draws`` draws with
    replacement (in proportion to the weights), in batches, L2 penalty on weights and bias, from a random start.

    ``weight_decay="cv"``: for each task the one of :data:`GRID` that :func:`cross_validate` finds best.

    Raises ValueError naming the task, if it has a name, and what is wrong: features that are not finite, no example,
    fewer than two classes, a class without weight, a label that all or no examples have, no penalty where the optimum
    needs one.
    """
    _check_options(likelihood, method, weight_decay)
    _check_features(features)
    if weight_decay == CROSS_VALIDATED:  # a penalty of its own for each task
        options = {"likelihood": likelihood, "method": method, "max_iterations": max_iterations, "tolerance": tolerance}
        fits = {}
        for name, task in tasks.items():
            best = _best(name, features, task, likelihood, seed)
            fits |= fit_heads(features, {name: task}, weight_decay=best, **options)
        return fits
    names, tasks = list(tasks), [_checked(name, task, len(features), likelihood) for name, task in tasks.items()]
    default_iterations, default_tolerance = DEFAULTS[method]
    max_iterations = default_iterations if max_iterations is None else max_iterations
    tolerance = default_tolerance if tolerance is None else tolerance
    losses = _softmax_losses if likelihood == "softmax" else _sigmoid_losses
    x = features.double()
    if method == "newton":
        found = _newton(x, tasks, weight_decay, max_iterations, tolerance, softmax=likelihood == "softmax")
    elif method == "lbfgs":
        found = _lbfgs(x, tasks, losses, weight_decay, max_iterations, tolerance)
    else:
        found = [
            _adam(features.float(), task, losses, weight_decay, seed, learning_rate, epochs, batch_size, draws)
            for task in tasks
        ]
    fits = {}
    for name, task, optimum in zip(names, tasks, found, strict=True):
        if optimum.shortfall:
            _warn(name, optimum)
        fits[name] = _head_fit(x, task, optimum, losses, likelihood, weight_decay)
    return fits


@dataclass(frozen=True)
class _Optimum:
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    iterations: int
    converged: bool
    shortfall: str = ""  # what was reached and expected, where it should have converged and did not


def _head_fit(
    x: Tensor, task: HeadTask, optimum: _Optimum, losses: Losses, likelihood: str, weight_decay: float
) -> HeadFit:
    linear = nn.Linear(x.shape[1], task.num_classes)
    with torch.no_grad():
        linear.weight.copy_(optimum.weight)
        linear.bias.copy_(optimum.bias)
        logits = F.linear(x, optimum.weight.double(), optimum.bias.double())
        loss = float((task.weights * losses(logits, task.labels)).sum())
        hits = logits.argmax(1) == task.labels if likelihood == "softmax" else (logits > 0) == (task.labels > 0.5)
        p = logits.softmax(1) if likelihood == "softmax" else logits.abs().sigmoid()
        top = p.amax(1) if likelihood == "softmax" else p
    accuracy, likeliest = float(hits.double().mean()), float(top.mean())
    return HeadFit(linear, loss, accuracy, likeliest, optimum.iterations, optimum.converged, weight_decay)


def _warn(name: str, optimum: _Optimum) -> None:
    level, frame = 1, sys._getframe()
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
    """For each weight decay of ``grid`` the weighted mean loss of held-out examples, by ``"newton"``.

    Other arguments as :func:`fit_head`. The examples of each class are spread evenly over ``folds`` parts, in an order
    drawn by ``seed``; the only example of a class is never held out. With ``"sigmoid"`` the parts are drawn without
    regard to labels, and a label that all or none of the other parts' examples have does not count in a part. Raises
    ValueError for what :func:`fit_head` refuses, for fewer than two folds, and where no example can be held out.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}, expected at least 2")
    for weight_decay in grid:
        _check_options(likelihood, "newton", weight_decay)
    _check_features(features)
    weights = _checked("", HeadTask(labels, num_classes, weights), len(features), likelihood).weights
    kept = weights > 0
    features, labels, weights = (t[kept].cpu() for t in (features, labels, weights))
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    single = torch.zeros(len(weights), dtype=torch.bool)
    if likelihood == "softmax":
        order = order[labels[order].argsort(stable=True)]
        single = (torch.bincount(labels.long(), minlength=num_classes) == 1)[labels.long()]
    part = torch.empty_like(order)
    part[order] = torch.arange(len(order)) % folds  # examples of one class follow each other
    part[single] = folds  # in no part
    losses = _softmax_losses if likelihood == "softmax" else _sigmoid_losses
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
    """The weight decay that cross-validation finds best for a task."""
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
    """The task with labels as the losses take them, and float64 weights that sum to one."""
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


def _softmax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [D], and centred features z [N, R] = (x - mean) axes, of which axes [D, R] are orthonormal.

    The best weights lie in the span of the centred features (a part outside only adds to the penalty), so nothing is
    lost where R = N < D, and the penalty keeps its form. Along these axes the Hessian of the objective is near its
    diagonal, which conditions the conjugate gradients: features of a network are correlated and of uneven spread.
    Neither depends on a task's weights, so that all tasks share them.
    """
    mean = x.mean(0)
    z = x - mean
    axes = None
    if len(x) < x.shape[1]:
        axes, r = torch.linalg.qr(z.T)
        z = r.T
    rotation = torch.linalg.eigh(z.T @ z).eigenvectors
    return mean, z @ rotation, rotation if axes is None else axes @ rotation


def _padded(matrix: Tensor) -> Tensor:
    """With rows and columns of zeros up to multiples of ``PAD``."""
    return F.pad(matrix, (0, -matrix.shape[1] % PAD, 0, -matrix.shape[0] % PAD))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix``, a padded one, each row to the last bit what it is without the others (seen with MKL).

    BLAS has other kernels for rows that are left over from a multiple of four and for rows of odd length, and they add
    in another order.
    """
    return (F.pad(rows, (0, 0, 0, -len(rows) % PAD)) @ matrix)[: len(rows)]


@dataclass(frozen=True)
class _Objective:
    """The objectives of T tasks side by side, each sum_n a_n l_n + weight_decay / 2 |W|^2, and their derivatives.

    A row is a class of a task: there are K in all. A vector has for each row the bias, then the weights, [K, R].
    Nothing that is computed for a task depends on the others, not in the last bit as far as :func:`_product` keeps
    that: two heads that differ in it may end at two points within the tolerance.
    """

    z: Tensor  # [N, R] a one, then the features; padded
    penalty: Tensor  # [R] zero for the bias, then the weight decay
    sizes: list[int]  # the classes of each task
    targets: Tensor  # [K, N] what the probabilities are fitted to
    a: Tensor  # [T, N]
    softmax: bool

    @cached_property
    def task(self) -> Tensor:
        """[K]: the task of each row."""
        return torch.repeat_interleave(torch.tensor(self.sizes, device=self.z.device))

    def of(self, tasks: Tensor) -> _Objective:
        """The objectives of some tasks, a mask [T]."""
        sizes = [size for size, chosen in zip(self.sizes, tasks.tolist(), strict=True) if chosen]
        return replace(self, sizes=sizes, targets=self.targets[tasks[self.task]], a=self.a[tasks])

    def spread(self, of_tasks: Tensor) -> Tensor:
        """[K, ...] from [T, ...]."""
        return of_tasks.index_select(0, self.task)

    def sum(self, of_rows: Tensor) -> Tensor:
        """[T, ...] from [K, ...]."""
        return of_rows.new_zeros(len(self.sizes), *of_rows.shape[1:]).index_add_(0, self.task, of_rows)

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """[T]: the inner products of two vectors."""
        return self.sum((u * v).sum(1))

    def logits(self, v: Tensor) -> Tensor:
        """[K, N]."""
        return _product(v, self.z.T)

    def normalisers(self, logits: Tensor) -> Tensor:
        """[T, N]: what the losses have beside the targets' logits."""
        # Task by task: vectorised functions compute the last elements of an array by others, with another rounding.
        blocks = logits.split(self.sizes)
        return torch.stack([b.logsumexp(0) if self.softmax else F.softplus(b).sum(0) for b in blocks])

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.cat([b.softmax(0) if self.softmax else b.sigmoid() for b in logits.split(self.sizes)])

    def values(self, logits: Tensor, v: Tensor) -> Tensor:
        """[T]."""
        losses = self.normalisers(logits) - self.sum(self.targets * logits)
        return (self.a * losses).sum(1) + self.dot(self.penalty * v, v) / 2

    def pull_back(self, cotangent: Tensor, v: Tensor) -> Tensor:
        """[K, R]: the gradient of a function with this cotangent of the logits [K, N], and of the penalty."""
        return _product(cotangent, self.z) + self.penalty * v

    def gradient(self, p: Tensor, v: Tensor) -> Tensor:
        return self.pull_back(self.spread(self.a) * (p - self.targets), v)

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        u = self.logits(v)
        u = u - self.spread(self.sum(p * u)) if self.softmax else u * (1 - p)
        return self.pull_back(self.spread(self.a) * p * u, v)

    def hessian_diagonal(self, p: Tensor) -> Tensor:
        curvature = self.spread(self.a) * p * (1 - p)
        return (_product(curvature, self.z.square()) + self.penalty).clamp_min(1e-300)


def _objective(z: Tensor, tasks: Sequence[HeadTask], weight_decay: float, softmax: bool) -> _Objective:
    """Of features [N, R], which are padded, as all else is, with examples of weight zero and features that are zero."""
    padded = _padded(F.pad(z, (1, 0), value=1.0))
    penalty = torch.full_like(padded[0], weight_decay)
    penalty[0] = 0
    extra = len(padded) - len(z)
    targets = [F.one_hot(task.labels, task.num_classes) if softmax else task.labels for task in tasks]
    return _Objective(
        padded,
        penalty,
        [task.num_classes for task in tasks],
        F.pad(torch.cat(targets, 1).T.to(z), (0, extra)),
        F.pad(torch.stack([task.weights for task in tasks]).to(z), (0, extra)),
        softmax,
    )


def _newton(
    x: Tensor, tasks: Sequence[HeadTask], weight_decay: float, max_iterations: int, tolerance: float, softmax: bool
) -> list[_Optimum]:
    mean, z, axes = _principal_axes(x)
    back = _padded(F.pad(axes.T, (0, 0, 1, 0)))  # from a row's bias and weights along the axes to weights
    found = []
    for group in _groups(tasks, len(x)):
        objective = _objective(z, group, weight_decay, softmax)
        v, iterations, norms, enough = _minimise(objective, max_iterations, tolerance)
        weights, biases = _product(v, back)[:, : len(mean)], v[:, 0]
        blocks = zip(weights.split(objective.sizes), biases.split(objective.sizes), strict=True)
        for (weight, bias), iteration, norm, wanted in zip(blocks, iterations, norms, enough, strict=True):
            if softmax:
                bias = bias - bias.mean()  # a constant in all biases of a softmax changes nothing
            shortfall = "" if norm <= wanted else f"the gradient's norm is {norm:.1e}, expected {wanted:.0e}"
            found.append(_Optimum(weight, bias - weight @ mean, int(iteration), not shortfall, shortfall))
    return found


def _groups(tasks: Sequence[HeadTask], n: int) -> Iterator[list[HeadTask]]:
    """Tasks that are fitted together: as many as keep an array of all logits within ``MAX_LOGITS``, at least one."""
    group: list[HeadTask] = []
    for task in tasks:
        if group and n * sum(t.num_classes for t in (*group, task)) > MAX_LOGITS:
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _minimise(objective: _Objective, max_iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The optima [K, R]; of each task the number of iterations, the gradient's norm, and the norm that is enough."""
    v = objective.z.new_zeros(len(objective.task), objective.z.shape[1])
    values = objective.values(objective.logits(v), v)
    # The scale of one example's gradient, which is (p - target) z.
    scales = (objective.a * objective.z.square().sum(1)).sum(1).sqrt()
    iterations, norms = torch.zeros_like(values, dtype=torch.long), torch.full_like(values, math.inf)
    going, part = torch.ones_like(values, dtype=torch.bool), objective  # the tasks that are not done, and theirs
    for iteration in range(max_iterations + 1):
        rows = going[objective.task]
        logits = part.logits(v[rows])
        p = part.probabilities(logits)
        gradient = part.gradient(p, v[rows])
        norms[going] = part.dot(gradient, gradient).sqrt()
        iterations[going] = iteration
        more = (norms > tolerance * scales)[going]
        if iteration == max_iterations or not more.any():
            break
        if not more.all():
            kept = more[part.task]
            logits, p, gradient = logits[kept], p[kept], gradient[kept]
            going, part = going.masked_scatter(going, more), part.of(more)
            rows = going[objective.task]
        # Loose near the optimum, where a step costs most: with a cube root Newton's method still is superlinear.
        accuracy = (norms / scales)[going].pow(1 / 3).clamp_max(0.03)
        direction = _solve(part, p, gradient, accuracy)
        slopes = part.dot(gradient, direction)
        steps, values[going] = _line_search(part, v[rows], logits, direction, slopes, values[going])
        v[rows] += part.spread(steps)[:, None] * direction
        if not steps.all():  # at the end of float64
            going, part = going.masked_scatter(going, steps > 0), part.of(steps > 0)
            if not going.any():
                break
    return v, iterations, norms, tolerance * scales


def _solve(objective: _Objective, p: Tensor, gradient: Tensor, accuracy: Tensor, max_steps: int = 500) -> Tensor:
    """About -H^-1 gradient of each task by conjugate gradients, preconditioned by the diagonal of H."""
    diagonal = objective.hessian_diagonal(p)
    solution, residual = torch.zeros_like(gradient), -gradient
    direction = residual / diagonal
    size = objective.dot(residual, direction)
    enough = accuracy.square() * size
    rows = torch.arange(len(p), device=p.device)  # of the tasks that are not done
    for _ in range(max_steps):
        product = objective.hessian_product(p, direction)
        curvature = objective.dot(direction, product)
        positive = curvature > 0  # or zero by rounding: H is positive semi-definite
        step = objective.spread(torch.where(positive, size / curvature, 0))[:, None]
        solution[rows] += step * direction
        residual = residual - step * product
        scaled = residual / diagonal
        size, previous = objective.dot(residual, scaled), size
        direction = scaled + objective.spread(size / previous)[:, None] * direction
        more = positive & (size > enough)
        if not more.all():
            if not more.any():
                break
            kept = more[objective.task]
            p, diagonal, residual, direction, rows = (t[kept] for t in (p, diagonal, residual, direction, rows))
            size, enough, objective = size[more], enough[more], objective.of(more)
    return solution


def _line_search(
    objective: _Objective, v: Tensor, logits: Tensor, direction: Tensor, slopes: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """[T]: the first of 1, 1/2, 1/4, ... that decreases a task's objective enough, and its value there.

    Zero and the old value where none does. Logits are linear in the step: a trial needs no product with the features.
    """
    change = objective.logits(direction)
    steps = torch.ones_like(values)
    for _ in range(MAX_HALVINGS):
        each = objective.spread(steps)[:, None]
        new = objective.values(logits + each * change, v + each * direction)
        good = new <= values + 1e-4 * steps * slopes + 1e-14 * values.abs()
        if good.all():
            break
        steps = torch.where(good, steps, steps / 2)
    return torch.where(good, steps, 0), torch.where(good, new, values)


def _lbfgs(
    x: Tensor, tasks: Sequence[HeadTask], losses: Losses, weight_decay: float, max_iterations: int, tolerance: float
) -> list[_Optimum]:
    mean, z, axes = _principal_axes(x)
    found = []
    for task in tasks:
        v, bias, iterations, largest = _lbfgs_along_axes(z, task, losses, weight_decay, max_iterations, tolerance)
        weight = v @ axes.T
        # At the end of its float64 a line search may stop a little above the tolerance; ten times it is still an
        # optimum, but only if it stopped by itself.
        converged = largest <= tolerance or (largest <= 10 * tolerance and iterations < max_iterations)
        shortfall = "" if converged else f"the gradient's largest entry is {largest:.1e}, expected {tolerance:.0e}"
        found.append(_Optimum(weight, bias - weight @ mean, iterations, converged, shortfall))
    return found


def _lbfgs_along_axes(
    z: Tensor, task: HeadTask, losses: Losses, weight_decay: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, int, float]:
    # The same objective in other variables: weights are v / scale, and the Hessian of v is near a multiple of the
    # identity.
    a = task.weights
    scale = (a @ z.square() / 4 + weight_decay).sqrt()
    scaled = z / scale  # [N, R]
    v = torch.zeros(task.num_classes, len(scale), dtype=torch.float64, requires_grad=True)
    b = torch.zeros(task.num_classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [v, b],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        fit = (a * losses(F.linear(scaled, v, b), task.labels)).sum()
        value = fit + weight_decay / 2 * (v / scale).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(objective)
        objective()
    largest = max(float(v.grad.abs().max()), float(b.grad.abs().max()))
    return (v / scale).detach(), b.detach(), optimiser.state[v]["n_iter"], largest


def _adam(
    x: Tensor,
    task: HeadTask,
    losses: Losses,
    weight_decay: float,
    seed: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    draws: int,
) -> _Optimum:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(x.shape[1], task.num_classes)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(linear.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = 0
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.multinomial(task.weights, draws, replacement=True, generator=generator)
            for rows in order[: draws - draws % batch_size].split(batch_size):
                optimiser.zero_grad()
                losses(linear(x[rows]), task.labels[rows]).mean().backward()
                optimiser.step()
                steps += 1
    return _Optimum(linear.weight.detach(), linear.bias.detach(), steps, converged=False)  # stopped early, by design
