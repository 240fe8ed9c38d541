"""The four primitives behind every weighted layer, as registered torch operators.

===============  ===========================================================  ======================================
op               per-example gradient G_m                                     layers
===============  ===========================================================  ======================================
``sq_outer``     sum_s g[m, s, :] x[n, s, :]^T, shape [O, I]                  linear
``sq_conv``      the same over the patches of x, never unfolded               convolution
``sq_prod``      sum_s g[m, s, :] (x[n, s, :] - shift) scale, shape [C]       norm weights; biases (without x)
``sq_scatter``   sum of g[m, s, :] over the s with index[n, s] = v, [V, O]    embedding tables
===============  ===========================================================  ======================================

``conv_gram`` and ``sq_gram`` are the two halves of the gram path of ``sq_conv`` and ``sq_outer``, for callers who have
several cotangents of one input; ``sq_norm`` is ``sq_prod`` with and without x in one pass. ``winograd_conv`` is a layer
of the network itself, for the CPU (:mod:`t2v_fast.gradients.fast_layers`).

``name(...)`` returns the sums of squares over each filter (a row of G), one per cotangent row: ``q[M, O]``.
``name_acc_(out, ..., weight)`` adds ``sum_m weight[m] G_m^2`` to ``out``, elementwise, and returns nothing.

M = K * N: K cotangents of one batch of N examples, cotangent-major, share one ``x``; row m belongs to example m % N.
Inputs are float64, float32, bfloat16 or float16, contiguous, channels-last or strided; sums are held in at least
float32, which is also the dtype of ``q`` (float64 for float64). Results are deterministic.

Calls go through the torch dispatcher: the compiled extension implements the operators for the devices it was built
for; :mod:`t2v_fast.kernels`, in Triton, for CUDA tensors where the extension has no CUDA kernels;
:mod:`t2v_fast.ops.reference` answers for every other. :func:`use_backend` forces one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .geometry import conv_output_size

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
CONV_PATHS = ("explicit", "gram", "winograd")
CONV_ACC_PATHS = ("explicit", "winograd")
OUTER_PATHS = ("explicit", "gram")

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
SCHEMAS = {
    "sq_outer": '(Tensor x, Tensor g, str path="explicit") -> Tensor',
    "sq_outer_acc_": "(Tensor(a!) out, Tensor x, Tensor g, Tensor weight) -> ()",
    "sq_conv": f'(Tensor x, Tensor g, int[2] kernel_size, {_GEOMETRY}, str path="explicit") -> Tensor',
    "sq_conv_acc_": f'(Tensor(a!) out, Tensor x, Tensor g, Tensor weight, {_GEOMETRY}, str path="explicit") -> ()',
    "conv_gram": f"(Tensor x, int[2] kernel_size, {_GEOMETRY}) -> Tensor",
    "sq_gram": "(Tensor gram, Tensor g) -> Tensor",
    "sq_prod": "(Tensor g, Tensor? x=None, Tensor? shift=None, Tensor? scale=None) -> Tensor",
    "sq_norm": "(Tensor g, Tensor x, Tensor? shift=None, Tensor? scale=None) -> Tensor",
    "sq_prod_acc_": "(Tensor(a!) out, Tensor g, Tensor weight, Tensor? x=None, Tensor? shift=None, "
    "Tensor? scale=None) -> ()",
    "sq_scatter": "(Tensor index, Tensor g, int num_rows) -> Tensor",
    "sq_scatter_acc_": "(Tensor(a!) out, Tensor index, Tensor g, Tensor weight) -> ()",
}
# Of the network itself, which is otherwise torch's: for the CPU only.
WINOGRAD_DTYPES = torch.float32, torch.float64, torch.bfloat16
WINOGRAD_CONV = "(Tensor x, Tensor weight, Tensor? bias, int[2] padding, bool transposed) -> Tensor"

_backend: contextvars.ContextVar[str] = contextvars.ContextVar("t2v_fast_backend", default="auto")


@functools.cache
def _extension() -> ModuleType:
    return importlib.import_module("t2v_fast._C")


def _load_extension() -> str | None:
    """Import the compiled extension, which registers its kernels; return why it is missing, or None."""
    try:
        extension = _extension()
    except ImportError as error:
        return str(error)
    built, running = extension.build_info()["torch"], torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        return f"it was built for torch {built}, but this is torch {running}: install t2v-fast again"
    return None


@functools.cache
def _triton() -> ModuleType:
    return importlib.import_module("t2v_fast.kernels.backend")


@functools.cache
def _load_triton() -> str | None:
    """Import the Triton kernels; return why they cannot be, or None."""
    try:
        _triton()
    except ImportError as error:
        return f"Triton's kernels did not load: {error}"
    return None


def _missing_on_gpu(backend: str) -> str | None:
    """Why a backend cannot run on CUDA tensors, or None."""
    if backend == "cuda" and _missing is not None:
        return f"the compiled extension did not load: {_missing}"
    if backend == "cuda" and not _extension().build_info()["cuda"]:
        return "the compiled extension was built without CUDA"
    if backend == "triton" and (why := _load_triton()) is not None:
        return why
    if backend == "triton" and _triton().interpreted():
        return None  # on CPU tensors, too
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def backend_status() -> dict[str, str]:
    """For every backend, ``"available"`` or the reason why it cannot run here."""
    return {
        "reference": "available",
        "cpu": "available" if _missing is None else f"the compiled extension did not load: {_missing}",
        "cuda": _missing_on_gpu("cuda") or "available",
        "triton": _missing_on_gpu("triton") or "available",
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this context on one backend of :data:`BACKENDS`; only ``"auto"`` may fall back.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name != "auto" and (why := backend_status()[name]) != "available":
        raise RuntimeError(f"backend {name!r} was asked for but cannot run: {why}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def backend_for(t: Tensor) -> str:
    """The backend that the ops run on for a tensor like ``t``."""
    if (forced := _backend.get()) != "auto":
        return forced
    if t.is_cuda:
        return gpu_backend()
    return "cpu" if t.device.type == "cpu" and _missing is None else "reference"


def uses_cpu_extension(t: Tensor) -> bool:
    """Whether the ops run on the compiled CPU kernels for a tensor like ``t``."""
    return t.device.type == "cpu" and backend_for(t) == "cpu"


def cpu_capability() -> str:
    """The instruction set of the compiled CPU kernels: ``"avx512"``, ``"avx2"``, ...; needs the extension."""
    return _extension().cpu_capability()


def vector_width(dtype: torch.dtype) -> int:
    """How many sums over ``dtype`` values a vector of the compiled CPU kernels holds; needs the extension."""
    return _extension().vector_width(reference.accumulate_dtype(dtype) == torch.float64)


def keep_freed_memory(keep: bool) -> bool:
    """Tell the C allocator whether freed memory stays with the process; False where it cannot be told."""
    return _missing is None and _extension().keep_freed_memory(keep)


def build_id() -> str:
    """Changes whenever the extension is built again; needs the extension."""
    file = os.stat(_extension().__file__)
    return f"{file.st_mtime_ns:x}-{file.st_size:x}"


_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}


def _call(name: str, *args: object) -> Tensor | None:
    forced = _backend.get()
    # An extension that loaded but does not fit this torch has registered its kernels: they must not be dispatched to.
    if forced == "reference" or (_missing is not None and not _on_gpu(args)):
        return getattr(reference, name)(*args)
    if forced == "auto":
        return getattr(torch.ops.t2v_fast, name)(*args)
    allowed = _DEVICES[forced]
    if forced == "triton" and _triton().interpreted():
        allowed = ("cpu",)
    for a in args:
        if isinstance(a, Tensor) and a.device.type not in allowed:
            raise RuntimeError(f"{name}: backend {forced!r} was asked for, but an argument is on {a.device}")
    return getattr(_triton() if forced == "triton" else torch.ops.t2v_fast, name)(*args)


def _on_gpu(args: Sequence[object]) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in args)


@functools.cache
def gpu_backend() -> str:
    """What CUDA tensors run on unless a backend is forced: ``"cuda"``, ``"triton"`` or ``"reference"``; logged once."""
    reasons = []
    for backend in ("cuda", "triton"):
        if (why := _missing_on_gpu(backend)) is None:
            log.info("CUDA tensors run on the %s kernels%s", backend, "".join(f"; {r}" for r in reasons))
            return backend
        reasons.append(f"not {backend}: {why}")
    log.warning("CUDA tensors run on the reference ops, an example at a time: %s", "; ".join(reasons))
    return "reference"


def _shape(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _require(condition: bool, name: str, message: Callable[[], str]) -> None:
    """The message is a function because composing it would take longer than a small op."""
    if not condition:
        raise ValueError(f"{name}: {message()}")


def _check_floating(name: str, **tensors: Tensor) -> None:
    first, reference_tensor = next(iter(tensors.items()))
    for key, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name}: {key} must be floating point, got {_shape(t)}")
        if t.dtype != reference_tensor.dtype or t.device != reference_tensor.device:
            raise ValueError(
                f"{name}: {key} is {_shape(t)} but {first} is {_shape(reference_tensor)}: expected one dtype and device"
            )


def _check_rows(name: str, key: str, examples: Tensor, g: Tensor) -> None:
    n, m = examples.shape[0], g.shape[0]
    _require(
        (m == 0) if n == 0 else m % n == 0,
        name,
        lambda: (
            f"g has {m} rows, expected a multiple of the {n} examples of {key}: {_shape(g)} against {_shape(examples)}"
        ),
    )


def _check_accumulator(name: str, out: Tensor, shape: Sequence[int], g: Tensor, weight: Tensor) -> None:
    dtype = reference.accumulate_dtype(g.dtype)
    _require(
        list(out.shape) == list(shape) and out.dtype == dtype and out.device == g.device and out.is_contiguous(),
        name,
        lambda: f"out is {_shape(out)}, expected contiguous {list(shape)} {dtype} on {g.device}",
    )
    _require(
        list(weight.shape) == [g.shape[0]] and weight.dtype == dtype and weight.device == g.device,
        name,
        lambda: f"weight is {_shape(weight)}, expected [{g.shape[0]}] {dtype} on {g.device}: one weight a row of g",
    )


def _check_outer(name: str, x: Tensor, g: Tensor, path: str = "explicit") -> None:
    _check_floating(name, x=x, g=g)
    _require(path in OUTER_PATHS, name, lambda: f"path {path!r} is none of {', '.join(OUTER_PATHS)}")
    _require(
        x.dim() == 3 and g.dim() == 3 and x.shape[1] == g.shape[1],
        name,
        lambda: f"expected x [N, S, I] and g [M, S, O] with one S, got x {_shape(x)} and g {_shape(g)}",
    )
    _check_rows(name, "x", x, g)


def winograd_fits(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether the ``"winograd"`` path of :func:`sq_conv` can do a convolution of this geometry."""
    return tuple(kernel_size) == (3, 3) and {*stride, *dilation, groups} == {1}


