"""Fit the linear head of a task on cached features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = ("newton", "lbfgs", "adam")
DEFAULTS = {"newton": (100, 1e-10), "lbfgs": (3000, 1e-7), "adam": (0, 0.0)}  # max_iterations, tolerance
CROSS_VALIDATED = "cv"
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the weight decays that cross-validation chooses from
FOLDS = 5


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


def fit_head(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    weights: Tensor | None = None,
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
) -> HeadFit:
    """Fit ``nn.Linear(D, num_classes)`` on features [N, D] and labels ([N] integers, or [N, C] for ``"sigmoid"``).

    ``"newton"`` and ``"lbfgs"`` minimise sum_n a_n l_n + weight_decay / 2 |W|^2 in float64; a_n are ``weights`` [N]
    divided by their sum, by default 1/N; l_n is the cross entropy, for ``"sigmoid"`` summed over labels. The bias is
    not penalised (it sums to zero for softmax under ``"newton"``). The objective is strictly convex in W, so the
    optimum depends on neither seed nor start. Warns if ``max_iterations`` do not suffice.

    - ``"newton"`` (Newton with conjugate gradients): until the gradient's norm is ``tolerance`` (1e-10) times the root
      mean square of the features, centred and with a one for the bias: some ten of at most ``max_iterations`` (100).
    - ``"lbfgs"``: until no entry of the gradient, in scaled variables, exceeds ``tolerance`` (1e-7), in at most
      ``max_iterations`` (3000). Slower: confident heads are too ill-conditioned for it.

    ``"adam"`` is the public Task2Vec code's schedule, stopped early by design: ``epochs`` of ``draws`` draws with
    replacement (in proportion to ``weights``), in batches, L2 penalty on weights and bias, from a random start.

    ``weight_decay="cv"``: the one of :data:`GRID` that :func:`cross_validate` finds best.

    Raises ValueError naming what is wrong: features that are not finite, no example, fewer than two classes, a class
    without weight, a label that all or no examples have, no penalty where the optimum needs one.
    """
    _check_options(likelihood, method, weight_decay)
    if weights is None:
        weights = torch.ones(len(features), dtype=torch.float64)
    _check(features, labels, num_classes, weights, likelihood)
    if weight_decay == CROSS_VALIDATED:
        held_out = cross_validate(
            features, labels, num_classes=num_classes, weights=weights, likelihood=likelihood, seed=seed
        )
        weight_decay = min(held_out, key=held_out.__getitem__)
    a = weights.double() / weights.double().sum()
    labels = labels.long() if likelihood == "softmax" else labels.double()
    default_iterations, default_tolerance = DEFAULTS[method]
    max_iterations = default_iterations if max_iterations is None else max_iterations
    tolerance = default_tolerance if tolerance is None else tolerance
    losses = _softmax_losses if likelihood == "softmax" else _sigmoid_losses
    if method == "newton":
        weight, bias, iterations, converged = _newton(
            features.double(),
            _targets(labels, num_classes, likelihood),
            a,
            weight_decay,
            max_iterations,
            tolerance,
            softmax=likelihood == "softmax",
        )
    elif method == "lbfgs":
        weight, bias, iterations, converged = _lbfgs(
            features.double(), labels, num_classes, a, losses, weight_decay, max_iterations, tolerance
        )
    else:
        weight, bias, iterations = _adam(
            features.float(),
            labels,
            num_classes,
            a,
            losses,
            weight_decay,
            seed,
            learning_rate,
            epochs,
            batch_size,
            draws,
        )
        converged = False  # it stops early, by design
    linear = nn.Linear(features.shape[1], num_classes)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        logits = F.linear(features.double(), weight.double(), bias.double())
        loss = float((a * losses(logits, labels)).sum())
        hits = logits.argmax(1) == labels if likelihood == "softmax" else (logits > 0) == (labels > 0.5)
        p = logits.softmax(1) if likelihood == "softmax" else logits.abs().sigmoid()
        top = p.amax(1) if likelihood == "softmax" else p
    return HeadFit(linear, loss, float(hits.double().mean()), float(top.mean()), iterations, converged, weight_decay)


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
    if weights is None:
        weights = torch.ones(len(features), dtype=torch.float64)
    _check(features, labels, num_classes, weights, likelihood)
    kept = weights > 0
    features, labels, weights = (t[kept].cpu() for t in (features, labels, weights.double()))
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


def _check(features: Tensor, labels: Tensor, num_classes: int, weights: Tensor, likelihood: str) -> None:
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features are {list(features.shape)}, expected [N, D] with N and D of at least 1")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the features of example {bad} are not finite: the probe overflows on it")
    if list(weights.shape) != [len(features)] or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"weights are {list(weights.shape)}, expected [{len(features)}] finite numbers of at least 0")
    (_check_classes if likelihood == "softmax" else _check_multilabel)(labels, num_classes, weights)


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


def _targets(labels: Tensor, num_classes: int, likelihood: str) -> Tensor:
    """float64 [N, C]: what the probabilities are fitted to."""
    return F.one_hot(labels, num_classes).double() if likelihood == "softmax" else labels


def _softmax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)


@dataclass(frozen=True)
class _Objective:
    """sum_n a_n l_n + weight_decay / 2 |W|^2 and its derivatives, for logits z W + b."""

    z: Tensor  # [N, R] features
    targets: Tensor  # [N, C]
    a: Tensor  # [N, 1]
    weight_decay: float
    softmax: bool

    def value(self, logits: Tensor, w: Tensor) -> float:
        normaliser = logits.logsumexp(1) if self.softmax else F.softplus(logits).sum(1)
        losses = normaliser - (self.targets * logits).sum(1)
        return float(self.a[:, 0] @ losses + self.weight_decay / 2 * w.square().sum())

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.softmax else logits.sigmoid()

    def pull_back(self, cotangent: Tensor, w: Tensor) -> Tensor:
        """[R + 1, C]: the gradient in weights and bias of a function with this cotangent of the logits [N, C]."""
        return torch.cat([self.z.T @ cotangent + self.weight_decay * w, cotangent.sum(0, keepdim=True)])

    def gradient(self, p: Tensor, w: Tensor) -> Tensor:
        return self.pull_back(self.a * (p - self.targets), w)

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        u = self.logits(v)
        u = u - (p * u).sum(1, keepdim=True) if self.softmax else u * (1 - p)
        return self.pull_back(self.a * p * u, v[:-1])

    def hessian_diagonal(self, p: Tensor) -> Tensor:
        curvature = self.a * p * (1 - p)
        bias = curvature.sum(0, keepdim=True).clamp_min(1e-300)
        return torch.cat([self.z.square().T @ curvature + self.weight_decay, bias])

    def logits(self, v: Tensor) -> Tensor:
        return self.z @ v[:-1] + v[-1]


def _newton(
    x: Tensor, targets: Tensor, a: Tensor, weight_decay: float, max_iterations: int, tolerance: float, softmax: bool
) -> tuple[Tensor, Tensor, int, bool]:
    mean, z, axes = _principal_axes(x, a)
    objective = _Objective(z, targets, a[:, None], weight_decay, softmax)
    v = torch.zeros(z.shape[1] + 1, targets.shape[1], dtype=torch.float64, device=x.device)  # weights, then the bias
    logits = objective.logits(v)
    value = objective.value(logits, v[:-1])
    scale = math.sqrt(1 + float(a @ z.square().sum(1)))  # that of one example's gradient, which is (p - target) (z, 1)
    for iteration in range(max_iterations + 1):
        p = objective.probabilities(logits)
        gradient = objective.gradient(p, v[:-1])
        norm = float(gradient.norm())
        if norm <= tolerance * scale or iteration == max_iterations:
            break
        direction = _solve(objective, p, gradient, accuracy=min(0.25, math.sqrt(norm / scale)))
        step, value = _line_search(objective, v, logits, direction, float((gradient * direction).sum()), value)
        if step == 0:
            break  # at the end of float64
        v = v + step * direction
        logits = objective.logits(v)
    converged = norm <= tolerance * scale
    if not converged:
        _warn(iteration, f"the gradient's norm is {norm:.1e}", f"{tolerance * scale:.0e}")
    bias = v[-1] - v[-1].mean() if softmax else v[-1]  # a constant in all biases of a softmax changes nothing
    weight = (axes @ v[:-1]).T
    return weight, bias - weight @ mean, iteration, converged


def _principal_axes(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean [D], and centred features z [N, R] = (x - mean) axes, of which axes [D, R] are orthonormal.

    The best weights lie in the span of the centred features (a part outside only adds to the penalty), so nothing is
    lost where R = N < D, and the penalty keeps its form. Along these axes the Hessian of the objective is near its
    diagonal, which conditions the conjugate gradients: features of a network are correlated and of uneven spread.
    """
    mean = a @ x
    z = x - mean
    axes = None
    if len(x) < x.shape[1]:
        axes, r = torch.linalg.qr(z.T)
        z = r.T
    rotation = torch.linalg.eigh(z.T @ (a[:, None] * z)).eigenvectors
    return mean, z @ rotation, rotation if axes is None else axes @ rotation


