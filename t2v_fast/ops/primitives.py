"""The public ops: each checks its arguments and calls the backend in force.

Letters for shapes: N examples, K cotangents of each example, M = K * N cotangent rows (row m belongs to example m % N),
S positions that are summed over, I and O input and output features. The package's documentation has the table of ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .checks import (
    check_accumulator,
    check_conv,
    check_conv_acc,
    check_conv_gram,
    check_gram,
    check_grouped,
    check_grouped_acc,
    check_outer,
    check_prod,
    check_scatter,
    check_scatter_acc,
    check_winograd_conv,
)


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    """Sum the squared per-example weight gradient of a linear layer over each row of the weight.

    ``q[m, o] = sum_i (sum_s g[m, s, o] x[n, s, i])^2`` with n = m % N.

    Args:
        x: Input of the layer, ``[N, S, I]``.
        g: Cotangents of the layer's output, ``[M, S, O]``; M is a multiple of N.
        path: ``"explicit"`` forms the gradient in tiles, with 2 S I O flops per row of ``g``. ``"gram"`` evaluates
            g_o^T (x x^T) g_o, with S^2 (I + O) flops; x x^T is formed once per example.
            :mod:`t2v_fast.ops.planner` predicts which path is faster.

    Returns:
        ``[M, O]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g = torch.rand(2, 5, 3), torch.rand(2, 5, 4)
        >>> gradients = torch.einsum("nso,nsi->noi", g, x)
        >>> torch.allclose(ops.sq_outer(x, g), gradients.square().sum(2))
        True
    """
    check_outer("sq_outer", x, g, path)
    return dispatch.call("sq_outer", x, g, path)


def sq_linear(x: Tensor, g: Tensor, path: str = "explicit", gram: Tensor | None = None) -> Tensor:
    """Square the per-example gradients of the weight and the bias of a linear layer.

    Where :func:`fuses_bias` says so, the path ``"gram"`` reads the cotangents once for both.

    Args:
        x: As for :func:`sq_outer`.
        g: As for :func:`sq_outer`.
        path: As for :func:`sq_outer`.
        gram: The Gram matrices of ``x`` as an image with one row, ``[N, 1, S, S]``, from :func:`conv_gram`. The path
            ``"gram"`` computes them if there are none, and the other path takes none.

    Returns:
        ``[2, M, O]``: :func:`sq_outer` for the weight, then :func:`sq_prod` of ``g`` for the bias.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g = torch.rand(2, 5, 3), torch.rand(2, 5, 4)
        >>> weight, bias = ops.sq_linear(x, g)
        >>> torch.allclose(weight, ops.sq_outer(x, g)), torch.allclose(bias, ops.sq_prod(g))
        (True, True)
    """
    check_outer("sq_linear", x, g, path)
    if gram is not None:
        if path != "gram":
            raise ValueError(f"sq_linear: path {path!r} takes no Gram matrices: leave them out, or pass path='gram'")
        check_gram("sq_linear", gram, _row(g))
    if path == "gram" and fuses_bias(x, g):
        return dispatch.call("sq_linear", x, g, gram)
    return torch.stack([sq_outer(x, g, path) if gram is None else sq_gram(gram, _row(g)), sq_prod(g)])


def _row(tokens: Tensor) -> Tensor:
    """[N, S, I] as an image with one row, [N, I, 1, S]."""
    return tokens.transpose(1, 2).unsqueeze(2)


def fuses_bias(x: Tensor, g: Tensor) -> bool:
    """Whether one kernel computes all of :func:`sq_linear` for these tensors by the path ``"gram"``.

    Args:
        x: As for :func:`sq_linear`.
        g: As for :func:`sq_linear`.

    Returns:
        True where the kernels for GPUs run on the tensors.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> ops.fuses_bias(torch.rand(2, 5, 3), torch.rand(2, 5, 4))  # on a CPU
        False
    """
    return dispatch.uses_gpu_kernels(g)


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """Add the weighted squares of a linear layer's per-example weight gradients to ``out``, in place.

    ``out[o, i] += sum_m weight[m] (sum_s g[m, s, o] x[n, s, i])^2`` with n = m % N.

    Args:
        out: Contiguous ``[O, I]``, float32, or float64 for float64 inputs.
        x: Input of the layer, ``[N, S, I]``.
        g: Cotangents of the layer's output, ``[M, S, O]``; M is a multiple of N.
        weight: One weight for each row of ``g``, ``[M]``, in the dtype of ``out``.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g, out = torch.rand(2, 5, 3), torch.rand(2, 5, 4), torch.zeros(4, 3)
        >>> ops.sq_outer_acc_(out, x, g, torch.tensor([0.5, 2.0]))
        >>> gradients = torch.einsum("nso,nsi->noi", g, x)
        >>> torch.allclose(out, 0.5 * gradients[0] ** 2 + 2.0 * gradients[1] ** 2)
        True
    """
    check_outer("sq_outer_acc_", x, g)
    check_accumulator("sq_outer_acc_", out, (g.shape[2], x.shape[2]), g, weight)
    dispatch.call("sq_outer_acc_", out, x, g, weight)


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
    """Sum the squared per-example weight gradient of a two-dimensional convolution over each filter.

    The input is never unfolded. The gradient of row m is the one that
    :func:`torch.nn.grad.conv2d_weight` returns for the batch of the one example m % N.

    Args:
        x: Input of the layer, ``[N, C, H, W]``.
        g: Cotangents of the layer's output, ``[M, O, Ho, Wo]``; M is a multiple of N.
        kernel_size: Height and width of the kernel.
        stride: As for :func:`torch.nn.functional.conv2d`, for height and width.
        padding: Rows and columns of zeros on each side.
        dilation: As for :func:`torch.nn.functional.conv2d`, for height and width.
        groups: Number of groups of channels.
        path: ``"explicit"`` forms each gradient in tiles, with 2 P O (C / groups) kh kw flops per row of ``g`` for
            P = Ho Wo positions. ``"gram"`` evaluates g_o^T K g_o with the Gram matrix K ``[P, P]`` of the patches,
            which is computed from the pixels' autocorrelation. ``"winograd"`` is the explicit path by F(3x3, 4x4),
            with a quarter of the multiplications, for 3x3 kernels of stride 1, dilation 1 and one group.

    Returns:
        ``[M, O]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together, or the path doesn't fit the geometry.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g = torch.rand(1, 3, 6, 6), torch.rand(1, 4, 6, 6)
        >>> gradient = torch.nn.grad.conv2d_weight(x, (4, 3, 3, 3), g, padding=1)
        >>> q = ops.sq_conv(x, g, (3, 3), (1, 1), (1, 1), (1, 1), 1)
        >>> torch.allclose(q[0], gradient.square().sum((1, 2, 3)))
        True
    """
    check_conv("sq_conv", x, g, kernel_size, stride, padding, dilation, groups, path)
    return dispatch.call("sq_conv", x, g, kernel_size, stride, padding, dilation, groups, path)


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
    """Add the weighted squares of a convolution's per-example weight gradients to ``out``, in place.

    ``out += sum_m weight[m] G_m^2``, elementwise, with the gradients G_m of :func:`sq_conv`.

    Args:
        out: Contiguous ``[O, C / groups, kh, kw]``, float32, or float64 for float64 inputs.
        x: Input of the layer, ``[N, C, H, W]``.
        g: Cotangents of the layer's output, ``[M, O, Ho, Wo]``; M is a multiple of N.
        weight: One weight for each row of ``g``, ``[M]``, in the dtype of ``out``.
        stride: As for :func:`torch.nn.functional.conv2d`, for height and width.
        padding: Rows and columns of zeros on each side.
        dilation: As for :func:`torch.nn.functional.conv2d`, for height and width.
        groups: Number of groups of channels.
        path: ``"explicit"`` or ``"winograd"``, as for :func:`sq_conv`.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together, or the path doesn't fit the geometry.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g, out = torch.rand(1, 3, 6, 6), torch.rand(1, 4, 6, 6), torch.zeros(4, 3, 3, 3)
        >>> ops.sq_conv_acc_(out, x, g, torch.tensor([2.0]), (1, 1), (1, 1), (1, 1), 1)
        >>> gradient = torch.nn.grad.conv2d_weight(x, (4, 3, 3, 3), g, padding=1)
        >>> torch.allclose(out, 2.0 * gradient.square())
        True
    """
    check_conv_acc("sq_conv_acc_", out, x, g, weight, stride, padding, dilation, groups, path)
    dispatch.call("sq_conv_acc_", out, x, g, weight, stride, padding, dilation, groups, path)


def conv_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute the Gram matrices of the patches that a convolution sees.

    With the patches U ``[D, P]`` of an example and a group, where D = (C / groups) kh kw, this is K = U^T U, *folded*:
    entries above the diagonal are doubled and entries below are zero. Folding changes no quadratic form.
    :func:`sq_gram` evaluates the forms of any number of cotangents.

    Args:
        x: Input of the layer, ``[N, C, H, W]``.
        kernel_size: Height and width of the kernel.
        stride: As for :func:`torch.nn.functional.conv2d`, for height and width.
        padding: Rows and columns of zeros on each side.
        dilation: As for :func:`torch.nn.functional.conv2d`, for height and width.
        groups: Number of groups of channels.

    Returns:
        ``[N, groups, P, P]`` for P = Ho Wo output positions, in float32, or float64 for float64 inputs.

    Raises:
        ValueError: ``x`` and the geometry don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x = torch.rand(1, 3, 4, 4)
        >>> patches = torch.nn.functional.unfold(x, 3)[0]
        >>> gram = patches.T @ patches
        >>> folded = ops.conv_gram(x, (3, 3), (1, 1), (0, 0), (1, 1), 1)
        >>> torch.allclose(folded[0, 0], gram.triu() + gram.triu(1))
        True
    """
    check_conv_gram("conv_gram", x, kernel_size, stride, padding, dilation, groups)
    return dispatch.call("conv_gram", x, kernel_size, stride, padding, dilation, groups)