def _check_conv(
    name: str,
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    path: str = "explicit",
) -> None:
    _check_floating(name, x=x, g=g)
    _require(path in CONV_PATHS, name, lambda: f"path {path!r} is none of {', '.join(CONV_PATHS)}")
    _require(
        x.dim() == 4 and g.dim() == 4,
        name,
        lambda: f"expected x [N, C, H, W] and g [M, O, Ho, Wo], got x {_shape(x)} and g {_shape(g)}",
    )

    def geometry() -> str:
        return (
            f"kernel_size {list(kernel_size)}, stride {list(stride)}, padding {list(padding)}, "
            f"dilation {list(dilation)}, groups {groups}"
        )

    _require(
        min(*kernel_size, *stride, *dilation, groups) >= 1 and min(padding) >= 0,
        name,
        lambda: f"expected positive sizes and padding of at least 0, got {geometry()}",
    )
    _require(
        x.shape[1] % groups == 0 and g.shape[1] % groups == 0,
        name,
        lambda: f"groups {groups} must divide the {x.shape[1]} input and the {g.shape[1]} output channels",
    )
    expected = conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    _require(
        list(g.shape[2:]) == expected and min(expected) >= 1,
        name,
        lambda: f"g is {_shape(g)} but x {_shape(x)} with {geometry()} gives spatial size {expected}",
    )
    _require(
        path != "winograd" or winograd_fits(kernel_size, stride, dilation, groups),
        name,
        lambda: f"path 'winograd' is for 3x3 kernels of stride 1, dilation 1 and one group, got {geometry()}",
    )
    _check_rows(name, "x", x, g)


