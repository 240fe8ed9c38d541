"""Weighted means over examples and their errors, accumulated batch by batch in float64.

Sums stay on the device of the values. They are copied to the CPU once, when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops.asynchronous import to_device

# The most numbers that are brought to float64 at once. On a CPU they fit into the second-level cache.
CHUNK = {"cpu": 2**17, "cuda": 2**24}


def chunk_width(values: Tensor) -> int:
    """Return how many columns of values [U, D] are brought to float64 at once."""
    return max(256, CHUNK[values.device.type] // max(1, len(values)))


class Units:
    """The units that a mean is over, such as the examples of a batch.

    Args:
        weights: One weight for each unit, [U].
        inclusion: The probability with which each unit was included, [U]; by default one. The sums are divided by it.
    """

    def __init__(self, weights: Tensor, inclusion: Tensor | None = None) -> None:
        a = weights.to("cpu", torch.float64)
        self.count = len(a)
        self.factors = torch.stack([a, a.square()])  # [2, U]
        if inclusion is not None:
            self.factors /= inclusion.to("cpu")
        self.weight, self.weight2 = self.factors.sum(1).tolist()
        self._there: dict[torch.device, Tensor] = {}

    def factors_on(self, device: torch.device) -> Tensor:
        """Return the weights and their squares, divided by the probabilities of inclusion, on a device, [2, U]."""
        if device not in self._there:
            self._there[device] = to_device(self.factors, device)
        return self._there[device]


class Moments:
    """A weighted mean over independent units and its standard error, by the delta method for a ratio of sums.

    For values q_u with weights a_u, the mean is m = sum_u a_u q_u / sum_u a_u. Its variance is estimated by
    sum_u a_u^2 (q_u - m)^2 / ((sum_u a_u)^2 - sum_u a_u^2). That is unbiased if all weights are equal, and also if q_u
    is the mean over a_u examples, as in batches of different sizes. Where the weights are those of more units than were
    drawn, the number of the drawn ones corrects for the mean: it is taken from the same units.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([1.0, 3.0]), Units(torch.ones(2)))
        >>> moments.add(torch.tensor([5.0]), Units(torch.ones(1)))
        >>> float(moments.mean()), round(float(moments.standard_error()), 3)
        (3.0, 1.155)
    """

    def __init__(self) -> None:
        self.units = 0
        self.weight = self.weight2 = 0.0
        self.first = torch.zeros((), dtype=torch.float64, device="cpu")  # sum_u a q
        self.cross = self.first  # sum_u a^2 q
        self.second = self.first  # sum_u a^2 q^2

    def add(self, values: Tensor, units: Units) -> None:
        """Add the values [U, ...] of U more units."""
        values = values if values.device.type in CHUNK else values.cpu()  # other devices may lack float64
        flat, shape = values.reshape(units.count, math.prod(values.shape[1:])), values.shape[1:]
        factors = units.factors_on(values.device)
        self.units += units.count
        self.weight += units.weight
        self.weight2 += units.weight2
        self._prepare(shape, values.device)
        width = chunk_width(flat)
        parts = (t.view(-1).split(width) for t in (self.first, self.cross, self.second))
        for q, first, cross, second in zip(flat.split(width, 1), *parts, strict=True):
            q = q.double()
            if units.count == 1:  # large tensors come as sums over a batch, and each pass over them counts
                (a,), (a2,) = units.factors.tolist()
                first.add_(q[0], alpha=a)
                cross.add_(q[0], alpha=a2)
                second.addcmul_(q[0], q[0], value=a2)
                continue
            more = factors @ q
            first += more[0]
            cross += more[1]
            second += factors[1] @ q.square()

    def _prepare(self, shape: torch.Size, device: torch.device) -> None:
        """Bring the sums to a shape and a device."""
        if self.first.shape != shape or self.first.device != device or self.first is self.cross:
            zeros = torch.zeros(3, *shape, dtype=torch.float64, device=device)
            for t, before in zip(zeros, (self.first, self.cross, self.second), strict=True):
                t += before.to(device)
            self.first, self.cross, self.second = zeros

    def to_cpu(self) -> None:
        """Copy the sums to the CPU."""
        self.first, self.cross, self.second = self.first.cpu(), self.cross.cpu(), self.second.cpu()

    def mean(self) -> Tensor:
        """Return the weighted mean of the values."""
        return self.first / self.weight

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean, or NaN for fewer than two units that count."""
        mean = self.mean()
        # The part of the spread that is lost, because the mean is that of the same units.
        lost = max(1 / self.units, self.weight2 / self.weight / self.weight) if self.weight else 1.0
        if not lost < 1 - 1e-12:
            return torch.full_like(mean, float("nan"))
        spread = self.second - 2 * mean * self.cross + mean.square() * self.weight2  # sum_u a^2 (q - mean)^2
        return (spread.clamp_min(0) / (1 - lost)).sqrt() / self.weight


