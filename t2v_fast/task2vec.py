"""Task2Vec: a labelled data set as a vector (Achille et al., 2019, arXiv 1902.03545)."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .cotangents import check_estimator
from .data import TASK_TYPES, TaskData, balanced_weights, check_task_type
from .embedding import Embedding
from .fisher import BATCH_MEAN, FisherDiagonal, fisher
from .head import HeadFit, fit_head
from .probe import Probe, load_probe


class Task2Vec:
    """The paper's pipeline: features in one pass, a linear head fitted on them, the Fisher in a second pass.

    ``probe``: a :class:`Probe`, a name for :func:`load_probe`, or a network whose last layer is linear.
    ``estimator`` and ``samples``: see :func:`t2v_fast.fisher`. ``task_type``: ``"multiclass"`` (one label an image) or
    ``"multilabel"`` (a 0-1 vector an image). ``balanced`` gives each class the same total weight, as the public code's
    balanced sampler does in expectation, though each image is visited once. ``head`` and ``head_options`` go to
    :func:`t2v_fast.head.fit_head`. ``dtype``: the precision in which the network runs, float32 by default;
    ``torch.bfloat16`` is faster where the processor has instructions for it, and its embeddings are not compared with
    those of float32. The head is fitted in float64 in any case.
    """

    def __init__(
        self,
        probe: Probe | nn.Module | str = "efficientnet-lite0",
        *,
        estimator: str = "deflated",
        samples: int = 2,
        task_type: str = "multiclass",
        balanced: bool = True,
        head: str = "newton",
        head_options: dict[str, Any] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        self_check: bool = True,
        progress: bool = False,
    ) -> None:
        check_task_type(task_type)
        if estimator != BATCH_MEAN:
            check_estimator(estimator, samples)
        if isinstance(probe, str):
            probe = load_probe(probe)
        elif not isinstance(probe, Probe):
            probe = Probe(probe)
        self.probe = probe
        self.estimator, self.samples = estimator, samples
        self.task_type, self.balanced = task_type, balanced
        self.head, self.head_options = head, dict(head_options or {})
        self.batch_size, self.num_workers = batch_size, num_workers
        self.device = torch.device(device) if device is not None else next(probe.network.parameters()).device
        self.seed, self.self_check, self.progress = seed, self_check, progress
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, expected a floating-point one such as torch.bfloat16")
        if dtype not in (None, next(self.probe.network.parameters()).dtype):
            self.probe.fingerprint()  # of the weights as they were given, which the copy keeps
            self.probe = copy.deepcopy(self.probe)  # rounding cannot be undone
            self.probe.network.to(dtype)
        self.probe.network.to(self.device)

    def embed(self, data: Any, *, name: str | None = None, skip_unreadable: bool = False) -> Embedding:
        """Embed one task.

        ``data``: a :class:`TaskData`, a map-style or re-iterable torch data set of (image, label), a folder with one
        sub-folder a class, or arrays (images, labels). Raises :class:`t2v_fast.data.DataError`, naming the image, for
        data that cannot be used, and what :func:`t2v_fast.fisher` and :func:`fit_head` raise.
        """
        if not isinstance(data, TaskData):
            data = TaskData.of(data, name=name, task_type=self.task_type, skip_unreadable=skip_unreadable)
        seconds = {}
        with _timed(seconds, "features"):
            features, labels = self._features(data)
        codes, classes = data.encode_labels(labels)
        weights = None
        if self.balanced and self.task_type == "multiclass":
            weights = balanced_weights(codes, len(classes))
        with _timed(seconds, "head"):
            fit = fit_head(
                features,
                codes,
                num_classes=len(classes),
                weights=weights,
                likelihood=TASK_TYPES[self.task_type],
                method=self.head,
                seed=self.seed,
                **self.head_options,
            )
        with _timed(seconds, "fisher"):
            diagonal = self._fisher(data, codes, fit.linear, weights)
        return self._embedding(data, classes, fit, diagonal, seconds)

    def _batches(self, data: TaskData, stage: str) -> Iterator[tuple[Tensor, Tensor]]:
        batches = data.batches(self.probe.preprocessing, self.batch_size, self.num_workers)
        label = f"{data.name or 'task'}: {stage}"
        for images, labels in tqdm(batches, desc=label, unit="batch", disable=not self.progress, leave=False):
            yield images.to(self.device, next(self.probe.network.parameters()).dtype), labels

    def _features(self, data: TaskData) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for images, targets in self._batches(data, "features"):
            features.append(self.probe.features(images).cpu())
            labels.append(targets)
        return torch.cat(features), torch.cat(labels)

    def _fisher(self, data: TaskData, codes: Tensor, linear: nn.Linear, weights: Tensor | None) -> FisherDiagonal:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            seen = 0
            for images, _ in self._batches(data, "Fisher"):
                yield images, codes[seen : seen + len(images)]
                seen += len(images)

        parameter = next(self.probe.network.parameters())
        with self.probe.with_head(linear.to(parameter.device, parameter.dtype)) as network:
            return fisher(
                network,
                batches(),
                self.estimator,
                self.samples,
                likelihood=TASK_TYPES[self.task_type],
                parameters=self.probe.embedding_parameters(),
                weights=weights,
                seed=self.seed,
                self_check=self.self_check,
            )

    def _embedding(
        self, data: TaskData, classes: list, fit: HeadFit, diagonal: FisherDiagonal, seconds: dict[str, float]
    ) -> Embedding:
        hessian = diagonal.vector().numpy()
        error = diagonal.standard_error_vector().numpy()
        stops = np.cumsum([len(v) for v in diagonal.values()]).tolist()
        layers = [(name, start, stop) for name, start, stop in zip(diagonal, [0, *stops[:-1]], stops, strict=True)]
        return Embedding(
            hessian=hessian,
            scale=np.ones_like(hessian),
            standard_error=error if np.isfinite(error).all() else None,
            layers=tuple(layers),
            num_examples=diagonal.num_examples,
            meta={
                "task": data.name,
                "task_type": self.task_type,
                "classes": [str(c) for c in classes],
                "estimator": self.estimator,
                "samples": self.samples,
                "seed": self.seed,
                "head_loss": fit.loss,
                "head_accuracy": fit.accuracy,
                "head_iterations": fit.iterations,
                "head_converged": fit.converged,
                "skipped_images": [str(s) for s in data.skipped],
                "seconds": {stage: round(s, 3) for stage, s in seconds.items()},
            },
            fingerprint=self.fingerprint(),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that must agree for two embeddings to be comparable."""
        names = "\n".join(self.probe.embedding_parameters())
        # The unbiased estimators share an expectation, so their embeddings can be compared; the other two differ.
        family = self.estimator if self.estimator in (BATCH_MEAN, "empirical") else "fisher"
        return {
            "probe": self.probe.name,
            "weights": self.probe.fingerprint(),
            "dtype": str(next(self.probe.network.parameters()).dtype).removeprefix("torch."),
            "layers": hashlib.sha256(names.encode()).hexdigest(),
            "granularity": "filter",
            "family": family,
            "likelihood": TASK_TYPES[self.task_type],
            "balanced": self.balanced,
            "head": {"method": self.head, **self.head_options},
            "preprocessing": self.probe.preprocessing.as_dict(),
        }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
