"""The registered operators and the choice of a backend.

This module defines the operators in the ``torch.ops.t2v_fast`` namespace, loads the compiled extension and the Triton
kernels, and keeps the state that decides which backend runs. :func:`call` is the one way from a public function of
:mod:`t2v_fast.ops` to a backend.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import extension, gpu_estimates, gpu_specs, reference
from .geometry import conv_output_size

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
SCHEMAS = {
    "sq_outer": '(Tensor x, Tensor g, str path="explicit") -> Tensor',
    "sq_linear": "(Tensor x, Tensor g, Tensor? gram=None) -> Tensor",
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
    "sq_grouped": "(Tensor x, Tensor g, Tensor offsets) -> Tensor",
    "sq_grouped_acc_": "(Tensor(a!) out, Tensor x, Tensor g, Tensor offsets, Tensor groups, Tensor weight) -> ()",
}
# The operators that the compiled CUDA library has no kernels for: Triton runs them on CUDA tensors.
TRITON_ONLY = frozenset({"sq_grouped", "sq_grouped_acc_"})
# Not in SCHEMAS because only the CPU extension has a kernel of its own; other devices run torch's convolution.
WINOGRAD_CONV = "(Tensor x, Tensor weight, Tensor? bias, int[2] padding, bool transposed) -> Tensor"

# The device types whose tensors a forced backend accepts.
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

_backend: contextvars.ContextVar[str] = contextvars.ContextVar("t2v_fast_backend", default="auto")


@functools.cache
def _triton() -> ModuleType:
    _find_kernels()
    return importlib.import_module("t2v_fast.kernels.backend")


def _find_kernels() -> None:
    """In a checkout that is not installed, take the folder ``kernels/`` beside the package for ``t2v_fast.kernels``."""
    name, folder = "t2v_fast.kernels", Path(__file__).resolve().parents[2] / "kernels"
    if importlib.util.find_spec(name) is None and (folder / "backend.py").exists():
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


@functools.cache
def _load_triton() -> str | None:
    """Import the Triton kernels; return why the import failed, or None."""
    try:
        _triton()
    except ImportError as error:
        return f"Triton's kernels did not load: {error}"
    return None


def _missing_on_gpu(backend: str) -> str | None:
    """Why a backend cannot run on CUDA tensors, or None."""
    if backend == "cuda" and (why := extension.why_no_cuda()) is not None:
        return f"the compiled CUDA library did not load: {why}"
    if backend == "triton" and (why := _load_triton()) is not None:
        return why
    if backend == "triton" and _triton().interpreted():
        return None  # Triton's interpreter runs on CPU tensors and needs no device
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def backend_status() -> dict[str, str]:
    """Report which backends can run here.

    Returns:
        For every backend but ``"auto"``: ``"available"``, or the reason why the backend cannot run.

    Example:
        >>> from t2v_fast import ops
        >>> ops.backend_status()["reference"]
        'available'
    """
    return {
        "reference": "available",
        "cpu": "available" if _missing is None else f"the compiled extension did not load: {_missing}",
        "cuda": _missing_on_gpu("cuda") or "available",
        "triton": _missing_on_gpu("triton") or "available",
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside a ``with`` block on one backend.

    A forced backend never falls back: an op raises if its tensors are on a device that the backend does not run on.
    The setting holds for the current thread or asynchronous task.

    Args:
        name: One of :data:`BACKENDS`. ``"auto"`` is the default: the extension where it has kernels for the tensors'
            device, then Triton for CUDA tensors, then the reference ops in plain torch.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend cannot run here. The message says why.

    Example:
        >>> import torch
        >>> from t2v_fast import ops
        >>> with ops.use_backend("reference"):
        ...     ops.sq_prod(torch.ones(1, 2, 3))
        tensor([[4., 4., 4.]])
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


def forced_backend() -> str:
    """Return the backend that :func:`use_backend` sets in this context, which is "auto" by default."""
    return _backend.get()


def backend_for(t: Tensor, path: str | None = None) -> str:
    """Return the name of the backend that the ops run on for tensors on the device of ``t``.

    With a ``path`` (``"explicit"`` or ``"gram"``), the backend of the ops of that path, which may differ on a GPU.
    """
    if (forced := _backend.get()) != "auto":
        return forced
    if t.is_cuda:
        return _gpu_backend_for(t.device, t.dtype, path)
    return "cpu" if t.device.type == "cpu" and _missing is None else "reference"


def uses_cpu_extension(t: Tensor) -> bool:
    """Whether the ops run on the compiled CPU kernels for tensors on the device of ``t``."""
    return t.device.type == "cpu" and backend_for(t) == "cpu"


def uses_gpu_kernels(t: Tensor) -> bool:
    """Whether the ops run on the kernels of the extension or of Triton for GPUs, for tensors on the device of ``t``."""
    return backend_for(t) in ("cuda", "triton")


def cpu_capability() -> str:
    """Return the instruction set that the compiled CPU kernels use.

    Returns:
        ``"avx512bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``; on Arm ``"neonbf16"`` or ``"neon"``.

    Raises:
        ImportError: The compiled extension is missing.
    """
    return extension.cpu_capability()


def vector_width(dtype: torch.dtype) -> int:
    """Return how many sums over ``dtype`` values a vector register of the compiled CPU kernels holds.

    Raises:
        ImportError: The compiled extension is missing.
    """
    return extension.vector_width(reference.accumulate_dtype(dtype) == torch.float64)


def few_positions() -> int:
    """Return the number of positions up to which the compiled CPU kernels evaluate quadratic forms column by column.

    Without the extension there are no such kernels, and the number is 0.
    """
    return 0 if _missing is not None else extension.few_positions()


def keep_freed_memory(keep: bool) -> bool:
    """Set whether the C allocator keeps freed memory in this process, so that later allocations reuse its pages.

    The setting is process-wide. Torch's large CPU tensors are otherwise returned to the system when they are freed.

    Args:
        keep: True keeps freed memory. False restores the allocator's usual behaviour and returns what was kept.

    Returns:
        False where the allocator has no such setting or the compiled extension is missing.
    """
    return _missing is None and extension.keep_freed_memory(keep)


def build_id() -> str:
    """Return a string that changes whenever the extension is built again.

    Raises:
        FileNotFoundError: The compiled extension is missing.
    """
    file = os.stat(extension.CPU_LIBRARY)
    return f"{file.st_mtime_ns:x}-{file.st_size:x}"


@functools.cache
def gpu_backend() -> str:
    """Return the first of ``"cuda"``, ``"triton"`` and ``"reference"`` that can run on CUDA tensors.

    The choice is made, and logged, once per process. Where the first is ``"cuda"``, Triton's kernels may still take the
    dtypes that they are faster for: see :func:`backend_for`.
    """
    reasons: list[str] = []
    for backend in ("cuda", "triton"):
        if (why := _missing_on_gpu(backend)) is None:
            log.info("CUDA tensors run on the %s kernels%s", backend, "".join(f"; {r}" for r in reasons))
            return backend
        reasons.append(f"not {backend}: {why}")
    log.warning("CUDA tensors run on the reference ops, an example at a time: %s", "; ".join(reasons))
    return "reference"


def _gpu_backend_for(device: torch.device, dtype: torch.dtype, path: str | None) -> str:
    """The backend for CUDA tensors of ``dtype`` on a path.

    Where both kinds of kernels can run, the faster ones do, by the rates of :mod:`t2v_fast.ops.gpu_estimates`.
    """
    backend = gpu_backend()
    if backend != "cuda" or not torch.cuda.is_available() or _missing_on_gpu("triton") is not None:
        return backend
    return gpu_estimates.leader(device, dtype, path)


def _runs_triton(name: str, args: Sequence[object]) -> bool:
    """Whether the Triton kernels take these CUDA tensors although the extension has kernels for them.

    Tensors of other types, which trace or pretend, go through torch's dispatcher. The extension keeps the ops that are
    bound by memory, and every layer that reads images: only its kernels read the three channels of a pixel together.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    images = {"sq_conv": 0, "sq_conv_acc_": 1}.get(name)
    if images is not None and tensors[images].shape[1] == 3:
        return False
    path = _path(name, args)
    if path is None:
        return gpu_backend() == "triton"
    # Accumulators and Gram matrices are wider than the layer's own tensors.
    own = min((t for t in tensors if t.is_floating_point()), key=lambda t: t.element_size())
    return _gpu_backend_for(own.device, own.dtype, path) == "triton"


