"""The arrays of a bank: one file a field, in which row r of D float64 numbers starts at byte 8 D r."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding import Embedding
from ..files import sync_folder, write_at
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


def read_embedding(folder: Path, header: dict[str, Any], record: dict[str, Any]) -> Embedding:
    """Read the embedding that a ``done`` record names. Raises ValueError if it is damaged."""
    length = header["layers"][-1][2]
    arrays = {field: read_row(folder, field, record["row"], length, sum_) for field, sum_ in record["sums"].items()}
    if "scale" not in arrays:
        arrays["scale"] = np.full(length, record["scale"])
    return Embedding(
        **arrays,
        layers=header["layers"],
        num_examples=record["examples"],
        meta=record["meta"],
        fingerprint=header["fingerprint"],
    )


def write_rows(
    folder: Path, names: Sequence[str], embeddings: Sequence[Embedding], first: int, length: int
) -> list[dict[str, Any]]:
    """Write embeddings to the rows from ``first`` on, wait for the disk, and return their ``done`` records.

    A scale with one value for all entries goes into the record instead of a row.
    """
    records = []
    with contextlib.ExitStack() as stack:
        files: dict[str, int] = {}
        created = False
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
                            files[field], new = _open_rows(rows_path(folder, field))
                            stack.callback(os.close, files[field])
                            created |= new
                        data = np.ascontiguousarray(values, dtype="<f8").tobytes()
                        write_at(files[field], data, row * 8 * length)
                        sums[field] = digest(data)
                records.append({**record, "sums": sums, "meta": e.meta})
            for file in files.values():
                os.fsync(file)
            if created:
                sync_folder(folder)  # a power cut may take a new file whose folder was not flushed
        except OSError:
            for file in files.values():
                # Give the space back. If that fails, the next writer overwrites the rows.
                with contextlib.suppress(OSError):
                    os.ftruncate(file, min(os.fstat(file).st_size, first * 8 * length))
            raise
    return records


def _open_rows(path: Path) -> tuple[int, bool]:
    """Open a file of rows, and return its descriptor and whether the file is new."""
    try:
        return os.open(path, os.O_RDWR), False
    except FileNotFoundError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True


def unnamed_rows(folder: Path, field: str, rows: int, length: int) -> int:
    """Return how many whole rows of a field follow the first ``rows``, which are all that the manifest names."""
    with contextlib.suppress(FileNotFoundError):
        return max(0, rows_path(folder, field).stat().st_size // (8 * length) - rows)
    return 0


def set_rows_aside(folder: Path, rows: int, length: int) -> list[str]:
    """Move the rows that no line of the manifest names to ``unnamed-NUMBER-FIELD.f64``, and say what was moved."""
    report = []
    for field in FIELDS:
        count = unnamed_rows(folder, field, rows, length)
        if not count:
            continue
        path, start = rows_path(folder, field), rows * 8 * length
        aside = free_name(folder, f"unnamed-{{}}-{field}.f64")
        if rows == 0:
            os.rename(path, aside)
        else:
            scratch = aside.with_name(f".{aside.name}.tmp")
            with open(path, "rb") as source, open(scratch, "wb") as target:
                source.seek(start)
                shutil.copyfileobj(source, target, 1 << 24)
                target.flush()
                os.fsync(target.fileno())
            os.rename(scratch, aside)
            sync_folder(folder)
            os.truncate(path, start)
        report.append(f"{count} rows of {path.name} that no line of the manifest names were moved to {aside.name}")
    return report


def free_name(folder: Path, pattern: str) -> Path:
    """Return a path in the folder that does not exist: the pattern with the first free number from 1 on."""
    return next(path for n in itertools.count(1) if not (path := folder / pattern.format(n)).exists())