def sq_gram(gram: Tensor, g: Tensor) -> Tensor:
    """Evaluate the quadratic forms ``q[m, o] = g_o^T K g_o`` with the matrices K of :func:`conv_gram`.

    The result is that of :func:`sq_conv`. A linear layer over S tokens is a 1x1 convolution of an image of 1 x S
    pixels.

    Args:
        gram: ``[N, groups, P, P]``, in float32, or float64 for float64 cotangents.
        g: Cotangents of the layer's output, ``[M, O, Ho, Wo]`` with Ho Wo = P; M is a multiple of N.

    Returns:
        ``[M, O]`` in the dtype of ``gram``.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g = torch.rand(1, 3, 4, 4), torch.rand(1, 5, 2, 2)
        >>> geometry = (3, 3), (1, 1), (0, 0), (1, 1), 1
        >>> torch.allclose(ops.sq_gram(ops.conv_gram(x, *geometry), g), ops.sq_conv(x, g, *geometry))
        True
    """
    check_gram("sq_gram", gram, g)
    return dispatch.call("sq_gram", gram, g)


def sq_prod(g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Square the per-example gradient of an elementwise scale, or of a bias.

    ``q[m, c] = (sum_s g[m, s, c] (x[n, s, c] - shift) scale)^2`` with n = m % N. Without ``x``, which is the case of a
    bias, ``q[m, c] = (sum_s g[m, s, c])^2``.

    Args:
        g: Cotangents of the layer's output, ``[M, S, C]``; M is a multiple of N.
        x: Input of the layer, ``[N, S, C]``.
        shift: Subtracted from ``x``, such as the mean of a norm. Broadcasts to ``x``; the dtype may be wider.
        scale: Multiplies ``x - shift``, such as the inverse standard deviation of a norm. Broadcasts like ``shift``.

    Returns:
        ``[M, C]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> g, x = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
        >>> torch.allclose(ops.sq_prod(g, x), (g * x).sum(1).square())
        True
        >>> torch.allclose(ops.sq_prod(g), g.sum(1).square())
        True
    """
    check_prod("sq_prod", g, x, shift, scale)
    return dispatch.call("sq_prod", g, x, shift, scale)


def sq_norm(g: Tensor, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Square the per-example gradients of a norm's weight and bias in one pass.

    Args:
        g: Cotangents of the layer's output, ``[M, S, C]``; M is a multiple of N.
        x: Input of the norm, ``[N, S, C]``.
        shift: Mean that the norm subtracts, as for :func:`sq_prod`.
        scale: Inverse standard deviation of the norm, as for :func:`sq_prod`.

    Returns:
        ``[2, M, C]``: :func:`sq_prod` with ``x`` for the weight, then without ``x`` for the bias.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> g, x = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
        >>> torch.allclose(ops.sq_norm(g, x), torch.stack([ops.sq_prod(g, x), ops.sq_prod(g)]))
        True
    """
    check_prod("sq_norm", g, x, shift, scale)
    return dispatch.call("sq_norm", g, x, shift, scale)


def sq_prod_acc_(
    out: Tensor,
    g: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Add the weighted squares of :func:`sq_prod` to ``out``, in place.

    ``out[c] += sum_m weight[m] q[m, c]``.

    Args:
        out: Contiguous ``[C]``, float32, or float64 for float64 inputs.
        g: Cotangents of the layer's output, ``[M, S, C]``; M is a multiple of N.
        weight: One weight for each row of ``g``, ``[M]``, in the dtype of ``out``.
        x: As for :func:`sq_prod`.
        shift: As for :func:`sq_prod`.
        scale: As for :func:`sq_prod`.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> g, weight, out = torch.rand(2, 5, 3), torch.tensor([0.5, 2.0]), torch.zeros(3)
        >>> ops.sq_prod_acc_(out, g, weight)
        >>> torch.allclose(out, weight @ g.sum(1).square())
        True
    """
    check_prod("sq_prod_acc_", g, x, shift, scale)
    check_accumulator("sq_prod_acc_", out, (g.shape[2],), g, weight)
    dispatch.call("sq_prod_acc_", out, g, weight, x, shift, scale)


def sq_scatter(index: Tensor, g: Tensor, num_rows: int) -> Tensor:
    """Sum the squared per-example gradient of an embedding table over each row of the table.

    ``q[m, v] = sum_o (sum over s with index[n, s] = v of g[m, s, o])^2`` with n = m % N.

    Args:
        index: Rows that each example looks up, ``[N, S]`` int64. Negative entries are padding and are left out.
        g: Cotangents of the embeddings, ``[M, S, O]``; M is a multiple of N.
        num_rows: Rows V of the table.

    Returns:
        ``[M, V]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.
        IndexError: An index is ``num_rows`` or more. On a GPU this fails later, as torch's own indexing does.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> index, g = torch.tensor([[2, 0, 2]]), torch.rand(1, 3, 4)
        >>> gradient = torch.zeros(3, 4).index_add_(0, index[0], g[0])
        >>> torch.allclose(ops.sq_scatter(index, g, 3)[0], gradient.square().sum(1))
        True
    """
    check_scatter("sq_scatter", index, g, num_rows)
    return dispatch.call("sq_scatter", index, g, num_rows)


def sq_scatter_acc_(out: Tensor, index: Tensor, g: Tensor, weight: Tensor) -> None:
    """Add the weighted squares of an embedding table's per-example gradients to ``out``, in place.

    ``out[v, o] += sum_m weight[m] (sum over s with index[n, s] = v of g[m, s, o])^2`` with n = m % N.

    Args:
        out: Contiguous ``[V, O]``, float32, or float64 for float64 inputs.
        index: Rows that each example looks up, ``[N, S]`` int64. Negative entries are padding and are left out.
        g: Cotangents of the embeddings, ``[M, S, O]``; M is a multiple of N.
        weight: One weight for each row of ``g``, ``[M]``, in the dtype of ``out``.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.
        IndexError: An index is V or more. On a GPU this fails later, as torch's own indexing does.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> index, g, out = torch.tensor([[2, 0, 2]]), torch.rand(1, 3, 4), torch.zeros(3, 4)
        >>> ops.sq_scatter_acc_(out, index, g, torch.tensor([2.0]))
        >>> gradient = torch.zeros(3, 4).index_add_(0, index[0], g[0])
        >>> torch.allclose(out, 2.0 * gradient.square())
        True
    """
    check_scatter_acc("sq_scatter_acc_", out, index, g, weight)
    dispatch.call("sq_scatter_acc_", out, index, g, weight)


def sq_grouped(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """Sum squared gradients of linear layers that each see a segment of the rows, over each row of the weight.

    ``q[k B + b, o] = sum_i (sum over rows r of segment b of g[k R + r, o] x[r, i])^2``. A segment has the rows from
    ``offsets[b]`` to ``offsets[b + 1]``. For a mixture of experts, a segment has the tokens of one example that one
    expert sees. Segments differ in length, nothing is padded, and a segment without rows gets zeros.

    Args:
        x: Input rows ``[R, I]`` of all segments.
        g: Cotangents of the outputs, ``[M, O]`` with M = K R: row m belongs to row m % R of ``x``.
        offsets: ``[B + 1]`` int64, from 0 to R and never falling. Rows before the first and after the last are left
            out.

    Returns:
        ``[K B, O]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.
        IndexError: The offsets fall, or leave the rows. On a GPU this is not checked.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g = torch.rand(5, 3), torch.rand(5, 4)
        >>> q = ops.sq_grouped(x, g, torch.tensor([0, 2, 5]))
        >>> gradients = torch.stack([g[:2].T @ x[:2], g[2:].T @ x[2:]])
        >>> torch.allclose(q, gradients.square().sum(2))
        True
    """
    check_grouped("sq_grouped", x, g, offsets)
    return dispatch.call("sq_grouped", x, g, offsets)


def sq_grouped_acc_(out: Tensor, x: Tensor, g: Tensor, offsets: Tensor, groups: Tensor, weight: Tensor) -> None:
    """Add the weighted squares of the gradients of :func:`sq_grouped` to ``out``, in place, group by group.

    ``out[e, o, i] += sum over k and the segments b of group e of weight[k B + b] G[k B + b, o, i]^2``. A group has the
    segments from ``groups[e]`` to ``groups[e + 1]``. For a mixture of experts, a group is an expert.

    Args:
        out: Contiguous ``[E, O, I]``, float32, or float64 for float64 inputs.
        x: Input rows ``[R, I]`` of all segments.
        g: Cotangents of the outputs, ``[M, O]`` with M = K R: row m belongs to row m % R of ``x``.
        offsets: ``[B + 1]`` int64, as for :func:`sq_grouped`.
        groups: ``[E + 1]`` int64, from 0 to B and never falling.
        weight: One weight for each segment and cotangent, ``[K B]``, in the dtype of ``out``.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.
        IndexError: The offsets or groups fall, or leave their range. On a GPU this is not checked.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, g, out = torch.rand(5, 3), torch.rand(5, 4), torch.zeros(1, 4, 3)
        >>> offsets, weight = torch.tensor([0, 2, 5]), torch.tensor([0.5, 2.0])
        >>> ops.sq_grouped_acc_(out, x, g, offsets, torch.tensor([0, 2]), weight)
        >>> torch.allclose(out[0], 0.5 * (g[:2].T @ x[:2]) ** 2 + 2.0 * (g[2:].T @ x[2:]) ** 2)
        True
    """
    check_grouped_acc("sq_grouped_acc_", out, x, g, offsets, groups, weight)
    dispatch.call("sq_grouped_acc_", out, x, g, offsets, groups, weight)


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    transposed: bool = False,
) -> Tensor:
    """Convolve with 3x3 kernels and stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016, arXiv 1509.09308).

    A layer of the network itself, for CPUs; other devices run torch's convolution. Rounding errors are up to three
    times those of a direct convolution, and the result of an image does not depend on the rest of the batch. bfloat16
    is multiplied in fixed point where the processor has dot products of 16-bit integers.

    Args:
        x: Input ``[N, C, H, W]`` in float32, float64 or bfloat16. If ``transposed``, cotangent of the output.
        weight: Kernels ``[O, C, 3, 3]``. If ``transposed``, ``[C, O, 3, 3]``.
        bias: ``[O]``.
        padding: Rows and columns of zeros on each side; at most 2 if ``transposed``.
        transposed: Compute the gradient of such a convolution with respect to its input, from the cotangent ``x`` of
            its output and the convolution's own ``weight`` and ``padding``.

    Returns:
        ``[N, O, Ho, Wo]`` in the dtype of ``x``, channels last.

    Raises:
        ValueError: Shapes, dtypes or devices don't fit together.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> x, weight = torch.rand(1, 3, 6, 6), torch.rand(4, 3, 3, 3)
        >>> y = ops.winograd_conv(x, weight, padding=(1, 1))
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), rtol=1e-4)
        True
    """
    check_winograd_conv("winograd_conv", x, weight, bias, padding, transposed)
    return dispatch.call("winograd_conv", x, weight, bias, padding, transposed)
