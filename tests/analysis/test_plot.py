"""Pictures are complete files with the right content, in any size."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from embeddings import make
from PIL import Image

from t2v_fast.analysis.plot import contact_sheet, coordinates, dendrogram, heatmap, layer_means, layer_profile, task_map


def distances(t: int) -> np.ndarray:
    points = np.random.default_rng(0).random((t, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=2)


@pytest.mark.slow_unless(t=(2, 3))
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


def test_coordinates_keep_distances_of_a_plane() -> None:
    points = np.random.default_rng(0).standard_normal((12, 2))
    true = np.linalg.norm(points[:, None] - points[None], axis=2)
    places = coordinates(true)
    np.testing.assert_allclose(np.linalg.norm(places[:, None] - places[None], axis=2), true, rtol=1e-9, atol=1e-12)
    assert coordinates(true[:2, :2]).shape == (2, 2)
    assert coordinates(np.zeros((3, 3))).tolist() == [[0, 0]] * 3


@pytest.mark.slow_unless(kind=("svg",))
@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("t", [2, 30])
def test_pictures_by_extension(kind: str, t: int, tmp_path: Path) -> None:
    names, families = [f"task & {k}" for k in range(t)], [f"family {k % 9}" for k in range(t)]
    embeddings = [make(str(k), k) for k in range(t)]
    files = [tmp_path / f"{name}.{kind}" for name in ("heatmap", "tree", "map", "layers")]
    for draw, file in zip((heatmap, dendrogram, task_map), files, strict=False):
        draw(distances(t), names, file, families=families)
    layer_profile(embeddings, names, files[3])
    for file in files:
        if kind == "png":
            assert len(np.unique(np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3), axis=0)) > 20
            continue
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert f"task &amp; {t - 1}" in file.read_text()  # comments name what is drawn as paths
        first = file.read_bytes()
    if kind == "svg":
        layer_profile(embeddings, names, files[3])
        assert files[3].read_bytes().count(b"<path") == first.count(b"<path")


def test_layer_means() -> None:
    embeddings = [make(str(k), k) for k in range(2)]
    means = layer_means(embeddings)
    for k, embedding in enumerate(embeddings):
        np.testing.assert_allclose(means[k], [embedding.layer(name).mean() for name in embedding.layer_names])


def test_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="png or svg"):
        task_map(distances(3), ["a", "b", "c"], tmp_path / "m.jpeg")
    assert not list(tmp_path.iterdir())
