"""Importances for elastic weight consolidation (Kirkpatrick et al., 2017), as continual learning asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .fim import fim_diag

CRITERIA = {nn.CrossEntropyLoss: "classification", nn.BCEWithLogitsLoss: "multi-label"}


def compute_importances(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    dataset: Dataset,
    device: str | torch.device,
    batch_size: int,
    num_workers: int = 0,
    *,
    labels: str = "true",
    **options: Any,
) -> dict[str, Tensor]:
    """The argument list of Avalanche's EWC plugin; returns {name: mean of squared per-example gradients}.

    ``dataset`` yields (input, label, ...). ``criterion`` says what is learned: cross-entropy or binary cross-entropy
    with logits, without class weights or label smoothing, whose likelihood would be another one. ``optimizer`` is not
    used. ``labels``: ``"true"`` as Avalanche has it, or ``"all"``, ``"sample"``, ``"pred"`` (:func:`fim_diag`, which
    also gets ``options``). The plugins square the mean gradient of each batch; this squares each example's, which
    is what they compute at batch size 1.

    Raises ValueError for another criterion.
    """
    task_type = next((kind for loss, kind in CRITERIA.items() if type(criterion) is loss), None)
    weighted = getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None
    if task_type is None or weighted or getattr(criterion, "label_smoothing", 0):
        known = ", ".join(loss.__name__ for loss in CRITERIA)
        raise ValueError(f"criterion is {criterion}, expected one of {known} without weights and label smoothing")
    loader = DataLoader(dataset, batch_size, shuffle=False, num_workers=num_workers)
    model.to(device)
    return fim_diag(model, loader, task_type, labels, device=device, **options)
