"""Run a job: embed many tasks into a bank, with workers that may die at any moment.

A driver claims tasks in the bank, assigns them to workers, and stores what they return. If a worker dies, only its
current work is lost; if a driver dies, only the current work of its workers. Several drivers may share a bank.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from ..embedding import FingerprintMismatch, differences, first_of
from ..spans import Spans
from ..tasks.data import DataError
from ..tasks.settings import Settings, other_settings
from . import job_profile
from .display import Display
from .engines import Engine, Factory, InProcess, Processes, Result, WorkerDied
from .job import Job, WorkItem
from .job_profile import JobProfile, RunTime, TaskTime
from .store import Bank, BankError

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
        changed: Finished tasks that were to be embedded again, because their folders or tables had changed.
        profile: Where the time of the run went.
    """

    finished: int = 0
    images: int = 0
    before: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    lost_workers: int = 0
    seconds: float = 0.0
    changed: list[str] = field(default_factory=list)
    profile: JobProfile = field(default_factory=lambda: JobProfile([]), init=False, repr=False)


def run_job(
    job: Job,
    bank: Bank,
    *,
    workers: int = 0,
    ray: str | None = None,
    progress: bool = True,
    factory: Factory | None = None,
    on_start: Callable[[Engine], None] | None = None,
    redo_changed: bool = False,
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
        redo_changed: Embed finished tasks again if their folders or tables have other images or labels than then. Names
            and sizes of files are compared. The former embedding stays until the new one takes its place, also if the
            run is interrupted or the task fails now.

    Returns:
        The :class:`Summary` of the run.

    Raises:
        FingerprintMismatch: If the bank holds embeddings of other settings.
        OSError: If the bank cannot be written.
        RuntimeError: If the pipeline cannot be made, or workers die before they are ready.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected at least 0")
    settings = Settings(**job.settings) if factory is None else None  # of another factory nothing is known
    factory = factory or job.task2vec
    began, threads = time.monotonic(), torch.get_num_threads()
    if ray is not None:
        from .ray_engine import RayActors

        cuda = str(job.settings.get("device", "")).startswith("cuda")
        threads = 1
        actors = RayActors(factory, ray, threads, gpus=float(cuda))
        engine: Engine = actors
        workers = workers or actors.cpus()
    elif workers:
        threads = max(1, threads // workers)
        engine = Processes(factory, threads)
    else:
        engine = InProcess(factory)
    clock = _Clock(began, max(workers, 1), threads, isinstance(engine, InProcess), dict(job.settings))
    driver = _Driver(job, settings, bank, engine, clock, Display(len(job.tasks), progress), redo_changed)
    try:
        with driver.display:
            return driver.run(on_start)
    finally:
        driver.close()


def _changed(works: Iterable[WorkItem], bank: Bank) -> list[str]:
    """Return the finished tasks whose folders or tables had other images or labels when they were embedded.

    ``meta["contents"]`` of their embeddings tells (:func:`~t2v_fast.tasks.data.contents_of`): the names and sizes of
    the images are compared, and the labels. Tasks of other kinds, and those whose data are gone, are never among them.
    """
    return [task for work in works for task in work.tasks if task in bank and _has_changed(work, bank, task)]


def _has_changed(work: WorkItem, bank: Bank, task: str) -> bool:
    try:
        now = work.contents()
        return now is not None and bank[task].meta.get("contents") not in (None, now)
    except (BankError, DataError, OSError):  # damaged, taken out, or without its data: no matter now
        return False


class _Driver:
    """The state of one run of a job."""

    def __init__(
        self,
        job: Job,
        settings: Settings | None,
        bank: Bank,
        engine: Engine,
        clock: _Clock,
        display: Display,
        redo_changed: bool,
    ) -> None:
        self.bank, self.engine, self.clock, self.display = bank, engine, clock, display
        self.workers = clock.workers
        self.names, self.settings = job.tasks, settings
        self.redo_changed, changed = redo_changed, []
        if redo_changed:
            display.note("looking for finished tasks that have changed")
            changed = _changed(job.work, bank)
        self.again = set(changed)  # finished tasks that are embedded again
        before = {name for name in self.names if bank.settled(name) and name not in self.again}
        self.finished = [work for work in job.work if work.tasks.keys() <= before]
        self.queue = deque(work for work in job.work if not work.tasks.keys() <= before)
        self.claimed_elsewhere: deque[WorkItem] = deque()  # tasks that another driver has claimed
        self.assigned: dict[int, WorkItem | None] = {}  # by worker; None: idle, or not ready yet
        self.idle: list[int] = []
        self.deaths: dict[str, int] = {}
        self.starts_failed = 0
        self.checked = False  # whether the bank was found to have the same settings
        self.summary = Summary(before=len(before), changed=changed)

    def _note_settings(self) -> None:
        """Say that finished tasks stay as they are, where one of them was embedded with other settings."""
        names = set(self.names)
        task = next((task for task in self.bank.tasks if task in names), None)
        with contextlib.suppress(BankError):  # a damaged embedding is not the matter here
            if self.settings and task and (different := other_settings(self.settings, self.bank[task].meta)):
                self.display.note(
                    f"note: task {task} was embedded with other settings before ({', '.join(different)}). Finished "
                    "tasks stay as they are: to embed all tasks alike, use another bank"
                )

    def _note_contents(self) -> None:
        """Say which tasks have other folders or tables than when they were embedded, and whether they stay."""
        if self.redo_changed:
            if self.again:
                self.display.note(f"to be embedded again, because they have changed: {first_of(self.summary.changed)}")
        elif changed := _changed(self.finished, self.bank):
            self.display.note(
                f"note: {first_of(changed)} had other images or labels when embedded. Finished tasks "
                "stay as they are: --redo-changed (redo_changed=True in Python) embeds them again"
            )

    def run(self, on_start: Callable[[Engine], None] | None) -> Summary:
        self.display.begin(self.summary.before)
        self._note_settings()
        # It takes some seconds for a thousand folders.
        look = threading.Thread(target=self._note_contents, daemon=True)
        look.start()
        for _ in range(min(self.workers, max(1, len(self.queue)))):
            self._start_worker()
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
            with self.clock.storing():
                self._store([(cast(WorkItem, self.assigned[worker]), result) for worker, result in results])
            self._note_times(results)
            for worker, _ in results:
                self.assigned[worker] = None  # only now, because close() releases the claims of assigned work
                self.idle.append(worker)
            for worker, event in events:
                if not isinstance(event, Result):
                    self._handle(worker, event)
        look.join()
        failed = self.bank.failed
        self.summary.failed |= {name: failed[name] for name in self.names if name in failed}
        self.summary.seconds = time.monotonic() - self.clock.began
        self.summary.profile = JobProfile(self.clock.tasks, [self.clock.run()])
        return self.summary

    def _start_worker(self) -> None:
        worker = self.engine.start()
        self.assigned[worker] = None
        self.clock.start(worker)

    def _assign_work(self) -> None:
        while self.idle and self.queue:
            work = self.queue.popleft()
            mine = {task: label for task, label in work.tasks.items() if self._claim(work, task)}
            rest = {t: v for t, v in work.tasks.items() if t not in mine and not self.bank.settled(t)}
            if rest:
                self.claimed_elsewhere.append(replace(work, tasks=rest))
            if mine:
                worker = self.idle.pop()
                self.assigned[worker] = given = replace(work, tasks=mine)
                self.engine.submit(worker, given)

    def _claim(self, work: WorkItem, task: str) -> bool:
        again = task in self.again
        if not self.bank.claim(task, again=again):
            return False
        if again and task in self.bank and not _has_changed(work, self.bank, task):
            self.bank.release(task)  # another driver has embedded it again
            return False
        return True

    def _handle(self, worker: int, event: Any) -> None:
        if isinstance(event, dict):
            known = self.bank.fingerprint
            if known is not None and (different := differences(known, event)):
                raise FingerprintMismatch(
                    f"bank {self.bank.folder} holds embeddings of other settings: they differ in "
                    f"{', '.join(different)} (first the bank's); use another bank"
                )
            self.checked = True
            self.clock.ready(worker)
            self.idle.append(worker)
            self.starts_failed = 0
        elif isinstance(event, WorkerDied):
            self._replace_worker(worker, str(event))
        else:
            raise RuntimeError(f"the pipeline cannot be made: {event}")

    def _store(self, results: list[tuple[WorkItem, Result]]) -> None:
        embeddings = [e for _, result in results for e in result.embeddings]
        self.bank.add(*embeddings, replace=bool(self.again))
        for work, result in results:
            for note in result.notes:
                self.display.note(note)
            for task, error in result.errors.items():
                if task in self.again and task in self.bank:
                    error += "; its former embedding stays"
                    self.summary.failed[task] = error
                else:
                    self.bank.fail(task, error)
                self.display.note(f"failed: {task}: {error}")
            for task in work.tasks:
                self.bank.release(task)
            self.summary.finished += len(result.embeddings)
            # The tasks of one piece of work share their images.
            images = max((e.num_examples for e in result.embeddings), default=0)
            self.summary.images += images
            self.display.advance(len(work.tasks), images)

    def _note_times(self, results: list[tuple[int, Result]]) -> None:
        entries: list[TaskTime] = []
        for worker, result in results:
            images = {str(e.meta.get("task")): e.num_examples for e in result.embeddings}
            entries += job_profile.task_times(result.spans, images, worker, time.time())
            self.clock.add(result)
        self.clock.tasks += entries
        job_profile.append(self.bank.folder, entries)

    def _replace_worker(self, worker: int, cause: str) -> None:
        self.clock.end(worker)
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
        self._start_worker()

    def close(self) -> None:
        self.engine.close()
        if self.clock.tasks:
            # After an interruption the summary has no profile yet.
            job_profile.append(self.bank.folder, self.summary.profile.runs or [self.clock.run()])
        for work in self.assigned.values():
            for task in work.tasks if work else ():
                self.bank.release(task)


class _Clock:
    """What a run of a job takes besides its tasks, and what the tasks took."""

    def __init__(self, began: float, workers: int, threads: int, in_driver: bool, settings: dict[str, Any]) -> None:
        self.began, self.workers, self.threads = began, workers, threads
        self.in_driver, self.settings = in_driver, settings
        self.wall = time.time() - (time.monotonic() - began)
        self.tasks: list[TaskTime] = []
        self.total = Spans()
        self._lives: dict[int, float] = {}  # of workers, when they were started
        self._starts: dict[int, float] = {}  # of workers that are not ready yet
        self._lived = self._store = 0.0
        self._start = time.monotonic() - began if in_driver else 0.0  # the worker was made first

    def start(self, worker: int) -> None:
        now = time.monotonic()
        self._lives[worker] = self.began if self.in_driver else now
        self._starts[worker] = now

    def ready(self, worker: int) -> None:
        self._start += time.monotonic() - self._starts.pop(worker)

    def end(self, worker: int) -> None:
        now = time.monotonic()
        self._lived += now - self._lives.pop(worker)
        if worker in self._starts:
            self._start += now - self._starts.pop(worker)

    def add(self, result: Result) -> None:
        for spans in result.spans.values():
            self.total.add(spans)
        if result.embeddings:
            self.settings.setdefault("batch_size", result.embeddings[0].meta.get("batch_size"))

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._store += time.monotonic() - start

    def run(self) -> RunTime:
        """The times so far."""
        now = time.monotonic()
        lived = self._lived + sum(now - born for born in self._lives.values())
        starting = self._start + sum(now - since for since in self._starts.values())
        busy = sum(self.total.seconds.values()) + starting + (self._store if self.in_driver else 0.0)
        return RunTime(
            began=round(self.wall, 2),
            seconds=now - self.began,
            workers=self.workers,
            start=starting,
            store=self._store,
            idle=max(lived - busy, 0.0),
            in_driver=self.in_driver,
            threads=self.threads,
            cores=os.cpu_count() or 1,
            settings=self.settings,
            sizes=self.total.sizes,
        )
