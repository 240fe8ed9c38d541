"""Where measured costs and rates are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for measured costs: ``$T2V_FAST_CACHE``, or ``~/.cache/t2v_fast``."""
    return Path(os.environ.get("T2V_FAST_CACHE") or Path.home() / ".cache" / "t2v_fast")
