"""Error of each estimator against ``exact`` on the demo's tasks, at 1, 2 and 4 cotangents an image.

    python bench/estimators.py [--images 80] [--size 96] [--head newton|adam]

Prints Markdown: relative error of the whole embedding, |estimate - exact| / |exact|, the median over tasks and draws,
and in brackets the largest. Each task has one head, shared by all estimators.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch

from t2v_fast import FisherRecorder, TaskData, load_probe
from t2v_fast.cotangents import cotangents
from t2v_fast.data import balanced_weights
from t2v_fast.demo import demo_tasks
from t2v_fast.head import fit_head

ESTIMATORS = ("monte_carlo", "hutchinson", "deflated")
SAMPLES = (1, 2, 4)
BATCH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--head", default="newton")
    arguments = parser.parse_args()
    probe = load_probe()
    probe.preprocessing = replace(probe.preprocessing, resize=arguments.size, crop=arguments.size)
    errors: dict[tuple[str, int], list[float]] = {(e, k): [] for e in ESTIMATORS for k in SAMPLES}
    confidences = []
    for task in demo_tasks(arguments.images):
        if len(task.classes) == 2:
            continue  # exact with one cotangent, whatever the estimator but monte_carlo
        batches = list(TaskData.of((task.images, task.labels)).batches(probe.preprocessing, BATCH))
        features = torch.cat([probe.features(x) for x, _ in batches])
        labels = torch.cat([y for _, y in batches])
        weights = balanced_weights(labels, len(task.classes))
        fit = fit_head(features, labels, num_classes=len(task.classes), weights=weights, method=arguments.head)
        confidences.append(float(fit.linear(features).detach().softmax(1).amax(1).mean()))
        settings = [(e, k, s) for e in ESTIMATORS for k in SAMPLES for s in range(arguments.seeds)]
        sums: dict[tuple, torch.Tensor | float] = dict.fromkeys([("exact", 0, 0), *settings], 0.0)
        generators = {s: torch.Generator().manual_seed(s[2]) for s in settings}
        seen = 0
        # One forward serves all: each estimator only backpropagates other cotangents.
        with probe.with_head(fit.linear) as network, FisherRecorder(network, probe.embedding_parameters()) as recorder:
            for x, _ in batches:
                a = weights[seen : seen + len(x)]
                seen += len(x)
                logits = network(x)
                for key in sums:
                    estimator, k, _ = key
                    u = cotangents(logits, estimator, max(k, 1), generator=generators.get(key))
                    q = recorder.backward(logits, u, retain_graph=True)
                    sums[key] = sums[key] + torch.cat([a @ v.double() for v in q.values()])
        exact = sums.pop(("exact", 0, 0))
        for (estimator, k, _), value in sums.items():
            errors[estimator, k].append(float((value - exact).norm() / exact.norm()))
        print(f"<!-- {task.name}: top probability {confidences[-1]:.4f} -->", flush=True)
    print(f"\nmean top probability {min(confidences):.4f} to {max(confidences):.4f}\n")
    print("| cotangents an image | " + " | ".join(ESTIMATORS) + " |")
    print("| --- |" + " --- |" * len(ESTIMATORS))
    for k in SAMPLES:
        cells = [f"{statistics.median(errors[e, k]):.3f} ({max(errors[e, k]):.3f})" for e in ESTIMATORS]
        print(f"| {k} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
