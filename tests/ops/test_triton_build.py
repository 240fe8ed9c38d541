"""The Triton kernels compile for two GPUs without spilling."""

from __future__ import annotations

import pytest
import resources

pytest.importorskip("triton", reason="this torch comes without Triton")


@pytest.mark.weekly
def test_no_kernel_spills() -> None:
    rows = resources.of_triton_kernels()
    assert {row["kernel"] for row in rows} == {
        f"{name}_kernel" for name in ("explicit", "depthwise", "gram", "quadratic", "prod", "scatter")
    }
    assert {row["dtype"] for row in rows} == {"float64", "float32", "bfloat16", "float16", "tf32"}
    assert [row for row in rows if row["spills"]] == []
    assert len(resources.triton_table(rows)) == len(rows) / len(resources.CARD)
