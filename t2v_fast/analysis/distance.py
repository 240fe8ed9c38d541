"""Distances between tasks: matrices of any metric, complexity, and the distances built from them.

All computation is in float64. The formulas of the metrics are in :mod:`t2v_fast.analysis.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, Union

import numpy as np

from ..embedding import Embedding, check_comparable, stack
from .metrics import (
    CAREFUL,
    COLUMNS,
    METRICS,
    ROWS,
    SMALLEST,
    TINY,
    Metric,
    cosine_distances,
    scale_rows,
)

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

__all__ = [
    "ALL_METRICS",
    "ALPHA",
    "CAREFUL",
    "COLUMNS",
    "FLOOR",
    "METRICS",
    "ROWS",
    "ROWS_AT_ONCE",
    "SMALLEST",
    "TINY",
    "Metric",
    "Vectors",
    "as_vectors",
    "asymmetric_distance",
    "cdist",
    "centred_distance",
    "check_same",
    "complexity",
    "distance_rows",
    "distances_of",
    "layerwise_cdist",
    "layerwise_pdist",
    "nearest_tasks",
    "pdist",
    "symmetric",
    "to_frame",
    "trivial_embedding",
]

# Tasks: embeddings, or an array [T, D] of Fisher vectors.
Vectors = Union[Sequence[Embedding], np.ndarray, "Tensor"]

# Rows of the result that pdist asks a metric for at once; about ROWS_AT_ONCE^2 / 2 pairs of each are computed twice.
ROWS_AT_ONCE = 64
ALPHA = 0.15  # of the asymmetric distance, as in the paper
FLOOR = 1e-3  # of the centred distance
ASYMMETRIC, CENTRED = "asymmetric", "centred"
ALL_METRICS = (*METRICS, ASYMMETRIC, CENTRED)  # what the command line, pictures and the map know


def cdist(a: Vectors, b: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Compute the distances between each task of ``a`` and each task of ``b``.

    With Fisher values h, variances v = 1/h, and sums or means over the D entries, the metrics are:

    - ``"cosine"`` (Achille et al., 2019, section 4): cosine distance of h0 / (h0 + h1) and h1 / (h0 + h1)
    - ``"normalized_cosine"``: cosine distance of v0 scale0 and v1 scale1
    - ``"correlation"``: correlation distance of v0 and v1, from 0 to 2
    - ``"asymmetric_kl"``: sum of (v0/v1 - 1 + log v1 - log v0) / 2, the KL divergence of N(0, v0) from N(0, v1)
    - ``"kl"``: sum over entries of the larger of that divergence and its mirror image
    - ``"jsd"``: mean of the two KL divergences from N(0, (v0 + v1) / 2), divided by two
    - ``"entropy"``: log 2 minus the mean binary entropy (in nats) of h0 / (h0 + h1)
    - ``"plain_cosine"``: cosine distance of h0 and h1

    All but the last are metrics of the public Task2Vec code, under the names that they have there. Entries that are
    zero in both tasks are left out. An entry that is zero in only one task makes the KL divergences and ``"jsd"``
    infinite.

    A pair of tasks costs one division an entry for ``"cosine"``, some logarithms an entry for the divergences and
    ``"entropy"``, and its share of a matrix product for the other metrics. Pairs that would lose digits take a slower
    path. The work is spread over ``torch.get_num_threads()`` threads. Besides the inputs in float64 and the result,
    memory holds some copies of the inputs and 4 MiB a thread.

    Args:
        a: A embeddings, which must be comparable with those of ``b``; or an array [A, D] of Fisher vectors, which
            cannot be checked and whose scale is taken to be one.
        b: B embeddings, or an array [B, D].
        metric: A name in :data:`METRICS`.
        epsilon: A small number that keeps divisions finite; zero by default. ``"cosine"`` and ``"entropy"`` add it to
            the denominator h0 + h1, as the public code does with 1e-8, which changes distances between tasks whose
            Fisher values are that small. Metrics of variances add it to the Fisher values. ``"plain_cosine"`` ignores
            it.

    Returns:
        The distances [A, B], float64.

    Raises:
        FingerprintMismatch: If embeddings cannot be compared.
        ValueError: For an unknown metric, and for vectors that are not finite, negative, or of the wrong shape.

    Example:
        >>> import numpy as np
        >>> tasks, experts = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 1.0]])
        >>> cdist(tasks, experts).round(4)
        array([[0.    , 0.3369]])
    """
    check_same(a, b)
    chosen = _metric(metric)
    first = as_vectors(a, "a", normalized=chosen.normalized)
    second = as_vectors(b, "b", first.shape[1], normalized=chosen.normalized)
    return chosen.measure(first, second, _check_epsilon(epsilon))


