"""Bank: a folder of task embeddings that many processes can add to.

=======================  ===========================================================================================
``bank.json``            the header, which all embeddings share: fingerprint, layers and length D; written once
``manifest.jsonl``       one line for each event of a task, with a checksum; lines are only ever appended
``hessian.f64``          the Fisher vectors: row r is float64 [D] and starts at byte 8 D r
``standard_error.f64``   the standard errors in the same rows, for tasks that have them
``scale.f64``            the scales in the same rows; a constant scale is in the manifest instead
``bank.copy.json``       a second copy of the header
``manifest.copy.jsonl``  a second copy of the manifest
``locks``                an empty file whose bytes are locked; the kernel releases the locks of a process that dies
=======================  ===========================================================================================

A row counts only once the manifest names it, and it is on the disk before that. So a process may die at any moment:
the next writer overwrites what it left half-written, and everything that was added stays. A bank from before there were
copies gets them from the first writer (:mod:`t2v_fast.bank.recovery`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..embedding import Embedding, FingerprintMismatch, differences_from
from . import locks, recovery
from .index import Index, scan, stored_index
from .locks import LOCKS, WRITER, Locks, task_offset
from .manifest import (
    ADVICE,
    MANIFEST,
    BankError,
    Ledger,
    NotInBank,
    append_lines,
    check_name,
    copy_size,
    encode_record,
    is_residue,
    parse_record,
    printable,
    read_header,
    write_header,
)
from .rows import map_rows, read_embedding, write_rows


class _Snapshot(NamedTuple):
    """The finished tasks of one moment, in the order of their rows."""

    moment: tuple
    tasks: list[str]
    rows: list[int]
    vectors: np.ndarray  # [T, D]


class Bank:
    """A folder of task embeddings, each under the name of its task.

    All embeddings of a bank share one fingerprint, which the first one sets. Several threads and processes may use a
    bank at the same time, and each call sees what the others have added so far. While others may be adding, take
    :meth:`snapshot` instead of :attr:`tasks` and :meth:`vectors`, which may see different moments.

    Args:
        folder: The folder of the bank.
        create: Make the folder if it is missing. With False, a folder without a bank is an error.

    Raises:
        BankError: For a damaged bank, naming the file and line; :meth:`repair` keeps what is whole. Also for a folder
            without a bank if ``create`` is False, and on systems without POSIX file locks.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from t2v_fast import Bank, Embedding
        >>> def embedding(task, values):
        ...     return Embedding(np.array(values), np.ones(3), [("conv.weight", 0, 3)], 10, meta={"task": task})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = Bank(folder)
        ...     bank.add(embedding("cats", [1.0, 2.0, 3.0]), embedding("dogs", [1.0, 2.0, 4.0]))
        ...     bank.add(embedding("cars", [9.0, 0.5, 1.0]))
        ...     print(bank.tasks, bank.vectors().shape)
        ...     print(bank["dogs"].hessian, [task for task, distance in bank.nearest("cats", 2)])
        ['cats', 'dogs', 'cars'] (3, 3)
        [1. 2. 4.] ['dogs', 'cars']
    """

    _header: dict[str, Any] | None
    _inode: int | None  # of the manifest
    _prepared: int | None  # the manifest of which the copy was compared
    _read: int  # bytes of the manifest that were read
    _lines: int
    _ledger: Ledger
    _snapshot: _Snapshot | None
    _indices: dict[str, tuple[tuple, Index]]

    def __init__(self, folder: str | os.PathLike, *, create: bool = True) -> None:
        if not locks.AVAILABLE:
            raise BankError("a bank needs POSIX file locks, which this system does not have")
        self.folder = Path(folder)
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            recovery.check_is_bank(self.folder)
        if not self.folder.is_dir():
            raise BankError(f"{self.folder} is no folder")
        self._thread = threading.RLock()
        self._header = None
        self._forget()
        self.refresh()

    def __repr__(self) -> str:
        return f"Bank({str(self.folder)!r}, {len(self)} tasks, {len(self._ledger.failed)} failed)"

    # Adding and reading

    def add(self, *embeddings: Embedding, replace: bool = False) -> None:
        """Store embeddings under the names in their ``meta["task"]``, all of them or none.

        The embeddings are on the disk when this method returns. Adding many at once waits for the disk only once.

        Args:
            embeddings: The embeddings to store, under names that the bank does not have yet.
            replace: Let an embedding take the place of the one that the bank has under its name (as with
                :meth:`remove`).

        Raises:
            FingerprintMismatch: If an embedding cannot be compared with those of the bank.
            BankError: If a task is there already, or its name cannot be one.
            OSError: If the disk is full. The message names the task.
        """
        if not embeddings:
            return
        names = [str(e.meta.get("task") or "") for e in embeddings]
        for name in names:
            check_name(name)
        with self._writing():
            for k, name in enumerate(names):
                if (name in self._ledger.done and not replace) or name in names[:k]:
                    raise BankError(f"bank {self.folder}: task {name!r} is there already")
            try:
                self._prepare()
                if self._header is None:
                    write_header(self.folder, embeddings[0])
                    self._load_header()
                    self._prepared = None  # the header has no copy yet
                    self._prepare()
                self._check_comparable(embeddings)
                records = write_rows(self.folder, names, embeddings, self._ledger.rows, self._length)
                self._append(self._withdrawals(names) + records)
            except OSError as error:
                some = names[0] if len(names) == 1 else f"{names[0]!r} to {names[-1]!r}"
                raise OSError(
                    error.errno, f"bank {self.folder}: task {some!r} was not stored: {error.strerror}"
                ) from error

    @property
    def tasks(self) -> list[str]:
        """The names of the finished tasks, in the order of :meth:`vectors`."""
        with self._thread:
            self.refresh()
            return self._order()

    def __len__(self) -> int:
        """Return the number of finished tasks."""
        self.refresh()
        return len(self._ledger.done)

    def __contains__(self, task: object) -> bool:
        """Return whether a task is finished."""
        self.refresh()
        return task in self._ledger.done

    def __getitem__(self, task: str) -> Embedding:
        """Read one embedding and compare it with its checksums.

        Raises:
            KeyError: If the bank does not have the task (:class:`~t2v_fast.bank.NotInBank`). The message holds the
                error of a task that failed.
            BankError: If the embedding is damaged.
        """
        with self._thread:
            self.refresh()
            done, error = self._ledger.done.get(task), self._ledger.failed.get(task)
        if done is None:
            state = "is not in it" if error is None else f"failed: {error}"
            raise NotInBank(f"bank {self.folder}: task {task!r} {state}")
        with open(self._manifest, "rb") as file:
            file.seek(done.start)
            line = file.read(done.length)
        try:
            record = parse_record(line)
            if record["task"] != task or record["row"] != done.row:
                raise ValueError("its line was changed")
            assert self._header is not None  # it is written before the first task
            return read_embedding(self.folder, self._header, record)
        except (KeyError, TypeError, ValueError) as error:
            if os.stat(self._manifest).st_ino != self._inode:  # a repair replaced it in between
                return self[task]
            raise BankError(
                f"bank {self.folder}: task {task!r} is damaged: {error}; `t2v-fast bank repair` takes it out"
            ) from None

    def __iter__(self) -> Iterator[Embedding]:
        """Iterate over the embeddings in the order of :attr:`tasks`; each is read and checked when it is reached."""
        return (self[task] for task in self.tasks)

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of all embeddings (:class:`~t2v_fast.embedding.Embedding`), or None for an empty bank."""
        self._load_header()
        return None if self._header is None else self._header["fingerprint"]

    @property
    def layers(self) -> tuple[tuple[str, int, int], ...]:
        """The slices (parameter, start, stop) of the vectors; no slices for an empty bank."""
        self._load_header()
        return () if self._header is None else tuple(tuple(layer) for layer in self._header["layers"])

    def vectors(self) -> np.ndarray:
        """Return the Fisher vectors [T, D] of all finished tasks, one row for each of :attr:`tasks`.

        The array is a read-only memory map, so only the rows in use are read. Rows are not compared with their
        checksums; :meth:`verify` does that. If tasks were taken out of the bank (:meth:`remove`, :meth:`repair`), the
        array is a copy.
        """
        return self.snapshot()[1]

    def snapshot(self) -> tuple[list[str], np.ndarray]:
        """Return :attr:`tasks` and :meth:`vectors` of the same moment."""
        now = self._now()
        return now.tasks, now.vectors

    def nearest(
        self,
        query: Embedding | str,
        k: int = 10,
        metric: str = "cosine",
        *,
        candidates: int | None = None,
        exact: bool = False,
    ) -> list[tuple[str, float]]:
        """Find the tasks nearest to an embedding, or to a task of the bank.

        An index picks candidates, and the metric itself ranks them (:class:`~t2v_fast.bank.index.Index`). The index is
        kept in the folder and grows with the bank.

        Args:
            query: An embedding, or the name of a task of the bank. A named task is not among its own neighbours.
            k: How many neighbours to return.
            metric: A name in :data:`t2v_fast.analysis.distance.METRICS`.
            candidates: How many tasks to measure. By default 4 ``k``, at least 64.
            exact: Measure all tasks instead of the candidates.

        Returns:
            Up to ``k`` pairs (task, distance), nearest first. The distances are those of
            :func:`t2v_fast.analysis.distance.cdist`.

        Raises:
            FingerprintMismatch: If the embedding cannot be compared with those of the bank.
            KeyError: If the bank does not have the named task.
        """
        embedding = self[query] if isinstance(query, str) else query
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        now = self._now()
        if not now.tasks:
            return []
        self._check_comparable([embedding])
        more = k + isinstance(query, str)
        if exact:
            rows, distances = scan(now.vectors, embedding.hessian, more, metric)
        else:
            rows, distances = self._index(now, metric).query(now.vectors, embedding.hessian, more, candidates)
        found = [(now.tasks[row], float(d)) for row, d in zip(rows, distances, strict=True)]
        return [(task, d) for task, d in found if task != query][:k]

    # Sharing the work with other processes

    def claim(self, task: str, *, again: bool = False) -> bool:
        """Try to become the one process and thread that works on a task.

        A claim ends with :meth:`release`, or with the process, however the process ends. Without a claim, two
        processes may compute the same task, but only one of them can store it.

        Args:
            task: The name of the task.
            again: Claim a finished task, too, to replace its embedding (:meth:`add`).

        Returns:
            True if the caller now has the claim. False if the task is finished (unless ``again``), has failed, or is
            claimed already.
        """
        check_name(task)
        if not self._locks.acquire(task_offset(task), wait=False):
            return False
        try:
            self.refresh()
        except BaseException:
            self.release(task)
            raise
        if task in self._ledger.failed or (task in self._ledger.done and not again):
            self.release(task)
            return False
        return True

    def release(self, task: str) -> None:
        """End the claim on a task."""
        self._locks.release(task_offset(task))

    def fail(self, task: str, error: str) -> None:
        """Record that a task failed, and why. It cannot be claimed again before :meth:`retry`.

        Raises:
            BankError: If the task is finished.
        """
        check_name(task)
        with self._writing():
            if task in self._ledger.done:
                raise BankError(f"bank {self.folder}: task {task!r} is finished, so it cannot have failed")
            self._append([{"task": task, "state": "failed", "error": printable(error)}])

    @property
    def failed(self) -> dict[str, str]:
        """The tasks that failed and were not retried since, with their errors."""
        self.refresh()
        return dict(self._ledger.failed)

    def retry(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Let failed tasks be claimed again.

        Args:
            tasks: The names of failed tasks. By default all of them.

        Returns:
            The names of the tasks that can be claimed again.

        Raises:
            BankError: If one of the tasks has not failed.
        """
        with self._writing():
            wanted = list(self._ledger.failed) if tasks is None else list(dict.fromkeys(tasks))
            for task in wanted:
                if task not in self._ledger.failed:
                    raise BankError(f"bank {self.folder}: task {task!r} has not failed")
            self._append([{"task": task, "state": "open", "row": None} for task in wanted])
        return wanted

    def remove(self, *tasks: str) -> None:
        """Take finished tasks out of the bank, all of them or none. They can be embedded again then.

        What they took on the disk is not given back, and :meth:`vectors` is a copy from then on.

        Args:
            tasks: The names of finished tasks.

        Raises:
            BankError: If one of the tasks is not finished. One that has failed needs :meth:`retry` instead.
        """
        with self._writing():
            wanted = list(dict.fromkeys(tasks))
            for task in wanted:
                if task not in self._ledger.done:
                    state = "has failed: retry it" if task in self._ledger.failed else "is not in it"
                    raise BankError(f"bank {self.folder}: task {task!r} {state}")
            self._append(self._withdrawals(wanted))

    def settled(self, task: str) -> bool:
        """Return whether a task is finished or has failed, without looking at the folder again."""
        return task in self._ledger.done or task in self._ledger.failed

    def refresh(self) -> None:
        """Read what other processes have added. Methods that look tasks up do this first, except :meth:`settled`."""
        with self._thread:
            self._load_header()
            try:
                self._read_manifest()
            except BankError:
                # A repair, or a writer whose disk was full, may have replaced lines that were read before.
                self._forget()
                self._read_manifest()

    def _read_manifest(self) -> None:
        copied = copy_size(self.folder) if self._inode is None else None  # first, because the manifest is ahead
        try:
            file = open(self._manifest, "rb")  # noqa: SIM115 (a missing file is an empty bank)
        except FileNotFoundError:
            self._forget()
            recovery.check_not_lost(self.folder)
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:
                copied = copy_size(self.folder)
                self._forget()
                self._inode = status.st_ino
            file.seek(self._read)
            data = file.read()
        start = self._read
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                self._take_up(line)
            except ValueError as error:
                if is_residue(data[self._read - start :], self._read, copy_size(self.folder)):
                    break
                where = f"{self._manifest}, line {self._lines + 1}"
                self._forget()
                raise BankError(f"{where}: {error}; {ADVICE}") from None
        if copied is not None and copied > self._read:
            recovery.check_complete(self.folder)

    def _take_up(self, line: bytes) -> None:
        record = parse_record(line)
        if record["state"] == "done":
            self._load_header()  # written before the first line, but perhaps after the last look at the folder
            if self._header is None:
                raise ValueError("the bank has no bank.json, without which its rows cannot be read")
        self._ledger.apply(record, self._read, len(line))
        self._read += len(line)
        self._lines += 1

    # Damage

    def verify(self) -> dict[str, str]:
        """Read all embeddings and all other files, and compare them with their checksums and copies.

        Returns:
            What is wrong with each damaged task, by its name, and with each damaged file, by the file's name.
        """
        return recovery.verify(self.folder)

    @classmethod
    def repair(cls, folder: str | os.PathLike) -> list[str]:
        """Restore the files of the bank in ``folder`` from each other, and take out embeddings that are damaged.

        The tasks that were taken out can be run again. An embedding of which only the standard errors are damaged stays
        without them. What a damaged text file held is kept beside it, and rows of embeddings are never removed.

        Returns:
            One sentence for each thing that was wrong.

        Raises:
            BankError: If the folder is no bank, or ``bank.json`` is damaged and has no copy, as in banks of older
                versions.
        """
        folder = Path(folder)
        recovery.check_is_bank(folder)
        report = recovery.mend_text_files(folder) + recovery.mend_rows(folder)
        if report:
            recovery.drop_indices(folder)
        cls(folder)
        return report

    # Internals

    @property
    def _manifest(self) -> Path:
        return self.folder / MANIFEST

    @property
    def _locks(self) -> Locks:
        return Locks.of(self.folder / LOCKS)

    @property
    def _length(self) -> int:
        assert self._header is not None  # every bank with a row has a header
        return self._header["layers"][-1][2]

    def _order(self) -> list[str]:
        return sorted(self._ledger.done, key=lambda task: self._ledger.done[task].row)

    def _forget(self) -> None:
        """Drop everything that was read from the manifest."""
        self._inode = self._prepared = None
        self._read = self._lines = 0
        self._ledger = Ledger()
        self._snapshot = None
        self._indices = {}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writer's lock, with the manifest up to date."""
        held = self._locks
        with self._thread:
            held.acquire(WRITER)
            try:
                self.refresh()
                yield
            finally:
                held.release(WRITER)

    def _prepare(self) -> None:
        """Complete the copies of the header and the manifest, unless this object has found them complete before."""
        if self._prepared is None or self._prepared != self._inode or copy_size(self.folder) != self._read:
            recovery.prepare(self.folder, self._read, self._ledger.rows, self._header)
            self.refresh()
            self._prepared = self._inode

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        if records:
            self._prepare()
            lines = list(map(encode_record, records))
            append_lines(self.folder, b"".join(lines), self._read)
            for line in lines:
                self._take_up(line)

    def _withdrawals(self, tasks: Sequence[str]) -> list[dict[str, Any]]:
        done = self._ledger.done
        return [{"task": task, "state": "open", "row": done[task].row} for task in tasks if task in done]

    def _load_header(self) -> None:
        if self._header is None:
            self._header = read_header(self.folder)

    def _check_comparable(self, embeddings: Sequence[Embedding]) -> None:
        for e in embeddings:
            if different := differences_from(self.fingerprint or {}, self.layers, e):
                raise FingerprintMismatch(
                    f"task {e.meta.get('task')!r} cannot go into bank {self.folder}: they differ in "
                    f"{', '.join(different)} (first the bank's)"
                )

    def _now(self) -> _Snapshot:
        with self._thread:
            self.refresh()
            moment = (self._inode, self._read)
            if self._snapshot is None or self._snapshot.moment != moment:
                tasks = self._order()
                rows = [self._ledger.done[task].row for task in tasks]
                count = rows[-1] + 1 if rows else 0
                length = self._length if self._header else 0
                array = map_rows(self.folder, "hessian", count, length) if rows else np.empty((0, length))
                if len(rows) != count:  # tasks were taken out
                    array = array[rows]
                    array.flags.writeable = False
                self._snapshot = _Snapshot(moment, tasks, rows, array)
            return self._snapshot

    def _index(self, now: _Snapshot, metric: str) -> Index:
        """Return the index of a metric, brought up to date with a snapshot."""
        moment, index = self._indices.get(metric, (None, None))
        if index is None or moment != now.moment:
            # A task that was removed and embedded again has another row.
            names = [f"{row} {task}" for row, task in zip(now.rows, now.tasks, strict=True)]
            index = stored_index(self.folder, names, now.vectors, metric)
            self._indices[metric] = now.moment, index
        return index
