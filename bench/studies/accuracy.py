"""Error against seconds: the time that each estimator of a task's embedding needs for its accuracy.

    python -m bench.studies.accuracy [--images 80] [--size 96] [--heads newton adam early] [--plot docs/accuracy.png]

Estimators are compared with ``exact`` on the demo's tasks of more than two classes. All estimators share one head for
each task: ``newton`` is fitted to the end (this library's default), ``adam`` by the schedule of the public Task2Vec
code, ``early`` by a tenth of this schedule. Prints Markdown: the relative error of the whole embedding, |estimate -
exact| / |exact|, as the median over tasks and draws and in brackets the largest, and the seconds for 1,000 images and
for an error of 5 percent.

The error of label sampling (``monte_carlo``) is its exact root mean square, from the per-example Fishers of every
label. Beyond the measured numbers of cotangents, errors are taken to fall as one over the square root of the number.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.contestants import naive
from t2v_fast import FisherRecorder, Probe, TaskData, fisher, load_probe
from t2v_fast.demo import DemoTask, demo_tasks
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.tasks.data import balanced_weights
from t2v_fast.tasks.head import fit_head

SAMPLED = ("hutchinson", "deflated")
SAMPLES = (1, 2, 4)
BATCH = 40
GOAL = 0.05
HEADS = {"newton": {}, "adam": {}, "early": {"epochs": 1}}


@dataclass
class Measured:
    """Of one head's tasks: errors by estimator and cotangents, and seconds an image."""

    errors: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)  # of one cotangent
    batch_mean: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)  # autograd at batch size 1, for one label
    confidence: list[float] = field(default_factory=list)

    def seconds(self, estimator: str, samples: float) -> float:
        """For one image."""
        if estimator == "batch_mean":
            return statistics.median(self.batch_mean)
        if estimator == "monte_carlo, batch size 1":
            return samples * statistics.median(self.single)
        return statistics.median(self.forward) + samples * statistics.median(self.backward)

    def needed(self, estimator: str) -> float | None:
        """Seconds an image for the goal; None where no number of cotangents gets there."""
        errors = self.errors
        known = {k: statistics.median(e) for (name, k), e in errors.items() if name == estimator.partition(",")[0]}
        for k in sorted(known):
            if known[k] <= GOAL:
                return self.seconds(estimator, k)
        if estimator in ("empirical", "batch_mean"):
            return None
        most = max(known)
        return self.seconds(estimator, math.ceil(most * (known[most] / GOAL) ** 2))


