"""Convolutions, and linear layers as convolutions of an image of one row: sums of squares without an unfolded copy.

Letters as in :mod:`t2v_fast.ops.reference`; P output positions, D = C / groups * kh * kw columns of a filter, ordered
(kh, kw, channel) so that channels-last inputs are read along their contiguous axis.

- *explicit*: G_m = g_m U_n^T by tiles, an implicit product whose epilogue squares and reduces.
- *gram*: q = g_o^T K g_o. A program forms one tile of K = U^T U, from the patches or by summing the pixels' Gram matrix
  over the kernel's taps, and evaluates every filter's form on it while it is on the chip. K is symmetric: tiles below
  the diagonal are skipped and those above count twice.

Partial results lie side by side and are summed in a fixed order, so every result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.geometry import conv_output_size, gram_by_pixels
from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, operand_type, power_of_two, precision, processors, run_best, sum_type

# Where the tiles of a Gram matrix come from.
PATCHES, PIXELS, STORED = 0, 1, 2
PIXELWISE = ((1, 1), (1, 1), (0, 0), (1, 1))  # a window on each pixel
LARGEST_WORKSPACE = 1 << 28  # bytes of pixels' Gram matrices that are held at once


@triton.jit
def load_patches(
    x,
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
    FLAT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The patches' entries [p, d]; zero in the padding and beyond the edges."""
    inside = (p < positions)[:, None] & (d < columns)[None, :]
    if FLAT:  # a kernel of one pixel that visits every one in order: positions are pixels, columns are channels
        return tl.load(x + p[:, None] * x_w + d[None, :] * x_c, mask=inside, other=0.0)
    KERNEL, STRIDE, PAD, DILATION = WINDOW
    tap = d // channels
    channel = d - tap * channels
    tap_h = tap // KERNEL[1]
    tap_w = tap - tap_h * KERNEL[1]
    out_h = p // out_width
    out_w = p - out_h * out_width
    h = (out_h * STRIDE[0] - PAD[0])[:, None] + (tap_h * DILATION[0])[None, :]
    w = (out_w * STRIDE[1] - PAD[1])[:, None] + (tap_w * DILATION[1])[None, :]
    inside = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    return tl.load(x + h * x_h + w * x_w + (channel * x_c)[None, :], mask=inside, other=0.0)


