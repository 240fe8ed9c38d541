"""Registers, shared memory and machine code of the compiled GPU kernels. As a script, writes the tables of docs/gpu.md.

    python tests/helpers/resources.py [--before 317f8b0]

The main loops are compared with those of an earlier commit. Needs nvcc and Triton, but no GPU.
"""

from __future__ import annotations

import argparse
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

import machine_code
from torch.utils import cpp_extension

from t2v_fast.ops import gpu_specs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
CARD = {80: "A100", 90: "H100"}
NVCC = shutil.which("nvcc")
FACTORS = ("no x", "by channel", "by position")  # the values of Factor in csrc/cuda/sq_prod.cu
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


def _compile(source: Path, arch: int, folder: str) -> list[dict[str, Any]]:
    cubin = Path(folder) / f"{source.stem}.{arch}.cubin"
    command = [NVCC, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    command += [f"-isystem={p}" for p in cpp_extension.include_paths()]
    command += [str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [match.groupdict() for match in ENTRY.finditer(done.stderr)]
    names = subprocess.check_output(["c++filt"], input="\n".join(row["name"] for row in found), text=True).splitlines()
    code = machine_code.functions(cubin)
    return [row | {"name": name, "code": code[name]} for row, name in zip(found, names, strict=True)]


def of_cuda_kernels(root: Path = ROOT) -> list[dict[str, Any]]:
    """What ptxas reports of each kernel in csrc/cuda, and the kernel's instructions."""
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_compile, source, arch, folder) for source in sources for arch in CARD]
        return [row for job in jobs for row in job.result()]


def instance(row: dict[str, Any]) -> tuple[str, str]:
    """(kernel, template arguments) of a kernel in csrc/cuda."""
    name, arguments = re.search(r"(\w+)_kernel<(.*)>\(", row["name"]).groups()
    arguments = re.sub(r"t2v::cuda::|c10::", "", arguments).replace("true", "elements").replace("false", "filters")
    arguments = re.sub(r"\(\(anonymous namespace\)::Factor\)(\d)", lambda m: FACTORS[int(m[1])], arguments)
    return name, arguments


def reads_single_values(instance: str) -> bool:
    """Whether the second template argument, which is how many values a kernel reads at once, is 1."""
    return instance.split(", ")[1] == "1"


def cuda_launches(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[int, str]]:
    """{(kernel, instance): {architecture: cell of the table}}."""
    launches: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        text = cell(int(row["arch"]), 128, int(row["registers"]), int(row["shared"] or 0))
        launches.setdefault(instance(row), {})[int(row["arch"])] = text
    return launches


def of_triton_kernels(root: Path = ROOT) -> list[dict[str, Any]]:
    """What ptxas reports of each default configuration in kernels/, in a process that does not interpret Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ahead.py"), *map(str, CARD)]
    command += ["--earlier"] if root != ROOT else []
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def triton_table(rows: list[dict[str, Any]]) -> list[list[object]]:
    """One line for each launch. A launch that only one card can run has no cell for the other."""
    launches: dict[tuple[object, ...], list[dict[int, str]]] = {}
    for row in rows:
        about = (row["kernel"].removesuffix("_kernel"), row["case"], row["dtype"], row["warps"])
        found = launches.setdefault(about, [{}])
        if row["arch"] in found[-1]:  # a case may launch a kernel twice
            found.append({})
        found[-1][row["arch"]] = cell(row["arch"], 32 * row["warps"], row["registers"], row["shared"])
    return [[*about, *(cells.get(arch, "-") for arch in CARD)] for about, found in launches.items() for cells in found]


# The counts that the table of main loops shows, and how it calls them.
SHOWN = {
    "tensor": "tensor",
    "multiply-adds": "FMA",
    "matrix loads": "LDSM",
    "shared loads": "LDS",
    "transposes": "MOVM",
    "generic": "generic",
    "local": "local",
    "copies 16": "copies of 16 B",
    "copies 8": "copies of 8 B",
    "copies 4": "copies of 4 B",
    "box copies": "copies of boxes",
    "global loads 2": "loads of 2 B",
}


def loop_cell(counts: dict[str, int], multiply_adds: float) -> str:
    shown = ", ".join(f"{counts[kind]} {text}" for kind, text in SHOWN.items() if counts.get(kind))
    return f"{counts['all']:,}: {shown}; {multiply_adds:.0f}"


def main_loops(cuda: list[dict[str, Any]], triton: list[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    """{(language, kernel, instance): cell of the table} of the kernels that multiply matrices, on sm_90."""
    cells: dict[tuple[str, ...], str] = {}
    for row in cuda:
        name, arguments = instance(row)
        tiled = name in ("squares", "gradient", "gram", "form")
        if tiled and row["arch"] == "90" and not reads_single_values(arguments):
            loop = machine_code.main_loop(row["code"])
            cells["CUDA", name, arguments] = loop_cell(machine_code.counts(loop), machine_code.multiply_adds(loop))
    for row in triton:
        if (
            row["kernel"] in ("explicit_kernel", "gram_kernel", "quadratic_kernel", "boxes_kernel")
            and row["arch"] == 90
        ):
            key = ("Triton", row["kernel"].removesuffix("_kernel"), f"{row['case']}, {row['dtype']}")
            cells.setdefault(key, loop_cell(row["loop"], row["multiply_adds"]))
    return cells


def cell_before(before: dict[tuple[str, ...], str], key: tuple[str, ...]) -> str:
    """The cell of the same kernel in an earlier commit, whose instances may have fewer template arguments."""
    *kernel, instance = key
    found = [k for k in before if list(k[:-1]) == kernel and f"{instance}, ".startswith(f"{k[-1]}, ")]
    return before[max(found, key=lambda k: len(k[-1]))] if found else "-"


def earlier(commit: str, folder: str) -> Path:
    """The sources of a commit, unpacked into a folder."""
    archive = subprocess.run(["git", "archive", commit, "csrc", "kernels", "t2v_fast"], cwd=ROOT, capture_output=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    (Path(folder) / "t2v_fast" / "kernels").symlink_to("../kernels")
    return Path(folder)


def write(section: str, header: list[str], rows: list[list[object]]) -> None:
    """Replace the table between the section's marks."""
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in [header, ["---"] * len(header), *rows])
    text = PAGE.read_text()
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    PAGE.write_text(before + table + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="317f8b0", help="the commit that main loops are compared with")
    arguments = parser.parse_args()
    columns = ["sm_80: registers, shared bytes, occupancy", "sm_90"]
    cuda, triton = of_cuda_kernels(), of_triton_kernels()
    launches = cuda_launches(cuda)
    rows = [[*key, *launches[key].values()] for key in sorted(launches)]
    write("cuda resources", ["kernel", "instance", *columns], rows)
    write("triton resources", ["kernel", "launched by", "inputs", "warps", *columns], triton_table(triton))
    now = main_loops(cuda, triton)
    with tempfile.TemporaryDirectory() as folder:
        root = earlier(arguments.before, folder)
        before = main_loops(of_cuda_kernels(root), of_triton_kernels(root))
    rows = [[*key, cell_before(before, key), now[key]] for key in sorted(now)]
    write("main loops", ["written in", "kernel", "instance", f"at {arguments.before}", "now"], rows)


if __name__ == "__main__":
    main()
