"""Convolutions, and linear layers as convolutions of an image of one row: the ops, which choose a path.

The paths are in the files ``sq_conv_explicit``, ``sq_conv_depthwise`` and ``sq_conv_gram``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .sq_conv_depthwise import depthwise_sums
from .sq_conv_explicit import explicit_sums
from .sq_conv_geometry import ConvGeometry, conv_geometry
from .sq_conv_gram import gram_sums


def _sums(geometry: ConvGeometry, g: Tensor, weight: Tensor | None) -> Tensor:
    """The explicit path: filter sums, or elementwise sums where there is a weight for each row."""
    depthwise = geometry.channels == 1 and geometry.groups > 1
    return (depthwise_sums if depthwise else explicit_sums)(geometry, g, weight)


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
    geometry = conv_geometry(x, kernel_size, stride, padding, dilation, groups)
    return gram_sums(geometry, g) if path == "gram" else _sums(geometry, g, None)


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
        geometry = conv_geometry(x, out.shape[2:], stride, padding, dilation, groups)
        out.add_(_sums(geometry, g, weight.contiguous()))
