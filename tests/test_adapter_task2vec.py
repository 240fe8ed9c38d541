"""The public Task2Vec code's interface, by a module of the tests' own that has its contract."""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from t2v_fast import distance, export
from t2v_fast.adapters.task2vec import accelerate, read_embedding, read_embeddings, restore
from t2v_fast.embedding import FingerprintMismatch


class ProbeNetwork(nn.Module):
    """layers, fc, classifier, forward(x, start_from)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU())
        second = nn.Sequential(self.conv2, self.bn2, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.layers = [first, second, self.fc]
        for norm in (self.bn1, self.bn2):
            norm.running_var.uniform_(0.5, 2.0)

    @property
    def classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor, start_from: int = 0) -> Tensor:
        for layer in self.layers[start_from:]:
            x = layer(x)
        return x


class Task2Vec:
    """As much of the frontend as the Fisher concerns; its own is the squared mean gradient."""

    def __init__(self, model: nn.Module, skip_layers: int = 0, max_samples: int | None = None, **options: Any) -> None:
        self.model, self.skip_layers, self.max_samples = model, skip_layers, max_samples
        self.loader_opts = options.get("loader_opts", {})
        self.bernoulli = options.get("bernoulli", False)

    def montecarlo_fisher(self, dataset: TensorDataset, epochs: int = 1) -> None:
        x, y = dataset.tensors
        self.model.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        for p in self.model.parameters():
            p.grad2_acc, p.grad_counter = p.grad**2, 1

    def embed(self, dataset: TensorDataset) -> np.ndarray:
        self.montecarlo_fisher(dataset)
        return self.extract_embedding(self.model)

    def extract_embedding(self, model: nn.Module) -> np.ndarray:
        parts = []
        for module in model.modules():
            if module is not model.classifier and hasattr(getattr(module, "weight", None), "grad2_acc"):
                parts.append(
                    module.weight.grad2_acc.flatten(1).mean(1) if module.weight.dim() > 1 else module.weight.grad2_acc
                )
        return torch.cat(parts).numpy()


@pytest.fixture
def frontend() -> ModuleType:
    module = ModuleType("task2vec")
    module.Task2Vec = type("Task2Vec", (Task2Vec,), {"montecarlo_fisher": Task2Vec.montecarlo_fisher})
    return module


X = torch.randn(11, 3, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 0, 0, 0, 2, 0, 0])


def truth(model: nn.Module, x: Tensor, weights: Tensor, bernoulli: bool = False, start: int = 0) -> dict[str, Tensor]:
    """sum_n w_n E_y (d loss)^2 by autograd, an example at a time, every label of every example."""
    total: dict[str, Tensor] = {}
    named = {
        k: p for k, p in model.named_parameters() if any(p is q for m in model.layers[start:] for q in m.parameters())
    }
    for n in range(len(x)):
        z = model(x[n : n + 1], start_from=start)
        classes = range(z.shape[1])
        if bernoulli:
            p = z.detach().sigmoid()[0]
            losses = [(p[c] * (1 - p[c]), z[0, c]) for c in classes]  # variance of the label times d logit
        else:
            p = z.detach().softmax(1)[0]
            losses = [(p[c], F.cross_entropy(z, torch.tensor([c]))) for c in classes]
        for share, loss in losses:
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            for key, g in zip(named, gradients, strict=True):
                total[key] = total.get(key, 0) + weights[n] * share * g.square()
    return total


def assert_accumulated(model: nn.Module, want: dict[str, Tensor], examples: int) -> None:
    for name, p in model.named_parameters():
        assert p.grad_counter == (examples if name in want else 0)
        assert hasattr(p, "grad2_acc") == (name in want)
        if name in want:
            torch.testing.assert_close(p.grad2_acc, want[name], rtol=1e-9, atol=1e-16)


def evenly(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


BALANCED = (1 / 3 / torch.bincount(Y).double())[Y]  # each class the same, one in all


def test_accelerated_fisher_is_that_of_each_example(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().train()
    accelerate(frontend, estimator="exact")
    task2vec = frontend.Task2Vec(model, loader_opts={"batch_size": 4})
    statistics = model.bn1.running_mean.clone()
    task2vec.montecarlo_fisher(TensorDataset(X, Y))
    assert model.training
    assert model.bn2.training
    assert torch.equal(model.bn1.running_mean, statistics)
    model.eval()
    want = truth(model, X, BALANCED)
    assert_accumulated(model, want, len(X))
    assert task2vec.extract_embedding(model).shape == (4 + 4 + 5 + 5,)
    accelerate(frontend, estimator="exact", balanced=False, batch_scale=True)  # again, with other settings
    task2vec.montecarlo_fisher(TensorDataset(X, Y))
    assert_accumulated(model, {k: v / 4 for k, v in truth(model, X, evenly(11)).items()}, len(X))


def test_skipped_layers_and_fewer_samples(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend, estimator="exact", balanced=False)
    frontend.Task2Vec(model).montecarlo_fisher(TensorDataset(X, Y))
    inputs = model.layers[0](X).detach()
    frontend.Task2Vec(model, skip_layers=1).montecarlo_fisher(TensorDataset(inputs, Y))
    assert_accumulated(model, truth(model, inputs, evenly(11), start=1), 11)
    frontend.Task2Vec(model, max_samples=5).montecarlo_fisher(TensorDataset(X, Y))
    assert model.conv1.weight.grad_counter == 5
    kept = torch.randperm(11, generator=torch.Generator().manual_seed(0))[:5]
    assert_accumulated(model, truth(model, X[kept], evenly(5)), 5)


def test_many_labels_an_image(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend, estimator="exact")
    labels = torch.randint(0, 2, (11, 3)).double()
    frontend.Task2Vec(model, bernoulli=True).montecarlo_fisher(TensorDataset(X, labels))
    assert_accumulated(model, truth(model, X, evenly(11), bernoulli=True), 11)


def test_default_estimator_comes_close(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend)
    frontend.Task2Vec(model).montecarlo_fisher(TensorDataset(X, Y), epochs=2)  # 4 cotangents of 3 labels
    want = truth(model, X, BALANCED)
    got = torch.cat([p.grad2_acc.flatten() for p in model.parameters()])
    every = torch.cat([want[k].flatten() for k, _ in model.named_parameters()])
    assert (got - every).norm() <= 1e-9 * every.norm()


def test_restore(frontend: ModuleType) -> None:
    original = frontend.Task2Vec.montecarlo_fisher
    restore(frontend)
    assert frontend.Task2Vec.montecarlo_fisher is original
    accelerate(frontend)
    accelerate(frontend)
    assert frontend.Task2Vec.montecarlo_fisher is not original
    restore(frontend)
    assert frontend.Task2Vec.montecarlo_fisher is original
    assert {*vars(frontend.Task2Vec)} == {*vars(type("C", (), {})), "montecarlo_fisher"} - {"__dict__", "__weakref__"}
    with pytest.raises(TypeError, match="os has no class Task2Vec with montecarlo_fisher"):
        accelerate(os)


class Public:
    """What the public code pickles, under its own name."""


def write(path: Path, hessian: Any, scale: Any, meta: Any, protocol: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("task2vec")
    module.Embedding = type("Embedding", (Public,), {"__module__": "task2vec", "__qualname__": "Embedding"})
    monkeypatch.setitem(sys.modules, "task2vec", module)
    embedding = module.Embedding()
    vars(embedding).update(hessian=hessian, scale=scale, meta=meta)
    path.write_bytes(pickle.dumps(embedding, protocol=protocol))
    monkeypatch.delitem(sys.modules, "task2vec")
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_old_embeddings(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = np.arange(5, dtype=np.float32)
    meta = {"dataset": "cub", "task_id": np.int64(7), "names": ("a", "b")}
    path = write(tmp_path / "7.p", hessian, np.ones(5), meta, protocol, monkeypatch)
    found = read_embedding(path)
    np.testing.assert_array_equal(found.hessian, hessian)
    assert found.meta == {"dataset": "cub", "task_id": 7, "names": ["a", "b"], "task": "7"}
    (tmp_path / "8.p").write_bytes(export.public_pickle(found))  # written back, and read again
    again = list(read_embeddings(tmp_path))
    assert len(again) == 2
    np.testing.assert_array_equal(again[1].hessian, hessian)
    assert distance.pdist(again, "cosine").max() < 1e-12
    longer = read_embedding(write(tmp_path / "9.p", np.ones(6), np.ones(6), None, protocol, monkeypatch))
    with pytest.raises(FingerprintMismatch):
        distance.pdist([found, longer], "cosine")


def test_the_page_runs(frontend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text()
    (tmp_path / "old").mkdir()
    write(tmp_path / "old" / "a.p", np.ones(5), np.ones(5), None, 4, monkeypatch)
    monkeypatch.setitem(sys.modules, "task2vec", frontend)
    monkeypatch.chdir(tmp_path)
    names = {"probe_network": ProbeNetwork().double(), "dataset": TensorDataset(X, Y)}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[3:5]:
        exec(block, names)
    assert names["embedding"].shape == (18,)
    assert [len(e) for e in names["embeddings"]] == [5]


class Command:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = {
        "command.p": (pickle.dumps(Command()), r"mkdir, which no embedding needs"),
        "inside.p": (pickle.dumps({"hessian": Command()}), r"mkdir, which no embedding needs"),
        "eval.p": (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        "list.p": (pickle.dumps([1, 2]), "no embedding of the public"),
        "noise.p": (b"\x80\x04\xff\xff\x00", "no embedding of the public"),
        "empty.p": (b"", "no embedding of the public"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            read_embedding(tmp_path / name)
        assert name in str(raised.value)
    assert not (tmp_path / "ran").exists()
    nan = write(tmp_path / "nan.p", np.array([np.nan]), np.ones(1), {}, 2, monkeypatch)
    with pytest.raises(ValueError, match=r"nan\.p .*hessian\[0\] is nan"):
        read_embedding(nan)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no file"):
        list(read_embeddings(tmp_path / "none"))
