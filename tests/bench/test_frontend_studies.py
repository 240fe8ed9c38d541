"""What the studies of frontends share. The studies themselves need clones of the frontends."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.studies.frontends.table import HEADER, Row, Times, checkout, table, times


def test_table() -> None:
    rows = [Row("code, task", 1, "2e-8 apart", 1.234, 56.7), Row("other", 3, "none")]
    assert table(rows).splitlines() == [
        "| " + " | ".join(HEADER) + " |",
        "| --- | --- | --- | --- | --- |",
        "| code, task | 1 | 2e-8 apart | 1.23 | 57 |",
        "| other | 3 | none | - | - |",
    ]


@pytest.mark.parametrize("bare", [True, False])
def test_checkouts_are_importable_while_they_are_open(bare: bool, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "source").mkdir(parents=True)
    (work / "source" / "its_only_module.py").write_text("value = 7\n")
    path = work
    if bare:
        path = tmp_path / "repo"
        git = ["git", f"--git-dir={path}", f"--work-tree={work}", "-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "init", "-q", "--bare", str(path)], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "all"], check=True)
    before = list(sys.path)
    with checkout(path, "source") as folder:
        assert importlib.import_module("its_only_module").value == 7
        assert (folder / "source" / "its_only_module.py").is_file()
        assert (folder == work) is not bare
    assert sys.path == before
    assert "its_only_module" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("its_only_module")


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter([0, 6, 10, 12, 20, 28, 30, 34, 40, 42, 50, 51])  # seconds at the beginning and the end of each call
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    measured = times(lambda: calls.append("theirs"), lambda: calls.append("ours"), rounds=3)
    assert calls == ["theirs", "ours"] * 4  # the first two are not counted
    assert measured == Times(6, 2, 2)  # ratios 3, 2 and 2


def test_all_studies_make_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    studies = importlib.import_module("bench.studies.frontends.__main__")
    assert {path.stem for path in Path(studies.__file__).parent.glob("[!_]*.py")} == {*studies.STUDIES, "table"}
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        asked.append(command)
        name = command[2].rpartition(".")[2]
        if name == "peft":
            raise subprocess.CalledProcessError(1, command)
        rows = [{"frontend": name, "lines": 1, "agreement": "a"}]
        Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))

    monkeypatch.setattr("subprocess.run", run)
    page = tmp_path / "page.md"
    (tmp_path / "mats").mkdir()

    def call(*names: str) -> int:
        arguments = ["x", "--checkouts", str(tmp_path), "--write", str(page), "--only", *names]
        monkeypatch.setattr("sys.argv", arguments)
        return studies.main()

    assert call("merging", "laplace") == 0
    assert "| merging | 1 | a | - | - |\n| laplace | 1 | a |" in page.read_text()
    assert asked[0][3:6] == [str(tmp_path / "mats"), "--rounds", "5"]
    before = page.read_text()
    assert call("peft", "mammoth", "curvlinops") == 1
    said = capsys.readouterr()
    assert "| curvlinops | 1 | a |" in said.out
    assert "peft: Command" in said.err
    assert "mammoth needs clones of mammoth in --checkouts" in said.err
    assert page.read_text() == before
