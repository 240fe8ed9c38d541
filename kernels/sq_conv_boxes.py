"""The explicit path of ``sq_conv`` by tensor descriptors, for convolutions of stride 1 on tensor cores.

What one tap of the kernel reads for a rectangle of output positions is a box of the image, which the tensor memory
accelerator (TMA) of Hopper and later cards copies with one instruction. It writes zeros for what lies outside the
image, so that padding needs no code, and neither do edges. Where a card or a tensor is not suited, the kernel of
``sq_conv_explicit`` computes the same.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .launch import interpreted, on_device_of, operand_type, power_of_two, precision, run_best, sum_type
from .sq_conv_geometry import ConvGeometry

FEWEST_CHANNELS = 32  # below, most of a box would be zeros
ALIGNMENT = 16  # bytes, of addresses and of every stride but the last


@triton.jit
def boxes_kernel(
    x,
    g,
    out,
    examples,
    rows,
    filters,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_n,
    x_h,
    x_w,
    g_m,
    g_h,
    g_w,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The filter sums of one row, a block of filters, and a block of channels at one tap.  out [rows, tiles, O]."""
    tiles_o = tl.cdiv(filters, BLOCK_O)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    m = tl.program_id(0) // tiles_o
    o = (tl.program_id(0) % tiles_o) * BLOCK_O
    tap = tl.program_id(1) // tiles_c
    c = (tl.program_id(1) % tiles_c) * BLOCK_C
    tap_h = tap // WINDOW[0][1]
    down = tap_h * WINDOW[3][0] - WINDOW[2][0]
    right = (tap - tap_h * WINDOW[0][1]) * WINDOW[3][1] - WINDOW[2][1]
    images = tl.make_tensor_descriptor(
        x, [examples, height, width, channels], [x_n, x_h, x_w, 1], [1, BLOCK_H, BLOCK_W, BLOCK_C]
    )
    cotangents = tl.make_tensor_descriptor(
        g, [rows, out_height, out_width, filters], [g_m, g_h, g_w, 1], [1, BLOCK_H, BLOCK_W, BLOCK_O]
    )
    across = tl.cdiv(out_width, BLOCK_W)
    gradient = tl.zeros((BLOCK_O, BLOCK_C), SUM)
    for box in range(across * tl.cdiv(out_height, BLOCK_H)):
        h = box // across * BLOCK_H
        w = box % across * BLOCK_W
        a = cotangents.load([m, h, w, o]).reshape(BLOCK_H * BLOCK_W, BLOCK_O)
        b = images.load([m % examples, h + down, w + right, c]).reshape(BLOCK_H * BLOCK_W, BLOCK_C)
        gradient = tl.dot(tl.trans(a.to(OPERAND)), b.to(OPERAND), gradient, input_precision=PRECISION, out_dtype=SUM)
    place = o + tl.arange(0, BLOCK_O)
    out += (m.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * filters
    tl.store(out + place, tl.sum(gradient * gradient, 1), mask=place < filters)


@functools.cache
def _card_has_boxes(device: torch.device) -> bool:
    return hasattr(tl, "make_tensor_descriptor") and torch.cuda.get_device_capability(device) >= (9, 0)


def _is_box_source(t: Tensor) -> bool:
    """Whether a descriptor can describe the images [N, C, H, W] as [N, H, W, C]."""
    strides = [t.stride(axis) * t.element_size() for axis in (0, 2, 3)]
    aligned = t.data_ptr() % ALIGNMENT == 0 and all(s % ALIGNMENT == 0 and s > 0 for s in strides)
    return t.stride(1) == 1 and aligned and max(t.shape) < 2**31


def fits_boxes(geometry: ConvGeometry, g: Tensor) -> bool:
    """Whether :func:`boxes_sums` can compute the filter sums."""
    x = geometry.x
    return (
        (x.element_size() == 2 or (x.dtype == torch.float32 and precision() == "tf32"))
        and geometry.window[1] == (1, 1)
        and geometry.groups == 1
        and min(geometry.channels, g.shape[1]) >= FEWEST_CHANNELS
        and _is_box_source(x)
        and _is_box_source(g)
        and (interpreted() or (x.is_cuda and _card_has_boxes(x.device)))
    )


def boxes_blocks(itemsize: int, filters: int, channels: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Candidates (filters, channels, box height, box width, warps, stages), the default first.

    The default's factors are so large that two programs fit a processor's shared memory.
    """
    found = []
    positions = 128 // itemsize
    for o, c, warps, stages in ((128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 8, 4)):
        # Of the boxes with so many positions, the one that covers the image with the fewest.
        down = min(
            (2**k for k in range(positions.bit_length())),
            key=lambda h: (triton.cdiv(height, h) * triton.cdiv(width, positions // h), h),
        )
        shape = (power_of_two(filters, 32, o), power_of_two(channels, 32, c), down, positions // down)
        found.append((*shape, warps, stages))
    return list(dict.fromkeys(found))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that programs write."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _boxes(geometry: ConvGeometry, g: Tensor, blocks: tuple[int, ...]) -> Tensor:
    block_o, block_c, block_h, block_w, warps, stages = blocks
    x, rows, filters = geometry.x, g.shape[0], g.shape[1]
    tiles = geometry.kernel[0] * geometry.kernel[1] * triton.cdiv(geometry.channels, block_c)
    out = g.new_empty((rows, tiles, filters), dtype=accumulate_dtype(g.dtype))
    with on_device_of(g):
        triton.set_allocator(_scratch)
        boxes_kernel[(rows * triton.cdiv(filters, block_o), tiles)](
            x,
            g,
            out,
            examples=x.shape[0],
            rows=rows,
            filters=filters,
            channels=geometry.channels,
            height=x.shape[2],
            width=x.shape[3],
            out_height=g.shape[2],
            out_width=g.shape[3],
            x_n=x.stride(0),
            x_h=x.stride(2),
            x_w=x.stride(3),
            g_m=g.stride(0),
            g_h=g.stride(2),
            g_w=g.stride(3),
            WINDOW=geometry.window,
            SUM=sum_type(x.dtype),
            OPERAND=operand_type(x.dtype),
            PRECISION=precision(),
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            num_warps=warps,
            num_stages=stages,
        )
    return out.sum(1) if tiles > 1 else out[:, 0]


def boxes_sums(geometry: ConvGeometry, g: Tensor) -> Tensor:
    """Filter sums [M, O] of a convolution that :func:`fits_boxes`."""
    candidates = boxes_blocks(g.element_size(), g.shape[1], geometry.channels, g.shape[2], g.shape[3])
    key = ("boxes", *geometry.key(g))
    return run_best(key, candidates, lambda blocks: _boxes(geometry, g, blocks))
