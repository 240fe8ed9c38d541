"""What a Fisher is measured against. Each runs one batch and returns {name: filter means [O]}, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from t2v_fast.cotangents import cotangents
from t2v_fast.graph import backpropagate, find_taps
from t2v_fast.recorder import FisherRecorder


def filter_means(gradient: Tensor) -> Tensor:
    return gradient.square().reshape(gradient.shape[0], -1).mean(1)


def forward_only(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        model(x)


def floor(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward, and backward down to the first layer, with no weight gradient: what any Fisher of this batch costs."""
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(model(x), y, reduction="sum")
    backpropagate(loss, torch.ones_like(loss), find_taps(loss, parameters), lambda node, g: None, retain_graph=False)


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward and full backward: an ordinary training step without the update."""
    torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))


def fused(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """This library, one cotangent (the given labels)."""
    with FisherRecorder(model) as recorder:
        logits = model(x)
        q = recorder.backward(logits, cotangents(logits, "empirical", labels=y))
    return {name: values.sum(0) for name, values in q.items()}


def naive(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The batch-size-1 loop."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros(p.shape[0]) for name, p in parameters.items()}
    for n in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(parameters.values()))
        for name, g in zip(parameters, gradients, strict=True):
            sums[name] += filter_means(g)
    return sums


def per_example_vmap(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """torch.func: vmap over grad; every per-example gradient exists at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(p: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (p, buffers), (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return {name: g.square_().reshape(*g.shape[:2], -1).mean(2).sum(0) for name, g in gradients.items()}


ALL = {
    "forward": forward_only,
    "floor": floor,
    "step": step,
    "fisher": fused,
    "naive": naive,
    "vmap": per_example_vmap,
}
