"""Compile the default configurations of the Triton kernels ahead of time, and print their resources as JSON.

No GPU is needed. ``python tests/helpers/ahead.py 80 90`` prints a list of {kernel, case, arch, registers, shared,
spills, code, loop, multiply_adds}, where the last three are about the machine code. Each launch of the ops is caught
with its arguments, specialised as Triton would specialise it, and compiled to PTX, for which ptxas reports resources.
``--earlier`` is for kernels of an earlier commit, which may have fewer ops.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import machine_code
import torch
import triton
from t2v_fast.kernels import backend, launch, sq_conv_gram
from t2v_fast.kernels.sq_conv_geometry import conv_geometry
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from t2v_fast.ops.reference import accumulate_dtype

try:
    from t2v_fast.kernels import sq_conv_boxes
except ImportError:  # resources.py compares with an earlier commit, which has no such file
    sq_conv_boxes = None

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS[torch.int64] = "*i64"
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a program may have


def rand(*shape: int, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=dtype).to(memory_format=layout)


def convolution(dtype: torch.dtype, path: str, elementwise: bool, c: int, o: int, size: int, stride: int, groups: int):
    def run() -> None:
        x = rand(2, c, size, size, dtype=dtype, layout=torch.channels_last)
        g = rand(2, o, size // stride, size // stride, dtype=dtype, layout=torch.channels_last)
        rest = ((stride, stride), (1, 1), (1, 1), groups)
        if elementwise:
            sums = accumulate_dtype(dtype)
            backend.sq_conv_acc_(torch.zeros(o, c // groups, 3, 3, dtype=sums), x, g, torch.ones(2, dtype=sums), *rest)
        else:
            backend.sq_conv(x, g, (3, 3), *rest, path)

    return run


def boxes(dtype: torch.dtype, c: int, o: int, size: int, kernel: int) -> Callable[[], object]:
    """A launch that only sm_90 and later can run."""

    def run() -> None:
        x, g = (
            rand(2, n, size, size, dtype=dtype, layout=torch.channels_last)
            if kernel > 1
            else rand(2, size * size, n, dtype=dtype).transpose(1, 2).unsqueeze(2)
            for n in (c, o)
        )
        geometry = conv_geometry(x, (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
        sq_conv_boxes.boxes_sums(geometry, g)

    return run


# Cases whose op was not always there.
NEWER = {
    "linear gram, with bias": "sq_linear",
    "experts": "sq_grouped",
    "experts, elementwise": "sq_grouped_acc_",
}


def cases(dtype: torch.dtype, earlier: bool = False) -> dict[str, Callable[[], object]]:
    """Calls that launch every kernel, with sizes from the networks in docs/gpu.md.

    For ``earlier`` kernels, cases whose op is not there are left out.
    """
    sums = accumulate_dtype(dtype)
    tokens, out = rand(2, 197, 768, dtype=dtype), rand(2, 197, 3072, dtype=dtype)
    maps, shift = rand(2, 784, 128, dtype=dtype), torch.zeros(128, dtype=sums)
    index = torch.zeros(2, 197, dtype=torch.int64)
    offsets, groups = torch.arange(17) * 32, torch.arange(9) * 2  # 8 experts of 2 examples
    rows, hidden = rand(512, 768, dtype=dtype), rand(512, 1536, dtype=dtype)
    on_tensor_cores = dtype.itemsize == 2 or (dtype == torch.float32 and launch.precision() == "tf32")
    found = (
        {"3x3 boxes": boxes(dtype, 128, 128, 28, 3), "linear boxes": boxes(dtype, 768, 768, 14, 1)}
        if on_tensor_cores and sq_conv_boxes
        else {}
    ) | {
        "3x3 explicit": convolution(dtype, "explicit", False, 64, 64, 56, 1, 1),
        "3x3 explicit, elementwise": convolution(dtype, "explicit", True, 64, 64, 56, 1, 1),
        "3x3 gram": convolution(dtype, "gram", False, 256, 256, 14, 1, 1),
        "3x3 gram, strided": convolution(dtype, "gram", False, 16, 32, 56, 4, 1),
        "depthwise": convolution(dtype, "explicit", False, 96, 96, 56, 1, 96),
        "depthwise, elementwise": convolution(dtype, "explicit", True, 96, 96, 56, 1, 96),
        "conv_gram": lambda: backend.conv_gram(rand(2, 256, 14, 14, dtype=dtype), (3, 3), (1, 1), (1, 1), (1, 1), 1),
        "sq_gram": lambda: backend.sq_gram(torch.empty(2, 1, 196, 196, dtype=sums), rand(4, 256, 14, 14, dtype=dtype)),
        "linear explicit": lambda: backend.sq_outer(tokens, out),
        "linear gram": lambda: backend.sq_outer(tokens, out, "gram"),
        "linear gram, with bias": lambda: backend.sq_linear(tokens, out),
        "norm": lambda: backend.sq_norm(maps, maps, shift, shift),
        "norm, contiguous maps": lambda: backend.sq_norm(*[rand(2, 64, 3136, dtype=dtype).transpose(1, 2)] * 2),
        "bias": lambda: backend.sq_prod(maps),
        "embedding": lambda: backend.sq_scatter(index, tokens, 1000),
        "embedding, elementwise": lambda: backend.sq_scatter_acc_(
            torch.zeros(1000, 768, dtype=sums), index, tokens, torch.ones(2, dtype=sums)
        ),
        "experts": lambda: backend.sq_grouped(rows, hidden, offsets),
        "experts, elementwise": lambda: backend.sq_grouped_acc_(
            torch.zeros(8, 1536, 768, dtype=sums), rows, hidden, offsets, groups, torch.ones(16, dtype=sums)
        ),
    }
    return {name: run for name, run in found.items() if not earlier or hasattr(backend, NEWER.get(name, "sq_outer"))}


def specialise(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict[str, int]]:
    """Return what Triton would compile for these arguments, and the options of the launch."""
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Return the registers per thread and the bytes of spills, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(file), "-o", f"{folder}/cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))
    return {"registers": int(re.search(r"Used (\d+) registers", report)[1]), "spills": spills}


def instructions(cubin: bytes) -> dict[str, object]:
    """Return the counts of instructions in all of the code and in its main loop, and the loop's multiply-adds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = machine_code.functions(Path(file.name)).values()
    loop = machine_code.main_loop(code)
    return {
        "code": machine_code.counts(code),
        "loop": machine_code.counts(loop),
        "multiply_adds": machine_code.multiply_adds(loop),
    }


