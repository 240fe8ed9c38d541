"""The command line: ``t2v-fast embed | bank | distance | select | plot | map | profile | demo | info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__, demo, ops
from ..analysis import page, plot, selection
from ..analysis.distance import (
    ALPHA,
    METRICS,
    asymmetric_distance,
    centred_distance,
    distance_rows,
    nearest_tasks,
    pdist,
)
from ..bank.driver import run_job
from ..bank.export import FORMS, export
from ..bank.job import load_job
from ..bank.store import Bank
from ..embedding import Embedding
from ..estimation.cotangents import ESTIMATORS
from ..estimation.estimator import BATCH_MEAN
from ..estimation.profiling import profile
from ..files import write_csv
from ..tasks.head import CROSS_VALIDATED
from ..tasks.pipeline import METHODS, Task2Vec
from ..tasks.precision import dtype_of
from ..tasks.probe import load_probe

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error that is the input's, 130 for an interrupt."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(
            "t2v-fast: interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr
        )
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"t2v-fast: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t2v-fast", description="Task2Vec embeddings and diagonal Fishers, fast.")
    parser.add_argument("--version", action="version", version=f"t2v-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    embed = commands.add_parser(
        "embed", help="embed image folders (one sub-folder a class), or the tasks of a job file"
    )
    embed.add_argument("tasks", nargs="*", type=Path, metavar="FOLDER")
    embed.add_argument("--job", type=Path, help="YAML or TOML file with tasks, probe and settings; goes with --bank")
    embed.add_argument("--bank", type=Path, help="folder of the bank that a job's embeddings go to")
    embed.add_argument("--workers", type=int, help="processes that embed a job's tasks (default: this one)")
    embed.add_argument("--ray", metavar="ADDRESS", help="embed a job's tasks on a Ray cluster ('auto', 'local', ...)")
    embed.add_argument(
        "--tolerance", type=float, default=None, help="add images and cotangents until the relative error is below"
    )
    embed.add_argument("--method", default="fisher", choices=METHODS, help="variational: the paper's robust Fisher")
    embed.add_argument(
        "--weight-decay",
        type=_weight_decay,
        default=None,
        metavar="NUMBER",
        help="of the head, or cv: chosen by cross-validation (default: 1e-4)",
    )
    embed.add_argument("--root", type=Path, help="folder out of which no path of a job may lead (default: the job's)")
    embed.add_argument("--allow-outside", action="store_true", help="paths of a job may lead anywhere")
    embed.add_argument("--retry-failed", action="store_true", help="run again what failed in this bank")
    embed.add_argument("--output", type=Path, default=Path("embeddings"), help="folder for NAME.safetensors files")
    embed.add_argument("--overwrite", action="store_true", help="embed again what is there already")
    embed.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read, and say so"
    )
    _pipeline_options(embed)
    embed.set_defaults(run=_embed)

    distance = commands.add_parser("distance", help="distances between stored embeddings")
    distance.add_argument("embeddings", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")
    distance.add_argument(
        "--metric",
        default="cosine",
        choices=[*METRICS, "asymmetric", "centred"],
        help="asymmetric: the paper's, from the row's task to the column's, on top of cosine; centred: by what sets "
        "the tasks apart from each other, for a dozen and more (default: %(default)s)",
    )
    distance.add_argument("--alpha", type=float, default=ALPHA, help="of asymmetric (default: %(default)s)")
    distance.add_argument("--csv", type=Path, help="write the matrix here")
    distance.add_argument("--plot", type=Path, help="write a clustered heat map here (PNG or SVG)")
    distance.set_defaults(run=_distance)

    select = commands.add_parser("select", help="which expert to use for a task, and what such choices cost")
    select.add_argument("embeddings", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")
    select.add_argument(
        "--errors",
        type=Path,
        required=True,
        help="CSV of test errors: experts on top, each named as the task that it was trained on; a task a row; empty "
        "where an expert is not to be used",
    )
    select.add_argument("--task", action="append", help="a task to choose for (default: all that have no errors yet)")
    select.add_argument("--alpha", type=float, default=ALPHA, help="of the asymmetric distance (default: %(default)s)")
    select.add_argument("--floor", type=float, default=0.0, help="the least error to divide increases by")
    select.add_argument("--csv", type=Path, help="write the experts' distances from the tasks here")
    select.set_defaults(run=_select)

    picture = commands.add_parser("plot", help="draw stored embeddings, as PNG or SVG")
    picture.add_argument("embeddings", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")
    picture.add_argument("--kind", default="heatmap", choices=["heatmap", "dendrogram", "map", "layers"])
    picture.add_argument("--metric", default="cosine", choices=METRICS)
    picture.add_argument("--output", type=Path, required=True, help="a file that ends in .png or .svg")
    picture.set_defaults(run=_plot)

    page_ = commands.add_parser("map", help="a map of stored embeddings as one HTML page to look around in")
    page_.add_argument("embeddings", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")
    page_.add_argument("--metric", default="cosine", choices=METRICS)
    page_.add_argument("--output", type=Path, default=Path("map.html"))
    page_.add_argument("--title", default="Map of tasks")
    page_.set_defaults(run=_map)

    demo = commands.add_parser("demo", help="embed, compare and draw real tasks that need no download")
    demo.add_argument("--output", type=Path, default=Path("demo"))
    demo.add_argument("--images", type=int, default=None, help="images a task (default: what fits the demo's minutes)")
    _pipeline_options(demo)
    demo.set_defaults(run=_demo, size=96)  # glyphs hold no finer detail, and 224 would take five times as long

    profiling = commands.add_parser("profile", help="where the time of a Fisher goes, layer by layer")
    _pipeline_options(profiling)
    profiling.add_argument("--classes", type=int, default=10, help="classes of the head (default: %(default)s)")
    profiling.add_argument("--rounds", type=int, default=5, help="rounds that are measured (default: %(default)s)")
    profiling.add_argument("--slowest", type=int, help="show only this many layers")
    profiling.add_argument("--json", type=Path, help="write all that was measured here")
    profiling.add_argument("--trace", type=Path, help="write one batch here, for chrome://tracing or ui.perfetto.dev")
    profiling.add_argument("--plot", type=Path, help="write a roofline picture here (PNG or SVG)")
    profiling.set_defaults(run=_profile)

    _bank_options(commands.add_parser("bank", help="look at, search, mend and export a bank of embeddings"))

    info = commands.add_parser("info", help="versions, and which backends run here or why not")
    info.set_defaults(run=_info)
    return parser


def _weight_decay(text: str) -> float | str:
    if text == CROSS_VALIDATED:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, or {CROSS_VALIDATED}") from None


def _bank_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text)
        sub.add_argument("bank", type=Path, metavar="BANK")
        sub.set_defaults(run=run)
        return sub

    action("ls", _bank_ls, "finished tasks")
    action("failed", _bank_failed, "failed tasks and their errors")
    retry = action("retry", _bank_retry, "let failed tasks run again in the next `embed --job`")
    retry.add_argument("tasks", nargs="*", metavar="TASK", help="default: all that failed")
    exporting = action("export", _bank_export, "write all finished tasks in another form")
    exporting.add_argument("path", type=Path, metavar="PATH")
    exporting.add_argument("--form", default="numpy", choices=FORMS)
    nearest = action("nearest", _bank_nearest, "the tasks nearest to one")
    nearest.add_argument("query", metavar="TASK", help="a task of the bank, or a file that `embed` wrote")
    nearest.add_argument("-k", type=int, default=10)
    nearest.add_argument("--metric", default="cosine", choices=METRICS)
    nearest.add_argument("--exact", action="store_true", help="measure all tasks, not only an index's candidates")
    action("verify", _bank_verify, "compare everything with its checksums")
    action("repair", _bank_repair, "take out what is damaged, so that it is run again")


def _pipeline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        default="efficientnet-lite0",
        help="the packaged efficientnet-lite0, torchvision/NAME, timm/NAME, or a bare NAME (default: %(default)s)",
    )
    parser.add_argument("--weights", default="default", help="default, none (random), or a weights file")
    parser.add_argument("--head", default=None, help="name of the probe's last linear layer, where it is not found")
    parser.add_argument(
        "--size", type=int, default=None, help="side of the images in pixels (default: as the probe was trained)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--estimator", default="deflated", choices=[*ESTIMATORS, BATCH_MEAN])
    parser.add_argument("--samples", type=int, default=2, help="cotangents an image, on average (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images (default: 32, on a CPU fewer of more than 112 pixels)")
    parser.add_argument("--loaders", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _task2vec(arguments: argparse.Namespace, **settings: Any) -> Task2Vec:
    if arguments.device is not None and torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {arguments.device}: this torch sees no CUDA device")
    probe = load_probe(arguments.probe, weights=arguments.weights, head=arguments.head)
    if arguments.size is not None:
        probe.preprocessing = probe.preprocessing.sized(arguments.size)
    return Task2Vec(
        probe,
        estimator=arguments.estimator,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        num_workers=arguments.loaders,
        device=arguments.device,
        seed=arguments.seed,
        progress=not arguments.quiet,
        **settings,
    )


def _embed_job(arguments: argparse.Namespace) -> int:
    if arguments.tasks or arguments.job is None or arguments.bank is None:
        raise ValueError("a job needs --job FILE and --bank FOLDER, and takes no other folders")
    standard = _parser().parse_args(["embed"])
    inside = ("probe", "weights", "head", "size", "device", "estimator", "samples", "batch_size", "loaders", "seed")
    for name in (*inside, "tolerance", "method", "weight_decay", "output", "overwrite", "skip_unreadable"):
        if getattr(arguments, name) != getattr(standard, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --job: settings are in {arguments.job}")
    job = load_job(arguments.job, root=arguments.root, allow_outside=arguments.allow_outside)
    bank = Bank(arguments.bank)
    if arguments.retry_failed:
        bank.retry([task for task in bank.failed if task in set(job.tasks)])
    summary = run_job(job, bank, workers=arguments.workers or 0, ray=arguments.ray, progress=not arguments.quiet)
    lost = f", {summary.lost_workers} workers were lost" if summary.lost_workers else ""
    console.print(
        f"{summary.finished} of {len(job.tasks)} tasks embedded in {summary.seconds:.1f} s ({summary.images} images), "
        f"{summary.before} were settled before{lost} -> {arguments.bank}",
        markup=False,
    )
    for task, error in summary.failed.items():
        print(f"failed: {task}: {error}", file=sys.stderr)
    if summary.failed:
        print(f"{len(summary.failed)} tasks failed; --retry-failed runs them again", file=sys.stderr)
    return 1 if summary.failed else 0


def _embed(arguments: argparse.Namespace) -> int:
    of_a_job = ("job", "bank", "workers", "ray", "root", "allow_outside", "retry_failed")
    if any(getattr(arguments, name) for name in of_a_job):
        return _embed_job(arguments)
    if not arguments.tasks:
        raise ValueError("nothing to embed: give folders, or --job FILE --bank FOLDER")
    names = [folder.resolve().name for folder in arguments.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two tasks are called {sorted(twice)[0]!r}: their embeddings would have one file name")
    for folder in arguments.tasks:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: expected a folder with one sub-folder of images a class")
    options = {} if arguments.weight_decay is None else {"weight_decay": arguments.weight_decay}
    task2vec = _task2vec(arguments, tolerance=arguments.tolerance, method=arguments.method, head_options=options)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, folder in zip(names, arguments.tasks, strict=True):
        path = arguments.output / f"{name}.safetensors"
        if path.exists() and not arguments.overwrite:
            if Embedding.load(path).fingerprint != task2vec.fingerprint():
                raise ValueError(f"{path} was made with other settings: pass --overwrite, or another --output")
            console.print(f"{name}: already in {path}", markup=False)
            continue
        embedding = task2vec.embed(folder, name=name, skip_unreadable=arguments.skip_unreadable)
        embedding.save(path)
        skipped = embedding.meta["skipped_images"]
        note = f", {len(skipped)} unreadable left out: {', '.join(skipped[:3])}" if skipped else ""
        seconds = sum(embedding.meta["seconds"].values())
        console.print(
            f"{name}: {embedding.num_examples} images, {len(embedding.meta['classes'])} classes, {seconds:.1f} s{note} "
            f"-> {path}",
            markup=False,
        )
    return 0


def _open_bank(arguments: argparse.Namespace) -> Bank:
    return Bank(arguments.bank, create=False)


def _bank_ls(arguments: argparse.Namespace) -> int:
    bank = _open_bank(arguments)
    for task in bank.tasks:
        print(task)
    print(f"{len(bank)} tasks, {len(bank.failed)} failed")
    return 0


def _bank_failed(arguments: argparse.Namespace) -> int:
    for task, error in _open_bank(arguments).failed.items():
        print(f"{task}: {error}")
    return 0


def _bank_retry(arguments: argparse.Namespace) -> int:
    tasks = _open_bank(arguments).retry(arguments.tasks or None)
    print(f"{len(tasks)} task{'s' * (len(tasks) != 1)} will be run again")
    return 0


def _bank_export(arguments: argparse.Namespace) -> int:
    print(f"{export(_open_bank(arguments), arguments.path, arguments.form)} tasks -> {arguments.path}")
    return 0


def _bank_nearest(arguments: argparse.Namespace) -> int:
    bank = _open_bank(arguments)
    query = arguments.query
    if query not in bank:
        if not Path(query).is_file():
            raise ValueError(f"{query!r} is neither a task of bank {bank.folder} nor a file")
        query = Embedding.load(query)
    table = Table("task", arguments.metric)
    for task, d in bank.nearest(query, arguments.k, arguments.metric, exact=arguments.exact):
        table.add_row(Text(task), f"{d:.4g}")
    console.print(table)
    return 0


def _bank_verify(arguments: argparse.Namespace) -> int:
    bank = _open_bank(arguments)
    damaged = bank.verify()
    for error in damaged.values():
        print(error)
    print(f"{len(bank) - len(damaged)} of {len(bank)} tasks are whole")
    return 1 if damaged else 0


def _bank_repair(arguments: argparse.Namespace) -> int:
    for line in Bank.repair(arguments.bank):
        print(f"taken out: {line}")
    return 0


def _load(given: Sequence[Path]) -> tuple[list[str], list[Embedding]]:
    """The embeddings of files and folders, and their tasks' names."""
    paths = []
    for path in given:
        paths += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(paths) < 2:
        raise ValueError(f"distances need at least two embeddings, found {len(paths)}")
    embeddings = [Embedding.load(path) for path in paths]
    return [str(e.meta.get("task") or path.stem) for e, path in zip(embeddings, paths, strict=True)], embeddings


