"""The noise of the public Task2Vec code's variational Fisher, in its own arithmetic.

:class:`~t2v_fast.estimation.variational.WeightNoise` computes the same noise with far fewer products. Its rounding
differs, and the first steps of Adam divide small gradients by themselves: in float32, some filters then go another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.variational import WeightNoise


class PublicNoise(WeightNoise):
    """Every weight has its own copy of its filter's variance, and a second layer adds up the variances."""

    def __init__(self, weights: Mapping[str, nn.Parameter], generator: torch.Generator | None = None) -> None:
        super().__init__(weights, generator)
        self._logarithms: dict[str, Tensor] = {}

    def _each(self, name: str) -> Tensor:
        """Return the logarithm of the variance of each weight, in the weight's shape."""
        weight = self.weights[name]
        return self.log_variance[name].view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)

    def output_variance(
        self, name: str, func: Callable, energy: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Apply the layer to the squared inputs, with the variances as its weights."""
        self._logarithms[name] = each = self._each(name)
        return func(energy, each.exp(), None, *args, **kwargs)

    def divergence(self) -> Tensor:
        """Add up the terms of all layers one after the other, as there."""
        names = list(self.weights)
        each = {name: self._logarithms[name] for name in names}
        prior = self.log_prior
        norms = sum(self.weights[k].detach().pow(2).sum() / prior[k].exp() for k in names)
        logarithms = sum(each[k].sum() for k in names)
        traces = sum(each[k].exp().sum() / prior[k].exp() for k in names)
        costs = sum(prior[k] * self.weights[k].numel() for k in names)
        return torch.as_tensor(norms + traces + costs - logarithms - sum(self.weights[k].numel() for k in names))
