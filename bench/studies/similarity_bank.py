"""What is measured on each task of a bank: its Fisher under several heads, and the activations of every layer.

One pass over the images of a task serves all heads. Finished tasks are kept in a folder and used again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from t2v_fast import Embedding, Probe, Task2Vec, load_probe
from t2v_fast.demo import DemoTask
from t2v_fast.files import write_atomically
from t2v_fast.tasks.data import TaskData, WithIndex
from t2v_fast.tasks.head import HeadFit, HeadTask, fit_head
from t2v_fast.tasks.task_run import TaskRun

SIZE = 64  # pixels of the probe's input
FLAT = 1e-3  # a head times this gives every class the same probability, nearly
RANDOM_CLASSES = 32
RANK = 64  # of whitened features
HEADS = ("default", "cv", "flat", "random")
# Means over a task's images, for each filter of every layer: its mean over positions, the variance of that between
# images, and of the classes' means. The last is what the labels say.
MOMENTS = ("mean", "variance", "between")


class Task(Protocol):
    """A task of a bank."""

    name: str
    family: str

    def draw(self, count: int, split: int, seed: int = 0) -> DemoTask: ...


def flat(fit: HeadFit) -> HeadFit:
    """The same head, so unsure of itself that every class is as likely as the others."""
    linear = nn.Linear(fit.linear.in_features, fit.linear.out_features)
    with torch.no_grad():
        linear.weight.copy_(fit.linear.weight * FLAT)
        linear.bias.copy_(fit.linear.bias * FLAT)
    return replace(fit, linear=linear)


def random_head(features: Tensor) -> nn.Linear:
    """A head that no label and no task has changed, and that gives every class the same probability, nearly."""
    linear = nn.Linear(features.shape[1], RANDOM_CLASSES)
    with torch.no_grad():
        draws = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
        linear.weight.copy_(draws * FLAT / features.shape[1] ** 0.5)
        linear.bias.zero_()
    return linear


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean of the features [N, D] of each class [C, D]."""
    members = nn.functional.one_hot(labels, classes).to(features)
    return members.T @ features / members.sum(0)[:, None]


def heads_of(features: Tensor, task: HeadTask, which: Sequence[str]) -> dict[str, HeadFit]:
    """The heads of a task by name: ``default``, ``cv`` (cross-validated), ``flat`` (that one, flat), and
    ``random``."""
    given = {"num_classes": task.num_classes, "weights": task.weights}
    default = fit_head(features, task.labels, **given)
    chosen = fit_head(features, task.labels, weight_decay="cv", **given)
    every: dict[str, HeadFit] = {
        "default": default,
        "cv": chosen,
        "flat": flat(chosen),
        "random": replace(default, linear=random_head(features)),
    }
    return {name: every[name] for name in which}


