"""Run a job: many tasks into a bank, by worker processes or Ray actors that may die at any moment.

One driver claims tasks in the bank, hands them to workers, and stores what they return: a worker that dies costs the
task in its hand, a driver that dies what its workers had in theirs. Several drivers may share a bank.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..embedding import FingerprintMismatch, differences
from .engines import Engine, Factory, Here, Processes, Result, WorkerDied
from .job import Job, WorkItem
from .store import Bank

DEATHS = 3  # of workers at one task, after which it counts as failed
POLL = 0.5  # seconds between looks at tasks that are in another driver's hands


@dataclass
class Summary:
    """What a run did: embedded tasks, failures of the bank's tasks with their errors, lost workers."""

    finished: int = 0
    images: int = 0
    before: int = 0  # tasks that were finished or had failed when it began
    failed: dict[str, str] = field(default_factory=dict)
    lost_workers: int = 0
    seconds: float = 0.0


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
        from .ray_engine import RayActors

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
        self.elsewhere: deque[WorkItem] = deque()  # tasks that another driver has in hand
        self.hands: dict[int, WorkItem | None] = {}  # of each worker; None: idle, or not ready yet
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

    def _store(self, results: list[tuple[WorkItem, Result]]) -> None:
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
