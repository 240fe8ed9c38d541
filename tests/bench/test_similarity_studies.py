"""The studies of similarity run, small, on drawn pictures: no package of emoji, no font, no pretrained probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import PREPROCESSING, shapes, small_probe

from bench.studies import emoji_task, label_only, label_worlds, similarity, similarity_bank
from bench.studies.emoji_task import STYLES
from t2v_fast import Task2Vec
from t2v_fast.tasks.head import HeadTask, fit_head

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
SUBGROUPS = {"round": 50, "square": 45, "lone": 41}


@pytest.fixture
def emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as npm would make it, with small pictures: a subgroup has its shape, an emoji its colour."""
    folder = tmp_path / "node_modules"
    monkeypatch.setattr(emoji_task, "FOLDER", folder)
    rng = np.random.default_rng(0)
    records = []
    for group, (subgroup, count) in enumerate(SUBGROUPS.items()):
        for k in range(count):
            name = f"{subgroup}-{k}"
            images = {style: f"has_img_{style}" for style in STYLES}
            record = {"image": f"{name}.png", "category": f"group {group}", "subcategory": subgroup, "sort_order": k}
            record |= dict.fromkeys(images.values(), True)
            if subgroup == "round" and k < 4:
                record["skin_variations"] = {
                    tone: {"image": f"{name}-{tone}.png", **dict.fromkeys(images.values(), True)} for tone in TONES
                }
            records.append(record)
            files = [f"{name}.png", *(v["image"] for v in record.get("skin_variations", {}).values())]
            for file in files:
                colour = rng.integers(0, 200, 3)
                for style_number, style in enumerate(STYLES):
                    pixels = np.zeros((64, 64, 4), np.uint8)
                    y, x = np.mgrid[:64, :64] - 32
                    inside = np.hypot(x, y) < 20 if subgroup == "round" else np.maximum(abs(x), abs(y)) < 20
                    pixels[inside] = [*np.clip(colour + 12 * style_number, 0, 255), 255]
                    path = folder / f"emoji-datasource-{style}" / "img" / style / "64" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
    records.append({**records[0], "image": "missing.png", "has_img_google": False})  # which one style lacks
    (folder / f"emoji-datasource-{STYLES[0]}" / "emoji.json").write_text(json.dumps(records))
    emoji_task.all_emoji.cache_clear()
    emoji_task.picture.cache_clear()
    yield folder
    emoji_task.all_emoji.cache_clear()
    emoji_task.picture.cache_clear()


FAMILIES = {"figures": ("round", "square"), "rounds": ("round",), "squares": ("square",), "lone": ("lone",)}


def test_emoji_tasks(emoji: Path) -> None:
    every = emoji_task.all_emoji()
    assert len(every) == sum(SUBGROUPS.values())
    assert "missing.png" not in {e.file for e in every}
    assert sum(len(e.tones) == 5 for e in every) == 4
    tasks = emoji_task.emoji_tasks(FAMILIES)
    assert len(tasks) == 5 * len(FAMILIES)
    assert [t.styles for t in tasks[:5]] == [*((s,) for s in STYLES), STYLES]
    for start in range(0, len(tasks), 5):  # the tasks of a family share no emoji
        files = [f for t in tasks[start : start + 5] for _, members in t.classes for f in members]
        assert len(files) == len(set(files))
    assert [name for name, _ in tasks[4].classes] == ["round", "square"]
    assert len(tasks[9].classes) == 8  # one subgroup has no kinds
    drawn = [tasks[4].draw(30, split) for split in (0, 1)]
    for d in drawn:
        assert d.images.shape == (30, 64, 64, 3)
        assert np.ptp(np.bincount(d.labels)) <= 1
    assert drawn[0].digest != drawn[1].digest
    assert tasks[4].draw(30, 0).digest == drawn[0].digest != tasks[4].draw(30, 0, seed=1).digest
    assert emoji_task.picture("round-0.png", "google").getpixel((0, 0)) == (255, 255, 255)


def test_missing_pictures_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_task, "FOLDER", tmp_path)
    emoji_task.all_emoji.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"no pictures of apple, facebook, google, twitter in .*: npm install"):
        emoji_task.all_emoji()


