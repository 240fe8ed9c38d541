"""The machine code of GPU kernels: which instructions it has, in all and in the main loop. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);", re.MULTILINE)
TARGET = re.compile(r"0x([0-9a-f]+)")
SHAPE = re.compile(r"^H?G?D?MMA\.(\d+)x(\d+)x(\d+)")
PRODUCTS = ("HMMA", "HGMMA", "DMMA", "FFMA", "DFMA")


def _tool(name: str) -> str:
    """A tool of the CUDA toolkit, or else the copy that Triton brings along."""
    if (found := shutil.which(name)) is not None:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers, as HMMA.16816.F32.BF16
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


def functions(cubin: Path) -> dict[str, list[Instruction]]:
    """{name: instructions} of every kernel in a cubin."""
    text = subprocess.check_output([_tool("cuobjdump"), "-sass", str(cubin)], text=True)
    _, *bodies = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
    found = {}
    for body in bodies:
        name, _, code = body.partition("\n")
        found[name.strip()] = [Instruction(int(a, 16), b, c) for a, b, c in ADDRESS.findall(code)]
    demangled = subprocess.check_output(["c++filt"], input="\n".join(found), text=True).splitlines()
    return dict(zip(demangled, found.values(), strict=True))


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop: from the target of a branch backwards to the branch."""
    found = []
    for instruction in code:
        if instruction.opcode == "BRA" and (match := TARGET.findall(instruction.operands)):
            start = int(match[-1], 16)
            if start < instruction.address:
                found.append([i for i in code if start <= i.address <= instruction.address])
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most products; all of the code if no loop has any."""

    def products(loop: list[Instruction]) -> int:
        return sum(i.opcode in PRODUCTS for i in loop)

    best: list[Instruction] = []
    for loop in sorted(loops(code), key=len):
        inside = [other for other in loops(loop) if len(other) < len(loop) and products(other)]
        if not inside and products(loop) > products(best):
            best = loop
    return best or code


def multiply_adds(code: list[Instruction]) -> float:
    """How many multiply-adds a warp's instructions make, on average: 32 where each of them is one for every lane."""
    total = 0.0
    for i in code:
        if i.opcode in ("FFMA", "DFMA"):
            total += 32
        elif shape := SHAPE.search(i.name):
            by_warps = 4 if i.opcode == "HGMMA" else 1
            total += int(shape[1]) * int(shape[2]) * int(shape[3]) / by_warps
        elif i.opcode == "HMMA":
            total += 16 * 8 * (16 if ".16816." in i.name else 8)
    return total / len(code)


def counts(code: list[Instruction]) -> Counter[str]:
    """How many instructions of each kind there are.

    ``tensor`` are products on tensor cores, ``matrix loads`` are LDSM, ``generic`` loads and stores find out at run
    time which memory they access, ``local`` ones access what did not fit the registers, and ``copies N`` are
    asynchronous copies of N bytes into shared memory, or of whole boxes (``box copies``).
    """
    found: Counter[str] = Counter()
    for i in code:
        found["all"] += 1
        if i.opcode in ("HMMA", "HGMMA", "DMMA"):
            found["tensor"] += 1
        elif i.opcode in ("FFMA", "DFMA"):
            found["multiply-adds"] += 1
        elif i.opcode == "LDSM":
            found["matrix loads"] += 1
        elif i.opcode == "LDS":
            found["shared loads"] += 1
        elif i.opcode == "MOVM":
            found["transposes"] += 1
        elif i.opcode in ("LD", "ST"):
            found["generic"] += 1
        elif i.opcode in ("LDL", "STL"):
            found["local"] += 1
        elif i.opcode == "LDGSTS":
            bits = re.search(r"\.(64|128)\b", i.name)
            found[f"copies {int(bits[1]) // 8 if bits else 4}"] += 1
        elif i.opcode == "UTMALDG":
            found["box copies"] += 1
        elif i.opcode == "LDG":
            bits = re.search(r"\.(U8|S8|U16|S16|64|128)\b", i.name)
            width = int(bits[1].lstrip("US")) // 8 if bits else 4
            found[f"global loads {width}"] += 1
    return found
