"""Run a job: embed many tasks into a bank, with workers that may die at any moment.

A driver claims tasks in the bank, assigns them to workers, and stores what they return. If a worker dies, only its
current work is lost; if a driver dies, only the current work of its workers. Several drivers may share a bank.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..embedding import FingerprintMismatch, differences, escaped
from .engines import Engine, Factory, InProcess, Processes, Result, WorkerDied
from .job import Job, WorkItem
from .store import Bank

DEATHS = 3  # workers that die at one task before it counts as failed
POLL = 0.5  # seconds between looks at tasks that another driver has claimed


@dataclass
class Summary:
    """What a run of a job did.

    Args:
        finished: Tasks that were embedded.
        images: Images that were embedded. Tasks over the same images count them once.
        before: Tasks that were finished or had failed before the run.
        failed: All tasks of the job that have failed, with their errors.
        lost_workers: Workers that died.
        seconds: Duration of the run.
    """

    finished: int = 0
    images: int = 0
    before: int = 0
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
    """Embed all tasks of a job that a bank does not have and that have not failed before.

    A task that raises an error is recorded as failed. A worker that dies is replaced, and another worker takes its
    task; after three deaths the task counts as failed.

    Args:
        job: The job, from :func:`~t2v_fast.bank.job.load_job`.
        bank: The bank that takes the embeddings.
        workers: Worker processes, which share this machine's threads; 0 works in this process. With ``ray``, the number
            of Ray actors; 0 takes as many as the cluster has room for.
        ray: The address of a Ray cluster, ``"auto"`` or ``"local"``; see
            :class:`~t2v_fast.bank.ray_engine.RayActors`.
        progress: Show a bar on the error stream.
        factory: Makes the pipeline of a worker, by default ``job.task2vec``. It travels to the workers.
        on_start: Called with the engine when the first workers are started.

    Returns:
        The :class:`Summary` of the run.

    Raises:
        FingerprintMismatch: If the bank holds embeddings of other settings.
        OSError: If the bank cannot be written.
        RuntimeError: If the pipeline cannot be made, or workers die before they are ready.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected at least 0")
    factory = factory or job.task2vec
    if ray is not None:
        from .ray_engine import RayActors

        cuda = str(job.settings.get("device", "")).startswith("cuda")
        actors = RayActors(factory, ray, gpus=float(cuda))
        engine: Engine = actors
        workers = workers or actors.cpus()
    elif workers:
        engine = Processes(factory, max(1, torch.get_num_threads() // workers))
    else:
        engine = InProcess(factory)
    driver = _Driver(job, bank, engine, max(workers, 1), _Display(len(job.tasks), progress))
    try:
        with driver.display:
            return driver.run(on_start)
    finally:
        driver.close()


class _Driver:
    """The state of one run of a job."""

    def __init__(self, job: Job, bank: Bank, engine: Engine, workers: int, display: _Display) -> None:
        self.bank, self.engine, self.workers, self.display = bank, engine, workers, display
        self.names = job.tasks
        self.queue = deque(work for work in job.work if not all(map(bank.settled, work.tasks)))
        self.claimed_elsewhere: deque[WorkItem] = deque()  # tasks that another driver has claimed
        self.assigned: dict[int, WorkItem | None] = {}  # by worker; None: idle, or not ready yet
        self.idle: list[int] = []
        self.deaths: dict[str, int] = {}
        self.starts_failed = 0
        self.checked = False  # whether the bank was found to have the same settings
        self.summary = Summary(before=sum(map(bank.settled, self.names)))

    def run(self, on_start: Callable[[Engine], None] | None) -> Summary:
        start = time.monotonic()
        self.display.begin(self.summary.before)
        for _ in range(min(self.workers, max(1, len(self.queue)))):
            self.assigned[self.engine.start()] = None
        if on_start is not None:
            on_start(self.engine)
        while True:
            self._assign_work()
            if self.checked and not self.queue and not any(self.assigned.values()):
                if not self.claimed_elsewhere:
                    break
                self.queue, self.claimed_elsewhere = self.claimed_elsewhere, deque()
                time.sleep(POLL)
                continue
            events = self.engine.events(POLL)
            # Results that came together are stored together, and so wait for the disk only once.
            results = [(worker, event) for worker, event in events if isinstance(event, Result)]
            # Only a worker with assigned work returns a result.
            self._store([(cast(WorkItem, self.assigned[worker]), result) for worker, result in results])
            for worker, _ in results:
                self.assigned[worker] = None  # only now, because close() releases the claims of assigned work
                self.idle.append(worker)
            for worker, event in events:
                if not isinstance(event, Result):
                    self._handle(worker, event)
        failed = self.bank.failed
        self.summary.failed = {name: failed[name] for name in self.names if name in failed}
        self.summary.seconds = time.monotonic() - start
        return self.summary

    def _assign_work(self) -> None:
        while self.idle and self.queue:
            work = self.queue.popleft()
            mine = {task: label for task, label in work.tasks.items() if self.bank.claim(task)}
            rest = {t: v for t, v in work.tasks.items() if t not in mine and not self.bank.settled(t)}
            if rest:
                self.claimed_elsewhere.append(replace(work, tasks=rest))
            if mine:
                worker = self.idle.pop()
                self.assigned[worker] = given = replace(work, tasks=mine)
                self.engine.submit(worker, given)

    def _handle(self, worker: int, event: Any) -> None:
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
            self._replace_worker(worker, str(event))
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
            # The tasks of one piece of work share their images.
            images = max((e.num_examples for e in result.embeddings), default=0)
            self.summary.images += images
            self.display.advance(len(work.tasks), images)

    def _replace_worker(self, worker: int, cause: str) -> None:
        work = self.assigned.pop(worker)
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
            # One of the tasks that share images may be to blame, so each is tried alone.
            for task, label in again.items():
                self.queue.appendleft(replace(work, tasks={task: label}))
        self.assigned[self.engine.start()] = None

    def close(self) -> None:
        self.engine.close()
        for work in self.assigned.values():
            for task in work.tasks if work else ():
                self.bank.release(task)


class _Display:
    """The tasks done, images a second and time left, live on a terminal."""

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
        """Print a line above the bar, or to the error stream if there is no bar."""
        if self.enabled:
            self.console.print(escaped(text), markup=False)
        else:
            print(f"t2v-fast: {escaped(text)}", file=sys.stderr)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
