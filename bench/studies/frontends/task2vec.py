"""aws-cv-task2vec, unmodified, with and without this library.

    python -m bench.studies.frontends.task2vec CHECKOUT [--rounds 5]

CHECKOUT is a clone of github.com/awslabs/aws-cv-task2vec, or its bare git directory. Its own ResNet-18 (random
weights, ten classes) embeds 128 handwritten digits of 64 x 64 pixels (scikit-learn's). `mode="compat"` starts from
the same seed as the code itself. The errors of `accelerate` and of the code's own Fisher are relative to the exact
Fisher by filter, in evaluation mode and with the same head, |estimate - exact| / |exact|, after the best scaling of
the estimate. The code squares mean gradients of drawn batches. So the number of batches that it needs for an error
follows from the spread of its batches. For this, its batch norm is in evaluation mode, which is kind to it: in its
own training mode, its mean is another quantity, whose error no number of batches removes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench.studies.frontends.table import Row, checkout, main, times
from t2v_fast import fisher
from t2v_fast.adapters import task2vec as ours
from t2v_fast.tasks.data import balanced_weights

IMAGES, SIZE, BATCH, CLASSES = 128, 64, 64, 10
TASK = f"ResNet-18, {IMAGES} images of {SIZE} x {SIZE}"
SPREAD = 16  # batches from which the spread of the code's own batches is measured
LOADER = {"batch_size": BATCH, "num_samples": IMAGES, "num_workers": 0}
COMPAT = {"batch_size": BATCH, "num_samples": IMAGES, "num_workers": 0}


def digits() -> TensorDataset:
    """Handwritten digits as images of three channels."""
    found = load_digits()
    x = torch.tensor(found.images[:IMAGES], dtype=torch.float32)[:, None]
    x = F.interpolate(x, size=SIZE, mode="bilinear").repeat(1, 3, 1, 1)
    return TensorDataset((x - x.mean()) / x.std(), torch.tensor(found.target[:IMAGES]))


def apart(found: Tensor, exact: Tensor, scaled: bool = True) -> float:
    """Relative error, after the best scaling unless ``scaled`` is false."""
    if scaled:
        found = found * (found @ exact) / (found @ found)
    return float((found - exact).norm() / exact.norm())


class Study:
    """The code's modules, a probe with a fitted head, and the exact Fisher of its weights."""

    def __init__(self, task2vec: ModuleType, models: ModuleType) -> None:
        self.task2vec, self.models, self.data = task2vec, models, digits()
        torch.manual_seed(0)
        self.fresh = models.get_model("resnet18", num_classes=CLASSES)
        self.model = copy.deepcopy(self.fresh)
        x, y = self.data.tensors
        with torch.no_grad():  # statistics for evaluation mode
            for _ in range(20):
                self.model.train()(x)
        theirs = task2vec.Task2Vec(self.model, loader_opts={**LOADER, "num_samples": 10 * IMAGES})
        self.model.eval()
        theirs._cache_features(self.data)
        theirs._fit_classifier()
        self.names = [k for k, _ in self.model.named_parameters() if k.endswith("weight") and not k.startswith("fc.")]
        exact = fisher(
            self.model,
            DataLoader(self.data, BATCH),
            "exact",
            parameters=self.names,
            weights=balanced_weights(y, CLASSES),
        )
        self.exact = torch.cat([exact[k].flatten() for k in self.names])
        self.state = copy.deepcopy(self.model.state_dict())

    def squares(self, mode: bool, loader_opts: dict[str, Any] = LOADER) -> Tensor:
        """Run the loaded module's own or replaced Monte Carlo Fisher, and read what its embedding reads."""
        self.model = copy.deepcopy(self.model)  # a probe for each task, as in the code's examples: none is remembered
        self.model.load_state_dict(self.state)  # the code's training mode changes the statistics of batch norms
        task2vec = self.task2vec.Task2Vec(self.model, loader_opts=dict(loader_opts))
        self.model.train(mode)
        task2vec.montecarlo_fisher(self.data)
        return torch.as_tensor(task2vec.extract_embedding(self.model).hessian).double()

    def compat(self, method: str, rounds: int) -> Row:
        """Embed with the code, and with this library's compat mode, from the same seed."""

        found: dict[str, Tensor] = {}

        def embed(module: ModuleType, **options: Any) -> None:
            model = copy.deepcopy(self.fresh)
            torch.manual_seed(7)
            embedding = module.Task2Vec(model, method=method, loader_opts=dict(COMPAT), **options).embed(self.data)
            found[module.__name__] = torch.as_tensor(embedding.hessian).double()

        measured = times(lambda: embed(self.task2vec), lambda: embed(ours, mode="compat"), min(rounds, 3))
        difference = apart(found[ours.__name__], found[self.task2vec.__name__], scaled=False)
        return Row(
            f'aws-cv-task2vec, `Task2Vec(method="{method}", mode="compat")`, {TASK}, {COMPAT["num_samples"]} draws',
            2,
            f"{difference:.1e} apart, same seed, float32",
            measured.ratio,
        )

    def accelerated(self, title: str, rounds: int, needs: Callable[[float], float], own: str, **options: Any) -> Row:
        """Compare ``accelerate`` with the code, for the same number of images and for the same error."""
        errors = []
        for seed in range(3):
            with accelerated(self.task2vec, seed=seed, **options):
                errors.append(apart(self.squares(True), self.exact))
        error = math.sqrt(sum(e**2 for e in errors) / len(errors))

        def replaced() -> None:
            with accelerated(self.task2vec, **options):
                self.squares(True)

        measured = times(lambda: self.squares(True), replaced, rounds)
        batches = needs(error)
        return Row(
            f"aws-cv-task2vec, `accelerate`, {title}, {TASK}",
            2,
            f"{error:.3f} from the exact Fisher, {own}; for {error:.3f} it needs {batches:.0f} batches",
            measured.ratio,
            measured.ratio * batches / (IMAGES / BATCH),
        )

    def rows(self, rounds: int) -> list[Row]:
        """Measure everything."""
        one = {**LOADER, "num_samples": BATCH}
        own = self.squares(True)
        # The model must stay in evaluation mode although the class sets the training mode when it is made.
        each = torch.stack([self.squares(False, one) for _ in range(SPREAD)]) * BATCH
        variance = float(each.var(0).sum() / self.exact.norm() ** 2)
        evaluated = apart(each[: IMAGES // BATCH].mean(0), self.exact)
        text = f"the code itself {apart(own, self.exact):.2f}, and {evaluated:.2f} in evaluation mode"

        def needs(error: float) -> float:
            return variance / error**2

        return [
            self.compat("montecarlo", rounds),
            self.compat("variational", rounds),
            self.accelerated("one cotangent", rounds, needs, text, estimator="hutchinson", samples=1),
            self.accelerated("default, two cotangents", rounds, needs, text),
        ]


@contextlib.contextmanager
def accelerated(task2vec: ModuleType, **options: Any) -> Iterator[None]:
    """Replace the module's Fisher within the context."""
    ours.accelerate(task2vec, **options)
    try:
        yield
    finally:
        ours.restore(task2vec)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measure the first checkout."""
    path: Path = arguments.checkout[0]
    with checkout(path), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        study = Study(importlib.import_module("task2vec"), importlib.import_module("models"))
        assert isinstance(study.model, nn.Module)
        return study.rows(arguments.rounds)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows)
