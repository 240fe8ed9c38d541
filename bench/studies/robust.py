"""The learned robust Fisher against its fixed point from one ordinary Fisher: rank correlation of the filters.

    python -m bench.studies.robust [--images 100] [--size 64] [--samples 1000] [--epochs 1 4] [--beta 1e-7 1e-3]

Tasks are handwritten digits (scikit-learn's), the probe is the packaged EfficientNet-Lite0. Prints Markdown for each
prior weight beta and number of epochs: the correlation over all filters of the network, the median over layers of the
correlation within a layer, and the same for the plain Fisher.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from t2v_fast import Embedding, Task2Vec, load_probe
from t2v_fast.estimation.variational import fixed_point


def rank_correlations(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, float]:
    """Over all filters, and the median over layers of at least eight."""
    whole = spearmanr(np.concatenate(list(a.values())), np.concatenate(list(b.values()))).statistic
    layers = [spearmanr(a[name], b[name]).statistic for name in a if len(a[name]) >= 8]
    return float(whole), statistics.median(float(v) for v in layers)


def by_layer(embedding: Embedding, names: list[str]) -> dict[str, np.ndarray]:
    return {name: embedding.layer(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1000, help="images drawn in an epoch")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--beta", type=float, nargs="+", default=[1e-7, 1e-3])
    arguments = parser.parse_args()
    digits = load_digits()
    images = (digits.images[: arguments.images] * 255 / 16).astype(np.uint8)
    data = (images, digits.target[: arguments.images])
    probe = load_probe(size=arguments.size)
    plain = Task2Vec(probe).embed(data)
    weights = dict(probe.network.named_parameters())
    print("| beta | epochs | loss | fixed point: all filters | within layers | plain Fisher: all | within layers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for beta in arguments.beta:
        for epochs in arguments.epochs:
            options = {"num_samples": arguments.samples, "epochs": epochs, "beta": beta}
            robust = Task2Vec(probe, method="variational", method_options=options).embed(data)
            learned = by_layer(robust, robust.layer_names)
            fisher = by_layer(plain, robust.layer_names)
            closed = fixed_point({k: torch.from_numpy(v) for k, v in fisher.items()}, weights, beta).precision
            found = [
                *rank_correlations(learned, {k: v.numpy() for k, v in closed.items()}),
                *rank_correlations(learned, fisher),
            ]
            loss = robust.meta["losses"][-1]
            print(f"| {beta:g} | {epochs} | {loss:.3f} | {' | '.join(f'{v:.2f}' for v in found)} |", flush=True)


if __name__ == "__main__":
    main()
