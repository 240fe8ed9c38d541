"""Every score against a plain version of its formula, and what a user may rely on for all of them."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture

from t2v_fast.analysis import feature_scores
from t2v_fast.analysis.feature_scores import SCORES, score_networks


def problem(images=60, classes=4, dimension=10, spread=1.5, seed=0):
    """Features [N, D] around class means, with classes of unequal size, in mixed order."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes).repeat(4), rng.integers(0, classes, images - 4 * classes)]
    labels = labels[rng.permutation(images)]
    means = spread * rng.normal(size=(classes, dimension))
    shape = np.eye(dimension) + rng.normal(size=(dimension, dimension)) / (3 * np.sqrt(dimension))
    return means[labels] + rng.normal(size=(images, dimension)) @ shape, labels


def inputs_of(name, features):
    return softmax(features, 1) if SCORES[name].inputs == "probabilities" else features


def plain_h_score(f, y):
    model = LedoitWolf().fit(f)
    means = np.array([f[y == y_n].mean(0) for y_n in y])
    return (1 - model.shrinkage_) * np.trace(np.linalg.inv(model.covariance_) @ np.cov(means.T, bias=True))


def plain_n_leep(f, y):
    reduced = PCA(0.8, svd_solver="full").fit_transform(f)
    clusters = min(5 * len(set(y)), len(f) // 2)
    theta = GaussianMixture(clusters, reg_covar=1e-6 * reduced.var(0).mean(), random_state=0).fit(reduced)
    theta = theta.predict_proba(reduced)
    total = 0
    for n in range(len(y)):
        predicted = 0
        for z in range(clusters):
            joint = sum(theta[m, z] for m in range(len(y)) if y[m] == y[n]) / len(y)
            predicted += theta[n, z] * joint / (theta[:, z].sum() / len(y))
        total += np.log(predicted)
    return total / len(y)


def plain_gbc(f, y):
    reduced = PCA(min(64, *f.shape), svd_solver="full").fit_transform(f)
    d, total = reduced.shape[1], 0.0
    for a in set(y):
        for b in set(y) - {a}:
            covariances = [reduced[y == c].var(0).mean() * np.eye(d) for c in (a, b)]
            both = sum(covariances) / 2
            apart = reduced[y == a].mean(0) - reduced[y == b].mean(0)
            logs = [np.linalg.slogdet(c)[1] for c in (both, *covariances)]
            distance = apart @ np.linalg.inv(both) @ apart / 8 + (logs[0] - (logs[1] + logs[2]) / 2) / 2
            total -= np.exp(-distance)
    return total


def plain_transrate(f, y):
    f = f - f.mean(0)
    f = f / np.sqrt(np.trace(f.T @ f) / len(f))

    def rate(z):
        return np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / (len(z) * 1e-4))[1] / 2

    return rate(f) - sum((y == c).mean() * rate(f[y == c]) for c in set(y))


def covariance_within(f, y):
    return sum((y == c).mean() * np.cov(f[y == c].T, bias=True) for c in set(y))


def plain_shrinkage(f, y):
    return max(np.exp(-5 * np.linalg.eigvalsh(covariance_within(f, y)).max()), 1e-10)


def plain_discriminant(f, y, shrinkage):
    """Log probabilities [N, C]: the log density of each class's Gaussian and the log of its share, normalised."""
    within, d = covariance_within(f, y), f.shape[1]
    inverse = np.linalg.inv((1 - shrinkage) * within + shrinkage * np.trace(within) / d * np.eye(d))
    logits = np.empty((len(f), len(set(y))))
    for c in range(logits.shape[1]):
        apart = f - f[y == c].mean(0)
        logits[:, c] = np.log((y == c).mean()) - np.einsum("ni,ij,nj->n", apart, inverse, apart) / 2
    return log_softmax(logits, 1)


def plain_sfda(f, y):
    shrinkage = plain_shrinkage(f, y)
    first = np.exp(plain_discriminant(f, y, shrinkage))
    moved = np.empty_like(f)
    for n in range(len(f)):
        sure = softmax(first[n])[y[n]]
        moved[n] = sure * f[n] + (1 - sure) * f[y != y[n]].mean(0)
    return plain_discriminant(moved, y, shrinkage)[np.arange(len(y)), y].mean()


def plain_ped(f, y):
    scale = f.std(0)
    f, motions = f / scale, []
    while len(motions) < 6:
        motion = np.zeros((len(set(y)), f.shape[1]))
        for a in set(y):
            for b in set(y) - {a}:
                apart = f[y == a].mean(0) - f[y == b].mean(0)
                radii = [0.6 * np.sqrt(np.trace(np.cov(f[y == c].T, bias=True))) for c in (a, b)]
                overlap = max(sum(radii) - np.linalg.norm(apart), 0)
                motion[a] += apart / np.linalg.norm(apart) * overlap / 2  # half the squared unit step times the force
        motions.append(np.abs(motion).sum())
        if motions[-1] <= 0.5 * motions[0]:
            break
        f = f + motion[y]
    assert motions[0] > 0  # the test would say nothing about motion otherwise
    return plain_sfda(f * scale, y)