def test_heads_of() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    x[:, 0] += y
    found = similarity_bank.heads_of(x, HeadTask(y, 3), similarity_bank.HEADS)
    torch.testing.assert_close(found["default"].linear.weight, fit_head(x, y, num_classes=3).linear.weight)
    warm = fit_head(x, y, num_classes=3, weight_decay="cv", temperature=1 / similarity_bank.FLAT)
    torch.testing.assert_close(found["flat"].linear.weight, warm.linear.weight)  # as the library's option says it
    torch.testing.assert_close(found["flat"].linear.bias, warm.linear.bias)
    for head in ("flat", "random"):
        p = found[head].linear(x).softmax(1)
        assert (p - 1 / p.shape[1]).abs().max() < 1e-2
    other = similarity_bank.heads_of(x + 1, HeadTask(2 - y, 3), ["random"])["random"]
    assert torch.equal(other.linear.weight, found["random"].linear.weight)
    means = torch.stack([x[y == k].mean(0) for k in range(3)])
    torch.testing.assert_close(similarity_bank.class_means(x, y, 3), means)


def test_moments_of_activations() -> None:
    images, labels = shapes(20, 2)
    probe = small_probe()
    found = similarity_bank.pooled_activations(probe, images)
    assert [tuple(x.shape) for x in found.values()] == [(20, 6), (20, 6), (20, 8)]
    with torch.no_grad():
        want = torch.cat([probe.network[:1](PREPROCESSING(i)[None]).mean((2, 3)) for i in images]).double()
    torch.testing.assert_close(found["0.weight"], want, rtol=1e-5, atol=1e-6)
    moments = similarity_bank.moments_of(found, torch.from_numpy(labels), 2)
    assert {m: v.shape for m, v in moments.items()} == dict.fromkeys(similarity_bank.MOMENTS, (20,))
    np.testing.assert_allclose(moments["variance"][:6], want.numpy().var(0), rtol=1e-4)
    halves = np.stack([want.numpy()[labels == k].mean(0) for k in range(2)])
    np.testing.assert_allclose(moments["between"][:6], halves.var(0), rtol=1e-4)


def test_embeddings_of_label_sets_are_those_of_the_pipeline() -> None:
    images, labels = shapes(24, 3)
    sets = {"a": labels, "b": labels % 2}
    options = {"estimator": "exact", "batch_size": 8}
    features, found = similarity_bank.embed_label_sets(
        Task2Vec(small_probe(), self_check=False, **options), images, sets, ("cv", "flat")
    )
    assert features.shape == (24, 8)
    for name, codes in sets.items():
        for head, more in {"cv": {}, "flat": {"temperature": 1 / similarity_bank.FLAT}}.items():
            task2vec = Task2Vec(small_probe(), head_options={"weight_decay": "cv", **more}, **options)
            want = task2vec.embed((images, codes)).hessian
            np.testing.assert_allclose(found[name][head].hessian, want, rtol=1e-3, atol=1e-5 * want.max())


def test_how_many_images_count() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    found = similarity.effective_images(x, y, ("default", "flat"))
    fit = fit_head(torch.from_numpy(x), torch.from_numpy(y), num_classes=2)
    w, p = fit.linear.weight.detach().double(), fit.linear(torch.from_numpy(x)).detach().double().softmax(1)
    traces = [torch.trace(w.T @ (torch.diag(q) - torch.outer(q, q)) @ w) for q in p]
    want = float(sum(traces) ** 2 / sum(t**2 for t in traces))
    assert found["default"] == (pytest.approx(fit.mean_top_probability, rel=1e-4), pytest.approx(want, rel=1e-3))
    assert found["flat"][0] == pytest.approx(0.5, abs=0.1)
    assert found["flat"][1] > 39 > found["default"][1] > 1


def banks(emoji: Path, tmp_path: Path) -> tuple[similarity_bank.Bank, similarity_bank.Bank]:
    tasks, task2vec = emoji_task.emoji_tasks(FAMILIES), Task2Vec(small_probe(), batch_size=16, self_check=False)
    heads = similarity_bank.HEADS
    a = similarity_bank.measure_bank(tmp_path / "a", tasks, task2vec, 16, heads, drawn=24)
    return a, similarity_bank.measure_bank(tmp_path / "b", tasks, task2vec, 24, heads)


