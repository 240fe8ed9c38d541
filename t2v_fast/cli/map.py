"""``t2v-fast map``: an interactive map of stored embeddings, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_embeddings, add_metric, families_of, load_embeddings, print_files


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("map")
    add_embeddings(parser)
    add_metric(parser)
    parser.add_argument("--output", type=Path, default=Path("map.html"), help="the HTML file (default: %(default)s)")
    parser.add_argument("--title", default="Map of tasks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from ..analysis import page

    names, embeddings = load_embeddings(arguments.embeddings)
    page.write_map(
        embeddings,
        names,
        arguments.output,
        families=families_of(embeddings),
        metric=arguments.metric,
        alpha=arguments.alpha,
        title=arguments.title,
    )
    print_files([arguments.output], "map")
    arguments.result.update(path=arguments.output, tasks=names)
    return 0
