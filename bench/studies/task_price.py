"""What a task costs, beside what plain torch takes for the passes in it.

    python -m bench.studies.task_price [--probes efficientnet_lite0-96 resnet18-64] [--rounds 7] [--images 60]
        [--classes 10] [--options activation_megabytes=0 self_check=False] [--toy]

A task of this library is ``Task2Vec.embed`` of fresh images with two cotangents. Plain torch runs the same batches: one
forward pass for the features, one forward pass, and two backward passes with weight gradients, in each of two memory
formats; the faster one counts. The two sides take turns, each in a process of its own, because a process of this
library keeps its memory from task to task, which would serve plain torch as well. The first task of a process does not
count. Times are CPU seconds of one thread, so that other programs disturb them little.

Prints the median of the paired ratios, the median times, and which part of a task each stage takes. The parts come from
further tasks, with clocks around the stages. ``--options`` are options of Task2Vec, such as those of a former version.
``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`` before the command imitates a processor with AVX2.
"""

from __future__ import annotations

import argparse
import ast
import functools
import multiprocessing
import pkgutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.harness import MODELS
from bench.report import table
from t2v_fast import Preprocessing, Probe, Task2Vec, ops

SAMPLES = 2
FORMATS = (torch.contiguous_format, torch.channels_last)
# What the self-check adds: all that runs within these counts as its own, but for forward passes, which have a row.
CHECKS = (
    "t2v_fast.estimation.self_check:SelfCheck.batch",
    "t2v_fast.estimation.self_check:SelfCheck._compare_row",
    "t2v_fast.estimation.self_check:SelfCheck._compare_two",
)
# The stage, and the functions whose time it is, without the time of other stages within. A function is named by the
# module from which its caller takes it.
STAGES: dict[str, tuple[str, ...]] = {
    "reading images": ("t2v_fast.tasks.data:_Reader.__call__",),
    "forward passes": ("t2v_fast.gradients.fast_forward:FastNetwork.__call__",),
    "head": ("t2v_fast.tasks.stages:Stages.fit_heads",),
    "allocation": (
        "t2v_fast.tasks.stages:Stages.allocate",
        "t2v_fast.estimation.one_forward:passes_through_graphs",
        "t2v_fast.estimation.one_forward:by_need",
    ),
    "cotangents": ("t2v_fast.estimation.estimator:drawn_cotangents", "t2v_fast.estimation.one_forward:cotangents"),
    "owners of rows": ("t2v_fast.gradients.recorder:taps_of",),
    "backward passes": ("t2v_fast.gradients.squares:backpropagate",),
    "squares": (
        "t2v_fast.gradients.squares:Squares._uses_at",
        "t2v_fast.gradients.squares:Squares._add_summed",
        "t2v_fast.gradients.squares:Squares._add",
    ),
    # Within the second one, the squares of the batch itself are computed. They are not the check's.
    "self-check": (
        *CHECKS,
        "t2v_fast.estimation.self_check:SelfCheck.compared",
        "t2v_fast.gradients.network_state:signature_of",
    ),
    "moments": (
        "t2v_fast.estimation.moments:NamedMoments.add",
        "t2v_fast.estimation.estimator:diagonal_of",
        "t2v_fast.estimation.one_forward:diagonal_of",
    ),
    "preparing the network": (
        "t2v_fast.estimation.estimator:forward_passes",
        "t2v_fast.estimation.one_forward:forward_passes",
        "t2v_fast.gradients.fast_forward:_keep",
    ),
    "embedding": ("t2v_fast:Task2Vec.make_embedding",),
}
FORWARD_OF_CHECKS = "forward passes of the self-check"


@dataclass(frozen=True)
class Place:
    """A function that is timed: an attribute of a module or a class."""

    stage: str
    owner: Any
    attribute: str
    of_check: bool


def places_of(stages: Mapping[str, Sequence[str]]) -> list[Place]:
    """Find the functions of all stages. Raise LookupError where one is gone, or where it is no function."""
    found = []
    for stage, names in stages.items():
        for name in names:
            parent, _, attribute = name.replace(":", ".").rpartition(".")
            try:
                owner = pkgutil.resolve_name(parent)
                timed = getattr(owner, attribute)
            except (ImportError, AttributeError) as error:
                raise LookupError(
                    f"the stage {stage!r} is timed at {name}, which is gone ({error}): name the place in STAGES where "
                    "the library does this now"
                ) from error
            if not callable(timed):
                raise LookupError(f"the stage {stage!r} is timed at {name}, which is no function but {timed!r}")
            found.append(Place(stage, owner, attribute, name in CHECKS))
    return found


PLACES = places_of(STAGES)


def network_of(name: str, size: int) -> nn.Module:
    """A network in evaluation mode, with the statistics of a batch in its batch norms."""
    torch.manual_seed(0)
    network = MODELS[name](size)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(32, 3, size, size))
    return network.eval()


