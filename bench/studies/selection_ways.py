"""Ways to choose an expert, each with its cost, and how good their choices are.

A way gives every candidate of every task a score, and says what share of the forward passes of all candidates over all
of the task's images it took. Letters for shapes: T (tasks), E (experts), F (families).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
from scipy.stats import rankdata, weightedtau

from bench.studies.selection_data import Results, Settings, enough
from bench.studies.selection_experts import WIDTHS, Kind
from t2v_fast.analysis.distance import asymmetric_distance, cdist, centred_distance
from t2v_fast.analysis.feature_scores import SCORES, combine_terms
from t2v_fast.analysis.race import Runner, run_race
from t2v_fast.analysis.selection import Model2Vec, predict_errors

FLOOR = 0.01  # errors below count as this one, so that no task with nearly no errors decides a mean of ratios
ALPHAS = (0.05, 0.15, 0.5)
LENGTHS = (2, 3, 4, 6, 8, 10, 13)  # of shortlists
AVERAGE = "best on other families"
BUDGETS = (0.25, 0.5, 1.0)  # of races
SHORTLISTED = ("leep", "logme", "ncti", "knn", "linear_probe")  # the scores that order a shortlist
BANDWIDTHS = (0.05, 0.1, 0.2)  # of errors on near tasks


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
    share = results.probe_price / (results.candidates @ results.prices)
    return image_share(results, settings, count) * passes * share


def price_share(results: Results, among: np.ndarray) -> np.ndarray:
    """What the experts in ``among`` [T, E] cost, as a share of all candidates, [T]."""
    return (among @ results.prices) / (results.candidates @ results.prices)


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
    yield Way(AVERAGE, "static", masked(results, average_accuracy(results)), free)


def average_accuracy(results: Results) -> np.ndarray:
    """Each expert's accuracy on the tasks of other families, [T, E]."""
    out = np.empty_like(results.errors)
    for family in np.unique(results.families):
        mine = results.families == family
        out[mine] = -predict_errors(results.errors[~mine], floor=FLOOR)
    return out


def distance_tables(results: Results, images: int) -> dict[str, np.ndarray]:
    """Distances [T, E] from the experts' own tasks to the tasks, embedded with so many images."""
    experts, tasks = results.sources, results.embeddings[images]
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


def near_accuracy(results: Results, distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Each expert's accuracy on the tasks of other families, near ones first, [T, E]; distances are [T, T]."""
    out = np.empty_like(results.errors)
    for family in np.unique(results.families):
        mine = results.families == family
        near = distances[np.ix_(~mine, mine)]
        out[mine] = -predict_errors(results.errors[~mine], near, bandwidth=bandwidth, floor=FLOOR)
    return out


def between_tasks(results: Results, images: int) -> dict[str, np.ndarray]:
    """Distances [T, T] between tasks, embedded with so many images."""
    tasks = results.embeddings[images]
    about = np.mean([e.meta["mean_feature"] for e in results.sources], axis=0)
    means = np.array([e.meta["mean_feature"] for e in tasks]) - about
    return {
        "centred": centred_distance(tasks, tasks, bank=results.sources),
        "cosine": cdist(tasks, tasks),
        "mean feature": _cosine(means, means),
    }


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
    results: Results, settings: Settings, first: Way, length: int, scores: tuple[str, ...] = SHORTLISTED
) -> Iterator[Way]:
    """A shortlist of the candidates that ``first`` puts first, ordered by scores on several numbers of images."""
    inside = shortlist(first.scores, length)
    for score, count in product(scores, settings.counts):
        second = score_table(results, score, count, inside)
        cost = first.cost + image_share(results, settings, count) * price_share(results, inside)
        yield Way(f"{first.name}, then {length} by {score} on {count}", "shortlist", then(first.scores, second), cost)


def race_way(results: Results, name: str, first: Way, length: int, budget: float) -> Way:
    """The race of t2v_fast/analysis/race.py among the ``length`` candidates that ``first`` puts first."""
    scores, cost = np.full(first.scores.shape, -np.inf), first.cost.copy()
    inside = shortlist(first.scores, length)
    part = price_share(results, inside)
    for k, likelihoods in enumerate(results.likelihoods):
        by_images = {values.shape[1]: values for values in likelihoods.values()}
        rows = np.flatnonzero(inside[k])
        runners = [Runner(str(row), partial(_likelihoods, by_images, row), results.prices[row]) for row in rows]
        ranked, share = run_race(runners, sorted(by_images), budget=budget)
        for place, runner in enumerate(ranked):
            scores[k, int(runner.name)] = -place
        cost[k] += share * part[k]
    return Way(name, "race", then(first.scores, scores), cost)


def _likelihoods(by_images: dict[int, np.ndarray], row: int, images: int) -> np.ndarray:
    return by_images[images][row]


