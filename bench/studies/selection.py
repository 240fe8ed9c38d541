"""The paper's experiment: choose a feature extractor for each task of a meta-task, and measure what the choice costs.

    python -m bench.studies.selection [--output build/selection] [--write docs/selection.md]

Embeds every task (EfficientNet-Lite0), trains the experts, and fills the table of test errors with one linear head for
each task and expert. Prints the loss of each way of choosing (Achille et al., 2019, table 1). Finished parts are kept
under ``--output`` and used again; parts with other settings or other images are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from scipy.stats import weightedtau
from torch import Tensor, nn
from torch.nn import functional as F

from bench.pages import markdown, replace_section
from bench.studies.meta_task import EXPERT, TEST, TRAIN, MetaTask, meta_tasks
from t2v_fast import Embedding, Task2Vec, load_probe
from t2v_fast.analysis.distance import asymmetric_distance, cdist
from t2v_fast.analysis.feature_scores import SCORES, combine_terms
from t2v_fast.analysis.selection import (
    PENALTY,
    Model2Vec,
    compare,
    increase_rows,
    leave_one_out,
    nearest_expert,
    relative_error_increase,
)
from t2v_fast.demo import DemoTask
from t2v_fast.files import write_atomically
from t2v_fast.tasks.head import fit_head

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = (
    "Latin capitals",
    "Cyrillic small letters",
    "Devanagari",
    "Thai",
    "Arabic",
    "Ethiopic",
    "Canadian syllabics",
    "Latin digits",
    "MNIST digits",
    "mathematics",
    "animals",
    "bold or regular",
    "italic or upright",
)
SIDE = 32  # pixels of an expert's input


@dataclass(frozen=True)
class Settings:
    """Everything that a stored result depends on."""

    images: int = 120  # of a task, to train heads on
    embedded_images: int = 80  # the first of these, to embed it
    test_images: int = 250
    expert_images: int = 1600
    epochs: int = 8
    size: int = 64  # pixels of the probe's input
    weight_decay: float = 1e-2  # of the heads on experts' features
    seed: int = 0


class Expert(nn.Module):
    """A small feature extractor, images [N, 3, 32, 32] -> features [N, 128]; and the head of its own task."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def prepare(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, 3] as an expert's input [N, 3, SIDE, SIDE], about standardised."""
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return F.interpolate(pixels, (SIDE, SIDE), mode="area")


