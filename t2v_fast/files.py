"""Write files so that a crash leaves the old content or the new, never a mixture."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Replace the file at ``path`` by ``data``; readers see the old file or the new one.

    The data goes to a temporary file in the same folder, is flushed to the disk, and is then renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_csv(path: str | os.PathLike, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of text as a CSV file, with :func:`write_atomically`.

    Cells are written as they are. A spreadsheet takes a cell that begins with ``=``, ``+``, ``-`` or ``@`` for a
    formula, so import files with names from others as text.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_at(file: int, data: bytes, position: int) -> None:
    """Write all of ``data`` to the descriptor ``file``, starting at byte ``position``."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def write_file_at(path: str | os.PathLike, data: bytes, position: int) -> None:
    """Write ``data`` to a file that exists, from byte ``position`` on, without waiting for the disk."""
    file = os.open(path, os.O_WRONLY)
    try:
        write_at(file, data, position)
    finally:
        os.close(file)


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's list of files to the disk, so that a new file survives a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def canonical_json(value: Any, *, compact: bool = False) -> str:
    """Return JSON with sorted keys, so that equal values have equal text.

    Raises ValueError for NaN and infinities. ``compact`` leaves out the spaces after commas and colons. Digests are
    taken of this text, so neither form may change.
    """
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":") if compact else None)
