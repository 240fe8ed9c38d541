"""The text files of a bank: ``bank.json``, the header, and ``manifest.jsonl``, one record a line.

A record has one of three states. ``done`` names the row of a finished task and the checksums of its arrays, ``failed``
holds an error, and ``open`` withdraws what an earlier record of the task said. It names the row that it withdraws, or
null for a failure. (Lines of older versions name none, and withdraw whatever the task has.)

Each of the two files has a copy. A record goes to the copy of the manifest once the manifest is on the disk, so the
copy is never ahead. A copy that has more lines than the manifest proves that the manifest lost lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..embedding import LONGEST_NAME, Embedding
from ..files import canonical_json, write_at, write_atomically, write_file_at

FORMAT = "t2v-fast bank"
VERSION = 1
FIELDS = ("hessian", "scale", "standard_error")
HEADER, HEADER_COPY = "bank.json", "bank.copy.json"
MANIFEST, MANIFEST_COPY = "manifest.jsonl", "manifest.copy.jsonl"
ADVICE = "`t2v-fast bank repair` restores what the other files still say"


class BankError(ValueError):
    """A bank is damaged or was used wrongly. The message names the file, and the task if there is one."""


class NotInBank(BankError, KeyError):
    """A bank does not have a finished task of this name. It may have failed, or was taken out in the meantime."""

    __str__ = Exception.__str__  # that of KeyError puts the message into quotes


def check_name(task: Any) -> None:
    """Raise BankError unless ``task`` can be the name of a task."""
    if not isinstance(task, str) or not task or len(task) > LONGEST_NAME or not task.isprintable():
        raise BankError(
            f"a task's name is {str(task)[:80]!r}, expected 1 to {LONGEST_NAME} printable characters; "
            'an embedding has it in meta["task"]'
        )


def printable(error: Any) -> str:
    """Return the text of an error without lone surrogates, at most 10,000 characters."""
    return str(error).encode("utf-8", "backslashreplace").decode()[:10_000]


def digest(data: bytes) -> str:
    """Return the checksum that a bank stores: BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# The header


class NewerBank(BankError):
    """The bank was written by a newer version, so it is not damaged."""


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the fingerprint and layers that all embeddings share, or None if the bank has no header yet."""
    header = parse_header(folder / HEADER)
    # The copy is written after the original, which may have been written after the first look.
    if header is None and (folder / HEADER_COPY).exists() and (header := parse_header(folder / HEADER)) is None:
        raise BankError(f"{folder / HEADER} is missing, but its copy is there; {ADVICE}")
    return header


def parse_header(path: Path) -> dict[str, Any] | None:
    """Return the header in a file, or None if there is no such file. Raises BankError for a damaged one."""
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is damaged: {printable(error)}; {ADVICE}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise BankError(f"{path} does not belong to a bank of t2v-fast; {ADVICE}")
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerBank(f"{path} has version {version!r}, this t2v-fast reads {VERSION}: upgrade it")
    try:
        if version != VERSION or isinstance(version, bool):
            raise ValueError(f"its version is {version!r}")
        if header.get("sum") != _header_digest(header):
            raise ValueError("its checksum does not fit")
        # The checks of an embedding are the checks of a header.
        ones = np.ones(header["layers"][-1][2])
        Embedding(ones, ones, header["layers"], 1, fingerprint=header["fingerprint"])
    except (LookupError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BankError(f"{path} is damaged: {printable(error)}; {ADVICE}") from None
    return header


def write_header(folder: Path, first: Embedding) -> None:
    """Write the header of a bank whose first embedding is ``first``."""
    header: dict[str, Any] = {"fingerprint": first.fingerprint, "layers": [list(layer) for layer in first.layers]}
    header["sum"] = _header_digest(header)
    header |= {"format": FORMAT, "version": VERSION}
    write_atomically(folder / HEADER, encode_header(header))


def encode_header(header: dict[str, Any]) -> bytes:
    """Return the text of ``bank.json``."""
    return json.dumps(header, sort_keys=True, indent=1).encode()


def _header_digest(header: dict[str, Any]) -> str:
    return digest(canonical_json([header["fingerprint"], header["layers"]], compact=True).encode())


# Records


def encode_record(record: dict[str, Any]) -> bytes:
    """Return the line of a record: its checksum, a space, JSON, and a line feed."""
    data = canonical_json(record, compact=True).encode()
    return digest(data).encode() + b" " + data + b"\n"


_KEYS: dict[str, dict[str, type]] = {
    "done": {"task": str, "state": str, "row": int, "examples": int, "sums": dict, "meta": dict},
    "failed": {"task": str, "state": str, "error": str},
    "open": {"task": str, "state": str},
}


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record of a line. Raises ValueError for a line that :func:`encode_record` cannot have written."""
    stored, _, data = line.rstrip(b"\n").partition(b" ")
    if stored != digest(data).encode():
        raise ValueError("its checksum does not fit")
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("state"), str) or record["state"] not in _KEYS:
        raise ValueError("it is not a record of a bank")
    for key, kind in _KEYS[record["state"]].items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise ValueError(f"its {key!r} is {str(record.get(key))[:80]!r}, expected {kind.__name__}")
    check_name(record["task"])
    if record["state"] == "open" and not isinstance(record.get("row"), (int, NoneType)):
        raise ValueError(f"its row is {str(record['row'])[:80]!r}, expected a number or null")
    if record["state"] == "done":
        sums, scale = record["sums"], record.get("scale")
        if "hessian" not in sums or not set(sums) <= set(FIELDS) or not all(isinstance(s, str) for s in sums.values()):
            raise ValueError(f"its checksums are of {sorted(sums)}, expected some of {', '.join(FIELDS)}")
        if ("scale" in sums) == isinstance(scale, (int, float)) or (scale is not None and not math.isfinite(scale)):
            raise ValueError(f"its 'scale' is {scale!r}, expected a number or a checksum")
        if record["row"] < 0 or record["examples"] < 1:
            raise ValueError(f"its row is {record['row']} with {record['examples']} examples")
    return record


