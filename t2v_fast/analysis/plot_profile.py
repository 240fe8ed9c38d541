"""A picture of where the time of a job went."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from ..embedding import escaped
from .plot import DPI, FAMILY_COLOURS, write_figure

MOST_TASKS = 40  # bars of single tasks; of more tasks, every k-th is shown
GROUP_COLOURS = {
    "data": FAMILY_COLOURS[1],
    "features": FAMILY_COLOURS[5],
    "head": FAMILY_COLOURS[2],
    "forward": FAMILY_COLOURS[0],
    "backward": FAMILY_COLOURS[9],
    "check": FAMILY_COLOURS[3],
    "other": "#999999",
}


class MeasuredJob(Protocol):
    """What :func:`job_times` reads of a :class:`~t2v_fast.bank.job_profile.JobProfile`."""

    @property
    def tasks(self) -> Any: ...

    def totals(self) -> dict[str, float]: ...

    def grouped(self, task: Any) -> dict[str, float]: ...

    def rates(self, windows: int = 60) -> tuple[list[float], list[float]]: ...

    def headline(self) -> str: ...


def job_times(profile: MeasuredJob, names: dict[str, str], path: str | os.PathLike) -> None:
    """Draw the shares of all stages, the seconds of single tasks, and the images a second over time.

    Args:
        profile: The profile of a job.
        names: What to call each stage.
        path: The file to write, ``.png`` or ``.svg``.

    Raises:
        ValueError: For a profile without times, and for another suffix of the file's name.
    """
    from matplotlib.figure import Figure

    totals = profile.totals()
    if not totals:
        raise ValueError("the profile has no times, so there is nothing to draw")
    ends, rates = profile.rates(windows=min(60, max(2, len(profile.tasks) // 3)))
    figure = Figure(figsize=(11, 7.5), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1.2])
    _draw_stages(figure.add_subplot(grid[:, 0]), totals, names)
    _draw_tasks(figure.add_subplot(grid[0, 1]), profile)
    over_time = figure.add_subplot(grid[1, 1])
    if rates:
        over_time.step(np.array([0.0, *ends]), [rates[0], *rates], where="pre", color=FAMILY_COLOURS[0])
    over_time.set(xlabel="seconds of the job", ylabel="images/s", ylim=(0, None), title="stored over time")
    over_time.grid(alpha=0.3)
    figure.suptitle(profile.headline(), fontsize=11)
    write_figure(figure, path)


def _draw_stages(axes: Any, totals: dict[str, float], names: dict[str, str]) -> None:
    """Draw one bar for each stage, with its seconds."""
    whole = sum(totals.values())
    places = np.arange(len(totals))
    shares = [100 * seconds / whole for seconds in totals.values()]
    axes.barh(places, shares, color=[GROUP_COLOURS.get(_group(stage), "#999999") for stage in totals])
    axes.set_yticks(places, [names.get(stage, stage) for stage in totals], fontsize=8)
    axes.invert_yaxis()
    for place, share, seconds in zip(places, shares, totals.values(), strict=True):
        axes.text(share + 0.01 * max(shares), place, f"{seconds:.2f} s", va="center", fontsize=7)
    axes.set(xlabel="% of the workers' time", xlim=(0, 1.15 * max(shares)), title="all tasks")


def _group(stage: str) -> str:
    return "data" if stage in ("decode", "wait") else stage.partition(".")[0]


def _draw_tasks(axes: Any, profile: MeasuredJob) -> None:
    """Draw one stacked bar for each task, in the order in which they were stored."""
    step = max(1, -(-len(profile.tasks) // MOST_TASKS))
    shown = profile.tasks[::step]
    bottom = np.zeros(len(shown))
    for group, colour in GROUP_COLOURS.items():
        heights = np.array([profile.grouped(task)[group] for task in shown])
        axes.bar(range(len(shown)), heights, bottom=bottom, color=colour, label=group, width=0.9)
        bottom += heights
    if len(shown) <= 25:
        labels = [escaped(task.task)[:24] for task in shown]
        axes.set_xticks(range(len(shown)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=6)
    else:
        axes.set_xticks([])
    title = "single tasks" if step == 1 else f"single tasks, every {step}th"
    axes.set(ylabel="seconds", title=title)
    axes.legend(fontsize=7, ncols=4, loc="upper center", frameon=False, columnspacing=1, handlelength=1)
    axes.set_ylim(0, 1.2 * max(bottom.max(), 1e-9))
