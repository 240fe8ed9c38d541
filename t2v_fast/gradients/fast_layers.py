"""Implementations of layers that are faster than torch's own, with the same results up to rounding.

On a CUDA device only batch norms have one.

Linear layers
    torch computes float32 products with the BLAS library that it was built with. The usual one, MKL, runs at half speed
    on processors that Intel did not make. oneDNN, which torch uses for convolutions, runs at full speed on all.
Convolutions over images smaller than their kernel
    A direct convolution mostly multiplies zeros of the padding. A matrix that maps all entries of an image to all
    entries of its output multiplies no padding.
3x3 convolutions of channels-last images
    Winograd's F(4x4, 3x3), which oneDNN lacks, takes a quarter of the multiplications. The rounding error is up to
    three times that of a direct convolution, some 3e-6 of the largest value. bfloat16 is multiplied in fixed point
    where the processor has dot products of 16-bit integers, and in float32 elsewhere. Fixed point adds about as much
    error as rounding to bfloat16.
Depthwise convolutions with strides in bfloat16, and all products on processors without instructions for bfloat16
    torch takes ten times as long as in float32 and more, so they are computed in float32
    (:mod:`~t2v_fast.gradients.bfloat16_layers`).
Batch norms in evaluation mode
    The layer is linear, so its input gradient is the batch norm without the shift. torch reads the input again, and
    sums the gradients of the parameters. On a CUDA device, torch's input gradient leaves the channels-last format, and
    each convolution below copies it twice.
In-place ReLU6
    The output tells where the input was clamped. torch copies the input first.

docs/performance.md lists what each implementation gains.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import ops
from ..ops.geometry import conv_output_size, per_axis
from .bfloat16_layers import (
    StridedDepthwise,
    WideConvolution,
    in_batches,
    is_wide,
    parameter_gradients,
    wanted,
    widened,
)
from .graph import image_format, views_of

MIN_MULTIPLICATIONS = 2**22  # a smaller product is not worth the call of oneDNN
MAX_POINTWISE_PIXELS = 4  # 1x1 convolutions over images of more pixels are left to torch
MAX_MATRIX_GROWTH = 2  # the largest ratio of the entries of a convolution's matrix to those of its weight
MAX_WINOGRAD_COST = 0.75  # the largest ratio of Winograd's multiplications to those of a direct convolution

Pair = tuple[int, int]


_WEIGHT_GRADIENT = widened(torch.matmul)


class OneDnnLinear(torch.autograd.Function):
    """A linear layer computed by oneDNN: x [..., I], weight [O, I], bias [O] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        to_x, to_weight, to_bias = wanted(ctx)
        return (
            _product(g, weight.mT) if to_x else None,
            _WEIGHT_GRADIENT(rows.mT, x.reshape(-1, x.shape[-1])) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


class MatrixConvolution(torch.autograd.Function):
    """A convolution of x [N, C, H, W] as a product with a matrix [pixels O, pixels C]; bias [O] or None.

    The matrix maps one pixel (the weight of a 1x1 convolution) or a whole image (:func:`convolution_matrix`).
    ``geometry`` is stride, padding and dilation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: Tensor, geometry: tuple[Pair, Pair, Pair]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, matrix)
        ctx.geometry, ctx.groups = geometry, 1
        if bias is not None:
            bias = bias.repeat(len(matrix) // len(bias))
        y = _product(_pixels(x, matrix.shape[1]), matrix, bias)
        size = conv_output_size(x.shape[2:], weight.shape[2:], *geometry)
        # Detach the output: autograd forbids in-place changes of a view that a function returns.
        return _images(y, len(x), size).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, matrix = ctx.saved_tensors
        rows = _pixels(g, len(matrix))
        to_x, *to_parameters = wanted(ctx)
        back = None
        if to_x:
            # oneDNN transposes the matrix first, which takes longer than a product with one row.
            single = len(rows) == 1 and rows.dtype == torch.float32
            back = _images(rows @ matrix if single else _product(rows, matrix.mT), len(x), x.shape[2:])
        return (
            back,
            *parameter_gradients(ctx, g, x, weight, *to_parameters),
            None,
            None,
        )


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution of stride 1 by ``ops.winograd_conv``; ``geometry`` is stride, padding and dilation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups = geometry, 1
        return ops.winograd_conv(x, weight, bias, geometry[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, *to_parameters = wanted(ctx)
        return (
            _winograd_gradient(g, weight, ctx.geometry[1]) if to_x else None,
            *parameter_gradients(ctx, g, x, weight, *to_parameters),
            None,
        )


class InPlaceHardtanh(torch.autograd.Function):
    """x clamped to an interval, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: float, most: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.cuts = least, most
        x.clamp_(least, most)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.hardtanh_backward(g, *ctx.saved_tensors, *ctx.cuts), None, None


class BatchNorm(torch.autograd.Function):
    """A batch norm in evaluation mode, x [N, C, ...]: its input gradient is the batch norm without the shift.

    The last two of the saved tensors are what x is shifted and scaled by, in the type of sums. torch computes them
    for each forward pass on a CUDA device. On a CPU they are None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        # As torch.batch_norm, which checks the shapes.
        y, *known, _, _ = torch._batch_norm_impl_index(x, weight, bias, mean, variance, False, 0.0, eps, False)
        shift, scale = known if x.is_cuda and known[1].shape == variance.shape else (None, None)
        ctx.save_for_backward(x, weight, mean, variance, shift, scale)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, _, scale = ctx.saved_tensors
        to_x, *to_parameters = wanted(ctx)
        of_x = None
        if to_x and scale is not None:
            of_x = torch.batch_norm_elemt(g, weight, None, torch.zeros_like(scale), scale, ctx.eps)
        elif to_x:
            zero = torch.zeros_like(mean)
            of_x = torch.native_batch_norm(g, weight, None, zero, variance, False, 0.0, ctx.eps)[0]
        of_weight = of_bias = None
        if any(to_parameters):
            mask = [False, *to_parameters]
            if x.device.type == "cpu" and x.dim() == 4 and len(x) == 1:  # see graph.fix_batch_norm_gradients
                g = g.contiguous(memory_format=image_format(x))
            saved = x.new_empty(0) if x.is_cuda else None  # the statistics of a batch: CUDA asks for a tensor
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, variance, saved, saved, False, ctx.eps, mask
            )
        return of_x, of_weight, of_bias, None, None, None


FUNCTIONS = BatchNorm, InPlaceHardtanh, MatrixConvolution, OneDnnLinear, WinogradConvolution
FUNCTIONS += StridedDepthwise, WideConvolution
# Products other than those of linear layers and convolutions.
WIDENED = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm),
    *(torch.einsum, torch.baddbmm, torch.addmm, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(F.bilinear, F.conv1d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
NODES = frozenset(f"{function.__name__}Backward" for function in FUNCTIONS)


def convolution_matrix(weight: Tensor, image: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The matrix [Ho Wo O, H W C] of a convolution with ``weight`` [O, C, *kernel] over images of size ``image``."""
    kernel = tuple(weight.shape[2:])
    size = conv_output_size(image, kernel, stride, padding, dilation)
    geometry = list(zip(size, kernel, image, stride, padding, dilation, strict=True))
    rows, columns = ([_overlap(o, *rest) for o in range(outputs)] for outputs, *rest in geometry)
    # Zeros only where some remain: to write a large matrix twice takes as long as to read the weight.
    whole = all(
        len(range(pixels)[met]) == pixels for of, pixels in zip((rows, columns), image, strict=True) for _, met in of
    )
    matrix = (weight.new_empty if whole else weight.new_zeros)(*size, len(weight), *image, weight.shape[1])
    for oy, (ky, y) in enumerate(rows):
        for ox, (kx, x) in enumerate(columns):
            matrix[oy, ox, :, y, x] = weight[:, :, ky, kx].permute(0, 2, 3, 1)
    return matrix.view(size[0] * size[1] * len(weight), -1)


def _overlap(o: int, kernel: int, image: int, stride: int, padding: int, dilation: int) -> tuple[slice, slice]:
    """The entries of a kernel that meet the image at output ``o`` along one axis, and the entries that they meet."""
    first = o * stride - padding
    met = [k for k in range(kernel) if 0 <= first + k * dilation < image]
    if not met:
        return slice(0), slice(0)
    return slice(met[0], met[-1] + 1), slice(first + met[0] * dilation, first + met[-1] * dilation + 1, dilation)


def _winograd_gradient(g: Tensor, weight: Tensor, padding: Pair) -> Tensor:
    """The input gradient of a 3x3 convolution of stride 1."""
    if in_batches(g):
        return F.conv_transpose2d(g, weight, padding=padding)
    return ops.winograd_conv(g, weight, None, padding, transposed=True)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, by oneDNN in float32. For other types torch uses oneDNN itself where oneDNN supports them."""
    if is_wide(x):
        return _product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if x.dtype != torch.float32 or not torch._C._dispatch_keys(x).has(DispatchKey.CPU) or in_batches(x):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _has_bfloat16_tiles() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices eight times as fast as float32 ones (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def _winograd_cost(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair]) -> float:
    """The ratio of Winograd's multiplications to those of a direct convolution; infinite where it does not apply."""
    stride, padding, dilation = geometry
    if (
        x.dtype not in (torch.float32, torch.bfloat16)
        or (x.dtype == torch.bfloat16 and _has_bfloat16_tiles())
        or tuple(weight.shape[1:]) != (x.shape[1], 3, 3)
        or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype))
        or not ops.winograd_fits((3, 3), stride, dilation, 1)
        or max(padding) > 2
        # A network whose images are in another memory format may rely on that format.
        or x.is_contiguous()
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not ops.uses_cpu_extension(x)
    ):
        return math.inf
    high, wide = conv_output_size(x.shape[2:], (3, 3), stride, padding, dilation)
    if min(high, wide) < 1 or x.numel() * len(weight) < MIN_MULTIPLICATIONS:
        return math.inf
    tiles = len(x) * -(-high // 4) * -(-wide // 4)
    # The cost of transforming the kernels, as a number of tiles. Many kernels leave the caches, and so cost more each.
    kernels = 8 + weight.shape[0] * weight.shape[1] / 2**13
    return 36 * (tiles + kernels) / (9 * len(x) * high * wide)


def _pixels(images: Tensor, width: int) -> Tensor:
    """[N, C, H, W] to rows of one or more pixels [R, width]; a view if the images are channels-last."""
    return images.permute(0, 2, 3, 1).reshape(-1, width)


def _images(rows: Tensor, n: int, size: Sequence[int]) -> Tensor:
    """Rows of pixels to images [N, O, *size]."""
    return rows.view(n, *size, -1).permute(0, 3, 1, 2)


def _usable(x: Tensor, weight: Tensor | None, devices: Sequence[str] = ("cpu",)) -> bool:
    """Whether the fast layers may compute with this input and weight."""
    return (
        x.device.type in devices
        and (weight is None or (weight.device == x.device and weight.dtype == x.dtype))
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        # Leave an input that is a parameter (or its view) to torch's layers, whose rules handle parameters as inputs.
        and not (x.requires_grad and _is_parameter(x))
    )


def _is_parameter(x: Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # a mode around this one may look for the network's reads of autograd nodes
        node = x.grad_fn
    return node is None or views_of(node) is not None


def _all_wide(*tensors: Tensor | None) -> bool:
    """Whether a layer with these tensors is computed in float32 in place of bfloat16."""
    return all(is_wide(t) for t in tensors if t is not None)


class FastLayers(TorchFunctionMode):
    """A context in which the layers of a network use the implementations of this module.

    The matrices of convolutions are kept from call to call. ``replaced`` is called with each weight that a matrix
    replaces. The attribute ``read`` may be set to a function that is called with the weight of each convolution that
    torch computes from channels-last images. ``on_cpu`` says whether the network is on a CPU, for which most of the
    implementations are.

    Example:
        >>> layer = torch.nn.Linear(2048, 2048)
        >>> x = torch.randn(2, 2048)
        >>> with FastLayers():
        ...     y = layer(x)
        >>> bool(torch.allclose(y, layer(x), atol=1e-5))
        True
    """

    def __init__(self, replaced: Callable[[Tensor], None] = lambda weight: None, on_cpu: bool = True) -> None:
        super().__init__()
        self._replaced = replaced
        self.read: Callable[[Tensor], None] = lambda weight: None
        # By the weight's id, the image size and the geometry: the weight's version, the weight, and the matrix.
        self._matrices: dict[tuple, tuple[int, Tensor, Tensor]] = {}
        self._in_place: list[tuple[Tensor, int]] = []  # in-place outputs of the last forward pass, with their versions
        # Ids of parameters that the network may write through ``data``, which does not change their versions.
        self.written: set[int] = set()
        self._faster: dict[Callable, Callable] = {F.batch_norm: self._batch_norm}
        if not on_cpu:
            return
        self._faster |= {
            F.hardtanh: self._hardtanh,
            Tensor.data.__get__: self._data,
            Tensor.data.__set__: self._set_data,
        }
        if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            self._faster |= {F.linear: self._linear, F.conv2d: self._convolution}
        if not ops.multiplies_bfloat16():
            self._faster |= {func: widened(func) for func in WIDENED}

    @property
    def sees_convolutions(self) -> bool:
        """Whether ``read`` is called for the convolutions that torch computes."""
        return F.conv2d in self._faster

    def __enter__(self) -> FastLayers:
        self.forget()
        return super().__enter__()

    def forget(self) -> None:
        """Forget the in-place outputs of the last forward pass, so that their memory is free."""
        self._in_place.clear()

    def overwritten(self) -> bool:
        """Whether the network wrote over an output of :class:`InPlaceHardtanh`, which the backward pass would read.

        If so, the context uses torch's own layer from now on, and the forward pass must be run again.
        """
        changed = any(t._version != version for t, version in self._in_place)
        self.forget()
        if changed:
            del self._faster[F.hardtanh]
        return changed

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._faster.get(func, func)(*args, **(kwargs or {}))

    def _data(self, t: Tensor) -> Tensor:
        self._note_written(t)
        return t.data

    def _set_data(self, t: Tensor, value: Tensor) -> None:
        self._note_written(t)
        t.data = value

    def _note_written(self, t: Tensor) -> None:
        if isinstance(t, torch.nn.Parameter) and id(t) not in self.written:
            self.written.add(id(t))
            for key in [key for key in self._matrices if key[0] == id(t)]:
                del self._matrices[key]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = input  # torch names this argument ``input``
        if (
            (
                _all_wide(x, weight, bias)
                or (x.dtype == torch.float32 and x.numel() * len(weight) >= MIN_MULTIPLICATIONS)
            )
            and x.dim() > 1
            and weight.dim() == 2
            and x.shape[-1] == weight.shape[1]
            and _usable(x, weight)
            and torch._C._get_mkldnn_enabled()
        ):
            return OneDnnLinear.apply(x, weight, bias)
        return F.linear(x, weight, bias)

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        x = input
        if isinstance(padding, str) or x.dim() != 4 or not _usable(x, weight):
            return self._torch_convolution(x, weight, bias, stride, padding, dilation, groups)
        geometry = per_axis(stride, 2), per_axis(padding, 2), per_axis(dilation, 2)
        if groups == 1:
            matrix = self._matrix(x, weight, geometry)
            if matrix is not None:
                return MatrixConvolution.apply(x, weight, bias, matrix, geometry)
            if _winograd_cost(x, weight, bias, geometry) <= MAX_WINOGRAD_COST:
                return WinogradConvolution.apply(x, weight, bias, geometry)
        if _all_wide(x, weight, bias) and x.shape[1] == groups * weight.shape[1]:
            return WideConvolution.apply(x, weight, bias, geometry)
        if groups == x.shape[1] and x.dtype == torch.bfloat16 and max(geometry[0]) > 1:
            return StridedDepthwise.apply(x, weight, bias, geometry)
        return self._torch_convolution(x, weight, bias, stride, padding, dilation, groups)

    def _torch_convolution(self, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            self.read(weight)
        return F.conv2d(x, weight, *options)

    def _matrix(self, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair]) -> Tensor | None:
        """The matrix of a convolution over images of this size, if a product with it is faster; otherwise None."""
        if x.shape[1] != weight.shape[1] or not x.numel() or not torch._C._get_mkldnn_enabled():
            return None
        kernel, image = tuple(weight.shape[2:]), tuple(x.shape[2:])
        taps, pixels = kernel[0] * kernel[1], image[0] * image[1]
        if kernel == (1, 1) and geometry == ((1, 1), (0, 0), (1, 1)):
            return (
                weight.detach().flatten(1)
                if pixels <= MAX_POINTWISE_PIXELS and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
                else None
            )
        if pixels >= taps:
            return None
        size = conv_output_size(image, kernel, *geometry)
        if min(size) < 1 or pixels * size[0] * size[1] > MAX_MATRIX_GROWTH * taps:
            return None
        # The weight is computed anew for every batch, or may change without a new version.
        if weight.grad_fn is not None or weight.is_inference() or id(weight) in self.written:
            return None
        key = id(weight), image, geometry
        if key not in self._matrices or self._matrices[key][0] != weight._version:
            self._replaced(weight)
            with torch.no_grad():
                self._matrices[key] = weight._version, weight, convolution_matrix(weight, image, *geometry)
        return self._matrices[key][2]

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        own = [t for t in (running_mean, running_var, weight, bias) if t is not None]
        if (
            not training
            and running_mean is not None
            and running_var is not None
            # The layer's own tensors may be float32 where the input is less precise.
            and ({t.dtype for t in own} in ({input.dtype}, {torch.float32}))
            and torch.finfo(own[0].dtype).eps <= torch.finfo(input.dtype).eps
            and all(t.device == input.device for t in own)
            and _usable(input, None, ("cpu", "cuda"))
        ):
            return BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def _hardtanh(self, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        if (
            inplace
            and min_val < max_val
            and input.grad_fn is not None
            and not input._is_view()
            and _usable(input, None)
        ):
            output = InPlaceHardtanh.apply(input, min_val, max_val)
            self._in_place.append((output, output._version))
            return output
        return F.hardtanh(input, min_val, max_val, inplace)
