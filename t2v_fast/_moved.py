"""Modules under the names that they had before the package was divided: each still answers, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# Former module: the modules that have its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "allocation": ("estimation.allocation",),
    "cache": ("tasks.cache",),
    "cards": ("ops.gpu_specs",),
    "cotangents": ("estimation.cotangents", "estimation.likelihoods"),
    "cpu": ("gradients.fast_forward",),
    "cut": ("tasks.split_network",),
    "data": ("tasks.data",),
    "distance": ("analysis.distance",),
    "distributed": ("tasks.distributed", "bank.ray_engine"),
    "export": ("bank.export",),
    "factors": ("gradients.factors",),
    "fisher": ("estimation.estimator", "estimation.diagonal"),
    "geometry": ("ops.geometry",),
    "graph": ("gradients.graph",),
    "head": ("tasks.head",),
    "job": ("bank.job",),
    "layers": ("gradients.fast_layers",),
    "moments": ("estimation.moments",),
    "owners": ("gradients.owners",),
    "ownership": ("gradients.ownership",),
    "page": ("analysis.page",),
    "plan": ("ops.planner",),
    "plot": ("analysis.plot",),
    "precision": ("tasks.precision",),
    "probe": ("tasks.probe",),
    "profile": ("estimation.profiling",),
    "recorder": ("gradients.recorder",),
    "reference": ("ops.reference",),
    "rules": ("gradients.rules",),
    "run": ("bank.driver", "bank.engines"),
    "search": ("bank.index",),
    "selection": ("analysis.selection", "analysis.transferability"),
    "selfcheck": ("gradients.self_check",),
    "shared": ("estimation.label_sets",),
    "sources": ("tasks.sources",),
    "task2vec": ("tasks.pipeline",),
    "transfers": ("gradients.transfers",),
    "variational": ("estimation.variational",),
}
# Former name of a function or class in a former module: its name now.
RENAMED: dict[str, str] = {
    "run.Here": "InProcess",
}


class _Moved(ModuleType):
    """A former module, which looks its names up where they are now."""

    def __init__(self, name: str, homes: tuple[str, ...]) -> None:
        super().__init__(f"t2v_fast.{name}", f"Now {' and '.join(f't2v_fast.{home}' for home in homes)}.")
        self.__dict__["_homes"] = homes

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        name = RENAMED.get(f"{self.__name__.removeprefix('t2v_fast.')}.{key}", key)
        for home in self._homes:
            module = importlib.import_module(f"t2v_fast.{home}")
            if hasattr(module, name):
                warnings.warn(f"{self.__name__}.{key} is now t2v_fast.{home}.{name}", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"neither {self.__name__} nor t2v_fast.{self._homes[0]} has a name {key!r}")


def install() -> None:
    """Make the former modules importable. Folders that have a former module's name are not hidden by it."""
    package = sys.modules["t2v_fast"]
    for name, homes in MOVED.items():
        if f"t2v_fast.{name}" not in sys.modules:
            module = sys.modules[f"t2v_fast.{name}"] = _Moved(name, homes)
            if not hasattr(package, name):  # fisher and profile are functions there
                setattr(package, name, module)
