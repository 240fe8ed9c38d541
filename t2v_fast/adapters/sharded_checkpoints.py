"""Checkpoints of the Fisher of a sharded network, which load on another number of processes.

:func:`save_shards` and :func:`load_shards` use torch's distributed checkpoints: each process writes and reads its own
shards. :func:`save_whole` writes safetensors with the names of the model's own checkpoint, which merging and other
tools read (:mod:`t2v_fast.adapters.checkpoints`), and :func:`load_whole` reads each process's part of them.

All processes that share the network call these functions. A Fisher of one process is saved and loaded in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..estimation.diagonal import FisherDiagonal
from ..estimation.processes import in_shards, whole
from ..gradients.parameters import FilterAxis, filter_axes_of
from ..gradients.recorder import FisherRecorder
from .checkpoints import SHARD_BYTES, Checkpoint, Entry, empty_folder, files_of, keys_of, write_file, write_index

_ABOUT = ("granularity", "estimator", "samples", "num_examples", "visited")
_PARTS = ("entries", "standard_error")


def save_shards(found: FisherDiagonal, folder: str | os.PathLike) -> None:
    """Save a Fisher with ``torch.distributed.checkpoint``; every process writes its own shards.

    Args:
        found: The result of :func:`t2v_fast.fisher` on all processes.
        folder: A folder that all processes see.
    """
    from torch.distributed import checkpoint

    about: dict[str, Any] = {name: getattr(found, name) for name in _ABOUT}
    about |= {"unused": sorted(found.unused), "skipped": sorted(found.skipped), "names": list(found)}
    state: dict[str, Any] = {part: dict(getattr(found, part)) for part in _PARTS}
    state["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    checkpoint.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_shards(
    folder: str | os.PathLike, model: nn.Module | None = None, filter_axis: FilterAxis = None
) -> FisherDiagonal:
    """Load what :func:`save_shards` has saved, on any number of processes.

    The index of such a checkpoint is a pickle: load only files that you trust.

    Args:
        folder: The folder.
        model: The network, sharded as it is now; each process gets the values of its own shards. Without a network,
            every process gets the whole.
        filter_axis: The axes of the filters, as they were given to :func:`t2v_fast.fisher`.

    Returns:
        The Fisher.

    Raises:
        ValueError: The network lacks a parameter that the Fisher has, or its shape differs.
    """
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder)
    saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    options = {"storage_reader": reader, "no_dist": not dist.is_initialized()}
    text = {"about": torch.empty(saved["about"].size, dtype=torch.uint8)}
    checkpoint.load(text, **options)
    about = json.loads(bytes(text["about"].tolist()))
    parameters = None if model is None else FisherRecorder(model).parameters
    state: dict[str, dict[str, Tensor]] = {}
    for part in _PARTS:
        state[part] = {}
        for name in about["names"]:
            t = torch.zeros(saved[f"{part}.{name}"].size, dtype=torch.float64)
            state[part][name] = t if parameters is None else _like(name, t, parameters, about, filter_axis)
    checkpoint.load(state, **options)
    entries, errors = (state[part] for part in _PARTS)
    unused, skipped = (frozenset(about[name]) for name in ("unused", "skipped"))
    return FisherDiagonal(entries, errors, unused=unused, skipped=skipped, **{name: about[name] for name in _ABOUT})


def save_whole(
    found: FisherDiagonal,
    folder: str | os.PathLike,
    keys: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float64,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Save the values of a Fisher in safetensors files, with an index if there are several.

    The processes gather one tensor at a time, and the first one writes it.

    Args:
        found: The result of :func:`t2v_fast.fisher` on all processes.
        folder: A new folder, or one without ``*.safetensors``.
        keys: The checkpoint's key of each parameter (:func:`~t2v_fast.adapters.checkpoints.keys_of`); by default its
            name.
        dtype: The type of the values in the files.
        shard_bytes: The most bytes of a file; a larger tensor gets a file of its own.

    Returns:
        The files.

    Raises:
        RuntimeError: On every process, if the files could not be written.
        FileExistsError: If the folder has such files already (of one process alone).
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    names = {name if keys is None else keys[name]: name for name in found}
    entries = {key: Entry(dtype, tuple(found[name].shape)) for key, name in names.items()}
    files = files_of(entries, shard_bytes)
    gathered = (whole(found[name]).to(dtype) for name in names.values())  # a collective for each tensor
    error: Exception | None = None
    if first:
        try:
            folder = empty_folder(folder)
            for file, inside in files.items():
                write_file(folder / file, {key: entries[key] for key in inside}, _some(gathered, len(inside)))
            write_index(folder, files, entries)
        except Exception as raised:  # the other processes still gather, and wait for this one
            error = raised
    for _ in gathered:
        pass
    if dist.is_initialized():
        texts: list[Any] = [None if error is None else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(texts, src=0)
        if texts[0] is not None:
            raise RuntimeError(f"process 0 could not write the checkpoint: {texts[0]}") from error
    elif error is not None:
        raise error
    return [Path(folder) / name for name in files]


def load_whole(path: str | os.PathLike, model: nn.Module, filter_axis: FilterAxis = None) -> dict[str, Tensor]:
    """Load values of parameters from safetensors; each process gets those of its own shards.

    Args:
        path: A file, or a folder as :func:`save_whole` makes it.
        model: The network, sharded as it is now.
        filter_axis: The axes of the filters, as they were given to :func:`t2v_fast.fisher`.

    Returns:
        The values by parameter name, of all parameters that the files have; DTensors where the parameters are.

    Raises:
        ValueError: A shape is neither the parameter's, nor that of its filters, nor a single number.
    """
    parameters = FisherRecorder(model).parameters
    with Checkpoint(path) as checkpoint:
        there = [name for name in parameters if any(k == name or name.endswith(f".{k}") for k in checkpoint.entries)]
        keys = keys_of(there, checkpoint.entries)
        return {name: _like(name, checkpoint.read(key), parameters, {}, filter_axis) for name, key in keys.items()}


def _some(tensors: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield next(tensors)


def _like(
    name: str, values: Tensor, parameters: Mapping[str, nn.Parameter], about: Mapping[str, Any], axes: FilterAxis
) -> Tensor:
    """Values in the shards of their parameter. Without the granularity in ``about``, the shape tells it."""
    if name not in parameters:
        raise ValueError(f"the network has no parameter {name!r}, which the checkpoint's Fisher has")
    p = parameters[name]
    axis = filter_axes_of({name: p}, {name: axes[name]} if isinstance(axes, Mapping) and name in axes else None)[name]
    axis = filter_axes_of({name: p}, axes)[name] if callable(axes) else axis
    shapes = {
        "parameter": tuple(p.shape),
        "filter": (p.shape[axis] if p.dim() else 1,),
        "tensor": (),
    }
    kinds = [about["granularity"]] if about else list(shapes)
    for kind in kinds:
        if tuple(values.shape) == shapes[kind]:
            return in_shards(values, p, kind, axis)
    raise ValueError(f"the values of {name!r} are {list(values.shape)}, but the parameter is {list(p.shape)}")
