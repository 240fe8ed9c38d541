"""The diagonal Fisher of any model as a dictionary by parameter name: :func:`fim_diag`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..estimation.batches import default_forward, split_batch
from ..estimation.estimator import fisher
from ..estimation.packing import IGNORED
from ..gradients.recorder import ParameterFilter
from .squares import in_type_of

TASK_TYPES = {"classification": "softmax", "multi-label": "sigmoid", "regression": "gaussian"}
# Whose labels the gradients are of, in the words of continual learning, and the estimator that this means.
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
    """Compute the mean over examples of the squared per-example gradients of the log-likelihood.

    The model runs in evaluation mode and is left in its own mode.

    Args:
        model: The model, from inputs to logits [N, C], or to an object that has them as ``logits``.
        data_loader: Batches of (inputs, labels, ...), or mappings, as for :func:`t2v_fast.fisher`.
        task_type: ``"classification"``, ``"multi-label"``, or ``"regression"`` with half the squared error.
        labels: Whose labels the gradients are of:

            - ``"all"``: the expectation over the model's labels, which is the Fisher itself
            - ``"sample"``: one label drawn from the model for each example, or ``samples`` labels
            - ``"pred"``: the model's most likely label
            - ``"true"``: the label in the data, which gives the empirical Fisher

        parameters: The parameters, by default those that require gradients, or all if none does.
        device: The device of the batches, by default that of the model.
        estimator: Replaces the estimator that ``labels`` stands for; ``"deflated"`` is for many classes.
        samples: Cotangents of a random or deflated estimator.
        seed: The seed of random labels.
        options: More arguments of :func:`t2v_fast.fisher`.

    Returns:
        A tensor of the parameter's shape for each parameter, by name.

    Raises:
        ValueError: For an unknown choice, and for what :func:`t2v_fast.fisher` refuses.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]
        >>> {name: tuple(value.shape) for name, value in fim_diag(model, batches).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    for name, choice, known in (("task_type", task_type, TASK_TYPES), ("labels", labels, LABELS)):
        if choice not in known:
            raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(known)}")
    if parameters is None and any(p.requires_grad for p in model.parameters()):
        parameters = [name for name, p in model.named_parameters() if p.requires_grad]
    device = device or next(model.parameters()).device
    if labels == "pred":  # made for the positions of the logits
        options = {**options, "shift_labels": False}
    with evaluating(model):
        found = fisher(
            model,
            _predicted(model, data_loader, task_type, device, options.get("forward"))
            if labels == "pred"
            else data_loader,
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
    return {name: in_type_of(name, value, own[name]) for name, value in found.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the body with the model in evaluation mode, and put back the mode of every module."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _predicted(
    model: nn.Module,
    data_loader: Iterable[Any],
    task_type: str,
    device: str | torch.device,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Iterator[tuple[Any, Tensor]]:
    """Yield the inputs with the model's most likely labels."""
    run = default_forward if forward is None else forward
    likeliest: Mapping[str, Callable[[Tensor], Tensor]] = {
        "classification": lambda z: z.argmax(-1),
        "multi-label": lambda z: (z > 0).to(z.dtype),
        "regression": lambda z: z,
    }
    for batch in data_loader:
        x, labels = split_batch(batch)
        x = dict(x) if isinstance(x, Mapping) else x  # as what tokenizers return
        x = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
        with torch.no_grad():
            z = run(model, x)
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__}, expected logits [N, C]: pass forward=lambda model, x: ..., or "
                "wrap the model in a module that returns the logits alone"
            )
        found = likeliest[task_type](z)
        if task_type == "classification" and found.dim() > 1 and labels is not None and labels.shape == found.shape:
            found = found.masked_fill(labels.to(found.device) == IGNORED, IGNORED)  # these tokens do not count
        yield x, found
