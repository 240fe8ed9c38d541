"""Importances for elastic weight consolidation (Kirkpatrick et al., 2017), as continual learning asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..gradients.recorder import FisherRecorder
from .fim import evaluating, fim_diag

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


def online_ewc_fisher(
    net: nn.Module, train_loader: Iterable, device: str | torch.device, batch_size: int | None = None
) -> Tensor:
    """What Mammoth's online EWC accumulates over a task, as it keeps it: one vector [P], parameter after parameter.

    The sum over examples of p(label) times the squared gradient of log p(label), divided by ``batch_size`` times the
    number of batches, or by the number of examples where ``batch_size`` is None. ``train_loader`` yields (inputs,
    labels, ...). The model runs in evaluation mode, in which examples are apart, and is left in its own. Raises
    ValueError where there are no examples.
    """
    net.to(device)
    total: dict[str, Tensor] = {}
    examples = batches = 0
    with evaluating(net), FisherRecorder(net, granularity="parameter") as recorder:
        for inputs, labels, *_ in train_loader:
            logits, labels = net(inputs.to(device)), labels.to(device)
            p = logits.detach().softmax(1)
            chance = p.gather(1, labels[:, None])
            cotangents = p.scatter_add(1, labels[:, None], -torch.ones_like(chance)) * chance.sqrt()
            for name, squares in recorder.backward(logits, cotangents).items():
                total[name] = total[name] + squares if name in total else squares
            examples, batches = examples + len(labels), batches + 1
    if not examples:
        raise ValueError("train_loader has no examples")
    count = examples if batch_size is None else batches * batch_size
    return torch.cat([total[name].flatten() for name, _ in net.named_parameters()]) / count
