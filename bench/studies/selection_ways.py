"""Ways to choose an expert, each with its cost, and how good their choices are.

A way gives every candidate of every task a score, and says what share of the forward passes of all candidates over all of
the task's images it took. Letters for shapes: T (tasks), E (experts), F (families).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import rankdata, weightedtau

from bench.studies.selection_data import Results, Settings, enough
from bench.studies.selection_experts import WIDTHS
from t2v_fast.analysis.distance import asymmetric_distance, cdist, centred_distance
from t2v_fast.analysis.feature_scores import SCORES, combine_terms

FLOOR = 0.01  # errors below count as this one, so that no task with nearly no errors decides a mean of ratios
ALPHAS = (0.05, 0.15, 0.5)
LENGTHS = (2, 3, 4, 6, 8, 10, 13)  # of shortlists


@dataclass(frozen=True)
class Way:
    """One way to choose.

    Attributes:
        name: What the table calls it.
        group: "static", "distance", "learned", "score", "shortlist" or "race".
        scores: [T, E], higher is better; minus infinity where an expert is no candidate.
        cost: [T], the forward passes that it took, as a share of those of all candidates over all images.
    """

    name: str
    group: str
    scores: np.ndarray
    cost: np.ndarray


class Judge:
    """How good choices are, against the errors of a table."""

    def __init__(self, results: Results) -> None:
        self.errors, self.families = results.errors, results.families
        self.best = np.nanmin(self.errors, axis=1)
        self.floored = np.maximum(self.best, FLOOR)

    def picks(self, scores: np.ndarray) -> np.ndarray:
        """The probability [T, E] that an expert is chosen: equal parts where several have the highest score."""
        top = scores == scores.max(1, keepdims=True)
        return top / top.sum(1, keepdims=True)

    def increase(self, scores: np.ndarray) -> np.ndarray:
        """The relative increase [T] of the error over the best candidate's."""
        errors = np.where(np.isnan(self.errors), 0, self.errors)
        return ((self.picks(scores) * errors).sum(1) - self.best) / self.floored

    def chance(self) -> np.ndarray:
        """The expected increase [T] of a candidate drawn at random."""
        return (np.nanmean(self.errors, axis=1) - self.best) / self.floored

    def quality(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """By task [T]: increase, regret in error, weighted Kendall tau, best first, best among three, best of three."""
        found: dict[str, np.ndarray] = {"increase": self.increase(scores)}
        found["regret"] = found["increase"] * self.floored
        rows = []
        for error, score in zip(self.errors, scores, strict=True):
            usable = np.flatnonzero(~np.isnan(error))
            error, score = error[usable], score[usable]
            order = np.argsort(-score, kind="stable")
            first = (score == score.max()) @ (error == error.min()) / (score == score.max()).sum()
            tau = weightedtau(rankdata(score), -error).statistic if np.ptp(score) else 0.0
            rows.append((tau, first, float(error[order[:3]].min() == error.min()), error[order[:3]].min()))
        tau, first, among, three = np.array(rows).T
        found |= {"tau": np.nan_to_num(tau), "top-1": first, "top-3": among}
        found["best of 3"] = (three - self.best) / self.floored
        return found


def family_draws(families: np.ndarray, resamples: int = 4000, seed: int = 0) -> np.ndarray:
    """Weights [resamples, T] of bootstrap draws of whole families; every row sums to one."""
    kinds, codes = np.unique(families, return_inverse=True)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=resamples)
    weights = times[:, codes].astype(float)
    return weights / weights.sum(1, keepdims=True)


