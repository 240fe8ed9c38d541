"""Assemble an embedding from a diagonal Fisher, or from variances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..embedding import Embedding
from ..estimation.estimator import BATCH_MEAN, FisherDiagonal
from ..estimation.variational import RobustFisher


def family_of(estimator: str) -> str:
    """Name the estimators whose embeddings can be compared: all unbiased ones share an expectation.

    >>> family_of("deflated"), family_of("empirical")
    ('fisher', 'empirical')
    """
    return estimator if estimator in (BATCH_MEAN, "empirical") else "fisher"


def embedding_of(found: FisherDiagonal | RobustFisher, meta: dict[str, Any], fingerprint: dict[str, Any]) -> Embedding:
    """Concatenate a filter-wise diagonal, or variances, into an embedding.

    Args:
        found: the entries of each parameter, in the order that the embedding keeps.
        meta: notes on how the embedding was made.
        fingerprint: everything that must agree for two embeddings to be comparable.

    Returns:
        The embedding. It has a standard error if all entries have a finite one; a variational one has none.
    """
    error = None
    entries: Mapping[str, Tensor]
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
