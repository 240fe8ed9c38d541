"""Embed one large task by several processes, with torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..embedding import Embedding
from .pipeline import Task2Vec
from .shares import embed_in_shares


def embed_distributed(
    task2vec: Task2Vec,
    data: Any,
    *,
    name: str | None = None,
    skip_unreadable: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Embedding:
    """Embed one task by all processes of a torch.distributed group. Each process reads its share of the images.

    Every process calls this function with the same pipeline and the same data, after
    ``torch.distributed.init_process_group`` (by ``torchrun``, for instance) with gloo or nccl. Features and labels are
    gathered, the first process fits the head, and only sums are exchanged for the Fisher. The embedding equals that of
    one process up to rounding, because random numbers belong to images, not to processes.

    Args:
        task2vec: the pipeline.
        data: a map-style data set, a folder, or arrays, as for :meth:`Task2Vec.embed`.
        name: the task's name.
        skip_unreadable: leave out image files that cannot be read.
        group: the process group, by default the whole world. Where FSDP2 shards the probe's network, the processes that
            share it.

    Returns:
        The embedding, on every process.

    Raises:
        RuntimeError: on every process, if one failed; names the processes that failed and their errors.
        ValueError: for the estimator ``"batch_mean"``, which depends on the batches, for ``method="variational"`` and
            for a ``tolerance``.
    """
    return embed_in_shares(
        task2vec, task2vec.make_embedding, data, name=name, skip_unreadable=skip_unreadable, group=group
    )
