"""From an autograd node to op calls: the only file to edit for a new layer.

A :class:`Rule` belongs to one kind of node. Given the node's cotangent it says which rows there are (``rows``), and for
each parameter that enters the node, which primitive yields its per-example squared gradients (``factors``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from . import ops, plan
from .graph import RowLayout, Taps, UnsupportedError, Use


@dataclass
class Reuse:
    """What is computed once at one node, for several cotangents of a batch or for several parameters."""

    cotangents: int = 1  # how many there will be
    parameters: int = 1  # how many wanted ones enter the node
    gram: Tensor | None = None  # of the layer's input, for all cotangents
    bias: Tensor | None = None  # sums of a norm's bias, found with those of its weight, for this cotangent


class Factors(Protocol):
    """The two factors of a parameter's per-example gradients, ready for a primitive."""

    def filter_sums(self, reuse: Reuse) -> Tensor:
        """Sum of squares over each filter, q [N, filters]."""

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        """out += sum_n weight[n] G_n^2, out of the parameter's shape, weight [N]."""

    def work(self, cotangents: int) -> tuple[str, plan.Work]:
        """The path that ``filter_sums`` takes, and its work for one example and all its cotangents."""

    def predict(self, cotangents: int) -> float | None:
        """Seconds that the planner expects for one example and all its cotangents; None where it does not choose."""


class _Layer(ABC):
    """A convolution of x [N, C, H, W] with cotangent g [N, O, Ho, Wo], or a linear layer seen as one."""

    @property
    @abstractmethod
    def conv(self) -> plan.Conv:
        """The geometry, for the planner."""

    @abstractmethod
    def images(self, t: Tensor) -> Tensor:
        """x or g as images."""

    @abstractmethod
    def sums(self, path: str) -> Tensor:
        """Sum of squares over each filter, q [N, filters], by one path."""

    def path(self, cotangents: int) -> str:
        return plan.choose(self.conv, self.x, cotangents)

    def filter_sums(self, reuse: Reuse) -> Tensor:
        path = self.path(reuse.cotangents)
        # A Gram matrix is kept for the next cotangent only where that takes no more memory than the layer itself.
        if (
            path == "gram"
            and reuse.cotangents > 1
            and self.conv.gram_numel * len(self.x) <= self.x.numel() + self.g.numel()
        ):
            if reuse.gram is None:
                reuse.gram = ops.conv_gram(self.images(self.x), *self.conv.arguments)
            return ops.sq_gram(reuse.gram, self.images(self.g))
        return self.sums(path)

    def work(self, cotangents: int) -> tuple[str, plan.Work]:
        path = self.path(cotangents)
        return path, plan.work(self.conv, path, self.x.element_size(), cotangents)

    def predict(self, cotangents: int) -> float | None:
        return plan.predict(self.conv, self.x, self.path(cotangents), cotangents)


@dataclass(frozen=True)
class Outer(_Layer):
    """G_n = sum_s g x^T; the parameter is [O, I]."""

    x: Tensor  # [N, S, I]
    g: Tensor  # [N, S, O]

    @property
    def conv(self) -> plan.Conv:
        return plan.Conv(self.x.shape[2], (1, self.x.shape[1]), self.g.shape[2])

    def path(self, cotangents: int) -> str:
        # Of one token the gradient has rank one: what sq_outer makes of it is cheaper than any path of a convolution.
        return "explicit" if self.x.shape[1] == 1 else super().path(cotangents)

    def images(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).unsqueeze(2)

    def sums(self, path: str) -> Tensor:
        return ops.sq_outer(self.x, self.g, path)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        ops.sq_outer_acc_(out, self.x, self.g, weight)


@dataclass(frozen=True)
class Convolution(_Layer):
    """G_n of a convolution; the parameter is [O, C / groups, *kernel] with one or two spatial axes."""

    x: Tensor  # [N, C, H, W]
    g: Tensor  # [N, O, Ho, Wo]
    geometry: tuple  # kernel_size, stride, padding, dilation, groups

    @property
    def conv(self) -> plan.Conv:
        return plan.Conv(self.x.shape[1], tuple(self.x.shape[2:]), self.g.shape[1], *self.geometry)

    def images(self, t: Tensor) -> Tensor:
        return t

    def sums(self, path: str) -> Tensor:
        return ops.sq_conv(self.x, self.g, *self.geometry, path)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        kernel_size, *rest = self.geometry
        out = out.view(*out.shape[:2], *kernel_size)
        ops.sq_conv_acc_(out, self.x, self.g, weight, *rest, plan.choose(self.conv, self.x, elementwise=True))


