"""``t2v-fast distance``: distances between stored embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..analysis.distance import (
    ALPHA,
    METRICS,
    asymmetric_distance,
    centred_distance,
    distance_rows,
    nearest_tasks,
    pdist,
)
from ..files import write_csv
from .common import add_embeddings, console, load_embeddings


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("distance", help="distances between stored embeddings")
    add_embeddings(parser)
    parser.add_argument(
        "--metric",
        default="cosine",
        choices=[*METRICS, "asymmetric", "centred"],
        help="asymmetric: the paper's, from the row's task to the column's, on top of cosine; centred: by what sets "
        "the tasks apart from each other, for a dozen tasks and more (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the asymmetric distance (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write the matrix here")
    parser.add_argument("--plot", type=Path, help="write a clustered heat map here (PNG or SVG)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print each task's nearest task; write the matrix and a heat map where asked for."""
    names, embeddings = load_embeddings(arguments.embeddings)
    if arguments.metric == "asymmetric":
        distances = asymmetric_distance(embeddings, embeddings, alpha=arguments.alpha)
    elif arguments.metric == "centred":
        distances = centred_distance(embeddings)
    else:
        distances = pdist(embeddings, metric=arguments.metric)
    table = Table("task", "nearest", arguments.metric)
    # Distances lead from the row's task to the column's: a task's nearest one is found in its column.
    for i, j in enumerate(nearest_tasks(distances.T)):
        table.add_row(Text(names[i]), Text(names[j]), f"{distances[j, i]:.4g}")
    console.print(table)
    if arguments.csv:
        write_csv(arguments.csv, distance_rows(names, distances))
        console.print(f"distances -> {arguments.csv}", markup=False)
    if arguments.plot:
        from ..analysis import plot

        plot.heatmap((distances + distances.T) / 2, names, arguments.plot, label=f"{arguments.metric} distance")
        console.print(f"heat map -> {arguments.plot}", markup=False)
    return 0
