"""Distances against scipy and the formulas written out, and in high precision where vectors are nearly equal."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
from mpmath import mp, mpf
from test_embedding import make

from t2v_fast.distance import METRICS, cdist, pdist
from t2v_fast.embedding import FingerprintMismatch


def vectors(t: int = 6, d: int = 40, seed: int = 0) -> np.ndarray:
    h = np.random.default_rng(seed).lognormal(-18, 3, (t, d))  # Fisher values are small and uneven
    h[:, 3] = 0  # a filter that is dead in every task
    h[0, 5] = 0  # and in one
    return h


def literal(h0: np.ndarray, h1: np.ndarray, epsilon: float) -> float:
    used = h0 + h1 + epsilon > 0
    h0, h1 = h0[used], h1[used]
    return scipy.spatial.distance.cosine(h0 / (h0 + h1 + epsilon), h1 / (h0 + h1 + epsilon))


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_cosine_is_the_public_codes(epsilon: float) -> None:
    h = vectors()
    want = [[literal(a, b, epsilon) for b in h] for a in h]
    np.testing.assert_allclose(pdist(h, epsilon=epsilon), want, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(cdist(h[:2], h[2:], epsilon=epsilon), np.array(want)[:2, 2:], rtol=1e-10, atol=1e-14)


def test_plain_cosine() -> None:
    h = vectors()
    want = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(h, "cosine"))
    np.testing.assert_allclose(pdist(h, "plain_cosine"), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("t", [2, 7, 40])
@pytest.mark.parametrize("d", [5, 40_000])
def test_properties(metric: str, t: int, d: int) -> None:
    h = vectors(t, max(d, 6))[:, :d]
    distances = pdist(h, metric)
    assert distances.shape == (t, t)
    assert (np.diag(distances) == 0).all()
    assert (distances == distances.T).all()
    assert ((distances >= 0) & (distances <= 1 + 1e-12)).all()
    np.testing.assert_allclose(cdist(h, h, metric), distances, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(pdist(h * 1e-6, metric), distances, rtol=1e-9, atol=1e-11)  # no unit matters


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gap", [1e-3, 1e-7])
def test_nearly_equal_vectors_keep_their_digits(metric: str, gap: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.lognormal(-18, 3, 30)
    b = a * (1 + gap * rng.standard_normal(30))
    mp.dps = 60
    x, y = [mpf(v) for v in a], [mpf(v) for v in b]
    if metric == "cosine":
        x, y = [p / (p + q) for p, q in zip(x, y, strict=True)], [q / (p + q) for p, q in zip(x, y, strict=True)]
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    want = float(1 - dot / mp.sqrt(sum(p * p for p in x) * sum(q * q for q in y)))
    assert pdist(np.stack([a, b]), metric)[0, 1] == pytest.approx(want, rel=1e-7)
    assert pdist(np.stack([a, a]), metric)[0, 1] == 0


def test_embeddings_must_be_comparable() -> None:
    a, b = make("a", 0), make("b", 1)
    np.testing.assert_array_equal(pdist([a, b]), pdist(np.stack([a.hessian, b.hessian])))
    other = make("c", 2, fingerprint={"probe": "q"})
    with pytest.raises(FingerprintMismatch):
        pdist([a, other])
    with pytest.raises(FingerprintMismatch):
        cdist([a, b], [other])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: pdist(h, "manhattan"), "unknown metric 'manhattan': expected one of cosine"),
        (lambda h: pdist(h[0]), r"embeddings has shape \[40\]"),
        (lambda h: pdist([]), "expected"),
        (lambda h: cdist(h, h[:, :5]), r"b has shape \[6, 5\], expected \[T, 40\]"),
        (lambda h: pdist(-h), "at least 0"),
        (lambda h: pdist(h * np.nan), "finite"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(vectors())
