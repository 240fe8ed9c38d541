"""Prove that a forward pass computes each row of its output from the same row of its input.

:class:`RowWise` watches the calls of torch's functions in a forward pass. A network whose calls are all in a table of
row-wise functions, with arguments that keep the rows apart, cannot mix examples. This holds for every example of the
batch. To run examples a second time and to compare their logits is only needed where the proof fails.

The proof is an induction. The inputs are *rows*: tensors [N, ...] whose n-th entry belongs to example n. Parameters and
buffers are *constants*. A call in the table that gets rows, constants and plain numbers returns rows. So if the output
is one of the rows, its n-th entry is a function of the n-th entry of the inputs and of the constants.

The proof fails, and nothing is lost but time, at the first call that is not in the table. This includes each way in
which Python code can read a number out of a tensor or the number of examples: ``item``, ``bool``, ``tolist``,
``numpy``, ``shape``, ``len``. It also fails where a call gets a tensor that no seen call has returned (from compiled
code, from a custom autograd function, or from another pass), or that an unseen call has written to, which the tensor's
version tells. And it fails where a tensor's class or another mode may change what a call does, and where the pass has
changed a constant.

The calls in their order, with their numbers, are the *program* of the pass. Two passes with equal programs compute the
same function of their rows. A network that hides a counter, a random number or a value of the batch in a Python number
has other programs in other passes. So the caller compares programs, too.

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

Program = tuple[tuple, ...]  # one entry for each call, with its function and what its arguments are; and the output

# No subclasses, which may have a code of their own for torch's functions.
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format))
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

    __slots__ = ("args", "constants", "kwargs", "rows", "tokens", "versions")

    def __init__(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.tokens: list[Any] = [func]
        self.rows: list[Tensor] = []  # among the arguments, in their order
        self.constants: list[Tensor] = []
        self.versions: list[tuple[Tensor, int]] = []  # of all tensors

    def option(self, place: int, name: str, default: Any) -> Any:
        """The argument of this name, or at this place."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


class _Unproved(Exception):
    """An argument that may hold what other rows have."""


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
            constants = [*network.parameters(), *network.buffers()]
            tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
            ordinary = not any(t.is_inference() for t in (*constants, *tensors))  # the others have no version
            sizes = {t.shape[0] if type(t) is Tensor and t.dim() else None for t in tensors}
            if not ordinary or len(sizes) != 1 or None in sizes:
                self._calls = None
                return
            (self._n,) = sizes
            self._constants = {id(t): (k, t._version, t) for k, t in enumerate(constants)}
            for t in tensors:
                self._keep(t, False)

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
                self._read(output, call)
            except Exception:
                return None
            constants = [*self._network.parameters(), *self._network.buffers()]
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
                self._read(value, call)
            if not (call.rows or call.constants) or func in _PROPERTIES:
                return None
            if func in _SIZES and (not call.rows or _is_inner(args[0], call.option(1, "dim", None))):
                return None
            rule = ROW_WISE.get(func)
            no_other_mode = torch._C._len_torch_dispatch_stack() == 0
            if rule is not None and call.rows and rule(call) and no_other_mode:
                return call
        except Exception:  # also of a rule that meets arguments which the function itself will refuse
            pass
        self._calls = None
        return None

    def _after(self, call: _Call, result: Any) -> None:
        """Note what a call has returned, and check what it has written to."""
        assert self._calls is not None
        known = self._rows.get(id(result))
        if known is not None and not known.is_of(result):
            known = None
        fresh = known is not None and known.fresh
        # A call in place may write to its first argument, and to memory that was made in the pass.
        fine = all(
            t._version == version or (t is result and t is call.args[0] and fresh) for t, version in call.versions
        )
        ordinary = type(result) is Tensor and not result.is_inference()  # the others have no version
        if not (fine and ordinary and result.dim() and result.shape[0] == self._n):
            self._calls = None
            return
        # What no argument shows: whether autograd is on, and the type of autocast.
        self._calls.append((*call.tokens, result.requires_grad, result.dtype))
        self._keep(result, fresh if known is not None else not result._is_view())

    def _keep(self, t: Tensor, fresh: bool) -> None:
        self._rows[id(t)] = _Row(weakref.ref(t), self._made, t._version, t.requires_grad, fresh)
        self._made += 1

    def _read(self, value: Any, call: _Call) -> None:
        """Note what an argument is: a row, a constant, a plain value, or a sequence of these."""
        kind = type(value)
        if kind in _ORDINARY:
            version = value._version
            if (constant := self._constants.get(id(value))) is not None and constant[1] == version:
                call.constants.append(value)
                call.tokens += ("constant", constant[0])
            elif (
                (row := self._rows.get(id(value))) is not None
                and row.is_of(value)
                and (row.version, row.requires_grad) == (version, value.requires_grad)
            ):
                call.rows.append(value)
                call.tokens += ("row", row.place)
            else:
                raise _Unproved
            call.versions.append((value, version))
        elif kind in _SEQUENCES:
            call.tokens.append(len(value))
            for entry in value:
                self._read(entry, call)
        elif kind in _PLAIN:
            call.tokens += (kind, value)
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
    return _one_row(call) and call.args[0].dim() > 1