def _solve(objective: _Objective, p: Tensor, gradient: Tensor, accuracy: float, max_steps: int = 500) -> Tensor:
    """About -H^-1 gradient by conjugate gradients, preconditioned by the diagonal of H."""
    diagonal = objective.hessian_diagonal(p)
    solution, residual = torch.zeros_like(gradient), -gradient
    scaled = residual / diagonal
    direction, size = scaled, float((residual * scaled).sum())
    enough = accuracy**2 * size
    for _ in range(max_steps):
        product = objective.hessian_product(p, direction)
        curvature = float((direction * product).sum())
        if curvature <= 0:
            break  # only by rounding: H is positive semi-definite
        solution = solution + size / curvature * direction
        residual = residual - size / curvature * product
        scaled = residual / diagonal
        size, previous = float((residual * scaled).sum()), size
        if size <= enough:
            break
        direction = scaled + size / previous * direction
    return solution


def _line_search(
    objective: _Objective, v: Tensor, logits: Tensor, direction: Tensor, slope: float, value: float
) -> tuple[float, float]:
    """The first of 1, 1/2, 1/4, ... that decreases the objective enough, and the value there; (0, value) if none does.

    Logits are linear in the step, so a trial needs no product with the features.
    """
    change = objective.logits(direction)
    step = 1.0
    while step > 1e-8:
        new = objective.value(logits + step * change, v[:-1] + step * direction[:-1])
        if new <= value + 1e-4 * step * slope + 1e-14 * abs(value):
            return step, new
        step /= 2
    return 0.0, value


