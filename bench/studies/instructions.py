"""Instructions of the CPU kernels, counted by valgrind's callgrind.

    python -m bench.studies.instructions

One image, channels-last, one thread. Valgrind knows AVX2 and not AVX-512, so these are the AVX2 kernels, with 8
multiply-adds for each instruction. Prints Markdown: the multiply-adds of the layer's weight gradient (as many as of the
layer); the instructions of one call of ``sq_conv`` by its path, or of the layer's forward pass by ``winograd_conv`` or
by torch; and the instructions for 8 multiply-adds, which would be 1 for a loop of nothing else. Counts do not depend on
what else the machine does, so they show what a change of a kernel did.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import table
from t2v_fast.ops.geometry import conv_output_size

LAYERS = {  # path, channels, filters, size, kernel, stride
    "7x7 stem of 64 filters, 64x64": ("explicit", 3, 64, 64, 7, 2),
    "3x3, 64 channels, 28x28": ("explicit", 64, 64, 28, 3, 1),
    "3x3, 64 channels, 28x28, winograd": ("winograd", 64, 64, 28, 3, 1),
    "3x3, 64 channels, 8x8": ("gram", 64, 64, 8, 3, 1),
    "3x3, 256 channels, 4x4": ("gram", 256, 256, 4, 3, 1),
    "1x1, 256 channels, 14x14": ("gram", 256, 256, 14, 1, 1),
    "3x3, 128 channels, 14x14": ("explicit", 128, 128, 14, 3, 1),
    "3x3, 64 channels, 28x28, forward": ("torch", 64, 64, 28, 3, 1),
    "3x3, 64 channels, 28x28, forward, winograd": ("winograd_conv", 64, 64, 28, 3, 1),
}
# The function that is counted, of what is not a path of sq_conv.
FUNCTIONS = {
    "torch": "at::_ops::conv2d::call(*",
    "winograd_conv": "t2v::(anonymous namespace)::winograd_conv(t2v::Tensor const&*",
}
CALL = """
import torch
from t2v_fast import ops
torch.set_num_threads(1)
path, c, o, size, kernel, stride = {layer}
x, g = (torch.randn(1, *s).contiguous(memory_format=torch.channels_last) for s in ((c, size, size), (o, {out}, {out})))
pad = kernel // 2
w = torch.randn(o, c, kernel, kernel).contiguous(memory_format=torch.channels_last)
if path == "torch":
    torch.conv2d(x, w, padding=pad)
elif path == "winograd_conv":
    ops.winograd_conv(x, w, None, (pad, pad))
else:
    ops.sq_conv(x, g, (kernel, kernel), (stride, stride), (pad, pad), (1, 1), 1, path)
print(ops.cpu_capability())
"""


def output_size(layer: tuple) -> int:
    *_, size, kernel, stride = layer
    return conv_output_size((size,), (kernel,), (stride,), (kernel // 2,), (1,))[0]


def count(layer: tuple) -> int:
    """Instructions of one call."""
    function = FUNCTIONS.get(layer[0], "t2v::(anonymous namespace)::sq_conv(t2v::Tensor const&*")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={Path(folder) / 'out'}"),
                f"--toggle-collect={function}",
                *(sys.executable, "-c", CALL.format(layer=layer, out=output_size(layer))),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    if done.stdout.strip() != "avx2":
        raise RuntimeError(f"expected the AVX2 kernels, got {done.stdout.strip()!r}")
    found = int(re.search(r"Collected : (\d+)", done.stderr)[1])
    if not found:
        raise RuntimeError(f"no function of the library is {function!r}: nothing was counted")
    return found


def main() -> None:
    rows = []
    for name, layer in LAYERS.items():
        path, c, o, _, kernel, _ = layer
        products = c * o * kernel**2 * output_size(layer) ** 2
        n = count(layer)
        rows.append((name, path, f"{products / 1e6:.1f}", f"{n / 1e6:.2f}", f"{8 * n / products:.2f}"))
    table(["layer", "path", "million multiply-adds", "million instructions", "for 8"], rows)


if __name__ == "__main__":
    main()
