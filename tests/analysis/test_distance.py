"""Distances against scipy and the formulas written out, and in high precision where vectors are nearly equal."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from embeddings import make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mpmath import mp, mpf

from t2v_fast.analysis import distance
from t2v_fast.analysis.distance import cdist, pdist
from t2v_fast.embedding import Embedding, FingerprintMismatch

COSINES = ("cosine", "plain_cosine")
SCALE_FREE = (*COSINES, "entropy", "normalized_cosine")


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


@pytest.mark.slow_unless(t=(2, 7))
@pytest.mark.parametrize("metric", SCALE_FREE)
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


def truth(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """The metric in sixty digits."""
    with mp.workdps(60):
        pairs = [(mpf(float(p)), mpf(float(q))) for p, q in zip(a, b, strict=True) if p + q > 0]
        if metric == "cosine":
            pairs = [(p / (p + q), q / (p + q)) for p, q in pairs]
        dot, pp, qq = sum(p * q for p, q in pairs), sum(p * p for p, _ in pairs), sum(q * q for _, q in pairs)
        return float(1 - dot / mp.sqrt(pp * qq))


@pytest.mark.parametrize("metric", COSINES)
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-7, 1e-10])
def test_nearly_equal_vectors_keep_their_digits(metric: str, gap: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.lognormal(-18, 3, 300)
    b = a * (1 + gap * rng.standard_normal(300).clip(-3, 3))
    assert pdist(np.stack([a, b]), metric)[0, 1] == pytest.approx(truth(a, b, metric), rel=1e-12, abs=0)
    assert pdist(np.stack([a, a]), metric)[0, 1] == 0
    assert cdist(a[None], a[None], metric)[0, 0] == 0


def test_both_sides_of_a_power_of_two_keep_their_digits() -> None:
    a = np.random.default_rng(0).uniform(0.1, 0.9, 300)
    a[7] = 1 - 1e-9
    b = a * (1 + 1e-8 * np.random.default_rng(1).standard_normal(300))
    b[7] = 1 + 1e-9
    assert pdist(np.stack([a, b]), "plain_cosine")[0, 1] == pytest.approx(truth(a, b, "plain_cosine"), rel=1e-9, abs=0)


@pytest.mark.parametrize("metric", COSINES)
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-6, 1e-10, 1e-20, 1e-150])
def test_tasks_of_different_scale_keep_their_digits(metric: str, ratio: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(-18, 1, 300), ratio * rng.lognormal(-18, 1, 300)
    a[:5] = b[:5] = 0  # dead in both; an entry that only the smaller task has would hide the difference of scale
    want = truth(a, b, metric)
    assert pdist(np.stack([a, b]), metric)[0, 1] == pytest.approx(want, rel=1e-11)
    assert pdist(np.stack([b, a]), metric)[0, 1] == pytest.approx(want, rel=1e-11)


fisher_values = st.one_of(st.just(0.0), st.floats(1e-14, 1e2), st.floats(1e-200, 1e-190))


@pytest.mark.parametrize("metric", COSINES)
@settings(max_examples=60, deadline=None)
@given(h=arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=fisher_values))
def test_any_fisher_values(metric: str, h: np.ndarray) -> None:
    distances = pdist(h, metric)
    assert ((distances >= 0) & (distances <= 1 + 1e-12)).all()
    np.testing.assert_array_equal(distances, distances.T)
    np.testing.assert_array_equal(np.diag(distances), 0)
    both = cdist(h, h, metric)
    np.testing.assert_allclose(both, distances, rtol=1e-9, atol=1e-12)
    order = np.random.default_rng(0).permutation(h.shape[1])
    np.testing.assert_allclose(pdist(h[:, order], metric), distances, rtol=1e-9, atol=1e-12)
    for i, j in ((0, -1), (len(h) // 2, 0)):
        if h[i].any() and h[j].any():
            assert distances[i, j] == pytest.approx(truth(h[i], h[j], metric), rel=1e-9, abs=1e-10)
        else:
            assert distances[i, j] == (h[i].any() or h[j].any())


def test_inputs_and_threads_do_not_matter() -> None:
    h = vectors(20, 3000)
    want = pdist(h)
    np.testing.assert_array_equal(pdist(torch.from_numpy(h)), want)
    np.testing.assert_array_equal(pdist(list(h)), want)
    np.testing.assert_array_equal(pdist(h.astype(np.float32)), pdist(h.astype(np.float32).astype(np.float64)))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            np.testing.assert_array_equal(pdist(h), want)
    finally:
        torch.set_num_threads(threads)


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
        (lambda h: cdist([], h), r"a has shape \[0\], expected \[T, D\]"),
        (lambda h: pdist(h, epsilon=-1e-8), "epsilon is -1e-08, expected a finite number of at least 0"),
        (lambda h: cdist(h, h[:, :5]), r"b has shape \[6, 5\], expected \[T, 40\]"),
        (lambda h: pdist(-h), "at least 0"),
        (lambda h: pdist(h * np.nan), "finite"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(vectors())


def test_a_table_of_pandas() -> None:
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    layers = [("a", 0, 5)]
    tasks = [
        Embedding(rng.random(5) + 0.1, np.ones(5), layers, 3, meta={"task": name} if name else {})
        for name in ("cats", "", "cars")
    ]
    found = distance.to_frame(tasks, "jsd")
    assert list(found.index) == list(found.columns) == ["cats", "1", "cars"]
    np.testing.assert_array_equal(found.to_numpy(), pdist(tasks, "jsd"))
    with pytest.raises(TypeError, match="arrays have no names"):
        distance.to_frame(np.ones((2, 3)))


@pytest.mark.parametrize("metric", distance.ALL_METRICS)
def test_every_distance_by_its_name(metric: str) -> None:
    tasks = np.random.default_rng(0).random((4, 6)) + 0.1
    found = distance.distances_of(tasks, metric)
    assert found.shape == (4, 4)
    drawn = distance.symmetric(found)
    np.testing.assert_array_equal(drawn, drawn.T)
    assert drawn.min() == 0 == np.diag(drawn).max()
