"""The Triton kernels compile for two GPUs without spilling; docs/gpu.md has the table of their resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resources

pytest.importorskip("triton", reason="this torch comes without Triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.weekly
def test_no_kernel_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ahead.py"), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {
        f"{name}_kernel" for name in ("explicit", "depthwise", "gram", "quadratic", "prod", "scatter")
    }
    assert {row["dtype"] for row in rows} == {"float64", "float32", "bfloat16", "float16", "tf32"}
    assert [row for row in rows if row["spills"]] == []
    header = ["kernel", "launched by", "inputs", "warps", "sm_80: registers, shared bytes, occupancy", "sm_90"]
    table = []
    for launch in zip(rows[::2], rows[1::2], strict=True):  # one launch on both
        first = launch[0]
        about = [first["kernel"].removesuffix("_kernel"), first["case"], first["dtype"], first["warps"]]
        table.append(about + [resources.cell(r["arch"], 32 * r["warps"], r["registers"], r["shared"]) for r in launch])
    resources.write("triton resources", header, table)
