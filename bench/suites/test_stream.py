"""A large data set to its end, with memory that does not grow.

    python -m pytest bench/suites/test_stream.py --benchmark-json stream.json

The peers run on a part of the data, straight after this library on the same part. Ratios come from these pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness
from t2v_fast import fisher

IMAGES = {32: 50_000, 64: 10_000}
OURS = {"fisher": "empirical", "fisher_deflated": "deflated"}
PEERS = ("naive", "vmap_chunked", "backpack_save_memory", "opacus", "nngeometry", "asdl", "task2vec")


def stream(images: int, size: int, resident: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random images, made as they are asked for. Writes down the memory at each tenth."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, harness.BATCH[size]):
        n = min(harness.BATCH[size], images - start)
        yield (
            torch.randn(n, 3, size, size, generator=generator),
            torch.randint(0, harness.CLASSES, (n,), generator=generator),
        )
        if len(resident) < 10 * (start + n) // images:
            resident.append(harness.memory())


@pytest.mark.parametrize("contestant", [*OURS, *PEERS])
@pytest.mark.parametrize(
    ("model", "size"), [*(("resnet18", size) for size in IMAGES), ("efficientnet_lite0", 64), ("toy", 32)]
)
def test_stream(benchmark: Any, pytestconfig: pytest.Config, model: str, size: int, contestant: str) -> None:
    images = pytestconfig.getoption("images") or IMAGES[size]
    cell = harness.cell(model, size)
    entry = cell.enter(contestant)
    batch, limit = harness.BATCH[size], pytestconfig.getoption("limit")
    batches = max(1, entry.part(4 * batch, limit) // batch)
    examples = images if contestant in OURS else min(images, batches * batch)
    resident: list[int] = []

    def run(runner: harness.Entry) -> None:
        with runner.contestant.session():
            for x, y in stream(examples, size, resident):
                runner.run(x, y)

    def run_reference() -> None:
        if cell.reference is not None:
            benchmark.extra_info["reference"] = [harness.timed(run, cell.reference)]
            resident.clear()

    benchmark.group = f"stream-{model}-{size}"
    benchmark.extra_info |= entry.verdict | {"images": images, "examples": examples}
    with harness.refusals():
        if contestant in OURS:
            benchmark.pedantic(fisher, (cell.model, stream(images, size, resident), OURS[contestant]), rounds=1)
        else:
            entry.run(cell.x, cell.y)  # warm
            benchmark.pedantic(run, (entry,), setup=run_reference, rounds=1)
    benchmark.extra_info["resident"] = resident
