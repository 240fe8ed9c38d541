"""Published peak rates of GPUs, from which :mod:`t2v_fast.ops.gpu_estimates` estimates the rates that kernels achieve.

A card that is not listed is treated as an A100, with a warning.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuWork:
    """Work for one example: flops of products of inputs, flops of products with sums, and bytes that must be moved."""

    flops: float
    sum_flops: float
    bytes: float


@dataclass(frozen=True)
class Card:
    """Peak rates without sparsity, in TFLOP/s, and the memory's bandwidth in GB/s.

    The occupancy is bounded by the number of ``processors``, and by the ``registers`` and the ``shared`` KiB of shared
    memory of each processor.
    """

    name: str
    float64: float
    float32: float
    tf32: float
    half: float
    bandwidth: float
    processors: int
    shared: int
    registers: int = 65536

    def seconds(self, work: GpuWork, rate: str) -> float:
        """The least time for ``work`` with inputs multiplied at ``rate``: the longer of the times for flops and bytes.

        Sums are float32, or float64 for float64 inputs. Products with float32 sums use TF32 where torch allows TF32.
        """
        products = work.flops / getattr(self, rate)
        sums = work.sum_flops / getattr(self, _sums_rate(rate))
        return max((products + sums) / 1e12, work.bytes / (self.bandwidth * 1e9))


# NVIDIA's data sheets: A100 (2021), H100 and H200 (2024), L4, L40S (2023), V100 (2020), T4 (2019), GeForce 4090 (2022).
CARDS = (
    Card("A100-SXM4-40GB", 9.7, 19.5, 156, 312, 1555, 108, 164),
    Card("A100", 9.7, 19.5, 156, 312, 2039, 108, 164),
    Card("H100 PCIe", 26, 51, 378, 756, 2000, 114, 228),
    Card("H100", 34, 67, 495, 989, 3350, 132, 228),
    Card("H200", 34, 67, 495, 989, 4800, 132, 228),
    Card("L40S", 1.4, 91.6, 183, 362, 864, 142, 100),
    Card("L4", 0.5, 30.3, 60, 121, 300, 58, 100),
    Card("V100", 7.8, 15.7, 15.7, 125, 900, 80, 96),
    Card("T4", 0.25, 8.1, 8.1, 65, 320, 40, 64),
    Card("RTX 4090", 1.3, 82.6, 82.6, 165, 1008, 128, 100),
)


def named(name: str) -> Card | None:
    """The card whose name occurs in ``name``. If several do, the one with the longest name."""
    found = [card for card in CARDS if card.name in name.replace("NVIDIA ", "")]
    return max(found, key=lambda card: len(card.name), default=None)


def card_of(device: torch.device) -> Card:
    """The card of a CUDA device."""
    return _card(torch.cuda.get_device_name(device))


@functools.cache
def _card(name: str) -> Card:
    if (found := named(name)) is not None:
        return found
    log.warning("%s is not listed in t2v_fast.ops.gpu_specs: paths are chosen as for an A100", name)
    fallback = named("A100")
    assert fallback is not None
    return fallback


def allows_tf32() -> bool:
    """Whether torch lets GPUs multiply float32 values in TF32.

    ``torch.set_float32_matmul_precision("high")`` allows TF32. So does the newer setting,
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"``, after which the older one cannot be read.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def rate_of(dtype: torch.dtype) -> str:
    """The name of the rate at which kernels multiply ``dtype`` values: TF32 only where torch allows TF32."""
    if dtype == torch.float64:
        return "float64"
    if dtype == torch.float32:
        return "tf32" if allows_tf32() else "float32"
    return "half"


def _sums_rate(rate: str) -> str:
    if rate == "half":
        return rate_of(torch.float32)
    return rate
