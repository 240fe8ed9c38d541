"""Write the output of a script into a page of the documentation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from t2v_fast.files import write_atomically


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def replace_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the comments <!-- name --> and <!-- /name --> of a page, at its end if there are none."""
    page = path.read_text() if path.exists() else ""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2] if rest else ""
    separator = "" if rest or not page else "\n"
    write_atomically(path, f"{before}{separator}{start}\n{text.strip()}\n{end}{after or chr(10)}".encode())


def print_or_write(page: Callable[..., str], name: str, description: str, **numbers: int) -> None:
    """Print the table that ``page`` makes. The script's option ``--write`` also puts it into a document.

    Each of ``numbers`` is an option of the script with its default, and goes to ``page``.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    arguments = parser.parse_args()
    text = page(**{option: getattr(arguments, option) for option in numbers})
    print(text)
    if arguments.write:
        replace_section(arguments.write, name, text)
