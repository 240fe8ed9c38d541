"""``t2v-fast plot``: pictures of stored embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..analysis.distance import METRICS, pdist
from .common import add_embeddings, console, families_of, load_embeddings


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("plot", help="draw stored embeddings, as PNG or SVG")
    add_embeddings(parser)
    parser.add_argument("--kind", default="heatmap", choices=["heatmap", "dendrogram", "map", "layers"])
    parser.add_argument("--metric", default="cosine", choices=METRICS)
    parser.add_argument("--output", type=Path, required=True, help="a file that ends in .png or .svg")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture."""
    from ..analysis import plot

    names, embeddings = load_embeddings(arguments.embeddings)
    if arguments.kind == "layers":
        plot.layer_profile(embeddings, names, arguments.output)
    else:
        distances = pdist(embeddings, arguments.metric)
        draw = {"heatmap": plot.heatmap, "dendrogram": plot.dendrogram, "map": plot.task_map}[arguments.kind]
        options = {} if arguments.kind == "map" else {"label": f"{arguments.metric} distance"}
        symmetric = (distances + distances.T) / 2
        draw(symmetric, names, arguments.output, families=families_of(embeddings), **options)
    console.print(f"{arguments.kind} -> {arguments.output}", markup=False)
    return 0