def _distance(arguments: argparse.Namespace) -> int:
    names, embeddings = _load(arguments.embeddings)
    if arguments.metric == "asymmetric":
        distances = asymmetric_distance(embeddings, embeddings, alpha=arguments.alpha)
    elif arguments.metric == "centred":
        distances = centred_distance(embeddings)
    else:
        distances = pdist(embeddings, metric=arguments.metric)
    table = Table("task", "nearest", arguments.metric)
    # Distances lead from the row's task to the column's: what a task is near to is looked for in its column.
    for i, j in enumerate(nearest_tasks(distances.T)):
        table.add_row(Text(names[i]), Text(names[j]), f"{distances[j, i]:.4g}")
    console.print(table)
    if arguments.csv:
        write_csv(arguments.csv, distance_rows(names, distances))
        console.print(f"distances -> {arguments.csv}", markup=False)
    if arguments.plot:
        plot.heatmap((distances + distances.T) / 2, names, arguments.plot, label=f"{arguments.metric} distance")
        console.print(f"heat map -> {arguments.plot}", markup=False)
    return 0


def _select(arguments: argparse.Namespace) -> int:
    names, loaded = _load(arguments.embeddings)
    known = dict(zip(names, loaded, strict=True))
    if len(known) < len(names):
        raise ValueError("two embeddings are of tasks of one name, so the table of errors does not say which is meant")
    tasks, experts, errors = selection.read_errors(arguments.errors)
    wanted = arguments.task or [name for name in names if name not in tasks]
    for name in [*experts, *tasks, *wanted]:
        if name not in known:
            raise ValueError(f"no embedding of {name!r}: there are {', '.join(names)}")
    of_experts, of_tasks = [known[name] for name in experts], [known[name] for name in tasks]
    if wanted:
        chosen_for = [known[name] for name in wanted]
        distances = asymmetric_distance(of_experts, chosen_for, alpha=arguments.alpha)
        model = selection.Model2Vec(arguments.alpha).fit(of_experts, of_tasks, errors)
        learned = model.distances(chosen_for)
        for k, name in enumerate(wanted):
            table = Table("expert", "Model2Vec", "asymmetric", "symmetric", title=f"for {name}")
            symmetric = pdist([*of_experts, known[name]])[-1, :-1]
            for j in np.argsort(learned[:, k], kind="stable"):
                row = (f"{d[j]:.4f}" for d in (learned[:, k], distances[:, k], symmetric))
                table.add_row(Text(experts[j]), *row)
            console.print(table)
        if arguments.csv:
            rows = [[e, *map(repr, row.tolist())] for e, row in zip(experts, learned, strict=True)]
            write_csv(arguments.csv, [["expert", *wanted], *rows])
            console.print(f"Model2Vec distances -> {arguments.csv}", markup=False)
    table = Table(title="increase of the error over the best expert, on the tasks of the table")
    header, *rows = selection.increase_rows(
        selection.compare(of_experts, of_tasks, errors, alpha=arguments.alpha, floor=arguments.floor)
    )
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return 0


