"""The scripts that complete commands and options, as the shells read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t2v_fast import cli
from t2v_fast.cli.completion import SHELLS


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    program = f"""
        source {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
        $(complete -p t2v-fast | sed -E 's/.*-F ([^ ]+).*/\\1/') t2v-fast '{words[-1]}' '{words[-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    found = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "t2v-fast.bash"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "t2v-fast", "dis") == {"distance"}
    assert completed(script, "t2v-fast", "bank", "nea") == {"nearest"}
    assert completed(script, "t2v-fast", "distance", "--met") == {"--metric"}
    assert "asymmetric_kl" in completed(script, "t2v-fast", "distance", "--metric", "asym")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell, "--json", "-"]) == 0
    script = json.loads(capsys.readouterr().out)["script"]
    for command in cli.COMMANDS:
        assert command in script
    if path := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([path, "-n", tmp_path / "script"], check=True)


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "zsh"]) == 1
    assert "pip install 't2v-fast[completion]'" in capsys.readouterr().err
