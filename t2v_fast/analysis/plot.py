"""Pictures of tasks: distances between them, their layers and images, and the roofline of a profile.

The suffix of a file's name, ``.png`` or ``.svg``, chooses the format. A file is replaced only once its picture is
complete. Letters for shapes: T (tasks), L (layers).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..embedding import stack
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..embedding import Embedding

DPI = 150
FORMATS = ("png", "svg")
# Okabe and Ito's colours, which most colour-blind people can tell apart, where needed darkened for text on white; then
# Tol's.
FAMILY_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#56B4E9", "#444444"),
    *("#882255", "#117733", "#332288", "#999933", "#CC6677", "#44AA99", "#BB8800"),
)
LEGEND_COLUMNS = 4
MARKERS = "os^D"  # of families, one after the other each time that the colours are used up


def family_style(k: int) -> tuple[str, int]:
    """Return the colour of family number ``k``, and the place of its marker in :data:`MARKERS`."""
    return FAMILY_COLOURS[k % len(FAMILY_COLOURS)], k // len(FAMILY_COLOURS) % len(MARKERS)


def heatmap(
    distances: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    families: Sequence[str] | None = None,
    title: str | None = None,
    label: str = "cosine distance",
) -> None:
    """Draw distances as a heat map, with rows and columns in the order of an average-linkage clustering.

    Args:
        distances: A symmetric matrix [T, T].
        names: The names [T] of the tasks.
        path: The file to write, ``.png`` or ``.svg``.
        families: The family [T] of each task, which colours its name.
        title: The title of the picture.
        label: The label of the colour scale.

    Raises:
        ValueError: For distances that are not a symmetric matrix of finite numbers with at least two tasks, and for
            another suffix of the file's name.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> distances = np.array([[0.0, 0.1, 0.7], [0.1, 0.0, 0.6], [0.7, 0.6, 0.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     heatmap(distances, ["cats", "dogs", "cars"], Path(folder) / "map.svg")
        ...     [file.name for file in Path(folder).iterdir()]
        ['map.svg']
    """
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    t = len(names)
    distances = _check_distances(distances, t)
    tree = _tree(distances)
    # Everything is placed in inches, because automatic layouts move the tree's leaves off the map's rows and cut names.
    side = t * max(0.28, min(0.42, 9 / t))
    names_width = 0.2 + 0.075 * max(map(len, names))
    left, bottom = 1.3, 0.2 + 0.9 * names_width
    # Above the map: a margin, the legend of the families, and the title.
    above = 0.1 + (0.25 * -(-len(set(families)) // LEGEND_COLUMNS) if families is not None else 0.0)
    title_at, above = above, above + (0.3 if title else 0.0)
    width, height = left + side + names_width + 1.0, bottom + side + above
    figure = Figure(figsize=(width, height), dpi=DPI)
    branches = figure.add_axes((0.1 / width, bottom / height, (left - 0.15) / width, side / height))
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    scale = figure.add_axes(((width - 0.75) / width, (bottom + 0.2 * side) / height, 0.2 / width, 0.6 * side / height))
    order = dendrogram(
        tree, ax=branches, orientation="left", no_labels=True, color_threshold=0, above_threshold_color="#777777"
    )["leaves"]
    branches.set_ylim(10 * t, 0)  # leaves are 10 apart, and the first is on top like the map's first row
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
        axes.text(0.5, 1 + title_at / side, title, transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    write_figure(figure, path)


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
    """Return the average linkage [T - 1, 4] of a square matrix, with similar leaves next to each other."""
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
    """Draw the tree of an average-linkage clustering.

    Args:
        distances: A symmetric matrix [T, T].
        names: The names [T] of the tasks.
        path: The file to write, ``.png`` or ``.svg``.
        families: The family [T] of each task, which colours its name.
        label: The label of the axis of distances.

    Raises:
        ValueError: As :func:`heatmap`.
    """
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
    write_figure(figure, path)


def coordinates(distances: np.ndarray) -> np.ndarray:
    """Place tasks in the plane so that their distances approach a matrix: classical multidimensional scaling.

    The places are the two leading eigenvectors of the doubly centred squared distances (Torgerson, 1952). The signs
    make the largest entry of each positive.

    Args:
        distances: A symmetric matrix [T, T].

    Returns:
        The places [T, 2].

    Raises:
        ValueError: As :func:`heatmap`.

    Example:
        >>> import numpy as np
        >>> coordinates(np.array([[0.0, 3.0], [3.0, 0.0]])).round(2) + 0.0
        array([[ 1.5,  0. ],
               [-1.5,  0. ]])
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
    """Draw tasks as points in the plane, at their :func:`coordinates`.

    Args:
        distances: A symmetric matrix [T, T].
        names: The names [T] of the tasks.
        path: The file to write, ``.png`` or ``.svg``.
        families: The family [T] of each task, which sets its colour and marker.

    Raises:
        ValueError: As :func:`heatmap`.
    """
    from matplotlib.figure import Figure

    places = coordinates(_check_distances(distances, len(names)))
    kinds = sorted(set(families)) if families is not None else []
    figure = Figure(figsize=(9, 7), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for k, (x, y) in enumerate(places):
        colour, marker = family_style(kinds.index(families[k]) if families is not None else 0)
        axes.plot(x, y, MARKERS[marker], color=colour, markersize=5)
        axes.annotate(names[k], (x, y), (3, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("near tasks are alike; the axes mean nothing", fontsize=8, color="#555555")
    axes.set_aspect("equal", "datalim")
    if len(kinds) > 1:
        handles = _handles(kinds)
        for k, handle in enumerate(handles):
            handle.set_marker(MARKERS[family_style(k)[1]])
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8)
    write_figure(figure, path)


def layer_means(embeddings: Sequence[Embedding]) -> np.ndarray:
    """Return the mean Fisher value of each layer, [T, L], for T comparable embeddings."""
    stacked = stack(embeddings)
    return np.stack([stacked[:, start:stop].mean(1) for _, start, stop in embeddings[0].layers], 1)


def layer_profile(embeddings: Sequence[Embedding], names: Sequence[str], path: str | os.PathLike) -> None:
    """Draw the mean Fisher value of each layer, from the first layer to the last, with one line a task.

    Args:
        embeddings: T comparable embeddings.
        names: The names [T] of the tasks.
        path: The file to write, ``.png`` or ``.svg``.

    Raises:
        FingerprintMismatch: If the embeddings cannot be compared.
    """
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
    write_figure(figure, path)


def _handles(kinds: Sequence[str]) -> list:
    """Return the entries of a legend of families."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], marker="s", linestyle="", color=family_style(k)[0], label=kind) for k, kind in enumerate(kinds)
    ]


def _colour_names(axes: Any, labels: Sequence, families: Sequence[str]) -> None:
    """Draw each label in the colour of its family, and a legend above the axes."""
    kinds = sorted(set(families))
    for label, family in zip(labels, families, strict=True):
        label.set_color(family_style(kinds.index(family))[0])
    axes.legend(
        handles=_handles(kinds),
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=min(len(kinds), LEGEND_COLUMNS),
        frameon=False,
        fontsize=8,
    )


def contact_sheet(
    images: Sequence[Sequence[np.ndarray] | np.ndarray],
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    captions: Sequence[str] | None = None,
) -> None:
    """Draw a few example images of each task, one row a task.

    Args:
        images: The images of each task, ``images[task][k]``, uint8 [H, W] or [H, W, 3].
        names: The names [T] of the tasks.
        path: The file to write, ``.png`` or ``.svg``.
        captions: A second line [T] under each name.
    """
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
    write_figure(figure, path)


class MeasuredProfile(Protocol):
    """What :func:`roofline` reads of a :class:`~t2v_fast.estimation.profiling.Profile`."""

    @property
    def layers(self) -> Any: ...

    @property
    def machine(self) -> Any: ...

    @property
    def examples(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def fisher(self) -> float: ...


def roofline(profile: MeasuredProfile, path: str | os.PathLike) -> None:
    """Draw every layer of a profile as a point under the two limits of the machine (Williams et al., 2009).

    A point's height is the layer's rate in flops a second, and its place along the axis is its flops a byte. Its area
    is its share of the time.

    Args:
        profile: The result of :func:`t2v_fast.profile`.
        path: The file to write, ``.png`` or ``.svg``.
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
    write_figure(figure, path)


def write_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG or SVG, by the suffix of the path; ValueError for another suffix."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"{path}: a picture's suffix must be {' or '.join(FORMATS)}")
    buffer = io.BytesIO()
    # Without a date, the same picture gives the same file.
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())
