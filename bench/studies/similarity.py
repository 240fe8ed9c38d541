"""Which distance between tasks finds related ones: on glyphs, and on artwork of emoji.

    python -m bench.studies.similarity [--output build/similarity] [--write docs/selection.md]
        [--guide docs/guide/distances.md] [--readme README.md]

The banks are those of bench/studies/meta_task.py and bench/studies/emoji_task.py, which name their packages. A way to
compare tasks is chosen on the glyphs and on half of the emoji's families. The other half judges. Finished tasks are
kept under ``--output``. Besides the choice, the study says why: how sure the heads are, how many images count, which
layers tell families apart, and how much of an embedding is noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.pages import markdown, replace_section
from bench.studies.baseline import (
    Judge,
    choice_families,
    cosine_distances,
    log_contrasts,
    noise_aware,
    ranked,
    spread_scaled,
    together,
)
from bench.studies.emoji_task import emoji_tasks
from bench.studies.meta_task import meta_tasks
from bench.studies.selection import ROOT
from bench.studies.similarity_bank import (
    HEADS,
    Bank,
    centroids,
    heads_of,
    measure_bank,
    pipeline,
    scatter_distances,
    whitening,
)
from t2v_fast import Embedding
from t2v_fast.analysis.distance import centred_distance, pdist
from t2v_fast.tasks.head import HeadTask

IMAGES = 80
GLYPHS_DRAWN = 120  # as bench/studies/selection.py draws them, so that these are the same tasks
MEAN_FEATURE = "mean feature, centred cosine"
WITHIN = 0.01  # a simpler way is chosen if its AUC is within this of the highest
PARTS = 5  # of the depth

Way = Callable[[Bank], np.ndarray]


def mean_feature(bank: Bank) -> np.ndarray:
    return cosine_distances(bank.mean_features - bank.mean_features.mean(0))


def mean_activations(bank: Bank) -> np.ndarray:
    return np.mean([cosine_distances(x - x.mean(0)) for x in bank.of_layers("mean")], axis=0)


def between_classes(bank: Bank) -> np.ndarray:
    """The centred distance of the variances of class means in every layer: Task2Vec's form without a gradient."""
    layers = next(iter(bank.embeddings.values()))[0].layers
    return centred_distance([Embedding(x, np.ones_like(x), layers, IMAGES) for x in bank.moments["between"]])


def scatter(whitened: bool) -> Way:
    """The cosine distance between the matrices of between-class scatter, of plain or whitened features."""

    def way(bank: Bank) -> np.ndarray:
        features = bank.features
        if whitened:
            maps = whitening(np.concatenate(features))
            features = [x @ maps for x in features]
        means = [centroids(x, codes) for x, codes in zip(features, bank.labels, strict=True)]
        return scatter_distances(means, means)

    return way


def fisher(head: str, distance: Callable[[Sequence[Embedding]], np.ndarray] = centred_distance) -> Way:
    return lambda bank: distance(bank.embeddings[head])


def one_layer(embeddings: Sequence[Embedding]) -> np.ndarray:
    return centred_distance(np.stack([e.hessian for e in embeddings]))


def with_mean_feature(head: str) -> Way:
    """The sum of the centred distance and the mean feature's, each divided by its spread over pairs."""
    return lambda bank: together(centred_distance(bank.embeddings[head]), mean_feature(bank))


# The simplest first. What may be chosen:
CANDIDATES: dict[str, Way] = {
    MEAN_FEATURE: mean_feature,
    "mean activations of every layer, centred cosine": mean_activations,
    "Task2Vec, cosine": fisher("default", pdist),
    "Task2Vec, cosine, cross-validated head": fisher("cv", pdist),
    "Task2Vec, centred": fisher("default"),
    "Task2Vec, centred, cross-validated head": fisher("cv"),
    "Task2Vec, centred, flat head": fisher("flat"),
    "Task2Vec, cosine, flat head": fisher("flat", pdist),
    "Task2Vec, centred, random head (blind to labels)": fisher("random"),
    "variances of class means in every layer, centred": between_classes,
    "scatter of class means, cosine": scatter(whitened=False),
    "scatter of class means, whitened, cosine": scatter(whitened=True),
    "Task2Vec, centred, all filters as one layer, flat head": fisher("flat", one_layer),
    "Task2Vec, centred, ranks, flat head": fisher("flat", ranked),
    "Task2Vec, centred, one spread for every filter, flat head": fisher("flat", spread_scaled),
    "Task2Vec, centred, weighted by reliability, cross-validated head": fisher("cv", noise_aware),
    "Task2Vec, centred, weighted by reliability, flat head": fisher("flat", noise_aware),
    "Task2Vec, centred, cross-validated head, with the mean feature": with_mean_feature("cv"),
    "Task2Vec, centred, flat head, with the mean feature": with_mean_feature("flat"),
}
# What is compared with the mean feature, on every half.
PAPER, CENTRED, FLAT = "Task2Vec, cosine", "Task2Vec, centred, cross-validated head", "Task2Vec, centred, flat head"
BOTH = "Task2Vec, centred, flat head, with the mean feature"


