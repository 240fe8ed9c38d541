"""What the studies of frontends share: a checkout to run, two sides to time, and the table that all of them print.

Each study is a module with a function that returns rows:

    python -m bench.studies.frontends.task2vec CHECKOUT [--rounds 5]

``python -m bench.studies.frontends`` runs all of them, and writes one table.

CHECKOUT is a clone of the frontend's repository, or a bare git directory whose HEAD is unpacked into a temporary
folder. Frontends that are packages need none. Times are of one process and one thread (``time.process_time``). The two
sides take turns, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch

from bench.pages import markdown

SOURCES = {".py", ".yaml", ".yml", ".toml", ".cfg"}
HEADER = (
    "frontend and task",
    "lines changed",
    "agreement with the frontend's own numbers",
    "times faster, same images",
    "times faster, same error",
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        frontend: The frontend, its version or commit, and the task.
        lines: The lines that a user of the frontend changes.
        agreement: How far this library's numbers are from the frontend's own, and how that was compared.
        same_images: The frontend's time over this library's, for the same images; None if there is no such comparison.
        same_error: The frontend's time over this library's, for an estimate with the same error; None likewise.
    """

    frontend: str
    lines: int
    agreement: str
    same_images: float | None = None
    same_error: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the cells in the order of :data:`HEADER`."""
        ratios = (
            "-" if r is None else f"{r:.2f}" if r < 10 else f"{r:.0f}" for r in (self.same_images, self.same_error)
        )
        return (self.frontend, str(self.lines), self.agreement, *ratios)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    return markdown([HEADER, *(row.cells() for row in rows)])


@dataclass(frozen=True)
class Times:
    """Seconds of the frontend and of this library, and how many times faster the library is."""

    theirs: float
    ours: float
    ratio: float


def times(theirs: Callable[[], object], ours: Callable[[], object], rounds: int = 5) -> Times:
    """Time two sides in turns on one thread, each once before that: medians, and the median of the ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs(), ours()  # the first calls load, plan and allocate
        pairs = [(_seconds(theirs), _seconds(ours)) for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Times(first, second, statistics.median(a / b for a, b in pairs))


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextlib.contextmanager
def checkout(path: Path, source: str = ".") -> Iterator[Path]:
    """Make the modules of a checkout importable within the context, and forget them afterwards.

    Args:
        path: A working copy, or a bare git directory. Of its HEAD, source files and settings are unpacked, because
            a partial clone may lack pictures and data.
        source: The folder inside it that goes on ``sys.path``.

    Yields:
        The folder of the working copy.
    """
    with contextlib.ExitStack() as stack:
        if (path / "HEAD").is_file():
            bare, path = path, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            git = ["git", f"--git-dir={bare}"]
            listed = subprocess.run([*git, "ls-tree", "-rz", "--name-only", "HEAD"], check=True, capture_output=True)
            kinds = {Path(name).suffix for name in listed.stdout.decode().split("\0")} & SOURCES
            patterns = [f"*{kind}" for kind in sorted(kinds)]
            archive = subprocess.run([*git, "archive", "HEAD", "--", *patterns], check=True, capture_output=True)
            with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
                tar.extractall(path, filter="data")
        folder, before = str((path / source).resolve()), set(sys.modules)
        sys.path.insert(0, folder)
        try:
            yield path
        finally:
            sys.path.remove(folder)
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                    del sys.modules[name]


def main(description: str, rows: Callable[[argparse.Namespace], Sequence[Row]], needs: bool = True) -> None:
    """Parse the command line of one study, and print its table.

    Args:
        description: The first line of the study's docstring.
        rows: Makes the rows from ``checkout`` (a path) and ``rounds``.
        needs: Whether the study needs a checkout.
    """
    parser = argparse.ArgumentParser(description=description)
    if needs:
        parser.add_argument("checkout", type=Path, nargs="+", help="a clone of the frontend, or its bare git directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the file that gets the rows")
    arguments = parser.parse_args()
    found = rows(arguments)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found]))
