"""Flops, bytes and least times of each layer on GPUs, from the published rates of the GPUs.

    python -m bench.studies.roofline [--write docs/gpu.md]

Prints Markdown; --write puts it into the page.
"""

from __future__ import annotations

import math

import torchvision

from bench.pages import print_or_write
from bench.studies.planner import layers
from t2v_fast.ops import gpu_specs, planner

MODELS = {"ResNet-34": "resnet34", "ViT-B/16": "vit_b_16"}
RATES = {"float32": "exact float32", "tf32": "TF32", "half": "bfloat16"}
ON = ("A100", "H100")


def best(conv: planner.Conv, card: gpu_specs.Card, rate: str, itemsize: int) -> tuple[str, gpu_specs.GpuWork, float]:
    paths = [path for path in conv.paths() if path != "winograd"]
    works = {path: planner.gpu_work(conv, path, itemsize) for path in paths}
    path = min(paths, key=lambda path: card.seconds(works[path], rate))
    return path, works[path], card.seconds(works[path], rate)


def describe(conv: planner.Conv) -> str:
    kernel = "x".join(map(str, conv.kernel_size)) if conv.kernel_size != (1, 1) else "1x1"
    if conv.size[0] == 1:
        return f"linear {conv.channels} to {conv.filters}, {conv.size[1]} tokens"
    stride = f", stride {conv.stride[0]}" if conv.stride != (1, 1) else ""
    return f"{kernel}{stride}, {conv.channels} to {conv.filters}, {conv.size[0]}x{conv.size[1]}"


def bound(work: gpu_specs.GpuWork, card: gpu_specs.Card, rate: str) -> str:
    memory = work.bytes / (card.bandwidth * 1e9)
    return "memory" if memory >= card.seconds(work, rate) else "products"


def page() -> str:
    lines = []
    for title, name in MODELS.items():
        found = layers(getattr(torchvision.models, name)(num_classes=10).eval(), 224)
        lines += [
            f"### {title}",
            "",
            "| layer | times | path | MFLOP | MB | A100, us | H100, us | bound by |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for conv, times in found.items():
            path, work, seconds = best(conv, gpu_specs.named("H100"), "float32", 4)
            row = [describe(conv), times, path, f"{(work.flops + work.sum_flops) / 1e6:.1f}", f"{work.bytes / 1e6:.2f}"]
            row += [f"{1e6 * best(conv, gpu_specs.named('A100'), 'float32', 4)[2]:.2f}", f"{1e6 * seconds:.2f}"]
            row.append(bound(work, gpu_specs.named("H100"), "float32"))
            lines.append(f"| {' | '.join(map(str, row))} |")
        lines += [
            "",
            "All of these layers together, an image, and beside it an ordinary weight gradient (2 O D P flops) at the "
            "same rate:",
            "",
            "| products | " + " | ".join(f"{on}, us | {on}, weight gradient, us" for on in ON) + " |",
            "| --- | " + " | ".join(["--- | ---"] * len(ON)) + " |",
        ]
        for rate, kind in RATES.items():
            itemsize = 2 if rate == "half" else 4
            cells = []
            for on in ON:
                card = gpu_specs.named(on)
                flops = sum(
                    2 * n * conv.filters * conv.channels // conv.groups * math.prod((*conv.kernel_size, *conv.out_size))
                    for conv, n in found.items()
                )
                total = sum(n * best(conv, card, rate, itemsize)[2] for conv, n in found.items())
                cells += [f"{1e6 * total:.0f}", f"{flops / getattr(card, rate) / 1e6:.0f}"]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    print_or_write(page, "roofline", __doc__)


if __name__ == "__main__":
    main()
