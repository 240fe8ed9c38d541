"""Verify and measure this library on a GPU, and write a report.

    python -m bench.gpu [--output build/gpu] [--minutes 9] [--build] [--only STEP ...]

Every backend that runs on the device is first compared with float64: each op on each geometry of the tests and in each
dtype, torch's own checks of the operators, and whole networks. A steady batch of ``fisher()`` must wait for nothing.
Then layers and networks are timed, each in its own precision: the network alone (floor), a training step, eager and
compiled, this library, and the peers that are installed. The report is written after each line, to gpu.json and gpu.md.

The exit status is 1 if anything was wrong. A line of the library's own for which no time was left is wrong. What a peer
cannot do, or a tool that is not there, is left out with the reason.

``--rehearse`` runs every line on a CPU, with small networks and stand-ins for a card.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu import tools
from bench.gpu.report import Report

if TYPE_CHECKING:
    from t2v_fast.ops.planner import Conv


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    every: int  # of the tests' convolutions, each so-many-th is verified
    verified: list[tuple[str, int]]  # networks and the sizes of their images
    product: int  # rows of the matrices that show the ceilings
    cells: list[tuple[str, int, int]]  # networks, sizes and batches that are timed
    batches: int  # of a call of fisher() that is timed
    batch: int  # images of a layer that is timed
    processes: int  # that verify and compile ahead
    toy: bool
    compiled: tuple[str, ...] = ("bfloat16", "TF32")  # precisions of the compiled steps
    # Networks of short kernels, which are timed with graphs that the caller asked for.
    graphed: tuple[tuple[str, int, int], ...] = (("resnet18", 64, 16),)
    small: tuple[str, ...] = ("three channels", "padding", "7x7", "depthwise")
    large: tuple[str, ...] = ("squares", "form", "stem")
    more: list[str] = field(default_factory=list)  # arguments of the programs that the tools run

    @property
    def layers(self) -> dict[str, Conv]:
        """The layers that are timed by path."""
        from bench.gpu import measure

        return measure.TOY_LAYERS if self.toy else measure.LAYERS


FULL = Sizes(
    every=1,
    verified=[("resnet18", 64), ("small vit", 64)],
    product=8192,
    cells=[("resnet50", 224, 64), ("vit_b_16", 224, 64)],
    batches=64,
    batch=64,
    processes=16,
    toy=False,
)
REHEARSAL = Sizes(
    every=12,
    verified=[("small resnet", 32), ("small vit", 32)],
    product=64,
    cells=[("small resnet", 32, 2)],
    batches=32,
    batch=2,
    processes=1,
    toy=True,
    compiled=("TF32",),
    graphed=(("small resnet", 32, 2),),
    small=("padding",),
    large=("squares",),
    more=["--device", "cpu"],
)
BUILD = 110  # seconds
# Seconds of each step in its order.
STEPS: dict[str, float] = {
    "verification": 150,
    "ceilings": 15,
    "networks": 140,
    "layers": 65,
    "compiled": 60,
    "peers": 50,
    "counters": 40,
    "graphs": 90,  # last, because a capture that fails may leave the device unusable
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=9, help="what has not ended by then is given up")
    parser.add_argument("--build", action="store_true", help="first compile the extension for this card")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="only these steps")
    parser.add_argument("--rehearse", action="store_true", help="run every line on a CPU, with small networks")
    asked = parser.parse_args()
    report = Report(asked.output, asked.minutes)
    wanted = asked.only or list(STEPS)
    if asked.build and not asked.rehearse:
        tools.build(report, BUILD)  # before the library is imported, which loads the extension
    import torch

    from bench.gpu.card import rehearsing

    device = torch.device("cpu" if asked.rehearse else "cuda")
    if not asked.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: see nvidia-smi, or try the script with --rehearse")
    with rehearsing() if asked.rehearse else nullcontext():
        run(report, device, REHEARSAL if asked.rehearse else FULL, wanted)
    wrong = report.results["wrong"]
    print(f"{asked.output / 'gpu.md'}: {len(wrong)} wrong, {len(report.results['left_out'])} left out")
    sys.exit(bool(wrong))


def run(report: Report, device: Any, sizes: Sizes, wanted: list[str]) -> None:
    """Run the wanted steps."""
    import torch

    from bench.gpu import measure
    from bench.gpu.card import backends
    from t2v_fast import ops

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "CUDA": torch.version.cuda}
    report.results["machine"] = {"device": torch.cuda.get_device_name(device)} | versions | ops.backend_status()
    report.write()
    found = backends(device)

    def verification() -> None:
        from bench.gpu import pool

        arguments = ["--rehearse"] if sizes.more else []
        spent = pool.run(report, pool.jobs(device, sizes), sizes.processes, STEPS["verification"], arguments)
        report.results["seconds"] = dict(sorted(spent.items(), key=lambda item: -item[1])[:20])

    steps = {
        "verification": verification,
        "ceilings": lambda: (
            measure.ceilings(report, device, sizes.product),
            measure.planner_rates(report, device),
        ),
        "networks": lambda: measure.networks(report, device, sizes.cells, sizes.batches),
        "layers": lambda: measure.layers(report, device, sizes.layers, sizes.batch),
        "compiled": lambda: measure.compiled(report, device, sizes.cells, sizes.compiled),
        "peers": lambda: measure.peers(report, device, sizes.cells),
        "counters": lambda: tools.counters(report, sizes.large, found, STEPS["counters"], sizes.more),
        "graphs": lambda: (
            measure.graphs(report, device, sizes.cells, sizes.compiled),
            measure.replays(report, device, sizes.graphed, sizes.batches // 2),
        ),
    }
    assert list(steps) == list(STEPS)
    for name, do in steps.items():
        if name in wanted:
            with report.step(name, STEPS[name]):
                do()


if __name__ == "__main__":
    main()
