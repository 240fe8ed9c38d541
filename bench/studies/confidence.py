"""The error of each estimator, by how confident the network is, and by how many classes and examples there are.

    python -m bench.studies.confidence [--draws 20] [--write docs/guide/accuracy.md]

The network has random weights, and one hidden layer. Its last weights are multiplied, which makes it confident. The
error is that of the whole Fisher, |estimate - exact| / |exact|, as the root mean square over draws. ``with its error``
is ``deflated`` with two cotangents and ``estimator_error=True``, which takes a third one, and ``predicted`` is what
that says of its error without the exact Fisher. Takes about half a minute of one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.pages import markdown, print_or_write
from t2v_fast import fisher

INPUTS, HIDDEN = 6, 16
SCALES = (1.0, 60.0, 600.0)  # of the last weights
SIZES = ((10, 12), (10, 500), (100, 12))  # classes and examples
ESTIMATORS = (("deflated", 2), ("deflated", 8), ("hutchinson", 2), ("hutchinson", 8), ("monte_carlo", 2))


def networks() -> Iterator[tuple[nn.Module, Tensor]]:
    """Networks and their inputs [N, INPUTS]."""
    for scale in SCALES:
        for classes, examples in SIZES:
            torch.manual_seed(11)
            last = nn.Linear(HIDDEN, classes)
            network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), last).eval()
            last.weight.data *= scale
            yield network, torch.randn(examples, INPUTS)


def root_mean_square(values: list[float]) -> float:
    return float(torch.tensor(values).square().mean().sqrt())


def page(draws: int) -> str:
    """The table."""
    names = [f"{estimator}, {samples}" for estimator, samples in ESTIMATORS]
    rows = [["top probability", "classes", "examples", *names, "with its error", "predicted"]]
    for network, inputs in networks():
        exact = fisher(network, [inputs], estimator="exact").vector()
        with torch.no_grad():
            probabilities = network(inputs).softmax(1)
        cells, predicted = [], []
        for estimator, samples, own in [*((*each, False) for each in ESTIMATORS), ("deflated", 2, True)]:
            options = {"estimator": estimator, "samples": samples, "estimator_error": own, "self_check": False}
            found = [fisher(network, [inputs], seed=seed, **options) for seed in range(draws)]
            cells.append(root_mean_square([float((f.vector() - exact).norm() / exact.norm()) for f in found]))
            if own:
                predicted = [f.relative_error() for f in found]
        top = float(probabilities.amax(1).mean())
        texts = [f"{top:.2f}", str(probabilities.shape[1]), str(len(inputs))]
        rows.append([*texts, *(f"{cell:.3f}" for cell in (*cells, root_mean_square(predicted)))])
    return markdown(rows)


def main() -> None:
    print_or_write(page, "confidence", __doc__, draws=20)


if __name__ == "__main__":
    main()