def interval(values: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """The 95 percent interval of the mean of values [T], families drawn again."""
    low, high = np.quantile(draws @ values, [0.025, 0.975])
    return float(low), float(high)


def masked(results: Results, scores: np.ndarray) -> np.ndarray:
    """Scores [T, E] with minus infinity where an expert is no candidate."""
    return np.where(results.candidates, scores, -np.inf)


def image_share(results: Results, settings: Settings, count: int) -> np.ndarray:
    """What a pass of all candidates over so many images costs, [T]."""
    return np.array([min(enough(count, c), settings.images) for c in results.classes]) / settings.images


def embedding_share(results: Results, settings: Settings, count: int, passes: float) -> np.ndarray:
    """What an embedding of so many images costs, [T]; the probe counts as one more network."""
    return image_share(results, settings, count) * passes / results.candidates.sum(1)


def within_tasks(scores: np.ndarray) -> np.ndarray:
    """Scores [T, E] less their mean and divided by their spread over each task's candidates; others stay."""
    known = np.where(np.isinf(scores), np.nan, scores)
    spread = np.nanstd(known, axis=1, keepdims=True)
    scaled = (known - np.nanmean(known, axis=1, keepdims=True)) / np.maximum(spread, 1e-12)
    return np.where(np.isnan(scaled), -np.inf, scaled)


def static_ways(results: Results) -> Iterator[Way]:
    """What looks at no image of the task."""
    free = np.zeros(len(results.names))
    widths = np.array([WIDTHS[kind.size] + 0.5 * (kind.architecture == "residual") for kind in results.kinds])
    yield Way("largest network", "static", masked(results, np.tile(widths, (len(free), 1))), free)
    yield Way("best on other families", "static", masked(results, average_accuracy(results)), free)


def log_errors(results: Results) -> np.ndarray:
    """log of the errors [T, E], at least FLOOR, less each task's mean; NaN where an expert is no candidate."""
    logs = np.log(np.maximum(results.errors, FLOOR))
    return logs - np.nanmean(logs, axis=1, keepdims=True)


def average_accuracy(results: Results) -> np.ndarray:
    """Minus each expert's mean log error on the tasks of other families, [T, E]."""
    logs = log_errors(results)
    out = np.empty_like(logs)
    for family in np.unique(results.families):
        mine = results.families == family
        out[mine] = -np.nanmean(logs[~mine], axis=0)
    return out


def distance_tables(results: Results, images: int) -> dict[str, np.ndarray]:
    """Distances [T, E] from the experts' tasks, embedded with as many images as they have, to the tasks."""
    experts = [results.embeddings[max(results.embeddings)][k] for k in results.experts]
    tasks = results.embeddings[images]
    tables = {"cosine": cdist(experts, tasks).T}
    for alpha in ALPHAS:
        tables[f"asymmetric, alpha {alpha:g}"] = asymmetric_distance(experts, tasks, alpha=alpha).T
    tables["plain cosine"] = cdist(experts, tasks, "plain_cosine").T
    tables["entropy"] = cdist(experts, tasks, "entropy").T
    centred = centred_distance(experts, tasks, bank=experts).T
    tables["centred"] = centred
    means = [np.array([e.meta["mean_feature"] for e in group]) for group in (tasks, experts)]
    tables["mean feature"] = _cosine(*means)
    about = means[1].mean(0)
    tables["mean feature, centred"] = _cosine(means[0] - about, means[1] - about)
    tables["centred and mean feature"] = -(within_tasks(-centred) + within_tasks(-tables["mean feature, centred"])) / 2
    tables["centred, of what experts compute"] = centred_distance(results.computed, tasks, bank=results.computed).T
    tables["centred, both"] = -(within_tasks(-centred) + within_tasks(-tables["centred, of what experts compute"])) / 2
    return tables


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 1 - a @ b.T


def with_errors(results: Results, features: list[np.ndarray], ridge: float = 5.0) -> np.ndarray:
    """Predicted accuracy [T, E]: a slope for each feature [T, E] and a shrunk offset for each expert.

    Fitted by least squares to the log errors of other families. A feature is centred and scaled within each task.
    """
    logs, known = log_errors(results), results.candidates
    scaled = [np.where(known, within_tasks(masked(results, f)), 0) for f in features]
    t, e = known.shape
    design = np.stack([*scaled, *(np.tile(row, (t, 1)) for row in np.eye(e))], -1)  # [T, E, features + E]
    penalty = np.diag([1e-6] * len(features) + [ridge] * e)
    out = np.empty_like(logs)
    for family in np.unique(results.families):
        mine = results.families == family
        use = known & ~mine[:, None]
        x, y = design[use], logs[use]
        out[mine] = -(design[mine] @ np.linalg.solve(x.T @ x + penalty, x.T @ y))
    return out


def score_table(results: Results, score: str, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """A score [T, E] of the candidates, or of those in ``among`` [T, E]; minus infinity elsewhere."""
    among = results.candidates if among is None else among
    terms, out = results.scores[score, count], np.full(among.shape, -np.inf)
    for k, usable in enumerate(among):
        out[k, usable] = combine_terms(terms[k, usable], score)
    return out


def shortlist(scores: np.ndarray, length: int) -> np.ndarray:
    """The candidates [T, E] with the highest scores."""
    order = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return (order < length) & ~np.isinf(scores)


def then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Scores [T, E] that order by ``second`` where it is finite, and below these by ``first``."""
    inside = ~np.isinf(second)
    ranks = np.stack([rankdata(row) for row in second])
    low = np.stack([rankdata(row) for row in first]) - 2 * first.shape[1]
    return np.where(inside, ranks, np.where(np.isinf(first), -np.inf, low))


def shortlisted(
    results: Results, settings: Settings, name: str, first: np.ndarray, cost: np.ndarray, score: str, counts: tuple[int, ...]
) -> Iterator[Way]:
    """Shortlists by ``first`` of several lengths, ordered by a score on several numbers of images."""
    number = results.candidates.sum(1)
    for length, count in product(LENGTHS, counts):
        inside = shortlist(first, length)
        second = score_table(results, score, count, inside)
        total = cost + image_share(results, settings, count) * length / number
        yield Way(f"{name}, {length} by {score} on {count}", "shortlist", then(first, second), total)
