"""Fit the linear head of a task on cached features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = ("lbfgs", "adam")


@dataclass(frozen=True)
class HeadFit:
    """A fitted head and how it went."""

    linear: nn.Linear  # float32
    loss: float  # weighted mean loss of the fit, without the penalty
    accuracy: float  # unweighted: of the label, for sigmoid of all labels
    iterations: int  # L-BFGS iterations, or optimiser steps
    converged: bool


def fit_head(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    weights: Tensor | None = None,
    likelihood: str = "softmax",
    method: str = "lbfgs",
    weight_decay: float = 1e-4,
    seed: int = 0,
    max_iterations: int = 3000,
    tolerance: float = 1e-7,
    learning_rate: float = 4e-4,
    epochs: int = 10,
    batch_size: int = 64,
    draws: int = 10_000,
) -> HeadFit:
    """Fit ``nn.Linear(D, num_classes)`` on features [N, D] and labels ([N] integers, or [N, C] for ``"sigmoid"``).

    ``"lbfgs"`` minimises sum_n a_n l_n + weight_decay / 2 |W|^2 in float64 until no entry of the gradient exceeds
    ``tolerance``; a_n are ``weights`` [N] divided by their sum, by default 1/N. The objective is strictly convex in W,
    so the result does not depend on a start. The bias is not penalised. Warns if ``max_iterations`` do not suffice.

    ``"adam"`` is the public Task2Vec code's schedule, stopped early by design: ``epochs`` of ``draws`` draws with
    replacement (in proportion to ``weights``), in batches, L2 penalty on weights and bias, from a random start.

    Raises ValueError naming what is wrong: features that are not finite, no example, fewer than two classes, a class
    without example.
    """
    _check(features, labels, num_classes, weights, likelihood, method)
    if weights is None:
        weights = torch.ones(len(features), dtype=torch.float64)
    a = weights.double() / weights.sum()
    losses = _softmax_losses if likelihood == "softmax" else _sigmoid_losses
    if method == "lbfgs":
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
    return HeadFit(linear, loss, float(hits.double().mean()), iterations, converged)


def _check(
    features: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None, likelihood: str, method: str
) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown head method {method!r}: expected one of {', '.join(METHODS)}")
    if likelihood not in ("softmax", "sigmoid"):
        raise ValueError(f"a head has likelihood 'softmax' or 'sigmoid', got {likelihood!r}")
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features are {list(features.shape)}, expected [N, D] with N of at least 1")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the features of example {bad} are not finite: the probe overflows on it")
    if weights is not None and (list(weights.shape) != [len(features)] or not (weights >= 0).all()):
        raise ValueError(f"weights are {list(weights.shape)}, expected [{len(features)}] numbers of at least 0")
    if likelihood == "sigmoid":
        if list(labels.shape) != [len(features), num_classes]:
            raise ValueError(f"labels are {list(labels.shape)}, expected [{len(features)}, {num_classes}]")
        return
    if list(labels.shape) != [len(features)] or labels.is_floating_point():
        raise ValueError(f"labels are {list(labels.shape)} {labels.dtype}, expected integers [{len(features)}]")
    if num_classes < 2:
        raise ValueError(f"a task needs at least two classes, got {num_classes}")
    counts = torch.bincount(labels.clamp_min(0), minlength=num_classes)
    if int(labels.min()) < 0 or len(counts) > num_classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    if not counts.all():
        raise ValueError(f"class {int((counts == 0).nonzero()[0])} of {num_classes} has no example")


def _softmax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)


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
    # The same objective in other variables: W = V diag(1 / scale) B^T, with B the principal axes of the weighted
    # features. The best W lies in their span (a part outside it only adds to the penalty), and there the Hessian of V
    # is near a multiple of the identity, while raw features of a network differ in spread by orders of magnitude.
    mean = (a[:, None] * x).sum(0)
    centred = x - mean
    _, spread, axes = torch.linalg.svd(a.sqrt()[:, None] * centred, full_matrices=False)
    kept = spread > spread[0] * 1e-10
    axes, scale = axes[kept], (spread[kept].square() / 4 + weight_decay).sqrt()
    scaled = centred @ axes.T / scale  # [N, r]
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
    # At the end of its float64 a line search may stop a little above the tolerance; ten times it is still an optimum.
    converged = largest <= 10 * tolerance
    if not converged:
        warnings.warn(
            f"the head did not converge: after {iterations} iterations the gradient's largest entry is {largest:.1e}, "
            f"expected {tolerance:.0e}; raise max_iterations or weight_decay",
            stacklevel=3,
        )
    weight = (v / scale).detach() @ axes
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
