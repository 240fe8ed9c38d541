"""The explicit path of ``sq_conv``: G_m = g_m U_n^T in tiles, which are squared and reduced before they leave the chip.

The patches U are read from the image; they are never stored. Partial results are stored side by side and summed in a
fixed order, so every result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, power_of_two, precision, row_chunks, run_best
from .sq_conv_boxes import boxes_sums, fits_boxes
from .sq_conv_geometry import ConvGeometry, cotangent_arguments, load_cotangents, load_patches


@triton.jit
def explicit_kernel(
    x,
    g,
    weight,
    out,
    examples,
    rows,
    rows_per_chunk,
    groups,
    filters,
    channels,
    columns,
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
    FLAT: tl.constexpr,
    FLAT_G: tl.constexpr,
    WINDOW: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the gradients of a chunk of rows; ``filters`` and ``channels`` count those of one group.

    out: the filter sums of each tile of columns [rows, tiles of D, O], or the elementwise sums of each chunk
    [chunks, O, D].
    """
    tiles_o = tl.cdiv(filters, BLOCK_O)
    chunk = tl.program_id(0) // (groups * tiles_o)
    tile = tl.program_id(0) % (groups * tiles_o)
    group = tile // tiles_o
    o = (tile % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += group.to(tl.int64) * channels * x_c
    g += group.to(tl.int64) * filters * g_o
    total = tl.zeros((BLOCK_O, BLOCK_D), SUM)
    first = chunk * rows_per_chunk
    for m in range(first, tl.minimum(first + rows_per_chunk, rows)):
        g_row = g + tl.cast(m, tl.int64) * g_m
        x_row = x + tl.cast(m % examples, tl.int64) * x_n
        gradient = tl.zeros((BLOCK_O, BLOCK_D), SUM)
        for start in range(0, positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            a = load_cotangents(g_row, o, p, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
            b = load_patches(
                x_row,
                p,
                d,
                positions,
                columns,
                channels,
                height,
                width,
                out_width,
                x_c,
                x_h,
                x_w,
                FLAT,
                WINDOW,
            )
            gradient = tl.dot(a.to(OPERAND), b.to(OPERAND), gradient, input_precision=PRECISION, out_dtype=SUM)
        if ELEMENTWISE:
            total += tl.load(weight + m) * gradient * gradient
        else:
            total = gradient * gradient
    o_place = (group * filters + o).to(tl.int64)
    if ELEMENTWISE:
        tap = d // channels
        place = (d - tap * channels) * (columns // channels) + tap  # from (tap, channel) to (channel, tap)
        inside = (o < filters)[:, None] & (d < columns)[None, :]
        out += chunk.to(tl.int64) * groups * filters * columns
        tl.store(out + o_place[:, None] * columns + place[None, :], total, mask=inside)
    else:
        out += (chunk.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * groups * filters
        tl.store(out + o_place, tl.sum(total, 1), mask=o < filters)


def _explicit(
    geometry: ConvGeometry, g: Tensor, weight: Tensor | None, blocks: tuple[int, ...], chunks_asked: int
) -> Tensor:
    """Filter sums [M, O], or with a weight for each row the elementwise sums [O, C / groups, kh, kw]."""
    block_o, block_d, block_p, warps, stages = blocks
    x, rows = geometry.x, g.shape[0]
    filters, columns = g.shape[1] // geometry.groups, geometry.columns
    tiles_o, tiles_d = triton.cdiv(filters, block_o), triton.cdiv(columns, block_d)
    per_chunk = 1 if weight is None else triton.cdiv(rows, chunks_asked)
    chunks = triton.cdiv(rows, per_chunk)
    shape = (rows, tiles_d, g.shape[1]) if weight is None else (chunks, g.shape[1], columns)
    out = g.new_empty(shape, dtype=accumulate_dtype(g.dtype))
    with on_device_of(g):
        explicit_kernel[(chunks * geometry.groups * tiles_o, tiles_d)](
            x,
            g,
            g if weight is None else weight,
            out,
            examples=x.shape[0],
            rows=rows,
            rows_per_chunk=per_chunk,
            groups=geometry.groups,
            filters=filters,
            ELEMENTWISE=weight is not None,
            BLOCK_O=block_o,
            BLOCK_D=block_d,
            BLOCK_P=block_p,
            num_warps=warps,
            num_stages=stages,
            **geometry.image(),
            **cotangent_arguments(g),
            **geometry.constants(),
            **geometry.products(),
        )
    if weight is None:
        return out.sum(1) if tiles_d > 1 else out[:, 0]
    return (out.sum(0) if chunks > 1 else out[0]).view(g.shape[1], geometry.channels, *geometry.kernel)


def explicit_blocks(dtype: torch.dtype, filters: int, columns: int, positions: int) -> list[tuple[int, ...]]:
    """Candidates (filters, columns, positions, warps, stages), the default first.

    Exact float32 and float64 products run on the ordinary units, which take operands from registers, so blocks of
    positions are short. Tensor cores take operands from shared memory, so blocks of positions are long.
    """
    exact = dtype == torch.float64 or (dtype == torch.float32 and precision() == "ieee")
    sizes = [(64, 64, 16, 4, 3), (32, 64, 16, 4, 3), (64, 32, 16, 2, 4), (32, 32, 16, 2, 4)]
    if dtype == torch.float64:
        sizes = [(32, 32, 16, 4, 2), (64, 32, 16, 4, 2), (16, 32, 16, 2, 2)]
    elif not exact:
        sizes = [(64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (32, 128, 32, 4, 4)]
    fitted = [
        (power_of_two(filters, 16, o), power_of_two(columns, 16, d), power_of_two(positions, 16, p), warps, stages)
        for o, d, p, warps, stages in sizes
    ]
    return list(dict.fromkeys(fitted))


def explicit_sums(geometry: ConvGeometry, g: Tensor, weight: Tensor | None) -> Tensor:
    """Filter sums, or elementwise sums where there is a weight for each row."""
    if weight is None and fits_boxes(geometry, g):
        return boxes_sums(geometry, g)
    filters = g.shape[1] // geometry.groups
    candidates = explicit_blocks(g.dtype, filters, geometry.columns, geometry.positions)
    programs = (
        geometry.groups * triton.cdiv(filters, candidates[0][0]) * triton.cdiv(geometry.columns, candidates[0][1])
    )
    chunks = row_chunks(g, programs)
    key = ("explicit", weight is not None, *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _explicit(geometry, g, weight, blocks, chunks))
