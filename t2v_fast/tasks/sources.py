"""Labelled images in other forms than folders: tables, Hugging Face data sets and WebDataset shards.

Nothing in this module runs code from the data or unpacks an archive to the disk.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data import IMAGE_SUFFIXES, DataError, TaskData, contents_of, open_image


class Table:
    """A CSV file with a header. One column has the paths of images, the other columns have labels.

    ``resolve`` turns a path of the table into a path to open, or raises ValueError. ``labels`` are the columns to read,
    by default all but the paths. Raises DataError, which names the file and what is wrong.
    """

    def __init__(
        self, file: Path, path: str, labels: Sequence[str] | None, resolve: Callable[[str], Path], task: str
    ) -> None:
        where, self.folder = f"task {task!r}: {file}", file.parent.resolve()
        try:
            with open(file, newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.reader(stream, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{where} cannot be read: {error}") from None
        header = rows[0] if rows else []
        if len(set(header)) < len(header):
            raise DataError(f"{where} names a column twice: {', '.join(header)}")
        if labels is None:
            labels = [name for name in header if name != path]
        for name in (path, *labels):
            if name not in header:
                raise DataError(f"{where} has no column {name!r}; it has {', '.join(header) or 'no header'}")
        if not labels:
            raise DataError(f"{where} has no column of labels beside {path!r}")
        for number, row in enumerate(rows[1:], 2):
            if len(row) != len(header):
                raise DataError(f"{where}, line {number} has {len(row)} cells, expected {len(header)}")
        if len(rows) < 2:
            raise DataError(f"{where} has no row")
        place = {name: header.index(name) for name in (path, *labels)}
        try:
            self.paths = [resolve(row[place[path]]) for row in rows[1:]]
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        self.cells = {
            name: [row[place[name]] for row in rows[1:]] for name in labels
        }  # text; empty where a label is unknown

    def contents(self, labels: Sequence[str]) -> str:
        """See :func:`~t2v_fast.tasks.data.contents_of`."""
        rows = zip(self.paths, *(self.cells[label] for label in labels), strict=True)
        return contents_of((repr((os.path.relpath(path, self.folder), *cells)), path) for path, *cells in rows)

    def images(self, keep: Sequence[int], labels: Sequence | np.ndarray) -> _Files:
        """A map-style data set of the rows ``keep``, with their labels."""
        return _Files([self.paths[k] for k in keep], labels)


class _Files:
    def __init__(self, paths: Sequence[Path], labels: Sequence | np.ndarray) -> None:
        self.paths, self.labels = paths, labels

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return open_image(self.paths[index]), self.labels[index]


def encode(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return codes [N] of labels that are text, and the sorted classes. Whole numbers are sorted by size.

    >>> encode(["10", "9", "10"])
    (array([1, 0, 1]), ['9', '10'])
    """
    whole = all(v.removeprefix("-").isdecimal() and len(v) < 20 for v in values)
    classes = sorted(set(values), key=(lambda v: (int(v), v)) if whole else None)
    codes = {name: code for code, name in enumerate(classes)}
    return np.array([codes[v] for v in values], dtype=np.int64), classes


def table_task(table: Table, label: str, name: str, skip_unreadable: bool) -> TaskData:
    """One column of a table as a task. Rows with an empty cell are left out."""
    cells = table.cells[label]
    keep = [k for k, cell in enumerate(cells) if cell]
    if not keep:
        raise DataError(f"task {name!r}: column {label!r} is empty")
    codes, classes = encode([cells[k] for k in keep])
    files = table.images(keep, codes)
    task = TaskData(files, name, "multiclass", classes, files.describe, skip_unreadable)
    task.contents = partial(table.contents, [label])
    return task


def multilabel_task(table: Table, labels: Sequence[str], name: str, skip_unreadable: bool) -> TaskData:
    """Several columns of 0 and 1 as one multi-label task."""
    for label in labels:
        for row, cell in enumerate(table.cells[label], 2):
            if cell not in ("0", "1"):
                raise DataError(f"task {name!r}: column {label!r}, line {row} is {cell[:80]!r}, expected 0 or 1")
    targets = np.array([table.cells[label] for label in labels], dtype=np.int64).T
    files = table.images(range(len(targets)), targets)
    task = TaskData(files, name, "multilabel", list(labels), files.describe, skip_unreadable)
    task.contents = partial(table.contents, labels)
    return task


