"""Engines, which run the workers of a job: in processes of this machine, or in this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from ..embedding import Embedding
from ..spans import Spans, collect
from ..tasks import sources
from ..tasks.pipeline import Task2Vec
from .job import WorkItem

Factory = Callable[[], Task2Vec]
STOPPING = 2.0  # seconds that all workers together may take to end by themselves
TERMINATED = 128 + signal.SIGTERM  # the exit status of a worker that was told to end, as a shell would report it


@dataclass
class Result:
    """The outcome of one piece of work: embeddings, the errors of tasks that failed, and the texts of warnings.

    ``spans`` says what each task took (:mod:`t2v_fast.spans`).
    """

    embeddings: list[Embedding] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spans: dict[str, Spans] = field(default_factory=dict, init=False)


def perform(task2vec: Task2Vec, work: WorkItem) -> Result:
    """Embed the tasks of one piece of work. The result holds the errors of tasks that fail."""
    result = Result()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with collect() as shared:
            together = _perform_shared(task2vec, work, result)
        part = shared.part(len(work.tasks))
        for task in work.tasks:
            if together:
                result.spans[task] = part
                continue
            try:
                with collect() as result.spans[task]:
                    result.embeddings.append(task2vec.embed(work.data(task)))
            except Exception as error:  # whatever goes wrong with one task, the others go on
                result.errors[task] = f"{type(error).__name__}: {error}"
            result.spans[task].add(part)  # of the attempt to embed it with others
    result.notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return result


def _perform_shared(task2vec: Task2Vec, work: WorkItem, result: Result) -> bool:
    """Try to embed tasks over the same images in one pass. Return False if that is impossible or a task fails."""
    if len(work.tasks) < 2:
        return False
    try:
        pool = sources.pool(work.table(), work.tasks)
        if pool is None:
            return False
        files, labels = pool
        found = task2vec.embed_label_sets(
            files,
            {task: codes for task, (codes, _) in labels.items()},
            classes={task: classes for task, (_, classes) in labels.items()},
            skip_unreadable=work.skip_unreadable,
        )
    except Exception:  # the tasks are tried again one by one, to find those that fail
        return False
    result.embeddings = list(found.values())
    return True


class Engine(ABC):
    """Something that runs workers.

    A worker is known by a number. It makes its pipeline once and then does one piece of work at a time.
    """

    @abstractmethod
    def start(self) -> int:
        """Start a worker and return its number."""

    @abstractmethod
    def submit(self, worker: int, work: WorkItem) -> None:
        """Give work to an idle worker."""

    @abstractmethod
    def events(self, timeout: float) -> list[tuple[int, Any]]:
        """Wait up to ``timeout`` seconds for workers, and return pairs (worker, event).

        An event is a fingerprint (a dictionary) when the worker is ready, a :class:`Result` when its work is done, a
        :class:`WorkerDied`, or another exception if the worker's factory raised one.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all workers."""


class WorkerDied(RuntimeError):
    """A worker ended without being told to."""


class Processes(Engine):
    """Run workers in processes of this machine, each with ``threads`` threads."""

    def __init__(self, factory: Factory, threads: int) -> None:
        self.factory, self.threads = factory, threads
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}
        # A forked process would inherit torch's locks, but not the threads that hold them.
        self._context = multiprocessing.get_context("spawn")
        self._started = 0

    def start(self) -> int:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.factory, self.threads), daemon=False)
        process.start()
        theirs.close()
        self._started += 1
        self._workers[self._started] = process, ours
        return self._started

    def submit(self, worker: int, work: WorkItem) -> None:
        with contextlib.suppress(OSError):  # the worker just died, which events() will report
            self._workers[worker][1].send(work)

    def events(self, timeout: float) -> list[tuple[int, Any]]:
        connections = {connection: worker for worker, (_, connection) in self._workers.items()}
        found: list[tuple[int, Any]] = []
        for connection in cast(list[Connection], wait(list(connections), timeout)):
            worker = connections[connection]
            try:
                found.append((worker, connection.recv()))
            except Exception:  # the end of the stream, or half a message
                process, _ = self._workers.pop(worker)
                connection.close()
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
                found.append((worker, WorkerDied(_cause(process.exitcode))))
        return found

    def pids(self) -> list[int]:
        """Return the process numbers of the workers."""
        return [process.pid for process, _ in self._workers.values() if process.pid is not None]

    def close(self) -> None:
        for process, connection in self._workers.values():
            connection.close()
            process.terminate()
        deadline = time.monotonic() + STOPPING
        for process, _ in self._workers.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # in a call of compiled code, which lets no signal through before it returns
                process.kill()
                process.join()
        self._workers.clear()


def _cause(status: int | None) -> str:
    if status == TERMINATED:
        status = -signal.SIGTERM
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"it ended with status {status}"


def _work(connection: Connection, factory: Factory, threads: int) -> None:
    """Run a worker process: make the pipeline once, then do one piece of work after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the driver, which then stops its workers
    # By default the signal ends a process without any cleanup, which leaves the semaphore of its progress bars behind.
    signal.signal(signal.SIGTERM, _stop)
    try:
        _serve(connection, factory, threads)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends by itself, and its cleanup must not be cut off


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # as in _work
    sys.exit(TERMINATED)


def _serve(connection: Connection, factory: Factory, threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # of a process that multiprocessing started
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        task2vec = factory()
        connection.send(task2vec.fingerprint())
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    with contextlib.suppress(EOFError, OSError):  # the driver is gone
        while True:
            connection.send(perform(task2vec, connection.recv()))


def _end_with(parent: int) -> None:
    """End this process when its parent ends, even in the middle of a task."""
    wait([parent])
    os._exit(1)


class InProcess(Engine):
    """Do the work in this process, when :meth:`events` is called."""

    def __init__(self, factory: Factory) -> None:
        self.task2vec = factory()
        self._events: list[tuple[int, Any]] = []
        self._work: WorkItem | None = None

    def start(self) -> int:
        self._events.append((0, self.task2vec.fingerprint()))
        return 0

    def submit(self, worker: int, work: WorkItem) -> None:
        self._work = work

    def events(self, timeout: float) -> list[tuple[int, Any]]:
        if self._work is not None:
            work, self._work = self._work, None
            return [(0, perform(self.task2vec, work))]
        found, self._events = self._events, []
        if not found:
            time.sleep(timeout)
        return found

    def close(self) -> None:
        pass
