"""Rules: from the cotangent at an autograd node to the factors of per-example gradients.

A *rule* belongs to one kind of autograd node. Where a parameter enters such a node, the rule returns the *factors* of
the parameter's per-example gradients (:mod:`t2v_fast.gradients.factors`), arranged by example. The rule is told which
entries of the node's output each example owns (:mod:`t2v_fast.gradients.owners`).

Where a node has no rule, or its rule does not handle a use, the node itself computes the gradients of one example after
the other (:class:`~t2v_fast.gradients.factors.Called`). The result is as exact, and takes longer.

A new layer needs a rule here; ``CONTRIBUTING.md`` has the other steps. This file is long because it is a table, whose
rules are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..ops.geometry import per_axis
from .factors import Called, Convolution, Factors, Outer, Product, Scatter, Stacked
from .fast_layers import NODES
from .graph import Use
from .grouped import grouped, is_listed
from .owners import EACH, ListedRows, Owned, Owner, PaddedRows, RowLayout, Shape, Sole
from .ragged import Ragged, groups_of
from .transfers import FAST_CONVOLUTIONS, output_shape


@dataclass(frozen=True)
class Rule:
    """The arguments of :func:`register_rule` for one kind of autograd node."""

    factors: Callable[[Use, Tensor, Owner, int], Factors]
    knows: Callable[[Use], bool]
    check: Callable[[Use], str | None]
    segments: Callable[[Use, Tensor], bool]
    together: Callable[[Use], bool]


RULES: dict[str, Rule] = {}


def register_rule(
    *nodes: str,
    knows: Callable[[Use], bool] = lambda use: True,
    check: Callable[[Use], str | None] = lambda use: None,
    segments: Callable[[Use, Tensor], bool] = lambda use, g: False,
    together: Callable[[Use], bool] = lambda use: False,
) -> Callable:
    """Make the decorated function the rule of some autograd nodes.

    The function is called as ``factors(use, g, owner, n)``: the :class:`~t2v_fast.gradients.graph.Use` of a parameter,
    the cotangent of the node's first output, the owner of the output's entries, and the number of examples. It returns
    the :class:`~t2v_fast.gradients.factors.Factors` of the parameter's per-example gradients.

    Args:
        *nodes: Names of autograd nodes, as ``tensor.grad_fn.name()`` shows them.
        knows: Whether the rule handles a use in which all examples share the parameter. The node itself computes the
            gradients of the uses that the rule does not handle.
        check: Why a use has no exact answer by any method, as the end of a sentence that begins with "the parameter
            ...", or None. The recorder raises UnsupportedError with this sentence.
        segments: Whether the rule takes rows in any order as they lie, with the cotangent g. Only then is it called
            with an owner that lists them. Elsewhere, examples of similar length are padded together.
        together: Whether the rule takes the cotangents of several passes together, g [K N, ...], where example n owns
            row n of each pass. The factors then have these rows in place of [N, ...], except for what is read from the
            node. The rule is asked only where example n owns row n of the node's output.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        ValueError: One of the nodes already has a rule.

    Example:
        A rule for a layer of one's own, which multiplies channels by a weight:

        >>> import torch
        >>> from t2v_fast import FisherRecorder
        >>> from t2v_fast.gradients.factors import Product
        >>> from t2v_fast.gradients.rules import register_rule, tokens_by_example
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, weight):  # [N, S, C], [C]
        ...         ctx.save_for_backward(x, weight)
        ...         return x * weight
        ...
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         x, weight = ctx.saved_tensors
        ...         return g * weight, (g * x).sum((0, 1))
        >>> @register_rule("ScaleBackward", knows=lambda use: use.slot == 1)
        ... def scale(use, g, owner, n):  # G_n = sum_s g x
        ...     x, _ = use.node.saved_tensors
        ...     return Product(tokens_by_example(g, owner, n), tokens_by_example(x, owner, n))
        >>> model = torch.nn.ParameterDict({"weight": torch.ones(3)})
        >>> with FisherRecorder(model) as recorder:
        ...     output = Scale.apply(torch.ones(2, 5, 3), model["weight"]).sum(1)  # [N, C]
        ...     recorder.backward(output, torch.ones(2, 3))
        {'weight': tensor([[25., 25., 25.],
                [25., 25., 25.]])}
    """

    def decorate(factors: Callable) -> Callable:
        for name in nodes:
            if name in RULES:
                raise ValueError(f"the autograd node {name!r} already has a rule: {RULES[name].factors.__name__}")
            RULES[name] = Rule(factors, knows, check, segments, together)
        return factors

    return decorate


def factors_of(use: Use, cotangents: Sequence[Tensor | None], n: int, alone: bool = True) -> Factors:
    """The factors of a parameter's per-example gradients at a tap, from the cotangents of the node's outputs.

    ``alone`` says that the parameter has no other use. Otherwise the factors are to be joined with those of other uses,
    which are padded too.
    """
    rule = _rule_of(use)
    if rule is not None and cotangents[0] is not None:
        g, owner = cotangents[0], use.owners[0]
        if use.stack is None and is_listed(owner) and not (alone and rule.segments(use, g)):
            if groups := groups_of(owner, n):
                return Ragged([(examples, rule.factors(use, g, own, len(examples))) for examples, own in groups])
            owner = Owned(owner.axis, PaddedRows(owner.rows.owners(n)))
        return rule.factors(use, g, owner, n)
    owners = (*use.owners, *[None] * (len(cotangents) - len(use.owners)))
    return Called(use.node, use.slot, use.shape, cotangents, owners, n, use.transposed)


def has_rule(use: Use) -> bool:
    """Whether a rule handles this use; otherwise the node itself computes the gradients."""
    return _rule_of(use) is not None


def takes_passes_together(use: Use) -> bool:
    """Whether the rule of a use takes the cotangents of several passes together."""
    rule = _rule_of(use)
    return rule is not None and use.stack is None and _is_each(use.owners[0]) and rule.together(use)


def _rule_of(use: Use) -> Rule | None:
    """The rule that handles this use, which is looked up once for all cotangents of a batch."""
    if "rule" not in use.kept:
        rule, owner = RULES.get(use.node.name()), use.owners[0]
        owned = isinstance(owner, Sole) or (isinstance(owner, Owned) and use.shared)
        use.kept["rule"] = rule if rule is not None and owned and rule.knows(use) else None
    return use.kept["rule"]


def unsupported_reason(use: Use) -> str | None:
    """Why a use has no exact answer by any method, to follow "the parameter ... "; None where there is an answer."""
    rule = RULES.get(use.node.name())
    return None if rule is None else rule.check(use)


# ---- conditions on a use, for ``knows``


def _of_rows(use: Use) -> bool:
    """Whether the parameter is not the layer's input, and examples own rows, not channels or pixels."""
    owner = use.owners[0]
    return use.slot > 0 and (not isinstance(owner, Owned) or owner.axis == 0)


