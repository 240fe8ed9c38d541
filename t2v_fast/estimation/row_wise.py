"""Prove that a forward pass computes each row of its output from the same row of its input.

:class:`RowWise` watches the calls of torch's functions in a forward pass. A network whose calls are all in a table of
row-wise functions, with arguments that keep the rows apart, cannot mix examples. This holds for every example of the
batch. To run examples a second time and to compare their logits is only needed where the proof fails.

The proof is an induction. The inputs are *rows*: tensors [N, ...] whose n-th entry belongs to example n. Parameters and
buffers are *constants*. A call in the table that gets rows, constants and plain numbers returns rows. So if the output
is one of the rows, its n-th entry is a function of the n-th entry of the inputs and of the constants.

The proof fails, and nothing is lost but time, at the first call that is not in the table. This includes each way in
which Python code can read a number out of a tensor: ``item``, ``bool``, ``tolist``, ``numpy``. It also fails where a
call gets a tensor that no seen call has returned (from compiled code, from a custom autograd function, or from another
pass), or that an unseen call has written to, which the tensor's version tells. And it fails where a tensor's class or
another mode may change what a call does, and where the pass has changed a constant.

The calls in their order, with their numbers, are the *program* of the pass. Two passes with equal programs compute the
same function of their rows. A network that hides a counter, a random number or a value of the batch in a Python number
has other programs in other passes. So the caller compares programs, too. One of the passes must be that of an example
alone, because code may read the number of examples (``shape``, ``len``). This number is then part of the program, so
that the program of the batch is another one. Only calls that set a shape, such as ``x.view(len(x), -1)``, may be given
the number: the program has the shape of a row of their result in its place.

What remains unseen is code that writes to the memory of a tensor without a new version (outside torch, or through
``data`` in a scripted function or in another thread), and code that torch's functions do not show and that returns a
number which depends on the batch, but is the same in all passes that are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from ..gradients.fast_layers import FastLayers
from ..gradients.members import modules_of

Program = tuple[tuple, ...]  # one entry for each call, with its function and what its arguments are; and the output

# No subclasses, which may have a code of their own for torch's functions.
_PLAIN = frozenset((type(None), type(...), bool, int, float, str, torch.dtype, torch.device, torch.memory_format))
_SEQUENCES = frozenset((tuple, list, torch.Size))
_ORDINARY = frozenset((Tensor, nn.Parameter))
_HARMLESS = frozenset((FastLayers, DeviceContext))  # modes that keep what a function computes


class _Row(NamedTuple):
    """A tensor [N, ...] whose n-th entry belongs to example n."""

    of: weakref.ref
    place: int  # among the rows of the pass
    version: int
    requires_grad: bool  # changes where a custom function returns the result of a seen call as its own
    fresh: bool  # whether its memory was made in the pass, so that a call may write to it

    def is_of(self, t: Any) -> bool:
        return self.of() is t


class _Call:
    """A call that is about to be made."""

    __slots__ = ("args", "constants", "kwargs", "rows", "sized", "tokens", "versions")

    def __init__(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.sized = False  # whether the program has the shape of a row of the result in place of the sizes given
        self.tokens: list[Any] = [func]
        self.rows: list[Tensor] = []  # among the arguments, in their order
        self.constants: list[Tensor] = []
        self.versions: list[tuple[Tensor, int]] = []  # of all tensors

    def option(self, place: int, name: str, default: Any) -> Any:
        """The argument of this name, or at this place."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def sizes(self) -> Sequence[int]:
        """The whole numbers after the first argument, as in ``x.view(2, 3)`` and ``x.view((2, 3))``."""
        given = self.args[1:]
        given = given[0] if len(given) == 1 and type(given[0]) in _SEQUENCES else given
        if self.kwargs or not given or not all(type(size) is int for size in given):
            raise _Unproved
        return given

    def leave_out_sizes(self) -> None:
        """Let the program have the shape of a row of the result, in place of all arguments but the first."""
        self.sized = True
        del self.tokens[4:]  # behind the function, the number of arguments, and the two tokens of a tensor


