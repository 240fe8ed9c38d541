"""The public Task2Vec code (aws-cv-task2vec and its forks): its Fisher replaced in place, its embeddings read.

``accelerate(task2vec)`` gives a loaded module's class ``Task2Vec`` another ``montecarlo_fisher``; everything else of
that code runs as before. Its own squares the mean gradient of batches of drawn labels with batch norm in training
mode; this one is the Fisher: squares of each example's gradient, evaluation mode, every image once.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..embedding import Embedding
from ..fisher import fisher
from ..task2vec import balanced_weights
from .fim import evaluating

_ORIGINAL = "_t2v_fast_original"
BATCH = 64  # of the public code, unless its loader_opts have another


class _From(nn.Module):
    """A probe network entered at a layer."""

    def __init__(self, probe: nn.Module, start: int) -> None:
        super().__init__()
        self.probe, self.start = probe, start

    def forward(self, x: Tensor) -> Tensor:
        return self.probe(x, start_from=self.start) if self.start else self.probe(x)


def accelerate(
    task2vec: ModuleType,
    *,
    estimator: str = "deflated",
    samples: int = 2,
    balanced: bool = True,
    batch_scale: bool = False,
    **options: Any,
) -> None:
    """Replace ``Task2Vec.montecarlo_fisher`` of the loaded module ``task2vec``; :func:`restore` undoes it.

    The replacement sets ``grad2_acc`` (the parameter's shape) and ``grad_counter`` (the number of examples) of every
    parameter above ``skip_layers``. ``estimator`` and ``samples`` as in :func:`t2v_fast.fisher`, to which ``options``
    go; ``epochs`` multiplies ``samples`` of a random estimator and changes nothing else. ``balanced`` weighs examples
    so that each class counts the same, as the public code's sampler does. ``batch_scale`` divides by the batch size:
    the squared mean gradient of a batch is about that much smaller than the mean square.

    The model runs in evaluation mode and is left in its own. Raises TypeError for a module without the class, and when
    called what :func:`t2v_fast.fisher` raises.
    """
    owner = getattr(task2vec, "Task2Vec", None)
    if not isinstance(owner, type) or not callable(getattr(owner, "montecarlo_fisher", None)):
        name = getattr(task2vec, "__name__", task2vec)
        raise TypeError(f"{name} has no class Task2Vec with montecarlo_fisher: pass the public code's module task2vec")

    def montecarlo_fisher(self: Any, dataset: Dataset, epochs: int = 1) -> None:
        _fisher_of(self, dataset, epochs, estimator, samples, balanced, batch_scale, options)

    if not hasattr(owner, _ORIGINAL):
        setattr(owner, _ORIGINAL, owner.montecarlo_fisher)
    owner.montecarlo_fisher = montecarlo_fisher


def restore(task2vec: ModuleType) -> None:
    """Undo :func:`accelerate`. Does nothing to a module that was not accelerated."""
    owner = getattr(task2vec, "Task2Vec", None)
    if hasattr(owner, _ORIGINAL):
        owner.montecarlo_fisher = getattr(owner, _ORIGINAL)
        delattr(owner, _ORIGINAL)


def _fisher_of(
    task2vec: Any,
    dataset: Dataset,
    epochs: int,
    estimator: str,
    samples: int,
    balanced: bool,
    batch_scale: bool,
    options: dict[str, Any],
) -> None:
    model, start = task2vec.model, task2vec.skip_layers
    if task2vec.max_samples is not None and task2vec.max_samples < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        dataset = Subset(dataset, sorted(order[: task2vec.max_samples].tolist()))
    loader_options = dict(task2vec.loader_opts)
    batch = loader_options.get("batch_size", BATCH)
    loader = DataLoader(dataset, batch_size=batch, num_workers=loader_options.get("num_workers", 0))
    weights = None
    if balanced and not task2vec.bernoulli:
        _, codes = torch.unique(torch.as_tensor(_labels(dataset)), return_inverse=True)
        weights = balanced_weights(codes, int(codes.max()) + 1)
    entered = _From(model, start)
    wanted = list(model.parameters()) if not start else [p for m in model.layers[start:] for p in m.parameters()]
    names = {name for name, p in entered.named_parameters() if any(p is w for w in wanted)}
    with evaluating(model):
        found = fisher(
            entered,
            loader,
            estimator,
            samples if estimator in ("exact", "empirical") else samples * epochs,
            "parameter",
            likelihood="sigmoid" if task2vec.bernoulli else "softmax",
            parameters=sorted(names),
            weights=weights,
            device=next(model.parameters()).device,
            **options,
        )
    for name, p in entered.named_parameters():
        p.grad_counter = 0
        if hasattr(p, "grad2_acc"):
            del p.grad2_acc  # of another task
        if name in found:
            p.grad2_acc = (found[name] / batch if batch_scale else found[name]).to(p)
            p.grad_counter = found.num_examples


def _labels(dataset: Any) -> Any:
    """The labels, without loading an image where the data set keeps them apart, as the public code looks for them."""
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset)
        return [whole[i] for i in dataset.indices]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    if hasattr(dataset, "tensors"):
        return dataset.tensors[1].tolist()
    return [int(dataset[i][1]) for i in range(len(dataset))]


# What a pickle of the public code's embedding needs, and nothing that does anything.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("builtins", "object"),
    ("__builtin__", "object"),
    ("collections", "OrderedDict"),
}


class _State:
    """Stands for the public code's Embedding; takes whatever state it had."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "Embedding" and module.rpartition(".")[2] == "task2vec":
            return _State
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no embedding needs")
        return super().find_class(module, name)


def read_embedding(path: str | os.PathLike) -> Embedding:
    """The embedding in a pickle that the public code wrote.

    Nothing in the file is run: only arrays and plain values are taken. Its fingerprint says where it came from and how
    long it is, so it can be compared with others of the kind but not with this library's. ``num_examples`` is 1: the
    file does not say. :func:`t2v_fast.export.public_pickle` writes one. Raises ValueError, naming the file, for
    anything else than an embedding.
    """
    path = Path(path)
    try:
        state = vars(_Reader(io.BytesIO(path.read_bytes())).load())
        hessian, scale = (np.asarray(state[name], dtype=np.float64) for name in ("hessian", "scale"))
        meta = dict(_plain(state.get("meta") or {}))
        fingerprint = {"source": "aws-cv-task2vec", "entries": len(hessian)}
        meta.setdefault("task", meta.get("task_name") or path.stem)
        return Embedding(hessian, scale, (("all", 0, len(hessian)),), 1, None, meta, fingerprint)
    except OSError:
        raise
    except Exception as error:  # a pickle can fail with anything
        raise ValueError(f"{path} is no embedding of the public Task2Vec code: {error}") from error


def _plain(value: Any) -> Any:
    """Arrays and numpy's numbers as JSON has them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def read_embeddings(folder: str | os.PathLike) -> Iterator[Embedding]:
    """:func:`read_embedding` of every ``*.p`` and ``*.pkl`` of a folder, by name."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".p", ".pkl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no file *.p or *.pkl")
    yield from map(read_embedding, files)
