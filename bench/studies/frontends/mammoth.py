"""Mammoth: its online EWC on two tasks, and the diagonal of its TAK, with and without this library.

    python -m bench.studies.frontends.mammoth CHECKOUT [--rounds 5]

The files ``models/ewc_on.py``, ``models/tak_utils/fisher_diag.py`` and ``models/tak_utils/hooks.py`` and the folder
``backbone`` of the checkout run as they are. What they import for the command line, for data sets and for the weights
of CLIP is replaced by the few names that they use.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from scipy.special import stdtrit
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.studies.frontends.table import Row, checkout, main, times
from t2v_fast.adapters.continual import accelerate_mammoth
from t2v_fast.adapters.tak import LossDiagComputer

BATCH = 32
SEEDS = 10


class ContinualModel(nn.Module):
    """As much of Mammoth's base class as ``EwcOn`` touches."""

    def __init__(
        self, backbone: nn.Module, loss: nn.Module, args: Any, transform: object, dataset: object = None
    ) -> None:
        super().__init__()
        self.net, self.loss, self.args, self.device = backbone, loss, args, torch.device("cpu")
        self.opt = torch.optim.SGD(backbone.parameters(), args.lr)


@contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Let ``models`` be the checkout's folder without its ``__init__``, and replace what ``models`` imports."""
    made = {
        "models": {"__path__": [str(folder / "models")]},
        "models.utils": {"__path__": []},
        "models.utils.continual_model": {"ContinualModel": ContinualModel},
        "models.tak_utils": {"__path__": [str(folder / "models" / "tak_utils")]},
        "models.tak_utils.utils": {"set_requires_grad_to": _require_gradients},
        "utils.args": {"ArgumentParser": argparse.ArgumentParser},
    }
    for name, contents in made.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name in made or name.startswith("models.")]:
            del sys.modules[name]


def _require_gradients(model: nn.Module, names: Sequence[str], required: bool) -> None:
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad = required


def digits(part: slice, classes: range, dtype: torch.dtype = torch.float32) -> TensorDataset:
    data = load_digits()
    images, labels = torch.tensor(data.images[part], dtype=dtype)[:, None] / 16, torch.tensor(data.target[part])
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # batch norm refuses a single pixel of an image
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return TensorDataset(images[chosen].expand(-1, 3, -1, -1).contiguous(), labels[chosen])


def two_tasks(kind: type, backbone: nn.Module, ours: bool, seed: int = 0) -> tuple[list[float], nn.Module]:
    """Train on five digits and then on the others; return the accuracies on both halves among their own classes."""
    torch.manual_seed(seed)
    dtype = next(backbone.parameters()).dtype
    args = SimpleNamespace(lr=0.05, e_lambda=20.0, gamma=1.0, batch_size=BATCH)
    model: Any = kind(copy.deepcopy(backbone), nn.CrossEntropyLoss(), args, None)
    if ours:
        accelerate_mammoth(model)
    halves = range(5), range(5, 10)
    for classes in halves:
        loader = DataLoader(digits(slice(0, 400), classes, dtype), BATCH, shuffle=True)
        for _ in range(3):
            for images, labels in loader:
                model.observe(images, labels, images)
        model.end_task(SimpleNamespace(train_loader=loader))
    accuracies = []
    model.net.eval()
    for classes in halves:
        images, labels = digits(slice(400, 800), classes, dtype).tensors
        with torch.no_grad():
            logits = model.net(images)[:, classes.start : classes.stop]
        accuracies.append(float((logits.argmax(1) + classes.start == labels).double().mean()))
    return accuracies, model


def same_run(kind: type, backbone: nn.Module) -> tuple[list[float], float]:
    """Return the accuracies of two tasks in float64, and how far the final states are apart.

    In float64 nothing but the mathematics can make the runs differ. Float32's rounding grows in training, until two
    runs have other accuracies.
    """
    (theirs, first), (ours, second) = (
        two_tasks(kind, copy.deepcopy(backbone).double(), ours) for ours in (False, True)
    )
    assert theirs == ours, (theirs, ours)
    pairs = zip(first.net.state_dict().items(), second.net.state_dict().values(), strict=True)
    return ours, max(float((b - a).double().norm() / a.double().norm()) for (_, a), b in pairs)


def paired_differences(kind: type, resnet18: Callable[..., nn.Module]) -> tuple[float, float, float]:
    """Return the mean accuracy with Mammoth's own, the mean of (ours - its own) over seeds in float32, and the half
    width of the 95 % interval of this mean."""
    own, differences = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        backbone = resnet18(10, 4)
        theirs, ours = (statistics.fmean(two_tasks(kind, backbone, ours, seed)[0]) for ours in (False, True))
        own.append(theirs)
        differences.append(ours - theirs)
    error = statistics.stdev(differences) / SEEDS**0.5
    return statistics.fmean(own), statistics.fmean(differences), float(stdtrit(SEEDS - 1, 0.975)) * error


