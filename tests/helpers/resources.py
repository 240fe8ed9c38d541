"""Registers and shared memory that the compiled GPU kernels use. As a script, writes both tables of docs/gpu.md.

    python tests/helpers/resources.py

Needs nvcc and Triton, but no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from t2v_fast.ops import gpu_specs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
CARD = {80: "A100", 90: "H100"}
NVCC = shutil.which("nvcc")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """The share of a processor's 2,048 threads that fit, given the registers and the shared memory of each block."""
    card = gpu_specs.named(CARD[arch])
    by_registers = card.registers // (-(-registers // 8) * 8 * threads)
    by_shared = card.shared * 1024 // (shared + 1024)  # the driver reserves 1 KiB per block
    return min(by_registers, by_shared, 32, 2048 // threads) * threads / 2048


def cell(arch: int, threads: int, registers: int, shared: int) -> str:
    return f"{registers}, {shared:,}, {100 * occupancy(arch, threads, registers, shared):.0f} %"


def _compile(source: Path, folder: str) -> list[dict[str, str]]:
    command = [NVCC, "-std=c++20", "-O3", "-c", "-Xptxas=-v", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CARD]
    command += [f"-isystem={p}" for p in cpp_extension.include_paths()]
    command += [str(source), "-o", f"{folder}/{source.stem}.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [match.groupdict() for match in ENTRY.finditer(done.stderr)]
    names = subprocess.check_output(["c++filt"], input="\n".join(row["name"] for row in found), text=True).splitlines()
    return [row | {"name": name} for row, name in zip(found, names, strict=True)]


def of_cuda_kernels() -> list[dict[str, str]]:
    """What ptxas reports of each kernel in csrc/cuda."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda source: _compile(source, folder), sources) for row in rows]


def cuda_launches(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[int, str]]:
    """{(kernel, instance): {architecture: cell of the table}}."""
    launches: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        name, arguments = re.search(r"(\w+)_kernel<(.*)>\(", row["name"]).groups()
        arguments = re.sub(r"t2v::cuda::|c10::", "", arguments).replace("true", "elements").replace("false", "filters")
        text = cell(int(row["arch"]), 128, int(row["registers"]), int(row["shared"] or 0))
        launches.setdefault((name, arguments), {})[int(row["arch"])] = text
    return launches


def of_triton_kernels() -> list[dict[str, Any]]:
    """What ptxas reports of each default configuration in kernels/, in a process that does not interpret Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ahead.py"), *map(str, CARD)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def triton_table(rows: list[dict[str, Any]]) -> list[list[object]]:
    table = []
    for launch in zip(rows[::2], rows[1::2], strict=True):  # one launch on both
        first = launch[0]
        about = [first["kernel"].removesuffix("_kernel"), first["case"], first["dtype"], first["warps"]]
        table.append(about + [cell(r["arch"], 32 * r["warps"], r["registers"], r["shared"]) for r in launch])
    return table


def write(section: str, header: list[str], rows: list[list[object]]) -> None:
    """Replace the table between the section's marks."""
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in [header, ["---"] * len(header), *rows])
    text = PAGE.read_text()
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    PAGE.write_text(before + table + after)


def main() -> None:
    columns = ["sm_80: registers, shared bytes, occupancy", "sm_90"]
    launches = cuda_launches(of_cuda_kernels())
    rows = [[*key, *launches[key].values()] for key in sorted(launches)]
    write("cuda resources", ["kernel", "instance", *columns], rows)
    rows = triton_table(of_triton_kernels())
    write("triton resources", ["kernel", "launched by", "inputs", "warps", *columns], rows)


if __name__ == "__main__":
    main()
