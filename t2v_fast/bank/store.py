"""Bank: a folder of task embeddings that many processes add to, with one manifest.

====================  ==============================================================================================
``bank.json``         what all embeddings share: fingerprint, layers, length D; written once
``manifest.jsonl``    what happened to each task, one line an event, only ever appended to; each line has a checksum
``hessian.f64``       row r, float64 [D], at byte 8 D r, read as one memory map; ``standard_error.f64`` and
                      ``scale.f64`` likewise, where a task has them (a constant scale stands in the manifest)
``locks``             an empty file of which bytes are locked; the kernel releases a dead process's locks
====================  ==============================================================================================

A row counts only once the manifest names it, and is on the disk before that. So a process may die at any moment: what
it leaves half-written is overwritten by the next, what was added stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.distance import METRICS
from ..embedding import Embedding, FingerprintMismatch, differences_from
from ..files import write_atomically
from . import locks
from .index import Index, index_path, scan
from .locks import Locks, task_offset

FORMAT = "t2v-fast bank"
VERSION = 1
FIELDS = ("hessian", "scale", "standard_error")
LONGEST_NAME = 1000  # characters of a task's name


class BankError(ValueError):
    """A bank that is damaged or used wrongly; the message names the file, and the task where there is one."""


@dataclass(frozen=True)
class _Done:
    """Where a finished task lies: its row, and its line in the manifest."""

    row: int
    start: int
    length: int


class Bank:
    """The bank in ``folder``, which is made if it is missing.

    All embeddings of a bank have one fingerprint, that of the first. Tasks go by name. Every method sees what other
    processes did until it was called; :meth:`vectors` and :attr:`tasks` of one moment fit each other if nothing was
    added in between: take :meth:`snapshot` where others may be adding.

    Raises BankError, naming the file and line, for a damaged bank; :meth:`repair` keeps what is whole.
    """

    def __init__(self, folder: str | os.PathLike, *, create: bool = True) -> None:
        if not locks.AVAILABLE:
            raise BankError("a bank needs POSIX file locks, which this system does not have")
        self.folder = Path(folder)
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif not (self.folder / "manifest.jsonl").exists():
            raise BankError(f"{self.folder} is no bank: it has no manifest.jsonl")
        if not self.folder.is_dir():
            raise BankError(f"{self.folder} is no folder")
        self._locks = Locks.of(self.folder / "locks")
        self._thread = threading.RLock()
        self._shared: dict[str, Any] | None = None
        self._forget()
        self.refresh()

    # What is there

    def refresh(self) -> None:
        """See what other processes have added."""
        with self._thread:
            self._load_shared()
            try:
                file = open(self._manifest, "rb")  # noqa: SIM115 (a missing file is an empty bank)
            except FileNotFoundError:
                self._forget()
                return
            with file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._forget()
                    self._inode = inode
                file.seek(self._read)
                data = file.read()
            for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
                self._lines += 1
                try:
                    record = _parse(line)
                    self._apply(record, self._read, len(line))
                except ValueError as error:
                    where = f"{self._manifest}, line {self._lines}"
                    self._forget()
                    raise BankError(f"{where}: {error}; `t2v-fast bank repair` keeps what is whole") from None
                self._read += len(line)

    def __len__(self) -> int:
        """The number of finished tasks."""
        self.refresh()
        return len(self._done)

    def __contains__(self, task: object) -> bool:
        self.refresh()
        return task in self._done

    def settled(self, task: str) -> bool:
        """Whether a task is finished or has failed, as of the last look at the folder."""
        return task in self._done or task in self._failed

    def __repr__(self) -> str:
        return f"Bank({str(self.folder)!r}, {len(self)} tasks, {len(self._failed)} failed)"

    @property
    def tasks(self) -> list[str]:
        """The names of finished tasks, in the order of :meth:`vectors`."""
        self.refresh()
        return self._order()

    @property
    def failed(self) -> dict[str, str]:
        """Tasks that failed and were not retried since, with their errors."""
        self.refresh()
        return dict(self._failed)

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What all embeddings share, see :class:`Embedding`; None for an empty bank."""
        self._load_shared()
        return None if self._shared is None else self._shared["fingerprint"]

    @property
    def layers(self) -> tuple[tuple[str, int, int], ...]:
        """(parameter, start, stop) of the vectors; none for an empty bank."""
        self._load_shared()
        return () if self._shared is None else tuple(tuple(layer) for layer in self._shared["layers"])

    def vectors(self) -> np.ndarray:
        """The Fisher vectors [T, D] of all finished tasks: a read-only memory map, of which only what is used is read.

        Rows are not checked here: see :meth:`verify`. (A bank from which :meth:`repair` took tasks is copied instead.)
        """
        return self.snapshot()[1]

    def snapshot(self) -> tuple[list[str], np.ndarray]:
        """:attr:`tasks` and :meth:`vectors` of one moment."""
        with self._thread:
            self.refresh()
            moment = (self._inode, self._read)
            if self._snapshot is None or self._snapshot[0] != moment:
                order = self._order()
                rows = [self._done[task].row for task in order]
                count = rows[-1] + 1 if rows else 0
                array = self._map("hessian", count) if rows else np.empty((0, self._length if self._shared else 0))
                self._snapshot = moment, order, array if len(rows) == count else array[rows]
            return self._snapshot[1], self._snapshot[2]

    def nearest(
        self,
        query: Embedding | str,
        k: int = 10,
        metric: str = "cosine",
        *,
        candidates: int | None = None,
        exact: bool = False,
    ) -> list[tuple[str, float]]:
        """The ``k`` tasks nearest to an embedding, or to a task of the bank (which is left out): names and distances.

        Distances are those of :func:`t2v_fast.distance.cdist`. The tasks measured are the ``candidates`` (64, or 4 k)
        first ones by an index, which is kept in the folder and grows with it (:class:`t2v_fast.bank.index.Index`);
        ``exact`` measures all. Raises FingerprintMismatch for an embedding that was made otherwise.
        """
        embedding = self[query] if isinstance(query, str) else query
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        tasks, vectors = self.snapshot()
        if not tasks:
            return []
        self._check_like([embedding])
        more = k + isinstance(query, str)
        if exact:
            rows, distances = scan(vectors, embedding.hessian, more, metric)
        else:
            rows, distances = self._index(tasks, vectors, metric).query(vectors, embedding.hessian, more, candidates)
        found = [(tasks[row], float(d)) for row, d in zip(rows, distances, strict=True)]
        return [(task, d) for task, d in found if task != query][:k]

    def _index(self, tasks: list[str], vectors: np.ndarray, metric: str) -> Index:
        moment = (self._inode, self._read)
        if metric in self._indices and self._indices[metric][0] == moment:
            return self._indices[metric][1]
        path = index_path(self.folder, metric)
        index = Index.load(path, tasks, metric, self._length) or Index(vectors, metric)
        if len(index) < len(tasks) or not path.exists():
            # Axes that were found in a tenth of the tasks may miss what the others differ in.
            index = Index(vectors, metric) if len(tasks) > 10 * len(index) else index
            index.extend(vectors)
            index.save(path, tasks)
        self._indices[metric] = moment, index
        return index

    def __getitem__(self, task: str) -> Embedding:
        """One embedding, checked against its checksums; KeyError for a task that is not there."""
        self.refresh()
        if task not in self._done:
            state = f"failed: {self._failed[task]}" if task in self._failed else "is not in it"
            raise KeyError(f"bank {self.folder}: task {task!r} {state}")
        done = self._done[task]
        with open(self._manifest, "rb") as file:
            file.seek(done.start)
            line = file.read(done.length)
        try:
            record = _parse(line)
            if record["task"] != task or record["row"] != done.row:
                raise ValueError("its line was changed")
            arrays = {field: self._row(field, done.row, digest) for field, digest in record["sums"].items()}
            if "scale" not in arrays:
                arrays["scale"] = np.full(self._length, record["scale"])
            return Embedding(
                **arrays,
                layers=self.layers,
                num_examples=record["examples"],
                meta=record["meta"],
                fingerprint=self._shared["fingerprint"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(
                f"bank {self.folder}: task {task!r} is damaged: {error}; `t2v-fast bank repair` takes it out"
            ) from None

    def __iter__(self) -> Iterator[Embedding]:
        """All embeddings, one at a time, each checked."""
        return (self[task] for task in self.tasks)

    # Adding

    def claim(self, task: str) -> bool:
        """Take a task in hand, unless it is finished, failed, or in another hand: True if it is now the caller's.

        A claim ends by :meth:`release`, or with the process, however that ends. Who adds a task without claiming it
        risks to compute it twice, though never to store it twice.
        """
        check_name(task)
        if not self._locks.acquire(task_offset(task), wait=False):
            return False
        try:
            self.refresh()
        except BaseException:
            self.release(task)
            raise
        if task in self._done or task in self._failed:
            self.release(task)
            return False
        return True

    def release(self, task: str) -> None:
        """Give a claimed task back."""
        self._locks.release(task_offset(task))

    def add(self, *embeddings: Embedding) -> None:
        """Store embeddings under their ``meta["task"]``, all of them or none; they are on the disk when this returns.

        Adding many at once costs one wait for the disk. Raises FingerprintMismatch for one that was made otherwise,
        BankError for a task that is there already, OSError, naming the task, when the disk is full.
        """
        if not embeddings:
            return
        names = [str(e.meta.get("task") or "") for e in embeddings]
        for name in names:
            check_name(name)
        with self._changing():
            for k, name in enumerate(names):
                if name in self._done or name in names[:k]:
                    raise BankError(f"bank {self.folder}: task {name!r} is there already")
            self._check_like(embeddings)
            try:
                records = self._write_rows(names, embeddings)
                self._append(records)
            except OSError as error:
                some = names[0] if len(names) == 1 else f"{names[0]!r} to {names[-1]!r}"
                raise OSError(
                    error.errno, f"bank {self.folder}: task {some!r} was not stored: {error.strerror}"
                ) from error

    def fail(self, task: str, error: str) -> None:
        """Record that a task failed, and why; it is not claimed again before :meth:`retry`."""
        check_name(task)
        with self._changing():
            if task in self._done:
                raise BankError(f"bank {self.folder}: task {task!r} is finished, so it cannot have failed")
            self._append([{"task": task, "state": "failed", "error": _printable(error)}])

    def retry(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Let failed tasks (all, or these) be claimed again; returns their names."""
        with self._changing():
            wanted = list(self._failed) if tasks is None else list(dict.fromkeys(tasks))
            for task in wanted:
                if task not in self._failed:
                    raise BankError(f"bank {self.folder}: task {task!r} has not failed")
            self._append([{"task": task, "state": "open"} for task in wanted])
        return wanted

    # Damage

    def verify(self) -> dict[str, str]:
        """Read everything and compare it with its checksums: damaged tasks and what is wrong with them."""
        damaged = {}
        for task in self.tasks:
            try:
                self[task]
            except BankError as error:
                damaged[task] = str(error)
        return damaged

    @classmethod
    def repair(cls, folder: str | os.PathLike) -> list[str]:
        """Take damaged lines and embeddings out of a bank, so that their tasks are run again; says what it did."""
        folder = Path(folder)
        manifest = folder / "manifest.jsonl"
        if not manifest.exists():
            raise BankError(f"{folder} is no bank: it has no manifest.jsonl")
        report, kept, state = [], [], {}
        locks = Locks.of(folder / "locks")
        locks.acquire(0)
        try:
            lines = manifest.read_bytes().splitlines(keepends=True)
            for k, line in enumerate(lines, 1):
                try:
                    record = _parse(line)
                    if record["state"] == "done" and state.get(record["task"]) == "done":
                        kept.append(_line({"task": record["task"], "state": "open"}))
                    kept.append(line)
                    state[record["task"]] = record["state"]
                except ValueError as error:
                    report.append(f"line {k} of the manifest: {error}")
            if b"".join(kept) != b"".join(lines):
                write_atomically(manifest, b"".join(kept))
                for metric in METRICS:  # rows may be written anew
                    index_path(folder, metric).unlink(missing_ok=True)
        finally:
            locks.release(0)
        bank = cls(folder)
        for task, error in bank.verify().items():
            with bank._changing():
                bank._append([{"task": task, "state": "open"}])
            report.append(error)
        return report

    # Inside

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.jsonl"

    @property
    def _length(self) -> int:
        return self._shared["layers"][-1][2]

    def _order(self) -> list[str]:
        return sorted(self._done, key=lambda task: self._done[task].row)

    def _forget(self) -> None:
        self._inode: int | None = None
        self._read = self._lines = self._rows = 0
        self._done: dict[str, _Done] = {}
        self._failed: dict[str, str] = {}
        self._snapshot: tuple[tuple, list[str], np.ndarray] | None = None
        self._indices: dict[str, tuple[tuple, Index]] = {}

    def _apply(self, record: dict[str, Any], start: int, length: int) -> None:
        task, state = record["task"], record["state"]
        if state == "open":
            self._done.pop(task, None)
            self._failed.pop(task, None)
            return
        if task in self._done:
            raise ValueError(f"task {task!r} was finished before")
        if state == "failed":
            self._failed[task] = record["error"]
            return
        self._load_shared()  # made before the first line, but perhaps after we looked last
        if self._shared is None:
            raise ValueError("the bank has no bank.json, without which its rows cannot be read")
        if record["row"] < self._rows:
            raise ValueError(f"row {record['row']} is another task's")
        self._failed.pop(task, None)
        self._done[task] = _Done(record["row"], start, length)
        self._rows = record["row"] + 1

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The one writer of the moment, who has seen everything."""
        with self._thread:
            self._locks.acquire(0)
            try:
                self.refresh()
                yield
            finally:
                self._locks.release(0)

    def _load_shared(self) -> None:
        if self._shared is not None:
            return
        path = self.folder / "bank.json"
        try:
            shared = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except (ValueError, RecursionError) as error:
            raise BankError(f"{path} is damaged: {_printable(error)}") from None
        if not isinstance(shared, dict) or shared.get("format") != FORMAT:
            raise BankError(f"{path} is not that of a bank of t2v-fast")
        if shared.get("version") != VERSION:
            raise BankError(f"{path} has version {shared.get('version')!r}, this t2v-fast reads {VERSION}: upgrade it")
        try:
            if shared.get("sum") != _digest(_json([shared["fingerprint"], shared["layers"]]).encode()):
                raise ValueError("its checksum does not fit")
            length = shared["layers"][-1][2]
            ones = np.ones(length)
            Embedding(ones, ones, shared["layers"], 1, fingerprint=shared["fingerprint"])  # its checks are ours
        except (LookupError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise BankError(f"{path} is damaged: {_printable(error)}") from None
        self._shared = shared

    def _check_like(self, embeddings: Sequence[Embedding]) -> None:
        """The embeddings fit the bank, which takes the first one's fingerprint if it has none."""
        if self._shared is None:
            first = embeddings[0]
            shared = {"fingerprint": first.fingerprint, "layers": [list(layer) for layer in first.layers]}
            shared["sum"] = _digest(_json([shared["fingerprint"], shared["layers"]]).encode())
            shared |= {"format": FORMAT, "version": VERSION}
            write_atomically(self.folder / "bank.json", json.dumps(shared, sort_keys=True, indent=1).encode())
            self._load_shared()
        for e in embeddings:
            if different := differences_from(self.fingerprint, self.layers, e):
                raise FingerprintMismatch(
                    f"task {e.meta.get('task')!r} cannot go into bank {self.folder}: they differ in "
                    f"{', '.join(different)} (first the bank's)"
                )

    def _write_rows(self, names: Sequence[str], embeddings: Sequence[Embedding]) -> list[dict[str, Any]]:
        """Write rows behind all others and wait for the disk; their records."""
        records = []
        with contextlib.ExitStack() as stack:
            files: dict[str, int] = {}
            try:
                for k, (name, e) in enumerate(zip(names, embeddings, strict=True)):
                    row, sums = self._rows + k, {}
                    record = {"task": name, "state": "done", "row": row, "examples": int(e.num_examples)}
                    for field in FIELDS:
                        values = getattr(e, field)
                        if field == "scale" and (values == values[0]).all():
                            record["scale"] = float(values[0])
                        elif values is not None:
                            if field not in files:
                                files[field] = os.open(self.folder / f"{field}.f64", os.O_RDWR | os.O_CREAT, 0o666)
                                stack.callback(os.close, files[field])
                            data = np.ascontiguousarray(values, dtype="<f8").tobytes()
                            _write_at(files[field], data, row * 8 * self._length)
                            sums[field] = _digest(data)
                    records.append({**record, "sums": sums, "meta": e.meta})
                for file in files.values():
                    os.fsync(file)
            except OSError:
                for file in files.values():
                    with contextlib.suppress(OSError):  # gives space back; what stays is overwritten
                        os.ftruncate(file, min(os.fstat(file).st_size, self._rows * 8 * self._length))
                raise
        return records

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append lines to the manifest, all or none, and wait for the disk."""
        if not records:
            return
        data = b"".join(map(_line, records))
        new = not self._manifest.exists()
        file = os.open(self._manifest, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = self._read
            os.ftruncate(file, end)  # of a writer that died in a line, half of it may be there
            try:
                _write_at(file, data, end)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, end)
                raise
        finally:
            os.close(file)
        if new:
            _sync_folder(self.folder)
        self.refresh()

    def _map(self, field: str, rows: int) -> np.ndarray:
        path = self.folder / f"{field}.f64"
        size = path.stat().st_size if path.exists() else 0
        if size < rows * 8 * self._length:
            raise BankError(f"{path} has {size} bytes, expected {rows * 8 * self._length}: it was cut off")
        return np.memmap(path, dtype="<f8", mode="r", shape=(rows, self._length))

    def _row(self, field: str, row: int, digest: str) -> np.ndarray:
        path, stride = self.folder / f"{field}.f64", 8 * self._length
        try:
            with open(path, "rb") as file:
                file.seek(row * stride)
                data = file.read(stride)
        except FileNotFoundError:
            data = b""
        if _digest(data) != digest:
            raise ValueError(f"{field} in row {row} does not fit its checksum")
        return np.frombuffer(data, dtype="<f8")


def check_name(task: Any) -> None:
    """Raise BankError for what cannot be a task's name."""
    if not isinstance(task, str) or not task or len(task) > LONGEST_NAME or not task.isprintable():
        raise BankError(
            f"a task's name is {str(task)[:80]!r}, expected 1 to {LONGEST_NAME} printable characters; "
            'an embedding has it in meta["task"]'
        )


def _printable(error: Any) -> str:
    return str(error).encode("utf-8", "backslashreplace").decode()[:10_000]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _line(record: dict[str, Any]) -> bytes:
    data = _json(record).encode()
    return _digest(data).encode() + b" " + data + b"\n"


_KEYS = {
    "done": {"task": str, "state": str, "row": int, "examples": int, "sums": dict, "meta": dict},
    "failed": {"task": str, "state": str, "error": str},
    "open": {"task": str, "state": str},
}


def _parse(line: bytes) -> dict[str, Any]:
    """The record of a line of the manifest; ValueError for anything else."""
    digest, _, data = line.rstrip(b"\n").partition(b" ")
    if digest != _digest(data).encode():
        raise ValueError("its checksum does not fit")
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("state"), str) or record["state"] not in _KEYS:
        raise ValueError("it is no record of a bank")
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


def _write_at(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
