"""The same images, labelled in several ways: do distances between tasks follow what the labels say?

    python -m bench.studies.label_only [--output build/label_only] [--write docs/selection.md]
        [--picture docs/labels.png]

An embedding that does not see labels has the same vector for every label set, so it is at chance by construction. The
fair rivals are embeddings of labelled features. Each distance between label sets is compared with the variation of
information between the partitions, on the same images and on other images of the same world. Needs the packages of
bench/studies/meta_task.py and bench/studies/emoji_task.py. Finished parts are kept under ``--output``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist as point_distances
from scipy.stats import spearmanr

from bench.pages import markdown, replace_section
from bench.studies.claims import auc
from bench.studies.label_worlds import World, label_sets, letters, people, things, variation_of_information
from bench.studies.selection import ROOT
from bench.studies.similarity_bank import (
    centroids,
    embed_label_sets,
    moments_of,
    pipeline,
    pooled_activations,
    scatter_distances,
    whitening,
)
from t2v_fast import Embedding, Task2Vec
from t2v_fast.analysis.distance import cdist, centred_distance
from t2v_fast.analysis.plot import write_figure
from t2v_fast.files import canonical_json, write_atomically

HEADS = ("default", "cv", "flat")
IMAGES, PARTS = 96, 2
UNCLEAR = ("wrong", "random", "renamed")  # label sets that have no meaning on other images, or a double there


@dataclass
class Part:
    """One draw of a world: its images under every label set."""

    features: np.ndarray  # [N, F]
    codes: list[np.ndarray]  # of each label set [N]
    fishers: dict[str, list[Embedding]]  # by head, one for each label set
    between: list[Embedding]  # of each label set the variances of class means, in place of Fisher values


@dataclass
class Measured:
    """A world: its label sets, and what was measured on each part."""

    world: str
    names: list[str]
    about: np.ndarray  # the aspect of each label set, "" for none
    parts: list[Part]


Distance = Callable[[Part, Part], np.ndarray]


def measure(folder: Path, world: World, task2vec: Task2Vec, images: int = IMAGES, parts: int = PARTS) -> Measured:
    """Do whatever is missing in ``folder``, and read the rest."""
    found = []
    for part in range(parts):
        pictures, labels = world.draw(images, part)
        sets, about = label_sets(world, labels, seed=part)
        digest = int(sum(int(c.sum()) * (k + 1) for k, c in enumerate(sets.values()))) + int(pictures.sum())
        settings = canonical_json([list(sets), images, digest, task2vec.fingerprint()])
        path = folder / f"{world.name}-{part}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            features, embeddings = embed_label_sets(task2vec, pictures, sets, HEADS)
            activations = pooled_activations(task2vec.probe, pictures)
            arrays = {"features": features.double().numpy()}
            for head in HEADS:
                arrays[head] = np.stack([embeddings[name][head].hessian for name in sets])
            arrays["between"] = np.stack(
                [moments_of(activations, torch.from_numpy(c), int(c.max()) + 1)["between"] for c in sets.values()]
            )
            layers = embeddings[next(iter(sets))][HEADS[0]].layers
            write_atomically(path, save(arrays, {"settings": settings, "layers": json.dumps(layers)}))
            print(f"measured {world.name}, part {part}", flush=True)
        found.append(_read(path, settings, list(sets.values())))
    return Measured(world.name, list(sets), np.array([about.get(name, "") for name in sets]), found)


def _read(path: Path, settings: str, codes: list[np.ndarray]) -> Part:
    with safe_open(path, "numpy") as file:
        if file.metadata()["settings"] != settings:
            raise ValueError(f"{path} is of other images or settings: remove it, or pass another --output")
        layers = json.loads(file.metadata()["layers"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)

    def as_embeddings(vectors: np.ndarray) -> list[Embedding]:
        return [Embedding(v, np.ones_like(v), layers, len(codes[0])) for v in vectors]

    fishers = {head: as_embeddings(arrays[head]) for head in HEADS}
    return Part(arrays["features"], codes, fishers, as_embeddings(arrays["between"]))


def mean_feature(a: Part, b: Part) -> np.ndarray:
    """Between the mean features, which are the same for every label set."""
    means = [np.tile(part.features.mean(0), (len(part.codes), 1)) for part in (a, b)]
    return np.linalg.norm(means[0][:, None] - means[1][None], axis=2)


def fisher(head: str, centred: bool) -> Distance:
    """Task2Vec with one of the heads."""

    def distance(a: Part, b: Part) -> np.ndarray:
        return (_centred if centred else cdist)(a.fishers[head], b.fishers[head])

    return distance


def between_variance(a: Part, b: Part) -> np.ndarray:
    """The centred distance of class means' variances in every layer: Task2Vec's form with activations alone."""
    return _centred(a.between, b.between)


def _centred(a: Sequence[Embedding], b: Sequence[Embedding]) -> np.ndarray:
    return centred_distance(a) if a is b else centred_distance(a, b)


def scatter(whitened: bool) -> Distance:
    """The cosine distance between the matrices of between-class scatter, of plain or whitened features."""

    def distance(a: Part, b: Part) -> np.ndarray:
        parts = [a] if a is b else [a, b]
        maps = whitening(np.concatenate([part.features for part in parts])) if whitened else None
        sides = []
        for part in (a, b):
            x = part.features if maps is None else part.features @ maps
            sides.append([centroids(x, codes) for codes in part.codes])
        return scatter_distances(*sides)

    return distance


def otdd(a: Part, b: Part) -> np.ndarray:
    """The optimal transport distance between data sets (Alvarez-Melis and Fusi, 2020), classes as Gaussians with
    diagonal covariances: the cheapest matching of images, by their features and their classes."""
    points = point_distances(a.features, b.features, "sqeuclidean")
    out = np.empty((len(a.codes), len(b.codes)))
    for i, first in enumerate(a.codes):
        for j, second in enumerate(b.codes):
            cost = points + _gaussians(a.features, first, b.features, second)[first[:, None], second[None]]
            out[i, j] = np.sqrt(max(cost[linear_sum_assignment(cost)].mean(), 0))
    return out


def _gaussians(x: np.ndarray, a: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Wasserstein distances between classes [A, B]: of means, and of standard deviations."""
    moments = []
    for features, codes in ((x, a), (y, b)):
        classes = [features[codes == k] for k in range(codes.max() + 1)]
        moments.append(np.stack([np.concatenate([c.mean(0), c.std(0)]) for c in classes]))
    return point_distances(*moments, "sqeuclidean")


