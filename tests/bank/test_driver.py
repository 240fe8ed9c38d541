"""Jobs with workers: finished tasks stay, whichever process dies."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from jobs import (
    broken_pipeline,
    deadly_pipeline,
    dying_pipeline,
    folders,
    other_pipeline,
    pipeline,
    plain,
    run,
    slow_pipeline,
    take_small_probes,
    write_job,
    write_table,
)
from small import shapes, write_folder

from t2v_fast import Bank, FingerprintMismatch, Task2Vec, cli
from t2v_fast.bank.engines import Processes, perform
from t2v_fast.bank.job import load_job


@pytest.mark.slow_unless(workers=(0,))
@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_goes_on_and_ends(tmp_path: Path, workers: int) -> None:
    job = folders(tmp_path, [f"t{k}" for k in range(5)])
    with open(tmp_path / "tasks" / "t1" / "class 0" / "000.png", "r+b") as file:
        file.truncate(80)
    write_folder(tmp_path / "tasks" / "t2", shapes(12)[0], np.zeros(12, int))
    for k in range(1, 3):
        for path in (tmp_path / "tasks" / "t2" / f"class {k}").glob("*"):
            path.unlink()
    summary = run(job, tmp_path / "bank", workers=workers)
    bank = Bank(tmp_path / "bank")
    assert sorted(bank.tasks) == ["t0", "t3", "t4"]
    assert (summary.finished, summary.before, summary.images) == (3, 0, 36)
    assert summary.failed == bank.failed
    assert "task 't1'" in bank.failed["t1"]
    assert "000.png cannot be read" in bank.failed["t1"]
    assert "one class only" in bank.failed["t2"]
    for task, want in plain(job, "t0", "t3", "t4").items():
        np.testing.assert_allclose(bank[task].hessian, want.hessian, rtol=1e-4)
    again = run(job, tmp_path / "bank", workers=workers)
    assert (again.finished, again.before, list(again.failed)) == (0, 5, ["t1", "t2"])
    write_folder(tmp_path / "tasks" / "t1", *shapes(12, classes=3, seed=1))
    bank.retry(["t1"])
    assert run(job, tmp_path / "bank", workers=workers).finished == 1
    assert list(bank.failed) == ["t2"]


def test_a_task_that_kills_its_workers_fails_alone(tmp_path: Path) -> None:
    job = folders(tmp_path, ["a", "b", "deadly", "z"])
    summary = run(job, tmp_path / "bank", workers=2, factory=deadly_pipeline)
    bank = Bank(tmp_path / "bank")
    assert sorted(bank.tasks) == ["a", "b", "z"]
    assert bank.failed == {"deadly": "3 workers died at it, the last: killed by SIGKILL"}
    assert summary.lost_workers == 3


def test_finished_tasks_stay_where_settings_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note says so: embeddings of more cotangents are comparable, and are not made again."""
    job = folders(tmp_path, ["a"])
    run(job, tmp_path / "bank")
    write_folder(tmp_path / "tasks" / "b", *shapes(12, classes=2, seed=1))
    capsys.readouterr()
    assert run(job, tmp_path / "bank").before == 1
    assert "other settings" not in capsys.readouterr().err
    write_job(job, {"tasks": [{"folders": "tasks"}], "settings": {"samples": 3}})
    assert run(job, tmp_path / "bank").before == 2  # whose pipeline is not made from the job's settings
    assert "other settings" not in capsys.readouterr().err
    with pytest.raises(FingerprintMismatch):  # the job's own has another network
        run(job, tmp_path / "bank", factory=None)
    said = capsys.readouterr().err
    assert "task a was embedded with other settings before (samples is" in said
    assert ", not 3). Finished tasks stay as they are" in said


