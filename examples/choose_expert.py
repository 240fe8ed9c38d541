"""Choose an expert: which of several trained networks is the best feature extractor for a new task?

    python examples/choose_expert.py

Trying every expert on every task is expensive. Here each of five experts is known by the embedding of the task that it
was trained on, and the expert for a task is chosen by distance. Then all experts are tried, to see what the choice
costs. The data are scikit-learn's handwritten digits: each task tells three digits apart.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import t2v_fast
from t2v_fast.analysis import selection

DIGITS = [(0, 1, 2), (3, 5, 8), (4, 7, 9), (1, 4, 7), (2, 3, 6)]
EACH = 40  # images of a task


def train_expert(images: Tensor, labels: Tensor) -> nn.Module:
    """A small network trained on one task; its features are what the last layer reads."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 12), nn.ReLU())
    network = nn.Sequential(features, nn.Linear(12, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return features


def test_error(features: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The error of a linear head on an expert's features, fitted to half of the images and tried on the others."""
    with torch.no_grad():
        x = torch.cat([features(images), torch.ones(len(images), 1)], 1)
    half = len(x) // 2
    targets = nn.functional.one_hot(labels).float()
    ridge = x[:half].T @ x[:half] + 0.1 * torch.eye(x.shape[1])
    head = torch.linalg.solve(ridge, x[:half].T @ targets[:half])
    return float(((x[half:] @ head).argmax(1) != labels[half:]).float().mean())


def main() -> None:
    digits = load_digits()
    names, embeddings, data = [], [], []
    probe = t2v_fast.load_probe("efficientnet-lite0", size=32)
    task2vec = t2v_fast.Task2Vec(probe)
    for chosen in DIGITS:
        names.append("".join(map(str, chosen)))
        places = np.flatnonzero(np.isin(digits.target, chosen))
        codes = np.searchsorted(chosen, digits.target[places])
        pixels = (digits.images[places[:EACH]] * 15).astype(np.uint8)
        embeddings.append(task2vec.embed((pixels, codes[:EACH]), name=names[-1]))
        images = torch.tensor(digits.images[places], dtype=torch.float32)[:, None] / 16
        data.append((images, torch.tensor(codes)))

    # The nearest expert by the paper's asymmetric distance, an expert's own task left out.
    distances = t2v_fast.distance.asymmetric_distance(embeddings, embeddings)  # [experts, tasks]
    others = ~np.eye(len(names), dtype=bool)
    for task, expert in enumerate(selection.nearest_expert(distances, others)):
        print(f"for {names[task]}: the expert of {names[expert]}")

    # Was it a good choice? Try them all: errors[t, e] is the error of expert e on task t.
    experts = [train_expert(images[:EACH], labels[:EACH]) for images, labels in data]
    errors = np.array([[test_error(expert, *task) for expert in experts] for task in data])
    errors[~others] = np.nan  # never its own task
    print("expert:   ", *(f"{name:>6}" for name in names))
    for name, row in zip(names, errors, strict=True):
        print(f"error {name}:", *(f"{error:6.3f}" for error in row))
    increases = selection.compare(embeddings, embeddings, errors, floor=0.01)
    for row in selection.increase_rows(increases):
        print(f"{row[0]:22} {row[1]:>14} {row[3]:>10}")


if __name__ == "__main__":
    main()
