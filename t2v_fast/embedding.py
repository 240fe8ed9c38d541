"""Embeddings: the vectors of tasks, the settings that they were made with, and their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .files import canonical_json, write_atomically

FORMAT = "t2v-fast embedding"
VERSION = 1


class FingerprintMismatch(ValueError):
    """Embeddings were made with different probes or settings, so a distance between them means nothing.

    The message names the two tasks, and the keys of the fingerprints that differ.
    """


@dataclass(eq=False)
class Embedding:
    """The embedding of a task: the diagonal Fisher information of a probe's filters (Achille et al., 2019).

    Args:
        hessian: The Fisher values [D]. The name is that of the public code.
        scale: The scales [D], as in the public code. They are one unless the embedding is variational.
        layers: Slices (parameter name, start, stop) that cover the vector in order.
        num_examples: The number of examples.
        standard_error: The standard errors [D] of ``hessian``, if they are known.
        meta: Facts about the embedding: task, classes, estimator, timings.
        fingerprint: Everything that must agree between two embeddings before they can be compared.

    ``meta`` and ``fingerprint`` must be JSON. They are kept as a file would return them, so tuples become lists.

    Raises:
        ValueError: For values that are negative or not finite, shapes that differ, layers that leave a gap, and
            ``meta`` or ``fingerprint`` that are not JSON.

    Example:
        >>> import numpy as np
        >>> e = Embedding(np.array([3.0, 4.0]), np.ones(2), [("conv.weight", 0, 2)], 10, meta={"task": "cats"})
        >>> len(e), e.norm, e.layer_names
        (2, 5.0, ['conv.weight'])
        >>> e.layer("conv.weight")
        array([3., 4.])
    """

    hessian: np.ndarray
    scale: np.ndarray
    layers: Sequence[tuple[str, int, int]]
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
                # A fingerprint must still be equal to itself after a round trip through a file.
                setattr(self, name, json.loads(canonical_json(getattr(self, name))))
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
        """Return the number of entries D."""
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
        """Return the part of ``hessian`` that belongs to one parameter.

        Raises:
            KeyError: For an unknown name; the message lists the known ones.
        """
        for known, start, stop in self.layers:
            if known == name:
                return self.hessian[start:stop]
        raise KeyError(f"no layer {name!r}; there are {', '.join(self.layer_names)}")

    @property
    def norm(self) -> float:
        """The length of the vector, a measure of the task's complexity (Achille et al., 2019, section 3)."""
        return float(np.linalg.norm(self.hessian))

    @property
    def fingerprint_id(self) -> str:
        """Twelve hexadecimal digits that stand for the fingerprint."""
        return hashlib.sha256(canonical_json(self.fingerprint).encode()).hexdigest()[:12]

    def save(self, path: str | os.PathLike) -> None:
        """Write the embedding to a safetensors file.

        An older file at ``path`` is replaced only once the new one is complete.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> import numpy as np
            >>> e = Embedding(np.array([3.0, 4.0]), np.ones(2), [("conv.weight", 0, 2)], 10)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     e.save(Path(folder) / "cats.safetensors")
            ...     Embedding.load(Path(folder) / "cats.safetensors").hessian
            array([3., 4.])
        """
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "layers": canonical_json(self.layers),
            "num_examples": str(int(self.num_examples)),
            "meta": canonical_json(self.meta),
            "fingerprint": canonical_json(self.fingerprint),
        }
        arrays = {"hessian": self.hessian, "scale": self.scale, "standard_error": self.standard_error}
        write_atomically(path, save({k: v for k, v in arrays.items() if v is not None}, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Embedding:
        """Read a file that :meth:`save` wrote. Nothing in the file is unpickled or run.

        Raises:
            ValueError: For any other file; the message names the file.
        """
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


def network_fingerprint(
    probe: str, weights: str, dtype: Any, parameters: Iterable[str], family: str | dict[str, Any]
) -> dict[str, Any]:
    """Return the part of a fingerprint that describes the network and the quantity that was estimated.

    Args:
        probe: The name of the network.
        weights: A digest of its weights.
        dtype: The torch dtype that it runs in.
        parameters: The parameters that the embedding covers, in order.
        family: What embeddings of the estimator can be compared with.
    """
    return {
        "probe": probe,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": hashlib.sha256("\n".join(parameters).encode()).hexdigest(),
        "granularity": "filter",
        "family": family,
    }


def differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the differences between two fingerprints, in words; an empty list for equal ones."""
    return [
        f"{key} ({first.get(key)!r} against {other.get(key)!r})"
        for key in sorted({*first, *other})
        if first.get(key) != other.get(key)
    ]


def differences_from(fingerprint: dict[str, Any], layers: Sequence[tuple], other: Embedding) -> list[str]:
    """Return what keeps ``other`` from being compared with embeddings of this fingerprint and layout, in words."""
    different = differences(fingerprint, other.fingerprint)
    return different or (["the layers"] if layers != other.layers else [])


def check_comparable(embeddings: Sequence[Embedding]) -> None:
    """Raise FingerprintMismatch unless all embeddings have the same fingerprint and the same layers."""
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
    """Return the vectors of comparable embeddings as rows [T, D].

    Raises:
        FingerprintMismatch: If the embeddings cannot be compared.
    """
    check_comparable(embeddings)
    return np.stack([e.hessian for e in embeddings])
