"""A cache of decoded images for the passes over a data set, so that each file is decoded once."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile

import numpy as np
import torch
from torch import Tensor

ABSENT = -1
COLUMNS = 6  # of the table: offset, kind, height, width, number of labels (-1: a scalar), dtype of the labels
KINDS = (np.dtype(np.uint8), np.dtype(np.float32))


class ImageCache:
    """Room for the images of a data set and their labels, for this process and the loaders that it forks.

    The cache keeps an image's decoded pixels (uint8) or its prepared form (float32), whichever is smaller. Results are
    the same to the last bit as without a cache. Once ``budget`` bytes are used, further images are not kept.

    Args:
        count: the number of images in the data set.
        budget: bytes that the cache may use.
        folder: keep the images on the disk of this folder. The budget is reserved at once, and is given back when the
            process ends, however it ends. By default images are kept in memory, which is taken as needed.

    Raises:
        ValueError: for a budget below one byte.
        OSError: the disk has less room than the budget.

    Example:
        >>> cache = ImageCache(2, budget=1 << 20)
        >>> pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        >>> cache.put(0, pixels, torch.zeros(3, 8, 8), torch.tensor(1))
        >>> [t.shape for t in cache.get(0)], cache.get(1), cache.used
        ([torch.Size([3, 4, 4]), torch.Size([])], None, 56)
    """

    def __init__(self, count: int, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        if budget < 1:
            raise ValueError(f"the cache's budget is {budget} bytes, expected at least 1")
        if folder is None:
            self._pixels = mmap.mmap(-1, budget)  # shared with forks
        else:
            with tempfile.TemporaryFile(dir=folder) as file:  # the file has no name, so nothing is left behind
                os.posix_fallocate(file.fileno(), 0, budget)  # or a full disk would show as a bus error later
                self._pixels = mmap.mmap(file.fileno(), budget)
        table = np.frombuffer(mmap.mmap(-1, 8 * (COLUMNS * count + 1)), dtype=np.int64)
        self._used, self._table = table[:1], table[1:].reshape(count, COLUMNS)
        self._table[:, 0] = ABSENT
        self._budget = budget
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple:
        return _no_cache, ()  # a loader that was not forked reads the files

    @property
    def used(self) -> int:
        """Bytes in use."""
        return int(self._used[0])

    def get(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Pixels (uint8) or a prepared image (float32), [3, H, W], and the label; None if the image is not kept."""
        offset, kind, height, width, labels, label_kind = self._table[index].tolist()
        if offset == ABSENT:
            return None
        count = 3 * height * width
        dtype = KINDS[kind]
        image = np.frombuffer(self._pixels, dtype, count, offset).reshape(3, height, width).copy()
        offset += _padded(count * dtype.itemsize)
        label = np.frombuffer(self._pixels, (np.int64, np.float32)[label_kind], abs(labels), offset).copy()
        return torch.from_numpy(image), torch.from_numpy(label.reshape(()) if labels < 0 else label)

    def put(self, index: int, pixels: Tensor, prepared: Tensor, label: Tensor) -> None:
        """Keep an image if there is room. ``label`` is int64 [] or float32 [L]."""
        smaller = pixels if pixels.numel() <= 4 * prepared.numel() else prepared
        image, labels = smaller.contiguous().numpy(), label.reshape(-1).numpy()
        size = _padded(image.nbytes) + _padded(labels.nbytes)
        with self._lock:
            offset = self.used
            if offset + size > self._budget or self._table[index, 0] != ABSENT:
                return
            self._used[0] = offset + size
        start = offset + _padded(image.nbytes)
        self._pixels[offset : offset + image.nbytes] = image.tobytes()
        self._pixels[start : start + labels.nbytes] = labels.tobytes()
        self._table[index, 1:] = (
            KINDS.index(image.dtype),
            *image.shape[1:],
            -1 if label.dim() == 0 else len(labels),
            labels.dtype == np.float32,
        )
        self._table[index, 0] = offset  # last, because from now on the image can be read


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _no_cache() -> None:
    return None
