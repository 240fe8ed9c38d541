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
from .common import console, print_files


def add_parser(commands: Any) -> None:
    """Add the command and its actions to the parser."""
    parser = commands.add_parser("bank", shared=False)
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
    removing = action("rm", _rm, "take tasks out, so that they can be embedded again")
    removing.add_argument("tasks", nargs="+", metavar="TASK")
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
    for task in bank.tasks if arguments.progress else ():
        console.print(escaped(task), markup=False, soft_wrap=True)
    console.print(f"{len(bank)} tasks, {len(bank.failed)} failed")
    arguments.result.update(tasks=bank.tasks, failed=len(bank.failed))
    return 0


def _failed(arguments: argparse.Namespace) -> int:
    failed = _open(arguments).failed
    for task, error in failed.items():
        console.print(escaped(f"{task}: {error}"), markup=False, soft_wrap=True)
    arguments.result.update(failed=failed)
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    tasks = _open(arguments).retry(arguments.tasks or None)
    console.print(f"{len(tasks)} task{'s' * (len(tasks) != 1)} will be run again")
    arguments.result.update(tasks=tasks)
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    tasks = list(dict.fromkeys(arguments.tasks))
    if not tasks:  # `rm BANK -- --`
        raise ValueError("no task to take out")
    _open(arguments).remove(*tasks)
    console.print(f"{len(tasks)} task{'s' * (len(tasks) != 1)} taken out")
    arguments.result.update(tasks=tasks)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    count = export(_open(arguments), arguments.path, arguments.form)
    print_files([arguments.path], f"{count} tasks")
    arguments.result.update(tasks=count, path=arguments.path)
    return 0


def _nearest(arguments: argparse.Namespace) -> int:
    bank = _open(arguments)
    query = arguments.query
    if query not in bank:
        if not Path(query).is_file():
            raise ValueError(f"{query!r} is neither a task of bank {bank.folder} nor a file")
        query = Embedding.load(query)
    table = Table("task", arguments.metric)
    found = bank.nearest(query, arguments.k, arguments.metric, exact=arguments.exact)
    for task, d in found:
        table.add_row(Text(escaped(task)), f"{d:.4g}")
    if arguments.progress:
        console.print(table)
    arguments.result.update(metric=arguments.metric, nearest=found)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if not is_bank(arguments.bank):
        _open(arguments)  # says why
    problems = verify(arguments.bank)  # also where the bank cannot be opened
    arguments.result.update(problems=problems)
    for problem in problems.values():
        console.print(escaped(problem), markup=False, soft_wrap=True)
    if problems:
        console.print(f"{len(problems)} problem{'s' * (len(problems) != 1)} in {escaped(str(arguments.bank))}")
        return 1
    bank = _open(arguments)
    console.print(f"all {len(bank)} tasks are whole")
    return 0


def _repair(arguments: argparse.Namespace) -> int:
    lines = Bank.repair(arguments.bank)
    for line in lines:
        console.print(f"repaired: {escaped(line)}", markup=False, soft_wrap=True)
    arguments.result.update(repaired=lines)
    return 0