def measure(task: DemoTask, probe: Probe, options: dict, seeds: int, into: Measured) -> None:
    batches = list(TaskData.of((task.images, task.labels)).batches(probe.preprocessing, BATCH))
    features = torch.cat([probe.features(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    classes = len(task.classes)
    weights = balanced_weights(labels, classes)
    weights = weights / weights.sum()
    fit = fit_head(features, labels, num_classes=classes, weights=weights, **options)
    into.confidence.append(fit.mean_top_probability)
    settings = [(e, k, s) for e in SAMPLED for k in SAMPLES for s in range(seeds)]
    sums: dict[tuple, Tensor | float] = dict.fromkeys([("exact", 0, 0), ("empirical", 1, 0), *settings], 0.0)
    generators = {s: torch.Generator().manual_seed(s[2]) for s in settings}
    variance, seen = 0.0, 0
    parameters = probe.embedding_parameters()
    with probe.with_head(fit.linear) as network:
        with FisherRecorder(network, parameters) as recorder:
            for x, y in batches:
                a = weights[seen : seen + len(x)]
                seen += len(x)
                start = time.perf_counter()
                logits = network(x)
                into.forward.append((time.perf_counter() - start) / len(x))
                # One forward serves all: each estimator only backpropagates other cotangents.
                for key in sums:
                    u = cotangents(logits, key[0], max(key[1], 1), labels=y, generator=generators.get(key))
                    start = time.perf_counter()
                    q = flat(recorder.backward(logits, u, retain_graph=True))
                    into.backward.append((time.perf_counter() - start) / len(x) / len(u))
                    sums[key] = sums[key] + a @ q
                variance += label_sampling_variance(recorder, logits, a)
        exact = sums.pop(("exact", 0, 0))
        start = time.perf_counter()
        public = fisher(network, batches, "batch_mean", parameters=parameters, self_check=False).vector()
        into.batch_mean.append((time.perf_counter() - start) / len(labels))
        x, y = batches[0]
        start = time.perf_counter()
        naive(network, x[:4], y[:4])
        into.single.append((time.perf_counter() - start) / 4)
    for (estimator, k, _), value in sums.items():
        into.errors[estimator, k].append(float((value - exact).norm() / exact.norm()))
    # The gradient of a mean over B examples has 1/B of the squared gradient of one.
    into.errors["batch_mean", 1].append(float((BATCH * public - exact).norm() / exact.norm()))
    for k in SAMPLES:
        into.errors["monte_carlo", k].append(math.sqrt(variance / k) / float(exact.norm()))


def flat(q: dict[str, Tensor]) -> Tensor:
    """[N, D], float64."""
    return torch.cat([v.double() for v in q.values()], 1)


def label_sampling_variance(recorder: FisherRecorder, logits: Tensor, a: Tensor) -> float:
    """Sum of the variances of sum_n a_n q_n, where q_n is that of one label drawn from the model."""
    p = logits.detach().double().softmax(1)
    mean, square = 0.0, 0.0
    for c in range(logits.shape[1]):
        u = nn.functional.one_hot(torch.tensor(c), logits.shape[1]) - p
        q = flat(recorder.backward(logits, u.to(logits), retain_graph=True))
        mean, square = mean + p[:, c : c + 1] * q, square + p[:, c] * q.square().sum(1)
    return float(a.square() @ (square - mean.square().sum(1)).clamp_min(0))


ROWS = (
    *[(estimator, k) for estimator in ("deflated", "hutchinson", "monte_carlo") for k in SAMPLES],
    ("monte_carlo, batch size 1", 1),
    ("empirical", 1),
    ("batch_mean", 1),
)


def table(name: str, measured: Measured) -> None:
    low, high = min(measured.confidence), max(measured.confidence)
    print(f"\nHead `{name}`, mean top probability {low:.4f} to {high:.4f}:\n")
    print("| estimator | cotangents an image | relative error | s for 1,000 images | s for 5 percent |")
    print("| --- | --- | --- | --- | --- |")
    said = set()
    for estimator, k in ROWS:
        errors = measured.errors[estimator.partition(",")[0], k]
        needed = measured.needed(estimator)
        goal = "" if estimator in said else "never" if needed is None else f"{1000 * needed:.3g}"
        said.add(estimator)
        error = f"{statistics.median(errors):.3f} ({max(errors):.3f})"
        print(f"| `{estimator}` | {k} | {error} | {1000 * measured.seconds(estimator, k):.1f} | {goal} |")
    ratio = measured.needed("monte_carlo, batch size 1") / measured.needed("deflated")
    print(f"\nLabel sampling at batch size 1 over `deflated`, at 5 percent: {ratio:.0f}")


def draw(results: dict[str, Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 4), sharey=True, layout="constrained")
    colours = {"deflated": "#0072B2", "hutchinson": "#009E73", "monte_carlo": "#D55E00"}
    for each, (name, measured) in zip([axes] if len(results) == 1 else axes, results.items(), strict=True):
        for estimator, colour in colours.items():
            x = [1000 * measured.seconds(estimator, k) for k in SAMPLES]
            y = [statistics.median(measured.errors[estimator, k]) for k in SAMPLES]
            each.plot(x, y, "o-", color=colour, label=estimator)
        for estimator, marker in (("empirical", "s"), ("batch_mean", "^")):
            point = 1000 * measured.seconds(estimator, 1), statistics.median(measured.errors[estimator, 1])
            each.plot(*point, marker, color="#444444", label=estimator)
        each.axhline(GOAL, color="0.6", linestyle=":")
        each.set(xlim=(0, None), yscale="log", xlabel="seconds for 1,000 images", title=f"head: {name}")
        each.grid(alpha=0.3)
    (axes if len(results) == 1 else axes[0]).set_ylabel("relative error of the embedding")
    (axes if len(results) == 1 else axes[-1]).legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tasks", type=int, help="how many of the tasks (default: all)")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    probe = load_probe(size=arguments.size)
    # Of two classes every estimator but label sampling is exact with one cotangent.
    tasks = [task for task in demo_tasks(arguments.images) if len(task.classes) > 2][: arguments.tasks]
    print(
        f"{len(tasks)} tasks of {arguments.images} images at {arguments.size} pixels, {torch.get_num_threads()} threads"
    )
    results = {}
    for name in arguments.heads:
        results[name] = Measured()
        for task in tasks:
            options = {"method": "newton" if name == "newton" else "adam", **HEADS[name]}
            measure(task, probe, options, arguments.seeds, results[name])
        table(name, results[name])
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
