"""``fim_diag``: the diagonal Fisher of any model as a dictionary by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.estimator import fisher
from ..gradients.recorder import ParameterFilter

TASK_TYPES = {"classification": "softmax", "multi-label": "sigmoid", "regression": "gaussian"}
# Whose labels the gradients are of, in the words of continual learning, and the estimator that stands for it.
LABELS = {"all": "exact", "sample": "monte_carlo", "pred": "empirical", "true": "empirical"}


def fim_diag(
    model: nn.Module,
    data_loader: Iterable[Any],
    task_type: str = "classification",
    labels: str = "all",
    *,
    parameters: ParameterFilter = None,
    device: str | torch.device | None = None,
    estimator: str | None = None,
    samples: int = 1,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """The mean over examples of squared per-example gradients of the log-likelihood: {name: tensor of its shape}.

    ``data_loader`` yields (input, label, ...). ``task_type``: ``"classification"``, ``"multi-label"`` or
    ``"regression"`` (squared error / 2). ``labels``: ``"all"``, the expectation over the model's labels (the Fisher
    itself); ``"sample"``, one drawn label an example (or ``samples``); ``"pred"``, the model's likeliest label;
    ``"true"``, the data's (the empirical Fisher). ``estimator`` replaces the one that ``labels`` stands for, such as
    ``"deflated"`` for many classes. ``options`` go to :func:`t2v_fast.fisher`. The model runs in evaluation mode, and
    is left as it was. By default the parameters that require gradients, or all where none does.

    Raises ValueError for an unknown choice, and what :func:`t2v_fast.fisher` raises.
    """
    for name, choice, known in (("task_type", task_type, TASK_TYPES), ("labels", labels, LABELS)):
        if choice not in known:
            raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(known)}")
    if parameters is None and any(p.requires_grad for p in model.parameters()):
        parameters = [name for name, p in model.named_parameters() if p.requires_grad]
    device = device or next(model.parameters()).device
    with evaluating(model):
        found = fisher(
            model,
            _predicted(model, data_loader, task_type, device) if labels == "pred" else data_loader,
            estimator or LABELS[labels],
            samples,
            "parameter",
            likelihood=TASK_TYPES[task_type],
            parameters=parameters,
            device=device,
            seed=seed,
            **options,
        )
    own = dict(model.named_parameters())
    return {name: value.to(own[name]) for name, value in found.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's mode is put back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _predicted(
    model: nn.Module, data_loader: Iterable[Any], task_type: str, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs with the model's likeliest labels."""
    likeliest: Mapping[str, Callable[[Tensor], Tensor]] = {
        "classification": lambda z: z.argmax(1),
        "multi-label": lambda z: (z > 0).to(z.dtype),
        "regression": lambda z: z,
    }
    for batch in data_loader:
        x = (batch[0] if isinstance(batch, (tuple, list)) else batch).to(device)
        with torch.no_grad():
            z = model(x)
        yield x, likeliest[task_type](z)
