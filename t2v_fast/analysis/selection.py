"""Choose a pretrained feature extractor (an expert) for a task without training on all of them.

An expert is represented by the embedding of the task that it was trained on. A table of test errors [tasks, experts]
says how well each expert did on earlier tasks. The methods are those of sections 4 and 5 of Achille et al., 2019 (arXiv
1902.03545). Letters for shapes: T (tasks), E (experts), D (entries of a vector), N (images).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .distance import ALPHA, Vectors, as_vectors, asymmetric_distance, cdist, check_same, trivial_embedding

# Model2Vec's defaults. The penalty allows changes of some tenths in log m; it was not tuned on the errors of any task.
PENALTY, STEPS, RATE, ENTRIES = 1.0, 30, 0.02, 4096
BANDWIDTH, SHRINKAGE = 0.1, 0.5  # of predict_errors


def nearest_expert(distances: np.ndarray, available: np.ndarray | None = None) -> np.ndarray:
    """Return the index of the nearest available expert for each task.

    Args:
        distances: The distances [E, T] from experts to tasks.
        available: Which experts [T, E] may be chosen for a task, by default all.

    Returns:
        The indices [T].

    Raises:
        ValueError: For wrong shapes, NaN, and a task without an available expert.

    Example:
        >>> import numpy as np
        >>> nearest_expert(np.array([[0.1, 0.5], [0.3, 0.2]]))
        array([0, 1])
    """
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
    """Return the expert with the lowest mean error on the other tasks, for each task.

    Each task's mean error is subtracted first, so that hard tasks count no more than easy ones.

    Args:
        errors: The errors [T, E], NaN where an expert may not be used for a task.

    Returns:
        The indices [T] of the experts.
    """
    errors = check_errors(errors)
    centred = errors - np.nanmean(errors, axis=1, keepdims=True)
    known = ~np.isnan(centred)
    values = np.where(known, centred, 0)
    others = known.sum(0) - known
    mean = np.divide(values.sum(0) - values, others, out=np.zeros_like(values), where=others > 0)
    return nearest_expert(mean.T, known)


def relative_error_increase(errors: np.ndarray, chosen: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """Compute how much worse the chosen experts are than the best ones, relative to the best ones.

    This is the measure of table 1 of Achille et al., 2019: (error of the chosen expert - error of the best expert) /
    error of the best expert.

    Args:
        errors: The errors [T, E], NaN where an expert may not be used for a task.
        chosen: The index [T] of the expert that was chosen for each task.
        floor: The smallest denominator, such as 1 / the number of test images.

    Returns:
        The relative increase [T].

    Raises:
        ValueError: If a chosen expert has no error, or the best expert's error is zero and ``floor`` is zero too.

    Example:
        >>> import numpy as np
        >>> relative_error_increase(np.array([[0.1, 0.2], [0.4, 0.3]]), np.array([1, 1]))
        array([1., 0.])
    """
    errors = check_errors(errors)
    mine = errors[np.arange(len(errors)), chosen]
    if np.isnan(mine).any():
        task = int(np.flatnonzero(np.isnan(mine))[0])
        raise ValueError(f"task {task}: expert {int(np.asarray(chosen)[task])} was chosen, but has no error there")
    return (mine - np.nanmin(errors, axis=1)) / _best_errors(errors, floor)


def chance_increase(errors: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """Return the expected :func:`relative_error_increase` [T] of experts that are drawn at random."""
    errors = check_errors(errors)
    return (np.nanmean(errors, axis=1) - np.nanmin(errors, axis=1)) / _best_errors(errors, floor)


def _best_errors(errors: np.ndarray, floor: float, names: Sequence[str] | None = None) -> np.ndarray:
    best = np.maximum(np.nanmin(errors, axis=1), floor)
    if (best <= 0).any():
        raise ValueError(
            f"task {_called(best <= 0, names)}: its best expert makes no error, so an increase has no ratio; "
            "pass a floor such as 1 / the number of its test images"
        )
    return best


def _called(wrong: np.ndarray, names: Sequence[str] | None) -> str:
    """Return the name of the first wrong task, or its index where tasks have no names."""
    task = int(np.flatnonzero(wrong)[0])
    return str(task) if names is None else repr(names[task])


def check_errors(errors: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
    """Return errors as float64 [T, E].

    Args:
        errors: The errors [T, E], NaN where an expert may not be used for a task.
        names: The names [T] of the tasks for messages, by default their indices.

    Returns:
        The errors.

    Raises:
        ValueError: Unless every task has an error, and all errors are from 0 to 1 or NaN.
    """
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 2 or not errors.size:
        raise ValueError(f"errors have shape {list(errors.shape)}, expected [tasks, experts]")
    known = ~np.isnan(errors)
    if not known.any(1).all():
        raise ValueError(f"task {_called(~known.any(1), names)} has no error of any expert")
    if not ((errors[known] >= 0) & (errors[known] <= 1)).all():
        raise ValueError("errors must be from 0 to 1, or missing")
    return errors


def without_own(errors: np.ndarray, experts: Vectors, tasks: Vectors) -> np.ndarray:
    """Return errors without those of experts on their own tasks.

    An expert's own task is at distance zero, so to choose it says nothing about a distance. An expert's own task is
    known by its embedding, which is equal in all entries.

    Args:
        errors: The errors [T, E], NaN where an expert may not be used for a task.
        experts: The embeddings of the E tasks that the experts were trained on, or an array [E, D].
        tasks: T tasks, embedded in the same way.

    Returns:
        The errors [T, E], NaN where the expert was trained on the task too.

    Raises:
        ValueError: For wrong shapes.

    Example:
        >>> import numpy as np
        >>> tasks = np.array([[2.0, 1.0], [1.0, 3.0]])
        >>> without_own(np.array([[0.1, 0.2], [0.4, 0.3]]), tasks, tasks)
        array([[nan, 0.2],
               [0.4, nan]])
    """
    errors = np.asarray(errors, dtype=np.float64)
    f, t = as_vectors(experts, "experts"), as_vectors(tasks, "tasks")
    if errors.shape != (len(t), len(f)):
        raise ValueError(f"errors are {list(errors.shape)}, expected [{len(t)} tasks, {len(f)} experts]")
    own = np.array([[np.array_equal(expert, task) for expert in f] for task in t])
    return np.where(own, np.nan, errors)


def with_errors(tasks: Sequence[str], errors: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the names of the tasks that have an error of any expert, and their errors, from names [T], errors [T, E].

    Example:
        >>> with_errors(["cars", "birds"], np.array([[np.nan, np.nan], [0.4, np.nan]]))
        (['birds'], array([[0.4, nan]]))
    """
    tried = ~np.isnan(errors).all(1)
    return [name for name, some in zip(tasks, tried, strict=True) if some], errors[tried]


