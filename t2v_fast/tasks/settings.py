"""The options of the pipeline, in one table that Python, job files and the command line share."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..estimation.cotangents import ESTIMATORS
from ..estimation.estimator import BATCH_MEAN
from .data import TASK_TYPES
from .head import METHODS as HEAD_METHODS

METHODS = ("fisher", "variational")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = {
    "estimator": "what is estimated, and how precisely",
    "head": "the linear head that is fitted to each task",
    "data": "data and caches",
    "running": "where and how the pipeline runs",
}
# What the mappings may hold: keywords of `fit_heads`, and of `variational_fisher` besides num_samples.
NAMES_IN = {
    "head_options": (
        "weight_decay",
        "temperature",
        "max_iterations",
        "tolerance",
        "learning_rate",
        "epochs",
        "batch_size",
        "draws",
    ),
    "method_options": ("epochs", "beta", "learning_rate", "head_learning_rate", "num_samples", "progress"),
}
# Options that a job file refuses, each with the reason.
NOT_IN_JOBS = {"progress": "a job shows the progress of all its tasks; `t2v-fast embed --quiet` turns that display off"}


class SettingError(ValueError):
    """An option with a value that cannot be used.

    ``option`` is the option's name, ``given`` its value, and ``expected`` says which values can be used.
    """

    def __init__(self, option: str, given: Any, expected: str) -> None:
        super().__init__(option, given, expected)
        self.option, self.given, self.expected = option, given, expected

    def __str__(self) -> str:
        if self.option in ("estimator", "task_type"):
            return f"unknown {self.option} {shown(self.given)}: expected {self.expected}"
        return f"{self.option} is {shown(self.given)}, expected {self.expected}"


def shown(value: Any) -> str:
    """A short text for a value in an error message: the value if it is simple, otherwise the name of its type."""
    simple = isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device))
    try:
        text = repr(value) if simple else type(value).__name__
    except ValueError:  # an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) < 90 else f"{text[:80]}..."


@dataclass(frozen=True)
class Kind:
    """A type of options. ``convert`` raises TypeError, ValueError, OverflowError or RuntimeError for a wrong value."""

    expected: str  # describes the values that can be used, for error messages
    convert: Callable[[Any], Any]
    read: Callable[[str], Any] = str  # from the text of a command line


def _whole(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    number = operator.index(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise OverflowError
    return number


def _number(value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return dict(value)


def _folder(value: Any) -> str | os.PathLike:
    if not isinstance(os.fspath(value), str):
        raise TypeError
    return value


def _layers(value: Any) -> int | str:
    if isinstance(value, str) and value:
        return value
    number = _whole(value)
    if number < 0:
        raise ValueError
    return number


def _device(value: Any) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):  # a number stands for a GPU
        raise TypeError
    return torch.device(value)


def _dtype(value: Any) -> torch.dtype:
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise ValueError
    return dtype


def _read_layers(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() else text


WHOLE = Kind("a whole number", _whole, int)
NUMBER = Kind("a number", _number, float)
TEXT = Kind("text", _text)
SWITCH = Kind("true or false", _switch)
MAPPING = Kind("a mapping from names to values", _mapping)
FOLDER = Kind("the path of a folder", _folder)
LAYERS = Kind("how many layers to skip, at least 0, or the name of the last one", _layers, _read_layers)
DEVICE = Kind("a device such as 'cpu', 'cuda' or 'cuda:1'", _device)
DTYPE = Kind("a floating-point one: float32, float64, bfloat16 or float16", _dtype)


@dataclass(frozen=True)
class Option:
    """The type, group, help text, choices, minimum and default of an option."""

    kind: Kind
    group: str  # a key of GROUPS
    help: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    default: Any = None

    def convert(self, name: str, value: Any) -> Any:
        """The value in the option's own type. Raises SettingError for another type, or if it is none of the choices."""
        if value is None and self.default is None:
            return {} if self.kind is MAPPING else None
        try:
            value = self.kind.convert(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            large = self.kind is WHOLE and isinstance(error, OverflowError)
            expected = "a number from -2^63 to 2^63 - 1" if large else self.kind.expected
            raise SettingError(name, value, expected) from None
        if self.choices and value not in self.choices:
            raise SettingError(name, value, f"one of {', '.join(self.choices)}")
        return value

    def read(self, name: str, text: str) -> Any:
        """The value of a text from a command line. Raises SettingError as :meth:`convert` does."""
        try:
            value = self.kind.read(text)
        except ValueError:
            raise SettingError(name, text, self.kind.expected) from None
        self.convert(name, value)
        return value

    def check(self, name: str, value: Any) -> Any:
        """Convert a value; SettingError also for a number below the minimum."""
        value = self.convert(name, value)
        if self.minimum is not None and value is not None and value < self.minimum:
            raise SettingError(name, value, f"at least {self.minimum}")
        return value


def _about(*details: Any, **more: Any) -> dict[str, Option]:
    return {"option": Option(*details, **more)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of :class:`t2v_fast.Task2Vec`, checked. The documentation of that class explains each option.

    ``Task2Vec(probe, samples=2)``, the section ``settings:`` of a job file and the options of ``t2v-fast embed`` have
    the same names, defaults and checks, because all three are made from the fields of this class. A ``dtype`` may be
    given by its name.

    Raises:
        SettingError: an option cannot be used. This ValueError names the option, what was given and what is expected.
        ValueError: two options do not go together.

    Example:
        >>> settings = Settings(samples=3, dtype="bfloat16")
        >>> settings.samples, settings.dtype, settings.estimator
        (3, torch.bfloat16, 'deflated')
        >>> Settings(samples=0)
        Traceback (most recent call last):
            ...
        t2v_fast.tasks.settings.SettingError: samples is 0, expected at least 1
    """

    estimator: str = field(
        default="deflated",
        metadata=_about(
            TEXT,
            "estimator",
            "how the Fisher is estimated; deflated combines leading eigenvectors with one random cotangent",
            choices=(*ESTIMATORS, BATCH_MEAN),
        ),
    )
    samples: int = field(
        default=2, metadata=_about(WHOLE, "estimator", "cotangents for each image, on average", minimum=1)
    )
    tolerance: float | None = field(
        default=None,
        metadata=_about(
            NUMBER, "estimator", "add images and cotangents until the relative error is below; samples is ignored"
        ),
    )
    method: str = field(
        default="fisher",
        metadata=_about(TEXT, "estimator", "fisher, or variational: the paper's robust Fisher", choices=METHODS),
    )
    method_options: dict[str, Any] | None = field(
        default=None,
        metadata=_about(
            MAPPING,
            "estimator",
            "options of the variational method: epochs, beta, learning_rate, head_learning_rate, and num_samples, the "
            "number of images that are drawn in an epoch",
        ),
    )
    unsupported: str = field(
        default="error",
        metadata=_about(
            TEXT,
            "estimator",
            "what to do about weights that the probe transforms before use: refuse the probe, or compute them exactly",
            choices=("error", "exact"),
        ),
    )
    task_type: str = field(
        default="multiclass",
        metadata=_about(TEXT, "head", "one label for each image, or a vector of 0 and 1", choices=tuple(TASK_TYPES)),
    )
    balanced: bool = field(default=True, metadata=_about(SWITCH, "head", "give each class the same total weight"))
    head: str = field(
        default="newton", metadata=_about(TEXT, "head", "the method that fits the head", choices=HEAD_METHODS)
    )
    head_options: dict[str, Any] | None = field(
        default=None, metadata=_about(MAPPING, "head", "options of the method that fits the head, such as weight_decay")
    )
    batch_size: int | None = field(
        default=None,
        metadata=_about(WHOLE, "data", "images in a batch (default: 32, fewer large ones on a CPU)", minimum=1),
    )
    num_workers: int = field(
        default=0, metadata=_about(WHOLE, "data", "processes that load images, for one task at a time", minimum=0)
    )
    cache_megabytes: int = field(
        default=512,
        metadata=_about(
            WHOLE, "data", "megabytes for decoded images between the two passes; 0 for no cache", minimum=0
        ),
    )
    cache_folder: str | os.PathLike | None = field(
        default=None, metadata=_about(FOLDER, "data", "folder whose disk holds the decoded images (default: memory)")
    )
    activation_megabytes: int = field(
        default=1024,
        metadata=_about(
            WHOLE,
            "data",
            "megabytes for activations that are kept from the features to the Fisher; 0 for two forward passes",
            minimum=0,
        ),
    )
    skip_layers: int | str = field(
        default=0,
        metadata=_about(
            LAYERS, "data", "leave the first layers out of the embedding: how many, or the name of the last one"
        ),
    )
    feature_folder: str | os.PathLike | None = field(
        default=None,
        metadata=_about(
            FOLDER, "data", "folder that keeps the outputs of the skipped layers for later passes and runs"
        ),
    )
    device: str | torch.device | None = field(
        default=None,
        metadata=_about(DEVICE, "running", "cpu, cuda, cuda:1, ... (default: where the probe is, usually cpu)"),
    )
    dtype: str | torch.dtype | None = field(
        default=None,
        metadata=_about(DTYPE, "running", f"precision of the network: {', '.join(DTYPES)} (default: the probe's own)"),
    )
    seed: int = field(default=0, metadata=_about(WHOLE, "running", "seed of all random numbers"))
    self_check: bool = field(
        default=True, metadata=_about(SWITCH, "running", "compare a few images with plain autograd")
    )
    progress: bool = field(default=False, metadata=_about(SWITCH, "running", "show progress bars"))

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(name, getattr(self, name)))
        fitting = self.estimator == "deflated" and self.method == "fisher"
        if self.tolerance is not None and not (0 < self.tolerance < math.inf and fitting):
            expected = "a positive number, with estimator='deflated' and method='fisher'"
            raise SettingError("tolerance", self.tolerance, expected)
        if self.method == "fisher" and self.method_options:
            raise ValueError("method_options are for method='variational'")
        if self.feature_folder is not None and not self.skip_layers:
            raise ValueError("feature_folder is for what skipped layers make of the images: pass skip_layers, too")
        for mapping, names in NAMES_IN.items():
            for name, value in getattr(self, mapping).items():
                if name not in names:
                    raise ValueError(f"{mapping} has no {shown(name)}: expected some of {', '.join(names)}")
                if isinstance(value, str) and name != "weight_decay":  # which may be CROSS_VALIDATED
                    raise ValueError(f"{mapping}: {name} is {shown(value)}, expected a number")

    def as_dict(self) -> dict[str, Any]:
        """The options by name, as :class:`Task2Vec` takes them."""
        return {name: getattr(self, name) for name in OPTIONS}


OPTIONS: dict[str, Option] = {f.name: replace(f.metadata["option"], default=f.default) for f in fields(Settings)}


def other_settings(settings: Any, meta: Mapping[str, Any]) -> list[str]:
    """Compare settings with those that an embedding was made with, as its ``meta`` has them.

    These settings make no two embeddings incomparable: they decide how exact one is.

    Args:
        settings: A :class:`Settings`, or a pipeline with the same attributes.
        meta: Of a comparable embedding.

    Returns:
        A text for each difference.

    Example:
        >>> other_settings(Settings(samples=3), {"estimator": "deflated", "samples": 2, "seed": 0})
        ['samples is 2, not 3']
    """
    names = ["seed"]
    if settings.method == "fisher":
        names += ["estimator", "tolerance"]
        if settings.estimator == BATCH_MEAN:
            names += ["batch_size"] if settings.batch_size is not None else []
        elif settings.estimator in ("exact", "empirical"):
            names.remove("seed")
        elif settings.tolerance is None and meta.get("tolerance") is None:  # otherwise a measured number is there
            names.append("samples")
    made = {"tolerance": None, **meta}
    return [
        f"{name} is {made[name]!r}, not {getattr(settings, name)!r}"
        for name in names
        if name in made and made[name] != getattr(settings, name)
    ]
