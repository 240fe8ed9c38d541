"""Public names and their parameters. ``python tests/helpers/signatures.py FILE`` writes those of t2v_fast to FILE."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def signature(found: Any) -> str | None:
    """Parameters with their defaults, without annotations; None for what cannot be called."""
    found = getattr(found, "__func__", found)
    if isinstance(found, property):
        return "property"
    if not callable(found):
        return None
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    return re.sub(r" at 0x[0-9a-f]+", "", str(bare))


def names_of(module: ModuleType, package: str) -> dict[str, str | None]:
    """Public names that ``module`` defines, or re-exports where it is the package itself."""
    found: dict[str, str | None] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or inspect.ismodule(value):
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            if not value.__module__.startswith(package) or module.__name__ not in (package, value.__module__):
                continue
            found[key] = signature(value)
            if inspect.isclass(value):
                found |= {f"{key}.{k}": signature(v) for k, v in vars(value).items() if not k.startswith("_")}
        elif key.isupper() and re.search(rf"^{key}\b", inspect.getsource(module), re.MULTILINE):
            found[key] = None
    return found


if __name__ == "__main__":
    package = importlib.import_module("t2v_fast")
    every = [package.__name__]
    every += [m.name for m in pkgutil.walk_packages(package.__path__, "t2v_fast.")]
    wanted = [name for name in every if "._" not in name and ".kernels" not in name and "__main__" not in name]
    for name in wanted:
        importlib.import_module(name)
    names = {name: names_of(sys.modules[name], "t2v_fast") for name in wanted}
    Path(sys.argv[1]).write_text(json.dumps(names, indent=1, sort_keys=True) + "\n")
