"""curvlinops: the diagonal of its operators, multiplied out or estimated, and this library's.

    python -m bench.studies.frontends.curvlinops [--rounds 5]

curvlinops comes from ``requirements/frontends.txt``. It has no exact diagonal: multiplying an operator onto all unit
vectors gives one, and ``hutchinson_diag`` an estimate. Two rows compare this library with both.

- *One random vector each*: ``hutchinson_diag`` with one vector, and this library's estimate with one random cotangent
  for each example. This is the comparison for the same work. The errors of both are in the row.
- *The exact diagonal*: nine cotangents of each example for ten classes. The time for the same error is that of the unit
  vectors. The time for the same images is that of one random vector, which is a ninth of the work.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

from bench.studies.frontends.table import Row, main, times
from t2v_fast.adapters.curvlinops import diagonal_operator

DRAWS = 20  # estimates from which an error is measured


def rows(arguments: argparse.Namespace) -> list[Row]:
    warnings.simplefilter("ignore")
    from curvlinops import GGNLinearOperator, hutchinson_diag

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    params = list(model.parameters())
    data = [(torch.randn(16, 1, 16, 16), torch.randint(0, 10, (16,))) for _ in range(2)]

    def theirs() -> GGNLinearOperator:
        return GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data, check_deterministic=False)

    def ours(estimator: str = "exact", seed: int = 0) -> torch.Tensor:
        loss = nn.CrossEntropyLoss()
        found = diagonal_operator(model, loss, params, data, estimator=estimator, samples=1, seed=seed)
        return torch.cat([d.flatten() for d in found.diagonal])

    def multiplied() -> torch.Tensor:
        operator = theirs()
        unit = torch.eye(operator.shape[0], dtype=params[0].dtype)
        return torch.cat([(operator @ part.T)[k * 256 :].diagonal() for k, part in enumerate(unit.split(256))])

    def estimated(vectors: int = 1) -> torch.Tensor:
        return hutchinson_diag(theirs(), vectors)

    model.double()
    data = [(x.double(), y) for x, y in data]
    exact = multiplied()
    worst = float((ours() - exact).norm() / exact.norm())

    def error(estimates: list[torch.Tensor]) -> float:
        return float((torch.stack(estimates) - exact).square().sum(1).mean().sqrt() / exact.norm())

    their_error = error([estimated() for _ in range(DRAWS)])
    our_error = error([ours("hutchinson", seed) for seed in range(DRAWS)])
    model.float()
    data = [(x.float(), y) for x, y in data]
    task = f"{len(exact)} parameters, 32 images of 16 x 16"
    one = times(estimated, lambda: ours("hutchinson"), arguments.rounds).ratio
    return [
        Row(
            f"curvlinops `hutchinson_diag` of `GGNLinearOperator`, one random vector each, {task}",
            1,
            f"both estimate the same diagonal; errors {their_error:.2g} with its own and {our_error:.2g} with ours",
            one,
            one * (their_error / our_error) ** 2,
        ),
        Row(
            f"curvlinops `GGNLinearOperator`, its exact diagonal (nine times the work of one random vector), {task}",
            1,
            f"{worst:.0e} relative in float64; `hutchinson_diag` with one vector is {their_error:.2g} off",
            times(estimated, ours, arguments.rounds).ratio,
            times(multiplied, ours, 1).ratio,
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, needs=False)
