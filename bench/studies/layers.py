"""What the faster layers of t2v_fast/gradients/fast_layers.py gain.

    python -m bench.studies.layers [--rounds 9] [--cells resnet18-64 vit_b_16-224 ...] [--toy]

Networks run forward and backward, without weight gradients. Prints Markdown: the milliseconds of a batch with torch's
own layers, and the share of this time that remains with each kind of faster layer alone and with all of them. Rounds
are interleaved, ratios are medians, images are channels-last, and memory is kept. A second part has 3x3 convolutions by
torch and by Winograd (milliseconds and errors), and products by torch and by oneDNN (GFLOP/s).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from bench import harness
from bench.report import table
from t2v_fast import ops
from t2v_fast.gradients.fast_forward import FastNetwork, kept_memory
from t2v_fast.gradients.fast_layers import FastLayers

CELLS = (
    "resnet18-224",
    "resnet18-64",
    "resnet18-32",
    "resnet50-32",
    "convnext_tiny-64",
    "vit_b_16-64",
    "efficientnet_lite0-224",
)
KINDS: dict[str, set[Callable]] = {
    "linear": {F.linear},
    "convolution": {F.conv2d},
    "batch norm": {F.batch_norm},
    "ReLU6": {F.hardtanh},
    "all": {F.linear, F.conv2d, F.batch_norm, F.hardtanh},
}
PRODUCTS = ((32, 2048, 2048), (392, 768, 3072), (1576, 768, 3072), (25088, 96, 384))  # rows, inputs, outputs


IMAGES = ((8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7), (32, 64, 16), (32, 128, 8), (32, 256, 4), (1, 64, 56))


def only(functions: set[Callable]) -> FastLayers:
    layers = FastLayers()
    layers._faster = {function: faster for function, faster in layers._faster.items() if function in functions}
    return layers


def measure(cell: harness.Cell, rounds: int) -> tuple[float, dict[str, float]]:
    """Milliseconds with torch's layers, and ratios to that."""
    first = next(p for p in cell.model.parameters() if p.dim() == 1)  # as far down as the Fisher goes
    modes = {"torch": only(set())} | {kind: only(functions) for kind, functions in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    with kept_memory(), FastNetwork(cell.model, lambda model, x: model(x)) as run:

        def batch(mode: FastLayers) -> None:
            run._layers, mode.read = mode, run._make_channels_last
            logits = run(cell.model, cell.x)
            torch.autograd.grad(logits, [first], torch.ones_like(logits))

        for r in range(rounds + 1):
            for name, mode in modes.items():
                batch(mode)
                taken = harness.timed(batch, mode)
                if r:
                    seconds[name].append(taken)
    own = seconds.pop("torch")
    ratios = {k: statistics.median(a / b for a, b in zip(s, own, strict=True)) for k, s in seconds.items()}
    return 1e3 * statistics.median(own), ratios


def products(shapes: Sequence[tuple[int, int, int]], rounds: int) -> Sequence[tuple[str, ...]]:
    rows = []
    for n, i, o in shapes:
        x, w = torch.randn(n, i), torch.randn(o, i)
        rates = {}
        for name, run in {"torch": F.linear, "oneDNN": FastLayers()._linear}.items():
            run(x, w)
            rates[name] = 2e-9 * n * i * o / statistics.median(harness.timed(run, x, w) for _ in range(3 * rounds))
        rows.append((f"{n:,} x {i:,} to {o:,}", *(f"{rate:.0f}" for rate in rates.values())))
    return rows


def winograd(images: Sequence[tuple[int, int, int]], rounds: int, dtype: torch.dtype) -> Sequence[tuple[str, ...]]:
    """3x3 convolutions and their input gradients: milliseconds, and the largest error over the largest value."""
    rows = []
    for n, c, size in images:
        shapes = [(n, c, size, size), (n, c, size, size), (c, c, 3, 3)]
        x, g, w = (torch.randn(s).to(dtype).contiguous(memory_format=torch.channels_last) for s in shapes)
        w /= (9 * c) ** 0.5
        row = [f"{n} images of {size}x{size}, {c} channels"]
        for t, transposed in ((x, False), (g, True)):
            ways = [
                functools.partial(F.conv_transpose2d if transposed else F.conv2d, t, w, padding=1),
                functools.partial(ops.winograd_conv, t, w, None, (1, 1), transposed),
            ]
            exact = ways[0].func(t.double(), w.double(), padding=1)
            seconds = [[harness.timed(run) for run in ways] for _ in range(5 * rounds)]
            for run, taken in zip(ways, zip(*seconds, strict=True), strict=True):
                off = float((run().double() - exact).abs().max() / exact.abs().max())
                row.append(f"{1e3 * statistics.median(taken):.2f} ({off:.0e})")
        rows.append(tuple(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="MODEL-SIZE")
    parser.add_argument("--toy", action="store_true", help="one small convolution and product: tries the script")
    arguments = parser.parse_args()
    images, shapes = (((1, 8, 6),), ((5, 16, 24),)) if arguments.toy else (IMAGES, PRODUCTS)
    rows = []
    for name in arguments.cells:
        model, _, size = name.rpartition("-")
        own, ratios = measure(harness.Cell(model, int(size)), arguments.rounds)
        rows.append((f"{model}, {size}", f"{own:.1f}", *(f"{ratios[kind]:.2f}" for kind in KINDS)))
    table(["network, input", "ms a batch by torch", *KINDS], rows)
    by = [f"{what}, {who}" for what in ("forward", "gradient") for who in ("torch", "Winograd")]
    for dtype in (torch.float32, torch.bfloat16):
        table([f"3x3 convolution, {str(dtype).removeprefix('torch.')}", *by], winograd(images, arguments.rounds, dtype))
    table(["rows x inputs to outputs", "torch, GFLOP/s", "oneDNN"], products(shapes, arguments.rounds))


if __name__ == "__main__":
    main()
