"""Choosing an expert: scores against their formulas written out, and Model2Vec on a case that has an answer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from embeddings import make

from t2v_fast.analysis import selection
from t2v_fast.analysis.distance import asymmetric_distance
from t2v_fast.analysis.selection import (
    Model2Vec,
    best_on_average,
    bootstrap_interval,
    chance_increase,
    compare,
    leave_one_out,
    nearest_expert,
    predict_errors,
    read_errors,
    relative_error_increase,
    without_own,
)
from t2v_fast.analysis.transferability import leep, logme
from t2v_fast.embedding import FingerprintMismatch


def plain_leep(theta: np.ndarray, labels: list) -> float:
    n, z = theta.shape
    joint = {(y, k): sum(theta[i, k] for i in range(n) if labels[i] == y) / n for y in set(labels) for k in range(z)}
    marginal = [sum(theta[i, k] for i in range(n)) / n for k in range(z)]
    return sum(math.log(sum(joint[labels[i], k] / marginal[k] * theta[i, k] for k in range(z))) for i in range(n)) / n


def test_leep() -> None:
    rng = np.random.default_rng(0)
    theta = rng.dirichlet(np.full(4, 0.3), 40)
    labels = rng.choice([3, 5, 9], 40).tolist()
    assert leep(theta, labels) == pytest.approx(plain_leep(theta, labels), rel=1e-12)
    perfect = np.eye(3)[np.arange(30) % 3]
    assert leep(perfect, np.arange(30) % 3) == pytest.approx(0, abs=1e-12)  # never better than certain
    with_unused = np.hstack([perfect, np.zeros((30, 1))])  # a class that the expert never sees
    assert leep(with_unused, np.arange(30) % 3) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="sum to one"):
        leep(2 * theta, labels)


def log_evidence(f: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log N(y; 0, F F^T / alpha + I / beta): the evidence by its definition, not by the paper's formula."""
    covariance = f @ f.T / alpha + np.eye(len(f)) / beta
    _, log_determinant = np.linalg.slogdet(covariance)
    return -(y @ np.linalg.solve(covariance, y) + log_determinant + len(y) * math.log(2 * math.pi)) / 2


@pytest.mark.parametrize("shape", [(60, 5), (20, 30)])
def test_logme_is_the_largest_evidence(shape: tuple[int, int]) -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    f = rng.standard_normal(shape)
    labels = (f[:, 0] + 0.5 * rng.standard_normal(len(f)) > 0).astype(int) + 2 * (rng.random(len(f)) < 0.2)
    want = []
    for c in np.unique(labels):
        y = (labels == c).astype(float)
        starts = [(a, b) for a in (-2.0, 2.0) for b in (0.0, 3.0)]
        best = min(
            (minimize(lambda x, y=y: -log_evidence(f, y, *np.exp(x)), s, tol=1e-12) for s in starts),
            key=lambda r: r.fun,
        )
        want.append(-best.fun / len(f))
    found = logme(f, labels, iterations=20_000, tolerance=1e-12)
    assert found == pytest.approx(np.mean(want), rel=1e-5, abs=1e-6)
    assert logme(f, labels) == pytest.approx(found, abs=1e-2)
    # Features that tell the classes apart score higher than others.
    assert logme(np.eye(4)[labels] + 0.01 * rng.standard_normal((len(f), 4)), labels) > found


def test_scores_reject_what_they_cannot_use() -> None:
    for score in (leep, logme):
        with pytest.raises(ValueError, match="expected \\[N, D\\] and \\[N\\]"):
            score(np.ones((3, 2)), [0, 1])
        with pytest.raises(ValueError, match="at least two classes"):
            score(np.full((3, 2), 0.5), [1, 1, 1])
        with pytest.raises(ValueError, match="finite"):
            score(np.full((3, 2), np.nan), [0, 1, 1])


ERRORS = np.array([[0.1, 0.2, np.nan], [0.4, 0.3, 0.2], [0.1, 0.3, 0.2], [np.nan, 0.2, 0.1]])