def pdist(embeddings: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Compute the distances between all pairs of tasks, as a square matrix.

    ``scipy.spatial.distance.pdist`` returns a condensed vector of T (T - 1) / 2 distances instead;
    ``scipy.spatial.distance.squareform`` converts one form to the other.

    Args:
        embeddings: T comparable embeddings, or an array [T, D] of Fisher vectors.
        metric: A name in :data:`METRICS`; :func:`cdist` describes them.
        epsilon: As in :func:`cdist`.

    Returns:
        The distances [T, T], zero on the diagonal. The matrix is symmetric unless the metric is ``"asymmetric_kl"``;
        then row i holds the distances from task i.

    Raises:
        FingerprintMismatch: If embeddings cannot be compared.
        ValueError: As :func:`cdist`.

    Example:
        >>> import numpy as np
        >>> pdist(np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 1.0], [1.0, 2.0, 4.0]]), "plain_cosine").round(4)
        array([[0.    , 0.3585, 0.0085],
               [0.3585, 0.    , 0.4286],
               [0.0085, 0.4286, 0.    ]])
    """
    chosen = _metric(metric)
    vectors = as_vectors(embeddings, "embeddings", normalized=chosen.normalized)
    _check_epsilon(epsilon)
    out = np.zeros((len(vectors), len(vectors)))
    for i in range(0, len(vectors), ROWS_AT_ONCE):
        start = i if chosen.symmetric else 0
        out[i : i + ROWS_AT_ONCE, start:] = chosen.measure(vectors[i : i + ROWS_AT_ONCE], vectors[start:], epsilon)
    if not chosen.symmetric:
        np.fill_diagonal(out, 0)
        return out
    out = np.triu(out, 1)
    return out + out.T


def layerwise_cdist(
    a: Sequence[Embedding], b: Sequence[Embedding], metric: str = "cosine", *, epsilon: float = 0.0
) -> dict[str, np.ndarray]:
    """Compute :func:`cdist` for each layer's part of the embeddings.

    The public code's ``layerwise_kl`` is this function with ``"asymmetric_kl"``. Its ``layerwise_cosine`` is this
    function with ``"normalized_cosine"``, because all scales within a layer are equal.

    Args:
        a: A embeddings.
        b: B embeddings, comparable with those of ``a``.
        metric: A name in :data:`METRICS`.
        epsilon: As in :func:`cdist`.

    Returns:
        The distances [A, B] by layer name.

    Raises:
        TypeError: For arrays, which do not say where a layer begins.
        FingerprintMismatch: If the embeddings cannot be compared.
    """
    if not (_are_embeddings(a) and _are_embeddings(b)):
        raise TypeError(
            "distances by layer need lists of Embedding, as list(bank): arrays do not say where a layer begins"
        )
    check_comparable([*a, *b])
    chosen = _metric(metric)
    first, second = (as_vectors(e, "embeddings", normalized=chosen.normalized) for e in (a, b))
    return {
        name: chosen.measure(first[:, start:stop], second[:, start:stop], _check_epsilon(epsilon))
        for name, start, stop in a[0].layers
    }


def layerwise_pdist(
    embeddings: Sequence[Embedding], metric: str = "cosine", *, epsilon: float = 0.0
) -> dict[str, np.ndarray]:
    """Compute :func:`layerwise_cdist` of T embeddings with themselves.

    Returns:
        The distances [T, T] by layer name, zero on the diagonals.
    """
    distances = layerwise_cdist(embeddings, embeddings, metric, epsilon=epsilon)
    for matrix in distances.values():
        np.fill_diagonal(matrix, 0)
    return distances


def trivial_embedding(*tasks: Vectors) -> np.ndarray:
    """Return the embedding t0 of the trivial task, which has no labels to tell apart.

    The Fisher information of such a task is zero, so that only the prior is left of its precision. The plain Fisher
    has no prior, so this function takes one of the size of the given tasks: each layer's mean Fisher value over all
    ``tasks``. For arrays, all entries are one layer. ``docs/decisions.md`` gives the reasons.

    Args:
        tasks: One or more sets of tasks, all with D entries.

    Returns:
        The vector t0 [D].

    Example:
        >>> import numpy as np
        >>> trivial_embedding(np.array([[1.0, 3.0], [5.0, 7.0]]))
        array([4., 4.])
    """
    stacked = np.concatenate([as_vectors(t, "tasks") for t in tasks])
    prior = np.empty(stacked.shape[1])
    for _, start, stop in _layers(tasks[0], stacked.shape[1]):
        prior[start:stop] = stacked[:, start:stop].mean()
    return prior


def complexity(
    embeddings: Vectors, trivial: np.ndarray | None = None, metric: str = "cosine", *, epsilon: float = 0.0
) -> np.ndarray:
    """Compute how far each task is from the trivial one: d_sym(h + t0, t0) (Achille et al., 2019, section 4).

    The paper's other measure of complexity is :attr:`t2v_fast.embedding.Embedding.norm`.

    Args:
        embeddings: T embeddings, or an array [T, D] of Fisher vectors.
        trivial: The trivial task t0 [D], by default :func:`trivial_embedding` of ``embeddings``.
        metric: A name in :data:`METRICS`.
        epsilon: As in :func:`cdist`.

    Returns:
        The complexities [T].
    """
    chosen = _metric(metric)
    prior = trivial_embedding(embeddings) if trivial is None else np.asarray(trivial, dtype=np.float64)
    vectors = as_vectors(embeddings, "embeddings", prior.size)
    prior = as_vectors(prior[None], "trivial", prior.size)
    return chosen.measure(vectors + prior, prior, _check_epsilon(epsilon))[:, 0]


def asymmetric_distance(
    a: Vectors,
    b: Vectors,
    metric: str = "cosine",
    *,
    alpha: float = ALPHA,
    trivial: np.ndarray | None = None,
    epsilon: float = 0.0,
) -> np.ndarray:
    """Compute the paper's d(a -> b) = d_sym(a, b) - alpha d_sym(a, t0), by which complex tasks ``a`` are nearer.

    The second term is alpha times the :func:`complexity` of ``a`` (Achille et al., 2019, section 4).

    Args:
        a: The A tasks that experts were trained on, as in :func:`cdist`.
        b: The B tasks that an expert is wanted for.
        metric: A name in :data:`METRICS`.
        alpha: The weight of the complexity, 0.15 in the paper.
        trivial: The trivial task t0 [D], by default :func:`trivial_embedding` of ``a``.
        epsilon: As in :func:`cdist`.

    Returns:
        The distances [A, B], which may be negative.

    Raises:
        FingerprintMismatch: If embeddings cannot be compared.
        ValueError: For an ``alpha`` that is not finite, and as :func:`cdist`.
    """
    if not np.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    distances = cdist(a, b, metric, epsilon=epsilon)
    return distances - alpha * complexity(a, trivial, metric, epsilon=epsilon)[:, None]


def centred_distance(
    a: Vectors, b: Vectors | None = None, *, bank: Vectors | None = None, floor: float = FLOOR
) -> np.ndarray:
    """Compare tasks by what sets them apart from the other tasks of a bank, with equal weight for every layer.

    Let g be the Fisher values of one task and layer divided by their mean, and m [D] the mean of g over the bank. Then
    x is log(g / m + ``floor``) minus its own mean over the bank, and the distance is the mean over layers of
    1 - cos(x_a, x_b).

    So neither a task's norm nor what all tasks have in common counts. A dead filter is as far from the others as one
    with ``floor`` times the usual value. Filters that are zero in the whole bank are left out, and so are layers in
    which all tasks of the bank are alike. ``docs/selection.md`` measures this distance.

    Args:
        a: A tasks, as in :func:`cdist`. For arrays, all entries are one layer.
        b: B tasks, by default those of ``a``.
        bank: The tasks over which the means are taken, by default those of ``a`` and ``b``. At least three; dozens of
            many kinds are better.
        floor: The smallest ratio of g to m that still makes a difference.

    Returns:
        The distances [A, B], from 0 to 2. Without ``b``, the diagonal is zero.

    Raises:
        FingerprintMismatch: If embeddings cannot be compared.
        ValueError: For a bank of fewer than three tasks, a ``floor`` that is not positive and finite, and unusable
            vectors.
    """
    if not 0 < floor < math.inf:
        raise ValueError(f"floor is {floor}, expected a finite number above 0")
    check_same(a, a if b is None else b)
    check_same(a, a if bank is None else bank)
    first = as_vectors(a, "a")
    second = first if b is None else as_vectors(b, "b", first.shape[1])
    if bank is not None:
        tasks = as_vectors(bank, "bank", first.shape[1])
    else:
        tasks = first if b is None else np.concatenate([first, second])
    if len(tasks) < 3:
        raise ValueError(f"the bank has {len(tasks)} tasks, expected at least 3: two lie on both sides of their mean")
    total, counted = np.zeros((len(first), len(second))), 0
    for _, start, stop in _layers(a, first.shape[1]):
        mean, centre = _centre(tasks[:, start:stop], floor)
        x_bank = _contrasts(tasks[:, start:stop], mean, centre, floor)
        if not x_bank.any():
            continue
        u = _contrasts(first[:, start:stop], mean, centre, floor)
        v = u if b is None else _contrasts(second[:, start:stop], mean, centre, floor)
        total += cosine_distances(u, v)
        counted += 1
    total /= max(counted, 1)
    if b is None:
        total = np.triu(total, 1)
        return total + total.T
    return total


def distances_of(embeddings: Sequence[Embedding], metric: str, *, alpha: float = ALPHA) -> np.ndarray:
    """Compute the distances [T, T] of tasks by any name in :data:`ALL_METRICS`.

    ``"asymmetric"`` is :func:`asymmetric_distance` with ``alpha``, ``"centred"`` is :func:`centred_distance`, and other
    names are those of :func:`pdist`.
    """
    if metric == ASYMMETRIC:
        return asymmetric_distance(embeddings, embeddings, alpha=alpha)
    if metric == CENTRED:
        return centred_distance(embeddings)
    return pdist(embeddings, metric)


def symmetric(distances: np.ndarray) -> np.ndarray:
    """Return distances [T, T] to draw: means of both directions, zero from a task to itself, and at least zero."""
    drawn = np.maximum((distances + distances.T) / 2, 0)
    np.fill_diagonal(drawn, 0)
    return drawn


def _shares(h: np.ndarray) -> np.ndarray:
    """Divide a layer's Fisher values [T, O] by each task's mean; rows of zeros stay."""
    h = scale_rows(h)
    mean = h.mean(1, keepdims=True)
    return h / np.where(mean > 0, mean, 1)


def _centre(h: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two means [O] over a bank's layer [T, O]: of g, zero where the bank is dead, and of log(g / m + floor)."""
    g = _shares(h)
    mean = g.mean(0)
    mean[mean < 1e-200] = 0  # the usual value is about one, so this filter is dead; dividing by it would overflow
    return mean, np.log(g / np.where(mean > 0, mean, np.inf) + floor).mean(0)


