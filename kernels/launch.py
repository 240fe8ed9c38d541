"""Launching kernels: types, precision, the device, block sizes and their tuning."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.gpu_specs import allows_tf32
from t2v_fast.ops.reference import accumulate_dtype

log = logging.getLogger(__name__)

# Environment variable: "1" measures the candidate block sizes once per geometry, instead of taking the first one.
TUNE = "T2V_FAST_TUNE"

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The type that holds sums over ``dtype`` values."""
    return _DTYPES[accumulate_dtype(dtype)]


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which ``dtype`` values enter a matrix product."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32  # the interpreter keeps bfloat16 as bits and would multiply them as integers
    return _DTYPES[dtype]


def precision() -> str:
    """The precision of products of float32 values: exact, unless torch allows TF32.

    Narrower inputs are multiplied exactly in either mode.
    """
    return "tf32" if allows_tf32() else "ieee"


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, because Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``n``, within bounds."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


def processors(t: Tensor) -> int:
    """The number of processors of the tensor's device, which is a lower bound for the programs that run at once."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 1


def shared_memory(t: Tensor) -> int:
    """The bytes of shared memory that one program may have on the tensor's device; as on an H100 without a device."""
    return torch.cuda.get_device_properties(t.device).shared_memory_per_block_optin if t.is_cuda else 227 << 10


def row_chunks(g: Tensor, programs: int) -> int:
    """The number of chunks of rows that give every processor work, for ``programs`` programs per chunk.

    Elementwise sums go over all rows of ``g``. Where there are few tiles, programs share the rows.
    """
    return min(g.shape[0], max(1, 4 * processors(g) // programs))


_tuned: dict[Hashable, tuple[int, ...]] = {}


def best(
    key: Hashable, candidates: Sequence[tuple[int, ...]], run: Callable[[tuple[int, ...]], Tensor]
) -> tuple[int, ...]:
    """The candidate with which ``run`` takes the least time if tuning is on, else the first candidate.

    ``run`` must not change its inputs. Nothing is measured while a CUDA graph is captured.
    """
    if key in _tuned:
        return _tuned[key]
    if os.environ.get(TUNE) != "1" or interpreted() or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = {}
    for candidate in candidates:
        try:
            times[candidate] = triton.testing.do_bench(lambda c=candidate: run(c), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources as error:
            log.debug("%s with blocks %s: %s", key, candidate, error)
    if not times:
        return candidates[0]
    _tuned[key] = min(times, key=times.__getitem__)
    log.info("%s: blocks %s, %.4f ms", key, _tuned[key], times[_tuned[key]])
    return _tuned[key]


def run_best(key: Hashable, candidates: Sequence[tuple[int, ...]], run: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Call ``run`` with the :func:`best` candidate."""
    return run(best(key, candidates, run))
