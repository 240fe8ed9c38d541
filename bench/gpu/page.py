"""Tables of predicted and measured times: ``python -m bench.gpu.page [bench/gpu/h200.json ...] --write docs/gpu.md``.

Of several reports, the later ones have precedence. Without a report the measured columns say that no card has been
measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import ROOT
from bench.gpu.measure import LAYERS, paths
from bench.pages import markdown, replace_section
from bench.studies import gpu_model
from t2v_fast.ops import gpu_specs, planner

CARD = "H200"
REPORT = ROOT / "bench" / "gpu" / "h200.json"
NONE = "not measured"
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
    """Whole networks: the floor, a step, this library, and its ratios to both."""
    rows = [["network", "products", "floor, predicted", "floor", "step", "compiled step"]]
    rows[0] += ["squares, predicted", "squares", "host", "replayed", "squares / floor", "/ step", "/ compiled step"]
    rows[0] += ["fisher()", "fisher() / floor"]
    found = results.get("networks", {})
    for (name, kind), (floor, _, own) in gpu_model.predictions().items():
        title = f"{name}, 224, batch 64, {kind}: "

        def time(what: str, field: str, title: str = title) -> float | None:
            return found.get(title + what, {}).get(field)

        squares, backend = min(
            ((t, b) for b in BACKENDS if (t := time(f"squares, {b}", "busy")) is not None), default=(None, "")
        )
        of_others = [time(what, "busy") for what in ("floor", "step", "compiled step")]
        row = [name, kind, f"{floor:.1f}", *map(_number, of_others), f"{floor + own:.1f}", _number(squares)]
        row += [_number(time(f"squares, {backend}", "host")), _number(time(f"squares replayed, {backend}", "ms"))]
        row += [_ratio(squares, other) for other in of_others]
        whole = time("fisher()", "ms")
        rows.append([*row, _number(whole), _ratio(whole, time("floor", "ms"))])
    return markdown(rows)


def _ratio(time: float | None, to: float | None) -> str:
    return NONE if time is None or to is None else f"{time / to:.2f}"


def peers(results: dict[str, Any]) -> str:
    """Other ways to the squares of a batch, in TF32."""
    rows = [["network", "way", "ms a batch", "over squares, replayed", "relative error", "examples at once"]]
    whole = results.get("networks", {})
    for title, found in results.get("peers", {}).items():
        cell, _, peer = title.partition(": ")
        replays = [whole[key]["ms"] for b in BACKENDS if (key := f"{cell}: squares replayed, {b}") in whole]
        error = f"{found['error']:.0e}" if "error" in found else "another quantity"
        network = cell.partition(",")[0]
        rows.append(
            [
                network,
                peer,
                _number(found["ms"]),
                _ratio(found["ms"], min(replays, default=None)),
                error,
                str(found["examples"]),
            ]
        )
    return markdown(rows)


def layers(results: dict[str, Any]) -> str:
    """Layers by path: the least time by the published rates, and the time of each backend."""
    card = gpu_specs.named(CARD)
    assert card is not None
    rows = [["layer", "products", "path", "predicted, us"] + [f"{backend}, us" for backend in BACKENDS]]
    found = results.get("layers", {})
    for name, conv in LAYERS.items():
        for kind, (rate, itemsize) in RATES.items():
            for path in paths(conv):
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
    "gpu peers": peers,
    "gpu layers": layers,
}


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The sections of several reports; the lines of later reports have precedence."""
    found: dict[str, Any] = {}
    for path in paths:
        for section, lines in json.loads(path.read_text()).items() if path.exists() else ():
            found[section] = found.get(section, {}) | lines if isinstance(lines, dict) else lines
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="*", default=[REPORT])
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    asked = parser.parse_args()
    results = merged(asked.reports)
    if results and not re.search(CARD, str(results["machine"]["device"])):
        raise SystemExit(f"the report is from {results['machine']['device']}, and the predictions are for an {CARD}")
    for name, table in TABLES.items():
        if asked.write is None:
            print(f"{name}\n\n{table(results)}\n")
        else:
            replace_section(asked.write, name, table(results))


if __name__ == "__main__":
    main()
