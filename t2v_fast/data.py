"""Any labelled data set as batches of prepared images, the same in every pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
TASK_TYPES = ("multiclass", "multilabel")


class DataError(ValueError):
    """Data that cannot be used; the message names the task and the image."""


class TaskData:
    """A labelled data set that can be visited twice in the same order.

    Make one with :meth:`of`. ``classes`` are names where the data has them (a folder's sub-folders); ``skipped`` lists
    the unreadable files that ``skip_unreadable`` left out, and is complete after a pass.
    """

    def __init__(
        self,
        source: Sequence | Iterable,
        name: str | None,
        task_type: str,
        classes: list[str] | None = None,
        describe: Callable[[int], str] = lambda index: f"image {index}",
        skip_unreadable: bool = False,
    ) -> None:
        if task_type not in TASK_TYPES:
            raise ValueError(f"unknown task_type {task_type!r}: expected one of {', '.join(TASK_TYPES)}")
        self.source, self.name, self.task_type, self.classes = source, name, task_type, classes
        self.describe, self.skip_unreadable = describe, skip_unreadable
        self.skipped: list[str] = []
        self._labels: Tensor | None = None  # of the first complete pass

    @classmethod
    def of(
        cls, data: Any, *, name: str | None = None, task_type: str = "multiclass", skip_unreadable: bool = False
    ) -> TaskData:
        """``data``: (images, labels) arrays or tensors, images first axis N; a folder with one sub-folder of images a
        class; a map-style torch data set of (image, label, ...); or an iterable of such that can be iterated again.
        """
        if isinstance(data, TaskData):
            return data
        if isinstance(data, (str, os.PathLike)):
            folder = _Folder(Path(data))
            return cls(
                folder, name or Path(data).resolve().name, task_type, folder.classes, folder.describe, skip_unreadable
            )
        if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, (np.ndarray, Tensor)) for part in data):
            return cls(_Arrays(*data, name), name, task_type)
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            if not isinstance(data, Iterable):
                raise DataError(
                    f"{_task(name)}: {type(data).__name__} is no data set: expected a torch data set, a folder, "
                    "(images, labels) arrays, or an iterable of (image, label)"
                )
            if isinstance(data, Iterator):
                raise DataError(
                    f"{_task(name)}: a {type(data).__name__} can be visited only once, but Task2Vec needs two passes: "
                    "pass a list or a data set"
                )
            return cls(data, name, task_type)
        if not isinstance(data, Sized):
            raise DataError(f"{_task(name)}: {type(data).__name__} has no length: expected a map-style data set")
        return cls(data, name, task_type)

    def batches(
        self, prepare: Callable[[Any], Tensor], batch_size: int = 32, num_workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, C, H, W] as ``prepare`` makes them, finite, and labels [B] int64, or [B, L] for multi-label.

        Raises DataError, naming the image, for anything unusable, and when a second pass gives other labels.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        read = _Reader(self, prepare)
        if isinstance(self.source, Sized) and hasattr(self.source, "__getitem__"):
            dataset: Dataset = _Mapped(self.source, read)
        else:
            dataset = _Iterated(self.source, read)
            num_workers = 0  # each worker would yield the whole of it
        loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=list)
        labels: list[Tensor] = []
        self.skipped = []
        for items in loader:
            self.skipped += [item for item in items if isinstance(item, str)]
            kept = [item for item in items if not isinstance(item, str)]
            if not kept:
                continue
            labels.append(torch.stack([label for _, label, _ in kept]))
            yield self._stack(kept), labels[-1]
        if not labels:
            skipped = f" ({len(self.skipped)} files were unreadable)" if self.skipped else ""
            raise DataError(f"{_task(self.name)} has no image{skipped}")
        found = torch.cat(labels)
        if self._labels is not None and not torch.equal(found, self._labels):
            raise DataError(
                f"{_task(self.name)}: the second pass gave {len(found)} images with other labels than the first, of "
                f"{len(self._labels)}: the data set must give the same images in the same order each time"
            )
        self._labels = found

    def _stack(self, items: list[tuple[Tensor, Tensor, str]]) -> Tensor:
        first, _, name = items[0]
        for image, _, other in items:
            if image.shape != first.shape:
                raise DataError(
                    f"{_task(self.name)}: {other} is {list(image.shape)} but {name} is {list(first.shape)}: prepared "
                    "images must have one size"
                )
        return torch.stack([image for image, _, _ in items])

    def encode_labels(self, labels: Tensor) -> tuple[Tensor, list]:
        """Labels as codes 0 to C-1 over the sorted distinct values, and the classes they stand for.

        Multi-label targets [N, L] are passed through; every label must occur and be missing somewhere.
        """
        if self.task_type == "multilabel":
            for label in range(labels.shape[1]):
                if not 0 < float(labels[:, label].mean()) < 1:
                    raise DataError(f"{_task(self.name)}: label {label} is the same for every image")
            return labels, self.classes or list(range(labels.shape[1]))
        values, codes = labels.unique(return_inverse=True)
        if len(values) < 2:
            only = self.classes[int(values[0])] if self.classes else int(values[0])
            raise DataError(f"{_task(self.name)} has images of one class only ({only}): a task needs at least two")
        return codes, [self.classes[v] if self.classes else v for v in values.tolist()]


def balanced_weights(codes: Tensor, num_classes: int) -> Tensor:
    """Weights [N], float64, of sum 1 that give each class the same total: what a balanced sampler does on average."""
    counts = torch.bincount(codes, minlength=num_classes).double()
    return 1 / (counts[codes] * num_classes)


def _task(name: str | None) -> str:
    return f"task {name!r}" if name else "the task"


class _Reader:
    """Reads, checks and prepares one item; a string instead of an item is the name of an unreadable file."""

    def __init__(self, data: TaskData, prepare: Callable[[Any], Tensor]) -> None:
        self.task, self.prepare = _task(data.name), prepare
        self.multilabel, self.describe, self.skip = data.task_type == "multilabel", data.describe, data.skip_unreadable

    def __call__(self, get: Callable[[], Any], index: int) -> tuple[Tensor, Tensor, str] | str:
        where = self.describe(index)
        try:
            item = get()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            if self.skip:
                return where
            raise DataError(f"{self.task}: {where} cannot be read: {error}") from None
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DataError(f"{self.task}: {where} is {type(item).__name__}, expected (image, label)")
        try:
            image = self.prepare(item[0])
        except ValueError as error:
            raise DataError(f"{self.task}: {where}: {error}") from None
        if not image.isfinite().all():
            raise DataError(f"{self.task}: {where} has NaN or infinite pixels")
        return image, self.label(item[1], where), where

    def label(self, label: Any, where: str) -> Tensor:
        value = torch.as_tensor(label)
        if self.multilabel:
            if value.dim() != 1 or not ((value == 0) | (value == 1)).all():
                raise DataError(f"{self.task}: {where} has label {label!r}, expected a vector of 0 and 1")
            return value.float()
        if value.numel() != 1 or value.is_floating_point() or value.is_complex():
            raise DataError(f"{self.task}: {where} has label {label!r}, expected one integer")
        if int(value) < 0:
            raise DataError(f"{self.task}: {where} has label {int(value)}, expected at least 0")
        return value.reshape(()).long()


class _Mapped(Dataset):
    def __init__(self, source: Any, read: _Reader) -> None:
        self.source, self.read = source, read

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str] | str:
        return self.read(lambda: self.source[index], index)


class _Iterated(IterableDataset):
    def __init__(self, source: Iterable, read: _Reader) -> None:
        self.source, self.read = source, read

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, str] | str]:
        for index, item in enumerate(self.source):
            yield self.read(lambda item=item: item, index)


class _Arrays:
    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor, name: str | None) -> None:
        if len(images) != len(labels):
            raise DataError(f"{_task(name)} has {len(images)} images but {len(labels)} labels")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class _Folder:
    """Images below one sub-folder a class, classes and files in sorted order."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is no folder: expected a folder with one sub-folder of images a class")
        self.root = root
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        ]
        if not self.files:
            raise DataError(
                f"{root} holds no image: expected one sub-folder a class with files {' '.join(IMAGE_SUFFIXES)}"
            )

    def describe(self, index: int) -> str:
        return str(self.files[index][0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            image.load()  # a truncated file fails here
        return image, label
