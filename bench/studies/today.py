"""What a Fisher takes next to a training step, in memory and time, for networks as they are trained today: one table.

    python -m bench.studies.today [--rounds 3] [--only checkpointed adapted ...] [--toy] [--write docs/performance.md]

Needs transformers and PEFT (requirements/coverage.txt). The figures come from the studies of each kind, at their own
sizes: an encoder with the width of BERT-base that is checkpointed or compiled (``checkpointing``), dense decoders and
mixtures of experts (``mixtures``), a decoder with adapters (``adapted``), and a network in one process and sharded over
two (``sharding``). The Fisher is by filter, with one cotangent of each example; with adapters it is by parameter. The
training step is a forward and a backward pass, without an update, of the network as the row names it.

Memory is the peak of warm batches: the weights, and what the batch needs besides. That of two processes is what each of
them holds. Times are ratios to the training step of the same row. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from bench import harness
from bench.pages import markdown, replace_section
from bench.studies import adapted, checkpointing, mixtures, sharding


@dataclass(frozen=True)
class Row:
    """Bytes of the weights, bytes of a step and of a Fisher besides them, seconds of a step, and the ratio of times."""

    name: str
    weights: float
    step: float
    fisher: float
    seconds: float
    ratio: float

    def cells(self) -> list[str]:
        step, fisher = self.weights + self.step, self.weights + self.fisher
        sizes = [f"{size / 1e6:.0f}" for size in (self.weights, step, fisher)]
        return [self.name, *sizes, f"{fisher / step:.2f}", f"{1e3 * self.seconds:.0f}", f"{self.ratio:.2f}"]


HEADER = ["network", "weights, MB", "step, MB", "Fisher, MB", "memory over a step", "step, ms", "time over a step"]


def bytes_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def checkpointed(rounds: int, toy: bool) -> Iterator[Row]:
    """An encoder, without and with checkpointing, and compiled."""
    weights = bytes_of(checkpointing.NETWORKS["transformer"]("none", toy)[0])
    for way in checkpointing.WAYS:
        kinds = ("step", "fisher, 1", *(["compiled step"] if way == "none" else []))
        step, fisher, *compiled = (
            checkpointing.apart(checkpointing.measure, "transformer", way, kind, rounds, toy) for kind in kinds
        )
        names = ["encoder" if way == "none" else f"encoder, checkpointed {way}", "encoder, compiled step"]
        for name, of in zip(names, (step, *compiled), strict=False):
            yield Row(name, weights, of.bytes, fisher.bytes, of.seconds, fisher.seconds / of.seconds)


def decoders(rounds: int, toy: bool) -> Iterator[Row]:
    """A dense decoder and a mixture of experts with as much work for each token."""
    sizes = mixtures.TOY if toy else mixtures.SIZES
    tokens = torch.randint(0, mixtures.VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    for name, implementation in (("decoder, dense", None), ("decoder, mixture of experts", "grouped_mm")):
        network = mixtures.decoder(implementation, sizes, torch.float32)
        memory, seconds = mixtures.figures(network, tokens, rounds)
        sides = ("step", "by filter")
        ratio = statistics.median(f / s for s, f in zip(*(seconds[side] for side in sides), strict=True))
        step, fisher = (memory[side] for side in sides)
        yield Row(name, bytes_of(network), step, fisher, statistics.median(seconds["step"]), ratio)


def adapters(rounds: int, toy: bool) -> Iterator[Row]:
    """A decoder, all of whose weights are trained, and the same with frozen weights and adapters."""
    layers, width = (1, 32) if toy else (6, 256)
    torch.set_num_threads(1)  # as the study
    for kind in (adapted.ALL, *list(adapted.ADAPTERS)[:1]):
        step, fisher = (checkpointing.apart(adapted.peak, kind, side, layers, width) for side in ("step", "fisher"))
        runs = adapted.sides(kind, layers, width)
        pairs = [[harness.timed(runs[side]) for side in ("step", "fisher")] for _ in range(rounds + 1)][1:]
        ratio, seconds = statistics.median(f / s for s, f in pairs), statistics.median(s for s, _ in pairs)
        weights = bytes_of(adapted.decoder(kind, layers, width))
        yield Row(f"decoder, {kind}", weights, step, fisher, seconds, ratio)


def processes(rounds: int, toy: bool) -> Iterator[Row]:
    """A stack of blocks in one process, and sharded over two."""
    sizes = ["--width", "16", "--blocks", "2", "--tokens", "4"] if toy else []
    asked = sharding.parser().parse_args([*sizes, "--rounds", str(rounds)])
    for size, name in ((1, "blocks, one process"), (2, "blocks, each of two processes")):
        usual, given_back = (sharding.measured(asked, size, settings) for settings in ({}, sharding.GIVEN_BACK))
        weights = max(of["weights"] for of in given_back)
        step, fisher = (max(of["peaks"][kind] for of in given_back) - weights for kind in (sharding.STEP, "filter"))
        yield Row(name, weights, step, fisher, usual[0]["step"], max(of["ratios"]["filter"] for of in usual))


KINDS: dict[str, Callable[[int, bool], Iterator[Row]]] = {
    "checkpointed": checkpointed,
    "decoders": decoders,
    "adapted": adapters,
    "processes": processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--toy", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    asked = parser.parse_args()
    for kind, package in (("decoders", "transformers"), ("adapted", "peft")):
        if kind in asked.only and find_spec(package) is None:
            parser.error(f"{kind!r} needs the package {package} (requirements/coverage.txt): install it, or use --only")
    rows = [HEADER]
    for kind in asked.only:
        for row in KINDS[kind](asked.rounds, asked.toy):
            rows.append(row.cells())
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = markdown(rows)
    print(text)
    if asked.write:
        replace_section(asked.write, "today", text)


if __name__ == "__main__":
    main()
