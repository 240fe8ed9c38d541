"""Registers, shared memory and occupancy of compiled kernels: the tables that the tests write into docs/gpu.md."""

from __future__ import annotations

from pathlib import Path

from t2v_fast.ops import gpu_specs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
CARD = {80: "A100", 90: "H100"}


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """The share of a processor's 2,048 threads that fit, given the registers and the shared memory of each block."""
    card = gpu_specs.named(CARD[arch])
    by_registers = card.registers // (-(-registers // 8) * 8 * threads)
    by_shared = card.shared * 1024 // (shared + 1024)  # the driver reserves 1 KiB per block
    return min(by_registers, by_shared, 32, 2048 // threads) * threads / 2048


def cell(arch: int, threads: int, registers: int, shared: int) -> str:
    return f"{registers}, {shared:,}, {100 * occupancy(arch, threads, registers, shared):.0f} %"


def write(section: str, header: list[str], rows: list[list[object]]) -> None:
    """Replace the table between the marks of the section, if the table has changed."""
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in [header, ["---"] * len(header), *rows])
    text = PAGE.read_text()
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    if (new := before + table + after) != text:
        PAGE.write_text(new)
