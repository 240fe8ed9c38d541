"""Opacus 1.6 (Yousefpour et al., 2021, arXiv 2109.12298): the per-example gradients of GradSampleModule, squared."""

from __future__ import annotations

import functools
import warnings

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contestants import Contestant, Sums, filter_means
from bench.peers import owns_parameters, without_inplace


@register_grad_sampler([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def _batch_norm(layer: nn.Module, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus refuses batch norm; in evaluation mode it is a scale and a shift, which have per-example gradients."""
    x = activations[0]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    xhat = (x - layer.running_mean.view(shape)) * torch.rsqrt(layer.running_var + layer.eps).view(shape)
    return {layer.weight: (xhat * g).flatten(2).sum(2), layer.bias: g.flatten(2).sum(2)}


def _evaluate(m: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


def prepare(model: nn.Module) -> GradSampleModule:
    model = without_inplace(model)
    for m in model.modules():
        # Activations are captured in training mode alone; dropout stays off, and batch norm on its running statistics.
        m.training = owns_parameters(m) and not isinstance(m, nn.MultiheadAttention)
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            m.forward = functools.partial(_evaluate, m)
    return GradSampleModule(model, strict=False, loss_reduction="sum")


def run(model: GradSampleModule, x: Tensor, y: Tensor) -> Sums:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(x), y, reduction="sum").backward()
    sums = {}
    for name, p in model._module.named_parameters():
        if p.grad_sample is not None:
            sums[name] = filter_means(p.grad_sample.square_().sum(0))
        p.grad = p.grad_sample = None
    return sums


CONTESTANTS = {"opacus": Contestant(run, prepare)}
