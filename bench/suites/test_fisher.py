"""Seconds of a batch for each contestant, next to this library's on the same batch.

    python -m pytest bench/suites/test_fisher.py -k "resnet18-64" --benchmark-json fisher.json

Other people use the machines too. So each timed run follows a timed run of this library, and ratios come from these
pairs. Before every timed run there is an untimed run of the same contestant, as for all batches of a data set but the
first.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import harness
from bench.contestants import NAMES

CONTRACT = ("floor", "step", "fisher", "naive", "vmap")


@pytest.mark.parametrize(
    "contestant", [pytest.param(name, marks=[pytest.mark.contract] if name in CONTRACT else []) for name in NAMES]
)
@pytest.mark.parametrize(("model", "size"), harness.CELLS)
def test_fisher(benchmark: Any, pytestconfig: pytest.Config, model: str, size: int, contestant: str) -> None:
    cell = harness.cell(model, size)
    entry, reference = cell.enter(contestant), cell.reference
    rounds = pytestconfig.getoption("rounds")
    examples = entry.part(len(cell.x), pytestconfig.getoption("limit"))
    before: list[float] = []

    def run_reference() -> None:
        if reference is not None:
            before.append(reference.timed(cell.x, cell.y))
        entry.warm(cell.x[:examples], cell.y[:examples])

    benchmark.group = f"{model}-{size}"
    benchmark.extra_info |= entry.verdict
    with harness.refusals(), entry.contestant.session():
        benchmark.pedantic(
            entry.run, (cell.x[:examples], cell.y[:examples]), setup=run_reference, rounds=rounds, warmup_rounds=1
        )
    benchmark.extra_info |= {"batch": len(cell.x), "examples": examples, "reference": before[-rounds:]}