@dataclass(frozen=True)
class Done:
    """Where a finished task is: its row, and the place of its line in the manifest."""

    row: int
    start: int
    length: int


class Ledger:
    """What the records of a manifest say, taken up one after another."""

    def __init__(self) -> None:
        self.done: dict[str, Done] = {}
        self.failed: dict[str, str] = {}
        self.rows = 0  # rows that records name or named; the next embedding goes to this row

    def apply(self, record: dict[str, Any], start: int = 0, length: int = 0) -> None:
        """Take up a record of the manifest. Raises ValueError if it contradicts earlier ones."""
        task, state = record["task"], record["state"]
        if state == "open":
            self.failed.pop(task, None)
            if (done := self.done.get(task)) is not None and record.get("row", done.row) == done.row:
                del self.done[task]
            return
        if task in self.done:
            raise ValueError(f"task {task!r} was finished before")
        if state == "failed":
            self.failed[task] = record["error"]
            return
        if record["row"] < self.rows:
            raise ValueError(f"row {record['row']} is another task's")
        self.failed.pop(task, None)
        self.done[task] = Done(record["row"], start, length)
        self.rows = record["row"] + 1


def append_lines(folder: Path, lines: bytes, end: int) -> None:
    """Write lines from byte ``end`` of the manifest on, all or none, wait for the disk, and add them to the copy.

    The copy must be complete up to ``end``. This function does not wait for it: if the copy cannot be written, or is
    lost in a power cut, the next writer completes it from the manifest.
    """
    file = os.open(folder / MANIFEST, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(file).st_size != end:
            os.ftruncate(file, end)  # a writer that died may have left half a line
        try:
            write_at(file, lines, end)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
    with contextlib.suppress(OSError):
        write_file_at(folder / MANIFEST_COPY, lines, end)


def copy_size(folder: Path) -> int | None:
    """Return the size of the manifest's copy, or None if there is no copy."""
    try:
        return os.stat(folder / MANIFEST_COPY).st_size
    except FileNotFoundError:
        return None


def lines_lost(manifest: bytes, copy: bytes) -> int:
    """Return how many whole lines the copy has that the manifest lacks."""
    if manifest.startswith(copy):
        return 0
    lost = Counter(copy.splitlines()) - Counter(manifest.splitlines())  # the lines of repeated failures are equal
    return sum(count for line, count in lost.items() if is_record(line))


def is_residue(rest: bytes, start: int, copied: int | None) -> bool:
    """Return whether a writer that died left the end of a manifest, of which the first line is damaged.

    The copy has every line that was added. After a power cut it may lack the last ones, but these are whole.

    Args:
        rest: The end of the manifest.
        start: The byte at which it starts.
        copied: The size of the copy, or None if there is no copy.
    """
    if copied is None or copied > start:
        return False
    return copied == start or not any(map(is_record, rest.splitlines()))


def is_record(line: bytes) -> bool:
    """Return whether a line is whole."""
    try:
        parse_record(line)
    except ValueError:
        return False
    return True