def _warn(iterations: int, reached: str, expected: str) -> None:
    warnings.warn(
        f"the head did not converge: after {iterations} iterations {reached}, expected {expected}; "
        "raise max_iterations or weight_decay",
        stacklevel=4,
    )


def _lbfgs(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    a: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    weight_decay: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, int, bool]:
    # The same objective in other variables: W = V diag(1 / scale) axes^T, where the Hessian of V is near a multiple of
    # the identity.
    mean, z, axes = _principal_axes(x, a)
    scale = (a @ z.square() / 4 + weight_decay).sqrt()
    scaled = z / scale  # [N, R]
    v = torch.zeros(num_classes, len(scale), dtype=torch.float64, requires_grad=True)
    b = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
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
        fit = (a * losses(F.linear(scaled, v, b), labels)).sum()
        value = fit + weight_decay / 2 * (v / scale).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(objective)
        objective()
    largest = max(float(v.grad.abs().max()), float(b.grad.abs().max()))
    iterations = optimiser.state[v]["n_iter"]
    # At the end of its float64 a line search may stop a little above the tolerance; ten times it is still an optimum,
    # but only if it stopped by itself.
    converged = largest <= tolerance or (largest <= 10 * tolerance and iterations < max_iterations)
    if not converged:
        _warn(iterations, f"the gradient's largest entry is {largest:.1e}", f"{tolerance:.0e}")
    weight = (v / scale).detach() @ axes.T
    return weight, b.detach() - weight @ mean, iterations, converged


def _adam(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    a: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    weight_decay: float,
    seed: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    draws: int,
) -> tuple[Tensor, Tensor, int]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(x.shape[1], num_classes)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(linear.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = 0
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.multinomial(a, draws, replacement=True, generator=generator)
            for rows in order[: draws - draws % batch_size].split(batch_size):
                optimiser.zero_grad()
                losses(linear(x[rows]), labels[rows]).mean().backward()
                optimiser.step()
                steps += 1
    return linear.weight.detach(), linear.bias.detach(), steps