def pooled_activations(probe: Probe, images: Sequence[Any]) -> dict[str, Tensor]:
    """Of every layer that an embedding covers, each filter's mean output over positions, for each image [N, O]."""
    modules = dict(probe.network.named_modules())
    found: dict[str, list[Tensor]] = {name: [] for name in probe.embedding_parameters()}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found[name].append(output.flatten(2).double().mean(2))

    handles = [modules[name.rpartition(".")[0]].register_forward_hook(hook(name)) for name in found]
    try:
        with torch.no_grad():
            for batch in torch.stack([probe.preprocessing(image) for image in images]).split(20):
                probe.features(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def moments_of(activations: dict[str, Tensor], labels: Tensor, classes: int) -> dict[str, np.ndarray]:
    """:data:`MOMENTS` of all layers [D], in the order of an embedding."""
    parts: dict[str, list[Tensor]] = {moment: [] for moment in MOMENTS}
    for x in activations.values():
        parts["mean"].append(x.mean(0))
        parts["variance"].append(x.var(0, unbiased=False))
        parts["between"].append(class_means(x, labels, classes).var(0, unbiased=False))
    return {moment: torch.cat(values).numpy() for moment, values in parts.items()}


def embed_label_sets(
    task2vec: Task2Vec, images: np.ndarray, labels: dict[str, np.ndarray], which: Sequence[str]
) -> tuple[Tensor, dict[str, dict[str, Embedding]]]:
    """Embed label sets over the same images, each with several heads, from one forward pass.

    Returns:
        The features [N, D], and by label set and head the embedding that ``Task2Vec`` would make with this head.
    """
    data = TaskData.of((images, next(iter(labels.values()))))
    shared = TaskRun(TaskData(WithIndex(data.source), "shared", "multiclass"))
    task2vec.compute_features(shared)
    runs: dict[tuple[str, str], TaskRun] = {}
    for name, codes in labels.items():
        task = TaskData(data.source, name, "multiclass")
        encoded = TaskRun(task, shared.features, torch.from_numpy(np.unique(codes, return_inverse=True)[1]))
        task2vec.encode_labels(encoded)
        for head, fit in heads_of(shared.features, encoded.head_task, which).items():
            run = runs[name, head] = replace(encoded, fit=fit)
            task2vec.allocate(run)
    task2vec.compute_shared_fisher(shared, list(runs.values()))
    found: dict[str, dict[str, Embedding]] = {name: {} for name in labels}
    for (name, head), run in runs.items():
        found[name][head] = task2vec.make_embedding(run)
    return shared.features, found


def centroids(features: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The class means without their mean, times the root of the class's share [C, F]."""
    kinds, counts = np.unique(codes, return_counts=True)
    means = np.stack([features[codes == k].mean(0, dtype=np.float64) for k in kinds])
    share = counts / counts.sum()
    return (means - share @ means) * np.sqrt(share)[:, None]


def scatter_distances(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Cosine distances [A, B] between the matrices of between-class scatter M^T M, of :func:`centroids` M."""
    sizes = [[np.linalg.norm(m @ m.T) for m in side] for side in (a, b)]
    inner = np.array([[np.square(m @ n.T).sum() for n in b] for m in a])
    return 1 - inner / np.outer(*sizes)


def whitening(features: np.ndarray, rank: int = RANK) -> np.ndarray:
    """A map [F, R] to the leading principal components of features, each of one variance. It sees no label."""
    _, sizes, axes = np.linalg.svd(features - features.mean(0, dtype=np.float64), full_matrices=False)
    return axes[:rank].T / sizes[:rank]


@dataclass
class Bank:
    """What was measured on the tasks of a bank, in their order."""

    names: list[str]
    families: np.ndarray
    embeddings: dict[str, list[Embedding]]  # by head
    moments: dict[str, np.ndarray]  # [T, D]
    features: list[np.ndarray]  # of each task [N, F]
    labels: list[np.ndarray]

    @property
    def mean_features(self) -> np.ndarray:
        return np.stack([f.mean(0, dtype=np.float64) for f in self.features])

    def of_layers(self, moment: str) -> list[np.ndarray]:
        """A moment by layer, [T, O] each."""
        return [self.moments[moment][:, a:b] for _, a, b in next(iter(self.embeddings.values()))[0].layers]


def pipeline(size: int = SIZE) -> Task2Vec:
    """Task2Vec without a self-check: it would compare heads side by side whose logits differ a thousandfold in size,
    and take one head's rounding for another's error."""
    probe = load_probe(size=size)
    return Task2Vec(probe, batch_size=20, self_check=False)


def measure_task(task2vec: Task2Vec, drawn: DemoTask, which: Sequence[str]) -> tuple[dict, dict[str, Embedding]]:
    """The arrays and embeddings of one task."""
    features, found = embed_label_sets(task2vec, drawn.images, {drawn.name: drawn.labels}, which)
    codes = torch.from_numpy(np.unique(drawn.labels, return_inverse=True)[1])
    moments = moments_of(pooled_activations(task2vec.probe, drawn.images), codes, int(codes.max()) + 1)
    return {"features": features.numpy(), "labels": codes.numpy(), **moments}, found[drawn.name]


def measure_bank(
    folder: Path, tasks: Sequence[Task], task2vec: Task2Vec, images: int, which: Sequence[str], drawn: int | None = None
) -> Bank:
    """Do whatever is missing in ``folder``, and read the rest.

    Args:
        folder: where results are kept.
        tasks: the tasks of the bank.
        task2vec: the pipeline.
        images: how many images of a task are embedded.
        which: the heads, see :func:`heads_of`.
        drawn: how many images are drawn, of which the first ``images`` are embedded; by default as many.

    Raises:
        ValueError: a file in ``folder`` is of other images or settings.
    """
    rows: list[tuple[dict[str, np.ndarray], dict[str, Embedding]]] = []
    for task in tasks:
        slug = "".join(c if c.isalnum() else "-" for c in task.name)
        data = task.draw(drawn or images, 0)
        data = replace(data, images=data.images[:images], labels=data.labels[:images])
        settings = json.dumps([data.digest, task2vec.fingerprint()], sort_keys=True)
        path = folder / slug / "arrays.safetensors"
        if not path.exists():
            arrays, found = measure_task(task2vec, data, which)
            for head, embedding in found.items():
                (folder / slug).mkdir(parents=True, exist_ok=True)
                embedding.save(folder / slug / f"{head}.safetensors")
            write_atomically(path, save(arrays, {"settings": settings}))  # the last file of a task
            print(f"measured {task.name}", flush=True)
        with safe_open(path, "numpy") as file:
            if file.metadata()["settings"] != settings:
                raise ValueError(f"{path} is of other images or settings: remove {folder}, or pass another --output")
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        rows.append((arrays, {head: Embedding.load(folder / slug / f"{head}.safetensors") for head in which}))
    return Bank(
        [t.name for t in tasks],
        np.array([t.family for t in tasks]),
        {head: [embeddings[head] for _, embeddings in rows] for head in which},
        {m: np.stack([arrays[m] for arrays, _ in rows]) for m in MOMENTS},
        [arrays["features"] for arrays, _ in rows],
        [arrays["labels"] for arrays, _ in rows],
    )
