"""The arrays of a bank: one file a field, in which row r of D float64 numbers starts at byte 8 D r."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding import Embedding
from ..files import write_at
from .manifest import FIELDS, BankError, digest


def rows_path(folder: Path, field: str) -> Path:
    """Return the file that holds the rows of a field."""
    return folder / f"{field}.f64"


def map_rows(folder: Path, field: str, rows: int, length: int) -> np.ndarray:
    """Map the first ``rows`` rows of a field, read-only [rows, length]."""
    path, expected = rows_path(folder, field), rows * 8 * length
    size = path.stat().st_size if path.exists() else 0
    if size < expected:
        raise BankError(f"{path} has {size} bytes, expected {expected}: it was cut off")
    return np.memmap(path, dtype="<f8", mode="r", shape=(rows, length))


def read_row(folder: Path, field: str, row: int, length: int, checksum: str) -> np.ndarray:
    """Read one row [length] of a field. Raises ValueError if the row does not fit its checksum."""
    try:
        with open(rows_path(folder, field), "rb") as file:
            file.seek(row * 8 * length)
            data = file.read(8 * length)
    except FileNotFoundError:
        data = b""
    if digest(data) != checksum:
        raise ValueError(f"{field} in row {row} does not fit its checksum")
    return np.frombuffer(data, dtype="<f8")


def write_rows(
    folder: Path, names: Sequence[str], embeddings: Sequence[Embedding], first: int, length: int
) -> list[dict[str, Any]]:
    """Write embeddings to the rows from ``first`` on, wait for the disk, and return their ``done`` records.

    A scale with one value for all entries goes into the record instead of a row.
    """
    records = []
    with contextlib.ExitStack() as stack:
        files: dict[str, int] = {}
        try:
            for row, (name, e) in enumerate(zip(names, embeddings, strict=True), first):
                record = {"task": name, "state": "done", "row": row, "examples": int(e.num_examples)}
                sums = {}
                for field in FIELDS:
                    values = getattr(e, field)
                    if field == "scale" and (values == values[0]).all():
                        record["scale"] = float(values[0])
                    elif values is not None:
                        if field not in files:
                            files[field] = os.open(rows_path(folder, field), os.O_RDWR | os.O_CREAT, 0o666)
                            stack.callback(os.close, files[field])
                        data = np.ascontiguousarray(values, dtype="<f8").tobytes()
                        write_at(files[field], data, row * 8 * length)
                        sums[field] = digest(data)
                records.append({**record, "sums": sums, "meta": e.meta})
            for file in files.values():
                os.fsync(file)
        except OSError:
            for file in files.values():
                # Give the space back. If that fails, the next writer overwrites the rows.
                with contextlib.suppress(OSError):
                    os.ftruncate(file, min(os.fstat(file).st_size, first * 8 * length))
            raise
    return records
