"""Weighted means over examples, batch after batch, and what is known of their errors; float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
        flat, shape = q.reshape(len(q), math.prod(q.shape[1:])), q.shape[1:]
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


class NamedMoments:
    """Moments of several quantities of the same units by name, of those that every batch had.

    Small ones lie next to each other in one: dozens of operations on each of them take longer to call than to run.
    """

    TOGETHER = 2**16  # numbers of a unit

    def __init__(self) -> None:
        self.parts: list[Moments] = []
        self._names: list[list[str]] = []  # of each part
        self._devices: list[torch.device] = []
        self._shapes: dict[str, torch.Size] = {}
        self._missed: set[str] = set()

    @property
    def weight(self) -> float:
        return self.parts[0].weight if self.parts else 0.0

    def set_weights(self, weights: Tensor) -> None:
        """Means are to be over units of these weights in all, whatever was added."""
        a = weights.double()
        for part in self.parts:
            part.weight, part.weight2 = float(a.sum()), float(a.square().sum())

    def add(self, values: Mapping[str, Tensor], units: Units) -> None:
        """values [U, ...] of U more units."""
        if not self.parts:
            self._arrange(values)
        self._missed |= self._shapes.keys() - values.keys()
        for part, names, device in zip(self.parts, self._names, self._devices, strict=True):
            rows = [
                values[name].reshape(units.count, size)
                if name in values
                else torch.zeros(units.count, size, device=device)
                for name, size in zip(names, self._sizes(names), strict=True)
            ]
            part.add(rows[0] if len(rows) == 1 else torch.cat(rows, 1), units)

    def mean(self) -> dict[str, Tensor]:
        return self._apart([part.mean() for part in self.parts])

    def standard_error(self) -> dict[str, Tensor]:
        return self._apart([part.standard_error() for part in self.parts])

    def _arrange(self, values: Mapping[str, Tensor]) -> None:
        room: dict[torch.device, int] = {}  # left in the part of the device that was begun last, and which that is
        at: dict[torch.device, int] = {}
        for name, q in values.items():
            self._shapes[name] = q.shape[1:]
            size = self._shapes[name].numel()
            if q.device not in room or room[q.device] < size:
                room[q.device], at[q.device] = self.TOGETHER, len(self.parts)
                self.parts.append(Moments())
                self._names.append([])
                self._devices.append(q.device)
            room[q.device] -= size
            self._names[at[q.device]].append(name)

    def _sizes(self, names: Sequence[str]) -> list[int]:
        return [self._shapes[name].numel() for name in names]

    def _apart(self, found: list[Tensor]) -> dict[str, Tensor]:
        apart: dict[str, Tensor] = {}
        for t, names in zip(found, self._names, strict=True):
            pieces = t.split(self._sizes(names))
            apart |= {n: q.reshape(self._shapes[n]).clone() for n, q in zip(names, pieces, strict=True)}
        return {name: apart[name] for name in self._shapes if name not in self._missed}


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