def _contrasts(h: np.ndarray, mean: np.ndarray, centre: np.ndarray, floor: float) -> np.ndarray:
    """Return x of :func:`centred_distance` for a layer's values [T, O]; zero for filters that do not count."""
    x = np.log(_shares(h) / np.where(mean > 0, mean, np.inf) + floor) - centre
    return np.where(np.abs(x) < 1e-12, 0, x)  # all tasks are equal here, up to rounding


def nearest_tasks(distances: np.ndarray) -> list[int]:
    """Return the index of the nearest other task for each task of a square matrix [T, T].

    Example:
        >>> import numpy as np
        >>> nearest_tasks(np.array([[0.0, 0.3, 0.1], [0.3, 0.0, 0.2], [0.1, 0.2, 0.0]]))
        [2, 2, 0]
    """
    return np.argmin(distances + np.diag(np.full(len(distances), np.inf)), axis=1).tolist()


def distance_rows(names: Sequence[str], distances: np.ndarray) -> list[list[str]]:
    """Return a square matrix as rows of text, with names on top and on the left; numbers keep all their digits."""
    return [["task", *names], *([name, *map(repr, row.tolist())] for name, row in zip(names, distances, strict=True))]


def to_frame(embeddings: Sequence[Embedding], metric: str = "cosine", *, epsilon: float = 0.0) -> pandas.DataFrame:
    """Compute :func:`pdist` of embeddings as a table of pandas, with the names of the tasks on both sides.

    Args:
        embeddings: T comparable embeddings.
        metric: A name in :data:`METRICS`; :func:`cdist` describes them.
        epsilon: As in :func:`cdist`.

    Returns:
        The distances [T, T]. Tasks without a name have their number.

    Raises:
        ImportError: Without pandas.
        TypeError: For arrays, which have no names: call :func:`pdist`.
        FingerprintMismatch: If the embeddings cannot be compared.

    Example:
        >>> import numpy as np
        >>> from t2v_fast import Embedding
        >>> def embedding(task, values):
        ...     return Embedding(np.array(values), np.ones(3), [("conv.weight", 0, 3)], 10, meta={"task": task})
        >>> tasks = [embedding("cats", [1.0, 2.0, 3.0]), embedding("cars", [4.0, 2.0, 1.0])]
        >>> print(to_frame(tasks).round(4))
                cats    cars
        cats  0.0000  0.3369
        cars  0.3369  0.0000
    """
    if not _are_embeddings(embeddings):
        raise TypeError(
            "a table of distances needs a list of Embedding, as list(bank): arrays have no names, see pdist"
        )
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"a table of distances needs the package 'pandas': pip install pandas ({error})") from error
    names = [str(e.meta.get("task") or k) for k, e in enumerate(embeddings)]
    return pandas.DataFrame(pdist(embeddings, metric, epsilon=epsilon), index=names, columns=names)


