"""Every metric against the public code's formula, written out entry by entry in plain Python and high precision."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from embeddings import make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mpmath import mp, mpf

from t2v_fast.analysis.distance import (
    METRICS,
    asymmetric_distance,
    cdist,
    centred_distance,
    complexity,
    layerwise_cdist,
    layerwise_pdist,
    pdist,
    trivial_embedding,
)

DIVERGENCES = ("kl", "asymmetric_kl", "jsd")


def pairs(a, b, epsilon=0.0):
    """Entries of two tasks as exact numbers, without those that are zero in both."""
    kept = [(mpf(float(p)) + epsilon, mpf(float(q)) + epsilon) for p, q in zip(a, b, strict=True)]
    return [(p, q) for p, q in kept if p + q > 0]


def cosine_distance(u, v):
    dot, uu, vv = sum(p * q for p, q in zip(u, v, strict=True)), sum(p * p for p in u), sum(q * q for q in v)
    if uu == 0 or vv == 0:
        return mpf(int(uu != vv))
    return 1 - dot / mp.sqrt(uu * vv)


def cosine(a, b, epsilon):
    kept = [(p, q, p + q + epsilon) for p, q in pairs(a, b)]
    return cosine_distance([p / t for p, _, t in kept], [q / t for _, q, t in kept])


def plain_cosine(a, b, epsilon):
    kept = pairs(a, b)
    return cosine_distance([p for p, _ in kept], [q for _, q in kept])


def variances(a, b, epsilon):
    """1/h, or, where some are infinite, the limit in proportion."""
    kept = pairs(a, b, epsilon)
    rows = []
    for k in range(2):
        h = [pair[k] for pair in kept]
        rows.append([mpf(int(x == 0)) for x in h] if any(x == 0 for x in h) else [1 / x for x in h])
    return rows


def normalized_cosine(a, b, epsilon):
    return cosine_distance(*variances(a, b, epsilon))


def correlation(a, b, epsilon):
    rows = variances(a, b, epsilon)
    means = [sum(row) / len(row) for row in rows]
    return cosine_distance(*([x - mean for x in row] for row, mean in zip(rows, means, strict=True)))


def divergence(v0, v1):
    return (v0 / v1 - 1 + mp.log(v1) - mp.log(v0)) / 2


def asymmetric_kl(a, b, epsilon):
    kept = pairs(a, b, epsilon)
    return mp.inf if any(p * q == 0 for p, q in kept) else sum(divergence(1 / p, 1 / q) for p, q in kept)


def kl(a, b, epsilon):
    kept = pairs(a, b, epsilon)
    if any(p * q == 0 for p, q in kept):
        return mp.inf
    return sum(max(divergence(1 / p, 1 / q), divergence(1 / q, 1 / p)) for p, q in kept)


def jsd(a, b, epsilon):
    kept = pairs(a, b, epsilon)
    if any(p * q == 0 for p, q in kept):
        return mp.inf
    total = mpf(0)
    for p, q in kept:
        v0, v1 = 1 / p, 1 / q
        middle = (v0 + v1) / 2
        total += (divergence(v0, middle) + divergence(v1, middle)) / 2
    return total / max(len(kept), 1)


def entropy(a, b, epsilon):
    kept = pairs(a, b) if not epsilon else [(mpf(float(p)), mpf(float(q))) for p, q in zip(a, b, strict=True)]
    total = mpf(0)
    for p, q in kept:
        x = p / (p + q + epsilon)
        total += mp.log(2) + sum(y * mp.log(y) for y in (x, 1 - x) if y > 0)
    return total / max(len(kept), 1)


PLAIN = {f.__name__: f for f in (cosine, normalized_cosine, correlation, kl, asymmetric_kl, jsd, entropy, plain_cosine)}


def plain(metric: str, a, b, epsilon: float = 0.0) -> float:
    with mp.workdps(60):
        return float(PLAIN[metric](a, b, mpf(epsilon)))


def matrix(metric: str, a, b, epsilon: float = 0.0) -> np.ndarray:
    return np.array([[plain(metric, p, q, epsilon) for q in b] for p in a])


def tasks(t: int = 6, d: int = 40, seed: int = 0, spread: float = 1.5, zeros: bool = False) -> np.ndarray:
    h = np.random.default_rng(seed).lognormal(-16, spread, (t, d))
    h[:, 3] = 0  # dead in every task
    if zeros:
        h[0, 5] = h[1, 5] = h[0, 6] = h[2, 7] = 0  # dead in some
    return h


def test_all_are_covered() -> None:
    assert set(PLAIN) == set(METRICS)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_formula(metric: str, zeros: bool, epsilon: float, spread: float) -> None:
    h = tasks(spread=spread, zeros=zeros)
    want = matrix(metric, h, h, epsilon)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-13)
    close(cdist(h[:2], h[2:], metric, epsilon=epsilon), want[:2, 2:])
    close(cdist(h[2:], h[:2], metric, epsilon=epsilon), want[2:, :2])
    found = pdist(h, metric, epsilon=epsilon)
    off = ~np.eye(len(h), dtype=bool)
    if METRICS[metric].symmetric:
        want = np.triu(want) + np.triu(want, 1).T  # of entropy with epsilon the two halves differ: the first counts
    close(found[off], want[off])
    assert (np.diag(found) == 0).all()
    assert not np.isnan(found).any()


@pytest.mark.parametrize("metric", METRICS)
def test_many_rows_and_columns(metric: str) -> None:
    """More than one tile each way, and the matrix of a set is that of its pairs."""
    h = tasks(70, 1500, spread=1.0, zeros=True)
    found = pdist(h, metric)
    for i, j in ((0, 69), (65, 3), (40, 41), (1, 0), (69, 64)):
        assert found[i, j] == pytest.approx(plain(metric, h[i], h[j]), rel=1e-9)
    assert METRICS[metric].symmetric == np.array_equal(found, found.T)


@pytest.mark.parametrize("metric", ["kl", "asymmetric_kl", "jsd", "entropy", "normalized_cosine", "correlation"])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-4, 1e-6])
def test_nearly_equal_tasks_keep_their_digits(metric: str, gap: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.lognormal(-16, 2, 300)
    b = a * (1 + gap * rng.standard_normal(300).clip(-3, 3))
    # The reciprocals of variances are rounded, to 1e-16 of a difference of `gap`.
    rel = 1e-9 if metric in ("normalized_cosine", "correlation") else 1e-10
    assert pdist(np.stack([a, b]), metric)[0, 1] == pytest.approx(plain(metric, a, b), rel=max(rel, 1e-13 / gap), abs=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ratio", [1e-3, 1e-12, 1e-100])
def test_tasks_of_different_scale(metric: str, ratio: float) -> None:
    a, b = tasks(2, 100, spread=1.0)
    b = b * ratio
    assert cdist(a[None], b[None], metric)[0, 0] == pytest.approx(plain(metric, a, b), rel=1e-9)
    assert cdist(b[None], a[None], metric)[0, 0] == pytest.approx(plain(metric, b, a), rel=1e-9)


values = st.one_of(st.just(0.0), st.floats(1e-12, 1e2))


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=40, deadline=None)
@given(h=arrays(np.float64, st.tuples(st.integers(1, 10), st.integers(1, 6)), elements=values))
def test_never_nan(metric: str, h: np.ndarray) -> None:
    found = pdist(h, metric)
    assert not np.isnan(found).any()
    assert (found >= 0).all()
    assert (np.diag(found) == 0).all()
    if metric in DIVERGENCES:  # infinite exactly where one of two tasks has a zero of its own
        own = ((h[:, None] == 0) != (h[None] == 0)).any(2)
        np.testing.assert_array_equal(np.isinf(found), own)
    else:
        assert np.isfinite(found).all()
    if metric == "correlation":
        return  # of few entries it can be undefined
    for i, j in ((0, -1), (len(h) // 2, 0)):
        if h[i].any() and h[j].any():
            want = plain(metric, h[i], h[j])
            assert found[i, j] == (want if np.isinf(want) else pytest.approx(want, rel=1e-7, abs=1e-9))


def test_correlation_of_constant_and_opposite_tasks() -> None:
    h = np.array([[1.0, 1, 1, 0], [2, 2, 2, 0], [1, 2, 4, 0], [1 / 3, 1 / 2, 1 / 1.25, 0]])
    found = pdist(h, "correlation")
    assert found[0, 1] == 0
    assert found[0, 2] == 1
    np.testing.assert_allclose(found[2, 3], plain("correlation", h[2], h[3]), rtol=1e-12)
    opposite = 1 / np.array([[1.0, 2, 3], [3, 2, 1]])
    assert pdist(opposite, "correlation")[0, 1] == pytest.approx(2)


def test_normalized_divides_by_the_scale() -> None:
    a, b = make("a", 0), make("b", 1)
    plain_h = np.stack([a.hessian, b.hessian])
    scales = np.random.default_rng(0).uniform(0.5, 2, plain_h.shape)
    a.scale, b.scale = scales
    assert pdist([a, b], "normalized_cosine")[0, 1] == pytest.approx(
        plain("normalized_cosine", *(plain_h / scales)), rel=1e-9
    )
    assert pdist([a, b], "correlation")[0, 1] == pytest.approx(plain("correlation", *plain_h), rel=1e-9)
    b.scale = b.scale * 0
    with pytest.raises(ValueError, match="scale of zero"):
        pdist([a, b], "normalized_cosine")


def test_layerwise() -> None:
    tasks_ = [make(str(k), k) for k in range(3)]
    for metric in ("asymmetric_kl", "normalized_cosine", "cosine"):
        found = layerwise_pdist(tasks_, metric)
        assert list(found) == tasks_[0].layer_names
        for name, distances in found.items():
            parts = [t.layer(name) for t in tasks_]
            for i, j in ((0, 1), (2, 0)):
                assert distances[i, j] == pytest.approx(plain(metric, parts[i], parts[j]), rel=1e-9)
            assert (np.diag(distances) == 0).all()
        across = layerwise_cdist(tasks_[:1], tasks_[1:], metric)
        np.testing.assert_allclose(across[name], distances[:1, 1:], rtol=1e-12)
    with pytest.raises(TypeError, match="lists of Embedding"):
        layerwise_pdist(np.ones((2, 3)))


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_asymmetric_distance(metric: str) -> None:
    h = tasks(5, 30)
    prior = [float(np.mean(h[:3]))] * 30
    want = np.array(
        [
            [
                plain(metric, a, b) - 0.15 * plain(metric, [x + t for x, t in zip(a, prior, strict=True)], prior)
                for b in h
            ]
            for a in h[:3]
        ]
    )
    off = ~np.eye(3, 5, dtype=bool)
    np.testing.assert_allclose(asymmetric_distance(h[:3], h, metric)[off], want[off], rtol=1e-9)
    np.testing.assert_array_equal(asymmetric_distance(h, h, metric, alpha=0), cdist(h, h, metric))
    own = np.full(30, 1e-7)
    np.testing.assert_allclose(
        asymmetric_distance(h, h, metric, alpha=2, trivial=own),
        cdist(h, h, metric) - 2 * cdist(h + own, own[None], metric),
        rtol=1e-12,
    )
    # The trivial task itself has no complexity.
    assert complexity(np.zeros((1, 30)), own, metric)[0] == pytest.approx(0, abs=1e-12)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha"):
            asymmetric_distance(h, h, alpha=bad)


def test_trivial_embedding_is_each_layers_mean() -> None:
    tasks_ = [make(str(k), k) for k in range(3)]
    prior = trivial_embedding(tasks_[:2], tasks_[2:])
    for name, start, stop in tasks_[0].layers:
        want = np.mean([np.mean(t.layer(name)) for t in tasks_])
        np.testing.assert_allclose(prior[start:stop], want, rtol=1e-12)


def plain_centred(a, b, bank, layers, floor: float) -> float:
    """Filter by filter, in plain Python."""

    def shares(h, start: int, stop: int) -> list[float]:
        part = [float(v) for v in h[start:stop]]
        mean = sum(part) / len(part)
        return [v / mean if mean else 0.0 for v in part]

    distances = []
    for _, start, stop in layers:
        of_bank, of_a, of_b = [shares(h, start, stop) for h in bank], shares(a, start, stop), shares(b, start, stop)
        u, v, spread = [], [], 0.0
        for k in range(stop - start):
            m = sum(g[k] for g in of_bank) / len(bank)
            if m == 0:
                continue
            logs = [math.log(g[k] / m + floor) for g in of_bank]
            centre = sum(logs) / len(logs)
            spread += sum(abs(x - centre) for x in logs)
            u.append(math.log(of_a[k] / m + floor) - centre)
            v.append(math.log(of_b[k] / m + floor) - centre)
        if spread < 1e-9:
            continue
        dot, uu, vv = (sum(p * q for p, q in zip(*w, strict=True)) for w in ((u, v), (u, u), (v, v)))
        distances.append(1 - dot / math.sqrt(uu * vv))
    return sum(distances) / len(distances)


def bank_of_embeddings(t: int = 5) -> list:
    h = np.random.default_rng(1).lognormal(-12, 2, (t, 40))
    h[:, 3] = 0  # dead in every task
    h[0, 5] = h[1, 15] = 0  # dead in one
    h[2, 20:26] = 0  # a layer that is dead in one
    h[:, 26:30] = 0  # and one in all
    h[:, 30:34] = 2.0 ** np.arange(t)[:, None]  # a layer in which all tasks are alike
    stops = (0, 10, 20, 26, 30, 34, 40)
    layers = tuple((f"layer {k}", a, b) for k, (a, b) in enumerate(itertools.pairwise(stops)))
    return [make(str(k), hessian=row, scale=np.ones(40), standard_error=None, layers=layers) for k, row in enumerate(h)]


@pytest.mark.parametrize("floor", [1e-3, 0.1])
def test_centred_distance(floor: float) -> None:
    tasks_ = bank_of_embeddings()
    layers, h = tasks_[0].layers, [t.hessian for t in tasks_]
    want = np.array([[plain_centred(a, b, h, layers, floor) for b in h] for a in h])
    found = centred_distance(tasks_, floor=floor)
    off = ~np.eye(len(h), dtype=bool)
    np.testing.assert_allclose(found[off], want[off], rtol=1e-9)
    assert (np.diag(found) == 0).all()
    np.testing.assert_array_equal(found, found.T)
    # Two sets, and a bank of others.
    np.testing.assert_allclose(centred_distance(tasks_[:2], tasks_[2:], floor=floor), want[:2, 2:], rtol=1e-9)
    want = np.array([[plain_centred(a, b, h[1:4], layers, floor) for b in h[2:]] for a in h[:2]])
    given = centred_distance(tasks_[:2], tasks_[2:], bank=tasks_[1:4], floor=floor)
    np.testing.assert_allclose(given, want, rtol=1e-9, atol=1e-12)
    # Of arrays all entries are one layer.
    want = [[plain_centred(a, b, h, [("all", 0, len(h[0]))], floor) for b in h] for a in h]
    np.testing.assert_allclose(centred_distance(np.stack(h), floor=floor), want, rtol=1e-9, atol=1e-12)


def test_centred_distance_does_not_see_what_it_should_not() -> None:
    tasks_ = bank_of_embeddings()
    want = centred_distance(tasks_)
    for k, e in enumerate(tasks_):
        e.hessian = e.hessian * 10.0 ** (3 * k - 200)  # the norms
    np.testing.assert_allclose(centred_distance(tasks_), want, rtol=1e-9, atol=1e-12)
    h = np.stack([e.hessian for e in tasks_])
    even = h / h.max(1, keepdims=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(h.shape[1])
    np.testing.assert_allclose(centred_distance(even[:, order]), centred_distance(even), rtol=1e-9, atol=1e-12)
    near = np.stack([even[0], even[0] * (1 + 1e-7 * rng.standard_normal(h.shape[1])), *even[1:]])
    assert 0 < centred_distance(near)[0, 1] < 1e-12  # a small distance keeps its digits


@settings(max_examples=60, deadline=None)
@given(h=arrays(np.float64, st.tuples(st.integers(3, 10), st.integers(1, 6)), elements=values))
def test_centred_distance_is_never_nan(h: np.ndarray) -> None:
    for found in (centred_distance(h), centred_distance(h, h[::-1]), centred_distance(h[:2], bank=h[-3:])):
        assert np.isfinite(found).all()
        assert ((found >= 0) & (found <= 2 + 1e-12)).all()
    assert (centred_distance(np.tile(h[:1], (4, 1))) == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: centred_distance(h[:2]), "the bank has 2 tasks, expected at least 3"),
        (lambda h: centred_distance(h, bank=h[:2]), "the bank has 2 tasks"),
        (lambda h: centred_distance(h, floor=0), "floor is 0, expected a finite number above 0"),
        (lambda h: centred_distance(h, floor=np.nan), "floor is nan"),
        (lambda h: centred_distance(h, h[:, :5]), r"b has shape \[6, 5\], expected \[T, 40\]"),
        (lambda h: centred_distance(h, bank=h[:, :5]), r"bank has shape \[6, 5\], expected \[T, 40\]"),
        (lambda h: centred_distance(-h), "a: Fisher values must be finite and at least 0"),
        (lambda h: centred_distance([make("a", 0), make("b", 1), make("c", 2, fingerprint={"probe": "q"})]), "probe"),
        (lambda h: centred_distance([make("a", 0)], bank=[make("c", 2, fingerprint={"probe": "q"})] * 3), "probe"),
    ],
)
def test_centred_distance_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tasks())
