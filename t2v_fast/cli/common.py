"""What several commands share: the console, JSON results, and the stored embeddings that they read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..analysis.distance import ALL_METRICS, ALPHA
from ..bank.recovery import is_bank
from ..bank.store import Bank
from ..embedding import Embedding, FingerprintMismatch, escaped, first_of
from ..files import write_atomically


class _Console(Console):
    """A console whose errors reach :func:`t2v_fast.cli.main`."""

    def on_broken_pipe(self) -> None:
        raise  # the error of the failed write; rich would exit with status 1


console = _Console(highlight=False)


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that :func:`load_embeddings` takes."""
    parser.add_argument(
        "embeddings", nargs="+", type=Path, metavar="FILE", help="files that `embed` wrote, folders of them, and banks"
    )


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the distance, and the ``--alpha`` of one of them."""
    parser.add_argument(
        "--metric",
        default="cosine",
        choices=ALL_METRICS,
        help="asymmetric: the paper's, from the row's task to the column's, on top of cosine; centred: by what sets "
        "the tasks apart from each other, for a dozen tasks and more (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the asymmetric distance (default: %(default)s)")


def load_embeddings(given: Sequence[Path]) -> tuple[list[str], list[Embedding]]:
    """The names of the tasks and the embeddings in files, folders and banks; ValueError for fewer than two."""
    names: list[str] = []
    embeddings: list[Embedding] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        if path.is_dir() and is_bank(path):
            if beside := next(path.glob("*.safetensors"), None):
                raise ValueError(f"{path} is a bank, but has the file {beside.name}, too: move the file elsewhere")
            stored = list(Bank(path, create=False))
            names += [str(e.meta["task"]) for e in stored]  # without which nothing goes into a bank
            embeddings += stored
            continue
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            embeddings.append(Embedding.load(file))
            names.append(str(embeddings[-1].meta.get("task") or file.stem))
    if len(embeddings) < 2:
        raise ValueError(
            f"distances need at least two embeddings, found {len(embeddings)} in {', '.join(map(str, given))}: "
            "expected files that `t2v-fast embed` wrote, folders of them, or banks with finished tasks"
        )
    _check_settings(names, embeddings)
    return names, embeddings


def _check_settings(names: Sequence[str], embeddings: Sequence[Embedding]) -> None:
    """Raise FingerprintMismatch, in lines that a person can read, unless all embeddings have the same settings."""
    lines = []
    for key in sorted({key for e in embeddings for key in e.fingerprint}):
        groups: dict[str, list[str]] = {}
        for name, e in zip(names, embeddings, strict=True):
            groups.setdefault(json.dumps(e.fingerprint.get(key)), []).append(name)
        if len(groups) > 1:
            lines.append(f"  {key}:")
            for value, tasks in groups.items():
                text = value if len(value) <= 60 else f"{value[:57]}..."
                lines.append(f"    {text}: {first_of(tasks)}")
    if lines:
        head = "these embeddings cannot be compared, because they were made with different settings:"
        raise FingerprintMismatch("\n".join([head, *lines, "  compare those of one kind, or embed the others again"]))


def families_of(embeddings: Sequence[Embedding]) -> list[str] | None:
    """The families of tasks in ``meta["family"]``; None unless every embedding has one."""
    families = [e.meta.get("family") for e in embeddings]
    return [str(f) for f in families] if all(families) else None


def readable(error: BaseException) -> str:
    """The text of an error as it may be shown on a terminal."""
    return "\n".join(map(escaped, str(error).splitlines())) or type(error).__name__


def print_files(paths: Iterable[Path | str | None], what: str = "") -> None:
    """Print where results went."""
    for path in paths:
        if path is not None and str(path) != "-":
            console.print(f"{what} -> {escaped(str(path))}".lstrip(), markup=False)


def write_json(path: str | Path, content: Any) -> None:
    """Write a result as JSON to a file, or for ``-`` to the standard output. Infinite numbers become null."""
    text = json.dumps(_finite(content), indent=1)
    if str(path) == "-":
        print(text)
    else:
        write_atomically(path, f"{text}\n".encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
