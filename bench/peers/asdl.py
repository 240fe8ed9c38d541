"""ASDL 0.1a5 (Osawa et al., 2023, arXiv 2305.04684; package asdfghjkl): diagonal empirical Fisher, as shipped."""

from __future__ import annotations

from asdl import FISHER_EMP, SHAPE_DIAG
from asdl.fisher import FisherConfig, FisherMaker, get_fisher_maker
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contestants import Contestant, Sums, filter_means

State = tuple[nn.Module, FisherMaker]


def prepare(model: nn.Module) -> State:
    config = FisherConfig(fisher_type=FISHER_EMP, fisher_shapes=[SHAPE_DIAG], loss_type="cross_entropy", data_size=1)
    return model, get_fisher_maker(model, config)


def run(state: State, x: Tensor, y: Tensor) -> Sums:
    model, maker = state
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, output, y, reduction="sum")
    maker.forward_and_backward()
    sums = {}
    for module, m in model.named_modules():
        found = m.__dict__.pop("fisher", None)
        if found is not None and found.has_diag:
            for kind in ("weight", "bias"):
                if (values := getattr(found.diag, kind, None)) is not None:
                    sums[f"{module}.{kind}".lstrip(".")] = filter_means(values)
    return sums


CONTESTANTS = {"asdl": Contestant(run, prepare)}
