"""The ops in plain torch. They define the results, and run where no compiled kernels are available.

Letters: ``x`` is the layer's input and ``g`` the cotangent of the layer's output. N counts examples, K cotangents of
each example, M = K * N rows of ``g`` (row m belongs to example m % N), S summed positions, I input features and O
output features. Per-example gradients are computed one at a time, and squared and reduced at once.
:mod:`t2v_fast.ops` documents the arguments of every op.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over ``dtype`` values: float64 for float64, and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(t: Tensor) -> Tensor:
    """Convert a tensor to the dtype of sums over its values."""
    return t.to(accumulate_dtype(t.dtype))


def _outer(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Yield the gradients of a linear layer, one row of ``g`` at a time: [O, I]."""
    x, g = widen(x), widen(g)
    for m in range(g.shape[0]):
        yield g[m].T @ x[m % x.shape[0]]  # [O, I]


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    q = g.new_zeros((g.shape[0], g.shape[2]), dtype=accumulate_dtype(g.dtype))
    for m, gradient in enumerate(_outer(x, g)):
        q[m] = gradient.square().sum(1)
    return q


def sq_linear(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    weight = sq_outer(x, g) if gram is None else sq_gram(gram, g.transpose(1, 2).unsqueeze(2))
    return torch.stack([weight, sq_prod(g)])


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    for m, gradient in enumerate(_outer(x, g)):
        out.add_(gradient.square_().mul_(weight[m]))


def conv_gradients(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Iterator[Tensor]:
    """Yield the gradients of a convolution, one row of ``g`` at a time: [O, C / groups, kh, kw]."""
    x, g = widen(x), widen(g)
    kernel = x.new_empty((g.shape[1], x.shape[1] // groups, *kernel_size))  # only the shape is used
    for m in range(g.shape[0]):
        n = m % x.shape[0]
        yield torch.ops.aten.convolution_backward(
            g[m : m + 1],
            x[n : n + 1],
            kernel,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [False, True, False],
        )[1]  # [O, I / groups, kh, kw]


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
    q = g.new_zeros(g.shape[:2], dtype=accumulate_dtype(g.dtype))
    for m, gradient in enumerate(conv_gradients(x, g, kernel_size, stride, padding, dilation, groups)):
        q[m] = gradient.square().sum((1, 2, 3))
    return q


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
    for m, gradient in enumerate(conv_gradients(x, g, out.shape[2:], stride, padding, dilation, groups)):
        out.add_(gradient.square_().mul_(weight[m]))


def conv_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x = widen(x)
    patches = F.unfold(x, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))  # [N, C kh kw, P]
    patches = patches.unflatten(1, (groups, -1))
    return _fold(patches.transpose(2, 3) @ patches)


def _fold(k: Tensor) -> Tensor:
    """The upper triangular matrix with the same quadratic form."""
    return k.triu() + k.triu(1)


def sq_gram(gram: Tensor, g: Tensor) -> Tensor:
    g = widen(g)
    n, groups = gram.shape[:2]
    if g.shape[0] == 0:
        return g.new_zeros(g.shape[:2])
    d = g.flatten(2).unflatten(1, (groups, -1)).unflatten(0, (-1, n))  # [K, N, groups, O / groups, P]
    return ((d @ gram) * d).sum(-1).flatten(2).flatten(0, 1)


def sq_prod(g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    g = widen(g)
    if x is None:
        return g.sum(1).square()
    x = widen(x)
    if shift is not None:
        x = x - shift.to(x.dtype)
    if scale is not None:
        x = x * scale.to(x.dtype)
    return (g.unflatten(0, (-1, x.shape[0])) * x).sum(2).flatten(0, 1).square() if g.shape[0] else g.sum(1)


def sq_norm(g: Tensor, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return torch.stack([sq_prod(g, x, shift, scale), sq_prod(g)])


def sq_prod_acc_(
    out: Tensor,
    g: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    q = sq_prod(g, x, shift, scale)
    out.add_((q * weight.to(q.dtype)[:, None]).sum(0))


def scatter_gradients(index: Tensor, g: Tensor, num_rows: int) -> Iterator[Tensor]:
    """Yield the gradients of a table, one row of ``g`` at a time: [num_rows, O]."""
    g = widen(g)
    for m in range(g.shape[0]):
        rows = index[m % index.shape[0]]
        used = rows >= 0
        yield g.new_zeros((num_rows, g.shape[2])).index_add_(0, rows[used], g[m][used])


def sq_scatter(index: Tensor, g: Tensor, num_rows: int) -> Tensor:
    q = g.new_zeros((g.shape[0], num_rows), dtype=accumulate_dtype(g.dtype))
    for m, gradient in enumerate(scatter_gradients(index, g, num_rows)):
        q[m] = gradient.square().sum(1)
    return q


def sq_scatter_acc_(out: Tensor, index: Tensor, g: Tensor, weight: Tensor) -> None:
    for m, gradient in enumerate(scatter_gradients(index, g, out.shape[0])):
        out.add_(gradient.square_().mul_(weight[m]))


def grouped_gradients(x: Tensor, g: Tensor, offsets: Tensor) -> Iterator[Tensor]:
    """Yield the gradients of the segments, one cotangent and one segment at a time: [O, I]."""
    x, g = widen(x), widen(g)
    bounds = offsets.tolist()
    if bounds != sorted(bounds) or not 0 <= bounds[0] <= bounds[-1] <= len(x):
        raise IndexError(f"sq_grouped: offsets {bounds} are out of range: expected growing numbers up to {len(x)}")
    for first in range(0, len(g), len(x)) if len(x) else (0,):
        for start, stop in pairwise(bounds):
            yield g[first + start : first + stop].T @ x[start:stop]


def sq_grouped(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    squares = [gradient.square().sum(1) for gradient in grouped_gradients(x, g, offsets)]
    return torch.stack(squares) if squares else g.new_zeros((0, g.shape[1]), dtype=accumulate_dtype(g.dtype))


def sq_grouped_acc_(out: Tensor, x: Tensor, g: Tensor, offsets: Tensor, groups: Tensor, weight: Tensor) -> None:
    bounds, segments = groups.tolist(), len(offsets) - 1
    if bounds != sorted(bounds) or not 0 <= bounds[0] <= bounds[-1] <= segments:
        raise IndexError(f"sq_grouped_acc_: groups {bounds} are out of range: expected growing numbers to {segments}")
    for m, gradient in enumerate(grouped_gradients(x, g, offsets)):
        group = bisect_right(bounds, m % segments) - 1
        if 0 <= group < len(out):
            out[group].add_(gradient.square_().mul_(weight[m]))


def winograd_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], transposed: bool) -> Tensor:
    convolution = F.conv_transpose2d if transposed else F.conv2d
    return convolution(x, weight, bias, padding=tuple(padding)).contiguous(memory_format=torch.channels_last)