def _path(name: str, args: Sequence[object]) -> str | None:
    """The path of a call of an operator; None for an operator that multiplies no matrices."""
    if name in ("conv_gram", "sq_gram", "sq_linear"):
        return "gram"
    if name in ("sq_conv_acc_", "sq_outer_acc_"):
        return "explicit"
    if name in ("sq_conv", "sq_outer"):
        return "gram" if args[-1] == "gram" else "explicit"
    return None


def call(name: str, *args: object) -> Any:
    """Run the operator ``name`` of :data:`SCHEMAS` on the backend in force; the arguments have been checked.

    The result is a tensor, or None for an operator that works in place.
    """
    forced = _backend.get()
    if forced == "reference" or (_missing is not None and not _on_gpu(args)):
        return getattr(reference, name)(*args)
    if forced == "auto":
        if _on_gpu(args) and _runs_triton(name, args):
            return getattr(_triton(), name)(*args)
        return getattr(torch.ops.t2v_fast, name)(*args)
    if forced == "cuda" and name in TRITON_ONLY:
        raise RuntimeError(f"{name}: backend 'cuda' was asked for, which has no kernel for it: use 'auto' or 'triton'")
    allowed = _DEVICES[forced]
    if forced == "triton" and _triton().interpreted():
        allowed = ("cpu",)
    for a in args:
        if isinstance(a, Tensor) and a.device.type not in allowed:
            raise RuntimeError(f"{name}: backend {forced!r} was asked for, but an argument is on {a.device}")
    return getattr(_triton() if forced == "triton" else torch.ops.t2v_fast, name)(*args)