def _check_prod(
    name: str, g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None
) -> None:
    _require(g.dim() == 3, name, lambda: f"expected g [M, S, C], got {_shape(g)}")
    if x is None:
        _check_floating(name, g=g)
        _require(shift is None and scale is None, name, lambda: "shift and scale act on x, which was not given")
        return
    _check_floating(name, g=g, x=x)
    _require(
        x.dim() == 3 and x.shape[1:] == g.shape[1:],
        name,
        lambda: f"expected g [M, S, C] and x [N, S, C], got g {_shape(g)} and x {_shape(x)}",
    )
    for key, t in (("shift", shift), ("scale", scale)):
        if t is None:
            continue
        broadcasts = t.dim() <= 3 and all(
            a in (1, b) for a, b in zip(reversed(t.shape), reversed(x.shape), strict=False)
        )
        if not broadcasts or not t.is_floating_point() or t.device != x.device:
            raise ValueError(f"{name}: {key} is {_shape(t)}, expected floating point that broadcasts to x {_shape(x)}")
    _check_rows(name, "x", x, g)


def _check_scatter(name: str, index: Tensor, g: Tensor, num_rows: int) -> None:
    _check_floating(name, g=g)
    _require(
        index.dim() == 2 and g.dim() == 3 and index.shape[1] == g.shape[1] and index.dtype == torch.int64,
        name,
        lambda: f"expected index [N, S] int64 and g [M, S, O], got index {_shape(index)} and g {_shape(g)}",
    )
    _require(index.device == g.device, name, lambda: f"index is on {index.device} but g on {g.device}")
    _require(num_rows >= 1, name, lambda: f"num_rows is {num_rows}, expected at least 1")
    _check_rows(name, "index", index, g)


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    """q[m, o] = sum_i (sum_s g[m, s, o] x[n, s, i])^2.

    x [N, S, I], g [M, S, O] -> q [M, O]. ``path``: ``"explicit"`` forms each G_m in tiles, 2 S I O flops;
    ``"gram"`` evaluates g_o^T (x x^T) g_o, S^2 (I + O) flops with x x^T formed once per example;
    Which is faster says :mod:`t2v_fast.ops.planner`. Raises ValueError with the shapes given and expected.
    """
    _check_outer("sq_outer", x, g, path)
    return _call("sq_outer", x, g, path)


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """out[o, i] += sum_m weight[m] (sum_s g[m, s, o] x[n, s, i])^2.  out [O, I], weight [M], rest as in sq_outer."""
    _check_outer("sq_outer_acc_", x, g)
    _check_accumulator("sq_outer_acc_", out, (g.shape[2], x.shape[2]), g, weight)
    _call("sq_outer_acc_", out, x, g, weight)


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
    """Sum of squares over each filter of the per-example weight gradient of a 2-d convolution.

    x [N, C, H, W], g [M, O, Ho, Wo] -> q [M, O]. Zero padding. ``path``: ``"explicit"`` forms each gradient in tiles,
    2 P O C/groups kh kw flops for P = Ho Wo; ``"gram"`` evaluates g_o^T K g_o with the patches' Gram matrix K
    (P x P), taken from the pixels' autocorrelation; ``"winograd"`` (3x3, stride 1) is explicit by F(3x3, 4x4), with a
    quarter of the multiplications. Raises ValueError with the shapes given and expected.
    """
    _check_conv("sq_conv", x, g, kernel_size, stride, padding, dilation, groups, path)
    return _call("sq_conv", x, g, kernel_size, stride, padding, dilation, groups, path)


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
    """out += sum_m weight[m] G_m^2 for a 2-d convolution.  out [O, C / groups, kh, kw], the rest as :func:`sq_conv`.

    ``path``: ``"explicit"`` or ``"winograd"``.
    """
    _require(out.dim() == 4, "sq_conv_acc_", lambda: f"out must be [O, C / groups, kh, kw], got {_shape(out)}")
    _require(path in CONV_ACC_PATHS, "sq_conv_acc_", lambda: f"path {path!r} is none of {', '.join(CONV_ACC_PATHS)}")
    _check_conv("sq_conv_acc_", x, g, out.shape[2:], stride, padding, dilation, groups, path)
    _check_accumulator("sq_conv_acc_", out, (g.shape[1], x.shape[1] // groups, *out.shape[2:]), g, weight)
    _call("sq_conv_acc_", out, x, g, weight, stride, padding, dilation, groups, path)


def conv_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gram matrices K = U^T U of the patches of x [N, C, H, W]: [N, groups, P, P] for P = Ho Wo output positions.

    Folded: entries above the diagonal are doubled and those below are zero, which leaves every quadratic form as it is.
    Raises ValueError with the shapes given and expected.
    """
    _require(x.dim() == 4, "conv_gram", lambda: f"expected x [N, C, H, W], got {_shape(x)}")
    size = conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    g = x.new_empty((1, 1, 1, 1)).expand(x.shape[0], groups, *size) if min(size) >= 1 else x
    _check_conv("conv_gram", x, g, kernel_size, stride, padding, dilation, groups)
    return _call("conv_gram", x, kernel_size, stride, padding, dilation, groups)


def sq_gram(gram: Tensor, g: Tensor) -> Tensor:
    """q[m, o] = g_o^T K g_o with the K of :func:`conv_gram`, [N, groups, P, P]; g [M, O, Ho, Wo] -> q [M, O].

    A linear layer over S tokens is a 1x1 convolution over an image of 1 x S pixels.
    """
    _check_floating("sq_gram", g=g)
    _require(
        gram.dim() == 4
        and g.dim() == 4
        and gram.shape[2] == gram.shape[3] == g.shape[2] * g.shape[3]
        and gram.shape[1] >= 1
        and g.shape[1] % gram.shape[1] == 0,
        "sq_gram",
        lambda: f"expected gram [N, groups, P, P], g [M, O, Ho, Wo], P = Ho Wo; got {_shape(gram)} and {_shape(g)}",
    )
    _require(
        gram.dtype == reference.accumulate_dtype(g.dtype) and gram.device == g.device,
        "sq_gram",
        lambda: f"gram is {_shape(gram)}, expected {reference.accumulate_dtype(g.dtype)} for g {_shape(g)}",
    )
    _check_rows("sq_gram", "gram", gram, g)
    return _call("sq_gram", gram, g)


def sq_prod(g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """q[m, c] = (sum_s g[m, s, c] (x[n, s, c] - shift) scale)^2; without x, (sum_s g[m, s, c])^2.

    g [M, S, C], x [N, S, C] -> q [M, C]. shift and scale broadcast to x; their dtype may be wider than that of x.
    """
    _check_prod("sq_prod", g, x, shift, scale)
    return _call("sq_prod", g, x, shift, scale)


def sq_norm(g: Tensor, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """:func:`sq_prod` with x and without it, for the weight and the bias of a norm, in one pass: [2, M, C]."""
    _check_prod("sq_norm", g, x, shift, scale)
    return _call("sq_norm", g, x, shift, scale)


def sq_prod_acc_(
    out: Tensor,
    g: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """out[c] += sum_m weight[m] q[m, c] with the q of :func:`sq_prod`.  out [C], weight [M]."""
    _check_prod("sq_prod_acc_", g, x, shift, scale)
    _check_accumulator("sq_prod_acc_", out, (g.shape[2],), g, weight)
    _call("sq_prod_acc_", out, g, weight, x, shift, scale)


def sq_scatter(index: Tensor, g: Tensor, num_rows: int) -> Tensor:
    """q[m, v] = sum_o (sum over s with index[n, s] = v of g[m, s, o])^2.

    index [N, S] int64, g [M, S, O] -> q [M, num_rows]. Negative indices are left out (padding); an index of num_rows
    or more raises IndexError.
    """
    _check_scatter("sq_scatter", index, g, num_rows)
    return _call("sq_scatter", index, g, num_rows)


def sq_scatter_acc_(out: Tensor, index: Tensor, g: Tensor, weight: Tensor) -> None:
    """out[v, o] += sum_m weight[m] (sum over s with index[n, s] = v of g[m, s, o])^2.  out [V, O], weight [M]."""
    _require(out.dim() == 2, "sq_scatter_acc_", lambda: f"out must be [V, O], got {_shape(out)}")
    _check_scatter("sq_scatter_acc_", index, g, out.shape[0])
    _check_accumulator("sq_scatter_acc_", out, (out.shape[0], g.shape[2]), g, weight)
    _call("sq_scatter_acc_", out, index, g, weight)


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    transposed: bool = False,
) -> Tensor:
    """A 3x3 convolution of stride 1 of x [N, C, H, W] by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): channels last.

    ``weight`` [O, C, 3, 3], ``bias`` [O]. ``transposed``: the gradient of such a convolution for its input, from the
    cotangent x of its output, with its ``weight`` [C, O, 3, 3] and its ``padding``, at most 2. Results are rounded
    up to three times as coarsely as those of a direct convolution; each image's are the same in every batch. For
    float32, float64 and bfloat16, which is multiplied in fixed point where the processor has dot products of 16-bit
    integers. Raises ValueError with the shapes given and expected.
    """
    _require(
        x.dim() == 4 and weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3) and len(padding) == 2,
        "winograd_conv",
        lambda: (
            f"expected x [N, C, H, W], a weight of kernels of 3x3 and 2 paddings, got {_shape(x)}, {_shape(weight)} "
            f"and {list(padding)}"
        ),
    )
    _require(
        x.shape[1] == weight.shape[0 if transposed else 1],
        "winograd_conv",
        lambda: (
            f"x {_shape(x)} has {x.shape[1]} channels, the weight {_shape(weight)} takes "
            f"{weight.shape[0 if transposed else 1]}"
        ),
    )
    _require(
        x.dtype == weight.dtype and x.dtype in WINOGRAD_DTYPES and x.device == weight.device,
        "winograd_conv",
        lambda: f"expected one of float32, float64 and bfloat16 on one device, got {_shape(x)} and {_shape(weight)}",
    )
    outputs = weight.shape[1 if transposed else 0]
    _require(
        bias is None or (tuple(bias.shape) == (outputs,) and bias.dtype == x.dtype and bias.device == x.device),
        "winograd_conv",
        lambda: f"bias is {_shape(bias)}, expected [{outputs}] {x.dtype} on {x.device}",
    )
    by = [2 - p for p in padding] if transposed else padding
    size = conv_output_size(x.shape[2:], (3, 3), (1, 1), by, (1, 1))
    _require(
        min(padding) >= 0 and min(by) >= 0 and min(size) >= 1,
        "winograd_conv",
        lambda: f"x {_shape(x)} with padding {list(padding)} gives spatial size {size}",
    )
    return _call("winograd_conv", x, weight, bias, padding, transposed)


def _register() -> torch.library.Library:
    """Define the operators: reference kernels for every device, fake kernels for tracing."""
    library = torch.library.Library("t2v_fast", "DEF")
    fakes = {
        "sq_outer": lambda x, g, path="explicit": (g, g.shape[2]),
        "sq_conv": lambda x, g, *geometry: (g, g.shape[1]),
        "sq_gram": lambda gram, g: (g, g.shape[1]),
        "sq_prod": lambda g, x=None, shift=None, scale=None: (g, g.shape[2]),
        "sq_scatter": lambda index, g, num_rows: (g, num_rows),
    }

    def fake(columns):
        def q(*args, **kwargs):
            g, width = columns(*args, **kwargs)
            return g.new_empty((g.shape[0], width), dtype=reference.accumulate_dtype(g.dtype))

        return q

    def fake_gram(x, kernel_size, stride, padding, dilation, groups):
        p = math.prod(conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation))
        return x.new_empty((x.shape[0], groups, p, p), dtype=reference.accumulate_dtype(x.dtype))

    def fake_norm(g, x, shift=None, scale=None):
        return g.new_empty((2, g.shape[0], g.shape[2]), dtype=reference.accumulate_dtype(g.dtype))

    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        kernel = fake(fakes[name]) if name in fakes else lambda *args, **kwargs: None
        kernel = {"conv_gram": fake_gram, "sq_norm": fake_norm}.get(name, kernel)
        torch.library.register_fake(f"t2v_fast::{name}", kernel, lib=library)
    library.define("winograd_conv" + WINOGRAD_CONV)
    library.impl("winograd_conv", reference.winograd_conv, "CompositeExplicitAutograd")
    torch.library.register_fake("t2v_fast::winograd_conv", reference.winograd_conv, lib=library)
    return library


def _register_triton(library: torch.library.Library) -> None:
    """CUDA kernels of the operators where the extension has none: Triton's, imported at their first call."""

    def late(name: str) -> Callable[..., Tensor | None]:
        def run(*args: object) -> Tensor | None:
            return getattr(_triton() if gpu_backend() == "triton" else reference, name)(*args)

        return run

    for name in SCHEMAS:
        library.impl(name, late(name), "CUDA")


_library = _register()
_missing = _load_extension()
if _missing is not None or not _extension().build_info()["cuda"]:
    _register_triton(_library)
if _missing is not None:
    log.info("running on the reference ops: %s", _missing)