def saved_dataset(folder: Path, image: str, label: str, name: str, skip_unreadable: bool) -> TaskData:
    """A Hugging Face data set that ``save_to_disk`` wrote. Needs the package ``datasets``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"task {name!r} needs the package 'datasets': pip install datasets ({error})") from error
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files make it fail with almost anything
        raise DataError(f"task {name!r}: {folder} is no data set that save_to_disk wrote: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        raise DataError(
            f"task {name!r}: {folder} holds the splits {', '.join(data)}: name one, {folder}/{next(iter(data))}"
        )
    for column in (image, label):
        if column not in data.column_names:
            raise DataError(f"task {name!r}: {folder} has no column {column!r}; it has {', '.join(data.column_names)}")
    feature = data.features[label]
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    labels = data[label][:] if not isinstance(data[label], list) else data[label]
    if labels and isinstance(labels[0], str):
        labels, classes = encode(labels)
    source = _Saved(data, image, labels)
    return TaskData(source, name, "multiclass", classes, f"{folder}, row {{}}".format, skip_unreadable)


class _Saved:
    def __init__(self, data: Any, image: str, labels: Sequence | np.ndarray) -> None:
        self.data, self.image, self.labels = data, image, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            image = self.data[index][self.image]
        except Exception as error:  # as in open_image
            raise OSError(str(error) or type(error).__name__) from error
        return np.asarray(image, dtype=np.uint8) if isinstance(image, list) else image, self.labels[index]


def shards_task(shards: Sequence[Path], label: str, name: str, skip_unreadable: bool) -> TaskData:
    """WebDataset shards: tar archives in which the files ``KEY.jpg`` and ``KEY.LABEL`` (text) make an example.

    Archives are not unpacked. The names of their members only say which files belong together.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}  # key: {suffix: (shard, offset, size)}
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, _, file = member.name.rpartition("/")
                        stem, _, suffix = file.partition(".")
                        place = number, member.offset_data, member.size
                        samples.setdefault(f"{number} {folder}/{stem}", {})[suffix.lower()] = place
        except (OSError, tarfile.TarError, ValueError, EOFError) as error:
            raise DataError(f"task {name!r}: {shard} is no tar archive that can be read: {error}") from None
    images, labels = [], []
    for key, files in samples.items():
        image = next((place for suffix, place in files.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
        if image is None or label not in files:
            what = f"no file .{label}" if image else "no image"
            raise DataError(
                f"task {name!r}: example {key.split(' ', 1)[1]!r} of {shards[int(key.split()[0])]} has {what}"
            )
        images.append((key.split(" ", 1)[1], *image))
        labels.append(_read_label(shards, files[label], name, key))
    if not images:
        raise DataError(f"task {name!r}: {', '.join(map(str, shards))} hold no example")
    codes, classes = encode(labels)
    source = _Members(list(shards), images, codes)
    return TaskData(source, name, "multiclass", classes, source.describe, skip_unreadable)


def _read_at(shards: Sequence[Path], place: tuple[int, int, int]) -> bytes:
    shard, offset, size = place
    with open(shards[shard], "rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_label(shards: Sequence[Path], place: tuple[int, int, int], name: str, key: str) -> str:
    try:
        text = _read_at(shards, (place[0], place[1], min(place[2], 1000))).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task {name!r}: the label of {key.split(' ', 1)[1]!r} is no text: {error}") from None
    if not text:
        raise DataError(f"task {name!r}: the label of {key.split(' ', 1)[1]!r} is empty")
    return text


class _Members:
    def __init__(self, shards: list[Path], images: list[tuple[str, int, int, int]], labels: np.ndarray) -> None:
        self.shards, self.images, self.labels = shards, images, labels

    def describe(self, index: int) -> str:
        return f"{self.images[index][0]} in {self.shards[self.images[index][1]]}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return open_image(io.BytesIO(_read_at(self.shards, self.images[index][1:]))), self.labels[index]


def pool(table: Table, labels: Mapping[str, str]) -> tuple[_Files, dict[str, tuple[np.ndarray, list[str]]]] | None:
    """The images of a table, and codes and classes for several tasks, given as {task: column}.

    None if a column has an empty cell, because then the tasks do not have the same images.
    """
    if not all(cell for column in labels.values() for cell in table.cells[column]):
        return None
    n = len(table.paths)
    return table.images(range(n), range(n)), {task: encode(table.cells[column]) for task, column in labels.items()}
