"""Any labelled data set as batches of prepared images, the same batches in every pass."""

from __future__ import annotations

import contextlib
import hashlib
import mimetypes
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..embedding import escaped, first_of
from ..spans import count, stage
from .cache import ImageCache
from .probe import rgb

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SHOWN = 5  # names in a warning
TASK_TYPES = {"multiclass": "softmax", "multilabel": "sigmoid"}  # with the likelihood of their labels


class DataError(ValueError):
    """Data that cannot be used; the message names the task and the image."""


class MapStyle(Protocol):
    """Anything with a length whose items can be read by number, as torch's map-style data sets."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def check_task_type(task_type: str) -> None:
    """Raise ValueError unless ``task_type`` is one of :data:`TASK_TYPES`."""
    if task_type not in TASK_TYPES:
        raise ValueError(f"unknown task_type {task_type!r}: expected one of {', '.join(TASK_TYPES)}")


class TaskData:
    """A labelled data set that can be visited several times in the same order.

    :meth:`of` makes one from any usual form of data. The attribute ``skipped`` lists the unreadable files that were
    left out; it is complete after a pass. The attribute ``left_out`` says what in a folder is no part of the task:
    classes without an image, images outside of a class folder, images with other suffixes than
    :data:`IMAGE_SUFFIXES`, and links to folders or to nothing. The attribute ``contents`` is None, or a function that
    tells whether a folder or a table is what it was before (:func:`contents_of`).

    Args:
        source: a map-style data set of (image, label), or an iterable that can be iterated again.
        name: the task's name, for messages.
        task_type: ``"multiclass"`` or ``"multilabel"``.
        classes: the names of the classes, where the data has names (the sub-folders of a folder).
        describe: what to call an image in messages, by its number. A worker process must be able to unpickle it.
        skip_unreadable: leave out image files that cannot be read.

    Raises:
        ValueError: for an unknown task type.

    Example:
        >>> import numpy as np
        >>> data = TaskData.of((np.zeros((4, 8, 8, 3), np.uint8), np.array([7, 7, 2, 2])), name="example")
        >>> data.is_map_style, len(data.source)
        (True, 4)
        >>> data.encode_labels(data.check_labels([7, 7, 2, 2]))
        (tensor([0, 0, 1, 1]), [7, 2])
    """

    def __init__(
        self,
        source: MapStyle | Iterable,
        name: str | None,
        task_type: str,
        classes: list[str] | None = None,
        describe: Callable[[int], str] = "image {}".format,  # not a lambda, which cannot be pickled
        skip_unreadable: bool = False,
    ) -> None:
        check_task_type(task_type)
        self.source, self.name, self.task_type, self.classes = source, name, task_type, classes
        self.describe, self.skip_unreadable = describe, skip_unreadable
        self.skipped: list[str] = []
        self.left_out: list[str] = []
        self.contents: Callable[[], str] | None = None
        self._labels: Tensor | None = None  # of all images, after the first complete pass
        self._places: Tensor | None = None  # where the images of that pass are in the source
        self.cache: ImageCache | None = None  # of decoded images, while the task is being embedded

    @classmethod
    def of(
        cls, data: Any, *, name: str | None = None, task_type: str = "multiclass", skip_unreadable: bool = False
    ) -> TaskData:
        """Make a task from any usual form of data.

        A warning names what is left out of a folder. Hidden files and folders, whose names begin with a dot, do not
        count.

        Args:
            data: (images, labels), where images are an array or a tensor with first axis N; a folder with one
                sub-folder of images for each class; a map-style torch data set of (image, label, ...); or an iterable
                of such items that can be iterated again. A :class:`TaskData` is returned as it is.
            name: the task's name, by default the folder's.
            task_type: ``"multiclass"`` (one label for each image) or ``"multilabel"`` (a 0-1 vector for each image).
            skip_unreadable: leave out image files that cannot be read.

        Raises:
            DataError: for data of another form, a folder without images, or arrays of different lengths.
        """
        if isinstance(data, TaskData):
            return data
        if isinstance(data, (str, os.PathLike)):
            folder, name = _Folder(Path(data)), name or Path(data).resolve().name
            task = cls(folder, name, task_type, folder.classes, folder.describe, skip_unreadable)
            task.left_out, task.contents = folder.left_out, folder.contents
            if task.left_out:
                text = f"{_task(name)}: {escaped(str(folder.root))}: left out {'; '.join(task.left_out)}"
                expected = f"expected one sub-folder a class with files {' '.join(IMAGE_SUFFIXES)}"
                warnings.warn(f"{text} ({expected})", stacklevel=3)
            return task
        if isinstance(data, DataLoader):
            raise DataError(f"{_task(name)}: a DataLoader makes batches of its own: pass its data set")
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (np.ndarray, Tensor)):
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
        return cls(cast(MapStyle, data), name, task_type)

    @property
    def is_map_style(self) -> bool:
        """Whether images can be read by number. An iterable can only be read in order."""
        return isinstance(self.source, Sized) and hasattr(self.source, "__getitem__")

    def batches(
        self,
        prepare: Callable[[Any], Tensor],
        batch_size: int = 32,
        num_workers: int = 0,
        cache: ImageCache | None = None,
        examples: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield prepared images [B, C, H, W] and labels [B] int64, or [B, L] for multi-label.

        Args:
            prepare: makes a tensor [C, H, W] of an image, such as :class:`t2v_fast.Preprocessing`.
            batch_size: images in a batch.
            num_workers: processes that load images of a map-style source.
            cache: keeps the decoded files of a map-style source for the next pass.
            examples: visit only these images, [b] for each batch, in any order. They are numbered as the first pass
                over a map-style source yielded them.

        Raises:
            DataError: for an image or label that cannot be used, which the message names; and if a later pass gives
                other labels than the first.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        read = _Reader(self, prepare)
        if self.is_map_style:
            dataset: Dataset = _Mapped(self.source, read, cache)
        else:
            dataset = _Iterated(cast(Iterable, self.source), read)
            num_workers = 0  # each worker would yield all images
        # With a generator, because the loader would otherwise draw from torch's global one.
        known = self._labels
        sizes: dict[str, Any] = {"batch_size": batch_size}
        if examples is not None:  # in a later pass
            first_labels, places = cast(Tensor, self._labels), cast(Tensor, self._places)
            known = first_labels[torch.cat(list(examples))]
            sizes = {"batch_sampler": [places[batch].tolist() for batch in examples]}
        loader = DataLoader(
            dataset, num_workers=num_workers, collate_fn=list, generator=torch.Generator().manual_seed(0), **sizes
        )
        labels: list[Tensor] = []
        readable: list[bool] = []
        skipped: list[str] = []
        first: Item | None = None
        seen = 0
        for items in loader:
            kept: list[Item] = []
            for item in items:
                if isinstance(item, DataError):
                    raise item
                readable.append(not isinstance(item, str))
                if isinstance(item, str):
                    skipped.append(item)
                else:
                    first = first or item
                    self._check_like(first, item)
                    kept.append(item)
            if not kept:
                continue
            labels.append(torch.stack([label for _, label, _ in kept]))
            seen += len(kept)
            if known is not None and seen > len(known):
                raise self._other_pass("has more")
            if known is not None and not torch.equal(labels[-1], known[seen - len(kept) : seen]):
                raise self._other_pass(f"has other labels from image {seen - len(kept)} on")
            yield torch.stack([image for image, _, _ in kept]), labels[-1]
        if not labels:
            unreadable = f" ({len(skipped)} files were unreadable)" if skipped else ""
            raise DataError(f"{_task(self.name)} has no image{unreadable}")
        if known is not None and seen != len(known):
            raise self._other_pass(f"has {seen}")
        if examples is None:
            self._labels, self.skipped = torch.cat(labels), skipped
            self._places = torch.tensor(readable).nonzero()[:, 0]

    def _check_like(self, first: Item, item: Item) -> None:
        (image, label, where), (first_image, first_label, first_where) = item, first
        if (image.shape, image.dtype) != (first_image.shape, first_image.dtype):
            raise DataError(
                f"{_task(self.name)}: {where} is {list(image.shape)} {image.dtype} but {first_where} is "
                f"{list(first_image.shape)} {first_image.dtype}: prepared images must have one size and dtype"
            )
        if label.shape != first_label.shape:
            raise DataError(
                f"{_task(self.name)}: {where} has {len(label)} labels but {first_where} has {len(first_label)}"
            )

    def _other_pass(self, what: str) -> DataError:
        assert self._labels is not None
        return DataError(
            f"{_task(self.name)}: the first pass gave {len(self._labels)} images, the second {what}: the data set must "
            "give the same images in the same order each time"
        )

    def check_labels(self, labels: Iterable) -> Tensor:
        """Check labels that are given apart from the images, and return [N] or [N, L]; DataError for bad labels."""
        read = _Reader(self, lambda image: image)
        return torch.stack([read.label(label, self.describe(k)) for k, label in enumerate(labels)])

    def encode_labels(self, labels: Tensor) -> tuple[Tensor, list]:
        """Turn labels into codes 0 to C-1, in the order in which the labels first occur.

        The codes do not depend on the names of the classes, and neither does anything that is computed from the codes.
        Multi-label targets [N, L] are returned as they are.

        Returns:
            The codes [N], and the class of each code.

        Raises:
            DataError: for a task with one class only, or a label that all or no images have.
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
        first = torch.full(values.shape, len(codes)).scatter_reduce(0, codes, torch.arange(len(codes)), "amin")
        order = first.argsort()
        values = values[order]
        return order.argsort()[codes], [self.classes[v] if self.classes else v for v in values.tolist()]


