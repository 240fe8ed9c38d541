"""Networks in a lower precision, with as little of what they compute lost as can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def reduce_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network in place, as ``network.to(dtype)`` does, but to a lower precision more exactly; returns it.

    Rounded weights distort every activation of every example alike, and no average over examples makes up for it. Where
    an image is uniform, a convolution sees the sum of its taps alone, in which they often cancel and their rounding
    does not: each tap is rounded with what was lost of the ones before, so that the sum is kept. Batch norms, whose
    shifts cancel the mean of their input, stay in float32, which torch lets them.

    >>> network = reduce_precision(network.eval(), torch.bfloat16)  # takes images of that dtype
    """
    if torch.finfo(dtype).eps <= torch.finfo(dtype_of(network)).eps:
        return network.to(dtype)
    kernels = {
        id(weight): (weight, _keeping_sums(weight.detach(), dtype))
        for module in network.modules()
        if isinstance(module, _ConvNd) and (weight := module._parameters.get("weight")) is not None
    }
    for module in network.modules():
        to = torch.float32 if isinstance(module, _BatchNorm) else dtype
        module._apply(lambda t, to=to: t.to(to) if t.is_floating_point() else t, recurse=False)
    for weight, rounded in kernels.values():
        weight.data = rounded
    return network


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of a network's images: that of its first parameter which is no batch norm's."""
    found = (p for m in network.modules() if not isinstance(m, _BatchNorm) for p in m.parameters(recurse=False))
    return next(found, next(network.parameters(), torch.empty(0))).dtype


def _keeping_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels [O, C, ...], whose sums over taps are off by half a last place of the least one."""
    if not weight.numel() or math.prod(weight.shape[2:]) == 1:
        return weight.to(dtype)
    order = weight.flatten(2).abs().argsort(dim=2, descending=True, stable=True)
    rest = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
    values = []
    for tap in weight.flatten(2).gather(2, order).double().unbind(2):
        wanted = tap + rest
        values.append(wanted.to(dtype))
        rest = wanted - values[-1].double()
    rounded = torch.stack(values, 2)
    return torch.empty_like(rounded).scatter_(2, order, rounded).view_as(weight)
