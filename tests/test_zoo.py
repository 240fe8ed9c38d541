"""The race of networks for a task: its order, cost and refusals, and how it continues after an interruption."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from embeddings import make_for_bank
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from t2v_fast import zoo
from t2v_fast.analysis import selection
from t2v_fast.analysis.distance import centred_distance
from t2v_fast.analysis.feature_scores import linear_probe
from t2v_fast.tasks.data import DataError, TaskData
from t2v_fast.tasks.probe import Preprocessing, Probe
from t2v_fast.zoo import rank_zoo

SIDE = 8


class Sees(nn.Module):
    """Features: the mean colours with noise that depends on the image alone, then a head."""

    def __init__(self, noise: float, seed: int = 0) -> None:
        super().__init__()
        self.noise, self.calls = noise, 0
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(3 * SIDE * SIDE, 6, generator=generator))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        self.calls += len(x)
        colours = x.mean((2, 3))
        hashed = torch.sin(30 * (x.flatten(1) @ self.mix))  # as good as random, the same each time
        return self.head(torch.cat([colours, colours.square()], 1) + self.noise * hashed)


def probe(name: str, noise: float, seed: int = 0) -> Probe:
    # Images are taken as they come, a tensor [3, 8, 8].
    return Probe(Sees(noise, seed), preprocessing=Preprocessing(resize=SIDE, crop=SIDE), name=name)


def images(count: int = 400, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    colours = rng.integers(40, 216, (classes, 3))
    noise = rng.normal(0, 30, (count, 1, 1, 3)) + rng.normal(0, 20, (count, SIDE, SIDE, 3))
    return np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8), labels


def folder_of(path: Path, count: int = 60) -> Path:
    for k, (pixels, label) in enumerate(zip(*images(count), strict=True)):
        (path / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f"class{label}" / f"{k}.png")
    return path


def test_better_networks_come_first_and_bad_ones_leave_early():
    networks = [probe("blind", 20.0), probe("good", 0.0), probe("fair", 0.4)]
    ranking = rank_zoo(images(), networks, name="colours", images=None)
    assert [entry.name for entry in ranking.entries] == ["good", "fair", "blind"]
    best, blind = ranking.best, ranking.entries[-1]
    assert best.images > blind.images
    assert (best.behind, blind.outcome) == (0, "dropped")
    assert blind.behind > 3 * blind.standard_error
    assert 0 < ranking.cost < 1
    assert ranking.images + ranking.held_out == ranking.available == 400
    assert (ranking.classes, ranking.task) == (4, "colours")


def test_the_score_of_a_finished_network_is_that_of_a_linear_probe_on_all_images():
    data, network = images(200), probe("only", 0.2)
    ranking = rank_zoo(data, [network, probe("same", 0.2, seed=1)], images=None)
    entry = ranking.best
    order, held_out = zoo._draw(zoo._labels(TaskData.of(data)), None, 0)
    assert entry.images == len(order) == 200 - len(held_out)
    network = network if entry.name == "only" else probe("same", 0.2, seed=1)

    def features(rows):
        return network.features(torch.stack([network.preprocessing(image) for image in data[0][rows]])).numpy()

    assert entry.score == pytest.approx(linear_probe(features(order), data[1][order]), rel=1e-3)
    # The accuracy is that of scikit-learn's own pipeline, fitted to the scored images and tested on the others.
    scaled = features(order)
    mean, scale = scaled.mean(0), scaled.std(0) + 1e-3
    head = LogisticRegression(C=1 / (1e-2 * len(order)), max_iter=1000).fit((scaled - mean) / scale, data[1][order])
    assert ranking.accuracy == head.score((features(held_out) - mean) / scale, data[1][held_out])
    assert ranking.held_out == len(held_out)


def test_networks_that_may_be_as_good_are_named():
    ranking = rank_zoo(images(150), [probe("one", 0.3), probe("two", 0.3, seed=5)])
    assert [entry.outcome for entry in ranking.entries] == ["finished", "finished"]
    second = ranking.entries[1]
    assert second.behind <= 2 * second.standard_error
    assert f"{second.name} may be as good" in ranking.explain()


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_the_budget_holds(budget, monkeypatch):
    monkeypatch.setattr(zoo._Network, "pace", 1.0)
    networks = [probe(f"n{k}", 0.3, seed=k) for k in range(6)]
    ranking = rank_zoo(images(800), networks, budget=budget, images=None)
    # Finding the head takes a pass of two images, and the chosen network sees the held-out ones.
    shown = sum(network.network.calls for network in networks) - 2 * 6 - ranking.held_out
    assert shown / (6 * ranking.images) == pytest.approx(ranking.cost, abs=0.01)
    assert 0.1 <= ranking.cost <= budget
    if budget == 0.5:  # six equal networks: nothing but the budget makes most of them leave
        assert [entry.outcome for entry in ranking.entries].count("budget") >= 2


def test_what_cannot_be_loaded_is_listed(monkeypatch):
    def load(name, weights):
        if name == "good":
            assert weights == "own.safetensors"
            return probe("good", 0.0)
        raise RuntimeError(f"the default weights of {name!r} could not be had\nmore lines")

    monkeypatch.setattr(zoo, "load_probe", load)
    ranking = rank_zoo(images(80), ["timm/nosuch", "good=own.safetensors"])
    assert [(e.name, e.outcome) for e in ranking.entries] == [
        ("good=own.safetensors", "finished"),
        ("timm/nosuch", "unavailable"),
    ]
    assert ranking.entries[1].reason == "the default weights of 'timm/nosuch' could not be had"
    assert "unavailable: the default weights" in ranking.rows()[2][-1]
    stored = json.loads(json.dumps(ranking.as_dict()))
    assert stored["entries"][0]["name"] == "good=own.safetensors"
    assert "good=own.safetensors gives held-out labels" in stored["explanation"]
    with pytest.raises(ValueError, match="no network can be loaded: timm/nosuch: the default"):
        rank_zoo(images(80), ["timm/nosuch"])


def test_an_interrupted_race_continues_from_its_cache(tmp_path, monkeypatch):
    data = folder_of(tmp_path / "data", 200)
    whole = rank_zoo(data, [probe("a", 0.0), probe("b", 0.3)], cache=tmp_path / "first", images=None)

    class Interrupted(Exception):
        pass

    real, calls = zoo.held_out_likelihoods, []

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(zoo, "held_out_likelihoods", interrupting)
    with pytest.raises(Interrupted):
        rank_zoo(data, [probe("a", 0.0), probe("b", 0.3)], cache=tmp_path / "cache", images=None)
    monkeypatch.setattr(zoo, "held_out_likelihoods", real)
    networks = [probe("a", 0.0), probe("b", 0.3)]
    before = [network.network.calls for network in networks]
    again = rank_zoo(data, networks, cache=tmp_path / "cache", images=None)
    assert [e.name for e in again.entries] == [e.name for e in whole.entries]
    assert [e.score for e in again.entries] == pytest.approx([e.score for e in whole.entries], rel=1e-6)
    assert networks[0].network.calls - before[0] < 200  # the first two rounds of a were there

    # Another image, or other weights, is not what the cache holds.
    seen = [network.network.calls for network in networks]
    rank_zoo(data, networks, cache=tmp_path / "cache", images=None)
    assert [network.network.calls for network in networks] == seen
    changed = next(iter((data / "class0").iterdir()))
    Image.new("RGB", (SIDE, SIDE), "red").save(changed)
    rank_zoo(data, networks, cache=tmp_path / "cache")
    assert networks[0].network.calls > seen[0]
    with torch.no_grad():
        networks[0].network.mix.mul_(2)
    fresh = Probe(networks[0].network, preprocessing=networks[0].preprocessing, name="a")
    count = fresh.network.calls
    rank_zoo(data, [fresh], cache=tmp_path / "cache")
    assert fresh.network.calls > count


@pytest.mark.parametrize(("held", "loads"), [(4.0, [1, 1]), (0.0, [4, 5])])
def test_a_network_is_loaded_once_unless_memory_is_short(held, loads, monkeypatch):
    loaded = []

    def load(name, weights):
        loaded.append(name)
        return probe(name, 0.3, seed=len(name))

    monkeypatch.setattr(zoo, "load_probe", load)
    ranking = rank_zoo(images(512), ["a", "bb"], held_gigabytes=held, images=None)
    assert [entry.images for entry in ranking.entries] == [ranking.images] * 2
    assert 256 < ranking.images < 512  # four rounds: 64, 128, 256 and all
    best, other = (loaded.count(entry.name) for entry in ranking.entries)
    assert [other, best] == loads  # the best one is loaded once more for the held-out images
    assert all(entry.parameters == 3 * SIDE * SIDE * 6 + 70 for entry in ranking.entries)


def test_only_networks_with_high_priors_run(monkeypatch):
    loaded = []

    def load(name, weights):
        loaded.append(name)
        if name == "good but gone":
            raise OSError("no weights")
        return probe(name, 0.3, seed=len(name))

    monkeypatch.setattr(zoo, "load_probe", load)
    prior = {"bad": -3.0, "good": 2.0, "good but gone": 3.0, "worse": -4.0, "fair": 1.0, "worst": -5.0}
    ranking = rank_zoo(images(128), [*prior, "unknown"], shortlist=2, prior={**prior, "not in the zoo": 9.0})
    by_name = {entry.name: entry for entry in ranking.entries}
    # The network without a prior runs, and the next one takes the place of the one that is gone.
    assert sorted(loaded) == ["fair", "good", "good but gone", "unknown"]
    assert {name: entry.prior for name, entry in by_name.items()} == {**prior, "unknown": None}
    assert [by_name[name].outcome for name in ("bad", "worse", "worst")] == ["not shortlisted"] * 3
    assert by_name["good but gone"].outcome == "unavailable"
    assert ranking.cost <= 3 / 6
    assert "3 expected to be worse and never run, 1 could not be loaded" in ranking.explain()
    assert [row[-1] for row in ranking.rows()].count("not shortlisted") == 3
    # A long shortlist runs all networks.
    assert all(
        e.outcome != "not shortlisted" for e in rank_zoo(images(128), list(prior), prior=prior, shortlist=9).entries
    )
    with pytest.raises(ValueError, match="no prior is of a network: priors are of bad"):
        rank_zoo(images(128), ["unknown"], prior=prior)


@given(st.lists(st.integers(0, 4), min_size=10, max_size=60), st.integers(0, 9))
def test_every_prefix_has_classes_in_equal_parts(labels, seed):
    labels = np.array([*labels, *range(5), *range(5)])  # two of each class at least
    order, held_out = zoo._draw(labels, None, seed)
    assert sorted([*order, *held_out]) == list(range(len(labels)))
    assert np.bincount(labels[held_out], minlength=5).tolist() == (np.bincount(labels) // 5).tolist()
    for rows in (order, held_out):
        whole = np.bincount(labels[rows], minlength=5)
        for n in range(len(rows)):
            counts = np.bincount(labels[rows[:n]], minlength=5)
            more = counts[counts < whole]  # classes of which more images follow
            assert more.size == 0 or counts.max() <= more.min() + 1
    again = zoo._draw(labels, None, seed)
    assert all(np.array_equal(a, b) for a, b in zip(again, (order, held_out), strict=True))
    few, tests = zoo._draw(labels, 26, seed)
    assert few.tolist() == order[:26].tolist()
    assert tests.tolist() == held_out[:26].tolist()
    assert len(zoo._draw(labels, 2, seed)[0]) == min(len(order), zoo.IMAGES_PER_CLASS * 5)


def test_a_large_task_is_not_run_whole():
    data, networks = images(3000), [probe("a", 0.3), probe("b", 0.3, seed=1)]
    before = {network.name: network.network.calls for network in networks}  # finding the heads
    ranking = rank_zoo(data, networks)
    assert (ranking.images, ranking.available, ranking.held_out) == (zoo.IMAGES, 3000, zoo.IMAGES)
    calls = {network.name: network.network.calls - before[network.name] for network in networks}
    assert calls == {ranking.best.name: 2 * zoo.IMAGES, ranking.entries[1].name: zoo.IMAGES}
    assert "On 120 other images, which had no part in the choice, its accuracy is " in ranking.explain()
    stored = json.loads(json.dumps(ranking.as_dict()))
    assert (stored["available"], stored["seed"], stored["accuracy"]) == (3000, 0, ranking.accuracy)
    assert 0 < stored["accuracy_error"] < 0.1
    # Another seed draws other images.
    other = rank_zoo(data, networks, seed=1)
    assert (other.seed, other.best.score != ranking.best.score) == (1, True)


def test_labels_that_mean_nothing_have_the_accuracy_of_chance():
    # The best of many networks looks better than chance to the images that chose it, but not to others.
    data = images(4000, classes=2)
    labels = np.random.default_rng(5).integers(0, 2, 4000)
    ranking = rank_zoo((data[0], labels), [probe(f"n{k}", 5.0, seed=k) for k in range(8)], images=1000)
    assert ranking.held_out > 700
    assert abs(ranking.accuracy - 0.5) < 4 * ranking.accuracy_error


def test_classes_of_few_images_have_none_held_out():
    data = images(400)
    rows = np.concatenate([np.flatnonzero(data[1] == c)[:4] for c in range(4)])
    ranking = rank_zoo((data[0][rows], data[1][rows]), [probe("a", 0.1)])
    assert (ranking.images, ranking.held_out, ranking.accuracy) == (16, 0, None)
    assert "none is held out, and its accuracy is not measured" in ranking.explain()


def test_what_cannot_be_ranked_is_refused():
    data = images(60)
    with pytest.raises(ValueError, match="'a' is given twice"):
        rank_zoo(data, [probe("a", 0), probe("a", 1)])
    with pytest.raises(ValueError, match="expected a budget above 0 and at most 1"):
        rank_zoo(data, [probe("a", 0)], budget=0)
    with pytest.raises(ValueError, match=r"images=1, .* at least two images"):
        rank_zoo(data, [probe("a", 0)], images=1)
    with pytest.raises(ValueError, match="has one image, expected two"):
        rank_zoo((data[0], np.where(np.arange(60) == 7, 99, data[1])), [probe("a", 0)])
    with pytest.raises(DataError, match="cannot be read by number"):
        rank_zoo(iter_data(data), [probe("a", 0)])
    with pytest.raises(ValueError, match="a cache of features needs a folder"):
        rank_zoo(data, [probe("a", 0)], cache="features")


class iter_data:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return zip(*self.data, strict=True)


def test_the_command_writes_table_json_and_picture(tmp_path, monkeypatch, capsys):
    from t2v_fast.cli import main

    def load(name, weights):
        if name.startswith("timm/"):
            raise RuntimeError("the default weights could not be had")
        return probe(name, {"good": 0.0, "blind": 20.0}[name])

    monkeypatch.setattr(zoo, "load_probe", load)
    monkeypatch.setenv("COLUMNS", "120")
    folder = folder_of(tmp_path / "colours", 160)
    outputs = [tmp_path / name for name in ("race.csv", "race.json", "race.png")]
    arguments = ["select", str(folder), "--zoo", "good,blind,timm:nosuch", "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--csv", str(outputs[0]), "--json", str(outputs[1]), "--plot", str(outputs[2])]) == 0
    out = capsys.readouterr().out
    assert out.index("good") < out.index("blind")
    assert "unavailable: timm/nosuch: the default weights could not be had" in out
    assert "chance gives 0.250" in out
    assert outputs[0].read_text().splitlines()[1].startswith("good,")
    stored = json.loads(outputs[1].read_text())
    assert (stored["images"], stored["available"], stored["seed"]) == (120, 160, 0)
    assert 0.5 < stored["accuracy"] <= 1
    assert "scored by 120 of 160 images, drawn with seed 0" in out
    assert main([*arguments, "--images", "all", "--seed", "3", "--json", str(outputs[1])]) == 0
    stored = json.loads(outputs[1].read_text())
    assert (stored["images"], stored["seed"]) == (160 - stored["held_out"], 3)
    assert main([*arguments, "--images", "1"]) == 1
    assert "at least two images" in capsys.readouterr().err
    with Image.open(outputs[2]) as picture:
        assert picture.size[0] > 500
    assert main(["select", str(folder)]) != 0
    assert "give --errors with embeddings of tasks, or --zoo" in capsys.readouterr().err


def test_priors_from_errors_and_near_tasks(tmp_path):
    from t2v_fast.cli.zoo import _prior

    stored = [make_for_bank(name, seed) for seed, name in enumerate(["task 0", "task 1", "task 2", "mine"])]
    for k, embedding in enumerate(stored):
        embedding.save(tmp_path / f"{k}.safetensors")
    table = tmp_path / "errors.csv"
    table.write_text("task,timm/a,b\ntask 2,0.1,0.2\ntask 0,0.2,0.1\ntask 1,0.3,\n")
    errors = np.array([[0.1, 0.2], [0.2, 0.1], [0.3, np.nan]])
    earlier, mine = [tmp_path / f"{k}.safetensors" for k in range(3)], tmp_path / "3.safetensors"

    def prior(**given):
        return _prior(argparse.Namespace(**{"errors": None, "earlier": None, "embedding": None, **given}))

    assert prior() is None
    found = prior(errors=table)
    assert list(found) == ["timm/a", "b"]
    np.testing.assert_array_equal(list(found.values()), -selection.predict_errors(errors)[0])
    bank = [stored[2], stored[0], stored[1]]  # in the order of the table
    expected = -selection.predict_errors(errors, centred_distance(bank, [stored[3]]))[0]
    near = prior(errors=table, earlier=earlier, embedding=mine)
    assert list(near.values()) == pytest.approx(expected.tolist())
    assert near != found
    with pytest.raises(ValueError, match="--earlier and --embedding go together"):
        prior(errors=table, earlier=earlier)
    with pytest.raises(ValueError, match="pass --errors too"):
        prior(earlier=earlier, embedding=mine)
    with pytest.raises(ValueError, match="no embedding of the earlier task 'task 2'"):
        prior(errors=table, earlier=earlier[:2], embedding=mine)
    with pytest.raises(ValueError, match="two embeddings of --earlier are of a task called 'task 1'"):
        prior(errors=table, earlier=[*earlier, earlier[1]], embedding=mine)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--embedding is the file of one embedding, got the folder"):
        prior(errors=table, earlier=earlier, embedding=tmp_path / "empty")
    table.write_text("task,timm/a,b,c\ntask 2,0.1,0.2,\ntask 0,0.2,0.1,\ntask 1,0.3,,\n")
    assert prior(errors=table) == found  # nothing is known of c, which the shortlist does not leave out
    assert prior(errors=table, earlier=earlier, embedding=mine) == near
    with table.open("a") as file:
        file.write("task 9,,,\n")  # a task without errors says nothing of networks, and needs no embedding
    assert prior(errors=table) == found
    assert prior(errors=table, earlier=earlier, embedding=mine) == near


def test_a_race_without_scores_has_no_picture(tmp_path):
    from t2v_fast.analysis.race_plot import race

    with pytest.raises(ValueError, match="no network has a score"):
        race([zoo.Entry("a", outcome="unavailable", reason="gone")], 3, tmp_path / "race.png")
