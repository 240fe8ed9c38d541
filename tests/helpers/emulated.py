"""The operators of csrc/cuda on the host: the CUDA sources are compiled against emulation/emulation.h."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

from t2v_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "tests" / "helpers" / "emulation"
SOURCES = sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), ROOT / "csrc" / "cuda" / "bindings.cpp"])
LIBRARY = "t2v_fast_emulated"
SANITIZE = "T2V_EMULATION_SANITIZE"


def build(sanitize: str = "") -> Path:
    """Return the shared library, which is compiled again if a source or a compiler flag has changed.

    As the library that is released, it works with every supported torch, whichever one it was compiled with.
    """
    flags = ["-std=c++20", "-fPIC", "-O1", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Werror=sign-compare", f"-I{HEADERS}", "-DT2V_EMULATED"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # as in CMakeLists.txt
    if sanitize:
        flags += ["-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    read = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir(), *HEADERS.iterdir()]
    state = "".join(flags) + "".join(f.read_text() for f in sorted(read))
    folder = ROOT / "build" / "emulation" / hashlib.sha256(state.encode()).hexdigest()[:16]
    library = folder / "emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # only one of the test processes compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, flags)
    return library


def _compile(library: Path, flags: list[str]) -> None:
    folder, compiler = library.parent, os.environ.get("CXX", "g++")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        headers = [f"-isystem{p}" for p in cpp_extension.include_paths()]
        subprocess.run([compiler, *flags, *headers, "-xc++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    search = [f"-L{p}" for p in cpp_extension.library_paths()]
    temporary = library.with_suffix(f".{os.getpid()}")
    links = [compiler, "-shared", *flags, *objects, *search, "-ltorch_cpu", "-o", temporary]
    subprocess.run(links, check=True)
    os.replace(temporary, library)


@functools.cache
def load() -> ctypes.CDLL:
    """Register the operators as torch.ops.t2v_fast_emulated, once, built with the sanitizers named by SANITIZE."""
    definitions = torch.library.Library(LIBRARY, "DEF")
    for name, schema in dispatch.SCHEMAS.items():
        definitions.define(name + schema)
    load.keep = definitions  # the definitions live as long as this object
    library = ctypes.CDLL(str(build(os.environ.get(SANITIZE, ""))))
    library.emulation_sites.restype = ctypes.c_char_p
    return library


@contextmanager
def running(
    backwards: bool = False, eager: bool = False, left_out: str = "", calls: list[str] | None = None
) -> Iterator[None]:
    """Run the ops of t2v_fast.ops on the emulated kernels, with threads and copies in the given order.

    ``left_out`` names a barrier, as file:line, that is skipped. ``calls`` gets the names of the operators that run.
    """
    library, call, uses_gpu_kernels = load(), dispatch.call, dispatch.uses_gpu_kernels
    library.emulation_set(backwards, eager, left_out.encode())

    def emulated(name: str, *args: object) -> object:
        if calls is not None:
            calls.append(name)
        return call(name, *args) if name in dispatch.TRITON_ONLY else getattr(getattr(torch.ops, LIBRARY), name)(*args)

    dispatch.call, dispatch.uses_gpu_kernels = emulated, lambda t: True
    try:
        yield
    finally:
        dispatch.call, dispatch.uses_gpu_kernels = call, uses_gpu_kernels
        library.emulation_set(False, False, b"")


def sites() -> list[str]:
    """Every barrier, and every wait for copies, that kernels have reached so far."""
    return load().emulation_sites().decode().split()