def test_finished_tasks_whose_data_changed_are_named_and_embedded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders and tables. Reading them again, or moving everything, is no change."""
    names = ["a", "b", "c", "d", "e", "f"]
    tasks = folders(tmp_path, names).parent / "tasks"
    write_table(tmp_path, shapes(12)[0], {"kind": ["x", "y"] * 6, "colour": ["r", "s"] * 6})
    table = {"name": "g", "csv": "table.csv", "label": "kind"}
    job = tmp_path / "job.yaml"
    write_job(job, {"tasks": [{"folders": "tasks"}, table]})
    assert run(job, tmp_path / "bank").finished == 7
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    capsys.readouterr()
    assert run(moved / "job.yaml", moved / "bank").before == 7
    assert "other images" not in capsys.readouterr().err

    (tasks / "a" / "class 0" / "000.png").rename(tasks / "a" / "class 1" / "100.png")
    (tasks / "b" / "class 0" / "000.png").unlink()
    shutil.copy(tasks / "c" / "class 0" / "000.png", tasks / "c" / "class 0" / "100.png")
    with open(tasks / "d" / "class 0" / "000.png", "ab") as file:
        file.write(b"0")
    shutil.rmtree(tasks / "f")  # its embedding is as good as before
    with open(tmp_path / "table.csv") as file:
        text = file.read()
    (tmp_path / "table.csv").write_text(text.replace(",x", ",z", 1))
    write_job(job, {"tasks": [{"folders": "tasks"}, table]})
    assert run(job, tmp_path / "bank").before == 6
    assert "note: a, b, c and 2 more had other images or labels when embedded. Finished" in capsys.readouterr().err
    bank = Bank(tmp_path / "bank")

    kept = {name: bank[name].hessian for name in ("e", "f")}
    take_small_probes(monkeypatch)
    redo = ["embed", "--job", str(job), "--bank", str(tmp_path / "bank"), "--redo-changed"]
    assert cli.main(redo) == 0
    said = capsys.readouterr()
    assert "to be embedded again, because they have changed: a, b, c and 2 more" in said.err
    assert "5 of 6 tasks embedded" in said.out
    assert "other images" not in said.err
    assert sorted(bank.tasks) == ["a", "b", "c", "d", "e", "f", "g"]
    assert {name: bank[name].num_examples for name in "abcdg"} == {"a": 12, "b": 11, "c": 13, "d": 12, "g": 12}
    assert bank["g"].meta["contents"] == load_job(job).work[-1].contents()
    for name, hessian in kept.items():
        np.testing.assert_array_equal(bank[name].hessian, hessian)
    assert cli.main([*redo, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == []


def test_a_former_embedding_stays_until_another_one_takes_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_small_probes(monkeypatch)
    job, bank = folders(tmp_path, ["a", "b"]), Bank(tmp_path / "bank")
    run(job, bank.folder)
    former = bank["a"].hessian
    folder = tmp_path / "tasks" / "a"
    (folder / "class 0" / "000.png").unlink()
    with pytest.raises(FingerprintMismatch):
        run(job, bank.folder, factory=other_pipeline, redo_changed=True)
    with pytest.raises(ValueError, match="workers is -1"):
        run(job, bank.folder, workers=-1, redo_changed=True)
    for other in sorted(folder.iterdir())[1:]:
        shutil.rmtree(other)
    assert cli.main(["embed", "--job", str(job), "--bank", str(bank.folder), "--redo-changed"]) == 1
    said = capsys.readouterr().err
    assert "failed: a: DataError: task 'a' has images of one class only" in said
    assert "its former embedding stays" in said
    assert "--retry-failed" not in said
    assert bank.failed == {}
    np.testing.assert_array_equal(bank["a"].hessian, former)
    write_folder(folder, *shapes(12, seed=5))
    summary = run(job, bank.folder, redo_changed=True)
    assert (summary.changed, summary.finished, summary.before, summary.failed) == (["a"], 1, 1, {})
    assert (bank["a"].hessian != former).any()
    assert run(job, bank.folder, redo_changed=True).changed == []


def test_two_drivers_embed_what_changed_once(tmp_path: Path) -> None:
    names = [f"t{k}" for k in range(6)]
    job, bank = folders(tmp_path, names), Bank(tmp_path / "bank")
    run(job, bank.folder)
    for name in names:
        (tmp_path / "tasks" / name / "class 0" / "000.png").unlink()
    both = threading.Barrier(2)
    summaries = []

    def drive(task2vec: Task2Vec) -> None:
        options = {"factory": lambda: task2vec, "on_start": lambda engine: both.wait(60)}
        summaries.append(run(job, bank.folder, redo_changed=True, **options))

    threads = [threading.Thread(target=drive, args=(pipeline(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.changed for summary in summaries] == [names, names]
    assert sum(summary.finished for summary in summaries) == 6
    assert [bank[name].num_examples for name in names] == [11] * 6
    assert Bank(bank.folder).verify() == {}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    job = folders(tmp_path, ["a"])
    run(job, tmp_path / "bank")
    for workers in (0, 1):
        with pytest.raises(FingerprintMismatch, match="holds embeddings of other settings: they differ in weights"):
            run(job, tmp_path / "bank", workers=workers, factory=other_pipeline)


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_made(tmp_path: Path) -> None:
    job = folders(tmp_path, ["a"])
    with pytest.raises(RuntimeError, match="the pipeline cannot be made: ValueError: no such probe"):
        run(job, tmp_path / "bank", workers=1, factory=broken_pipeline)
    with pytest.raises(RuntimeError, match=r"workers die before they begin \(killed by SIGKILL\)"):
        run(job, tmp_path / "bank", workers=1, factory=dying_pipeline)


def test_a_full_disk_stops_the_job_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, real = folders(tmp_path, ["a", "b", "c"]), os.pwrite

    def pwrite(file, data, position):
        if len(Bank(tmp_path / "bank").tasks) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="task 'b' was not stored: No space left"):
        run(job, tmp_path / "bank")
    monkeypatch.undo()
    assert Bank(tmp_path / "bank").tasks == ["a"]
    assert run(job, tmp_path / "bank").finished == 2
    assert Bank(tmp_path / "bank").verify() == {}


@pytest.mark.slow
def test_workers_killed_at_random(tmp_path: Path) -> None:
    """Every task is embedded once, equal to a plain run, while workers are killed in the middle of tasks."""
    job, rng = folders(tmp_path, [f"t{k:02}" for k in range(30)]), random.Random(1)
    kills, over = [], threading.Event()

    def killer(engine: Processes) -> None:
        def work() -> None:
            while len(kills) < 4 and not over.is_set():
                time.sleep(rng.uniform(0.05, 0.3))
                if len(Bank(tmp_path / "bank")) > 5 * len(kills) and (pids := engine.pids()):
                    kills.append(rng.choice(pids))
                    os.kill(kills[-1], signal.SIGKILL)

        threading.Thread(target=work, daemon=True).start()

    summary = run(job, tmp_path / "bank", workers=2, factory=slow_pipeline, on_start=killer)
    over.set()
    bank = Bank(tmp_path / "bank")
    assert summary.failed == {}
    assert len(kills) == 4
    assert summary.lost_workers >= 3  # the last may have been killed when all was done
    assert sorted(bank.tasks) == [f"t{k:02}" for k in range(30)]
    assert bank.verify() == {}
    want = plain(job)
    assert all(np.allclose(bank[t].hessian, want[t].hessian, rtol=1e-4, atol=1e-12) for t in bank.tasks)


DRIVER = """
import sys
sys.path.insert(0, {helpers!r})
from pathlib import Path
from jobs import run, slow_pipeline
if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, factory=slow_pipeline)
"""


@pytest.mark.slow
def test_the_driver_killed_at_random(tmp_path: Path) -> None:
    job, rng = folders(tmp_path, [f"t{k:02}" for k in range(16)]), random.Random(2)
    (tmp_path / "driver.py").write_text(DRIVER.format(helpers=str(Path(__file__).parents[1] / "helpers")))
    command = [sys.executable, str(tmp_path / "driver.py"), str(job), str(tmp_path / "bank")]
    before = 0
    for goal in (3, 8):
        driver = subprocess.Popen(command, start_new_session=True)
        while (now := len(Bank(tmp_path / "bank"))) < goal:
            assert driver.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        driver.kill()
        driver.wait()
        assert now > before
        before = now
    # Their orphans end by themselves, and hold no claims.
    last = subprocess.run(command, check=True, timeout=300, stderr=subprocess.PIPE, text=True)
    assert "leaked" not in last.stderr  # semaphores, of workers that ended without a cleanup
    bank = Bank(tmp_path / "bank")
    assert sorted(bank.tasks) == [f"t{k:02}" for k in range(16)]
    assert (bank.failed, bank.verify()) == ({}, {})
    want = plain(job)
    assert all(np.allclose(bank[t].hessian, want[t].hessian, rtol=1e-4, atol=1e-12) for t in bank.tasks)


@pytest.mark.slow
def test_two_drivers_share_a_bank(tmp_path: Path) -> None:
    job = folders(tmp_path, [f"t{k:02}" for k in range(12)])
    (tmp_path / "driver.py").write_text(DRIVER.format(helpers=str(Path(__file__).parents[1] / "helpers")))
    command = [sys.executable, str(tmp_path / "driver.py"), str(job), str(tmp_path / "bank")]
    for driver in [subprocess.Popen(command) for _ in range(2)]:
        assert driver.wait(300) == 0
    bank = Bank(tmp_path / "bank")
    assert len(bank) == 12
    assert (tmp_path / "bank" / "manifest.jsonl").read_text().count("\n") == 12
    assert bank.verify() == {}


def test_tables_share_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = shapes(12)
    columns = {"kind": labels.tolist(), "wing": [*"01" * 6], "bad": [1] * 12}
    write_table(tmp_path, images, columns)
    write_table(tmp_path, images, {"kind": labels.tolist(), "wing": [*"01" * 6]}, "good.csv")
    tasks = [{"name": "g", "table": "good.csv"}, {"name": "b", "table": "table.csv"}]
    job, calls = load_job(write_job(tmp_path / "job.yaml", {"tasks": tasks})), []
    task2vec = pipeline()
    real = task2vec.embed_label_sets
    monkeypatch.setattr(task2vec, "embed_label_sets", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = perform(task2vec, job.work[0])
    assert [e.meta["task"] for e in found.embeddings] == ["g/kind", "g/wing"]
    assert len(calls) == 1
    assert found.embeddings[0].meta["classes"] == ["0", "1", "2"]
    alone = pipeline().embed(job.work[0].data("g/kind"))
    np.testing.assert_allclose(found.embeddings[0].hessian, alone.hessian, rtol=1e-4, atol=1e-12)
    # One unusable label set fails alone.
    found = perform(task2vec, job.work[1])
    assert [e.meta["task"] for e in found.embeddings] == ["b/kind", "b/wing"]
    assert list(found.errors) == ["b/bad"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    take_small_probes(monkeypatch)
    job = folders(tmp_path, ["a", "b"])
    write_folder(tmp_path / "tasks" / "c", shapes(4)[0], np.zeros(4, int))

    def command(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["embed", *map(str, arguments)])
        return status, *capsys.readouterr()

    status, out, err = command("--job", job, "--bank", tmp_path / "bank")
    assert status == 1
    assert "2 of 3 tasks embedded" in out
    assert "(24 images)" in out
    assert "failed: c: DataError: task 'c' has images of one class only" in err
    assert "3/3" in err  # the progress display
    status, out, err = command("--job", job, "--bank", tmp_path / "bank", "--retry-failed", "--quiet")
    assert "0 of 3 tasks embedded" in out
    assert "failed: c" in err
    for arguments, message in (
        (["--job", job], "needs --job FILE and --bank FOLDER"),
        (
            ["--job", job, "--bank", "b", "--samples", 3],
            "--samples does not go with --job: write `settings: {samples: ...}` into",
        ),
        (["--job", job, "--bank", "b", "--skip-unreadable"], "write `settings: {skip_unreadable: true}` into"),
        (["--job", job, "--bank", "b", "--weights", "none"], "write `probe: {weights: ...}` into"),
        (["--job", job, "--bank", "b", "--probe", "x"], "write `probe: {name: ...}` into"),
        (["--job", job, "--bank", "b", "--overwrite"], "--overwrite does not go with --job: settings are in"),
        ([], "nothing to embed"),
        (["--workers", 2, tmp_path], "needs --job"),
        (["--job", tmp_path / "none.yaml", "--bank", tmp_path / "b"], "none.yaml cannot be read"),
    ):
        status, _, err = command(*arguments)
        assert status == 1
        assert message in err
    content = yaml.safe_load(job.read_text()) | {"settings": {"head": "adam", "head_options": {"nonsense": 1}}}
    status, _, err = command("--job", write_job(job, content), "--bank", tmp_path / "b2", "--quiet")
    assert status == 1
    assert "settings: head_options has no 'nonsense'" in err  # once, before any task