@dataclass(frozen=True)
class Product:
    """G_n = sum_s g (x - shift) scale, or sum_s g for a bias; C entries of the parameter, in its own order."""

    g: Tensor  # [N, S, C]
    x: Tensor | None = None  # [N, S, C]
    shift: Tensor | None = None
    scale: Tensor | None = None
    filters: int | None = None  # where the parameter's first axis is shorter than C
    norm: bool = False  # whether it is the weight of a norm, or its bias, which comes after the weight

    def filter_sums(self, reuse: Reuse) -> Tensor:
        if self.norm and self.x is None and reuse.bias is not None:
            q, reuse.bias = reuse.bias, None
        elif self.norm and self.x is not None and reuse.parameters > 1:
            q, reuse.bias = ops.sq_norm(self.g, self.x, self.shift, self.scale)
        else:
            q = ops.sq_prod(self.g, self.x, self.shift, self.scale)
        return q if self.filters is None else q.unflatten(1, (self.filters, -1)).sum(2)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        ops.sq_prod_acc_(out.view(-1), self.g, weight, self.x, self.shift, self.scale)

    def work(self, cotangents: int) -> tuple[str, plan.Work]:
        n = self.g[0].numel() * cotangents
        operands = 1 if self.x is None else 2
        return "pass", plan.Work((), (), n * operands, n * operands * self.g.element_size())

    def predict(self, cotangents: int) -> float | None:
        return None


Shape = tuple[int, ...]


def _first_axis(g: Tensor, shape: Shape) -> Tensor:
    """[R, ...]: the first axis holds the rows."""
    return g


def _features(g: Tensor, shape: Shape) -> Tensor:
    """[..., O] -> [R, O]."""
    return g.reshape(-1, g.shape[-1])


def _normalised(g: Tensor, shape: Shape) -> Tensor:
    """[..., *shape] -> [R, C]."""
    return g.flatten(-len(shape)).reshape(-1, math.prod(shape))


def _elementwise(g: Tensor, shape: Shape) -> Tensor:
    """The rows of a sum or product with a parameter that is broadcast over the examples, wherever their axis is.

    A parameter of the last axis alone, [C], may meet rows of any layout; any other leaves the first axis to them.
    """
    return _features(g, shape) if _of_last_axis(shape, g) else g


def _of_last_axis(shape: Shape, t: Tensor) -> bool:
    return math.prod(shape[:-1]) == 1 and shape[-1:] == tuple(t.shape[-1:])


def _positions(t: Tensor) -> Tensor:
    """[N, C] or [N, C, *spatial] -> [N, S, C]."""
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Rule:
    """How one kind of node yields the factors of the parameters that enter it.

    ``factors(use, g, layout, n, parameter)`` gets the cotangent of the node's output, the layout of its rows over the
    n examples, and the parameter itself (for its shape). It raises UnsupportedError where it has no exact answer.
    """

    factors: Callable[[Use, Tensor, RowLayout, int, Tensor], Factors]
    rows: Callable[[Tensor, Shape], Tensor] = field(default=_first_axis)
    check: Callable[[Use], None] | None = None  # raises UnsupportedError for what the node alone rules out


RULES: dict[str, Rule] = {}


def register_rule(
    *nodes: str,
    rows: Callable[[Tensor, Shape], Tensor] = _first_axis,
    check: Callable[[Use], None] | None = None,
) -> Callable:
    """Make the decorated function the rule of the autograd nodes of these names; a name can be taken only once."""

    def decorate(factors: Callable) -> Callable:
        for name in nodes:
            if name in RULES:
                raise ValueError(f"the autograd node {name!r} already has a rule: {RULES[name].factors.__name__}")
            RULES[name] = Rule(factors, rows, check)
        return factors

    return decorate


def rows_of(use: Use, g: Tensor, parameter: Tensor) -> Tensor:
    """The cotangent at a parameter's tap as rows, [R, ...]; each row belongs to one example."""
    return RULES[use.node.name()].rows(g, tuple(parameter.shape))


def check_supported(taps: Taps) -> None:
    """Raise UnsupportedError, naming parameter and node, unless every use has a rule and no parameter is used twice."""
    users: dict[str, Use] = {}
    for node, uses in taps.uses.items():
        for use in uses:
            if node.name() not in RULES:
                raise UnsupportedError(
                    f"the parameter {use} has no rule: it is transformed before use, or the layer is not supported; "
                    f"leave it out with parameters=..., or register a rule (rules are known for {', '.join(RULES)})"
                )
            if check := RULES[node.name()].check:
                check(use)
            if use.parameter in users:
                raise UnsupportedError(
                    f"the parameter {use} is used more than once, here and by {users[use.parameter]}: "
                    "its per-example gradients would have to be summed before squaring, which is not supported"
                )
            users[use.parameter] = use


def _unsupported(use: Use, why: str) -> UnsupportedError:
    return UnsupportedError(f"the parameter {use} {why}")


