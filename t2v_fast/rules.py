"""From an autograd node to op calls: the only file to edit for a new layer.

A :class:`Rule` belongs to one kind of node. It says which of the node's inputs are shared by all examples (``shared``),
which rows of its cotangent belong to one example (``rows``), and which factors the per-example gradients of such an
input have (``factors``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .factors import Convolution, Factors, Outer, Product, Scatter, Stacked
from .geometry import per_axis
from .graph import HIDING, RowLayout, Shape, Taps, UnsupportedError, Use, find_taps, input_shape
from .layers import NODES


def _first_axis(g: Tensor, use: Use) -> Tensor:
    """[R, ...]: the first axis holds the rows."""
    return g


def _features(g: Tensor, use: Use) -> Tensor:
    """[..., O] -> [R, O]."""
    return g.reshape(-1, g.shape[-1])


def _nowhere(node: Node, slot: int) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """How one kind of node yields the factors of the parameters that enter it.

    ``factors(use, g, layout, n)`` gets the cotangent of the node's output and the layout of its rows,
    ``rows(g, use)`` [R, ...], over the n examples. ``shared(node, slot)``: whether that input is one for all examples
    (asked where it is not simply a parameter). ``check(use)``: what keeps this use from having an exact answer, to
    follow "the parameter ... ", or None; it raises UnsupportedError where nothing else has one either.
    """

    factors: Callable[[Use, Tensor, RowLayout, int], Factors]
    rows: Callable[[Tensor, Use], Tensor] = field(default=_first_axis)
    shared: Callable[[Node, int], bool] = field(default=_nowhere)
    check: Callable[[Use], str | None] = field(default=lambda use: None)


RULES: dict[str, Rule] = {}


def register_rule(
    *nodes: str,
    rows: Callable[[Tensor, Use], Tensor] = _first_axis,
    shared: Callable[[Node, int], bool] = _nowhere,
    check: Callable[[Use], str | None] = lambda use: None,
) -> Callable:
    """Make the decorated function the rule of the autograd nodes of these names; a name can be taken only once."""

    def decorate(factors: Callable) -> Callable:
        for name in nodes:
            if name in RULES:
                raise ValueError(f"the autograd node {name!r} already has a rule: {RULES[name].factors.__name__}")
            RULES[name] = Rule(factors, rows, shared, check)
        return factors

    return decorate


def taps_of(output: Tensor, parameters: dict[str, Tensor]) -> Taps:
    """Every use of ``parameters`` in the graph of ``output``, as the rules see it.

    Raises UnsupportedError where layers are hidden in a node of the graph.
    """

    def shared(node: Node, slot: int) -> bool:
        rule = RULES.get(node.name())
        return rule is not None and rule.shared(node, slot)

    taps = find_taps(output, parameters, shared)
    for node in taps.order:
        if why := HIDING.get(node.name()):
            raise UnsupportedError(f"the autograd node {node.name()} is in the way: {why}")
        custom = isinstance(node, torch.autograd.function.BackwardCFunction) and node.name() not in NODES
        if taps.unused and custom:
            raise UnsupportedError(
                f"the parameter {min(taps.unused)!r} is nowhere in the autograd graph, and the custom function "
                f"{node.name()}, which is, may hide it: leave the parameter out with parameters=..., or the function"
            )
    return taps


def rows_of(use: Use, g: Tensor) -> Tensor:
    """The cotangent at a tap as rows, [R, ...]; each row belongs to one example."""
    return RULES[use.node.name()].rows(g, use)


def problem(use: Use, taps: Taps) -> str | None:
    """Why a use has no exact answer by rules, to follow "the parameter ... "; None where it has one."""
    rule = RULES.get(use.node.name())
    if rule is None:
        return f"has no rule: the layer is not supported (rules are known for {', '.join(RULES)})"
    if taps.both & {*use.parameters}:
        raise UnsupportedError(
            f"the parameter {use}: what is computed from it is an activation, and also seems to be one for all "
            "examples; examples interact in this network, or it multiplies activations in a way that is not followed"
        )
    return rule.check(use)


def _inputs(*slots: int) -> Callable[[Node, int], bool]:
    """Those inputs are shared, whatever they are computed from."""
    return lambda node, slot: slot in slots


def _own_axes(shape: Shape, whole: Sequence[int]) -> Shape:
    """``shape`` with leading ones, to as many axes as ``whole``."""
    return (1,) * (len(whole) - len(shape)) + tuple(shape)


def _broadcast_input(node: Node, slot: int) -> bool:
    """Whether an input of an elementwise node is broadcast over the first axis of the output."""
    whole = node._input_metadata[0].shape
    shape = input_shape(node, slot)
    return len(whole) > 0 and (len(shape) < len(whole) or (shape[0] == 1 < whole[0]))


def _of_last_axis(shape: Shape, t: Tensor) -> bool:
    return math.prod(shape[:-1]) == 1 and shape[-1:] == tuple(t.shape[-1:])


def _rows_first(t: Tensor, shape: Shape) -> tuple[Tensor, Shape]:
    """What meets an input of ``shape`` that is broadcast to t, as rows [R, ...], and the input's shape against that.

    An input of the last axis alone, [C], may meet rows of any layout; for any other the rows are the first axis over
    which it is broadcast.
    """
    if _of_last_axis(shape, t):
        return t.reshape(-1, t.shape[-1]), (1, t.shape[-1])
    own = _own_axes(shape, t.shape)
    axis = next((axis for axis, size in enumerate(own) if size == 1 < t.shape[axis]), None)
    if axis is None:
        return t[None], (1, *own)
    return t.movedim(axis, 0), (1, *own[:axis], *own[axis + 1 :])


def _broadcast(t: Tensor, shape: Shape, layout: RowLayout, n: int) -> Tensor:
    """The same as [N, S, C]: what the input is broadcast over becomes S, its own axes become C."""
    rows, own = _rows_first(t, shape)
    summed = [axis for axis in range(1, rows.dim()) if own[axis] == 1]
    kept = [axis for axis in range(1, rows.dim()) if own[axis] != 1]
    size = math.prod(rows.shape[axis] for axis in kept)
    return layout.split(rows.permute(0, *summed, *kept).reshape(len(rows), -1, size), n).reshape(n, -1, size)


def _elementwise(g: Tensor, use: Use) -> Tensor:
    return _rows_first(g, use.shape)[0]


def _channels(t: Tensor, layout: RowLayout, n: int) -> Tensor:
    """[R, C] or [R, C, *spatial] -> [N, S, C]."""
    t = t.unsqueeze(1) if t.dim() == 2 else t.flatten(2).transpose(1, 2)
    return t if len(t) == n else layout.split(t, n).flatten(1, 2)


def _not_as_input(layer: str) -> Callable[[Use], str | None]:
    return lambda use: f"is the input of a {layer}" if use.slot == 0 else None


def _check_convolution(use: Use) -> str | None:
    axes = len(use.node._input_metadata[0].shape) - 2  # of the output: activation checkpointing shows no input here
    if use.slot == 0:
        return "is the input of a convolution"
    return None if 1 <= axes <= 3 else f"belongs to a convolution with {axes} spatial axes"


@register_rule("ConvolutionBackward0", shared=_inputs(1, 2), check=_check_convolution)
def _convolution(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    node = use.node
    if use.slot == 2:
        return Product(_channels(g, layout, n))
    kernel = use.shape[2:]
    geometry = [per_axis(getattr(node, f"_saved_{key}"), len(kernel)) for key in ("stride", "padding", "dilation")]
    x, of_input = node._saved_input, not node._saved_transposed
    if not of_input:  # the transpose of a convolution that goes from its output to its input
        x, g = g, x
    x, g = (_frames(t, layout, n) for t in (x, g))
    if len(kernel) == 1:  # as a 2-d convolution over images of height 1
        x, g, kernel = x.unsqueeze(3), g.unsqueeze(3), (1, *kernel)
        geometry = [(neutral, *given) for neutral, given in zip((1, 0, 1), geometry, strict=True)]
    stride, padding, dilation = geometry
    if len(kernel) == 2:
        return _over_images(x, g, kernel, stride, padding, dilation, node._saved_groups, of_input)
    slices = []
    for k in range(kernel[0]):
        frames = torch.arange(g.shape[3]) * stride[0] - padding[0] + k * dilation[0]
        inside = (frames >= 0) & (frames < x.shape[3])
        seen = (  # [N, F, C, D, H, W] -> [N, F D', C, H, W]
            t[:, :, :, at].transpose(2, 3).flatten(1, 2) for t, at in ((x, frames[inside]), (g, inside.nonzero()[:, 0]))
        )
        rest = (given[1:] for given in (kernel, stride, padding, dilation))
        slices.append(_over_images(*seen, *rest, node._saved_groups, of_input))
    return Stacked(slices)


def _frames(t: Tensor, layout: RowLayout, n: int) -> Tensor:
    """[R, C, *size] -> [N, F, C, *size], F images an example."""
    return t[:, None] if len(t) == n else layout.split(t, n)


@register_rule(
    *("MatrixConvolutionBackward", "StridedDepthwiseBackward", "WinogradConvolutionBackward"),
    shared=_inputs(1, 2),
    check=_not_as_input("convolution"),
)
def _fast_convolution(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    if use.slot == 2:
        return Product(_channels(g, layout, n))
    x, g = (_frames(t, layout, n) for t in (use.node.saved_tensors[0], g))
    return _over_images(x, g, use.shape[2:], *use.node.geometry, use.node.groups, True)


def _over_images(
    x: Tensor, g: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int, of_input: bool
) -> Convolution:
    """A 2-d convolution of x [N, F, C, H, W] with cotangent g [N, F, O, Ho, Wo], F images an example."""
    n, f, channels, height, width = x.shape
    if f != 1:  # one tall image, with rows between in which the kernel meets nothing of two images at once
        rows = g.shape[3]
        read = (rows - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1  # of a padded image
        period = -(-max(read, height + padding[0]) // stride[0]) * stride[0]
        tall = x.new_zeros(n, channels, f * period + dilation[0] * (kernel[0] - 1), width)
        images = tall[:, :, : f * period].unflatten(2, (f, period))
        images[:, :, :, padding[0] : padding[0] + height] = x.transpose(1, 2)
        cotangent = g.new_zeros(n, g.shape[2], f, period // stride[0], g.shape[4])
        cotangent[:, :, :, :rows] = g.transpose(1, 2)
        x, g, padding = tall[:, None], cotangent.flatten(2, 3)[:, None], (0, padding[1])
    x, g = x[:, 0], g[:, 0]
    if kernel == (1, 1) and padding == (0, 0):  # a stride only leaves pixels out
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return Convolution(x, g, (kernel, stride, padding, dilation, groups), of_input)


def _norm_inputs(node: Node, slot: int) -> bool:
    # A batch norm that gets its parameters repeated is an instance norm, with examples along its channels.
    return slot in (1, 2) and node.next_functions[slot][0].name() != "RepeatBackward0"


def _check_batch_norm(use: Use) -> str | None:
    if use.slot == 0:
        return "is the input of a batch norm"
    if use.node._saved_training:
        raise UnsupportedError(
            f"the parameter {use} belongs to a batch norm in training mode: it couples the examples of a batch, so "
            "per-example gradients do not exist; call eval() on the network, or use estimator='batch_mean'"
        )
    return None


@register_rule("BatchNormBackward", shared=_norm_inputs, check=_not_as_input("batch norm"))
@register_rule("NativeBatchNormBackward0", shared=_norm_inputs, check=_check_batch_norm)
def _batch_norm(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    node = use.node
    g = _channels(g, layout, n)
    if use.slot == 2:
        return Product(g, norm=use.direct)
    if node.name() in NODES:
        (x, _, mean, variance), eps = node.saved_tensors, node.eps
    else:
        x, mean, variance = node._saved_input, node._saved_running_mean, node._saved_running_var
        eps = node._saved_eps
    return Product(g, _channels(x, layout, n), mean, (variance + eps).rsqrt(), norm=use.direct)


@register_rule("NativeGroupNormBackward0", shared=_inputs(1, 2), check=_not_as_input("group norm"))
def _group_norm(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    node = use.node
    rows = len(g)
    g = _channels(g, layout, n)
    if use.slot == 2:
        return Product(g, norm=use.direct)
    x = _channels(node._saved_input, layout, n)
    channels = x.shape[2]

    def each(t: Tensor) -> Tensor:  # [R, groups] -> [N, S, C]
        t = t.reshape(rows, -1).repeat_interleave(channels // t.shape[-1], -1)[:, None]
        return t if rows == n else layout.split(t.expand(-1, x.shape[1] * n // rows, -1), n).flatten(1, 2)

    return Product(g, x, each(node._saved_result1), each(node._saved_result2), norm=use.direct)


@register_rule(
    "NativeLayerNormBackward0",
    rows=lambda g, use: g.flatten(-len(use.shape)).reshape(-1, math.prod(use.shape)),
    shared=_inputs(1, 2),
    check=_not_as_input("layer norm"),
)
def _layer_norm(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    node = use.node

    def tokens(t: Tensor) -> Tensor:
        return layout.split(rows_of(use, t), n)

    if use.slot == 2:
        return Product(tokens(g), norm=use.direct)
    mean, scale = (layout.split(t.reshape(-1, 1), n) for t in (node._saved_result1, node._saved_result2))
    return Product(tokens(g), tokens(node._saved_input), mean, scale, norm=use.direct)


def _check_linear(use: Use) -> str | None:
    node = use.node
    if node.name() == "AddmmBackward0" and (node._saved_alpha, node._saved_beta) != (1, 1):
        return f"enters addmm with alpha={node._saved_alpha} and beta={node._saved_beta}, expected 1"
    return None


def _linear_inputs(node: Node, slot: int) -> bool:
    # The first input of addmm may be an activation of the output's own shape.
    return _broadcast_input(node, slot) if (node.name(), slot) == ("AddmmBackward0", 0) else slot == _right(node)


def _right(node: Node) -> int:
    """The input of a matrix product that is its right factor."""
    return 2 if node.name() == "AddmmBackward0" else 1


def _product_rows(g: Tensor, use: Use) -> Tensor:
    if use.slot == _right(use.node):
        return g.movedim(-2, 0)
    return _elementwise(g, use) if use.node.name() == "AddmmBackward0" and use.slot == 0 else g.movedim(-1, 0)


@register_rule("AddmmBackward0", "MmBackward0", rows=_product_rows, shared=_linear_inputs, check=_check_linear)
@register_rule("BmmBackward0", rows=_product_rows)
def _linear(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    node = use.node
    added = node.name() == "AddmmBackward0"
    if added and use.slot == 0:
        return Product(_broadcast(g, use.shape, layout, n))
    if use.slot == _right(node):  # [B, K, P] from [B, M, K] and g [B, M, P], rows M
        x, g = (t.movedim(-2, 0) for t in (node._saved_mat1 if added else node._saved_self, g))
        return _matrix(layout.split(g, n), layout.split(x, n), of_input=False, exchange=use.transposed)
    # [B, M, K] from [B, K, P] and g [B, M, P], rows P
    x, g = (t.movedim(-1, 0) for t in (node._saved_mat2, g))
    return _matrix(layout.split(x, n), layout.split(g, n), of_input=True, exchange=use.transposed)


@register_rule("OneDnnLinearBackward", rows=_features, shared=_inputs(1, 2), check=_not_as_input("linear layer"))
def _onednn_linear(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    g = layout.split(_features(g, use), n)
    if use.slot == 2:
        return Product(g)
    return Outer(layout.split(_features(use.node.saved_tensors[0], use), n), g)


def _matrix(x: Tensor, g: Tensor, of_input: bool, exchange: bool) -> Factors:
    """G_n = sum_s g x^T for x [N, S, (B,) I] and g [N, S, (B,) O], or its transpose."""
    if x.dim() == 4 and x.shape[2] == 1:
        x, g = x[:, :, 0], g[:, :, 0]
    if x.dim() == 3:
        outer = Outer(x, g, of_input)
        return outer.exchanged() if exchange else outer
    groups = x.shape[2]
    x, g = (t.flatten(2).transpose(1, 2).unsqueeze(2) for t in (x, g))  # [N, B I, 1, S]
    return Convolution(x, g, ((1, 1), (1, 1), (0, 0), (1, 1), groups), of_input)


def _check_embedding(use: Use) -> str | None:
    return "has scale_grad_by_freq, which couples examples" if use.node._saved_scale_grad_by_freq else None


@register_rule("EmbeddingBackward0", rows=_features, shared=_inputs(0), check=_check_embedding)
def _embedding(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    index = use.node._saved_indices.reshape(-1, 1)
    index = index.masked_fill(index == use.node._saved_padding_idx, -1)
    return Scatter(layout.split(index, n)[:, :, 0], layout.split(_features(g, use), n), use.shape[0])


def _scaled(use: Use, g: Tensor, layout: RowLayout, n: int, x: Tensor | None = None) -> Product:
    """The factors of an input of an elementwise node, x its derivative, of the output's shape (or a number, one)."""
    if x is None:
        return Product(_broadcast(g, use.shape, layout, n))
    return Product(_broadcast(g, use.shape, layout, n), _broadcast(x.expand(g.shape), use.shape, layout, n).to(g.dtype))


