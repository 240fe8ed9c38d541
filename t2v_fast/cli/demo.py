"""``t2v-fast demo``: embed, compare and draw real tasks that need no download."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import console
from .options import SHORT_LIST, add_probe_options, add_settings, task2vec_of


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("demo")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--images", type=int, help="images of each task (default: what fits the demo's minutes)")
    add_probe_options(parser)
    add_settings(parser, SHORT_LIST)
    parser.set_defaults(run=run, size=96)  # glyphs hold no finer detail, and 224 would take five times as long


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from .. import demo

    options = {} if arguments.images is None else {"images_per_task": arguments.images}
    tasks = demo.demo_tasks(seed=arguments.seed, **options)
    found = demo.run_demo(arguments.output, task2vec_of(arguments), tasks, console)
    arguments.result.update(
        output=arguments.output,
        tasks=[t.name for t in tasks],
        distances=found.distances.tolist(),
        nearest=found.nearest,
    )
    return 0
