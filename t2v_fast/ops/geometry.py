"""The geometry of convolutions, shared by the ops, the planner and the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial output size of a convolution, one entry per spatial axis."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def per_axis(given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each of ``axes`` axes: a single number is repeated."""
    if isinstance(given, int):
        return (given,) * axes
    return tuple(given) * axes if len(given) == 1 else tuple(given)


def winograd_fits(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether the ``"winograd"`` path of ``sq_conv`` can compute a convolution of this geometry."""
    return tuple(kernel_size) == (3, 3) and {*stride, *dilation, groups} == {1}


def gram_by_pixels(pixels: int, positions: int, channels: int, taps: int) -> bool:
    """Whether a GPU computes the Gram matrix of a group's patches faster from the pixels' Gram matrix.

    The alternative is to multiply the patches directly. The two are compared by multiply-adds; a gathered entry counts
    as 16, because it moves 4 bytes from cache.
    """
    return pixels**2 * channels + 16 * taps * positions**2 < positions**2 * channels * taps
