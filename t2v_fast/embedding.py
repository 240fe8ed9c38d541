"""Embeddings: the vectors of tasks, the settings that they were made with, and their files."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .files import canonical_json, write_atomically

FORMAT = "t2v-fast embedding"
VERSION = 1
CHECKSUM = "checksum"  # key of the metadata

LONGEST_NAME = 1000  # characters of a task's name
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_ACTS = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_BIDI}]")


def escaped(text: str) -> str:
    """Return text that can be shown anywhere: what acts on a terminal or turns text around is written as an escape.

    These are control characters, line separators, marks that set the direction of text, and halves of characters, which
    stand for the bytes of a file name that is not UTF-8. All other text stays as it is.

    Example:
        >>> print(escaped("caf\u00e9 \x1b[31m\u202e"))
        café \\x1b[31m\\u202e
    """
    return _ACTS.sub(lambda match: f"\\{f'x{ord(match[0]):02x}' if match[0] < 'Ā' else f'u{ord(match[0]):04x}'}", text)


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names, and how many more there are.

    Example:
        >>> first_of(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


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

    def _repr_html_(self) -> str:
        """Show the embedding as a small table in a notebook."""
        shown = {
            "task": self.meta.get("task"),
            "classes": len(self.meta.get("classes", ())) or None,
            "examples": self.num_examples,
            "entries": f"{len(self)} in {len(self.layers)} layers",
            "norm": f"{self.norm:.4g}",
            "probe": self.fingerprint.get("probe"),
            "fingerprint": self.fingerprint_id,
        }
        rows = "".join(
            f"<tr><th>{key}</th><td>{html.escape(escaped(str(value)))}</td></tr>"
            for key, value in shown.items()
            if value is not None
        )
        return f"<table><caption>Embedding</caption>{rows}</table>"

    def to_numpy(self) -> np.ndarray:
        """Return ``hessian``, the vector [D], as an array of the caller's own."""
        return self.hessian.copy()

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
        """Write the embedding to a safetensors file, with a checksum of everything in it.

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
        arrays = {"hessian": self.hessian, "scale": self.scale}
        if self.standard_error is not None:
            arrays["standard_error"] = self.standard_error
        write_atomically(path, save(arrays, metadata={**header, CHECKSUM: _checksum(header, arrays)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Embedding:
        """Read a file that :meth:`save` wrote, and compare it with its checksum, which files of old versions lack.

        Nothing in the file is unpickled or run. If the name of the task has characters that act on a terminal, they are
        replaced by :func:`escaped`, with a warning.

        Raises:
            ValueError: For any other file, and for what is no regular file, such as a pipe. The message names the file.
        """
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is no regular file, as an embedding is")
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
            checksum = header.pop(CHECKSUM, None)
            if checksum is not None and checksum != _checksum(header, arrays):
                raise ValueError("it does not fit its checksum")
            return cls(
                **arrays,
                layers=tuple(tuple(layer) for layer in json.loads(header["layers"])),
                num_examples=int(header["num_examples"]),
                meta=_with_names_checked(json.loads(header["meta"]), path),
                fingerprint=json.loads(header["fingerprint"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is a damaged embedding: {error}") from None


def _checksum(header: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """Return the checksum of a file's metadata and of the names, types, shapes and bytes of its arrays."""
    state = hashlib.blake2b(canonical_json(header).encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        state.update(canonical_json([name, array.dtype.str, array.shape]).encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def _with_names_checked(meta: Any, path: str | os.PathLike) -> Any:
    """Return ``meta`` of a file, with the names of its task and family escaped where they need it."""
    for key in ("task", "family"):
        name = meta.get(key) if isinstance(meta, dict) else None
        if isinstance(name, str):
            if len(name) > LONGEST_NAME:
                raise ValueError(f"its {key} has {len(name)} characters, expected at most {LONGEST_NAME}")
            if (shown := escaped(name)) != name:
                warnings.warn(f"{path}: the name of its {key} has control characters: {shown}", stacklevel=3)
                meta[key] = shown
    return meta


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
