"""Markdown tables and plots of the results of the suites.

    python -m bench.report fisher.json stream.json memory.json [--plots docs]

Prints Markdown. With --plots, also writes a PNG for each table of contestants.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# fisher / floor, fisher / step, naive / fisher, vmap / fisher: what docs/performance.md promises.
RATIOS = (("fisher", "floor"), ("fisher", "step"), ("naive", "fisher"), ("vmap", "fisher"))
BOUNDS = {
    ("resnet18", 224): (1.35, 0.85, 1.8, 2.5),
    ("resnet18", 64): (1.20, 0.70, 8, 12),
    ("resnet18", 32): (1.25, 0.75, 12, 30),
}
MEMORY_BOUND = 1.15  # fisher / step
COLOURS = {
    "": "0.6",
    "exact": "tab:blue",
    "cosine": "tab:blue",
    "wrong": "tab:red",
    "incomplete": "tab:red",
}  # by the verdict's first word
Row = dict[str, Any]


def load(paths: Iterable[Path]) -> tuple[list[Row], str]:
    """One flat row a contestant and cell, in the order of the contestants, and the machine in words."""
    rows: list[Row] = []
    for path in paths:
        data = json.loads(path.read_text())
        order = {name: i for i, name in enumerate(data["contestants"])}
        found = [
            {"suite": Path(b["fullname"].split("::")[0]).stem, "seconds": b["stats"]["data"]}
            | b["params"]
            | b["extra_info"]
            for b in data["benchmarks"]
        ]
        found += [r["params"] | {"suite": r["suite"], "verdict": r["verdict"]} for r in data["refused"]]
        rows += sorted(found, key=lambda row: order[row["contestant"]])
        machine = data["machine_info"]
    name = machine["cpu"].get("brand_raw", machine["machine"])
    return rows, f"{name}, {machine['threads']} threads, torch {machine['torch']}"


def groups(rows: Iterable[Row], suite: str) -> dict[tuple[str, int], dict[str, Row]]:
    """{(model, size): {contestant: row}} of one suite."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == suite:
            found.setdefault((row["model"], row["size"]), {})[row["contestant"]] = row
    return found


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for cells in body:
        print("| " + " | ".join(cells) + " |")


def ratio(row: Row) -> float:
    """Time over this library's for as many images: the median over pairs. NaN without pairs."""
    scale = row["batch"] / row["examples"] if "batch" in row else 1  # a stream's pairs are of equal parts
    pairs = zip(row.get("seconds", ()), row.get("reference", ()), strict=False)
    return statistics.median([scale * s / r for s, r in pairs] or [float("nan")])


def milliseconds(row: Row) -> str:
    return f"{1e3 * statistics.median(row['seconds']) / row['examples']:.3g}" if "seconds" in row else "-"


def verdict(row: Row, whole: str = "batch") -> str:
    part = "examples" in row and row["examples"] < row[whole]
    words = (row["verdict"].replace("|", "/"), f"extrapolated from {row['examples']} images" if part else "")
    return "; ".join(filter(None, words))


