"""Layers in bfloat16 whose products are computed in float32, where torch takes far longer for them in bfloat16.

Values are stored in bfloat16, and each result is rounded to it once, as torch's own layers do: they hold sums in
float32, too. On a processor with instructions for bfloat16 (:func:`~t2v_fast.ops.multiplies_bfloat16`) only strided
depthwise convolutions are computed in this way. On others, torch's products in bfloat16 take many times as long as
in float32, and all of them are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .. import ops
from ..ops.geometry import conv_output_size

Pair = tuple[int, int]

MAX_TINY_PIXELS = 64  # of a layer's output, for which torch's weight gradient of one example is slow


def is_wide(t: Tensor) -> bool:
    """Whether products of such tensors are computed in float32."""
    return t.dtype == torch.bfloat16 and t.device.type == "cpu" and not ops.multiplies_bfloat16()


def in_batches(g: Tensor) -> bool:
    """Whether gradients are computed in batches (vmap), which only torch's own operators support."""
    return torch._C._dispatch_keys(g).has(DispatchKey.FuncTorchBatched)


def wanted(ctx: Any) -> list[bool]:
    """Whether this backward pass asks for the gradients of a layer's input, weight and bias, its first three inputs.

    ``ctx.needs_input_grad`` only tells whether any pass could ask for them.
    """
    onward = ctx.next_functions  # torch makes an object for each input, so it is read once
    return [needed and _executes(onward[slot][0]) for slot, needed in enumerate(ctx.needs_input_grad[:3])]


# A backward pass that asks for gradients of leaves. torch answers for each of these by an error, which takes 0.1 ms.
_asks_for_leaves = -1


def _executes(node: Any) -> bool:
    """Whether the running backward pass executes this node. To say so of a leaf in error costs time alone."""
    global _asks_for_leaves
    task = torch._C._current_graph_task_id()
    if task == _asks_for_leaves and hasattr(node, "variable"):
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except (RuntimeError, AttributeError):  # a leaf whose gradient is asked for, or torch does not tell
        _asks_for_leaves = task
        return True


def parameter_gradients(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor, to_weight: bool, to_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a convolution's weight and bias, or None for one that is not asked for."""
    of_weight = None
    if to_weight and _is_tiny(ctx, g, x):
        columns = F.unfold(x, weight.shape[2:], ctx.geometry[2], ctx.geometry[1], ctx.geometry[0])[0]
        of_weight = (g.reshape(len(weight), -1) @ columns.mT).view(weight.shape)
    elif to_weight:
        geometry = *ctx.geometry, False, [0, 0], ctx.groups
        mask = [False, True, False]
        operands = [t.float() if is_wide(t) else t for t in (g, x, weight)]
        of_weight = torch.ops.aten.convolution_backward(*operands, None, *geometry, mask)[1].to(weight.dtype)
    return of_weight, g.sum((0, 2, 3)) if to_bias else None


def _is_tiny(ctx: Any, g: Tensor, x: Tensor) -> bool:
    """Whether the weight gradient is a product with few columns, in which torch writes the gradient several times."""
    few = len(x) == 1 and ctx.groups == 1 and g.shape[2] * g.shape[3] <= MAX_TINY_PIXELS
    precise = g.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
    return few and precise and not in_batches(g) and not in_batches(x)


def _input_gradient(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The input gradient of a convolution's function, by way of float32."""
    stride, padding, dilation = ctx.geometry
    # Pixels of the padded input that no output position reads.
    last = conv_output_size(x.shape[2:], weight.shape[2:], (1, 1), padding, dilation)
    beyond = [(size - 1) % by for size, by in zip(last, stride, strict=True)]
    wide = g.float(), weight.float(), None, stride, padding, beyond, ctx.groups, dilation
    return F.conv_transpose2d(*wide).to(g.dtype)


class StridedDepthwise(torch.autograd.Function):
    """A depthwise convolution in bfloat16; ``geometry`` is stride, padding and dilation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups = geometry, x.shape[1]
        return F.conv2d(x, weight, bias, *geometry, ctx.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, *to_parameters = wanted(ctx)
        of_x = _input_gradient(ctx, g, x, weight) if to_x else None
        return of_x, *parameter_gradients(ctx, g, x, weight, *to_parameters), None


class WideConvolution(torch.autograd.Function):
    """A convolution of bfloat16 images that is computed in float32; ``geometry`` is stride, padding and dilation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups = geometry, x.shape[1] // weight.shape[1]
        wide = x.float(), weight.float(), None if bias is None else bias.float()
        return F.conv2d(*wide, *geometry, ctx.groups).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, *to_parameters = wanted(ctx)
        of_x = _input_gradient(ctx, g, x, weight) if to_x else None
        return of_x, *parameter_gradients(ctx, g, x, weight, *to_parameters), None


def widened(func: Callable) -> Callable:
    """A function that casts bfloat16 tensors to float32 for ``func``, and its results back to bfloat16.

    Autograd differentiates the casts, so that the gradients of ``func`` are computed in float32, too.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        if not given or not all(map(is_wide, given)):
            return func(*args, **kwargs)
        args, kwargs = tree_map(_cast(torch.bfloat16, torch.float32), (args, kwargs))
        return tree_map(_cast(torch.float32, torch.bfloat16), func(*args, **kwargs))

    return call


def _cast(before: torch.dtype, after: torch.dtype) -> Callable[[Any], Any]:
    return lambda t: t.to(after) if isinstance(t, Tensor) and t.dtype == before else t
