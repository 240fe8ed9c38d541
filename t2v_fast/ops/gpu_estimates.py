"""The rates that the GPU kernels achieve: estimated, or measured by :func:`t2v_fast.ops.gpu_rates.measure`.

The planner and the choice between the CUDA and the Triton kernels need the time that a kernel takes, which is far above
the least time at a card's published rates. :func:`rates` returns what was measured for a card, or else the estimates of
this module. Nothing is measured unasked.

A convolution or a linear layer is computed by one of two paths. The explicit path has products of inputs only. The Gram
path has products of inputs too (the Gram matrices), and products with sums (the quadratic forms). Each kind of product
has a rate of its own. Those of the Gram path have another one for large layers, which was measured on large layers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import torch

from . import gpu_specs
from .cache import cache_folder
from .gpu_specs import Card, GpuWork

log = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton")
KERNELS = ("explicit", "gram", "forms")
LARGE = {"gram": "large gram", "forms": "large forms"}  # what the kernels of the Gram path are called in large layers
# A layer is large from so many flops of an example on: half way, by the ratio, between the small and the large layers
# that are measured.
LARGE_FLOPS = 1.56e8
# What is multiplied: the names of the rates of a card.
KINDS = ("float64", "float32", "tf32", "half")


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of each (backend, kind of product, kernel), and GB/s of passes over memory.

    Attributes:
        products: The rates. A kernel that multiplies every term of a Gram matrix apart counts its products once. The
            kernels are those of :data:`KERNELS`, and the names in :data:`LARGE`.
        bandwidth: GB/s that kernels move which are bound by memory.
        measured: Whether the rates were measured on the card; otherwise they are estimated.
    """

    products: Mapping[tuple[str, str, str], float]
    bandwidth: float
    measured: bool

    def seconds(self, work: GpuWork, backend: str, kind: str, path: str) -> float:
        """The time for ``work``: of its products, or of its passes over memory if that is longer.

        Args:
            work: What :func:`t2v_fast.ops.planner.gpu_work` counts for ``path``, of one example.
            backend: ``"cuda"`` or ``"triton"``.
            kind: What is multiplied, as :func:`t2v_fast.ops.gpu_specs.rate_of` names it.
            path: ``"explicit"`` or ``"gram"``.
        """
        kernels = [path, "forms"]
        if path == "gram" and work.flops + work.sum_flops >= LARGE_FLOPS:
            kernels = [*LARGE.values()]
        inputs, forms = (1e12 * self.products[backend, kind, kernel] for kernel in kernels)
        # Depthwise convolutions count as products with sums. They are bound by memory.
        sums = work.sum_flops / forms if path == "gram" else 0.0
        return max(work.flops / inputs + sums, work.bytes / (1e9 * self.bandwidth))

    def leader(self, kind: str, path: str | None = None) -> str:
        """The backend that takes less time for a flop of each kernel of a path together, or of all kernels."""
        of_gram = (*LARGE, *LARGE.values())
        kernels = {None: ("explicit", *of_gram), "explicit": ("explicit",), "gram": of_gram}[path]
        return min(BACKENDS, key=lambda name: sum(1 / self.products[name, kind, kernel] for kernel in kernels))


