"""curvlinops (Dangel et al., 2025, arXiv 2501.19183): the GGN's diagonal from one drawn label an example.

Version 3.0.1 has no such operator. This is for the versions after it (tried with the source of May 2026).
"""

from __future__ import annotations

import torch
from curvlinops import GGNDiagonalLinearOperator
from torch import Tensor, nn
from torch.func import functional_call

from bench.contestants import ESTIMATE, Contestant, Sums, filter_means


def run(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    named = dict(model.named_parameters())

    def forward(parameters: Sums, images: Tensor) -> Tensor:
        alone = images.dim() == x.dim() - 1  # each example comes without an axis of its own
        found = functional_call(model, parameters, (images[None] if alone else images,))
        return found[0] if alone else found

    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = GGNDiagonalLinearOperator(
        forward, loss, named, [(x, y)], check_deterministic=False, num_data=len(x), mc_samples=1
    )
    diagonal = operator @ [torch.ones_like(p) for p in named.values()]
    return {name: filter_means(values.detach()) for name, values in zip(named, diagonal, strict=True)}


CONTESTANTS = {"curvlinops": Contestant(run, target=ESTIMATE)}
