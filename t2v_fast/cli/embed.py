"""``t2v-fast embed``: embed folders of images, or the tasks of a job file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from ..embedding import Embedding, escaped
from ..tasks.data import IMAGE_SUFFIXES, contents_of_folder
from ..tasks.pipeline import Task2Vec
from ..tasks.settings import NOT_IN_JOBS, OPTIONS, other_settings
from .common import console, readable
from .options import PROBE_OPTIONS, add_probe_options, add_settings, flags_of, task2vec_of

# Options that are for jobs only, and those that a job file decides.
FOR_JOBS = ("job", "bank", "workers", "ray", "root", "allow_outside", "retry_failed", "redo_changed")
NOT_FOR_JOBS = (
    *PROBE_OPTIONS,
    *(name for name in OPTIONS if name != "progress"),
    "weight_decay",
    "output",
    "overwrite",
    "skip_unreadable",
)


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("embed")
    parser.add_argument("tasks", nargs="*", type=Path, metavar="FOLDER", help="a task: one sub-folder for each class")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("embeddings"),
        help="folder for NAME.safetensors files (default: embeddings)",
    )
    parser.add_argument("--overwrite", action="store_true", help="embed again what is there already")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read, and say so"
    )
    job = parser.add_argument_group("job", "many tasks into a bank; a job file has its own probe and settings")
    job.add_argument("--job", type=Path, help="YAML or TOML file with tasks, probe and settings; goes with --bank")
    job.add_argument("--bank", type=Path, help="folder of the bank that a job's embeddings go to")
    job.add_argument("--workers", type=int, help="processes that embed the tasks of a job (default: this one)")
    job.add_argument("--ray", metavar="ADDRESS", help="embed a job's tasks on a Ray cluster ('auto', 'local', ...)")
    job.add_argument("--root", type=Path, help="folder that all paths of a job must stay in (default: the job's)")
    job.add_argument("--allow-outside", action="store_true", help="paths of a job may lead anywhere")
    job.add_argument("--retry-failed", action="store_true", help="run again what failed in this bank")
    job.add_argument(
        "--redo-changed",
        action="store_true",
        help="embed finished tasks again whose folders or tables have changed since",
    )
    add_probe_options(parser)
    add_settings(parser)
    parser.set_defaults(run=run, defaults={name: parser.get_default(name) for name in NOT_FOR_JOBS})


def run(arguments: argparse.Namespace) -> int:
    """Embed the folders, or run the job."""
    if any(getattr(arguments, name) for name in FOR_JOBS):
        return _run_job(arguments)
    if not arguments.tasks:
        raise ValueError("nothing to embed: give folders, or --job FILE --bank FOLDER")
    names = [folder.resolve().name for folder in arguments.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two tasks are called {sorted(twice)[0]!r}: their embeddings would have one file name")
    for folder in arguments.tasks:
        with contextlib.suppress(PermissionError):  # which fails the task, and not the others
            _check_folder(folder)
    task2vec = task2vec_of(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    made = arguments.result["embeddings"] = []
    failed = arguments.result["failed"] = {}
    for number, (name, folder) in enumerate(zip(names, arguments.tasks, strict=True), 1):
        place = f" ({number} of {len(names)})" if len(names) > 1 else ""
        try:
            made.append(_embed(task2vec, folder, name, arguments, place))
        except (ValueError, RuntimeError, PermissionError, FileNotFoundError) as error:
            # The other folders go on, as the tasks of a job do. Other errors of the system, as a full disk, end all.
            named = repr(name) in str(error) or str(folder) in str(error)
            failed[name] = str(error) if named else f"task {name!r}: {error}"
            print(f"t2v-fast: error: {readable(ValueError(failed[name]))}", file=sys.stderr)
    if failed:
        arguments.result["error"] = "\n".join(failed.values())
    if failed and len(names) > 1:
        text = f"{len(failed)} of {len(names)} tasks failed: {', '.join(failed)}"
        print(f"t2v-fast: {escaped(text)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _embed(task2vec: Task2Vec, folder: Path, name: str, arguments: argparse.Namespace, place: str) -> dict[str, Any]:
    """Embed one folder, unless that was done before. Return what ``--json`` shows of it."""
    path = arguments.output / f"{name}.safetensors"
    if path.exists() and not arguments.overwrite:
        before = Embedding.load(path)
        different = other_settings(task2vec, before.meta)
        if different or before.fingerprint != task2vec.fingerprint():
            which = f" ({', '.join(different)})" if different else ""
            raise ValueError(f"{path} was made with other settings{which}: pass --overwrite, or another --output")
        if before.meta.get("contents") not in (None, contents_of_folder(folder)):
            raise ValueError(
                f"{path} was made of other images than {folder} has now: pass --overwrite, or another --output"
            )
        size = f"{before.num_examples} images, {len(before.meta.get('classes') or ())} classes"
        text = f"{name}: already in {path} ({size}; --overwrite embeds the folder again)"
        console.print(escaped(text), markup=False)
        return {"task": name, "path": str(path), "new": False}
    embedding = task2vec.embed(folder, name=name, skip_unreadable=arguments.skip_unreadable)
    embedding.save(path)
    skipped, classes = embedding.meta["skipped_images"], len(embedding.meta["classes"])
    note = f", {len(skipped)} unreadable left out: {', '.join(skipped[:3])}" if skipped else ""
    seconds = sum(embedding.meta["seconds"].values())
    text = f"{name}: {embedding.num_examples} images, {classes} classes{note}, {seconds:.1f} s{place} -> {path}"
    console.print(escaped(text), markup=False)
    return {
        "task": name,
        "path": str(path),
        "new": True,
        "images": embedding.num_examples,
        "classes": classes,
        "skipped": skipped,
        "left_out": embedding.meta["left_out"],
        "seconds": embedding.meta["seconds"],
    }


def _check_folder(folder: Path) -> None:
    """Raise ValueError for what is no folder; warn where sub-folders look like tasks, since they are taken as classes.

    It is a warning only, because a class may well have its images in sub-folders.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected a folder with one sub-folder of images a class")
    inside = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."]
    if len(inside) > 1 and all(map(_looks_like_a_task, inside)):
        text = (
            f"note: {folder} is embedded as one task of {len(inside)} classes, but its sub-folders ({inside[0].name}, "
            f"...) look like tasks: they have sub-folders of images themselves. To embed each of them, give "
            f"{folder}/* instead, or a job with `folders: {folder.name}`"
        )
        print(f"t2v-fast: {escaped(text)}", file=sys.stderr)


