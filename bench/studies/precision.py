"""What bfloat16 keeps of an embedding: its cosine to the embedding in float64 or float32.

    python -m bench.studies.precision [--cells resnet18-224 resnet18-64 ...] [--examples 3 8 32 128] [--tasks 4] [--size
    96]

The first table has networks with random weights, batch-norm statistics of the batch, and given labels. It compares the
filter means of the weights of all convolutions, of this library and of plain autograd in bfloat16, with this library's
in float64. The second table has the first demo tasks in the packaged probe, ``Task2Vec`` in bfloat16 against float32.
Heads are fitted to the end, or by a tenth of the public code's schedule, which makes them less confident. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

from bench import harness
from bench.contestants import naive
from bench.report import table
from t2v_fast import Task2Vec, fisher, load_probe, reduce_precision
from t2v_fast.demo import demo_tasks

CELLS = ("resnet18-224", "resnet18-64", "resnet18-32", "resnet50-64", "convnext_tiny-64", "efficientnet_lite0-64")
HEADS = {"fitted to the end": {}, "early-stopped": {"head": "adam", "head_options": {"epochs": 1}}}


def networks(cells: list[str], examples: list[int]) -> list[tuple[str, ...]]:
    rows = []
    for name in cells:
        model, _, size = name.rpartition("-")
        cell = harness.Cell(model, int(size))
        weights = [f"{n}.weight" for n, m in cell.model.named_modules() if isinstance(m, nn.Conv2d)]
        torch.manual_seed(1)
        x = torch.randn(max(examples), 3, int(size), int(size)).bfloat16()
        y = torch.randint(0, harness.CLASSES, (max(examples),))
        plain, wide = copy.deepcopy(cell.model).bfloat16(), copy.deepcopy(cell.model).double()
        narrow = reduce_precision(copy.deepcopy(cell.model), torch.bfloat16)
        for n in examples:
            batches = list(zip(x[:n].split(8), y[:n].split(8), strict=True))
            truth = fisher(wide, [(i.double(), j) for i, j in batches], "empirical", parameters=weights)
            found = fisher(narrow, batches, "empirical", parameters=weights), naive(plain, x[:n], y[:n])
            rows.append((f"{model}, {size}", f"{n}", *(f"{harness.compare(q, truth)[2]:.5f}" for q in found)))
    return rows


def tasks(count: int, images: int, size: int) -> list[tuple[str, ...]]:
    rows = []
    probe = load_probe(size=size)
    for task in demo_tasks(images)[:count]:
        for head, settings in HEADS.items():
            narrow, wide = (
                Task2Vec(probe, dtype=dtype, **settings).embed((task.images, task.labels))
                for dtype in (torch.bfloat16, None)
            )
            vectors = ({"embedding": torch.from_numpy(e.hessian).double()} for e in (narrow, wide))
            rows.append((task.name, head, f"{wide.meta['head_loss']:.1e}", f"{harness.compare(*vectors)[2]:.4f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="MODEL-SIZE")
    parser.add_argument("--examples", nargs="+", type=int, default=[3, 8, 32, 128])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--images", type=int, default=80, help="of each task")
    parser.add_argument("--size", type=int, default=96, help="of the tasks' images, in pixels")
    arguments = parser.parse_args()
    rows = networks(arguments.cells, arguments.examples)
    table(["network, input", "examples", "bfloat16", "plain autograd in bfloat16"], rows)
    if arguments.tasks:
        rows = tasks(arguments.tasks, arguments.images, arguments.size)
        table(["demo task", "head", "its loss", "bfloat16"], rows)


if __name__ == "__main__":
    main()
