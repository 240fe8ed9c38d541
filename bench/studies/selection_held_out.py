"""The recommended way to choose an expert, on families that had no part in its design: artwork of emoji.

    npm install --prefix build/emoji emoji-datasource-{apple,facebook,google,twitter}@16.0.0
    python -m bench.studies.selection_held_out [--output build/selection] [--write docs/selection.md]

Fixed before the first result: the way is the recommended one of bench/studies/selection.py, with its settings. The
experts are the 27 of that study, and the earlier errors are those on its tasks. The new tasks are the first and the
last of each family of bench/studies/emoji_task.py. The rival is LEEP on 120 images of all experts. Parts are kept under
``--output``, beside those of the study, which are made if they are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.pages import markdown, replace_section
from bench.studies.emoji_task import emoji_tasks
from bench.studies.selection import RECOMMENDED, RIVAL
from bench.studies.selection_data import Results, Settings, Store, embedder, of_families
from bench.studies.selection_ways import (
    AVERAGE,
    FLOOR,
    Judge,
    Way,
    embedding_share,
    family_draws,
    image_share,
    interval,
    score_table,
    shortlisted,
)
from bench.studies.wide_task import wide_tasks
from t2v_fast import Task2Vec
from t2v_fast.analysis.distance import centred_distance
from t2v_fast.analysis.selection import predict_errors

ROOT = Path(__file__).resolve().parents[2]
PER_FAMILY = 2
SCORED = ("leep", "linear_probe")
IMAGES, BANDWIDTH, LENGTH = 120, 0.1, 4  # of the recommended way


def new_tasks() -> list:
    return of_families(emoji_tasks(), PER_FAMILY)


def ways_of(store: Store, task2vec: Task2Vec) -> tuple[Results, list[Way]]:
    """The experts' errors on the new tasks, and the ways to choose for them. Makes what is missing."""
    settings = replace(store.settings, counts=(IMAGES,))
    experts = {name: store.expert(name) for name in store.experts}
    by_name = {task.name: task for task in store.tasks}
    sources = [store.embedding(by_name[name], settings.source_images, task2vec) for name in experts]
    images, tasks = max(settings.embedded), new_tasks()
    earlier, mine = ([store.embedding(task, images, task2vec) for task in some] for some in (store.tasks, tasks))
    own = np.array([by_name[name].family for name in experts])
    of_earlier = np.stack([store.row(task, experts)["errors"].mean(0) for task in store.tasks])
    known = np.where(np.array([task.family for task in store.tasks])[:, None] == own, np.nan, of_earlier)
    rows = [store.row(task, experts) for task in tasks]
    stored = [store.scores(task, row, SCORED) for task, row in zip(tasks, rows, strict=True)]
    every = np.stack([row["errors"] for row in rows], 1)
    results = Results(
        names=[task.name for task in tasks],
        families=np.array([task.family for task in tasks]),
        places=np.zeros(len(tasks), int),
        experts=store.experts,
        kinds=list(store.kinds.values()),
        errors=every.mean(0),
        every_error=every,
        classes=np.array([int(row["labels"].max()) + 1 for row in rows]),
        scores={(score, IMAGES): np.stack([s[f"{IMAGES}/{score}"] for s in stored]) for score in SCORED},
        seconds={},
        likelihoods=[],
        features=[],
        embeddings={images: mine},
        sources=sources,
        computed=[],
        passes=float(np.median([e.meta["seconds_embedding"] / e.meta["seconds_forward"] for e in mine])),
        prices=np.ones(len(experts)),
    )
    near = predict_errors(known, centred_distance(earlier, mine, bank=sources), bandwidth=BANDWIDTH, floor=FLOOR)
    free = np.zeros(len(tasks))
    first = Way("errors on near tasks, centred within 0.1", "learned", -near,
                embedding_share(results, settings, images, results.passes))  # fmt: skip
    static = Way(AVERAGE, "static", np.tile(-predict_errors(known, floor=FLOOR), (len(tasks), 1)), free)
    ways = [static, first, *shortlisted(results, settings, first, LENGTH, ("linear_probe",))]
    full = image_share(results, settings, IMAGES)
    ways += [Way(f"{score} on {IMAGES}", "score", score_table(results, score, IMAGES), full) for score in SCORED]
    return results, ways


def report(results: Results, ways: Sequence[Way]) -> str:
    """The result as Markdown."""
    judge, draws = Judge(results), family_draws(results.families)
    increases = {way.name: judge.increase(way.scores) for way in ways}

    def cell(values: np.ndarray, sign: str = "") -> str:
        low, high = interval(values, draws)
        return f"{100 * values.mean():{sign}.1f} % ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"

    rows = [["chosen by", "cost", "mean increase (95 % interval)", f"less that of {RIVAL}", "median", "best first"]]
    rows.append(["chance", "0 %", cell(judge.chance()), cell(judge.chance() - increases[RIVAL], "+"), "-", "-"])
    for way in ways:
        own = increases[way.name]
        label = f"**{way.name}** (recommended)" if way.name == RECOMMENDED else way.name
        cells = [f"{100 * way.cost.mean():.0f} %", cell(own), cell(own - increases[RIVAL], "+")]
        first = judge.quality(way.scores)["top-1"].mean()
        rows.append([label, *cells, f"{100 * np.median(own):.1f} %", f"{first:.2f}"])
    return (
        f"{len(results.names)} tasks in {len(set(results.families))} families, {len(results.experts)} experts, all of "
        f"them candidates. Error of the best candidate: {judge.best.min():.3f} to {judge.best.max():.3f}, median "
        f"{np.median(judge.best):.3f}. An embedding takes {results.passes:.1f} forward passes. Intervals: families "
        f"drawn again.\n\n{markdown(rows)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "selection")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args(argv)
    settings = Settings()
    store = Store(arguments.output, settings, of_families(wide_tasks()))
    text = report(*ways_of(store, embedder(settings)))
    print(text)
    if arguments.write:
        replace_section(arguments.write, "selection_held_out", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
