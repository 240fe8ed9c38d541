"""Embedding tables. Tokens are sorted by row of the table, so that one program owns a row: sums need no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, power_of_two, sum_type


@triton.jit
def scatter_kernel(
    key,
    order,
    g,
    weight,
    out,
    examples,
    tokens,
    positions,
    columns,
    num_rows,
    cotangents,
    g_m,
    g_s,
    g_o,
    ELEMENTWISE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program starts at each token, and the program at the start of a run of equal keys computes the whole run.

    ``key`` is sorted; a key is row of the table * examples + example. ``order`` has the original place of each token.
    With ELEMENTWISE, a program goes through all examples that use its row and adds to out [V, O]. Otherwise it goes
    through one example and sets out [M, V].
    """
    begin = tl.program_id(0)
    mine = tl.load(key + begin)
    before = tl.load(key + begin - 1, mask=begin > 0, other=-1)
    starts = before != mine
    if ELEMENTWISE:
        starts = (before // examples != mine // examples) | (before < 0)
    if (mine >= 0) & starts:
        row = mine // examples
        for k in range(cotangents):
            form = tl.zeros((BLOCK_O,), SUM)
            for first in range(0, columns, BLOCK_O):
                o = first + tl.arange(0, BLOCK_O)
                total = tl.zeros((BLOCK_O,), SUM)
                at = begin
                current = mine
                while (current >= 0) & (current // examples == row) & (ELEMENTWISE | (current == mine)):
                    m = k * examples + current % examples
                    gradient = tl.zeros((BLOCK_O,), SUM)
                    example = current
                    while current == example:
                        s = tl.load(order + at) % positions
                        gradient += tl.load(g + m * g_m + s * g_s + o * g_o, mask=o < columns, other=0.0).to(SUM)
                        at += 1
                        current = tl.load(key + at, mask=at < tokens, other=-1)
                    if ELEMENTWISE:
                        total += tl.load(weight + m) * gradient * gradient
                    else:
                        total = gradient * gradient
                if ELEMENTWISE:
                    place = out + row * columns + o
                    tl.store(place, tl.load(place, mask=o < columns, other=0.0) + total, mask=o < columns)
                else:
                    form += total
            if not ELEMENTWISE:
                tl.store(out + (k * examples + mine % examples) * num_rows + row, tl.sum(form, 0))


def _run(out: Tensor, index: Tensor, g: Tensor, num_rows: int, weight: Tensor | None) -> None:
    examples, positions = index.shape
    inside = (index < num_rows).all()
    if index.is_cuda:
        torch._assert_async(inside, f"sq_scatter: an index is out of range for a table of {num_rows} rows")
    elif not inside:
        raise IndexError(f"sq_scatter: index {int(index.max())} is out of range for a table of {num_rows} rows")
    example = torch.arange(examples, device=index.device)[:, None]
    key, order = torch.where(index >= 0, index * examples + example, -1).flatten().sort(stable=True)
    columns = g.shape[2]
    block = power_of_two(columns, 16, 512)
    with on_device_of(g):
        scatter_kernel[(index.numel(),)](
            key,
            order,
            g,
            g if weight is None else weight.contiguous(),
            out,
            examples=examples,
            tokens=index.numel(),
            positions=positions,
            columns=columns,
            num_rows=num_rows,
            cotangents=g.shape[0] // examples,
            **dict(zip(("g_m", "g_s", "g_o"), g.stride(), strict=True)),
            ELEMENTWISE=weight is not None,
            SUM=sum_type(g.dtype),
            BLOCK_O=block,
            num_warps=1 if block <= 64 else 4,
        )


def sq_scatter(index: Tensor, g: Tensor, num_rows: int) -> Tensor:
    """As :func:`t2v_fast.ops.sq_scatter`; on a GPU an index beyond the table fails as torch's own indexing does."""
    q = g.new_zeros((g.shape[0], num_rows), dtype=accumulate_dtype(g.dtype))
    if g.numel():
        _run(q, index, g, num_rows, None)
    return q


def sq_scatter_acc_(out: Tensor, index: Tensor, g: Tensor, weight: Tensor) -> None:
    """As :func:`t2v_fast.ops.sq_scatter_acc_`."""
    if g.numel():
        _run(out, index, g, out.shape[0], weight)
