"""The formulas of the distances between Fisher vectors, and the table :data:`METRICS` of their names.

A formula takes Fisher values ``a`` [A, D] and ``b`` [B, D] in float64 and returns the distances [A, B] of all pairs of
rows. Most work goes through tiles of a few pairs and entries that fit a core's cache. Where the fast form of a formula
would lose digits, the few pairs concerned are computed again in a careful form.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

# A tile of ROWS x ROWS pairs and COLUMNS entries: each of its temporaries takes 0.5 MiB, about a core's cache.
ROWS, COLUMNS = 8, 1024
CAREFUL = 8  # pairs that the careful form takes at once
TINY = np.finfo(np.float64).tiny
SMALLEST = np.finfo(np.float64).smallest_subnormal


def thread_count() -> int:
    """Return torch's number of threads; before torch was imported, the number that it would choose, about.

    Distances need nothing else of torch, whose import takes longer than most of them.
    """
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1


def _in_threads(block: Callable[[int], np.ndarray], rows: int, axis: int = 0) -> np.ndarray:
    """Concatenate ``block(start)`` for every ROWS-th row, computed by :func:`thread_count` threads.

    Threads inside each NumPy operation would wait for one another after every tile.
    """
    starts = range(0, rows, ROWS)
    with ThreadPoolExecutor(max(1, min(thread_count(), len(starts)))) as workers:
        return np.concatenate(list(workers.map(block, starts)), axis=axis)


def _cosine(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """The public code's ``cosine``: the cosine distance between h0 / (h0 + h1) and h1 / (h0 + h1).

    With t = h0 + h1 + epsilon, q = (h0 + h1) / t and d = (h0 - h1) / t, the two vectors are (q + d) / 2 and
    (q - d) / 2. So a pair needs the sums of d^2, d q and q^2. Without ``epsilon``, q is one, and the last sum counts
    the entries that are not zero in both tasks. The difference of nearly equal tasks is exact in d, so their distance
    keeps its digits.
    """
    dead_a, dead_b = (a == 0).astype(np.float32), (b == 0).astype(np.float32)
    used = a.shape[1] - (dead_a @ dead_b.T).astype(np.float64)  # [A, B]: exact, because these are small integers

    def block(i: int) -> np.ndarray:
        return _cosine_sums(a[i : i + ROWS], b, used[i : i + ROWS], epsilon)

    dd, dq, qq = _in_threads(block, len(a), axis=1)
    middle = (qq + dd) / 4
    uu, vv = np.maximum(middle + dq / 2, 0), np.maximum(middle - dq / 2, 0)
    # 2 (|u| |v| - u.v) = |u - v|^2 - (|u| - |v|)^2
    u, v = np.sqrt(uu), np.sqrt(vv)
    apart = np.maximum(dd - np.square(dq / np.maximum(u + v, TINY)), 0)
    distance = apart / np.maximum(2 * u * v, TINY)
    # If the scales of two tasks differ much, the smaller square above is the difference of two numbers near D / 2.
    _recompute(distance, np.minimum(uu, vv) <= 1e-4 * np.maximum(uu, vv), a, b, partial(_fractions, epsilon=epsilon))
    return distance


def _cosine_sums(a: np.ndarray, b: np.ndarray, used: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the sums of d^2, d q and q^2 of :func:`_cosine`, [3, A, B], for a few rows a [A, D] and all b [B, D].

    ``used`` [A, B] is the number of entries that are not zero in both rows.
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
                    np.maximum(total, SMALLEST, out=total)  # 0 / 0 becomes 0, and no other total changes
                d /= total
                dq[tile] += d.sum(2)
            dd[tile] += np.vecdot(d, d)
    return sums


def _fractions(h0: np.ndarray, h1: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    total = np.maximum(h0 + h1 + epsilon, SMALLEST)
    return h0 / total, h1 / total


def _plain_cosine(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """1 - cos of the Fisher vectors themselves; ``epsilon`` is ignored."""
    return cosine_distances(a, b, largest=1)


def cosine_distances(u: np.ndarray, v: np.ndarray, largest: float = 2) -> np.ndarray:
    """1 - cos of all pairs of rows u [A, D] and v [B, D], clipped to [0, ``largest``]; 0 between two rows of zeros."""
    distance = 1 - _unit(u) @ _unit(v).T
    # A product of unit vectors is accurate to about 1e-15, which leaves too few digits of a small distance.
    _recompute(distance, distance < 1e-2, u, v, lambda rows, columns: (rows, columns))
    distance[np.ix_(~u.any(1), ~v.any(1))] = 0
    return np.clip(distance, 0, largest)


def _recompute(
    distance: np.ndarray,
    pairs: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    vectors: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Overwrite the marked ``pairs`` of ``distance``, both [A, B], by 1 - cos of ``vectors(a_i, b_j)``."""
    left, right = np.nonzero(pairs)
    for k in range(0, len(left), CAREFUL):
        i, j = left[k : k + CAREFUL], right[k : k + CAREFUL]
        distance[i, j] = _careful_cosine(*vectors(a[i], b[j]))


