"""What the stages of the pipeline pass on: one task on its way from images to an embedding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .. import spans
from ..estimation.allocation import Allocation
from ..estimation.estimator import FisherDiagonal
from ..estimation.one_forward import OneForward
from ..estimation.variational import RobustFisher
from .data import TaskData
from .head import HeadFit, HeadTask


@dataclass
class TaskRun:
    """One task while it is embedded. Each stage of :class:`t2v_fast.Task2Vec` fills in its part.

    ==================  ==============================================================================
    stage               fills in
    ==================  ==============================================================================
    compute_features    ``features`` [N, D] and ``labels`` [N], or [N, L] for multi-label: the labels of the data
    encode_labels       ``classes`` and ``head_task``: the codes of the labels, and the weights of the images
    fit_heads           ``fit``
    allocate            ``allocation``, for the estimator ``"deflated"``
    compute_fisher      ``fisher``
    ==================  ==============================================================================
    """

    data: TaskData
    features: Tensor | None = None
    labels: Tensor | None = None
    classes: list | None = None
    head_task: HeadTask | None = None
    fit: HeadFit | None = None
    allocation: Allocation | None = None
    fisher: FisherDiagonal | RobustFisher | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    waited: float = 0.0  # seconds in which the pipeline waited for images
    passes: OneForward | None = None  # within `Stages.one_forward`: the forward pass that features and Fisher share


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note in ``seconds[stage]`` how long the body took. It is a stage of :mod:`t2v_fast.spans`, too."""
    start = time.perf_counter()
    with spans.stage(stage):
        yield
    seconds[stage] = time.perf_counter() - start
