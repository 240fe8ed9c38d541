"""What bench/studies/selection.py measures once and keeps: experts, features, errors, scores and embeddings.

Each finished part is one file under the output folder. A run that was interrupted continues. Parts with other settings
or other images are refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save
from torch import Tensor

from bench.studies.meta_task import EXPERT, TEST, TRAIN, MetaTask
from bench.studies.selection_experts import KINDS, Expert, Kind, outputs, prepare, train_expert
from t2v_fast import Embedding, Task2Vec, load_probe
from t2v_fast.analysis.feature_scores import SCORES, held_out_likelihoods
from t2v_fast.demo import DemoTask
from t2v_fast.files import write_atomically
from t2v_fast.tasks.head import fit_head

PER_FAMILY = 4  # tasks, so that no family decides alone


@dataclass(frozen=True)
class Settings:
    """Everything that a stored result depends on."""

    source_images: int = 80  # of an expert's own task, to embed it
    images: int = 120  # of a task, to choose an expert by and to train a head on
    draws: int = 3  # of those images; heads are trained on each of them
    test_images: int = 1000
    expert_images: int = 1600
    epochs: int = 8
    counts: tuple[int, ...] = (30, 60, 120)  # images that a score may see
    embedded: tuple[int, ...] = (40,)  # images that an embedding may see
    size: int = 64  # pixels of the probe's input
    weight_decay: float = 1e-2  # of the heads on experts' features
    seed: int = 0


def embedder(settings: Settings) -> Task2Vec:
    """Task2Vec as the studies of selection embed with it."""
    probe = load_probe(size=settings.size)
    return Task2Vec(probe, seed=settings.seed)


def enough(count: int, classes: int) -> int:
    """At least two images of each class, which a cross-validated head needs."""
    return max(count, 2 * classes)


def of_families(tasks: Sequence[MetaTask], most: int = PER_FAMILY) -> list[MetaTask]:
    """At most so many tasks of each family, evenly spaced in their order."""
    chosen = []
    for family in dict.fromkeys(task.family for task in tasks):
        members = [task for task in tasks if task.family == family]
        places = np.unique(np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(int))
        chosen += [members[k] for k in places]
    return chosen


def first_of_families(tasks: Sequence[MetaTask]) -> dict[str, Kind]:
    """The task that each family's one expert is trained on, and the expert's kind: all kinds in turn."""
    first: dict[str, str] = {}
    for task in tasks:
        first.setdefault(task.family, task.name)
    return {name: KINDS[k % len(KINDS)] for k, name in enumerate(first.values())}


def interleaved(labels: np.ndarray) -> np.ndarray:
    """An order in which every prefix has the classes in equal parts."""
    place = np.empty(len(labels))
    for code in np.unique(labels):
        rows = np.flatnonzero(labels == code)
        place[rows] = np.arange(len(rows))
    return np.argsort(place, kind="stable")


class Store:
    """A folder of results: one file each, complete or not there, all of the same settings."""

    def __init__(self, folder: Path, settings: Settings, tasks: Sequence[MetaTask]) -> None:
        self.folder, self.settings, self.tasks = folder, settings, list(tasks)
        self.kinds = first_of_families(self.tasks)
        folder.mkdir(parents=True, exist_ok=True)
        path, mine = folder / "settings.json", json.dumps(asdict(settings), sort_keys=True)
        if path.exists() and path.read_text() != mine:
            raise ValueError(f"{folder} holds results of {path.read_text()}, not of {mine}: pass another --output")
        write_atomically(path, mine.encode())

    @property
    def experts(self) -> list[str]:
        """The names of the experts' own tasks."""
        return list(self.kinds)

    def path(self, kind: str, name: str, suffix: str) -> Path:
        (self.folder / kind).mkdir(exist_ok=True)
        slug = "".join(c if c.isalnum() else "-" for c in name)
        return self.folder / kind / f"{slug}.{suffix}"

    def train(self, task: MetaTask, draw: int = 0) -> DemoTask:
        """One draw of a task's training images, such that every prefix has the classes in equal parts."""
        drawn = task.draw(self.settings.images, TRAIN, self.settings.seed + draw)
        order = interleaved(drawn.labels)
        return DemoTask(drawn.name, drawn.family, drawn.images[order], drawn.labels[order], drawn.classes)

    def expert(self, name: str) -> Expert:
        task = next(t for t in self.tasks if t.name == name)
        path, kind = self.path("experts", name, "safetensors"), self.kinds[name]
        if path.exists():
            expert = Expert(kind, len(task.glyphs or task.groups)).to(memory_format=torch.channels_last).eval()
            expert.load_state_dict(load_file(path))
            return expert
        drawn = task.draw(self.settings.expert_images, EXPERT, self.settings.seed)
        expert = train_expert(drawn, kind, self.settings.epochs, self.settings.seed)
        write_atomically(path, save({k: v.contiguous() for k, v in expert.state_dict().items()}))
        held_out = task.draw(200, TEST, self.settings.seed)
        wrong = outputs(expert, prepare(held_out.images))[1].argmax(1) != torch.from_numpy(held_out.labels)
        _say(f"trained {kind.architecture} {kind.size} on {name}: {wrong.double().mean():.3f} of its own images wrong")
        return expert

    def row(self, task: MetaTask, experts: dict[str, Expert]) -> dict[str, np.ndarray]:
        """Of one task: errors [draws, E], labels [N], and each expert's features [N, D] and probabilities [N, Z]."""
        path = self.path("rows", task.name, "safetensors")
        draws = [self.train(task, draw) for draw in range(self.settings.draws)]
        if path.exists():
            found = load_arrays(path)
            if not np.array_equal(found["digest"], _bytes(draws[0].digest)):
                raise ValueError(f"{path} is of other images: remove it, or pass another --output")
            return found
        test = task.draw(self.settings.test_images, TEST, self.settings.seed)
        x, held_out = prepare(np.concatenate([d.images for d in draws])), prepare(test.images)
        labels, answers = [torch.from_numpy(d.labels) for d in draws], torch.from_numpy(test.labels)
        found = {"digest": _bytes(draws[0].digest), "labels": draws[0].labels}
        errors = np.empty((len(draws), len(experts)))
        for k, (name, expert) in enumerate(experts.items()):
            features, own = outputs(expert, x)
            others, _ = outputs(expert, held_out)
            parts = features.split(self.settings.images)
            found[f"features/{name}"] = parts[0].numpy()
            found[f"probabilities/{name}"] = own[: self.settings.images].numpy()
            for d, part in enumerate(parts):
                errors[d, k] = head_error(
                    part, labels[d], others, answers, len(test.classes), self.settings.weight_decay
                )
        found["errors"] = errors
        write_atomically(path, save_arrays(found))
        mean = errors.mean(0)
        best = list(experts)[int(mean.argmin())]
        _say(f"{task.name}: best expert {best}, error {mean.min():.3f}, median {np.median(mean):.3f}")
        return found

    def scores(
        self, task: MetaTask, row: dict[str, np.ndarray], which: Sequence[str] = tuple(SCORES)
    ) -> dict[str, np.ndarray]:
        """Of one task: ``COUNT/SCORE`` [E] or [E, terms], ``COUNT/likelihoods`` [E, n], ``COUNT/seconds/SCORE`` [].

        What is missing is added. ``linear_probe`` is the mean of the likelihoods.
        """
        path = self.path("scores", task.name, "safetensors")
        stored, changed = load_arrays(path) if path.exists() else {}, False
        labels = row["labels"]
        for count in self.settings.counts:
            n = min(enough(count, int(labels.max()) + 1), len(labels))
            for score in which:
                if f"{count}/{score}" in stored:
                    continue
                entry = SCORES[score]
                start, values = time.process_time(), []
                for name in self.experts:
                    inputs = row[f"{entry.inputs}/{name}"][:n].astype(np.float64)
                    if entry.inputs == "probabilities":
                        inputs /= inputs.sum(1, keepdims=True)
                    function = held_out_likelihoods if score == "linear_probe" else entry.function
                    values.append(function(inputs, labels[:n]))
                found = np.array(values, dtype=np.float64)
                stored[f"{count}/seconds/{score}"] = np.array((time.process_time() - start) / len(self.experts))
                if score == "linear_probe":
                    stored[f"{count}/likelihoods"] = found
                    found = found.mean(1)
                stored[f"{count}/{score}"], changed = found, True
        if changed:
            write_atomically(path, save_arrays(stored))
            _say(f"scored {task.name}")
        return stored

    def embedding(self, task: MetaTask, images: int, task2vec: Task2Vec) -> Embedding:
        """The task's Task2Vec embedding, with the mean of its features in the probe as ``meta["mean_feature"]``."""
        drawn = self.train(task)
        n = min(enough(images, len(drawn.classes)), len(drawn.labels))
        return self._embed(
            f"embeddings-{images}", task.name, drawn.images[:n], drawn.labels[:n], drawn.digest, task2vec
        )

    def computed_embedding(self, name: str, pool: np.ndarray, expert: Expert, task2vec: Task2Vec) -> Embedding:
        """What an expert computes: the embedding of general images under the labels that the expert gives them.

        A label is the class that the expert finds likelier than usual, as it may find one class likeliest for all.
        """
        logs = outputs(expert, prepare(pool))[1].clamp_min(1e-30).log()
        labels = (logs - logs.mean(0)).argmax(1).numpy()
        common = np.isin(labels, np.flatnonzero(np.bincount(labels) > 1))
        digest = DemoTask(name, "", pool[common], labels[common], ()).digest
        return self._embed("computed", name, pool[common], labels[common], digest, task2vec)

    def pool(self) -> np.ndarray:
        """General images, as colours [N, H, W, 3]: two of each task."""
        drawn = [task.draw(2, EXPERT, self.settings.seed + 1).images for task in self.tasks]
        return np.concatenate([x if x.ndim == 4 else np.repeat(x[..., None], 3, 3) for x in drawn])

    def _embed(
        self, kind: str, name: str, images: np.ndarray, labels: np.ndarray, digest: str, task2vec: Task2Vec
    ) -> Embedding:
        path = self.path(kind, name, "safetensors")
        if path.exists():
            embedding = Embedding.load(path)
            if embedding.meta["digest"] != digest or embedding.fingerprint != task2vec.fingerprint():
                raise ValueError(f"{path} is of other images or settings: remove it, or pass another --output")
            return embedding
        probe = task2vec.probe
        start = time.process_time()
        embedding = task2vec.embed((images, labels), name=name)
        whole = time.process_time() - start
        batches = torch.stack([probe.preprocessing(image) for image in images]).split(32)
        start = time.process_time()
        with torch.no_grad():
            mean = torch.cat([probe.features(batch) for batch in batches]).double().mean(0)
        forward = time.process_time() - start
        embedding.meta |= {"digest": digest, "mean_feature": mean.tolist(), "images": len(labels)}
        embedding.meta |= {"seconds_embedding": whole, "seconds_forward": forward}
        embedding.save(path)
        _say(f"embedded {name} ({kind}): {whole:.1f} s, {whole / forward:.1f} forward passes")
        return embedding


