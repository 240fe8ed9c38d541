"""``t2v-fast bank``: look at, search, repair and export a bank of embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..analysis.distance import METRICS
from ..bank.export import FORMS, export
from ..bank.recovery import is_bank, verify
from ..bank.store import Bank
from ..embedding import Embedding, escaped
from .common import console


def add_parser(commands: Any) -> None:
    """Add the command and its actions to the parser."""
    parser = commands.add_parser("bank", help="look at, search, repair and export a bank of embeddings")
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text)
        sub.add_argument("bank", type=Path, metavar="BANK")
        sub.set_defaults(run=run)
        return sub

    action("ls", _ls, "finished tasks")
    action("failed", _failed, "failed tasks and their errors")
    retry = action("retry", _retry, "let failed tasks run again in the next `embed --job`")
    retry.add_argument("tasks", nargs="*", metavar="TASK", help="default: all that failed")
    exporting = action("export", _export, "write all finished tasks in another form")
    exporting.add_argument("path", type=Path, metavar="PATH")
    exporting.add_argument("--form", default="numpy", choices=FORMS)
    nearest = action("nearest", _nearest, "the tasks nearest to one")
    nearest.add_argument("query", metavar="TASK", help="a task of the bank, or a file that `embed` wrote")
    nearest.add_argument("-k", type=int, default=10)
    nearest.add_argument("--metric", default="cosine", choices=METRICS)
    nearest.add_argument("--exact", action="store_true", help="measure all tasks, not only an index's candidates")
    action("verify", _verify, "compare everything with its checksums and copies")
    action("repair", _repair, "restore files from each other, and take out what is damaged, so that it is run again")


def _open(arguments: argparse.Namespace) -> Bank:
    return Bank(arguments.bank, create=False)


def _ls(arguments: argparse.Namespace) -> int:
    bank = _open(arguments)
    for task in bank.tasks:
        print(task)
    print(f"{len(bank)} tasks, {len(bank.failed)} failed")
    return 0


def _failed(arguments: argparse.Namespace) -> int:
    for task, error in _open(arguments).failed.items():
        print(escaped(f"{task}: {error}"))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    tasks = _open(arguments).retry(arguments.tasks or None)
    print(f"{len(tasks)} task{'s' * (len(tasks) != 1)} will be run again")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    print(f"{export(_open(arguments), arguments.path, arguments.form)} tasks -> {arguments.path}")
    return 0


def _nearest(arguments: argparse.Namespace) -> int:
    bank = _open(arguments)
    query = arguments.query
    if query not in bank:
        if not Path(query).is_file():
            raise ValueError(f"{query!r} is neither a task of bank {bank.folder} nor a file")
        query = Embedding.load(query)
    table = Table("task", arguments.metric)
    for task, d in bank.nearest(query, arguments.k, arguments.metric, exact=arguments.exact):
        table.add_row(Text(escaped(task)), f"{d:.4g}")
    console.print(table)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if not is_bank(arguments.bank):
        _open(arguments)  # says why
    problems = verify(arguments.bank)  # also where the bank cannot be opened
    for problem in problems.values():
        print(escaped(problem))
    if problems:
        print(f"{len(problems)} problem{'s' * (len(problems) != 1)} in {escaped(str(arguments.bank))}")
        return 1
    bank = _open(arguments)
    print(f"all {len(bank)} tasks are whole")
    return 0


def _repair(arguments: argparse.Namespace) -> int:
    for line in Bank.repair(arguments.bank):
        print(f"repaired: {escaped(line)}")
    return 0
