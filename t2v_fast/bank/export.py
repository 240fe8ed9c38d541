"""A bank in other forms: NumPy arrays, Parquet, the public code's pickles. Written a few tasks at a time."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..embedding import Embedding
from .store import FIELDS, Bank, BankError

CHUNK = 256  # tasks in memory at once


def export(bank: Bank, path: str | os.PathLike, form: str) -> int:
    """Write all finished tasks of ``bank`` to ``path``, which must not exist yet; returns how many there are.

    - ``"numpy"``: a folder of ``hessian.npy``, ``scale.npy`` and ``standard_error.npy`` (NaN where a task has none),
      float64 [T, D], and ``tasks.json`` with the names, numbers of examples, ``meta`` and fingerprint.
    - ``"parquet"``: a file with the same as columns, a row a task (needs pyarrow).
    - ``"pickle"``: a folder with one ``NAME.p`` a task, as Task2Vec's public code writes its ``Embedding``; characters
      of the name that no file should have are written %XX.

    Every embedding is checked on the way; an error leaves nothing at ``path``.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it, or choose another place")
    tasks = list(bank.tasks)
    if not tasks:
        raise BankError(f"bank {bank.folder} has no finished task to export")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        FORMS[form](bank, tasks, scratch / "new")
        os.rename(scratch / "new", path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(tasks)


def _numpy(bank: Bank, tasks: list[str], path: Path) -> None:
    path.mkdir()
    shape = (len(tasks), len(bank[tasks[0]]))
    arrays = {f: np.lib.format.open_memmap(path / f"{f}.npy", "w+", np.float64, shape) for f in FIELDS}
    records = []
    for row, task in enumerate(tasks):
        e = bank[task]
        for field, array in arrays.items():
            values = getattr(e, field)
            array[row] = np.nan if values is None else values
        records.append({"task": task, "num_examples": e.num_examples, "meta": e.meta})
    for array in arrays.values():
        array.flush()
    layers = [list(layer) for layer in bank.layers]
    (path / "tasks.json").write_text(
        json.dumps({"fingerprint": bank.fingerprint, "layers": layers, "tasks": records}, indent=1)
    )


def _parquet(bank: Bank, tasks: list[str], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet needs the package 'pyarrow': pip install pyarrow ({error})") from error
    vector = pyarrow.list_(pyarrow.float64())
    columns = [("task", pyarrow.string()), ("num_examples", pyarrow.int64()), ("meta", pyarrow.string())]
    header = {"fingerprint": json.dumps(bank.fingerprint), "layers": json.dumps(bank.layers)}
    schema = pyarrow.schema([*columns, *((field, vector) for field in FIELDS)], metadata=header)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(tasks), CHUNK):
            embeddings = [bank[task] for task in tasks[start : start + CHUNK]]
            rows = {
                "task": tasks[start : start + CHUNK],
                "num_examples": [e.num_examples for e in embeddings],
                "meta": [json.dumps(e.meta) for e in embeddings],
                **{field: [getattr(e, field) for e in embeddings] for field in FIELDS},
            }
            writer.write_table(pyarrow.table(rows, schema=schema))


def _pickle(bank: Bank, tasks: list[str], path: Path) -> None:
    path.mkdir()
    for task in tasks:
        name = quote(task, safe=" ()[]+,=@!")
        (path / f"{name.replace('.', '%2E') if name.startswith('.') else name}.p").write_bytes(
            public_pickle(bank[task])
        )


def public_pickle(embedding: Embedding) -> bytes:
    """What Task2Vec's public code gets from ``pickle.load``: its ``task2vec.Embedding`` with hessian, scale and meta.

    Its class is not at hand here and need not be: the pickle names it, and asks for an empty object with this state.
    """
    meta = {**embedding.meta, "task_name": embedding.meta.get("task")}
    state = pickle.dumps({"hessian": embedding.hessian, "scale": embedding.scale, "meta": meta}, protocol=2)
    body = state[2:-1]  # without the mark of the protocol and the stop
    return b"\x80\x02ctask2vec\nEmbedding\n)\x81" + body + b"b."


FORMS: dict[str, Callable[[Bank, list[str], Path], None]] = {"numpy": _numpy, "parquet": _parquet, "pickle": _pickle}
