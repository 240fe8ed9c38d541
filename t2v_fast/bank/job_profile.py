"""Where the time of a job goes: what the workers and the driver measured, and what would make the job faster.

The seconds of every task and of every run are kept beside the records of a bank, in ``profile.jsonl``: one JSON object
a line, only ever appended. A bank does not need the file. Lines that a crash has cut are left out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..embedding import escaped
from ..files import write_atomically
from ..spans import KINDS, Spans

FILE = "profile.jsonl"
PASSES = ("forward", "backward")
# Every stage in the order of a task, with what a person calls it. Passes stand for their kinds of layers, too.
STAGES: dict[str, str] = {
    "start": "starting workers",
    "decode": "decoding and preparing images",
    "wait": "waiting for data",
    "features": "features",
    "head": "head",
    **{f"{name}.{kind}": f"Fisher, {name}: {kind}" for name in PASSES for kind in KINDS},
    "fisher": "Fisher: cotangents and sums",
    "check": "self-check",
    "rest": "other work on tasks",
    "store": "storing",
    "idle": "idle",
}
# Groups of stages, for lines that have no room for all of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "data": ("decode", "wait"),
    "features": ("features",),
    "head": ("head",),
    "forward": tuple(f"forward.{kind}" for kind in KINDS),
    "backward": tuple(f"backward.{kind}" for kind in KINDS),
    "check": ("check",),
    "other": ("fisher", "rest"),
}


@dataclass(frozen=True)
class TaskTime:
    """What one task took. ``seconds`` has the stages of :mod:`t2v_fast.spans`."""

    task: str
    seconds: dict[str, float]
    images: float  # a share of them where several tasks went over the same images
    decoded: float = 0.0  # files that were decoded, in this process
    worker: int = 0
    at: float = 0.0  # when it was stored, in seconds since 1970
    failed: bool = False


@dataclass(frozen=True)
class RunTime:
    """What one run of a driver took besides its tasks, and how it was set up."""

    began: float  # in seconds since 1970
    seconds: float  # from the first worker's start to the end
    workers: int
    start: float = 0.0  # summed over workers: until each was ready
    store: float = 0.0  # of the driver
    idle: float = 0.0  # summed over workers
    in_driver: bool = True  # the work was done in the driver's process
    threads: int = 1  # of each worker
    cores: int = 1  # of the driver's machine
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)  # of Spans


@dataclass(frozen=True)
class JobProfile:
    """The times of the tasks and the runs of a job.

    Example:
        >>> tasks = [TaskTime("cats", {"head": 1.0, "forward": 2.0, "forward.linear": 0.5}, images=10)]
        >>> profile = JobProfile(tasks, [RunTime(began=0, seconds=4.0, workers=1, idle=0.5)])
        >>> profile.totals()
        {'head': 1.0, 'forward.linear': 2.5, 'idle': 0.5}
    """

    tasks: Sequence[TaskTime]
    runs: Sequence[RunTime] = ()

    @property
    def images(self) -> float:
        """The images of all tasks that were embedded."""
        return sum(t.images for t in self.tasks if not t.failed)

    @property
    def seconds(self) -> float:
        """The time in which at least one run went on. Several drivers may have shared the bank."""
        total, end = 0.0, -math.inf
        for run in sorted(self.runs, key=lambda run: run.began):
            total += max(run.began + run.seconds - max(run.began, end), 0.0)
            end = max(end, run.began + run.seconds)
        return total

    def stages_of(self, tasks: Iterable[TaskTime]) -> dict[str, float]:
        """The seconds of some tasks by stage, in the order of :data:`STAGES`.

        Some passes were divided into kinds of layers. Their shares, over all tasks of the job, divide the others.
        """
        found = _sum(t.seconds for t in tasks)
        every = _sum(t.seconds for t in self.tasks)
        for name in PASSES:
            whole = found.pop(name, 0.0) + sum(found.get(f"{name}.{kind}", 0.0) for kind in KINDS)
            measured = {kind: every.get(f"{name}.{kind}", 0.0) for kind in KINDS}
            total = sum(measured.values())
            for kind in KINDS:
                share = measured[kind] / total if total else float(kind == "other")
                found[f"{name}.{kind}"] = whole * share
        return {stage: found[stage] for stage in STAGES if found.get(stage, 0.0) > 0}

    def totals(self) -> dict[str, float]:
        """The seconds of all workers by stage, with those of the runs: starting, storing and idle.

        Storing counts only where a worker waits for it, in the driver's process.
        """
        found = self.stages_of(self.tasks)
        runs = {key: sum(getattr(run, key) for run in self.runs) for key in ("start", "idle")}
        runs["store"] = sum(run.store for run in self.runs if run.in_driver)
        return {stage: s for stage in STAGES if (s := found.get(stage, 0.0) + runs.get(stage, 0.0)) > 0}

    @property
    def divided(self) -> bool:
        """Whether any pass was divided into kinds of layers; a short job may have none."""
        return any(name in t.seconds for t in self.tasks for name in (f"{PASSES[0]}.other", f"{PASSES[1]}.other"))

    def table(self) -> Table:
        """Return the table of all stages."""
        table = Table("stage")
        for column in ("seconds", "share", "ms an image"):
            table.add_column(column, justify="right")
        totals = self.totals()
        whole = sum(totals.values())
        for stage, seconds in totals.items():
            each = "" if stage in ("start", "idle") or not self.images else f"{1e3 * seconds / self.images:.2f}"
            table.add_row(STAGES[stage], f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %", each)
        return table

    def headline(self) -> str:
        """One line: tasks, images, and how many of them a second."""
        done = sum(not t.failed for t in self.tasks)
        text = f"{done} tasks, {self.images:.0f} images"
        if self.seconds:
            workers = max(run.workers for run in self.runs)
            text += (
                f" in {self.seconds:.1f} s: {self.images / self.seconds:.1f} images/s, "
                f"{3600 * done / self.seconds:.0f} tasks/h, {workers} worker{'s' * (workers > 1)}"
            )
            beside = sum(run.store for run in self.runs if not run.in_driver)
            text += f", {beside:.1f} s of storing beside them" if beside else ""
        return text

    def task_table(self, slowest: int | None = None) -> Table:
        """Return the table of the tasks in the order in which they were stored, or of the slowest, slowest first."""
        tasks = list(self.tasks)
        if slowest is not None:
            tasks = sorted(tasks, key=lambda t: -sum(t.seconds.values()))[:slowest]
        table = Table()
        table.add_column("task", min_width=12, overflow="fold")
        for column in ("images", "seconds", *GROUPS):
            table.add_column(column, justify="right")
        for t in tasks:
            groups = self.grouped(t)
            cells = (f"{s:.2f}" for s in groups.values())
            name = f"{t.task} (failed)" if t.failed else t.task
            table.add_row(Text(escaped(name)), f"{t.images:.0f}", f"{sum(groups.values()):.2f}", *cells)
        return table

    def grouped(self, task: TaskTime) -> dict[str, float]:
        """The seconds of a task by :data:`GROUPS`."""
        stages = self.stages_of([task])
        return {group: sum(stages.get(s, 0.0) for s in members) for group, members in GROUPS.items()}

    def rates(self, windows: int = 60) -> tuple[list[float], list[float]]:
        """Images a second over time: the ends of windows, in seconds from the first run's begin, and the rates.

        The pauses between runs are left out.
        """
        events: list[tuple[float, float]] = []
        before = 0.0
        runs = sorted(self.runs, key=lambda run: run.began)
        for run, end in zip(runs, [*(later.began for later in runs[1:]), math.inf], strict=True):
            inside = [t for t in self.tasks if run.began <= t.at < end and not t.failed]
            events += [(before + min(t.at - run.began, run.seconds), t.images) for t in inside]
            before += run.seconds
        if not events or not before:
            return [], []
        width = before / windows
        counts = [0.0] * windows
        for at, images in events:
            counts[min(int(at / width), windows - 1)] += images
        return [width * (k + 1) for k in range(windows)], [c / width for c in counts]

    def as_dict(self, advice: Iterable[Any] = ()) -> dict[str, Any]:
        """Everything as JSON values, with the :func:`~t2v_fast.bank.advice.advice_for` it."""
        ends, rates = self.rates()
        return {
            "tasks": len(self.tasks),
            "failed": sum(t.failed for t in self.tasks),
            "images": self.images,
            "seconds": self.seconds,
            "images_per_second": self.images / self.seconds if self.seconds else None,
            "tasks_per_hour": 3600 * sum(not t.failed for t in self.tasks) / self.seconds if self.seconds else None,
            "stages": self.totals(),
            "advice": [asdict(a) for a in advice],
            "by_task": [{**asdict(t), "seconds": self.stages_of([t])} for t in self.tasks],
            "runs": [asdict(run) for run in self.runs],
            "over_time": {"seconds": ends, "images_per_second": rates},
        }

    def save_json(self, path: str | os.PathLike, advice: Iterable[Any] = ()) -> None:
        """Write :meth:`as_dict`."""
        write_atomically(path, json.dumps(self.as_dict(advice), indent=1).encode())


def _sum(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def task_times(spans: dict[str, Spans], images: dict[str, int], worker: int, at: float) -> list[TaskTime]:
    """The times of tasks that a worker has come back with; tasks without a number of images have failed."""
    return [
        TaskTime(
            task,
            {stage: round(s, 4) for stage, s in found.seconds.items() if s >= 5e-5},
            images.get(task, 0) / found.shared,
            found.counts.get("decoded", 0),
            worker,
            round(at, 2),
            task not in images,
        )
        for task, found in spans.items()
    ]


def append(folder: Path, entries: Iterable[TaskTime | RunTime]) -> None:
    """Add entries to a bank's profile. A profile is not worth a job: what cannot be written is left out."""
    lines = [
        json.dumps({"task" if isinstance(e, TaskTime) else "run": asdict(e)}, separators=(",", ":")) for e in entries
    ]
    if not lines:
        return
    with contextlib.suppress(OSError):
        file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # One write at the end, so that lines of several drivers do not mix; a line feed ends what a crash has cut.
            os.write(file, ("\n" + "\n".join(lines) + "\n").encode())
        finally:
            os.close(file)


def read(folder: Path, tasks: Iterable[str] | None = None) -> JobProfile:
    """Read the profile in a bank's folder, of all tasks or of some. The last entry of a task counts.

    Raises:
        ValueError: if the bank has no profile, as banks of older versions.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: the bank was made by an older version, or holds no embedding of a job")
    wanted = None if tasks is None else set(tasks)
    found: dict[str, TaskTime] = {}
    runs: list[RunTime] = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            entry = json.loads(line)
            if "run" in entry:
                runs.append(_checked(RunTime(**entry["run"])))
            elif wanted is None or entry["task"]["task"] in wanted:
                found[entry["task"]["task"]] = _checked(TaskTime(**entry["task"]))
    return JobProfile(list(found.values()), runs)


def _checked(entry: Any) -> Any:
    """The entry, if its numbers are numbers."""
    numbers = [*entry.seconds.values(), entry.images] if isinstance(entry, TaskTime) else [entry.seconds, entry.idle]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise ValueError("not a number")
    return entry
