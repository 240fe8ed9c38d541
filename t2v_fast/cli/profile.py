"""``t2v-fast profile``: where the time of a Fisher goes, layer by layer, or that of a job, stage by stage."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..tasks.precision import dtype_of
from .common import console, print_files
from .options import SHORT_LIST, add_probe_options, add_settings, flags_of, task2vec_of

if TYPE_CHECKING:
    from ..bank.job import Job
    from ..bank.job_profile import JobProfile

ONLY_FOR_A_FISHER = ("classes", "rounds", "trace", "probe", "probe_weights", "probe_head", "size", *SHORT_LIST[:-1])


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("profile")
    parser.add_argument("--classes", type=int, default=10, help="classes of the head (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured (default: %(default)s)")
    parser.add_argument("--slowest", type=int, help="show only this many layers, or tasks of a job")
    parser.add_argument("--trace", type=Path, help="write one batch here, for chrome://tracing or ui.perfetto.dev")
    parser.add_argument("--plot", type=Path, help="write a picture here (PNG or SVG): a roofline, or a job's times")
    job = parser.add_argument_group("job", "profile a job, in place of the Fisher of random images")
    job.add_argument("--job", type=Path, help="YAML or TOML file with tasks, probe and settings")
    job.add_argument("--bank", type=Path, help="report what runs of the job noted in this bank, and run nothing")
    job.add_argument("--tasks", type=int, help="without --bank: embed so many tasks of the job (default: 5)")
    job.add_argument("--workers", type=int, help="without --bank: processes that embed them (default: this one)")
    add_probe_options(parser)
    add_settings(parser, SHORT_LIST)
    defaults = {name: parser.get_default(name) for name in ONLY_FOR_A_FISHER}
    parser.set_defaults(run=run, defaults=defaults)


def run(arguments: argparse.Namespace) -> int:
    """Measure a Fisher of random images or a job, and report it."""
    if arguments.job is not None:
        return _run_job(arguments)
    for name in ("bank", "tasks", "workers"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} needs --job FILE")
    return _run_fisher(arguments)


def _run_job(arguments: argparse.Namespace) -> int:
    from ..bank import job_profile
    from ..bank.advice import advice_for
    from ..bank.job import load_job

    for name, default in arguments.defaults.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"{flags_of(name)[0]} does not go with --job: settings are in {arguments.job}")
    job = load_job(arguments.job)
    if arguments.bank is None:
        profile = _measured(job, arguments)
    else:
        if arguments.tasks is not None or arguments.workers is not None:
            raise ValueError("--tasks and --workers do not go with --bank, whose runs have been measured")
        profile = job_profile.read(arguments.bank, job.tasks)
        if not profile.tasks:
            raise ValueError(f"{arguments.bank} has no times of the tasks of {arguments.job}")
    print_profile(profile, arguments.progress)
    if arguments.progress:
        console.print(profile.task_table(arguments.slowest))
    arguments.result.update(profile.as_dict(advice_for(profile)))
    if arguments.plot is not None:
        from ..analysis.plot_profile import job_times

        job_times(profile, job_profile.STAGES, arguments.plot)
    print_files([arguments.json, arguments.plot])
    return 0


def _measured(job: Job, arguments: argparse.Namespace) -> JobProfile:
    """Embed the first tasks of a job into a bank that is thrown away."""
    from ..bank.driver import run_job
    from ..bank.store import Bank

    left = 5 if arguments.tasks is None else arguments.tasks
    if left < 1:
        raise ValueError(f"--tasks is {left}, expected at least 1")
    work = []
    for item in job.work:
        some = dict(list(item.tasks.items())[:left])
        left -= len(some)
        if some:
            work.append(replace(item, tasks=some))
    with tempfile.TemporaryDirectory() as folder:
        few, bank = replace(job, work=tuple(work)), Bank(Path(folder) / "bank")
        summary = run_job(few, bank, workers=arguments.workers or 0, progress=arguments.progress)
    for task, error in summary.failed.items():
        console.print(f"failed: {task}: {error}", markup=False)
    return summary.profile


def print_profile(profile: JobProfile, table: bool = True) -> None:
    """Print the table of all stages, and what would make the job faster."""
    from ..bank.advice import advice_for

    console.print(profile.headline(), markup=False)
    if table:
        console.print(profile.table())
    for advice in advice_for(profile):
        console.print(str(advice), markup=False)
    if not profile.divided:
        console.print("the job was too short to divide its passes into kinds of layers: all count as other")


def _run_fisher(arguments: argparse.Namespace) -> int:
    from ..estimation.profiling import profile

    task2vec = task2vec_of(arguments)
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
    if arguments.progress:
        console.print(report.table(arguments.slowest))
    console.print(report.summary(), markup=False)
    arguments.result.update(report.as_dict())
    if arguments.trace is not None:
        report.save_trace(arguments.trace)
    if arguments.plot is not None:
        from ..analysis.plot import roofline  # matplotlib takes a second to import

        roofline(report, arguments.plot)
    print_files([arguments.json, arguments.trace, arguments.plot])
    return 0
