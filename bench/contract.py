"""The performance table: a Fisher against floor, step, the batch-size-1 loop and vmap, in one interleaved run.

    python bench/contract.py [--models resnet18 resnet50] [--sizes 224 64 32] [--rounds 7]

Prints Markdown. Each round times every contestant once, one after the other; ratios are formed within a round, and the
median over rounds is reported. No number is printed unless all Fishers agree.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from baselines import ALL

BATCH = {224: 8, 64: 32, 32: 64}
RATIOS = (("fisher", "floor"), ("fisher", "step"), ("naive", "fisher"), ("vmap", "fisher"))


def verify(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    want = ALL["naive"](model, x, y)
    for contestant in ("fisher", "vmap"):
        got = ALL[contestant](model, x, y)
        for name, q in want.items():
            error = float((got[name] - q).norm() / q.norm())
            if not error < 1e-2:
                raise SystemExit(f"{contestant} is wrong for {name}: relative error {error:.2g}; no timing is reported")


def measure(model: torch.nn.Module, size: int, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    n = BATCH[size]
    x, y = torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))
    verify(model, x, y)
    seconds: dict[str, list[float]] = {name: [] for name in ALL}
    for _ in range(rounds):
        for name, run in ALL.items():
            start = time.perf_counter()
            run(model, x, y)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 64, 32], choices=sorted(BATCH))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    import torchvision

    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| probe, input, batch | fisher ms/image | " + " | ".join(f"{a} / {b}" for a, b in RATIOS) + " |")
    print("| --- |" + " --- |" * (len(RATIOS) + 1))
    for name in arguments.models:
        model = getattr(torchvision.models, name)(num_classes=10, weights=None).eval()
        for size in arguments.sizes:
            seconds = measure(model, size, arguments.rounds)
            cells = [f"{1e3 * statistics.median(seconds['fisher']) / BATCH[size]:.1f}"]
            for a, b in RATIOS:
                cells.append(f"{statistics.median(s / t for s, t in zip(seconds[a], seconds[b], strict=True)):.2f}")
            print(f"| {name}, {size}, {BATCH[size]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
