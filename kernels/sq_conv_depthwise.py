"""The explicit path of ``sq_conv`` for depthwise convolutions, which have one input channel per group.

A gradient has one entry per tap, so the kernel computes one tap at a time without a matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, power_of_two, row_chunks, run_best
from .sq_conv_geometry import ConvGeometry, cotangent_arguments, load_cotangents


@triton.jit
def depthwise_kernel(
    x,
    g,
    weight,
    out,
    examples,
    rows,
    rows_per_chunk,
    filters,
    filters_per_channel,
    positions,
    height,
    width,
    out_width,
    x_n,
    x_c,
    x_h,
    x_w,
    g_m,
    g_o,
    g_h,
    g_w,
    FLAT_G: tl.constexpr,
    WINDOW: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sums of a block of filters with one input channel each. Operands come from memory once, then from cache.

    out: [rows, O], or [chunks, O, kh kw].
    """
    tiles_o = tl.cdiv(filters, BLOCK_O)
    chunk = tl.program_id(0) // tiles_o
    o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = o // filters_per_channel
    first = chunk * rows_per_chunk
    q = tl.zeros((BLOCK_O,), SUM)
    for tap in range(WINDOW[0][0] * WINDOW[0][1]):
        tap_h = tap // WINDOW[0][1]
        tap_w = tap - tap_h * WINDOW[0][1]
        total = tl.zeros((BLOCK_O,), SUM)
        for m in range(first, tl.minimum(first + rows_per_chunk, rows)):
            g_row = g + tl.cast(m, tl.int64) * g_m
            x_row = x + tl.cast(m % examples, tl.int64) * x_n
            gradient = tl.zeros((BLOCK_O, BLOCK_P), SUM)
            for start in range(0, positions, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                a = load_cotangents(g_row, o, p, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                out_h = p // out_width
                h = out_h * WINDOW[1][0] - WINDOW[2][0] + tap_h * WINDOW[3][0]
                w = (p - out_h * out_width) * WINDOW[1][1] - WINDOW[2][1] + tap_w * WINDOW[3][1]
                inside = (p < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
                inside = (o < filters)[:, None] & inside[None, :]
                b = tl.load(x_row + (channel * x_c)[:, None] + (h * x_h + w * x_w)[None, :], mask=inside, other=0.0)
                gradient += a.to(SUM) * b.to(SUM)
            entry = tl.sum(gradient, 1)
            if ELEMENTWISE:
                total += tl.load(weight + m) * entry * entry
            else:
                total = entry * entry
        if ELEMENTWISE:
            place = (chunk.to(tl.int64) * filters + o) * (WINDOW[0][0] * WINDOW[0][1]) + tap
            tl.store(out + place, total, mask=o < filters)
        else:
            q += total
    if not ELEMENTWISE:
        tl.store(out + chunk.to(tl.int64) * filters + o, q, mask=o < filters)


def _depthwise(
    geometry: ConvGeometry, g: Tensor, weight: Tensor | None, blocks: tuple[int, ...], chunks_asked: int
) -> Tensor:
    """Filter sums [M, O], or with a weight for each row the elementwise sums [O, 1, kh, kw]."""
    block_o, block_p, warps = blocks
    x, rows, filters = geometry.x, g.shape[0], g.shape[1]
    per_chunk = 1 if weight is None else triton.cdiv(rows, chunks_asked)
    chunks = triton.cdiv(rows, per_chunk)
    shape = (rows, filters) if weight is None else (chunks, filters, 1, *geometry.kernel)
    out = g.new_empty(shape, dtype=accumulate_dtype(g.dtype))
    with on_device_of(g):
        depthwise_kernel[(chunks * triton.cdiv(filters, block_o),)](
            x,
            g,
            g if weight is None else weight,
            out,
            examples=x.shape[0],
            rows=rows,
            rows_per_chunk=per_chunk,
            filters=filters,
            filters_per_channel=filters // x.shape[1],
            ELEMENTWISE=weight is not None,
            BLOCK_O=block_o,
            BLOCK_P=block_p,
            num_warps=warps,
            **geometry.image(),
            **cotangent_arguments(g),
            **geometry.constants(),
        )
    return out if weight is None else out.sum(0)


def depthwise_blocks(g: Tensor) -> list[tuple[int, ...]]:
    """Candidates (channels, positions, warps), the default first: a warp reads along the contiguous axis."""
    if g.stride(1) == 1 and g.shape[1] > 1:
        sizes = [(64, 16, 4), (128, 8, 4), (32, 32, 4), (32, 8, 1)]
    else:
        sizes = [(4, 256, 4), (1, 1024, 4), (8, 128, 4), (4, 64, 2)]
    positions = g.shape[2] * g.shape[3]
    return list(dict.fromkeys((power_of_two(g.shape[1], 1, o), power_of_two(positions, 16, p), w) for o, p, w in sizes))


def depthwise_sums(geometry: ConvGeometry, g: Tensor, weight: Tensor | None) -> Tensor:
    """Filter sums, or elementwise sums where there is a weight for each row."""
    candidates = depthwise_blocks(g)
    chunks = row_chunks(g, triton.cdiv(g.shape[1], candidates[0][0]))
    key = ("depthwise", weight is not None, *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _depthwise(geometry, g, weight, blocks, chunks))
