"""The study of choosing an expert: its statistics on plain cases, and all of it, small, on scanned digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import small_probe

from t2v_fast import Embedding, Task2Vec
from t2v_fast.analysis.distance import centred_distance
from t2v_fast.analysis.feature_scores import SCORES, linear_probe
from t2v_fast.analysis.transferability import leep


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch):
    from bench.studies import selection_ways

    return selection_ways


@pytest.fixture
def tasks() -> list:
    """Ten tasks in three families, of which each has one expert."""
    from bench.studies.meta_task import scanned_tasks

    found = scanned_tasks()
    for k, task in enumerate(found):
        object.__setattr__(task, "family", ("a", "b", "c")[k % 3])
    return found


def table(errors: list, families: str) -> SimpleNamespace:
    errors = np.array(errors, float)
    return SimpleNamespace(errors=errors, families=np.array(list(families)), candidates=~np.isnan(errors))


def test_judge_on_plain_orders(ways) -> None:
    results = table([[0.1, 0.2, 0.4, 0.8], [0.5, 0.1, np.nan, 0.3]], "ab")
    judge = ways.Judge(results)
    right = ways.masked(results, -np.nan_to_num(results.errors))
    found = judge.quality(right)
    assert [found[key].tolist() for key in ("increase", "tau", "top-1", "top-3", "best of 3")] == [
        [0, 0],
        pytest.approx([1, 1]),
        [1, 1],
        [1, 1],
        [0, 0],
    ]
    worst = judge.quality(ways.masked(results, np.nan_to_num(results.errors)))
    assert worst["tau"] == pytest.approx([-1, -1])
    assert worst["increase"] == pytest.approx([7, 4])
    assert worst["regret"] == pytest.approx([0.7, 0.4])
    assert worst["best of 3"] == pytest.approx([1, 0])
    # Equal scores are a draw by lot, never the first expert of the list.
    tied = judge.quality(ways.masked(results, np.zeros((2, 4))))
    assert tied["increase"] == pytest.approx(judge.chance())
    assert tied["top-1"] == pytest.approx([1 / 4, 1 / 3])
    # An error below the floor counts as the floor.
    assert ways.Judge(table([[0.0, 0.02]], "a")).increase(np.array([[0.0, 1.0]])) == pytest.approx([2.0])


def test_bootstrap_draws_whole_families(ways) -> None:
    families = np.array(list("aaabbc"))
    draws = ways.family_draws(families, 500)
    assert draws.sum(1) == pytest.approx(np.ones(500))
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    assert (draws[:, 5] == 0).any()
    low, high = ways.interval(np.array([0.0, 0, 0, 1, 1, 1]), draws)
    assert low == 0
    assert high == 1


def test_cross_fitting_never_judges_where_it_chose(ways) -> None:
    families = np.array(list("aabbccdd"))
    half = ways.alternate_halves(families)
    assert half.tolist() == [False, False, True, True, False, False, True, True]
    free, dear = np.zeros(8), np.ones(8)
    scores = np.zeros((8, 2))
    three = [
        ways.Way("one", "score", scores, free),
        ways.Way("two", "score", scores, free),
        ways.Way("best", "score", scores, dear),
    ]
    increases = np.array([np.where(half, 5.0, 1.0), np.where(half, 2.0, 3.0), np.zeros(8)])
    fit = ways.cross_fit(three, increases, families, half, 0.5)
    # On the first half "one" is better, and is judged on the second; and the other way round.
    assert fit.chosen == ["one", "two"]
    assert fit.increase.tolist() == np.where(half, 5.0, 3.0).tolist()
    assert fit.cost == 0
    assert ways.cross_fit(three, increases, families, half, 1.0).chosen == ["best", "best"]
    for other in ways.random_halves(families, 5):
        assert all(len(set(other[families == family])) == 1 for family in "abcd")
        assert other.sum() == 4


def test_what_is_learned_never_sees_the_family(ways) -> None:
    rng = np.random.default_rng(0)
    families = np.repeat(list("abcd"), 6)
    errors = np.exp(rng.normal(-2, 0.3, (24, 4)) + np.array([0, 0.5, 1, 1.5])).clip(0, 1)
    errors[families[:, None] == np.array(list("abcd"))] = np.nan
    results = SimpleNamespace(errors=errors, families=families, candidates=~np.isnan(errors), names=[""] * 24)
    distance = rng.random((24, 24))

    def learned() -> list[np.ndarray]:
        return [ways.average_accuracy(results), ways.near_accuracy(results, distance, 0.1)]

    before, mine = learned(), families == "a"
    for table in before:
        assert (np.diff(table.mean(0)) < 0).all()  # the experts' order is found
    errors[mine] = errors[mine][:, [0, 3, 2, 1]]
    for a, b in zip(before, learned(), strict=True):
        np.testing.assert_array_equal(a[mine], b[mine])
        assert np.abs(a[~mine] - b[~mine]).max() > 1e-3


def test_shortlists(ways) -> None:
    first = np.array([[4.0, 3, 2, 1, -np.inf]])
    inside = ways.shortlist(first, 2)
    assert inside.tolist() == [[True, True, False, False, False]]
    assert ways.shortlist(first, 9).tolist() == [[True] * 4 + [False]]
    second = np.where(inside, np.array([[0.1, 0.9, 5, 5, 5]]), -np.inf)
    combined = ways.then(first, second)
    assert np.argsort(-combined[0]).tolist() == [1, 0, 2, 3, 4]
    assert combined[0, 4] == -np.inf


def test_costs_follow_prices(ways) -> None:
    settings = SimpleNamespace(images=60)
    errors = np.array([[0.1, 0.2, 0.3], [0.3, 0.1, np.nan]])
    results = table(errors, "ab")
    results.classes, results.prices, results.probe_price = np.array([2, 2]), np.array([1.0, 3.0, 6.0]), 2.0
    first = np.array([[True, True, False], [False, True, False]])
    assert ways.price_share(results, first).tolist() == [4 / 10, 3 / 4]
    # Half of the images, five passes of the probe for each, against one pass of all candidates over all images.
    assert ways.embedding_share(results, settings, 30, 5.0) == pytest.approx([0.5 * 5 * 2 / 10, 0.5 * 5 * 2 / 4])


def test_weighted_distances_have_the_centred_one_as_equal_weights() -> None:
    from bench.studies import selection_layers

    rng = np.random.default_rng(0)
    layers = [("a.weight", 0, 30), ("b.weight", 30, 50), ("c.weight", 50, 90)]
    bank = []
    for _ in range(6):
        values = rng.gamma(2.0, size=90)
        bank.append(Embedding(values, np.ones(90), layers, 10, standard_error=0.1 * values))
    noisy = [replace(e, standard_error=np.concatenate([e.standard_error[:50], 50 * e.hessian[50:]])) for e in bank]
    tables = selection_layers.distances(bank)
    np.testing.assert_allclose(tables[selection_layers.CENTRED], centred_distance(bank), atol=1e-9)
    for name, found in tables.items():
        np.testing.assert_allclose(found, found.T, atol=1e-9, err_msg=name)
    # A layer that is all noise does not count, and what is said about the others stays.
    weighted = selection_layers.distances(noisy)["layers by mean reliability"]
    parts = [Embedding(e.hessian[:50], np.ones(50), layers[:2], 10, standard_error=e.standard_error[:50]) for e in bank]
    expected = selection_layers.distances(parts)["layers by mean reliability"]
    np.testing.assert_allclose(weighted, expected, atol=1e-9)


def test_packaged_networks_are_measured_once(tasks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import selection_data, selection_packaged

    networks = ("small", "other")
    monkeypatch.setattr(selection_packaged, "sized_probe", lambda name, size: small_probe(networks.index(name), size))
    monkeypatch.setattr(selection_packaged, "NETWORKS", networks)
    monkeypatch.setattr(selection_packaged, "SIZES", (8, 12))
    candidates = [(name, size) for name in networks for size in (8, 12)]
    monkeypatch.setattr(selection_packaged, "CANDIDATES", candidates)
    settings = selection_data.Settings(images=120, draws=1, test_images=60, counts=(60, 120), embedded=(40,), size=12)
    store = selection_packaged.PackagedStore(tmp_path, settings, tasks)
    results = selection_packaged.fill(store)
    assert results.errors.shape == (10, 4)
    assert results.candidates.all()
    assert results.prices[1] > 1.5 * results.prices[0]  # 12 pixels against 8
    assert results.probe_price == results.prices[1]
    # One cell from scratch.
    task, probe = tasks[3], small_probe(1, 8)
    train = store.train(task)
    features = probe.features(torch.stack([probe.preprocessing(image) for image in train.images]))
    own = probe.network[-1](features).softmax(1).detach().numpy()
    np.testing.assert_allclose(results.scores["leep", 120][3, 2], leep(own, train.labels), rtol=1e-4)
    likelihood = linear_probe(features.numpy(), train.labels)
    np.testing.assert_allclose(results.scores["linear_probe", 120][3, 2], likelihood, rtol=1e-3)
    text = selection_packaged.report(results, settings)
    for part in ("10 tasks in 3 families; 4 candidates, which are 2 networks at 2 sizes", "chance", "leep on 120",
                 "errors on near tasks, centred within 0.1, then 4 by linear_probe on 120", "other at 12"):  # fmt: skip
        assert part in text
    # What is there is used again.
    monkeypatch.setattr(selection_packaged, "features_of", lambda *a: pytest.fail("measured again"))
    np.testing.assert_array_equal(selection_packaged.fill(store).errors, results.errors)


def test_families_held_out_of_the_design(tasks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import selection_data, selection_held_out

    new = [replace(task, name=f"new {task.name}", family=f"new {task.family}") for task in tasks[:6]]
    monkeypatch.setattr(selection_held_out, "new_tasks", lambda: new)
    settings = selection_data.Settings(
        images=120, draws=1, test_images=60, expert_images=100, epochs=1, counts=(120,), embedded=(40,)
    )
    store = selection_data.Store(tmp_path, settings, tasks)
    results, ways = selection_held_out.ways_of(store, Task2Vec(small_probe()))
    assert results.errors.shape == (6, 3)
    assert results.candidates.all()
    assert [way.name for way in ways][2] == selection_held_out.RECOMMENDED
    # The static order is the same for all new tasks, and is learned from the earlier ones alone.
    static = ways[0].scores
    assert (static == static[0]).all()
    text = selection_held_out.report(results, ways)
    assert "6 tasks in 3 families, 3 experts, all of them candidates" in text
    assert "(recommended)" in text


@pytest.mark.slow
def test_study_and_resume(ways, tasks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import selection, selection_data

    settings = selection_data.Settings(
        images=60, draws=2, test_images=60, expert_images=200, epochs=2, counts=(20, 60), embedded=(20, 40)
    )
    monkeypatch.setattr(selection, "RIVAL", "leep on 60")
    monkeypatch.setattr(
        selection, "RECOMMENDED", "errors on near tasks, centred within 0.1, then 2 by linear_probe on 60"
    )
    monkeypatch.setattr(ways, "LENGTHS", (1, 2))
    task2vec = Task2Vec(small_probe())
    store = selection_data.Store(tmp_path, settings, tasks)
    results = selection_data.fill(store, task2vec)
    assert results.errors.shape == (10, 3)
    np.testing.assert_array_equal(results.candidates.sum(1), 2)  # not the expert of one's own family
    assert results.every_error.shape == (2, 10, 3)
    np.testing.assert_allclose(np.nanmin(results.errors, 1) <= 1, True)
    for score in SCORES:
        assert np.isfinite(results.scores[score, 60]).all()
    np.testing.assert_allclose(results.likelihoods[0][60].mean(1), results.scores["linear_probe", 60][0])
    study = selection.Study(results, settings, resamples=50)
    everything = study.by_name["linear_probe on 60"]
    assert everything.cost == pytest.approx(np.ones(10))
    whole_race = study.by_name["race of all, budget 1"]
    assert (whole_race.cost <= 1 + 1e-9).all()
    assert study.by_name["centred, 20 images"].cost.mean() < study.by_name["centred, 40 images"].cost.mean()
    text = selection.report(study)
    for part in ("chance", "largest network", "centred, 40 images", "The claim", "3 experts", "10 tasks in 3 families"):
        assert part in text
    study.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000

    # What is there is used again, and only what is missing is made.
    made = []
    monkeypatch.setattr(selection_data, "train_expert", lambda *a: made.append("expert"))
    real = selection_data.head_error
    monkeypatch.setattr(selection_data, "head_error", lambda *a: (made.append("error"), real(*a))[1])
    np.testing.assert_array_equal(selection_data.fill(store, task2vec).every_error, results.every_error)
    assert made == []
    store.path("rows", "optical digits", "safetensors").unlink()
    np.testing.assert_array_equal(selection_data.fill(store, task2vec).every_error, results.every_error)
    assert made == ["error"] * 6
    with pytest.raises(ValueError, match="pass another --output"):
        selection_data.Store(tmp_path, selection_data.Settings(), tasks)
