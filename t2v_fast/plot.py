"""Pictures: distances between tasks, and the roofline of a profile."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .profile import Profile

DPI = 150
# Okabe and Ito's colours, which most colour-blind people can tell apart, dark enough for text on white.
FAMILY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#56B4E9", "#444444")


def heatmap(
    distances: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    families: Sequence[str] | None = None,
    title: str | None = None,
    label: str = "cosine distance",
) -> None:
    """Draw distances [T, T] as a heat map with rows and columns in the order of an average-linkage clustering.

    ``families`` [T] colour the names. The PNG at ``path`` is replaced only once the picture is complete.
    Raises ValueError for distances that are no symmetric matrix of finite numbers.
    """
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    distances = np.asarray(distances, dtype=np.float64)
    t = len(names)
    if (
        distances.shape != (t, t)
        or t < 2
        or not np.isfinite(distances).all()
        or not np.allclose(distances, distances.T)
    ):
        raise ValueError(
            f"distances are {distances.shape}, expected a finite symmetric [{t}, {t}] with at least two tasks"
        )
    condensed = squareform(distances, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    # Everything is placed in inches: automatic layouts keep neither the tree's leaves on the map's rows nor long names.
    side = t * max(0.28, min(0.42, 9 / t))
    names_width = 0.2 + 0.075 * max(map(len, names))
    left, bottom = 1.3, 0.2 + 0.9 * names_width
    width, height = left + side + names_width + 1.0, bottom + side + 0.95
    figure = Figure(figsize=(width, height), dpi=DPI)
    branches = figure.add_axes((0.1 / width, bottom / height, (left - 0.15) / width, side / height))
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    scale = figure.add_axes(((width - 0.75) / width, (bottom + 0.2 * side) / height, 0.2 / width, 0.6 * side / height))
    order = dendrogram(
        tree, ax=branches, orientation="left", no_labels=True, color_threshold=0, above_threshold_color="#777777"
    )["leaves"]
    branches.set_ylim(10 * t, 0)  # leaves are 10 apart; the first on top, as the first row of the map
    branches.set_axis_off()
    image = axes.imshow(distances[np.ix_(order, order)], cmap="viridis", aspect="auto")
    axes.set_xticks(range(t), [names[k] for k in order], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(t), [names[k] for k in order], fontsize=8)
    axes.yaxis.tick_right()
    axes.tick_params(length=0)
    figure.colorbar(image, cax=scale, label=label)
    if families is not None:
        _colour_names(axes, [families[k] for k in order])
    if title:
        axes.text(0.5, 1 + 0.62 / side, title, transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    _write(figure, path)


def _colour_names(axes, families: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    kinds = sorted(set(families))
    colours = {kind: FAMILY_COLOURS[k % len(FAMILY_COLOURS)] for k, kind in enumerate(kinds)}
    for tick, family in [
        *zip(axes.get_xticklabels(), families, strict=True),
        *zip(axes.get_yticklabels(), families, strict=True),
    ]:
        tick.set_color(colours[family])
    handles = [Line2D([], [], marker="s", linestyle="", color=colours[kind], label=kind) for kind in kinds]
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=len(kinds) if len(kinds) < 6 else 4,
        frameon=False,
        fontsize=8,
    )


def contact_sheet(
    images: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    captions: Sequence[str] | None = None,
) -> None:
    """Draw a few example images of each task: ``images[task][k]`` uint8 [H, W] or [H, W, 3]; ``captions`` [T]."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in images)
    figure = Figure(figsize=(0.62 * columns + 2.2, 0.62 * len(images) + 0.1), dpi=DPI)
    grid = figure.add_gridspec(
        len(images),
        columns,
        left=2.1 / figure.get_figwidth(),
        right=0.995,
        top=0.995,
        bottom=0.005,
        wspace=0.06,
        hspace=0.06,
    )
    for r, (row, name) in enumerate(zip(images, names, strict=True)):
        for c, image in enumerate(row):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            if c == 0:
                text = name if captions is None else f"{name}\n{captions[r]}"
                axes.text(-0.15, 0.5, text, ha="right", va="center", transform=axes.transAxes, fontsize=8)
    _write(figure, path)


def roofline(profile: Profile, path: str | os.PathLike) -> None:
    """Every layer of a profile as a point, its rate over its flops a byte, under the machine's two limits.

    The PNG at ``path`` is replaced only once the picture is complete.
    """
    from matplotlib.figure import Figure

    machine = profile.machine
    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    intensity = np.array([layer.flops / layer.bytes for layer in profile.layers])
    rate = np.array([layer.flops / layer.seconds for layer in profile.layers])
    span = np.array([min(intensity.min(), 0.1) / 1.5, max(intensity.max(), 100) * 1.5])
    ridge = machine.flops_per_second / machine.bytes_per_second
    x = np.sort(np.append(span, np.clip(ridge, *span)))
    limit = np.minimum(machine.flops_per_second, machine.bytes_per_second * x)
    axes.plot(x, limit / 1e9, color="#444444", label="limits of the machine, measured")
    for colour, kind in zip(FAMILY_COLOURS, ("explicit", "winograd", "gram", "pass"), strict=False):
        chosen = np.array([layer.path == kind for layer in profile.layers])
        if chosen.any():
            area = 12 + 400 * np.array([layer.seconds for layer in profile.layers])[chosen] / profile.fisher
            axes.scatter(intensity[chosen], rate[chosen] / 1e9, s=area, color=colour, alpha=0.7, label=kind)
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="flops a byte", ylabel="GFLOP/s")
    axes.set_title(
        f"{profile.examples} images, {profile.dtype}, {profile.threads} threads; areas are shares of the time"
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    _write(figure, path)


def _write(figure: Figure, path: str | os.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
