"""``t2v-fast plot``: pictures of stored embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..analysis.distance import distances_of, symmetric
from .common import add_embeddings, add_metric, families_of, load_embeddings, print_files

KINDS = ("heatmap", "dendrogram", "map", "layers")


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("plot")
    add_embeddings(parser)
    parser.add_argument("--kind", default="heatmap", choices=KINDS)
    add_metric(parser)
    parser.add_argument("--output", type=Path, help="a file that ends in .png or .svg (default: KIND.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture."""
    from ..analysis import plot

    names, embeddings = load_embeddings(arguments.embeddings)
    path = arguments.output or Path(f"{arguments.kind}.png")
    if arguments.kind == "layers":
        plot.layer_profile(embeddings, names, path)
    else:
        distances = symmetric(distances_of(embeddings, arguments.metric, alpha=arguments.alpha))
        draw = {"heatmap": plot.heatmap, "dendrogram": plot.dendrogram, "map": plot.task_map}[arguments.kind]
        options = {} if arguments.kind == "map" else {"label": f"{arguments.metric} distance"}
        draw(distances, names, path, families=families_of(embeddings), **options)
    print_files([path], arguments.kind)
    arguments.result.update(path=path, kind=arguments.kind, tasks=names)
    return 0
