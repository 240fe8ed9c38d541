"""Transfers: from the owners of a node's output to the owners of its inputs.

A *transfer* belongs to one kind of autograd node, as a rule does (:mod:`t2v_fast.gradients.rules`). It reads shapes and
saved positions, never values of entries. A node without a transfer is called to find the owners
(:func:`t2v_fast.gradients.ownership.probe_node`), which takes longer: add a transfer here for a node that is called
often.

This file is long because it is a table, whose transfers are independent of each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .owners import (
    EACH,
    SHARED,
    Interacting,
    Owned,
    Owner,
    RowLayout,
    Scattered,
    Shape,
    Sole,
    State,
    along,
    is_complete,
    list_along,
    owner_along,
    owners_of_field,
)
from .quantised import LINEAR

# A transfer takes the node, the owner of its output and the number of examples. It returns the state of each input, or
# None for an input that no cotangent reaches. It returns None instead of a list where the node must be called.
Transfer = Callable[[Node, Owned, int], "Sequence[State | None] | None"]
TRANSFERS: dict[str, Transfer] = {}
# The convolutions of fast_layers.py, which cannot be imported here.
FAST_CONVOLUTIONS = "MatrixConvolution", "StridedDepthwise", "WideConvolution", "WinogradConvolution"
# Layers that mix the entries of their first input, an activation, along some axes.
MIXING: set[str] = {"Convolution", *FAST_CONVOLUTIONS}
# Transfers of nodes that read only some positions. One example may own the output, and not the whole input.
SELECTING: dict[str, Callable[[Node, Mapping[int, Owner], int], Sequence[State | None] | None]] = {}


@functools.cache
def kind_of(name: str) -> str:
    """The kind of a node: its name without "Backward" and the number of the overload (AddBackward0 -> Add)."""
    return name.rstrip("0123456789").removesuffix("Backward")


def output_shape(node: Node, number: int = 0) -> Shape:
    """The shape of one output of a node."""
    return tuple(node._input_metadata[number].shape)


def input_shape(node: Node, slot: int) -> Shape:
    """The shape of a node's input ``slot``, which must require a gradient."""
    child, number = node.next_functions[slot]
    return tuple(child._input_metadata[number].shape)


def transfer(*names: str, table: dict[str, Callable] | None = None) -> Callable[[Callable], Callable]:
    """Make the decorated function the transfer of some kinds of autograd nodes (:func:`kind_of`), in ``TRANSFERS``."""
    table = TRANSFERS if table is None else table

    def register(function: Callable) -> Callable:
        for name in names:
            if name in TRANSFERS or name in SELECTING:
                raise ValueError(f"the autograd node {name!r} already has a transfer")
            table[name] = function
        return function

    return register


def selecting(*names: str) -> Callable[[Callable], Callable]:
    """As :func:`transfer`, for nodes that read some positions; the function gets the owners of outputs by number."""
    return transfer(*names, table=SELECTING)


def signed(value: int) -> int:
    """A saved integer with its sign; torch shows some negative numbers as unsigned ones."""
    return value - 2**64 if value >= 2**63 else value


def saved_axis(value: int, dims: int) -> int:
    """An axis counted from 0, from a saved one."""
    value = signed(value)
    return value + dims if value < 0 else value


def _axes(values: Iterable[int] | int | None, dims: int) -> list[int]:
    """Axes counted from 0, from saved ones; none saved means all axes."""
    if values is None:
        return list(range(dims))
    values = [values] if isinstance(values, int) else list(values)
    return [saved_axis(v, dims) for v in values] or list(range(dims))


