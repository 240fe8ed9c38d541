"""Packages of other people that tests import: what it takes to import them here."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType


def import_avalanche() -> ModuleType:
    """Import Avalanche with an empty module in place of wandb, which only one of its loggers uses.

    The empty module is taken away afterwards, because other packages look whether wandb is there.
    """
    absent = "wandb" not in sys.modules
    sys.modules.setdefault("wandb", ModuleType("wandb"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("avalanche.training.supervised")
            return importlib.import_module("avalanche")
    finally:
        if absent:
            del sys.modules["wandb"]
