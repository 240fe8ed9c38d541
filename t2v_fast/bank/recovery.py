"""Find and mend what was lost or damaged in a bank's folder, and keep the copies of its text files complete.

The functions here work on the files, because a damaged bank cannot be opened. A mended file is replaced as a whole, and
its damaged content is kept beside it under a name that begins with ``damaged``.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..analysis.distance import METRICS
from ..files import sync_folder, write_atomically, write_file_at
from .index import index_path
from .locks import LOCKS, WRITER, Locks
from .manifest import (
    ADVICE,
    FIELDS,
    HEADER,
    HEADER_COPY,
    MANIFEST,
    MANIFEST_COPY,
    BankError,
    Ledger,
    NewerBank,
    encode_header,
    encode_record,
    is_record,
    is_residue,
    lines_lost,
    parse_header,
    parse_record,
)
from .rows import free_name, read_embedding, rows_path, set_rows_aside, unnamed_rows


def is_bank(folder: Path) -> bool:
    """Return whether the folder has any file that only a bank has."""
    return any((folder / name).exists() for name in (MANIFEST, MANIFEST_COPY, HEADER, HEADER_COPY)) or _has_rows(folder)


def check_is_bank(folder: Path) -> None:
    """Raise BankError for a folder that has no file of a bank, or only what a job leaves before its first task."""
    if is_bank(folder):
        return
    if (folder / LOCKS).is_file():
        raise BankError(
            f"{folder} has no task yet: the job that made it has stored none so far. If it was interrupted, run the "
            "same command again"
        )
    raise BankError(f"{folder} is no bank: it has no manifest.jsonl")


def check_not_lost(folder: Path) -> None:
    """Raise BankError if the manifest is missing although the folder holds what a manifest names."""
    copy = _read(folder / MANIFEST_COPY)
    # The manifest is the first file of a bank, so it may have been made after the first look, but before the others.
    if (copy or _has_rows(folder)) and not (folder / MANIFEST).exists():
        found = "its copy is" if copy else "rows of embeddings are"
        raise BankError(f"{folder / MANIFEST} is missing, but {found} there; {ADVICE}")


def check_complete(folder: Path) -> None:
    """Raise BankError if the copy of the manifest has lines that the manifest lacks."""
    copy = _read(folder / MANIFEST_COPY) or b""  # first, because the manifest is ahead
    _check_no_line_lost(folder, _read(folder / MANIFEST) or b"", copy)


def _check_no_line_lost(folder: Path, manifest: bytes, copy: bytes) -> None:
    if lost := lines_lost(manifest, copy):
        raise BankError(f"{folder / MANIFEST} lacks lines that its copy has ({lost}); {ADVICE}")


def prepare(folder: Path, end: int, rows: int, header: dict[str, Any] | None) -> None:
    """Make ready for a writer who holds the lock: complete the copies, and put nothing at risk.

    A bank of an older version gets its copies here. Since nothing shows whether its manifest lost lines, rows that no
    line names are moved aside first. In a bank with copies, such rows belong to a writer that died.

    Args:
        folder: The folder of the bank.
        end: The end of the manifest's last whole line.
        rows: The number of rows that the manifest names.
        header: The header, if there is one yet.

    Raises:
        BankError: If the copy of the manifest has lines that the manifest lacks.
    """
    created = not (folder / MANIFEST).exists()
    if created:
        (folder / MANIFEST).touch()
    manifest, copy = (_read(folder / MANIFEST) or b"")[:end], _read(folder / MANIFEST_COPY)
    if copy is None:
        if header is not None:
            set_rows_aside(folder, rows, header["layers"][-1][2])
        write_atomically(folder / MANIFEST_COPY, manifest)
    elif manifest.startswith(copy):
        write_file_at(folder / MANIFEST_COPY, manifest[len(copy) :], len(copy))
    else:
        _check_no_line_lost(folder, manifest, copy)
        write_atomically(folder / MANIFEST_COPY, manifest)
    if header is not None:
        try:
            whole = parse_header(folder / HEADER_COPY) is not None
        except BankError:
            whole = False
        if not whole:
            write_atomically(folder / HEADER_COPY, encode_header(header))
    if created or copy is None:
        sync_folder(folder)
    if created:
        with contextlib.suppress(OSError):  # a folder that may not be listed
            sync_folder(folder.absolute().parent)


# Looking


@dataclass
class _Findings:
    """What the text files of a bank say, and what is wrong with each file."""

    header: dict[str, Any] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    manifest: bytes = b""  # the whole lines of both manifests, which contradict each other nowhere
    ledger: Ledger = field(default_factory=Ledger)  # of those lines
    has_copies: bool = False
    lines: list[str] = field(default_factory=list)  # what is wrong with lines of the manifest
    files: dict[str, str] = field(default_factory=dict)  # what is wrong with other files, by their name


def verify(folder: Path) -> dict[str, str]:
    """Compare everything in a bank's folder with its checksums, also where the bank cannot be opened.

    Returns:
        What is wrong, by the name of the task or file.
    """
    with _writer(folder):
        found = _look(folder)
    problems = dict(found.files)
    if found.lines:
        problems[MANIFEST] = f"{folder / MANIFEST}: {'; '.join(found.lines)}; {ADVICE}"
    for task, record in _done(found).items():
        if error := _damage(folder, found.header, record):
            problems[task] = f"bank {folder}: task {task!r} is damaged: {error}; `t2v-fast bank repair` takes it out"
    return problems


def _damage(folder: Path, header: dict[str, Any] | None, record: dict[str, Any]) -> str | None:
    """Return what is wrong with the embedding that a record names, if anything."""
    if header is None:
        return None  # the report on the header says so once
    try:
        read_embedding(folder, header, record)
    except (KeyError, TypeError, ValueError) as error:
        return str(error)
    return None


def _done(found: _Findings) -> dict[str, dict[str, Any]]:
    """The records of the finished tasks, by name."""
    rows = {done.row for done in found.ledger.done.values()}
    return {r["task"]: r for r in found.records if r["state"] == "done" and r["row"] in rows}


def _look(folder: Path) -> _Findings:
    """Read the text files and merge what they say."""
    found = _Findings()
    headers: dict[str, dict[str, Any] | None] = {}
    newer: NewerBank | None = None
    for name in (HEADER, HEADER_COPY):
        try:
            headers[name] = parse_header(folder / name)
        except BankError as error:
            headers[name] = None
            found.files[name] = str(error)
            newer = error if isinstance(error, NewerBank) else newer
    found.header = headers[HEADER] or headers[HEADER_COPY]
    if newer and found.header is None:  # otherwise the number of the version is damaged
        raise newer
    copy, original = _read(folder / MANIFEST_COPY), _read(folder / MANIFEST)
    found.has_copies = copy is not None or (folder / HEADER_COPY).exists()
    _merge(found, original or b"", copy)
    if headers[HEADER] is None and HEADER not in found.files and (found.header or _done(found)):
        found.files[HEADER] = f"{folder / HEADER} is missing; {ADVICE}"
    if headers[HEADER] and headers[HEADER_COPY] and headers[HEADER] != headers[HEADER_COPY]:
        found.files[HEADER_COPY] = f"{folder / HEADER_COPY} differs from {HEADER}; {ADVICE}"
    if found.has_copies:
        if headers[HEADER_COPY] is None and HEADER_COPY not in found.files and found.header:
            found.files[HEADER_COPY] = f"{folder / HEADER_COPY} is missing; {ADVICE}"
        if copy is None or (copy != found.manifest and found.manifest.startswith(copy)):
            behind = "is missing" if copy is None else "is not complete"
            found.files[MANIFEST_COPY] = f"{folder / MANIFEST_COPY} {behind}; the next writer completes it"
        elif copy != found.manifest:
            found.files[MANIFEST_COPY] = f"{folder / MANIFEST_COPY} is damaged; {ADVICE}"
    if original is None and (copy or _has_rows(folder)):
        found.lines.insert(0, "the file is missing")
    if not found.has_copies and found.header is not None:
        length = found.header["layers"][-1][2]
        for name in FIELDS:
            if count := unnamed_rows(folder, name, found.ledger.rows, length):
                path = rows_path(folder, name)
                found.files[path.name] = f"{path} has {count} rows that no line of the manifest names; {ADVICE}"
    return found


def _merge(found: _Findings, original: bytes, copy: bytes | None) -> None:
    """Take up all whole lines of the manifest and its copy in their order."""
    end = 0  # of the whole lines at the beginning
    for line in original.splitlines(keepends=True):
        if not line.endswith(b"\n") or not is_record(line):
            break
        end += len(line)
    if is_residue(original[end:], end, None if copy is None else len(copy)):
        original = original[:end]
    first, problems = _whole_lines(original)
    second, _ = _whole_lines(copy or b"")
    merged = _supersequence(first, second)
    if lost := Counter(merged) - Counter(first):
        problems.append(f"lines that are only in {MANIFEST_COPY}: {lost.total()}")
    ledger, kept = found.ledger, []
    for line in merged:
        record = parse_record(line)
        if record["state"] == "done" and record["task"] in ledger.done and record["row"] >= ledger.rows:
            # A damaged line withdrew the task.
            again = {"task": record["task"], "state": "open", "row": ledger.done[record["task"]].row}
            ledger.apply(again)
            kept.append(encode_record(again))
            found.records.append(again)
        try:
            ledger.apply(record)
        except ValueError as error:
            problems.append(f"the line of task {record['task']!r} contradicts earlier ones: {error}")
            continue
        kept.append(line)
        found.records.append(record)
    found.manifest, found.lines = b"".join(kept), problems


def _whole_lines(text: bytes) -> tuple[list[bytes], list[str]]:
    """Return the whole lines, each with its line feed, and a sentence for each other line."""
    whole, problems = [], []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            parse_record(line)
        except ValueError as error:
            problems.append(f"line {number} of the manifest: {error}")
        else:
            whole.append(line.rstrip(b"\n") + b"\n")
    return whole, problems


def _supersequence(first: list[bytes], second: list[bytes]) -> list[bytes]:
    """Return all lines of two lists in an order that fits both.

    If neither list has all lines, the rows give the order: a line is behind those of earlier rows, and a line without
    one stays behind the line before it. (Equal lines, of repeated failures, are one line then.)
    """
    for whole, part in ((first, second), (second, first)):
        rest = iter(whole)
        if all(line in rest for line in part):  # each one behind the one before
            return whole
    return list(dict.fromkeys(line for _, line in heapq.merge(_placed(first), _placed(second), key=itemgetter(0))))


def _placed(lines: list[bytes]) -> Iterator[tuple[tuple[int, bool], bytes]]:
    """Give each line its place, which never decreases: its row, and whether it comes behind the embedding there."""
    place = (-1, True)
    for line in lines:
        record = parse_record(line)
        if (row := record.get("row")) is not None:
            place = max(place, (row, record["state"] != "done"))
        yield place, line


# Mending


def mend_text_files(folder: Path) -> list[str]:
    """Restore the header, the manifest and their copies from each other; return a sentence for each change.

    Raises:
        BankError: If the header is lost and has no whole copy.
    """
    report = []
    with _writer(folder, must=True):
        found = _look(folder)
        if found.header is None and (_done(found) or HEADER in found.files):
            raise BankError(
                f"{found.files.get(HEADER, folder / HEADER)}, but {HEADER} has no whole copy here. Nothing else says "
                "what the embeddings were made with, so their rows stay as they are"
            )
        if found.header is not None:
            for name in (HEADER_COPY, HEADER):
                if name in found.files or not (folder / name).exists():
                    _replace(folder / name, encode_header(found.header))
        report += [*found.lines, *(found.files[n] for n in (HEADER, HEADER_COPY, MANIFEST_COPY) if n in found.files)]
        if not found.has_copies and found.header is not None:
            report += set_rows_aside(folder, found.ledger.rows, found.header["layers"][-1][2])
        elif found.header is None and not found.records and _has_rows(folder):
            report.append("there are rows of embeddings, but no other file says anything about them: they stay")
        for name in (MANIFEST, MANIFEST_COPY):  # in this order, because the copy may not be ahead
            _replace(folder / name, found.manifest)
        for scratch in folder.glob(".*.tmp"):  # of writers that died
            scratch.unlink(missing_ok=True)
        sync_folder(folder)
    return [line.removesuffix(f"; {ADVICE}").removesuffix("; the next writer completes it") for line in report]


def mend_rows(folder: Path) -> list[str]:
    """Withdraw embeddings that are damaged; where only standard errors are, withdraw these.

    Returns:
        A sentence for each damaged embedding.
    """
    report, changed = [], {}
    for task, record in _done(found := _look(folder)).items():
        error = _damage(folder, found.header, record)
        if error is None:
            continue
        rest = {**record, "sums": {k: v for k, v in record["sums"].items() if k != "standard_error"}}
        alone = rest != record and _damage(folder, found.header, rest) is None
        changed[task] = record, rest if alone else None
        done = "its Fisher values are kept without their standard errors" if alone else "it was taken out"
        report.append(f"bank {folder}: task {task!r} is damaged: {error}; {done}")
    if not changed:
        return []
    with _writer(folder, must=True):
        found = _look(folder)
        lines, withdrawn = [], []
        latest = _done(found)
        for record in found.records:
            old, new = changed.get(record["task"], (None, None))
            if record is latest.get(record["task"]) and record == old:
                if new is None:
                    withdrawn.append({"task": record["task"], "state": "open", "row": record["row"]})
                lines.append(encode_record(new or record))
                continue
            lines.append(encode_record(record))
        lines += map(encode_record, withdrawn)
        for name in (MANIFEST, MANIFEST_COPY):
            write_atomically(folder / name, b"".join(lines))
        sync_folder(folder)
    return report


def drop_indices(folder: Path) -> None:
    """Remove the indices, which may be of rows that are gone; they are made again when they are needed."""
    for metric in METRICS:
        index_path(folder, metric).unlink(missing_ok=True)


# Helpers


def _replace(path: Path, content: bytes) -> None:
    """Write a file, and keep beside it what it held unless the new content begins with that."""
    before = _read(path)
    if before == content:
        return
    if before and not content.startswith(before):
        write_atomically(free_name(path.parent, f"damaged-{{}}-{path.name}"), before)
    write_atomically(path, content)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _has_rows(folder: Path) -> bool:
    for name in FIELDS:
        with contextlib.suppress(FileNotFoundError):
            if rows_path(folder, name).stat().st_size:
                return True
    return False


@contextlib.contextmanager
def _writer(folder: Path, must: bool = False) -> Iterator[None]:
    """Keep writers out, also without ``must`` in a folder where nobody can write."""
    try:
        held = Locks.of(folder / LOCKS)
    except OSError:
        if must or os.access(folder, os.W_OK):
            raise
        yield
        return
    held.acquire(WRITER)
    try:
        yield
    finally:
        held.release(WRITER)