class SideBySide:
    """How quantities of the same units are laid side by side, in parts, each of which is one tensor.

    A part has quantities of one device. Dozens of small operations take longer than one on all of them.

    Args:
        values: The quantities [U, ...] by name.
        most: The most numbers of a unit that a part holds, unless it has a single quantity; by default any number.

    Example:
        >>> values = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
        >>> sides = SideBySide(values)
        >>> [list(part.shape) for part in sides.join(values, 2)]
        [[2, 4]]
        >>> {name: list(q.shape) for name, q in sides.split(sides.join(values, 2)).items()}
        {'a': [2, 3], 'b': [2]}
    """

    def __init__(self, values: Mapping[str, Tensor], most: float = math.inf) -> None:
        self._shapes = {name: q.shape[1:] for name, q in values.items()}
        self._parts: list[tuple[torch.device, list[str]]] = []
        newest: dict[torch.device, tuple[float, list[str]]] = {}  # of each device: the room that is left, and the names
        for name, q in values.items():
            size = self._shapes[name].numel()
            room, names = newest.get(q.device, (0, []))
            if q.device not in newest or room < size:
                room, names = most, []
                self._parts.append((q.device, names))
            names.append(name)
            newest[q.device] = room - size, names

    def __len__(self) -> int:
        return len(self._parts)

    def missing(self, values: Mapping[str, Tensor]) -> set[str]:
        """Return the names of the quantities that ``values`` lacks."""
        return self._shapes.keys() - values.keys()

    def join(self, values: Mapping[str, Tensor], units: int) -> list[Tensor]:
        """Return the parts [U, D] of so many units, with zeros for quantities that are missing."""
        joined = []
        for device, names in self._parts:
            rows = [
                values[name].reshape(units, size) if name in values else torch.zeros(units, size, device=device)
                for name, size in zip(names, self._sizes(names), strict=True)
            ]
            joined.append(rows[0] if len(rows) == 1 else torch.cat(rows, 1))
        return joined

    def split(self, parts: Sequence[Tensor], copy: bool = False) -> dict[str, Tensor]:
        """Return the quantities of parts [..., D], in the order of the names: views, or with ``copy`` in own memory."""
        apart: dict[str, Tensor] = {}
        for t, (_, names) in zip(parts, self._parts, strict=True):
            divide = torch.ops.aten.split_with_sizes_copy if copy else torch.split
            for name, q in zip(names, divide(t, self._sizes(names), -1), strict=True):
                shape = self._shapes[name]
                apart[name] = q if len(shape) == 1 else q.reshape(t.shape[:-1] + shape)
        return {name: apart[name] for name in self._shapes}

    def _sizes(self, names: Sequence[str]) -> list[int]:
        return [self._shapes[name].numel() for name in names]


