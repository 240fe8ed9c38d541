"""Pictures, PNG or SVG by the file's name: distances between tasks, their layers, the roofline of a profile."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..embedding import stack
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..embedding import Embedding
    from ..estimation.profiling import Profile

DPI = 150
FORMATS = ("png", "svg")
# Okabe and Ito's colours, which most colour-blind people can tell apart, dark enough for text on white; then Tol's.
FAMILY_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#56B4E9", "#444444"),
    *("#882255", "#117733", "#332288", "#999933", "#CC6677", "#44AA99", "#BB8800"),
)


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

    ``families`` [T] colour the names. The file at ``path`` is replaced only once the picture is complete.
    Raises ValueError for distances that are no symmetric matrix of finite numbers.
    """
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    t = len(names)
    distances = _check_distances(distances, t)
    tree = _tree(distances)
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
        ordered = [families[k] for k in order]
        _colour_names(axes, [*axes.get_xticklabels(), *axes.get_yticklabels()], ordered * 2)
    if title:
        axes.text(0.5, 1 + 0.62 / side, title, transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    _write(figure, path)


def _check_distances(distances: np.ndarray, t: int) -> np.ndarray:
    distances = np.asarray(distances, dtype=np.float64)
    if (
        distances.shape != (t, t)
        or t < 2
        or not np.isfinite(distances).all()
        or not np.allclose(distances, distances.T)
    ):
        raise ValueError(
            f"distances are {distances.shape}, expected a finite symmetric [{t}, {t}] with at least two tasks"
        )
    return distances


def _tree(distances: np.ndarray) -> np.ndarray:
    """Average linkage [T - 1, 4] of a square matrix, neighbours in the best order."""
    from scipy.cluster.hierarchy import linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    condensed = squareform(distances, checks=False)
    return optimal_leaf_ordering(linkage(condensed, "average"), condensed)


def dendrogram(
    distances: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    families: Sequence[str] | None = None,
    label: str = "cosine distance",
) -> None:
    """Draw the average-linkage tree of distances [T, T]. Arguments and errors as :func:`heatmap`."""
    from matplotlib.figure import Figure
    from scipy.cluster import hierarchy

    t = len(names)
    tree = _tree(_check_distances(distances, t))
    figure = Figure(figsize=(8, 1.4 + 0.22 * t), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    order = hierarchy.dendrogram(
        tree, ax=axes, orientation="left", labels=list(names), color_threshold=0, above_threshold_color="#555555"
    )["leaves"]
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(label)
    axes.spines[["left", "right", "top"]].set_visible(False)
    if families is not None:
        _colour_names(axes, axes.get_yticklabels(), [families[k] for k in order])
    _write(figure, path)


def coordinates(distances: np.ndarray) -> np.ndarray:
    """Places [T, 2] whose distances approach a symmetric matrix [T, T]: classical multidimensional scaling.

    Torgerson, 1952: the two leading eigenvectors of the doubly centred squares. Signs make the largest entry positive.
    """
    distances = _check_distances(distances, len(distances))
    squares = np.square(distances)
    centred = -(squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean()) / 2
    values, vectors = np.linalg.eigh(centred)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    return places * np.where(places[np.abs(places).argmax(0), [0, 1]] < 0, -1, 1)


def task_map(
    distances: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    families: Sequence[str] | None = None,
) -> None:
    """Draw tasks in the plane (:func:`coordinates`). Arguments and errors as :func:`heatmap`."""
    from matplotlib.figure import Figure

    places = coordinates(_check_distances(distances, len(names)))
    kinds = sorted(set(families)) if families is not None else []
    colours = _colours(kinds)
    figure = Figure(figsize=(9, 7), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for k, (x, y) in enumerate(places):
        colour = colours[families[k]] if families is not None else FAMILY_COLOURS[0]
        marker = _marker(kinds, families[k]) if families is not None else "o"
        axes.plot(x, y, marker, color=colour, markersize=5)
        axes.annotate(names[k], (x, y), (3, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", "datalim")
    if len(kinds) > 1:
        handles = _handles(colours)
        for handle, kind in zip(handles, kinds, strict=True):
            handle.set_marker(_marker(kinds, kind))
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8)
    _write(figure, path)


def layer_means(embeddings: Sequence[Embedding]) -> np.ndarray:
    """The mean Fisher value of each layer, [T, L], of comparable embeddings."""
    stacked = stack(embeddings)
    return np.stack([stacked[:, start:stop].mean(1) for _, start, stop in embeddings[0].layers], 1)


def layer_profile(embeddings: Sequence[Embedding], names: Sequence[str], path: str | os.PathLike) -> None:
    """Draw the mean Fisher value of each layer, a line a task [T], from the first layer to the last."""
    from matplotlib.figure import Figure

    means = layer_means(embeddings)
    figure = Figure(figsize=(9, 5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for k, (name, row) in enumerate(zip(names, means, strict=True)):
        colour = FAMILY_COLOURS[k % len(FAMILY_COLOURS)]
        style = ("-", "--", ":", "-.")[k // len(FAMILY_COLOURS) % 4]
        axes.plot(range(1, len(row) + 1), np.where(row > 0, row, np.nan), style, color=colour, label=name, linewidth=1)
    axes.set(yscale="log", xlabel="layer", ylabel="mean Fisher value")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(names) // 30)
    _write(figure, path)


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    return {kind: FAMILY_COLOURS[k % len(FAMILY_COLOURS)] for k, kind in enumerate(kinds)}


def _marker(kinds: Sequence[str], kind: str) -> str:
    """Families beyond the colours differ by their mark."""
    return "os^D"[kinds.index(kind) // len(FAMILY_COLOURS) % 4]


def _handles(colours: dict[str, str]) -> list:
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker="s", linestyle="", color=colour, label=kind) for kind, colour in colours.items()]


def _colour_names(axes, labels: Sequence, families: Sequence[str]) -> None:
    """Give each label the colour of its family, and the axes a legend on top."""
    kinds = sorted(set(families))
    colours = _colours(kinds)
    for label, family in zip(labels, families, strict=True):
        label.set_color(colours[family])
    axes.legend(
        handles=_handles(colours),
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

    The file at ``path`` is replaced only once the picture is complete.
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
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"{path}: pictures are written as {' or '.join(FORMATS)}, by the file's name")
    buffer = io.BytesIO()
    # Without a date the same picture is the same file.
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())
