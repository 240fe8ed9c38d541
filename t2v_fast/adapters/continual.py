"""Importances for elastic weight consolidation (Kirkpatrick et al., 2017), with the interfaces of two libraries."""

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
    """Compute importances with the argument list of Avalanche's EWC plugin.

    The plugins square the mean gradient of each batch. This function squares the gradient of each example, which is
    what the plugins compute at batch size 1.

    Args:
        model: The model, which is moved to ``device``.
        criterion: The loss: cross-entropy, or binary cross-entropy with logits. Class weights and label smoothing are
            refused, because they change the likelihood.
        optimizer: Ignored.
        dataset: A data set of (input, label, ...).
        device: The device to run on.
        batch_size: Examples in a batch.
        num_workers: Processes that load data.
        labels: Whose labels the gradients are of. ``"true"`` takes the data's, as Avalanche does. For ``"all"``,
            ``"sample"`` and ``"pred"``, see :func:`~t2v_fast.adapters.fim.fim_diag`.
        options: More arguments of :func:`~t2v_fast.adapters.fim.fim_diag`.

    Returns:
        The mean squared per-example gradient of each parameter, by name.

    Raises:
        ValueError: For another criterion.
    """
    task_type = next((kind for loss, kind in CRITERIA.items() if type(criterion) is loss), None)
    weighted = getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None
    if task_type is None or weighted or getattr(criterion, "label_smoothing", False):
        known = ", ".join(loss.__name__ for loss in CRITERIA)
        raise ValueError(f"criterion is {criterion}, expected one of {known} without weights and label smoothing")
    loader = DataLoader(dataset, batch_size, shuffle=False, num_workers=num_workers)
    model.to(device)
    return fim_diag(model, loader, task_type, labels, device=device, **options)


def online_ewc_fisher(
    net: nn.Module, train_loader: Iterable, device: str | torch.device, batch_size: int | None = None
) -> Tensor:
    """Compute what Mammoth's online EWC accumulates over a task, in its layout.

    It is the sum over examples of p(label) times the squared gradient of log p(label), divided by a number of examples.
    The model runs in evaluation mode, in which batch norm does not mix examples, and is left in its own mode.

    Args:
        net: The model, which is moved to ``device``.
        train_loader: Batches of (inputs, labels, ...).
        device: The device to run on.
        batch_size: If given, the divisor is this number times the number of batches, as in Mammoth; otherwise it is
            the number of examples.

    Returns:
        One vector with all parameters, in the order of ``net.named_parameters()``.

    Raises:
        ValueError: If there are no examples.
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
