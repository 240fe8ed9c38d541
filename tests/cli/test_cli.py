"""The command line, run as a user runs it."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small import shapes, small_probe, write_folder

from t2v_fast import Bank, Embedding, cli, ops
from t2v_fast.analysis.distance import asymmetric_distance, centred_distance, pdist
from t2v_fast.analysis.selection import Model2Vec
from t2v_fast.tasks.pipeline import Task2Vec


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.options, "load_probe", lambda name, **options: small_probe(len(name)))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [str(write_folder(tmp_path / f"task {s}", *shapes(classes=3 - s % 2, seed=s))) for s in range(3)]


def run(*arguments: str) -> int:
    return cli.main([str(a) for a in arguments])


def test_embed_then_distance(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("embed", *folders, "--output", out, "--estimator", "exact") == 0
    found = capsys.readouterr()
    assert "task 0: 24 images, 3 classes" in found.out
    assert not found.err  # bars are for terminals
    assert Embedding.load(out / "task 1.safetensors").meta["estimator"] == "exact"
    assert run("embed", *folders, "--output", out, "--quiet", "--estimator", "exact") == 0
    assert capsys.readouterr().out.count("already in") == 3
    assert run("distance", out, "--csv", tmp_path / "d.csv", "--plot", tmp_path / "d.png") == 0
    with (tmp_path / "d.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["task", "task 0", "task 1", "task 2"]
    assert (tmp_path / "d.png").stat().st_size > 10_000
    for metric in ("asymmetric_kl", "jsd", "asymmetric", "centred"):
        assert run("distance", out, "--metric", metric, "--csv", tmp_path / f"{metric}.csv") == 0
        with (tmp_path / f"{metric}.csv").open() as file:
            found = np.array([row[1:] for row in list(csv.reader(file))[1:]], dtype=float)
        embeddings = [Embedding.load(out / f"task {k}.safetensors") for k in range(3)]
        of_a_set = {"asymmetric": asymmetric_distance, "centred": centred_distance}
        want = of_a_set[metric](embeddings, embeddings) if metric in of_a_set else pdist(embeddings, metric)
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    # Other settings never mix with what is there.
    assert run("embed", *folders, "--output", out, "--quiet", "--probe", "other", "--estimator", "exact") == 1
    assert "was made with other settings: pass --overwrite" in capsys.readouterr().err
    assert run("embed", folders[0], "--output", out, "--samples", "3") == 1
    assert (
        "was made with other settings (estimator is 'exact', not 'deflated', samples is 2, not 3): pass"
        in capsys.readouterr().err
    )
    assert run("embed", folders[0], "--output", out, "--estimator", "exact", "--samples", "3") == 0
    assert "(24 images, 3 classes; --overwrite embeds the folder again)" in capsys.readouterr().out
    # And neither do other images.
    (sorted(Path(folders[1]).rglob("*.png"))[0]).unlink()
    assert run("embed", folders[1], "--output", out, "--estimator", "exact") == 1
    error = capsys.readouterr().err
    assert f"task 1.safetensors was made of other images than {folders[1]} has now: pass --overwrite" in error
    assert run("embed", folders[1], "--output", out, "--estimator", "exact", "--overwrite") == 0
    assert run("embed", folders[1], "--output", out, "--estimator", "exact") == 0
    assert run("embed", folders[0], "--output", out, "--quiet", "--probe", "other", "--overwrite") == 0
    assert run("distance", out) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_embed_with_a_weight_decay(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for given, want in (("cv", "cv"), ("0.1", 0.1)):
        assert run("embed", folders[0], "--output", tmp_path / given, "--quiet", "--weight-decay", given) == 0
        embedding = Embedding.load(tmp_path / given / "task 0.safetensors")
        assert embedding.fingerprint["head"]["weight_decay"] == want
    capsys.readouterr()
    assert run("embed", folders[0], "--output", tmp_path / "bad", "--weight-decay", "-1") == 1
    assert "weight_decay is -1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("embed", folders[0], "--weight-decay", "little")
    assert "'little': expected a number above 0, or cv" in capsys.readouterr().err
    assert run("embed", "--job", "a.yaml", "--bank", "b", "--weight-decay", "cv") == 1
    assert "--weight-decay does not go with --job" in capsys.readouterr().err


def test_embed_to_a_tolerance(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("embed", folders[0], "--output", tmp_path, "--quiet", "--tolerance", "0.001") == 0
    meta = Embedding.load(tmp_path / "task 0.safetensors").meta
    assert meta["tolerance"] == 0.001
    assert meta["relative_error"] <= 0.001
    capsys.readouterr()
    assert run("embed", folders[0], "--output", tmp_path, "--tolerance", "-1", "--overwrite") == 1
    assert "tolerance is -1.0, expected a positive number" in capsys.readouterr().err
    assert run("embed", "--job", "a.yaml", "--bank", "b", "--method", "variational") == 1
    assert "--method does not go with --job" in capsys.readouterr().err


def test_select(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors.csv"
    assert run("embed", *folders, "--output", out, "--quiet") == 0
    errors.write_text("task,task 0,task 1\ntask 0,,0.3\ntask 1,0.2,0.1\n")
    capsys.readouterr()
    assert run("select", out, "--errors", errors, "--csv", tmp_path / "s.csv") == 0
    found = capsys.readouterr().out
    assert "for task 2" in found
    assert "for task 1" not in found
    for way in ("chance", "best on average", "Task2Vec, symmetric", "Task2Vec, asymmetric", "Model2Vec"):
        assert way in found
    embeddings = [Embedding.load(out / f"task {k}.safetensors") for k in range(3)]
    model = Model2Vec().fit(embeddings[:2], embeddings[:2], np.array([[np.nan, 0.3], [0.2, np.nan]]))
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["expert", "task 2"]
    np.testing.assert_array_equal([float(row[1]) for row in rows[1:]], model.distances(embeddings[2:])[:, 0])
    assert run("select", out, "--errors", errors, "--task", "task 0", "--json", tmp_path / "s.json") == 0
    assert "for task 0" in capsys.readouterr().out
    ranked = json.loads((tmp_path / "s.json").read_text())["experts"]
    assert [e["expert"] for e in ranked["task 0"]] == ["task 1"]  # a task is not its own expert
    # An expert's error on its own task changes no figure.
    results = []
    for own in ("", "0.01", "0.9"):
        errors.write_text(f"task,task 0,task 1,task 2\ntask 0,{own},0.3,0.2\ntask 1,0.2,{own},0.4\n")
        assert run("select", out, "--errors", errors, "--json", tmp_path / "s.json") == 0
        results.append(json.loads((tmp_path / "s.json").read_text()))
    assert results[0] == results[1] == results[2]
    # A row without errors is a task to choose for, as one without a row.
    errors.write_text("task,task 0,task 1\ntask 0,,0.3\ntask 1,0.2,\n")
    assert run("select", out, "--errors", errors, "--json", tmp_path / "a.json") == 0
    errors.write_text("task,task 0,task 1\ntask 2,,\ntask 0,,0.3\ntask 1,0.2,\n")
    assert run("select", out, "--errors", errors, "--json", tmp_path / "b.json") == 0
    assert list(json.loads((tmp_path / "b.json").read_text())["experts"]) == ["task 2"]
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    capsys.readouterr()
    for text, message in (
        ("task,task 0\ntask 9,0.1\n", "no embedding of 'task 9'"),
        ("task,task 0\ntask 1,0.0\n", "task 'task 1': its best expert makes no error"),
        ("task,task 0\ntask 1,\n", "all fields of its 1 tasks are empty"),
        ("task,task 0\ntask 0,0.1\n", "has only errors of experts on their own tasks"),
    ):
        errors.write_text(text)
        assert run("select", out, "--errors", errors) == 1
        assert message in capsys.readouterr().err


def test_interrupt_keeps_what_is_finished(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = Task2Vec.embed

    def embed(self, data, **options):
        if options["name"] == "task 1":
            raise KeyboardInterrupt
        return real(self, data, **options)

    monkeypatch.setattr(Task2Vec, "embed", embed)
    assert run("embed", *folders, "--output", tmp_path / "out", "--quiet") == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["task 0.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "{tmp}/missing"], "missing is no folder"),
        (["embed", "{task}", "{task}"], "two tasks are called 'task 0'"),
        (["embed", "{task}", "--device", "cuda"], "sees no CUDA device"),
        (["distance", "{tmp}/none.safetensors", "{tmp}/none.safetensors"], "no such file or folder"),
        (["distance", "{tmp}"], "at least two embeddings, found 0"),
        (["demo", "--images", "5", "--output", "{tmp}/d"], "at least 60"),
    ],
)
def test_errors(
    arguments: list[str], message: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(*(a.format(tmp=tmp_path, task=folders[0]) for a in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("t2v-fast: error: ")
    assert message in error


def test_unreadable_images(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = Path(folders[0]) / "class 0" / "000.png"
    bad.write_bytes(b"no picture")
    assert run("embed", folders[0], "--output", tmp_path / "out", "--quiet") == 1
    assert "000.png cannot be read" in (error := capsys.readouterr().err)
    assert "(embed --skip-unreadable; a setting of jobs)" in error
    assert not list((tmp_path / "out").iterdir())
    assert run("embed", folders[0], "--output", tmp_path / "out", "--quiet", "--skip-unreadable") == 0
    assert "1 unreadable left out" in capsys.readouterr().out


def test_a_folder_that_fails_leaves_the_others(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(Path(folders[0]) / "class 0")
    shutil.rmtree(Path(folders[0]) / "class 1")
    (Path(folders[1]) / "class 0" / "000.png").write_bytes(b"no picture")
    assert run("embed", *folders, "--output", tmp_path / "out", "--json", tmp_path / "r.json") == 1
    found = capsys.readouterr()
    assert "(3 of 3) -> " in found.out
    lines = found.err.splitlines()
    assert lines[0].startswith("t2v-fast: error: task 'task 0' has images of one class only")
    assert lines[1].startswith("t2v-fast: error: task 'task 1': ")
    assert lines[2:] == ["t2v-fast: 2 of 3 tasks failed: task 0, task 1; the same command tries them again"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["task 2.safetensors"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["status"], list(result["failed"])) == (1, ["task 0", "task 1"])
    assert [made["task"] for made in result["embeddings"]] == ["task 2"]


@pytest.mark.parametrize(("has", "words"), [(True, "fast, the processor has"), (False, "no faster than float32")])
def test_info_says_what_is_fast(
    has: bool, words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "multiplies_bfloat16", lambda: has)
    assert run("info") == 0
    found = " ".join(capsys.readouterr().out.split())
    assert f"processor: {platform.machine()}, kernels for {ops.cpu_capability()}" in found
    assert f"bfloat16 on it: {words}" in found


@pytest.mark.slow
def test_info_and_the_installed_command() -> None:
    for command in ([sys.executable, "-m", "t2v_fast.cli"], [str(Path(sys.executable).parent / "t2v-fast")]):
        found = subprocess.run([*command, "info"], capture_output=True, text=True, check=True).stdout
        assert "reference: available" in found
        assert f"cpu: {ops.backend_status()['cpu']}" in found


def light(*arguments: object) -> str:
    """Run a command in a process of its own; its output, and whether it imported torch."""
    program = (
        "import sys, t2v_fast.cli\n"
        "try: status = t2v_fast.cli.main()\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def save_embeddings(folder: Path, count: int = 3, **fingerprint: object) -> None:
    rng = np.random.default_rng(0)
    for k in range(count):
        meta, layers = {"task": f"task {k}", "classes": ["a", "b"]}, [("conv.weight", 0, 4)]
        embedding = Embedding(rng.random(4) + 0.1, np.ones(4), layers, 10, meta=meta, fingerprint=fingerprint)
        embedding.save(folder / f"task {k}.safetensors")


def test_light_commands_do_not_import_torch(tmp_path: Path) -> None:
    assert light("--help").endswith("0 False False\n")
    assert light("--version").startswith("t2v-fast 0.2.0\n0 False")
    save_embeddings(tmp_path)
    for command in (["distance"], ["plot", "--output", tmp_path / "p.png"], ["map", "--output", tmp_path / "m.html"]):
        assert " False True\n" in light(*command, tmp_path), command


@pytest.mark.parametrize("command", [["completion", "bash"], ["info", "-q", "--json", "-"], ["distance", "FOLDER"]])
def test_a_reader_that_goes_is_no_error(command: list[str], tmp_path: Path) -> None:
    save_embeddings(tmp_path)
    command = [str(tmp_path) if part == "FOLDER" else part for part in command]
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "t2v_fast.cli", *command]
    found = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")
    # Another pipe that breaks is an error like any other.
    program = [
        sys.executable,
        "-c",
        "import t2v_fast.cli.distance as d, t2v_fast.cli as c\n"
        "def run(arguments): raise BrokenPipeError('the worker is gone')\n"
        "d.run = run\n"
        "raise SystemExit(c.main(['distance', 'x']))",
    ]
    found = subprocess.run(program, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (1, "t2v-fast: error: the worker is gone\n")


def test_json_and_quiet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_embeddings(tmp_path)
    assert run("distance", tmp_path, "--metric", "asymmetric_kl", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)  # and nothing else
    assert result["tasks"] == ["task 0", "task 1", "task 2"]
    embeddings = [Embedding.load(tmp_path / f"task {k}.safetensors") for k in range(3)]
    np.testing.assert_allclose(result["distances"], pdist(embeddings, "asymmetric_kl"))
    assert run("distance", tmp_path, "-q", "--csv", tmp_path / "d.csv", "--json", tmp_path / "d.json") == 0
    assert "nearest" not in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["status"] == 0
    assert run("info", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] == "available"
    assert (found["processor"], found["instruction_set"]) == (platform.machine(), ops.cpu_capability())
    assert found["multiplies_bfloat16"] == ops.multiplies_bfloat16()
    assert run("distance", tmp_path / "none", "--json", "-") == 1
    found = capsys.readouterr()
    assert json.loads(found.out) == {"status": 1, "error": f"no such file or folder: {tmp_path / 'none'}"}
    assert run("distance", tmp_path, "--json", tmp_path / "no" / "folder.json") == 1


def test_every_command_has_json_and_quiet() -> None:
    def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            for choice in action.choices.values():
                yield from parsers(choice)
        if not inner:
            yield parser

    found = list(parsers(cli._parser()))
    assert len(found) > 12
    for parser in found:
        assert {"--json", "--quiet", "-q"} <= parser._option_string_actions.keys(), parser.prog
        assert not parser.allow_abbrev


def test_flags_cannot_be_abbreviated(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["embed", "--sampl", "3", "x"], "--sampl is no option of `t2v-fast embed`: did you mean --samples?"),
        (["distance", "--metrik=kl", "x"], "--metrik is no option of `t2v-fast distance`: did you mean --metric?"),
        (["bank", "ls", "--zzz", "x"], "--zzz is no option of `t2v-fast bank ls`\n"),
        (["distance", "--met\x1bric", "x"], "--met\\x1bric is no option"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_other_settings_are_told_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_embeddings(tmp_path / "a", probe="one", dtype="float32")
    save_embeddings(tmp_path / "b", 1, probe="two\x1b", dtype="float32")
    assert run("distance", tmp_path / "a", tmp_path / "b") == 1
    error = capsys.readouterr().err
    assert '    "one": task 0, task 1, task 2\n    "two\\u001b": task 0\n' in error
    assert "dtype" not in error
    assert max(map(len, error.splitlines())) < 120


def test_distances_of_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "files").mkdir()
    save_embeddings(tmp_path / "files")
    files = [Embedding.load(tmp_path / "files" / f"task {k}.safetensors") for k in range(3)]
    Bank(tmp_path / "bank").add(*files[1:])
    for command in (["distance"], ["plot", "--output", tmp_path / "p.png"], ["map", "--output", tmp_path / "m.html"]):
        for given in ([tmp_path / "bank"], [tmp_path / "files" / "task 0.safetensors", tmp_path / "bank"]):
            assert run(*command, *given, "--json", tmp_path / "r.json") == 0
            want = ["task 0", "task 1", "task 2"][-1 - len(given) :]
            assert json.loads((tmp_path / "r.json").read_text())["tasks"] == want
    (tmp_path / "errors.csv").write_text("task,task 0,task 1\ntask 0,,0.3\ntask 1,0.2,0.1\n")
    assert run("select", tmp_path / "bank", tmp_path / "files" / "task 0.safetensors", "--errors",
               tmp_path / "errors.csv") == 0  # fmt: skip
    assert "for task 2" in capsys.readouterr().out
    Bank(tmp_path / "other").fail("cats", "no image")
    assert run("distance", tmp_path / "other") == 1
    assert f"found 0 in {tmp_path / 'other'}: expected files" in capsys.readouterr().err


def test_a_folder_of_tasks_is_told_from_a_task(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for folder in folders:
        Path(folder).rename(tmp_path / "data" / Path(folder).name)
    assert run("embed", tmp_path / "data", "--output", tmp_path / "out", "--quiet") == 0
    assert "is embedded as one task of 3 classes, but its sub-folders (task 0, ...)" in capsys.readouterr().err
    assert run("embed", tmp_path / "data" / "task 0", "--output", tmp_path / "out2", "--quiet") == 0
    assert not capsys.readouterr().err


def test_pictures_of_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_embeddings(tmp_path)
    for metric in ("centred", "asymmetric", "asymmetric_kl"):
        assert run("plot", tmp_path, "--metric", metric) == 0
        assert run("map", tmp_path, "--metric", metric) == 0
        assert (tmp_path / "heatmap.png").exists()
        assert "axes mean nothing" in (tmp_path / "map.html").read_text()
    pages = [(run("map", tmp_path, "--metric", "asymmetric", "--alpha", a), (tmp_path / "map.html").read_bytes())
             for a in (0, 0.15, 0.5)]  # fmt: skip
    assert [status for status, _ in pages] == [0, 0, 0]
    assert len({page for _, page in pages}) == 3


def test_a_pipe_is_no_job_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    assert run("embed", "--job", tmp_path / "job.yaml", "--bank", tmp_path / "bank") == 1
    assert "is no regular file, as a job file is" in capsys.readouterr().err


def test_bars_of_a_folder_know_their_total(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    totals = []

    def bar(batches, *, total, disable, **options):
        totals.append((total, disable))
        return batches

    monkeypatch.setattr("t2v_fast.tasks.stages.tqdm", bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("embed", folders[0], "--output", tmp_path / "a", "--batch-size", "7") == 0
    assert totals == [(4, False)]  # 24 images in one pass for features and Fisher
    totals.clear()
    two_passes = ("--activation-megabytes", "0")
    assert run("embed", folders[0], "--output", tmp_path / "two", "--batch-size", "7", *two_passes) == 0
    assert totals == [(4, False), (4, False)]
