"""laplace-torch: diagonals from its own backends and from this library's, on a residual network with batch norms.

    python -m bench.studies.frontends.laplace [--rounds 5]

laplace-torch comes from ``requirements/frontends.txt``. Times are those of ``Laplace(...).fit``. The backends are
exact, so the time for the same error is that for the same images. Each fit has a new network, so all of its self-check
is in the time. The empirical Fisher, which is one backward pass a batch, is fitted to more images as well: the
self-check costs the same for few and for many. Memory is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.harness import memory
from bench.studies.frontends.table import Row, main, times

BATCH, CLASSES = 16, 10
FEW, MANY = 2 * BATCH, 64 * BATCH  # images
BACKENDS = {"T2VGGN": ("CurvlinopsGGN", "AsdlGGN"), "T2VEF": ("CurvlinopsEF", "AsdlEF")}
SIZES = {"T2VGGN": (FEW,), "T2VEF": (FEW, MANY)}


class Residual(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def backend(name: str) -> type:
    from laplace import curvature

    from t2v_fast.adapters import laplace

    return getattr(laplace if name.startswith("T2V") else curvature, name)


def fit(name: str, images: int, dtype: torch.dtype = torch.float32) -> Any:
    from laplace import Laplace

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = Residual().to(dtype)
    data = TensorDataset(torch.randn(images, 3, 32, 32, dtype=dtype), torch.arange(images) % CLASSES)
    la = Laplace(model, "classification", "all", "diag", backend=backend(name))
    la.fit(DataLoader(data, BATCH))
    return la


def megabytes(name: str, images: int) -> float:
    """Return how much the largest size of a fresh process grows during a fit."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (name, images))


def _growth(name: str, images: int) -> float:
    backend(name)
    before = memory("VmHWM")  # getrusage's number may be that of the process that started this one
    fit(name, images)
    return (memory("VmHWM") - before) / 2**20


def rows(arguments: argparse.Namespace) -> list[Row]:
    return [
        row
        for ours, names in BACKENDS.items()
        for images in SIZES[ours]
        for row in compared(ours, names, images, arguments.rounds)
    ]


def compared(ours: str, names: Sequence[str], images: int, rounds: int) -> Iterator[Row]:
    """Compare one of this library's backends with some of laplace-torch's."""
    exact, needed = fit(ours, images, torch.float64), megabytes(ours, images)
    for theirs in names:
        yield row(ours, exact, needed, theirs, images, rounds)


def row(ours: str, exact: Any, needed: float, theirs: str, images: int, rounds: int) -> Row:
    """Compare a backend, its fit in float64 and the memory that it needs with one of laplace-torch's."""
    la = fit(theirs, images, torch.float64)
    worst = float((exact.H - la.H).norm() / la.H.norm())
    evidence = float((exact.log_marginal_likelihood() - la.log_marginal_likelihood()).abs())
    ratio = times(lambda: fit(theirs, images), lambda: fit(ours, images), rounds).ratio
    return Row(
        f"laplace-torch `{theirs}`, diagonal of all weights, {la.n_params} parameters, {CLASSES} classes, "
        f"{images:,} images of 32 x 32",
        1,
        f"{worst:.0e} relative in float64, log marginal likelihood {evidence:.0e} apart; memory grows by "
        f"{megabytes(theirs, images):.0f} MB with its own and {needed:.0f} MB with ours",
        ratio,
        ratio,
    )


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, needs=False)
