"""A job of tasks: a file lists them, and a bank keeps their embeddings.

    python examples/job_of_tasks.py

The same job can run again after any interruption: the bank knows what is done. On the command line this is
``t2v-fast embed --job job.yaml --bank bank``. The images are scikit-learn's handwritten digits.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import t2v_fast
from t2v_fast.bank.driver import run_job
from t2v_fast.bank.job import load_job

JOB = """
probe: {name: efficientnet-lite0, size: 32}
settings: {samples: 2, batch_size: 16}
tasks:
  - folder: small digits                           # one sub-folder a class
  - folder: large digits
  - {name: digits, table: labels.csv, path: file}   # each other column is a task over the same images
"""


def write_images(folder: Path) -> None:
    """The tasks' images, as a user would have them on disk."""
    digits = load_digits()
    rows = ["file,parity,size"]
    for k, (pixels, digit) in enumerate(zip(digits.images[:48], digits.target, strict=False)):
        place = folder / ("small digits" if digit < 5 else "large digits") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{k}.png"
        Image.fromarray((pixels * 15).astype(np.uint8)).save(file)
        rows.append(f"{file.relative_to(folder)},{'odd' if digit % 2 else 'even'},{'small' if digit < 5 else 'large'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "job.yaml").write_text(JOB)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        job = load_job(folder / "job.yaml")  # reads and checks the file; looks at no image yet
        bank = t2v_fast.Bank(folder / "bank")

        done = run_job(job, bank, progress=False)  # workers=2 would start two processes
        print(f"{done.finished} tasks embedded, {len(done.failed)} failed")
        again = run_job(job, bank, progress=False)
        print(f"the second run embedded {again.finished} and found {again.before} done")

        print(f"the bank has {', '.join(sorted(bank.tasks))}")
        print(f"as one array: {bank.vectors().shape[0]} vectors")
        query = next(task for task in bank.tasks if task.endswith("parity"))
        for task, distance in bank.nearest(query, k=2):
            print(f"near {query}: {task} at {distance:.3f}")


if __name__ == "__main__":
    main()
