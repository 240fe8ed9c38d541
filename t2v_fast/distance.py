"""Distances between tasks, vectorised over pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .embedding import Embedding, check_comparable, stack

Vectors = Sequence[Embedding] | np.ndarray | Tensor

# A block of pairs has about this many float64 entries, so that its temporaries stay in a cache: 256 KiB each.
BLOCK = 1 << 15


def _cosine(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """The public code's ``cosine``: the cosine distance of h0 / (h0 + h1) and h1 / (h0 + h1), for each pair of rows.

    The two vectors are 1/2 + s and 1/2 - s with s = (h0 - h1) / 2 (h0 + h1), so without ``epsilon`` a pair needs only
    sum s, sum s^2 and the number of entries that are not zero in both tasks; those are left out.
    """
    out = torch.empty(len(a), len(b), dtype=torch.float64)
    step = max(1, BLOCK // max(1, a.shape[1]))
    for i, h0 in enumerate(a):
        for start in range(0, len(b), step):
            h1 = b[start : start + step]
            total = h0 + h1
            used = total > 0
            if epsilon:
                total += epsilon
            difference = (h0 - h1).div_(total.masked_fill_(~used, 1))
            if epsilon:
                u, v = h0 / total, h1 / total
                uu, vv, gap = u.square().sum(1), v.square().sum(1), (difference * (u + v)).sum(1)
            else:
                count, gap = used.sum(1), difference.sum(1)
                middle = (count + difference.square().sum(1)) / 4
                uu, vv = middle + gap / 2, middle - gap / 2
            out[i, start : start + step] = _cosine_distance(uu, vv, difference.square().sum(1), gap)
    return out


def _plain_cosine(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """1 - cos of the Fisher vectors themselves."""
    u, v = _unit(a), _unit(b)
    distance = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    zero_a, zero_b = ~u.any(1)[:, None], ~v.any(1)[None]
    return distance.masked_fill(zero_a | zero_b, 1).masked_fill(zero_a & zero_b, 0)


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay. Scaled by the largest entry first: squares of 1e-200 would vanish."""
    vectors = vectors / vectors.amax(1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _cosine_distance(uu: Tensor, vv: Tensor, difference: Tensor, gap: Tensor) -> Tensor:
    """1 - u.v / |u| |v| from |u|^2, |v|^2, |u - v|^2 and |u|^2 - |v|^2, without cancellation for nearly equal vectors.

    2 (|u| |v| - u.v) = |u - v|^2 - (|u| - |v|)^2. Two zero vectors are at distance 0, one from any other at 1.
    """
    u, v = uu.clamp_min(0).sqrt(), vv.clamp_min(0).sqrt()
    apart = difference - (gap / (u + v).clamp_min(torch.finfo(u.dtype).tiny)).square()
    distance = apart.clamp_min(0) / (2 * u * v)
    either, both = (u == 0) | (v == 0), (u == 0) & (v == 0)
    return distance.masked_fill(either, 1).masked_fill(both, 0)


METRICS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"cosine": _cosine, "plain_cosine": _plain_cosine}


def cdist(a: Vectors, b: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [A, B] between each task of ``a`` and each of ``b``.

    ``a`` and ``b``: sequences of :class:`Embedding`, which must be comparable (FingerprintMismatch otherwise), or
    arrays [T, D] of Fisher vectors, which cannot be checked. ``metric``: a name in :data:`METRICS`; ``"cosine"`` is the
    public code's (Achille et al., 2019, section 4), ``"plain_cosine"`` the ordinary one. ``epsilon`` is added to the
    denominator of ``"cosine"``; the public code adds 1e-8, which changes distances where Fisher values are as small.

    Memory beyond inputs and result: about 1 MiB. Raises ValueError for an unknown metric and for unusable vectors.
    """
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        check_comparable([*a, *b])
    return _measure(metric)(_vectors(a, "a"), _vectors(b, "b", len(a[0])), epsilon).numpy()


def pdist(embeddings: Vectors, metric: str = "cosine", *, epsilon: float = 0.0) -> np.ndarray:
    """Distances [T, T] between all tasks: symmetric, zero on the diagonal. Arguments and errors as :func:`cdist`."""
    measure = _measure(metric)
    vectors = _vectors(embeddings, "embeddings")
    out = np.zeros((len(vectors), len(vectors)))
    for i in range(len(vectors) - 1):
        out[i, i + 1 :] = measure(vectors[i : i + 1], vectors[i + 1 :], epsilon)[0].numpy()
    return out + out.T


def _measure(metric: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    return METRICS[metric]


def _vectors(given: Vectors, name: str, length: int | None = None) -> Tensor:
    array = stack(given) if isinstance(given, Sequence) and len(given) else given
    vectors = torch.as_tensor(np.asarray(array), dtype=torch.float64)
    if vectors.dim() != 2 or not vectors.numel() or (length is not None and vectors.shape[1] != length):
        raise ValueError(f"{name} has shape {list(vectors.shape)}, expected [T, {'D' if length is None else length}]")
    if not vectors.isfinite().all() or (vectors < 0).any():
        raise ValueError(f"{name}: Fisher values must be finite and at least 0")
    return vectors
