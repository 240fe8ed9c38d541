"""Task2Vec against the obvious baseline, the mean feature of a task's images: which tasks are of one family?

    python -m bench.studies.baseline [--output build/baseline] [--write docs/selection.md]

Runs on the tasks of bench/studies/meta_task.py. The study tries heads, layers, scales and distances, none of which sees
a family. One of them is chosen on about half of the families, drawn by a fixed seed, and judged on the others. The
embeddings are kept under ``--output`` and used again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from scipy.stats import rankdata
from torch import Tensor

from bench.pages import markdown, replace_section
from bench.studies.claims import auc, interval_over_tasks, nearest_in_family
from bench.studies.meta_store import ROOT, Settings, Store
from bench.studies.meta_task import TRAIN, MetaTask, meta_tasks
from bench.studies.similarity_bank import pooled_activations
from t2v_fast import Embedding, Probe, Task2Vec, load_probe
from t2v_fast.analysis.distance import FLOOR, centred_distance, pdist
from t2v_fast.analysis.selection import bootstrap_interval
from t2v_fast.demo import DemoTask, demo_tasks
from t2v_fast.estimation.variational import fixed_point
from t2v_fast.files import write_atomically
from t2v_fast.tasks.assemble import embedding_of

# head: what Task2Vec is told. The first is the paper's form here: a head fitted until it is certain.
HEADS: dict[str, dict[str, Any]] = {
    "weight decay 1e-4": {},
    "weight decay 0.01": {"weight_decay": 1e-2},
    "weight decay 0.1": {"weight_decay": 1e-1},
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 10": {"weight_decay": 10.0},
    "cross-validated": {"weight_decay": "cv"},
}
PLAIN_HEAD, PREFERRED_HEAD = "weight decay 1e-4", "cross-validated"
BETAS = (1e-5, 1e-4, 1e-3)  # of the robust Fisher: from a prior that hardly counts to one that nearly alone does
CHOICE = 0.5  # share of the families that the choice is made on
BASELINE = "mean feature, centred cosine"
ACTIVATIONS = "mean activations of every layer, centred cosine"
FLOORS = (0.1, 1e-2, 1e-4)


def choice_families(families: Sequence[str], seed: int = 0) -> set[str]:
    """The families that the choice is made on."""
    kinds = sorted(set(families))
    return set(np.random.default_rng(seed).permutation(kinds)[: round(CHOICE * len(kinds) + 0.5)].tolist())


def cosine_distances(x: np.ndarray) -> np.ndarray:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    return 1 - unit @ unit.T


def layers_of(
    embeddings: Sequence[Embedding], kept: Callable[[float, int], bool], weights: dict[str, Tensor]
) -> list[Embedding]:
    """The embeddings' layers of which ``kept`` (depth from 0 to 1, axes of the weight) is true, as embeddings."""
    every = embeddings[0].layers
    layers = [layer for k, layer in enumerate(every) if kept(k / len(every), weights[layer[0]].dim())]
    stops = np.cumsum([stop - start for _, start, stop in layers]).tolist()
    new = tuple((name, a, b) for (name, _, _), a, b in zip(layers, [0, *stops[:-1]], stops, strict=True))
    rows = np.concatenate([np.arange(start, stop) for _, start, stop in layers])
    return [
        replace(
            e,
            hessian=e.hessian[rows],
            scale=e.scale[rows],
            standard_error=None if e.standard_error is None else e.standard_error[rows],
            layers=new,
        )
        for e in embeddings
    ]


