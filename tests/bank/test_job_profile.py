"""The profile of a job: its sums, its file beside a bank, its pictures, and its advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import folders, pipeline, run, take_small_probes, write_job, write_table
from PIL import Image
from small import shapes

from t2v_fast import Bank, Task2Vec, cli
from t2v_fast.analysis.plot_profile import job_times
from t2v_fast.bank import advice, job_profile
from t2v_fast.bank.display import Rates
from t2v_fast.bank.job_profile import STAGES, JobProfile, RunTime, TaskTime


@pytest.mark.slow_unless(workers=(0,))
@pytest.mark.parametrize("workers", [0, 2])
def test_the_seconds_of_a_job_add_up(tmp_path: Path, workers: int) -> None:
    job = folders(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "tasks" / "b" / "class 0" / "000.png").write_bytes(b"none")
    summary = run(job, tmp_path / "bank", workers=workers)
    profile = summary.profile
    assert {t.task for t in profile.tasks} == set("abcd")
    assert [t.task for t in profile.tasks if t.failed] == ["b"]
    assert profile.images == 36
    totals = profile.totals()
    assert list(totals) == [stage for stage in STAGES if stage in totals]
    expected = max(workers, 1) * profile.seconds
    assert sum(totals.values()) == pytest.approx(expected, rel=0.05, abs=0.1 * max(workers, 1))
    assert profile.seconds == pytest.approx(summary.seconds, abs=0.05)
    stored = job_profile.read(tmp_path / "bank")
    assert stored.tasks == profile.tasks
    # Files have rounded numbers. What is left of the whole time is idle, and the sum of all the roundings is there.
    assert stored.totals() == pytest.approx(totals, abs=0.02)
    assert Bank(tmp_path / "bank").verify() == {}
    # A second run adds to what is there, and a line that was cut is left out.
    with open(tmp_path / "bank" / job_profile.FILE, "a") as file:
        file.write('{"task": {"task": "cut", "seco')
    Bank(tmp_path / "bank").retry(["b"])
    (tmp_path / "tasks" / "b" / "class 0" / "000.png").unlink()
    again = run(job, tmp_path / "bank", workers=workers)
    assert [t.task for t in again.profile.tasks] == ["b"]
    stored = job_profile.read(tmp_path / "bank")
    assert [t.task for t in stored.tasks if t.failed] == []
    assert stored.images == 47
    assert len(stored.runs) == 2
    assert job_profile.read(tmp_path / "bank", ["a"]).images == 12
    ends, rates = stored.rates(10)
    assert len(ends) == len(rates) == 10
    assert sum(rates) * ends[0] == pytest.approx(47)


def test_tasks_that_share_images_share_the_time(tmp_path: Path) -> None:
    images, labels = shapes(12)
    write_table(tmp_path, images, {"kind": labels.tolist(), "wing": [*"01" * 6]})
    job = write_job(tmp_path / "job.yaml", {"tasks": [{"name": "g", "table": "table.csv"}]})
    profile = run(job, tmp_path / "bank").profile
    assert [t.images for t in profile.tasks] == [6, 6]
    assert profile.tasks[0].seconds == profile.tasks[1].seconds
    assert [t.decoded for t in profile.tasks] == [6, 6]  # the second pass takes them from the cache
    # One that cannot be embedded makes the others run alone, and the attempt counts.
    write_table(tmp_path, images, {"kind": labels.tolist(), "one": [1] * 12})
    profile = run(job, tmp_path / "other").profile
    assert {t.task: (t.images, t.failed) for t in profile.tasks} == {"g/kind": (12, False), "g/one": (0, True)}


def profile_of(seconds: dict[str, float], run: dict[str, Any] | None = None, **task: Any) -> JobProfile:
    tasks = [TaskTime(name, seconds, 10, decoded=10, **task) for name in "ab"]
    options = {"began": 0.0, "seconds": 2 * sum(seconds.values()), "workers": 1, **(run or {})}
    return JobProfile(tasks, [RunTime(**options)])


def test_passes_are_divided_by_the_shares_of_some() -> None:
    tasks = [
        TaskTime("a", {"forward": 3.0, "forward.linear": 0.6, "forward.other": 0.4}, 1),
        TaskTime("b", {"forward": 2.0}, 1),
    ]
    profile = JobProfile(tasks)
    assert profile.totals() == pytest.approx({"forward.linear": 3.6, "forward.other": 2.4})
    assert profile.stages_of(tasks[1:]) == pytest.approx({"forward.linear": 1.2, "forward.other": 0.8})
    assert profile.divided
    assert not JobProfile(tasks[1:]).divided
    assert JobProfile(tasks[1:]).totals() == {"forward.other": 2.0}


def gains(profile: JobProfile) -> dict[str, float]:
    return {a.change: a.gain for a in advice.advice_for(profile)}


def test_advice_follows_from_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "bfloat16_times", lambda device: 2.0)
    # Loading is 40 percent; two cores share everything evenly, so half of the loading is hidden.
    loading = profile_of({"decode": 4.0, "head": 6.0}, {"cores": 2})
    assert gains(loading) == {"num_workers: 1": pytest.approx(0.2)}
    assert gains(profile_of({"decode": 4.0, "head": 6.0}, {"cores": 1})) == {}
    on_gpu = {"cores": 1, "settings": {"device": "cuda"}}
    assert gains(profile_of({"decode": 4.0, "features": 6.0}, on_gpu))["num_workers: 1"] == pytest.approx(0.4)
    # One loader needs 10 s a task while the network needs 6: with two, the network is what one waits for.
    waiting = {"settings": {"num_workers": 1, "dtype": "bfloat16"}}
    assert gains(profile_of({"wait": 4.0, "features": 6.0}, waiting)) == {"num_workers: 2": pytest.approx(0.4)}
    # 60 percent are products, which bfloat16 halves; the features have the forward pass's share of products.
    products = {"features": 4.0, "forward.convolution": 2.0, "forward.other": 2.0, "backward.linear": 2.0}
    assert gains(profile_of(products)) == {"dtype: bfloat16": pytest.approx(0.3)}
    assert gains(profile_of(products, {"settings": {"dtype": "bfloat16"}})) == {}
    idle = {"workers": 2, "idle": 20.0, "in_driver": False}
    assert gains(profile_of({"head": 10.0}, idle)) == {
        "more tasks in a job, or fewer workers than 2": pytest.approx(0.5)
    }
    assert gains(profile_of({"head": 10.0}, idle | {"store": 15.0})) == {"several drivers": pytest.approx(0.5)}
    assert gains(profile_of({"head": 9.0}, {"store": 2.0})) == {"workers: 1": pytest.approx(0.1)}
    assert gains(profile_of({"check": 3.0, "head": 7.0})) == {"self_check: false": pytest.approx(0.3)}
    assert gains(JobProfile([])) == {}


def test_advice_on_the_cache() -> None:
    tasks = [TaskTime("a", {"decode": 5.0, "head": 5.0}, 10, decoded=20)]
    found = gains(JobProfile(tasks, [RunTime(0, 10, 1, settings={"cache_megabytes": 3})]))
    assert found == {"cache_megabytes: more than 3": pytest.approx(0.25)}


def test_advice_on_the_batch_size() -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(1, 9, 200)
    t = 0.01 + 0.005 * n + rng.normal(0, 1e-4, 200)
    sums = [float(s) for s in (200, n.sum(), (n * n).sum(), t.sum(), (n * t).sum(), (t * t).sum())]
    fixed, error = advice.fixed_cost(sums)
    assert fixed == pytest.approx(0.01, abs=3 * error)
    assert error < 1e-4
    settings = {"sizes": {"forward": sums}, "settings": {"batch_size": 8, "dtype": "bfloat16"}}
    found = gains(profile_of({"forward": float(t.sum()) / 2}, settings))
    assert found == {"batch_size: 16": pytest.approx(200 * fixed / 2 / t.sum())}
    equal = [5, 20, 80, 1, 4, 0.2]
    assert advice.fixed_cost(equal) == (0, float("inf"))


def test_runs_at_the_same_time_count_once() -> None:
    runs = [RunTime(began, seconds, 1) for began, seconds in ((100.0, 10.0), (0.0, 10.0), (5.0, 10.0), (6.0, 1.0))]
    assert JobProfile([], runs).seconds == pytest.approx(25)


def test_an_interrupted_job_notes_its_time(tmp_path: Path) -> None:
    def stop_at_the_third() -> Task2Vec:
        task2vec = pipeline()
        real, names = task2vec.embed, []

        def embed(data: Any, **options: Any) -> Any:
            names.append(data.name)
            if len(names) == 3:
                raise KeyboardInterrupt
            return real(data, **options)

        task2vec.embed = embed  # type: ignore[method-assign]
        return task2vec

    job = folders(tmp_path, ["a", "b", "c"])
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "bank", factory=stop_at_the_third)
    found = job_profile.read(tmp_path / "bank")
    assert [t.task for t in found.tasks] == ["a", "b"]
    assert len(found.runs) == 1
    assert found.seconds > sum(sum(t.seconds.values()) for t in found.tasks)


def test_files_and_tables(tmp_path: Path) -> None:
    profile = run(folders(tmp_path, ["a", "b\N{SNOWMAN}"]), tmp_path / "bank").profile
    profile.save_json(tmp_path / "p.json")
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["stages"] == profile.totals()
    assert [t["task"] for t in stored["by_task"]] == ["a", "b\N{SNOWMAN}"]
    assert (stored["tasks"], stored["images"], stored["failed"]) == (2, 24, 0)
    job_times(profile, STAGES, tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] > 1000
    assert len(profile.task_table(1).rows) == 1
    assert len(profile.table().rows) == len(profile.totals())
    with pytest.raises(ValueError, match="no times"):
        job_times(JobProfile([]), STAGES, tmp_path / "q.png")
    with pytest.raises(ValueError, match="made by an older version"):
        job_profile.read(tmp_path)


def test_a_profile_that_cannot_be_written_costs_no_job(tmp_path: Path) -> None:
    (tmp_path / "bank" / job_profile.FILE).mkdir(parents=True)
    assert run(folders(tmp_path, ["a"]), tmp_path / "bank").finished == 1


def test_strange_lines_are_left_out(tmp_path: Path) -> None:
    lines = ["[]", "3", '"x"', '{"task": 1}', '{"task": {"task": "a", "seconds": {"head": "x"}, "images": 1}}', "{"]
    good = '{"task": {"task": "b", "seconds": {"head": 1.5}, "images": 2}}'
    (tmp_path / job_profile.FILE).write_bytes("\n".join([*lines, good]).encode() + b"\n\xff\xfe")
    assert [t.task for t in job_profile.read(tmp_path).tasks] == ["b"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    take_small_probes(monkeypatch)
    job = folders(tmp_path, ["a", "b", "c"])

    def command(*arguments: object) -> tuple[int, str, str]:
        return cli.main([str(a) for a in arguments]), *capsys.readouterr()

    status, out, _ = command("profile", "--job", job, "--tasks", 2, "--json", tmp_path / "j.json", "--quiet")
    assert status == 0
    assert "2 tasks, 24 images" in out
    assert json.loads((tmp_path / "j.json").read_text())["tasks"] == 2
    status, out, _ = command("embed", "--job", job, "--bank", tmp_path / "bank")
    assert "Fisher: cotangents and sums" in out
    assert "images/s" in out
    status, out, _ = command(
        "profile", "--job", job, "--bank", tmp_path / "bank", "--plot", tmp_path / "p.svg", "--slowest", 1
    )
    assert status == 0
    assert "3 tasks, 36 images" in out
    assert (tmp_path / "p.svg").stat().st_size > 1000
    for arguments, message in (
        (["--bank", tmp_path / "bank"], "--bank needs --job"),
        (["--job", job, "--samples", 3], "--samples does not go with --job"),
        (["--job", job, "--tasks", 0], "--tasks is 0, expected at least 1"),
        (["--job", job, "--bank", tmp_path / "bank", "--tasks", 1], "do not go with --bank"),
        (["--job", job, "--bank", tmp_path / "none"], "profile.jsonl is missing"),
    ):
        status, _, err = command("profile", *arguments)
        assert status == 1
        assert message in err


def test_rates_of_a_long_job() -> None:
    rates = Rates(width=1.0)
    for second in range(1000):
        rates.add(second + 0.5, 3.0)
    assert len(rates.counts) <= 24
    assert sum(rates.counts) == rates.images == 3000
    assert rates.overall(1000) == rates.now(1000) == 3.0
    assert len(rates.chart(1000)) == len(rates.counts)
    assert Rates().chart(5.0) == ""