def number(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"


def contract(cells: dict[tuple[str, int], dict[str, Row]]) -> None:
    """The performance contract: a cell is left out where a contestant of it was not asked for."""
    body = []
    for (model, size), by_name in cells.items():
        if not all(a in by_name and b in by_name for a, b in RATIOS):
            continue
        fisher = by_name["fisher"]
        line = [f"{model}, {size}, {fisher.get('batch', '-')}", milliseconds(fisher)]
        for i, (a, b) in enumerate(RATIOS):
            value = 1 / ratio(by_name[b]) if a == "fisher" else ratio(by_name[a])
            bound = BOUNDS.get((model, size))
            line.append(number(value) + (f" ({'≤' if a == 'fisher' else '≥'} {bound[i]:g})" if bound else ""))
        refusal = "" if "seconds" in fisher else fisher["verdict"]
        wrong = [f"{name} {by_name[name]['verdict']}" for name in ("naive", "vmap") if bad(by_name[name])]
        body.append([*line, "; ".join(filter(None, [refusal or fisher["verdict"], *wrong]))])
    if body:
        head = ("probe, input, batch", "fisher ms/image", *(f"{a} / {b}" for a, b in RATIOS), "verdict")
        table(head, body)


def bad(row: Row) -> bool:
    return row["verdict"].startswith(("wrong", "incomplete", "raises", "absent"))


def bars(axes: Any, rows: Sequence[Row], values: Sequence[float], label: str, log: bool) -> None:
    """Horizontal bars with their values; what cannot be measured says why."""
    names = [row["contestant"] for row in rows]
    colours = [COLOURS.get(row["verdict"].replace(":", " ").partition(" ")[0], "tab:orange") for row in rows]
    known = [v if v == v else 0.0 for v in values]
    axes.barh(names, known, color=colours)
    for i, (row, v) in enumerate(zip(rows, values, strict=True)):
        at = v if v == v else min((k for k in known if k), default=1.0)
        axes.text(at, i, f" {v:.3g}" if v == v else f" {row['verdict'][:60]}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    labels = {
        "0.6": "yardstick",
        "tab:blue": "right",
        "tab:orange": "estimate or another quantity",
        "tab:red": "wrong or incomplete",
    }
    handles = [Patch(color=c, label=text) for c, text in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


class Plots:
    """Figures in a folder, or none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def save(self, name: str, title: str, rows: Sequence[Row], values: Sequence[float], label: str, log: bool) -> None:
        if self.folder is None or all(v != v for v in values):
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.4 + 0.26 * len(rows)), layout="constrained")
        bars(figure.subplots(), rows, values, label, log)
        figure.suptitle(title, fontsize=10)
        legend(figure)
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{name}.png", dpi=120)
        print(f"\n![{title}]({self.folder.name}/{name}.png)")


def report_fisher(rows: Sequence[Row], plots: Plots) -> None:
    cells = groups(rows, "test_fisher")
    contract(cells)
    for (model, size), by_name in cells.items():
        found = list(by_name.values())
        print(f"\n### {model}, {size} pixels, batches of {max(r.get('batch', 0) for r in found)}")
        head = ("contestant", "ms/image", "times fisher", "verdict")
        table(head, ([r["contestant"], milliseconds(r), number(ratio(r)), verdict(r)] for r in found))
        title = f"{model}, {size} pixels: time over this library's, one cotangent"
        plots.save(f"fisher-{model}-{size}", title, found, [ratio(r) for r in found], "times fisher", True)


def report_stream(rows: Sequence[Row], plots: Plots) -> None:
    for (model, size), by_name in groups(rows, "test_stream").items():
        found = list(by_name.values())
        images = max(r.get("images", 0) for r in found)
        nan = float("nan")
        seconds = [r["seconds"][0] * images / r["examples"] if "seconds" in r else nan for r in found]
        # A part says nothing about growth.
        mib = [[m / 2**20 for m in r["resident"]] if r.get("examples") == images else [] for r in found]
        print(f"\n### A stream of {images:,} images, {model}, {size} pixels")
        body = [
            (
                r["contestant"],
                number(s),
                number(images / s),
                number(ratio(r)),
                *(f"{m[i]:.0f}" if m else "-" for i in (0, -1)),
                verdict(r, "images"),
            )
            for r, s, m in zip(found, seconds, mib, strict=True)
        ]
        head = ("contestant", "seconds", "images/s", "times fisher", "MiB resident at 10%", "at the end", "verdict")
        table(head, body)
        title = f"{images:,} images of {size} pixels, {model}"
        plots.save(f"stream-{model}-{size}", title, found, seconds, "seconds", True)


def report_memory(rows: Sequence[Row], plots: Plots) -> None:
    for (model, size), by_name in groups(rows, "test_memory").items():
        found = list(by_name.values())
        step = by_name.get("step", {}).get("peak", float("nan"))
        over = [r.get("peak", float("nan")) / step for r in found]
        print(f"\n### Peak memory over the model and its batch, {model}, {size} pixels")
        body = [
            (
                r["contestant"],
                f"{r['peak'] / 2**20:.0f}" if "peak" in r else "-",
                number(o) + (f" (≤ {MEMORY_BOUND})" if r["contestant"] == "fisher" else ""),
                verdict(r),
            )
            for r, o in zip(found, over, strict=True)
        ]
        table(("contestant", "MiB", "/ step", "verdict"), body)
        plots.save(f"memory-{model}-{size}", f"{model}, {size} pixels: peak memory", found, over, "of a step", False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    arguments = parser.parse_args()
    rows, machine = load(arguments.results)
    print(machine)
    plots = Plots(arguments.plots)
    for report in (report_fisher, report_stream, report_memory):
        report(rows, plots)


if __name__ == "__main__":
    main()