def _broadcast(use: Use, t: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Tensor:
    """``t``, of the shape of what the parameter was added to or multiplied with, as [N, S, C]: what it is broadcast
    over becomes S, its own axes become C."""
    shape = tuple(parameter.shape)
    if _of_last_axis(shape, t):
        return layout.split(_features(t, shape), n)
    _one_row_each(use, layout)
    own = (1,) * (t.dim() - len(shape)) + shape
    if own[0] != 1 or any(size not in (1, whole) for size, whole in zip(own, t.shape, strict=True)):
        raise _unsupported(use, f"has shape {list(shape)}, expected one that is broadcast over the examples of {use}")
    summed = [axis for axis in range(1, t.dim()) if own[axis] == 1]
    kept = [axis for axis in range(1, t.dim()) if own[axis] != 1]
    return t.permute(0, *summed, *kept).reshape(n, math.prod(t.shape[axis] for axis in summed), -1)


def _filters(parameter: Tensor) -> int | None:
    return None if parameter.dim() < 2 else parameter.shape[0]


def _bias(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Product:
    return Product(_broadcast(use, g, layout, n, parameter), filters=_filters(parameter))


def _one_row_each(use: Use, layout: RowLayout) -> None:
    if (layout.outer, layout.inner) != (1, 1):
        raise _unsupported(
            use,
            f"sees {layout.outer * layout.inner} images of each example along its batch axis, which is not supported",
        )


@register_rule("ConvolutionBackward0")
def _convolution(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    node = use.node
    _one_row_each(use, layout)
    if use.slot == 2:
        return Product(_positions(g))
    if use.slot != 1:
        raise _unsupported(use, "is the input of a convolution")
    if use.transposed:
        raise _unsupported(use, "is transposed before use")
    if node._saved_transposed:
        raise _unsupported(use, "belongs to a transposed convolution")
    x, kernel = node._saved_input, tuple(parameter.shape[2:])
    geometry = [tuple(getattr(node, f"_saved_{key}")) for key in ("stride", "padding", "dilation")]
    geometry = [given * len(kernel) if len(given) == 1 else given for given in geometry]  # one number for all axes
    if len(kernel) == 1:  # as a 2-d convolution over images of height 1
        x, g, kernel = x.unsqueeze(2), g.unsqueeze(2), (1, *kernel)
        geometry = [(neutral, *given) for neutral, given in zip((1, 0, 1), geometry, strict=True)]
    if len(kernel) != 2:
        raise _unsupported(use, f"belongs to a convolution with {len(kernel)} spatial axes")
    stride, padding, dilation = geometry
    if kernel == (1, 1) and padding == (0, 0):  # a stride only leaves pixels out
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return Convolution(x, g, (kernel, stride, padding, dilation, node._saved_groups))


def _evaluating(use: Use) -> None:
    if use.node._saved_training:
        raise _unsupported(
            use,
            "belongs to a batch norm in training mode: it couples the examples of a batch, so per-example gradients do "
            "not exist; call eval() on the network, or use estimator='batch_mean'",
        )


@register_rule("NativeBatchNormBackward0", check=_evaluating)
def _batch_norm(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    node = use.node
    _one_row_each(use, layout)
    if use.slot == 2:
        return Product(_positions(g), norm=True)
    if use.slot != 1:
        raise _unsupported(use, "is the input of a batch norm")
    mean = node._saved_running_mean
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return Product(_positions(g), _positions(node._saved_input), mean, scale, norm=True)


@register_rule("AddmmBackward0", "MmBackward0", rows=_features)
def _linear(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    node = use.node
    biased = node.name() == "AddmmBackward0"
    if biased and (node._saved_alpha, node._saved_beta) != (1, 1):
        raise _unsupported(use, f"enters addmm with alpha={node._saved_alpha} and beta={node._saved_beta}, expected 1")
    if biased and use.slot == 0:
        return _bias(use, g, layout, n, parameter)
    if use.slot != (2 if biased else 1):
        raise _unsupported(use, "is the left factor of a matrix product, where rows are no examples")
    x = layout.split(node._saved_mat1 if biased else node._saved_self, n)
    g = layout.split(_features(g, ()), n)
    return Outer(x, g) if use.transposed else Outer(g, x)


@register_rule("NativeLayerNormBackward0", rows=_normalised)
def _layer_norm(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    node, shape = use.node, tuple(parameter.shape)

    def tokens(t: Tensor) -> Tensor:
        return layout.split(_normalised(t, shape), n)

    if use.slot == 2:
        return Product(tokens(g), filters=_filters(parameter), norm=True)
    if use.slot != 1:
        raise _unsupported(use, "is the input of a layer norm")
    mean, scale = (layout.split(t.reshape(-1, 1), n) for t in (node._saved_result1, node._saved_result2))
    return Product(tokens(g), tokens(node._saved_input), mean, scale, _filters(parameter), norm=True)


@register_rule("MulBackward0", rows=_elementwise)
def _multiply(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    other = use.node._saved_self if use.slot == 1 else use.node._saved_other
    if other is None:
        raise _unsupported(use, "is multiplied by a number before use")
    x = _broadcast(use, other.expand(g.shape), layout, n, parameter)
    return Product(_broadcast(use, g, layout, n, parameter), x.to(g.dtype), filters=_filters(parameter))


@register_rule("ExpandBackward0", rows=_elementwise)
def _expand(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    return _bias(use, g, layout, n, parameter)


@register_rule("AddBackward0", rows=_elementwise)
def _add(use: Use, g: Tensor, layout: RowLayout, n: int, parameter: Tensor) -> Factors:
    if use.slot == 1 and use.node._saved_alpha != 1:
        raise _unsupported(use, f"is added with alpha={use.node._saved_alpha}, expected 1")
    return _bias(use, g, layout, n, parameter)
