"""The Triton kernels compile for GPUs that are not here, without spilling; docs/gpu.md has what they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2v_fast import cards

pytest.importorskip("triton", reason="this torch comes without Triton")
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- triton resources -->\n", "<!-- /triton resources -->\n"
CARD = {80: "A100", 90: "H100"}


def occupancy(row: dict) -> float:
    """Share of a processor's 2,048 threads that the registers and the shared memory of its blocks leave room for."""
    card = cards.named(CARD[row["arch"]])
    threads = 32 * row["warps"]
    by_registers = card.registers // (-(-row["registers"] // 8) * 8 * threads)
    by_shared = card.shared * 1024 // (row["shared"] + 1024)  # the driver takes 1 KiB a block
    return min(by_registers, by_shared, 32, 2048 // threads) * threads / 2048


def table(rows: list[dict]) -> str:
    lines = [
        "| kernel | launched by | inputs | warps | sm_80: registers, shared bytes, occupancy | sm_90 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for old, new in zip(rows[::2], rows[1::2], strict=True):  # one launch on both
        cells = [old["kernel"].removesuffix("_kernel"), old["case"], old["dtype"], old["warps"]]
        for row in (old, new):
            cells.append(f"{row['registers']}, {row['shared']:,}, {100 * occupancy(row):.0f} %")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def test_no_kernel_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "ahead.py"), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {
        f"{name}_kernel" for name in ("explicit", "depthwise", "gram", "quadratic", "prod", "scatter")
    }
    assert {row["dtype"] for row in rows} == {"float64", "float32", "bfloat16", "float16", "tf32"}
    assert [row for row in rows if row["spills"]] == []
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    if (new := before + table(rows) + after) != text:
        PAGE.write_text(new)
