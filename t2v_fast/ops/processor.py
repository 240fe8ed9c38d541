"""What the processor multiplies fast."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on this processor with the processor's own instructions.

    These are AVX-512 with BF16, AMX, and BF16 of Arm. Elsewhere a product in bfloat16 takes torch many times as long as
    one in float32, so that :class:`~t2v_fast.gradients.fast_layers.FastLayers` computes it in float32.

    Returns:
        The answer of oneDNN, which also heeds its setting ``ONEDNN_MAX_CPU_ISA``, and of torch.

    Example:
        >>> multiplies_bfloat16() in (True, False)
        True
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # missing where torch lacks oneDNN
    if supported is None or not supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # oneDNN also supports bfloat16 by way of float32 instructions, which is no faster than float32.
    found = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return any(found)
