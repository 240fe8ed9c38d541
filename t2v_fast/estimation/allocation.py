"""Decide which examples a Fisher estimate visits, and how many cotangents each of them gets.

Both follow from the logits, which the features of the first pass and the fitted head give for every example before any
backward pass. Let S_n be the Fisher of example n's logits, W the head's weights and a_n the example's weight.

- The size of example n's part of the sum is approximated by a_n t_n with t_n = tr(W^T S_n W), the trace of the Fisher
  of the features.
- The variance that k ``deflated`` cotangents leave, relative to the square of example n's part, is approximated by
  v_n(k), the least of :data:`~t2v_fast.estimation.sketches.ALIGNMENT` * T(l) / (k - l) over l from 0 to k - 1. The
  cotangents are l eigenvectors and k - l sketches (:mod:`t2v_fast.estimation.sketches`).

:func:`share_out` spends a fixed number of cotangents on all examples. :func:`draw` spends as little as a given error
is predicted to allow; :mod:`t2v_fast.estimation.tolerance` watches what the error really is. The approximations only
decide how good the choice is: the estimate is unbiased for every choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .likelihoods import Likelihood, get_likelihood, mixed
from .moments import Strata
from .sketches import ALIGNMENT, MoreSketches, counts_of, least, tails

FORWARD = 0.5  # time to read and run an example, relative to backpropagating one cotangent
OVERHEAD = 3.0  # fixed cost of a pass, in examples; measured with EfficientNet-Lite0 at 64 pixels on a CPU
# |sum_n a_n q_n| / sum_n a_n |q_n|, with q_n the diagonal Fisher of example n. Measured 0.68 to 0.78 with 2 to 100
# classes, for heads fitted to the end and heads stopped early (EfficientNet-Lite0, handwritten digits).
COHERENCE = 0.7
FLOOR = 0.01  # t_n is at least this part of its mean, which bounds the weights of examples that t_n underestimates
MOST_SHARED = 64  # the most cotangents of an example, unless their mean is above a quarter of it
MIN_DRAWN = 64  # the fewest examples that the first draw expects to visit, so that normal confidence intervals hold
MIN_UNCERTAIN = 8  # the fewest uncertain examples, if there are any, to estimate their variance


@dataclass(frozen=True)
class Allocation:
    """The examples that a Fisher estimate visits, and the number of ``deflated`` cotangents of each.

    Args:
        samples: The cotangents of each example of the data set, int64 [N].
        examples: The numbers of the visited examples in the order of the visits, int64 [n].
        inclusion: The probability with which each example of the data set is visited, [N]. Each visited example's part
            is divided by its probability, which keeps the sum unbiased (Horvitz and Thompson, 1952).
        strata: Where what the sketches of some examples estimate is added up apart, which takes an estimate with its
            error.
        more: If given, examples only get these sketches. ``samples`` still tells which eigenvectors they leave out.

    Raises:
        ValueError: The sizes do not fit, an example's number is out of range, or a visited example has a probability
            that is not above 0 and at most 1.
    """

    samples: Tensor
    examples: Tensor
    inclusion: Tensor
    strata: Strata | None = None
    more: MoreSketches | None = None

    def __post_init__(self) -> None:
        n = len(self.samples)
        if list(self.inclusion.shape) != [n]:
            raise ValueError(f"inclusion is {list(self.inclusion.shape)}, expected a probability an example: [{n}]")
        if len(self.examples) and not 0 <= int(self.examples.min()) <= int(self.examples.max()) < n:
            raise ValueError(f"examples go from {self.examples.min()} to {self.examples.max()}, expected 0 to {n - 1}")
        if self.more is not None and [len(self.more.counts), len(self.more.logits)] != [n, n]:
            found = f"{len(self.more.counts)} numbers of sketches and {len(self.more.logits)} logits"
            raise ValueError(f"there are {found}, expected {n}")
        visited = self.inclusion[self.examples]
        if not ((visited > 0) & (visited <= 1)).all():
            raise ValueError("inclusion of the visited examples must be above 0 and at most 1")

    @property
    def numbers(self) -> Tensor:
        """How many cotangents each example of the data set gets, if it is visited, int64 [N]."""
        return self.samples if self.more is None else self.more.counts

    def ordered(self) -> Allocation:
        """Return the same allocation, with the examples that have the most cotangents first.

        The examples of one batch then need about the same number of backward passes.
        """
        order = self.numbers[self.examples].argsort(descending=True, stable=True)
        return replace(self, examples=self.examples[order])

    def batches(self, size: int) -> list[Tensor]:
        """Split the visited examples, in their order, into the batches that cost the least.

        Every example of a batch costs as much as the example with the most cotangents, and every pass costs
        :data:`OVERHEAD` examples more.

        Args:
            size: The most examples of a batch.

        Returns:
            The numbers of each batch's examples, int64 [b].

        Raises:
            ValueError: ``size`` is below one.
        """
        if size < 1:
            raise ValueError(f"size is {size}, expected batches of at least one example")
        passes = FORWARD + self.numbers[self.examples].double().numpy()
        n = len(passes)
        # For the first i examples: the least cost, and where the last batch begins.
        least, begin = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
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
    """Return a seed for each example, int64 [n]. It does not depend on the other examples or on their order."""
    return mixed(mixed(torch.tensor(seed)) + examples)


def full_allocation(samples: Tensor) -> Allocation:
    """Return the allocation that visits every example in the order of the data set, with ``samples`` [N] cotangents."""
    return Allocation(samples, torch.arange(len(samples)), torch.ones(len(samples), dtype=torch.float64))


@dataclass(frozen=True)
class SamplingStats:
    """What is known about each example before any backward pass.

    Args:
        importance: a_n t_n divided by its sum over all examples, [N].
        spectrum: The eigenvalues of S_n divided by its trace, the largest first, [N, R].
    """

    importance: Tensor
    spectrum: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, weight: Tensor, weights: Tensor | None = None, likelihood: str | Likelihood = "softmax"
    ) -> SamplingStats:
        """Compute the statistics from the logits of all examples.

        Args:
            logits: [N, C].
            weight: The weights of the head that gave the logits, [C, D].
            weights: The weights of the examples, [N]; by default all count the same.
            likelihood: As for :func:`t2v_fast.fisher`.

        Raises:
            ValueError: The sizes do not fit, or the logits of an example are not finite.
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
        if not importance.any():  # every example has a Fisher that is zero in float64
            importance = a
        return cls(importance / importance.sum().clamp_min(tiny), spectrum / spectrum.sum(1, True).clamp_min(tiny))

    def variances(self, samples: Tensor, sketches: int = 1) -> Tensor:
        """Return v_n for each number of cotangents k in ``samples`` [K]: [N, K]. It is 0 for k of at least R.

        With more than one of the fewest ``sketches``, an example has k - 1 + ``sketches`` cotangents.
        """
        tail = tails(self.spectrum)
        found = [least(tail, k, sketches)[0] for k in samples.tolist()]
        return ALIGNMENT * torch.stack(found, 1)

    def predicted_error(self, allocation: Allocation) -> float:
        """Return the relative error that the approximations predict for an allocation with two sketches an example."""
        v = self.left_by(allocation.samples)
        p = allocation.inclusion
        return math.sqrt(float((self.importance.square() * ((1 - p) + v) / p).nan_to_num(0).sum())) / COHERENCE

    def left_by(self, samples: Tensor) -> Tensor:
        """Return v_n for the number of cotangents of each example, [N], with two sketches."""
        steps, place = samples.unique(return_inverse=True)
        return self.variances(steps, sketches=2).gather(1, place[:, None])[:, 0]

    def sketches(self, samples: Tensor) -> Tensor:
        """Return how many sketches there are, at least two, for the number of cotangents of each example, int64 [N]."""
        return counts_of(tails(self.spectrum), samples, 2)