def train_expert(task: DemoTask, settings: Settings) -> Expert:
    """An expert fitted to one task from a random start, in evaluation mode."""
    torch.manual_seed(settings.seed + zlib.crc32(task.name.encode()))
    x, y = prepare(task.images), torch.from_numpy(task.labels)
    expert = Expert(len(task.classes)).train()
    steps = settings.epochs * -(-len(x) // 64)
    optimizer = torch.optim.AdamW(expert.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(expert(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return expert.to(memory_format=torch.channels_last).eval()


def outputs(expert: Expert, images: Tensor) -> tuple[Tensor, Tensor]:
    """An expert's features [N, 128] of prepared images, and its probabilities of its own classes [N, Z]."""
    with torch.no_grad():
        # Channels last, a few at a time: four times faster here than 256 as they come.
        parts = images.contiguous(memory_format=torch.channels_last).split(32)
        features = torch.cat([expert.body(part) for part in parts])
        return features, expert.head(features).softmax(1)


def test_error(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor, classes: int, decay: float) -> float:
    """The share of test images that a linear head, fitted on the training features, gets wrong."""
    mean, scale = train.mean(0), train.std(0) + 1e-3
    fit = fit_head((train - mean) / scale, labels, num_classes=classes, weight_decay=decay, tolerance=1e-6)
    with torch.no_grad():
        return float((fit.linear((test - mean) / scale).argmax(1) != answers).double().mean())


class Store:
    """A folder of results: one file each, complete or not there, all of the same settings."""

    def __init__(self, folder: Path, settings: Settings, tasks: Sequence[MetaTask], experts: Sequence[str]) -> None:
        self.folder, self.settings = folder, settings
        self.tasks, self.experts = list(tasks), list(experts)
        known = {task.name for task in tasks}
        if missing := [name for name in experts if name not in known]:
            raise ValueError(f"no task {missing[0]!r} for an expert: expected some of {', '.join(sorted(known))}")
        folder.mkdir(parents=True, exist_ok=True)
        path, mine = folder / "settings.json", json.dumps(asdict(settings), sort_keys=True)
        if path.exists() and path.read_text() != mine:
            raise ValueError(f"{folder} holds results of {path.read_text()}, not of {mine}: pass another --output")
        write_atomically(path, mine.encode())

    def data(self, task: MetaTask, split: int) -> DemoTask:
        count = (self.settings.images, self.settings.test_images, self.settings.expert_images)[split]
        return task.draw(count, split, self.settings.seed)

    def path(self, kind: str, name: str, suffix: str) -> Path:
        (self.folder / kind).mkdir(exist_ok=True)
        slug = "".join(c if c.isalnum() else "-" for c in name)
        return self.folder / kind / f"{slug}.{suffix}"

    def embedding(self, task: MetaTask, task2vec: Task2Vec) -> Embedding:
        """The task's Task2Vec embedding, with the mean of its features in the probe as ``meta["mean_feature"]``."""
        path, drawn = self.path("embeddings", task.name, "safetensors"), self.data(task, TRAIN)
        drawn = replace(
            drawn,
            images=drawn.images[: self.settings.embedded_images],
            labels=drawn.labels[: self.settings.embedded_images],
        )
        if path.exists():
            embedding = Embedding.load(path)
            if embedding.meta["digest"] != drawn.digest or embedding.fingerprint != task2vec.fingerprint():
                raise ValueError(f"{path} is of other images or settings: remove it, or pass another --output")
            return embedding
        embedding = task2vec.embed((drawn.images, drawn.labels), name=task.name)
        probe = task2vec.probe
        with torch.no_grad():
            batches = torch.stack([probe.preprocessing(image) for image in drawn.images]).split(32)
            mean = torch.cat([probe.features(batch) for batch in batches]).double().mean(0)
        embedding.meta |= {"digest": drawn.digest, "mean_feature": mean.tolist(), "family": task.family}
        embedding.save(path)
        print(f"embedded {task.name}: {sum(embedding.meta['seconds'].values()):.1f} s", flush=True)
        return embedding

    def expert(self, name: str) -> Expert:
        task = next(t for t in self.tasks if t.name == name)
        path = self.path("experts", name, "safetensors")
        if path.exists():
            expert = Expert(len(task.glyphs or task.groups)).to(memory_format=torch.channels_last).eval()
            expert.load_state_dict(load_file(path))
            return expert
        expert = train_expert(self.data(task, EXPERT), self.settings)
        write_atomically(path, save({k: v.contiguous() for k, v in expert.state_dict().items()}))
        held_out = self.data(task, TEST)
        wrong = outputs(expert, prepare(held_out.images))[1].argmax(1) != torch.from_numpy(held_out.labels)
        print(f"trained the expert of {name}: {wrong.double().mean():.3f} of its own test images wrong", flush=True)
        return expert

    def row(self, task: MetaTask, experts: dict[str, Expert]) -> dict[str, dict[str, float]]:
        """Of one task and each expert: test error, and numbers or terms of every score; what is missing is added."""
        path, train = self.path("rows", task.name, "json"), self.data(task, TRAIN)
        stored = json.loads(path.read_text()) if path.exists() else {"digest": train.digest, "experts": {}}
        if stored["digest"] != train.digest:
            raise ValueError(f"{path} is of other images: remove it, or pass another --output")
        known = stored["experts"]
        if missing := [name for name in experts if set(known.get(name, {}).get("scores", ())) != set(SCORES)]:
            test = self.data(task, TEST)
            x, held_out = prepare(train.images), prepare(test.images)
            labels, answers = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
            for name in missing:
                features, own = outputs(experts[name], x)
                others, _ = outputs(experts[name], held_out)
                inputs = {"features": features.double().numpy(), "probabilities": own.double().numpy()}
                seconds, scores = {}, {}
                for score, entry in SCORES.items():
                    start = time.perf_counter()
                    scores[score] = entry.function(inputs[entry.inputs], train.labels)
                    seconds[score] = time.perf_counter() - start
                known[name] = {
                    "error": test_error(
                        features, labels, others, answers, len(train.classes), self.settings.weight_decay
                    ),
                    "scores": scores,
                    "seconds": seconds,
                }
            write_atomically(path, json.dumps(stored).encode())
            best = min(stored["experts"], key=lambda name: stored["experts"][name]["error"])
            print(f"{task.name}: best expert {best}, error {stored['experts'][best]['error']:.3f}", flush=True)
        return stored["experts"]


@dataclass
class Results:
    """Everything of a filled store: embeddings and families of the tasks, tables [tasks, experts]."""

    names: list[str]
    families: list[str]
    domains: list[str]
    embeddings: list[Embedding]
    experts: list[int]  # the experts' own tasks
    errors: np.ndarray  # NaN where the task is the expert's own, as in the paper: it has seen its classes
    scores: dict[str, np.ndarray]  # of each score, scaled over the experts that a task may use
    seconds: dict[str, float]  # the median time of each score, for one task and expert, without the forward pass

    @property
    def mean_features(self) -> np.ndarray:
        return np.array([e.meta["mean_feature"] for e in self.embeddings])


def fill(store: Store, task2vec: Task2Vec | None = None) -> Results:
    """Do whatever is missing, and read the rest."""
    if task2vec is None:
        probe = load_probe()
        probe.preprocessing = probe.preprocessing.sized(store.settings.size)
        task2vec = Task2Vec(probe, seed=store.settings.seed)
    experts = {name: store.expert(name) for name in store.experts}
    rows = [store.row(task, experts) for task in store.tasks]
    names = [task.name for task in store.tasks]

    own = np.array([[name == task for name in store.experts] for task in names])
    errors = np.array([[row[name]["error"] for name in store.experts] for row in rows])
    scores = {score: np.full(errors.shape, np.nan) for score in SCORES}
    for score, table in scores.items():
        for k, row in enumerate(rows):
            terms = np.array([row[name]["scores"][score] for name in store.experts])
            table[k, ~own[k]] = combine_terms(terms[~own[k]], score)
    seconds = {
        score: float(np.median([row[name]["seconds"][score] for row in rows for name in store.experts]))
        for score in SCORES
    }
    return Results(
        names,
        [task.family for task in store.tasks],
        [task.domain for task in store.tasks],
        [store.embedding(task, task2vec) for task in store.tasks],
        [names.index(name) for name in store.experts],
        np.where(own, np.nan, errors),
        scores,
        seconds,
    )


def ranking_quality(errors: np.ndarray, scores: np.ndarray, floor: float) -> dict[str, float]:
    """How well scores [T, E] order the experts of each task, in the mean over tasks.

    ``tau`` is the weighted Kendall correlation of scores and accuracies, ``top-1`` the share of tasks whose best expert
    has the highest score, and ``best of 3`` the increase of the error if the three highest are all tried.
    """
    tau, first, three = [], [], []
    for error, score in zip(errors, scores, strict=True):
        usable = np.flatnonzero(~np.isnan(error))
        error, score = error[usable], score[usable]
        tau.append(weightedtau(score, -error).statistic)
        order = np.argsort(-score, kind="stable")
        first.append(error[order[0]] == error.min())
        three.append((error[order[:3]].min() - error.min()) / max(error.min(), floor))
    return {"tau": float(np.nanmean(tau)), "top-1": float(np.mean(first)), "best of 3": float(np.mean(three))}


def score_tables(results: Results) -> dict[str, np.ndarray]:
    """The scores [T, E] of every way that orders all experts without errors of other tasks; higher is better."""
    of_experts = [results.embeddings[k] for k in results.experts]
    means = results.mean_features
    centred = means - means.mean(0)
    tables = {
        "Task2Vec, symmetric": -cdist(of_experts, results.embeddings).T,
        "Task2Vec, asymmetric": -asymmetric_distance(of_experts, results.embeddings).T,
    }
    for name, vectors in (("mean feature, cosine", means), ("mean feature, centred cosine", centred)):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        tables[name] = unit @ unit[results.experts].T
    # A task's own expert has no score, and is not available.
    return tables | {name: np.nan_to_num(table, nan=-np.inf) for name, table in results.scores.items()}


def increases(results: Results, settings: Settings) -> dict[str, np.ndarray]:
    """The relative error increase [T] of every way to choose."""
    errors, floor = results.errors, 1 / settings.test_images
    available = ~np.isnan(errors)
    of_experts = [results.embeddings[k] for k in results.experts]
    found = compare(of_experts, results.embeddings, errors, floor=floor)
    for penalty in (PENALTY / 10, PENALTY * 10):
        picks = leave_one_out(of_experts, results.embeddings, errors, Model2Vec(penalty=penalty))
        found[f"Model2Vec, penalty {penalty:g}"] = relative_error_increase(errors, picks, floor=floor)
    for alpha in (0.05, 0.5):
        picks = nearest_expert(asymmetric_distance(of_experts, results.embeddings, alpha=alpha), available)
        found[f"Task2Vec, asymmetric, alpha {alpha:g}"] = relative_error_increase(errors, picks, floor=floor)
    for name, scores in score_tables(results).items():
        if name not in found:
            found[name] = relative_error_increase(errors, nearest_expert(-scores.T, available), floor=floor)
    return found


def report(results: Results, settings: Settings) -> str:
    """The experiment as Markdown."""
    errors = results.errors
    counts = f"{len(results.names)} tasks in {len(set(results.families))} families, {errors.shape[1]} experts"
    best = np.nanmin(errors, axis=1)
    spread = f"{best.min():.3f} to {best.max():.3f}, median {np.median(best):.3f}"
    winners = len(set(np.nanargmin(errors, axis=1).tolist()))
    found = increases(results, settings)
    orders = [["ranked by", "weighted Kendall tau", "best expert first", "increase, best of 3", "ms a network"]]
    for name, table in score_tables(results).items():
        quality = ranking_quality(errors, table, 1 / settings.test_images)
        cells = f"{quality['tau']:.3f}", f"{quality['top-1']:.2f}", f"{100 * quality['best of 3']:.1f} %"
        orders.append([name, *cells, f"{1e3 * results.seconds[name]:.1f}" if name in results.seconds else "-"])
    return (
        f"{counts}; {settings.images} images to train a head on, {settings.test_images} to test it, "
        f"{settings.embedded_images} to embed a task (EfficientNet-Lite0 at {settings.size} pixels). Test error of "
        f"each task's best expert: {spread}; {winners} experts are the best for some task; where the best makes no "
        f"error, one image's share ({1 / settings.test_images:g}) is divided by.\n\n"
        f"{markdown(increase_rows(found))}\n\n"
        f"The last column is the time of the score alone, on one thread. Before it, the network needs one forward pass "
        f"over the task's {settings.images} images; the rows without a time need none.\n\n{markdown(orders)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "selection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args(argv)
    settings = Settings(seed=arguments.seed)
    results = fill(Store(arguments.output, settings, meta_tasks(), EXPERTS))
    text = report(results, settings)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "selection", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