def log_contrasts(embeddings: Sequence[Embedding]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By layer the x [T, O] of ``centred_distance``, and the standard errors of x."""
    xs, errors = [], []
    for name, start, stop in embeddings[0].layers:
        h = np.stack([e.layer(name) for e in embeddings])
        mean = np.maximum(h.mean(1, keepdims=True), 1e-300)
        g, e = h / mean, np.stack([e.standard_error[start:stop] for e in embeddings]) / mean
        used = g.mean(0) > 0
        if used.any():
            g, e = g[:, used] / g.mean(0)[used], e[:, used] / g.mean(0)[used]
            x = np.log(g + FLOOR)
            xs.append(x - x.mean(0))
            errors.append(e / (g + FLOOR))
    return xs, errors


def noise_aware(embeddings: Sequence[Embedding]) -> np.ndarray:
    """The centred distance with each filter weighted by its reliability: the share of the variance of x between tasks
    that its standard errors do not explain."""
    found = []
    for x, error in zip(*log_contrasts(embeddings), strict=True):
        total = np.maximum(x.var(0, ddof=1), 1e-300)
        found.append(cosine_distances(x * np.maximum(1 - np.square(error).mean(0) / total, 0)))
    return np.mean(found, axis=0)


def shrunk(embeddings: Sequence[Embedding]) -> np.ndarray:
    """The centred distance of each task's own x, shrunk by its own standard error (empirical Bayes)."""
    found = []
    for x, error in zip(*log_contrasts(embeddings), strict=True):
        total, noise = x.var(0, ddof=1), np.square(error)
        between = np.maximum(total - noise.mean(0), 0.05 * total) + 1e-300
        found.append(cosine_distances(x * between / (between + noise)))
    return np.mean(found, axis=0)


def spread_scaled(embeddings: Sequence[Embedding]) -> np.ndarray:
    """The centred distance with each filter's x divided by its spread over the bank."""
    xs, _ = log_contrasts(embeddings)
    return np.mean([cosine_distances(x / np.maximum(x.std(0), 1e-9)) for x in xs], axis=0)


def ranked(embeddings: Sequence[Embedding]) -> np.ndarray:
    """Ranks of a layer's filters within each task in place of logarithms."""
    found = []
    for name in embeddings[0].layer_names:
        x = rankdata(np.stack([e.layer(name) for e in embeddings]), axis=1)
        found.append(cosine_distances(x - x.mean(0)))
    return np.mean(found, axis=0)


def together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of two distances, each divided by its spread over pairs."""
    upper = np.triu_indices(len(a), 1)
    return sum((d - d[upper].mean()) / d[upper].std() for d in (a, b)) / 2


# What may be chosen, with every head, the simplest first. Parts of the layers are not among them: which layers tell
# families apart depends on the families, and half of these few are no ground to choose on. They are reported.
CANDIDATES: dict[str, Callable[[Sequence[Embedding]], np.ndarray]] = {
    "cosine": pdist,
    "centred": centred_distance,
    "centred, all filters as one layer": lambda e: centred_distance(np.stack([x.hessian for x in e])),
    "centred, ranks in place of logarithms": ranked,
    "centred, filters scaled to one spread": spread_scaled,
    "centred, filters weighted by reliability": noise_aware,
    "centred, shrunk by the standard error": shrunk,
}
PARTS: dict[str, Callable[[float, int], bool]] = {  # of a layer's depth from 0 to 1, and the axes of its weight
    "first third of the layers": lambda depth, axes: depth < 1 / 3,
    "middle third": lambda depth, axes: 1 / 3 <= depth < 2 / 3,
    "last third": lambda depth, axes: depth >= 2 / 3,
    "norms only": lambda depth, axes: axes == 1,
    "convolutions only": lambda depth, axes: axes > 1,
}


def mean_activations(probe: Probe, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Of every layer that an embedding covers, the mean over images and positions of each filter's output [O]."""
    return {name.rpartition(".")[0]: each.mean(0) for name, each in pooled_activations(probe, images).items()}


def robust(embeddings: Sequence[Embedding], weights: dict[str, Tensor], beta: float) -> list[Embedding]:
    """The embeddings of the paper's robust Fisher, at what it converges to: the precisions of the filters' noise.

    Learning them takes some twenty minutes a task by the public settings (ten thousand draws), and has not converged
    then (docs/decisions.md).
    """
    found = []
    for e in embeddings:
        diagonal = {name: torch.from_numpy(e.layer(name)) for name in e.layer_names}
        limit = replace(fixed_point(diagonal, weights, beta), num_examples=e.num_examples)
        found.append(embedding_of(limit, {}, e.fingerprint))
    return found


@dataclass(frozen=True)
class Drawn:
    """A task of the demo, in place of a MetaTask."""

    task: DemoTask

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def family(self) -> str:
        return self.task.family

    def draw(self, count: int, split: int, seed: int = 0) -> DemoTask:
        if count != len(self.task.images):
            raise ValueError(f"{self.name} has {len(self.task.images)} images, not {count}")
        return self.task


@dataclass
class Measured:
    """Everything that was embedded: for each way of fitting the head the tasks' embeddings."""

    names: list[str]
    families: np.ndarray
    embeddings: dict[str, list[Embedding]]
    activations: list[np.ndarray]  # by layer [T, O]
    weights: dict[str, Tensor]

    @property
    def mean_features(self) -> np.ndarray:
        return np.array([e.meta["mean_feature"] for e in self.embeddings[PLAIN_HEAD]])


def measure(
    folder: Path,
    settings: Settings,
    tasks: Sequence[MetaTask | Drawn],
    probe: Probe,
    heads: dict[str, dict[str, Any]] = HEADS,
) -> Measured:
    """Do whatever is missing, and read the rest."""
    slug = {head: "".join(c if c.isalnum() else "-" for c in head) for head in heads}
    embeddings = {}
    for head, options in heads.items():
        store = Store(folder / slug[head], settings, tasks, ())
        task2vec = Task2Vec(probe, seed=settings.seed, head_options=options)
        embeddings[head] = [store.embedding(task, task2vec) for task in tasks]
    store = Store(folder / "activations", settings, tasks, ())
    activations = []
    for task in tasks:
        path = store.path("means", task.name, "safetensors")
        if not path.exists():
            images = store.data(task, TRAIN).images[: settings.embedded_images]
            write_atomically(path, save(mean_activations(probe, images)))
        activations.append(load_file(path))
    stacked = [np.stack([a[name].numpy() for a in activations]) for name in activations[0]]
    weights = dict(probe.network.named_parameters())
    return Measured([t.name for t in tasks], np.array([t.family for t in tasks]), embeddings, stacked, weights)


def baselines(measured: Measured) -> dict[str, np.ndarray]:
    means = measured.mean_features
    centred = [x - x.mean(0) for x in measured.activations]
    return {
        "mean feature, cosine": cosine_distances(means),
        BASELINE: cosine_distances(means - means.mean(0)),
        ACTIVATIONS: np.mean([cosine_distances(x) for x in centred], axis=0),
    }


@dataclass(frozen=True)
class Judge:
    """AUC and nearest neighbours of a distance among some of the tasks."""

    families: np.ndarray
    rows: np.ndarray  # the tasks that count
    resamples: int = 1000

    def _within(self, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return d[np.ix_(self.rows, self.rows)], self.families[self.rows]

    def auc(self, d: np.ndarray) -> float:
        return auc(*self._within(d))

    def hits(self, d: np.ndarray) -> np.ndarray:
        return nearest_in_family(*self._within(d)).astype(float)

    def auc_cell(self, d: np.ndarray, against: np.ndarray | None = None) -> str:
        """AUC, or its difference from another distance's, with an interval: tasks are drawn again."""
        inside, families = self._within(d)
        other = None if against is None else self._within(against)[0]

        def statistic(k: np.ndarray) -> float:
            here = np.ix_(k, k)
            return auc(inside[here], families[k]) - (0 if other is None else auc(other[here], families[k]))

        with np.errstate(invalid="ignore"):  # a draw without two tasks of one family has no AUC, and is left out
            low, high = interval_over_tasks(statistic, len(families), self.resamples)
        sign = "" if other is None else "+"
        return f"{statistic(np.arange(len(families))):{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    def hits_cell(self, d: np.ndarray, against: np.ndarray | None = None) -> str:
        """The share of tasks whose nearest other task is of their family, or its difference, with an interval."""
        hits = self.hits(d) - (0 if against is None else self.hits(against))
        low, high = bootstrap_interval(hits)
        sign = "" if against is None else "+"
        return f"{hits.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def choose(found: dict[tuple[str, str], np.ndarray], judge: Judge, within: float = 0.01) -> tuple[str, str]:
    """The (head, distance) with the highest AUC; of those ``within`` that much of it, the one that comes first."""
    aucs = {key: judge.auc(d) for key, d in found.items()}
    return next(key for key in found if aucs[key] >= max(aucs.values()) - within)


def report(measured: Measured, seed: int = 0, resamples: int = 1000) -> str:
    """The experiment as Markdown."""
    families = measured.families
    of_choice = choice_families(families.tolist(), seed)
    chosen_on = np.array([f in of_choice for f in families])
    parts = (np.flatnonzero(chosen_on), np.flatnonzero(~chosen_on), np.arange(len(families)))
    first, rest, both = (Judge(families, rows, resamples) for rows in parts)
    # Simplest distance first, and of heads the one that has no number to set: a weight decay has the features' unit.
    heads = [PREFERRED_HEAD, *(head for head in HEADS if head != PREFERRED_HEAD)]
    found = {
        (head, name): distance(measured.embeddings[head]) for name, distance in CANDIDATES.items() for head in heads
    }
    chosen = choose(found, first)
    base = baselines(measured)
    embeddings = measured.embeddings[chosen[0]]

    def line(name: str, d: np.ndarray) -> list[str]:
        return [
            name,
            f"{first.auc(d):.3f}, {first.hits(d).mean():.3f}",
            rest.auc_cell(d),
            rest.hits_cell(d),
            both.auc_cell(d),
            both.hits_cell(d),
        ]

    rows = [["distance", "choice: AUC, nearest", "others: AUC", "others: nearest", "all: AUC", "all: nearest"]]
    rows += [line(name, d) for name, d in base.items()]
    rows.append(line(f"Task2Vec, cosine, {PLAIN_HEAD} (the default)", found[PLAIN_HEAD, "cosine"]))
    rows.append(line(f"**chosen: Task2Vec, {chosen[1]}, {chosen[0]}**", found[chosen]))
    rows.append(line(f"the same distance, {PLAIN_HEAD}", found[PLAIN_HEAD, chosen[1]]))
    chosen_head = [(name, found[chosen[0], name]) for name in CANDIDATES if name != chosen[1]]
    rows += [line(name, d) for name, d in chosen_head]
    for metric, distance in (("cosine", pdist), ("centred", centred_distance)):
        for part, kept in PARTS.items():
            rows.append(line(f"{metric}, {part}", distance(layers_of(embeddings, kept, measured.weights))))
    rows.append(line("chosen, with the mean feature", together(found[chosen], base[BASELINE])))
    rows.append(line("chosen, with the mean activations", together(found[chosen], base[ACTIVATIONS])))
    rows.append(line("cosine, with the mean feature", together(found[chosen[0], "cosine"], base[BASELINE])))
    for beta in BETAS:
        precisions = robust(embeddings, measured.weights, beta)
        rows.append(line(f"robust Fisher, beta {beta:g}, cosine", pdist(precisions)))
        rows.append(line(f"robust Fisher, beta {beta:g}, centred", centred_distance(precisions)))
    for floor in FLOORS:
        rows.append(line(f"centred, floor {floor:g}", centred_distance(embeddings, floor=floor)))
    of_others = centred_distance(embeddings, bank=[embeddings[k] for k in first.rows])
    rows.append(line("centred, means over the choice's tasks only", of_others))

    of_heads = [["head", "median loss", "cosine: choice", "cosine: others", "centred: choice", "centred: others"]]
    for head in HEADS:
        loss = np.median([e.meta["head_loss"] for e in measured.embeddings[head]])
        cells = [
            f"{judge.auc(found[head, name]):.3f}, {judge.hits(found[head, name]).mean():.3f}"
            for name in ("cosine", "centred")
            for judge in (first, rest)
        ]
        of_heads.append([head, f"{loss:.2g}", *cells])

    pairs = [["difference", "others: AUC", "others: nearest", "all: AUC", "all: nearest"]]
    plain, best = found[PLAIN_HEAD, "cosine"], found[chosen]
    with_mean = together(best, base[BASELINE])
    for name, one, other in (
        ("Task2Vec by default - mean feature", plain, base[BASELINE]),
        ("chosen - mean feature", best, base[BASELINE]),
        ("chosen - mean activations of every layer", best, base[ACTIVATIONS]),
        ("chosen - Task2Vec by default", best, plain),
        (f"chosen - the same distance, {PLAIN_HEAD}", best, found[PLAIN_HEAD, chosen[1]]),
        ("chosen with the mean feature - mean feature", with_mean, base[BASELINE]),
        ("chosen with the mean feature - chosen", with_mean, best),
    ):
        cells = [cell(one, other) for judge in (rest, both) for cell in (judge.auc_cell, judge.hits_cell)]
        pairs.append([name, *cells])
    names = ", ".join(sorted(of_choice))
    return (
        f"{len(families)} tasks in {len(set(families))} families; {chosen_on.sum()} tasks for the choice ({names}), "
        f"{(~chosen_on).sum()} others. Nearest: the share of tasks whose nearest other task is of their family. In "
        f"brackets 95 percent intervals, tasks drawn again.\n\n{markdown(rows)}\n\n"
        f"The same draws of tasks for both:\n\n{markdown(pairs)}\n\n"
        f"By the head (AUC, nearest):\n\n{markdown(of_heads)}"
    )


def confirm(measured: Measured, resamples: int = 1000) -> str:
    """A bank on which nothing was chosen, as Markdown."""
    judge = Judge(measured.families, np.arange(len(measured.families)), resamples)
    base = baselines(measured)
    distances = {
        **base,
        f"Task2Vec, cosine, {PLAIN_HEAD} (the default)": pdist(measured.embeddings[PLAIN_HEAD]),
        f"Task2Vec, cosine, {PREFERRED_HEAD}": pdist(measured.embeddings[PREFERRED_HEAD]),
        f"Task2Vec, centred, {PLAIN_HEAD}": centred_distance(measured.embeddings[PLAIN_HEAD]),
        f"Task2Vec, centred, {PREFERRED_HEAD}": (best := centred_distance(measured.embeddings[PREFERRED_HEAD])),
        "the last, with the mean feature": together(best, base[BASELINE]),
    }
    rows = [["distance", "AUC", "nearest", "AUC - mean feature's", "nearest - mean feature's"]]
    for name, d in distances.items():
        against = base[BASELINE]
        rows.append(
            [name, judge.auc_cell(d), judge.hits_cell(d), judge.auc_cell(d, against), judge.hits_cell(d, against)]
        )
    counts = f"{len(measured.names)} tasks in {len(set(measured.families.tolist()))} families"
    return f"The demo's {counts}, other images in other fonts, on which nothing was chosen:\n\n{markdown(rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "baseline")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    arguments = parser.parse_args(argv)
    settings = Settings()
    probe = load_probe(size=settings.size)
    text = report(measure(arguments.output, settings, meta_tasks(), probe))
    print(text, flush=True)
    of_demo = [Drawn(task) for task in demo_tasks(settings.images)]
    two = {head: HEADS[head] for head in (PLAIN_HEAD, PREFERRED_HEAD)}
    other = confirm(measure(arguments.output / "demo", settings, of_demo, probe, two))
    print(other)
    text = f"{text}\n\n{other}"
    if arguments.write:
        replace_section(arguments.write, "baseline", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