def _careful_cosine(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """1 - cos of each row of u and v, [P, D], accurate for tiny distances and for rows of very different scale.

    1 - cos = sin^2 / (1 + cos), and sin^2 |u|^2 = |e|^2 - (e.v)^2 / |v|^2 with e = u - v, which is exact for nearly
    equal vectors. Two rows of zeros are at distance 0; a row of zeros is at distance 1 from any other.
    """
    at_u, at_v = _exponents(u), _exponents(v)
    # Rows of about one size share one scale, also across a power of two, so that their difference stays exact.
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
    """Return k [R, 1] such that the largest size in rows / 2^k is in [1/2, 1)."""
    return np.frexp(np.abs(rows).max(1, keepdims=True))[1]


def scale_rows(rows: np.ndarray) -> np.ndarray:
    """Divide each row by a power of two so that its largest size is in [1/2, 1).

    Nothing is rounded. Without this step, sums and squares of the smallest numbers would vanish.
    """
    return np.ldexp(rows, -_exponents(rows))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Divide each row by its length; rows of zeros stay."""
    rows = scale_rows(rows)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)


# A term of a sum over entries: Fisher values h0 [A, 1, C] and h1 [1, B, C] of two sets of tasks -> [A, B, C].
Term = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sums(a: np.ndarray, b: np.ndarray, term: Term) -> np.ndarray:
    """Sum ``term`` over the entries of each pair of rows, [A, B]; entries that are zero in both rows count 0."""

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

    return _in_threads(block, len(a))


def _excess(h0: np.ndarray, h1: np.ndarray) -> np.ndarray:
    """x - log(1 + x) for x = h1 / h0 - 1, in full precision: twice the KL divergence of a pair of entries."""
    log = np.log(h1) - np.log(h0)
    x = (h1 - h0) / h0
    series = np.zeros_like(x)
    for k in range(10, 1, -1):
        series = x * series + (-1) ** k / k
    return np.where(np.abs(x) < 0.05, np.square(x) * series, np.where(np.isinf(log), np.inf, x - log))


def _kl(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """The sum of the larger of the two KL divergences of each entry, which starts from the larger variance."""
    return _sums(a + epsilon, b + epsilon, lambda h, g: _excess(np.minimum(h, g), np.maximum(h, g)) / 2)


def _asymmetric_kl(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """KL(N(0, 1/a) || N(0, 1/b)): the sum of (v0/v1 - 1 + log v1 - log v0) / 2 with v = 1/h."""
    return _sums(a + epsilon, b + epsilon, lambda h, g: _excess(h, g) / 2)


def _jsd(a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    """The public code's ``jsd``, which is the mean of -log(1 - d^2) / 4 with d = (h0 - h1) / (h0 + h1)."""

    def term(h: np.ndarray, g: np.ndarray) -> np.ndarray:
        total = h + g
        d2 = np.square((h - g) / total)
        apart = np.log(total / 2) - (np.log(h) + np.log(g)) / 2  # accurate where d is nearly 1
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
    # With epsilon, an entry that is zero in both tasks has p = 0, which the public code counts as far apart.
    return (_sums(a, b, term) + math.log(2) * (a.shape[1] - _used(a, b, minimum=0))) / a.shape[1]


def _used(a: np.ndarray, b: np.ndarray, minimum: int = 1) -> np.ndarray:
    """Count the entries that are not zero in both rows of each pair, [A, B]; ``minimum`` replaces smaller counts."""
    return np.maximum(a.shape[1] - ((a == 0).astype(np.float64) @ (b == 0).astype(np.float64).T), minimum)


def _variance_cosine(a: np.ndarray, b: np.ndarray, epsilon: float, *, centre: bool) -> np.ndarray:
    """The cosine distance between the variances 1/h; with ``centre``, after subtracting their means over the entries.

    An entry that is zero in only one of the tasks has an infinite variance there. The result is the limit in which all
    such entries are equally small: they are then the whole of their vector.
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
    # Small distances have too few digits here, and so have the squares of nearly equal variances about their mean.
    pairs = (distance < 1e-2) | (uu < 1e-8 * a.shape[1]) | (vv < 1e-8 * a.shape[1])

    def vectors(h: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = (h == 0) & (g == 0)
        return _reciprocal(h, both, centre), _reciprocal(g, both, centre)

    _recompute(distance, pairs, a, b, vectors)
    return np.clip(distance, 0, 2 if centre else 1)


def _reciprocal(h: np.ndarray, without: np.ndarray, centre: bool = False) -> np.ndarray:
    """Return rows in proportion to 1/h [R, D], at most 1, and 0 in the entries ``without``, which enter no mean.

    A row with zeros in other entries has ones there and zeros everywhere else.
    """
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

    Args:
        measure: The formula: Fisher values a [A, D], b [B, D] and an epsilon -> distances [A, B].
        symmetric: Whether d(a, b) = d(b, a). For a symmetric metric, only one triangle of a matrix is computed.
        normalized: Whether the formula takes Fisher values that were divided by the ``scale`` of their embedding.
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