def plain_ways(results: Results, settings: Settings) -> list[Way]:
    """The ways that order all candidates at once: static, by distance, learned, and by the score of their features."""
    ways = list(static_ways(results))
    for images in settings.embedded:
        tables = distance_tables(results, images)
        embedded = embedding_share(results, settings, images, results.passes)
        forward = embedding_share(results, settings, images, 1)
        for name, table in tables.items():
            cost = forward if name.startswith("mean feature") else embedded
            ways.append(Way(f"{name}, {images} images", "distance", masked(results, -table), cost))
        for name, table in between_tasks(results, images).items():
            cost = forward if name == "mean feature" else embedded
            for bandwidth in BANDWIDTHS:
                learned = masked(results, near_accuracy(results, table, bandwidth))
                ways.append(Way(f"errors on near tasks, {name} within {bandwidth:g}", "learned", learned, cost))
    for score, count in product(SCORES, settings.counts):
        cost = image_share(results, settings, count)
        ways.append(Way(f"{score} on {count}", "score", score_table(results, score, count), cost))
    return ways


def all_ways(results: Results, settings: Settings) -> list[Way]:
    """Every way that the study compares: the plain ones, shortlists and races."""
    ways = plain_ways(results, settings)
    firsts = [
        way
        for way in ways
        if way.name == AVERAGE
        or way.name.startswith("centred, ")
        or (way.group == "learned" and "cosine" not in way.name)
    ]
    everyone = results.errors.shape[1]
    for first, length in product(firsts, LENGTHS):
        ways += shortlisted(results, settings, first, length)
        for budget in BUDGETS:
            label = f"{first.name}, then {length} in a race, budget {budget:g}"
            ways.append(race_way(results, label, first, length, budget))
    average = next(way for way in ways if way.name == AVERAGE)
    for budget in BUDGETS:
        ways.append(race_way(results, f"race of all, budget {budget:g}", average, everyone, budget))
    return ways


def of_kind(results: Results, kind: Kind) -> Results:
    """The same with the experts of one architecture and size as the only candidates."""
    mine = np.array([other == kind for other in results.kinds])
    return replace(results, errors=np.where(mine, results.errors, np.nan))


def model2vec(results: Results, half: np.ndarray, penalty: float, entries: int) -> dict[str, np.ndarray]:
    """What Model2Vec learns from the other half of the families, and what of it is one offset for each expert.

    Returns:
        Scores [T, E] of the distance without learning, of Model2Vec, and of the distance plus the mean over tasks of
        what Model2Vec changed for each expert.
    """
    sources = np.array([e.hessian for e in results.sources])
    tasks = np.array([e.hessian for e in results.embeddings[max(results.embeddings)]])
    found = {name: np.full(results.errors.shape, -np.inf) for name in ("before", "after", "offsets")}
    for side in (False, True):
        fit, rest = half == side, half != side
        model = Model2Vec(penalty=penalty, entries=entries).fit(sources, tasks[fit], results.errors[fit])
        after = model.distances(tasks[rest]).T
        before = asymmetric_distance(sources[:, model.indices], tasks[rest][:, model.indices], trivial=model.trivial).T
        found["before"][rest], found["after"][rest] = -before, -after
        found["offsets"][rest] = -(before + (after - before).mean(0))
    return {name: masked(results, scores) for name, scores in found.items()}


@dataclass(frozen=True)
class CrossFitted:
    """Ways that were chosen on some families, and judged on the others."""

    budget: float
    chosen: list[str]  # one for each half
    increase: np.ndarray  # [T], of the way that was chosen on the half that the task is not in
    cost: float


def cross_fit(ways: list[Way], table: np.ndarray, families: np.ndarray, half: np.ndarray, budget: float) -> CrossFitted:
    """Choose the way with the lowest mean increase within the budget on each half, and judge it on the other.

    Args:
        ways: W ways.
        table: Their increases [W, T].
        families: The family of each task [T].
        half: Which half each task is in [T]; all tasks of a family are in one.
        budget: The highest mean cost.
    """
    cost = np.array([way.cost.mean() for way in ways])
    increase, spent, chosen = np.empty(len(families)), np.empty(len(families)), []
    for side in (False, True):
        fit = half == side
        means = np.where(cost <= budget, table[:, fit].mean(1), np.inf)
        k = int(means.argmin())
        chosen.append(ways[k].name)
        increase[~fit], spent[~fit] = table[k, ~fit], ways[k].cost[~fit]
    return CrossFitted(budget, chosen, increase, float(spent.mean()))


def alternate_halves(families: np.ndarray) -> np.ndarray:
    """Every second family, in the order in which they are listed: [T]."""
    order = list(dict.fromkeys(families.tolist()))
    return np.array([order.index(family) % 2 == 1 for family in families])


def random_halves(families: np.ndarray, number: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Halves of the families drawn at random, each [T]."""
    rng, kinds = np.random.default_rng(seed), np.unique(families)
    for _ in range(number):
        yield np.isin(families, rng.permutation(kinds)[: len(kinds) // 2])
