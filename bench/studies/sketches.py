"""The error of the cotangents of one example, by how many of its classes are probable.

    python -m bench.studies.sketches [--draws 4000] [--write docs/decisions.md]

An example has 100 classes. A few of them share nearly all of the probability, or its logits are random. Its Jacobian
is random, for six filters of 40 entries. ``deflated`` cotangents are drawn many times. The printed errors are root mean
squares over the draws, relative to the norm of the diagonal Fisher. With ``classes alone``, sketches add up the columns
of classes only, as they did once.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from bench.pages import markdown, print_or_write
from t2v_fast.estimation import likelihoods
from t2v_fast.estimation.allocation import seeds_of
from t2v_fast.estimation.cotangents import cotangents

CLASSES, FILTERS, ENTRIES = 100, 6, 40
PROBABLE = (2, 3, 5, 8, 30)


def examples(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Names and logits [C]."""
    flat = 0.3 * torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    for probable in PROBABLE:
        yield str(probable), flat + 12 * (torch.arange(CLASSES) < probable)
    yield "all", flat
    yield "random, standard deviation 8", 8 * torch.randn(CLASSES, generator=generator, dtype=torch.float64)


def error(z: Tensor, jacobian: Tensor, samples: int, draws: int) -> float:
    """The relative error of so many cotangents of an example with logits z [C]."""

    def squares(u: Tensor) -> Tensor:  # [N, F] from [K, N, C]
        return torch.einsum("knc,cfe->knfe", u, jacobian).square().sum((0, 3))

    want = squares(cotangents(z[None], "exact"))[0]
    seeds = seeds_of(torch.arange(draws), 1)
    got = squares(cotangents(z.expand(draws, -1), "deflated", torch.full((draws,), samples), generator=seeds))
    return float(((got - want).square().sum(1).mean() / want.square().sum()).sqrt())


def page(draws: int) -> str:
    """The table."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(CLASSES, FILTERS, ENTRIES, generator=generator, dtype=torch.float64)
    rows = [["probable classes", "two, classes alone", "two", "one, classes alone", "one"]]
    for name, z in examples(generator):
        rows.append([name])
        for samples in (2, 1):
            with mock.patch.object(likelihoods, "_reach", lambda values, p, leading, among: leading):
                rows[-1].append(f"{error(z, jacobian, samples, draws):.3f}")
            rows[-1].append(f"{error(z, jacobian, samples, draws):.3f}")
    return markdown(rows)


def main() -> None:
    print_or_write(page, "sketches", __doc__, draws=4000)


if __name__ == "__main__":
    main()
