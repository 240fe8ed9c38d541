"""The small feature extractors of bench/studies/selection.py: two architectures in three sizes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast.demo import DemoTask

SIDE = 32  # pixels of an expert's input
WIDTHS = {"0.5x": 6, "1x": 12, "2x": 24}  # filters of the first layer
ARCHITECTURES = ("plain", "residual")


@dataclass(frozen=True)
class Kind:
    """An architecture and its size."""

    architecture: str
    size: str


KINDS = tuple(Kind(architecture, size) for size in WIDTHS for architecture in ARCHITECTURES)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(inputs, outputs), nn.ReLU(), *_convolution(outputs, outputs))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class Expert(nn.Module):
    """A small feature extractor, images [N, 3, 32, 32] -> features [N, 4 widths]; and the head of its own task."""

    def __init__(self, kind: Kind, classes: int) -> None:
        super().__init__()
        width = WIDTHS[kind.size]
        layers: list[nn.Module] = [*_convolution(3, width), nn.ReLU(), nn.MaxPool2d(2)]
        for inputs, outputs in ((width, 2 * width), (2 * width, 4 * width)):
            if kind.architecture == "residual":
                layers.append(_Residual(inputs, outputs))
            else:
                layers += [*_convolution(inputs, outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def prepare(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, 3] as an expert's input [N, 3, SIDE, SIDE], about standardised."""
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return F.interpolate(pixels, (SIDE, SIDE), mode="area").contiguous(memory_format=torch.channels_last)


def train_expert(task: DemoTask, kind: Kind, epochs: int, seed: int = 0) -> Expert:
    """An expert fitted to one task from a random start, in evaluation mode."""
    torch.manual_seed(seed + zlib.crc32(task.name.encode()))
    x, y = prepare(task.images), torch.from_numpy(task.labels)
    expert = Expert(kind, len(task.classes)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(expert.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(expert(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return expert.eval()


def outputs(expert: Expert, images: Tensor) -> tuple[Tensor, Tensor]:
    """An expert's features [N, D] of prepared images, and its probabilities of its own classes [N, Z]."""
    with torch.no_grad():
        features = torch.cat([expert.body(part) for part in images.split(32)])
        return features, expert.head(features).softmax(1)
