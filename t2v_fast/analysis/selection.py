"""Choose a pretrained feature extractor (an expert) for a task without training on all of them.

An expert is known by the embedding of the task that it was trained on; a table of test errors [tasks, experts] says how
well each did on tasks that were tried. Sections 4 and 5 of Achille et al., 2019 (arXiv 1902.03545).
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass

import numpy as np

from .distance import ALPHA, Vectors, as_vectors, asymmetric_distance, cdist, check_same, trivial_embedding

# Model2Vec's defaults. The penalty allows logarithms of some tenths; it was not tuned on any task's errors.
PENALTY, STEPS, RATE, ENTRIES = 1.0, 30, 0.02, 4096


def nearest_expert(distances: np.ndarray, available: np.ndarray | None = None) -> np.ndarray:
    """For each task the index [T] of the nearest expert by ``distances`` [E, T], of those ``available`` [T, E]."""
    distances = np.asarray(distances, dtype=np.float64).T
    if available is None:
        available = np.ones(distances.shape, bool)
    if available.shape != distances.shape or np.isnan(distances).any():
        raise ValueError(
            f"distances are {list(distances.T.shape)} and available is {list(available.shape)}, expected numbers "
            "[E, T] and [T, E]"
        )
    if not available.any(1).all():
        raise ValueError(f"task {int(np.flatnonzero(~available.any(1))[0])} has no expert to choose from")
    return np.where(available, distances, np.inf).argmin(1)


def best_on_average(errors: np.ndarray) -> np.ndarray:
    """For each task the expert [T] with the lowest mean error on the other tasks, each task's mean taken off.

    ``errors`` [T, E], NaN where an expert is not to be used for a task.
    """
    errors = check_errors(errors)
    centred = errors - np.nanmean(errors, axis=1, keepdims=True)
    known = ~np.isnan(centred)
    values = np.where(known, centred, 0)
    others = known.sum(0) - known
    mean = np.divide(values.sum(0) - values, others, out=np.zeros_like(values), where=others > 0)
    return nearest_expert(mean.T, known)


def relative_error_increase(errors: np.ndarray, chosen: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """(error of the chosen expert - error of the best one) / error of the best one, for each task [T].

    The measure of table 1 of Achille et al., 2019. ``errors`` [T, E] with NaN where an expert is not to be used,
    ``chosen`` [T]. Of the best expert's error at least ``floor`` is taken to divide by, such as one test image's share;
    without one, ValueError where the best expert makes no error.
    """
    errors = check_errors(errors)
    mine = errors[np.arange(len(errors)), chosen]
    if np.isnan(mine).any():
        task = int(np.flatnonzero(np.isnan(mine))[0])
        raise ValueError(f"task {task}: expert {int(np.asarray(chosen)[task])} was chosen, but has no error there")
    return (mine - np.nanmin(errors, axis=1)) / _least(errors, floor)


def chance_increase(errors: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """The expectation of :func:`relative_error_increase` for an expert drawn at random, [T]."""
    errors = check_errors(errors)
    return (np.nanmean(errors, axis=1) - np.nanmin(errors, axis=1)) / _least(errors, floor)


def _least(errors: np.ndarray, floor: float) -> np.ndarray:
    least = np.maximum(np.nanmin(errors, axis=1), floor)
    if (least <= 0).any():
        raise ValueError(
            f"task {int(np.flatnonzero(least <= 0)[0])}: its best expert makes no error, so an increase has no ratio; "
            "pass a floor such as 1 / the number of its test images"
        )
    return least


def check_errors(errors: np.ndarray) -> np.ndarray:
    """float64 [T, E]; ValueError unless every task has an error, and all errors are from 0 to 1 or NaN."""
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 2 or not errors.size:
        raise ValueError(f"errors have shape {list(errors.shape)}, expected [tasks, experts]")
    known = ~np.isnan(errors)
    if not known.any(1).all():
        raise ValueError(f"task {int(np.flatnonzero(~known.any(1))[0])} has no error of any expert")
    if not ((errors[known] >= 0) & (errors[known] <= 1)).all():
        raise ValueError("errors must be from 0 to 1, or missing")
    return errors


@dataclass
class Model2Vec:
    """Experts as vectors m_j = F_j + b_j, placed so that the best expert of a task is the nearest to it.

    Section 5 of Achille et al., 2019: F_j [D] is the embedding of the task that expert j was trained on, and b_j is
    learned from tasks of which the best expert is known, by the cross entropy of a softmax over -d_asym(m_j -> t). The
    paper leaves open how b_j is kept small and m_j positive: here m_j = F_j exp(s_j), and the loss has
    penalty / 2 sum_j mean(s_j^2) besides. Of ``steps`` steps of Adam from s_j = 0, where this is the asymmetric
    distance, with a rate that falls from ``rate`` to zero, the one of the lowest loss is kept. The temperature of the
    softmax is the likeliest one at every step. Distances are taken over ``entries`` of the vectors' entries, evenly
    spaced, or all if there are fewer: time grows with experts times tasks times entries.
    """

    alpha: float = ALPHA
    penalty: float = PENALTY
    steps: int = STEPS
    rate: float = RATE
    entries: int = ENTRIES

    def fit(
        self, experts: Vectors, tasks: Vectors, errors: np.ndarray, *, trivial: np.ndarray | None = None
    ) -> Model2Vec:
        """Learn from ``errors`` [T, E] (NaN where an expert is not to be used) of ``tasks``, embedded as ``experts``.

        ``trivial`` [D]: t0, by default :func:`trivial_embedding` of the experts. Raises ValueError and
        FingerprintMismatch for what cannot be compared.
        """
        check_same(experts, tasks)
        f, t = as_vectors(experts, "experts"), as_vectors(tasks, "tasks")
        errors = check_errors(errors)
        if errors.shape != (len(t), len(f)):
            raise ValueError(f"errors are {list(errors.shape)}, expected [{len(t)} tasks, {len(f)} experts]")
        prior = trivial_embedding(experts) if trivial is None else np.asarray(trivial, dtype=np.float64)
        self.indices = np.linspace(0, f.shape[1] - 1, min(self.entries, f.shape[1])).round().astype(int)
        f, t, prior = f[:, self.indices], t[:, self.indices], prior[self.indices]
        # The distance does not change if an entry of all vectors is divided by one number: single precision suffices.
        unit = np.concatenate([f, t]).mean(0)
        used = unit > 0
        self.vectors = f.copy()  # m_j [E, len(indices)]
        # A filter that is nearly dead is far below the prior, however far.
        f, t, t0 = (np.minimum(x[..., used] / unit[used], 1e30).astype(np.float32) for x in (f, t, prior))
        least = np.float32(1e-30)  # a filter that is dead for an expert or task, beside others of about one
        log_f, log_t = np.log(np.maximum(f, least)), np.log(np.maximum(t, least))
        best = np.nanargmin(errors, axis=1)
        missing = np.isnan(errors)
        s = np.zeros_like(log_f)
        self.loss: list[float] = []
        self.temperature = 1.0
        first, second = np.zeros_like(s), np.zeros_like(s)
        for step in range(self.steps + 1):
            distance, slope = _model_distances(log_f + s, log_t, t0, self.alpha)
            distance[missing] = np.inf
            self.temperature = _temperature(distance, best)
            p = _softmax(-distance / self.temperature)
            penalty = self.penalty / 2 * float(np.square(s).mean(1).sum())
            self.loss.append(float(-np.log(p[np.arange(len(p)), best]).mean()) + penalty)
            if self.loss[-1] == min(self.loss):
                kept = s.copy()
            if step == self.steps:
                break
            p[np.arange(len(p)), best] -= 1
            gradient = slope(-p / (self.temperature * len(p))) + self.penalty * s / s.shape[1]
            # Adam; every entry has the scale of a logarithm, so no step sizes need tuning.
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * np.square(gradient)
            at = step + 1
            s -= (
                self.rate
                * (1 - step / self.steps)
                * (first / (1 - 0.9**at))
                / (np.sqrt(second / (1 - 0.99**at)) + 1e-12)
            )
        self.vectors[:, used] = np.exp(np.log(np.maximum(f, least)) + kept).astype(np.float64) * unit[used]
        self.trivial = prior
        return self

    def distances(self, tasks: Vectors) -> np.ndarray:
        """d_asym(m_j -> t) [E, T]."""
        t = as_vectors(tasks, "tasks")[:, self.indices]
        return asymmetric_distance(self.vectors, t, alpha=self.alpha, trivial=self.trivial)


def _model_distances(log_m: np.ndarray, log_t: np.ndarray, t0: np.ndarray, alpha: float):
    """d_asym(m_j -> t_i) [T, E] with the cosine metric, and what turns its gradient [T, E] into that of log m [E, D].

    With u = m / (m + t) the other vector is 1 - u, so the distance is a function of sum u and sum u^2.
    """

    def cosine(s1: np.ndarray, s2: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distance, and its derivatives by sum u and sum u^2."""
        a, b, c = s1 - s2, s2, d - 2 * s1 + s2
        root = np.sqrt(b * c)
        cos = a / root
        return 1 - cos, -(1 / root + cos / c), 1 / root + cos / 2 * (1 / b + 1 / c)

    d = log_m.shape[1]
    u = [1 / (1 + np.exp(log_t - row)) for row in log_m]  # E times [T, D]
    s1 = np.stack([x.sum(1, dtype=np.float64) for x in u], 1)
    s2 = np.stack([np.einsum("td,td->t", x, x, dtype=np.float64) for x in u], 1)
    distance, by1, by2 = cosine(s1, s2, d)
    r = np.exp(log_m) / t0
    w = (r + 1) / (r + 2)  # (m + t0) / (m + 2 t0) [E, D]
    depth, depth1, depth2 = cosine(w.sum(1, dtype=np.float64), np.square(w).sum(1, dtype=np.float64), d)

    def slope(g: np.ndarray) -> np.ndarray:
        out = np.empty_like(log_m)
        for j, x in enumerate(u):
            c1, c2 = ((g * by)[:, j].astype(np.float32) for by in (by1, by2))
            out[j] = c1 @ (x * (1 - x)) + (2 * c2) @ (np.square(x) * (1 - x))
        of_depth = -alpha * g.sum(0)[:, None]
        by_m = r / np.square(r + 2)  # of w by log m
        return (out + of_depth * (depth1[:, None] + 2 * depth2[:, None] * w) * by_m).astype(np.float32)

    return distance - alpha * depth, slope


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _temperature(distances: np.ndarray, best: np.ndarray) -> float:
    """Of a grid the temperature that makes the best experts likeliest."""
    finite = np.where(np.isinf(distances), np.nan, distances)
    spread = max(float(np.nanmean(np.nanstd(finite, axis=1))), 1e-6)
    grid = spread * np.geomspace(0.05, 20, 60)

    def likelihood(t: float) -> float:
        return float(np.log(_softmax(-distances / t)[np.arange(len(best)), best]).mean())

    return float(max(grid, key=likelihood))


