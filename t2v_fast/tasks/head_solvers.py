"""Solvers for linear heads: Newton's method, L-BFGS, and Adam with the schedule of the public Task2Vec code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD = 4  # rows and columns are padded to multiples of this, see _product
MAX_LOGITS = 1 << 22  # in one array of float64, 32 MiB; a few such arrays exist at a time
MAX_HALVINGS = 28  # of a step, in a line search

Losses = Callable[[Tensor, Tensor], Tensor]  # from logits [N, C] and labels to losses [N]


@dataclass(frozen=True)
class HeadTask:
    """The labels that a head is fitted to, and the weights of the examples."""

    labels: Tensor  # [N] integers; for sigmoid [N, C] between 0 and 1
    num_classes: int
    weights: Tensor | None = None  # [N], equal by default


def weights_of(task: HeadTask) -> Tensor:
    """Return the weights of a task that was checked: :func:`t2v_fast.tasks.head.fit_heads` gives every task weights."""
    assert task.weights is not None
    return task.weights


@dataclass(frozen=True)
class Optimum:
    """The weights that a solver found."""

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    iterations: int
    converged: bool
    shortfall: str = ""  # for a solver that failed to converge: what it reached, and what was expected


def softmax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each example, [N], for labels [N]."""
    return F.cross_entropy(logits, labels, reduction="none")


