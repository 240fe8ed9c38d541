"""Every example of the README runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from networks import Model
from small import shapes, write_folder

from t2v_fast import cli, demo

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    namespace = {
        "tasks": {"a": shapes(6), "b": shapes(6, 2)},
        "model": Model(),
        "loader": [(images, labels)],
        "weights": torch.ones(6),
        "images": images,
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["F"]["conv.weight"].shape == (4,)
    assert namespace["D"].shape == (2, 2)


@pytest.mark.slow
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("flowers", "birds")):
        write_folder(tmp_path / name, *shapes(6, seed=seed))
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    few = demo.demo_tasks(60)[:2]
    monkeypatch.setattr(demo, "demo_tasks", lambda **options: few)
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "t2v-fast"
        assert cli.main(arguments) == 0, command
    assert (tmp_path / "distances.csv").exists()
    assert (tmp_path / "demo" / "heatmap.png").exists()


def test_targets_and_links() -> None:
    root = Path(__file__).resolve().parent.parent
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (root / link).exists(), link
