"""Job files with their tables and folders, and pipelines that work, wait or die, which worker processes import."""

from __future__ import annotations

import csv
import io
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from small import shapes, small_probe, write_folder

from t2v_fast import Bank, Embedding, Task2Vec
from t2v_fast.bank.driver import run_job
from t2v_fast.bank.job import load_job


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_table(root: Path, images: np.ndarray, columns: dict[str, list], name: str = "table.csv") -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        (root / "images" / f"{k:03}.png").write_bytes(png(image))
    with open(root / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *columns])
        writer.writerows([f"images/{k:03}.png", *row] for k, row in enumerate(zip(*columns.values(), strict=True)))
    return root / name


def write_job(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def take_small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs of this process have a small probe.

    ``load_probe`` itself stays: a module that is first imported in the meantime would keep what stands in its place.
    """
    monkeypatch.setattr("t2v_fast.bank.job.probes", SimpleNamespace(load_probe=lambda **options: small_probe()))


def pipeline() -> Task2Vec:
    return Task2Vec(small_probe(), batch_size=8)


def other_pipeline() -> Task2Vec:
    return Task2Vec(small_probe(1))


def deadly_pipeline() -> Task2Vec:
    """One whose process dies at the task called "deadly"."""
    task2vec = pipeline()
    real = task2vec.embed

    def embed(data, **options):
        if data.name == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, **options)

    task2vec.embed = embed
    return task2vec


def slow_pipeline() -> Task2Vec:
    task2vec = pipeline()
    real = task2vec.embed
    task2vec.embed = lambda data, **options: (time.sleep(0.05), real(data, **options))[1]
    return task2vec


def broken_pipeline() -> Task2Vec:
    raise ValueError("no such probe")


def dying_pipeline() -> Task2Vec:
    os.kill(os.getpid(), signal.SIGKILL)


def folders(root: Path, names: list[str]) -> Path:
    for k, name in enumerate(names):
        write_folder(root / "tasks" / name, *shapes(12, classes=2 + k % 2, seed=k))
    return write_job(root / "job.yaml", {"tasks": [{"folders": "tasks"}]})


def plain(job: Path, *names: str) -> dict[str, Embedding]:
    """Embeddings by an undisturbed loop, of all tasks or of these."""
    task2vec, work = pipeline(), load_job(job).work
    return {t: task2vec.embed(w.data(t)) for w in work for t in w.tasks if not names or t in names}


def run(job: Path, bank: Path, **options):
    return run_job(load_job(job), Bank(bank), progress=False, **{"factory": pipeline, **options})
