"""Run a job: many tasks into a bank, by worker processes or Ray actors that may die at any moment.

One driver claims tasks in the bank, hands them to workers, and stores what they return: a worker that dies costs the
task in its hand, a driver that dies what its workers had in theirs. Several drivers may share a bank.
"""

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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import sources
from .bank import Bank
from .embedding import Embedding, FingerprintMismatch, differences
from .job import Job, Work
from .task2vec import Task2Vec

DEATHS = 3  # of workers at one task, after which it counts as failed
POLL = 0.5  # seconds between looks at tasks that are in another driver's hands
Factory = Callable[[], Task2Vec]


@dataclass
class Summary:
    """What a run did: embedded tasks, failures of the bank's tasks with their errors, lost workers."""

    finished: int = 0
    images: int = 0
    before: int = 0  # tasks that were finished or had failed when it began
    failed: dict[str, str] = field(default_factory=dict)
    lost_workers: int = 0
    seconds: float = 0.0


@dataclass
class Result:
    """What became of a :class:`Work`: embeddings, errors of tasks, and what was worth a warning."""

    embeddings: list[Embedding] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def perform(task2vec: Task2Vec, work: Work) -> Result:
    """Embed the tasks of one work; what goes wrong is in the result, under the task's name."""
    result = Result()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if not _perform_shared(task2vec, work, result):
            for task in work.tasks:
                try:
                    result.embeddings.append(task2vec.embed(work.data(task)))
                except Exception as error:  # a task may fail in any way, the others go on
                    result.errors[task] = f"{type(error).__name__}: {error}"
    result.notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return result


def _perform_shared(task2vec: Task2Vec, work: Work, result: Result) -> bool:
    """Embed tasks over the same images in one pass; False where that is not possible, or one of them fails."""
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
    except Exception:  # alone, each task fails or succeeds for itself
        return False
    result.embeddings = list(found.values())
    return True


class Engine(ABC):
    """Where workers live. A worker is a number; it makes its pipeline once and does one work at a time."""

    @abstractmethod
    def start(self) -> int:
        """Begin a worker."""

    @abstractmethod
    def submit(self, worker: int, work: Work) -> None:
        """Give an idle worker work."""

    @abstractmethod
    def events(self, timeout: float) -> list[tuple[int, Any]]:
        """What happened within ``timeout`` seconds: (worker, fingerprint when it is ready, a :class:`Result`, or an
        exception: a :class:`WorkerDied`, or what its factory raised)."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""


class WorkerDied(RuntimeError):
    """A worker is gone."""


class Processes(Engine):
    """Worker processes on this machine, each with ``threads`` threads."""

    def __init__(self, factory: Factory, threads: int) -> None:
        self.factory, self.threads = factory, threads
        self._workers: dict[int, tuple[multiprocessing.Process, Connection]] = {}
        # A fork would inherit locks and threads of torch.
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

    def submit(self, worker: int, work: Work) -> None:
        with contextlib.suppress(OSError):  # it just died, as events() will say
            self._workers[worker][1].send(work)

    def events(self, timeout: float) -> list[tuple[int, Any]]:
        connections = {connection: worker for worker, (_, connection) in self._workers.items()}
        found = []
        for connection in wait(list(connections), timeout):
            worker = connections[connection]
            try:
                found.append((worker, connection.recv()))
            except Exception:  # an end, or half a message
                process, _ = self._workers.pop(worker)
                connection.close()
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
                found.append((worker, WorkerDied(_cause(process.exitcode))))
        return found

    def pids(self) -> list[int]:
        """The processes that are alive."""
        return [process.pid for process, _ in self._workers.values()]

    def close(self) -> None:
        for process, connection in self._workers.values():
            connection.close()
            process.terminate()
        for process, _ in self._workers.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()


def _cause(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"it ended with status {status}"


def _work(connection: Connection, factory: Factory, threads: int) -> None:
    """A worker process: the pipeline is made once, then tasks come one at a time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
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
    """End this process when its parent does, be it in the middle of a task."""
    wait([parent])
    os._exit(1)