def leave_one_out(experts: Vectors, tasks: Vectors, errors: np.ndarray, model: Model2Vec | None = None) -> np.ndarray:
    """Model2Vec's choice [T] for each task, learned from the other tasks."""
    check_same(experts, tasks)
    f, t, errors = as_vectors(experts, "experts"), as_vectors(tasks, "tasks"), check_errors(errors)
    model, prior = model or Model2Vec(), trivial_embedding(experts)
    chosen = np.empty(len(t), int)
    for k in range(len(t)):
        rest = np.arange(len(t)) != k
        if rest.any():
            distances = model.fit(f, t[rest], errors[rest], trivial=prior).distances(t[k : k + 1])
        else:  # nothing to learn from
            distances = asymmetric_distance(f, t, alpha=model.alpha, trivial=prior)
        chosen[k] = nearest_expert(distances, ~np.isnan(errors[k : k + 1]))[0]
    return chosen


def compare(
    experts: Vectors,
    tasks: Vectors,
    errors: np.ndarray,
    *,
    alpha: float = ALPHA,
    model: Model2Vec | None = None,
    floor: float = 0.0,
) -> dict[str, np.ndarray]:
    """The relative error increase [T] of each way to choose, as in table 1 of Achille et al., 2019.

    ``experts`` [E]: embeddings of the tasks that the experts were trained on; ``tasks`` [T], ``errors`` [T, E] with NaN
    where an expert is not to be used, ``floor`` as :func:`relative_error_increase`. Best on average and Model2Vec learn
    from the other tasks' errors only.
    """
    errors = check_errors(errors)
    available = ~np.isnan(errors)
    chosen = {
        "best on average": best_on_average(errors),
        "Task2Vec, symmetric": nearest_expert(cdist(experts, tasks), available),
        "Task2Vec, asymmetric": nearest_expert(asymmetric_distance(experts, tasks, alpha=alpha), available),
        "Model2Vec": leave_one_out(experts, tasks, errors, model or Model2Vec(alpha)),
    }
    found = {name: relative_error_increase(errors, picks, floor=floor) for name, picks in chosen.items()}
    return {"chance": chance_increase(errors, floor=floor), **found}


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` [T], which are drawn again with replacement."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def increase_rows(increases: dict[str, np.ndarray]) -> list[list[str]]:
    """Rows of text for :func:`compare`'s result: way, mean increase in percent, its 95 percent interval, median."""
    rows = [["chosen by", "mean increase", "95 % interval", "median"]]
    for name, values in increases.items():
        low, high = (f"{100 * x:.1f}" for x in bootstrap_interval(values))
        rows.append([name, f"{100 * values.mean():.1f} %", f"{low} to {high} %", f"{100 * np.median(values):.1f} %"])
    return rows


def read_errors(path: str | os.PathLike) -> tuple[list[str], list[str], np.ndarray]:
    """Tasks, experts and errors [T, E] of a CSV table: experts on top, a task at the start of each row.

    An empty field is an expert that is not to be used for the task. Raises ValueError, naming file and row.
    """
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ValueError(f"{path} has no errors: expected a row of experts' names and then rows of task, error, ...")
    experts, tasks, errors = rows[0][1:], [], []
    for row in rows[1:]:
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: the row of {row[0]!r} has {len(row) - 1} errors, expected {len(experts)}")
        try:
            errors.append([float(x) if x.strip() else np.nan for x in row[1:]])
        except ValueError as error:
            raise ValueError(f"{path}: the row of {row[0]!r}: {error}") from None
        tasks.append(row[0])
    for names, kind in ((experts, "experts"), (tasks, "tasks")):
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{path}: two {kind} are called {sorted(twice)[0]!r}")
    return tasks, experts, check_errors(np.array(errors))


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Log Expected Empirical Prediction (Nguyen et al., 2020, arXiv 2002.12462, section 3); higher is better.

    ``probabilities`` [N, Z]: what an expert says of the task's images, over its own Z classes, rows of sum one.
    ``labels`` [N]: the images' labels in the task. The mean log likelihood of the labels if an image's expert class z
    is drawn from its row and its label then from the empirical P(y | z); at most 0.
    """
    theta, codes, classes = _examples(probabilities, labels, "probabilities")
    if (theta < 0).any() or not np.allclose(theta.sum(1), 1, atol=1e-5):
        raise ValueError("probabilities: every row must be of numbers of at least 0 and sum to one")
    joint = np.eye(classes)[codes].T @ theta / len(theta)  # [C, Z]
    marginal = joint.sum(0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    return float(np.log((conditional[codes] * theta).sum(1)).mean())


def logme(features: np.ndarray, labels: np.ndarray, *, iterations: int = 100, tolerance: float = 1e-6) -> float:
    """LogME: log maximum evidence an example (You et al., 2021, arXiv 2102.11005, algorithm 1); higher is better.

    ``features`` [N, D] of an expert on the task's images, ``labels`` [N]. For each class a Bayesian linear regression
    of its 0-1 indicator on the features, weights ~ N(0, 1/alpha), noise ~ N(0, 1/beta), alpha and beta maximising the
    evidence by MacKay's fixed point, until neither moves by more than ``tolerance`` of itself; the mean over classes.
    """
    f, codes, classes = _examples(features, labels, "features")
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = np.square(s)
    targets = np.eye(classes)[codes]  # [N, C]
    projected = np.square(u.T @ targets)  # [min(N, D), C]
    # The part of a target outside the features' span, which no weights explain.
    outside = np.maximum(np.square(targets).sum(0) - projected.sum(0), 0)
    evidence = []
    for z2, rest in zip(projected.T, outside, strict=True):
        alpha = beta = 1.0
        for _ in range(iterations):
            t = alpha / beta
            m2 = (sigma * z2 / np.square(t + sigma)).sum()
            residual = (z2 / np.square(1 + sigma / t)).sum() + rest
            gamma = (sigma / (t + sigma)).sum()
            before = alpha, beta
            # Targets that the features explain exactly, or not at all, have their optimum at infinity.
            alpha = float(np.clip(gamma / max(m2, 1e-300), 1e-10, 1e10))
            beta = float(np.clip((n - gamma) / max(residual, 1e-300), 1e-10, 1e10))
            if abs(alpha - before[0]) <= tolerance * alpha and abs(beta - before[1]) <= tolerance * beta:
                break
        t = alpha / beta
        m2 = (sigma * z2 / np.square(t + sigma)).sum()
        residual = (z2 / np.square(1 + sigma / t)).sum() + rest
        log_determinant = np.log(alpha + beta * sigma).sum() + (d - len(sigma)) * np.log(alpha)
        evidence.append(
            (n * np.log(beta / (2 * np.pi)) + d * np.log(alpha) - log_determinant - beta * residual - alpha * m2) / 2
        )
    return float(np.mean(evidence) / n)


def _examples(values: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """float64 [N, D], the labels as codes 0 to C-1, and C."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or not values.size or labels.shape != (len(values),):
        raise ValueError(f"{name} are {list(values.shape)} and labels {list(labels.shape)}, expected [N, D] and [N]")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite")
    kinds, codes = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(f"labels are all {kinds[0]}: expected at least two classes")
    return values, codes, len(kinds)
