"""Embedding: a task's vector, what it was made with, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .files import write_atomically

FORMAT = "t2v-fast embedding"
VERSION = 1


class FingerprintMismatch(ValueError):
    """Two embeddings were made with different probes or settings, so a distance between them means nothing."""


@dataclass(eq=False)
class Embedding:
    """A task embedding: the filter-wise diagonal Fisher of a probe (Achille et al., 2019).

    ``hessian`` and ``scale`` [D] are named as in the public code (``scale`` is one for this estimator);
    ``standard_error`` [D] or None; ``layers`` are (parameter name, start, stop) slices that cover the vector in order.
    ``fingerprint`` holds everything that must agree for two embeddings to be comparable, ``meta`` everything else
    (task, classes, estimator, timings); both must be JSON and are kept as their file will return them (tuples become
    lists). Raises ValueError for anything that is not so.
    """

    hessian: np.ndarray
    scale: np.ndarray
    layers: tuple[tuple[str, int, int], ...]
    num_examples: int
    standard_error: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = tuple((str(name), int(start), int(stop)) for name, start, stop in self.layers)
        for name in ("hessian", "scale", "standard_error"):
            values = getattr(self, name)
            if values is None and name == "standard_error":
                continue
            values = np.asarray(values, dtype=np.float64)
            setattr(self, name, values)
            if values.ndim != 1 or len(values) != len(self.hessian):
                raise ValueError(
                    f"{name} has shape {values.shape}, expected one axis of {np.size(self.hessian)} entries"
                )
            bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
            if len(bad):
                raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite numbers of at least 0")
        if self.num_examples < 1:
            raise ValueError(f"num_examples is {self.num_examples}, expected at least 1")
        for name in ("meta", "fingerprint"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {type(getattr(self, name)).__name__}, expected a dictionary")
            try:
                # A fingerprint must equal itself after a round trip through a file.
                setattr(self, name, json.loads(_json(getattr(self, name))))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must be JSON: {error}") from None
        self._check_layers()

    def _check_layers(self) -> None:
        stop = 0
        for name, start, end in self.layers:
            if start != stop or end <= start:
                raise ValueError(
                    f"layer {name!r} covers [{start}, {end}), expected a start at {stop}: layers lie in order"
                )
            stop = end
        if stop != len(self.hessian):
            raise ValueError(f"the layers cover {stop} entries, but the embedding has {len(self.hessian)}")

    def __len__(self) -> int:
        return len(self.hessian)

    def __repr__(self) -> str:
        return (
            f"Embedding({self.meta.get('task')!r}, {len(self)} entries in {len(self.layers)} layers, "
            f"{self.num_examples} examples, norm {self.norm:.4g}, fingerprint {self.fingerprint_id})"
        )

    @property
    def layer_names(self) -> list[str]:
        """The parameters of the probe that the vector covers, in order."""
        return [name for name, _, _ in self.layers]

    def layer(self, name: str) -> np.ndarray:
        """The part of ``hessian`` that belongs to one parameter; KeyError, listing all, for an unknown one."""
        for known, start, stop in self.layers:
            if known == name:
                return self.hessian[start:stop]
        raise KeyError(f"no layer {name!r}; there are {', '.join(self.layer_names)}")

    @property
    def norm(self) -> float:
        """The vector's length, which the paper reads as the task's complexity (section 3)."""
        return float(np.linalg.norm(self.hessian))

    @property
    def fingerprint_id(self) -> str:
        """Twelve hexadecimal digits that stand for the fingerprint."""
        return hashlib.sha256(_json(self.fingerprint).encode()).hexdigest()[:12]

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. An older file of that name survives whatever goes wrong before the last moment."""
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "layers": _json(self.layers),
            "num_examples": str(int(self.num_examples)),
            "meta": _json(self.meta),
            "fingerprint": _json(self.fingerprint),
        }
        arrays = {"hessian": self.hessian, "scale": self.scale, "standard_error": self.standard_error}
        write_atomically(path, save({k: v for k, v in arrays.items() if v is not None}, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Embedding:
        """Read what :meth:`save` wrote; ValueError, naming the file, for anything else. Nothing is ever unpickled."""
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        except SafetensorError as error:
            raise ValueError(f"{path} is no embedding: it is not a complete safetensors file ({error})") from None
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, but no embedding of t2v-fast")
        version = header.get("version", "")
        if version.isdecimal() and int(version) > VERSION:
            raise ValueError(f"{path} has format version {version}: upgrade t2v-fast, which reads up to {VERSION}")
        try:
            if version != str(VERSION):
                raise ValueError(f"its format version is {version!r}")
            return cls(
                **arrays,
                layers=tuple(tuple(layer) for layer in json.loads(header["layers"])),
                num_examples=int(header["num_examples"]),
                meta=json.loads(header["meta"]),
                fingerprint=json.loads(header["fingerprint"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is a damaged embedding: {error}") from None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; nothing for equal ones."""
    return [
        f"{key} ({first.get(key)!r} against {other.get(key)!r})"
        for key in sorted({*first, *other})
        if first.get(key) != other.get(key)
    ]


def differences_from(fingerprint: dict[str, Any], layers: Sequence[tuple], other: Embedding) -> list[str]:
    """What keeps an embedding from being compared with those of this fingerprint and layout, in words."""
    different = differences(fingerprint, other.fingerprint)
    return different or (["the layers"] if layers != other.layers else [])


def check_comparable(embeddings: Sequence[Embedding]) -> None:
    """Raise FingerprintMismatch, naming two tasks and what differs, unless all have one fingerprint and one layout."""
    if not embeddings:
        return
    first = embeddings[0]
    for k, other in enumerate(embeddings):
        if different := differences_from(first.fingerprint, first.layers, other):
            raise FingerprintMismatch(
                f"embeddings 0 ({first.meta.get('task')!r}) and {k} ({other.meta.get('task')!r}) cannot be compared: "
                f"they differ in {', '.join(different)}"
            )


def stack(embeddings: Sequence[Embedding]) -> np.ndarray:
    """The vectors of comparable embeddings as rows, [T, D]."""
    check_comparable(embeddings)
    return np.stack([e.hessian for e in embeddings])
