"""``t2v-fast profile``: where the time of a Fisher goes, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..tasks.precision import dtype_of
from .common import console
from .options import SHORT_LIST, add_probe_options, add_settings, task2vec_of


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("profile", help="where the time of a Fisher goes, layer by layer")
    parser.add_argument("--classes", type=int, default=10, help="classes of the head (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured (default: %(default)s)")
    parser.add_argument("--slowest", type=int, help="show only this many layers")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--trace", type=Path, help="write one batch here, for chrome://tracing or ui.perfetto.dev")
    parser.add_argument("--plot", type=Path, help="write a roofline picture here (PNG or SVG)")
    add_probe_options(parser)
    add_settings(parser, SHORT_LIST)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure a Fisher of random images, and report it."""
    from ..estimation.profiling import profile

    task2vec = task2vec_of(arguments)
    probe, size = task2vec.probe, task2vec.probe.preprocessing.crop
    generator = torch.Generator().manual_seed(arguments.seed)
    images = torch.randn(task2vec.batch_size, 3, size, size, generator=generator)
    images = images.to(task2vec.device, dtype_of(probe.network))
    torch.manual_seed(arguments.seed)
    head = torch.nn.Linear(probe.feature_dim, arguments.classes).to(images)
    with probe.with_head(head) as network:
        report = profile(
            network,
            images,
            arguments.estimator,
            arguments.samples,
            labels=torch.zeros(task2vec.batch_size, dtype=torch.long),
            parameters=probe.embedding_parameters(),
            rounds=arguments.rounds,
        )
    console.print(report.table(arguments.slowest))
    console.print(report.summary(), markup=False)
    if arguments.json is not None:
        report.save_json(arguments.json)
    if arguments.trace is not None:
        report.save_trace(arguments.trace)
    if arguments.plot is not None:
        from ..analysis.plot import roofline  # matplotlib takes a second to import

        roofline(report, arguments.plot)
    for path in filter(None, (arguments.json, arguments.trace, arguments.plot)):
        console.print(f"-> {path}", markup=False)
    return 0
