"""Weighted means over examples, batch after batch, and what is known of their errors; float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


class Units:
    """Units of which means are taken, such as the examples of a batch: their ``weights`` [U], and the probabilities
    ``inclusion`` [U] with which they came to be here."""

    def __init__(self, weights: Tensor, inclusion: Tensor | None = None) -> None:
        a = weights.to("cpu", torch.float64)
        self.count = len(a)
        self.factors = torch.stack([a, a.square()])  # [2, U]
        if inclusion is not None:
            self.factors /= inclusion
        self.weight, self.weight2 = self.factors.sum(1).tolist()


class Moments:
    """Weighted mean of independent units and its standard error, by the delta method for a ratio of sums."""

    def __init__(self) -> None:
        self.units = 0
        self.weight = self.weight2 = 0.0
        self.first: Tensor | float = 0.0  # sum_u a q
        self.cross: Tensor | float = 0.0  # sum_u a^2 q
        self.second: Tensor | float = 0.0  # sum_u a^2 q^2

    def add(self, values: Tensor, units: Units) -> None:
        """values [U, ...] of U more units."""
        q = values.to("cpu", torch.float64)
        flat, shape = q.reshape(len(q), -1), q.shape[1:]
        self.units += units.count
        self.weight += units.weight
        self.weight2 += units.weight2
        first, cross = (units.factors @ flat).view(2, *shape)
        self.first = self.first + first
        self.cross = self.cross + cross
        self.second = self.second + (units.factors[1] @ flat.square()).view(shape)

    def mean(self) -> Tensor:
        return self.first / self.weight

    def standard_error(self) -> Tensor:
        mean = self.mean()
        if self.units < 2:
            return torch.full_like(mean, float("nan"))
        spread = self.second - 2 * mean * self.cross + mean.square() * self.weight2  # sum_u a^2 (q - mean)^2
        return (spread.clamp_min(0) * self.units / (self.units - 1)).sqrt() / self.weight


class DrawnExamples:
    """The variance that comes of visiting drawn examples in place of all: Hajek's (1964) for samples of fixed size.

    sum_s (1 - p_n) (r_n - mean)^2 over the visited examples, r_n = a_n q_n / p_n, p_n their inclusion probabilities,
    with the mean weighted by 1 - p_n. Systematic samples in random order vary like it or less. To that comes of the
    examples' own draws what the spread of r_n does not show: p_n of it.
    """

    def __init__(self) -> None:
        self.units = 0
        self.weight = 0.0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.draws: Tensor | float = 0.0

    def add(self, values: Tensor, variances: Tensor, a: Tensor, inclusion: Tensor) -> None:
        """Per-example values [n, ...], the variances of their draws, weights and probabilities [n]."""
        r, left = a / inclusion, 1 - inclusion
        q = values.to("cpu", torch.float64)
        self.draws = self.draws + torch.tensordot(r.square() * inclusion, variances.to("cpu", torch.float64), 1)
        some = left > 0
        if some.any():
            r, left, q = r[some], left[some], q[some]
            self.units += len(r)
            self.weight += float(left.sum())
            self.first = self.first + torch.tensordot(left * r, q, 1)
            self.second = self.second + torch.tensordot(left * r.square(), q.square(), 1)

    def variance(self) -> Tensor:
        if self.units < 2:  # no spread to be seen: that around zero
            return self.draws + self.second
        spread = self.second - (self.first * self.first) / self.weight
        return self.draws + spread.clamp_min(0) * self.units / (self.units - 1)
