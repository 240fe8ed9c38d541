"""A picture of how a race of networks ended: what each network achieves, and what it cost to find out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .plot import DPI, write_figure

COLOURS = {"finished": "#1b7837", "dropped": "#b2182b", "budget": "#ef8a62"}
LABELS = {
    "finished": "finished",
    "dropped": "surely worse than the leader",
    "budget": "left to stay within the budget",
}


class RaceEntry(Protocol):
    """What the picture reads of a network; :class:`t2v_fast.zoo.Entry` has it."""

    @property
    def name(self) -> str: ...
    @property
    def score(self) -> float | None: ...
    @property
    def standard_error(self) -> float | None: ...
    @property
    def images(self) -> int: ...
    @property
    def outcome(self) -> str: ...


def race(entries: Sequence[RaceEntry], classes: int, path: str | os.PathLike) -> None:
    """Draw a bar for each network, best first: the probability that its head gives to held-out labels.

    A bar's line is two standard errors of the difference to the best network, which has none. Beside a name is how many
    images the network saw.

    Args:
        entries: The networks, best first. Networks without a score are left out.
        classes: The number of classes, for the line of chance.
        path: The file to write, ``.png`` or ``.svg``.

    Raises:
        ValueError: If no network has a score, or for another suffix.
    """
    from matplotlib.figure import Figure

    scored = [entry for entry in entries if entry.score is not None]
    if not scored:
        raise ValueError("no network has a score, so there is nothing to draw")
    figure = Figure(figsize=(8, 1.7 + 0.36 * len(scored)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    height = np.exp([float(entry.score or 0) for entry in scored])
    spread = np.array([2 * (entry.standard_error or 0) for entry in scored])
    rows = np.arange(len(scored))
    for outcome, colour in COLOURS.items():
        chosen = np.array([entry.outcome == outcome for entry in scored])
        if chosen.any():
            axes.barh(rows[chosen], height[chosen], color=colour, label=LABELS[outcome])
    if (rest := spread > 0).any():
        x, ends = height[rest], np.exp(np.stack([-spread, spread])[:, rest])
        axes.errorbar(x, rows[rest], xerr=np.abs(x * ends - x), fmt="none", ecolor="#222222", elinewidth=1, capsize=2,
                      label="two standard errors of the difference to the best")  # fmt: skip
    axes.axvline(1 / classes, color="#666666", linestyle="--", linewidth=1, label="chance")
    axes.set_yticks(rows, [f"{entry.name}, {entry.images} images" for entry in scored])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="probability of a held-out label (geometric mean)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)  # no bar reaches it
    write_figure(figure, path)