def _metric(metric: str) -> Metric:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    return METRICS[metric]


def _check_epsilon(epsilon: float) -> float:
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}, expected a finite number of at least 0")
    return epsilon


def _are_embeddings(given: Vectors) -> TypeGuard[Sequence[Embedding]]:
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(e, Embedding) for e in given)


def _layers(given: Vectors, length: int) -> Sequence[tuple[str, int, int]]:
    """Return the layers of embeddings; all entries of an array are one layer."""
    return given[0].layers if _are_embeddings(given) else (("all", 0, length),)


def check_same(a: Vectors, b: Vectors) -> None:
    """Raise FingerprintMismatch if both are embeddings and any two of them cannot be compared."""
    if _are_embeddings(a) and _are_embeddings(b):
        check_comparable([*a, *b])


def as_vectors(given: Vectors, name: str, length: int | None = None, *, normalized: bool = False) -> np.ndarray:
    """Return what a caller gave as float64 [T, D], after checking shape and values.

    Args:
        given: Embeddings, or an array [T, D].
        name: The name of the argument, for error messages.
        length: The D that is expected, if any.
        normalized: Divide the Fisher values by the scales of their embeddings.

    Raises:
        TypeError: For anything else, such as a bank, which ``list`` turns into a list of embeddings.
        ValueError: For another shape, values that are negative or not finite, and scales of zero with ``normalized``.
        FingerprintMismatch: If embeddings cannot be compared.
    """
    array = stack(given) if _are_embeddings(given) else given.cpu() if hasattr(given, "cpu") else given
    try:
        vectors = np.asarray(array, dtype=np.float64)
    except TypeError:
        what = type(given).__name__
        raise TypeError(
            f"{name} is {what}, expected a list of Embedding, as list(bank), or an array [T, D] of numbers"
        ) from None
    if normalized and _are_embeddings(given):
        scale = np.stack([e.scale for e in given])
        if not scale.all():
            raise ValueError(f"{name}: Fisher values cannot be divided by a scale of zero")
        vectors = vectors / scale
    if vectors.ndim != 2 or not vectors.size or (length is not None and vectors.shape[1] != length):
        raise ValueError(f"{name} has shape {list(vectors.shape)}, expected [T, {'D' if length is None else length}]")
    if not np.isfinite(vectors).all() or (vectors < 0).any():
        raise ValueError(f"{name}: Fisher values must be finite and at least 0")
    return vectors
