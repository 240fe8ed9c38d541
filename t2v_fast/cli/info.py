"""``t2v-fast info``: versions, and which backends run here."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from .. import __version__, ops
from .common import console

BFLOAT16 = "fast, the processor has instructions for it"
NO_BFLOAT16 = "no faster than float32, as the processor has no instructions for it and multiplies in float32"


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("info")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the versions and the state of each backend."""
    console.print(f"t2v-fast {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", markup=False)
    backends = ops.backend_status()
    instructions = ops.cpu_capability() if backends["cpu"] == "available" else None
    console.print(f"  processor: {platform.machine()}, kernels for {instructions or 'none'}", markup=False)
    narrow = BFLOAT16 if ops.multiplies_bfloat16() else NO_BFLOAT16
    console.print(f"  bfloat16 on it: {narrow}", markup=False)
    for name, status in backends.items():
        console.print(f"  {name}: {status}", markup=False)
    arguments.result.update(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        processor=platform.machine(),
        instruction_set=instructions,
        multiplies_bfloat16=ops.multiplies_bfloat16(),
        backends=backends,
    )
    return 0
