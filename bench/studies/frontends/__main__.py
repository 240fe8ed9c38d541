"""Every frontend's study, and one table of all.

    python -m bench.studies.frontends --checkouts FOLDER [--rounds 5] [--only NAME ...] [--write docs/adapters.md]

FOLDER has the clones that the studies need, or their bare git directories, each named as its repository. The folder
``mml`` in it is made by ``pip install --no-deps --target FOLDER/mml -r requirements/mml.txt``. The other packages come
from ``requirements/frontends.txt``. Each study runs in a process of its own. A study that fails, or whose clone
is missing, is reported, and the exit status is 1. ``--write`` then leaves the page as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.pages import replace_section
from bench.studies.frontends.table import Row, table

# The study, and the repositories that it needs.
STUDIES = {
    "task2vec": ("aws-cv-task2vec",),
    "language": ("beyond-scale-language-data-diversity", "DataFlow"),
    "merging": ("mats",),
    "mammoth": ("mammoth",),
    "mml": ("mml",),
    "avalanche": (),
    "laplace": (),
    "curvlinops": (),
    "peft": (),
}


def find_checkouts(folder: Path | None, study: str) -> list[Path]:
    """Return the clones that a study needs. Raise FileNotFoundError, which names those that are missing."""
    paths = [(folder or Path()) / name for name in STUDIES[study]]
    missing = [path.name for path in paths if not path.is_dir()]
    if missing or (paths and folder is None):
        raise FileNotFoundError(f"{study} needs clones of {', '.join(missing or STUDIES[study])} in --checkouts")
    return paths


def run(study: str, checkouts: list[Path], rounds: int) -> list[Row]:
    """Run a study in a process of its own. Raise CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"bench.studies.frontends.{study}", *map(str, checkouts)]
        subprocess.run([*command, "--rounds", str(rounds), "--json", str(rows)], check=True, stdout=subprocess.DEVNULL)
        return [Row(**row) for row in json.loads(rows.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=Path, help="the folder with the clones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    rows, failures = [], []
    for study in arguments.only:
        try:
            rows += run(study, find_checkouts(arguments.checkouts, study), arguments.rounds)
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append(f"{study}: {error}")
    print(table(rows))
    for failure in failures:
        print(failure, file=sys.stderr)
    if arguments.write and not failures:
        replace_section(arguments.write, "frontends", table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
