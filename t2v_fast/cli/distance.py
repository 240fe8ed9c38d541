"""``t2v-fast distance``: distances between stored embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..analysis.distance import distance_rows, distances_of, nearest_tasks, symmetric
from ..embedding import escaped
from ..files import write_csv
from .common import add_embeddings, add_metric, console, load_embeddings, print_files


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("distance")
    add_embeddings(parser)
    add_metric(parser)
    parser.add_argument("--csv", type=Path, help="write the matrix here")
    parser.add_argument("--plot", type=Path, help="write a clustered heat map here (PNG or SVG)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print each task's nearest task; write the matrix and a heat map where asked for."""
    names, embeddings = load_embeddings(arguments.embeddings)
    distances = distances_of(embeddings, arguments.metric, alpha=arguments.alpha)
    table = Table("task", "nearest", arguments.metric)
    # Distances lead from the row's task to the column's: a task's nearest one is found in its column.
    nearest = nearest_tasks(distances.T)
    for i, j in enumerate(nearest):
        table.add_row(Text(escaped(names[i])), Text(escaped(names[j])), f"{distances[j, i]:.4g}")
    if arguments.progress:
        console.print(table)
    arguments.result.update(
        metric=arguments.metric,
        tasks=names,
        distances=distances.tolist(),
        nearest={names[i]: names[j] for i, j in enumerate(nearest)},
    )
    if arguments.csv:
        write_csv(arguments.csv, distance_rows(names, distances))
        print_files([arguments.csv], "distances")
    if arguments.plot:
        from ..analysis import plot

        plot.heatmap(symmetric(distances), names, arguments.plot, label=f"{arguments.metric} distance")
        print_files([arguments.plot], "heat map")
    return 0
