"""What the kernels of a convolution share: its geometry as arguments, and loading patches and cotangents.

Letters as in :mod:`t2v_fast.ops.reference`. P is the number of output positions. D = C / groups * kh * kw is the number
of columns of a filter, ordered (kh, kw, channel), so that channels-last inputs are read along their contiguous axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from t2v_fast.ops.geometry import conv_output_size

from .launch import operand_type, precision, sum_type

# The window of a 1x1 convolution without padding: (kernel, stride, padding, dilation).
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1))


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
    """The entries [p, d] of the patches; zero in the padding and outside the image.

    WINDOW is (kernel, stride, padding, dilation). Kernels index it, because Triton 3.6 cannot take a tuple of constants
    apart by assignment.
    """
    inside = (p < positions)[:, None] & (d < columns)[None, :]
    if FLAT:  # a 1x1 kernel that visits all pixels in order: positions are pixels, columns are channels
        return tl.load(x + p[:, None] * x_w + d[None, :] * x_c, mask=inside, other=0.0)
    tap = d // channels
    channel = d - tap * channels
    tap_h = tap // WINDOW[0][1]
    tap_w = tap - tap_h * WINDOW[0][1]
    out_h = p // out_width
    out_w = p - out_h * out_width
    h = (out_h * WINDOW[1][0] - WINDOW[2][0])[:, None] + (tap_h * WINDOW[3][0])[None, :]
    w = (out_w * WINDOW[1][1] - WINDOW[2][1])[:, None] + (tap_w * WINDOW[3][1])[None, :]
    inside = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    return tl.load(x + h * x_h + w * x_w + (channel * x_c)[None, :], mask=inside, other=0.0)


@triton.jit
def load_cotangents(g, o, p, filters, positions, out_width, g_o, g_h, g_w, FLAT: tl.constexpr):
    """The cotangents [o, p] of one row and group."""
    if FLAT:
        place = p * g_w
    else:
        out_h = p // out_width
        place = out_h * g_h + (p - out_h * out_width) * g_w
    inside = (o < filters)[:, None] & (p < positions)[None, :]
    return tl.load(g + (o * g_o)[:, None] + place[None, :], mask=inside, other=0.0)


@dataclass(frozen=True, eq=False)
class ConvGeometry:
    """A convolution of ``x``; ``window`` is (kernel, stride, padding, dilation)."""

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
    def pixels(self) -> ConvGeometry:
        """The 1x1 convolution of the same image: each pixel is a patch."""
        return replace(self, window=POINTWISE)

    def image(self) -> dict[str, int]:
        """The kernels' arguments that describe the input."""
        return {
            "positions": self.positions,
            "height": self.x.shape[2],
            "width": self.x.shape[3],
            "out_width": self.out_size[1],
        } | _strides("x_n x_c x_h x_w", self.x)

    def constants(self) -> dict[str, object]:
        """The compile-time arguments of every kernel."""
        return {"WINDOW": self.window, "SUM": sum_type(self.x.dtype)}

    def products(self) -> dict[str, object]:
        """The arguments of kernels that multiply patches as matrices."""
        return {
            "columns": self.columns,
            "channels": self.channels,
            "FLAT": self.window == POINTWISE and _is_flat(self.x),
            "OPERAND": operand_type(self.x.dtype),
            "PRECISION": precision(),
        }

    def key(self, g: Tensor) -> tuple[object, ...]:
        """What the best block sizes depend on, except the number of examples."""
        return (g.dtype, *self.x.shape[1:], g.shape[1], self.window, self.groups, self.x.stride(), precision())


def _strides(names: str, t: Tensor) -> dict[str, int]:
    return dict(zip(names.split(), t.stride(), strict=True))


def _is_flat(t: Tensor) -> bool:
    """Whether a constant stride leads through all pixels of an image."""
    return t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3)


def cotangent_arguments(g: Tensor) -> dict[str, object]:
    """The kernels' arguments that describe the cotangent ``g``."""
    return _strides("g_m g_o g_h g_w", g) | {"FLAT_G": _is_flat(g)}


def conv_geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    """The geometry from the arguments of an op."""
    return ConvGeometry(x, tuple(map(tuple, (kernel, stride, padding, dilation))), groups)
