"""curvlinops 3.0 (Dangel et al., 2025, arXiv 2501.19183): the GGN's diagonal from one drawn label an example."""

from __future__ import annotations

import torch
from curvlinops import GGNDiagonalLinearOperator
from torch import Tensor, nn

from bench.contestants import ESTIMATE, Contestant, Sums, filter_means


def run(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    named = dict(model.named_parameters())
    operator = GGNDiagonalLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(named.values()),
        [(x, y)],
        check_deterministic=False,
        num_data=len(x),
        mode="mc",
    )
    diagonal = operator @ [torch.ones_like(p) for p in named.values()]
    return {name: filter_means(values) for name, values in zip(named, diagonal, strict=True)}


CONTESTANTS = {"curvlinops": Contestant(run, target=ESTIMATE)}