def balanced_weights(codes: Tensor, num_classes: int) -> Tensor:
    """Return weights [N] that give each class the same total, as a balanced sampler does on average.

    The weights are float64 and sum to one.

    >>> balanced_weights(torch.tensor([0, 0, 1]), 2)
    tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    counts = torch.bincount(codes, minlength=num_classes).double()
    return 1 / (counts[codes] * num_classes)


def _task(name: str | None) -> str:
    return f"task {name!r}" if name else "the task"


Item = tuple[Tensor, Tensor, str]  # image [C, H, W], label [] or [L], and its description for messages


class _Reader:
    """Read, check and prepare one item. A string instead of an item is the name of a file that was skipped.

    Errors are returned, not raised, because a worker process would wrap them in a traceback.
    """

    def __init__(self, data: TaskData, prepare: Callable[[Any], Tensor]) -> None:
        self.task, self.prepare = _task(data.name), prepare
        self.multilabel, self.describe, self.skip = data.task_type == "multilabel", data.describe, data.skip_unreadable

    def __call__(self, get: Callable[[], Any], index: int) -> Item | str | DataError:
        where = self.describe(index)
        try:
            with stage("decode"):
                count("decoded")
                return self._item(get(), where)
        except DataError as error:
            return error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if self.skip:
                return where
            hint = "skip_unreadable leaves such images out (embed --skip-unreadable; a setting of jobs)"
            return DataError(f"{self.task}: {where} cannot be read: {error}; {hint}")

    def _item(self, item: Any, where: str) -> Item:
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
        try:
            value = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError):  # None, a string, a ragged list
            value = torch.empty(0)
        if self.multilabel:
            if value.dim() != 1 or not len(value) or not ((value == 0) | (value == 1)).all():
                raise DataError(f"{self.task}: {where} has label {label!r}, expected a vector of 0 and 1")
            return value.float()
        if value.numel() != 1 or value.is_floating_point() or value.is_complex():
            raise DataError(f"{self.task}: {where} has label {label!r}, expected one integer")
        if int(value) < 0:
            raise DataError(f"{self.task}: {where} has label {int(value)}, expected at least 0")
        return value.reshape(()).long()


class _Mapped(Dataset):
    def __init__(self, source: Any, read: _Reader, cache: ImageCache | None) -> None:
        self.source, self.read, self.cache = source, read, cache

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item | str | DataError:
        if self.cache is None:
            return self.read(lambda: self.source[index], index)
        kept = self.cache.get(index)
        if kept is not None:
            with stage("decode"):
                return self.read.prepare(kept[0]), kept[1], self.read.describe(index)
        raw: list[Any] = []

        def get() -> Any:
            raw.append(self.source[index])
            return raw[0]

        item = self.read(get, index)
        if isinstance(item, tuple) and isinstance(raw[0][0], Image.Image):  # other forms cost nothing to read again
            self.cache.put(index, rgb(raw[0][0]), item[0], item[1])
        return item


class _Iterated(IterableDataset):
    def __init__(self, source: Iterable, read: _Reader) -> None:
        self.source, self.read = source, read

    def __iter__(self) -> Iterator[Item | str | DataError]:
        for index, item in enumerate(self.source):
            yield self._read(item, index)

    def _read(self, item: Any, index: int) -> Item | str | DataError:
        return self.read(lambda: item, index)


class WithIndex(Dataset):
    """The images of a map-style data set, each labelled with its own number."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.source[index]
        return (item[0] if isinstance(item, (tuple, list)) and item else item), index


