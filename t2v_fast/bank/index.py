"""Nearest tasks among very many: candidates from a small projection, then the metric itself."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..analysis.distance import TINY, cdist
from ..files import write_atomically

DIMENSIONS = 64  # of the projection
SAMPLE = 2000  # rows from which the projection is made
CHUNK = 1024  # rows that are read at once
CANDIDATES = 64  # rows whose distance is computed, at least


class Index:
    """A projection of Fisher vectors in which a plain Euclidean scan finds candidates for a metric of
    :mod:`t2v_fast.distance`.

    With ``"cosine"`` two tasks that are near are at a distance of about twice the variance of
    d = (h0 - h1) / (h0 + h1), which neither is Euclidean nor has an index of its own. To second order it is the squared
    Euclidean distance of the tasks' own d against a common reference (the median task, at each task's scale), which is
    what is projected on its leading principal axes. For ``"plain_cosine"`` those of the unit vectors are taken.

    The order among candidates is that of the metric; a neighbour is missed only if it is not among them. Arrays may be
    memory maps: they are read ``CHUNK`` rows at a time.
    """

    def __init__(self, vectors: np.ndarray, metric: str, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(vectors), min(len(vectors), SAMPLE), replace=False))
        sample = np.asarray(vectors[rows], dtype=np.float64)
        self.metric = metric
        self.reference = np.median(_positive_scale(sample), axis=0).astype(np.float32)
        features = torch.from_numpy(self._features(sample))
        self.center = features.mean(0).numpy()
        with torch.random.fork_rng(devices=[]):  # torch.pca_lowrank draws from the global generator
            torch.manual_seed(seed)
            axes = torch.pca_lowrank(features, q=min(DIMENSIONS, *features.shape), niter=4)[2]
        self.axes = axes.numpy()  # [D, P]
        self.points = np.empty((0, self.axes.shape[1]), np.float32)  # [T, P]
        self.extend(vectors)

    def __len__(self) -> int:
        return len(self.points)

    def extend(self, vectors: np.ndarray) -> None:
        """Take up the rows of ``vectors`` [T, D] that follow those that are known; the axes stay."""
        new = [
            self._project(np.asarray(vectors[start : start + CHUNK], dtype=np.float64))
            for start in range(len(self), len(vectors), CHUNK)
        ]
        self.points = np.concatenate([self.points, *new])
        self._squares = np.einsum("tp,tp->t", self.points, self.points)

    def query(
        self, vectors: np.ndarray, vector: np.ndarray, k: int, candidates: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and distances of the ``k`` tasks of ``vectors`` [T, D] nearest to ``vector`` [D], nearest first."""
        count = min(len(self), max(k, candidates or max(CANDIDATES, 4 * k)))
        if count < len(self):
            point = self._project(vector[None])[0]
            rows = np.sort(np.argpartition(self._squares - 2 * (self.points @ point), count)[:count])
        else:
            rows = np.arange(len(self))
        distances = cdist(vector[None], vectors[rows], self.metric)[0]
        order = np.argsort(distances, kind="stable")[:k]
        return rows[order], distances[order]

    def _project(self, rows: np.ndarray) -> np.ndarray:
        return (self._features(rows) - self.center) @ self.axes

    def _features(self, rows: np.ndarray) -> np.ndarray:
        """float32 [T, D], whose Euclidean distances order tasks about as the metric does."""
        rows = _positive_scale(rows)
        if self.metric == "plain_cosine":
            return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)).astype(np.float32)
        m = self.reference.astype(np.float64)
        d = (rows - m) / np.maximum(rows + m, TINY)
        return (d - d.mean(1, keepdims=True)).astype(np.float32)

    def save(self, path: str | os.PathLike, tasks: Sequence[str]) -> None:
        """Write to ``path``, with a digest of the tasks' names."""
        file = io.BytesIO()
        names = np.array([_names(tasks), self.metric])
        np.savez(file, names=names, reference=self.reference, center=self.center, axes=self.axes, points=self.points)
        write_atomically(path, file.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike, tasks: Sequence[str], metric: str, length: int) -> Index | None:
        """What :meth:`save` wrote for the first of these tasks; None if it is missing, damaged or of other tasks."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            index = cls.__new__(cls)
            digest, index.metric = arrays.pop("names").tolist()
            index.reference, index.center, index.axes, index.points = (
                arrays[name] for name in ("reference", "center", "axes", "points")
            )
            p = index.axes.shape[1]
            shapes = [index.reference.shape, index.center.shape, index.axes.shape, index.points.shape[1:]]
            known = len(index.points) <= len(tasks) and digest == _names(tasks[: len(index.points)])
            kinds = {a.dtype for a in (index.reference, index.center, index.axes, index.points)}
        except (OSError, ValueError, KeyError, IndexError, EOFError, AttributeError, zipfile.BadZipFile):
            return None
        if not known or index.metric != metric or kinds != {np.dtype(np.float32)}:
            return None
        if shapes != [(length,), (length,), (length, p), (p,)]:
            return None
        index._squares = np.einsum("tp,tp->t", index.points, index.points)
        return index


def scan(
    vectors: np.ndarray, vector: np.ndarray, k: int, metric: str = "cosine", chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """As :meth:`Index.query`, by the distance to every row: exact, and as slow as reading everything."""
    distances = np.concatenate(
        [cdist(vector[None], vectors[start : start + chunk], metric)[0] for start in range(0, len(vectors), chunk)]
    )
    order = np.argsort(distances, kind="stable")[:k]
    return order, distances[order]


def index_path(folder: Path, metric: str) -> Path:
    """Where a bank keeps the index of a metric."""
    return folder / f"index-{metric}.npz"


def _positive_scale(rows: np.ndarray) -> np.ndarray:
    """Each row over the mean of its entries; rows of zeros stay."""
    return rows / np.maximum(rows.mean(1, keepdims=True), TINY)


def _names(tasks: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(tasks).encode(), digest_size=16).hexdigest()