def test_increases_are_plain_arithmetic() -> None:
    np.testing.assert_allclose(relative_error_increase(ERRORS, [1, 0, 0, 2]), [1, 1, 0, 0])
    np.testing.assert_allclose(chance_increase(ERRORS), [0.5, 0.5, 1, 0.5])
    np.testing.assert_allclose(relative_error_increase(ERRORS, [1, 0, 0, 2], floor=0.4), [0.25, 0.5, 0, 0])
    with pytest.raises(ValueError, match="task 0: expert 2 was chosen"):
        relative_error_increase(ERRORS, [2, 0, 0, 2])
    perfect = ERRORS.copy()
    perfect[2, 0] = 0
    with pytest.raises(ValueError, match="task 2: its best expert makes no error"):
        chance_increase(perfect)
    assert chance_increase(perfect, floor=0.1)[2] == pytest.approx(5 / 3)
    for bad in (np.full((2, 2), np.nan), ERRORS[0], ERRORS + 1):
        with pytest.raises(ValueError, match=r"error|from 0 to 1"):
            chance_increase(bad)


def test_best_on_average_leaves_the_task_out() -> None:
    errors = np.array([[0.0, 0.9], [0.5, 0.4], [0.5, 0.4]])
    assert best_on_average(errors).tolist() == [1, 0, 0]  # expert 0 is best only by virtue of task 0
    assert best_on_average(ERRORS)[0] != 2  # not to be used there


def test_nearest_expert() -> None:
    distances = np.array([[1.0, 5], [2, 4], [3, 3]])  # [E, T]
    assert nearest_expert(distances).tolist() == [0, 2]
    available = np.array([[False, True, True], [True, True, False]])
    assert nearest_expert(distances, available).tolist() == [1, 1]
    with pytest.raises(ValueError, match="task 1 has no expert"):
        nearest_expert(distances, np.array([[True] * 3, [False] * 3]))


