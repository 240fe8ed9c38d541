"""Where a Fisher's cotangents are spent: how many each example gets, and which examples are drawn at all.

Both follow from the logits, which the features of the first pass and the fitted head give for every example before any
backward pass. With S_n the Fisher of example n's logits, W the head's weights and a_n the example's weight,

- a_n t_n, t_n = tr(W^T S_n W), the Fisher of the features, stands for the size of the example's part of the sum;
- v_n(k) = 4 sum_{i < j} l_i l_j, over all eigenvalues of S_n but the k - 1 largest, relative to tr(S_n)^2, stands for
  the variance that k ``deflated`` cotangents leave: it is that of one random-sign sketch of a diagonal of traces l_i.

:func:`share_out` spends a fixed number of cotangents on all examples, :func:`draw` as little as it takes for a given
error. What they rest on only decides how good the choice is: any choice gives an unbiased estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .likelihoods import Likelihood, get_likelihood, mixed

if TYPE_CHECKING:
    from .diagonal import FisherDiagonal

FORWARD = 0.5  # seconds of reading and running an example, in those of backpropagating one cotangent
OVERHEAD = 3.0  # examples that a pass of any size costs more, about that of EfficientNet-Lite0 at 64 pixels on a CPU
# |sum_n a_n q_n| / sum_n a_n |q_n|, q_n the diagonal Fisher of example n: 0.68 to 0.78 with 2 to 100 classes, heads
# fitted to the end and stopped early (EfficientNet-Lite0, handwritten digits).
COHERENCE = 0.7
FLOOR = 0.01  # t_n counts as at least this part of its mean, which bounds the weights of examples that t_n misjudges
MARGIN = 0.85  # the error that is aimed at, of that allowed; what a draw reports scatters by some ten percent
LEAST = 64  # examples that are drawn at least: normal intervals need some


@dataclass(frozen=True)
class Allocation:
    """Which examples a Fisher visits, and with how many ``deflated`` cotangents.

    ``samples`` [N] int64, the cotangents of each example of the data set; ``examples`` [n] int64, the numbers of those
    that are visited, in order; ``inclusion`` [N], the probability with which each came among them (Horvitz and
    Thompson, 1952: dividing by it keeps sums over the visited examples unbiased). Raises ValueError for sizes that do
    not fit and for visited examples of no probability.
    """

    samples: Tensor
    examples: Tensor
    inclusion: Tensor

    def __post_init__(self) -> None:
        n = len(self.samples)
        if list(self.inclusion.shape) != [n]:
            raise ValueError(f"inclusion is {list(self.inclusion.shape)}, expected a probability an example: [{n}]")
        if len(self.examples) and not 0 <= int(self.examples.min()) <= int(self.examples.max()) < n:
            raise ValueError(f"examples go from {self.examples.min()} to {self.examples.max()}, expected 0 to {n - 1}")
        visited = self.inclusion[self.examples]
        if not ((visited > 0) & (visited <= 1)).all():
            raise ValueError("inclusion of the visited examples must be above 0 and at most 1")

    @property
    def is_sample(self) -> bool:
        """Whether examples were left out by chance."""
        return bool((self.inclusion < 1).any())

    def ordered(self) -> Allocation:
        """The same with the examples of the most cotangents first, so that no batch waits for a few."""
        order = self.samples[self.examples].argsort(descending=True, stable=True)
        return Allocation(self.samples, self.examples[order], self.inclusion)

    def batches(self, size: int) -> list[Tensor]:
        """The visited examples in batches of at most ``size``, int64 [b] each, that cost the least.

        Every example of a batch costs as much as that with the most cotangents, and every pass costs
        :data:`OVERHEAD` examples besides. Raises ValueError for a size below one.
        """
        if size < 1:
            raise ValueError(f"size is {size}, expected batches of at least one example")
        passes = FORWARD + self.samples[self.examples].double().numpy()
        n = len(passes)
        least, begin = np.zeros(n + 1), np.zeros(n + 1, dtype=int)  # of the first i examples: cost, start of the last
        falling = bool((passes[1:] <= passes[:-1]).all())
        for i in range(1, n + 1):
            first = max(0, i - size)
            most = passes[first:i]
            if not falling:
                most = np.maximum.accumulate(most[::-1])[::-1]
            costs = least[first:i] + most * (np.arange(i - first, 0, -1) + OVERHEAD)
            best = int(costs.argmin())
            least[i], begin[i] = costs[best], first + best
        cuts = [n]
        while cuts[-1] > 0:
            cuts.append(int(begin[cuts[-1]]))
        return [self.examples[start:stop] for stop, start in pairwise(cuts)][::-1]


def seeds_of(examples: Tensor, seed: int) -> Tensor:
    """A seed for each of some examples, int64 [n], the same whichever others are visited, and in what order."""
    return mixed(mixed(torch.tensor(seed)) + examples)


def everyone(samples: Tensor) -> Allocation:
    """Every example in its place, with ``samples`` [N] cotangents."""
    return Allocation(samples, torch.arange(len(samples)), torch.ones(len(samples), dtype=torch.float64))


@dataclass(frozen=True)
class Need:
    """What is known of each example before any backward pass.

    ``importance`` [N], a_n t_n over its sum; ``spectrum`` [N, R], the eigenvalues of S_n over its trace, the largest
    first.
    """

    importance: Tensor
    spectrum: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, weight: Tensor, weights: Tensor | None = None, likelihood: str | Likelihood = "softmax"
    ) -> Need:
        """From the logits [N, C] of all examples, the head's ``weight`` [C, D] and the examples' ``weights`` [N].

        Raises ValueError, naming it, for logits that are not finite and sizes that do not fit.
        """
        if logits.dim() != 2 or weight.dim() != 2 or len(weight) != logits.shape[1]:
            raise ValueError(
                f"logits are {list(logits.shape)} and weight {list(weight.shape)}: expected [N, C], [C, D]"
            )
        if weights is not None and list(weights.shape) != [len(logits)]:
            raise ValueError(f"weights are {list(weights.shape)}, expected one an example: [{len(logits)}]")
        z = logits.detach().to("cpu", torch.float64)
        if not z.isfinite().all():
            raise ValueError(f"the logits of example {int((~z.isfinite().all(1)).nonzero()[0])} are not finite")
        model = get_likelihood(likelihood)
        a = torch.ones(len(z), dtype=torch.float64) if weights is None else weights.double().cpu()
        t = model.trace_through(z, weight.detach().to("cpu", torch.float64))
        t = t.clamp_min(FLOOR * float(a @ t) / float(a.sum())) if len(t) else t
        tiny = torch.finfo(torch.float64).tiny
        spectrum = model.spectrum(z)
        importance = a * t
        if not importance.any():  # no example has a Fisher that float64 can tell from zero
            importance = a
        return cls(importance / importance.sum().clamp_min(tiny), spectrum / spectrum.sum(1, True).clamp_min(tiny))

    def variances(self, samples: Tensor) -> Tensor:
        """v_n(k) for each of the numbers of cotangents ``samples`` [K], relative to t_n^2: [N, K]; 0 from rank R on."""
        n, rank = self.spectrum.shape
        zero = self.spectrum.new_zeros(n, 1)
        tails = torch.cat([self.spectrum.flip(1).cumsum(1).flip(1), zero], 1)  # [N, R + 1]
        # 4 sum_{i < j} l_i l_j as a sum over i, which does not cancel
        pairs = torch.cat([(self.spectrum * tails[:, 1:]).flip(1).cumsum(1).flip(1), zero], 1)
        return 4 * pairs[:, (samples - 1).clamp_max(rank)]


def share_out(need: Need, samples: float) -> Tensor:
    """How many cotangents each example gets, int64 [N], at most ``samples`` on average and each at least one.

    The next eigenvector of example n takes a_n^2 t_n^2 (v_n(k) - v_n(k + 1)) off the variance of the sum, which falls
    with k: so taking the largest of these differences, over all examples, is the best choice. Raises ValueError for
    fewer than one.
    """
    if not samples >= 1:
        raise ValueError(f"samples is {samples}, expected at least one cotangent for each example")
    n, rank = need.spectrum.shape
    tails = need.spectrum.flip(1).cumsum(1).flip(1)
    gains = need.importance[:, None].square() * need.spectrum[:, :-1] * tails[:, 1:]  # [N, R - 1]
    count = min(int(n * (samples - 1) + 1e-6), gains.numel())
    taken = gains.flatten().topk(count).indices // max(rank - 1, 1)
    return 1 + torch.bincount(taken, minlength=n)


def draw(need: Need, error: float, seed: int = 0) -> Allocation:
    """The cheapest choice of examples and of their cotangents whose relative error should be ``error``.

    Each example costs :data:`FORWARD` and its cotangents, one more than ``samples`` where two sketches tell the error.
    With inclusion probability p and k cotangents it leaves the variance (a_n t_n)^2 ((1 / p - 1) + v_n(k) / 2 p); one
    price of variance for all examples gives p and k of each. The examples are drawn systematically (Madow, 1949), in
    random order; those of probability one are all there. Raises ValueError for an error below zero.
    """
    if not error >= 0:
        raise ValueError(f"error is {error}, expected a relative error of at least 0")
    n, rank = need.spectrum.shape
    steps = torch.unique((1.15 ** torch.arange(100)).round().long().clamp_max(rank))
    steps = steps if int(steps[-1]) == rank else torch.cat([steps, torch.tensor([rank])])
    variances = need.variances(steps) / 2
    cost = FORWARD + steps + (steps < rank)
    squares = need.importance.square()[:, None]

    def best(price: float) -> tuple[Tensor, Tensor, float]:
        """Probabilities, numbers of cotangents and relative error, where variance costs 1 / ``price``."""
        if price == 0:
            return torch.ones(n, dtype=torch.float64), torch.full((n,), rank), 0.0
        p = (squares * (1 + variances) / (price * cost)).sqrt().clamp_max(1)
        left = squares * ((1 - p) + variances) / p.clamp_min(torch.finfo(torch.float64).tiny)
        chosen = (left + price * p * cost).argmin(1, keepdim=True)
        return (
            p.gather(1, chosen)[:, 0],
            steps[chosen[:, 0]],
            math.sqrt(float(left.gather(1, chosen).sum())) / COHERENCE,
        )

    low, high = -80.0, 2.0  # exponents of ten
    if best(10**low)[2] > error:
        inclusion, samples, _ = best(0)
    else:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if best(10**middle)[2] <= error else (low, middle)
        inclusion, samples, _ = best(10**low)
    inclusion = _at_least(inclusion, need.importance, LEAST)
    return Allocation(samples, _systematic(inclusion, seed), inclusion).ordered()


def until(need: Need, tolerance: float, visit: Callable[[Allocation], FisherDiagonal], seed: int = 0) -> FisherDiagonal:
    """``visit(allocation)``, the Fisher of a draw with its ``estimator_error``, for larger and larger draws until that
    is at most ``tolerance`` of the Fisher's norm. Each aims below it by a :data:`MARGIN`, since a further draw starts
    anew: to go on with the images of one because of its error would bias the result.

    Raises ValueError for a tolerance that is not above zero.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected a relative error above 0")
    target = MARGIN * tolerance
    while True:
        found = visit(draw(need, target, seed))
        error = found.relative_error()
        if error <= tolerance:
            return found
        target *= MARGIN * min(tolerance / error, 1)


def _at_least(inclusion: Tensor, importance: Tensor, least: int) -> Tensor:
    """Probabilities scaled up until ``least`` of the examples that may be drawn are expected, or all are certain; what
    is expected besides the certain ones is nothing, or some few, of whose spread something can be said."""
    some = importance > 0
    for _ in range(50):
        certain = inclusion >= 1
        rest = some & ~certain
        expected, wanted = float(inclusion[rest].sum()), max(least - int(certain.sum()), least // 8)
        if not rest.any() or expected >= wanted * (1 - 1e-9):
            break
        inclusion = torch.where(rest, inclusion.clamp_min(1e-300) * wanted / max(expected, 1e-300), inclusion)
        inclusion = inclusion.clamp_max(1)
    return inclusion


def _systematic(inclusion: Tensor, seed: int) -> Tensor:
    """Numbers of examples of which each is there with its probability, and as many as the sum of these, to rounding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inclusion), generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    order = order[inclusion[order] < 1]
    after = (inclusion[order].cumsum(0) + start).floor()
    before = torch.cat([after.new_zeros(1), after[:-1]])
    return torch.cat([(inclusion >= 1).nonzero()[:, 0], order[after > before]]).sort().values