DISTANCES: dict[str, Distance] = {
    "mean feature (or any embedding without labels)": mean_feature,
    "Task2Vec, cosine": fisher("default", centred=False),
    "Task2Vec, cosine, cross-validated head": fisher("cv", centred=False),
    "Task2Vec, cosine, flat head": fisher("flat", centred=False),
    "Task2Vec, centred": fisher("default", centred=True),
    "Task2Vec, centred, cross-validated head": fisher("cv", centred=True),
    "Task2Vec, centred, flat head": fisher("flat", centred=True),
    "variances of class means in every layer, centred": between_variance,
    "scatter of class means, cosine": scatter(whitened=False),
    "scatter of class means, whitened, cosine": scatter(whitened=True),
    "OTDD, diagonal Gaussians": otdd,
}


def information(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """The variation of information between label sets of the same images [A, B]."""
    return np.array([[variation_of_information(x, y) for y in b] for x in a])


@dataclass(frozen=True)
class Compared:
    """A distance between the label sets of one world, next to the truth."""

    same: tuple[np.ndarray, ...]  # of each part [S, S]
    other: np.ndarray  # between the first part and the second [S, S]
    true_same: tuple[np.ndarray, ...]
    true_other: np.ndarray
    about: np.ndarray
    clear: np.ndarray  # label sets with a meaning on other images
    renamed: np.ndarray  # pairs that differ by names only

    def correlation(self, k: np.ndarray) -> float:
        """The rank correlation with the truth on the same images, among label sets ``k``."""
        upper = np.triu_indices(len(k), 1)
        here = np.ix_(k, k)
        return _mean([_rank(d[here][upper], t[here][upper]) for d, t in zip(self.same, self.true_same, strict=True)])

    def separation(self, k: np.ndarray) -> float:
        """The AUC of pairs about one aspect against pairs about two."""
        k = k[self.about[k] != ""]
        if len(np.unique(self.about[k])) in (len(k), 1):
            return np.nan
        return _mean([auc(d[np.ix_(k, k)], self.about[k]) for d in self.same])

    def across(self, k: np.ndarray) -> float:
        """The rank correlation with the truth on other images."""
        k = k[self.clear[k]]
        off = ~np.eye(len(k), dtype=bool)
        here = np.ix_(k, k)
        return _rank(self.other[here][off], self.true_other[here][off])

    def found(self, k: np.ndarray) -> float:
        """How often, for label sets ``k``, the nearest of all in the other part is the same one; ties share the hit."""
        every = np.flatnonzero(self.clear)
        d = self.other[np.ix_(every, every)]
        nearest = np.isclose(d, d.min(1, keepdims=True), rtol=1e-9, atol=1e-12)
        hits = (np.diag(nearest) / nearest.sum(1))[np.isin(every, k)]
        return float(hits.mean()) if len(hits) else np.nan

    def of_renamed(self) -> float:
        """The largest distance between label sets that differ by names only, over the median of all pairs."""
        largest = max(d[i, j] for d in self.same for i, j in self.renamed)
        return float(largest / max(np.median([d[np.triu_indices(len(d), 1)] for d in self.same]), 1e-300))


def _rank(d: np.ndarray, truth: np.ndarray) -> float:
    """The rank correlation; 0 for distances that are all the same, up to rounding."""
    d, truth = d.round(12), truth.round(12)
    if len(d) < 3 or np.ptp(truth) == 0:
        return np.nan
    return 0.0 if np.ptp(d) <= 1e-9 * np.abs(d).max() else float(spearmanr(d, truth).statistic)


def _mean(values: Sequence[float]) -> float:
    return float(np.nan if np.isnan(values).all() else np.nanmean(values))


def compare(measured: Measured, distance: Distance) -> Compared:
    a, b = measured.parts[:2]
    clear = np.array([not any(word in name for word in UNCLEAR) for name in measured.names])
    renamed = [
        (measured.names.index(name.removesuffix(", renamed")), k)
        for k, name in enumerate(measured.names)
        if name.endswith(", renamed")
    ]
    pooled = [np.concatenate(pair) for pair in zip(a.codes, b.codes, strict=True)]
    return Compared(
        tuple(distance(part, part) for part in (a, b)),
        distance(a, b),
        tuple(information(part.codes, part.codes) for part in (a, b)),
        information(pooled, pooled),
        measured.about,
        clear,
        np.array(renamed),
    )


def cell(worlds: Sequence[Compared], statistic: Callable[[Compared, np.ndarray], float], resamples: int) -> str:
    """The mean of a statistic over worlds, with a 95 percent interval: label sets are drawn again."""
    rng = np.random.default_rng(0)
    value = _mean([statistic(w, np.arange(len(w.about))) for w in worlds])
    draws = [
        _mean([statistic(w, np.unique(rng.integers(len(w.about), size=len(w.about)))) for w in worlds])
        for _ in range(resamples)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def report(measured: Sequence[Measured], resamples: int = 200) -> str:
    """The study as Markdown."""
    rows = [
        [
            "distance",
            "same images: rank correlation",
            "same images: AUC, one aspect or two",
            "renamed",
            "other images: rank correlation",
            "other images: the same label set is nearest",
        ]
    ]
    for name, distance in DISTANCES.items():
        worlds = [compare(m, distance) for m in measured]
        statistics = (Compared.correlation, Compared.separation, Compared.across, Compared.found)
        cells = [cell(worlds, statistic, resamples) for statistic in statistics]
        renamed = max(w.of_renamed() for w in worlds)
        rows.append([name, *cells[:2], f"{renamed:.2g}", *cells[2:]])
    by_world = [["distance", *(f"{m.world}: same images, other images" for m in measured)]]
    for name, distance in DISTANCES.items():
        worlds = [compare(m, distance) for m in measured]
        every = [np.arange(len(w.about)) for w in worlds]
        by_world.append(
            [name, *(f"{w.correlation(k):.2f}, {w.across(k):.2f}" for w, k in zip(worlds, every, strict=True))]
        )
    count = ", ".join(f"{m.world} ({len(m.names)} label sets)" for m in measured)
    clear = sum(int(compare(m, mean_feature).clear.sum()) for m in measured)
    return (
        f"Worlds: {count}; two draws of {len(measured[0].parts[0].features)} images each. In brackets 95 percent "
        f"intervals, label sets drawn again.\n\n{markdown(rows)}\n\n"
        f'"Renamed" is the largest distance between label sets that differ by the names of their classes only, over '
        f"the median distance. On other images, {clear} label sets are compared: those with a meaning there. The rank "
        f"correlation by world:\n\n{markdown(by_world)}"
    )


# What a picture shows beside the truth.
PANELS = ("mean feature (or any embedding without labels)", "Task2Vec, centred, flat head")


def draw(measured: Measured, path: Path) -> None:
    """Draw the distances between the label sets of a world on the same images: the truth, and two distances."""
    from matplotlib.figure import Figure

    part = measured.parts[0]
    panels = {"variation of information (the truth)": information(part.codes, part.codes)}
    panels |= {name: DISTANCES[name](part, part) for name in PANELS}
    figure = Figure(figsize=(4.2 * len(panels) + 2, 4.8), layout="constrained")
    places = np.arange(len(measured.names))
    for k, (axes, (title, d)) in enumerate(zip(figure.subplots(1, len(panels)), panels.items(), strict=True)):
        axes.imshow(d, cmap="viridis", vmin=0, vmax=max(d.max(), 1e-9))
        axes.set_title(title, fontsize=9)
        axes.set_xticks(places, measured.names, rotation=90, fontsize=6)
        axes.set_yticks(places, measured.names if k == 0 else [], fontsize=6)
    write_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "label_only")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    parser.add_argument("--picture", type=Path, help="draw the first world's distances")
    arguments = parser.parse_args(argv)
    task2vec = pipeline()
    measured = [measure(arguments.output, world, task2vec) for world in (people(), things(), letters())]
    text = report(measured)
    print(text)
    if arguments.picture:
        draw(measured[0], arguments.picture)
    if arguments.write:
        replace_section(arguments.write, "label_only", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
