"""Task2Vec: a labelled data set as a vector (Achille et al., 2019, arXiv 1902.03545)."""

from __future__ import annotations

import copy
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from ..embedding import Embedding
from ..estimation.allocation import Allocation, Need, everyone, share_out, until
from ..estimation.estimator import BATCH_MEAN, FisherDiagonal, fisher
from ..estimation.label_sets import Heads, LabelSet, fisher_of_label_sets
from ..estimation.variational import RobustFisher, variational_fisher
from ..gradients.fast_forward import fast_forward
from .cache import ImageCache
from .data import TASK_TYPES, DataError, TaskData, WithIndex, balanced_weights
from .head import HeadFit, HeadTask, fit_heads
from .precision import dtype_of, reduce_precision
from .probe import Probe, load_probe
from .settings import METHODS as METHODS
from .settings import Settings
from .split_network import FeatureCache

Result = TypeVar("Result")
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 4, 32  # images of a batch, where none are asked for
MAX_CPU_BATCH_PIXELS = 8 * 224**2  # of a batch on a CPU: more take longer each, as their activations leave the caches


class Task2Vec:
    """The paper's pipeline: features in one pass, a linear head fitted on them, the Fisher in a second pass.

    ``probe``: a :class:`Probe`, a name for :func:`load_probe`, or a network whose last layer is linear. ``estimator``
    and ``samples``: see :func:`t2v_fast.fisher`. ``"deflated"`` cotangents are ``samples`` an image on average and are
    spent where the spectra of the images' logit Fishers say that they help the most
    (:func:`t2v_fast.estimation.allocation.share_out`): each embedding visits all images, once, those of equal need
    together. Where images come in their order alone (an iterable, a ``feature_folder``), each has ``samples``.
    ``task_type``: ``"multiclass"`` (one label an image) or ``"multilabel"`` (a 0-1 vector an image). ``balanced`` gives
    each class the same total weight, as the public code's balanced sampler does in expectation, though each image is
    visited once. ``head`` and ``head_options`` go to :func:`t2v_fast.tasks.head.fit_heads`; ``{"weight_decay": "cv"}``
    chooses the penalty by cross-validation. ``dtype``: the precision in which the network runs, float32 by default;
    ``torch.bfloat16`` (:func:`t2v_fast.reduce_precision`) is faster where the processor has instructions for it, and
    its embeddings are not compared with those of float32. The head is fitted in float64 in any case. ``skip_layers``:
    leave out the first layers, by number or name (:meth:`Probe.skipping`), as the public code's option of this name
    does; nothing is backpropagated into them, and in ``feature_folder`` what they make of each batch is kept, for the
    second pass and for later runs. Image files are decoded once where they fit into ``cache_megabytes`` of memory, or
    of the disk at ``cache_folder`` (:class:`t2v_fast.tasks.cache.ImageCache`). ``unsupported="exact"`` for probes that
    transform weights before use, which are refused by default (:class:`t2v_fast.FisherRecorder`). ``batch_size``: by
    default 32 images, on a CPU fewer of large ones (8 of 224 pixels), whose activations then stay in its caches.

    ``tolerance``: the relative error that the estimator may leave, norm of the error over norm of the embedding. Images
    are drawn by importance, the weighted trace of their logit Fisher through the head, and each gets the cotangents
    that its spectrum asks for, until the error that the draws show is below
    (:func:`t2v_fast.estimation.allocation.until`; an iterable and a ``feature_folder`` are visited whole).
    ``standard_error`` is then that of the estimator alone, against ``"exact"`` on all the images; ``meta`` has the
    ``relative_error`` that was reached, the ``images`` of the Fisher and the mean of their ``samples``, of which none
    are asked for. For ``estimator="deflated"``.

    ``method="variational"``: the paper's robust Fisher in place of the Fisher (:mod:`t2v_fast.estimation.variational`),
    for probes of convolutions and linear layers; ``hessian`` is 1 / variance and ``scale`` 1 / lambda^2.
    ``method_options``: ``epochs`` (1), ``beta`` (1e-7), ``learning_rate``, ``head_learning_rate``, and how many images
    are drawn in an epoch, ``num_samples`` (10,000), each class as often as the others where ``balanced``.
    """

    def __init__(
        self,
        probe: Probe | nn.Module | str = "efficientnet-lite0",
        *,
        estimator: str = "deflated",
        samples: int = 2,
        tolerance: float | None = None,
        method: str = "fisher",
        method_options: dict[str, Any] | None = None,
        task_type: str = "multiclass",
        balanced: bool = True,
        head: str = "newton",
        head_options: dict[str, Any] | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        cache_megabytes: int = 512,
        cache_folder: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        skip_layers: int | str = 0,
        feature_folder: str | os.PathLike | None = None,
        unsupported: str = "error",
        seed: int = 0,
        self_check: bool = True,
        progress: bool = False,
    ) -> None:
        settings = Settings(
            estimator=estimator,
            samples=samples,
            tolerance=tolerance,
            method=method,
            method_options=method_options,
            task_type=task_type,
            balanced=balanced,
            head=head,
            head_options=head_options,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_megabytes=cache_megabytes,
            cache_folder=cache_folder,
            device=device,
            dtype=dtype,
            skip_layers=skip_layers,
            feature_folder=feature_folder,
            unsupported=unsupported,
            seed=seed,
            self_check=self_check,
            progress=progress,
        )
        if isinstance(probe, str):
            probe = load_probe(probe)
        elif not isinstance(probe, Probe):
            probe = Probe(probe)
        self.probe = probe
        self.estimator, self.samples, self.tolerance = settings.estimator, settings.samples, settings.tolerance
        self.method, self.method_options = settings.method, settings.method_options
        self.task_type, self.balanced = settings.task_type, settings.balanced
        self.head, self.head_options = settings.head, settings.head_options
        self.num_workers = settings.num_workers
        self.cache_megabytes, self.cache_folder = settings.cache_megabytes, settings.cache_folder
        self.unsupported = settings.unsupported
        self.seed, self.self_check, self.progress = settings.seed, settings.self_check, settings.progress
        self.device = next(probe.network.parameters()).device if settings.device is None else settings.device
        self.batch_size = self._usual_batch() if settings.batch_size is None else settings.batch_size
        self._waited = 0.0  # seconds for data, of the task in hand
        if settings.dtype not in (None, dtype_of(self.probe.network)):
            self.probe.fingerprint()  # of the weights as they were given, which the copy keeps
            self.probe = copy.deepcopy(self.probe)  # rounding cannot be undone
            reduce_precision(self.probe.network, settings.dtype)
        self.probe.network.to(self.device)
        self._feature_cache: FeatureCache | None = None
        if settings.skip_layers:
            self.probe = self.probe.skipping(settings.skip_layers)
            if settings.feature_folder is not None:
                key = f"{self.probe.fingerprint()} {self.probe.cut.name} {dtype_of(self.probe.network)}"
                self._feature_cache = FeatureCache(settings.feature_folder, key)

    @classmethod
    def from_settings(cls, probe: Probe | nn.Module | str, settings: Settings) -> Task2Vec:
        """The pipeline with these settings: ``Task2Vec(probe, ...)`` with each option of ``settings``."""
        return cls(probe, **settings.as_dict())

    def _usual_batch(self) -> int:
        if self.device.type != "cpu" or self.estimator == BATCH_MEAN:  # which estimates another quantity at each size
            return MAX_BATCH_SIZE
        return max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, MAX_CPU_BATCH_PIXELS // self.probe.preprocessing.crop**2))

    def embed(self, data: Any, *, name: str | None = None, skip_unreadable: bool = False) -> Embedding:
        """Embed one task.

        ``data``: a :class:`TaskData`, a map-style or re-iterable torch data set of (image, label), a folder with one
        sub-folder a class, or arrays (images, labels). Raises :class:`t2v_fast.tasks.data.DataError`, naming the image,
        for data that cannot be used, and what :func:`t2v_fast.fisher` and :func:`fit_heads` raise.
        """
        if not isinstance(data, TaskData):
            data = TaskData.of(data, name=name, task_type=self.task_type, skip_unreadable=skip_unreadable)
        return self._within_memory(data, lambda: self._embed(data))

    def _embed(self, data: TaskData) -> Embedding:
        seconds = {}
        with timed(seconds, "features"):
            features, labels = self._features(data)
        codes, classes = data.encode_labels(labels)
        with timed(seconds, "head"):
            task = self._head_task(codes, len(classes))
            (fit,) = self._fit_heads(features, {data.name or "": task}).values()
        with timed(seconds, "fisher"):
            if self.method == "variational":
                found: FisherDiagonal | RobustFisher = self._robust(data, codes, fit.linear, task.weights)
            else:
                found = self._fisher(data, features, codes, fit.linear, task.weights)
        return self._embedding(data, classes, fit, found, seconds)

    def embed_label_sets(
        self,
        data: Any,
        label_sets: Mapping[str, Any],
        *,
        classes: Mapping[str, list[str]] | None = None,
        skip_unreadable: bool = False,
    ) -> dict[str, Embedding]:
        """Embed several tasks over the same images, which are decoded and run through the network once for all.

        ``data`` as in :meth:`embed`, a map-style one; its own labels are not used. ``label_sets``: for each task's name
        its labels, one for each image of ``data``, and ``classes`` the names of its codes, if they have any. Each
        embedding equals that of :meth:`embed` with these labels, to rounding. Raises DataError naming the task.
        """
        if not label_sets:
            raise ValueError("label_sets is empty, expected labels for at least one task")
        if self.method != "fisher" or self.tolerance is not None:
            what = "tolerance" if self.tolerance is not None else f"method {self.method!r}"
            raise ValueError(f"{what} has no shared form: embed the tasks one by one")
        if self.estimator == BATCH_MEAN:
            raise ValueError(f"estimator {BATCH_MEAN!r} has no shared form: embed the tasks one by one")
        if not isinstance(data, TaskData):
            data = TaskData.of(data, name=", ".join(label_sets), skip_unreadable=skip_unreadable)
        if not data.is_map_style:
            raise DataError(f"tasks {', '.join(label_sets)}: {type(data.source).__name__} is no map-style data set")
        for name, labels in label_sets.items():
            if len(labels) != len(data.source):
                raise DataError(f"task {name!r} has {len(labels)} labels for {len(data.source)} images")
        skip = data.skip_unreadable or skip_unreadable
        indexed = TaskData(WithIndex(data.source), data.name, "multiclass", None, data.describe, skip)
        return self._within_memory(indexed, lambda: self._embed_label_sets(indexed, label_sets, classes or {}))

    def _embed_label_sets(
        self, data: TaskData, label_sets: Mapping[str, Any], classes: Mapping[str, list[str]]
    ) -> dict[str, Embedding]:
        seconds = {}
        with timed(seconds, "features"):
            features, indices = self._features(data)
        tasks, found, heads = {}, {}, {}
        with timed(seconds, "head"):
            for name, labels in label_sets.items():
                task = TaskData(data.source, name, self.task_type, classes.get(name), skip_unreadable=True)
                codes, found[name] = task.encode_labels(task.check_labels(labels)[indices])
                heads[name] = self._head_task(codes, len(found[name]))
                task.skipped = data.skipped
                tasks[name] = task
            fits = self._fit_heads(features, heads)
            sets, totals = [], torch.zeros(len(features), dtype=torch.long)
            for name, head in heads.items():
                allocation = self._allocation(data, features, fits[name].linear, head.weights)
                sets.append(LabelSet(fits[name].linear, head.labels, head.weights, allocation))
                totals += 0 if allocation is None else allocation.samples
        with timed(seconds, "fisher"):
            diagonals = self._fisher_of_label_sets(data, sets, everyone(totals))
        share = {stage: s / len(tasks) for stage, s in seconds.items()}
        self._waited /= len(tasks)
        return {
            name: self._embedding(task, found[name], fits[name], diagonal, share)
            for (name, task), diagonal in zip(tasks.items(), diagonals, strict=True)
        }

    def _fisher_of_label_sets(
        self, data: TaskData, sets: list[LabelSet], total: Allocation, first: int = 0, **shard: Any
    ) -> list[FisherDiagonal]:
        """``total``: the cotangents of all sets together, of the examples in ``data``, from number ``first`` on."""
        names = self.probe.embedding_parameters()
        order = total.ordered().batches(self.batch_size) if self._reorders(data) else None
        with self.probe.with_head(Heads(sets).to(self.device, dtype_of(self.probe.network))) as network:
            return fisher_of_label_sets(
                network,
                (images for images, _ in self._batches(data, "Fisher", order)),
                sets,
                self.estimator,
                self.samples,
                likelihood=TASK_TYPES[self.task_type],
                parameters=names,
                unsupported=self.unsupported,
                seed=self.seed,
                self_check=self.self_check,
                first=first,
                examples=None if order is None else torch.cat(order) + first,
                **shard,
            )

    def _head_task(self, codes: Tensor, num_classes: int) -> HeadTask:
        """What a head is fitted to: the codes, and the weights [N] of the examples where classes are balanced."""
        balanced = self.balanced and self.task_type == "multiclass"
        return HeadTask(codes, num_classes, balanced_weights(codes, num_classes) if balanced else None)

    def _fit_heads(self, features: Tensor, tasks: Mapping[str, HeadTask]) -> dict[str, HeadFit]:
        likelihood = TASK_TYPES[self.task_type]
        return fit_heads(features, tasks, likelihood=likelihood, method=self.head, seed=self.seed, **self.head_options)

    def _within_memory(self, data: TaskData, run: Callable[[], Result]) -> Result:
        """``run()``, again with half the batch each time memory runs out: the results are the same to rounding."""
        while True:
            self._waited = 0.0
            try:
                with torch.inference_mode(False):  # in which a head would have no gradients
                    return run()
            except (MemoryError, RuntimeError) as error:
                # The squared gradient of a batch's mean depends on the batch.
                if not out_of_memory(error) or self.batch_size == 1 or self.estimator == BATCH_MEAN:
                    raise
            finally:
                data.cache = None  # holds what this probe's preprocessing made
            # Outside of the handler, whose traceback keeps the tensors of the failed attempt.
            size, self.batch_size = self.batch_size, self.batch_size // 2
            warnings.warn(
                f"task {data.name!r}: out of memory with batches of {size} images, going on with {self.batch_size}",
                stacklevel=3,
            )

    def _reorders(self, data: TaskData) -> bool:
        """Whether images are visited in an order of their own; what skipped layers gave is kept by the batch."""
        return self.estimator == "deflated" and data.is_map_style and self._feature_cache is None

    def _allocation(
        self, data: TaskData, features: Tensor, linear: nn.Linear, weights: Tensor | None
    ) -> Allocation | None:
        """How many cotangents each example gets: ``samples`` on average, or all of them where a batch, which has as
        many backward passes as the neediest of its examples, cannot be made of those with equal needs."""
        if self.estimator != "deflated":
            return None
        if not self._reorders(data):
            return everyone(torch.full((len(features),), self.samples))
        return everyone(share_out(self._need(features, linear, weights), self.samples))

    def _need(self, features: Tensor, linear: nn.Linear, weights: Tensor | None) -> Need:
        weight, bias = linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double()
        logits = F.linear(features.double(), weight, bias)
        return Need.of(logits, weight, weights, TASK_TYPES[self.task_type])

    def _batches(
        self, data: TaskData, stage: str, examples: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = data.batches(self.probe.preprocessing, self.batch_size, self.num_workers, self._cache(data), examples)
        label = f"{data.name or 'task'}: {stage}"
        batches = self._waiting(batches)
        for images, labels in tqdm(batches, desc=label, unit="batch", disable=not self.progress, leave=False):
            images = images.to(self.device, dtype_of(self.probe.network))
            at_cut = self.probe.at_cut
            yield at_cut(images) if self._feature_cache is None else self._feature_cache.get(images, at_cut), labels

    def _waiting(self, batches: Iterator[Result]) -> Iterator[Result]:
        """The batches; the time that they take to come is added up."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches, None)
            finally:
                self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _cache(self, data: TaskData) -> ImageCache | None:
        """The cache of this data, the same one in both passes."""
        if not self.cache_megabytes or not isinstance(data.source, Sized) or not len(data.source):
            return None
        if data.cache is None:
            data.cache = ImageCache(len(data.source), self.cache_megabytes << 20, self.cache_folder)
        return data.cache

    def _features(self, data: TaskData) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        with fast_forward(self.probe.network, lambda _, images: self.probe.features(images), self.device) as forward:
            for images, targets in self._batches(data, "features"):
                features.append(forward(self.probe.network, images).cpu())
                labels.append(targets)
        return torch.cat(features), torch.cat(labels)

    def _fisher(
        self, data: TaskData, features: Tensor, codes: Tensor, linear: nn.Linear, weights: Tensor | None
    ) -> FisherDiagonal:
        if self.tolerance is None:
            return self._visit(data, codes, linear, weights, self._allocation(data, features, linear, weights))
        checked = False

        def visit(allocation: Allocation) -> FisherDiagonal:
            nonlocal checked
            if not self._reorders(data):  # every image has to be visited
                allocation = everyone(allocation.samples)
            found = self._visit(data, codes, linear, weights, allocation, not checked)
            checked = True
            return found

        return until(self._need(features, linear, weights), self.tolerance, visit, self.seed)

    def _visit(
        self,
        data: TaskData,
        codes: Tensor,
        linear: nn.Linear,
        weights: Tensor | None,
        allocation: Allocation | None,
        first: bool = True,
    ) -> FisherDiagonal:
        """The Fisher of the images of an allocation, or of all."""
        order, targets = None, codes
        if allocation is not None and self._reorders(data):
            allocation = allocation.ordered()
            order, targets = allocation.batches(self.batch_size), codes[allocation.examples]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            seen = 0
            for images, _ in self._batches(data, "Fisher", order):
                yield images, targets[seen : seen + len(images)]
                seen += len(images)

        with self.probe.with_head(linear.to(self.device, dtype_of(self.probe.network))) as network:
            return fisher(
                network,
                batches(),
                self.estimator,
                self.samples,
                likelihood=TASK_TYPES[self.task_type],
                parameters=self.probe.embedding_parameters(),
                unsupported=self.unsupported,
                weights=weights,
                seed=self.seed,
                self_check=self.self_check and first,
                estimator_error=self.tolerance is not None,
                allocation=allocation,
            )

    def _robust(self, data: TaskData, codes: Tensor, linear: nn.Linear, weights: Tensor | None) -> RobustFisher:
        """The variances, learned on images drawn with replacement."""
        options = {"num_samples": 10_000, **self.method_options}
        draws = options.pop("num_samples")
        if draws < 1:
            raise ValueError(f"num_samples is {draws}, expected at least 1")
        if not data.is_map_style:
            raise DataError(f"task {data.name!r}: method 'variational' draws images, which takes a map-style data set")
        if data.skipped:
            raise DataError(f"task {data.name!r}: method 'variational' needs every image, but {data.skipped[0]} is bad")
        generator = torch.Generator().manual_seed(self.seed)
        chances = torch.ones(len(codes), dtype=torch.float64) if weights is None else weights
        targets = codes.to(self.device) if self.task_type == "multiclass" else codes.to(self.device, torch.float32)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            drawn = torch.multinomial(chances, draws, replacement=True, generator=generator)
            places = drawn.tolist()
            some = TaskData(
                Subset(data.source, places), data.name, self.task_type, None, lambda k: data.describe(places[k])
            )
            seen = 0
            for images, _ in self._batches(some, f"variances, epoch {epoch + 1}"):
                yield images, targets[drawn[seen : seen + len(images)].to(self.device)]
                seen += len(images)

        linear = linear.to(self.device, dtype_of(self.probe.network))
        with self.probe.with_head(linear) as network:
            named = dict(network.named_parameters())
            return variational_fisher(
                network,
                batches,
                [name for name in self.probe.embedding_parameters() if named[name].dim() > 1],
                head=linear.parameters(),
                likelihood=TASK_TYPES[self.task_type],
                generator=torch.Generator(self.device).manual_seed(self.seed),
                **options,
            )

    def _embedding(
        self,
        data: TaskData,
        classes: list,
        fit: HeadFit,
        found: FisherDiagonal | RobustFisher,
        seconds: dict[str, float],
    ) -> Embedding:
        if isinstance(found, RobustFisher):
            how = {"method": "variational", "losses": list(found.losses)}
        else:
            how = {"estimator": self.estimator, "samples": self.samples}
            if self.tolerance is not None:
                how |= {
                    "samples": found.samples,
                    "images": found.visited,
                    "tolerance": self.tolerance,
                    "relative_error": found.relative_error(),
                }
        return embedding_of(
            found,
            meta={
                "task": data.name,
                "task_type": self.task_type,
                "classes": [str(c) for c in classes],
                **how,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "head_loss": fit.loss,
                "head_accuracy": fit.accuracy,
                "head_iterations": fit.iterations,
                "head_converged": fit.converged,
                "head_weight_decay": fit.weight_decay,
                "skipped_images": [str(s) for s in data.skipped],
                "seconds_waiting_for_data": round(self._waited, 3),
                "seconds": {stage: round(s, 3) for stage, s in seconds.items()},
            },
            fingerprint=self.fingerprint(),
        )

    def _family(self) -> str | dict[str, Any]:
        if self.method == "fisher":
            return family_of(self.estimator)
        return {"method": self.method, **self.method_options}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that must agree for two embeddings to be comparable."""
        names = "\n".join(self.probe.embedding_parameters())
        return {
            "probe": self.probe.name,
            "weights": self.probe.fingerprint(),
            "dtype": str(dtype_of(self.probe.network)).removeprefix("torch."),
            "layers": hashlib.sha256(names.encode()).hexdigest(),
            "granularity": "filter",
            "family": self._family(),
            "likelihood": TASK_TYPES[self.task_type],
            "balanced": self.balanced,
            "head": {"method": self.head, **self.head_options},
            "preprocessing": self.probe.preprocessing.as_dict(),
        }


def family_of(estimator: str) -> str:
    """What embeddings of an estimator can be compared with: the unbiased ones share an expectation, two differ."""
    return estimator if estimator in (BATCH_MEAN, "empirical") else "fisher"


def embedding_of(found: FisherDiagonal | RobustFisher, meta: dict[str, Any], fingerprint: dict[str, Any]) -> Embedding:
    """The embedding whose entries are those of a filter-wise diagonal, or of variances, parameter after parameter."""
    error = None
    if isinstance(found, RobustFisher):
        entries = found.precision
        hessian, scale = (torch.cat(list(v.values())).double().cpu().numpy() for v in (entries, found.scale))
    else:
        entries, hessian = found, found.vector().numpy()
        scale, errors = np.ones_like(hessian), found.error_vector().numpy()
        error = errors if np.isfinite(errors).all() else None
    stops = np.cumsum([len(v) for v in entries.values()]).tolist()
    return Embedding(
        hessian=hessian,
        scale=scale,
        standard_error=error,
        layers=tuple(zip(entries, [0, *stops[:-1]], stops, strict=True)),
        num_examples=found.num_examples,
        meta=meta,
        fingerprint=fingerprint,
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's: Python's, CUDA's or that of torch on a CPU, which has no type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the body took."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