class _Unproved(Exception):
    """An argument that may hold what other rows have."""


def _constants_of(network: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a network, each once."""
    members = (t for m in modules_of(network) for of in (m._parameters, m._buffers) for t in of.values())
    return list({id(t): t for t in members if t is not None}.values())


class RowWise(TorchFunctionMode):
    """Watch one forward pass, within a ``with`` block; ask :meth:`program_of` its output afterwards.

    Args:
        network: The network. Its parameters and buffers are the constants.
        inputs: The inputs of the pass, a tree of tensors [N, ...].

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> with RowWise(network, x) as watch:
        ...     logits = network(x)
        >>> [function.__name__ for function, *_ in watch.program_of(logits)[:-1]]
        ['linear', 'relu', 'linear']
        >>> with RowWise(network, x) as watch:
        ...     logits = network(x - x.mean(0))
        >>> watch.program_of(logits) is None
        True
    """

    def __init__(self, network: nn.Module, inputs: Any) -> None:
        super().__init__()
        self._calls: list[tuple] | None = []  # None once the proof has failed
        self._rows: dict[int, _Row] = {}
        self._made = 0  # rows so far
        self._network = network
        with torch._C.DisableTorchFunction():
            constants = _constants_of(network)
            tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
            ordinary = not any(t.is_inference() for t in (*constants, *tensors))  # the others have no version
            sizes = {t.shape[0] if type(t) is Tensor and t.dim() else None for t in tensors}
            if not ordinary or len(sizes) != 1 or None in sizes:
                self._calls = None
                return
            (self._n,) = sizes
            self._constants = {id(t): (k, t._version, t) for k, t in enumerate(constants)}
            for t in tensors:
                self._rows[id(t)] = self._row(t, False)

    def __enter__(self) -> RowWise:
        below = _get_current_function_mode_stack()
        if not all(type(mode) in _HARMLESS for mode in below):
            self._calls = None  # another mode may change what the calls do
        return super().__enter__()

    def program_of(self, output: Any) -> Program | None:
        """The program of the pass, or None where it is not proved that the output [N, ...] is computed row by row."""
        if self._calls is None or not isinstance(output, Tensor):
            return None
        call = _Call(self.program_of, (output,), {})
        with torch._C.DisableTorchFunction():
            try:
                self._read((output,), call)
            except Exception:
                return None
            constants = _constants_of(self._network)
            if [(id(t), t._version) for t in constants] != [(id(t), v) for _, v, t in self._constants.values()]:
                return None  # the next pass would have other constants
        return (*self._calls, tuple(call.tokens[1:])) if call.rows else None

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._calls is None:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = self._before(func, args, kwargs)
        result = func(*args, **kwargs)
        if call is not None:
            with torch._C.DisableTorchFunction():
                self._after(call, result)
        return result

    def _before(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> _Call | None:
        """What a call gets; None for one that has no effect on the proof, or that ends it."""
        call = _Call(func, args, kwargs)
        try:
            self._read(args, call)
            for name, value in kwargs.items():
                call.tokens.append(name)
                self._read((value,), call)
            if not (call.rows or call.constants) or func in _PROPERTIES:
                return None
            rule = ROW_WISE.get(func)
            no_other_mode = torch._C._len_torch_dispatch_stack() == 0
            if rule is not None and rule(call) and no_other_mode:
                return call
        except Exception:  # also of a rule that meets arguments which the function itself will refuse
            pass
        self._calls = None
        return None

    def _after(self, call: _Call, result: Any) -> None:
        """Note what a call has returned, and check what it has written to."""
        assert self._calls is not None
        calls, self._calls = self._calls, None  # unless nothing below ends the proof
        results = result if type(result) in (tuple, list) else (result,)
        rows: list[_Row] = []
        shapes = []
        for t in results:
            shape = t.shape if type(t) is Tensor else ()  # a subclass may have a code of its own
            if not shape or shape[0] != self._n or t.is_inference():  # an inference tensor has no version
                return
            known = self._rows.get(id(t))
            row = self._row(t, known.fresh if known is not None and known.is_of(t) else not t._is_view())
            rows.append(row)
            # What no argument shows: whether autograd is on, and the type of autocast.
            call.tokens.append((row.requires_grad, t.dtype))
            if call.sized:
                shapes.append(shape[1:])
        if not rows:
            return
        # A call in place may write to its first argument, and to memory that was made in the pass.
        for t, version in call.versions:
            if t._version != version and not (t is result and t is call.args[0] and rows[0].fresh):
                return
        calls.append((*call.tokens, *shapes))
        self._rows |= {id(t): row for t, row in zip(results, rows, strict=True)}
        self._calls = calls

    def _row(self, t: Tensor, fresh: bool) -> _Row:
        self._made += 1
        return _Row(weakref.ref(t), self._made, t._version, t.requires_grad, fresh)

    def _read(self, values: Sequence[Any], call: _Call) -> None:
        """Note what arguments are: rows, constants, plain values, or sequences of these.

        One call for all values: a network makes hundreds of these calls between its layers, when none is in the caches.
        """
        tokens = call.tokens
        tokens.append(len(values))
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                tokens += (kind, value)
            elif kind in _ORDINARY:
                version = value._version
                if (constant := self._constants.get(id(value))) is not None and constant[1] == version:
                    call.constants.append(value)
                    tokens += ("constant", constant[0])
                elif (
                    (row := self._rows.get(id(value))) is not None
                    and row.is_of(value)
                    and row.version == version
                    and row.requires_grad == value.requires_grad
                ):
                    call.rows.append(value)
                    tokens += ("row", row.place)
                else:
                    raise _Unproved
                call.versions.append((value, version))
            elif kind in _SEQUENCES:
                self._read(value, call)
            elif kind is slice:
                tokens.append(slice)
                self._read((value.start, value.stop, value.step), call)
            else:
                raise _Unproved


# ---- the table: for each function, whether a call keeps rows apart

Rule = Callable[[_Call], bool]


def _one_row(call: _Call) -> bool:
    """Whether the first argument is a row, and every other tensor is a constant."""
    return len(call.rows) == 1 and call.rows[0] is call.args[0]


def _elementwise(call: _Call) -> bool:
    """A function of one row and numbers."""
    return _one_row(call) and not call.constants


def _broadcast(call: _Call) -> bool:
    """A function of two operands that are broadcast: the first axis of a row may meet that of another row only."""
    (dims,) = {t.dim() for t in call.rows}
    return (
        len(call.args) == 2
        and not any(isinstance(t, Tensor) for t in call.kwargs.values())
        and all(t.dim() < dims or (t.dim() == dims and t.shape[0] == 1) for t in call.constants)
    )


def _layer(dims: int) -> Rule:
    """A layer whose input has so many axes, the first of which is that of the rows."""
    return lambda call: _one_row(call) and call.args[0].dim() == dims


def _linear(call: _Call) -> bool:
    """A layer along inner axes. Its weight may be a matrix, and its bias, which is broadcast, a vector."""
    return _one_row(call) and call.args[0].dim() > 1 and all(t.dim() < 2 for t in call.constants[1:])


def _in_evaluation(place: int, default: bool) -> Rule:
    """A layer that mixes rows, or is random, in training mode."""
    return lambda call: _linear(call) and call.option(place, "training", default) is False


def _norm(call: _Call) -> bool:
    """Layer norm and RMS norm over the last axes."""
    return _one_row(call) and 0 < len(call.option(1, "normalized_shape", ())) < call.args[0].dim()


def _over_axes(place: int = 1, name: str = "dim", default: Any = (), added: int = 0) -> Rule:
    """A function of one row along some axes, none of which is the first of the result, which has some more axes."""

    def rule(call: _Call) -> bool:
        axes = call.option(place, name, default)
        axes = [axes] if isinstance(axes, int) else axes
        dims = call.args[0].dim() + added
        return _elementwise(call) and len(axes) > 0 and all(_is_inner(dims, axis) for axis in axes)

    return rule


def _joined(added: int) -> Rule:
    """Tensors that are joined along an inner axis of the result, which has some more axes."""

    def rule(call: _Call) -> bool:
        tensors, axis = call.args[0], call.option(1, "dim", 0)
        all_rows = len(call.rows) == len(tensors) > 0 and not call.constants
        return all_rows and all(_is_inner(t.dim() + added, axis) for t in tensors)

    return rule


def _permute(call: _Call) -> bool:
    return _elementwise(call) and call.sizes()[0] == 0


def _transpose(call: _Call) -> bool:
    return _elementwise(call) and not call.kwargs and all(_is_inner(call.args[0].dim(), a) for a in call.args[1:])


def _listed_axes(call: _Call) -> bool:
    """A function of one row along axes that may be arguments of their own, none of which is the first."""
    return _elementwise(call) and all(_is_inner(call.args[0].dim(), axis) for axis in call.sizes())


def _reshape(call: _Call) -> bool:
    """Another shape of as many rows. Each then has the same numbers as before, because the first axis is outermost."""
    sizes = call.sizes()
    call.leave_out_sizes()
    return _elementwise(call) and len(sizes) > 0


def _expand(call: _Call) -> bool:
    """One row or one constant, repeated along inner axes; or a constant that becomes every row."""
    t, sizes = call.args[0], call.sizes()
    call.leave_out_sizes()
    if call.rows:
        return _elementwise(call) and len(sizes) == t.dim()
    return len(sizes) > t.dim() or (len(sizes) == t.dim() and t.shape[0] == 1)


def _index(call: _Call) -> bool:
    """Whole numbers and slices of inner axes: the first axis is taken whole."""
    index = call.args[1] if type(call.args[1]) is tuple else (call.args[1],)
    if not _elementwise(call) or not all(type(i) in (int, slice, type(None), type(...)) for i in index):
        return False
    if index[0] is ...:
        return sum(type(i) in (int, slice) for i in index) < call.args[0].dim()
    return type(index[0]) is slice and index[0] == slice(None)


def _embedding(call: _Call) -> bool:
    """Rows of indices into a constant table. Gradients that are scaled by the counts of the batch are left out."""
    plain = call.option(3, "max_norm", None) is None and call.option(5, "scale_grad_by_freq", False) is False
    return _one_row(call) and plain and call.option(6, "sparse", False) is False


def _pad(call: _Call) -> bool:
    """Padding, which begins at the last axis. What torch cuts off in circular padding may show memory of others."""
    sizes = call.option(1, "pad", ())
    uncut = call.option(2, "mode", "constant") == "constant" or all(size >= 0 for size in sizes)
    return _elementwise(call) and len(sizes) < 2 * call.args[0].dim() - 1 and uncut


def _matmul(call: _Call) -> bool:
    """Products of matrices, each of one row; or of a constant matrix with the last axes of rows."""
    a, b = call.args
    if call.constants:
        (row,), (constant,) = call.rows, call.constants
        return constant.dim() == 2 and row.dim() > (1 if row is a else 2)
    return a.dim() == b.dim() > 2 and not call.kwargs


def _attention(call: _Call) -> bool:
    """Attention among the tokens of each row, without dropout. A mask may be a constant of the same dims or fewer.

    torch's kernel for CPUs reads as many keys as there are values: of fewer keys, it reads those of the next row.
    """
    (dims,) = {t.dim() for t in call.rows}
    q, k, v = call.args[:3]
    masks = all(t.dim() < dims or (t.dim() == dims and t.shape[0] == 1) for t in call.constants)
    no_constants = not any(t is u for t in (q, k, v) for u in call.constants)
    one_key_a_value = k.shape[:-1] == v.shape[:-1]
    return dims > 2 and no_constants and masks and one_key_a_value and call.option(4, "dropout_p", 0.0) == 0


def _is_inner(dims: int, axis: Any) -> bool:
    """Whether an axis of a tensor with so many axes is none but the first."""
    return type(axis) is int and -dims < axis < dims and axis != 0


ROW_WISE: dict[Callable, Rule] = {
    F.conv1d: _layer(3),
    F.conv2d: _layer(4),
    F.conv3d: _layer(5),
    F.linear: _linear,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    F.batch_norm: _in_evaluation(5, False),
    F.group_norm: _linear,
    F.layer_norm: _norm,
    F.rms_norm: _norm,
    F.normalize: _over_axes(2, "dim", 1),
    F.adaptive_avg_pool1d: _layer(3),
    F.adaptive_avg_pool2d: _layer(4),
    F.adaptive_avg_pool3d: _layer(5),
    F.avg_pool2d: _layer(4),
    F.max_pool2d: _layer(4),
    F.pad: _pad,
    F.dropout: _in_evaluation(2, True),
    F.dropout2d: _in_evaluation(2, True),
    F.softmax: _over_axes(),
    F.log_softmax: _over_axes(),
    F.glu: _over_axes(1, "dim", -1),
    torch.flatten: _over_axes(1, "start_dim", 0),
    Tensor.flatten: _over_axes(1, "start_dim", 0),
    Tensor.unflatten: _over_axes(),
    torch.cat: _joined(0),
    torch.stack: _joined(1),
    Tensor.__getitem__: _index,
    Tensor.expand: _expand,
}
ROW_WISE |= dict.fromkeys((torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax), _over_axes())
ROW_WISE |= dict.fromkeys((torch.softmax, Tensor.softmax), _over_axes())
ROW_WISE |= dict.fromkeys((torch.squeeze, Tensor.squeeze, torch.flip, Tensor.flip), _listed_axes)
ROW_WISE |= dict.fromkeys((torch.roll, Tensor.roll), _over_axes(2, "dims"))
ROW_WISE |= dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), _over_axes(added=1))
ROW_WISE |= dict.fromkeys((torch.unbind, Tensor.unbind), _over_axes(1, "dim", 0))
ROW_WISE |= dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), _over_axes(2, "dim", 0))
ROW_WISE |= dict.fromkeys((torch.permute, Tensor.permute), _permute)
ROW_WISE |= dict.fromkeys((torch.transpose, Tensor.transpose), _transpose)
ROW_WISE |= dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), _reshape)
ROW_WISE |= dict.fromkeys((torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm), _matmul)
ROW_WISE |= dict.fromkeys(
    (
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.hardtanh, F.relu6, F.leaky_relu, F.elu),
        *(F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.logsigmoid),
        *(torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.clamp, Tensor.clamp, Tensor.contiguous),
        *(torch.abs, Tensor.abs, torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt, torch.pow, Tensor.pow),
        *(torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.log, Tensor.log, Tensor.__pow__, Tensor.detach),
        *(torch.exp, Tensor.exp, torch.square, Tensor.square, torch.neg, Tensor.neg, Tensor.__neg__),
        *(Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half, Tensor.to),
    ),
    _elementwise,
)
ROW_WISE |= dict.fromkeys(
    (
        *(torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_, Tensor.__rsub__),
        *(torch.mul, Tensor.mul, Tensor.mul_, torch.div, Tensor.div, Tensor.div_, Tensor.__rdiv__),
    ),
    _broadcast,
)

# What tells no entry of a tensor. The number of rows differs from pass to pass, so that it shows in the programs.
_PROPERTIES = frozenset(
    (
        *(Tensor.size, Tensor.numel, Tensor.__len__),
        *(Tensor.dim, Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
        *(
            getattr(Tensor, name).__get__
            for name in ("ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_nested", "shape")
        ),
    )
)
