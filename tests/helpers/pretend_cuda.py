"""Tensors that pretend to be on a CUDA device and hold their values on the CPU.

torch builds the autograd graph that it would build on a GPU, with the same nodes and saved tensors, and every operator
computes with the CPU tensors. Operators that only CUDA has are replaced by stand-ins. As on a GPU, an operator refuses
arguments on different devices.

Autograd's engine starts a thread for each CUDA device, and cannot run without one. A walk through the graph that calls
each node therefore replaces ``torch.autograd.grad`` and the backward pass of ``Squares``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_fast.gradients import squares
from t2v_fast.gradients.graph import Taps
from t2v_fast.gradients.ownership import LEAF, call_node
from t2v_fast.ops import dispatch, gpu_estimates, gpu_specs, reference

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


class Pretend(Tensor):
    """A tensor whose device is CUDA, and whose values are those of the CPU tensor ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Pretend:
        meta = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="meta")
        found = torch.Tensor._make_subclass(cls, meta, False, dispatch_device=True, device_for_backend_keys=CUDA)
        found.held = real
        return found

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Pretend) -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        stream.read.append(self)

    def __getitem__(self, index: Any) -> Tensor:
        """As for any tensor, but torch would copy lists to the device behind the mode's back."""
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def __repr__(self) -> str:
        return f"Pretend({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _without_lists(index: Any) -> tuple:
    each = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(at) if isinstance(at, list) else at for at in each)


class Event:
    """An event of a device that computes at once: it has happened when it is recorded."""

    def __init__(self, **options: Any) -> None:
        self.recorded = 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.recorded, "the event was not recorded"


class Stream:
    """A stream of such a device."""

    def __init__(self, device: Any = None) -> None:
        self.device, self.awaited, self.read = device, [], []

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "the event was not recorded"
        self.awaited.append(event)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


class Pinned(Tensor):
    """A CPU tensor that pretends to be pinned. It looks like any other tensor to the operators."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


class _Mode(TorchDispatchMode):
    """Tensors can be created on the device that does not exist, and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


# Operators that copy from one device to another, or read CPU indices or lengths.
_ACROSS = {
    *(aten.copy_.default, aten._to_copy.default),
    *(aten._pack_padded_sequence.default, aten._pad_packed_sequence.default),
    aten._pack_padded_sequence_backward.default,
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
}


# Attention keeps the seeds of its dropout on the host.
_ATTENTION = {
    getattr(aten, f"_scaled_dot_product_{kernel}_attention").default for kernel in ("efficient", "flash", "cudnn")
}


# Operators that change the shape of their argument itself.
_RESHAPING_IN_PLACE = {
    *(aten.transpose_.default, aten.t_.default, aten.squeeze_.default, aten.squeeze_.dim, aten.unsqueeze_.default)
}


def tensors_in(*arguments: Any) -> list[Tensor]:
    """The tensors among what operators take and give: torch's own functions for this take as long as operators do."""
    found: list[Tensor] = []
    for a in arguments:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (tuple, list)):
            found += tensors_in(*a)
        elif isinstance(a, dict):
            found += tensors_in(*a.values())
    return found


def replaced(kind: type[Tensor], function: Callable[[Any], Any], of: Any) -> Any:
    """What an operator takes or gives, with ``function(t)`` in place of each tensor of a kind."""
    if isinstance(of, kind):
        return function(of)
    if type(of) in (tuple, list):
        return type(of)([replaced(kind, function, each) for each in of])
    if type(of) is dict:
        return {key: replaced(kind, function, each) for key, each in of.items()}
    assert not tensors_in(of) or isinstance(of, Tensor), type(of)
    return of


