"""Linear layers over segments of rows of different lengths. A program goes through the rows of its own segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, operand_type, power_of_two, precision, sum_type


@triton.jit
def grouped_kernel(
    x,
    g,
    offsets,
    groups,
    weight,
    out,
    rows,
    segments,
    inputs,
    outputs,
    cotangents,
    x_r,
    x_i,
    g_r,
    g_o,
    ELEMENTWISE: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """With ELEMENTWISE, a program adds to a tile of out [E, O, I], from all segments of its group.

    Otherwise it sets BLOCK_O filters of out [K B, O], for one segment and one cotangent.
    """
    o_tiles = tl.cdiv(outputs, BLOCK_O)
    i_tiles = tl.cdiv(inputs, BLOCK_I)
    which = tl.program_id(0).to(tl.int64)
    o = (which % o_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    which = which // o_tiles
    if ELEMENTWISE:
        i_first = (which % i_tiles) * BLOCK_I
        i_last = i_first + BLOCK_I
        which = which // i_tiles  # the group
        first = tl.load(groups + which)
        last = tl.load(groups + which + 1)
        k_first = 0
        k_last = cotangents
    else:
        i_first = tl.zeros_like(which)
        i_last = i_first + inputs
        first = which % segments
        last = first + 1
        k_first = which // segments
        k_last = k_first + 1
    form = tl.zeros((BLOCK_O,), SUM)
    for start in range(i_first, i_last, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        total = tl.zeros((BLOCK_O, BLOCK_I), SUM)
        for b in range(first, last):
            begin = tl.load(offsets + b)
            end = tl.load(offsets + b + 1)
            for k in range(k_first, k_last):
                gradient = tl.zeros((BLOCK_O, BLOCK_I), SUM)
                for row in range(begin, end, BLOCK_R):
                    r = row + tl.arange(0, BLOCK_R)
                    a = tl.load(
                        g + (k * rows + r)[None, :] * g_r + o[:, None] * g_o,
                        mask=(r < end)[None, :] & (o < outputs)[:, None],
                        other=0.0,
                    ).to(OPERAND)
                    c = tl.load(
                        x + r[:, None] * x_r + i[None, :] * x_i,
                        mask=(r < end)[:, None] & (i < inputs)[None, :],
                        other=0.0,
                    ).to(OPERAND)
                    gradient = tl.dot(a, c, gradient, input_precision=PRECISION, out_dtype=SUM)
                if ELEMENTWISE:
                    total += tl.load(weight + k * segments + b) * gradient * gradient
                else:
                    form += tl.sum(gradient * gradient, 1)
        if ELEMENTWISE:
            place = out + (which * outputs + o)[:, None] * inputs + i[None, :]
            inside = (o < outputs)[:, None] & (i < inputs)[None, :]
            tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
    if not ELEMENTWISE:
        tl.store(out + (k_first * segments + first) * outputs + o, form, mask=o < outputs)


def _run(out: Tensor, x: Tensor, g: Tensor, offsets: Tensor, groups: Tensor | None, weight: Tensor | None) -> None:
    (rows, inputs), outputs, segments = x.shape, g.shape[1], len(offsets) - 1
    cotangents = g.shape[0] // rows
    wide = g.dtype == torch.float64
    block_o, block_i = power_of_two(outputs, 16, 32 if wide else 64), power_of_two(inputs, 16, 32 if wide else 64)
    tiles = triton.cdiv(outputs, block_o)
    if groups is not None:
        tiles *= triton.cdiv(inputs, block_i) * (len(groups) - 1)
    else:
        tiles *= segments * cotangents
    if not tiles:
        return
    with on_device_of(g):
        grouped_kernel[(tiles,)](
            x,
            g,
            offsets.contiguous(),
            offsets if groups is None else groups.contiguous(),
            g if weight is None else weight.contiguous(),
            out,
            rows=rows,
            segments=segments,
            inputs=inputs,
            outputs=outputs,
            cotangents=cotangents,
            **dict(zip(("x_r", "x_i"), x.stride(), strict=True)),
            **dict(zip(("g_r", "g_o"), g.stride(), strict=True)),
            ELEMENTWISE=groups is not None,
            OPERAND=operand_type(g.dtype),
            SUM=sum_type(g.dtype),
            PRECISION=precision(),
            BLOCK_R=16,
            BLOCK_I=block_i,
            BLOCK_O=block_o,
            num_warps=4,
        )


def sq_grouped(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """As :func:`t2v_fast.ops.sq_grouped`."""
    cotangents = g.shape[0] // x.shape[0] if x.shape[0] else 1
    q = g.new_zeros((cotangents * (len(offsets) - 1), g.shape[1]), dtype=accumulate_dtype(g.dtype))
    if g.numel() and x.numel():
        _run(q, x, g, offsets, None, None)
    return q


def sq_grouped_acc_(out: Tensor, x: Tensor, g: Tensor, offsets: Tensor, groups: Tensor, weight: Tensor) -> None:
    """As :func:`t2v_fast.ops.sq_grouped_acc_`."""
    if g.numel() and x.numel():
        _run(out, x, g, offsets, groups, weight)
