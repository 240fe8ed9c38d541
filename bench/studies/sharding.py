"""Memory and time of the Fisher of a network that FSDP2 shards over processes, next to a training step.

    python -m bench.studies.sharding [--width 1024] [--blocks 16] [--rounds 5] [--write docs/guide/sharded.md]

Each process has one thread, and a batch of its own. The network is a stack of residual blocks. Each block is sharded by
itself, and its gathered weights are freed after the forward pass. A training step is a forward and a whole backward
pass, with the exchange of the gradients. A batch of the Fisher is a forward pass and the squares of one cotangent of
each example, by ``FisherRecorder``.

Memory is the peak of a process's resident memory while it repeats one of the three, the largest of the processes. It
counts from a baseline: the process has run all three with a tiny network that is sharded in the same way, so that the
modules that torch imports late, and the buffers of the connections, are no part of it. The weights are. The C library
keeps blocks that were freed, and FSDP2 frees and allocates large ones all the time. *Held* is the memory where the
library gives them back at once (``MALLOC_MMAP_THRESHOLD_``, 128 KiB); *resident* is the memory with its own settings.

Times are medians of the ratios of neighbours, which alternate, with the C library's own settings. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from bench import harness
from bench.pages import markdown, replace_section
from t2v_fast import FisherRecorder

STEP = "training step"
KINDS = (STEP, "filter", "parameter")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # so that the C library keeps no large block that was freed


class Block(nn.Module):
    """A layer of a residual network over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """Blocks, and a head on the mean over tokens."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(blocks)), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def made(width: int, blocks: int, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    network = Network(width, blocks).eval()
    if sharded:
        for block in network.blocks:
            fully_shard(block, reshard_after_forward=True)
        fully_shard(network)
    return network


def runs(network: nn.Module, x: Tensor) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""

    def step() -> None:
        network(x).logsumexp(1).sum().backward()
        network.zero_grad()

    def fisher(granularity: str) -> Callable[[], None]:
        def run() -> None:
            with FisherRecorder(network, granularity=granularity) as recorder:
                output = network(x)
                recorder.backward(output, torch.ones_like(output))

        return run

    return {STEP: step, "filter": fisher("filter"), "parameter": fisher("parameter")}


def found_here(rank: int, asked: argparse.Namespace, sharded: bool) -> dict[str, Any]:
    """The bytes of the weights, the peaks in bytes, and the ratios of times to a training step."""

    def batch(width: int) -> Tensor:
        return torch.randn(asked.batch, asked.tokens, width, generator=torch.Generator().manual_seed(rank))

    for run in runs(made(8, 2, sharded), batch(8)).values():
        run()
    del run  # with its network
    before = harness.settled()
    network = made(asked.width, asked.blocks, sharded)
    weights = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in network.parameters())
    of = runs(network, batch(asked.width))
    peaks = {}
    for name, run in of.items():
        run()
        harness.settled()
        for _ in range(3):
            run()
        peaks[name] = harness.memory("VmHWM") - before
    times: dict[str, list[float]] = {name: [] for name in of}
    for _ in range(asked.rounds):
        for name, run in of.items():
            times[name].append(harness.timed(run))
    ratios = {name: statistics.median(a / b for a, b in zip(times[name], times[STEP], strict=True)) for name in of}
    return {"weights": weights, "peaks": peaks, "ratios": ratios, "step": statistics.median(times[STEP])}


def _process(rank: int, asked: argparse.Namespace, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(found_here(rank, asked, size > 1), f"{folder}/{rank}.pt")
    gc.collect()  # networks end before the process group that they use, and no process ends it for another one
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(asked: argparse.Namespace, size: int, settings: dict[str, str]) -> list[dict[str, Any]]:
    """What each of some processes found, which start with these variables of the environment."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **settings}):
        mp.start_processes(_process, (asked, size, folder), size, start_method="spawn")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def rows(asked: argparse.Namespace) -> list[list[str]]:
    """The table, whose first row is the header."""
    found = [["processes", "weights of each, MB", "what", "held, MB", "resident, MB", "time over a training step"]]
    for size in (1, 2):
        usual, given_back = measured(asked, size, {}), measured(asked, size, GIVEN_BACK)
        for kind in KINDS:
            held, resident = (max(of["peaks"][kind] for of in every) / 1e6 for every in (given_back, usual))
            ratio = max(of["ratios"][kind] for of in usual)
            what = f"step ({1e3 * usual[0]['step']:.0f} ms)" if kind == STEP else f"Fisher by {kind}"
            weights = f"{usual[0]['weights'] / 1e6:.0f}"
            found.append([str(size), weights, what, f"{held:.0f}", f"{resident:.0f}", f"{ratio:.2f}"])
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--width", type=int, default=1024)
    made.add_argument("--blocks", type=int, default=16)
    made.add_argument("--tokens", type=int, default=16)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--write", type=Path, help="the page whose table is replaced")
    return made


def main() -> None:
    asked = parser().parse_args()
    sizes = f"{asked.blocks} blocks of width {asked.width}, {asked.batch} examples of {asked.tokens} tokens."
    text = f"{markdown(rows(asked))}\n\n{sizes}"
    print(text)
    if asked.write:
        replace_section(asked.write, "sharding", text)


if __name__ == "__main__":
    main()
