"""BackPACK 1.7 (Dangel et al., 2020, arXiv 1912.10985): SumGradSquared, with and without its memory option."""

from __future__ import annotations

import functools
import warnings

from backpack import backpack, extend
from backpack.core.derivatives.convnd import weight_jac_t_save_memory
from backpack.extensions import SumGradSquared
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contestants import Contestant, Sums, filter_means
from bench.peers import owns_parameters, without_inplace


def prepare(model: nn.Module) -> nn.Module:
    model = without_inplace(model)
    for m in model.modules():
        # Extending the whole model, as documented, hooks containers too, which in-place operations break.
        if owns_parameters(m) and not list(m.children()):
            extend(m)
    return model


def run(model: nn.Module, x: Tensor, y: Tensor, save_memory: bool) -> Sums:
    with warnings.catch_warnings(), backpack(SumGradSquared()), weight_jac_t_save_memory(save_memory):
        warnings.simplefilter("ignore")
        F.cross_entropy(model(x), y, reduction="sum").backward()
    sums = {}
    for name, p in model.named_parameters():
        p.grad = None
        if hasattr(p, "sum_grad_squared"):
            sums[name] = filter_means(p.sum_grad_squared)
            del p.sum_grad_squared
    return sums


CONTESTANTS = {
    "backpack": Contestant(functools.partial(run, save_memory=False), prepare),
    "backpack_save_memory": Contestant(functools.partial(run, save_memory=True), prepare),
}