@dataclass
class Model2Vec:
    """Learn where models belong among tasks: m_j = F_j + b_j, from errors of the experts on earlier tasks.

    F_j [D] is the embedding of the task that expert j was trained on (section 5 of Achille et al., 2019). The offset
    b_j is learned from tasks whose best expert is known, by the cross entropy of a softmax over -d_asym(m_j -> t). The
    softmax always has its most likely temperature.

    The paper leaves open how b_j is kept small and m_j positive. Here m_j = F_j exp(s_j), and the loss also has the
    term penalty / 2 sum_j mean(s_j^2). Adam starts from s_j = 0, which gives the asymmetric distance itself, and the
    step with the lowest loss is kept.

    After :meth:`fit`, ``vectors`` [E, entries] holds m_j, ``trivial`` [entries] holds t0, ``indices`` the entries in
    use, ``loss`` the loss of each step, and ``temperature`` the last temperature.

    Args:
        alpha: The weight of the complexity in the asymmetric distance.
        penalty: The weight of the penalty.
        steps: How many steps of Adam.
        rate: The rate of the first step. It falls linearly to zero.
        entries: How many entries of the vectors to use, evenly spaced; all if there are fewer. Time grows with experts
            times tasks times entries.

    Example:
        Tasks that resemble expert 0 turn out to be solved better by expert 1, so Model2Vec moves expert 1 nearer:

        >>> import numpy as np
        >>> experts = np.array([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 4.0]])
        >>> tasks = np.array([[3.0, 2.0, 1.0, 1.5], [4.0, 2.5, 1.0, 1.2]])
        >>> errors = np.array([[0.30, 0.10], [0.25, 0.10]])
        >>> before = asymmetric_distance(experts, tasks)
        >>> after = Model2Vec().fit(experts, tasks, errors).distances(tasks)
        >>> bool((after[1] - after[0] < before[1] - before[0]).all())
        True
    """

    alpha: float = ALPHA
    penalty: float = PENALTY
    steps: int = STEPS
    rate: float = RATE
    entries: int = ENTRIES

    def fit(
        self, experts: Vectors, tasks: Vectors, errors: np.ndarray, *, trivial: np.ndarray | None = None
    ) -> Model2Vec:
        """Learn from the errors of the experts on tasks.

        Args:
            experts: The embeddings of the E tasks that the experts were trained on, or an array [E, D].
            tasks: T tasks, embedded in the same way.
            errors: The errors [T, E], NaN where an expert may not be used for a task. :func:`without_own` leaves out
                those of experts on their own tasks, which teach nothing.
            trivial: The trivial task t0 [D], by default
                :func:`~t2v_fast.analysis.distance.trivial_embedding` of the experts.

        Returns:
            This object.

        Raises:
            FingerprintMismatch: If the embeddings cannot be compared.
            ValueError: For wrong shapes and values.
        """
        check_same(experts, tasks)
        f, t = as_vectors(experts, "experts"), as_vectors(tasks, "tasks")
        errors = check_errors(errors)
        if errors.shape != (len(t), len(f)):
            raise ValueError(f"errors are {list(errors.shape)}, expected [{len(t)} tasks, {len(f)} experts]")
        prior = trivial_embedding(experts) if trivial is None else np.asarray(trivial, dtype=np.float64)
        self.indices = np.linspace(0, f.shape[1] - 1, min(self.entries, f.shape[1])).round().astype(int)
        f, t, prior = f[:, self.indices], t[:, self.indices], prior[self.indices]
        # Dividing an entry of all vectors by one number leaves the distances as they are. After that, single precision
        # is enough.
        unit = np.concatenate([f, t]).mean(0)
        used = unit > 0
        self.vectors = f.copy()  # m_j [E, len(indices)]
        # Where a filter is nearly dead in all tasks, prior / unit may overflow; its exact size no longer matters then.
        f, t, t0 = (np.minimum(x[..., used] / unit[used], 1e30).astype(np.float32) for x in (f, t, prior))
        smallest = np.float32(1e-30)  # for a filter that is dead for an expert or task; the usual value is about one
        log_f, log_t = np.log(np.maximum(f, smallest)), np.log(np.maximum(t, smallest))
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
            # Adam. All entries are logarithms and so have the same scale.
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * np.square(gradient)
            at = step + 1
            s -= (
                self.rate
                * (1 - step / self.steps)
                * (first / (1 - 0.9**at))
                / (np.sqrt(second / (1 - 0.99**at)) + 1e-12)
            )
        self.vectors[:, used] = np.exp(np.log(np.maximum(f, smallest)) + kept).astype(np.float64) * unit[used]
        self.trivial = prior
        return self

    def distances(self, tasks: Vectors) -> np.ndarray:
        """Return the distances d_asym(m_j -> t) [E, T] from the learned experts to T tasks."""
        t = as_vectors(tasks, "tasks")[:, self.indices]
        return asymmetric_distance(self.vectors, t, alpha=self.alpha, trivial=self.trivial)