def plain_ncti(f, y):
    reduced = PCA(min(64, f.shape[1]), svd_solver="full").fit_transform(f)
    shrinkage = np.exp(-np.sum(np.var(reduced, axis=0, ddof=1)[:32]))
    solver = {"solver": "eigen", "shrinkage": shrinkage} if shrinkage > 1e-10 else {"solver": "svd"}
    model = LinearDiscriminantAnalysis(**solver).fit(reduced, y)
    projected, probabilities = model.transform(reduced), model.predict_proba(reduced)
    nuclear = sum(np.linalg.svd(probabilities[y == c], compute_uv=False).sum() for c in set(y))
    span = np.linalg.svd(projected - projected.mean(0), compute_uv=False).sum()
    return span, np.mean([p[c] for p, c in zip(probabilities, y, strict=True)]), -np.log(nuclear)


def plain_etran(f, y):
    probabilities = np.exp(plain_discriminant(f, y, plain_shrinkage(f, y)))
    return np.log(np.exp(f).sum(1)).mean(), probabilities[np.arange(len(y)), y].mean()


def plain_knn(f, y):
    right = 0
    for n in range(len(f)):
        cosines = [f[n] @ f[m] / np.linalg.norm(f[n]) / np.linalg.norm(f[m]) for m in range(len(f))]
        nearest = sorted((m for m in range(len(f)) if m != n), key=lambda m, c=cosines: -c[m])[:5]
        votes = {c: (sum(y[nearest] == c), sum(cosines[m] for m in nearest if y[m] == c)) for c in set(y)}
        right += max(votes, key=votes.get) == y[n]
    return right / len(f)


PLAIN = {
    "n_leep": plain_n_leep,
    "h_score": plain_h_score,
    "gbc": plain_gbc,
    "transrate": plain_transrate,
    "sfda": plain_sfda,
    "ped": plain_ped,
    "ncti": plain_ncti,
    "etran": plain_etran,
    "knn": plain_knn,
}


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_plain_formula(name, scale):
    """The scale decides how strongly sfda, ped, ncti and etran regularise."""
    for seed in range(3):
        f, y = problem(seed=seed, spread=(0.3, 0.6, 1.0)[seed])
        expected = PLAIN[name](scale * f, y)
        np.testing.assert_allclose(SCORES[name].function(scale * f, y), expected, rtol=1e-7, atol=1e-12)


def test_a_sure_discriminant_keeps_its_digits():
    """The loss of a sure class is tiny, and not a difference of ones: the sum in long double is the truth."""
    f, y = problem(images=120, classes=4, dimension=20, spread=1.5)
    found = feature_scores._discriminant(f, y, 1e-3)[0][np.arange(len(y)), y]
    logits = plain_discriminant(f, y, 1e-3).astype(np.longdouble)
    logits -= logits.max(1, keepdims=True)
    exact = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(y)), y]
    some = (exact < -1e-17) & (exact > -1e-10)
    assert some.sum() >= 5
    np.testing.assert_allclose(found[some], exact[some].astype(float), rtol=0.02)
    assert (found < 0).all()


def test_sfda_and_ped_saturate_with_fewer_images_than_features():
    """Both then see perfectly separated classes, whatever the features are: their likelihoods are one."""
    networks = [
        problem(images=60, dimension=200, spread=spread, seed=seed)[0] for seed, spread in enumerate((0.2, 1.0))
    ]
    y = problem(images=60)[1]
    for name in ("sfda", "ped"):
        assert [float(PLAIN[name](f, y)) for f in networks] == pytest.approx([0, 0], abs=1e-12)
        with pytest.warns(UserWarning, match=f"{name} gives 2 of 2 networks the same highest score, .*linear_probe"):
            assert score_networks(networks, y, name) == pytest.approx([0, 0], abs=1e-12)


def test_linear_probe_is_the_held_out_likelihood_of_the_penalised_fit(monkeypatch):
    f, y = problem(images=40, classes=3, dimension=4)
    train, test = np.arange(40)[::2], np.arange(40)[1::2]

    class Halves:
        def __init__(self, *args, **kwargs):
            pass

        def split(self, *data):
            return [(train, test), (test, train)]

    monkeypatch.setattr("sklearn.model_selection.StratifiedKFold", Halves)
    logs = np.empty(40)
    for fit_on, judge in ((train, test), (test, train)):
        mean, scale = f[fit_on].mean(0), f[fit_on].std(0) + 1e-3
        x = (f - mean) / scale

        def loss(theta, x=x, rows=fit_on):
            w, b = theta[:12].reshape(4, 3), theta[12:]
            return -log_softmax(x[rows] @ w + b, 1)[np.arange(len(rows)), y[rows]].mean() + 5e-3 * np.square(w).sum()

        theta = minimize(loss, np.zeros(15), options={"gtol": 1e-9}).x
        predicted = log_softmax(x[judge] @ theta[:12].reshape(4, 3) + theta[12:], 1)
        logs[judge] = predicted[np.arange(len(judge)), y[judge]]
    assert feature_scores.linear_probe(f, y) == pytest.approx(logs.mean(), abs=2e-4)  # sklearn stops at 1e-4


