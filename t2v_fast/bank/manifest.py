"""The text files of a bank: ``bank.json``, the header, and ``manifest.jsonl``, one record a line.

A record has one of three states. ``done`` names the row of a finished task and the checksums of its arrays, ``failed``
holds an error, and ``open`` withdraws whatever an earlier record of the task said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding import Embedding
from ..files import canonical_json, sync_folder, write_at, write_atomically

FORMAT = "t2v-fast bank"
VERSION = 1
FIELDS = ("hessian", "scale", "standard_error")
LONGEST_NAME = 1000  # characters of a task's name


class BankError(ValueError):
    """A bank is damaged or was used wrongly. The message names the file, and the task if there is one."""


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


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the fingerprint and layers that all embeddings share, or None if the bank has no header yet."""
    path = folder / "bank.json"
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is damaged: {printable(error)}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise BankError(f"{path} does not belong to a bank of t2v-fast")
    if header.get("version") != VERSION:
        raise BankError(f"{path} has version {header.get('version')!r}, this t2v-fast reads {VERSION}: upgrade it")
    try:
        if header.get("sum") != _header_digest(header):
            raise ValueError("its checksum does not fit")
        # The checks of an embedding are the checks of a header.
        ones = np.ones(header["layers"][-1][2])
        Embedding(ones, ones, header["layers"], 1, fingerprint=header["fingerprint"])
    except (LookupError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BankError(f"{path} is damaged: {printable(error)}") from None
    return header


def write_header(folder: Path, first: Embedding) -> None:
    """Write the header of a bank whose first embedding is ``first``."""
    header: dict[str, Any] = {"fingerprint": first.fingerprint, "layers": [list(layer) for layer in first.layers]}
    header["sum"] = _header_digest(header)
    header |= {"format": FORMAT, "version": VERSION}
    write_atomically(folder / "bank.json", json.dumps(header, sort_keys=True, indent=1).encode())


def _header_digest(header: dict[str, Any]) -> str:
    return digest(canonical_json([header["fingerprint"], header["layers"]], compact=True).encode())


# Records


@dataclass(frozen=True)
class Done:
    """Where a finished task is: its row, and the place of its line in the manifest."""

    row: int
    start: int
    length: int


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
    if record["state"] == "done":
        sums, scale = record["sums"], record.get("scale")
        if "hessian" not in sums or not set(sums) <= set(FIELDS) or not all(isinstance(s, str) for s in sums.values()):
            raise ValueError(f"its checksums are of {sorted(sums)}, expected some of {', '.join(FIELDS)}")
        if ("scale" in sums) == isinstance(scale, (int, float)) or (scale is not None and not math.isfinite(scale)):
            raise ValueError(f"its 'scale' is {scale!r}, expected a number or a checksum")
        if record["row"] < 0 or record["examples"] < 1:
            raise ValueError(f"its row is {record['row']} with {record['examples']} examples")
    return record


def append_records(manifest: Path, records: Sequence[dict[str, Any]], end: int) -> None:
    """Write the lines of ``records`` from byte ``end`` on, all or none, and wait for the disk."""
    data = b"".join(map(encode_record, records))
    new = not manifest.exists()
    file = os.open(manifest, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(file, end)  # a writer that died may have left half a line
        try:
            write_at(file, data, end)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
    if new:
        sync_folder(manifest.parent)


def drop_damaged_lines(manifest: bytes) -> tuple[bytes, list[str]]:
    """Return the manifest without its damaged lines, and a sentence for each of them.

    A damaged line may have withdrawn a finished task. So a second ``done`` record of a task gets an ``open`` record
    before it.
    """
    report: list[str] = []
    kept: list[bytes] = []
    states: dict[str, str] = {}
    for number, line in enumerate(manifest.splitlines(keepends=True), 1):
        try:
            record = parse_record(line)
        except ValueError as error:
            report.append(f"line {number} of the manifest: {error}")
            continue
        if record["state"] == "done" and states.get(record["task"]) == "done":
            kept.append(encode_record({"task": record["task"], "state": "open"}))
        kept.append(line)
        states[record["task"]] = record["state"]
    return b"".join(kept), report
