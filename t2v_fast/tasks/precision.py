"""Convert networks to a lower precision with little loss of accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def reduce_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network in place, as ``network.to(dtype)`` does, but to a lower precision more accurately.

    Rounded weights distort every activation of every example in the same way, so an average over examples does not
    cancel the error. Where an image is uniform, a convolution only sees the sum of its taps. The taps often cancel in
    this sum, but their rounding errors do not. So each tap is rounded together with the rounding errors of the taps
    before it, which keeps the sum. Batch norms stay in float32, because their shifts cancel the mean of their input.

    Args:
        network: the network, in evaluation mode. Afterwards it takes images of ``dtype``.
        dtype: a floating-point type. For one that is no less precise, this is ``network.to(dtype)``.

    Returns:
        The same network.

    Example:
        >>> network = reduce_precision(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval(), torch.bfloat16)
        >>> network[0].weight.dtype, network[1].weight.dtype
        (torch.bfloat16, torch.float32)
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
    """The dtype of images that a network takes: the dtype of its first parameter outside of batch norms."""
    found = (p for m in network.modules() if not isinstance(m, _BatchNorm) for p in m.parameters(recurse=False))
    return next(found, next(network.parameters(), torch.empty(0))).dtype


def _keeping_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round kernels [O, C, ...] so that a sum over taps is off by at most half a last place of its smallest tap."""
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
