"""Gradient norms of single examples, next to Opacus: its ghost norms, a loop over examples, and a training step.

    python -m bench.studies.ghost_norms [--rounds 5] [--write docs/comparison.md]

Needs Opacus (requirements/peers.txt). It has ghost norms of linear layers and embeddings. Of other layers, it forms the
gradients of each example. Each side runs the forward pass and gives the norms of a batch's examples. The step is a
forward pass and a backward pass alone. The sides take turns on one thread, and a ratio is the median of the rounds'
ratios. The error is that of the total norms against the loop in float64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.pages import markdown, replace_section
from t2v_fast import gradient_norms


class Text(nn.Module):
    """Words to a class by blocks of linear layers and layer norms over every word."""

    def __init__(self, width: int, vocabulary: int = 2000, blocks: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, words: Tensor) -> Tensor:
        h = self.table(words)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h.mean(1))


def images_network(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for k in range(4):
        outputs = width * 2 ** (k // 2)
        layers += [nn.Conv2d(inputs, outputs, 3, stride=1 + k % 2, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def networks(size: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks and a batch of each; ``size`` scales them."""
    torch.manual_seed(0)
    texts = torch.randint(0, 2000, (16, 8 * size))
    pictures = torch.randn(16, 3, 4 * size, 4 * size)
    return {
        f"4 convolutions with group norms, 16 images of {4 * size} x {4 * size}": (images_network(4 * size), pictures),
        f"4 blocks of linear layers with layer norms, 16 texts of {8 * size} words": (Text(16 * size), texts),
    }


def sides(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y, reduction="sum")

    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(model), max_grad_norm=1.0, loss_reduction="sum")

    def ours() -> Tensor:
        return gradient_norms(model, [(x, y)]).total

    def theirs() -> Tensor:
        loss(wrapped, x, y).backward()
        found = wrapped.get_norm_sample().detach()
        wrapped.zero_grad()
        return found

    def loop() -> Tensor:
        found = []
        for one in zip(x.split(1), y.split(1), strict=True):
            gradients = torch.autograd.grad(loss(model, *one), list(model.parameters()))
            found.append(torch.stack([g.norm() for g in gradients]).norm())
        return torch.stack(found)

    def step() -> None:
        loss(model, x, y).backward()
        model.zero_grad()

    return {"t2v-fast": ours, "Opacus": theirs, "loop": loop, "step": step}


def page(rounds: int, size: int) -> str:
    torch.set_num_threads(1)
    rows = [["network", "", "seconds", "over a step", "times slower than t2v-fast", "error"]]
    for name, (model, x) in networks(size).items():
        y = torch.randint(0, 10, (len(x),))
        exact = copy.deepcopy(model).double()
        want = sides(exact, x.double() if x.is_floating_point() else x, y)["loop"]()
        made = sides(model, x, y)
        found = {side: run() for side, run in made.items()}
        seconds: dict[str, list[float]] = {side: [] for side in made}
        for _ in range(rounds):
            for side, run in made.items():
                start = time.process_time()
                run()
                seconds[side].append(time.process_time() - start)
        for side in made:
            ratios = (
                statistics.median(a / b for a, b in zip(seconds[side], seconds[to], strict=True))
                for to in ("step", "t2v-fast")
            )
            norms = found[side]
            wrong = "-" if norms is None else f"{float((norms.double() - want).norm() / want.norm()):.0e}"
            rows.append([name, side, f"{statistics.median(seconds[side]):.3f}", *(f"{r:.2f}" for r in ratios), wrong])
            name = ""
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=16, help="scales the networks and their inputs")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus says that hooks on inputs without gradients miss inputs
        text = page(arguments.rounds, arguments.size)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "ghost norms", text)


if __name__ == "__main__":
    main()