def _looks_like_a_task(folder: Path) -> bool:
    """Whether a folder has no image of its own, but at least two sub-folders that have some."""
    entries = [entry for entry in folder.iterdir() if entry.name[0] != "."]
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        return False
    folders = [entry for entry in entries if entry.is_dir()]
    return sum(any(f.suffix.lower() in IMAGE_SUFFIXES for f in each.glob("[!.]*")) for each in folders) > 1


def _key_of(name: str) -> str:
    """Where an option has its place in a job file, as the middle of a sentence that ends with the file's name."""
    if name in PROBE_OPTIONS:
        key = f"probe: {{{'name' if name == 'probe' else name.removeprefix('probe_')}: ...}}"
    elif name == "weight_decay":
        key = "settings: {head_options: {weight_decay: ...}}"
    elif name == "skip_unreadable":
        key = "settings: {skip_unreadable: true}"
    elif name in OPTIONS and name not in NOT_IN_JOBS:
        key = f"settings: {{{name}: ...}}"
    else:
        return "settings are in "
    return f"write `{key}` into "


def _run_job(arguments: argparse.Namespace) -> int:
    from ..bank.driver import run_job
    from ..bank.job import load_job
    from ..bank.store import Bank

    if arguments.tasks or arguments.job is None or arguments.bank is None:
        raise ValueError("a job needs --job FILE and --bank FOLDER, and takes no other folders")
    for name, default in arguments.defaults.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"{flags_of(name)[0]} does not go with --job: {_key_of(name)}{arguments.job}")
    job = load_job(arguments.job, root=arguments.root, allow_outside=arguments.allow_outside)
    bank = Bank(arguments.bank)
    if arguments.retry_failed:
        bank.retry([task for task in bank.failed if task in set(job.tasks)])
    summary = run_job(
        job,
        bank,
        workers=arguments.workers or 0,
        ray=arguments.ray,
        progress=arguments.progress,
        redo_changed=arguments.redo_changed,
    )
    lost = f", {summary.lost_workers} workers were lost" if summary.lost_workers else ""
    console.print(
        f"{summary.finished} of {len(job.tasks)} tasks embedded in {summary.seconds:.1f} s ({summary.images} images), "
        f"{summary.before} were settled before{lost} -> {arguments.bank}",
        markup=False,
    )
    arguments.result.update(
        bank=arguments.bank,
        finished=summary.finished,
        before=summary.before,
        changed=summary.changed,
        failed=summary.failed,
        images=summary.images,
        lost_workers=summary.lost_workers,
        seconds=summary.seconds,
        stages=summary.profile.totals(),
    )
    if arguments.progress and summary.profile.tasks:
        from .profile import print_profile

        print_profile(summary.profile)
    for task, error in summary.failed.items():
        print(escaped(f"failed: {task}: {error}"), file=sys.stderr)
    if kept := summary.failed.keys() & bank.failed.keys():
        print(f"{len(kept)} tasks failed; --retry-failed runs them again", file=sys.stderr)
    return 1 if summary.failed else 0