def share_out(need: SamplingStats, samples: float) -> Tensor:
    """Choose the numbers of cotangents that leave the least variance, for a fixed total.

    One more cotangent of example n reduces the variance of the sum by a_n^2 t_n^2 (v_n(k) - v_n(k + 1)). This
    reduction nearly always falls with k, so the largest reductions over all examples are the best choice.

    Args:
        need: The statistics of the examples.
        samples: The mean number of cotangents of an example, at least 1.

    Returns:
        The number of cotangents of each example, int64 [N]: at least one, and at most ``samples`` on average.

    Raises:
        ValueError: ``samples`` is below one.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])  # one example is uncertain
        >>> share_out(SamplingStats.of(logits, torch.eye(3)), samples=4 / 3)
        tensor([1, 2, 1])
    """
    if not samples >= 1:
        raise ValueError(f"samples is {samples}, expected at least one cotangent for each example")
    n, rank = need.spectrum.shape
    count = int(n * (samples - 1) + 1e-6)
    most = max(1, min(rank, count + 1, max(MOST_SHARED, math.ceil(4 * samples))))
    left = need.importance[:, None].square() * need.variances(torch.arange(1, most + 1))
    # A step counts at most as much as the step before it, so that an example takes its steps in their order.
    gains = (-left.diff(dim=1)).cummin(1).values if most > 1 else left[:, :0]  # [N, most - 1]
    taken = gains.flatten().topk(min(count, gains.numel())).indices // max(most - 1, 1)
    return 1 + torch.bincount(taken, minlength=n)


