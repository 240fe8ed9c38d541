"""The demo's tasks are real, and its run can be resumed."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small import small_probe

from t2v_fast import Task2Vec, demo
from t2v_fast.demo import FONTS, SANS, demo_tasks, draw_glyph, run_demo


@pytest.fixture(scope="module")
def tasks() -> list:
    return demo_tasks(60)


def test_the_tasks(tasks: list) -> None:
    assert len(tasks) >= 14
    assert len({t.slug for t in tasks}) == len(tasks)
    assert len({len(t.classes) for t in tasks}) >= 5
    assert all(count >= 2 for count in Counter(t.family for t in tasks).values())
    for task in tasks:
        assert task.images.dtype == np.uint8
        assert len(task.images) == len(task.labels) == 60
        counts = np.bincount(task.labels, minlength=len(task.classes))
        assert len(counts) == len(task.classes)
        assert counts.max() - counts.min() <= 1, task.name
        for image in task.images:
            ink = (image < 128).mean()
            assert 0.005 < ink < 0.6, task.name  # neither blank nor a box
        distinct = {image.tobytes() for image in task.images}
        assert len(distinct) == 60


def test_no_glyph_has_two_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []

    def draw(character: str, font: str, rng: np.random.Generator) -> np.ndarray:
        # Without serifs a small l is a capital I.
        drawn.append(("I" if character == "l" and font in SANS else character, font))
        return np.zeros((1, 1), np.uint8)

    monkeypatch.setattr(demo, "draw_glyph", draw)
    start = 0
    for task in demo_tasks(1500):
        if task.family == "handwritten digits":
            continue
        labels: dict[tuple[str, str], int] = {}
        for glyph, label in zip(drawn[start:], task.labels.tolist(), strict=False):
            assert labels.setdefault(glyph, label) == label, (task.name, glyph)
        start += len(task.labels)
    assert start == len(drawn)


@pytest.mark.slow
def test_the_seed_decides(tasks: list) -> None:
    again, other = demo_tasks(60), demo_tasks(60, seed=1)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(tasks, again, strict=True))
    assert not any(np.array_equal(a.images, b.images) for a, b in zip(tasks, other, strict=True))


def test_glyphs() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no glyph for '漢'"):
        draw_glyph("漢", FONTS[0], rng)
    with pytest.raises(ValueError, match="at least 60"):
        demo_tasks(10)


def test_run_and_resume(tasks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tasks[:4]
    task2vec = Task2Vec(small_probe())
    text = io.StringIO()
    result = run_demo(tmp_path, task2vec, chosen, Console(file=text, width=200))
    assert f"{result.same_family} of 4 tasks have a nearest task of their own family" in text.getvalue()
    with (tmp_path / "distances.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == [t.name for t in chosen] == [row[0] for row in rows[1:]]
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], dtype=float), result.distances)
    for picture in ("heatmap.png", "tasks.png"):
        assert np.asarray(Image.open(tmp_path / picture).convert("L")).std() > 10
    # A second run embeds only what is missing, or was made with other settings.
    (tmp_path / "embeddings" / f"{chosen[2].slug}.safetensors").unlink()
    embedded = []
    real = Task2Vec.embed
    monkeypatch.setattr(
        Task2Vec, "embed", lambda self, data, name: (embedded.append(name), real(self, data, name=name))[1]
    )
    again = run_demo(tmp_path, task2vec, chosen, Console(file=text))
    assert embedded == [chosen[2].name]
    np.testing.assert_array_equal(again.distances, result.distances)
    # A damaged file is made again, and so is the embedding of other images under the same name.
    damaged = tmp_path / "embeddings" / f"{chosen[1].slug}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    embedded.clear()
    run_demo(tmp_path, task2vec, chosen, Console(file=text))
    assert embedded == [chosen[1].name]
    embedded.clear()
    others = [replace(chosen[0], images=255 - chosen[0].images), *chosen[1:]]
    run_demo(tmp_path, task2vec, others, Console(file=text))
    assert embedded == [chosen[0].name]
    for options in ({"samples": 3}, {"seed": 1}):
        embedded.clear()
        run_demo(tmp_path, Task2Vec(small_probe(), **options), chosen, Console(file=text))
        assert len(embedded) == 4