@dataclass
class Halves:
    """Both banks, and which tasks the choice is made on."""

    glyphs: Bank
    emoji: Bank
    resamples: int = 1000

    def __post_init__(self) -> None:
        self.chosen_on = choice_families(self.emoji.families.tolist())
        of_choice = np.isin(self.emoji.families, sorted(self.chosen_on))
        self.all_glyphs = self._judge(self.glyphs, np.arange(len(self.glyphs.names)))
        self.first = self._judge(self.emoji, np.flatnonzero(of_choice))
        self.others = self._judge(self.emoji, np.flatnonzero(~of_choice))
        self.found = {name: (way(self.glyphs), way(self.emoji)) for name, way in CANDIDATES.items()}

    def _judge(self, bank: Bank, rows: np.ndarray) -> Judge:
        return Judge(bank.families, rows, self.resamples)

    def score(self, name: str) -> float:
        """The mean AUC of a way on what the choice is made on."""
        glyphs, emoji = self.found[name]
        return (self.all_glyphs.auc(glyphs) + self.first.auc(emoji)) / 2

    def chosen(self) -> str:
        """The first way whose score is within :data:`WITHIN` of the highest."""
        scores = {name: self.score(name) for name in CANDIDATES}
        return next(name for name in CANDIDATES if scores[name] >= max(scores.values()) - WITHIN)


def table_of_ways(halves: Halves) -> str:
    chosen = halves.chosen()
    rows = [["distance", "glyphs: AUC, nearest", "emoji, choice: AUC, nearest", "emoji, others: AUC", "nearest"]]
    for name, (glyphs, emoji) in halves.found.items():
        rows.append(
            [
                f"**chosen: {name}**" if name == chosen else name,
                f"{halves.all_glyphs.auc(glyphs):.3f}, {halves.all_glyphs.hits(glyphs).mean():.3f}",
                f"{halves.first.auc(emoji):.3f}, {halves.first.hits(emoji).mean():.3f}",
                halves.others.auc_cell(emoji),
                halves.others.hits_cell(emoji),
            ]
        )
    return markdown(rows)


def table_of_differences(halves: Halves) -> str:
    rows = [["difference", "glyphs: AUC", "glyphs: nearest", "emoji, others: AUC", "emoji, others: nearest"]]
    pairs = [(name, MEAN_FEATURE) for name in (PAPER, CENTRED, FLAT, BOTH)]
    pairs += [(FLAT, CENTRED), (BOTH, FLAT)]
    if (chosen := halves.chosen()) not in (PAPER, CENTRED, FLAT, BOTH, MEAN_FEATURE):
        pairs.append((chosen, MEAN_FEATURE))
    for one, other in pairs:
        cells = []
        for judge, bank in ((halves.all_glyphs, 0), (halves.others, 1)):
            a, b = halves.found[one][bank], halves.found[other][bank]
            cells += [judge.auc_cell(a, b), judge.hits_cell(a, b)]
        rows.append([f"{one} - {other}", *cells])
    return markdown(rows)


