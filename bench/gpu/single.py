"""One small call of an op, in a process of its own, for the tools: ``python -m bench.gpu.single stem``."""

from __future__ import annotations

import argparse

import torch

from bench.gpu.card import KINDS, products
from t2v_fast import ops
from t2v_fast.ops import planner, reference

# For compute-sanitizer: small, and with the edges where copies can go wrong.
SMALL = {
    "three channels": planner.Conv(3, (17, 15), 14, (7, 7), (2, 2), (3, 3)),
    "padding": planner.Conv(8, (6, 5), 12, (3, 3), padding=(1, 1)),
    "7x7": planner.Conv(16, (9, 9), 24, (7, 7), padding=(3, 3)),
    "depthwise": planner.Conv(19, (8, 7), 19, (3, 3), padding=(1, 1), groups=19),
}
# For ncu: as large as in the networks.
LARGE = {
    "squares": planner.Conv(128, (28, 28), 128, (3, 3), padding=(1, 1)),
    "form": planner.Conv(768, (1, 197), 3072),
    "stem": planner.Conv(3, (224, 224), 64, (7, 7), (2, 2), (3, 3)),
}
PATHS = {"form": ("gram",), "squares": ("explicit",), "stem": ("explicit",)}


def call(conv: planner.Conv, path: str, backend: str, kind: str, batch: int, device: torch.device) -> float:
    """Run the op; return how far it is from the reference, relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, conv.channels, *conv.size, generator=generator).to(device, KINDS[kind])
    g = torch.randn(batch, conv.filters, *conv.out_size, generator=generator).to(device, KINDS[kind])
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    with ops.use_backend(backend), products(kind):
        got = ops.sq_conv(x, g, *conv.arguments, path).double()
    want = reference.sq_conv(x.double(), g.double(), *conv.arguments)
    return float((got - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[*SMALL, *LARGE])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--kind", default="bfloat16", choices=KINDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=2)
    asked = parser.parse_args()
    conv = (SMALL | LARGE)[asked.case]
    for path in PATHS.get(asked.case, ("explicit", "gram")):
        if path in conv.paths():
            error = call(conv, path, asked.backend, asked.kind, asked.batch, torch.device(asked.device))
            print(f"{asked.case}, {path}: relative error {error:.1e}")
            assert error < 0.05, path


if __name__ == "__main__":
    main()
