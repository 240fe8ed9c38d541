"""Checkpoints in safetensors, of one file or of many with an index, read and written piece by piece.

The layout is that of ``transformers``: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on with
``model.safetensors.index.json``, which says which file has which tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import write_atomically

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30
PIECE = 2**17  # entries of a tensor that are in memory at a time; in float64 they fit into a cache
# The names of dtypes in a safetensors header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return self.numel * self.dtype.itemsize

    def pieces(self) -> Iterator[slice]:
        """Yield ranges of the first axis, each with at most :data:`PIECE` entries or one index."""
        if not self.shape:
            yield slice(0, 1)
            return
        step = max(1, PIECE // max(1, prod(self.shape[1:])))
        for begin in range(0, self.shape[0], step):
            yield slice(begin, min(begin + step, self.shape[0]))


class Checkpoint:
    """The tensors of a checkpoint, which are read when they are asked for.

    Args:
        path: A file ``*.safetensors``, or a folder with an index or with such files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged, a tensor is in two files, or the index names a tensor that its file lacks.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"w": torch.arange(6.0).view(3, 2)}, Path(folder, "model.safetensors"))
        ...     with Checkpoint(folder) as checkpoint:
        ...         checkpoint.entries["w"].shape, checkpoint.read("w", slice(1, 2))
        ((3, 2), tensor([[2., 3.]]))
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.files: dict[str, list[str]] = {}  # file name: its tensors
        self.entries: dict[str, Entry] = {}
        self._open: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        folder = self.path if self.path.is_dir() else self.path.parent
        try:
            for name in self._file_names():
                self._add(folder, name)
        except BaseException:
            self._stack.close()
            raise
        if (folder / INDEX).is_file() and self.path.is_dir():
            for tensor, name in json.loads((folder / INDEX).read_text())["weight_map"].items():
                if tensor not in self.files.get(name, ()):
                    raise ValueError(f"{folder / INDEX} says that {name} has {tensor!r}, but it has not")

    def _file_names(self) -> list[str]:
        if self.path.is_file():
            return [self.path.name]
        if (self.path / INDEX).is_file():
            return sorted(set(json.loads((self.path / INDEX).read_text())["weight_map"].values()))
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if not (found := sorted(p.name for p in self.path.glob("*.safetensors"))):
            raise FileNotFoundError(f"{self.path} is no file *.safetensors and no folder with such files")
        return found

    def _add(self, folder: Path, name: str) -> None:
        try:
            file = self._stack.enter_context(safe_open(folder / name, "pt"))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is no complete safetensors file: {error}") from error
        self.files[name] = list(file.keys())
        for tensor in self.files[name]:
            if tensor in self.entries:
                raise ValueError(f"{self.path} has {tensor!r} in two files, {name} is one of them")
            part = file.get_slice(tensor)
            if part.get_dtype() not in _DTYPES:
                raise ValueError(f"{tensor!r} in {folder / name} has the dtype {part.get_dtype()}, which torch lacks")
            self.entries[tensor] = Entry(_DTYPES[part.get_dtype()], tuple(part.get_shape()))
            self._open[tensor] = file

    def read(self, name: str, part: slice = slice(None)) -> Tensor:
        """Return a tensor, or a range of its first axis."""
        if not self.entries[name].shape:
            return self._open[name].get_tensor(name)
        return self._open[name].get_slice(name)[part]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def write_file(path: Path, entries: Mapping[str, Entry], pieces: Iterable[Tensor]) -> None:
    """Write a safetensors file from the pieces of its tensors, one after the other in the order of ``entries``.

    The file appears under its name when it is complete.

    Raises:
        ValueError: If there are more or fewer bytes than the entries have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary, written = path.with_name(f".{path.name}.tmp"), 0
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in pieces:
                written += file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        if written != end:
            raise ValueError(f"{path} got {written} bytes of values, expected {end}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(folder: Path, files: Mapping[str, Sequence[str]], entries: Mapping[str, Entry]) -> None:
    """Write the index of a checkpoint's files, unless its only file is ``model.safetensors``."""
    if list(files) != ["model.safetensors"]:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        total = sum(entries[tensor].nbytes for tensor in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode())


def save_sharded(
    tensors: Mapping[str, Tensor], folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as a checkpoint, with an index if one file of ``shard_bytes`` does not hold them.

    Args:
        tensors: The tensors by name.
        folder: A new folder, or one without ``*.safetensors``.
        shard_bytes: The most bytes of a file; a larger tensor gets a file of its own.

    Returns:
        The files.

    Raises:
        FileExistsError: If the folder has such files already.
    """
    folder = empty_folder(folder)
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    files = files_of(entries, shard_bytes)
    for file, inside in files.items():
        write_file(folder / file, {name: entries[name] for name in inside}, (tensors[name].cpu() for name in inside))
    write_index(folder, files, entries)
    return [folder / name for name in files]


def files_of(entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Divide tensors among files of at most ``shard_bytes``; a larger tensor gets a file of its own.

    Args:
        entries: The tensors' types and shapes.
        shard_bytes: The most bytes of a file.

    Returns:
        The names of the tensors in each file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    return dict(zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True))


def empty_folder(folder: str | os.PathLike) -> Path:
    """Make a folder for a checkpoint. Raise FileExistsError if it has one already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob("*.safetensors*")):
        raise FileExistsError(f"{found[0]} exists: give another folder, or delete the checkpoint in it")
    return folder


def keys_of(names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Find the checkpoint's key of each parameter's name.

    A model with a head has its base model's parameters under a prefix, which the base model's checkpoint lacks.

    Args:
        names: Names of parameters.
        keys: The keys of the checkpoint.

    Returns:
        The key of each name.

    Raises:
        ValueError: If a name has no key.
    """
    keys, found = set(keys), {}
    for name in names:
        ends = [name, *(name.split(".", k)[-1] for k in range(1, name.count(".")))]
        key = next((end for end in ends if end in keys), None)
        key = key or next((k for k in keys if k.endswith(f".{name}")), None)
        if key is None:
            raise ValueError(f"the checkpoint has no tensor for the parameter {name!r}: it has {sorted(keys)[:3]}, ...")
        found[name] = key
    return found
