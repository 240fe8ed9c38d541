"""The kernels of the CPU backend without torch, against plain loops: of this processor, and of Arm by emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM = pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR} (package qemu-user)"
)


def build(folder: Path, compiler: str, isas: dict[str, list[str]], *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """Compile the kernels and the program that checks them, with the compiler's flags for each instruction set."""
    common = [compiler, "-std=c++20", "-O2", "-ffp-contract=fast", "-Wno-psabi"]
    objects = []
    for isa, own in isas.items():
        objects.append(folder / f"{isa}.o")
        command = [*common, *own, f"-DT2V_ISA={isa}", "-c", csrc / "cpu" / "tile.cpp", "-o", objects[-1]]
        subprocess.run(command, check=True)
    sources = ROOT / "tests" / "helpers" / "kernels" / "check.cpp", csrc / "cpu" / "dispatch.cpp"
    subprocess.run([*common, "-static", *flags, *sources, *objects, "-o", folder / "check"], check=True)
    return folder / "check"


def run(*command: object) -> tuple[int, list[str]]:
    found = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return found.returncode, found.stdout.splitlines()


@pytest.mark.slow
def test_portable_kernels(tmp_path: Path) -> None:
    status, lines = run(build(tmp_path, "g++", {"portable": []}), "portable")
    assert (status, len(lines)) == (0, 1), lines
    assert int(lines[0].removeprefix("portable: ").removesuffix(" checks")) > 5000


@pytest.mark.slow
def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    """A tile that leaves the last summed position out."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "cpu" / "vector.h"
    before = "for (int64_t z = 0; z < rows.inner; ++z, p"
    assert header.read_text().count(before) == 1
    header.write_text(header.read_text().replace(before, before.replace("< rows.inner", "< rows.inner - 1")))
    status, lines = run(build(tmp_path, "g++", {"portable": []}, csrc=tmp_path / "csrc"), "portable")
    assert status == 1
    assert lines[0].startswith("store: got")


@ARM
@pytest.mark.slow
def test_kernels_of_arm(tmp_path: Path) -> None:
    """On a processor with every extension, and on one without dot products of bfloat16."""
    isas = {"neon": ["-march=armv8-a"], "neonbf16": ["-march=armv8.2-a+bf16"]}
    check = build(tmp_path, CROSS, isas, "-DT2V_ARM")
    status, lines = run(EMULATOR, "-cpu", "max", check, *isas)
    assert status == 0, lines
    assert [line.split(":")[0] for line in lines] == list(isas)
    assert all(line.endswith(" checks") for line in lines)
    status, lines = run(EMULATOR, "-cpu", "cortex-a57", check, *isas)
    assert status == 0, lines
    assert lines[1] == "neonbf16: not here"
