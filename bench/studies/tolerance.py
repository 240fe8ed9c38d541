"""The cost of a given error of a task's embedding, for several ways to spend cotangents.

    python -m bench.studies.tolerance [--classes 2 10 100 1000] [--heads newton early own] [--images 200] [--size 64]

The ways are equal numbers of cotangents, and numbers that are shared out by the spectrum. Images are handwritten digits
(scikit-learn's), the probe is the packaged EfficientNet-Lite0. Labels of 2 classes are parities, of 10 the digits, of
100 and 1,000 random (1,000 images are labelled and fitted, whatever --images says). Heads: ``newton``, fitted to the
end (six iterations for 1,000 classes), ``early``, one epoch of Adam, and ``own``, the probe's own head of 1,000 classes
(left out for other numbers of classes).

Errors are relative to the norm of the embedding: the root mean square over the draws, from two sketches of each image
for each number of cotangents. Seconds are the measured seconds of a forward and of a backward pass, times their
numbers. A batch has as many backward passes as its neediest image.

    python -m bench.studies.tolerance --classes 1000 --heads early --images 128 --average 4.5 5.2 5.7 [--seeds 24]

With ``--average``, the cotangents are shared out by the spectrum, so many for an image on average, and the error is the
spread of whole estimates over the seeds. No second sketch is needed then.

    python -m bench.studies.tolerance --heads newton early --images 128 --goals 0.05 0.02 --seeds 8

With ``--goals``, the cost of each error for several seeds, as ``Task2Vec(tolerance=...)`` reaches it: images are drawn
by importance and visited again as needed. The columns are the backward passes of an image on average, their median and
most over the seeds, the visits of an image, the mean of the errors that are reported, and the root mean square of the
errors against ``exact`` (up to 10 classes).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from t2v_fast import FisherDiagonal, FisherRecorder, Probe, TaskData, fisher, load_probe
from t2v_fast.estimation.allocation import Allocation, SamplingStats, full_allocation, share_out
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.tolerance import sample_until
from t2v_fast.tasks.data import balanced_weights
from t2v_fast.tasks.head import fit_head

BATCH = 32
MOST = 16  # cotangents of an image
AVERAGES = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 14, 16)
GOALS = (0.05, 0.02)
OWN_CLASSES = 1000
HEADS = ("newton", "early", "own")


@dataclass
class Task:
    """A head on the features of some images."""

    images: Tensor  # [N, 3, H, W]
    need: SamplingStats
    head: nn.Linear
    weights: Tensor
    confidence: float
    forward: list[float] = field(default_factory=list)  # seconds an image
    backward: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, probe: Probe, classes: int, head: str, count: int) -> Task:
        digits = load_digits()
        fitted = max(count, classes)
        pictures, labels = (digits.images[:fitted] * 255 / 16).astype(np.uint8), digits.target[:fitted]
        if classes == 2:
            labels = labels % 2
        elif classes > 10:
            labels = np.random.default_rng(0).permutation(np.arange(fitted) % classes)
        batches = list(TaskData.of((pictures, labels)).batches(probe.preprocessing, BATCH))
        features = torch.cat([probe.features(x) for x, _ in batches])
        y = torch.from_numpy(labels)
        if head == "own":
            linear = copy.deepcopy([m for m in probe.network.modules() if isinstance(m, nn.Linear)][-1])
            weights = torch.ones(len(y))
        else:
            options = {"method": "adam", "epochs": 1} if head == "early" else {}
            if classes > 100 and head == "newton":
                options = {"max_iterations": 6}
            weights = balanced_weights(y, classes)
            linear = fit_head(features, y, num_classes=classes, weights=weights, **options).linear
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        logits = nn.functional.linear(features[:count].double(), weight, bias)
        images = torch.cat([x for x, _ in batches])[:count]
        need = SamplingStats.of(logits, weight, weights[:count])
        return cls(images, need, linear, weights[:count], float(logits.softmax(1).amax(1).mean()))

    def seconds(self, visits: float, passes: float) -> float:
        """Of so many forward and backward passes of an image."""
        return visits * statistics.median(self.forward) + passes * statistics.median(self.backward)


def passes(allocation: Allocation, rank: int | None = None) -> int:
    """Backward passes, each of an image; with a ``rank``, below it one more for the second sketch."""
    numbers = [allocation.numbers[b] for b in allocation.batches(BATCH)]
    second = rank is not None and allocation.more is None
    return sum(len(k) * (int(k.max()) + (second and int(k.min()) < rank)) for k in numbers)


def variances(task: Task, network: nn.Module, parameters: list[str]) -> Tensor:
    """Sum over the entries of the variance that 1, 2, ... cotangents leave of an image's diagonal, [N, K]."""
    n, rank = task.need.spectrum.shape
    found = torch.zeros(n, min(rank, MOST), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with FisherRecorder(network, parameters) as recorder:
        for start in range(0, n, BATCH):
            here = slice(start, start + BATCH)
            began = time.perf_counter()
            logits = network(task.images[here])
            task.forward.append((time.perf_counter() - began) / len(logits))
            for k in range(1, min(rank - 1, MOST) + 1):
                two = cotangents(logits, "deflated", k, generator=generator, sketches=2)[-2:]
                began = time.perf_counter()
                # As if each were the only one, without the factor 1 / sqrt(2).
                q = [2 * flat(recorder.backward(logits, u, retain_graph=True)) for u in two]
                task.backward.append((time.perf_counter() - began) / len(logits) / 2)
                found[here, k - 1] = (q[0] - q[1]).square().sum(1) / 2
            if rank == 1:
                began = time.perf_counter()
                recorder.backward(logits, cotangents(logits, "exact"))
                task.backward.append((time.perf_counter() - began) / len(logits))
    return found


def flat(q: dict[str, Tensor]) -> Tensor:
    """[N, D], float64."""
    return torch.cat([v.double() for v in q.values()], 1)


def tolerance(
    task: Task, network: nn.Module, parameters: list[str], goal: float, first_seed: int = 0
) -> tuple[FisherDiagonal, int, int, int]:
    """The estimate within the goal; images visited, backward passes, and draws and refinements."""
    visits, cost, rounds = 0, 0, 0

    def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
        nonlocal visits, cost, rounds
        visits, rounds = visits + len(allocation.examples), rounds + 1
        cost += passes(allocation, task.need.spectrum.shape[1])
        return fisher(
            network,
            (task.images[batch] for batch in allocation.batches(BATCH)),
            parameters=parameters,
            weights=task.weights,
            seed=seed,
            self_check=rounds == 1,
            estimator_error=True,
            allocation=allocation,
        )

    return sample_until(task.need, goal, visit, first_seed), visits, cost, rounds


def spread(probe: Probe, classes: int, head: str, count: int, averages: list[float], seeds: int) -> None:
    """Print the error of estimates with a fixed number of cotangents, from their spread over the seeds."""
    task = Task.of(probe, classes, head, count)
    with probe.with_head(task.head) as network:
        for average in averages:
            allocation = full_allocation(share_out(task.need, average)).ordered()
            found = []
            for seed in range(seeds):
                images = (task.images[batch] for batch in allocation.batches(BATCH))
                named = {"parameters": probe.embedding_parameters(), "weights": task.weights}
                found.append(fisher(network, images, **named, seed=seed, self_check=not seed, allocation=allocation))
            vectors = torch.stack([f.vector() for f in found])
            error = float(vectors.var(0).sum().sqrt() / vectors.mean(0).norm())
            row = [
                f"{classes:,}",
                f"`{head}`",
                str(average),
                f"{passes(allocation) / len(task.images):.2f}",
                f"{error:.3f}",
            ]
            print("|", " | ".join(row), "|", flush=True)


def costs(probe: Probe, classes: int, head: str, count: int, goals: list[float], seeds: int) -> None:
    """Print what each goal costs, over the seeds."""
    task = Task.of(probe, classes, head, count)
    with probe.with_head(task.head) as network:
        exact = None
        if classes <= 10:
            named = {"parameters": probe.embedding_parameters(), "weights": task.weights}
            exact = fisher(network, task.images.split(BATCH), "exact", **named).vector()
        for goal in goals:
            found = [tolerance(task, network, probe.embedding_parameters(), goal, seed) for seed in range(seeds)]
            each = [cost / count for _, _, cost, _ in found]
            row = [
                f"{classes:,}",
                f"`{head}`",
                f"{goal:.0%}",
                f"{statistics.mean(each):.2f}",
                f"{statistics.median(each):.2f}",
                f"{max(each):.2f}",
                f"{statistics.mean(visits / count for _, visits, _, _ in found):.2f}",
                f"{statistics.mean(f.relative_error() for f, *_ in found):.4f}",
                "not computed",
            ]
            if exact is not None:
                apart = [float((f.vector() - exact).norm() / exact.norm()) for f, *_ in found]
                row[-1] = f"{statistics.mean(e**2 for e in apart) ** 0.5:.4f}"
            print("|", " | ".join(row), "|", flush=True)


def measure(probe: Probe, classes: int, head: str, count: int) -> None:
    task = Task.of(probe, classes, head, count)
    n, rank = task.need.spectrum.shape
    most = min(rank, MOST)
    parameters = probe.embedding_parameters()
    with probe.with_head(task.head) as network:
        left = variances(task, network, parameters)
        batches = task.images.split(BATCH)
        norm = float(
            fisher(network, batches, samples=most, parameters=parameters, weights=task.weights).vector().norm()
        )
    a = (task.weights / task.weights.sum()).double()
    ways = {"equal": [torch.full((n,), k) for k in range(1, most + 1)]}
    ways["by spectrum"] = [share_out(task.need, m).clamp_max(most) for m in AVERAGES if m <= most]
    for way, numbers in ways.items():
        cells = []
        errors = [float((a.square() @ left[torch.arange(n), k - 1]).sqrt()) / norm for k in numbers]
        for goal in GOALS:
            enough = [k for k, e in enumerate(errors) if e <= goal]
            if not enough:
                cells += [f"above {most}", "", f"{errors[-1]:.3f}"]
                continue
            cost = passes(full_allocation(numbers[enough[0]]).ordered())
            cells += [f"{cost / n:.2f}", f"{1000 / n * task.seconds(n, cost):.1f}", f"{errors[enough[0]]:.3f}"]
        print("|", " | ".join([f"{classes:,}", f"`{head}`", f"{task.confidence:.4f}", way, *cells]), "|", flush=True)


def header(columns: list[str]) -> None:
    print("|", " | ".join(columns), "|\n" + "| --- " * len(columns) + "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--average", type=float, nargs="+", help="cotangents of an image on average, without a tolerance"
    )
    parser.add_argument("--goals", type=float, nargs="+", help="relative errors, whose cost is measured over the seeds")
    parser.add_argument("--seeds", type=int, default=24)
    arguments = parser.parse_args()
    probe = load_probe(size=arguments.size)
    if arguments.average:
        print(f"{arguments.images} images at {arguments.size} pixels, {arguments.seeds} seeds\n")
        header(["classes", "head", "cotangents", "passes an image", "error"])
        for classes, head in product(arguments.classes, arguments.heads):
            spread(probe, classes, head, arguments.images, arguments.average, arguments.seeds)
        return
    if arguments.goals:
        print(f"{arguments.images} images at {arguments.size} pixels, {arguments.seeds} seeds\n")
        columns = [
            "classes",
            "head",
            "goal",
            "passes an image",
            "median",
            "most",
            "visits an image",
            "error",
            "against exact",
        ]
        header(columns)
        for classes, head in product(arguments.classes, arguments.heads):
            costs(probe, classes, head, arguments.images, arguments.goals, arguments.seeds)
        return
    goals = [c for g in GOALS for c in (f"passes an image, {g:.0%}", "s for 1,000 images", "error")]
    columns = ["classes", "head", "top probability", "cotangents", *goals]
    print(f"{arguments.images} images at {arguments.size} pixels, {torch.get_num_threads()} threads\n")
    header(columns)
    for classes in arguments.classes:
        for head in arguments.heads:
            if head == "own" and classes != OWN_CLASSES:
                continue
            measure(probe, classes, head, arguments.images)


if __name__ == "__main__":
    main()