# Called with each operator of the device: what is run, its arguments, those of them that are on the host, the result.
listeners: list[Callable[[Any, Callable, tuple, dict[str, Any], list[Tensor], Any], None]] = []


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU. The results pretend to be on CUDA if an argument does, or if the call asks for it."""
    if func is torch.ops.prim.device.default:
        return CUDA
    tensors = tensors_in(args, kwargs)
    pretending = [t for t in tensors if isinstance(t, Pretend)]
    on_gpu = bool(pretending)
    if on_gpu and func not in _ACROSS and any(t.dim() for t in tensors if not isinstance(t, Pretend)):
        raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu")
    if (asked := kwargs.get("device")) is not None:
        on_gpu = torch.device(asked).type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func in _RESHAPING_IN_PLACE and on_gpu:
        with torch._C._DisableTorchDispatch():
            func(*args)
    own = {id(t.held): t for t in pretending}
    args, kwargs = replaced(Pretend, lambda t: t.held, (args, kwargs))
    function = _STAND_INS.get(func, func)
    found = function(*args, **kwargs)
    if listeners and (on_gpu or pretending):
        here = [t for t in tensors if not isinstance(t, Pretend)]
        if not on_gpu:
            here.append(found)
        listeners[-1](func, function, args, kwargs, here, found)
    if not on_gpu:
        return found
    if func is aten._pack_padded_sequence.default:  # lengths of a batch are on the CPU
        return Pretend(found[0]), found[1]
    if func in _ATTENTION:
        return replaced(Tensor, lambda t: Pretend(t) if t.is_floating_point() else t, found)
    return replaced(Tensor, lambda t: own[id(t)] if id(t) in own else Pretend(t), found)


def moved(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters and buffers pretend to be on a CUDA device."""
    network = copy.deepcopy(network)
    memo: dict[int, Tensor] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, t in table.items():
                if isinstance(t, Tensor):
                    if id(t) not in memo:
                        pretend = Pretend(t.detach())
                        memo[id(t)] = nn.Parameter(pretend, t.requires_grad) if isinstance(t, nn.Parameter) else pretend
                    table[name] = memo[id(t)]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return network


# ---- operators that only CUDA has


