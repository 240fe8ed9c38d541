"""Choose a feature extractor for a task: what does each way to choose cost, and how good are its choices?

    python -m bench.studies.selection [--output build/selection] [--write docs/selection.md]

The experiment of Achille et al., 2019, table 1, made wide: a hundred real tasks in 27 families, one expert a family in
two architectures and three sizes, all ways from static orders over Task2Vec to scores of features, and mixtures. An
expert of the task's own family is no candidate, and what is learned is learned from other families. Prints the tables,
and with ``--write`` puts them and docs/selection_curve.png into the page. Finished parts are kept under ``--output``
and used again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.pages import markdown, replace_section
from bench.studies.selection_data import Results, Settings, Store, embedder, fill, finished, of_families
from bench.studies.selection_ways import (
    FLOOR,
    Judge,
    Way,
    all_ways,
    alternate_halves,
    cross_fit,
    family_draws,
    interval,
    model2vec,
    of_kind,
    plain_ways,
    random_halves,
)
from bench.studies.wide_task import wide_tasks

ROOT = Path(__file__).resolve().parents[2]
SPENDING = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0)  # the budgets of the curve
TARGET, RIVAL = 0.25, "leep on 120"  # the claim: better than the rival at a quarter of its cost
SPLITS = 200
# What the library does by default, and the tasks that were looked at when it was designed: the first two of each
# family, and
# all of these families.
RECOMMENDED = "errors on near tasks, centred within 0.1, then 4 by linear_probe on 120"
SEEN_FAMILIES = ("European scripts", "North Indic scripts", "South Indic scripts", "arrangements")
PENALTIES, ENTRIES = (0.1, 1.0, 10.0), 1024  # of Model2Vec


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def with_interval(values: np.ndarray, draws: np.ndarray, sign: bool = False) -> str:
    low, high = interval(values, draws)
    return (
        f"{100 * values.mean():+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
        if sign
        else f"{100 * values.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    )


class Study:
    """All ways, judged."""

    def __init__(self, results: Results, settings: Settings, resamples: int = 4000) -> None:
        self.results, self.settings = results, settings
        self.judge, self.draws = Judge(results), family_draws(results.families, resamples)
        self.ways = all_ways(results, settings)
        self.by_name = {way.name: way for way in self.ways}
        self.table = np.stack([self.judge.increase(way.scores) for way in self.ways])
        self.row = {way.name: row for way, row in zip(self.ways, self.table, strict=True)}
        self.fits = [
            cross_fit(self.ways, self.table, results.families, alternate_halves(results.families), budget)
            for budget in SPENDING
        ]

    def front(self) -> list[Way]:
        """The ways that no other way beats at their cost or below, on all families."""
        cost = np.array([way.cost.mean() for way in self.ways])
        means = self.table.mean(1)
        order = np.lexsort((means, cost))
        kept: list[Way] = []
        best = np.inf
        for k in order:
            if means[k] < best - 1e-12:
                best = means[k]
                kept.append(self.ways[k])
        return kept

    def ways_section(self, groups: Sequence[str]) -> str:
        """The ways of some groups as a table."""
        head = ["chosen by", "cost", "mean increase (95 % interval)", "median", "points of error lost"]
        rows = [[*head, "weighted tau", "best first", "best in first 3"]]
        if "static" in groups:
            chance = self.judge.chance()
            rows.append(["chance", "0 %", with_interval(chance, self.draws), percent(float(np.median(chance))),
                         f"{100 * (chance * self.judge.floored).mean():.1f}", "-", "-", "-"])  # fmt: skip
        for way in self.ways:
            if way.group in groups:
                found = self.judge.quality(way.scores)
                cells = [
                    way.name,
                    f"{100 * way.cost.mean():.0f} %",
                    with_interval(found["increase"], self.draws),
                    percent(float(np.median(found["increase"]))),
                    f"{100 * found['regret'].mean():.1f}",
                    *(f"{found[key].mean():.2f}" for key in ("tau", "top-1", "top-3")),
                ]
                rows.append(cells)
        return markdown(rows)

    def kinds_section(self) -> str:
        """Choices among the experts of one architecture and size, in the mean over kinds that have at least three."""
        increases: dict[str, list[np.ndarray]] = {}
        taus: dict[str, list[float]] = {}
        number = 0
        for kind in dict.fromkeys(self.results.kinds):
            some = of_kind(self.results, kind)
            if some.candidates.sum(1).min() < 2:
                continue
            number, judge = number + 1, Judge(some)
            increases.setdefault("chance", []).append(judge.chance())
            for way in plain_ways(some, self.settings):
                if way.name != "largest network":
                    found = judge.quality(way.scores)
                    increases.setdefault(way.name, []).append(found["increase"])
                    taus.setdefault(way.name, []).append(float(found["tau"].mean()))
        rows = [["chosen by", "mean increase (95 % interval)", f"less that of {RIVAL}", "weighted tau"]]
        rival = np.mean(increases.get(RIVAL, [np.zeros(1)]), axis=0)
        for name, values in increases.items():
            mean = np.mean(values, axis=0)
            cells = with_interval(mean, self.draws), with_interval(mean - rival, self.draws, sign=True)
            rows.append([name, *cells, f"{np.mean(taus[name]):.2f}" if name in taus else "-"])
        return f"Means over {number} kinds.\n\n{markdown(rows)}" if number else "No kind has three experts."

    def confirmation_section(self) -> str:
        """The recommended way on the tasks that had no part in its design."""
        results = self.results
        new = (results.places >= 2) & ~np.isin(results.families, SEEN_FAMILIES)
        if not new.any():
            return "All of these tasks were looked at when the recommended way was designed."
        draws, own, rival = family_draws(results.families[new]), self.row[RECOMMENDED][new], self.row[RIVAL][new]
        return (
            f'The recommended way ("{RECOMMENDED}") was designed by looking at other tasks than {new.sum()} of these, '
            f"which are of {len(set(results.families[new]))} families. On them its increase is "
            f"{with_interval(own, draws)} at {percent(self.by_name[RECOMMENDED].cost[new].mean())} of the cost. "
            f"{RIVAL}: {with_interval(rival, draws)}. Paired difference: "
            f"{with_interval(own - rival, draws, sign=True)}."
        )

    def model2vec_section(self) -> str:
        """What Model2Vec learns from half of the families, on the other half."""
        half = alternate_halves(self.results.families)
        rows = [
            [
                "penalty",
                "distance alone",
                "Model2Vec",
                "distance and what Model2Vec changed for each expert in the mean",
            ]
        ]
        for penalty in PENALTIES:
            scores = model2vec(self.results, half, penalty, ENTRIES)
            increases = [self.judge.increase(scores[name]) for name in ("before", "after", "offsets")]
            rows.append([f"{penalty:g}", *(with_interval(values, self.draws) for values in increases)])
        return markdown(rows)

    def curve_section(self) -> str:
        """The best way within each budget, chosen on half of the families and judged on the other half."""
        rows = [["at most", "cost", "mean increase (95 % interval)", f"less that of {RIVAL}", "chosen on each half"]]
        for fit in self.fits:
            cells = percent(fit.budget), percent(fit.cost), with_interval(fit.increase, self.draws)
            difference = with_interval(fit.increase - self.row[RIVAL], self.draws, sign=True)
            rows.append([*cells, difference, "; ".join(dict.fromkeys(fit.chosen))])
        return markdown(rows)

    def claim(self) -> dict[str, Any]:
        """Whether the best way below the target's cost, cross-fitted, beats the rival."""
        fit = next(fit for fit in self.fits if fit.budget == TARGET)
        difference = fit.increase - self.row[RIVAL]
        others = [
            float(
                (
                    cross_fit(self.ways, self.table, self.results.families, half, TARGET).increase - self.row[RIVAL]
                ).mean()
            )
            for half in random_halves(self.results.families, SPLITS)
        ]
        return {
            "fit": fit,
            "difference": float(difference.mean()),
            "interval": interval(difference, self.draws),
            "others": np.array(others),
        }

    def claim_section(self) -> str:
        claim, rival = self.claim(), self.row[RIVAL]
        low, high = claim["interval"]
        verdict = "holds" if high < 0 else "does not hold" if low > 0 else "is not decided by these tasks"
        others = claim["others"]
        return (
            f'The claim "a smaller increase than {RIVAL} images of all experts, for {percent(TARGET)} of the cost" '
            f"**{verdict}**. Increase at {percent(claim['fit'].cost)} of the cost, chosen on other families: "
            f"{with_interval(claim['fit'].increase, self.draws)}. {RIVAL}: {with_interval(rival, self.draws)}. Paired "
            f"difference: {with_interval(claim['fit'].increase - rival, self.draws, sign=True)}. Over {len(others)} "
            f"random halves of the families the difference is {100 * others.mean():+.1f} % in the mean, and below zero "
            f"in {100 * (others < 0).mean():.0f} % of them."
        )

    def draw(self, path: Path) -> None:
        """The picture: increase against cost."""
        from matplotlib.figure import Figure

        from t2v_fast.analysis.plot import DPI, write_figure

        figure = Figure(figsize=(8.5, 5.2), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        styles = {
            "shortlist": ("#c8c8c8", 6, "shortlist, then a score"),
            "race": ("#e6ab02", 12, "race"),
            "score": ("#1f78b4", 26, "score of all experts' features"),
            "distance": ("#6a3d9a", 26, "distance of embeddings"),
            "learned": ("#33a02c", 26, "errors on near tasks of other families"),
            "static": ("#222222", 26, "static order"),
        }
        cost = np.array([way.cost.mean() for way in self.ways])
        means = self.table.mean(1)
        shown = means[[way.group in ("score", "learned", "race") for way in self.ways]]
        top = 1.15 * float(np.quantile(shown, 0.85))
        for group, (colour, size, label) in styles.items():
            some = np.array([way.group == group for way in self.ways]) & (means < top)
            if some.any():
                axes.scatter(100 * cost[some], 100 * means[some], s=size, color=colour, label=label, linewidths=0)
        x = [100 * fit.cost for fit in self.fits]
        y = np.array([100 * fit.increase.mean() for fit in self.fits])
        ends = 100 * np.array([interval(fit.increase, self.draws) for fit in self.fits]).T
        axes.errorbar(x, y, yerr=np.abs(ends - y), color="#b2182b", capsize=3, marker="o", markersize=5, linewidth=1.5,
                      label="best within a budget, chosen on the other half of the families")  # fmt: skip
        rival = 100 * self.row[RIVAL].mean()
        axes.annotate("LEEP", (100, rival), textcoords="offset points", xytext=(-8, 8), ha="right")
        axes.axhline(rival, color="#1f78b4", linestyle=":", linewidth=1)
        axes.axvline(100 * TARGET, color="#666666", linestyle="--", linewidth=1)
        axes.set(ylim=(0, 100 * top), xlim=(-2, 104),
                 xlabel="forward passes, percent of all experts on all images",
                 ylabel="mean increase of the error over the best expert's, percent")  # fmt: skip
        axes.legend(loc="upper right", fontsize=8)
        write_figure(figure, path)


def report(study: Study, picture: str = "selection_curve.png") -> str:
    """The study as Markdown."""
    results, settings, judge = study.results, study.settings, study.judge
    best = judge.best
    noise = results.every_error.std(0, ddof=1).mean() if len(results.every_error) > 1 else float("nan")
    winners = len(set(np.nanargmin(results.errors, axis=1).tolist()))
    own = results.errors.shape[1] - results.candidates.sum(1)
    intro = (
        f"{len(results.names)} tasks in {len(set(results.families))} families, {len(results.experts)} experts, of "
        f"which {results.candidates.sum(1).min()} or more are candidates for a task (not the {int(own.max())} of its "
        f"family). {settings.images} images to choose by and to train a head on, {settings.draws} draws of them, "
        f"{settings.test_images} test images. Error of the best candidate: {best.min():.3f} to {best.max():.3f}, "
        f"median {np.median(best):.3f}; {winners} experts are the best for some task. The error of one expert has a "
        f"standard deviation of {noise:.3f} over draws. Errors below {FLOOR:g} count as {FLOOR:g} in ratios. An "
        f"embedding takes {results.passes:.1f} forward passes for each of its images (measured), and the probe counts "
        f"as one more network. Intervals: families drawn again."
    )
    front = [["cost", "mean increase", "way"]]
    front += [[f"{100 * w.cost.mean():.0f} %", percent(study.row[w.name].mean()), w.name] for w in study.front()]
    return "\n\n".join(
        [
            intro,
            "### The curve",
            f"![Increase of the error against the cost of choosing]({picture})",
            study.confirmation_section(),
            study.claim_section(),
            study.curve_section(),
            "### Ways that look at no expert",
            study.ways_section(("static", "distance", "learned")),
            "### What Model2Vec learns",
            study.model2vec_section(),
            "### Scores of all experts' features",
            study.ways_section(("score",)),
            "### Choosing among networks of one architecture and size",
            study.kinds_section(),
            "### Below every cost, chosen and judged on all families",
            "These numbers are too good: each way is the best of many on the very tasks that judge it.",
            markdown(front),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "selection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finished", action="store_true", help="report on the tasks that are finished already")
    parser.add_argument("--write", type=Path, help="put the tables into this page, and the picture beside it")
    arguments = parser.parse_args(argv)
    settings = Settings(seed=arguments.seed)
    store = Store(arguments.output, settings, of_families(wide_tasks()))
    tasks = finished(store) if arguments.finished else None
    study = Study(fill(store, embedder(settings), tasks), settings)
    text = report(study)
    print(text)
    picture = arguments.write.parent / "selection_curve.png" if arguments.write else arguments.output / "curve.png"
    study.draw(picture)
    if arguments.write:
        replace_section(arguments.write, "selection", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