def _families(embeddings: Sequence[Embedding]) -> list[str] | None:
    """What the embeddings' makers wrote down as ``meta["family"]``, if all did."""
    families = [e.meta.get("family") for e in embeddings]
    return [str(f) for f in families] if all(families) else None


def _plot(arguments: argparse.Namespace) -> int:
    names, embeddings = _load(arguments.embeddings)
    if arguments.kind == "layers":
        plot.layer_profile(embeddings, names, arguments.output)
    else:
        distances = pdist(embeddings, arguments.metric)
        draw = {"heatmap": plot.heatmap, "dendrogram": plot.dendrogram, "map": plot.task_map}[arguments.kind]
        options = {} if arguments.kind == "map" else {"label": f"{arguments.metric} distance"}
        symmetric = (distances + distances.T) / 2
        draw(symmetric, names, arguments.output, families=_families(embeddings), **options)
    console.print(f"{arguments.kind} -> {arguments.output}", markup=False)
    return 0


def _map(arguments: argparse.Namespace) -> int:
    names, embeddings = _load(arguments.embeddings)
    page.write_map(
        embeddings,
        names,
        arguments.output,
        families=_families(embeddings),
        metric=arguments.metric,
        title=arguments.title,
    )
    console.print(f"map -> {arguments.output}", markup=False)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    options = {} if arguments.images is None else {"images_per_task": arguments.images}
    demo.run_demo(arguments.output, _task2vec(arguments), demo.demo_tasks(seed=arguments.seed, **options))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    task2vec = _task2vec(arguments)
    probe, size = task2vec.probe, task2vec.probe.preprocessing.crop
    generator = torch.Generator().manual_seed(arguments.seed)
    images = torch.randn(task2vec.batch_size, 3, size, size, generator=generator)
    images = images.to(task2vec.device, dtype_of(probe.network))
    torch.manual_seed(arguments.seed)
    head = torch.nn.Linear(probe.feature_dim, arguments.classes).to(images)
    with probe.with_head(head) as network:
        report = profile(
            network,
            images,
            arguments.estimator,
            arguments.samples,
            labels=torch.zeros(task2vec.batch_size, dtype=torch.long),
            parameters=probe.embedding_parameters(),
            rounds=arguments.rounds,
        )
    console.print(report.table(arguments.slowest))
    console.print(report.summary(), markup=False)
    for path, save in (
        (arguments.json, report.save_json),
        (arguments.trace, report.save_trace),
        (arguments.plot, report.save_roofline),
    ):
        if path is not None:
            save(path)
            console.print(f"-> {path}", markup=False)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    console.print(f"t2v-fast {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", markup=False)
    for name, status in ops.backend_status().items():
        console.print(f"  {name}: {status}", markup=False)
    return 0
