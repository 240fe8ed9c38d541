"""mml-similarity: its Fisher embedding of a task, with and without this library.

    pip install --no-deps --target FOLDER -r requirements/mml.txt
    python -m bench.studies.frontends.mml FOLDER [--rounds 5]

The package runs as it is: ``compute_fisher_information_embedding`` draws the images, chooses the parameters of a
``TimmGenericModel``, calls ``fim_diag`` and averages kernels. This library's ``fim_diag`` takes the place of the
package's own in its module.

mml-similarity draws one label for each image, and squares the gradient of the label's logit. Two comparisons follow.
With ``empirical=True`` the labels are those of the data, nothing is drawn, and the numbers have to be the same. With
drawn labels the mean over many passes has to approach ``fim_diag(gradient="logit")``.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.studies.frontends.table import Row, main, times
from t2v_fast.adapters.mml import fim_diag

CLASSES, IMAGES, PASSES = 10, 64, 20


class Images(Dataset):
    """Images as mml's ``TaskDataset`` gives them."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 32, 32, generator=generator).to(dtype)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {"image": self.images[k], "class": k % CLASSES}


@contextmanager
def package(folder: Path | None) -> Iterator[tuple[Any, Any]]:
    """Yield mml-similarity's module ``fisher`` and ``TaskType`` from a folder, which comes last on ``sys.path``."""
    before = list(sys.path)
    if folder is not None:
        sys.path.append(str(folder.resolve()))
    try:
        module = importlib.import_module("mml_similarity.scripts.fisher")
        yield module, importlib.import_module("mml.core.data_loading.task_attributes").TaskType
    finally:
        sys.path[:] = before


def network(task_type: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return mml's model around timm's ResNet-10, with a head of ten classes."""
    torch.manual_seed(0)
    model = importlib.import_module("mml.core.models.timm").TimmGenericModel(
        name="resnet10t", pretrained=False, drop_rate=0.2
    )
    model.add_head(SimpleNamespace(name="task", task_type=task_type.CLASSIFICATION, num_classes=CLASSES))
    return model.to(dtype)


def embedding(module: Any, model: Any, task_type: Any, own: Callable, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Return the package's embedding, whose Fisher ``own`` computes, of images that depend on the seed only."""
    before, module.fim_diag = module.fim_diag, own
    dtype = next(model.parameters()).dtype
    config = module.FimConfig(samples=IMAGES, **settings)
    torch.manual_seed(seed)
    try:
        return module.compute_fisher_information_embedding(
            config, model, Images(IMAGES, dtype), {"batch_size": 16}, torch.device("cpu"), task_type.CLASSIFICATION
        )
    finally:
        module.fim_diag = before


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in parts.values()]).double()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def estimates(module: Any, model: Any, task_type: Any, passes: int) -> Sequence[Tensor]:
    """Return the package's own Fishers of the same images, with other labels in each pass."""
    names = module.select_embedding_params(module.FimConfig(), model)
    loader = torch.utils.data.DataLoader(Images(IMAGES, next(model.parameters()).dtype), 16)
    found = []
    for seed in range(passes):
        torch.manual_seed(seed)
        found.append(flat(module.fim_diag(model, loader, names, task_type.CLASSIFICATION, device=torch.device("cpu"))))
    return found


def rows(arguments: argparse.Namespace) -> list[Row]:
    with package(arguments.checkout[0]) as (module, task_type):
        theirs, ours = module.fim_diag, partial(fim_diag, gradient="logit")
        model = network(task_type, torch.float64)
        given = [embedding(module, model, task_type, own, empirical=True) for own in (theirs, ours)]
        assert list(given[0]) == list(given[1])
        model = network(task_type)
        drawn = estimates(module, model, task_type, PASSES)
        names = module.select_embedding_params(module.FimConfig(), model)
        loader = torch.utils.data.DataLoader(Images(IMAGES, torch.float32), 16)
        exact = flat(ours(model, loader, names, task_type.CLASSIFICATION))
        single = statistics.median(distance(t, exact) for t in drawn)
        together = distance(torch.stack(drawn).mean(0), exact)
        # The one quantity for which both sides have the same error: images and labels of the data.
        found = times(
            lambda: embedding(module, model, task_type, theirs, empirical=True),
            lambda: embedding(module, model, task_type, ours, empirical=True),
            arguments.rounds,
        )
        expected = times(
            lambda: embedding(module, model, task_type, theirs),
            lambda: embedding(module, model, task_type, ours),
            arguments.rounds,
        )
    shape = f"a ResNet-10 of timm, {CLASSES} classes, {IMAGES} images of 32 x 32"
    apart = distance(flat(given[1]), flat(given[0]))
    return [
        Row(
            f"mml-similarity `compute_fisher_information_embedding`, labels of the data, {shape}",
            1,
            f'{apart:.0e} relative in float64 (`gradient="logit"`), the same {len(given[0])} entries',
            found.ratio,
            found.ratio,
        ),
        Row(
            f"mml-similarity `compute_fisher_information_embedding`, {shape}",
            1,
            f"one pass of the package {single:.2f} from the expectation over labels, which is exact here "
            f'(`gradient="logit"`), the mean of {PASSES} passes {together:.3f}',
            expected.ratio,
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows)