def effective_images(features: np.ndarray, labels: np.ndarray, which: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Of each head the mean probability of the likeliest class, and how many images carry its Fisher.

    Image n counts with t_n, the trace of its logits' Fisher in the head's metric, tr(W^T S_n W). As many images of one
    weight would have the same sum and the same sum of squares: (sum t_n)^2 / sum t_n^2.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    found = {}
    for head, fit in heads_of(x, HeadTask(y, int(y.max()) + 1), which).items():
        with torch.no_grad():
            w = fit.linear.weight.double()
            p = (x.double() @ w.T + fit.linear.bias.double()).softmax(1)
            t = p @ w.square().sum(1) - (p @ w).square().sum(1)
        found[head] = (float(p.amax(1).mean()), float(t.sum() ** 2 / t.square().sum()))
    return found


def table_of_heads(halves: Halves) -> str:
    """Why heads differ: how sure they are, how many images count, how noisy the embedding is."""
    rows = [["bank", "head", "likeliest class", "images that count, of 80", "share of noise", "AUC, centred"]]
    for label, bank, judge in (
        ("glyphs", halves.glyphs, halves.all_glyphs),
        ("emoji, choice", halves.emoji, halves.first),
    ):
        which = [h for h in ("default", "cv", "flat") if h in bank.embeddings]
        of_tasks = [effective_images(bank.features[k], bank.labels[k], which) for k in judge.rows]
        for head in which:
            some = [bank.embeddings[head][k] for k in judge.rows]
            sure, images = (np.median([task[head][k] for task in of_tasks]) for k in (0, 1))
            d = centred_distance(bank.embeddings[head])
            rows.append(
                [label, head, f"{sure:.3f}", f"{images:.1f}", f"{noise_share(some):.2f}", f"{judge.auc(d):.3f}"]
            )
    return markdown(rows)


def noise_share(embeddings: Sequence[Embedding]) -> float:
    """The share of the variance of the centred distance's contrasts that standard errors explain."""
    found = [np.square(e).mean() / x.var(0, ddof=1).mean() for x, e in zip(*log_contrasts(embeddings), strict=True)]
    return float(np.mean(np.minimum(found, 1)))


def table_of_layers(halves: Halves) -> str:
    """The AUC of single layers, averaged over fifths of the depth."""
    rows = [["bank", "what", *(f"fifth {k + 1} of the depth" for k in range(PARTS))]]
    for label, bank, judge in (
        ("glyphs", halves.glyphs, halves.all_glyphs),
        ("emoji, choice", halves.emoji, halves.first),
    ):
        for what, layers in (
            ("Task2Vec, cross-validated head", log_contrasts(bank.embeddings["cv"])[0]),
            ("Task2Vec, flat head", log_contrasts(bank.embeddings["flat"])[0]),
            ("mean activations", [x - x.mean(0) for x in bank.of_layers("mean")]),
        ):
            aucs = np.array([judge.auc(cosine_distances(x)) for x in layers])
            rows.append([label, what, *(f"{part.mean():.3f}" for part in np.array_split(aucs, PARTS))])
    return markdown(rows)


def report(halves: Halves) -> str:
    """The study as Markdown."""
    return (
        f"Glyphs: {len(halves.glyphs.names)} tasks in {len(set(halves.glyphs.families))} families. Emoji: "
        f"{len(halves.emoji.names)} tasks in {len(set(halves.emoji.families))} families, {len(halves.first.rows)} "
        f"tasks for the choice ({', '.join(sorted(halves.chosen_on))}) and {len(halves.others.rows)} others. Nearest: "
        "the share of tasks whose nearest other task is of their family. In brackets 95 percent intervals, tasks drawn "
        f"again.\n\n{table_of_ways(halves)}\n\nThe same draws of tasks for both:\n\n{table_of_differences(halves)}\n\n"
        f"Why heads differ:\n\n{table_of_heads(halves)}\n\nThe AUC of single layers:\n\n{table_of_layers(halves)}"
    )


def summary(halves: Halves, intervals: bool) -> str:
    """The table for the guide, with intervals, and for the README: all glyphs, and the emoji that judged."""
    rows = [["distance", "glyphs: AUC", "glyphs: nearest", "emoji: AUC", "emoji: nearest"]]
    for name in (PAPER, MEAN_FEATURE, CENTRED, FLAT):
        cells = []
        for judge, d in zip((halves.all_glyphs, halves.others), halves.found[name], strict=True):
            cells += [judge.auc_cell(d), judge.hits_cell(d)]
        rows.append([name, *(cell if intervals else cell.partition(" ")[0] for cell in cells)])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "similarity")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    parser.add_argument("--guide", type=Path, help="put a short table into this page")
    parser.add_argument("--readme", type=Path, help="put a short table without intervals into this page")
    arguments = parser.parse_args(argv)
    task2vec = pipeline()
    emoji = measure_bank(arguments.output / "emoji", emoji_tasks(), task2vec, IMAGES, HEADS)
    glyphs = measure_bank(arguments.output / "glyphs", meta_tasks(), task2vec, IMAGES, HEADS, GLYPHS_DRAWN)
    halves = Halves(glyphs, emoji)
    text = report(halves)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "similarity", text)
    for page, intervals in ((arguments.guide, True), (arguments.readme, False)):
        if page:
            replace_section(page, "similarity", summary(halves, intervals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
