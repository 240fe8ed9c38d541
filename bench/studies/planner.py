"""The planner's choices against measurement, on every layer of six networks at three sizes.

    python -m bench.studies.planner [--models resnet18 ...] [--sizes 32 64 224] [--repeats 7]

Times every path of every different layer, in interleaved rounds; the fastest run of each path counts. Prints Markdown:
the layers on which the planner's path was more than a tenth slower than the fastest path, and a summary.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter

import torch
import torchvision
from torch import nn

from t2v_fast import FisherRecorder, ops
from t2v_fast.ops import planner

MODELS = ("resnet18", "resnet34", "resnet50", "convnext_tiny", "vit_b_16", "mobilenet_v2")


def build(name: str, size: int) -> nn.Module:
    if name == "vit_b_16":  # one of its twelve equal blocks, at any size
        return torchvision.models.VisionTransformer(size, 16, 1, 12, 768, 3072, num_classes=10).eval()
    return getattr(torchvision.models, name)(num_classes=10).eval()


def layers(model: nn.Module, size: int) -> Counter[planner.Conv]:
    """The geometries that the rules hand to the planner, and how often each occurs."""
    found: Counter[planner.Conv] = Counter()
    with FisherRecorder(model) as recorder:
        recorder.observer = lambda use, factors, *rest: found.update([factors.conv] if hasattr(factors, "conv") else [])
        logits = model(torch.randn(1, 3, size, size))
        recorder.backward(logits, torch.randn_like(logits))
    return found


def measure(conv: planner.Conv, repeats: int) -> dict[str, float]:
    """Seconds for one example by path, on all threads."""
    elements = conv.channels * math.prod(conv.size) + conv.filters * math.prod(conv.out_size)
    n = max(4, min(64, (1 << 20) // elements)) // torch.get_num_threads() * torch.get_num_threads()
    x, g = (
        torch.randn(n, *shape).contiguous(memory_format=torch.channels_last)  # as fisher() has them
        for shape in ((conv.channels, *conv.size), (conv.filters, *conv.out_size))
    )
    best = dict.fromkeys(conv.paths(), math.inf)
    for _ in range(repeats + 1):
        for path in best:
            start = time.perf_counter()
            ops.sq_conv(x, g, *conv.arguments, path)
            best[path] = min(best[path], (time.perf_counter() - start) / n)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 224])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    users: dict[planner.Conv, list[str]] = {}
    for size in arguments.sizes:
        for name in arguments.models:
            for conv in layers(build(name, size), size):
                users.setdefault(conv, []).append(f"{name} at {size}")
    costs = planner.costs(torch.float32)
    ratios, totals = [], {"planned": 0.0, "fastest": 0.0, **dict.fromkeys(ops.CONV_PATHS, 0.0)}
    print("| layer | in | planned | fastest | planned / fastest |\n| --- | --- | --- | --- | --- |")
    for conv, where in users.items():
        if len(conv.paths()) == 1 or (conv.size, conv.kernel_size) == ((1, 1), (1, 1)):
            continue  # nothing to choose; linear layers of one token go by a formula of their own
        seconds = measure(conv, arguments.repeats)
        chosen, fastest = costs.best(conv), min(seconds, key=seconds.__getitem__)
        ratios.append(seconds[chosen] / seconds[fastest])
        totals["planned"] += seconds[chosen]
        totals["fastest"] += seconds[fastest]
        for path in ops.CONV_PATHS:
            totals[path] += seconds.get(path, seconds["explicit"])
        if ratios[-1] > 1.1:
            shape = f"{conv.channels} to {conv.filters}, {conv.size[0]}x{conv.size[1]}, kernel {conv.kernel_size[0]}"
            times = [f"{path} {1e6 * seconds[path]:.0f} us" for path in (chosen, fastest)]
            print(f"| {shape} | {where[0]} | {times[0]} | {times[1]} | {ratios[-1]:.2f} |", flush=True)
    print(f"\n{len(ratios)} layers with a choice; at most 1.10 times the fastest: {sum(r <= 1.1 for r in ratios)}")
    print("Sum over the layers, relative to the fastest path of each:")
    print(", ".join(f"{name} {seconds / totals['fastest']:.2f}" for name, seconds in totals.items()))


if __name__ == "__main__":
    main()