def _check_scaled_by_number(use: Use) -> str | None:
    node = use.node
    other = node._saved_self if use.slot == 1 else node._saved_other
    return "is multiplied by a number before use" if other is None else None


@register_rule("MulBackward0", rows=_elementwise, shared=_broadcast_input, check=_check_scaled_by_number)
def _multiply(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    return _scaled(use, g, layout, n, use.node._saved_self if use.slot == 1 else use.node._saved_other)


@register_rule("DivBackward0", rows=_elementwise, shared=_broadcast_input)
def _divide(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    other = use.node._saved_other
    return _scaled(use, g, layout, n, 1 / other if use.slot == 0 else -use.node._saved_self / other**2)


@register_rule("AddBackward0", "SubBackward0", rows=_elementwise, shared=_broadcast_input)
def _add(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    if use.slot == 1:
        factor = use.node._saved_alpha * (-1 if use.node.name() == "SubBackward0" else 1)
        g = g if factor == 1 else g * factor
    return _scaled(use, g, layout, n)


@register_rule("ExpandBackward0", rows=_elementwise, shared=_broadcast_input)
def _expand(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    return _scaled(use, g, layout, n)


def _repeats(g: Tensor, use: Use) -> tuple[Tensor, Shape]:
    """The output of a repetition with an axis of its own for each repeat, and the input's shape against that."""
    own = _own_axes(use.shape, g.shape)
    g = g.reshape([size for mine, whole in zip(own, g.shape, strict=True) for size in (whole // mine, mine)])
    return g, tuple(size for mine in own for size in (1, mine))


@register_rule("RepeatBackward0", rows=lambda g, use: _rows_first(*_repeats(g, use))[0], shared=lambda node, slot: True)
def _repeat(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    return Product(_broadcast(*_repeats(g, use), layout, n))


@register_rule("PreluKernelBackward0", rows=_elementwise, shared=_inputs(1))
def _prelu(use: Use, g: Tensor, layout: RowLayout, n: int) -> Factors:
    return _scaled(use, g, layout, n, use.node._saved_self.clamp(max=0))