def draw(need: SamplingStats, error: float, seed: int = 0, least: int = MIN_DRAWN) -> Allocation:
    """Choose the examples and their cotangents that cost the least for an expected relative error.

    An example with k cotangents costs k + :data:`FORWARD`, and one cotangent more where a second sketch estimates the
    error. With inclusion probability p the example leaves the variance (a_n t_n)^2 ((1 / p - 1) + v_n / p), where v_n
    counts the second sketch. One price of variance for all examples determines p and k of each. The examples are drawn
    systematically (Madow, 1949) in random order, and examples of probability one are always visited.

    Args:
        need: The statistics of the examples.
        error: The relative error of the Fisher's norm that is aimed at, at least 0.
        seed: Fixes which examples are drawn.
        least: The fewest examples that are expected to be visited, unless all of them are certain.

    Returns:
        The allocation, with the examples that have the most cotangents first.

    Raises:
        ValueError: ``error`` is below zero.
    """
    if not error >= 0:
        raise ValueError(f"error is {error}, expected a relative error of at least 0")
    n, rank = need.spectrum.shape
    # Few different numbers, so that the examples of a batch have the same one.
    steps = torch.unique((1.3 ** torch.arange(40)).round().long().clamp_max(rank))
    steps = steps if int(steps[-1]) == rank else torch.cat([steps, torch.tensor([rank])])
    variances = need.variances(steps, sketches=2)
    cost = FORWARD + steps + (steps < rank)
    squares = need.importance.square()[:, None]

    def best(price: float) -> tuple[Tensor, Tensor, float]:
        """Return probabilities, numbers of cotangents and relative error where variance costs 1 / ``price``."""
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
    inclusion = _at_least(inclusion, need.importance, least)
    return Allocation(samples, _systematic(inclusion, seed), inclusion).ordered()


def _at_least(inclusion: Tensor, importance: Tensor, least: int) -> Tensor:
    """Scale the probabilities up until ``least`` examples are expected to be visited, or all of them are certain.

    The expected number of uncertain examples is then zero, or large enough to estimate their variance.
    """
    some = importance > 0
    for _ in range(50):
        certain = inclusion >= 1
        rest = some & ~certain
        expected, wanted = float(inclusion[rest].sum()), max(least - int(certain.sum()), MIN_UNCERTAIN)
        if not rest.any() or expected >= wanted * (1 - 1e-9):
            break
        inclusion = torch.where(rest, inclusion.clamp_min(1e-300) * wanted / max(expected, 1e-300), inclusion)
        inclusion = inclusion.clamp_max(1)
    return inclusion


def _systematic(inclusion: Tensor, seed: int) -> Tensor:
    """Draw examples with the given probabilities. The number drawn is the sum of the probabilities, rounded."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inclusion), generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    order = order[inclusion[order] < 1]
    after = (inclusion[order].cumsum(0) + start).floor()
    before = torch.cat([after.new_zeros(1), after[:-1]])
    return torch.cat([(inclusion >= 1).nonzero()[:, 0], order[after > before]]).sort().values
