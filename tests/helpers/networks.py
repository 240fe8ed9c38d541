"""Networks in float64 and their inputs, and networks written as one function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import randomise_norms
from torch import Tensor, nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_network(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding="same", groups=4, padding_mode="reflect"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, classes),
    )
    return randomise_norms(network).double()


def images(n: int = 5, size: tuple[int, int] = (11, 9), seed: int = 1) -> Tensor:
    return torch.randn(n, 3, *size, dtype=torch.float64, generator=generator(seed))


class Function(nn.Module):
    """A network written as one function of its parameters and the input."""

    def __init__(self, forward: Callable, **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Model(nn.Module):
    """The network that the documents call ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))