class _Arrays:
    def __init__(self, images: np.ndarray | Tensor, labels: Sequence | np.ndarray | Tensor, name: str | None) -> None:
        if images.ndim not in (3, 4) or not hasattr(labels, "__getitem__") or not getattr(labels, "ndim", 1):
            raise DataError(
                f"{_task(name)}: images are {list(images.shape)} and labels {type(labels).__name__}, expected images "
                "[N, H, W], [N, H, W, C] or [N, C, H, W] and one label an image"
            )
        if len(images) != len(labels):
            raise DataError(f"{_task(name)} has {len(images)} images but {len(labels)} labels")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def open_image(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """Decode an image, turned as its EXIF orientation says; OSError for a file that is no image."""
    image: Image.Image
    try:
        with Image.open(file) as image:
            image.load()  # a truncated file fails here
            with contextlib.suppress(Exception):  # an image whose EXIF data is damaged is shown as it is
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make the decoders fail with almost anything
        raise OSError(str(error) or type(error).__name__) from error
    return image


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, and links that lead to no file. Hidden files and folders do not count.

    Raises:
        OSError: A folder cannot be read.
    """
    files: list[Path] = []
    links: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        links += [path for name in folders if (path := Path(place, name)).is_symlink()]  # which are not followed
        for path in (Path(place, name) for name in names if name[0] != "."):
            (files if path.is_file() else links).append(path)
    return sorted(files), sorted(links)


def _refuse(error: OSError) -> None:
    raise error


def _has_unknown_suffix(path: Path) -> bool:
    """Whether a file has the suffix of an image, as far as Python knows them, but not one that is read."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    return kind.startswith("image/") and path.suffix.lower() not in IMAGE_SUFFIXES


def contents_of_folder(folder: Path) -> str:
    """Return :func:`contents_of` the images in a folder, as ``meta["contents"]`` has it.

    Raises:
        DataError: it is no folder, or holds no image.
    """
    return _Folder(folder).contents()


def contents_of(files: Iterable[tuple[str, Path]]) -> str:
    """Return a digest of what each file is called in its task, such as its path and label, and of its size.

    It tells whether a task has the same images as before without reading them. A file whose content changed and whose
    size did not is not noticed.
    """
    digest = hashlib.sha256()
    for name, path in files:
        try:
            size = path.stat().st_size
        except OSError:  # a row of a table without an image
            size = -1
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


class _Folder:
    """The images below one sub-folder for each class, with classes and files in sorted order.

    ``left_out`` has a sentence for each kind of thing that one may have taken for a part of the task.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is no folder: expected a folder with one sub-folder of images a class")
        self.root = root
        inside = sorted((e for e in root.iterdir() if e.name[0] != "."), key=lambda e: e.name)
        self.classes = [entry.name for entry in inside if entry.is_dir()]
        self.files: list[tuple[Path, int]] = []
        without: list[str] = []  # folders without an image
        unknown: list[str] = []  # images with other suffixes
        unread: list[str] = []
        for label, name in enumerate(self.classes):
            files, links = _below(root / name)
            unread += [str(path.relative_to(root)) for path in links]
            images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            self.files += [(path, label) for path in images]
            if not images:
                suffixes = sorted({path.suffix or "no suffix" for path in files})
                what = first_of(suffixes, SHOWN) if files else "links only" if links else "empty"
                without.append(f"{name} ({what})")
            else:
                unknown += [str(path.relative_to(root)) for path in files if _has_unknown_suffix(path)]
        beside = [path.name for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        groups = {
            "class folders without an image": without,
            "images outside of a class folder": beside,
            "images with another suffix": unknown,
            "links to folders or to nothing": unread,
        }
        self.left_out = [
            escaped(f"{what} ({len(names)}): {first_of(names, SHOWN)}") for what, names in groups.items() if names
        ]
        if not self.files:
            found = f"; found {'; '.join(self.left_out)}" if self.left_out else ""
            raise DataError(
                f"{root} holds no image: expected one sub-folder a class with files {' '.join(IMAGE_SUFFIXES)}{found}"
            )

    def contents(self) -> str:
        return contents_of((str(path.relative_to(self.root)), path) for path, _ in self.files)

    def describe(self, index: int) -> str:
        return str(self.files[index][0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return open_image(path), label
