"""Times of whole networks on an H100, as predicted before a card was measured, for two versions of the kernels.

    python -m bench.studies.gpu_model [--parts] [--write docs/gpu.md]

Prints Markdown; --write puts it into the page. --parts shows what the Fisher's own time consists of instead. The
assumptions are in the constants of this file.
"""

from __future__ import annotations

import math
import sys
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
# each convolution. ViT's layer norms, two a block, read less than half of a cotangent. Its biases read each cotangent,
# unless the kernel of the Gram path sums them too, as it does now.
NORM_READS = {"resnet50": 2.0, "vit_b_16": 0.4}
BIAS_READS = {"resnet50": 0.0, "vit_b_16": 1.0}

# Shares of the published rates that the kernels of commit 317f8b0 were estimated to achieve: (explicit, Gram, forms),
# from the bounds in t2v_fast/ops/gpu_estimates.py. CUDA's kernels ran wherever they were built, and the planner
# took the published rates.
BEFORE = {"half": (0.115, 0.06, 0.035), "tf32": (0.10, 0.06, 0.07), "float32": (0.58, 0.45, 0.50)}
# The stem copied values of 2 bytes one at a time, 1,240 instructions a step, on half of the processors.
BEFORE_STEM = {"half": 0.025, "tf32": 0.05, "float32": 0.30}
# Shares of the published rates of Triton's kernel with blocks of 128 positions: (Gram, forms), for linear layers and
# 1x1 convolutions of more than 64 positions. The second cache bounds it, as in gpu_estimates.py. A block of 128 x 128
# makes 64 flops of a byte in half precision and 32 in TF32, so that 5.5 TB/s allow 352 and 176 TFLOP/s. Half of that
# is left, because a processor holds one program of 256 threads. And 0.83 of that is useful, compared with blocks of
# 64: 197 positions fill three pairs of blocks of 128, or ten of 64 (49,152 products against 40,960).
WIDE = {"half": (0.15, 0.15), "tf32": (0.15, 0.15)}
# The same shares of the present kernels, as they were estimated before a card was measured.
NOW = {
    ("cuda", "float32"): (0.60, 0.50, 0.50),
    ("cuda", "tf32"): (0.18, 0.14, 0.12),
    ("cuda", "half"): (0.15, 0.10, 0.05),
    ("triton", "float32"): (0.45, 0.35, 0.45),
    ("triton", "tf32"): (0.26, 0.12, 0.14),
    ("triton", "half"): (0.30, 0.15, 0.10),
}
RATES = gpu_estimates.rates_of(NOW, CARD, OF_BANDWIDTH)
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


def after(conv: planner.Conv, kind: str, itemsize: int) -> tuple[str, float]:
    """The path now, on the backend that leads, and seconds for an image."""
    times = {
        path: RATES.seconds(planner.gpu_work(conv, path, itemsize), RATES.leader(kind, path), kind, path)
        for path in conv.paths()
        if path != "winograd"
    }
    if conv.channels == 3:  # such a layer stays with CUDA
        return "explicit", RATES.seconds(planner.gpu_work(conv, "explicit", itemsize), "cuda", kind, "explicit") / STEM
    path = min(times, key=times.__getitem__)  # as the planner chooses it
    if path == "gram" and is_wide(conv, kind):
        gram, forms = (1e12 * share * getattr(CARD, kind) for share in WIDE[kind])
        work = planner.gpu_work(conv, path, itemsize)
        products = work.flops / gram + work.sum_flops / forms
        return path, max(products, work.bytes / (OF_BANDWIDTH * CARD.bandwidth * 1e9))
    return path, times[path]


def is_wide(conv: planner.Conv, kind: str) -> bool:
    """Whether the blocks of a layer have 128 positions (kernels/sq_conv_gram.py: gram_blocks)."""
    pointwise = (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
    return kind in WIDE and pointwise and math.prod(conv.out_size) > 64


def passes(found: Counter[planner.Conv], reads: float, itemsize: int) -> float:
    """Seconds for an image of ``reads`` reads of the outputs of all layers."""
    outputs = sum(times * conv.filters * math.prod(conv.out_size) for conv, times in found.items())
    return reads * outputs * itemsize / (OF_BANDWIDTH * CARD.bandwidth * 1e9)


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
        for kind, (title, itemsize) in KINDS.items():
            base = 1e3 * BATCH * floor(found, name, kind, itemsize)
            norms, biases = (1e3 * BATCH * passes(found, n[name], itemsize) for n in (NORM_READS, BIAS_READS))
            was = 1e3 * BATCH * sum(times * before(conv, kind, itemsize) for conv, times in found.items())
            now = 1e3 * BATCH * sum(times * after(conv, kind, itemsize)[1] for conv, times in found.items())
            was, now = was + norms + biases, now + norms  # the Gram path has the biases now
            times_of[name, title] = base, was, now
    return times_of


def page() -> str:
    header = ["network", "products", "floor, ms", "Fisher's own before, ms", "now, ms", "(floor + own) / floor before"]
    rows = [[*header, "now"]]
    for (name, kind), (base, *own) in predictions().items():
        ratios = [f"{(base + ms) / base:.2f}" for ms in own]
        rows.append([name, kind, f"{base:.1f}", *(f"{ms:.1f}" for ms in own), *ratios])
    return markdown(rows)


def parts() -> str:
    """What ViT's own time consists of, part by part."""
    import torchvision

    rows = [["products", "part", "GFLOP", "MB", "ms", "bound by", "share of the floor"]]
    found = layers(torchvision.models.vit_b_16(num_classes=10).eval(), 224)
    for kind, (title, itemsize) in KINDS.items():
        base = BATCH * floor(found, "vit_b_16", kind, itemsize)
        for conv, times in found.items():
            path, seconds = after(conv, kind, itemsize)
            work = planner.gpu_work(conv, path, itemsize)
            gram, forms = (work.flops, work.sum_flops) if path == "gram" else (0.0, 0.0)
            shares = WIDE[kind] if is_wide(conv, kind) else None
            leader = RATES.leader(kind, "gram")
            speeds = [
                1e12 * (shares[k] * getattr(CARD, kind) if shares else RATES.products[leader, kind, name])
                for k, name in enumerate(("gram", "forms"))
            ]
            name = f"{times} x {conv.channels} to {conv.filters}"
            moved = BATCH * times * work.bytes / 1e6
            halves = [("Gram matrices", gram / speeds[0], gram), ("forms", forms / speeds[1], forms)]
            for what, part, flops in halves if path == "gram" else [("explicit", seconds, work.flops)]:
                ms = 1e3 * BATCH * times * part
                if ms > 0.005:
                    cells = f"{BATCH * times * flops / 1e9:.0f}", f"{moved:.0f}", f"{ms:.2f}", "products"
                    rows.append([title, f"{name}: {what}", *cells, f"{ms / base / 1e3:.3f}"])
        seconds = BATCH * passes(found, NORM_READS["vit_b_16"], itemsize)
        moved = seconds * OF_BANDWIDTH * CARD.bandwidth * 1e3
        cells = "-", f"{moved:.0f}", f"{1e3 * seconds:.2f}", "memory"
        rows.append([title, "layer norms", *cells, f"{seconds / base:.3f}"])
    return markdown(rows)


def main() -> None:
    if "--parts" in sys.argv:
        sys.argv.remove("--parts")
        print_or_write(parts, "gpu parts", __doc__)
    else:
        print_or_write(page, "gpu model", __doc__)


if __name__ == "__main__":
    main()
