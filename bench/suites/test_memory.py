"""Peak memory over the model and its batch; each contestant has a process of its own. Linux only.

python -m pytest bench/suites/test_memory.py -k resnet18 --benchmark-json memory.json
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bench import harness

CONTESTANTS = (
    *("forward", "floor", "step", "step_compiled", "fisher", "fisher_bfloat16", "vmap", "backpack"),
    "backpack_save_memory",
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(
    ("model", "size"), [("resnet18", 224), ("resnet18", 64), ("resnet18", 32), ("resnet50", 224), ("toy", 32)]
)
def test_memory(benchmark: Any, model: str, size: int, contestant: str) -> None:
    entry = harness.cell(model, size).enter(contestant)
    benchmark.group = f"memory-{model}-{size}"
    with harness.refusals(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = benchmark.pedantic(pool.submit(harness.peak_memory, model, size, contestant).result, rounds=1)
    benchmark.extra_info |= entry.verdict | {"batch": harness.BATCH[size], "peak": peak}
