"""Distances between tasks, vectorised over pairs, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..embedding import Embedding, check_comparable, stack

Vectors = Sequence[Embedding] | np.ndarray | Tensor

# A tile of ROWS x ROWS pairs and COLUMNS entries: its temporaries take 0.5 MiB each, about a core's cache.
ROWS, COLUMNS = 8, 1024
# Rows of the result that pdist asks a metric for at once; some ROWS_AT_ONCE^2 / 2 pairs of each are computed twice.
ROWS_AT_ONCE = 64
ALPHA = 0.15  # of the asymmetric distance, as in the paper
FLOOR = 1e-3  # of the centred distance
# Pairs that the careful formula takes at once.
CAREFUL = 8
TINY = np.finfo(np.float64).tiny
SMALLEST = np.finfo(np.float64).smallest_subnormal


def _cosine(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """The public code's ``cosine``: the cosine distance of h0 / (h0 + h1) and h1 / (h0 + h1), for each pair of rows.

    With t = h0 + h1 + epsilon, q = (h0 + h1) / t and d = (h0 - h1) / t the two vectors are (q + d) / 2 and (q - d) / 2,
    so a pair needs only sum d, sum d^2 and, as q is one without ``epsilon``, the number of entries that are not zero in
    both tasks. The difference of nearly equal tasks is exact in d, so their distance keeps its digits.
    """
    dead_a, dead_b = (a == 0).astype(np.float32), (b == 0).astype(np.float32)
    used = a.shape[1] - (dead_a @ dead_b.T).astype(np.float64)  # [A, B]: exact, these are small integers

    def block(i: int) -> np.ndarray:
        return _cosine_sums(a[i : i + ROWS], b, used[i : i + ROWS], epsilon)

    # Workers of their own rather than threads inside each operation: those meet at a barrier after every tile.
    starts = range(0, len(a), ROWS)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(starts)))) as workers:
        dd, dq, qq = np.concatenate(list(workers.map(block, starts)), axis=1)
    middle = (qq + dd) / 4
    uu, vv = np.maximum(middle + dq / 2, 0), np.maximum(middle - dq / 2, 0)
    # 2 (|u| |v| - u.v) = |u - v|^2 - (|u| - |v|)^2
    u, v = np.sqrt(uu), np.sqrt(vv)
    apart = np.maximum(dd - np.square(dq / np.maximum(u + v, TINY)), 0)
    distance = apart / np.maximum(2 * u * v, TINY)
    # Of two tasks of very different scale, the smaller one's square was the difference of two numbers near D / 2.
    _recompute(distance, np.minimum(uu, vv) <= 1e-4 * np.maximum(uu, vv), a, b, partial(_fractions, epsilon=epsilon))
    return distance


def _cosine_sums(a: np.ndarray, b: np.ndarray, used: np.ndarray, epsilon: float) -> np.ndarray:
    """sum d^2, sum d q and sum q^2 of :func:`_cosine` for a few rows a [A, D] and all rows b [B, D]: [3, A, B].

    ``used`` [A, B]: the number of entries that are not zero in both rows.
    """
    dd, dq, qq = sums = np.zeros((3, len(a), len(b)))
    if not epsilon:
        qq += used
    both_zero = bool((used < a.shape[1]).any())
    buffers = np.empty((3, len(a) * ROWS * COLUMNS))
    for j in range(0, len(b), ROWS):
        tile = np.s_[:, j : j + ROWS]
        for c in range(0, a.shape[1], COLUMNS):
            h0, h1 = a[:, None, c : c + COLUMNS], b[None, j : j + ROWS, c : c + COLUMNS]
            shape = (len(a), *h1.shape[1:])
            total, d, q = (buffer[: math.prod(shape)].reshape(shape) for buffer in buffers)
            np.add(h0, h1, out=total)
            np.subtract(h0, h1, out=d)
            if epsilon:
                np.add(total, epsilon, out=q)
                d /= q
                np.divide(total, q, out=q)
                dq[tile] += np.vecdot(d, q)
                qq[tile] += np.vecdot(q, q)
            else:
                if both_zero:
                    np.maximum(total, SMALLEST, out=total)  # 0 / 0 becomes 0; no other total is changed
                d /= total
                dq[tile] += d.sum(2)
            dd[tile] += np.vecdot(d, d)
    return sums


def _fractions(h0: np.ndarray, h1: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    total = np.maximum(h0 + h1 + epsilon, SMALLEST)
    return h0 / total, h1 / total


def _plain_cosine(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """1 - cos of the Fisher vectors themselves, in which ``epsilon`` has no part."""
    distance = 1 - _unit(a) @ _unit(b).T
    # A product of unit vectors is good to about 1e-15, which is not enough digits of a small distance.
    _recompute(distance, distance < 1e-2, a, b, lambda u, v: (u, v))
    distance[np.ix_(~a.any(1), ~b.any(1))] = 0
    return np.clip(distance, 0, 1)


def _recompute(
    distance: np.ndarray,
    pairs: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    vectors: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Overwrite the marked ``pairs`` of ``distance``, both [A, B], by the careful formula."""
    left, right = np.nonzero(pairs)
    for k in range(0, len(left), CAREFUL):
        i, j = left[k : k + CAREFUL], right[k : k + CAREFUL]
        distance[i, j] = _careful_cosine(*vectors(a[i], b[j]))


