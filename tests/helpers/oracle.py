"""The truth: per-example gradients by plain autograd at batch size 1. Uses nothing of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def per_example_squares(model: nn.Module, x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """{name: [N, *shape]}: sum over k of squared gradients of u[k, n] . logits(x_n), cotangents u [K, N, C]."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    required = {name: p.requires_grad for name, p in parameters.items()}
    squares = {name: p.new_zeros(len(x), *p.shape) for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        for n in range(len(x)):
            logits = model(beside_itself(x, n))[:1]
            for u in cotangents:
                gradients = torch.autograd.grad(
                    logits,
                    list(parameters.values()),
                    u[n : n + 1].to(logits),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, g in zip(parameters, gradients, strict=True):
                    squares[name][n] += g.square()
    finally:
        for name, p in parameters.items():
            p.requires_grad_(required[name])
    return squares


def beside_itself(x: Tensor, n: int) -> Tensor:
    """Example n twice: alone, torch's batch norm on CPUs gives wrong gradients where memory formats differ."""
    return x[[n, n]]


def reduce(squares: Tensor, granularity: str) -> Tensor:
    """[N, *shape] to a granularity, per example."""
    if granularity == "parameter":
        return squares
    if granularity == "tensor":
        return squares.reshape(squares.shape[0], -1).mean(1)
    return squares.reshape(squares.shape[0], max(squares.shape[1:2], default=1), -1).mean(2)


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm statistics and affine parameters away from 0 and 1, so that an error in them shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                c = m.num_features
                m.running_mean.copy_(torch.randn(c, generator=g) * 0.1)
                m.running_var.copy_(torch.rand(c, generator=g) + 0.5)
                if m.affine:
                    m.weight.copy_(torch.rand(c, generator=g) * 0.5 + 0.5)
                    m.bias.copy_(torch.randn(c, generator=g) * 0.1)
    return model.eval()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))
