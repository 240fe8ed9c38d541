"""Export a bank as NumPy arrays, Parquet, or the public code's pickles, a few tasks at a time."""

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
from .manifest import FIELDS, BankError, digest
from .store import Bank

CHUNK = 256  # tasks in memory at once
LONGEST_FILE_NAME = 200  # characters; most file systems take 255


def export(bank: Bank, path: str | os.PathLike, form: str) -> int:
    """Write all finished tasks of a bank in another form.

    Every embedding is checked on the way. An error leaves nothing at ``path``.

    Args:
        bank: The bank to export.
        path: The file or folder to write, which must not exist yet.
        form: One of three forms.

            - ``"numpy"``: a folder with ``hessian.npy``, ``scale.npy`` and ``standard_error.npy``, float64 [T, D],
              where NaN stands for a standard error that a task does not have; and ``tasks.json`` with the
              fingerprint, layers, names, numbers of examples and ``meta``.
            - ``"parquet"``: a file with the same content, one row a task. Needs pyarrow.
            - ``"pickle"``: a folder with one file ``NAME.p`` a task, as Task2Vec's public code writes its
              ``Embedding``. Characters of the name that do not belong in a file name are written %XX. A longer name
              than 200 characters is cut, and a digest of it follows.

    Returns:
        The number of tasks.

    Raises:
        ValueError: For an unknown form.
        FileExistsError: If there is something at ``path``.
        BankError: If the bank has no finished task, or a damaged one.
        ImportError: For ``"parquet"`` without pyarrow.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from t2v_fast import Bank, Embedding
        >>> cats = Embedding(np.ones(2), np.ones(2), [("conv.weight", 0, 2)], 10, meta={"task": "cats"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = Bank(Path(folder) / "bank")
        ...     bank.add(cats)
        ...     export(bank, Path(folder) / "arrays", "numpy")
        ...     sorted(file.name for file in (Path(folder) / "arrays").iterdir())
        1
        ['hessian.npy', 'scale.npy', 'standard_error.npy', 'tasks.json']
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
        name = name.replace(".", "%2E") if name.startswith(".") else name
        if len(name) > LONGEST_FILE_NAME:
            name = f"{name[:LONGEST_FILE_NAME]}-{digest(task.encode())}"
        (path / f"{name}.p").write_bytes(public_pickle(bank[task]))


def public_pickle(embedding: Embedding) -> bytes:
    """Return a pickle that Task2Vec's public code loads as its ``task2vec.Embedding``.

    The class need not be importable here: the pickle only names it, and asks for an empty object with this state.

    Args:
        embedding: The embedding, whose ``hessian``, ``scale`` and ``meta`` are written. ``meta["task_name"]`` is the
            name of the task.
    """
    meta = {**embedding.meta, "task_name": embedding.meta.get("task")}
    state = pickle.dumps({"hessian": embedding.hessian, "scale": embedding.scale, "meta": meta}, protocol=2)
    body = state[2:-1]  # without the protocol's header and the stop
    return b"\x80\x02ctask2vec\nEmbedding\n)\x81" + body + b"b."


FORMS: dict[str, Callable[[Bank, list[str], Path], None]] = {"numpy": _numpy, "parquet": _parquet, "pickle": _pickle}