def sigmoid_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The binary cross entropy of each example, [N], summed over its labels [N, C]."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean [D], centred features z [N, R] = (x - mean) axes, and the orthonormal axes [D, R].

    The best weights lie in the span of the centred features, because a part outside the span only adds to the penalty.
    So nothing is lost where R = N < D, and the penalty keeps its form. Features of a network are correlated and of
    uneven spread; along these axes the Hessian of the objective is near its diagonal, which conditions the conjugate
    gradients. Mean and axes do not depend on the weights of a task, so all tasks share them.
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
    """Append rows and columns of zeros, up to multiples of ``PAD``."""
    return F.pad(matrix, (0, -matrix.shape[1] % PAD, 0, -matrix.shape[0] % PAD))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Compute ``rows @ matrix`` for a padded matrix; no row of the result depends on the other rows (seen with MKL).

    BLAS uses other kernels for rows beyond a multiple of four and for rows of odd length. Those kernels add in another
    order.
    """
    return (F.pad(rows, (0, 0, 0, -len(rows) % PAD)) @ matrix)[: len(rows)]


@dataclass(frozen=True)
class _Objective:
    """The objectives of T tasks side by side, each sum_n a_n l_n + weight_decay / 2 |W|^2, and their derivatives.

    A row is a class of a task; all tasks together have K rows. A vector [K, R] has the bias of each row, then its
    weights. The result for a task does not depend on the other tasks, to the last bit as far as :func:`_product`
    guarantees it. This matters: two iterates that differ in the last bit may stop at different points within the
    tolerance.
    """

    z: Tensor  # [N, R] a one, then the features, padded
    penalty: Tensor  # [R] zero for the bias, then the weight decay
    sizes: list[int]  # the classes of each task
    targets: Tensor  # [K, N] the probabilities that are fitted
    a: Tensor  # [T, N] weights of the examples
    softmax: bool

    @cached_property
    def task(self) -> Tensor:
        """The task of each row, [K]."""
        return torch.repeat_interleave(torch.tensor(self.sizes, device=self.z.device))

    def of(self, tasks: Tensor) -> _Objective:
        """The objectives of some tasks, given by a mask [T]."""
        sizes = [size for size, chosen in zip(self.sizes, tasks.tolist(), strict=True) if chosen]
        return replace(self, sizes=sizes, targets=self.targets[tasks[self.task]], a=self.a[tasks])

    def spread(self, of_tasks: Tensor) -> Tensor:
        """Repeat the value of each task, [T, ...], for its rows, [K, ...]."""
        return of_tasks.index_select(0, self.task)

    def sum(self, of_rows: Tensor) -> Tensor:
        """Sum the values of the rows, [K, ...], of each task, [T, ...]."""
        return of_rows.new_zeros(len(self.sizes), *of_rows.shape[1:]).index_add_(0, self.task, of_rows)

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product of two vectors for each task, [T]."""
        return self.sum((u * v).sum(1))

    def logits(self, v: Tensor) -> Tensor:
        """The logits of each row, [K, N]."""
        return _product(v, self.z.T)

    def normalisers(self, logits: Tensor) -> Tensor:
        """The part of the losses that does not depend on the targets, [T, N]."""
        # Task by task, because vectorised functions round the last elements of an array differently.
        blocks = logits.split(self.sizes)
        return torch.stack([b.logsumexp(0) if self.softmax else F.softplus(b).sum(0) for b in blocks])

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each row, [K, N]."""
        return torch.cat([b.softmax(0) if self.softmax else b.sigmoid() for b in logits.split(self.sizes)])

    def values(self, logits: Tensor, v: Tensor) -> Tensor:
        """The objective of each task, [T]."""
        losses = self.normalisers(logits) - self.sum(self.targets * logits)
        return (self.a * losses).sum(1) + self.dot(self.penalty * v, v) / 2

    def pull_back(self, cotangent: Tensor, v: Tensor) -> Tensor:
        """The gradient [K, R] of the penalty and of a function whose gradient by the logits is ``cotangent`` [K, N]."""
        return _product(cotangent, self.z) + self.penalty * v

    def gradient(self, p: Tensor, v: Tensor) -> Tensor:
        """The gradient [K, R] at probabilities ``p``."""
        return self.pull_back(self.spread(self.a) * (p - self.targets), v)

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        """The product [K, R] of the Hessian at probabilities ``p`` with a vector."""
        u = self.logits(v)
        u = u - self.spread(self.sum(p * u)) if self.softmax else u * (1 - p)
        return self.pull_back(self.spread(self.a) * p * u, v)

    def hessian_diagonal(self, p: Tensor) -> Tensor:
        """The diagonal [K, R] of the Hessian at probabilities ``p``, kept above zero."""
        curvature = self.spread(self.a) * p * (1 - p)
        return (_product(curvature, self.z.square()) + self.penalty).clamp_min(1e-300)


def _objective(z: Tensor, tasks: Sequence[HeadTask], weight_decay: float, softmax: bool) -> _Objective:
    """Build the objectives of tasks on features [N, R], padded with examples of weight zero and features of zero."""
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
        F.pad(torch.stack([weights_of(task) for task in tasks]).to(z), (0, extra)),
        softmax,
    )


def newton(
    x: Tensor, tasks: Sequence[HeadTask], weight_decay: float, max_iterations: int, tolerance: float, softmax: bool
) -> list[Optimum]:
    """Newton's method with conjugate gradients, for all tasks together."""
    mean, z, axes = _principal_axes(x)
    back = _padded(F.pad(axes.T, (0, 0, 1, 0)))  # maps a row's bias and weights along the axes to weights
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
            found.append(Optimum(weight, bias - weight @ mean, int(iteration), not shortfall, shortfall))
    return found


