"""What the host does in a steady batch of ``fisher()`` on a CUDA device, counted without one.

    python -m bench.studies.host_work [--write docs/gpu.md]

The device is pretended (tests/helpers/pretend_cuda.py), and graphs are tapes of operators (pretend_graphs.py). So this
counts torch's operators and says nothing of times. Prints Markdown; --write puts it into the page.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import t2v_fast
from bench.gpu.networks import network  # first, because bench.gpu finds the helpers of the tests
from bench.pages import markdown, print_or_write

from pretend_cuda import moved, pretended  # isort: skip
from pretend_graphs import with_graphs  # isort: skip
from steady import batches_of_images, images, steady  # isort: skip
from waits import TO_DEVICE, TO_HOST, WAIT, Counted  # isort: skip

SIZE, BATCH, BATCHES = 32, 2, 7


def pictures() -> list[Tensor]:
    return [torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(k)) for k in range(BATCHES)]


def named(name: str) -> Callable[[], nn.Module]:
    return functools.partial(network, name, SIZE, torch.device("cpu"))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "two convolutions": (images, batches_of_images),
    "ResNet-18": (named("resnet18"), pictures),
    "ResNet-50": (named("resnet50"), pictures),
    "ViT of two blocks": (named("small vit"), pictures),
}


def counts(make: Callable[[], nn.Module], batches: list[Tensor], cuda_graphs: bool, estimator: str) -> Counted:
    """What happens in one batch of a call."""
    with pretended(), with_graphs():
        there = moved(make())
        with Counted() as counted:
            t2v_fast.fisher(there, steady(batches, counted), estimator, 2, device="cuda:0", cuda_graphs=cuda_graphs)
    return counted


def page() -> str:
    """The table."""
    rows = [
        [
            *("network", "waits", "copies to the host", "copies to the device"),
            *("operators, as it is", "replayed", "replayed, `deflated`"),
        ]
    ]
    for name, (make, batches) in NETWORKS.items():
        # Graphs take away what the passes launch, and the estimator adds to what the cotangents launch.
        found = [
            counts(make, batches(), cuda_graphs, estimator)
            for estimator, cuda_graphs in (("hutchinson", False), ("hutchinson", True), ("deflated", True))
        ]
        crossing = [[each.kinds[kind] for kind in (WAIT, TO_HOST, TO_DEVICE)] for each in found]
        assert crossing[0] == crossing[1]
        launched = [each.operators.total() for each in found]
        replayed = (f"{number:,} and 2 graphs" for number in launched[1:])
        rows.append([name, *map(str, crossing[0]), f"{launched[0]:,}", *replayed])
    return markdown(rows)


if __name__ == "__main__":
    print_or_write(page, "host work", __doc__)
