"""Run what is not timed in many processes at once: ``python -m bench.gpu.pool [--rehearse] FOLDER``.

Each process takes the next job that no other has taken, and writes what came of it into the folder. A kernel that
breaks the device's context breaks it for its process alone: that process starts anew with the next job.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import tools
from bench.gpu.card import rehearsing
from bench.gpu.report import Absent, Report

BROKEN = ("CUDA error", "CUDA driver error", "illegal memory access", "device-side assert")


@dataclass(frozen=True)
class Job:
    """A line of the report. What an ``excused`` one cannot do is left out, and is not wrong."""

    section: str
    name: str
    run: Callable[[], Any]
    excused: bool = False


def jobs(device: torch.device, sizes: Any) -> list[Job]:
    """All jobs, those that take the longest first."""
    from bench.gpu import measure, verify

    return [*measure.compilations(device, sizes), *verify.jobs(device, sizes)]


def work(every: Sequence[Job], folder: Path) -> bool:
    """Do the jobs that nobody has taken. Return whether the device's context is broken, so that others must go on."""
    for number, job in enumerate(every):
        try:
            os.close(os.open(folder / f"{number}.taken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        found: dict[str, Any] = {}
        begin = time.monotonic()
        try:
            found["value"] = job.run()
        except Exception as error:
            found["absent"] = isinstance(error, Absent)
            found["error"] = str(error) if found["absent"] else Report.reason(error)
        found["seconds"] = time.monotonic() - begin
        (folder / f"{number}.new").write_text(json.dumps(found))
        os.replace(folder / f"{number}.new", folder / f"{number}.json")
        if any(text in found.get("error", "") for text in BROKEN):
            return True
    return False


def run(
    report: Report, every: Sequence[Job], processes: int, seconds: float, arguments: Sequence[str] = ()
) -> dict[str, float]:
    """Let processes do the jobs, and report each as soon as it has ended. Return how long each took."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(report, every, processes, seconds, arguments, Path(folder))


def _run(
    report: Report, every: Sequence[Job], processes: int, seconds: float, arguments: Sequence[str], folder: Path
) -> dict[str, float]:
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "bench.gpu.pool", *arguments, str(folder)]
    logs = [folder / f"{k}.log" for k in range(processes)]
    # Each process that compiles a step would otherwise start one of its own for every core.
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
    started = [tools.start(command, log, **threads) for log in logs]
    waiting, spent = dict(enumerate(every)), {}
    try:
        while waiting and time.monotonic() < end:
            running = any(process.poll() is None for process in started)
            ended = [number for number in waiting if (folder / f"{number}.json").exists()]
            for number in ended:
                job = waiting.pop(number)
                found = json.loads((folder / f"{number}.json").read_text())
                spent[job.name] = found["seconds"]
                report.line(job.section, job.name, partial(_result, found), job.excused)
            if not (ended or running):
                break
            time.sleep(0.1)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    last = "; ".join(text[-200:] for log in logs if log.exists() and (text := log.read_text().strip()))
    late = time.monotonic() >= end
    for number, job in waiting.items():
        taken = "its process" if (folder / f"{number}.taken").exists() else "no process took it: each"
        why = f"not done within {seconds:.0f} s" if late else f"{taken} ended early: {last[-1000:]}"
        report.line(job.section, job.name, partial(_result, {"error": why, "absent": False}), job.excused)
    return spent


def _result(found: dict[str, Any]) -> Any:
    if "error" in found:
        raise Absent(found["error"]) if found["absent"] else AssertionError(found["error"])
    return found["value"]


def main() -> None:
    from bench.gpu.__main__ import FULL, REHEARSAL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    device, sizes = (torch.device("cpu"), REHEARSAL) if asked.rehearse else (torch.device("cuda"), FULL)
    with rehearsing() if asked.rehearse else nullcontext():
        broken = work(jobs(device, sizes), asked.folder)
    if broken:
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu.pool", *sys.argv[1:]])


if __name__ == "__main__":
    main()
