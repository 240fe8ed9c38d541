"""Memory and time of the Fisher of a network that FSDP2 shards over processes, next to a training step.

    python -m bench.studies.sharding [--width 384] [--blocks 8] [--tokens 64] [--batch 4] [--rounds 9]

Each process has one thread, and a batch of its own. The network is a stack of residual blocks. Each block is sharded by
itself, and its gathered weights are freed after the forward pass. A training step is a forward and a whole backward
pass, with the exchange of the gradients. A batch of the Fisher is a forward pass and the squares of one cotangent of
each example, by ``FisherRecorder``. Memory is the peak of a process's resident memory while it repeats one of the
three, beyond what it had before the network was made; the largest of the processes. Times are medians of the ratios of
neighbours, which alternate. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from bench.report import table
from t2v_fast import FisherRecorder

STEP = "training step"
KINDS = (STEP, "filter", "parameter")


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


def made(asked: argparse.Namespace, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    network = Network(asked.width, asked.blocks).eval()
    if sharded:
        for block in network.blocks:
            fully_shard(block, reshard_after_forward=True)
        fully_shard(network)
    return network


def resident(key: str) -> float:
    """A line of /proc/self/status, in MiB: resident memory (VmRSS), or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


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


def _process(rank: int, asked: argparse.Namespace, size: int, kind: str | None, folder: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(_found(rank, asked, size, kind), f"{folder}/{rank}.pt")
    gc.collect()  # a network that outlives its process group can abort the interpreter when it ends
    if size > 1:
        dist.destroy_process_group()


def _found(rank: int, asked: argparse.Namespace, size: int, kind: str | None) -> dict[str, Any]:
    """Measure the memory of one kind, or the times of all."""
    before = resident("VmRSS")
    network = made(asked, size > 1)
    weights = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in network.parameters()) / 2**20
    x = torch.randn(asked.batch, asked.tokens, asked.width, generator=torch.Generator().manual_seed(rank))
    of = runs(network, x)
    found: dict[str, Any] = {"weights": weights}
    if kind is not None:
        of[kind]()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(3):
            of[kind]()
        found["peak"] = resident("VmHWM") - before
    else:
        times: dict[str, list[float]] = {name: [] for name in of}
        for _ in range(asked.rounds + 2):
            for name, run in of.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        found["ratios"] = {
            name: statistics.median(a / b for a, b in zip(times[name][2:], times[STEP][2:], strict=True)) for name in of
        }
        found["step"] = statistics.median(times[STEP][2:])
    return found


def measured(asked: argparse.Namespace, size: int, kind: str | None) -> list[dict[str, Any]]:
    """What each of some processes found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (asked, size, kind, folder), size, start_method="spawn")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    header = ["processes", "weights of each, MiB", "what", "peak memory of each, MiB", "time over a training step"]
    rows = []
    for size in (1, 2):
        times = measured(asked, size, None)
        for kind in KINDS:
            peaks = [found["peak"] for found in measured(asked, size, kind)]
            ratio = max(found["ratios"][kind] for found in times)
            what = f"step ({1e3 * times[0]['step']:.0f} ms)" if kind == STEP else f"Fisher by {kind}"
            rows.append([str(size), f"{times[0]['weights']:.0f}", what, f"{max(peaks):.0f}", f"{ratio:.2f}"])
    table(header, rows)


if __name__ == "__main__":
    main()
