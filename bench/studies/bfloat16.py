"""What bfloat16 costs with and without instructions for it: the time of ``fisher``, divided by that of float32.

    python -m bench.studies.bfloat16 [--cells resnet18-64 efficientnet_lite0-64 vit_b_16-224] [--rounds 5]

Runs once as the machine is, and once as a processor with AVX2 alone: settings of oneDNN and torch keep them from newer
instructions, and this library is told to use its kernels for AVX2. There, "by torch" is what torch's own products in
bfloat16 cost, and "here" is what this library does. The runs of a row alternate, and the shortest of each counts.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from unittest import mock

import torch
from torch import nn

from bench import harness
from bench.report import table
from t2v_fast import fisher, ops, reduce_precision
from t2v_fast.ops import extension

CELLS = ("resnet18-64", "efficientnet_lite0-64", "vit_b_16-224")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def rows(cells: list[str], rounds: int) -> list[tuple[str, ...]]:
    found = []
    for name in cells:
        model, _, size = name.rpartition("-")
        cell = harness.Cell(model, int(size))
        x = torch.randn(8, 3, int(size), int(size))
        wide, narrow = cell.model, reduce_precision(copy.deepcopy(cell.model), torch.bfloat16)
        has = ops.multiplies_bfloat16()
        runs = {"float32": (wide, x, has), "here": (narrow, x.bfloat16(), has)}
        if not has:
            runs["by torch"] = (narrow, x.bfloat16(), True)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds):
            for key, run in runs.items():
                best[key] = min(best[key], seconds(*run))
        times = (f"{best[key] / best['float32']:.2f}" if key in best else "-" for key in ("here", "by torch"))
        found.append((f"{model}, {size}", f"{1000 * best['float32'] / len(x):.1f}", *times))
    return found


def seconds(model: nn.Module, x: torch.Tensor, has_instructions: bool) -> float:
    with mock.patch.object(ops, "multiplies_bfloat16", return_value=has_instructions):
        return harness.timed(lambda: fisher(model, [x], "hutchinson", self_check=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as-it-is", action="store_true", help="only the processor that the environment describes")
    args = parser.parse_args()
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        extension.set_cpu_capability("avx2")
    print(f"\n{ops.cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    heads = ["network, input", "float32 [ms an image]", "bfloat16 here / float32", "bfloat16 by torch / float32"]
    table(heads, rows(args.cells, args.rounds))
    sys.stdout.flush()
    if not args.as_it_is:
        again = [sys.executable, "-m", "bench.studies.bfloat16", "--as-it-is", "--rounds", str(args.rounds)]
        subprocess.run([*again, "--cells", *args.cells], env={**os.environ, **AVX2}, check=True)


if __name__ == "__main__":
    main()
