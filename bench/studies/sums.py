"""What sums of squares and cotangents cost a batch on a CPU.

    python -m bench.studies.sums [--rounds 15] [--values 82176] [--examples 64]

The values are those of a large network's filters. The plain way converts all of them to float64 at once. The two ways
alternate. A row has medians of the process's time with one thread, and the median ratio of the pairs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.report import table
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.moments import NamedMoments, Units


def plain_sums(values: dict[str, Tensor], units: Units) -> tuple[Tensor, Tensor]:
    """The weighted sums of values, cross terms and squares, of all values at once."""
    q = torch.cat(list(values.values()), 1).double()
    return units.factors @ q, units.factors[1] @ q.square()


def spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--values", type=int, default=82176)
    parser.add_argument("--examples", type=int, default=64)
    asked = parser.parse_args()
    threads, n = torch.get_num_threads(), asked.examples
    torch.set_num_threads(1)
    try:
        sizes = [min(512, asked.values - start) for start in range(0, asked.values, 512)]
        values = {str(k): torch.rand(n, size) for k, size in enumerate(sizes)}
        moments = NamedMoments()
        units = Units(torch.ones(n))
        pairs = [
            (spent(lambda: plain_sums(values, units)), spent(lambda: moments.add(values, units)))
            for _ in range(asked.rounds + 1)
        ][1:]
        plain, own = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        rows = [["what", "plain, ms", "here, ms", "ratio"]]
        rows.append([f"sums of {asked.values} values of {n} examples", f"{plain:.2f}", f"{own:.2f}", f"{ratio:.2f}"])
        for classes in (10, 1000):
            logits = 4 * torch.randn(n, classes)
            times = [spent(lambda logits=logits: cotangents(logits)) for _ in range(asked.rounds + 1)][1:]
            what = f"`deflated` cotangents of {classes} classes"
            rows.append([what, "", f"{statistics.median(times):.2f}", ""])
        table(rows[0], rows[1:])
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