def online_ewc(rounds: int) -> Row:
    kind = importlib.import_module("models.ewc_on").EwcOn
    resnet18 = importlib.import_module("backbone.ResNetBlock").resnet18
    torch.manual_seed(0)
    accuracies, apart = same_run(kind, resnet18(10, 4))
    own, mean, half = paired_differences(kind, resnet18)
    args = SimpleNamespace(lr=0.05, e_lambda=1.0, gamma=1.0, batch_size=BATCH)
    theirs, ours = (kind(resnet18(10, 20), nn.CrossEntropyLoss(), args, None) for _ in range(2))
    images = torch.randn(BATCH, 3, 32, 32)
    dataset = SimpleNamespace(train_loader=DataLoader(TensorDataset(images, torch.arange(BATCH) % 10), BATCH))
    ours.net.load_state_dict(theirs.net.state_dict())
    accelerate_mammoth(ours)
    difference = []
    for double in (True, False):
        pair = [copy.deepcopy(model) for model in (theirs, ours)]
        for model in pair:
            model.net.train().to(torch.float64 if double else torch.float32)
        loader = [(x.to(torch.float64 if double else torch.float32), y) for x, y in dataset.train_loader]
        kind.end_task(pair[0], SimpleNamespace(train_loader=loader))
        accelerate_mammoth(pair[1]).end_task(SimpleNamespace(train_loader=loader))
        difference.append(float((pair[1].fish - pair[0].fish).norm() / pair[0].fish.norm()))

    def run(model: Any) -> None:
        model.fish = None
        model.end_task(dataset)

    found = times(lambda: run(theirs), lambda: run(ours), rounds)
    return Row(
        f"Mammoth `EwcOn`, its ResNet-18 of 20 filters in training mode, {len(images)} images of 32 x 32",
        1,
        f"{difference[0]:.0e} relative in float64, {difference[1]:.0e} in float32; two tasks of digits in float64: the "
        f"same accuracies {_shown(accuracies)}, final states {apart:.0e} apart; in float32, over {SEEDS} seeds: mean "
        f"accuracy {own:.3f} with its own, {mean:+.3f} +- {half:.3f} with ours (paired, 95 %)",
        found.ratio,
        found.ratio,
    )


def _shown(accuracies: Sequence[float]) -> str:
    return " and ".join(f"{a:.3f}" for a in accuracies)


class Block(nn.Module):
    """A block of a vision transformer in CLIP's layout [T, N, C], with the names that TAK's hooks look for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.ln_1(x).transpose(0, 1)
        q, k, v = self.attn["qkv"](rows).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](mixed).transpose(0, 1)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.lin_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_pre(self.patches(x).flatten(2).transpose(1, 2)).transpose(0, 1)
        return self.lin_proj(self.ln_post(self.blocks(x).mean(0)))


def tak(rounds: int) -> Row:
    theirs_kind = importlib.import_module("models.tak_utils.fisher_diag").LossDiagComputer
    torch.manual_seed(0)
    encoder = Encoder()
    weight = torch.randn(10, 64) * 3
    names = [name for name, _ in encoder.named_parameters() if "blocks" in name or "lin_proj" in name]
    images = torch.randn(32, 3, 48, 48)

    def run(kind: type, precision: str, dtype: torch.dtype) -> dict[str, Tensor]:
        net = SimpleNamespace(visual_encoder=encoder.to(dtype))
        loader = [(x.to(dtype), None) for x in images.split(16)]
        computer = kind("cpu", False, fp_precision=precision)
        dataset = SimpleNamespace(train_loader=loader)
        return computer.compute(net, lambda f: f @ weight.to(f).T, names, dataset, use_head=True)[0]

    theirs, ours = (run(kind, "fp64", torch.float64) for kind in (theirs_kind, LossDiagComputer))
    assert theirs.keys() == ours.keys()
    worst = max(float((ours[name] - value).norm() / value.norm()) for name, value in theirs.items())
    found = times(
        lambda: run(theirs_kind, "fp32", torch.float32), lambda: run(LossDiagComputer, "fp32", torch.float32), rounds
    )
    return Row(
        f"Mammoth TAK `LossDiagComputer`, a transformer of width 64, 10 classes, {len(images)} images of 48 x 48",
        1,
        f"{worst:.0e} relative in float64, the same {len(ours)} entries",
        found.ratio,
        found.ratio,
    )


def rows(arguments: argparse.Namespace) -> list[Row]:
    with checkout(arguments.checkout[0]) as folder, modules_of(folder):
        importlib.import_module("utils")
        return [online_ewc(arguments.rounds), tak(arguments.rounds)]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows)