class Here(Engine):
    """The work is done in this process, when events are asked for."""

    def __init__(self, factory: Factory) -> None:
        self.task2vec = factory()
        self._events: list[tuple[int, Any]] = []
        self._work: Work | None = None

    def start(self) -> int:
        self._events.append((0, self.task2vec.fingerprint()))
        return 0

    def submit(self, worker: int, work: Work) -> None:
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


def run_job(
    job: Job,
    bank: Bank,
    *,
    workers: int = 0,
    ray: str | None = None,
    progress: bool = True,
    factory: Factory | None = None,
    on_start: Callable[[Engine], None] | None = None,
) -> Summary:
    """Embed all tasks of ``job`` that ``bank`` does not have and that did not fail before.

    ``workers``: processes on this machine that share its threads, or with ``ray`` (an address, ``"auto"`` or
    ``"local"``) Ray actors; 0 works in this process. ``factory`` makes the pipeline, by default ``job.task2vec``; it
    travels to the workers. ``on_start`` is called with the engine when the first workers are started.

    A task that raises is recorded as failed. A worker that dies is replaced, and its task given to another; after
    three deaths the task counts as failed. Raises FingerprintMismatch where the bank holds embeddings of other
    settings, OSError where the bank cannot be written, RuntimeError for a pipeline that cannot be made.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected at least 0")
    factory = factory or job.task2vec
    if ray is not None:
        from .distributed import RayActors

        cuda = str(job.settings.get("device", "")).startswith("cuda")
        engine: Engine = RayActors(factory, ray, gpus=float(cuda))
        workers = workers or engine.cpus()
    elif workers:
        engine = Processes(factory, max(1, torch.get_num_threads() // workers))
    else:
        engine = Here(factory)
    driver = _Driver(job, bank, engine, max(workers, 1), _Display(len(job.tasks), progress))
    try:
        with driver.display:
            return driver.run(on_start)
    finally:
        driver.close()


class _Driver:
    """The state of one run."""

    def __init__(self, job: Job, bank: Bank, engine: Engine, workers: int, display: _Display) -> None:
        self.bank, self.engine, self.workers, self.display = bank, engine, workers, display
        self.names = job.tasks
        self.queue = deque(work for work in job.work if not all(map(bank.settled, work.tasks)))
        self.elsewhere: deque[Work] = deque()  # tasks that another driver has in hand
        self.hands: dict[int, Work | None] = {}  # of each worker; None: idle, or not ready yet
        self.idle: list[int] = []
        self.deaths: dict[str, int] = {}
        self.starts_failed = 0
        self.checked = False  # that the bank holds embeddings of the same settings
        self.summary = Summary(before=sum(map(bank.settled, self.names)))

    def run(self, on_start: Callable[[Engine], None] | None) -> Summary:
        start = time.monotonic()
        self.display.begin(self.summary.before)
        for _ in range(min(self.workers, max(1, len(self.queue)))):
            self.hands[self.engine.start()] = None
        if on_start is not None:
            on_start(self.engine)
        while True:
            self._hand_out()
            if self.checked and not self.queue and not any(self.hands.values()):
                if not self.elsewhere:
                    break
                self.queue, self.elsewhere = self.elsewhere, deque()
                time.sleep(POLL)
                continue
            events = self.engine.events(POLL)
            # All that came at once is stored at once, and waits for the disk once.
            results = [(worker, event) for worker, event in events if isinstance(event, Result)]
            self._store([(self.hands[worker], result) for worker, result in results])
            for worker, _ in results:
                self.hands[worker] = None  # in hand until it is stored: close() gives claims back
                self.idle.append(worker)
            for worker, event in events:
                if not isinstance(event, Result):
                    self._happened(worker, event)
        failed = self.bank.failed
        self.summary.failed = {name: failed[name] for name in self.names if name in failed}
        self.summary.seconds = time.monotonic() - start
        return self.summary

    def _hand_out(self) -> None:
        while self.idle and self.queue:
            work = self.queue.popleft()
            mine = {task: label for task, label in work.tasks.items() if self.bank.claim(task)}
            rest = {t: v for t, v in work.tasks.items() if t not in mine and not self.bank.settled(t)}
            if rest:
                self.elsewhere.append(replace(work, tasks=rest))
            if mine:
                worker = self.idle.pop()
                self.hands[worker] = replace(work, tasks=mine)
                self.engine.submit(worker, self.hands[worker])

    def _happened(self, worker: int, event: Any) -> None:
        if isinstance(event, dict):
            known = self.bank.fingerprint
            if known is not None and (different := differences(known, event)):
                raise FingerprintMismatch(
                    f"bank {self.bank.folder} holds embeddings of other settings: they differ in "
                    f"{', '.join(different)} (first the bank's); use another bank"
                )
            self.checked = True
            self.idle.append(worker)
            self.starts_failed = 0
        elif isinstance(event, WorkerDied):
            self._lost(worker, str(event))
        else:
            raise RuntimeError(f"the pipeline cannot be made: {event}")

    def _store(self, results: list[tuple[Work, Result]]) -> None:
        self.bank.add(*(e for _, result in results for e in result.embeddings))
        for work, result in results:
            for note in result.notes:
                self.display.note(note)
            for task, error in result.errors.items():
                self.bank.fail(task, error)
                self.display.note(f"failed: {task}: {error}")
            for task in work.tasks:
                self.bank.release(task)
            self.summary.finished += len(result.embeddings)
            images = max((e.num_examples for e in result.embeddings), default=0)  # of one pool, however many tasks
            self.summary.images += images
            self.display.advance(len(work.tasks), images)

    def _lost(self, worker: int, cause: str) -> None:
        work = self.hands.pop(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        self.summary.lost_workers += 1
        if work is None:
            self.starts_failed += 1
            if self.starts_failed > DEATHS * self.workers:
                raise RuntimeError(
                    f"workers die before they begin ({cause}): is there enough memory for {self.workers}?"
                )
        else:
            self.display.note(f"a worker died ({cause}) at {', '.join(work.tasks)}: another takes over")
            again = {}
            for task, label in work.tasks.items():
                self.deaths[task] = self.deaths.get(task, 0) + 1
                if self.deaths[task] >= DEATHS:
                    failure = Result(errors={task: f"{DEATHS} workers died at it, the last: {cause}"})
                    self._store([(replace(work, tasks={task: label}), failure)])
                else:
                    again[task] = label
                    self.bank.release(task)
            # Of tasks that share images one may be at fault.
            for task, label in again.items():
                self.queue.appendleft(replace(work, tasks={task: label}))
        self.hands[self.engine.start()] = None

    def close(self) -> None:
        self.engine.close()
        for work in self.hands.values():
            for task in work.tasks if work else ():
                self.bank.release(task)


class _Display:
    """Tasks done, images a second and the time left, live on a terminal."""

    def __init__(self, tasks: int, enabled: bool) -> None:
        self.tasks, self.enabled, self.images, self.start = tasks, enabled, 0, 0.0
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tasks, {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled,
        )

    def begin(self, before: int) -> None:
        self.start = time.monotonic()
        self.task = self.progress.add_task("embed", total=self.tasks - before, rate="")

    def advance(self, tasks: int, images: int) -> None:
        self.images += images
        rate = f"{self.images / max(time.monotonic() - self.start, 1e-9):.1f} images/s"
        self.progress.update(self.task, advance=tasks, rate=rate)

    def note(self, text: str) -> None:
        """A line above the bar; without one it goes to the error stream as well."""
        if self.enabled:
            self.console.print(text, markup=False)
        else:
            print(f"t2v-fast: {text}", file=sys.stderr)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
