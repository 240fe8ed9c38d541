"""``t2v-fast info``: versions, and which backends run here."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from .. import __version__, ops
from .common import console


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("info")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the versions and the state of each backend."""
    console.print(f"t2v-fast {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", markup=False)
    backends = ops.backend_status()
    for name, status in backends.items():
        console.print(f"  {name}: {status}", markup=False)
    arguments.result.update(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        backends=backends,
    )
    return 0
