"""Pictures: complete files, of the right content, in any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2v_fast.plot import contact_sheet, heatmap


def distances(t: int) -> np.ndarray:
    points = np.random.default_rng(0).random((t, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=2)


@pytest.mark.parametrize("t", [2, 3, 40])
def test_heatmap(t: int, tmp_path: Path) -> None:
    names = [f"a task with number {k}" for k in range(t)]
    heatmap(distances(t), names, tmp_path / "h.png", families=["x", "y"][: 1 + (t > 2)] * t if t == 2 else ["x"] * t)
    image = np.asarray(Image.open(tmp_path / "h.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    # Names are not cut off: the outermost pixels are white all around.
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all()


def test_bad_distances(tmp_path: Path) -> None:
    for bad in (np.zeros((2, 3)), np.full((2, 2), np.nan), np.array([[0.0, 1.0], [2.0, 0.0]])):
        with pytest.raises(ValueError, match="finite symmetric"):
            heatmap(bad, ["a", "b"], tmp_path / "h.png")
    assert not list(tmp_path.iterdir())


def test_contact_sheet(tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (25, 1))
    contact_sheet([[grey] * 3, [np.stack([grey] * 3, 2)] * 2], ["one", "two"], tmp_path / "c.png", captions=["", "x"])
    assert np.asarray(Image.open(tmp_path / "c.png").convert("L")).std() > 10
