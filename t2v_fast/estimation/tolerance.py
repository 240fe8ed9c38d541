"""Estimate a Fisher with as little work as an error allows: draw examples, and refine the draw where it misses.

The error that is predicted before any backward pass is made from logits and the head's weights alone
(:mod:`t2v_fast.estimation.allocation`), so a draw may miss the allowed error by a few percent. Its examples then get
more sketches of what their leading eigenvectors leave, a *stratum* of the examples at a time. Both sets of sketches are
averaged, and no eigenvector is backpropagated again. Where the error is due to the examples that were not drawn, more
sketches are no help, and an independent draw follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .allocation import FORWARD, MIN_DRAWN, MIN_UNCERTAIN, Allocation, SamplingStats, draw, full_allocation
from .diagonal import FisherDiagonal, combined
from .likelihoods import mixed
from .moments import Strata
from .sketches import MoreSketches

# The part of the allowed error that a draw and a refinement are planned for. A draw that misses by a few percent is
# cheap to refine. Margins from 0.85 to 0.89 took about the fewest passes with 10 to 1,000 classes.
MARGIN = 0.87
AIM = 0.99
MOST_STRATA = 16
MIN_STRATUM = 8  # examples
MORE = (0.25, 0.5, 1.0, 2.0)  # the sketches of a refinement, relative to those that an example has


def sample_until(
    need: SamplingStats,
    tolerance: float,
    visit: Callable[[Allocation, int], FisherDiagonal],
    seed: int = 0,
    every_example: bool = False,
) -> FisherDiagonal:
    """Estimate the Fisher from draws and refinements, until the estimated error is small enough.

    The first draw is refined while it is the only one and more sketches are enough. Later draws are independent, and
    the result is the mean of all. The weight of a draw in the mean is proportional to the precision that the
    approximations predict for its plan, and the weight of a refinement to its number of sketches. The weights do not
    depend on the errors that draws report, since an estimate and its reported error are not independent. The reported
    errors only decide how large the next draw is: it is as large as the missing precision asks for, if it is as much
    better or worse than predicted as the draws before it.

    Args:
        need: The statistics of the examples.
        tolerance: The largest ``estimator_error`` relative to the norm of the Fisher, above 0.
        visit: Returns the Fisher of an allocation, with its ``estimator_error``, from random signs of a seed.
        seed: Fixes the examples and the random signs of all draws.
        every_example: Visit every example in each draw, with the numbers of cotangents that the draw chose.

    Returns:
        The mean over the draws. Its relative error is at most ``tolerance``, or not finite if that of all examples
        with all their eigenvectors is not.

    Raises:
        ValueError: ``tolerance`` is not above zero.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected a relative error above 0")
    found: list[FisherDiagonal] = []
    predicted: list[float] = []
    visits = 0
    visited = torch.zeros(len(need.importance), dtype=torch.bool)
    target, least = MARGIN * tolerance, MIN_DRAWN

    def next_seed() -> int:
        nonlocal visits
        visits += 1
        return seed if visits == 1 else int(mixed(mixed(torch.tensor(seed)) + visits - 1))

    while True:
        own_seed = next_seed()
        allocation = draw(need, target, own_seed, least)
        if every_example:
            allocation = full_allocation(allocation.samples)
        if not found:
            allocation = replace(allocation, strata=strata_of(need, allocation, 1 if every_example else MOST_STRATA))
        found.append(visit(allocation, own_seed))
        predicted.append(need.predicted_error(allocation))
        visited[allocation.examples] = True
        if predicted[-1] == 0:  # nothing is left to chance, unless small eigenvalues were taken for zero
            everything = full_allocation(torch.full_like(allocation.samples, need.spectrum.shape[1]))
            return found[-1] if found[-1].relative_error() <= tolerance else visit(everything, own_seed)
        if len(found) == 1:
            found[0] = _refined(need, allocation, found[0], tolerance, every_example, lambda a: visit(a, next_seed()))
        weights = 1 / torch.tensor(predicted, dtype=torch.float64).square()
        mean = combined(found, weights / weights.sum(), int(visited.sum()))
        error = mean.relative_error()
        if error <= tolerance:
            return mean
        # Precisions add up, and all draws are taken to be as much worse than predicted as their mean is.
        # Only the error of the next draw is unknown, so only the missing precision has the margin.
        missing = float(weights.sum()) * ((error / tolerance) ** 2 - 1) / MARGIN**2
        if not math.isfinite(missing):  # nothing is known from an estimate of zero with an error: take everything
            target, least = 0.0, MIN_DRAWN
            continue
        target = missing**-0.5
        # A draw of little weight in the mean may be small: the mean is as normal as its other draws are.
        least = max(MIN_UNCERTAIN, math.ceil(MIN_DRAWN * missing / (float(weights.sum()) + missing)))


