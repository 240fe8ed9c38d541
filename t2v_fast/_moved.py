"""Modules under the names that they had before the package was divided: each still answers, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Former module: the modules that have its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "allocation": ("estimation.allocation", "estimation.tolerance"),
    "cache": ("tasks.cache",),
    "cards": ("ops.gpu_specs",),
    "cotangents": ("estimation.cotangents", "estimation.likelihoods"),
    "cpu": ("gradients.fast_forward",),
    "cut": ("tasks.split_network",),
    "data": ("tasks.data",),
    "distributed": ("tasks.distributed", "bank.ray_engine"),
    "export": ("bank.export",),
    "factors": ("gradients.factors", "gradients.grouped"),
    "fisher": ("estimation.estimator", "estimation.diagonal", "estimation.packing"),
    "geometry": ("ops.geometry",),
    "graph": ("gradients.graph", "gradients.refusals"),
    "head": ("tasks.head", "tasks.head_solvers"),
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
    "recorder": ("gradients.parameters", "gradients.recorder"),
    "reference": ("ops.reference",),
    "rules": ("gradients.rules", "gradients.refusals"),
    "run": ("bank.driver", "bank.engines"),
    "search": ("bank.index",),
    "selection": ("analysis.selection", "analysis.transferability"),
    "selfcheck": ("estimation.self_check",),
    "shared": ("estimation.label_sets",),
    "sources": ("tasks.sources",),
    "task2vec": ("tasks.pipeline", "tasks.assemble", "tasks.settings", "tasks.stages"),
    "transfers": ("gradients.transfers",),
    "variational": ("estimation.variational",),
}
# Former name of a function or class in a former module: its name now.
RENAMED: dict[str, str] = {
    "allocation.LEAST": "MIN_DRAWN",
    "allocation.Need": "SamplingStats",
    "allocation.everyone": "full_allocation",
    "allocation.until": "sample_until",
    "factors.CHUNK": "MAX_GRADIENT_ENTRIES",
    "graph.mend_batch_norms": "fix_batch_norm_gradients",
    "job.LEAST": "PROBE_MINIMUMS",
    "job.Work": "WorkItem",
    "layers.FEW": "MAX_POINTWISE_PIXELS",
    "layers.LEAST": "MIN_MULTIPLICATIONS",
    "layers.MATRIX": "MAX_MATRIX_GROWTH",
    "layers.WINOGRAD": "MAX_WINOGRAD_COST",
    "owners.owned": "owner_along",
    "ownership.ask": "probe_node",
    "ownership.call": "call_node",
    "rules.problem": "unsupported_reason",
    "run.Here": "InProcess",
    "task2vec.LEAST": "MIN_BATCH_SIZE",
    "task2vec.MOST": "MAX_BATCH_SIZE",
    "task2vec.PIXELS": "MAX_CPU_BATCH_PIXELS",
    "transfers.acted": "interacting_inputs",
}


class _Moved(ModuleType):
    """A former module, which looks its names up where they are now.

    What is assigned to a name goes there, too, so that tests that patch a former name change what the library uses.
    """

    def __init__(self, name: str, homes: tuple[str, ...]) -> None:
        super().__init__(f"t2v_fast.{name}", f"Now {' and '.join(f't2v_fast.{home}' for home in homes)}.")
        self.__dict__.update(__spec__=ModuleSpec(self.__name__, None), __package__="t2v_fast")
        self.__dict__.update(_homes=homes, _replaced={})

    def _places(self, key: str) -> Iterator[tuple[ModuleType, str]]:
        """The modules that have a former name now, each with its name there."""
        name = RENAMED.get(f"{self.__name__.removeprefix('t2v_fast.')}.{key}", key)
        for home in self._homes:
            module = importlib.import_module(f"t2v_fast.{home}")
            if hasattr(module, name):
                yield module, name

    def __getattr__(self, key: str) -> Any:
        if key == "__all__":
            return [name for name in dir(self) if not name.startswith("_")]
        if key.startswith("__"):
            raise AttributeError(key)
        for module, name in self._places(key):
            warnings.warn(f"{self.__name__}.{key} is now {module.__name__}.{name}", DeprecationWarning, stacklevel=2)
            return getattr(module, name)
        raise AttributeError(f"neither {self.__name__} nor t2v_fast.{self._homes[0]} has a name {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        places = [] if key.startswith("__") else list(self._places(key))
        if not places:
            super().__setattr__(key, value)
            return
        found = [(module, name, getattr(module, name)) for module, name in places]
        replaced = [place for place in found if place[2] is found[0][2]]  # another object is another thing
        self._replaced.setdefault(key, []).append(replaced)
        for module, name, _ in replaced:
            setattr(module, name, value)

    def __delattr__(self, key: str) -> None:
        """Take an assignment back, which is what libraries for tests delete a name for."""
        if not self._replaced.get(key):
            super().__delattr__(key)
            return
        for module, name, former in self._replaced[key].pop():
            setattr(module, name, former)

    def __dir__(self) -> list[str]:
        """The former names of what the modules define, besides those of any module."""
        prefix = f"{self.__name__.removeprefix('t2v_fast.')}."
        former = {new: old.removeprefix(prefix) for old, new in RENAMED.items() if old.startswith(prefix)}
        names = set(object.__dir__(self))
        for home in self._homes:
            module = importlib.import_module(f"t2v_fast.{home}")
            for name, value in vars(module).items():
                own = name.isupper() or getattr(value, "__module__", None) == module.__name__
                if own and not name.startswith("_"):
                    names.add(former.get(name, name))
        return sorted(names)


def install(public: set[str]) -> None:
    """Make the former modules importable, except where a folder or a ``public`` name of the package has their name."""
    package = sys.modules["t2v_fast"]
    for name, homes in MOVED.items():
        if f"t2v_fast.{name}" not in sys.modules:
            module = sys.modules[f"t2v_fast.{name}"] = _Moved(name, homes)
            if name not in public:  # fisher and profile are functions there
                setattr(package, name, module)
