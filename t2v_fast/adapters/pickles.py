"""Read embeddings that the public Task2Vec code pickled, without running anything in the files."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding import Embedding

# The names that a pickle of the public code's embedding needs. None of them has side effects.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("builtins", "object"),
    ("__builtin__", "object"),
    ("collections", "OrderedDict"),
}


class _State:
    """Takes the place of the public code's Embedding, with whatever state the pickle has."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "Embedding" and module.rpartition(".")[2] == "task2vec":
            return _State
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no embedding needs")
        return super().find_class(module, name)


def read_embedding(path: str | os.PathLike) -> Embedding:
    """Read the embedding in a pickle that the public code wrote.

    Nothing in the file is run: only arrays and plain values are taken.

    Args:
        path: The file. :func:`t2v_fast.bank.export.public_pickle` writes such files, too.

    Returns:
        The embedding. Its fingerprint says where it came from and how long it is, so it can be compared with others
        from the public code, but not with embeddings that this library made. ``num_examples`` is 1, because the file
        does not say how many there were.

    Raises:
        ValueError: For anything else than an embedding; the message names the file.
    """
    path = Path(path)
    try:
        state = vars(_Reader(io.BytesIO(path.read_bytes())).load())
        return from_public(state["hessian"], state["scale"], state.get("meta"), path.stem)
    except OSError:
        raise
    except Exception as error:  # a pickle can fail with anything
        raise ValueError(f"{path} is no embedding of the public Task2Vec code: {error}") from error


def from_public(hessian: Any, scale: Any, meta: Any, task: str | None) -> Embedding:
    """Convert the fields of the public code's embedding; ``task`` is its name unless ``meta`` has one."""
    hessian, scale = (np.asarray(v, dtype=np.float64) for v in (hessian, scale))
    meta = dict(_plain(meta or {}))
    meta.setdefault("task", meta.get("task_name") or task)
    fingerprint = {"source": "aws-cv-task2vec", "entries": len(hessian)}
    return Embedding(hessian, scale, (("all", 0, len(hessian)),), 1, None, meta, fingerprint)


def _plain(value: Any) -> Any:
    """Replace arrays and NumPy's numbers by lists and numbers, which JSON can hold."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def read_embeddings(folder: str | os.PathLike) -> Iterator[Embedding]:
    """Read every ``*.p`` and ``*.pkl`` in a folder with :func:`read_embedding`, in the order of their names.

    Raises:
        FileNotFoundError: If there is none.
    """
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".p", ".pkl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no file *.p or *.pkl")
    yield from map(read_embedding, files)
