"""A task that is shared out over processes: each of them reads a part of the images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Subset

from ..embedding import Embedding
from ..estimation.estimator import BATCH_MEAN
from ..estimation.moments import NamedMoments
from ..gradients.sharding import Sharding, sharding_of
from .data import DataError, MapStyle, TaskData
from .stages import Stages
from .task_run import TaskRun, timed

Value = TypeVar("Value")


def embed_in_shares(
    task2vec: Stages,
    make_embedding: Callable[[TaskRun], Embedding],
    data: Any,
    *,
    name: str | None = None,
    skip_unreadable: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Embedding:
    """Embed one task by all processes of a group, as :func:`t2v_fast.tasks.distributed.embed_distributed` does.

    Args:
        task2vec: the stages of the pipeline.
        make_embedding: makes the embedding of a task whose stages have all run.
        data: as for :meth:`t2v_fast.Task2Vec.embed`.
        name: the task's name.
        skip_unreadable: leave out image files that cannot be read.
        group: the process group. Where the network is sharded, the processes that share it; else the whole world.

    Returns:
        The embedding, on every process.

    Raises:
        RuntimeError: on every process, if one failed.
        ValueError: the pipeline's settings have no distributed form, or the group is not that of the sharded network.
    """
    if task2vec.estimator == BATCH_MEAN:
        raise ValueError(f"estimator {BATCH_MEAN!r} depends on the batches of one process: embed with one")
    if task2vec.method != "fisher" or task2vec.tolerance is not None:
        raise ValueError("method='variational' and tolerance have no distributed form: embed with one process")
    sharding = sharding_of(task2vec.probe.network)
    group = group if sharding is None else sharding.group_of_examples(group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    seconds: dict[str, float] = {}
    with timed(seconds, "features"):
        part, shares = _share(task2vec, data, name, skip_unreadable, group, sharding)
    first = sum(len(labels) for _, labels, _ in shares[:rank])

    def fit_head() -> Any:
        if rank:
            return None
        features, labels, _ = zip(*shares, strict=True)
        whole = TaskRun(part.data, torch.cat(features), torch.cat(labels))
        task2vec.encode_labels(whole)
        task2vec.fit_heads([whole])
        task2vec.allocate(whole)
        return whole.classes, whole.head_task, whole.fit, whole.allocation

    with timed(seconds, "head"):
        classes, head_task, fit, allocation = _together(fit_head, group)[0]
    run = TaskRun(part.data, classes=classes, head_task=head_task, fit=fit, allocation=allocation, seconds=seconds)
    agreed = False

    def reduce(moments: list[NamedMoments], count: int) -> int:
        nonlocal agreed
        agreed = True
        _agree(None, group)
        return _add_up(moments, count, task2vec.device, group)

    with timed(seconds, "fisher"):
        try:
            task2vec.compute_shared_fisher(part, [run], first, reduce)
        except Exception as error:
            if not agreed:  # the other processes wait for this one's result
                _agree(error, group)
            raise
    run.data.skipped = [path for _, _, skipped in shares for path in skipped]
    run.waited = part.waited
    embedding = make_embedding(run)
    embedding.meta["processes"] = size
    return embedding


def _share(
    task2vec: Stages,
    data: Any,
    name: str | None,
    skip_unreadable: bool,
    group: dist.ProcessGroup | None,
    sharding: Sharding | None,
) -> tuple[TaskRun, list[tuple[torch.Tensor, torch.Tensor, list[str]]]]:
    """This process's part of the images; features, labels and skipped files of all parts, in order."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts: list[TaskRun] = []

    def read() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        whole = TaskData.of(data, name=name, task_type=task2vec.task_type, skip_unreadable=skip_unreadable)
        if not hasattr(whole.source, "__getitem__"):
            raise DataError(f"task {whole.name!r}: a task that is shared out needs a map-style data set")
        n = len(cast(MapStyle, whole.source))
        start, stop = n * rank // size, n * (rank + 1) // size
        if start == stop:
            raise DataError(f"task {whole.name!r} has {n} images for {size} processes: use at most as many")
        describe = functools.partial(_describe, whole.describe, start)
        source: Subset = Subset(cast(Dataset, whole.source), range(start, stop))
        part = TaskRun(TaskData(source, whole.name, whole.task_type, whole.classes, describe, whole.skip_unreadable))
        part.data.left_out, part.data.contents = whole.left_out, whole.contents
        with contextlib.nullcontext() if sharding is None else sharding:
            task2vec.compute_features(part)
        parts.append(part)
        return cast(torch.Tensor, part.features), cast(torch.Tensor, part.labels), part.data.skipped

    shares = _together(read, group)
    return parts[0], shares


def _describe(describe: Callable[[int], str], start: int, index: int) -> str:
    return describe(start + index)


def _together(run: Callable[[], Value], group: dist.ProcessGroup | None) -> list[Value]:
    """Call ``run`` on each process, and return the results of all. RuntimeError on all if one of them raised."""
    value, error = None, None
    try:
        value = run()
    except Exception as raised:  # of any kind, or the other processes would wait forever
        error = raised
    _agree(error, group)
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def _agree(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise RuntimeError on every process if one of them has an error."""
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}", group)
    if any(errors):
        texts = "; ".join(f"process {rank}: {text}" for rank, text in enumerate(errors) if text)
        raise RuntimeError(f"a task that is shared out failed: {texts}") from error


def _add_up(moments: list[NamedMoments], count: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """Sum moments over the processes, in place; return the number of examples on all processes."""
    every = [part for named in moments for part in named.parts]
    flat = [torch.tensor([count, *(v for m in every for v in (m.units, m.weight, m.weight2))], dtype=torch.float64)]
    flat += [t.reshape(-1) for m in every for t in (m.first, m.cross, m.second)]
    sums = torch.cat(flat)
    if dist.get_backend(group) == "nccl":
        sums = sums.to(device)
    dist.all_reduce(sums, group=group)
    counts, rest = sums.cpu().split([len(flat[0]), sums.numel() - len(flat[0])])
    count, *numbers = counts.tolist()
    for k, m in enumerate(every):
        units, m.weight, m.weight2 = numbers[3 * k : 3 * k + 3]
        m.units = int(units)
        for field in ("first", "cross", "second"):
            shape = getattr(m, field).shape
            setattr(m, field, rest[: shape.numel()].reshape(shape))
            rest = rest[shape.numel() :]
    return int(count)
