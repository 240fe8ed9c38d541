"""A small probe and small tasks for tests that need no pretrained network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from t2v_fast import Preprocessing, Probe

PREPROCESSING = Preprocessing(12, 12, "bilinear", (0.5,) * 3, (0.25,) * 3)


def small_probe(seed: int = 0, size: int | None = None) -> Probe:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    preprocessing = PREPROCESSING if size is None else PREPROCESSING.sized(size)
    return Probe(network, preprocessing=preprocessing, name="small")


def shapes(n: int = 24, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 14, 16, 3] noise with a bar whose place is the class, and labels [N]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (n, 14, 16, 3), dtype=np.uint8)
    labels = np.arange(n) % classes
    for image, label in zip(images, labels, strict=True):
        image[:, 5 * label : 5 * label + 4, label % 3] += 150
    return images, labels


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:03}.png")
    return root