def task(seed: int, images: int, classes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square whose place depends on the class: uint8 [N, size, size, 3], labels [N]."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 120, (images, size, size, 3), dtype=np.uint8)
    labels = rng.permutation(np.arange(images) % classes)
    side = max(1, size // 4)
    for picture, label in zip(pictures, labels, strict=True):
        top, left = (3 * label) % (size - side), (7 * label) % (size - side)
        picture[top : top + side, left : left + side] += np.uint8(120)
    return pictures, labels


class Plain:
    """The passes of a task in plain torch."""

    def __init__(self, name: str, size: int, images: int, batch_size: int, memory_format: torch.memory_format) -> None:
        self.network = network_of(name, size).to(memory_format=memory_format)
        self.images = torch.randn(images, 3, size, size).to(memory_format=memory_format).split(batch_size)

    def __call__(self, seed: int) -> None:
        with torch.no_grad():
            for x in self.images:
                self.network(x)
        for x in self.images:
            logits = self.network(x)
            for k in range(SAMPLES):
                logits.backward(torch.randn_like(logits), retain_graph=k + 1 < SAMPLES)
        self.network.zero_grad()


def serve(connection: Connection, make: Callable[[], Callable[[int], None]]) -> None:
    """Run a side in this process: answer each seed with the CPU seconds of a run."""
    torch.set_num_threads(1)
    side = make()
    while (seed := connection.recv()) is not None:
        start = time.process_time()
        side(seed)
        connection.send(time.process_time() - start)


class Side:
    """One of the sides, in a process of its own."""

    def __init__(self, make: Callable[[], Callable[[int], None]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, seed: int) -> float:
        self.connection.send(seed)
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


class Ours:
    """``Task2Vec.embed`` of fresh images."""

    def __init__(self, name: str, size: int, images: int, classes: int, options: dict[str, Any]) -> None:
        probe = Probe(network_of(name, size), preprocessing=Preprocessing(size, size))
        self.task2vec = Task2Vec(probe, samples=SAMPLES, **options)
        self.of = functools.partial(task, images=images, classes=classes, size=size)

    def __call__(self, seed: int) -> None:
        self.task2vec.embed(self.of(seed), name=f"task {seed}")


class ClockedContext(AbstractContextManager):
    """A context whose beginning and end are the given functions."""

    def __init__(self, begin: Callable, end: Callable) -> None:
        self.begin, self.end = begin, end

    def __enter__(self) -> Any:
        return self.begin()

    def __exit__(self, *error: Any) -> Any:
        return self.end(*error)


@contextmanager
def clocks(spent: Counter[str]) -> Iterator[None]:
    """Within this context, add the CPU seconds of each stage to ``spent``."""
    within: list[tuple[str, bool, float]] = []  # stages that run, whether for a check, and the time of others in them

    def clocked(own: Callable, place: Place) -> Callable:
        @functools.wraps(own)
        def run(*arguments: Any, **options: Any) -> Any:
            name, of_check = place.stage, place.of_check
            if within and within[-1][1]:
                name, of_check = FORWARD_OF_CHECKS if name == "forward passes" else "self-check", True
            start = time.process_time()
            within.append((name, of_check, 0.0))
            try:
                found = own(*arguments, **options)
            finally:
                took = time.process_time() - start
                spent[name] += took - within.pop()[2]
                if within:
                    within[-1] = *within[-1][:2], within[-1][2] + took
            if isinstance(found, AbstractContextManager):  # whose time is that of its beginning and its end
                return ClockedContext(clocked(found.__enter__, place), clocked(found.__exit__, place))
            return found

        return run

    own = [(place, getattr(place.owner, place.attribute)) for place in PLACES]
    for place, function in own:
        setattr(place.owner, place.attribute, clocked(function, place))
    try:
        yield
    finally:
        for place, function in own:
            setattr(place.owner, place.attribute, function)


def parts(side: Ours, rounds: int) -> list[list[str]]:
    """The median milliseconds of each stage of a task, and their part of the whole."""
    side(0)
    tasks = []
    for seed in range(1, rounds + 1):
        spent: Counter[str] = Counter()
        start = time.process_time()
        with clocks(spent):
            side(seed)
        spent["the rest"] = time.process_time() - start - spent.total()
        tasks.append(spent)
    median = {stage: statistics.median(t[stage] for t in tasks) for stage in {s for t in tasks for s in t}}
    whole = sum(median.values())
    return [[s, f"{1e3 * t:.1f}", f"{t / whole:.1%}"] for s, t in sorted(median.items(), key=lambda i: -i[1])]


def study(cell: str, arguments: argparse.Namespace) -> None:
    """Print the ratio of a cell such as resnet18-64, and the parts of a task."""
    name, _, pixels = cell.rpartition("-")
    size, images, options = int(pixels), arguments.images, dict(arguments.options)
    make = functools.partial(Ours, name, size, images, arguments.classes, options)
    here = make()
    plain = [functools.partial(Plain, name, size, images, here.task2vec.batch_size, f) for f in FORMATS]
    sides = [Side(side) for side in (make, *plain)]
    rounds = [[side(seed) for side in sides] for seed in range(arguments.rounds + 1)][1:]
    for side in sides:
        side.close()
    ours, *plains = (statistics.median(times) for times in zip(*rounds, strict=True))
    best = 1 + plains.index(min(plains))
    ratios = [statistics.median(r[0] / r[k] for r in rounds) for k in range(1, len(sides))]
    print(f"\n## {name}, {size} pixels, {images} images, {arguments.classes} classes, {ops.cpu_capability()}\n")
    rows = [["this library", f"{ours:.3f}", ""]]
    for k, (memory_format, seconds, ratio) in enumerate(zip(FORMATS, plains, ratios, strict=True), 1):
        which = "channels-last" if memory_format == torch.channels_last else "contiguous"
        rows.append([f"plain torch, {which}", f"{seconds:.3f}", f"{ratio:.2f}" + (" (the price)" if k == best else "")])
    table(["side", "s for a task", "ratio"], rows)
    table(["stage", "ms", "part"], parts(here, arguments.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", nargs="+", default=["efficientnet_lite0-96", "resnet18-64"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--options", nargs="*", default=[], type=option, metavar="NAME=VALUE")
    parser.add_argument("--toy", action="store_true", help="a tiny network and a task of a few images, to try it out")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.probes, arguments.images, arguments.classes = ["toy-32"], 12, 3
    torch.set_num_threads(1)
    for cell in arguments.probes:
        study(cell, arguments)


def option(text: str) -> tuple[str, Any]:
    """An option of Task2Vec from the command line."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


if __name__ == "__main__":
    main()
