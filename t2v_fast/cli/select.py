"""``t2v-fast select``: choose an expert or a pretrained network for a task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..analysis.distance import ALPHA, asymmetric_distance, pdist
from ..files import write_csv
from . import zoo
from .common import add_embeddings, console, load_embeddings


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("select")
    add_embeddings(parser)
    parser.add_argument(
        "--errors",
        type=Path,
        help="CSV of test errors: a column for each expert, named as the task that it was trained on; a row for each "
        "task; empty where an expert is not to be used. Errors of experts on their own tasks have no effect. With "
        "--zoo, the columns are named as the networks",
    )
    parser.add_argument("--task", action="append", help="a task to choose for (default: all that have no errors yet)")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the asymmetric distance (default: %(default)s)")
    parser.add_argument("--floor", type=float, default=0.0, help="the smallest error by which increases are divided")
    parser.add_argument(
        "--csv", type=Path, help="write the experts' distances from the tasks here, or the ranking of a zoo"
    )
    zoo.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the experts for each task, nearest first, and the cost of each way to choose."""
    from ..analysis import selection

    if arguments.zoo is None and arguments.errors is None:
        raise ValueError("give --errors with embeddings of tasks, or --zoo with one folder of images")
    if arguments.zoo is not None:
        return zoo.run(arguments)
    names, loaded = load_embeddings(arguments.embeddings)
    known = dict(zip(names, loaded, strict=True))
    if len(known) < len(names):
        raise ValueError("two embeddings are of tasks of one name, so the table of errors does not say which is meant")
    tasks, experts, errors = selection.read_errors(arguments.errors)
    for name in [*experts, *tasks, *(arguments.task or ())]:
        if name not in known:
            raise ValueError(f"no embedding of {name!r}: there are {', '.join(names)}")
    of_experts = [known[name] for name in experts]
    errors = selection.without_own(errors, of_experts, [known[name] for name in tasks])
    tasks, errors = selection.with_errors(tasks, errors)
    if not tasks:
        raise ValueError(f"{arguments.errors} has only errors of experts on their own tasks: add some on other tasks")
    of_tasks = [known[name] for name in tasks]
    wanted = arguments.task or [name for name in names if name not in tasks]
    if wanted:
        chosen_for = [known[name] for name in wanted]
        distances = asymmetric_distance(of_experts, chosen_for, alpha=arguments.alpha)
        model = selection.Model2Vec(arguments.alpha).fit(of_experts, of_tasks, errors)
        learned = model.distances(chosen_for)
        for k, name in enumerate(wanted):
            table = Table("expert", "Model2Vec", "asymmetric", "symmetric", title=f"for {name}")
            symmetric = pdist([*of_experts, known[name]])[-1, :-1]
            others = [int(j) for j in np.argsort(learned[:, k], kind="stable") if experts[j] != name]  # not its own
            ranked = arguments.result.setdefault("experts", {})
            ranked[name] = [{"expert": experts[j], "distance": float(learned[j, k])} for j in others]
            for j in others:
                cells = (f"{d[j]:.4f}" for d in (learned[:, k], distances[:, k], symmetric))
                table.add_row(Text(experts[j]), *cells)
            if arguments.progress:
                console.print(table)
        if arguments.csv:
            rows = [[e, *map(repr, row.tolist())] for e, row in zip(experts, learned, strict=True)]
            write_csv(arguments.csv, [["expert", *wanted], *rows])
            console.print(f"Model2Vec distances -> {arguments.csv}", markup=False)
    table = Table(title="increase of the error over the best expert, on the tasks of the table")
    header, *rows = selection.increase_rows(
        selection.compare(of_experts, of_tasks, errors, alpha=arguments.alpha, floor=arguments.floor, names=tasks)
    )
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    if arguments.progress:
        console.print(table)
    arguments.result["increases"] = [header, *rows]
    return 0