class NamedMoments:
    """The moments of several quantities of the same units, by name.

    A quantity that some batch lacks is left out of the results. Small quantities are stored side by side.
    """

    TOGETHER = 2**16  # the most numbers of a unit that are stored side by side

    def __init__(self) -> None:
        self._sides = SideBySide({})
        self._parts: list[Moments] = []
        self._missed: set[str] = set()

    @property
    def parts(self) -> list[Moments]:
        """The moments of the quantities that are stored side by side, with their sums on the CPU."""
        for part in self._parts:
            part.to_cpu()
        return self._parts

    @property
    def weight(self) -> float:
        """The sum of the units' weights."""
        return self._parts[0].weight if self._parts else 0.0

    @property
    def scalars(self) -> tuple[float, float, float]:
        """The number of units, the sum of their weights, and the sum of the weights' squares."""
        return (self._parts[0].units, self._parts[0].weight, self._parts[0].weight2) if self._parts else (0, 0.0, 0.0)

    def sums(self) -> dict[str, Tensor]:
        """Return the three sums of each quantity that every batch had, [3, ...] on the CPU."""
        return self._apart([torch.stack([part.first, part.cross, part.second]) for part in self.parts])

    def set_weights(self, weights: Tensor) -> None:
        """Divide by the sum of these weights, one for each unit of the data set, instead of the added weights."""
        a = weights.double()
        for part in self._parts:
            part.weight, part.weight2 = float(a.sum()), float(a.square().sum())

    def add(self, values: Mapping[str, Tensor], units: Units) -> None:
        """Add the values [U, ...] of U more units."""
        if not self._parts:
            self._sides = SideBySide(values, self.TOGETHER)
            self._parts = [Moments() for _ in range(len(self._sides))]
        self._missed |= self._sides.missing(values)
        for part, joined in zip(self._parts, self._sides.join(values, units.count), strict=True):
            part.add(joined, units)

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean of each quantity."""
        return self._apart([part.mean() for part in self.parts])

    def are_finite(self) -> bool:
        """Whether all means are finite."""
        return all(bool(part.mean().isfinite().all()) for part in self.parts)

    def standard_error(self) -> dict[str, Tensor]:
        """Return the standard error of each quantity's mean."""
        return self._apart([part.standard_error() for part in self.parts])

    def _apart(self, found: list[Tensor]) -> dict[str, Tensor]:
        """Split the results of the parts into those of the quantities, none of which keeps the memory of all."""
        return {name: q for name, q in self._sides.split(found, copy=True).items() if name not in self._missed}


class DrawnUnits:
    """The examples of a batch, as :class:`DrawnExamples` needs them.

    Args:
        weights: The weight of each example, [n].
        inclusion: The probability with which each example was included, [n]; by default one.
    """

    def __init__(self, weights: Tensor, inclusion: Tensor | None = None) -> None:
        a = weights.to("cpu", torch.float64)
        inclusion = torch.ones_like(a) if inclusion is None else inclusion.to("cpu", torch.float64)
        r, left = a / inclusion, 1 - inclusion
        self.count = len(a)
        self.uncertain, self.left = int((left > 0).sum()), float(left.sum())
        self._factors = torch.stack([r.square() * inclusion, left * r, left * r.square()])  # [3, n]
        self._there: dict[torch.device, Tensor] = {}

    def factors_on(self, device: torch.device) -> Tensor:
        """Return the factors of the variances, the values and the squared values on a device, [3, n]."""
        if device not in self._there:
            self._there[device] = to_device(self._factors, device)
        return self._there[device]


class DrawnExamples:
    """The variance of a sum that is estimated from drawn examples, by Hajek's (1964) estimator for a fixed sample size.

    Example n has the weight a_n, the values q_n and the inclusion probability p_n; let r_n = a_n q_n / p_n. The
    variance between examples is estimated by K / (K - 1) * sum_n (1 - p_n) (r_n - m)^2, over the K visited examples
    with p_n < 1, where m is the mean of r_n weighted by 1 - p_n. Systematic samples in random order have this variance
    or less. The variance of each example's own random draws is added with the weight p_n; the spread of r_n covers the
    rest.
    """

    def __init__(self) -> None:
        self.units = 0
        self.weight = 0.0
        self.first = self.second = self.draws = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, values: Tensor, variances: Tensor, units: DrawnUnits) -> None:
        """Add values [n, ...] and the variances of their random draws."""
        if values.device.type not in CHUNK:
            values, variances = values.cpu(), variances.cpu()
        of_draws, of_values, of_squares = units.factors_on(values.device)
        self.draws = self.draws.to(values.device) + torch.tensordot(of_draws, variances.double(), 1)
        if units.uncertain:
            q = values.double()
            self.units += units.uncertain
            self.weight += units.left
            self.first = self.first.to(q.device) + torch.tensordot(of_values, q, 1)
            self.second = self.second.to(q.device) + torch.tensordot(of_squares, q.square(), 1)

    def variance(self) -> Tensor:
        """Return the variance of the weighted sum of the values, on the CPU."""
        draws, first, second = self.draws.cpu(), self.first.cpu(), self.second.cpu()
        if self.units < 2:  # too few for a spread around their mean: take the spread around zero
            return draws + second
        spread = second - (first * first) / self.weight
        return draws + spread.clamp_min(0) * self.units / (self.units - 1)


