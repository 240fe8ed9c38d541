"""``t2v-fast completion``: the script by which a shell completes commands and options."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("completion")
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        ImportError: The package shtab, which writes the script, is not installed.
    """
    from . import _parser

    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion needs the package shtab: pip install 't2v-fast[completion]'") from error
    script = shtab.complete(_parser(), arguments.shell)
    arguments.result.update(shell=arguments.shell, script=script)
    if arguments.json != "-":
        print(script)
    return 0
