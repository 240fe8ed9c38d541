"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write to a temporary name beside ``path``, flush to the disk, and rename: readers see the old file or the new."""
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
    """Write rows of text as CSV, as :func:`write_atomically` writes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue().encode())