def strata_of(need: SamplingStats, allocation: Allocation, most: int = MOST_STRATA) -> Strata:
    """Divide the examples that are certain to be drawn into at most so many strata, in the order of their visits.

    The others, and those whose cotangents are exact, have the stratum -1.
    """
    some = allocation.examples[allocation.inclusion[allocation.examples] == 1]
    some = some[allocation.samples[some] < need.spectrum.shape[1]]
    number = torch.full_like(allocation.samples, -1)
    parts = some.tensor_split(max(1, min(most, len(some) // MIN_STRATUM)))
    for i, part in enumerate(parts):
        number[part] = i
    return Strata(number, len(parts))


def _refined(
    need: SamplingStats,
    allocation: Allocation,
    found: FisherDiagonal,
    tolerance: float,
    every_example: bool,
    visit: Callable[[Allocation], FisherDiagonal],
) -> FisherDiagonal:
    """Visit strata again with more sketches, until the error is small enough or more sketches are not."""
    strata = allocation.strata
    assert strata is not None
    have = need.sketches(allocation.samples)  # of each example, so far
    # In proportion to the variance with one sketch.
    single = need.importance.square() * need.left_by(allocation.samples) * have
    certain = strata.number >= 0
    while strata.sums and strata.complete and found.relative_error() > tolerance:
        plan = _plan(found, strata, single, have, need.spectrum.shape[1], tolerance)
        if plan is None:
            break
        chosen, more = plan
        more = torch.where(certain & chosen[strata.number], more, 0)
        examples = allocation.examples if every_example else allocation.examples[more[allocation.examples] > 0]
        again = Strata(torch.where(more > 0, strata.number, -1), strata.count)
        visit(replace(allocation, examples=examples, strata=again, more=MoreSketches(more, strata.logits)))
        if not again.complete:
            break
        share = _by_stratum(strata, more) / _by_stratum(strata, have + more).clamp_min(1)
        found = _with(found, strata, again, share, int(more.sum()))
        have = have + more
    return found


def _plan(
    found: FisherDiagonal, strata: Strata, single: Tensor, have: Tensor, rank: int, tolerance: float
) -> tuple[Tensor, Tensor] | None:
    """Choose the strata [S] that get more sketches, and how many the examples of a chosen one get, int64 [N].

    The reported variance of all is taken to be where it was predicted, so that no stratum is chosen for its own report.

    Args:
        single: In proportion to the variance that one sketch of each example would leave, [N].
        have: The number of sketches of each example so far, int64 [N].
        rank: The most cotangents of an example, which are exact.
    """
    norm = float(found.vector().norm().clamp_min(torch.finfo(torch.float64).tiny))
    reported = sum(float(strata.sums[name][1].sum()) for name in found) / norm / norm
    excess = found.relative_error() ** 2 - (AIM * tolerance) ** 2
    value = _by_stratum(strata, single / have.clamp_min(1))
    if not float(value.sum()) > 0:
        return None
    value = value * (reported / float(value.sum()))
    best, least = None, math.inf
    for part in MORE:
        more = (part * have).ceil().long().clamp_min(2)
        gain = value * _by_stratum(strata, more) / _by_stratum(strata, have + more).clamp_min(1)
        gain = torch.where(_by_stratum(strata, have + more > rank) > 0, 0, gain)  # as many would be exact
        cost = _by_stratum(strata, more + FORWARD).clamp_min(1)
        order = (gain / cost).argsort(descending=True)
        enough = int((gain[order].cumsum(0) < excess).sum())
        if enough < len(order) and float(cost[order[: enough + 1]].sum()) < least:
            least = float(cost[order[: enough + 1]].sum())
            best = torch.zeros(strata.count, dtype=torch.bool).index_fill(0, order[: enough + 1], True), more
    return best


def _with(found: FisherDiagonal, strata: Strata, again: Strata, share: Tensor, spent: int) -> FisherDiagonal:
    """Average the sketches of two visits. ``share`` [S] is the weight of the second; ``strata`` gets the averages."""
    entries, errors, standard = {}, {}, {}
    for name in found:  # without parameters that some batch did not use
        sums = strata.sums[name]
        new = again.sums.get(name, torch.zeros_like(sums))  # zero where the second visit did not use it
        w = share.view(-1, *(1,) * (sums.dim() - 2))
        strata.sums[name] = torch.stack(
            [(1 - w) * sums[0] + w * new[0], (1 - w).square() * sums[1] + w.square() * new[1]]
        )
        shift, variance = (strata.sums[name] - sums).sum(1)
        before = (found.estimator_error or {})[name].square()
        after = (before + variance).clamp_min(0)
        entries[name], errors[name] = found.entries[name] + shift, after.sqrt()
        # The spread of the data stays as it was.
        standard[name] = ((found.standard_error[name].square() - before).clamp_min(0) + after).sqrt()
    samples = found.samples + spent / max(1, found.visited)
    return replace(found, entries=entries, estimator_error=errors, standard_error=standard, samples=samples)


def _by_stratum(strata: Strata, values: Tensor) -> Tensor:
    """Sum values of the examples, [N], over each stratum, [S]."""
    there = strata.number >= 0
    return torch.zeros(strata.count, dtype=torch.float64).index_add(0, strata.number[there], values[there].double())
