"""The robust Fisher by its definition: noise of the whole weight tensor's variance, module by module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain:
    """The variances by the definition: a convolution of the squares with every weight's variance."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        self.logvar, self.loglambda2 = [], []
        for m in self.modules:
            w = m.weight.detach()
            each = w.reshape(len(w), -1).var(dim=1) * 0.05 + 1e-8
            self.logvar.append(each.log().view(-1, *[1] * (w.dim() - 1)).clone().requires_grad_())
            self.loglambda2.append((w.pow(2).mean() + 1e-8).log().clone().requires_grad_())
        for k, m in enumerate(self.modules):
            m.forward = lambda x, m=m, k=k: self.forward(m, k, x)

    def forward(self, m: nn.Module, k: int, x: Tensor) -> Tensor:
        variance = self.logvar[k].expand_as(m.weight).exp()
        if isinstance(m, nn.Linear):
            mean, spread = F.linear(x, m.weight, m.bias), F.linear(x**2 + 1e-2, variance)
        else:
            rest = (m.stride, m.padding, m.dilation, m.groups)
            mean, spread = F.conv2d(x, m.weight, m.bias, *rest), F.conv2d(x**2 + 1e-2, variance, None, *rest)
        return mean + spread.sqrt() * torch.empty_like(mean).normal_()

    def divergence(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for m, v, p in zip(self.modules, self.logvar, self.loglambda2, strict=True):
            posterior = torch.distributions.Normal(m.weight.detach(), v.expand_as(m.weight).mul(0.5).exp())
            prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), p.mul(0.5).exp())
            total = total + 2 * torch.distributions.kl_divergence(posterior, prior).sum()
        return total
