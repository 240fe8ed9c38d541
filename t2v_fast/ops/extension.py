"""The compiled libraries: where they are, and the control functions of the CPU library.

A library is loaded with ctypes, and registers its kernels with torch when it is loaded. The libraries use only the
stable interface of LibTorch, so that one file serves every supported torch and Python. The CUDA library is for every
torch that was built with one major release of CUDA, which its name tells.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[1]
CPU_LIBRARY = FOLDER / "libt2v_cpu.so"


def cuda_library() -> Path:
    """Return the file of the CUDA library for the torch that is running; it need not exist.

    Raises:
        ImportError: This torch was built without CUDA.
    """
    if torch.version.cuda is None:
        raise ImportError("this torch was built without CUDA")
    return FOLDER / f"libt2v_cuda{torch.version.cuda.split('.')[0]}.so"


def _load(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise ImportError(f"there is no {path.name} in {path.parent}: it was not compiled")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(str(error)) from error


@functools.cache
def _cpu() -> ctypes.CDLL:
    """Load the CPU library, which registers its kernels.

    Raises:
        ImportError: There is no such library, or it does not load.
    """
    library = _load(CPU_LIBRARY)
    signatures = {
        "t2v_compiler": (ctypes.c_char_p, []),
        "t2v_cpu_isas": (ctypes.c_char_p, []),
        "t2v_cpu_capability": (ctypes.c_char_p, []),
        "t2v_set_cpu_capability": (ctypes.c_bool, [ctypes.c_char_p]),
        "t2v_vector_width": (ctypes.c_int, [ctypes.c_bool]),
        "t2v_few_positions": (ctypes.c_int64, []),
        "t2v_keep_freed_memory": (ctypes.c_bool, [ctypes.c_bool]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def why_no_cpu() -> str | None:
    """Load the CPU library; return why it is missing, or None."""
    try:
        _cpu()
    except (ImportError, AttributeError) as error:  # a control function is missing
        return str(error)
    return None


@functools.cache
def why_no_cuda() -> str | None:
    """Load the CUDA library; return why it is missing, or None."""
    try:
        path = cuda_library()
        if not path.exists() and (others := sorted(p.name for p in FOLDER.glob("libt2v_cuda*.so"))):
            return f"there is no {path.name} for torch with CUDA {torch.version.cuda}, but {', '.join(others)}"
        _load(path)
    except ImportError as error:
        return str(error)
    return None


def build_info() -> dict[str, str]:
    """Return the compiler and the instruction sets of the CPU library."""
    return {"compiler": _cpu().t2v_compiler().decode(), "cpu": _cpu().t2v_cpu_isas().decode()}


# A call through ctypes takes longer than a small op's share of the planning, so what changes only with the instruction
# set is read once for each.
@functools.cache
def cpu_capability() -> str:
    """Return the instruction set in use."""
    return _cpu().t2v_cpu_capability().decode()


@functools.cache
def vector_width(double_precision: bool) -> int:
    """Return the number of elements of a vector in the instruction set in use."""
    return _cpu().t2v_vector_width(double_precision)


def set_cpu_capability(name: str) -> None:
    """Force one of the instruction sets of ``build_info()["cpu"]``.

    Raises:
        ValueError: The instruction set is not in this build or not on this processor.
    """
    if not _cpu().t2v_set_cpu_capability(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not in this build ({build_info()['cpu']}) or not on this processor"
        )
    cpu_capability.cache_clear()
    vector_width.cache_clear()


def few_positions() -> int:
    """Return the number of positions up to which quadratic forms are evaluated column by column."""
    return _cpu().t2v_few_positions()


def keep_freed_memory(keep: bool) -> bool:
    """Set whether freed memory stays with the process; return whether this allocator can be told."""
    return _cpu().t2v_keep_freed_memory(keep)