def main(archs: list[int], earlier: bool) -> None:
    caught: list[tuple[JITFunction, tuple, dict]] = []
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: caught.append((self, args, kwargs))
    found, seen = [], set()
    modes = [(d, "highest") for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    for dtype, precision in [*modes, (torch.float32, "high")]:
        torch.set_float32_matmul_precision(precision)
        kind = "tf32" if precision == "high" else str(dtype).removeprefix("torch.")
        for case, run in cases(dtype, earlier).items():
            launches = []
            for arch in archs:
                caught.clear()
                sq_conv_gram.shared_memory = lambda t, arch=arch: SHARED[arch]  # which block sizes depend on
                run()
                launches.append(caught.copy())
            for at_once in zip(*launches, strict=True):
                for arch, (kernel, args, kwargs) in zip(archs, at_once, strict=True):
                    source, options = specialise(kernel, args, dict(kwargs))
                    key = (arch, source.hash(), *options.items())
                    if key in seen or (precision == "high" and kwargs.get("PRECISION") != "tf32"):
                        continue  # another case compiled the same kernel
                    seen.add(key)
                    if kernel.fn.__name__ == "boxes_kernel" and arch < 90:
                        continue
                    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
                    found.append(
                        {"kernel": kernel.fn.__name__, "case": case, "dtype": kind, "arch": arch}
                        | {"warps": options["num_warps"], "shared": compiled.metadata.shared}
                        | resources(compiled.asm["ptx"], arch)
                        | instructions(compiled.asm["cubin"])
                    )
    print(json.dumps(found))


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    main([int(a) for a in sys.argv[1:] if a != "--earlier"], "--earlier" in sys.argv)