class NamedDrawnExamples:
    """:class:`DrawnExamples` of several quantities of the same examples, by name.

    A quantity that some batch lacks is left out, as by :class:`NamedMoments`.
    """

    def __init__(self) -> None:
        self._sides = SideBySide({})
        self._parts: list[DrawnExamples] = []
        self._missed: set[str] = set()

    def add(self, values: Mapping[str, Tensor], variances: Mapping[str, Tensor], units: DrawnUnits) -> None:
        """Add values [n, ...] and the variances of their random draws."""
        if not self._parts:
            self._sides = SideBySide(values)
            self._parts = [DrawnExamples() for _ in range(len(self._sides))]
        self._missed |= self._sides.missing(values)
        joined = (self._sides.join(of, units.count) for of in (values, variances))
        for part, q, variance in zip(self._parts, *joined, strict=True):
            part.add(q, variance, units)

    def variance(self) -> dict[str, Tensor]:
        """Return the variance of the weighted sum of each quantity, on the CPU."""
        found = self._sides.split([part.variance() for part in self._parts], copy=True)
        return {name: q for name, q in found.items() if name not in self._missed}


class Strata:
    """What the sketches of each stratum of examples estimate together, and the variance of it.

    Args:
        number: The stratum of each example of the data set, int64 [N]; -1 for examples without one.
        count: The number of strata S.

    Attributes:
        sums: For each quantity of the examples, [...], the weighted sums over the strata, [2, S, ...] in float64: of
            the estimates, and of their variances.
        logits: The logits of the examples, [N, C] on the CPU.
        complete: Whether every example with a stratum was added.
    """

    def __init__(self, number: Tensor, count: int) -> None:
        self.number, self.count = number, count
        self.sums: dict[str, Tensor] = {}
        self.logits = torch.empty(0)
        self._missing = number >= 0

    @property
    def complete(self) -> bool:
        return not bool(self._missing.any())

    def add(
        self,
        examples: Tensor,
        weights: Tensor,
        logits: Tensor,
        sketched: Mapping[str, Tensor],
        variances: Mapping[str, Tensor],
    ) -> None:
        """Add the estimates [n, ...] and their variances for examples with these numbers, weights and logits.

        Estimates and variances are float64, on a CPU or a CUDA device.

        Raises:
            RuntimeError: An example was added before.
        """
        if bool(((self.number[examples] >= 0) & ~self._missing[examples]).any()):
            raise RuntimeError("examples were added to their strata before: each call needs strata of its own")
        if not len(self.logits):
            self.logits = torch.zeros(len(self.number), logits.shape[1], dtype=logits.dtype)
        self.logits[examples] = logits.detach().cpu()
        self._missing[examples] = False
        there = self.number[examples]
        onto = torch.zeros(self.count, len(examples), dtype=torch.float64)
        rows = (there >= 0).nonzero()[:, 0]
        onto[there[rows], rows] = weights.to("cpu", torch.float64)[rows]
        factors = torch.stack([onto, onto.square()])
        on = {device: to_device(factors, device) for device in {q.device for q in sketched.values()}}
        for name, q in sketched.items():
            pair = zip(on[q.device], (q, variances[name]), strict=True)
            found = torch.stack([torch.tensordot(f, t, 1) for f, t in pair])
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def divide(self, weight: float) -> None:
        """Divide by the sum of all weights, as means are, and bring the sums to the CPU."""
        for name, sums in self.sums.items():
            self.sums[name] = torch.stack([sums[0] / weight, sums[1] / weight**2]).cpu()
