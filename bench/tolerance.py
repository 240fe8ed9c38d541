"""What a given error of a task's embedding costs: equal cotangents, shared-out ones, and examples drawn by importance.

    python bench/tolerance.py [--classes 2 10 100 1000] [--heads newton early] [--images 200] [--size 64]

Images are handwritten digits (scikit-learn's), the probe is the packaged EfficientNet-Lite0. Labels of 2 classes are
parities, of 10 the digits, of 100 and 1,000 drawn at random (1,000 images are labelled and fitted, whatever --images).
Heads: ``newton``, fitted to the end (of 1,000 classes six iterations), ``early``, one epoch of Adam.

Errors are |estimate - truth| / |truth| against ``exact``; of 1,000 classes against 64 cotangents an image, of which
many sketches. Seconds are measured ones of a forward and of a backward pass, times their numbers; a batch has as many
backward passes as its neediest image. The tolerance rows are what ``Task2Vec(tolerance=...)`` does, every draw counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from t2v_fast import FisherRecorder, Probe, TaskData, fisher, load_probe
from t2v_fast.allocation import Allocation, Need, everyone, share_out, until
from t2v_fast.cotangents import cotangents
from t2v_fast.data import balanced_weights
from t2v_fast.head import fit_head

BATCH = 32
MOST = 16  # cotangents of an image
AVERAGES = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 14, 16)
GOALS = (0.05, 0.02)


@dataclass
class Task:
    """A head on the features of some images."""

    images: Tensor  # [N, 3, H, W]
    need: Need
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
        options = {"method": "adam", "epochs": 1} if head == "early" else {}
        if classes > 100 and head == "newton":
            options = {"max_iterations": 6}
        weights = balanced_weights(y, classes)
        fit = fit_head(features, y, num_classes=classes, weights=weights, **options)
        weight, bias = fit.linear.weight.detach().double(), fit.linear.bias.detach().double()
        logits = nn.functional.linear(features[:count].double(), weight, bias)
        images = torch.cat([x for x, _ in batches])[:count]
        need = Need.of(logits, weight, weights[:count])
        return cls(images, need, fit.linear, weights[:count], float(logits.softmax(1).amax(1).mean()))

    def seconds(self, visits: float, passes: float) -> float:
        """Of so many forward and backward passes of an image."""
        return visits * statistics.median(self.forward) + passes * statistics.median(self.backward)


def passes(allocation: Allocation, rank: int | None = None) -> int:
    """Backward passes, each of an image; with a ``rank``, below it one more for the second sketch."""
    batches = [allocation.samples[b] for b in allocation.batches(BATCH)]
    return sum(len(k) * (int(k.max()) + (rank is not None and int(k.min()) < rank)) for k in batches)


def truth(recorder: FisherRecorder, logits: Tensor, generator: torch.Generator) -> Tensor:
    if logits.shape[1] <= 100:
        u = cotangents(logits, "exact")
    else:
        u = cotangents(logits, "deflated", 49, generator=generator, sketches=16)
    return flat(recorder.backward(logits, u, retain_graph=True))


def flat(q: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.double() for v in q.values()], 1)


def ladders(task: Task, network: nn.Module, parameters: list[str]) -> tuple[Tensor, dict[tuple[str, float], Tensor]]:
    """The truth, and estimates with equal and with shared-out cotangents, all from one forward pass."""
    n, rank = task.need.spectrum.shape
    a = task.weights / task.weights.sum()
    counts = {("equal", float(k)): torch.full((n,), k) for k in range(1, min(rank, MOST) + 1)}
    counts |= {("shared out", m): share_out(task.need, m).clamp_max(MOST) for m in AVERAGES if m <= min(rank, MOST)}
    sums: dict[tuple[str, float], Tensor | float] = dict.fromkeys(counts, 0.0)
    exact: Tensor | float = 0.0
    generator = torch.Generator().manual_seed(0)
    with FisherRecorder(network, parameters) as recorder:
        for start in range(0, n, BATCH):
            here = slice(start, start + BATCH)
            began = time.perf_counter()
            logits = network(task.images[here])
            task.forward.append((time.perf_counter() - began) / len(logits))
            exact = exact + a[here] @ truth(recorder, logits, generator)
            leading = cotangents(logits, "deflated", min(rank, MOST), generator=generator)
            found, before = [], 0.0  # of each number of cotangents, [N, D]
            for k in range(1, min(rank, MOST) + 1):
                last = cotangents(logits, "deflated", k, generator=generator)[-1] if k < rank else leading[k - 1]
                found.append(before + flat(recorder.backward(logits, last, retain_graph=True)))
                began = time.perf_counter()
                before = before + flat(recorder.backward(logits, leading[k - 1], retain_graph=True))
                task.backward.append((time.perf_counter() - began) / len(logits))
            every = torch.stack(found)
            for key, k in counts.items():
                sums[key] = sums[key] + a[here] @ every[k[here] - 1, torch.arange(len(logits))]
    return exact, sums


def tolerance(task: Task, network: nn.Module, parameters: list[str], goal: float) -> tuple[Tensor, int, int, int]:
    """The estimate within the goal; images visited, backward passes and draws."""
    visits, cost, rounds = 0, 0, 0

    def visit(allocation: Allocation):
        nonlocal visits, cost, rounds
        visits, rounds = visits + len(allocation.examples), rounds + 1
        cost += passes(allocation, task.need.spectrum.shape[1])
        return fisher(
            network,
            (task.images[batch] for batch in allocation.batches(BATCH)),
            parameters=parameters,
            weights=task.weights,
            self_check=rounds == 1,
            estimator_error=True,
            allocation=allocation,
        )

    return until(task.need, goal, visit).vector(), visits, cost, rounds


def measure(probe: Probe, classes: int, head: str, count: int) -> None:
    task = Task.of(probe, classes, head, count)
    n, rank = task.need.spectrum.shape
    parameters = probe.embedding_parameters()
    with probe.with_head(task.head) as network:
        exact, sums = ladders(task, network, parameters)

        def error(estimate: Tensor) -> float:
            return float((estimate - exact).norm() / exact.norm())

        errors = {key: error(value) for key, value in sums.items()}
        for way in ("equal", "shared out", "tolerance"):
            cells = []
            for goal in GOALS:
                if way == "tolerance":
                    estimate, visits, cost, rounds = tolerance(task, network, parameters, goal)
                    reached = error(estimate)
                else:
                    enough = [(k, e) for (name, k), e in errors.items() if name == way and e <= goal]
                    if not enough:
                        cells += [f"above {min(rank, MOST)}", "", ""]
                        continue
                    k, reached = enough[0]
                    samples = torch.full((n,), int(k)) if way == "equal" else share_out(task.need, k).clamp_max(MOST)
                    visits, cost, rounds = n, passes(everyone(samples).ordered()), 1
                again = f" in {rounds} draws" if rounds > 1 else ""
                cells += [f"{cost / n:.2f}{again}", f"{1000 / n * task.seconds(visits, cost):.1f}", f"{reached:.3f}"]
            row = [f"{classes:,}", f"`{head}`", f"{task.confidence:.4f}", way, *cells]
            print("|", " | ".join(row), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--heads", nargs="+", choices=("newton", "early"), default=["newton", "early"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    probe = load_probe()
    probe.preprocessing = replace(probe.preprocessing, resize=arguments.size, crop=arguments.size)
    goals = [c for g in GOALS for c in (f"passes an image, {g:.0%}", "s for 1,000 images", "error")]
    columns = ["classes", "head", "top probability", "cotangents", *goals]
    print(f"{arguments.images} images at {arguments.size} pixels, {torch.get_num_threads()} threads\n")
    print("|", " | ".join(columns), "|\n" + "| --- " * len(columns) + "|", flush=True)
    for classes in arguments.classes:
        for head in arguments.heads:
            measure(probe, classes, head, arguments.images)


if __name__ == "__main__":
    main()
