"""A large data set to its end, at a memory that does not grow; the peers run on a part of it.

python -m pytest bench/test_stream.py --benchmark-json stream.json
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

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
    resident: list[int] = []
    if contestant in OURS:
        examples = images

        def run() -> None:
            fisher(cell.model, stream(examples, size, resident), OURS[contestant])
    else:
        batch = harness.BATCH[size]
        batches = max(1, entry.part(4 * batch, pytestconfig.getoption("limit")) // batch)
        examples = min(images, batches * batch)

        def run() -> None:
            for x, y in stream(examples, size, resident):
                entry.run(x, y)

    benchmark.group = f"stream-{model}-{size}"
    benchmark.extra_info |= entry.verdict | {"images": images, "examples": examples}
    with harness.refusals():
        entry.run(cell.x, cell.y)  # warm
        benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["resident"] = resident
