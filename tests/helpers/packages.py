"""Packages of other people that tests import: what it takes to import them here."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType


def import_avalanche() -> ModuleType:
    """Import Avalanche with an empty module in place of wandb, which only one of its loggers uses."""
    sys.modules.setdefault("wandb", ModuleType("wandb"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("avalanche")
