"""What activation checkpointing and torch.compile change: peak memory and time of a training step and of a Fisher.

    python -m bench.studies.checkpointing [--rounds 3] [--only transformer] [--toy] [--write PAGE]

A cell is a network and a way to checkpoint it: not at all, each block, or each block with the reentrant kind. Its rows
are a training step (forward and backward of the mean loss, without an update), the same step compiled by inductor, and
this library's Fisher with one and with two cotangents. Each row has a fresh process, so that memory figures are clean.

*Memory* is how far the resident memory of the process grows at its peak over the network and its batch, in the batches
after the first, which also compiles and plans. What the first batch leaves counts for a Fisher, not for a step.
*Time* is the median of the processor times of these batches, and *ratio* is that time over the step without
checkpointing and compiler. Rows are measured one after the other, so ratios need a quiet machine. *Runs* counts how
often a checkpointed region ran again in one batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
import torch._inductor.compile_fx  # every row has the compiler in memory, which checkpointing loads in part
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.harness import memory, settled
from bench.pages import markdown, replace_section
from t2v_fast import FisherRecorder
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.gradients.fast_forward import FastNetwork, kept_memory

Value = TypeVar("Value")
CLASSES = 10
WAYS = ("none", "blocks", "blocks, reentrant")
KINDS = ("step", "compiled step", "fisher, 1", "fisher, 2")


class Blocks(nn.Module):
    """A stem, blocks of which each may be checkpointed, and a head on the mean of what they give."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, mean: tuple[int, ...], way: str):
        super().__init__()
        self.stem, self.blocks, self.head, self.mean, self.way = stem, nn.ModuleList(blocks), head, mean, way

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.way == "none" else checkpoint(block, x, use_reentrant="reentrant" in self.way)
        return self.head(x.mean(self.mean))


class Bottleneck(nn.Module):
    """The block of ResNet-50, whose batch norms are in evaluation mode."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def transformer(way: str, toy: bool) -> tuple[nn.Module, Tensor]:
    """An encoder with the width of BERT-base, four layers, and 4 texts of 256 tokens."""
    width, depth, n, tokens = (32, 2, 2, 8) if toy else (768, 4, 4, 256)
    blocks: list[nn.Module] = [
        nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True)
        for _ in range(depth)
    ]
    network = Blocks(nn.Embedding(1000, width), blocks, nn.Linear(width, CLASSES), (1,), way)
    return network, torch.randint(0, 1000, (n, tokens))


def resnet50(way: str, toy: bool) -> tuple[nn.Module, Tensor]:
    """The blocks of ResNet-50 for 32 images of 64 pixels, with a stem for small images."""
    width, sizes, n, pixels = (4, (1, 1), 2, 16) if toy else (64, (3, 4, 6, 3), 32, 64)
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    blocks: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(sizes):
        for k in range(count):
            blocks.append(Bottleneck(channels, width * 2**stage, 2 if stage and not k else 1))
            channels = 4 * width * 2**stage
    return Blocks(stem, blocks, nn.Linear(channels, CLASSES), (2, 3), way), torch.randn(n, 3, pixels, pixels)


NETWORKS: dict[str, Callable[[str, bool], tuple[nn.Module, Tensor]]] = {
    "transformer": transformer,
    "resnet50": resnet50,
}


@dataclass(frozen=True)
class Measured:
    bytes: int
    seconds: float
    runs: int


@contextmanager
def batches_of(kind: str, network: nn.Module, x: Tensor) -> Iterator[Callable[[], int]]:
    """What is measured: a function that runs one batch, and returns how often regions ran again."""
    y = torch.arange(len(x)) % CLASSES
    if "step" in kind:
        run = torch.compile(network) if kind == "compiled step" else network

        def step() -> int:
            F.cross_entropy(run(x), y).backward()
            network.zero_grad(set_to_none=True)
            return 0

        yield step
        return
    samples = int(kind.split()[-1])
    with kept_memory(), FisherRecorder(network) as recorder, FastNetwork(network, lambda model, x: model(x)) as forward:

        def fisher() -> int:
            before = recorder.regions.recomputations
            logits = forward(network, x)
            recorder.backward(logits, cotangents(logits, "deflated" if samples > 1 else "hutchinson", samples))
            return recorder.regions.recomputations - before

        yield fisher


def measure(name: str, way: str, kind: str, rounds: int, toy: bool) -> Measured:
    """Measure one row, in a process of its own."""
    torch.manual_seed(0)
    network, x = NETWORKS[name](way, toy)
    network.eval()
    seconds, runs = [], 0
    before = memory()
    with batches_of(kind, network, x) as batch:
        batch()
        now = settled()
        if "step" in kind:  # what the compiler keeps is no memory of a batch; copies of weights for a Fisher are
            before = now
        for _ in range(rounds):
            start = time.process_time()
            runs = batch()
            seconds.append(time.process_time() - start)
        peak = memory("VmHWM") - before
    return Measured(peak, statistics.median(seconds), runs)


def apart(function: Callable[..., Value], *args: object) -> Value:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rows_of(name: str, rounds: int, toy: bool) -> Iterator[list[str]]:
    base = None
    for way in WAYS:
        for kind in KINDS:
            found = apart(measure, name, way, kind, rounds, toy)
            base = base or found.seconds
            print(f"{name}, {way}, {kind}: {found}", file=sys.stderr, flush=True)
            yield [
                *(name, way, kind, f"{found.bytes / 1e6:.0f}", f"{found.seconds:.2f}", f"{found.seconds / base:.2f}"),
                str(found.runs) if "fisher" in kind else "-",
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--toy", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    asked = parser.parse_args()
    rows = [["network", "checkpointed", "what", "memory, MB", "processor time, s", "ratio", "runs"]]
    for name in NETWORKS if asked.only is None else (asked.only,):
        rows += rows_of(name, asked.rounds, asked.toy)
    text = markdown(rows)
    print(text)
    if asked.write:
        replace_section(asked.write, "checkpointing", text)


if __name__ == "__main__":
    main()