# The share of a card's published rate that a kernel achieves, by generation, backend and kind: (explicit, Gram, forms).
# Those of sm_90 were measured on an H200 by measure() (bench/gpu/h200.json), but for float64 and two others. Since then
# the CUDA kernel of the forms multiplies all terms of a Gram matrix in one pass, and reads 16 bytes at a time in TF32
# too: its shares in TF32 and in half precision were 0.096 and 0.050, and are now estimates.
# The shares of sm_80 are estimates: the least of these bounds, and half of it where blocks of 128 threads or fewer than
# three blocks a processor leave waits uncovered:
# - instructions issued: multiply-adds an instruction of the main loop (docs/gpu.md, "Main loops") times one instruction
#   a cycle and scheduler;
# - shared memory: 128 bytes a cycle and processor, against the bytes that matrix loads and copies move;
# - the second cache: 4 TB/s on an A100, against the bytes of a tile's factors.
# On an H200 such estimates were too high: by a quarter for explicit products of CUDA in half precision (0.15), and by
# two thirds for Triton's (0.30) and for its forms (0.10).
_ESTIMATES: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "sm_90": {
        ("cuda", "float64"): (0.35, 0.35, 0.30),
        ("cuda", "float32"): (0.46, 0.13, 0.41),
        ("cuda", "tf32"): (0.116, 0.040, 0.14),
        ("cuda", "half"): (0.122, 0.049, 0.08),
        ("triton", "float64"): (0.30, 0.25, 0.25),
        ("triton", "float32"): (0.46, 0.058, 0.10),
        ("triton", "tf32"): (0.068, 0.094, 0.042),
        ("triton", "half"): (0.18, 0.12, 0.033),
    },
    "sm_80": {
        ("cuda", "float64"): (0.35, 0.35, 0.30),
        ("cuda", "float32"): (0.65, 0.55, 0.55),
        ("cuda", "tf32"): (0.35, 0.28, 0.24),
        ("cuda", "half"): (0.35, 0.25, 0.12),
        ("triton", "float64"): (0.30, 0.25, 0.25),
        ("triton", "float32"): (0.50, 0.40, 0.50),
        ("triton", "tf32"): (0.32, 0.25, 0.25),
        ("triton", "half"): (0.45, 0.30, 0.20),
    },
}
_OF_BANDWIDTH = 0.8  # a pass that reads 16 bytes a thread, as norms do; measured on an H200


@functools.cache
def estimates(card: Card) -> Rates:
    """Estimated rates of a card: shares of its published rates, which are those of its generation.

    Cards other than the H100 and the H200 get the shares that were estimated for the A100.
    """
    shares = _ESTIMATES["sm_90" if card.name.startswith(("H100", "H200")) else "sm_80"]
    return rates_of(shares, card, _OF_BANDWIDTH)


def rates_of(shares: Mapping[tuple[str, str], tuple[float, float, float]], card: Card, of_bandwidth: float) -> Rates:
    """Estimated rates from shares of a card's published ones: (explicit, Gram, forms) by backend and kind."""
    products = {
        (backend, kind, kernel): share * getattr(card, kind)
        for (backend, kind), three in shares.items()
        for kernel, share in zip(KERNELS, three, strict=True)
    }
    # Nobody has estimated how much busier a large layer keeps a card.
    products |= {(b, kind, LARGE[kernel]): rate for (b, kind, kernel), rate in products.items() if kernel in LARGE}
    return Rates(products, of_bandwidth * card.bandwidth, measured=False)


MEASUREMENT = "2"  # of rates. Files of another one are not read: 1 had no large layers


def rates_key(name: str) -> dict[str, str]:
    """What measured rates depend on: the card, this library, and torch, which brings Triton along."""
    try:
        library = version("t2v-fast")
    except PackageNotFoundError:  # the sources are on the path, and nothing is installed
        library = "not installed"
    return {"card": name, "library": library, "torch": torch.__version__, "measurement": MEASUREMENT}


def rates_file(name: str) -> Path:
    """The file of the measured rates of the card with this name."""
    return cache_folder() / f"gpu-rates-{hashlib.sha256(json.dumps(rates_key(name)).encode()).hexdigest()[:16]}.json"


def rates(device: torch.device) -> Rates:
    """The rates of a CUDA device: those that :func:`t2v_fast.ops.gpu_rates.measure` has kept, or else estimates."""
    return _rates(torch.cuda.get_device_name(device), gpu_specs.card_of(device))


@functools.cache
def _rates(name: str, card: Card) -> Rates:
    estimated, path = estimates(card), rates_file(name)
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != rates_key(name):
            return estimated
        found = {cast(tuple[str, str, str], tuple(k.split(", "))): float(v) for k, v in stored["products"].items()}
        bandwidth = float(stored["bandwidth"])
        if not all(v > 0 and math.isfinite(v) for v in (bandwidth, *found.values())):
            raise ValueError("a rate is not positive")
        # Backends and kinds that could not be measured, and the exact rates that nobody measures, stay estimates.
        return Rates({**estimated.products, **found}, bandwidth, measured=True)
    except FileNotFoundError:
        return estimated
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): the planner uses estimates until measure() runs again", path, error)
        return estimated


def leader(device: torch.device, dtype: torch.dtype, path: str | None = None) -> str:
    """The backend, ``"cuda"`` or ``"triton"``, that is faster on a path for ``dtype`` values on a CUDA device."""
    return rates(device).leader(gpu_specs.rate_of(dtype), path)