def head_error(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor, classes: int, decay: float) -> float:
    """The share of test images that a linear head, fitted on the training features, gets wrong."""
    mean, scale = train.mean(0), train.std(0) + 1e-3
    fit = fit_head((train - mean) / scale, labels, num_classes=classes, weight_decay=decay, tolerance=1e-4)
    with torch.no_grad():
        return float((fit.linear((test - mean) / scale).argmax(1) != answers).double().mean())


def _bytes(digest: str) -> np.ndarray:
    return np.frombuffer(digest.encode(), dtype=np.uint8)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Results:
    """Everything of a filled store. T tasks, E experts; an expert of the task's own family is no candidate."""

    names: list[str]
    families: np.ndarray  # [T]
    places: np.ndarray  # [T], of a task among those of its family
    experts: list[str]  # the names of the experts' own tasks
    kinds: list[Kind]  # of the experts
    errors: np.ndarray  # [T, E], the mean over draws; NaN where an expert is no candidate
    every_error: np.ndarray  # [draws, T, E], candidates or not
    classes: np.ndarray  # [T]
    scores: dict[tuple[str, int], np.ndarray]  # of each score and number of images, [T, E] or [T, E, terms]
    seconds: dict[tuple[str, int], float]  # the median time of a score, for one task and expert
    likelihoods: list[dict[int, np.ndarray]]  # of each task, by the number of images: [E, n], of held-out labels
    features: list[dict[str, np.ndarray]]  # of each task, what Store.row gives
    embeddings: dict[int, list[Embedding]]  # of the tasks, by the number of images
    sources: list[Embedding]  # of the experts' own tasks, with the most images
    computed: list[Embedding]  # of what each expert computes
    passes: float  # forward passes that an embedding takes, for each image
    prices: np.ndarray  # of one image, for each expert [E]; the probe's pass costs ``probe_price``
    probe_price: float = 1.0

    @property
    def candidates(self) -> np.ndarray:
        """Which experts a task may use [T, E]."""
        return ~np.isnan(self.errors)


