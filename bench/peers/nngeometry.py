"""NNGeometry 0.4 (George, 2021): PMatDiag of the per-example losses."""

from __future__ import annotations

from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object import PMatDiag
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench.contestants import Contestant, Sums, filter_means

State = tuple[nn.Module, LayerCollection]


def prepare(model: nn.Module) -> State:
    return model, LayerCollection.from_model(model)


def run(state: State, x: Tensor, y: Tensor) -> Sums:
    model, layers = state

    def losses(*batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")[:, None]

    generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
    examples = DataLoader(TensorDataset(x, y), batch_size=len(y))
    diagonal = PMatDiag(generator=generator, examples=examples).get_diag() * len(y)  # it averages over examples
    modules = dict(model.named_modules())
    sums = {}
    for name, layer in layers.layers.items():
        position = layers.p_pos[name]
        for kind in ("weight", "bias"):
            if (part := getattr(layer, kind)) is not None:
                values = diagonal[position : position + part.numel()]
                sums[f"{name}.{kind}"] = filter_means(values.reshape(getattr(modules[name], kind).shape))
                position += part.numel()
    return sums


CONTESTANTS = {"nngeometry": Contestant(run, prepare)}
