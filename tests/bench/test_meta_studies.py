"""The claims and the baseline run, small, on scanned digits: no font, no pretrained probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_probe

from t2v_fast import Embedding, Task2Vec
from t2v_fast.analysis.distance import centred_distance, pdist

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = ["MNIST first half", "optical parity", "optical digits"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    from bench.studies import meta_store

    return meta_store


@pytest.fixture
def tasks(bench) -> list:
    from bench.studies.meta_task import scanned_tasks

    return scanned_tasks()[:8]


@pytest.fixture
def settings(bench):
    return bench.Settings(images=60, embedded_images=40, test_images=60, expert_images=200, epochs=2)


def test_tasks(tasks: list) -> None:
    from bench.studies.meta_task import EXPERT, TEST, TRAIN, _scans

    for task in tasks:
        drawn = [task.draw(60, split) for split in (TRAIN, TEST, EXPERT)]
        for d in drawn:
            counts = np.bincount(d.labels, minlength=len(d.classes))
            assert counts.max() - counts.min() <= 1
            assert d.images.shape == (60, 64, 64)
        assert len({d.digest for d in drawn}) == 3
        assert task.draw(60, TRAIN).digest == drawn[0].digest != task.draw(60, TRAIN, seed=1).digest
    digits = _scans("MNIST")[1]
    # Two to each class of each split even for the rarest digit.
    assert min(np.bincount(digits[np.arange(len(digits)) % 3 == split]).min() for split in range(3)) >= 2


@pytest.mark.slow
def test_experiment_and_resume(bench, tasks, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task2vec = Task2Vec(small_probe())
    store = bench.Store(tmp_path, settings, tasks, EXPERTS)
    results = bench.fill(store, task2vec)
    assert results.errors.shape == (8, 3)
    assert np.isnan(results.errors).sum() == 3
    assert np.isnan(results.errors[results.names.index("optical parity"), 1])
    # A digit expert does better than chance on digits, and its error is that of a plain count.
    assert np.nanmin(results.errors[results.names.index("MNIST first half")]) < 0.6
    # What is there is used again, and only what is missing is made.
    made = []
    monkeypatch.setattr(bench, "train_expert", lambda *a: made.append("expert"))
    real = bench.test_error
    monkeypatch.setattr(bench, "test_error", lambda *a: (made.append("error"), real(*a))[1])
    again = bench.fill(bench.Store(tmp_path, settings, tasks, EXPERTS), task2vec)
    assert made == []
    np.testing.assert_array_equal(again.errors, results.errors)
    (tmp_path / "rows" / "optical-digits.json").unlink()
    np.testing.assert_array_equal(bench.fill(store, task2vec).errors, results.errors)
    assert made == ["error"] * 3
    # Other settings or images never mix with what is there.
    with pytest.raises(ValueError, match="pass another --output"):
        bench.Store(tmp_path, bench.Settings(), tasks, EXPERTS)
    path = tmp_path / "rows" / "MNIST-digits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "other"}))
    with pytest.raises(ValueError, match="is of other images"):
        bench.fill(store, task2vec)
    with pytest.raises(ValueError, match="no task 'nothing' for an expert"):
        bench.Store(tmp_path, settings, tasks, ["nothing"])


def test_replace_section(tmp_path: Path) -> None:
    from bench.pages import replace_section

    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    replace_section(page, "a", "one")
    replace_section(page, "b", "two")
    replace_section(page, "a", "three\n\nlines")
    assert page.read_text() == "# Title\n\n<!-- a -->\nthree\n\nlines\n<!-- /a -->\n\n<!-- b -->\ntwo\n<!-- /b -->\n"


@pytest.mark.slow
def test_claims(bench, tasks, settings, tmp_path: Path) -> None:
    from bench.studies import claims

    store, task2vec = bench.Store(tmp_path, settings, tasks, EXPERTS), Task2Vec(small_probe())
    bench.fill(store, task2vec)
    for task in tasks[4:]:  # a second family, or nothing is to be told apart
        object.__setattr__(task, "family", "other")
    text = dict(claims.measure(store, task2vec, ["MNIST digits"], ["MNIST parity"], (20, 40)))
    assert len(text) == 4
    assert "MNIST digits | exact | 0.0e+00 | 0.0e+00" in text["Labels' names"]
    assert text["Size of the data set"].count("MNIST parity |") >= 2
    assert "of 8" in text["Distance follows the taxonomy"]


def test_claims_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import claims

    families = ["a", "a", "b", "c"]
    tree = claims.taxonomic(families, ["x", "x", "x", "y"])
    assert tree.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 2, 0, 3], [3, 3, 3, 0]]
    rng = np.random.default_rng(0)
    groups = np.arange(30) % 4
    d = rng.random((30, 30)).round(1)  # with ties
    d = np.triu(d, 1) + np.triu(d, 1).T + (groups[:, None] != groups)
    d *= rng.random((30, 30)).round(1) < 0.8
    d = np.maximum(d, d.T)
    pairs = [(d[i, j], groups[i] == groups[j]) for i in range(30) for j in range(i)]
    inside, outside = [v for v, same in pairs if same], [v for v, same in pairs if not same]
    want = np.mean([(a < b) + (a == b) / 2 for a in inside for b in outside])
    assert claims.auc(d, groups) == pytest.approx(want)
    exact = np.array([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert claims.nearest_in_family(exact, np.array(["a", "a", "b"])).tolist() == [True, True, False]
    low, high = claims.interval_over_tasks(lambda k: float(groups[k].mean()), 30)
    assert low < groups.mean() < high


@pytest.mark.slow
def test_baseline(bench, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import baseline

    settings = bench.Settings(images=40, embedded_images=30)
    families = ["a", "b", "c", "d"]
    for k, task in enumerate(tasks):
        object.__setattr__(task, "family", families[k // 2])
    monkeypatch.setattr(baseline, "HEADS", {k: baseline.HEADS[k] for k in ("weight decay 1e-4", "cross-validated")})
    measured = baseline.measure(tmp_path, settings, tasks, small_probe())
    assert measured.mean_features.shape == (8, 8)
    assert [a.shape for a in measured.activations] == [(8, 6), (8, 6), (8, 8)]
    # The means of activations are those of a plain loop over the images.
    probe, images = small_probe(), tasks[3].draw(40, 0).images[:30]
    with torch.no_grad():
        want = np.mean([probe.network[:1](probe.preprocessing(i)[None]).mean((2, 3))[0].numpy() for i in images], 0)
    np.testing.assert_allclose(measured.activations[0][3], want, rtol=1e-5)
    text = baseline.report(measured, resamples=20)
    for way in (baseline.BASELINE, "(the default)", "**chosen: ", "robust Fisher", "weighted by reliability"):
        assert way in text
    assert "8 tasks in 4 families; 4 tasks for the choice" in text
    # Its default's AUC on all tasks, as claims.py measures it.
    all_of = pdist(measured.embeddings["weight decay 1e-4"])
    (line,) = [line for line in text.splitlines() if "(the default)" in line]
    assert f" | {baseline.auc(all_of, measured.families):.3f} (" in line
    drawn = [baseline.Drawn(task.draw(40, 0)) for task in tasks]
    assert drawn[2].draw(40, 0).digest == tasks[2].draw(40, 0).digest
    with pytest.raises(ValueError, match="has 40 images, not 50"):
        drawn[2].draw(50, 0)
    other = baseline.confirm(measured, resamples=20)
    assert "The demo's 8 tasks in 4 families" in other
    (line,) = [line for line in other.splitlines() if "(the default)" in line]
    assert f"| {baseline.auc(all_of, measured.families):.3f} (" in line
    # What is there is used again.
    monkeypatch.setattr(baseline, "mean_activations", None)
    monkeypatch.setattr(Task2Vec, "embed", None)
    again = baseline.measure(tmp_path, settings, tasks, small_probe())
    assert again.embeddings.keys() == measured.embeddings.keys()
    for name, found in again.embeddings.items():
        for one, other in zip(found, measured.embeddings[name], strict=True):
            np.testing.assert_array_equal(one.hessian, other.hessian)
    for one, other in zip(again.activations, measured.activations, strict=True):
        np.testing.assert_array_equal(one, other)


def test_baseline_statistics(bench) -> None:
    from bench.studies import baseline

    families = np.array(list("aabbcc"))
    apart = (families[:, None] != families).astype(float)
    worse = apart.copy()
    worse[0, 1] = worse[1, 0] = 2
    judge = baseline.Judge(families, np.arange(6))
    assert judge.auc(apart) == 1
    assert judge.hits(worse).tolist() == [0, 0, 1, 1, 1, 1]
    assert judge.hits_cell(worse, apart).startswith("-0.333 (")
    assert judge.auc_cell(apart, apart) == "+0.000 (+0.000 to +0.000)"
    assert baseline.Judge(families, np.arange(2, 6)).auc(worse) == 1
    # The first within reach of the best.
    assert baseline.choose({("h", "x"): worse, ("h", "y"): apart, ("h", "z"): apart}, judge) == ("h", "y")
    assert baseline.choose({("h", "x"): worse, ("h", "y"): apart}, judge, within=0.5) == ("h", "x")
    some = baseline.choice_families([f"{k}" for k in range(9)] * 2)
    assert len(some) == 5
    # The noise-aware distances are the centred one where there is no noise, and leave out what is only noise.
    rng = np.random.default_rng(0)

    def embeddings(noisy: float) -> list:
        h = np.random.default_rng(1).lognormal(-9, 1, (6, 12))
        error = np.zeros_like(h)
        error[:, 3] = noisy * h[:, 3]
        layers = (("conv.weight", 0, 8), ("bn.weight", 8, 12))
        return [
            Embedding(hessian=v, scale=np.ones(12), standard_error=e, layers=layers, num_examples=9)
            for v, e in zip(h, error, strict=True)
        ]

    for distance in (baseline.noise_aware, baseline.shrunk):
        np.testing.assert_allclose(distance(embeddings(0)), centred_distance(embeddings(0)), rtol=1e-9, atol=1e-12)
        assert np.abs(distance(embeddings(9)) - distance(embeddings(0))).max() > 1e-3
    without = baseline.log_contrasts(embeddings(0))[0]
    without[0][:, 3] = 0
    want = np.mean([baseline.cosine_distances(x) for x in without], axis=0)
    np.testing.assert_allclose(baseline.noise_aware(embeddings(9)), want, rtol=1e-9, atol=1e-12)
    weights = {"conv.weight": torch.ones(8, 1, 1, 1), "bn.weight": torch.ones(4)}
    parts = baseline.layers_of(embeddings(0), baseline.PARTS["norms only"], weights)
    assert parts[0].layers == (("bn.weight", 0, 4),)
    np.testing.assert_array_equal(parts[2].hessian, embeddings(0)[2].layer("bn.weight"))
    x = rng.random((6, 4))
    np.testing.assert_allclose(baseline.together(x @ x.T, 5 * (x @ x.T) + 2), baseline.together(x @ x.T, x @ x.T))
