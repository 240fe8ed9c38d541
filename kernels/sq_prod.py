"""Norm weights, biases and scales. Every operand is read once; a norm's weight and bias share one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import on_device_of, power_of_two, processors, run_best, sum_type


@triton.jit
def prod_kernel(
    g,
    x,
    shift,
    scale,
    out,
    examples,
    positions,
    channels,
    g_m,
    g_s,
    g_c,
    x_n,
    x_s,
    x_c,
    shift_n,
    shift_s,
    shift_c,
    scale_n,
    scale_s,
    scale_c,
    PRODUCT: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    PLAIN: tl.constexpr,
    SQUARE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over s of g (x - shift) scale (PRODUCT) and of g (PLAIN), in this order: [parts, forms, M, C].

    Each part has some of the positions. Of a single part, SQUARE gives the squares. SHIFT and SCALE are "", or the axes
    along which they vary: "c", "s", or "sc".
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    rows = (tl.num_programs(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    n = m % examples
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    product = tl.zeros((BLOCK_S, BLOCK_C), SUM)
    plain = tl.zeros((BLOCK_S, BLOCK_C), SUM)
    if SHIFT == "c":
        moved = tl.load(shift + n * shift_n + c * shift_c, mask=c < channels, other=0.0).to(SUM)[None, :]
    if SCALE == "c":
        factor = tl.load(scale + n * scale_n + c * scale_c, mask=c < channels, other=0.0).to(SUM)[None, :]
    for start in range(tl.program_id(1) * BLOCK_S, positions, tl.num_programs(1) * BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < positions)[:, None] & (c < channels)[None, :]
        a = tl.load(g + m * g_m + s[:, None] * g_s + c[None, :] * g_c, mask=inside, other=0.0).to(SUM)
        if PRODUCT:
            b = tl.load(x + n * x_n + s[:, None] * x_s + c[None, :] * x_c, mask=inside, other=0.0).to(SUM)
            if SHIFT == "s":
                moved = tl.load(shift + n * shift_n + s * shift_s, mask=s < positions, other=0.0).to(SUM)[:, None]
            elif SHIFT == "sc":
                place = n * shift_n + s[:, None] * shift_s + c[None, :] * shift_c
                moved = tl.load(shift + place, mask=inside, other=0.0).to(SUM)
            if SCALE == "s":
                factor = tl.load(scale + n * scale_n + s * scale_s, mask=s < positions, other=0.0).to(SUM)[:, None]
            elif SCALE == "sc":
                place = n * scale_n + s[:, None] * scale_s + c[None, :] * scale_c
                factor = tl.load(scale + place, mask=inside, other=0.0).to(SUM)
            if SHIFT != "":
                b -= moved
            if SCALE != "":
                b *= factor
            product += a * b
        if PLAIN:
            plain += a
    out += (tl.program_id(1) * (PRODUCT + PLAIN) * rows + m) * channels + c
    if PRODUCT:
        entry = tl.sum(product, 0)
        tl.store(out, entry * entry if SQUARE else entry, mask=c < channels)
        out += rows * channels
    if PLAIN:
        entry = tl.sum(plain, 0)
        tl.store(out, entry * entry if SQUARE else entry, mask=c < channels)


def prod_blocks(g: Tensor) -> list[tuple[int, ...]]:
    """Candidates (positions, channels, warps), the default first: a warp reads along the contiguous axis."""
    if g.stride(2) == 1 and g.shape[2] > 1:
        sizes = [(16, 64 if g.dtype == torch.float64 else 128, 4), (32, 64, 4), (8, 256, 4), (64, 32, 8)]
    else:
        sizes = [(512, 4, 4), (1024, 1, 4), (128, 8, 4)]
    return list(dict.fromkeys((power_of_two(g.shape[1], 1, s), power_of_two(g.shape[2], 1, c), w) for s, c, w in sizes))


def _parts(g: Tensor, tiles: int, block_s: int) -> int:
    """How many programs share the positions of a row, so that every processor has some; each has a few blocks."""
    wanted = triton.cdiv(8 * processors(g), g.shape[0] * tiles)
    return max(1, min(wanted, g.shape[1] // (4 * block_s)))


def _axes(t: Tensor | None, strides: tuple[int, ...]) -> str:
    """Along which of the axes of positions and channels a tensor varies, as :func:`prod_kernel` takes it."""
    if t is None:
        return ""
    return ("s" if strides[1] else "") + ("c" if strides[2] else "") or "s"


def _run(
    g: Tensor, x: Tensor | None, shift: Tensor | None, scale: Tensor | None, plain: bool, blocks: tuple[int, ...]
) -> Tensor:
    block_s, block_c, warps = blocks
    (rows, positions, channels), product = g.shape, x is not None
    tiles = triton.cdiv(channels, block_c)
    parts = _parts(g, tiles, block_s)
    out = g.new_empty((parts, product + plain, rows, channels), dtype=accumulate_dtype(g.dtype))
    image = g if x is None else x
    shift_, scale_ = (image if t is None else t.expand(image.shape) for t in (shift, scale))
    strides = zip(("x", "shift", "scale"), (image, shift_, scale_), strict=True)
    with on_device_of(g):
        prod_kernel[(rows * tiles, parts)](
            g,
            image,
            shift_,
            scale_,
            out,
            examples=image.shape[0],
            positions=positions,
            channels=channels,
            **dict(zip(("g_m", "g_s", "g_c"), g.stride(), strict=True)),
            **{f"{name}_{axis}": s for name, t in strides for axis, s in zip("nsc", t.stride(), strict=True)},
            PRODUCT=product,
            SHIFT=_axes(shift, shift_.stride()),
            SCALE=_axes(scale, scale_.stride()),
            PLAIN=plain,
            SQUARE=parts == 1,
            SUM=sum_type(g.dtype),
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            num_warps=warps,
        )
    return out[0] if parts == 1 else out.sum(0).square_()


def _squares(g: Tensor, x: Tensor | None, shift: Tensor | None, scale: Tensor | None, plain: bool) -> Tensor:
    if g.numel() == 0:
        return g.new_zeros(((x is not None) + plain, g.shape[0], g.shape[2]), dtype=accumulate_dtype(g.dtype))
    key = ("prod", g.dtype, *g.shape[1:], g.stride(), x is None, shift is None, scale is None, plain)
    return run_best(key, prod_blocks(g), lambda blocks: _run(g, x, shift, scale, plain, blocks))


def sq_prod(g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """As :func:`t2v_fast.ops.sq_prod`."""
    return _squares(g, x, shift, scale, plain=x is None)[0]


def sq_norm(g: Tensor, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """As :func:`t2v_fast.ops.sq_norm`."""
    return _squares(g, x, shift, scale, plain=True)


def sq_prod_acc_(
    out: Tensor,
    g: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As :func:`t2v_fast.ops.sq_prod_acc_`."""
    torch.add(out, (sq_prod(g, x, shift, scale) * weight[:, None]).sum(0), out=out)