def _gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` by autograd, on another thread: on this one, an operator is dispatched."""

    def run() -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=False) if g is not None]
        wanted = [t for t in leaves if t is not None]
        found = _engine_grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        each = iter(found)
        return [None if t is None else next(each) for t in leaves]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


_engine_grad = torch.autograd.grad


def _native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    """As on a GPU, also the shift and the scale in evaluation mode, in the type of sums."""
    found = aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    if training:
        return found
    wide = reference.accumulate_dtype(x.dtype)
    return found[0], mean.to(wide, copy=True), (variance.to(wide) + eps).rsqrt()


def _native_batch_norm_backward(g, x, weight, mean, variance, saved_mean, saved_scale, training, eps, mask):
    if saved_mean is None or saved_scale is None:
        raise RuntimeError("save_mean should always be defined")  # as on CUDA; a CPU takes None
    saved = (saved_mean, saved_scale) if training else 2 * [x.new_empty(0)]  # on a CPU they have the type of x
    return aten.native_batch_norm_backward(g, x, weight, mean, variance, *saved, training, eps, mask)


def _batch_norm_elemt(x, weight, bias, mean, scale, eps):
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) * scale.view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    y, *saved = aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    return y, *saved, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(x, g, weight, mean, variance, saved_mean, saved_scale, eps, reserve):
    saved = (mean, variance, saved_mean, saved_scale)
    return aten.native_batch_norm_backward(g, x, weight, *saved, True, eps, [True, True, True])


def _rms_norm(x, shape, weight, eps):
    axes = list(range(-len(shape), 0))
    wide = x if x.dtype == torch.float64 else x.float()
    scale = (wide.square().mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    y = wide * scale
    return (y if weight is None else y * weight).to(x.dtype), scale


def _rms_norm_backward(g, x, shape, scale, weight, mask):
    axes, wide = list(range(-len(shape), 0)), g.to(scale.dtype)
    normed = x * scale
    inner = wide if weight is None else wide * weight
    of_x = scale * (inner - normed * (inner * normed).mean(axes, keepdim=True))
    of_weight = (wide * normed).sum(list(range(x.dim() - len(shape)))) if mask[1] else None
    return of_x.to(x.dtype), None if of_weight is None else of_weight.to(x.dtype)


def _lstm_cell(inputs, hidden, c, input_bias=None, hidden_bias=None):
    gates = inputs + hidden if input_bias is None else inputs + hidden + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(of_h, of_c, c, new, workspace, has_bias):
    i, f, g, o = workspace.chunk(4, 1)
    of_h = torch.zeros_like(new) if of_h is None else of_h
    of_new = of_h * o * (1 - new.tanh().square()) + (0 if of_c is None else of_c)
    parts = [of_new * g * i * (1 - i), of_new * c * f * (1 - f), of_new * i * (1 - g.square())]
    gates = torch.cat([*parts, of_h * new.tanh() * o * (1 - o)], 1)
    return gates, of_new * f, gates.sum(0) if has_bias else None


def _gru_cell(inputs, hidden, h, input_bias=None, hidden_bias=None):
    if input_bias is not None:
        inputs, hidden = inputs + input_bias, hidden + hidden_bias
    (ir, iz, i), (hr, hz, inner) = inputs.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    new = (i + r * inner).tanh()
    return new + z * (h - new), torch.cat([r, z, new, h, inner], 1)


def _gru_cell_backward(g, workspace, has_bias):
    r, z, new, h, inner = workspace.chunk(5, 1)
    of_new = g * (1 - z) * (1 - new.square())
    of_r, of_z = of_new * inner * r * (1 - r), g * (h - new) * z * (1 - z)
    inputs, hidden = torch.cat([of_r, of_z, of_new], 1), torch.cat([of_r, of_z, of_new * r], 1)
    return inputs, hidden, g * z, *((inputs.sum(0), hidden.sum(0)) if has_bias else (None, None))


def _rnn_function(mode, layers, dropout, train, bidirectional, batch_first, weights, sizes=()):
    def function(x, *rest):
        weight, h, c = rest[:weights], rest[weights], rest[weights + 1]
        biases = weights == 4 * layers * (1 + bidirectional)
        options = (biases, layers, dropout, train, bidirectional)
        state = (h, c) if mode == 2 else h
        op = (torch.rnn_relu, torch.rnn_tanh, torch.lstm, torch.gru)[mode]
        if len(sizes):  # a packed sequence: the numbers of sequences that go on at each step
            return op(x, torch.tensor(sizes), state, weight, *options)
        return op(x, state, weight, *options, batch_first)

    return function


def _rnn(x, weight, stride, buffer, h, c, mode, hidden, proj, layers, first, dropout, train, both, sizes, state):
    found = _rnn_function(mode, layers, dropout, train, both, first, len(weight), sizes)(x, *weight, h, c)
    none = x.new_zeros(0)
    return *(found if mode == 2 else (*found, none)), none, none


def _rnn_backward(x, weight, stride, buffer, h, c, y, of_y, of_h, of_c, *rest):
    mode, _, _, layers, first, dropout, train, both, sizes, _, _, _ = rest
    if not train:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")
    function = _rnn_function(mode, layers, dropout, train, both, first, len(weight), sizes)
    of_x, *of_weight, of_h, of_c = _gradients(function, (x, *weight, h, c), (of_y, of_h, of_c))
    return of_x, of_h, of_c, of_weight


def _miopen_rnn(x, weight, stride, h, c, mode, hidden, layers, first, dropout, train, both, sizes, state):
    return _rnn(x, weight, stride, None, h, c, mode, hidden, 0, layers, first, dropout, train, both, sizes, state)


def _miopen_rnn_backward(x, weight, stride, buffer, h, c, y, of_y, of_h, of_c, mode, hidden, *rest):
    return _rnn_backward(x, weight, stride, buffer, h, c, y, of_y, of_h, of_c, mode, hidden, 0, *rest)


def _attention(q, k, v, mask=None, causal=False, scale=None):
    return (F_ATTENTION(q, k, v, mask, 0.0, causal, scale=scale),)


F_ATTENTION = F.scaled_dot_product_attention


def _attention_gradients(g, q, k, v, mask, causal, scale):
    return _gradients(lambda *inputs: _attention(*inputs, causal, scale), (q, k, v, mask), (g,))


def _seeds() -> tuple[Tensor, Tensor]:
    """Where dropout began to draw. Without dropout, and outside of a capture, they are empty numbers of the host."""
    return torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient(q, k, v, mask, lse, dropout=0.0, causal=False, *, scale=None):
    none = q.new_zeros(0)
    return *_attention(q, k, v, mask, causal, scale), none, *_seeds()


def _efficient_backward(g, q, k, v, mask, out, lse, seed, offset, dropout, wanted, causal=False, *, scale=None):
    return tuple(_attention_gradients(g, q, k, v, mask, causal, scale))


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    none = q.new_zeros(0)
    return *_attention(q, k, v, None, causal, scale), none, none, none, q.shape[2], k.shape[2], *_seeds(), none


def _flash_backward(g, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *rest, scale=None):
    return tuple(_attention_gradients(g, q, k, v, None, causal, scale)[:3])


def _cudnn(q, k, v, mask, lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    none = q.new_zeros(0)
    return *_attention(q, k, v, mask, causal, scale), none, none, none, q.shape[2], k.shape[2], *_seeds(), none


def _cudnn_backward(g, q, k, v, out, lse, seed, offset, mask, *rest, scale=None):
    return tuple(_attention_gradients(g, q, k, v, mask, rest[-1], scale)[:3])


def _by_heads(function):
    """A function of tensors [N, heads, T, D], for tensors [N, T, heads, D]."""

    def run(*tensors, **options):
        return function(*(t.transpose(1, 2) for t in tensors), **options).transpose(1, 2)

    return run


def _raw(q, k, v, causal, scale):
    return (_by_heads(lambda *t: F_ATTENTION(*t, None, 0.0, causal, scale=scale))(q, k, v),)


def _raw_flash(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None, **options):
    none = q.new_zeros(0)
    return *_raw(q, k, v, causal, scale), none, none, none, none


def _raw_flash_backward(
    g, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *rest, scale=None, **options
):
    return tuple(_gradients(lambda *inputs: _raw(*inputs, causal, scale), (q, k, v), (g,)))


def _raw_efficient(q, k, v, bias, cum_q, cum_k, max_q, max_k, dropout, mask_type, lse=False, *, scale=None, **options):
    none = q.new_zeros(0)
    return *_raw(q, k, v, mask_type == 1, scale), none, none, none, q.shape[1], k.shape[1]


def _raw_efficient_backward(g, q, k, v, bias, out, cum_q, cum_k, max_q, max_k, *rest, scale=None, **options):
    causal = rest[4] == 1
    return *_gradients(lambda *inputs: _raw(*inputs, causal, scale), (q, k, v), (g,)), None


_STAND_INS = {
    aten.miopen_rnn.default: _miopen_rnn,
    aten.miopen_rnn_backward.default: _miopen_rnn_backward,
    aten._flash_attention_forward.default: _raw_flash,
    aten._flash_attention_backward.default: _raw_flash_backward,
    aten._efficient_attention_forward.default: _raw_efficient,
    aten._efficient_attention_backward.default: _raw_efficient_backward,
    aten.native_batch_norm.default: _native_batch_norm,
    aten.native_batch_norm_backward.default: _native_batch_norm_backward,
    aten.batch_norm_elemt.default: _batch_norm_elemt,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    aten._cudnn_rnn.default: _rnn,
    aten._cudnn_rnn_backward.default: _rnn_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
}


def _sdpa(kernel: str) -> Callable[..., Tensor]:
    """``F.scaled_dot_product_attention`` as it is on a GPU where it takes one kernel; the checks need a GPU."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k, v, mask = query, key, value, attn_mask
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        if not isinstance(q, Pretend) or kernel == "math" or q.dim() != 4 or (kernel == "flash" and mask is not None):
            return aten._scaled_dot_product_attention_math(q, k, v, mask, dropout_p, is_causal, scale=scale)[0]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        if kernel == "flash":
            width = q.shape[-1]
            q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0][..., :width]
        if mask is not None:
            columns = mask.shape[-1]
            mask = F.pad(mask, (0, -columns % 16))[..., :columns] if columns % 16 else mask
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        op = getattr(aten, f"_scaled_dot_product_{kernel}_attention")
        return op(q, k, v, mask, True, 0.0, is_causal, scale=scale)[0]

    return attention


# ---- autograd without its engine


def _walk(
    starts: Iterable[tuple[Node, int, Tensor]],
    ends: Iterable[tuple[Node, int]],
    visit: Callable[[Node, tuple[Tensor | None, ...]], None] = lambda node, cotangents: None,
) -> dict[tuple[Node, int], Tensor]:
    """Call the nodes of a graph with the cotangents of their outputs, and return the cotangents at the ``ends``."""
    pending: dict[tuple[Node, int], Tensor] = {}
    found: dict[tuple[Node, int], Tensor] = {}
    wanted, order, seen = set(ends), [], set()

    def add(node: Node, number: int, g: Tensor) -> None:
        g = g.to(node._input_metadata[number].dtype)
        pending[node, number] = pending[node, number] + g if (node, number) in pending else g

    starts = list(starts)
    stack = [(node, False) for node, *_ in starts]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((child, False) for child, _ in node.next_functions if child is not None)]
    for start in starts:
        add(*start)
    useful = {node for node, _ in wanted}
    needed: set[Node] = set()  # nodes above an end
    for node in order:
        if any(child in needed or child in useful for child, _ in node.next_functions):
            needed.add(node)
    executed = needed | useful
    with (
        patch.object(torch._C, "_will_engine_execute_node", executed.__contains__),
        patch.object(torch._C, "_current_graph_task_id", lambda: id(executed)),
    ):
        for node in reversed(order):
            cotangents = tuple(pending.pop((node, k), None) for k in range(len(node._input_metadata)))
            if all(g is None for g in cotangents):
                continue
            visit(node, cotangents)
            found |= {(node, k): g for k, g in enumerate(cotangents) if (node, k) in wanted and g is not None}
            if node.name() == LEAF or node not in needed:
                continue
            for (child, number), g in zip(node.next_functions, call_node(node, cotangents), strict=False):
                if child is not None and g is not None:
                    add(child, number, g)
    return found


def _edge(t: Tensor | GradientEdge) -> tuple[Node, int]:
    edge = t if isinstance(t, GradientEdge) else get_gradient_edge(t)
    return edge.node, edge.output_nr


def _grad(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    grad_outputs: Sequence[Tensor],
    retain_graph: bool | None = None,
    allow_unused: bool = False,
    materialize_grads: bool = False,
    is_grads_batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` by walking through the graph."""
    if is_grads_batched:
        rows = [_grad(outputs, inputs, each, True, True, True) for each in zip(*grad_outputs, strict=True)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    ends = [_edge(t) for t in inputs]
    found = _walk([(*_edge(t), g) for t, g in zip(outputs, grad_outputs, strict=True)], ends)
    each = [found.get(end) for end in ends]
    return tuple(
        torch.zeros_like(t) if g is None and materialize_grads else g for g, t in zip(each, inputs, strict=True)
    )


def _backpropagate(output: Tensor, cotangent: Tensor, taps: Taps, visit: Callable, retain_graph: bool) -> None:
    """As :func:`t2v_fast.gradients.graph.backpropagate`."""

    def meet(node: Node, cotangents: tuple[Tensor | None, ...]) -> None:
        if node in taps.uses:
            visit(node, cotangents)

    with torch.no_grad():
        _walk([(output.grad_fn, output.output_nr, cotangent)], [(node, 0) for node in taps.last], meet)


def _made(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        found = create(data, *args, **options)
        return found if device is None else found.to(device)

    return made


@contextmanager
def pretended(kernel: str = "math") -> Iterator[None]:
    """A context in which CUDA seems to exist. Attention takes ``kernel``: math, efficient, flash or cudnn.

    The ops run on the CPU's kernels, and the planner chooses as for an H100.
    """
    torch._C._ensureCUDADeviceGuardSet()
    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(squares, "backpropagate", _backpropagate)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        for name in ("tensor", "as_tensor"):  # these copy to the device behind the mode's back
            patch.setattr(torch, name, _made(getattr(torch, name)))
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(F, "scaled_dot_product_attention", _sdpa(kernel))
        patch.setattr(dispatch, "gpu_backend", lambda: "cuda")
        patch.setattr(gpu_specs, "card_of", lambda device: gpu_specs.named("H100"))
        patch.setattr(Tensor, "is_pinned", lambda t: isinstance(t, Pinned))
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, _pinning(getattr(torch, name)))
        current = [Stream(CUDA)]
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
        patch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(-1, stream))
        patch.setattr(torch.cuda, "stream", lambda stream: _on_stream(current, stream))
        patch.setattr(gpu_estimates, "rates", lambda device: gpu_estimates.estimates(gpu_specs.named("H100")))
        yield


@contextmanager
def _on_stream(current: list[Stream], stream: Stream) -> Iterator[None]:
    current.append(stream)
    try:
        yield
    finally:
        current.pop()


def _pinning(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pinning(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        found = create(*args, **options)
        return found.as_subclass(Pinned) if pin_memory else found

    return pinning
