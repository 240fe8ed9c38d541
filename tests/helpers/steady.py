"""Calls of ``fisher`` whose batches become steady: networks, batches and options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from networks import Function
from oracle import randomise_norms
from torch import Tensor, nn
from waits import Counted

from t2v_fast.estimation.allocation import Allocation

STEADY = 5  # the number of a batch that the self-check leaves alone


def images() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(2)]
    return randomise_norms(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5))).eval()


def pooled() -> nn.Module:
    """With an average pool to one pixel, which channels-last images leave as a strided view."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 5)).eval()


def tokens() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    parts = {"embed": nn.Embedding(9, 8), "layer": layer, "head": nn.Linear(8, 4)}

    def run(self: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.layer(self.embed(batch["ids"]) * batch["attention_mask"][..., None]))

    return Function(run, **parts).eval()


def batches_of_images(labels: Tensor | None = None) -> list[Any]:
    x = [torch.randn(8, 4, 7, 6, generator=torch.Generator().manual_seed(k)) for k in range(7)]
    return x if labels is None else list(zip(x, labels.split(8), strict=True))


def batches_of_tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(7):
        ids, mask = torch.randint(0, 9, (8, 5), generator=generator), torch.ones(8, 5, dtype=torch.long)
        mask[::3, 3:] = 0
        found.append({"ids": ids, "attention_mask": mask, "labels": ids % 4})
    return found


def steady(loader: Iterable[Any], counted: Counted) -> Iterator[Any]:
    """Count what happens between the loader's batches ``STEADY`` and the next."""
    for k, batch in enumerate(loader):
        if k == STEADY:
            counted.counting = True
        if k == STEADY + 1:
            counted.counting = False
        yield batch


OF_TOKENS = {"forward": lambda model, batch: model(batch)}
LABELS = torch.arange(56) % 5
SPREAD = Allocation(torch.arange(56) % 3 + 1, torch.arange(56), torch.ones(56, dtype=torch.float64))
CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, Any]]] = {
    **{name: (images, batches_of_images(), {"estimator": name}) for name in ("deflated", "hutchinson", "monte_carlo")},
    **{
        f"exact, by {name}": (images, batches_of_images(), {"estimator": "exact", "granularity": name})
        for name in ("filter", "tensor", "parameter")
    },
    "a strided view": (pooled, batches_of_images(), {"estimator": "hutchinson"}),
    "all eigenvectors": (images, batches_of_images(), {"samples": 4}),
    "empirical": (images, batches_of_images(LABELS), {"estimator": "empirical"}),
    "sigmoid": (images, batches_of_images(), {"likelihood": "sigmoid", "samples": 3}),
    "gaussian": (images, batches_of_images(), {"likelihood": "gaussian", "samples": 3}),
    "with errors": (images, batches_of_images(), {"estimator_error": True, "weights": torch.rand(56)}),
    "an allocation": (images, batches_of_images(), {"allocation": SPREAD, "estimator_error": True}),
    "tokens": (tokens, batches_of_tokens(), OF_TOKENS | {"samples": 3}),
    "tokens, empirical": (tokens, batches_of_tokens(), OF_TOKENS | {"estimator": "empirical"}),
    "sequences": (tokens, batches_of_tokens(), OF_TOKENS | {"estimator": "empirical", "level": "sequence"}),
    "tokens by parameter": (
        tokens,
        batches_of_tokens(),
        OF_TOKENS | {"granularity": "parameter", "estimator": "empirical"},
    ),
    "batch mean": (images, batches_of_images(), {"estimator": "batch_mean"}),
}
# With an allocation, the spectra of a batch decide on the host how many sketches each example gets.
ALLOWED_WAITS = {"an allocation": {"estimation/sketches.py": 1}}
