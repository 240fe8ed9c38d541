"""What several commands share: the console, and the stored embeddings that they read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..embedding import Embedding

console = Console(highlight=False)


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that :func:`load_embeddings` takes."""
    parser.add_argument("embeddings", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")


def load_embeddings(given: Sequence[Path]) -> tuple[list[str], list[Embedding]]:
    """The names of the tasks and the embeddings in files and folders; ValueError for fewer than two."""
    paths = []
    for path in given:
        paths += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(paths) < 2:
        raise ValueError(f"distances need at least two embeddings, found {len(paths)}")
    embeddings = [Embedding.load(path) for path in paths]
    return [str(e.meta.get("task") or path.stem) for e, path in zip(embeddings, paths, strict=True)], embeddings


def families_of(embeddings: Sequence[Embedding]) -> list[str] | None:
    """The families of tasks in ``meta["family"]``; None unless every embedding has one."""
    families = [e.meta.get("family") for e in embeddings]
    return [str(f) for f in families] if all(families) else None
