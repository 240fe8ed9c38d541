"""Merging and task arithmetic on real digits: what two fine-tuned models know, apart and merged.

    python -m bench.studies.merging [--seeds 10] [--write docs/adapters.md]

A small network is trained briefly on 100 of scikit-learn's handwritten digits. One copy is fine-tuned on the digits
below five, another on the others. Accuracies are over held-out digits, as the mean over seeds.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bench.pages import markdown, replace_section
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.adapters.merging import apply_task_vectors, fisher_merge, task_vector

PARTS = ("all ten", "below five", "five and above")


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def accuracies(seed: int = 0) -> dict[str, dict[str, float]]:
    """{model: {part of the digits: accuracy}}."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    test = torch.arange(len(x)) % 3 == 0
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    base = trained(network, x[~test][:100], y[~test][:100], 40)
    halves = [~test & (y < 5), ~test & (y >= 5)]
    tuned = [trained(base, x[half], y[half]) for half in halves]

    start, *models = (dict(model.named_parameters()) for model in (base, *tuned))
    fishers = [fim_diag(model, [(x[half], y[half])]) for model, half in zip(tuned, halves, strict=True)]
    vectors = [task_vector(start, model) for model in models]
    found = {
        "before fine-tuning": start,
        "fine-tuned below five": models[0],
        "fine-tuned on five and above": models[1],
        "mean of the two": apply_task_vectors(start, vectors, [0.5, 0.5]),
        "merged by their Fishers": fisher_merge(models, fishers),
        "minus half of the first's task vector": apply_task_vectors(start, vectors[:1], [-0.5]),
    }
    parts = dict(zip(PARTS, (test, test & (y < 5), test & (y >= 5)), strict=True))

    def accuracy(parameters: dict[str, Tensor], part: Tensor) -> float:
        network.load_state_dict(parameters)
        return float((network(x[part]).argmax(1) == y[part]).float().mean())

    return {name: {part: accuracy(model, which) for part, which in parts.items()} for name, model in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    runs = [accuracies(seed) for seed in range(arguments.seeds)]
    rows = [("model", *PARTS)]
    for name in runs[0]:
        rows.append((name, *(f"{sum(run[name][part] for run in runs) / len(runs):.3f}" for part in PARTS)))
    text = markdown(rows)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "merging", text)


if __name__ == "__main__":
    main()
