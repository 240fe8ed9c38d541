"""The documentation site: Markdown pages, and an API reference from the docstrings. ``make docs`` builds it.

Warnings are errors there. A reference in a docstring must name an object that can be imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import t2v_fast

project = "t2v-fast"
author = "the t2v-fast authors"
project_copyright = author
release = version = t2v_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
nitpicky = True
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "t2v-fast"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def load_types() -> None:
    """Import what modules import for type checkers only, so that their annotations can be resolved."""
    for found in pkgutil.walk_packages(t2v_fast.__path__, "t2v_fast."):
        # The compiled libraries are no modules, though their names look so.
        if found.name.rpartition(".")[2].startswith(("_", "libt2v_")):
            continue
        module = importlib.import_module(found.name)
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                exec(compile(ast.Module(node.body, []), module.__file__, "exec"), vars(module))


load_types()


class Modules(SphinxDirective):
    """``.. modules:: PACKAGE``: all modules of a sub-package; ``:first:`` names those that come first."""

    required_arguments = 1
    option_spec = {"first": str.split}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        package = importlib.import_module(self.arguments[0])
        names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
        first = self.options.get("first", [])
        if missing := [name for name in first if name not in names]:
            raise self.error(f"{package.__name__} has no module {missing[0]!r}")
        text = f".. automodule:: {package.__name__}\n   :ignore-module-all:\n\n"  # what it imports is below
        for name in [*first, *(n for n in names if n not in first)]:
            full = f"{package.__name__}.{name}"
            text += f"{full}\n{'-' * len(full)}\n\n.. automodule:: {full}\n\n"
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def find(path: str) -> Any:
    """The object at a dotted path; None if there is none, or only a former name of it."""
    parts = path.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:k]))
        except (ImportError, ValueError):
            continue
        if type(found) is not ModuleType:  # a former module, which a function's or a package's name may hide
            continue
        for name in parts[k:]:
            if inspect.isclass(found) and not hasattr(found, name) and _is_set(found, name):
                return inspect.Parameter.empty  # an attribute of instances: it is there, whatever it is
            found = getattr(found, name, None)
            if found is None:
                return None
        return found
    return None


def _is_set(owner: type, name: str) -> bool:
    if name in getattr(owner, "__dataclass_fields__", {}):
        return True
    try:
        return re.search(rf"self\.{name}\b", inspect.getsource(owner)) is not None
    except (OSError, TypeError):
        return False


def resolve(app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.Element) -> nodes.Element | None:
    """A link to where an object is defined; its name alone where the site does not describe the object."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip(".")
    module, owner = node.get("py:module"), node.get("py:class")
    scopes = [f"{module}.{owner}.", f"{module}.", "", "t2v_fast.", "builtins.", "typing."]
    for path in [f"{scope}{target}" for scope in scopes if "None" not in scope]:
        if (found := find(path)) is None:
            continue
        home = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        known = env.domains["py"].objects
        for name in (path, ".".join(map(str, home))):
            if name in known:
                entry = known[name]
                return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode)
        return contnode
    return None


def keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what Napoleon does to a property: it takes the words before a colon for a type."""
    if what in ("property", "attribute"):
        lines[:] = [*prepare_docstring(inspect.getdoc(obj) or ""), ""]


PLAIN = [  # mathematics and names that reStructuredText would take for markup
    (re.compile(r"([\[ ])\*(?=\w+[\],])"), r"\1\\*"),  # shapes: [O, *kernel]
    (re.compile(r"\|(\w+)\|"), r"\\|\1\\|"),  # norms: |W|^2
    (re.compile(r"(\w)_(?=[\s,.;:)]|$)"), r"\1\\_"),  # names that end in an underscore: MALLOC_
]


def plain_mathematics(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape :data:`PLAIN` outside of literals."""
    for k, line in enumerate(lines):
        parts = line.split("``")
        for at in range(0, len(parts), 2):
            for pattern, escaped in PLAIN:
                parts[at] = pattern.sub(escaped, parts[at])
        lines[k] = "``".join(parts)


def readable_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """``<factory>``, the default of some fields of data classes, is no Python, so no type would be recognised."""
    return (signature and signature.replace("<factory>", "..."), returns)


def setup(app: Sphinx) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # former names, which references must not use
    app.add_directive("modules", Modules)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)  # after Napoleon's
    app.connect("autodoc-process-docstring", plain_mathematics, priority=700)
