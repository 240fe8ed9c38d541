"""The progress of a job: a live line on a terminal, and a plain line a minute where the output goes elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..embedding import escaped

BLOCKS = "▁▂▃▄▅▆▇█"
WINDOWS = 24  # the most columns of the small chart
EVERY = 60.0  # seconds between plain lines


class Rates:
    """Images a second, now and over time, in a few numbers however long a job runs.

    Time is divided into windows of equal length. If there are too many of them, each two become one.

    >>> rates = Rates(width=1.0)
    >>> for second in range(4):
    ...     rates.add(second + 0.5, images=10 * second)
    >>> rates.now(4.0), rates.overall(4.0), rates.chart(4.0)
    (25.0, 15.0, '▁▃▆█')
    """

    def __init__(self, width: float = 10.0) -> None:
        self.width, self.counts = width, [0.0]
        self.images = 0.0

    def add(self, at: float, images: float) -> None:
        """Count images that were finished ``at`` seconds after the start."""
        self._reach(at)
        self.counts[-1] += images
        self.images += images

    def _reach(self, at: float) -> None:
        while at >= self.width * len(self.counts):
            if len(self.counts) == WINDOWS:
                self.width *= 2
                self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
            else:
                self.counts.append(0.0)

    def now(self, at: float) -> float:
        """The rate in this window and the one before."""
        self._reach(max(at - 1e-9, 0.0))
        some = self.counts[-2:]
        return sum(some) / max(at - self.width * (len(self.counts) - len(some)), 1e-9)

    def overall(self, at: float) -> float:
        """The rate since the start."""
        return self.images / max(at, 1e-9)

    def chart(self, at: float) -> str:
        """The rates of all windows as blocks of eight heights; empty for a single window."""
        self._reach(max(at - 1e-9, 0.0))
        rates = [c / self.width for c in self.counts]
        rates[-1] = self.counts[-1] / max(at - self.width * (len(rates) - 1), 1e-9)
        top = max(rates)
        if len(rates) < 2 or not top:
            return ""
        return "".join(BLOCKS[min(int(8 * rate / top), 7)] for rate in rates)


class Display:
    """The tasks that are done, the rates and the time that is left."""

    def __init__(self, tasks: int, enabled: bool) -> None:
        self.tasks, self.enabled = tasks, enabled
        self.console = Console(stderr=True, highlight=False)
        self.live = enabled and self.console.is_terminal
        self.rates = Rates()
        self.start = self.spoke = time.monotonic()
        self.done = self.before = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("tasks, {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            speed_estimate_period=600,
        )

    def begin(self, before: int) -> None:
        """Start the clock; ``before`` tasks were settled before."""
        self.start = self.spoke = time.monotonic()
        self.before = before
        self.bar = self.progress.add_task("embed", total=self.tasks - before, rate="")

    def advance(self, tasks: int, images: float) -> None:
        """Count tasks that are done, and their images."""
        at = time.monotonic() - self.start
        self.rates.add(at, images)
        self.done += tasks
        self.progress.update(self.bar, advance=tasks, rate=self._rate(at))
        if self.enabled and not self.live and time.monotonic() - self.spoke >= EVERY:
            self.spoke = time.monotonic()
            left = (self.tasks - self.before - self.done) * at / self.done
            self.note(f"{self._count()}, {self._rate(at)}, about {_duration(left)} left")

    def _count(self) -> str:
        return f"{self.done}/{self.tasks - self.before} tasks"

    def _rate(self, at: float) -> str:
        now, overall = self.rates.now(at), self.rates.overall(at)
        chart = self.rates.chart(at)
        hourly = 3600 * self.done / max(at, 1e-9)
        each = f"{hourly / 3600:.1f} tasks/s" if hourly >= 7200 else f"{hourly:.0f} tasks/h"
        return f"{now:.1f} images/s now, {overall:.1f} in all{chart and f' {chart}'}, {each}"

    def note(self, text: str) -> None:
        """Print a line above the bar, or to the error stream if there is no bar."""
        if self.live:
            self.console.print(escaped(text), markup=False)
        else:
            print(f"t2v-fast: {escaped(text)}", file=sys.stderr)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        if self.enabled and not self.live and self.done:
            at = time.monotonic() - self.start
            self.note(f"{self._count()} in {_duration(at)}, {self._rate(at)}")


def _duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> _duration(7.2), _duration(200), _duration(9000)
    ('7 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
