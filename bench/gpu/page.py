"""Tables of predicted and measured times: ``python -m bench.gpu.page [build/gpu/gpu.json] --write docs/gpu.md``.

Without a report the measured columns say that no card has been measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.measure import LAYERS
from bench.pages import markdown, replace_section
from bench.studies import gpu_model
from t2v_fast.ops import gpu_specs, planner

CARD = "H200"
NONE = "no card yet"
RATES = {"bfloat16": ("half", 2), "TF32": ("tf32", 4), "float32": ("float32", 4)}
BACKENDS = ("cuda", "triton")


def rates(results: dict[str, Any]) -> str:
    """The card's rates, published and measured."""
    card = gpu_specs.named(CARD)
    assert card is not None
    published = {
        "bfloat16, TFLOP/s": card.half,
        "TF32, TFLOP/s": card.tf32,
        "float32, TFLOP/s": card.float32,
        "copy, GB/s": card.bandwidth,
    }
    rows = [["", f"published for an {CARD}", "measured"]]
    found = results.get("ceilings", {})
    rows += [[name, f"{rate:g}", _number(found.get(name))] for name, rate in published.items()]
    return markdown(rows)


def networks(results: dict[str, Any]) -> str:
    """Whole networks: the floor, a step, and this library's ratio to both."""
    rows = [["network", "products", "floor, ms", "squares, ms", "squares / floor"]]
    rows[0] += [
        f"{what}, measured"
        for what in ("floor", "step", "compiled step", "squares", "fisher()", "host", "fisher() / floor")
    ]
    found = results.get("networks", {})
    for (name, kind), (floor, _, own) in gpu_model.predictions().items():
        title = f"{name}, 224, batch 64, {kind}: "

        def time(what: str, field: str = "ms", title: str = title) -> float | None:
            return found.get(title + what, {}).get(field)

        squares = [(t, b) for b in BACKENDS if (t := time(f"squares, {b}")) is not None]
        best = min(squares, default=(None, ""))
        host = time(f"squares, {best[1]}", "host")
        whole, least = time("fisher()"), time("floor")
        ratio = None if whole is None or least is None else whole / least
        measured = [least, time("step"), time("compiled step"), best[0], whole, host, ratio]
        predicted = [f"{floor:.1f}", f"{floor + own:.1f}", f"{(floor + own) / floor:.2f}"]
        rows.append([name, kind, *predicted, *map(_number, measured)])
    return markdown(rows)


def layers(results: dict[str, Any]) -> str:
    """Layers by path: the least time by the published rates, and the time of each backend."""
    card = gpu_specs.named(CARD)
    assert card is not None
    rows = [["layer", "products", "path", "predicted, us"] + [f"{backend}, us" for backend in BACKENDS]]
    found = results.get("layers", {})
    for name, conv in LAYERS.items():
        for kind, (rate, itemsize) in RATES.items():
            for path in (p for p in conv.paths() if p != "winograd"):
                least = 1e6 * _least(card, planner.gpu_work(conv, path, itemsize), rate)
                times = [found.get(f"{name}, {kind}, {b}, {path}", {}).get("us an example") for b in BACKENDS]
                rows.append([name, kind, path, f"{least:.2f}", *map(_number, times)])
    return markdown(rows)


def _least(card: gpu_specs.Card, work: gpu_specs.GpuWork, rate: str) -> float:
    """The least time by the published rates; products with float32 sums are exact."""
    products = work.flops / getattr(card, rate) + work.sum_flops / card.float32
    return max(products / 1e12, work.bytes / (card.bandwidth * 1e9))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu rates": rates,
    "gpu networks": networks,
    "gpu layers": layers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", default=Path("build/gpu/gpu.json"))
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    asked = parser.parse_args()
    results = json.loads(asked.report.read_text()) if asked.report.exists() else {}
    if results and not re.search(CARD, str(results["machine"]["device"])):
        raise SystemExit(f"the report is from {results['machine']['device']}, and the predictions are for an {CARD}")
    for name, table in TABLES.items():
        if asked.write is None:
            print(f"{name}\n\n{table(results)}\n")
        else:
            replace_section(asked.write, name, table(results))


if __name__ == "__main__":
    main()
