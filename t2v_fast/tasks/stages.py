"""The stages of the pipeline: features, head, allocation, Fisher."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from .. import ops, spans
from ..estimation.allocation import Allocation, SamplingStats, full_allocation, share_out
from ..estimation.estimator import BATCH_MEAN, FisherDiagonal, fisher
from ..estimation.label_sets import Heads, LabelSet, fisher_of_label_sets
from ..estimation.moments import NamedMoments
from ..estimation.one_forward import FeatureTap, one_forward
from ..estimation.tolerance import sample_until
from ..estimation.variational import RobustFisher, variational_fisher
from ..gradients.fast_forward import fast_forward
from ..gradients.wrappers import named_parameters
from .cache import ImageCache
from .data import TASK_TYPES, DataError, TaskData, balanced_weights
from .head import HeadTask, fit_heads
from .precision import dtype_of, reduce_precision
from .probe import Probe, load_probe
from .settings import Settings
from .split_network import FeatureCache
from .task_run import TaskRun

Value = TypeVar("Value")
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 4, 32  # images in a batch by default
SLOW_BFLOAT16 = (
    "this processor has no instructions for bfloat16: products are computed in float32, so that dtype='bfloat16' saves "
    "memory but no time; dtype='float32' is more exact"
)
HOTTEST_HALF = 100  # the largest temperature of a head in float16, where smaller gradients are rounded to zero
MAX_CPU_BATCH_PIXELS = 8 * 224**2  # in a batch on a CPU: the activations of more pixels leave its caches


class Stages:
    """A probe and settings, and the stages by which :class:`t2v_fast.Task2Vec` embeds a task.

    Each stage fills in its part of a :class:`TaskRun`. The order is :meth:`compute_features`, :meth:`encode_labels`,
    :meth:`fit_heads`, :meth:`allocate`, and :meth:`compute_fisher` or, for several tasks over the same images,
    :meth:`compute_shared_fisher`. Stages keep nothing of a task in this object.
    """

    def __init__(self, probe: Probe | nn.Module | str, settings: Settings) -> None:
        if isinstance(probe, str):
            probe = load_probe(probe)
        elif not isinstance(probe, Probe):
            probe = Probe(probe)
        self.probe = probe
        self.estimator, self.samples, self.tolerance = settings.estimator, settings.samples, settings.tolerance
        self.method, self.method_options = settings.method, settings.method_options or {}
        self.task_type, self.balanced = settings.task_type, settings.balanced
        self.head, self.head_options = settings.head, settings.head_options or {}
        self.num_workers = settings.num_workers
        self.cache_megabytes, self.cache_folder = settings.cache_megabytes, settings.cache_folder
        self.activation_megabytes = settings.activation_megabytes
        self.unsupported = settings.unsupported
        self.seed, self.self_check, self.progress = settings.seed, settings.self_check, settings.progress
        own_device = next(probe.network.parameters()).device
        self.device = own_device if settings.device is None else torch.device(settings.device)
        self.batch_size = self._default_batch_size() if settings.batch_size is None else settings.batch_size
        if settings.dtype not in (None, dtype_of(self.probe.network)):
            self.probe.fingerprint()  # of the given weights; the copy keeps this fingerprint
            self.probe = copy.deepcopy(self.probe)  # rounding cannot be undone
            reduce_precision(self.probe.network, cast(torch.dtype, settings.dtype))  # no longer a name
            if settings.dtype == torch.bfloat16 and self.device.type == "cpu" and not ops.multiplies_bfloat16():
                warnings.warn(SLOW_BFLOAT16, stacklevel=3)
        self.probe.network.to(self.device)
        self._feature_cache: FeatureCache | None = None
        if settings.skip_layers:
            self.probe = self.probe.skipping(settings.skip_layers)
            if settings.feature_folder is not None:
                assert self.probe.cut is not None  # since layers are skipped
                key = f"{self.probe.fingerprint()} {self.probe.cut.name} {dtype_of(self.probe.network)}"
                self._feature_cache = FeatureCache(settings.feature_folder, key)

    def _default_batch_size(self) -> int:
        # What batch_mean estimates depends on the batch size, so its default must not depend on the machine.
        if self.device.type != "cpu" or self.estimator == BATCH_MEAN:
            return MAX_BATCH_SIZE
        return max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, MAX_CPU_BATCH_PIXELS // self.probe.preprocessing.crop**2))

    @contextmanager
    def one_forward(self, run: TaskRun) -> Iterator[None]:
        """Within this context, features and Fisher share a forward pass as far as ``activation_megabytes`` allow.

        The stages of this run take place within the context, and no other run's. Without it, they give the same results
        to rounding, from two passes over the images.
        """
        shared = self.method == "fisher" and self.tolerance is None and self.estimator != BATCH_MEAN
        by_number = run.data.is_map_style and self._feature_cache is None
        if not (shared and by_number and self.activation_megabytes):
            yield
            return
        names = self.probe.embedding_parameters()
        tap = FeatureTap(self.probe.feature_dim).to(self.device, dtype_of(self.probe.network))
        options = {"unsupported": self.unsupported, "self_check": self.self_check}
        budget = self.activation_megabytes << 20
        with self.probe.with_head(tap) as network, one_forward(network, tap, names, budget=budget, **options) as passes:
            run.passes = passes
            try:
                yield
            finally:
                run.passes = None

    def compute_features(self, run: TaskRun) -> None:
        """First pass over the images: fill in ``features`` and ``labels``."""
        labels: list[Tensor] = []

        def images() -> Iterator[Tensor]:
            for batch, targets in self._batches(run, run.data, "features"):
                labels.append(targets)
                yield batch

        if run.passes is not None:
            features = [f.cpu() for f in run.passes.features(images())]
        else:
            network = self.probe.network
            with fast_forward(network, lambda _, batch: self.probe.features(batch), self.device) as forward:
                features = [forward(network, batch).cpu() for batch in images()]
        run.features, run.labels = torch.cat(features), torch.cat(labels)

    def encode_labels(self, run: TaskRun) -> None:
        """Fill in ``classes`` and ``head_task``, which has weights where classes are balanced."""
        codes, run.classes = run.data.encode_labels(run.labels)
        balanced = self.balanced and self.task_type == "multiclass"
        weights = balanced_weights(codes, len(run.classes)) if balanced else None
        run.head_task = HeadTask(codes, len(run.classes), weights)

    def fit_heads(self, runs: Sequence[TaskRun]) -> None:
        """Fill in ``fit`` of tasks with different names and the same features."""
        tasks = {run.data.name or "": run.head_task for run in runs}
        if len(tasks) < len(runs):
            raise ValueError("two tasks have one name, so that their heads cannot be told apart")
        temperature = self.head_options.get("temperature", 1)
        if dtype_of(self.probe.network) == torch.float16 and temperature > HOTTEST_HALF:
            raise ValueError(
                f"temperature is {temperature}, and float16 holds gradients for at most {HOTTEST_HALF}: use bfloat16 "
                "or float32"
            )
        fits = fit_heads(
            runs[0].features,
            tasks,
            likelihood=TASK_TYPES[self.task_type],
            method=self.head,
            seed=self.seed,
            **self.head_options,
        )
        for run in runs:
            run.fit = fits[run.data.name or ""]

    def allocate(self, run: TaskRun) -> None:
        """Fill in ``allocation``: how many cotangents each image gets, ``samples`` on average.

        A batch has as many backward passes as its neediest image has cotangents. So images get equal numbers where
        batches cannot be made of images with equal needs. Other estimators than ``"deflated"`` need no allocation, and
        with a ``tolerance`` the allocations are made during the Fisher pass.
        """
        if self.estimator != "deflated" or self.method != "fisher" or self.tolerance is not None:
            return
        if self._reorders(run.data):
            run.allocation = full_allocation(share_out(self._need(run), self.samples))
        else:
            run.allocation = full_allocation(torch.full((len(run.features),), self.samples))

    def _need(self, run: TaskRun) -> SamplingStats:
        linear = run.fit.linear
        weight, bias = linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double()
        logits = F.linear(run.features.double(), weight, bias)
        return SamplingStats.of(logits, weight, run.head_task.weights, TASK_TYPES[self.task_type])

    def compute_fisher(self, run: TaskRun) -> None:
        """Fill in ``fisher``. Within :meth:`one_forward` images may be visited again, otherwise all of them are.

        With a ``tolerance`` there are several passes over images.
        """
        if self.method == "variational":
            run.fisher = self._variational_fisher(run)
        elif run.passes is not None:
            run.fisher = run.passes.fisher(
                run.fit.linear,
                len(run.labels),
                lambda order: (images for images, _ in self._batches(run, run.data, "Fisher", order)),
                self.batch_size,
                self.estimator,
                self.samples,
                likelihood=TASK_TYPES[self.task_type],
                labels=run.head_task.labels,
                weights=run.head_task.weights,
                allocation=run.allocation,
                seed=self.seed,
            )
        elif self.tolerance is None:
            run.fisher = self._visit(run, run.allocation, self.self_check, self.seed)
        else:
            self_check = self.self_check

            def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
                nonlocal self_check
                found = self._visit(run, allocation, self_check, seed)
                self_check = False
                return found

            in_order = not self._reorders(run.data)
            run.fisher = sample_until(self._need(run), self.tolerance, visit, self.seed, every_example=in_order)

    def _visit(self, run: TaskRun, allocation: Allocation | None, self_check: bool, seed: int) -> FisherDiagonal:
        """The Fisher of the images of an allocation, or of all."""
        order, targets = None, run.head_task.labels
        if allocation is not None and self._reorders(run.data):
            allocation = allocation.ordered()
            order, targets = allocation.batches(self.batch_size), targets[allocation.examples]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            seen = 0
            for images, _ in self._batches(run, run.data, "Fisher", order):
                yield images, targets[seen : seen + len(images)]
                seen += len(images)

        with self.probe.with_head(run.fit.linear.to(self.device, dtype_of(self.probe.network))) as network:
            return fisher(
                network,
                batches(),
                self.estimator,
                self.samples,
                likelihood=TASK_TYPES[self.task_type],
                parameters=self.probe.embedding_parameters(),
                unsupported=self.unsupported,
                weights=run.head_task.weights,
                seed=seed,
                self_check=self_check,
                estimator_error=self.tolerance is not None,
                allocation=allocation,
            )

    def compute_shared_fisher(
        self,
        images: TaskRun,
        tasks: Sequence[TaskRun],
        first: int = 0,
        reduce: Callable[[list[NamedMoments], int], int] | None = None,
    ) -> None:
        """One pass over the images of several tasks: fill in ``fisher`` of each task.

        Args:
            images: the run whose data is visited, after :meth:`compute_features`.
            tasks: the runs of the tasks, after :meth:`allocate`.
            first: the number of the first of these images among all images of the tasks, where this process has only a
                part of them.
            reduce: adds up moments, in place, and numbers of images over all processes.
        """
        sets = [LabelSet(t.fit.linear, t.head_task.labels, t.head_task.weights, t.allocation) for t in tasks]
        samples = torch.zeros(len(images.labels), dtype=torch.long)
        for task in tasks:
            samples += 0 if task.allocation is None else task.allocation.samples[first : first + len(samples)]
        order = full_allocation(samples).ordered().batches(self.batch_size) if self._reorders(images.data) else None
        names = self.probe.embedding_parameters()
        with self.probe.with_head(Heads(sets).to(self.device, dtype_of(self.probe.network))) as network:
            diagonals = fisher_of_label_sets(
                network,
                (batch for batch, _ in self._batches(images, images.data, "Fisher", order)),
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
                reduce=reduce,
            )
        for task, diagonal in zip(tasks, diagonals, strict=True):
            task.fisher = diagonal

    def _variational_fisher(self, run: TaskRun) -> RobustFisher:
        """The variances of the robust Fisher, learned on images that are drawn with replacement."""
        options = {"num_samples": 10_000, **self.method_options}
        draws = options.pop("num_samples")
        if draws < 1:
            raise ValueError(f"num_samples is {draws}, expected at least 1")
        data, codes, weights = run.data, run.head_task.labels, run.head_task.weights
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
                Subset(cast(Dataset, data.source), places),
                data.name,
                self.task_type,
                None,
                lambda k: data.describe(places[k]),
            )
            seen = 0
            for images, _ in self._batches(run, some, f"variances, epoch {epoch + 1}"):
                yield images, targets[drawn[seen : seen + len(images)].to(self.device)]
                seen += len(images)

        linear = run.fit.linear.to(self.device, dtype_of(self.probe.network))
        with self.probe.with_head(linear) as network:
            named = dict(named_parameters(network))
            return variational_fisher(
                network,
                batches,
                [name for name in self.probe.embedding_parameters() if named[name].dim() > 1],
                head=linear.parameters(),
                likelihood=TASK_TYPES[self.task_type],
                generator=torch.Generator(self.device).manual_seed(self.seed),
                **options,
            )

    def _reorders(self, data: TaskData) -> bool:
        """Whether images may be visited by their needs. A folder of features has batches in the order of the data."""
        return self.estimator == "deflated" and data.is_map_style and self._feature_cache is None

    def _batches(
        self, run: TaskRun, data: TaskData, stage: str, examples: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of ``data`` in the form that the network takes; add the time of waiting for them to the run."""
        batches = data.batches(self.probe.preprocessing, self.batch_size, self.num_workers, self._cache(data), examples)
        batches = _waiting(run, batches)
        label = f"{data.name or 'task'}: {stage}"
        bar = {"total": self._count(data, examples), "disable": not self.progress}
        for images, labels in tqdm(batches, desc=label, unit="batch", leave=False, **bar):
            images = images.to(self.device, dtype_of(self.probe.network))
            at_cut = self.probe.at_cut
            yield at_cut(images) if self._feature_cache is None else self._feature_cache.get(images, at_cut), labels

    def _count(self, data: TaskData, examples: list[Tensor] | None) -> int | None:
        """The number of batches that will come; None where it is unknown."""
        if examples is not None:
            return len(examples)
        return -(-len(data.source) // self.batch_size) if isinstance(data.source, Sized) else None

    def _cache(self, data: TaskData) -> ImageCache | None:
        """The cache of this data, the same one in both passes."""
        if not self.cache_megabytes or not isinstance(data.source, Sized) or not len(data.source):
            return None
        if data.cache is None:
            data.cache = ImageCache(len(data.source), self.cache_megabytes << 20, self.cache_folder)
        return data.cache


def _waiting(run: TaskRun, batches: Iterator[Value]) -> Iterator[Value]:
    while True:
        start = time.perf_counter()
        try:
            with spans.stage("wait"):
                batch = next(batches, None)
        finally:
            run.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch
