"""The Triton kernels compile for two GPUs without spilling."""

from __future__ import annotations

import pytest
import resources

pytest.importorskip("triton", reason="this torch comes without Triton")


@pytest.mark.weekly
def test_no_kernel_spills() -> None:
    rows = resources.of_triton_kernels()
    assert {row["kernel"] for row in rows} == {
        f"{name}_kernel"
        for name in ("explicit", "boxes", "depthwise", "gram", "quadratic", "prod", "scatter", "grouped")
    }
    assert {row["dtype"] for row in rows} == {"float64", "float32", "bfloat16", "float16", "tf32"}
    assert [row for row in rows if row["spills"]] == []
    only_new = [row for row in rows if row["kernel"] == "boxes_kernel"]  # their instructions came with sm_90
    assert len(resources.triton_table(rows)) == len(only_new) + (len(rows) - len(only_new)) / len(resources.CARD)