def _careful_cosine(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """1 - cos of each row of u and v, [P, D], which keeps its digits however small it is or the rows differ in scale.

    1 - cos = sin^2 / (1 + cos), and sin^2 |u|^2 = |e|^2 - (e.v)^2 / |v|^2 with e = u - v, which is exact for nearly
    equal vectors. Two rows of zeros are at distance 0, one is at distance 1 from any other.
    """
    at_u, at_v = _exponents(u), _exponents(v)
    # Rows of one size keep one scale, also on both sides of a power of two: their difference stays exact.
    at_v = np.where(np.abs(at_u - at_v) <= 1, at_u, at_v)
    u, v = np.ldexp(u, -at_u), np.ldexp(v, -at_v)
    e = u - v
    zero_u, zero_v = ~u.any(1), ~v.any(1)
    uu, vv = np.where(zero_u, 1, np.vecdot(u, u)), np.where(zero_v, 1, np.vecdot(v, v))
    sin2 = np.maximum(np.vecdot(e, e) - np.square(np.vecdot(e, v)) / vv, 0) / uu
    cosine = np.vecdot(u, v) / np.sqrt(uu * vv)
    distance = np.where(cosine < 0, 1 - cosine, sin2 / (1 + np.maximum(cosine, 0)))
    return np.where(zero_u & zero_v, 0, np.where(zero_u | zero_v, 1, distance))


def _exponents(rows: np.ndarray) -> np.ndarray:
    """k [R, 1] such that rows / 2^k have a largest size in [1/2, 1), without rounding: squares of 1e-200 vanish."""
    return np.frexp(np.abs(rows).max(1, keepdims=True))[1]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; rows of zeros stay."""
    rows = np.ldexp(rows, -_exponents(rows))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)


# A term of a sum over entries: Fisher values h0 [A, 1, C] and h1 [1, B, C] of two sets of tasks -> [A, B, C].
Term = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sums(a: np.ndarray, b: np.ndarray, term: Term) -> np.ndarray:
    """The sum of ``term`` over the entries of each pair of rows, [A, B]; entries that are zero in both count 0."""

    def block(i: int) -> np.ndarray:
        rows = a[i : i + ROWS]
        sums = np.zeros((len(rows), len(b)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for j in range(0, len(b), ROWS):
                for c in range(0, a.shape[1], COLUMNS):
                    h0, h1 = rows[:, None, c : c + COLUMNS], b[None, j : j + ROWS, c : c + COLUMNS]
                    values = term(h0, h1)
                    sums[:, j : j + ROWS] += np.where((h0 == 0) & (h1 == 0), 0, values).sum(2)
        return sums

    starts = range(0, len(a), ROWS)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(starts)))) as workers:
        return np.concatenate(list(workers.map(block, starts)))


def _excess(h0: np.ndarray, h1: np.ndarray) -> np.ndarray:
    """x - log(1 + x) for x = h1 / h0 - 1, in full precision: twice the KL divergence of a pair of entries."""
    log = np.log(h1) - np.log(h0)
    x = (h1 - h0) / h0
    series = np.zeros_like(x)
    for k in range(10, 1, -1):
        series = x * series + (-1) ** k / k
    return np.where(np.abs(x) < 0.05, np.square(x) * series, np.where(np.isinf(log), np.inf, x - log))


def _kl(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """Entry by entry the larger of both KL divergences: that from the larger variance's side."""
    return _sums(a + epsilon, b + epsilon, lambda h, g: _excess(np.minimum(h, g), np.maximum(h, g)) / 2)


def _asymmetric_kl(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """KL(N(0, 1/a) || N(0, 1/b)), summed: (v0/v1 - 1 + log v1 - log v0) / 2 with v = 1/h."""
    return _sums(a + epsilon, b + epsilon, lambda h, g: _excess(h, g) / 2)


def _jsd(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """The public code's ``jsd``: with v = 1/h and d = (h0 - h1) / (h0 + h1) the logarithms leave -log(1 - d^2) / 4."""

    def term(h: np.ndarray, g: np.ndarray) -> np.ndarray:
        total = h + g
        d2 = np.square((h - g) / total)
        apart = np.log(total / 2) - (np.log(h) + np.log(g)) / 2  # keeps its digits where d is nearly 1
        return np.where(d2 < 0.8, -np.log1p(-np.minimum(d2, 0.8)) / 4, apart / 2)

    a, b = a + epsilon, b + epsilon
    return _sums(a, b, term) / _used(a, b)


def _entropy(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """log 2 minus the mean binary entropy of p = h0 / (h0 + h1 + epsilon)."""

    def term(h: np.ndarray, g: np.ndarray) -> np.ndarray:
        total = h + g + epsilon
        p, q = h / total, (g + epsilon) / total
        d2 = np.square((h - g - epsilon) / total)
        series = np.zeros_like(d2)
        for k in range(7, 0, -1):
            series = d2 * series + 1 / (2 * k * (2 * k - 1))
        direct = math.log(2) + p * np.log(np.maximum(p, TINY)) + q * np.log(np.maximum(q, TINY))
        return np.where(d2 < 0.01, d2 * series, direct)

    if not epsilon:
        return _sums(a, b, term) / _used(a, b)
    # An entry of zeros has p = 0 then, which the public code counts as far apart.
    return (_sums(a, b, term) + math.log(2) * (a.shape[1] - _used(a, b, least=0))) / a.shape[1]


def _used(a: np.ndarray, b: np.ndarray, least: int = 1) -> np.ndarray:
    """How many entries are not zero in both rows of each pair, [A, B], at least ``least``."""
    return np.maximum(a.shape[1] - ((a == 0).astype(np.float64) @ (b == 0).astype(np.float64).T), least)


def _variance_cosine(a: np.ndarray, b: np.ndarray, epsilon: float, *, centre: bool) -> np.ndarray:
    """The cosine distance of the variances 1/h, for ``centre`` after subtracting their means over entries.

    The variance of an entry that is zero in one of the two tasks only is infinite: the limit of equal small values is
    taken, in which such entries are the whole of the vector.
    """
    a, b = a + epsilon, b + epsilon
    dead = [(h == 0).astype(np.float64) for h in (a, b)]
    u, v = (_reciprocal(h, h == 0) for h in (a, b))
    both = dead[0] @ dead[1].T  # [A, B]: entries that are left out
    only_u, only_v = dead[0].sum(1)[:, None] - both, dead[1].sum(1) - both  # infinite variances
    infinite_u, infinite_v = only_u > 0, only_v > 0
    finite = np.where(infinite_v, u @ dead[1].T, u @ v.T)
    uv = np.where(infinite_u, np.where(infinite_v, 0, dead[0] @ v.T), finite)
    uu = np.where(infinite_u, only_u, np.square(u).sum(1)[:, None])
    vv = np.where(infinite_v, only_v, np.square(v).sum(1))
    if centre:
        n = np.maximum(a.shape[1] - both, 1)
        sum_u, sum_v = np.where(infinite_u, only_u, u.sum(1)[:, None]), np.where(infinite_v, only_v, v.sum(1))
        uv, uu, vv = uv - sum_u * sum_v / n, uu - np.square(sum_u) / n, vv - np.square(sum_v) / n
    distance = 1 - uv / np.sqrt(np.maximum(uu, TINY)) / np.sqrt(np.maximum(vv, TINY))
    # Small distances have too few digits, and so have sums of nearly equal variances about their mean.
    pairs = (distance < 1e-2) | (uu < 1e-8 * a.shape[1]) | (vv < 1e-8 * a.shape[1])

    def vectors(h: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = (h == 0) & (g == 0)
        return _reciprocal(h, both, centre), _reciprocal(g, both, centre)

    _recompute(distance, pairs, a, b, vectors)
    return np.clip(distance, 0, 2 if centre else 1)


def _reciprocal(h: np.ndarray, without: np.ndarray | None = None, centre: bool = False) -> np.ndarray:
    """Rows in proportion to 1/h [R, D], at most 1; 0 in the entries ``without``, which are in no mean either.

    A row with zeros elsewhere has ones there and nothing else.
    """
    without = np.zeros(h.shape, bool) if without is None else without
    dead = (h == 0) & ~without
    smallest = np.where(h > 0, h, np.inf).min(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.where(without, 0, np.where(dead.any(1, keepdims=True), dead, smallest / h))
    if centre:
        mean = v.sum(1, keepdims=True) / np.maximum((~without).sum(1, keepdims=True), 1)
        v = np.where(without, 0, v - mean)
    return v


@dataclass(frozen=True)
class Metric:
    """A distance between Fisher vectors.

    ``measure`` (a [A, D], b [B, D], epsilon) -> [A, B]. Of a ``symmetric`` one pdist asks only for one triangle. A
    ``normalized`` one is of Fisher values divided by their embedding's ``scale``.
    """

    measure: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    symmetric: bool = True
    normalized: bool = False


METRICS: dict[str, Metric] = {
    "cosine": Metric(_cosine),
    "normalized_cosine": Metric(partial(_variance_cosine, centre=False), normalized=True),
    "correlation": Metric(partial(_variance_cosine, centre=True)),
    "kl": Metric(_kl),
    "asymmetric_kl": Metric(_asymmetric_kl, symmetric=False),
    "jsd": Metric(_jsd),
    "entropy": Metric(_entropy),
    "plain_cosine": Metric(_plain_cosine),
}


def cdist(a: Vectors, b: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [A, B] between each task of ``a`` and each of ``b``.

    ``a`` and ``b``: sequences of :class:`Embedding`, which must be comparable (FingerprintMismatch otherwise), or
    arrays [T, D] of Fisher vectors, which cannot be checked and have scale one. ``metric``: a name in :data:`METRICS`.
    With Fisher values h, variances v = 1/h, and sums or means over the D entries:

    - ``"cosine"`` (Achille et al., 2019, section 4): cosine distance of h0 / (h0 + h1) and h1 / (h0 + h1)
    - ``"normalized_cosine"``: cosine distance of v0 scale0 and v1 scale1
    - ``"correlation"``: correlation distance of v0 and v1, from 0 to 2
    - ``"asymmetric_kl"``: sum of (v0/v1 - 1 + log v1 - log v0) / 2, the KL divergence of N(0, v0) from N(0, v1)
    - ``"kl"``: sum of the larger of that and of its mirror image, entry by entry
    - ``"jsd"``: mean of the two KL divergences from N(0, (v0 + v1) / 2), divided by two
    - ``"entropy"``: log 2 minus the mean binary entropy (nats) of h0 / (h0 + h1)
    - ``"plain_cosine"``: cosine distance of h0 and h1

    All but the last are the public Task2Vec code's, by its names. Entries that are zero in both tasks are left out; one
    that is zero in one task only makes the KL divergences and ``"jsd"`` infinite. ``epsilon`` is added to the
    denominator h0 + h1 of ``"cosine"`` and ``"entropy"``, where the public code adds 1e-8, which changes distances
    where Fisher values are as small; for the metrics of variances it is added to the Fisher values, and
    ``"plain_cosine"`` has no use for it.

    Time: one division an entry of each pair for ``"cosine"``, some logarithms more for the divergences and
    ``"entropy"``, a matrix product for the others; pairs of which these would lose digits take a slower path. Work is
    spread over ``torch.get_num_threads()`` threads. Memory beyond the inputs in float64 and the result: some copies of
    the inputs, and 4 MiB a thread. Raises ValueError for an unknown metric and for unusable vectors.
    """
    check_same(a, b)
    measure = _metric(metric)
    first = as_vectors(a, "a", normalized=measure.normalized)
    second = as_vectors(b, "b", first.shape[1], normalized=measure.normalized)
    return measure.measure(first, second, _check_epsilon(epsilon))


def pdist(embeddings: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [T, T] between all tasks, zero on the diagonal. Arguments and errors as :func:`cdist`.

    Symmetric but for ``"asymmetric_kl"``, where row i holds the distances from task i.
    """
    measure = _metric(metric)
    vectors = as_vectors(embeddings, "embeddings", normalized=measure.normalized)
    _check_epsilon(epsilon)
    out = np.zeros((len(vectors), len(vectors)))
    for i in range(0, len(vectors), ROWS_AT_ONCE):
        start = i if measure.symmetric else 0
        out[i : i + ROWS_AT_ONCE, start:] = measure.measure(vectors[i : i + ROWS_AT_ONCE], vectors[start:], epsilon)
    if not measure.symmetric:
        np.fill_diagonal(out, 0)
        return out
    out = np.triu(out, 1)
    return out + out.T


def layerwise_cdist(
    a: Sequence[Embedding], b: Sequence[Embedding], metric: str = "cosine", *, epsilon: float = 0.0
) -> dict[str, np.ndarray]:
    """:func:`cdist` of each layer's part of the embeddings on its own: {layer name: distances [A, B]}.

    The public code's ``layerwise_kl`` is this with ``"asymmetric_kl"``, its ``layerwise_cosine`` with
    ``"normalized_cosine"``, as scales are equal within a layer. Raises TypeError for anything but embeddings.
    """
    if not (_are_embeddings(a) and _are_embeddings(b)):
        raise TypeError("distances by layer need sequences of Embedding: arrays do not say where a layer begins")
    check_comparable([*a, *b])
    measure = _metric(metric)
    first, second = (as_vectors(e, "embeddings", normalized=measure.normalized) for e in (a, b))
    return {
        name: measure.measure(first[:, start:stop], second[:, start:stop], _check_epsilon(epsilon))
        for name, start, stop in a[0].layers
    }


def layerwise_pdist(
    embeddings: Sequence[Embedding], metric: str = "cosine", *, epsilon: float = 0.0
) -> dict[str, np.ndarray]:
    """:func:`layerwise_cdist` of a set of tasks with itself: {layer name: distances [T, T]}, zero on the diagonal."""
    distances = layerwise_cdist(embeddings, embeddings, metric, epsilon=epsilon)
    for matrix in distances.values():
        np.fill_diagonal(matrix, 0)
    return distances


def trivial_embedding(*tasks: Vectors) -> np.ndarray:
    """The embedding t0 [D] of the task without labels to tell apart, for a bank of tasks.

    Such a task's Fisher is zero: nothing but the prior is left of its precision. The plain Fisher has no prior, so one
    of the bank's own size is taken: each layer's mean Fisher value over all ``tasks`` (of arrays, the mean of all
    entries). See ``docs/decisions.md``.
    """
    stacked = np.concatenate([as_vectors(t, "tasks") for t in tasks])
    layers = tasks[0][0].layers if _are_embeddings(tasks[0]) else (("all", 0, stacked.shape[1]),)
    prior = np.empty(stacked.shape[1])
    for _, start, stop in layers:
        prior[start:stop] = stacked[:, start:stop].mean()
    return prior


def complexity(
    embeddings: Vectors, trivial: np.ndarray | None = None, metric: str = "cosine", *, epsilon: float = 0.0
) -> np.ndarray:
    """How far each task [T] is from the trivial one t0 [D]: d_sym(h + t0, t0) (Achille et al., 2019, section 4).

    ``trivial``: by default :func:`trivial_embedding` of the given ones. The other measure of complexity in the paper is
    :attr:`Embedding.norm`.
    """
    measure = _metric(metric)
    prior = trivial_embedding(embeddings) if trivial is None else np.asarray(trivial, dtype=np.float64)
    vectors = as_vectors(embeddings, "embeddings", prior.size)
    prior = as_vectors(prior[None], "trivial", prior.size)
    return measure.measure(vectors + prior, prior, _check_epsilon(epsilon))[:, 0]


def asymmetric_distance(
    a: Vectors,
    b: Vectors,
    metric: str = "cosine",
    *,
    alpha: float = ALPHA,
    trivial: np.ndarray | None = None,
    epsilon: float = 0.0,
) -> np.ndarray:
    """The paper's d(a -> b) = d_sym(a, b) - alpha d_sym(a, t0), [A, B]: complex tasks ``a`` count as nearer.

    ``a`` are the tasks that experts were trained on, ``b`` those that an expert is wanted for; arguments as
    :func:`cdist`. ``alpha``: 0.15 in the paper. ``trivial``: t0 [D], by default :func:`trivial_embedding` of ``a``; the
    second term is :func:`complexity`. May be negative.
    """
    if not np.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    distances = cdist(a, b, metric, epsilon=epsilon)
    return distances - alpha * complexity(a, trivial, metric, epsilon=epsilon)[:, None]


def centred_distance(
    a: Vectors, b: Vectors | None = None, *, bank: Vectors | None = None, floor: float = FLOOR
) -> np.ndarray:
    """Distances [A, B], from 0 to 2, by what sets tasks apart from the others of a bank, every layer counting the same.

    With g the Fisher values of one task and layer divided by their mean, and m [D] the mean of g over the bank,
    x = log(g / m + ``floor``) less its mean over the bank; the distance is the mean over layers of 1 - cos(x_a, x_b).
    So neither a task's norm counts, nor what all tasks have in common, and a dead filter is as far from the others as
    one of ``floor`` times the usual value. Filters that are zero in the whole bank are left out, and layers in which
    all its tasks are alike. docs/selection.md measures it.

    ``a``, ``b``: as :func:`cdist`; ``b`` is ``a`` unless given, and the diagonal zero. ``bank``: the tasks that the
    means are taken over, by default those of ``a`` and ``b``: at least three, better dozens of many kinds. Of arrays
    all entries are one layer. Raises ValueError for what cannot be used, FingerprintMismatch for what cannot be
    compared.
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
    layers = a[0].layers if _are_embeddings(a) else (("all", 0, first.shape[1]),)
    total, counted = np.zeros((len(first), len(second))), 0
    for _, start, stop in layers:
        mean, centre = _centre(tasks[:, start:stop], floor)
        x_bank = _contrasts(tasks[:, start:stop], mean, centre, floor)
        if not x_bank.any():
            continue
        u = _contrasts(first[:, start:stop], mean, centre, floor)
        v = u if b is None else _contrasts(second[:, start:stop], mean, centre, floor)
        distance = 1 - _unit(u) @ _unit(v).T
        _recompute(distance, distance < 1e-2, u, v, lambda rows, columns: (rows, columns))
        distance[np.ix_(~u.any(1), ~v.any(1))] = 0
        total += np.clip(distance, 0, 2)
        counted += 1
    total /= max(counted, 1)
    if b is None:
        total = np.triu(total, 1)
        return total + total.T
    return total


def _shares(h: np.ndarray) -> np.ndarray:
    """A layer's Fisher values [T, O] divided by each task's mean; zeros stay."""
    h = np.ldexp(h, -_exponents(h))  # the mean of values near the smallest numbers would be none
    mean = h.mean(1, keepdims=True)
    return h / np.where(mean > 0, mean, 1)


def _centre(h: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Of a bank's layer [T, O]: the mean of g, zero where the bank is dead, and of log(g / mean + floor), both [O]."""
    g = _shares(h)
    mean = g.mean(0)
    mean[mean < 1e-200] = 0  # of values about one: dead, and no number to divide by
    return mean, np.log(g / np.where(mean > 0, mean, np.inf) + floor).mean(0)


def _contrasts(h: np.ndarray, mean: np.ndarray, centre: np.ndarray, floor: float) -> np.ndarray:
    """x of :func:`centred_distance` for a layer's values [T, O], zero for the filters that do not count."""
    x = np.log(_shares(h) / np.where(mean > 0, mean, np.inf) + floor) - centre
    return np.where(np.abs(x) < 1e-12, 0, x)  # rounding: all tasks are equal here


def nearest_tasks(distances: np.ndarray) -> list[int]:
    """For each task of a square matrix [T, T], the index of the nearest other one."""
    return np.argmin(distances + np.diag(np.full(len(distances), np.inf)), axis=1).tolist()


def distance_rows(names: Sequence[str], distances: np.ndarray) -> list[list[str]]:
    """A square matrix as rows of text, names on top and on the left; numbers keep all their digits."""
    return [["task", *names], *([name, *map(repr, row.tolist())] for name, row in zip(names, distances, strict=True))]


def _metric(metric: str) -> Metric:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    return METRICS[metric]


def _check_epsilon(epsilon: float) -> float:
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}, expected a finite number of at least 0")
    return epsilon


def check_same(a: Vectors, b: Vectors) -> None:
    """Raise FingerprintMismatch if both are embeddings and not all are comparable."""
    if _are_embeddings(a) and _are_embeddings(b):
        check_comparable([*a, *b])


def _are_embeddings(given: Vectors) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(e, Embedding) for e in given)


def as_vectors(given: Vectors, name: str, length: int | None = None, *, normalized: bool = False) -> np.ndarray:
    """float64 [T, D] of what a caller gave, which must be finite, at least 0, and of ``length`` columns if given.

    ``normalized``: divided by the embeddings' scales.
    """
    array = stack(given) if _are_embeddings(given) else given.cpu() if isinstance(given, Tensor) else given
    vectors = np.asarray(array, dtype=np.float64)
    if normalized and _are_embeddings(given):
        scale = np.stack([e.scale for e in given])
        if not scale.all():
            raise ValueError(f"{name}: a scale of zero, by which Fisher values cannot be divided")
        vectors = vectors / scale
    if vectors.ndim != 2 or not vectors.size or (length is not None and vectors.shape[1] != length):
        raise ValueError(f"{name} has shape {list(vectors.shape)}, expected [T, {'D' if length is None else length}]")
    if not np.isfinite(vectors).all() or (vectors < 0).any():
        raise ValueError(f"{name}: Fisher values must be finite and at least 0")
    return vectors
