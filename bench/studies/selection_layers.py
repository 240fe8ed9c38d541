"""Do weights on layers, or against noise, find better neighbours to choose an expert by than the centred distance?

    python -m bench.studies.selection_layers [--output build/selection] [--write docs/selection.md]

Reads the experts' errors and the embeddings of bench/studies/selection.py, and makes those that are missing. A distance
finds the near tasks whose errors predict which expert is best (``selection.predict_errors``). Each distance is judged
with the second stage of the recommended way and without it. A distance and its bandwidth are chosen on half of the
families and judged on the other half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.pages import markdown, replace_section
from bench.studies.baseline import cosine_distances, log_contrasts, noise_aware, shrunk
from bench.studies.selection_data import Results, Settings, Store, embedder, of_families
from bench.studies.selection_ways import (
    BANDWIDTHS,
    Judge,
    alternate_halves,
    family_draws,
    interval,
    masked,
    near_accuracy,
    random_halves,
    score_table,
    shortlist,
    then,
)
from bench.studies.wide_task import wide_tasks
from t2v_fast import Embedding, Task2Vec

ROOT = Path(__file__).resolve().parents[2]
CENTRED, SPLITS = "centred: all layers alike", 200
LENGTH, SCORE, IMAGES = 4, "linear_probe", 120  # the second stage of the recommended way


# The weight of a layer, from its depth (0 to 1) and from the mean over its filters of their reliability: the share of
# the variance between tasks that standard errors do not explain.
OF_LAYERS: dict[str, Callable[[float, float], float]] = {
    CENTRED: lambda depth, reliability: 1.0,
    "layers rise with depth": lambda depth, reliability: depth,
    "layers fall with depth": lambda depth, reliability: 1 - depth,
    "middle layers": lambda depth, reliability: depth * (1 - depth),
    "layers by mean reliability": lambda depth, reliability: reliability,
}
OF_FILTERS = {
    "filters by reliability": noise_aware,
    "each task's filters shrunk by its own noise": shrunk,
}


def distances(embeddings: Sequence[Embedding]) -> dict[str, np.ndarray]:
    """Each distance [T, T] between tasks. All of them centre over the same tasks."""
    pairs = list(zip(*log_contrasts(embeddings), strict=True))
    plain = np.stack([cosine_distances(x) for x, _ in pairs])
    depths = (np.arange(len(pairs)) + 0.5) / len(pairs)
    reliabilities = [_reliability(x, error) for x, error in pairs]
    found = {
        name: np.average(plain, axis=0, weights=list(map(weight, depths, reliabilities)))
        for name, weight in OF_LAYERS.items()
    }
    return found | {name: distance(embeddings) for name, distance in OF_FILTERS.items()}


def _reliability(x: np.ndarray, error: np.ndarray) -> float:
    """The mean over filters of 1 - noise variance / total variance, each at least 0, for contrasts [T, O]."""
    total = np.maximum(x.var(0, ddof=1), 1e-300)
    return float(np.maximum(1 - np.square(error).mean(0) / total, 0).mean())


def load(store: Store, task2vec: Task2Vec, whole: bool) -> Results:
    """What the comparison needs, of all tasks or of those whose errors and embeddings are there."""
    images = max(store.settings.embedded)
    kinds = ("rows", f"embeddings-{images}")
    tasks = [t for t in store.tasks if whole or all(store.path(k, t.name, "safetensors").exists() for k in kinds)]
    experts = {name: store.expert(name) for name in store.experts}
    rows = [store.row(task, experts) for task in tasks]
    stored = [store.scores(task, row, (SCORE,)) for task, row in zip(tasks, rows, strict=True)]
    embeddings = [store.embedding(task, images, task2vec) for task in tasks]
    families = np.array([task.family for task in tasks])
    own = np.array([next(t.family for t in store.tasks if t.name == name) for name in store.experts])
    every = np.stack([row["errors"] for row in rows], 1)
    return Results(
        names=[task.name for task in tasks],
        families=families,
        places=np.zeros(len(tasks), int),
        experts=store.experts,
        kinds=list(store.kinds.values()),
        errors=np.where(families[:, None] == own, np.nan, every.mean(0)),
        every_error=every,
        classes=np.array([int(row["labels"].max()) + 1 for row in rows]),
        scores={(SCORE, IMAGES): np.stack([s[f"{IMAGES}/{SCORE}"] for s in stored])},
        seconds={},
        likelihoods=[],
        features=[],
        embeddings={images: embeddings},
        sources=embeddings,
        computed=[],
        passes=1.0,
        prices=np.ones(len(experts)),
    )


def report(results: Results) -> str:
    """The comparison as Markdown."""
    judge, draws = Judge(results), family_draws(results.families)
    tables = distances(next(iter(results.embeddings.values())))
    # The increases [2, T] of each distance and bandwidth: without the second stage, and with it.
    increases: dict[tuple[str, float], np.ndarray] = {}
    for name, table in tables.items():
        for bandwidth in BANDWIDTHS:
            first = masked(results, near_accuracy(results, table, bandwidth))
            second = then(first, score_table(results, SCORE, IMAGES, shortlist(first, LENGTH)))
            increases[name, bandwidth] = np.stack([judge.increase(first), judge.increase(second)])

    def cross_fitted(names: Sequence[str], half: np.ndarray, stage: int) -> np.ndarray:
        """The increase [T] of the best of these distances and bandwidths, chosen on the other half."""
        options = [increases[name, bandwidth][stage] for name in names for bandwidth in BANDWIDTHS]
        found = np.empty(len(half))
        for side in (False, True):
            fit = half == side
            found[~fit] = min(options, key=lambda values: values[fit].mean())[~fit]
        return found

    def cell(values: np.ndarray, sign: str = "") -> str:
        low, high = interval(values, draws)
        return f"{100 * values.mean():{sign}.1f} % ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"

    half = alternate_halves(results.families)
    base = [cross_fitted([CENTRED], half, stage) for stage in (0, 1)]
    head = [
        "distance",
        "alone",
        f"less that of {CENTRED.split(':')[0]}",
        f"then {LENGTH} by {SCORE}",
        "less that of it",
    ]
    rows = [head]
    others = [name for name in tables if name != CENTRED]
    for label, names in [*((name, [name]) for name in tables), ("the best of the weighted ones", others)]:
        own = [cross_fitted(names, half, stage) for stage in (0, 1)]
        cells = [text for a, b in zip(own, base, strict=True) for text in (cell(a), cell(a - b, "+"))]
        rows.append([label, *cells])
    wins = [
        np.mean([cross_fitted(others, h, stage).mean() < cross_fitted([CENTRED], h, stage).mean() for h in halves])
        for stage, halves in ((s, list(random_halves(results.families, SPLITS))) for s in (0, 1))
    ]
    return "\n\n".join(
        [
            f"{len(results.names)} tasks in {len(set(results.families))} families, {len(results.experts)} experts. The "
            "bandwidth, and in the last row the distance, are chosen on half of the families and judged on the other "
            "half. Increase of the error over the best candidate's, without and with the second stage of the "
            f"recommended way. Over {SPLITS} random halves the best of the weighted ones is below the centred distance "
            f"in {100 * wins[0]:.0f} % of them without the second stage, and in {100 * wins[1]:.0f} % with it. "
            "Intervals: families drawn again.",
            markdown(rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "selection")
    parser.add_argument("--finished", action="store_true", help="report on the tasks that are finished already")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args(argv)
    settings = Settings()
    store = Store(arguments.output, settings, of_families(wide_tasks()))
    text = report(load(store, embedder(settings), not arguments.finished))
    print(text)
    if arguments.write:
        replace_section(arguments.write, "selection_layers", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