def _model_distances(log_m: np.ndarray, log_t: np.ndarray, t0: np.ndarray, alpha: float) -> tuple[np.ndarray, Callable]:
    """Return d_asym(m_j -> t_i) [T, E] of the cosine metric, and a function for its gradient.

    The function turns a gradient with respect to the distances [T, E] into one with respect to log m [E, D]. With
    u = m / (m + t), the other vector is 1 - u, so a distance depends on sum u and sum u^2 only.
    """

    def cosine(s1: np.ndarray, s2: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distance and its derivatives with respect to sum u and sum u^2."""
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
    """Return the temperature of a grid that makes the best experts most likely."""
    finite = np.where(np.isinf(distances), np.nan, distances)
    spread = max(float(np.nanmean(np.nanstd(finite, axis=1))), 1e-6)
    grid = spread * np.geomspace(0.05, 20, 60)

    def likelihood(t: float) -> float:
        return float(np.log(_softmax(-distances / t)[np.arange(len(best)), best]).mean())

    return float(max(grid, key=likelihood))


def leave_one_out(experts: Vectors, tasks: Vectors, errors: np.ndarray, model: Model2Vec | None = None) -> np.ndarray:
    """Return Model2Vec's choice for each task after learning from the other tasks.

    Args:
        experts: The embeddings of the E tasks that the experts were trained on, or an array [E, D].
        tasks: T tasks, embedded in the same way.
        errors: The errors [T, E], NaN where an expert may not be used for a task. :func:`without_own` leaves out those
            of experts on their own tasks, which would always be chosen.
        model: The settings to learn with, by default those of ``Model2Vec()``.

    Returns:
        The indices [T] of the experts.
    """
    check_same(experts, tasks)
    f, t, errors = as_vectors(experts, "experts"), as_vectors(tasks, "tasks"), check_errors(errors)
    model, prior = model or Model2Vec(), trivial_embedding(experts)
    chosen = np.empty(len(t), int)
    for k in range(len(t)):
        rest = np.arange(len(t)) != k
        if rest.any():
            distances = model.fit(f, t[rest], errors[rest], trivial=prior).distances(t[k : k + 1])
        else:  # there is no other task to learn from
            distances = asymmetric_distance(f, t, alpha=model.alpha, trivial=prior)
        chosen[k] = nearest_expert(distances, ~np.isnan(errors[k : k + 1]))[0]
    return chosen


def predict_errors(
    errors: np.ndarray,
    distances: np.ndarray | None = None,
    *,
    bandwidth: float = BANDWIDTH,
    shrinkage: float = SHRINKAGE,
    floor: float = 0.01,
) -> np.ndarray:
    """Predict how well experts will do on new tasks: as they did on earlier tasks, near ones first.

    The logarithm of an error, less its mean over a task's experts, says how an expert compares on this task. An
    expert's prediction is the weighted mean over earlier tasks. A task at distance d has the weight exp(-(d - d0) /
    ``bandwidth``), where d0 is the distance of the nearest one. The expert's plain mean counts like ``shrinkage`` more
    tasks as near as that.

    Args:
        errors: The errors [T, E] on T earlier tasks, NaN where an expert may not be used for a task.
        distances: The distances [T, N] from the earlier tasks to N new ones, such as
            :func:`~t2v_fast.analysis.distance.centred_distance`. Without them, the prediction is the plain mean.
        bandwidth: The distance at which a task counts 1/e.
        shrinkage: How much the plain mean counts. A plain mean itself is shrunk toward the average expert by one task.
        floor: Errors below count as this one.

    Returns:
        The predicted logarithms of the errors [N, E], less each task's mean; lower is better. N is 1 without distances.

    Raises:
        ValueError: For wrong shapes and values.

    Example:
        Expert 0 is better on average, and expert 1 is better on the tasks near the new one:

        >>> import numpy as np
        >>> errors = np.array([[0.1, 0.4], [0.1, 0.4], [0.1, 0.4], [0.3, 0.2]])
        >>> int(predict_errors(errors)[0].argmin())
        0
        >>> int(predict_errors(errors, np.array([[0.9], [0.9], [0.9], [0.2]]))[0].argmin())
        1
    """
    errors = check_errors(errors)
    if bandwidth <= 0 or shrinkage < 0 or not 0 < floor <= 1:
        raise ValueError(
            f"bandwidth={bandwidth}, shrinkage={shrinkage}, floor={floor}: expected a positive bandwidth, a "
            f"shrinkage of at "
            "least 0 and a floor above 0 and at most 1"
        )
    logs = np.log(np.maximum(errors, floor))
    logs -= np.nanmean(logs, axis=1, keepdims=True)
    known = ~np.isnan(logs)
    logs = np.where(known, logs, 0)
    mean = logs.sum(0, keepdims=True) / (known.sum(0) + 1)
    if distances is None:
        return mean
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 2 or len(distances) != len(errors) or not np.isfinite(distances).all():
        raise ValueError(f"distances are {list(distances.shape)}, expected finite numbers [{len(errors)}, N]")
    weights = np.exp(-(distances - distances.min(0)) / bandwidth).T  # [N, T]
    total = weights @ known + shrinkage
    # An expert without an error near the task keeps its mean.
    return np.divide(weights @ logs + shrinkage * mean, total, out=np.repeat(mean, len(total), 0), where=total > 0)


def compare(
    experts: Vectors,
    tasks: Vectors,
    errors: np.ndarray,
    *,
    alpha: float = ALPHA,
    model: Model2Vec | None = None,
    floor: float = 0.0,
    names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Compare ways to choose an expert, as table 1 of Achille et al., 2019, does.

    "Best on average" and Model2Vec learn from the errors of the other tasks only. A task's own expert has no part in
    any way (:func:`without_own`): it is no choice, no best expert, and not drawn by chance.

    Args:
        experts: The embeddings of the E tasks that the experts were trained on, or an array [E, D].
        tasks: T tasks, embedded in the same way.
        errors: The errors [T, E], NaN where an expert may not be used for a task.
        alpha: The weight of the complexity in the asymmetric distance.
        model: The settings of Model2Vec, by default ``Model2Vec(alpha)``.
        floor: The smallest denominator of :func:`relative_error_increase`.
        names: The names [T] of the tasks for messages, by default their indices.

    Returns:
        The relative error increase [T] of each way, by its name.

    Raises:
        FingerprintMismatch: If the embeddings cannot be compared.
        ValueError: For wrong shapes and values, and for a task that has no error of another expert than its own.
    """
    check_same(experts, tasks)
    errors = check_errors(without_own(errors, experts, tasks), names)
    _best_errors(errors, floor, names)  # says which task has none
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
    """Return the bootstrap's percentile interval of a mean.

    Args:
        values: The values [T], which are drawn again with replacement.
        level: The probability that the interval covers.
        resamples: How many means to draw.
        seed: The seed of the draws.

    Returns:
        The lower and upper ends.
    """
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def increase_rows(increases: dict[str, np.ndarray]) -> list[list[str]]:
    """Return the result of :func:`compare` as rows of text.

    The columns are the way to choose, its mean increase in percent, the mean's 95 percent interval, and the median.
    """
    rows = [["chosen by", "mean increase", "95 % interval", "median"]]
    for name, values in increases.items():
        low, high = (f"{100 * x:.1f}" for x in bootstrap_interval(values))
        rows.append([name, f"{100 * values.mean():.1f} %", f"{low} to {high} %", f"{100 * np.median(values):.1f} %"])
    return rows


def read_errors(path: str | os.PathLike) -> tuple[list[str], list[str], np.ndarray]:
    """Read a CSV table of errors, with experts on top and a task at the start of each row.

    Args:
        path: The file. An empty field means that the expert may not be used for the task. All fields of a task may be
            empty: it is one to choose for.

    Returns:
        The names of the tasks, the names of the experts, and the errors [T, E], NaN for empty fields.

    Raises:
        ValueError: For anything else; the message names the file and the row.
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
    table = np.array(errors)
    tried, known = with_errors(tasks, table)
    if not tried:
        raise ValueError(f"{path} has no errors: all fields of its {len(tasks)} tasks are empty")
    try:
        check_errors(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tasks, experts, table