def _in_evaluation(place: int, default: bool) -> Rule:
    """A layer that mixes rows, or is random, in training mode."""
    return lambda call: _linear(call) and call.option(place, "training", default) is False


def _layer_norm(call: _Call) -> bool:
    return _one_row(call) and 0 < len(call.option(1, "normalized_shape", ())) < call.args[0].dim()


def _flatten(call: _Call) -> bool:
    return _elementwise(call) and _is_inner(call.args[0], call.option(1, "start_dim", 0))


def _over_axes(call: _Call) -> bool:
    """A function along some axes, none of which is that of the rows."""
    axes = call.option(1, "dim", ())
    axes = [axes] if isinstance(axes, int) else axes
    return _elementwise(call) and len(axes) > 0 and all(_is_inner(call.args[0], a) for a in axes)


def _cat(call: _Call) -> bool:
    axis = call.option(1, "dim", 0)
    return len(call.rows) == len(call.args[0]) and not call.constants and all(_is_inner(t, axis) for t in call.rows)


def _permute(call: _Call) -> bool:
    axes = call.args[1:] if isinstance(call.args[1], int) else call.args[1]
    return _elementwise(call) and not call.kwargs and axes[0] == 0


def _transpose(call: _Call) -> bool:
    return _elementwise(call) and not call.kwargs and all(_is_inner(call.args[0], a) for a in call.args[1:])


def _is_inner(t: Tensor, axis: Any) -> bool:
    """Whether an axis is none but the first."""
    return type(axis) is int and -t.dim() < axis < t.dim() and axis != 0


ROW_WISE: dict[Callable, Rule] = {
    F.conv1d: _layer(3),
    F.conv2d: _layer(4),
    F.conv3d: _layer(5),
    F.linear: _linear,
    F.batch_norm: _in_evaluation(5, False),
    F.group_norm: _linear,
    F.layer_norm: _layer_norm,
    F.adaptive_avg_pool2d: _layer(4),
    F.avg_pool2d: _layer(4),
    F.max_pool2d: _layer(4),
    F.dropout: _in_evaluation(2, True),
    F.dropout2d: _in_evaluation(2, True),
    F.softmax: _over_axes,
    F.log_softmax: _over_axes,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
    torch.cat: _cat,
    torch.permute: _permute,
    Tensor.permute: _permute,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
}
ROW_WISE |= dict.fromkeys((torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.softmax, Tensor.softmax), _over_axes)
ROW_WISE |= dict.fromkeys(
    (
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.hardtanh, F.relu6, F.leaky_relu, F.elu),
        *(F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.logsigmoid),
        *(torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.clamp, Tensor.clamp, Tensor.contiguous),
        *(torch.exp, Tensor.exp, torch.square, Tensor.square, torch.neg, Tensor.neg, Tensor.__neg__),
        *(Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half),
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

# What tells neither an entry of a tensor nor the number of its rows.
_PROPERTIES = frozenset(
    (
        *(Tensor.dim, Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
        *(
            getattr(Tensor, name).__get__
            for name in ("ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_nested")
        ),
    )
)
# The size of the first axis is the number of rows.
_SIZES = frozenset((Tensor.size, Tensor.numel, Tensor.__len__, getattr(Tensor, "shape").__get__))  # noqa: B009
