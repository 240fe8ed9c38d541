"""Runs of Avalanche itself, whose EWC plugin computes its importances with this library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import import_avalanche
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from t2v_fast.adapters.continual import accelerate_avalanche

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXPERIENCES = 2


@pytest.fixture(autouse=True, scope="module")
def _leave_no_avalanche() -> Iterator[None]:
    """Importances are others where Avalanche has been imported, and tests of other files expect the usual ones."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "avalanche"]:
        del sys.modules[name]


def features() -> nn.Sequential:
    convolutions = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten())


def growing(frozen: bool = False) -> nn.Module:
    from avalanche.models import IncrementalClassifier

    body = features()
    body[0].requires_grad_(not frozen)
    return nn.Sequential(body, IncrementalClassifier(128, 2))


def with_task_labels() -> nn.Module:
    from avalanche.models import MultiHeadClassifier, MultiTaskModule

    class Model(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = features(), MultiHeadClassifier(128)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.head(self.body(x), task_labels)

    return Model()


MODELS = {"growing head": growing, "frozen": lambda: growing(frozen=True), "task labels": with_task_labels}


def run(
    name: str, ours: bool, mode: str = "separate", ewc_lambda: float = 2.0, **options: Any
) -> tuple[list[float], Any]:
    """Train on two experiences of five digits each; return the accuracies on both, and the plugin."""
    import_avalanche()
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.plugins import EvaluationPlugin, EWCPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    parts = []
    for part in (slice(0, 600), slice(600, 1200)):
        data = TensorDataset(x[part], y[part])
        data.targets = y[part].tolist()
        parts.append(data)
    by_task = name == "task labels"
    kind = {"task_labels": by_task, "class_ids_from_zero_in_each_exp": by_task, "shuffle": False}
    benchmark = nc_benchmark(*parts, n_experiences=EXPERIENCES, **kind)
    model = MODELS[name]()
    plugin = EWCPlugin(ewc_lambda, mode, 0.9 if mode == "online" else None)
    if ours:
        plugin = accelerate_avalanche(plugin, **options)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=3,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    model.eval()
    accuracies = []
    for experience in benchmark.test_stream:
        images, labels, tasks = (torch.as_tensor(column) for column in _columns(experience.dataset))
        with torch.no_grad():
            logits = model(images, tasks) if by_task else model(images)
        accuracies.append(float((logits.argmax(1) == labels).float().mean()))
    return accuracies, plugin


def _columns(dataset: Any) -> tuple[Tensor, list[int], list[int]]:
    rows = [dataset[k] for k in range(len(dataset))]
    return torch.stack([row[0] for row in rows]), [int(row[1]) for row in rows], [int(row[2]) for row in rows]


@pytest.mark.parametrize("name", MODELS)
def test_two_experiences(name: str) -> None:
    """The same entries and types as the plugin's own, and the same accuracies within the noise of 300 test images."""
    theirs, plain = run(name, ours=False)
    ours, plugin = run(name, ours=True)
    assert list(plugin.importances) == list(plain.importances) == list(range(EXPERIENCES))
    for experience, importances in plain.importances.items():
        found = plugin.importances[experience]
        assert list(found) == list(importances)
        for key, value in importances.items():
            assert type(found[key]) is type(value)
            assert found[key].data.shape == value.data.shape
            assert bool(found[key].data.any()) == bool(value.data.any()), key
    assert ours == pytest.approx(theirs, abs=0.1)


def test_an_online_penalty_grows_with_the_head() -> None:
    _, plugin = run("growing head", ours=True, mode="online")
    assert plugin.importances[1]["1.classifier.weight"].data.shape == (10, 128)


def test_at_batch_size_one_the_importances_are_the_plugins() -> None:
    import_avalanche()
    from avalanche.training.plugins import EWCPlugin

    from t2v_fast.adapters.continual import compute_importances

    torch.manual_seed(0)
    model = nn.Sequential(features(), nn.Linear(128, 10)).double()
    model[0][0].requires_grad_(False)
    data = TensorDataset(torch.randn(12, 1, 8, 8).double(), torch.randint(0, 10, (12,)), torch.zeros(12))
    arguments = model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), data, "cpu"
    want = EWCPlugin(1.0).compute_importances(*arguments, 1)
    got = compute_importances(*arguments, 5)
    assert list(got) == list(want)
    for name, value in want.items():  # the plugin's zeros, and so its sums, are float32
        torch.testing.assert_close(got[name].data.float(), value.data, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
def test_labels_that_the_criterion_ignores_count_as_in_the_plugin(weight: list[float] | None) -> None:
    import_avalanche()
    from avalanche.training.plugins import EWCPlugin

    from t2v_fast.adapters.continual import compute_importances

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = TensorDataset(torch.randn(6, 4).double(), torch.tensor([0, -100, 2, 1, -100, 0]), torch.zeros(6))
    criterion = nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight).double())
    arguments = model, criterion, torch.optim.SGD(model.parameters(), 0.1), data, "cpu"
    # A batch of ignored labels alone has no gradient, and the plugin counts it among its batches.
    want = EWCPlugin(1.0).compute_importances(*arguments, 1)
    for name, value in compute_importances(*arguments, 1, batch_scale=True).items():
        torch.testing.assert_close(value.data.float(), want[name].data, rtol=1e-5, atol=1e-9)
    # Batches with one label that counts each have the plugin's importances at any size.
    few = TensorDataset(data.tensors[0][1:5], torch.tensor([-100, 2, 1, -100]), torch.zeros(4))
    arguments = *arguments[:3], few, "cpu"
    want = EWCPlugin(1.0).compute_importances(*arguments, 2)
    for name, value in compute_importances(*arguments, 2, batch_scale=True).items():
        torch.testing.assert_close(value.data.float(), want[name].data, rtol=1e-5, atol=1e-9)


def test_the_page_runs() -> None:
    import_avalanche()
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (block,) = re.findall(r"## Avalanche and Mammoth themselves\n.*?```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["plugin"].compute_importances.keywords == {"batch_scale": True}
