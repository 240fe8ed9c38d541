"""The gram path of ``sq_conv``, q = g_o^T K g_o, and its halves ``conv_gram`` and ``sq_gram``.

A program computes one tile of K = U^T U, either from the patches or by summing the pixels' Gram matrix over the taps of
the kernel, and evaluates the forms of every filter while the tile is on the chip. K is symmetric: tiles below the
diagonal are skipped, and tiles above it count twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.geometry import gram_by_pixels
from t2v_fast.ops.reference import accumulate_dtype

from .launch import (
    on_device_of,
    operand_type,
    power_of_two,
    precision,
    processors,
    run_best,
    shared_memory,
    sum_type,
)
from .sq_conv_geometry import (
    POINTWISE,
    ConvGeometry,
    conv_geometry,
    cotangent_arguments,
    load_cotangents,
    load_patches,
)

# The source of the tiles of K: the patches, the pixels' Gram matrix, or K itself in memory.
PATCHES, PIXELS, STORED = 0, 1, 2
LARGEST_GRID = 2**31 - 1  # most programs along the first axis of a grid
WIDE = 200 << 10  # bytes of shared memory of a program: an H100 has 227 KiB, and an A100, which lacks registers, 163
LARGEST_WORKSPACE = 1 << 28  # most bytes of pixels' Gram matrices that are held at once


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
        for tap in range(WINDOW[0][0] * WINDOW[0][1]):
            tap_h = tap // WINDOW[0][1]
            down = tap_h * WINDOW[3][0] - WINDOW[2][0]
            right = (tap - tap_h * WINDOW[0][1]) * WINDOW[3][1] - WINDOW[2][1]
            h, w = i_h * WINDOW[1][0] + down, i_w * WINDOW[1][1] + right
            i_inside = (i < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            i_pixel = h * width + w
            h, w = j_h * WINDOW[1][0] + down, j_w * WINDOW[1][1] + right
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
    """Store the tiles of K, [N, groups, P, P]: whole, or folded into the upper triangle."""
    tiles = tl.cdiv(positions, BLOCK_P)
    row = tl.program_id(0) % (tiles * tiles) // tiles
    column = tl.program_id(0) % tiles
    matrix = tl.program_id(0) // (tiles * tiles)
    n = matrix // groups
    group = matrix % groups
    i = row * BLOCK_P + tl.arange(0, BLOCK_P)
    j = column * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (i < positions)[:, None] & (j < positions)[None, :]
    out += matrix.to(tl.int64) * positions * positions
    place = i[:, None] * positions + j[None, :]
    if column >= row:
        tile = gram_tile(
            x + n.to(tl.int64) * x_n + group.to(tl.int64) * channels * x_c,
            gram + matrix.to(tl.int64) * height * width * height * width,
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
def leading(values, DROPPED: tl.constexpr):
    """The float32 values, rounded to as many bits as are left without the last DROPPED ones."""
    bits = values.to(tl.int32, bitcast=True) + (1 << (DROPPED - 1))
    return (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def quadratic_kernel(
    x,
    gram,
    g,
    out,
    plain,
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
    TERMS: tl.constexpr,
    DROPPED: tl.constexpr,
    FACTOR: tl.constexpr,
    FORM_PRECISION: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_i^T K[i, j] g_j for one pair of blocks, all cotangents and a share of the filters.  out [M, pairs, O].

    K is a sum of TERMS terms of the type FACTOR (see form_terms). With PLAIN, the sums of g_j go to plain
    [M, tiles, O]: the gradients of a bias, from cotangents that are on the chip anyway.
    """
    tiles = tl.cdiv(positions, BLOCK_P)
    row = tl.program_id(0) % (tiles * tiles) // tiles
    column = tl.program_id(0) % tiles
    if column >= row:
        matrix = tl.program_id(0) // (tiles * tiles)
        n = matrix // groups
        group = matrix % groups
        i = row * BLOCK_P + tl.arange(0, BLOCK_P)
        j = column * BLOCK_P + tl.arange(0, BLOCK_P)
        size = positions if SOURCE == 2 else height * width
        tile = gram_tile(
            x + n.to(tl.int64) * x_n + group.to(tl.int64) * channels * x_c,
            gram + matrix.to(tl.int64) * size * size,
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
        first = tile
        second = tile
        third = tile
        if TERMS > 1:
            first = leading(tile, DROPPED)
            second = leading(tile - first, DROPPED)
            third = tile - first - second
        share = tl.cdiv(tl.cdiv(filters, BLOCK_O), tl.num_programs(1)) * BLOCK_O
        begin = tl.program_id(1) * share
        for k in range(cotangents):
            m = (n + tl.cast(k, tl.int64) * examples).to(tl.int64)
            g_row = g + m * g_m + group.to(tl.int64) * filters * g_o
            for start in range(begin, tl.minimum(begin + share, filters), BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                a = load_cotangents(g_row, o, i, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                b = load_cotangents(g_row, o, j, filters, positions, out_width, g_o, g_h, g_w, FLAT_G)
                if PLAIN:
                    place = (m * tiles + column) * groups * filters + group * filters + o
                    tl.store(plain + place, tl.sum(b.to(SUM), 1), mask=(o < filters) & (column == row))
                a = a.to(FACTOR)
                product = tl.dot(a, first.to(FACTOR), input_precision=FORM_PRECISION, out_dtype=SUM)
                if TERMS > 1:
                    product = tl.dot(a, second.to(FACTOR), product, input_precision=FORM_PRECISION, out_dtype=SUM)
                if TERMS > 2:
                    product = tl.dot(a, third.to(FACTOR), product, input_precision=FORM_PRECISION, out_dtype=SUM)
                form = tl.sum(product * b.to(SUM), 1)
                place = (m * pairs + pair) * groups * filters + group * filters + o
                tl.store(out + place, form, mask=o < filters)


def form_terms(dtype: torch.dtype, positions: int) -> dict[str, object]:
    """How quadratic forms of ``dtype`` cotangents multiply K, which is float32 (or float64 for float64 cotangents).

    Half-precision cotangents are multiplied on tensor cores. K is split into terms, so that little or nothing of it is
    lost. Three bfloat16 terms hold all bits of a float32 value. Two have an error of at most 2^-18, and errors of many
    entries cancel, so that two are used for 64 positions or more: forms of independent values then have a relative
    error of 1e-6, and 6e-5 where the cotangents of a filter sum to zero and all inputs are positive. Plain torch has
    4e-3 in either case (tests/ops/test_forms.py). float16 cotangents and K in two terms are multiplied in TF32, which
    has all bits of float16 and the range of float32.
    """
    if dtype == torch.bfloat16:
        terms, dropped, factor, exactness = 2 if positions >= 64 else 3, 16, operand_type(dtype), "ieee"
    elif dtype == torch.float16:
        terms, dropped, factor, exactness = 2, 13, sum_type(dtype), "tf32"
    else:
        terms, dropped, factor, exactness = 1, 0, sum_type(dtype), precision()
    return {"TERMS": terms, "DROPPED": dropped, "FACTOR": factor, "FORM_PRECISION": exactness}


def gram_blocks(
    dtype: torch.dtype, filters: int, positions: int, columns: int, wide: bool = False
) -> list[tuple[int, ...]]:
    """Candidates (filters, positions, columns, warps, stages), the default first.

    ``wide`` allows blocks that need WIDE bytes of shared memory. A pair of blocks of 128 positions reads as many
    cotangents as one of 64, for four times as many products.
    """
    if dtype == torch.float64:
        sizes = [(32, 32, 16, 4, 2)]
    elif dtype != torch.float32:
        sizes = [(128, 64, 32, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 8, 2), (32, 64, 32, 4, 3)]
    elif precision() == "ieee":
        sizes = [(16, 64, 16, 8, 2), (32, 32, 16, 2, 2)]
    else:
        sizes = [(64, 64, 32, 8, 2), (32, 64, 32, 4, 3)]
    if wide and positions > 64 and dtype == torch.bfloat16:
        sizes.insert(0, (64, 128, 64, 8, 2))
    elif wide and positions > 64 and dtype == torch.float32 and precision() == "tf32":
        sizes.insert(0, (64, 128, 32, 8, 2))
    return list(
        dict.fromkeys(
            (power_of_two(filters, 16, o), power_of_two(positions, 16, p), power_of_two(columns, 16, d), w, s)
            for o, p, d, w, s in sizes
        )
    )


def gram_grid(geometry: ConvGeometry, block_p: int) -> tuple[int]:
    """A program for each tile of each matrix, all along axis 0: the other axes of a grid end at 65,535 programs."""
    programs = geometry.x.shape[0] * geometry.groups * triton.cdiv(geometry.positions, block_p) ** 2
    if programs > LARGEST_GRID:
        raise ValueError(
            f"{programs:,} tiles of Gram matrices are more than a grid holds: use smaller batches or images"
        )
    return (programs,)


def _gram(geometry: ConvGeometry, source: int, pixels: Tensor | None, fold: bool, blocks: tuple[int, ...]) -> Tensor:
    """K [N, groups, P, P], whole or folded."""
    _, block_p, block_d, warps, stages = blocks
    x, positions = geometry.x, geometry.positions
    out = x.new_empty((x.shape[0], geometry.groups, positions, positions), dtype=accumulate_dtype(x.dtype))
    with on_device_of(x):
        gram_kernel[gram_grid(geometry, block_p)](
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


def _quadratic(
    geometry: ConvGeometry, g: Tensor, source: int, gram: Tensor | None, blocks: tuple[int, ...], plain: bool = False
) -> Tensor:
    """Filter sums [M, O] from the quadratic forms; with ``plain`` [2, M, O], and then the squares of the sums of g."""
    block_o, block_p, block_d, warps, stages = blocks
    x, groups = geometry.x, geometry.groups
    filters = g.shape[1] // groups
    tiles = triton.cdiv(geometry.positions, block_p)
    pairs = tiles * (tiles + 1) // 2
    # Tiles that are read and not computed are cheap: several programs may read one, each for a share of the filters.
    shares = 1 if source == PATCHES else 4 * processors(g) // (x.shape[0] * groups * pairs)
    shares = min(max(shares, 1), triton.cdiv(filters, block_o))
    out = g.new_empty((g.shape[0], pairs, g.shape[1]), dtype=accumulate_dtype(g.dtype))
    biases = out.new_empty((g.shape[0], tiles, g.shape[1])) if plain else out
    with on_device_of(g):
        quadratic_kernel[(*gram_grid(geometry, block_p), shares)](
            x,
            x if gram is None else gram,
            g,
            out,
            biases,
            examples=x.shape[0],
            cotangents=g.shape[0] // x.shape[0],
            groups=groups,
            filters=filters,
            SOURCE=source,
            PLAIN=plain,
            BLOCK_O=block_o,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=stages,
            **geometry.image(),
            **cotangent_arguments(g),
            **geometry.constants(),
            **geometry.products(),
            **form_terms(g.dtype, geometry.positions),
        )
    q = out.sum(1) if pairs > 1 else out[:, 0]
    return torch.stack([q, biases.sum(1).square_()]) if plain else q


def gram_source(geometry: ConvGeometry) -> int:
    """PATCHES or PIXELS: whichever makes K cheaper to compute."""
    pixels = math.prod(geometry.x.shape[2:])
    shared = gram_by_pixels(pixels, geometry.positions, geometry.channels, math.prod(geometry.kernel))
    return PIXELS if shared and geometry.window != POINTWISE else PATCHES


def _pixels(geometry: ConvGeometry) -> Tensor:
    """The Gram matrices of the pixels."""
    pixels = geometry.pixels
    candidates = gram_blocks(geometry.x.dtype, 16, pixels.positions, pixels.columns)
    key = ("pixels", *geometry.key(geometry.x))
    return run_best(key, candidates, lambda blocks: _gram(pixels, PATCHES, None, False, blocks))


def gram_sums(geometry: ConvGeometry, g: Tensor) -> Tensor:
    """Filter sums by the gram path, for as many examples at a time as the workspace holds Gram matrices."""
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
            sums[:, piece] = gram_sums(part, whole[:, piece].flatten(0, 1)).unflatten(0, (-1, part.x.shape[0]))
        return q
    gram = _pixels(geometry) if source == PIXELS else None
    key = ("quadratic", source, *geometry.key(g))
    return run_best(key, _blocks(geometry, g), lambda blocks: _quadratic(geometry, g, source, gram, blocks))


def linear_sums(geometry: ConvGeometry, g: Tensor) -> Tensor:
    """[2, M, O]: the filter sums of a 1x1 convolution by the gram path, and the squares of its bias's gradients."""
    key = ("linear", *geometry.key(g))
    return run_best(key, _blocks(geometry, g), lambda blocks: _quadratic(geometry, g, PATCHES, None, blocks, True))


def _blocks(geometry: ConvGeometry, g: Tensor) -> list[tuple[int, ...]]:
    wide = geometry.window == POINTWISE and shared_memory(g) >= WIDE
    return gram_blocks(g.dtype, g.shape[1] // geometry.groups, geometry.positions, geometry.columns, wide)


def conv_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As :func:`t2v_fast.ops.conv_gram`."""
    geometry = conv_geometry(x, kernel_size, stride, padding, dilation, groups)
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
    return _stored(gram, g, False)


def linear_forms(gram: Tensor, g: Tensor) -> Tensor:
    """[2, M, O]: as :func:`linear_sums`, with Gram matrices that are there already."""
    return _stored(gram, g, True)


def _stored(gram: Tensor, g: Tensor, plain: bool) -> Tensor:
    if g.numel() == 0:
        return g.new_zeros((*([2] if plain else []), *g.shape[:2]), dtype=accumulate_dtype(g.dtype))
    gram = gram.contiguous()
    # The kernel takes no layer input here. A slice of g, which has the size of the image, stands for it.
    x = g[: gram.shape[0], : gram.shape[1]]
    geometry = ConvGeometry(x, POINTWISE, gram.shape[1])
    candidates = gram_blocks(g.dtype, g.shape[1] // gram.shape[1], geometry.positions, 16)
    key = ("stored", plain, *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _quadratic(geometry, g, STORED, gram, blocks, plain))
