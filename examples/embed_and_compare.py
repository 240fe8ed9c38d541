"""Embed four tasks and compare them.

    python examples/embed_and_compare.py

A task is a set of labelled images. Task2Vec turns each task into a vector, and related tasks into nearby vectors. Three
of the tasks are about handwritten digits (scikit-learn's), one is about drawn stripes.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import t2v_fast

IMAGES = 60  # of each task


def stripes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes, labelled by their direction: images uint8 [N, 32, 32], labels [N]."""
    labels = np.arange(IMAGES) % 2
    images = rng.integers(0, 60, (IMAGES, 32, 32), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        place = (slice(None), slice(rng.integers(4), None, 4)) if label else (slice(rng.integers(4), None, 4),)
        image[place] += 150
    return images, labels


def main() -> None:
    digits = load_digits()
    pixels = (digits.images * 15).astype(np.uint8)  # [1797, 8, 8], from 0 to 240
    low, high = np.flatnonzero(digits.target < 5)[:IMAGES], np.flatnonzero(digits.target >= 5)[:IMAGES]
    tasks = {
        "digits 0 to 4": (pixels[low], digits.target[low]),
        "digits 5 to 9": (pixels[high], digits.target[high]),
        "odd or even": (pixels[-IMAGES:], digits.target[-IMAGES:] % 2),
        "stripes": stripes(np.random.default_rng(0)),
    }

    # The probe is a pretrained network that comes with a package: nothing is downloaded. Small images are faster.
    probe = t2v_fast.load_probe("efficientnet-lite0", size=32)
    task2vec = t2v_fast.Task2Vec(probe)
    embeddings = [task2vec.embed(data, name=name) for name, data in tasks.items()]

    # An embedding and its file say how it was made. Comparing with one that was made in another way raises an error.
    with tempfile.TemporaryDirectory() as folder:
        embeddings[0].save(Path(folder) / "digits.safetensors")
        embeddings[0] = t2v_fast.Embedding.load(Path(folder) / "digits.safetensors")

    distances = t2v_fast.distance.pdist(embeddings, metric="cosine")  # [T, T]
    names = list(tasks)
    print(" " * 14, *(f"{name:>14}" for name in names))
    for name, row in zip(names, distances, strict=True):
        print(f"{name:14}", *(f"{d:14.3f}" for d in row))
    for name, nearest in zip(names, t2v_fast.distance.nearest_tasks(distances), strict=True):
        print(f"nearest to {name}: {names[nearest]}")


if __name__ == "__main__":
    main()