@pytest.mark.slow
def test_the_study_of_banks(emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = banks(emoji, tmp_path)
    assert [f.shape for f in a.features] == [(16, 8)] * 20
    assert [x.shape for x in a.of_layers("mean")] == [(20, 6), (20, 6), (20, 8)]
    np.testing.assert_allclose(a.mean_features[2], a.features[2].mean(0), rtol=1e-5)
    monkeypatch.setattr(similarity, "PARTS", 3)  # of the three layers
    halves = similarity.Halves(a, b, resamples=20)
    assert len(halves.chosen_on) == 2
    assert set(b.families[halves.first.rows]) == halves.chosen_on
    assert sorted([*halves.first.rows, *halves.others.rows]) == list(range(20))
    # The first way within reach of the best, on what the choice is made on.
    best = max(map(halves.score, similarity.CANDIDATES))
    assert halves.score(halves.chosen()) >= best - similarity.WITHIN
    earlier = list(similarity.CANDIDATES)[: list(similarity.CANDIDATES).index(halves.chosen())]
    assert all(halves.score(name) < best - similarity.WITHIN for name in earlier)
    text = similarity.report(halves)
    assert f"**chosen: {halves.chosen()}**" in text
    for part in ("20 tasks in 4 families", "flat head - mean feature", "images that count", "fifth 3 of the depth"):
        assert part in text
    want = f"{halves.others.auc(halves.found[similarity.FLAT][1]):.3f}"
    for intervals, ending in ((True, f"{want} ("), (False, f"{want} |")):
        lines = similarity.summary(halves, intervals).splitlines()
        (line,) = [line for line in lines if line.startswith(f"| {similarity.FLAT} |")]
        assert f"| {ending}" in line
    # What is there is used again, and other settings never mix with it.
    monkeypatch.setattr(similarity_bank, "measure_task", None)
    again = similarity.Halves(*banks(emoji, tmp_path), resamples=20)
    assert similarity.summary(again, True) == similarity.summary(halves, True)
    with pytest.raises(ValueError, match="is of other images or settings"):
        similarity_bank.measure_bank(tmp_path / "a", emoji_task.emoji_tasks(FAMILIES), Task2Vec(small_probe()), 17, ())


def world() -> label_worlds.World:
    """Bars, whose place is what they show, in two colours and three widths."""
    shown = tuple((f"bar {k}", f"half {k // 2}") for k in range(4))
    aspects = {"width": ("thin", "wide", "wider"), "colour": ("red", "blue")}

    def render(thing: int, width: str, colour: str) -> Image.Image:
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[:, 14 * thing : 14 * thing + {"thin": 5, "wide": 9, "wider": 13}[width]] = (
            (200, 0, 0) if colour == "red" else (0, 0, 200)
        )
        return Image.fromarray(pixels)

    return label_worlds.World("bars", shown, ("bar", "half"), aspects, render)


def test_worlds_and_their_label_sets() -> None:
    bars = world()
    images, labels = bars.draw(12, 0)
    assert images.shape == (12, 64, 64, 3)
    assert list(labels) == ["width", "colour", "bar", "half"]
    assert (labels["half"] == labels["bar"] // 2).all()
    other = bars.draw(12, 1)[1]
    combinations = {(i, *row) for i, part in enumerate((labels, other)) for row in zip(*part.values(), strict=True)}
    assert len({row[1:] for row in combinations}) == len(combinations) == 24  # parts share no combination
    sets, about = label_worlds.label_sets(bars, labels)
    assert {about[name] for name in ("bar", "half", "bar, merged by pairs", "bar, renamed")} == {"shown"}
    assert about["width, in two"] == about["width, a quarter wrong"] == "width"
    assert not {"random, 2 classes", "half and width"} & set(about)
    vi = label_worlds.variation_of_information
    assert vi(sets["bar"], sets["bar, renamed"]) == 0
    assert not (sets["bar"] == sets["bar, renamed"]).all()
    assert 0 < vi(sets["bar"], sets["half"]) < vi(sets["bar"], sets["random, 2 classes"])
    assert vi(sets["half and width"], sets["half"]) > 0
    assert len(np.unique(sets["bar, merged by pairs"])) == 2
    # A merging has the same meaning in every draw.
    merged = label_worlds.label_sets(bars, other)[0]["bar, merged by pairs"]
    pairs = {*zip(labels["bar"], sets["bar, merged by pairs"], strict=True), *zip(other["bar"], merged, strict=True)}
    assert len(pairs) == 4


def test_variation_of_information() -> None:
    a = np.array([0, 0, 1, 1])
    b = np.array([0, 1, 0, 1])
    vi = label_worlds.variation_of_information
    assert vi(a, 1 - a) == 0
    assert vi(a, b) == pytest.approx(1)
    assert vi(a, 2 * a + b) == pytest.approx(0.5)  # H(ab | a) is half of H(ab)
    assert vi(a * 0, a * 0) == 0


@pytest.fixture
def measured(tmp_path: Path) -> label_only.Measured:
    return label_only.measure(tmp_path, world(), Task2Vec(small_probe(), batch_size=16, self_check=False), images=24)


def test_the_study_of_label_sets(measured: label_only.Measured, tmp_path: Path, monkeypatch) -> None:
    every = np.arange(len(measured.names))
    # An embedding without labels: nothing is told apart, and every answer is a guess.
    blind = label_only.compare(measured, label_only.mean_feature)
    assert (blind.correlation(every), blind.separation(every), blind.across(every)) == (0, 0.5, 0)
    assert blind.found(every) == pytest.approx(1 / blind.clear.sum())
    assert blind.of_renamed() == 0
    # The truth itself is right everywhere.
    truth = label_only.compare(
        measured,
        lambda a, b: (
            label_only.information(a.codes, a.codes)
            if a is b
            else label_only.information(*[[np.concatenate(c) for c in zip(a.codes, b.codes, strict=True)]] * 2)
        ),
    )
    assert truth.correlation(every) == pytest.approx(1)
    assert truth.across(every) == pytest.approx(1)
    assert truth.found(every) == 1
    assert truth.of_renamed() == 0
    assert 0.5 < truth.separation(every) <= 1
    for name, distance in label_only.DISTANCES.items():
        compared = label_only.compare(measured, distance)
        assert compared.of_renamed() < 1e-4, name  # names of classes do not count
        assert compared.other.shape == (len(every),) * 2
    text = label_only.report([measured], resamples=10)
    assert "| mean feature (or any embedding without labels) | 0.00 (0.00 to 0.00) | 0.50 (0.50 to 0.50) | 0 |" in text
    assert f"bars ({len(every)} label sets)" in text
    label_only.draw(measured, tmp_path / "labels.png")
    assert Image.open(tmp_path / "labels.png").width > 1000
    monkeypatch.setattr(label_only, "embed_label_sets", None)  # what is there is used again
    again = label_only.measure(tmp_path, world(), Task2Vec(small_probe(), batch_size=16, self_check=False), images=24)
    assert label_only.report([again], resamples=10) == text
    with pytest.raises(ValueError, match="is of other images or settings"):
        label_only.measure(tmp_path, world(), Task2Vec(small_probe(), batch_size=16, balanced=False), images=24)


def test_rivals_that_see_labels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5))
    codes = [np.arange(12) % 3, np.arange(12) % 2, (np.arange(12) + 1) % 3]
    part = label_only.Part(x, codes, {}, [])
    scatters = []
    for c in codes:
        s = np.zeros((5, 5))
        for k in np.unique(c):
            m = x[c == k].mean(0) - x.mean(0)
            s += (c == k).mean() * np.outer(m, m)
        scatters.append(s / np.linalg.norm(s))
    want = [[1 - (a * b).sum() for b in scatters] for a in scatters]
    np.testing.assert_allclose(label_only.scatter(whitened=False)(part, part), want, atol=1e-12)
    # Whitened features: any linear map of them gives the same distances.
    turned = label_only.Part(x @ rng.normal(size=(5, 5)), codes, {}, [])
    both = [label_only.scatter(whitened=True)(p, p) for p in (part, turned)]
    np.testing.assert_allclose(*both, atol=1e-9)
    # Optimal transport: the cheapest of all matchings, for so few images that all can be tried.
    from itertools import permutations

    small = label_only.Part(x[:5], [np.array([0, 0, 1, 1, 1])], {}, [])
    other = label_only.Part(x[5:10], [np.array([0, 1, 0, 1, 1])], {}, [])

    def cost(i: int, j: int) -> float:
        a, b = small.features[small.codes[0] == small.codes[0][i]], other.features[other.codes[0] == other.codes[0][j]]
        spread = np.square(a.std(0) - b.std(0)).sum()
        return np.square(small.features[i] - other.features[j]).sum() + np.square(a.mean(0) - b.mean(0)).sum() + spread

    cheapest = min(sum(cost(i, p[i]) for i in range(5)) for p in permutations(range(5)))
    assert label_only.otdd(small, other)[0, 0] == pytest.approx(np.sqrt(cheapest / 5))
    assert label_only.otdd(part, part)[0, 0] == pytest.approx(0, abs=1e-6)
