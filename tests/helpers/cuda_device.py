"""The CUDA device of the tests: the machine's own, or a pretended one (:mod:`pretend_cuda`).

``Pretend(x)`` is a CPU tensor on that device, ``moved(network)`` a copy of a network there, and ``t.held`` the values
of one of its tensors on the CPU. Within ``pretended(kernel)`` attention takes one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

REAL = torch.cuda.is_available()

if REAL:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class _OnDevice(type):
        def __call__(cls, real: Tensor) -> Tensor:
            return real.cuda()

        def __instancecheck__(cls, t: Any) -> bool:
            return isinstance(t, Tensor) and t.is_cuda

    class Pretend(metaclass=_OnDevice):
        """A tensor on the machine's CUDA device."""

    Tensor.held = property(Tensor.cpu)  # type: ignore[attr-defined]

    def moved(network: nn.Module) -> nn.Module:
        """A copy of a network on the device."""
        # What a network keeps of its last pass is part of a graph, and cannot be copied as it is.
        attributes = [t for module in network.modules() for t in tree_leaves(vars(module)) if isinstance(t, Tensor)]
        memo = {id(t): t.detach().clone() for t in attributes if not t.is_leaf}
        return copy.deepcopy(network, memo).cuda()

    _KERNELS = {
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }

    @contextmanager
    def pretended(kernel: str = "math") -> Iterator[None]:
        """A context in which attention takes ``kernel``, and float32 is multiplied exactly."""
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with sdpa_kernel(list({_KERNELS[kernel], SDPBackend.MATH})):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
else:
    from pretend_cuda import Pretend, moved, pretended

# The libraries of recurrent layers that torch can call here.
LIBRARIES = ("cuDNN",) if REAL else ("cuDNN", "MIOpen")

__all__ = ["LIBRARIES", "REAL", "Pretend", "dtype_of", "moved", "pretended"]


def dtype_of(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """The widest dtype that an attention kernel takes; a pretended one takes any."""
    if not REAL or dtype != torch.float64:
        return dtype
    return {"math": dtype, "efficient": torch.float32}.get(kernel, torch.bfloat16)
