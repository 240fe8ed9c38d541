"""Find the nearest of very many tasks: candidates from a small projection, then the metric itself."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..analysis.distance import cdist
from ..analysis.metrics import TINY
from ..files import write_atomically
from .manifest import digest

DIMENSIONS = 64  # of the projection
SAMPLE = 2000  # rows to which the projection is fitted, at most
CHUNK = 1024  # rows that are read at once
CANDIDATES = 64  # rows whose distance is computed, at least


class Index:
    """A projection of Fisher vectors in which a Euclidean scan finds candidates for a metric.

    The distance ``"cosine"`` of two nearby tasks is about twice the variance of d = (h0 - h1) / (h0 + h1). That
    distance is not Euclidean and has no index of its own. To second order it equals the squared Euclidean distance
    between the two tasks' own d against a common reference, the median task, with each task divided by its mean. The
    index projects these d on their leading principal axes. For ``"plain_cosine"`` it projects the unit vectors.

    The metric itself ranks the candidates, so the index misses a neighbour only if it is not a candidate.

    Args:
        vectors: The Fisher vectors [T, D]. A memory map is read ``CHUNK`` rows at a time.
        metric: A name in :data:`t2v_fast.analysis.distance.METRICS`.
        seed: Seed of the rows that are sampled and of the randomised principal axes.

    Example:
        >>> import numpy as np
        >>> vectors = np.random.default_rng(0).random((300, 20))
        >>> rows, distances = Index(vectors, "cosine").query(vectors, vectors[7], 3)
        >>> int(rows[0]), float(distances[0])
        (7, 0.0)
    """

    def __init__(self, vectors: np.ndarray, metric: str, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(vectors), min(len(vectors), SAMPLE), replace=False))
        sample = np.asarray(vectors[rows], dtype=np.float64)
        self.metric = metric
        self.reference = np.median(_divided_by_mean(sample), axis=0).astype(np.float32)
        import torch  # only here, because its import takes longer than most that one does with a bank

        features = torch.from_numpy(self._features(sample))
        self.center = features.mean(0).numpy()
        with torch.random.fork_rng(devices=[]):  # torch.pca_lowrank draws from the global generator
            torch.manual_seed(seed)
            axes = torch.pca_lowrank(features, q=min(DIMENSIONS, *features.shape), niter=4)[2]
        self.axes = axes.numpy()  # [D, P]
        self.points = np.empty((0, self.axes.shape[1]), np.float32)  # [T, P]
        self.extend(vectors)

    def __len__(self) -> int:
        """Return the number of tasks in the index."""
        return len(self.points)

    def extend(self, vectors: np.ndarray) -> None:
        """Add the rows of ``vectors`` [T, D] that follow those in the index. The axes stay."""
        new = [
            self._project(np.asarray(vectors[start : start + CHUNK], dtype=np.float64))
            for start in range(len(self), len(vectors), CHUNK)
        ]
        self.points = np.concatenate([self.points, *new])
        self._squares = np.einsum("tp,tp->t", self.points, self.points)

    def query(
        self, vectors: np.ndarray, vector: np.ndarray, k: int, candidates: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the ``k`` tasks nearest to one vector.

        Args:
            vectors: The vectors [T, D] that are in the index.
            vector: The vector [D] whose neighbours are wanted.
            k: How many neighbours to return.
            candidates: How many tasks to measure. By default 4 ``k``, at least 64.

        Returns:
            The rows of the neighbours in ``vectors`` and their distances, nearest first.
        """
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
        """Return float32 [T, D] whose Euclidean distances order tasks about as the metric does."""
        rows = _divided_by_mean(rows)
        if self.metric == "plain_cosine":
            return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)).astype(np.float32)
        m = self.reference.astype(np.float64)
        d = (rows - m) / np.maximum(rows + m, TINY)
        return (d - d.mean(1, keepdims=True)).astype(np.float32)

    def save(self, path: str | os.PathLike, tasks: Sequence[str]) -> None:
        """Write the index to ``path``, with a digest of ``tasks``, which names its rows."""
        file = io.BytesIO()
        names = np.array([_names_digest(tasks), self.metric])
        np.savez(file, names=names, reference=self.reference, center=self.center, axes=self.axes, points=self.points)
        write_atomically(path, file.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike, tasks: Sequence[str], metric: str, length: int) -> Index | None:
        """Read an index that :meth:`save` wrote.

        Args:
            path: The file.
            tasks: The names of all rows now. The index must be of the first of them.
            metric: The metric that the index must be for.
            length: The length D of the vectors.

        Returns:
            The index, or None if the file is missing or damaged, or belongs to other tasks or another metric.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            index = cls.__new__(cls)
            names, index.metric = arrays.pop("names").tolist()
            index.reference, index.center, index.axes, index.points = (
                arrays[name] for name in ("reference", "center", "axes", "points")
            )
            p = index.axes.shape[1]
            shapes = [index.reference.shape, index.center.shape, index.axes.shape, index.points.shape[1:]]
            known = len(index.points) <= len(tasks) and names == _names_digest(tasks[: len(index.points)])
            kinds = {a.dtype for a in (index.reference, index.center, index.axes, index.points)}
        except Exception:  # readers of zip archives and arrays raise many errors for damaged files
            return None
        if not known or index.metric != metric or kinds != {np.dtype(np.float32)}:
            return None
        if shapes != [(length,), (length,), (length, p), (p,)]:
            return None
        index._squares = np.einsum("tp,tp->t", index.points, index.points)
        return index


def stored_index(folder: Path, tasks: Sequence[str], vectors: np.ndarray, metric: str) -> Index:
    """Return the index that a bank keeps for a metric; it is made, or extended to all tasks, where that is needed.

    Args:
        folder: The folder of the bank.
        tasks: A name for each row of ``vectors``, which no other vector ever has.
        vectors: The Fisher vectors [T, D].
        metric: A name in :data:`t2v_fast.analysis.distance.METRICS`.
    """
    path = index_path(folder, metric)
    stored = Index.load(path, tasks, metric, vectors.shape[1])
    index = stored or Index(vectors, metric)
    if len(index) < len(tasks) or stored is None:
        # Axes that were fitted to less than a tenth of the tasks may miss how the other tasks differ.
        index = Index(vectors, metric) if len(tasks) > 10 * len(index) else index
        index.extend(vectors)
        with contextlib.suppress(OSError):  # a full disk or a read-only folder: the index is made again next time
            index.save(path, tasks)
    return index


def scan(
    vectors: np.ndarray, vector: np.ndarray, k: int, metric: str = "cosine", chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``k`` tasks nearest to one vector by measuring all of ``vectors``, ``chunk`` rows at a time.

    Arguments and results are those of :meth:`Index.query`.
    """
    distances = np.concatenate(
        [cdist(vector[None], vectors[start : start + chunk], metric)[0] for start in range(0, len(vectors), chunk)]
    )
    order = np.argsort(distances, kind="stable")[:k]
    return order, distances[order]


def index_path(folder: Path, metric: str) -> Path:
    """Return the file in which a bank keeps the index of a metric."""
    return folder / f"index-{metric}.npz"


def _divided_by_mean(rows: np.ndarray) -> np.ndarray:
    """Divide each row by the mean of its entries; rows of zeros stay."""
    return rows / np.maximum(rows.mean(1, keepdims=True), TINY)


def _names_digest(tasks: Sequence[str]) -> str:
    return digest("\n".join(tasks).encode())