def _before_axis(use: Use, axis: int) -> bool:
    """Whether the examples lie along an axis before ``axis``, which may be counted from the end."""
    owner = use.owners[0]
    return not isinstance(owner, Owned) or owner.axis < axis % len(output_shape(use.node))


# ---- convolutions


@register_rule(
    "ConvolutionBackward0",
    knows=lambda use: _of_rows(use) and 3 <= len(output_shape(use.node)) <= 5,
    together=lambda use: len(output_shape(use.node)) <= 4 and not use.node._saved_transposed,
)
def _convolution(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    node = use.node
    if use.slot == 2:
        return Product(_channels_by_example(g, owner, n))
    kernel = use.shape[2:]
    axes = len(kernel)
    geometry = [per_axis(t, axes) for t in (node._saved_stride, node._saved_padding, node._saved_dilation)]
    x, of_input = node._saved_input, not node._saved_transposed
    if not of_input:  # a transposed convolution is a convolution from its output to its input
        x, g = g, x
    if len(kernel) == 2 and _is_each(owner):
        return _image_of_each(x, g, kernel, *geometry, node._saved_groups, of_input)
    x, g = (by_example(t, owner, n, 0) for t in (x, g))  # [N, F, C, *size], F images per example
    if len(kernel) == 1:  # a 2-d convolution over images of height 1
        x, g, kernel = x.unsqueeze(3), g.unsqueeze(3), (1, *kernel)
        geometry = [(neutral, *given) for neutral, given in zip((1, 0, 1), geometry, strict=True)]
    stride, padding, dilation = geometry
    if len(kernel) == 2:
        return _over_images(x, g, kernel, stride, padding, dilation, node._saved_groups, of_input)
    slices: list[Convolution | None] = []
    for k in range(kernel[0]):
        # The output frame d sees the input frame d * stride + offset. Frames from `first` to `last` are in the input.
        offset = k * dilation[0] - padding[0]
        first, last = max(0, -(offset // stride[0])), min(g.shape[3], (x.shape[3] - 1 - offset) // stride[0] + 1)
        if first >= last:  # this slice of the kernel sees nothing but padding
            slices.append(None)
            continue
        start = first * stride[0] + offset
        frames = slice(start, start + (last - first - 1) * stride[0] + 1, stride[0])
        seen = (  # [N, F, C, D, H, W] -> [N, F D', C, H, W]
            t[:, :, :, at].transpose(2, 3).flatten(1, 2) for t, at in ((x, frames), (g, slice(first, last)))
        )
        rest = (given[1:] for given in (kernel, stride, padding, dilation))
        slices.append(_over_images(*seen, *rest, node._saved_groups, of_input))
    return Stacked(slices)


@register_rule(*(f"{layer}Backward" for layer in FAST_CONVOLUTIONS), knows=_of_rows, together=lambda use: True)
def _fast_convolution(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    if use.slot == 2:
        return Product(_channels_by_example(g, owner, n))
    x, geometry, groups = use.node.saved_tensors[0], use.node.geometry, use.node.groups
    if _is_each(owner):
        return _image_of_each(x, g, use.shape[2:], *geometry, groups, True)
    x, g = (by_example(t, owner, n, 0) for t in (x, g))
    return _over_images(x, g, use.shape[2:], *geometry, groups, True)


def _over_images(
    x: Tensor, g: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int, of_input: bool
) -> Convolution:
    """The factors of a 2-d convolution of x [N, F, C, H, W] with cotangent g [N, F, O, Ho, Wo], F images each."""
    n, f, channels, height, width = x.shape
    if f != 1:  # stack the images into a tall one, with zeros between so that the kernel never sees two images at once
        rows = g.shape[3]
        read = (rows - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1  # rows of a padded image that are read
        period = -(-max(read, height + padding[0]) // stride[0]) * stride[0]
        tall = x.new_zeros(n, channels, f * period + dilation[0] * (kernel[0] - 1), width)
        images = tall[:, :, : f * period].unflatten(2, (f, period))
        images[:, :, :, padding[0] : padding[0] + height] = x.transpose(1, 2)
        cotangent = g.new_zeros(n, g.shape[2], f, period // stride[0], g.shape[4])
        cotangent[:, :, :, :rows] = g.transpose(1, 2)
        x, g, padding = tall[:, None], cotangent.flatten(2, 3)[:, None], (0, padding[1])
    return _image_of_each(x[:, 0], g[:, 0], kernel, stride, padding, dilation, groups, of_input)


def _image_of_each(
    x: Tensor, g: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int, of_input: bool
) -> Convolution:
    """The factors of a 2-d convolution of x [N, C, H, W] with cotangent g [N, O, Ho, Wo]."""
    if kernel == (1, 1) and padding == (0, 0) and stride != (1, 1):  # here a stride only leaves out pixels
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return Convolution(x, g, (kernel, stride, padding, dilation, groups), of_input)


# ---- norms


def _check_batch_norm(use: Use) -> str | None:
    by_channels = isinstance(use.owners[0], Owned) and use.owners[0].axis == 1
    if getattr(use.node, "_saved_training", False) and use.slot and not by_channels:
        return (
            "belongs to a batch norm in training mode, or without running statistics: it couples the examples of a "
            "batch, so per-example gradients do not exist; call eval() on the network, or use estimator='batch_mean'"
        )
    return None


@register_rule(
    *("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0", "BatchNormBackward"),
    knows=_of_rows,
    check=_check_batch_norm,
    together=lambda use: True,
)
def _batch_norm(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    g = _channels_by_example(g, owner, n)
    if use.slot == 2:
        return Product(g, norm=use.direct)
    node, shift, scale = use.node, None, None
    if node.name() in NODES:
        (x, _, mean, variance, shift, scale), eps = node.saved_tensors, node.eps
    else:
        x, mean, variance = node._saved_input, node._saved_running_mean, node._saved_running_var
        eps = node._saved_epsilon if hasattr(node, "_saved_epsilon") else node._saved_eps
        if node.name() == "NativeBatchNormBackward0" and not node._saved_training:
            shift, scale = node._saved_result1, node._saved_result2
            if scale.shape != variance.shape:  # on a CPU they are empty
                shift = scale = None
    if scale is None:
        if "scale" not in use.kept:
            use.kept["scale"] = (variance + eps).rsqrt()
        shift, scale = mean, use.kept["scale"]
    return Product(g, _channels_by_example(x, owner, n), shift, scale, norm=use.direct)


@register_rule("NativeGroupNormBackward0", knows=_of_rows, together=lambda use: True)
def _group_norm(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    node = use.node
    if use.slot == 2:
        return Product(_channels_by_example(g, owner, n), norm=use.direct)
    x = node._saved_input
    rows, channels = x.shape[:2]
    positions = x[0, 0].numel() if rows else 1

    def each(t: Tensor) -> Tensor:  # [R, groups] -> [N, S, C]
        t = t.reshape(rows, -1).repeat_interleave(channels // node._saved_group, -1)[:, None]
        if isinstance(owner, Owned) and owner.rows == RowLayout():
            return t
        return tokens_by_example(t.expand(-1, positions, -1), owner, n)

    g, x = _channels_by_example(g, owner, n), _channels_by_example(x, owner, n)
    return Product(g, x, each(node._saved_result1), each(node._saved_result2), norm=use.direct)


@register_rule("NativeLayerNormBackward0", knows=lambda use: use.slot > 0 and _before_axis(use, -len(use.shape)))
def _layer_norm(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    node = use.node
    leading = g.dim() - len(use.shape)

    def tokens(t: Tensor, axes: int = len(use.shape)) -> Tensor:
        return tokens_by_example(t.flatten(-axes) if axes > 1 else t, owner, n)

    if use.slot == 2:
        return Product(tokens(g), norm=use.direct)
    mean, scale = (tokens(t.reshape(*g.shape[:leading], 1), 1) for t in (node._saved_result1, node._saved_result2))
    return Product(tokens(g), tokens(node._saved_input), mean, scale, norm=use.direct)


@register_rule("FusedRmsNormBackward0", knows=lambda use: use.slot > 0 and _before_axis(use, -len(use.shape)))
def _rms_norm(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    """On CUDA, RMS norm is one node. On a CPU it is several elementwise nodes."""
    axes, leading = len(use.shape), g.dim() - len(use.shape)
    scale = use.node._saved_result1.reshape(*g.shape[:leading], 1)
    g, x = (tokens_by_example(t.flatten(-axes), owner, n) for t in (g, use.node._saved_input))
    return Product(g, x, None, tokens_by_example(scale, owner, n), norm=use.direct)


# ---- matrix products


def _right_factor(node: Node) -> int:
    """The number of the input that is the right factor of a matrix product."""
    return 2 if node.name() == "AddmmBackward0" else 1


def _examples_axis(use: Use) -> int:
    """The axis of the examples in a product [(B,) M, K] [(B,) K, P] with a parameter, counted from the end."""
    return -2 if use.slot == _right_factor(use.node) else -1


def _knows_product(use: Use) -> bool:
    node, owner = use.node, use.owners[0]
    if use.stack is not None and isinstance(use.stack.index, Tensor):
        return True
    if node.name() == "AddmmBackward0":
        if (node._saved_alpha, node._saved_beta) != (1, 1):
            return False
        if use.slot == 0:
            return True
    return not isinstance(owner, Owned) or owner.axis == len(output_shape(node)) + _examples_axis(use)


def _is_matrix(use: Use, g: Tensor) -> bool:
    """Whether the parameter is a factor of a product whose result is a matrix."""
    return g.dim() == 2 and not (use.node.name() == "AddmmBackward0" and use.slot == 0)


def _takes_products_together(use: Use) -> bool:
    """Whether the parameter is added to a product, or is the right factor as a linear layer has it."""
    of_input = use.slot == _right_factor(use.node) and use.transposed
    return use.node.name() == "AddmmBackward0" and (use.slot == 0 or of_input)


@register_rule(
    "AddmmBackward0",
    "MmBackward0",
    "BmmBackward0",
    knows=_knows_product,
    segments=_is_matrix,
    together=_takes_products_together,
)
def _linear(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    node = use.node
    added = node.name() == "AddmmBackward0"
    if added and use.slot == 0:
        return Product(_broadcast_by_example(g, _with_leading_ones(use.shape, g.shape), owner, n))
    right, axis = use.slot == _right_factor(node), _examples_axis(use)
    if use.stack is not None and isinstance(use.stack.index, Tensor):
        return _looked_up(use, g, owner, n)
    if use.stack is not None or is_listed(owner):
        x = (node._saved_mat1 if added else node._saved_self) if right else node._saved_mat2
        x, g = (t if axis == -2 else t.T for t in (x, g))  # [R, I], [R, O]
        if use.stack is not None:
            swap = use.stack.transposed != right
            return grouped(*((g, x) if swap else (x, g)), owner, n, use.stack.index, use.stack.count)
        return grouped(*((x, g) if use.transposed == right else (g, x)), owner, n)
    if right:
        x, g = (by_example(t, owner, n, axis) for t in (node._saved_mat1 if added else node._saved_self, g))
        return _matrix(g, x, of_input=False, exchange=use.transposed)
    x, g = (by_example(t, owner, n, axis) for t in (node._saved_mat2, g))
    return _matrix(x, g, of_input=True, exchange=use.transposed)


@register_rule(
    "OneDnnLinearBackward",
    knows=lambda use: use.slot > 0 and _before_axis(use, -1),
    segments=lambda use, g: use.slot == 1 and g.dim() == 2,
    together=lambda use: True,
)
def _onednn_linear(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    if is_listed(owner) and use.stack is None:
        return grouped(use.node.saved_tensors[0], g, owner, n)
    if use.stack is not None:
        x, stack = use.node.saved_tensors[0], use.stack
        if g.dim() > 2 or not is_listed(owner):
            x, g = (tokens_by_example(t, owner, n) for t in (x, g))
            owner = Owned(0, RowLayout(1, g.shape[1]))
            x, g = x.flatten(0, 1), g.flatten(0, 1)
        return grouped(*((g, x) if stack.transposed else (x, g)), owner, n, stack.index, stack.count)
    g = tokens_by_example(g, owner, n)
    return Product(g) if use.slot == 2 else Outer(tokens_by_example(use.node.saved_tensors[0], owner, n), g)


def _matrix(x: Tensor, g: Tensor, of_input: bool, exchange: bool) -> Factors:
    """The factors of G_n = sum_s g x^T for x [N, S, (B,) I] and g [N, S, (B,) O], or of its transpose."""
    if x.dim() == 4 and x.shape[2] == 1:
        x, g = x[:, :, 0], g[:, :, 0]
    if x.dim() == 3:
        outer = Outer(x, g, of_input)
        return outer.exchanged() if exchange else outer
    groups = x.shape[2]
    x, g = (t.flatten(2).transpose(1, 2).unsqueeze(2) for t in (x, g))  # [N, B I, 1, S]
    return Convolution(x, g, ((1, 1), (1, 1), (0, 0), (1, 1), groups), of_input)


def _looked_up(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    """A batched product [S, A, B] [S, B, C] with a matrix of a stack for each of S, which is looked up."""
    x = use.node._saved_self if use.slot else use.node._saved_mat2
    if use.slot:  # the gradient of matrix s is x_s^T g_s
        left, right = x, g
    else:  # g_s x_s^T
        left, right = g.mT, x.mT
    each = left.shape[1]
    if isinstance(owner, Owned):
        owner = Owned(0, ListedRows(owner.rows.owners(n).repeat_interleave(each)))
    experts = use.stack.index.cpu().repeat_interleave(each)
    left, right = (t.flatten(0, 1) for t in (left, right))
    return grouped(*((left, right) if use.stack.transposed else (right, left)), owner, n, experts, use.stack.count)


@register_rule(
    "GroupedMmBackward0",
    "GeneratedBackwardFor_transformers_grouped_mm_fallback_defaultBackward",
    knows=lambda use: use.stack is not None and _before_axis(use, 1),
)
def _grouped_product(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    """Groups of rows [R, A], each times its own matrix of a stack [E, A, B]; ``offs`` says where the groups end."""
    node, count = use.node, use.stack.count
    if hasattr(node, "_saved_offs"):
        x, ends = node._saved_self, node._saved_offs
    else:
        x, ends = node.saved_tensors[0], node.offs
    experts = torch.bucketize(torch.arange(len(g)), ends.cpu().long(), right=True)
    return grouped(*((x, g) if use.stack.transposed else (g, x)), owner, n, experts, count)


# ---- tables that are looked up


def _check_embedding(use: Use) -> str | None:
    if use.node._saved_scale_grad_by_freq:
        return "has scale_grad_by_freq, which divides by how often a token occurs in the batch and couples its examples"
    return None


@register_rule("EmbeddingBackward0", knows=lambda use: _before_axis(use, -1), check=_check_embedding)
def _embedding(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    index = use.node._saved_indices.long().unsqueeze(-1)
    index = index.masked_fill(index == use.node._saved_padding_idx, -1)
    return Scatter(tokens_by_example(index, owner, n, fill=-1)[:, :, 0], tokens_by_example(g, owner, n), use.shape[0])


@register_rule(
    "EmbeddingBagBackward0",
    knows=lambda use: use.slot == 0 and use.node._saved_mode < 2 and _before_axis(use, -1),  # a sum or a mean
    check=_check_embedding,
)
def _embedding_bag(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    node = use.node
    index, weights = node._saved_indices.long(), node._saved_per_sample_weights
    at = torch.arange(len(index), dtype=node._saved_offsets.dtype, device=index.device)
    bag = torch.searchsorted(node._saved_offsets, at, right=True) - 1  # the bag of each index
    g = g[bag]
    if node._saved_mode == 1:  # a mean, which takes no weights
        weights = 1 / node._saved_result2.clamp_min(1)[bag].to(g.dtype)
    if weights is not None:
        g = g * weights[:, None]
    if isinstance(owner, Owned):
        owner = Owned(0, ListedRows(owner.rows.owners(n)[bag.cpu()]))
    index = index.masked_fill(index == node._saved_padding_idx, -1).unsqueeze(-1)
    return Scatter(tokens_by_example(index, owner, n, fill=-1)[:, :, 0], tokens_by_example(g, owner, n), use.shape[0])


def _knows_index(use: Use) -> bool:
    """Whether rows of the parameter are looked up by integers along its first axis."""
    indices = use.node._saved_indices
    one = len(indices) == 1 and indices[0] is not None and indices[0].dtype not in (torch.bool, torch.uint8)
    return one and indices[0].dim() > 0 and _before_axis(use, indices[0].dim())


@register_rule("IndexBackward0", knows=_knows_index)
def _index(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    index = use.node._saved_indices[0].long()
    g = g.reshape(*index.shape, math.prod(use.shape[1:]))
    index = (index % use.shape[0]).unsqueeze(-1)
    return Scatter(tokens_by_example(index, owner, n, fill=-1)[:, :, 0], tokens_by_example(g, owner, n), use.shape[0])


# ---- elementwise nodes


def _scaled(use: Use, g: Tensor, owner: Owner, n: int, x: Tensor | None = None) -> Product:
    """The factors of an input of an elementwise node.

    ``x`` is the derivative of the output with respect to the input, and broadcasts to the output; None stands for one.
    """
    own = _with_leading_ones(use.shape, g.shape)
    if x is None:
        return Product(_broadcast_by_example(g, own, owner, n))
    return Product(
        _broadcast_by_example(g, own, owner, n), _broadcast_by_example(x.expand(g.shape), own, owner, n).to(g.dtype)
    )


def _other_factor(use: Use) -> Tensor | None:
    return use.node._saved_self if use.slot == 1 else use.node._saved_other


@register_rule("MulBackward0", knows=lambda use: _other_factor(use) is not None)
def _multiply(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    return _scaled(use, g, owner, n, _other_factor(use))


@register_rule("DivBackward0")
def _divide(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    other = use.node._saved_other
    return _scaled(use, g, owner, n, 1 / other if use.slot == 0 else -use.node._saved_self / other**2)


@register_rule("AddBackward0", "SubBackward0")
def _add(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    if use.slot == 1:
        factor = use.node._saved_alpha * (-1 if use.node.name() == "SubBackward0" else 1)
        g = g if factor == 1 else g * factor
    return _scaled(use, g, owner, n)


@register_rule("AddcmulBackward0")
def _add_product(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    """The node computes self + value * tensor1 * tensor2."""
    node = use.node
    if use.slot == 0:
        return _scaled(use, g, owner, n)
    other = node._saved_tensor2 if use.slot == 1 else node._saved_tensor1
    return _scaled(use, g, owner, n, other * node._saved_value)


@register_rule("WhereBackward0")
def _where(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    condition = use.node._saved_condition
    return _scaled(use, g.masked_fill(condition if use.slot else ~condition, 0), owner, n)


@register_rule("ExpandBackward0")
def _expand(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    return _scaled(use, g, owner, n)


def _knows_repeat(use: Use) -> bool:
    owner, whole = use.owners[0], output_shape(use.node)
    if not isinstance(owner, Owned):
        return True
    mine = _with_leading_ones(use.shape, whole)[owner.axis]
    return isinstance(owner.rows, RowLayout) and owner.rows.inner % mine == 0


@register_rule("RepeatBackward0", knows=_knows_repeat)
def _repeat(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    own = _with_leading_ones(use.shape, g.shape)
    # Divide each axis in two: repeats, and entries of the parameter.
    sizes = [(whole // mine, mine) for mine, whole in zip(own, g.shape, strict=True)]
    if isinstance(owner, Owned):
        rows, mine = owner.rows, own[owner.axis]
        owner = Owned(2 * owner.axis, RowLayout(rows.outer, rows.inner // mine))
    g = g.reshape([size for pair in sizes for size in pair])
    return Product(_broadcast_by_example(g, tuple(size for mine in own for size in (1, mine)), owner, n))


@register_rule("PreluKernelBackward0", knows=lambda use: use.slot == 1)
def _prelu(use: Use, g: Tensor, owner: Owner, n: int) -> Factors:
    return _scaled(use, g, owner, n, use.node._saved_self.clamp(max=0))


# ---- activations and cotangents arranged by example


def _is_each(owner: Owner) -> bool:
    """Whether example n owns row n along the first axis, which is the usual case."""
    return isinstance(owner, Owned) and owner.axis == 0 and (owner.rows is EACH or owner.rows == EACH)


def by_example(t: Tensor, owner: Owner, n: int, axis: int, fill: float = 0) -> Tensor:
    """Arrange ``t`` as [N, S, other axes of t], where S are the positions of each example along its owner's axis.

    ``axis`` is the axis to be summed over where one example owns all of ``t``. ``fill`` is put where an example has
    fewer positions than others.
    """
    if isinstance(owner, Owned):
        rows, axis = owner.rows, owner.axis
    elif n == 1:
        rows = RowLayout(1, t.shape[axis])
    else:
        rows = ListedRows(torch.full((t.shape[axis],), owner.example))
    return rows.split(t if axis == 0 else t.movedim(axis, 0), n, fill)


def tokens_by_example(t: Tensor, owner: Owner, n: int, trailing: int = 1, fill: float = 0) -> Tensor:
    """Arrange ``t`` as [N, S, ...] with the last ``trailing`` axes of ``t``; all other axes become S."""
    t = by_example(t, owner, n, 0, fill)
    return t if t.dim() == 2 + trailing else t.flatten(1, -1 - trailing)


def _channels_by_example(t: Tensor, owner: Owner, n: int) -> Tensor:
    """[R, C] or [R, C, *spatial] -> [N, S, C]."""
    if t.dim() > 2 and _is_each(owner):
        return t.flatten(2).mT
    if t.dim() == 2:
        return by_example(t, owner, n, 0)
    return tokens_by_example(t.flatten(2).transpose(1, 2), owner, n)


def _broadcast_by_example(t: Tensor, own: Shape, owner: Owner, n: int) -> Tensor:
    """Arrange ``t`` as [N, S, C] for an input of shape ``own`` (with as many axes as ``t``) that is broadcast to ``t``.

    The axes that the input is broadcast over become S, and the input's own axes become C.
    """
    if isinstance(owner, Owned):
        own = (*own[: owner.axis], *own[owner.axis + 1 :])
    else:
        t = t.unsqueeze(0)
    t = by_example(t, owner, n, 0)  # [N, S, the other axes]
    if t.dim() == 3 and own[0] != 1:
        return t
    summed = [axis + 2 for axis, size in enumerate(own) if size == 1]
    kept = [axis + 2 for axis, size in enumerate(own) if size != 1]
    sizes = (math.prod(t.shape[axis] for axis in axes) for axes in ((1, *summed), kept))
    return t.permute(0, 1, *summed, *kept).reshape(len(t), *sizes)


def _with_leading_ones(shape: Shape, whole: Sequence[int]) -> Shape:
    """``shape`` with leading ones, so that it has as many axes as ``whole``."""
    return (1,) * (len(whole) - len(shape)) + tuple(shape)