def _on_gpu(args: Sequence[object]) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in args)


def _register() -> torch.library.Library:
    """Define the operators: reference kernels for every device, fake kernels for tracing."""
    library = torch.library.Library("t2v_fast", "DEF")
    fakes: dict[str, Callable[..., tuple[Tensor, int]]] = {
        "sq_outer": lambda x, g, path="explicit": (g, g.shape[2]),
        "sq_conv": lambda x, g, *geometry: (g, g.shape[1]),
        "sq_gram": lambda gram, g: (g, g.shape[1]),
        "sq_prod": lambda g, x=None, shift=None, scale=None: (g, g.shape[2]),
        "sq_scatter": lambda index, g, num_rows: (g, num_rows),
    }

    def fake_grouped(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        segments = offsets.shape[0] - 1
        cotangents = g.shape[0] // x.shape[0] if x.shape[0] else 1
        return g.new_empty((cotangents * segments, g.shape[1]), dtype=reference.accumulate_dtype(g.dtype))

    def fake(columns: Callable[..., tuple[Tensor, int]]) -> Callable[..., Tensor]:
        def q(*args: Any, **kwargs: Any) -> Tensor:
            g, width = columns(*args, **kwargs)
            return g.new_empty((g.shape[0], width), dtype=reference.accumulate_dtype(g.dtype))

        return q

    def fake_gram(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        p = math.prod(conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation))
        return x.new_empty((x.shape[0], groups, p, p), dtype=reference.accumulate_dtype(x.dtype))

    def fake_norm(g: Tensor, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return g.new_empty((2, g.shape[0], g.shape[2]), dtype=reference.accumulate_dtype(g.dtype))

    def fake_linear(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
        return fake_norm(g, x)

    others: dict[str, Callable] = {
        "conv_gram": fake_gram,
        "sq_linear": fake_linear,
        "sq_norm": fake_norm,
        "sq_grouped": fake_grouped,
    }
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        kernel: Callable = fake(fakes[name]) if name in fakes else lambda *args, **kwargs: None
        kernel = others.get(name, kernel)
        torch.library.register_fake(f"t2v_fast::{name}", kernel, lib=library)
    # The CUDA library asks for torch's setting, which LibTorch's stable interface does not show.
    library.define("allows_tf32() -> bool")
    library.impl("allows_tf32", gpu_specs.allows_tf32, "CompositeExplicitAutograd")
    library.define("winograd_conv" + WINOGRAD_CONV)
    library.impl("winograd_conv", reference.winograd_conv, "CompositeExplicitAutograd")
    torch.library.register_fake("t2v_fast::winograd_conv", reference.winograd_conv, lib=library)
    return library


def _register_triton(library: torch.library.Library, names: Iterable[str]) -> None:
    """Register CUDA kernels that import Triton's kernels at their first call, where the extension has no kernels."""

    def late(name: str) -> Callable[..., Tensor | None]:
        def run(*args: object) -> Tensor | None:
            return getattr(reference if _missing_on_gpu("triton") else _triton(), name)(*args)

        return run

    for name in names:
        library.impl(name, late(name), "CUDA")


_library = _register()
_missing = extension.why_no_cpu()
_register_triton(_library, SCHEMAS if extension.why_no_cuda() is not None else TRITON_ONLY)
if _missing is not None:
    log.info("running on the reference ops: %s", _missing)
