"""``t2v-fast merge``: average checkpoints by their Fishers, without any whole model in memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..adapters.merging import merge_checkpoints
from .common import console


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("merge")
    parser.add_argument("models", type=Path, nargs="+", help="safetensors files, or folders of them with an index")
    parser.add_argument(
        "--fishers", type=Path, nargs="+", required=True, help="the Fisher of each model, as t2v-fast fisher writes it"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument("--weights", type=float, nargs="+", help="the weight of each model (default: equal)")
    parser.add_argument(
        "--floor", type=float, default=1e-6, help="added to each Fisher, relative to its mean (default: %(default)s)"
    )
    parser.add_argument("--minimum", type=float, default=0.0, help="replaces smaller values (default: %(default)s)")
    parser.add_argument(
        "--no-normalize", action="store_true", help="do not divide each Fisher by its mean, as r-three/mats"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and say where the files are."""
    files = merge_checkpoints(
        arguments.models,
        arguments.fishers,
        arguments.output,
        arguments.weights,
        floor=arguments.floor,
        minimum=arguments.minimum,
        normalize=not arguments.no_normalize,
    )
    arguments.result.update(models=len(arguments.models), files=[str(file) for file in files])
    console.print(f"{len(arguments.models)} models merged into {arguments.output} ({len(files)} files)", markup=False)
    return 0
