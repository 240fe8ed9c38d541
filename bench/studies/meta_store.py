"""What claims.py and baseline.py share: embeddings of the meta-task, and how hard each task is for a few experts.

Embeds every task (EfficientNet-Lite0), trains small experts, and finds the test error of one linear head for each task
and expert. Finished parts are kept and used again; parts with other settings or other images are refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from bench.studies.meta_task import EXPERT, TEST, TRAIN, MetaTask
from t2v_fast import Embedding, Task2Vec, load_probe
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

    def row(self, task: MetaTask, experts: dict[str, Expert]) -> dict[str, float]:
        """The test error of each expert for one task; what is missing is added."""
        path, train = self.path("rows", task.name, "json"), self.data(task, TRAIN)
        stored = json.loads(path.read_text()) if path.exists() else {"digest": train.digest, "experts": {}}
        if stored["digest"] != train.digest:
            raise ValueError(f"{path} is of other images: remove it, or pass another --output")
        known = stored["experts"]
        if missing := [name for name in experts if name not in known]:
            test = self.data(task, TEST)
            x, held_out = prepare(train.images), prepare(test.images)
            labels, answers = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
            for name in missing:
                features, _ = outputs(experts[name], x)
                others, _ = outputs(experts[name], held_out)
                known[name] = test_error(
                    features, labels, others, answers, len(train.classes), self.settings.weight_decay
                )
            write_atomically(path, json.dumps(stored).encode())
            best = min(known, key=lambda name: known[name])
            print(f"{task.name}: best expert {best}, error {known[best]:.3f}", flush=True)
        return stored["experts"]


@dataclass
class Results:
    """Everything of a filled store: embeddings and families of the tasks, and errors [tasks, experts]."""

    names: list[str]
    families: list[str]
    domains: list[str]
    embeddings: list[Embedding]
    experts: list[int]  # the experts' own tasks
    errors: np.ndarray  # NaN where the task is the expert's own, as in the paper: it has seen its classes

    @property
    def mean_features(self) -> np.ndarray:
        return np.array([e.meta["mean_feature"] for e in self.embeddings])


def fill(store: Store, task2vec: Task2Vec | None = None) -> Results:
    """Do whatever is missing, and read the rest."""
    if task2vec is None:
        probe = load_probe(size=store.settings.size)
        task2vec = Task2Vec(probe, seed=store.settings.seed)
    experts = {name: store.expert(name) for name in store.experts}
    rows = [store.row(task, experts) for task in store.tasks]
    names = [task.name for task in store.tasks]

    own = np.array([[name == task for name in store.experts] for task in names])
    errors = np.array([[row[name] for name in store.experts] for row in rows])
    return Results(
        names,
        [task.family for task in store.tasks],
        [task.domain for task in store.tasks],
        [store.embedding(task, task2vec) for task in store.tasks],
        [names.index(name) for name in store.experts],
        np.where(own, np.nan, errors),
    )
