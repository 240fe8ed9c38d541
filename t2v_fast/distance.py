"""Distances between tasks, vectorised over pairs, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .embedding import Embedding, check_comparable, stack

Vectors = Sequence[Embedding] | np.ndarray | Tensor

# A tile of ROWS x ROWS pairs and COLUMNS entries: its temporaries take 0.5 MiB each, about a core's cache.
ROWS, COLUMNS = 8, 1024
# Rows of the result that pdist asks a metric for at once; some ROWS_AT_ONCE^2 / 2 pairs of each are computed twice.
ROWS_AT_ONCE = 64
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
    u, v = _power_of_two(u), _power_of_two(v)
    e = u - v
    zero_u, zero_v = ~u.any(1), ~v.any(1)
    uu, vv = np.where(zero_u, 1, np.vecdot(u, u)), np.where(zero_v, 1, np.vecdot(v, v))
    sin2 = np.maximum(np.vecdot(e, e) - np.square(np.vecdot(e, v)) / vv, 0) / uu
    distance = sin2 / (1 + np.vecdot(u, v) / np.sqrt(uu * vv))
    return np.where(zero_u & zero_v, 0, np.where(zero_u | zero_v, 1, distance))


def _power_of_two(rows: np.ndarray) -> np.ndarray:
    """Rows with a largest entry in [1/2, 1), scaled without rounding: squares of 1e-200 would vanish."""
    return np.ldexp(rows, -np.frexp(rows.max(1, keepdims=True))[1])


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; rows of zeros stay."""
    rows = _power_of_two(rows)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)


# (a [A, D], b [B, D], epsilon) -> distances [A, B], symmetric in a and b: pdist asks only for one triangle.
Metric = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
METRICS: dict[str, Metric] = {"cosine": _cosine, "plain_cosine": _plain_cosine}


def cdist(a: Vectors, b: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [A, B] between each task of ``a`` and each of ``b``.

    ``a`` and ``b``: sequences of :class:`Embedding`, which must be comparable (FingerprintMismatch otherwise), or
    arrays [T, D] of Fisher vectors, which cannot be checked. ``metric``: a name in :data:`METRICS`; ``"cosine"`` is the
    public code's (Achille et al., 2019, section 4), ``"plain_cosine"`` the ordinary one. ``epsilon`` is added to the
    denominator of ``"cosine"``; the public code adds 1e-8, which changes distances where Fisher values are as small.
    Without it, entries that are zero in both tasks are left out.

    Time: one division an entry of each pair for ``"cosine"``, a matrix product for ``"plain_cosine"``; pairs of which
    these would lose digits take a slower path. Work is spread over ``torch.get_num_threads()`` threads. Memory beyond
    the inputs in float64 and the result: at most two copies of the inputs, and 1.5 MiB a thread. Raises ValueError for
    an unknown metric and for unusable vectors.
    """
    if _are_embeddings(a) and _are_embeddings(b):
        check_comparable([*a, *b])
    measure, first = _measure(metric), _vectors(a, "a")
    return measure(first, _vectors(b, "b", first.shape[1]), _check_epsilon(epsilon))


def pdist(embeddings: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [T, T] between all tasks: symmetric, zero on the diagonal. Arguments and errors as :func:`cdist`."""
    measure, vectors = _measure(metric), _vectors(embeddings, "embeddings")
    out = np.zeros((len(vectors), len(vectors)))
    for i in range(0, len(vectors), ROWS_AT_ONCE):
        rows = vectors[i : i + ROWS_AT_ONCE]
        out[i : i + ROWS_AT_ONCE, i:] = measure(rows, vectors[i:], _check_epsilon(epsilon))
    out = np.triu(out, 1)
    return out + out.T


def nearest_tasks(distances: np.ndarray) -> list[int]:
    """For each task of a square matrix [T, T], the index of the nearest other one."""
    return np.argmin(distances + np.diag(np.full(len(distances), np.inf)), axis=1).tolist()


def distance_rows(names: Sequence[str], distances: np.ndarray) -> list[list[str]]:
    """A square matrix as rows of text, names on top and on the left; numbers keep all their digits."""
    return [["task", *names], *([name, *map(repr, row.tolist())] for name, row in zip(names, distances, strict=True))]


def _measure(metric: str) -> Metric:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    return METRICS[metric]


def _check_epsilon(epsilon: float) -> float:
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}, expected a finite number of at least 0")
    return epsilon


def _are_embeddings(given: Vectors) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(e, Embedding) for e in given)


def _vectors(given: Vectors, name: str, length: int | None = None) -> np.ndarray:
    """float64 [T, D] of what a caller gave, which must be finite, at least 0, and of ``length`` columns if given."""
    array = stack(given) if _are_embeddings(given) else given.cpu() if isinstance(given, Tensor) else given
    vectors = np.asarray(array, dtype=np.float64)
    if vectors.ndim != 2 or not vectors.size or (length is not None and vectors.shape[1] != length):
        raise ValueError(f"{name} has shape {list(vectors.shape)}, expected [T, {'D' if length is None else length}]")
    if not np.isfinite(vectors).all() or (vectors < 0).any():
        raise ValueError(f"{name}: Fisher values must be finite and at least 0")
    return vectors