@transfer(
    *("Relu", "Gelu", "Silu", "Sigmoid", "Tanh", "Hardtanh", "Hardswish", "Hardsigmoid", "LeakyRelu", "Elu"),
    *("Softplus", "Mish", "Exp", "Expm1", "Log", "Log1p", "Log2", "Log10", "Sqrt", "Rsqrt", "Abs", "Neg"),
    *("Clamp", "ClampMin", "ClampMax", "Sin", "Cos", "Erf", "Reciprocal", "Threshold", "Clone", "ToCopy"),
    *("Alias", "LogSigmoid", "Sgn", "InPlaceHardtanh", "NativeDropout", "NanToNum", "Celu", "Softshrink"),
    *("Hardshrink", "Triu", "Tril", "Contiguous", "Square", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Erfinv"),
    *("Logit", "Round", "Floor", "Ceil", "Acosh", "Asinh", "Atanh", "Tan", "Erfc", "Exp2", "Lgamma", "Digamma"),
    *("Sinc", "Frac", "Sign", "Trunc"),
)
def _pointwise(node: Node, own: Owned, n: int) -> list[State]:
    """The node has one input in the output's shape, or several that broadcast to it."""
    if len(node.next_functions) == 1:
        return [own]
    return _broadcast(node, own, n)


@transfer(
    *("Add", "Sub", "Rsub", "Mul", "Div", "Where", "Maximum", "Minimum", "Addcmul", "Addcdiv", "Lerp", "Pow"),
    *("Expand", "MaskedFill", "PreluKernel", "Atan2", "Xlogy", "Fmod", "Remainder", "Copysign", "Hypot"),
    "torch::autograd::CopyBackwards",
)
def _broadcast(node: Node, own: Owned, n: int) -> list[State | None]:
    whole = output_shape(node)
    states: list[State | None] = []
    for child, number in node.next_functions:
        states.append(None if child is None else _aligned(child, number, own, whole))
    return states


ELEMENTWISE = frozenset(name for name, function in TRANSFERS.items() if function is _broadcast)


def _aligned(child: Node, number: int, own: Owned, whole: Shape) -> State:
    """The state of an operand that is broadcast to the output, with axes aligned from the right."""
    shape = child._input_metadata[number].shape
    if len(shape) == len(whole) and shape[own.axis] != 1:
        return own
    axis = own.axis - len(whole) + len(shape)
    if axis < 0 or shape[axis] == 1:
        return SHARED  # the operand is broadcast along the axis of the examples
    return own if axis == own.axis else Owned(axis, own.rows)


def keeps(*names: str, acts: Callable[[Node, int], Iterable[int]], mixes: bool = False) -> None:
    """Register nodes that keep the axis of the examples, unless it is one of the axes ``acts(node, dims)``.

    ``mixes``: along these axes, entries of one example change the outputs of another.
    """

    def function(node: Node, own: Owned, n: int) -> list[State | None] | None:
        dims = len(node._input_metadata[0].shape)
        if own.axis in acts(node, dims):
            return interacting_inputs(node) if mixes and is_complete(own) else None
        states: list[State | None] = [own]
        states += [SHARED] * (len(node.next_functions) - 1)
        return states

    transfer(*names)(function)
    MIXING.update(names)


def interacting_inputs(node: Node) -> list[State]:
    """The states of the inputs of a layer that mixes entries of several examples."""
    why = f"examples interact: {node.name()} acts along an axis along which they lie"
    return [Interacting(why), *[SHARED] * (len(node.next_functions) - 1)]


# Softmax and similar nodes act along one axis; poolings, paddings and resizings of images along the last axes.
keeps(
    *("Softmax", "LogSoftmax", "SafeSoftmax", "Cumsum", "Cumprod", "Logcumsumexp", "Sort", "Topk", "Glu"),
    acts=lambda node, dims: [saved_axis(node._saved_dim, dims)],
    mixes=True,
)
keeps("ConstantPadNd", acts=lambda node, dims: [dims - 1 - k // 2 for k, by in enumerate(node._saved_pad) if by])
keeps(
    *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "ReflectionPad2D"),
    *("ReplicationPad2D", "UpsampleBilinear2D", "UpsampleNearest2D", "UpsampleBicubic2D", "UpsampleBilinear2DAa"),
    *("UpsampleBicubic2DAa", "UpsampleNearestExact2D", "PixelShuffle", "PixelUnshuffle"),
    acts=lambda node, dims: range(dims - 3, dims) if "Pixel" in node.name() else range(dims - 2, dims),
)
keeps(
    *("ReflectionPad1D", "ReplicationPad1D", "UpsampleLinear1D", "UpsampleNearest1D"),
    acts=lambda node, dims: [dims - 1],
)
keeps(
    *("MaxPool3DWithIndices", "AvgPool3D", "AdaptiveAvgPool3D", "UpsampleTrilinear3D", "UpsampleNearest3D"),
    acts=lambda node, dims: range(dims - 3, dims),
)
keeps(
    *("NativeLayerNorm", "FusedRmsNorm"),
    acts=lambda node, dims: range(dims - len(node._saved_normalized_shape), dims),
)
keeps("NativeGroupNorm", acts=lambda node, dims: range(1, dims))
keeps("OneDnnLinear", *LINEAR, acts=lambda node, dims: [dims - 1])


@transfer("Flip")
def _flip(node: Node, own: Owned, n: int) -> list[State | None]:
    flipped = own.axis in _axes(node._saved_dims, len(output_shape(node)))
    return [owner_along(own.axis, own.rows.owners(n).flip(0), n) if flipped else own]


@transfer("Roll")
def _roll(node: Node, own: Owned, n: int) -> list[State | None] | None:
    dims, shifts = node._saved_dims, node._saved_shifts
    if len(dims) != len(shifts):
        return None  # the flattened tensor is rolled
    by = sum(
        signed(shift) for a, shift in zip(_axes(dims, len(output_shape(node))), shifts, strict=True) if a == own.axis
    )
    return [owner_along(own.axis, own.rows.owners(n).roll(-by), n) if by else own]


@transfer("Embedding")
def _embedding(node: Node, own: Owned, n: int) -> list[State] | None:
    return [SHARED] if own.axis < len(output_shape(node)) - 1 else None


@transfer("EmbeddingBag")
def _embedding_bag(node: Node, own: Owned, n: int) -> list[State | None] | None:
    weighted = len(node.next_functions) > 1 and node.next_functions[1][0] is not None
    return None if own.axis or weighted else [SHARED, *[None] * (len(node.next_functions) - 1)]


@transfer("Convolution", *FAST_CONVOLUTIONS)
def _convolution(node: Node, own: Owned, n: int) -> list[State] | None:
    """The examples are images, or groups of channels if each example has weights of its own."""
    if own.axis == 0:
        return [own] + [SHARED] * (len(node.next_functions) - 1)
    rows = own.rows
    if own.axis == 1 and isinstance(rows, RowLayout) and rows.outer == 1 and kind_of(node.name()) == "Convolution":
        channels = node._saved_input.shape[1]
        filters = output_shape(node)[1]
        if node._saved_groups % n == 0 and channels % n == 0 and filters == rows.inner * n:
            of_input, of_output = (Owned(axis, RowLayout(1, c // n)) for axis, c in ((1, channels), (0, filters)))
            of_weight = Owned(0, RowLayout(1, channels // n)) if node._saved_transposed else of_output
            return [of_input, of_weight, of_output]
    return None


@transfer("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm")
def _batch_norm(node: Node, own: Owned, n: int) -> list[State]:
    """Channels lie along axis 1; in training mode the layer mixes the entries of a channel."""
    rest = len(node.next_functions) - 3
    if own.axis == 1:
        return [own, Owned(0, own.rows), Owned(0, own.rows), *[None] * rest]
    if getattr(node, "_saved_training", False):
        why = (
            f"a batch norm in training mode, or without running statistics ({node.name()}), couples the examples of a "
            "batch; call eval() on the network"
        )
        return [Interacting(why), SHARED, SHARED, *[None] * rest]
    return [own, SHARED, SHARED, *[None] * rest]


@transfer("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
def _view(node: Node, own: Owned, n: int) -> list[State | None] | None:
    whole, shape = output_shape(node), input_shape(node, 0)
    if whole == shape:
        return [own]
    return None if 0 in shape else [reshaped(own, whole, shape, n)]


def reshaped(own: Owned, whole: Shape, shape: Shape, n: int) -> State | None:
    """The owners of a tensor of ``shape``, from the owners ``own`` of its view in shape ``whole``."""
    axis = own.axis
    # The smallest ranges of axes in both shapes that contain the axis, with as many entries before them and in them.
    first, last, start, stop = _range_around(axis, whole, shape)
    before, after = math.prod(whole[first:axis]), math.prod(whole[axis + 1 : last])
    rows = own.rows
    if isinstance(rows, RowLayout):
        outer, inner = before * rows.outer, rows.inner * after
        for a in range(start, stop):
            left, right = math.prod(shape[start:a]), math.prod(shape[a + 1 : stop])
            if outer % left == 0 and inner % right == 0 and shape[a] == outer // left * n * (inner // right):
                layout = RowLayout(outer // left, inner // right)
                return Owned(a, EACH if layout == EACH else layout)
    flat = rows.owners(n).repeat_interleave(after).repeat(before)
    left, right = (1,) * start, (1,) * (len(shape) - stop)
    return owners_of_field(flat.view(*left, *shape[start:stop], *right), n)


def _range_around(axis: int, whole: Shape, shape: Shape) -> tuple[int, int, int, int]:
    """The bounds of the range of axes of ``whole`` that contains ``axis``, and of the matching range of ``shape``."""
    i = j = first = start = 0
    while True:
        left, right = whole[i] if i < len(whole) else 1, shape[j] if j < len(shape) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * whole[i], i + 1
            else:
                right, j = right * shape[j], j + 1
        if first <= axis < i:
            return first, min(i, len(whole)), start, min(j, len(shape))
        first, start = i, j


@transfer("Transpose")
def _transpose(node: Node, own: Owned, n: int) -> list[State]:
    dims = len(output_shape(node))
    a, b = saved_axis(node._saved_dim0, dims), saved_axis(node._saved_dim1, dims)
    return [Owned(b if own.axis == a else a, own.rows) if own.axis in (a, b) else own]


@transfer("T")
def _t(node: Node, own: Owned, n: int) -> list[State]:
    return [Owned(len(output_shape(node)) - 1 - own.axis, own.rows)]


@transfer("Permute")
def _permute(node: Node, own: Owned, n: int) -> list[State]:
    axis = saved_axis(node._saved_dims[own.axis], len(output_shape(node)))
    return [own if axis == own.axis else Owned(axis, own.rows)]


@transfer(
    *("Sum", "Mean", "Amax", "Amin", "Logsumexp", "Var", "Std", "Prod", "Norm", "LinalgVectorNorm", "Max", "Min"),
    *("Median", "Nansum", "Argmax", "Aminmax"),
)
def _reduction(node: Node, own: Owned, n: int) -> list[State] | None:
    """The reduced axes are removed, or keep size one."""
    if not hasattr(node, "_saved_dim"):
        return None  # the node takes two tensors, or reduces all axes
    dims = len(input_shape(node, 0))
    reduced = set(_axes(node._saved_dim, dims))
    if node._saved_keepdim:
        return [own]
    axis = [a for a in range(dims) if a not in reduced][own.axis]
    return [own if axis == own.axis else Owned(axis, own.rows)]


@transfer("Mm", "Bmm", "Addmm", "Baddbmm")
def _product(node: Node, own: Owned, n: int) -> list[State | None]:
    """A product [(B,) M, K] [(B,) K, P], plus a tensor that is broadcast where the node adds one."""
    dims = len(output_shape(node))
    if own.axis == dims - 2:
        factors: list[State | None] = [own, SHARED]
    elif own.axis == dims - 1:
        factors = [SHARED, own]
    else:
        factors = [own, own]
    if len(node.next_functions) == 2:
        return factors
    child, number = node.next_functions[0]
    return [None if child is None else _aligned(child, number, own, output_shape(node)), *factors]


@transfer("GroupedMm", "GeneratedBackwardFor_transformers_grouped_mm_fallback_default")
def _grouped_product(node: Node, own: Owned, n: int) -> list[State | None] | None:
    """Groups of rows [R, A], each times its own matrix of a stack [E, A, B]."""
    if own.axis != 0 or len(output_shape(node)) != 2 or len(input_shape(node, 0)) != 2:
        return None
    return [own, SHARED, *[None] * (len(node.next_functions) - 2)]


@transfer("Mv")
def _matrix_vector(node: Node, own: Owned, n: int) -> list[State]:
    return [own, SHARED]


@transfer(
    *("ScaledDotProductFlashAttentionForCpu", "ScaledDotProductEfficientAttention", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductCudnnAttention", "ScaledDotProductFusedAttentionOverrideable"),
)
def _attention(node: Node, own: Owned, n: int) -> list[State | None] | None:
    """Queries, keys and values are [N, H, T, E], and a mask is broadcast. Heads and tokens of an example interact."""
    if own.axis != 0:
        return None
    return _broadcast(node, own, n)


@transfer("FlashAttention", "EfficientAttention")
def _attention_operator(node: Node, own: Owned, n: int) -> list[State | None] | None:
    """The same with queries, keys and values [N, T, H, E]. Texts of several lengths lie one after the other instead."""
    flash = kind_of(node.name()) == "FlashAttention"
    packed = node._saved_cum_seq_q if flash else node._saved_cu_seqlens_q
    return _broadcast(node, own, n) if own.axis == 0 and packed is None else None


@selecting("ThnnFusedLstmCell", "ThnnFusedGruCell")
def _recurrent_cell(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None] | None:
    """A step of a recurrent layer on a GPU: the gates of the input and of the state, a state, and biases."""
    own = outputs[min(outputs)]
    if not _is_axis(own) or own.axis != 0 or any(state != own for state in outputs.values()):
        return None
    return [own, own, own, *[SHARED] * (len(node.next_functions) - 3)]


@selecting("CudnnRnn", "MiopenRnn")
def _cudnn_rnn(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None] | None:
    """Inputs and outputs are [T, N, I], or [N, T, I] with batch_first. States are [layers, N, H]."""
    if node._saved_batch_sizes or not all(map(_is_axis, outputs.values())):
        return None  # the sequences are packed, or some entries belong to nobody
    axis, rows = 0 if node._saved_batch_first else 1, next(iter(outputs.values())).rows
    if any(own != Owned(1 if number else axis, rows) for number, own in outputs.items()):
        return None
    weights = len(node.next_functions) - 3
    return [Owned(axis, rows), *[SHARED] * weights, Owned(1, rows), Owned(1, rows)]


@transfer("Repeat")
def _repeat(node: Node, own: Owned, n: int) -> list[State] | None:
    whole, shape = output_shape(node), input_shape(node, 0)
    axis = own.axis - len(whole) + len(shape)
    rows = own.rows
    if axis < 0:
        return [SHARED]
    if not isinstance(rows, RowLayout):
        return None
    if rows.inner % shape[axis] == 0:
        return [SHARED]
    if shape[axis] % (n * rows.inner) == 0:
        return [Owned(axis, RowLayout(shape[axis] // (n * rows.inner), rows.inner))]
    return None


@transfer("Unfold")
def _unfold(node: Node, own: Owned, n: int) -> list[State] | None:
    """Windows are taken along one axis; the entries of a window lie along a new last axis."""
    dims = len(output_shape(node)) - 1
    return [own] if own.axis not in (saved_axis(node._saved_dimension, dims), dims) else None


@transfer("Scatter", "ScatterAdd", "IndexAdd", "IndexCopy")
def _scatter(node: Node, own: Owned, n: int) -> list[State | None] | None:
    """The node writes one tensor into another along one axis."""
    dims = len(output_shape(node))
    axis = saved_axis(node._saved_dim, dims)
    if len(node.next_functions) != 2:
        return None
    if axis != own.axis:
        child, _ = node.next_functions[1]
        same = child is None or input_shape(node, 1)[own.axis] == output_shape(node)[own.axis]
        return [own, own] if same else None
    if kind_of(node.name()) in ("Scatter", "ScatterAdd"):
        return None
    return [own, owner_along(axis, own.rows.owners(n)[node._saved_index.cpu().reshape(-1)], n)]


def _is_axis(state: Owner) -> bool:
    """Whether positions along one axis tell the owner of every entry, also of entries that are not read."""
    return isinstance(state, Owned) and is_complete(state)


def _of_parts(parts: Sequence[tuple[Owner, Tensor]], axis: int, size: int, n: int) -> Sequence[State | None] | None:
    """The owners of a tensor from the owners of parts of it, given as (owner, positions of the part along the axis)."""
    if all(_is_axis(state) and state.axis != axis and state == parts[0][0] for state, _ in parts):
        return [parts[0][0]]
    owners = torch.full((size,), -1)
    for state, positions in parts:
        found = list_along(state, axis, len(positions), n)
        if found is None:
            return None
        owners[positions] = found
    return [owner_along(axis, owners, n)]


@selecting("Slice")
def _slice(node: Node, outputs: Mapping[int, Owner], n: int) -> Sequence[State | None] | None:
    shape = tuple(node._saved_self_sym_sizes)
    axis = saved_axis(node._saved_dim, len(shape))
    start, stop = (signed(v) for v in (node._saved_start, node._saved_end))
    positions = torch.arange(shape[axis])[start : min(stop, shape[axis]) : node._saved_step]
    return _of_parts([(outputs[0], positions)], axis, shape[axis], n)


@selecting("Select")
def _select(node: Node, outputs: Mapping[int, Owner], n: int) -> Sequence[State | None] | None:
    shape = tuple(node._saved_self_sym_sizes)
    axis = saved_axis(node._saved_dim, len(shape))
    return _picked(outputs, {0: signed(node._saved_index)}, axis, shape, n)


@selecting("Unbind")
def _unbind(node: Node, outputs: Mapping[int, Owner], n: int) -> Sequence[State | None] | None:
    shape = input_shape(node, 0)
    return _picked(outputs, {k: k for k in outputs}, saved_axis(node._saved_dim, len(shape)), shape, n)


def _picked(
    outputs: Mapping[int, Owner], places: Mapping[int, int], axis: int, shape: Shape, n: int
) -> Sequence[State | None] | None:
    """Each output is one position along an axis; ``places`` gives the positions by output number."""
    states = list(outputs.values())
    if all(_is_axis(state) and state == states[0] for state in states):
        own = states[0]
        return [Owned(own.axis + (own.axis >= axis), own.rows)]
    if not all(isinstance(state, Sole) for state in states):
        return None
    owners = torch.full((shape[axis],), -1)
    for number, state in outputs.items():
        owners[places[number]] = state.example
    return [owner_along(axis, owners, n)]


@selecting("Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes")
def _split(node: Node, outputs: Mapping[int, Owner], n: int) -> Sequence[State | None] | None:
    shape = input_shape(node, 0)
    axis = saved_axis(node._saved_dim, len(shape))
    sizes = [of.shape[axis] for of in node._input_metadata]
    starts = [sum(sizes[:k]) for k in outputs]
    parts = [
        (own, torch.arange(start, start + sizes[k])) for start, (k, own) in zip(starts, outputs.items(), strict=True)
    ]
    return _of_parts(parts, axis, shape[axis], n)


@selecting("Index")
def _index(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None] | None:
    own, shape, whole = outputs[0], tuple(node._saved_self_sym_sizes), output_shape(node)
    indices: list[Tensor | None] = []
    for index in node._saved_indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            indices.extend(index.cpu().nonzero().unbind(1))
        else:
            indices.append(None if index is None else index.cpu())
    at = [k for k, index in enumerate(indices) if index is not None]
    positions = torch.broadcast_tensors(*(indices[k] for k in at))
    dims = positions[0].dim()
    # Adjacent indexed axes are replaced in place; otherwise the new axes come first.
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    if isinstance(own, Scattered):
        return None
    if isinstance(own, Owned) and not place <= own.axis < place + dims:
        if not _is_axis(own):
            return None
        kept = [a for a in range(len(shape)) if a not in at]
        axis = kept[own.axis - (dims if own.axis >= place else 0)]
        return [Owned(axis, own.rows)]
    if isinstance(own, Sole):
        owners = torch.full((positions[0].numel(),), own.example)
    else:
        owners = along(own.rows.owners(n), own.axis - place, dims).expand(whole[place : place + dims]).reshape(-1)
    if not len(owners):
        return [None]
    for axis, index in zip(at, positions, strict=True):
        where = index.reshape(-1) % shape[axis] if shape[axis] else index.reshape(-1)
        mine = owners >= 0
        listed = torch.full((shape[axis],), -1)
        listed[where[mine]] = owners[mine]
        if torch.equal(listed[where[mine]], owners[mine]):
            return [owner_along(axis, listed, n)]
    if len(at) == 1:
        return [SHARED]  # two examples read the same position
    return None


@selecting("IndexSelect")
def _index_select(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None]:
    own, shape = outputs[0], tuple(node._saved_self_sym_sizes)
    axis = saved_axis(node._saved_dim, len(shape))
    where = node._saved_index.cpu().reshape(-1)
    owners = list_along(own, axis, len(where), n)
    if owners is None:
        return [own] if _is_axis(own) else None
    mine = owners >= 0
    listed = torch.full((shape[axis],), -1)
    listed[where[mine]] = owners[mine]
    return [owner_along(axis, listed, n) if torch.equal(listed[where[mine]], owners[mine]) else SHARED]


@selecting("Gather")
def _gather(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None] | None:
    own, shape, whole = outputs[0], input_shape(node, 0), output_shape(node)
    axis = saved_axis(node._saved_dim, max(1, len(shape)))
    if isinstance(own, Owned) and own.axis != axis and whole[own.axis] == shape[own.axis]:
        return [own] if _is_axis(own) else None
    return None


@transfer("Cat")
def _cat(node: Node, own: Owned, n: int) -> list[State | None] | None:
    whole = output_shape(node)
    axis = saved_axis(node._saved_dim, len(whole))
    if own.axis != axis:
        return [own] * len(node.next_functions)
    children = [child for child, _ in node.next_functions]
    sizes = [None if c is None else input_shape(node, k)[axis] for k, c in enumerate(children)]
    if sizes.count(None) == 1:
        sizes[sizes.index(None)] = whole[axis] - sum(size for size in sizes if size is not None)
    if None in sizes:
        return None
    return [owner_along(axis, part, n) for part in own.rows.owners(n).split(sizes)]


@transfer("Stack")
def _stack(node: Node, own: Owned, n: int) -> list[State | None]:
    axis = saved_axis(node._saved_dim, len(output_shape(node)))
    count = len(node.next_functions)
    if own.axis != axis:
        return [Owned(own.axis - (own.axis > axis), own.rows)] * count
    return [Sole(int(e)) if e >= 0 else None for e in own.rows.owners(n)]


@transfer("IndexPut")
def _index_put(node: Node, own: Owned, n: int) -> list[State | None] | None:
    """Values are written or added at positions along the first axes."""
    child, _ = node.next_functions[1]
    indices = node._saved_indices
    if len(indices) != 1 or own.axis != 0 or indices[0] is None or child is None:
        return None
    index, taken = indices[0].cpu(), 1
    if index.dtype in (torch.bool, torch.uint8):
        index, taken = index.nonzero()[:, 0], index.dim()
    values = input_shape(node, 1)
    if index.dim() != 1 or values[:1] != (len(index),) or len(values) != len(output_shape(node)) - taken + 1:
        return None
    return [own, owner_along(0, own.rows.owners(n)[index], n)]


@selecting("AsStrided")
def _as_strided(node: Node, outputs: Mapping[int, Owner], n: int) -> list[State | None] | None:
    """The node only moves entries, so it turns a cotangent of owners' numbers into the owners of the input.

    It does so on the CPU as well, so that the host need not wait for a device. An average pool to one pixel is such a
    node for channels-last images.
    """
    of = node._input_metadata[0]
    field = (outputs[0].field(len(of.shape), n) + 1.0).expand(tuple(of.shape)).to("cpu", torch.float64)
    owners = node(field)  # numbers start from one; entries that nobody reads get zero
    # All entries are reached and there are as many as in the output, so each is reached once: nothing overlaps.
    if is_complete(outputs[0]) and owners.shape == field.shape and torch.equal(owners, field):
        return [outputs[0]]
    if bool((node(torch.ones_like(field)) > 1).any()):
        return None
    return [owners_of_field(owners.long() - 1, n)]


@selecting("MaskedSelect", "Diagonal", "Take", "torch::autograd::CopySlices")
def _must_be_called(node: Node, outputs: Mapping[int, Owner], n: int) -> None:
    """Only the node itself knows which entries it reads: it must be called."""
