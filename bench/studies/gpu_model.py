"""Estimated times of whole networks on an H100, before and after the kernels of this version. Nothing is measured.

    python -m bench.studies.gpu_model [--write docs/gpu.md]

Prints Markdown; --write puts it into the page. The assumptions are in the constants of this file.
"""

from __future__ import annotations

import math
from collections import Counter

from bench.pages import markdown, print_or_write
from bench.studies.planner import layers
from t2v_fast.ops import gpu_estimates, gpu_specs, planner

CARD = gpu_specs.named("H100")
BATCH = 64
KINDS = {"half": ("bfloat16", 2), "tf32": ("TF32", 4), "float32": ("float32", 4)}

# The share of the published rate that cuBLAS and cuDNN achieve, and of the bandwidth that passes over memory do.
OF_LIBRARIES, OF_BANDWIDTH = 0.55, 0.75
# How often the output of a layer is moved by a forward pass and a backward pass without weight gradients. After a
# convolution, batch norm, ReLU and the addition read and write it in both directions. Less follows a linear layer.
MOVES = {"resnet50": 16, "vit_b_16": 6}
# Reads of cotangents and inputs by the sums of norms and biases, in outputs of a layer: batch norms read both after
# each convolution. ViT's biases read each cotangent, and its layer norms, two a block, read less than half of that.
READS = {"resnet50": 2.0, "vit_b_16": 1.4}

# Shares of the published rates that the kernels of commit 317f8b0 were estimated to achieve: (explicit, Gram, forms),
# from the same bounds as in t2v_fast/ops/gpu_estimates.py. CUDA's kernels ran wherever they were built, and the planner
# took the published rates.
BEFORE = {"half": (0.115, 0.06, 0.035), "tf32": (0.10, 0.06, 0.07), "float32": (0.58, 0.45, 0.50)}
# The stem copied values of 2 bytes one at a time, 1,240 instructions a step, on half of the processors.
BEFORE_STEM = {"half": 0.025, "tf32": 0.05, "float32": 0.30}
STEM = 0.6  # of the explicit rate now: a quarter of its columns is padding, and copies are 8 bytes


def before(conv: planner.Conv, kind: str, itemsize: int) -> float:
    """Seconds for an image at commit 317f8b0."""
    works = {path: planner.gpu_work(conv, path, itemsize) for path in conv.paths() if path != "winograd"}
    path = min(works, key=lambda path: CARD.seconds(works[path], kind))
    explicit, gram, forms = (1e12 * share * getattr(CARD, kind) for share in BEFORE[kind])
    if conv.channels == 3:
        explicit = 1e12 * BEFORE_STEM[kind] * getattr(CARD, kind)
    if path == "gram":
        products = works[path].flops / gram + works[path].sum_flops / forms
    else:
        products = works[path].flops / explicit
    return max(products, works[path].bytes / (OF_BANDWIDTH * CARD.bandwidth * 1e9))


def after(conv: planner.Conv, kind: str, itemsize: int) -> float:
    """Seconds for an image now, on the backend that leads."""
    rates = gpu_estimates.estimates(CARD)
    backend = rates.leader(kind)
    times = {
        path: rates.seconds(planner.gpu_work(conv, path, itemsize), backend, kind, path)
        for path in conv.paths()
        if path != "winograd"
    }
    if conv.channels == 3:  # such a layer stays with CUDA
        return rates.seconds(planner.gpu_work(conv, "explicit", itemsize), "cuda", kind, "explicit") / STEM
    return min(times.values())


def floor(found: Counter[planner.Conv], name: str, kind: str, itemsize: int) -> float:
    """Seconds for an image of a forward pass and a backward pass without weight gradients."""
    flops = outputs = 0.0
    for conv, times in found.items():
        columns = conv.channels // conv.groups * math.prod(conv.kernel_size)
        output = conv.filters * math.prod(conv.out_size)
        flops += times * 2 * 2 * output * columns
        outputs += times * output
    moved = MOVES[name] * outputs * itemsize / (OF_BANDWIDTH * CARD.bandwidth * 1e9)
    return flops / (OF_LIBRARIES * 1e12 * getattr(CARD, kind)) + moved


def predictions() -> dict[tuple[str, str], tuple[float, float, float]]:
    """Milliseconds of the floor, and of what the Fisher added before and adds now, by network and kind of products."""
    import torchvision  # bench.gpu runs on machines without it

    times_of = {}
    for name in MOVES:
        found = layers(getattr(torchvision.models, name)(num_classes=10).eval(), 224)
        outputs = sum(times * conv.filters * math.prod(conv.out_size) for conv, times in found.items())
        for kind, (title, itemsize) in KINDS.items():
            passes = READS[name] * outputs * itemsize / (OF_BANDWIDTH * CARD.bandwidth * 1e9)
            base = 1e3 * BATCH * floor(found, name, kind, itemsize)
            was, now = (
                1e3 * BATCH * (passes + sum(times * seconds(conv, kind, itemsize) for conv, times in found.items()))
                for seconds in (before, after)
            )
            times_of[name, title] = base, was, now
    return times_of


def page() -> str:
    header = ["network", "products", "floor, ms", "Fisher's own before, ms", "now, ms", "(floor + own) / floor before"]
    rows = [[*header, "now"]]
    for (name, kind), (base, *own) in predictions().items():
        ratios = [f"{(base + ms) / base:.2f}" for ms in own]
        rows.append([name, kind, f"{base:.1f}", *(f"{ms:.1f}" for ms in own), *ratios])
    return markdown(rows)


def main() -> None:
    print_or_write(page, "gpu model", __doc__)


if __name__ == "__main__":
    main()
