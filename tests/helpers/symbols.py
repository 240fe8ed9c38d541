"""What a compiled library takes from other libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path


def taken(library: Path) -> set[str]:
    """The symbols that a library takes from elsewhere: of torch only C functions, and nothing of Python."""
    names = subprocess.check_output(["nm", "--dynamic", "--undefined-only", library], text=True)
    symbols = {line.split()[-1] for line in names.splitlines()}
    assert [name for name in symbols if "Py" in name or "3c10" in name or "2at" in name or "5torch" in name] == []
    return symbols