@triton.jit
def load_cotangents(g, o, p, filters, positions, out_width, g_o, g_h, g_w, FLAT: tl.constexpr):
    """Cotangents [o, p] of one row and group."""
    if FLAT:
        place = p * g_w
    else:
        out_h = p // out_width
        place = out_h * g_h + (p - out_h * out_width) * g_w
    inside = (o < filters)[:, None] & (p < positions)[None, :]
    return tl.load(g + (o * g_o)[:, None] + place[None, :], mask=inside, other=0.0)


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
    """One tile of the gradients of a chunk of rows; ``filters`` and ``channels`` are those of a group.

    out: filter sums of each tile of columns [rows, tiles of D, O], or elementwise sums of each chunk [chunks, O, D].
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
    """One input channel a group: no product to speak of, each operand is read once from memory and then from cache.

    out: [rows, O], or [chunks, O, kh kw].
    """
    KERNEL, STRIDE, PAD, DILATION = WINDOW
    tiles_o = tl.cdiv(filters, BLOCK_O)
    chunk = tl.program_id(0) // tiles_o
    o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = o // filters_per_channel
    first = chunk * rows_per_chunk
    q = tl.zeros((BLOCK_O,), SUM)
    for tap in range(KERNEL[0] * KERNEL[1]):
        tap_h = tap // KERNEL[1]
        tap_w = tap - tap_h * KERNEL[1]
        total = tl.zeros((BLOCK_O,), SUM)
        for m in range(first, tl.minimum(first + rows_per_chunk, rows)):
            g_row = g + tl.cast(m, tl.int64) * g_m
            x_row = x + tl.cast(m % examples, tl.int64) * x_n
            gradient = tl.zeros((BLOCK_O, BLOCK_P), SUM)
            for start in range(0, positions, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                a = load_cotangents(g_row, o, p, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                out_h = p // out_width
                h = out_h * STRIDE[0] - PAD[0] + tap_h * DILATION[0]
                w = (p - out_h * out_width) * STRIDE[1] - PAD[1] + tap_w * DILATION[1]
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
            place = (chunk.to(tl.int64) * filters + o) * (KERNEL[0] * KERNEL[1]) + tap
            tl.store(out + place, total, mask=o < filters)
        else:
            q += total
    if not ELEMENTWISE:
        tl.store(out + chunk.to(tl.int64) * filters + o, q, mask=o < filters)


@triton.jit
def gram_tile(
    x,
    gram,
    i,
    j,
    positions,
    columns,
    channels,
    height,
    width,
    out_width,
    x_c,
    x_h,
    x_w,
    SOURCE: tl.constexpr,
    FLAT: tl.constexpr,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K[i, j] for two blocks of positions of one example and group.

    ``gram`` is the pixels' Gram matrix where SOURCE is PIXELS (1), and K itself where it is STORED (2).
    """
    KERNEL, STRIDE, PAD, DILATION = WINDOW
    tile = tl.zeros((BLOCK_P, BLOCK_P), SUM)
    if SOURCE == 2:
        inside = (i < positions)[:, None] & (j < positions)[None, :]
        tile = tl.load(gram + i[:, None] * positions + j[None, :], mask=inside, other=0.0)
    elif SOURCE == 1:
        i_h = i // out_width
        i_w = i - i_h * out_width
        j_h = j // out_width
        j_w = j - j_h * out_width
        pixels = height * width
        for tap in range(KERNEL[0] * KERNEL[1]):
            tap_h = tap // KERNEL[1]
            down = tap_h * DILATION[0] - PAD[0]
            right = (tap - tap_h * KERNEL[1]) * DILATION[1] - PAD[1]
            h, w = i_h * STRIDE[0] + down, i_w * STRIDE[1] + right
            i_inside = (i < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            i_pixel = h * width + w
            h, w = j_h * STRIDE[0] + down, j_w * STRIDE[1] + right
            j_inside = (j < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = i_pixel[:, None] * pixels + (h * width + w)[None, :]
            tile += tl.load(gram + place, mask=i_inside[:, None] & j_inside[None, :], other=0.0)
    else:
        for start in range(0, columns, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            a = load_patches(
                x,
                i,
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
            b = load_patches(
                x,
                j,
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
            tile = tl.dot(a.to(OPERAND), tl.trans(b.to(OPERAND)), tile, input_precision=PRECISION, out_dtype=SUM)
    return tile


@triton.jit
def gram_kernel(
    x,
    gram,
    out,
    groups,
    positions,
    columns,
    channels,
    height,
    width,
    out_width,
    x_n,
    x_c,
    x_h,
    x_w,
    SOURCE: tl.constexpr,
    FOLD: tl.constexpr,
    FLAT: tl.constexpr,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles of K to memory, [N, groups, P, P]: whole, or folded into the upper triangle."""
    tiles = tl.cdiv(positions, BLOCK_P)
    row = tl.program_id(1) // tiles
    column = tl.program_id(1) % tiles
    n = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    i = row * BLOCK_P + tl.arange(0, BLOCK_P)
    j = column * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (i < positions)[:, None] & (j < positions)[None, :]
    out += tl.program_id(0).to(tl.int64) * positions * positions
    place = i[:, None] * positions + j[None, :]
    if column >= row:
        tile = gram_tile(
            x + n.to(tl.int64) * x_n + group.to(tl.int64) * channels * x_c,
            gram + tl.program_id(0).to(tl.int64) * height * width * height * width,
            i,
            j,
            positions,
            columns,
            channels,
            height,
            width,
            out_width,
            x_c,
            x_h,
            x_w,
            SOURCE,
            FLAT,
            WINDOW,
            SUM,
            OPERAND,
            PRECISION,
            BLOCK_P,
            BLOCK_D,
        )
        if FOLD:
            above = i[:, None] < j[None, :]
            tile = tl.where(above, 2 * tile, tl.where(i[:, None] == j[None, :], tile, 0.0))
            tl.store(out + place, tile, mask=inside)
        else:
            tl.store(out + place, tile, mask=inside)
            tl.store(out + i[:, None] + (j * positions)[None, :], tile, mask=inside)
    elif FOLD:
        tl.store(out + place, tl.zeros((BLOCK_P, BLOCK_P), SUM), mask=inside)


@triton.jit
def quadratic_kernel(
    x,
    gram,
    g,
    out,
    examples,
    cotangents,
    groups,
    filters,
    positions,
    columns,
    channels,
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
    SOURCE: tl.constexpr,
    FLAT: tl.constexpr,
    FLAT_G: tl.constexpr,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_i^T K[i, j] g_j for one pair of blocks: every cotangent, a share of the filters.  out [M, pairs, O]."""
    tiles = tl.cdiv(positions, BLOCK_P)
    row = tl.program_id(1) // tiles
    column = tl.program_id(1) % tiles
    if column >= row:
        n = tl.program_id(0) // groups
        group = tl.program_id(0) % groups
        i = row * BLOCK_P + tl.arange(0, BLOCK_P)
        j = column * BLOCK_P + tl.arange(0, BLOCK_P)
        size = positions if SOURCE == 2 else height * width
        tile = gram_tile(
            x + n.to(tl.int64) * x_n + group.to(tl.int64) * channels * x_c,
            gram + tl.program_id(0).to(tl.int64) * size * size,
            i,
            j,
            positions,
            columns,
            channels,
            height,
            width,
            out_width,
            x_c,
            x_h,
            x_w,
            SOURCE,
            FLAT,
            WINDOW,
            SUM,
            OPERAND,
            PRECISION,
            BLOCK_P,
            BLOCK_D,
        )
        if SOURCE != 2 and column > row:
            tile = 2 * tile
        pair = row * tiles - (row * (row - 1)) // 2 + column - row
        pairs = tiles * (tiles + 1) // 2
        share = tl.cdiv(tl.cdiv(filters, BLOCK_O), tl.num_programs(2)) * BLOCK_O
        begin = tl.program_id(2) * share
        for k in range(cotangents):
            m = (n + tl.cast(k, tl.int64) * examples).to(tl.int64)
            g_row = g + m * g_m + group.to(tl.int64) * filters * g_o
            for start in range(begin, tl.minimum(begin + share, filters), BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                a = load_cotangents(g_row, o, i, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                b = load_cotangents(g_row, o, j, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                product = tl.dot(a.to(SUM), tile, input_precision=PRECISION, out_dtype=SUM)
                form = tl.sum(product * b.to(SUM), 1)
                place = (m * pairs + pair) * groups * filters + group * filters + o
                tl.store(out + place, form, mask=o < filters)


@dataclass(frozen=True, eq=False)
class _Geometry:
    """A convolution of ``x`` in the kernels' terms; ``window`` is (kernel, stride, padding, dilation)."""

    x: Tensor
    window: tuple[tuple[int, int], ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        return self.window[0]

    @property
    def out_size(self) -> list[int]:
        return conv_output_size(self.x.shape[2:], *self.window)

    @property
    def positions(self) -> int:
        return math.prod(self.out_size)

    @property
    def channels(self) -> int:
        return self.x.shape[1] // self.groups

    @property
    def columns(self) -> int:
        return self.channels * math.prod(self.kernel)

    @property
    def pixels(self) -> _Geometry:
        """The same image, each pixel a patch."""
        return replace(self, window=PIXELWISE)

    def image(self) -> dict[str, int]:
        return {
            "positions": self.positions,
            "height": self.x.shape[2],
            "width": self.x.shape[3],
            "out_width": self.out_size[1],
        } | _strides("x_n x_c x_h x_w", self.x)

    def constants(self) -> dict[str, object]:
        return {"WINDOW": self.window, "SUM": sum_type(self.x.dtype)}

    def products(self) -> dict[str, object]:
        """What a kernel takes that multiplies patches as matrices."""
        return {
            "columns": self.columns,
            "channels": self.channels,
            "FLAT": self.window == PIXELWISE and _is_flat(self.x),
            "OPERAND": operand_type(self.x.dtype),
            "PRECISION": precision(),
        }

    def key(self, g: Tensor) -> tuple[object, ...]:
        """What the best block sizes depend on, the number of examples aside."""
        return (g.dtype, *self.x.shape[1:], g.shape[1], self.window, self.groups, self.x.stride(), precision())


def _strides(names: str, t: Tensor) -> dict[str, int]:
    return dict(zip(names.split(), t.stride(), strict=True))


def _is_flat(t: Tensor) -> bool:
    """Whether the pixels of an image lie at one distance from each other."""
    return t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3)


def _rows(g: Tensor) -> dict[str, object]:
    return _strides("g_m g_o g_h g_w", g) | {"FLAT_G": _is_flat(g)}


def _explicit(
    geometry: _Geometry, g: Tensor, weight: Tensor | None, blocks: tuple[int, ...], row_chunks: int
) -> Tensor:
    """Filter sums [M, O], or with a weight a row the elementwise sums [O, C / groups, kh, kw]."""
    block_o, block_d, block_p, warps, stages = blocks
    x, rows = geometry.x, g.shape[0]
    filters, columns = g.shape[1] // geometry.groups, geometry.columns
    tiles_o, tiles_d = triton.cdiv(filters, block_o), triton.cdiv(columns, block_d)
    per_chunk = 1 if weight is None else triton.cdiv(rows, row_chunks)
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
            **_rows(g),
            **geometry.constants(),
            **geometry.products(),
        )
    if weight is None:
        return out.sum(1) if tiles_d > 1 else out[:, 0]
    return (out.sum(0) if chunks > 1 else out[0]).view(g.shape[1], geometry.channels, *geometry.kernel)


def _depthwise(
    geometry: _Geometry, g: Tensor, weight: Tensor | None, blocks: tuple[int, ...], row_chunks: int
) -> Tensor:
    block_o, block_p, warps = blocks
    x, rows, filters = geometry.x, g.shape[0], g.shape[1]
    per_chunk = 1 if weight is None else triton.cdiv(rows, row_chunks)
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
            **_rows(g),
            **geometry.constants(),
        )
    return out if weight is None else out.sum(0)


def explicit_blocks(dtype: torch.dtype, filters: int, columns: int, positions: int) -> list[tuple[int, ...]]:
    """Candidates (filters, columns, positions, warps, stages), the default first.

    Exact float32 and float64 products run on the ordinary units, whose operands lie in registers: short blocks of
    positions. Tensor cores read theirs from shared memory: long ones.
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


def depthwise_blocks(g: Tensor) -> list[tuple[int, ...]]:
    """Candidates (channels, positions, warps), the default first: a warp reads along the contiguous axis."""
    if g.stride(1) == 1 and g.shape[1] > 1:
        sizes = [(64, 16, 4), (128, 8, 4), (32, 32, 4), (32, 8, 1)]
    else:
        sizes = [(4, 256, 4), (1, 1024, 4), (8, 128, 4), (4, 64, 2)]
    positions = g.shape[2] * g.shape[3]
    return list(dict.fromkeys((power_of_two(g.shape[1], 1, o), power_of_two(positions, 16, p), w) for o, p, w in sizes))


def _sums(geometry: _Geometry, g: Tensor, weight: Tensor | None) -> Tensor:
    """The explicit path: filter sums, or elementwise sums where there is a weight for each row."""
    filters = g.shape[1] // geometry.groups
    if geometry.channels == 1 and geometry.groups > 1:
        run, candidates = _depthwise, depthwise_blocks(g)
        programs = triton.cdiv(g.shape[1], candidates[0][0])
    else:
        run, candidates = _explicit, explicit_blocks(g.dtype, filters, geometry.columns, geometry.positions)
        programs = geometry.groups * triton.cdiv(filters, candidates[0][0])
        programs *= triton.cdiv(geometry.columns, candidates[0][1])
    # Elementwise sums go over all rows: few tiles share the rows out, so that every processor has work.
    row_chunks = min(g.shape[0], max(1, 4 * processors(g) // programs))
    key = (run.__name__, weight is not None, *geometry.key(g))
    return run_best(key, candidates, lambda blocks: run(geometry, g, weight, blocks, row_chunks))


def gram_blocks(dtype: torch.dtype, filters: int, positions: int, columns: int) -> list[tuple[int, ...]]:
    """Candidates (filters, positions, columns, warps, stages), the default first."""
    if dtype == torch.float64:
        sizes = [(32, 32, 16, 4, 2)]
    elif precision() == "ieee":
        sizes = [(16, 64, 16, 8, 2), (32, 32, 16, 2, 2)]
    else:
        sizes = [(64, 64, 32, 8, 2), (32, 64, 32, 4, 3)]
    return list(
        dict.fromkeys(
            (power_of_two(filters, 16, o), power_of_two(positions, 16, p), power_of_two(columns, 16, d), w, s)
            for o, p, d, w, s in sizes
        )
    )


def _gram(geometry: _Geometry, source: int, pixels: Tensor | None, fold: bool, blocks: tuple[int, ...]) -> Tensor:
    _, block_p, block_d, warps, stages = blocks
    x, positions = geometry.x, geometry.positions
    out = x.new_empty((x.shape[0], geometry.groups, positions, positions), dtype=accumulate_dtype(x.dtype))
    with on_device_of(x):
        gram_kernel[(x.shape[0] * geometry.groups, triton.cdiv(positions, block_p) ** 2)](
            x,
            x if pixels is None else pixels,
            out,
            groups=geometry.groups,
            SOURCE=source,
            FOLD=fold,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=stages,
            **geometry.image(),
            **geometry.constants(),
            **geometry.products(),
        )
    return out


def _quadratic(geometry: _Geometry, g: Tensor, source: int, gram: Tensor | None, blocks: tuple[int, ...]) -> Tensor:
    block_o, block_p, block_d, warps, stages = blocks
    x, groups = geometry.x, geometry.groups
    filters = g.shape[1] // groups
    tiles = triton.cdiv(geometry.positions, block_p)
    pairs = tiles * (tiles + 1) // 2
    # A tile that is only read may be read by several programs, each with a share of the filters.
    shares = 1 if source == PATCHES else 4 * processors(g) // (x.shape[0] * groups * pairs)
    shares = min(max(shares, 1), triton.cdiv(filters, block_o))
    out = g.new_empty((g.shape[0], pairs, g.shape[1]), dtype=accumulate_dtype(g.dtype))
    with on_device_of(g):
        quadratic_kernel[(x.shape[0] * groups, tiles**2, shares)](
            x,
            x if gram is None else gram,
            g,
            out,
            examples=x.shape[0],
            cotangents=g.shape[0] // x.shape[0],
            groups=groups,
            filters=filters,
            SOURCE=source,
            BLOCK_O=block_o,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=stages,
            **geometry.image(),
            **_rows(g),
            **geometry.constants(),
            **geometry.products(),
        )
    return out.sum(1) if pairs > 1 else out[:, 0]


def gram_source(geometry: _Geometry) -> int:
    """Whether K is cheaper from the patches or from the pixels' Gram matrix."""
    pixels = math.prod(geometry.x.shape[2:])
    shared = gram_by_pixels(pixels, geometry.positions, geometry.channels, math.prod(geometry.kernel))
    return PIXELS if shared and geometry.window != PIXELWISE else PATCHES


def _pixels(geometry: _Geometry) -> Tensor:
    pixels = geometry.pixels
    candidates = gram_blocks(geometry.x.dtype, 16, pixels.positions, pixels.columns)
    key = ("pixels", *geometry.key(geometry.x))
    return run_best(key, candidates, lambda blocks: _gram(pixels, PATCHES, None, False, blocks))


def _forms(geometry: _Geometry, g: Tensor) -> Tensor:
    """The gram path, K in pieces that stay within the workspace."""
    x = geometry.x
    source = gram_source(geometry)
    each = geometry.groups * math.prod(x.shape[2:]) ** 2 * accumulate_dtype(x.dtype).itemsize
    if source == PIXELS and each * x.shape[0] > LARGEST_WORKSPACE and x.shape[0] > 1:
        q = g.new_empty(g.shape[:2], dtype=accumulate_dtype(g.dtype))
        at_once = max(1, LARGEST_WORKSPACE // each)
        whole, sums = g.unflatten(0, (-1, x.shape[0])), q.unflatten(0, (-1, x.shape[0]))
        for start in range(0, x.shape[0], at_once):
            piece = slice(start, start + at_once)
            part = replace(geometry, x=x[piece])
            sums[:, piece] = _forms(part, whole[:, piece].flatten(0, 1)).unflatten(0, (-1, part.x.shape[0]))
        return q
    gram = _pixels(geometry) if source == PIXELS else None
    candidates = gram_blocks(g.dtype, g.shape[1] // geometry.groups, geometry.positions, geometry.columns)
    key = ("quadratic", source, *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _quadratic(geometry, g, source, gram, blocks))


def _geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> _Geometry:
    return _Geometry(x, tuple(map(tuple, (kernel, stride, padding, dilation))), groups)


def sq_conv(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    path: str = "explicit",
) -> Tensor:
    """As :func:`t2v_fast.ops.sq_conv`; the path ``"winograd"`` runs as ``"explicit"``."""
    if g.numel() == 0 or x.numel() == 0:
        return g.new_zeros(g.shape[:2], dtype=accumulate_dtype(g.dtype))
    geometry = _geometry(x, kernel_size, stride, padding, dilation, groups)
    return _forms(geometry, g) if path == "gram" else _sums(geometry, g, None)


def sq_conv_acc_(
    out: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    path: str = "explicit",
) -> None:
    """As :func:`t2v_fast.ops.sq_conv_acc_`."""
    if g.numel() and x.numel():
        geometry = _geometry(x, out.shape[2:], stride, padding, dilation, groups)
        out.add_(_sums(geometry, g, weight.contiguous()))


def conv_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As :func:`t2v_fast.ops.conv_gram`."""
    geometry = _geometry(x, kernel_size, stride, padding, dilation, groups)
    if x.numel() == 0:
        shape = (x.shape[0], groups, geometry.positions, geometry.positions)
        return x.new_zeros(shape, dtype=accumulate_dtype(x.dtype))
    source = gram_source(geometry)
    pixels = _pixels(geometry) if source == PIXELS else None
    candidates = gram_blocks(x.dtype, 16, geometry.positions, geometry.columns)
    key = ("gram", source, *geometry.key(x))
    return run_best(key, candidates, lambda blocks: _gram(geometry, source, pixels, True, blocks))


def sq_gram(gram: Tensor, g: Tensor) -> Tensor:
    """As :func:`t2v_fast.ops.sq_gram`."""
    if g.numel() == 0:
        return g.new_zeros(g.shape[:2], dtype=accumulate_dtype(g.dtype))
    gram = gram.contiguous()
    # The layer's input is not needed: an image of the cotangent's size stands for it.
    x = g[: gram.shape[0], : gram.shape[1]]
    geometry = _Geometry(x, PIXELWISE, gram.shape[1])
    candidates = gram_blocks(g.dtype, g.shape[1] // gram.shape[1], geometry.positions, 16)
    key = ("stored", *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _quadratic(geometry, g, STORED, gram, blocks))