def _groups(tasks: Sequence[HeadTask], n: int) -> Iterator[list[HeadTask]]:
    """Divide the tasks into groups whose logits fit into ``MAX_LOGITS``, at least one task in each."""
    group: list[HeadTask] = []
    for task in tasks:
        if group and n * sum(t.num_classes for t in (*group, task)) > MAX_LOGITS:
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _minimise(objective: _Objective, max_iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the optima [K, R], and for each task the iterations, the gradient's norm and the norm that suffices."""
    v = objective.z.new_zeros(len(objective.task), objective.z.shape[1])
    values = objective.values(objective.logits(v), v)
    # The scale of one example's gradient, which is (p - target) z.
    scales = (objective.a * objective.z.square().sum(1)).sum(1).sqrt()
    iterations, norms = torch.zeros_like(values, dtype=torch.long), torch.full_like(values, math.inf)
    going, part = torch.ones_like(values, dtype=torch.bool), objective  # tasks that are not done, and their objectives
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
        # Loose near the optimum, where a step costs most. With a cube root Newton's method is still superlinear.
        accuracy = (norms / scales)[going].pow(1 / 3).clamp_max(0.03)
        direction = _solve(part, p, gradient, accuracy)
        slopes = part.dot(gradient, direction)
        steps, values[going] = _line_search(part, v[rows], logits, direction, slopes, values[going])
        v[rows] += part.spread(steps)[:, None] * direction
        if not steps.all():  # a task is at the limit of float64
            going, part = going.masked_scatter(going, steps > 0), part.of(steps > 0)
            if not going.any():
                break
    return v, iterations, norms, tolerance * scales


def _solve(objective: _Objective, p: Tensor, gradient: Tensor, accuracy: Tensor, max_steps: int = 500) -> Tensor:
    """Approximate -H^-1 gradient of each task by conjugate gradients, preconditioned by the diagonal of H."""
    diagonal = objective.hessian_diagonal(p)
    solution, residual = torch.zeros_like(gradient), -gradient
    direction = residual / diagonal
    size = objective.dot(residual, direction)
    enough = accuracy.square() * size
    rows = torch.arange(len(p), device=p.device)  # of the tasks that are not done
    for _ in range(max_steps):
        product = objective.hessian_product(p, direction)
        curvature = objective.dot(direction, product)
        positive = curvature > 0  # H is positive semi-definite, so anything else is rounding
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
    """Return for each task the first step of 1, 1/2, 1/4, ... that decreases its objective enough, and the new value.

    Where no step does, the step is zero and the value is the old one. Logits are linear in the step, so a trial needs
    no product with the features.
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


def lbfgs(
    x: Tensor, tasks: Sequence[HeadTask], losses: Losses, weight_decay: float, max_iterations: int, tolerance: float
) -> list[Optimum]:
    """L-BFGS, one task after the other."""
    mean, z, axes = _principal_axes(x)
    found = []
    for task in tasks:
        v, bias, iterations, largest = _lbfgs_along_axes(z, task, losses, weight_decay, max_iterations, tolerance)
        weight = v @ axes.T
        # At the limit of float64 a line search may stop a little above the tolerance. Ten times the tolerance still
        # counts as an optimum, but only if the search stopped by itself.
        converged = largest <= tolerance or (largest <= 10 * tolerance and iterations < max_iterations)
        shortfall = "" if converged else f"the gradient's largest entry is {largest:.1e}, expected {tolerance:.0e}"
        found.append(Optimum(weight, bias - weight @ mean, iterations, converged, shortfall))
    return found


def _lbfgs_along_axes(
    z: Tensor, task: HeadTask, losses: Losses, weight_decay: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, int, float]:
    # The same objective in other variables: the weights are v / scale, so that the Hessian by v is near a multiple of
    # the identity.
    a = weights_of(task)
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
    assert v.grad is not None
    assert b.grad is not None
    largest = max(float(v.grad.abs().max()), float(b.grad.abs().max()))
    return (v / scale).detach(), b.detach(), optimiser.state[v]["n_iter"], largest


def adam(
    x: Tensor,
    task: HeadTask,
    losses: Losses,
    weight_decay: float,
    seed: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    draws: int,
) -> Optimum:
    """The public code's schedule: batches of examples that are drawn with replacement, from a random start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(x.shape[1], task.num_classes)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(linear.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = 0
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.multinomial(weights_of(task), draws, replacement=True, generator=generator)
            for rows in order[: draws - draws % batch_size].split(batch_size):
                optimiser.zero_grad()
                losses(linear(x[rows]), task.labels[rows]).mean().backward()
                optimiser.step()
                steps += 1
    return Optimum(linear.weight.detach(), linear.bias.detach(), steps, converged=False)  # stopped early, by design
