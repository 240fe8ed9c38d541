"""The command line ``t2v-fast``: one module for each command, whose parsers :func:`main` collects."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import bank, demo, distance, embed, fisher, info, map, merge, plot, profile, select

COMMANDS = (embed, distance, select, plot, map, demo, profile, bank, fisher, merge, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for an error in the input, or 130 after an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(
            "t2v-fast: interrupted; finished results are kept, and the same command continues from there",
            file=sys.stderr,
        )
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"t2v-fast: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t2v-fast", description="Task2Vec embeddings and diagonal Fishers, fast.")
    parser.add_argument("--version", action="version", version=f"t2v-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
