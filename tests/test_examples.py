"""The examples run, and print what their pages of the documentation say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))


def run(name: str, capsys: pytest.CaptureFixture) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def same_but_for_numbers(text: str) -> str:
    """Text without the digits of numbers, which differ by rounding, and without the spaces that align them."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.]*(e[+-]\d+)?", "#", text)).strip()


def said_on_its_page(name: str, printed: str) -> bool:
    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
    (told,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    return same_but_for_numbers(told) == same_but_for_numbers(printed)


def test_each_example_has_a_page() -> None:
    assert len(EXAMPLES) == 7
    assert sorted(p.stem for p in (ROOT / "docs" / "tutorials").glob("*.md")) == EXAMPLES


def test_fisher_in_ten_lines(capsys: pytest.CaptureFixture) -> None:
    printed = run("fisher_in_ten_lines", capsys)
    assert said_on_its_page("fisher_in_ten_lines", printed)
    assert float(printed.split("estimator: ")[1]) < 0.1


def test_embed_and_compare(capsys: pytest.CaptureFixture) -> None:
    printed = run("embed_and_compare", capsys)
    assert said_on_its_page("embed_and_compare", printed)
    rows = {line[:14].strip(): [float(d) for d in line[14:].split()] for line in printed.splitlines()[1:5]}
    assert max(rows["digits 0 to 4"][:3]) < min(rows["stripes"][:3])


def test_job_of_tasks(capsys: pytest.CaptureFixture) -> None:
    printed = run("job_of_tasks", capsys)
    assert said_on_its_page("job_of_tasks", printed)
    assert "4 tasks embedded, 0 failed" in printed
    assert "the second run embedded 0 and found 4 done" in printed


@pytest.mark.slow
def test_choose_expert(capsys: pytest.CaptureFixture) -> None:
    printed = run("choose_expert", capsys)
    assert said_on_its_page("choose_expert", printed)
    means = dict(re.findall(r"^(chance|Task2Vec, symmetric) +([\d.]+) %", printed, re.MULTILINE))
    assert float(means["Task2Vec, symmetric"]) < float(means["chance"])


@pytest.mark.slow
def test_sharded_network() -> None:
    script = [str(ROOT / "examples" / "sharded_network.py")]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert said_on_its_page("sharded_network", done.stdout)
    assert "equal to one process: True\nequal after loading: True" in done.stdout


def test_own_loop(capsys: pytest.CaptureFixture) -> None:
    printed = run("own_loop", capsys)
    assert said_on_its_page("own_loop", printed)
    found = int(re.search(r"gradients, (\d+) have", printed).group(1))
    assert found >= 20  # of 30, where chance finds one
    fast, plain = re.search(r"first: ([\d.e+]+), by plain autograd ([\d.e+]+)", printed).groups()
    assert float(fast) == pytest.approx(float(plain), rel=1e-2)


def test_outliers(capsys: pytest.CaptureFixture) -> None:
    printed = run("outliers", capsys)
    assert said_on_its_page("outliers", printed)
    found = {
        name: [float(v) for v in values.split()] for name, values in re.findall(r"^(\S.*?)  +([\d. ]+)$", printed, re.M)
    }
    norms, loss = found["gradient norm of all parameters"], found["loss"]
    for score in (norms, loss, found["gradient norm of the second convolution"]):
        assert score[0] >= 0.9  # of 30, where chance finds one in twenty
        assert score[2] >= 0.8
    fast, plain = re.search(r"norm: ([\d.e+]+), by plain autograd ([\d.e+]+)", printed).groups()
    assert float(fast) == pytest.approx(float(plain), rel=1e-2)
