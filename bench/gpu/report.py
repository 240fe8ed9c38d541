"""The report: results by section, written after each line."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutOfTime(BaseException):
    """Raised inside a line that takes longer than its step has. It is no Exception, so that no line catches it."""


class Absent(RuntimeError):
    """A tool or a peer that this machine does not have, or does not let us use."""


class Report:
    """Collects results, and what went wrong; nothing stops the rest.

    A line of this library's own that gives no result is *wrong*: a wrong number, an error, a network that the library
    refuses, and a line for which no time was left. Lines of peers and of tools are excused. They are *left out*, with
    the reason.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.begin = time.monotonic()
        self.end = self.begin + 60 * minutes
        self.step_end = self.end
        self.results: dict[str, Any] = {"machine": {}, "steps": {}, "wrong": [], "left_out": []}

    @contextmanager
    def step(self, name: str, seconds: float | None) -> Iterator[None]:
        """Give the lines in this context at most ``seconds``; with None, only the total limits them."""
        start = time.monotonic()
        self.step_end = self.end if seconds is None else min(self.end, start + seconds)
        try:
            yield
        finally:
            self.results["steps"][name] = {
                "seconds": round(time.monotonic() - start, 1),
                "budget": seconds,
                "since the start": round(time.monotonic() - self.begin, 1),
            }
            self.step_end = self.end
            self.write()

    def line(self, section: str, name: str, run: Callable[[], Any], excused: bool = False) -> Any:
        """Keep the result of a line, or the reason why there is none. Return the result or None."""
        value = None
        left = self.step_end - time.monotonic()
        start = time.monotonic()
        try:
            if left <= 0:
                raise OutOfTime
            with _alarm(left):
                value = run()
            self.results.setdefault(section, {})[name] = value
            said = str(value)
        except (OutOfTime, Exception) as error:
            said = (
                f"no time was left (it began with {max(left, 0):.0f} s)"
                if isinstance(error, OutOfTime)
                else self.reason(error)
            )
            place = "left_out" if excused or isinstance(error, Absent) else "wrong"
            self.results[place].append(f"{section}: {name}: {said}")
        print(
            f"[{time.monotonic() - self.begin:5.0f} s, {time.monotonic() - start:5.1f}] {section}: {name}: {said}",
            flush=True,
        )
        self.write()
        return value

    @staticmethod
    def reason(error: BaseException) -> str:
        """What went wrong, in one text."""
        if isinstance(error, AssertionError):
            return str(error) or traceback.format_exc(limit=-1)
        return f"{type(error).__name__}: {error}"

    def write(self) -> None:
        """Write gpu.json and gpu.md. A reader sees the former contents or the new ones, never a part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu.json", json.dumps(self.results, indent=1)), ("gpu.md", markdown(self.results))):
            (self.folder / f"{name}.new").write_text(text)
            os.replace(self.folder / f"{name}.new", self.folder / name)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {results['machine'].get('device', 'no device yet')}", ""]
    for section, found in results.items():
        lines += [f"## {section.replace('_', ' ').capitalize()}", ""]
        if isinstance(found, list):
            lines += [f"- {' '.join(text.split())}" for text in found] or ["None."]
        else:
            lines += ["| | |", "| --- | --- |"]
            for name, value in found.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{_shown(v)} {k}" for k, v in value.items())
                lines.append(f"| {name} | {_shown(value)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
