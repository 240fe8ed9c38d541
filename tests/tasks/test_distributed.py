"""One task by several processes, and many tasks by Ray, give the results of one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jobs import dying_pipeline, folders, pipeline, plain
from small import shapes, small_probe, write_folder
from torch.distributed.fsdp import fully_shard

from t2v_fast import Bank, Embedding, Task2Vec
from t2v_fast.bank.driver import run_job
from t2v_fast.bank.job import load_job
from t2v_fast.tasks.distributed import embed_distributed


def _process(rank: int, size: int, folder: str, cases: list[dict], data: list) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    for number, (options, task) in enumerate(zip(cases, data, strict=True)):
        try:
            probe, embed = small_probe(), embed_distributed
            if options.pop("sharded", False):
                for layer in probe.network.children():
                    fully_shard(layer) if list(layer.parameters()) else None
                fully_shard(probe.network)
                embed = Task2Vec.embed
            embedding = embed(Task2Vec(probe, **options), task, name="t", skip_unreadable=True)
            embedding.save(f"{folder}/{number}-{rank}.safetensors")
        except (ValueError, RuntimeError) as error:
            Path(f"{folder}/{number}-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def together(tmp_path: Path, cases: list[dict], data: list, size: int = 2) -> None:
    mp.start_processes(_process, (size, str(tmp_path), cases, data), size, start_method="spawn")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    images, labels = shapes(25)
    folder = write_folder(tmp_path / "task", images, labels)
    (folder / "class 0" / "000.png").write_bytes(b"no picture")
    targets = np.stack([labels == 0, labels > 0], 1).astype(np.int64)
    many = np.arange(210) % 70  # the eigenvectors of this many classes come from another solver
    cases = [
        {"estimator": "exact", "batch_size": 4},
        {"estimator": "deflated", "batch_size": 5, "seed": 7},
        {"estimator": "hutchinson", "samples": 3},
        {"estimator": "monte_carlo", "samples": 2, "batch_size": 3},
        {"estimator": "empirical", "balanced": False},
        {"task_type": "multilabel", "samples": 1},
        {"estimator": "deflated"},
        {},
        {"estimator": "exact", "batch_size": 4, "sharded": True},
        {"sharded": True, "batch_size": 5},
    ]
    data = [(images, labels)] * 5 + [(images, targets), (shapes(210, 2)[0], many), str(folder)]
    data += [(images, labels), str(folder)]
    together(tmp_path, cases, data)
    for number, (options, task) in enumerate(zip(cases, data, strict=True)):
        options.pop("sharded", None)
        alone = Task2Vec(small_probe(), **options).embed(task, name="t", skip_unreadable=True)
        first, second = (Embedding.load(tmp_path / f"{number}-{rank}.safetensors") for rank in range(2))
        np.testing.assert_array_equal(first.hessian, second.hessian)
        scale = np.abs(alone.hessian).max()
        np.testing.assert_allclose(first.hessian, alone.hessian, rtol=1e-4, atol=1e-6 * scale, err_msg=str(options))
        np.testing.assert_allclose(first.standard_error, alone.standard_error, rtol=1e-3, atol=1e-6 * scale)
        assert first.num_examples == alone.num_examples
        assert first.fingerprint == alone.fingerprint
        assert first.meta["processes"] == 2
        assert first.meta["skipped_images"] == second.meta["skipped_images"] == alone.meta["skipped_images"]
        assert first.meta["classes"] == alone.meta["classes"]


@pytest.mark.slow
def test_a_failure_on_one_process_is_known_to_all(tmp_path: Path) -> None:
    images, labels = shapes(24)
    bad = torch.randn(24, 3, 12, 12)
    bad[20] = float("nan")
    cases = [{}, {}, {}, {"estimator": "batch_mean"}]
    data = [(bad, labels), (images, labels * 0), (images[:1], labels[:1]), (images, labels)]
    together(tmp_path, cases, data)
    for rank in range(2):
        errors = [(tmp_path / f"{number}-{rank}.txt").read_text() for number in range(4)]
        assert "process 1: DataError: task 't': image 20 has NaN" in errors[0]
        assert "process 0: DataError: task 't' has images of one class only" in errors[1]
        assert "has 1 images for 2 processes" in errors[2]
        assert "depends on the batches of one process" in errors[3]


@pytest.mark.slow
def test_ray_with_two_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    job = folders(tmp_path, [f"t{k:02}" for k in range(10)])
    bank = Bank(tmp_path / "bank")
    helpers = str(Path(__file__).parents[1] / "helpers")

    def killer(engine) -> None:
        def work() -> None:
            while len(Bank(tmp_path / "bank")) < 2:
                time.sleep(0.05)
            ray.kill(next(iter(engine._actors.values())))

        threading.Thread(target=work, daemon=True).start()

    ray.init(address="local", include_dashboard=False, num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": helpers}})
    options = {"ray": "local", "progress": False}
    try:
        summary = run_job(load_job(job), bank, workers=2, factory=pipeline, on_start=killer, **options)
        assert summary.failed == {}
        assert sorted(bank.tasks) == [f"t{k:02}" for k in range(10)]
        assert summary.lost_workers >= 1
        other = load_job(folders(tmp_path / "more", ["a"]))
        with pytest.raises(RuntimeError, match="workers die before they begin"):
            run_job(other, Bank(tmp_path / "b2"), workers=1, factory=dying_pipeline, **options)
    finally:
        ray.shutdown()
    want = plain(tmp_path / "job.yaml")
    for task in bank.tasks:
        np.testing.assert_allclose(bank[task].hessian, want[task].hessian, rtol=1e-4, atol=1e-12)