@pytest.mark.parametrize("name", SCORES)
def test_better_features_score_higher(name):
    """Ten problems, each with features that know nothing of the classes and features that tell them apart."""
    for seed in range(10):
        networks = [inputs_of(name, problem(images=80, spread=s, seed=seed)[0]) for s in (0.0, 0.5, 2.0)]
        scores = score_networks(networks, problem(images=80, seed=seed)[1], name)
        assert scores[0] < scores[2], (seed, scores)


@pytest.mark.parametrize("name", SCORES)
def test_names_of_classes_and_order_of_images_do_not_matter(name):
    f, y = problem()
    f = inputs_of(name, f)
    order = np.random.default_rng(1).permutation(len(f))
    names = np.array(["d", "a", "c", "b"])[y]
    expected = SCORES[name].function(f, y)
    if name not in ("n_leep", "linear_probe"):  # a random start and random folds follow the order of the images
        np.testing.assert_allclose(SCORES[name].function(f[order], y[order]), expected, rtol=1e-6)
    if name != "linear_probe":  # folds follow the classes' order
        np.testing.assert_allclose(SCORES[name].function(f, names), expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["constant", "one image of a class", "fewer images than features", "twins", "tiny"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:Number of distinct clusters", "ignore:Only one sample")
def test_degenerate_features_give_finite_scores_or_an_error(name, case):
    f, y = problem(images=24, classes=3, dimension=6)
    if case == "constant":
        f = np.ones_like(f)
    elif case == "one image of a class":
        y = np.where(np.arange(len(y)) == 3, 9, y)
    elif case == "fewer images than features":
        f = np.random.default_rng(0).normal(size=(24, 100))
    elif case == "twins":
        f = np.eye(3)[y]  # no spread within a class
    else:
        f = 1e-8 * f
    if name in ("n_leep", "gbc", "ncti") and case == "constant":
        with pytest.raises(ValueError, match="the network does not tell these images apart"):
            SCORES[name].function(f, y)
    elif name == "linear_probe" and case == "one image of a class":
        with pytest.raises(ValueError, match="a class has one image"):
            SCORES[name].function(f, y)
    else:
        assert np.isfinite(SCORES[name].function(inputs_of(name, f), y)).all()


@pytest.mark.parametrize("name", SCORES)
def test_wrong_inputs_are_refused(name):
    f, y = problem()
    function = SCORES[name].function
    with pytest.raises(ValueError, match="finite"):
        function(np.where(f == f[0, 0], np.nan, f), y)
    with pytest.raises(ValueError, match="at least two classes"):
        function(inputs_of(name, f), np.zeros(len(f)))
    with pytest.raises(ValueError, match="expected \\[N, D\\] and \\[N\\]"):
        function(f, y[1:])


def test_the_inputs_are_not_changed():
    f, y = problem()
    before = f.copy()
    for name, score in SCORES.items():
        score.function(inputs_of(name, f), y)
    np.testing.assert_array_equal(f, before)


def test_terms_are_scaled_over_the_networks():
    networks = [problem(spread=spread)[0] for spread in (0.5, 1.0, 3.0)]
    labels = problem()[1]
    terms = np.array([feature_scores.etran_terms(f, labels) for f in networks])
    scaled = (terms - terms.min(0)) / (terms.max(0) - terms.min(0))
    np.testing.assert_allclose(score_networks(networks, labels, "etran"), 0.15 * scaled[:, 0] + 0.85 * scaled[:, 1])
    assert score_networks(networks[:1], labels, "etran").tolist() == [0]


def test_reference_features_of_ped():
    f, y = problem(spread=0.5)
    assert feature_scores.ped(f, y, reference=f) == pytest.approx(feature_scores.ped(f, y))
    assert feature_scores.ped(f, y, reference=10 * f[:, ::-1]) != pytest.approx(feature_scores.ped(f, y))
    with pytest.raises(ValueError, match="expected finite features \\[R, 10\\]"):
        feature_scores.ped(f, y, reference=f[:, 1:])


def test_an_unknown_score_and_no_network_are_refused():
    f, y = problem()
    with pytest.raises(ValueError, match="expected one of leep, n_leep"):
        score_networks([f], y, "nosuch")
    with pytest.raises(ValueError, match="no network"):
        score_networks([], y, "knn")
