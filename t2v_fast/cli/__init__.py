"""The command line ``t2v-fast``: one module for each command. Only the module of the wanted command is imported."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__

COMMANDS = {
    "embed": "embed image folders (one sub-folder a class), or the tasks of a job file",
    "distance": "distances between stored embeddings",
    "select": "which expert or pretrained network to use for a task",
    "plot": "draw stored embeddings, as PNG or SVG",
    "map": "an interactive map of stored embeddings, as one HTML page",
    "demo": "embed, compare and draw real tasks that need no download",
    "profile": "where the time of a Fisher or of a job goes",
    "bank": "look at, search, repair and export a bank of embeddings",
    "fisher": "the diagonal Fisher of a language model, as a checkpoint of the same keys",
    "merge": "average checkpoints of one architecture, weighted by their Fishers",
    "completion": "a script for bash, zsh or fish that completes commands and options",
    "info": "versions, and which backends run here or why not",
}
EPILOG = (
    "exit status: 0 for success; 1 for an error in the input, tasks that failed or a bank that is damaged; 2 for a "
    "command line that is not understood; 130 after an interrupt; 141 if the reader of the output has gone"
)
CLOSED = 141  # 128 + 13, the number of SIGPIPE: what a shell reports of other programs


class _Parser(argparse.ArgumentParser):
    """A parser whose flags cannot be abbreviated, with the options that all commands share.

    Args:
        shared: whether to add ``--json`` and ``--quiet``, which a command may replace by its own.
    """

    def __init__(self, *, shared: bool = True, **options: Any) -> None:
        super().__init__(allow_abbrev=False, conflict_handler="resolve", **options)
        if shared:
            self.add_argument("--json", metavar="FILE", help="write the result here as JSON; - is the standard output")
            self.add_argument(
                "-q", "--quiet", dest="progress", action="store_false", help="show no progress and no tables"
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        flag = next((a for a in unknown if a.startswith("-")), None)
        if flag is not None:
            self.error(f"{flag.partition('=')[0]} is no option of `{self.prog}`{self._near(flag.partition('=')[0])}")
        return found, unknown

    def _near(self, flag: str) -> str:
        """A hint that names the options that may be meant."""
        known = [o for o in self._option_string_actions if o.startswith("--")]
        near = [o for o in known if o.startswith(flag)] or difflib.get_close_matches(flag, known, 2)
        return f": did you mean {' or '.join(near)}?" if near else ""

    def error(self, message: str) -> NoReturn:
        from ..embedding import escaped

        super().error(escaped(message))


class _Commands(argparse._SubParsersAction):
    """Gives each command its line of help, without which neither the help nor a completion would show the command."""

    def add_parser(self, name: str, **options: Any) -> Any:
        return super().add_parser(name, **{"help": COMMANDS[name], **options})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for an error in the input, 130 after an interrupt, or 141 if the reader of the standard
        output has gone, as ``head`` does when it has its lines. A command line that is not understood exits with 2.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when the process ends.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return CLOSED


def _reader_has_gone() -> bool:
    """Whether the standard output is a pipe that nobody reads any more."""
    try:
        from select import poll  # not at the top, where the command of this name would replace the module

        output = poll()
        output.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
    except (ImportError, OSError, ValueError):  # a system without poll, or an output that is no file
        return False
    return bool(output.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(next((a for a in argv if not a.startswith("-")), "")).parse_args(argv)
    from . import common

    result: dict[str, Any] = {}
    arguments.result = result  # what commands fill in for --json
    common.console.quiet = arguments.json == "-"
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        message, status = "interrupted; finished results are kept, and the same command continues from there", 130
        print(f"t2v-fast: {message}", file=sys.stderr)
        result["error"] = message
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        status, result["error"] = 1, str(error)
        print(f"t2v-fast: error: {common.readable(error)}", file=sys.stderr)
    finally:
        common.console.quiet = False
    if arguments.json is None:
        return status
    try:
        common.write_json(arguments.json, {"status": status, **result})
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        print(f"t2v-fast: error: {common.readable(error)}", file=sys.stderr)
        return 1
    return status


def _parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line. Only the ``wanted`` command has its options; by default all of them."""
    parser = _Parser(
        prog="t2v-fast", shared=False, description="Task2Vec embeddings and diagonal Fishers, fast.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"t2v-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, action=_Commands)
    for command, text in COMMANDS.items():
        if wanted in (None, command):
            importlib.import_module(f".{command}", __name__).add_parser(commands)
            commands.choices[command].description = text
        else:
            commands.add_parser(command)
    return parser


def __getattr__(name: str) -> ModuleType:
    if name in COMMANDS or name in ("common", "options"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
