"""Avalanche: its EWC plugin on two experiences with and without this library, and the time of its importances.

    python -m bench.studies.frontends.avalanche [--rounds 5]

Avalanche comes from ``requirements/frontends.txt``. The plugin squares the mean gradient of a batch. What it computes
at batch size 1 is the Fisher, so the time for the same error is that of the plugin at batch size 1. The time for the
same images compares one cotangent of each example with one backward pass of the plugin. The adapter's first batch has
the plugin's size; later ones are larger where they fit into the memory that the plugin's gradients take.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from bench.studies.frontends.table import Row, main, times
from t2v_fast.adapters.continual import compute_importances

sys.path += [str(Path(__file__).parents[3] / "tests" / folder) for folder in ("helpers", "adapters")]

import test_avalanche
from packages import import_avalanche

BATCH = 32


def experiences(name: str) -> Row:
    """Compare accuracies, and the sums of all importances, after two experiences of five digits each."""
    (theirs, plain), (ours, plugin) = (test_avalanche.run(name, ours=ours) for ours in (False, True))
    traces = [sum(float(v.data.sum()) for v in p.importances[0].values()) for p in (plain, plugin)]
    shown = [" and ".join(f"{a:.3f}" for a in accuracies) for accuracies in (theirs, ours)]
    return Row(
        f"Avalanche `EWCPlugin`, two experiences of digits, {name}",
        1,
        f"accuracies {shown[0]} with its own and {shown[1]} with ours; sums of all importances {traces[0]:.2f} "
        f"(squared batch means) and {traces[1]:.2f} (squares of each example over the batch size)",
    )


def importances(name: str, model: nn.Module, images: torch.Tensor, rounds: int) -> Row:
    """Compare the numbers at batch size 1, and the times at the usual one."""
    from avalanche.training.plugins import EWCPlugin

    plugin, criterion = EWCPlugin(1.0), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    labels = torch.arange(len(images)) % 10
    few = TensorDataset(images[:8].double(), labels[:8], torch.zeros(8))
    want = plugin.compute_importances(model.double(), criterion, optimizer, few, "cpu", 1)
    got = compute_importances(model, criterion, optimizer, few, "cpu", 4)
    numbers = [torch.cat([v.data.double().flatten() for v in found.values()]) for found in (got, want)]
    worst = float((numbers[0] - numbers[1]).norm() / numbers[1].norm())
    data = TensorDataset(images, labels, torch.zeros(len(images)))
    model.float()

    def theirs(batch_size: int) -> None:
        plugin.compute_importances(model, criterion, optimizer, data, "cpu", batch_size)

    def ours() -> None:
        compute_importances(model, criterion, optimizer, data, "cpu", BATCH)

    same_images, same_error = (times(lambda size=size: theirs(size), ours, rounds).ratio for size in (BATCH, 1))
    return Row(
        f"Avalanche `EWCPlugin.compute_importances`, {name}, {len(images):,} images",
        1,
        f"{worst:.0e} relative to the plugin at batch size 1, whose sums are float32",
        same_images,
        same_error,
    )


def rows(arguments: argparse.Namespace) -> list[Row]:
    import_avalanche()
    from avalanche.models import SimpleMLP
    from avalanche.models.slim_resnet18 import SlimResNet18

    torch.manual_seed(0)
    return [
        *(experiences(name) for name in test_avalanche.MODELS),
        importances("`SlimResNet18`, 32 x 32", SlimResNet18(10), torch.randn(64, 3, 32, 32), arguments.rounds),
        *(
            importances("`SimpleMLP`, 28 x 28", SimpleMLP(), torch.randn(images, 784), arguments.rounds)
            for images in (512, 2000)
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, needs=False)
