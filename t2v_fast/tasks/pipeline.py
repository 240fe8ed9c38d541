"""Task2Vec: a labelled data set as a vector (Achille et al., 2019, arXiv 1902.03545)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..embedding import Embedding, network_fingerprint
from ..estimation.estimator import BATCH_MEAN
from ..estimation.variational import RobustFisher
from ..gradients.sharding import sharding_of
from .assemble import embedding_of, family_of
from .data import TASK_TYPES, DataError, TaskData, WithIndex
from .memory import keep_memory_of, release_memory_of
from .precision import dtype_of
from .probe import Probe
from .settings import Settings
from .shares import embed_in_shares
from .stages import Stages
from .task_run import TaskRun, timed

Result = TypeVar("Result")


class Task2Vec(Stages):
    """The paper's pipeline: features, a linear head fitted to them, and the Fisher of the network with this head.

    ``Task2Vec(probe, **options)`` checks its options as :class:`t2v_fast.tasks.settings.Settings` does;
    :meth:`from_settings` takes such an object. The stages of a task are public methods, from
    :meth:`compute_features` to :meth:`make_embedding`, which pass on a :class:`t2v_fast.tasks.task_run.TaskRun`.

    Args:
        probe: a :class:`Probe`, a name for :func:`load_probe`, or a network whose last layer is linear.
        estimator: see :func:`t2v_fast.fisher`. ``"deflated"`` spends its cotangents where the spectra of the images'
            logit Fishers say that they help the most (:func:`t2v_fast.estimation.allocation.share_out`). All images
            are visited once, and images that get equally many cotangents are visited together. Images that can only be
            read in order (an iterable, or a ``feature_folder``) get ``samples`` each.
        samples: cotangents for each image, on average.
        tolerance: the relative error that the estimator may leave: the norm of the error over the norm of the
            embedding. Images are drawn by importance, the weighted trace of their logit Fisher through the head, and
            each gets as many cotangents as its spectrum asks for, until the estimated error is below the tolerance
            (:func:`t2v_fast.estimation.tolerance.sample_until`). With an iterable or a ``feature_folder``, all images
            are visited. ``samples`` is ignored. ``standard_error`` is then the error against ``"exact"`` on all images,
            and ``meta`` has the ``relative_error`` that was reached, the number of ``images`` of the Fisher and the
            mean number of cotangents, ``samples``. Needs ``estimator="deflated"`` and ``method="fisher"``.
        method: ``"fisher"``, or ``"variational"`` for the paper's robust Fisher
            (:mod:`t2v_fast.estimation.variational`), for probes of convolutions and linear layers. Then ``hessian`` is
            1 / variance, and ``scale`` is 1 / lambda^2.
        method_options: for ``"variational"``: ``epochs`` (1), ``beta`` (1e-7), ``learning_rate``,
            ``head_learning_rate``, and ``num_samples`` (10,000), the number of images that are drawn in an epoch, each
            class as often as the others where ``balanced``.
        task_type: ``"multiclass"`` (one label for each image) or ``"multilabel"`` (a 0-1 vector for each image).
        balanced: give each class the same total weight. The public code's balanced sampler does so in expectation;
            here each image is still visited once.
        head: the method that fits the head, see :func:`t2v_fast.tasks.head.fit_heads`.
        head_options: options of that function; ``{"weight_decay": "cv"}`` chooses the penalty by cross-validation, and
            ``{"temperature": 1000}`` makes every class nearly as likely as the others (a *flat* head).
        batch_size: images in a batch; by default 32. On a CPU the default is smaller for large images (8 at 224
            pixels), so that their activations stay in the caches.
        num_workers: processes that load images.
        cache_megabytes: memory, or disk space in ``cache_folder``, for decoded image files
            (:class:`t2v_fast.tasks.cache.ImageCache`). Files that fit are decoded once.
        cache_folder: see ``cache_megabytes``.
        activation_megabytes: memory for activations that are kept from the pass for the features to the Fisher. Images
            whose activations fit are read once, and are usually run through the network once
            (:mod:`t2v_fast.estimation.one_forward`). Results agree to rounding. 0 stands for two passes over all
            images, which an iterable, a ``feature_folder``, a ``tolerance`` and tasks over the same images take anyway.
        device: the device that the network runs on; by default the device that it is on.
        dtype: the precision in which the network runs, or its name; by default the network's own. ``torch.bfloat16``
            (:func:`t2v_fast.reduce_precision`) is faster on processors with instructions for it (``t2v-fast info``),
            and its embeddings cannot be compared with those of float32. The head is fitted in float64 in any case.
        skip_layers: leave out the first layers, by number or by the name of the last one (:meth:`Probe.skipping`), as
            the public code's option of this name does. Nothing is backpropagated into them.
        feature_folder: keeps the skipped layers' output for each batch, for the second pass and for later runs.
        unsupported: ``"exact"`` accepts probes that transform weights before use, which ``"error"`` refuses
            (:class:`t2v_fast.FisherRecorder`).
        seed: seed of all random numbers.
        self_check: compare a few images with plain autograd (:class:`t2v_fast.FisherRecorder`).
        progress: show progress bars.

    Raises:
        ValueError: an option cannot be used; the message names the option.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        ... )
        >>> images, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 2
        >>> embedding = Task2Vec(network, estimator="exact").embed((images, labels), name="noise")
        >>> embedding.hessian.shape, embedding.layer_names
        ((4,), ['0.weight'])
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
        cache_folder: str | os.PathLike | None = None,
        activation_megabytes: int = 1024,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        skip_layers: int | str = 0,
        feature_folder: str | os.PathLike | None = None,
        unsupported: str = "error",
        seed: int = 0,
        self_check: bool = True,
        progress: bool = False,
    ) -> None:
        # The options one by one, so that editors and `help` show them.
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
            activation_megabytes=activation_megabytes,
            device=device,
            dtype=dtype,
            skip_layers=skip_layers,
            feature_folder=feature_folder,
            unsupported=unsupported,
            seed=seed,
            self_check=self_check,
            progress=progress,
        )
        super().__init__(probe, settings)

    @classmethod
    def from_settings(cls, probe: Probe | nn.Module | str, settings: Settings) -> Task2Vec:
        """Make the pipeline that ``Task2Vec(probe, ...)`` makes from the same options."""
        return cls(probe, **settings.as_dict())

    def embed(self, data: Any, *, name: str | None = None, skip_unreadable: bool = False) -> Embedding:
        """Embed one task.

        If memory runs out, the task starts again with half the batch size, and a warning says so.

        Where FSDP2 (``fully_shard``) shards the probe's network, all processes that share it call this method with the
        same data, and each of them reads a part of the images
        (:func:`t2v_fast.tasks.distributed.embed_distributed`).

        Args:
            data: a :class:`TaskData`; a map-style or re-iterable torch data set of (image, label); a folder with one
                sub-folder of images for each class; or arrays (images, labels).
            name: the task's name, for messages and ``meta``; by default a folder's name.
            skip_unreadable: leave out image files that cannot be read, and list them in ``meta["skipped_images"]``.
                What else of a folder is no part of the task is in ``meta["left_out"]``, and a warning names it.
                ``meta["contents"]`` of a folder is a digest of the names and sizes of its images.

        Returns:
            The embedding, with one entry for each filter.

        Raises:
            DataError: the data cannot be used; the message names the image.
            ValueError: no head can be fitted (:func:`t2v_fast.tasks.head.fit_heads`), or no Fisher computed
                (:func:`t2v_fast.fisher`).
        """
        if sharding_of(self.probe.network) is not None:
            return embed_in_shares(self, self.make_embedding, data, name=name, skip_unreadable=skip_unreadable)
        if not isinstance(data, TaskData):
            data = TaskData.of(data, name=name, task_type=self.task_type, skip_unreadable=skip_unreadable)
        return self._within_memory(data, lambda: self._embed(data))

    def _embed(self, data: TaskData) -> Embedding:
        run = TaskRun(data)
        with self.one_forward(run):
            with timed(run.seconds, "features"):
                self.compute_features(run)
            with timed(run.seconds, "head"):
                self.encode_labels(run)
                self.fit_heads([run])
            with timed(run.seconds, "fisher"):
                self.allocate(run)
                self.compute_fisher(run)
        return self.make_embedding(run)

    def embed_label_sets(
        self,
        data: Any,
        label_sets: Mapping[str, Any],
        *,
        classes: Mapping[str, list[str]] | None = None,
        skip_unreadable: bool = False,
    ) -> dict[str, Embedding]:
        """Embed several tasks over the same images, which are decoded and run through the network once for all tasks.

        Args:
            data: images as in :meth:`embed`, in a map-style form; labels in the data are not used.
            label_sets: for each task's name its labels, one for each image of ``data``.
            classes: for a task's name the names of its classes, in the order of their labels.
            skip_unreadable: as in :meth:`embed`.

        Returns:
            Each task's embedding, by its name. It equals the result of :meth:`embed` with these labels up to rounding.

        Raises:
            DataError: the data or labels cannot be used; the message names the task.
            ValueError: there are no label sets, the pipeline uses a tolerance, ``method="variational"`` or the
                estimator ``"batch_mean"``, which tasks cannot share, or processes share the probe's network.
        """
        if not label_sets:
            raise ValueError("label_sets is empty, expected labels for at least one task")
        if self.method != "fisher" or self.tolerance is not None:
            what = "tolerance" if self.tolerance is not None else f"method {self.method!r}"
            raise ValueError(f"{what} has no shared form: embed the tasks one by one")
        if self.estimator == BATCH_MEAN:
            raise ValueError(f"estimator {BATCH_MEAN!r} has no shared form: embed the tasks one by one")
        if sharding_of(self.probe.network) is not None:
            raise ValueError("the probe's network is sharded over processes: embed the tasks one by one")
        if not isinstance(data, TaskData):
            data = TaskData.of(data, name=", ".join(label_sets), skip_unreadable=skip_unreadable)
        if not data.is_map_style:
            raise DataError(f"tasks {', '.join(label_sets)}: {type(data.source).__name__} is no map-style data set")
        for name, labels in label_sets.items():
            if len(labels) != len(data.source):
                raise DataError(f"task {name!r} has {len(labels)} labels for {len(data.source)} images")
        skip = data.skip_unreadable or skip_unreadable
        indexed = TaskData(WithIndex(data.source), data.name, "multiclass", None, data.describe, skip)
        indexed.left_out = data.left_out
        return self._within_memory(indexed, lambda: self._embed_label_sets(indexed, label_sets, classes or {}))

    def _embed_label_sets(
        self, data: TaskData, label_sets: Mapping[str, Any], classes: Mapping[str, list[str]]
    ) -> dict[str, Embedding]:
        shared = TaskRun(data)
        with timed(shared.seconds, "features"):
            self.compute_features(shared)
        indices, runs = shared.labels, {}
        with timed(shared.seconds, "head"):
            for name, labels in label_sets.items():
                task = TaskData(data.source, name, self.task_type, classes.get(name), skip_unreadable=True)
                runs[name] = TaskRun(task, shared.features, task.check_labels(labels)[indices])
                self.encode_labels(runs[name])
                task.skipped, task.left_out = data.skipped, data.left_out
            self.fit_heads(list(runs.values()))
            for run in runs.values():
                self.allocate(run)
        with timed(shared.seconds, "fisher"):
            self.compute_shared_fisher(shared, list(runs.values()))
        for run in runs.values():
            run.seconds = {stage: seconds / len(runs) for stage, seconds in shared.seconds.items()}
            run.waited = shared.waited / len(runs)
        return {name: self.make_embedding(run) for name, run in runs.items()}

    def make_embedding(self, run: TaskRun) -> Embedding:
        """Return the embedding of a task whose stages have all run."""
        found, fit = run.fisher, run.fit
        how: dict[str, Any]
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
                "task": run.data.name,
                "task_type": self.task_type,
                "classes": [str(c) for c in run.classes],
                **how,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "head_loss": fit.loss,
                "head_accuracy": fit.accuracy,
                "head_iterations": fit.iterations,
                "head_converged": fit.converged,
                "head_weight_decay": fit.weight_decay,
                "skipped_images": [str(s) for s in run.data.skipped],
                "left_out": run.data.left_out,
                "contents": None if run.data.contents is None else run.data.contents(),
                "seconds_waiting_for_data": round(run.waited, 3),
                "seconds": {stage: round(s, 3) for stage, s in run.seconds.items()},
            },
            fingerprint=self.fingerprint(),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that must agree for two embeddings to be comparable; can be written as JSON."""
        fisher_family = family_of(self.estimator)
        return {
            **network_fingerprint(
                self.probe.name,
                self.probe.fingerprint(),
                dtype_of(self.probe.network),
                self.probe.embedding_parameters(),
                fisher_family if self.method == "fisher" else {"method": self.method, **self.method_options},
            ),
            "likelihood": TASK_TYPES[self.task_type],
            "balanced": self.balanced,
            "head": {"method": self.head, **self.head_options},
            "preprocessing": self.probe.preprocessing.as_dict(),
        }

    def _within_memory(self, data: TaskData, attempt: Callable[[], Result]) -> Result:
        """Call ``attempt``, and again with half the batch size each time memory runs out. Results agree to rounding."""
        while True:
            try:
                if self.device.type == "cpu":
                    keep_memory_of(self)
                with torch.inference_mode(False):  # in inference mode a head would have no gradients
                    return attempt()
            except (MemoryError, RuntimeError) as error:
                # The squared gradient of a batch's mean depends on the batch.
                if not out_of_memory(error) or self.batch_size == 1 or self.estimator == BATCH_MEAN:
                    raise
            finally:
                data.cache = None  # holds images that this probe's preprocessing prepared
            # Outside of the handler, whose traceback keeps the tensors of the failed attempt.
            release_memory_of(self)  # which is in pieces that a larger tensor may not fit into
            self.activation_megabytes = 0
            size, self.batch_size = self.batch_size, self.batch_size // 2
            warnings.warn(
                f"task {data.name!r}: out of memory with batches of {size} images, going on with {self.batch_size}",
                stacklevel=3,
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out.

    Torch's error on a CPU has no type of its own, only a message. An error of the compiled CUDA ops loses its type on
    its way through LibTorch's stable interface.
    """
    said = any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or said
