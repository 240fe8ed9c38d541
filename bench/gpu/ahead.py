"""Compile a share of what Triton and torch.compile need: ``python -m bench.gpu.ahead [--rehearse] SHARE OF``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from bench.gpu import measure, verify
from bench.gpu.__main__ import FULL, REHEARSAL, Sizes
from bench.gpu.card import DTYPES, KINDS, backends, products, rehearsing


def jobs(device: torch.device, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """What is compiled, the longest first."""
    found: dict[str, Callable[[], object]] = {}
    for name, size, batch in sizes.cells:
        for kind in sizes.compiled:
            found[f"step of {name}, {kind}"] = partial(_step, name, size, batch, kind, device)
    compiling = [name for name in backends(device) if name != "cuda"]  # nvcc has compiled those already
    for backend in compiling:
        for dtype in DTYPES:
            found[f"convolutions, {dtype}"] = partial(verify.convolutions, backend, dtype, device, sizes.every)
            found[f"other ops, {dtype}"] = partial(verify.other_ops, backend, dtype, device)
        for name, conv in sizes.layers.items():
            for kind in KINDS:
                for path in (p for p in conv.paths() if p != "winograd"):
                    run = partial(measure.layer, conv, path, backend, kind, sizes.batch, device)
                    found[f"{name}, {kind}, {path}"] = run
    return found


def _step(name: str, size: int, batch: int, kind: str, device: torch.device) -> None:
    with products(kind):
        measure.step_of(name, size, batch, kind, device, compiled=True)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("share", type=int)
    parser.add_argument("of", type=int)
    asked = parser.parse_args()
    device, sizes = (torch.device("cpu"), REHEARSAL) if asked.rehearse else (torch.device("cuda"), FULL)
    with rehearsing() if asked.rehearse else nullcontext():
        run_share(jobs(device, sizes), asked.share, asked.of)


def run_share(every: dict[str, Callable[[], object]], share: int, of: int) -> None:
    """Run each ``of``-th job, and say what failed: a job that fails leaves the others alone."""
    for name, job in list(every.items())[share::of]:
        try:
            job()
            print(f"compiled: {name}", flush=True)
        except Exception as error:
            print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
