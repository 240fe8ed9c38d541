"""Programs beside this one: the build, compute-sanitizer and ncu."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from bench.gpu import ROOT
from bench.gpu.report import Absent, Report

METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of the processors' peak",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "% of the tensor cores' issue slots",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of the memory's peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% occupancy",
}


def start(command: Sequence[str], log: Path | None = None, **settings: str) -> subprocess.Popen:
    """Start a program in the repository, with more environment variables. What it prints goes into a file or a pipe."""
    environment = {**os.environ, **settings}
    with nullcontext(subprocess.PIPE) if log is None else log.open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, seconds: float) -> str:
    """Return what a program prints. AssertionError if it fails, TimeoutExpired if it takes longer."""
    try:
        said, _ = process.communicate(timeout=max(seconds, 1))
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, f"{process.args} failed: {said[-1500:]}"
    return said


def build(report: Report, seconds: float) -> None:
    """Compile the extension for this machine's card, in place. Nothing of the library may be imported before."""

    def run() -> str:
        begin = time.monotonic()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        settings = {"T2V_FAST_CUDA": "1", "T2V_FAST_REQUIRE_EXT": "1", "MAX_JOBS": str(os.cpu_count())}
        said = finish(start(command, **settings, TORCH_CUDA_ARCH_LIST="9.0"), seconds)
        return f"{time.monotonic() - begin:.0f} s; {said.strip().splitlines()[-1]}"

    report.line("environment", "build", run)


def sanitized(case: str, backend: str, check: str, more: Sequence[str]) -> str:
    """What compute-sanitizer says about a small case."""
    tool = _found("compute-sanitizer", more)
    if tool is None:
        return _absent("compute-sanitizer")
    options = [] if more else ["--tool", check, "--error-exitcode", "9"]
    program = [sys.executable, "-m", "bench.gpu.single", case, "--backend", backend, *more]
    try:
        return finish(start([*tool, *options, *program]), 120).strip().splitlines()[-1]
    except AssertionError as error:
        if "Device not supported" in str(error):
            raise Absent("compute-sanitizer cannot work on this machine") from error
        raise


def _absent(name: str) -> NoReturn:
    raise Absent(f"this machine has no {name}")


def counters(
    report: Report, cases: Sequence[str], backends: Sequence[str], seconds: float, more: Sequence[str]
) -> None:
    """What ncu says about the longest kernel of some large cases."""
    for case in cases:
        for backend in backends:

            def run(case: str = case, backend: str = backend) -> dict[str, str]:
                tool = _found("ncu", more)
                if tool is None:
                    return _absent("ncu")
                asked = [] if more else ["--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)]
                command = [*tool, *asked, sys.executable, "-m", "bench.gpu.single", case, "--backend", backend]
                return longest(finish(start([*command, "--batch", "2" if more else "64", *more]), seconds))

            report.line("counters", f"{case}, {backend}", run, excused=True)


def _found(name: str, more: Sequence[str]) -> list[str] | None:
    """How a command with a tool begins. In a rehearsal (``more``) the program runs without the tool."""
    if more:
        return []
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    return None if path is None else [path]


def longest(said: str) -> dict[str, str]:
    """The metrics of the kernel with the longest time in what ncu printed."""
    lines = said.splitlines()
    first = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise Absent(f"ncu measured nothing: {said.strip()[-300:]}")
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[first:]):
        if row.get("Metric Name") in METRICS:
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            kernel[METRICS[row["Metric Name"]]] = _in_us(row["Metric Value"], row.get("Metric Unit", ""))
    assert kernels, f"ncu printed none of {list(METRICS)}"
    return max(kernels.values(), key=lambda kernel: float(kernel.get("us", 0)))


def _in_us(value: str, unit: str) -> str:
    number = float(value.replace(",", ""))
    return f"{number * {'ns': 1e-3, 'nsecond': 1e-3, 'ms': 1e3, 'msecond': 1e3}.get(unit, 1):.4g}"