def bank(t: int = 40, e: int = 4, d: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Experts whose own tasks mislead: expert j does best on the tasks of family (j + 1) mod e."""
    rng = np.random.default_rng(seed)
    families = rng.lognormal(-16, 1, (e, d))
    family = np.arange(t) % e
    tasks = families[family] * rng.lognormal(0, 0.3, (t, d))
    experts = families * rng.lognormal(0, 0.3, (e, d))
    errors = np.full((t, e), 0.4)
    errors[np.arange(t), (family - 1) % e] = 0.1
    return experts, tasks, errors, (family - 1) % e


@pytest.mark.slow
def test_model2vec_learns_where_experts_belong() -> None:
    experts, tasks, errors, best = bank()
    assert (nearest_expert(asymmetric_distance(experts, tasks)) != best).mean() > 0.5
    model = Model2Vec(penalty=0.01, steps=150).fit(experts, tasks, errors)
    assert model.loss[-1] < 0.5 * model.loss[0]
    assert (model.vectors > 0).all()
    assert (nearest_expert(model.distances(tasks)) == best).mean() > 0.9
    held_out = bank(seed=0, t=80)
    np.testing.assert_array_equal(held_out[0].shape, experts.shape)
    chosen = leave_one_out(experts, tasks, errors, Model2Vec(penalty=0.01, steps=150))
    assert (chosen == best).mean() > 0.8


def test_model2vec_without_steps_is_the_asymmetric_distance() -> None:
    experts, tasks, errors, _ = bank()
    experts[:, 3] = tasks[:, 3] = 0
    model = Model2Vec(steps=0).fit(experts, tasks, errors)
    np.testing.assert_allclose(model.distances(tasks), asymmetric_distance(experts, tasks), rtol=1e-5)
    held = Model2Vec(penalty=1e9).fit(experts, tasks, errors)  # no step is worth it
    np.testing.assert_array_equal(held.distances(tasks), model.distances(tasks))
    # A strong penalty holds the experts where they are, a weak one does not.
    moved = [
        np.abs(np.log(Model2Vec(penalty=p).fit(experts, tasks, errors).vectors[:, 4:] / experts[:, 4:])).mean()
        for p in (1e5, 1e-3)
    ]
    assert moved[0] < 0.02 < 0.1 < moved[1]


def test_model2vec_gradient() -> None:
    """The closed form against differences of the loss."""
    experts, tasks, _, _ = bank(5, 3, 12)
    unit = experts.mean(0)
    log_m, log_t = np.log(experts / unit), np.log(tasks / unit)
    t0 = np.random.default_rng(0).uniform(0.5, 2, 12)
    g = np.random.default_rng(1).standard_normal((5, 3))

    def loss(x: np.ndarray) -> float:
        return float((g * selection._model_distances(x, log_t, t0, 0.3)[0]).sum())

    gradient = selection._model_distances(log_m, log_t, t0, 0.3)[1](g)
    for j, d in ((0, 0), (1, 7), (2, 11)):
        step = np.zeros_like(log_m)
        step[j, d] = 1e-5
        assert gradient[j, d] == pytest.approx((loss(log_m + step) - loss(log_m - step)) / 2e-5, rel=1e-3, abs=1e-6)


def test_a_tasks_own_errors_decide_nothing() -> None:
    experts, tasks, errors, _ = bank(12)
    errors += np.random.default_rng(0).uniform(0, 0.1, errors.shape)  # no ties
    chosen, average = leave_one_out(experts, tasks, errors), best_on_average(errors)
    other = errors.copy()
    other[5] = other[5][::-1]
    assert leave_one_out(experts, tasks, other)[5] == chosen[5]
    assert best_on_average(other)[5] == average[5]


@pytest.mark.slow
def test_compare() -> None:
    experts, tasks, errors, _ = bank()
    errors[0, 1] = np.nan
    found = compare(experts, tasks, errors, model=Model2Vec(penalty=0.01, steps=100))
    assert list(found) == ["chance", "best on average", "Task2Vec, symmetric", "Task2Vec, asymmetric", "Model2Vec"]
    assert found["Model2Vec"].mean() < found["chance"].mean() < found["Task2Vec, symmetric"].mean()
    assert all(values.shape == (40,) and (values >= 0).all() for values in found.values())
    rows = selection.increase_rows(found)
    assert rows[1][1] == f"{100 * found['chance'].mean():.1f} %"


def test_an_expert_is_not_tried_on_its_own_task() -> None:
    """An own error that is best or worst changes no figure, and distance zero is never the choice."""
    experts, others, _, _ = bank(6, 4)
    tasks = np.concatenate([experts, others])
    errors = np.random.default_rng(0).uniform(0.1, 0.5, (10, 4))
    blank = errors.copy()
    np.fill_diagonal(blank, np.nan)
    np.testing.assert_array_equal(without_own(errors, experts, tasks), blank)
    want = compare(experts, tasks, blank)
    for own in (0.01, 0.9):
        np.fill_diagonal(errors, own)
        for name, increase in compare(experts, tasks, errors).items():
            np.testing.assert_array_equal(increase, want[name])
    nearest = nearest_expert(asymmetric_distance(experts, tasks), ~np.isnan(blank))
    np.testing.assert_array_equal(want["Task2Vec, asymmetric"], relative_error_increase(blank, nearest))
    errors[7, 2] = 0
    with pytest.raises(ValueError, match="task 7: its best expert makes no error"):
        compare(experts, tasks, errors)
    with pytest.raises(ValueError, match="task 'h': its best expert makes no error"):
        compare(experts, tasks, errors, names="abcdefghij")
    errors[1] = np.nan
    errors[1, 1] = 0.1  # of its own expert
    with pytest.raises(ValueError, match="task 'b' has no error of any expert"):
        compare(experts, tasks, errors, names="abcdefghij", floor=0.1)
    with pytest.raises(ValueError, match=r"errors are \[4, 10\], expected \[10 tasks, 4 experts\]"):
        compare(experts, tasks, errors.T)


def test_predicted_errors_are_weighted_means() -> None:
    rng = np.random.default_rng(0)
    t, e, n = 7, 4, 3
    errors, distances = rng.uniform(0.002, 0.6, (t, e)), rng.random((t, n))
    errors[2, 1] = errors[5, 3] = np.nan
    found = predict_errors(errors, distances, bandwidth=0.3, shrinkage=0.7, floor=0.01)
    plain = predict_errors(errors, floor=0.01)[0]
    logs = []
    for row in errors:
        usable = [math.log(max(x, 0.01)) for x in row if not np.isnan(x)]
        logs.append([None if np.isnan(x) else math.log(max(x, 0.01)) - sum(usable) / len(usable) for x in row])
    for j in range(e):
        column = [row[j] for row in logs if row[j] is not None]
        assert plain[j] == pytest.approx(sum(column) / (len(column) + 1))
        for k in range(n):
            weights = [math.exp(-(distances[i, k] - min(distances[:, k])) / 0.3) for i in range(t)]
            pairs = [(w, row[j]) for w, row in zip(weights, logs, strict=True) if row[j] is not None]
            total = sum(w * x for w, x in pairs) + 0.7 * plain[j]
            assert found[k, j] == pytest.approx(total / (sum(w for w, _ in pairs) + 0.7))


def test_predicted_errors_follow_near_tasks_as_far_as_they_are_near() -> None:
    errors = np.array([[0.1, 0.4], [0.1, 0.4], [0.3, 0.2]])
    near = np.array([[0.8], [0.8], [0.1]])
    assert predict_errors(errors, near).argmin() == 1
    assert predict_errors(errors, near, bandwidth=100).argmin() == 0
    assert predict_errors(errors, near, shrinkage=100).argmin() == 0
    # An expert without an error near the task keeps its mean, also with no shrinkage at all.
    errors[2, 1] = np.nan
    errors[2, 0] = 0.2
    far = np.array([[1e3], [1e3], [0.0]])
    assert predict_errors(errors, far, shrinkage=0)[0, 1] == predict_errors(errors)[0, 1]


def test_predicted_errors_refuse_what_does_not_fit() -> None:
    errors = np.full((4, 3), 0.1)
    for distances in (np.zeros((3, 4)), np.zeros(4), np.full((4, 2), np.nan)):
        with pytest.raises(ValueError, match=r"expected finite numbers \[4, N\]"):
            predict_errors(errors, distances)
    for wrong in ({"bandwidth": 0}, {"shrinkage": -1}, {"floor": 0}):
        with pytest.raises(ValueError, match="expected a positive bandwidth"):
            predict_errors(errors, np.zeros((4, 1)), **wrong)


def test_embeddings_must_be_comparable() -> None:
    a, b = make("a", 0), make("b", 1, fingerprint={"probe": "other"})
    with pytest.raises(FingerprintMismatch):
        Model2Vec().fit([a], [b], np.array([[0.1]]))
    with pytest.raises(ValueError, match="expected \\[1 tasks, 2 experts\\]"):
        Model2Vec().fit([a, a], [a], np.array([[0.1]]))
    assert leave_one_out([a, a], [a], np.array([[0.1, 0.2]])).tolist() == [0]


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        low, high = bootstrap_interval(rng.exponential(1, 60), resamples=500, seed=k)
        hits += low <= 1 <= high
    assert 170 <= hits <= 199


def test_read_errors(tmp_path: Path) -> None:
    path = tmp_path / "errors.csv"
    path.write_text("task,x,y\na,0.1,\nb,0.3,0.2\n\n")
    tasks, experts, errors = read_errors(path)
    assert (tasks, experts) == (["a", "b"], ["x", "y"])
    np.testing.assert_array_equal(errors, [[0.1, np.nan], [0.3, 0.2]])
    path.write_text("task,x,y\na,0.1,\nb,,\n")  # b is a task to choose for
    np.testing.assert_array_equal(read_errors(path)[2], [[0.1, np.nan], [np.nan, np.nan]])
    for text, message in (
        ("task,x\n", "has no errors"),
        ("task,x\na,0.1,0.2\n", "row of 'a' has 2 errors, expected 1"),
        ("task,x\na,low\n", "could not convert"),
        ("task,x,x\na,0.1,0.2\n", "two experts are called 'x'"),
        ("task,x\na,0.1\na,0.1\n", "two tasks are called 'a'"),
        ("task,x\na,\nb, \n", "all fields of its 2 tasks are empty"),
        ("task,x\na,7\n", "errors.csv: errors must be from 0 to 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_errors(path)