def finished(store: Store) -> list[MetaTask]:
    """The tasks whose parts are all there, so that a run that is not over yet has a first result."""
    kinds = ["rows", "scores", *(f"embeddings-{n}" for n in store.settings.embedded)]
    return [task for task in store.tasks if all(store.path(kind, task.name, "safetensors").exists() for kind in kinds)]


def fill(store: Store, task2vec: Task2Vec, tasks: Sequence[MetaTask] | None = None) -> Results:
    """Do whatever is missing for some of the tasks, by default all, and read the rest."""
    settings = store.settings
    tasks = store.tasks if tasks is None else list(tasks)
    names = [task.name for task in tasks]
    experts = {name: store.expert(name) for name in store.experts}
    rows = [store.row(task, experts) for task in tasks]
    embeddings = {n: [store.embedding(task, n, task2vec) for task in tasks] for n in settings.embedded}
    pool = store.pool()
    computed = [store.computed_embedding(name, pool, expert, task2vec) for name, expert in experts.items()]
    stored = [store.scores(task, row) for task, row in zip(tasks, rows, strict=True)]
    families = np.array([task.family for task in tasks])
    by_name = {task.name: task for task in store.tasks}
    own = [by_name[name] for name in store.experts]
    sources = [store.embedding(task, settings.source_images, task2vec) for task in own]
    every = np.stack([row["errors"] for row in rows], 1)
    scores, seconds = {}, {}
    for count in settings.counts:
        for score in SCORES:
            scores[score, count] = np.stack([s[f"{count}/{score}"] for s in stored])
            seconds[score, count] = float(np.median([s[f"{count}/seconds/{score}"] for s in stored]))
    whole = [e.meta["seconds_embedding"] / e.meta["seconds_forward"] for e in embeddings[max(settings.embedded)]]
    members: dict[str, list[str]] = {}
    for task in store.tasks:
        members.setdefault(task.family, []).append(task.name)
    return Results(
        names,
        families,
        np.array([members[task.family].index(task.name) for task in tasks]),
        list(store.experts),
        list(store.kinds.values()),
        np.where(families[:, None] == np.array([task.family for task in own]), np.nan, every.mean(0)),
        every,
        np.array([int(row["labels"].max()) + 1 for row in rows]),
        scores,
        seconds,
        [{count: s[f"{count}/likelihoods"] for count in settings.counts} for s in stored],
        rows,
        embeddings,
        sources,
        computed,
        float(np.median(whole)),
        np.ones(len(store.experts)),
    )
