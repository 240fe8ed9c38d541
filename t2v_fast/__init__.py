"""t2v-fast: exact diagonal Fisher information and Task2Vec embeddings, fast.

The names of this module are imported when they are first used: torch takes seconds, and not every command needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:
    from . import ops
    from .analysis import distance
    from .bank.store import Bank, BankError
    from .embedding import Embedding, FingerprintMismatch
    from .estimation.diagonal import FisherDiagonal
    from .estimation.estimator import fisher
    from .estimation.norms import GradientNorms, gradient_norms
    from .estimation.profiling import Profile, profile
    from .estimation.self_check import SelfCheckError
    from .gradients.graph import UnsupportedError
    from .gradients.recorder import FisherRecorder
    from .tasks.data import DataError, TaskData
    from .tasks.pipeline import Task2Vec
    from .tasks.precision import reduce_precision
    from .tasks.probe import Preprocessing, Probe, load_probe
    from .zoo import rank_zoo

__version__ = "0.2.0"
__all__ = [
    "Bank",
    "BankError",
    "DataError",
    "Embedding",
    "FingerprintMismatch",
    "FisherDiagonal",
    "FisherRecorder",
    "GradientNorms",
    "Preprocessing",
    "Probe",
    "Profile",
    "SelfCheckError",
    "Task2Vec",
    "TaskData",
    "UnsupportedError",
    "distance",
    "fisher",
    "gradient_norms",
    "load_probe",
    "ops",
    "profile",
    "rank_zoo",
    "reduce_precision",
]

# The module of each name in __all__ that is no module itself.
_HOMES = {
    "Bank": "bank.store",
    "BankError": "bank.manifest",
    "DataError": "tasks.data",
    "Embedding": "embedding",
    "FingerprintMismatch": "embedding",
    "FisherDiagonal": "estimation.diagonal",
    "FisherRecorder": "gradients.recorder",
    "GradientNorms": "estimation.norms",
    "Preprocessing": "tasks.probe",
    "Probe": "tasks.probe",
    "Profile": "estimation.profiling",
    "SelfCheckError": "estimation.self_check",
    "Task2Vec": "tasks.pipeline",
    "TaskData": "tasks.data",
    "UnsupportedError": "gradients.graph",
    "fisher": "estimation.estimator",
    "gradient_norms": "estimation.norms",
    "load_probe": "tasks.probe",
    "profile": "estimation.profiling",
    "rank_zoo": "zoo",
    "reduce_precision": "tasks.precision",
}
_PACKAGES = ("analysis", "bank", "embedding", "estimation", "files", "gradients", "ops", "spans", "tasks", "zoo")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name == "distance":
        found = importlib.import_module(".analysis.distance", __name__)
    elif name in _PACKAGES:
        found = importlib.import_module(f".{name}", __name__)
        if hasattr(found, "__path__") and not hasattr(found, "__getattr__"):
            vars(found)["__getattr__"] = partial(_module_of, found)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _module_of(package: ModuleType, name: str) -> ModuleType:
    """Import a module of a sub-package when it is first used as an attribute: ``t2v_fast.tasks.pipeline``."""
    found = None if name.startswith("_") else importlib.util.find_spec(f"{package.__name__}.{name}")
    if found is None:
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
    return importlib.import_module(found.name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


_moved.install(set(__all__))
