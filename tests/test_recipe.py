"""The recipe for conda-forge and the workflows agree with pyproject.toml, and one version is said everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import t2v_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RECIPE: dict[str, Any] = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = {"torch": "pytorch"}  # where conda-forge's name is another


def requirements(given: list[str]) -> dict[str, str]:
    """The bound of each package, without markers and spaces."""
    parts = [re.fullmatch(r"([\w-]+)\s*([<>=!~][^;]*)?(;.*)?", line.strip()) for line in given]
    return {NAMES.get(p[1], p[1]): (p[2] or "").strip() for p in parts if p}


def test_requirements() -> None:
    run = requirements(RECIPE["requirements"]["run"])
    assert run.pop("python") == PROJECT["project"]["requires-python"]
    assert run == requirements(PROJECT["project"]["dependencies"])
    built = requirements([line for line in RECIPE["requirements"]["build"] if "${{" not in line])
    built |= requirements(RECIPE["requirements"]["host"])
    wanted = requirements(PROJECT["build-system"]["requires"])
    assert len(wanted) >= 4
    assert built | wanted == built


def test_names() -> None:
    project, about = PROJECT["project"], RECIPE["about"]
    assert RECIPE["package"]["name"] == project["name"]
    assert (about["summary"], about["license"]) == (project["description"], project["license"])
    assert RECIPE["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in project["scripts"].items()]


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert t2v_fast.__version__ == RECIPE["context"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    sections = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert sections[1].startswith(f"{version} (")


def test_python_versions() -> None:
    """The classifiers name the releases of Python that the wheel is tested with."""
    from install_matrix import COMBINATIONS

    named = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if ":: 3." in c]
    assert named == sorted(COMBINATIONS, key=lambda release: int(release.partition(".")[2]))


def test_table_of_versions() -> None:
    """The page shows what the results say; nothing is written by hand."""
    import install_matrix

    results = install_matrix.noted()
    assert results.keys() <= {f"python{p}-torch{t}" for p, t in install_matrix.COMBINATIONS.items()}
    assert all(install_matrix.passed(result) for result in results.values())
    assert install_matrix.table(results) in install_matrix.PAGE.read_text()


def test_results_that_are_no_success() -> None:
    import install_matrix

    good = {"counts": {"passed": 5, "skipped": 1}, "cpu": "available"}
    assert install_matrix.passed(good)
    for change in ({"counts": {"passed": 5, "failed": 1}}, {"counts": {"passed": 5, "error": 1}}, {"counts": {}}):
        assert not install_matrix.passed(good | change)
    assert not install_matrix.passed(good | {"cpu": "the compiled extension did not load"})


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows(path: Path) -> None:
    """They have not run, say so, and call only targets that there are."""
    text = path.read_text()
    assert text.startswith("# This workflow has not run yet.")
    assert yaml.safe_load(text)["jobs"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    called = re.findall(r"\bmake ([a-z-]+)", text)
    assert set(called) <= set(targets)
