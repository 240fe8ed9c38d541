"""The replacement of the public Task2Vec code, tested with a stand-in for its module that has the same interface."""

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
from plain_noise import Plain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from t2v_fast import distance
from t2v_fast.adapters import patching
from t2v_fast.adapters import task2vec as replacement
from t2v_fast.adapters.task2vec import accelerate, read_embedding, read_embeddings, restore
from t2v_fast.bank import export
from t2v_fast.embedding import FingerprintMismatch


def add_layers(probe: nn.Module) -> None:
    torch.manual_seed(0)
    probe.conv1, probe.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    probe.conv2, probe.bn2 = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    probe.fc = nn.Linear(5, 3)


class ProbeNetwork(nn.Module):
    """layers, fc, classifier, forward(x, start_from)."""

    def __init__(self) -> None:
        super().__init__()
        add_layers(self)
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
    inside = [q for m in model.layers[start:] if isinstance(m, nn.Module) for q in m.parameters()]
    named = {k: p for k, p in model.named_parameters() if any(p is q for q in inside)}
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
    accelerate(frontend, estimator="exact", granularity="parameter")
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
    # Again, with other settings.
    accelerate(frontend, estimator="exact", balanced=False, batch_scale=True, granularity="parameter")
    task2vec.montecarlo_fisher(TensorDataset(X, Y))
    assert_accumulated(model, {k: v / 4 for k, v in truth(model, X, evenly(11)).items()}, len(X))


def test_each_entry_of_a_filter_has_the_mean_that_the_frontend_reads(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    task2vec = frontend.Task2Vec(model, loader_opts={"batch_size": 4})
    accelerate(frontend, estimator="exact")
    task2vec.montecarlo_fisher(TensorDataset(X, Y))
    read = task2vec.extract_embedding(model)
    for name, value in truth(model, X, BALANCED).items():
        mean = value.flatten(1).mean(1).view(-1, *[1] * (value.dim() - 1)) if value.dim() > 1 else value
        torch.testing.assert_close(model.get_parameter(name).grad2_acc, mean.expand_as(value), rtol=1e-9, atol=1e-16)
    accelerate(frontend, estimator="exact", granularity="parameter")
    task2vec.montecarlo_fisher(TensorDataset(X, Y))
    np.testing.assert_allclose(task2vec.extract_embedding(model), read, rtol=1e-12)


def public_distances(h0: np.ndarray, h1: np.ndarray) -> dict[str, float]:
    """The seven distances of the public code, by their formulas."""
    v0, v1 = 1 / h0, 1 / h1
    forth, back = (0.5 * (a / b - 1 + np.log(b) - np.log(a)) for a, b in ((v0, v1), (v1, v0)))
    middle = 0.5 * (v0 + v1)
    jsd = sum(0.25 * (v / middle - 1 + np.log(middle) - np.log(v)) for v in (v0, v1))
    s0, s1 = h0 / (h0 + h1 + 1e-8), h1 / (h0 + h1 + 1e-8)
    p = np.clip(s0, 1e-300, 1)
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-np.minimum(p, 1 - 1e-16)))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    return {
        "kl": np.maximum(forth, back).sum(),
        "asymmetric_kl": forth.sum(),
        "jsd": jsd.mean(),
        "cosine": cosine(s0, s1),
        "normalized_cosine": cosine(v0, v1),
        "correlation": cosine(v0 - v0.mean(), v1 - v1.mean()),
        "entropy": np.log(2) - entropy.mean(),
    }


def test_filters_that_are_dead_leave_all_distances_finite(frontend: ModuleType) -> None:
    """Dead for both tasks, dead for one of them, and not dead."""
    model = ProbeNetwork().double().eval()
    with torch.no_grad():
        model.bn1.weight[1] = 0  # for every task
        model.bn1.bias[1] = -1
        model.bn2.weight[2] = 0
        model.bn2.bias[2] = -1
        model.conv1.weight[3] = 0  # for images whose first channel is negative everywhere
        model.conv1.weight[3, 0, 1, 1] = 1
        model.conv1.bias[3] = model.bn1.bias[3] = model.bn1.running_mean[3] = 0
        model.bn1.weight[3] = 1
    images = torch.cat([-X[:, :1].abs(), X[:, 1:]], 1)
    tasks = [TensorDataset(images, Y), TensorDataset(X.flip(3) * 2, Y.flip(0))]
    dead, one = [1, 5, 10, 15], [3, 7]  # conv1, bn1, conv2, bn2
    task2vec = frontend.Task2Vec(model)
    accelerate(frontend, estimator="exact", floor=0)
    with pytest.warns(UserWarning, match="the Fisher of [0-9]+ of [0-9]+ filters is zero, and floor=0 leaves it so"):
        zeros = np.stack([task2vec.embed(task) for task in tasks])
    np.testing.assert_array_equal(np.flatnonzero(zeros[0] == 0), sorted(dead + one))
    np.testing.assert_array_equal(np.flatnonzero(zeros[1] == 0), dead)
    accelerate(frontend, estimator="exact")
    first, second = (task2vec.embed(task) for task in tasks)
    np.testing.assert_array_equal(first[dead + one], 1e-12)
    np.testing.assert_array_equal(second[dead], 1e-12)
    public = public_distances(first, second)
    assert np.isfinite(list(public.values())).all()
    assert min(public.values()) > 0
    ours = {name: distance.cdist(zeros[:1], zeros[1:], name)[0, 0] for name in public}
    assert not np.isnan(list(ours.values())).any()
    # The two distances that the public code can compute with zeros are those with zeros: 1e-12 over 1e-8 is p = 1e-4,
    # whose entropy is 1e-3 in place of zero.
    for name in ("cosine", "entropy"):
        of_zeros = distance.cdist(zeros[:1], zeros[1:], name, epsilon=1e-8)[0, 0]
        assert public[name] == pytest.approx(of_zeros, rel=1e-3 / np.log(2)), name
    # A filter that is dead for both adds nothing, and one that is dead for one task is the limit of a small value.
    alive = np.setdiff1d(np.arange(len(first)), dead)
    few = public_distances(first[alive], second[alive])
    assert public["kl"] == pytest.approx(few["kl"])
    assert public["kl"] > 1e3
    assert ours["kl"] == np.inf
    for name in ("normalized_cosine", "correlation"):
        assert few[name] == pytest.approx(ours[name], rel=1e-3), name
    with torch.no_grad():
        model.fc.weight *= 1e-6  # values below the floor: dead filters stay the least of all
    accelerate(frontend, estimator="exact")
    small = task2vec.embed(tasks[0])
    assert 0 < small[1] < 1e-12
    assert small[1] == pytest.approx(small.min(), rel=1e-12)


def test_small_values_do_not_overflow_in_distances(frontend: ModuleType) -> None:
    """In float32, the public code's correlation of such values is 1 for every pair of tasks."""
    model = ProbeNetwork().eval()
    with torch.no_grad():
        model.fc.weight *= 1e-5
    accelerate(frontend, estimator="exact")
    tasks = [TensorDataset(X.float(), Y), TensorDataset(X.float().flip(3) * 2, Y.flip(0))]
    first, second = (frontend.Task2Vec(model).embed(task) for task in tasks)
    assert first.dtype == np.float64
    found = public_distances(first, second)
    for name in ("normalized_cosine", "correlation"):
        assert found[name] == pytest.approx(distance.cdist(first[None], second[None], name)[0, 0], rel=1e-6), name
        assert found[name] < 0.999


def test_frozen_parameters_have_no_entry(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    model.conv1.requires_grad_(False)
    accelerate(frontend, estimator="exact", balanced=False, granularity="parameter")
    frontend.Task2Vec(model).montecarlo_fisher(TensorDataset(X, Y))
    model.requires_grad_(True)
    want = truth(model, X, evenly(11))
    assert_accumulated(model, {k: v for k, v in want.items() if not k.startswith("conv1.")}, 11)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        frontend.Task2Vec(model).montecarlo_fisher(TensorDataset(X, Y))


def test_no_more_images_than_the_frontend_draws(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend, estimator="exact", granularity="parameter")
    x, y = torch.randn(60, 3, 8, 7, dtype=torch.float64), torch.tensor([0] * 50 + [1] * 5 + [4] * 5)
    task2vec = frontend.Task2Vec(model, loader_opts={"num_samples": 12})
    task2vec.montecarlo_fisher(TensorDataset(x, y))
    assert model.conv1.weight.grad_counter == 12
    drawn = patching._balanced(y, 12)
    counts = torch.bincount(y[drawn])
    assert counts[0] < 8  # rare classes are as likely as the others
    weights = (1 / 3 / counts.double())[y[drawn]]
    assert_accumulated(model, truth(model, x[drawn], weights), 12)
    task2vec.montecarlo_fisher(TensorDataset(x, y), epochs=2)
    assert model.conv1.weight.grad_counter == 24
    own = OwnProbe().double()  # the replacement of the class visits every image, whatever the number of draws
    replacement.Task2Vec(own, loader_opts={"num_samples": 12}).montecarlo_fisher(TensorDataset(x, y.clamp(max=2)))
    assert own.conv1.weight.grad_counter == 60


def test_nothing_stays_slow_in_silence(frontend: ModuleType) -> None:
    frontend.Task2Vec.variational_fisher = lambda self, dataset, epochs=1, beta=1e-7: "variances"
    accelerate(frontend)
    with pytest.warns(UserWarning, match="accelerate leaves variational_fisher as it is"):
        assert frontend.Task2Vec(ProbeNetwork()).variational_fisher(None) == "variances"
    restore(frontend)
    frontend.Task2Vec.montecarlo_fisher_of_graphs = lambda self, dataset: None
    before = dict(vars(frontend.Task2Vec))
    with pytest.raises(TypeError, match="has the method montecarlo_fisher_of_graphs, which accelerate does not know"):
        accelerate(frontend)
    assert dict(vars(frontend.Task2Vec)) == before
    for options, message in (({"floor": -1}, "floor is -1"), ({"granularity": "tensor"}, "granularity is 'tensor'")):
        with pytest.raises(ValueError, match=message):
            accelerate(frontend, **options)


def test_skipped_layers_and_fewer_samples(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend, estimator="exact", balanced=False, granularity="parameter")
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
    accelerate(frontend, estimator="exact", granularity="parameter")
    labels = torch.randint(0, 2, (11, 3)).double()
    frontend.Task2Vec(model, bernoulli=True).montecarlo_fisher(TensorDataset(X, labels))
    assert_accumulated(model, truth(model, X, evenly(11), bernoulli=True), 11)


def test_default_estimator_comes_close(frontend: ModuleType) -> None:
    model = ProbeNetwork().double().eval()
    accelerate(frontend, granularity="parameter")
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
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (tmp_path / "old").mkdir()
    write(tmp_path / "old" / "a.p", np.ones(5), np.ones(5), None, 4, monkeypatch)
    monkeypatch.setitem(sys.modules, "task2vec", frontend)
    monkeypatch.chdir(tmp_path)
    names = {"probe_network": ProbeNetwork().double(), "dataset": TensorDataset(X, Y)}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for word in ("accelerate(", "read_embeddings("):
        (block,) = [b for b in blocks if word in b]
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


# The replacements of the module's classes.

IMAGES = torch.randn(40, 3, 8, 7, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 0, 1, 2, 0] * 8)
LOADER = {"batch_size": 8, "num_samples": 50}


class OwnProbe(replacement.ProbeNetwork):
    """A frontend's own network, layers and functions mixed."""

    def __init__(self) -> None:
        super().__init__()
        add_layers(self)
        self.layers = [
            nn.Sequential(self.conv1, self.bn1),
            nn.Sequential(nn.ReLU(), self.conv2),
            self.bn2,
            F.relu,
            lambda x: x.mean((2, 3)),
            self.fc,
        ]

    @property
    def classifier(self) -> nn.Linear:
        return self.fc


def drawn(x: Tensor, y: Tensor) -> torch.utils.data.DataLoader:
    """Balanced batches by torch's own generator: what the contract's loader is."""
    counts = torch.bincount(y).double()
    chances = 1.0 / counts[y] / len(counts)
    sampler = torch.utils.data.WeightedRandomSampler(chances / chances.sum(), LOADER["num_samples"])
    return torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=8, sampler=sampler, drop_last=True)


def plain_head(model: nn.Module, skip: int, batches: int | None) -> tuple[Tensor, Tensor]:
    """Features in training mode, and Adam on balanced batches of them: the contract's first half."""
    model.train()
    inputs, features, labels = [], [], []
    size = 8 if skip else 64  # only with skipped layers, the contract's features heed the batch size
    for k, (x, y) in enumerate(torch.utils.data.DataLoader(TensorDataset(IMAGES, LABELS), batch_size=size)):
        if batches is not None and k == batches:
            break
        with torch.no_grad():
            for layer in model.layers[:skip]:
                x = layer(x)
            inputs.append(x)
            for layer in model.layers[skip:-1]:
                x = layer(x)
        features.append(x)
        labels.append(y)
    features, labels = torch.cat(features), torch.cat(labels)
    adam = torch.optim.Adam(model.fc.parameters(), lr=4e-4, weight_decay=1e-4)
    for _ in range(10):
        for x, y in drawn(features, labels):
            adam.zero_grad()
            F.cross_entropy(model.fc(x), y).backward()
            adam.step()
    return (torch.cat(inputs), labels) if skip else (IMAGES, LABELS)


def plain_embedding(model: nn.Module, skip: int, x: Tensor, y: Tensor, bernoulli: bool, epochs: int) -> np.ndarray:
    """Squares of the mean gradient of each batch, on average: the contract's second half."""
    weights = [m.weight for m in (model.conv1, model.bn1, model.conv2, model.bn2)]
    if skip:
        weights = weights[2:]
    sums, count = [torch.zeros_like(w) for w in weights], 0
    for _ in range(epochs):
        for inputs, _ in tqdm(drawn(x, y)):  # which draws one more seed, as there
            z = model(inputs, start_from=skip)
            if bernoulli:
                loss = F.binary_cross_entropy_with_logits(z, torch.bernoulli(torch.sigmoid(z)).detach())
            else:
                loss = F.cross_entropy(z, torch.multinomial(F.softmax(z, dim=-1), 1).view(-1))
            for total, g in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += g**2
            count += 1
    return torch.cat([(s / count).reshape(len(s), -1).mean(1) for s in sums]).numpy()


@pytest.mark.parametrize(
    ("skip", "max_samples", "bernoulli"), [(0, None, False), (1, None, False), (1, 33, False), (0, None, True)]
)
def test_compat_has_the_numbers_of_the_plain_loop(skip: int, max_samples: int | None, bernoulli: bool) -> None:
    model, other = OwnProbe(), OwnProbe()
    torch.manual_seed(7)
    found = replacement.Task2Vec(
        model,
        skip_layers=skip,
        max_samples=max_samples,
        method_opts={"epochs": 2},
        loader_opts=LOADER,
        bernoulli=bernoulli,
        mode="compat",
    ).embed(TensorDataset(IMAGES, LABELS))
    torch.manual_seed(7)
    x, y = plain_head(other, skip, 33 // 8 - 1 if max_samples else None)
    want = plain_embedding(other, skip, x, y, bernoulli, 2)
    torch.testing.assert_close(model.fc.weight, other.fc.weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.hessian, want, rtol=1e-5, atol=1e-7 * want.max())
    np.testing.assert_array_equal(found.scale, 1)
    assert found.meta is None
    torch.testing.assert_close(model.bn1.running_mean, other.bn1.running_mean)


def test_compat_variational_has_the_numbers_of_plain_noise() -> None:
    model, other = OwnProbe(), OwnProbe()
    options = {"method": "variational", "method_opts": {"epochs": 2, "beta": 1e-4}, "loader_opts": LOADER}
    torch.manual_seed(7)
    found = replacement.Task2Vec(model, **options, mode="compat").embed(TensorDataset(IMAGES, LABELS))
    torch.manual_seed(7)
    plain_head(other, 0, None)
    plain = Plain(other, ["conv1.weight", "conv2.weight"])
    variances = [*plain.logvar, *plain.loglambda2]
    adam = torch.optim.Adam([{"params": variances, "lr": 1e-2}, {"params": other.fc.parameters(), "lr": 5e-4}])
    for _ in range(2):
        for x, y in tqdm(drawn(IMAGES, LABELS)):
            adam.zero_grad()
            (F.cross_entropy(other(x), y) + 1e-4 * plain.divergence()).backward()
            adam.step()
    np.testing.assert_allclose(
        found.hessian, torch.cat([(-v).exp().flatten() for v in plain.logvar]).detach().numpy(), rtol=1e-4
    )
    np.testing.assert_allclose(found.scale[[0, -1]], [(-p).exp().item() for p in plain.loglambda2], rtol=1e-4)


def test_exact_is_the_fisher_of_the_fitted_network() -> None:
    model = OwnProbe().double()
    images = IMAGES.double()
    found = replacement.Task2Vec(model, loader_opts={"batch_size": 16}, estimator="exact").embed(
        TensorDataset(images, LABELS)
    )
    model.eval()
    balanced = (1 / 3 / torch.bincount(LABELS).double())[LABELS]
    want = truth(model, images, balanced)
    rows = [want[f"{name}.weight"] for name in ("conv1", "bn1", "conv2", "bn2")]
    want_hessian = torch.cat([r.reshape(len(r), -1).mean(1) for r in rows])
    np.testing.assert_allclose(found.hessian, want_hessian, rtol=1e-6)
    accuracy = (model(images).argmax(1) == LABELS).double().mean()
    again = replacement.Task2Vec(model, estimator="exact").embed(TensorDataset(images, LABELS))
    np.testing.assert_allclose(again.hessian, found.hessian, rtol=1e-6)  # the head is fitted, whatever it was before
    task2vec = replacement.Task2Vec(model, classifier_opts={"epochs": 1}, loader_opts=LOADER, max_samples=20)
    task2vec.embed(TensorDataset(images, LABELS))
    assert (model(images).argmax(1) == LABELS).double().mean() <= accuracy  # barely trained, as was asked for
    skipped = replacement.Task2Vec(model, skip_layers=1, estimator="exact").embed(TensorDataset(images, LABELS))
    np.testing.assert_allclose(skipped.hessian, found.hessian[8:], rtol=1e-6)


def test_methods_do_not_mix() -> None:
    """A Fisher after variances, on the same network, is read as a Fisher."""
    model, data = OwnProbe(), TensorDataset(IMAGES, LABELS)
    fisher = replacement.Task2Vec(model).embed(data)
    robust = replacement.Task2Vec(model, method="variational", loader_opts=LOADER).embed(data)
    assert len(fisher.hessian) == 18
    assert len(robust.hessian) == 9
    assert len(set(robust.scale.tolist())) == 2
    np.testing.assert_allclose(replacement.Task2Vec(model).embed(data).hessian, fisher.hessian, rtol=1e-4)


def test_embeddings_travel(tmp_path: Path) -> None:
    model, data = OwnProbe(), TensorDataset(IMAGES, LABELS)
    found = replacement.Task2Vec(model).embed(data)
    found.meta = {"task_name": "own"}
    (tmp_path / "own.p").write_bytes(pickle.dumps(found))
    read = read_embedding(tmp_path / "own.p")
    np.testing.assert_array_equal(read.hessian, found.hessian)
    assert read.meta["task"] == "own"
    assert distance.pdist([found.convert(), read]).max() < 1e-12


@pytest.mark.slow_unless(name=("resnet18",))
@pytest.mark.parametrize(("name", "entries"), [("resnet18", 9600), ("resnet34", 17024)])
def test_embedding_sizes_of_the_public_probes(name: str, entries: int) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is for the main torch")
    model = replacement.ProbeNetwork.of(getattr(models, name)(), num_classes=2)
    assert model.classifier is model.fc is model.layers[-1]
    assert model.fc.out_features == 2
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    assert len(replacement.Task2Vec(model).embed(data).hessian) == entries
    loader = {"batch_size": 8, "num_samples": 8}
    robust = replacement.Task2Vec(model, method="variational", loader_opts=loader).embed(data)
    assert len(robust.hessian) == entries // 2


def test_replacements_refuse() -> None:
    model, data = OwnProbe(), TensorDataset(IMAGES, LABELS)
    with pytest.raises(ValueError, match="mode is 'fast', expected one of exact, compat"):
        replacement.Task2Vec(model, mode="fast")
    with pytest.raises(ValueError, match="method is 'exact'"):
        replacement.Task2Vec(model, method="exact")
    with pytest.raises(ValueError, match="skip_layers is 6, expected 0 to 5"):
        replacement.Task2Vec(model, skip_layers=6)
    with pytest.raises(ValueError, match="skip_layers is 3, but that layer is a function"):
        replacement.Task2Vec(model, skip_layers=3)
    with pytest.raises(ValueError, match="are for mode='exact'"):
        replacement.Task2Vec(model, mode="compat", samples=3)
    with pytest.raises(ValueError, match="max_samples is 10, expected at least two batches of 64"):
        replacement.Task2Vec(model, mode="compat", max_samples=10, loader_opts=LOADER).embed(
            TensorDataset(IMAGES, LABELS)
        )
    with pytest.raises(ValueError, match="7 draws fill no batch of 8"):
        replacement.Task2Vec(model, mode="compat", loader_opts=LOADER | {"num_samples": 7}).embed(data)
    with pytest.raises(ValueError, match="the data set has no example"):
        replacement.Task2Vec(model).embed(TensorDataset(IMAGES[:0], LABELS[:0]))
    with pytest.raises(ValueError, match=r"labels are torch\.float32, expected whole numbers"):
        replacement.Task2Vec(model).embed(TensorDataset(IMAGES, LABELS.float()))
    with pytest.raises(ValueError, match="no Fisher was computed"):
        replacement.Task2Vec(model).extract_embedding(OwnProbe())
    with pytest.raises(ValueError, match="optimizer is 'lbfgs'"):
        replacement.Task2Vec(model, classifier_opts={"optimizer": "lbfgs"}).embed(data)
    with pytest.raises(ValueError, match="does not end in a linear layer but in ReLU"):
        replacement.ProbeNetwork.of(nn.Sequential(nn.Flatten(), nn.ReLU()))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 64), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(2 * self.conv(x).flatten(1))

    with pytest.raises(ValueError, match="Twice is not its children one after the other"):
        replacement.ProbeNetwork.of(Twice())


def test_the_replacement_on_the_page_runs() -> None:
    pytest.importorskip("torchvision", reason="torchvision is for the main torch")
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ProbeNetwork" in b]
    names: dict[str, Any] = {"dataset": TensorDataset(torch.randn(70, 3, 32, 32), torch.arange(70) % 3)}
    exec(block, names)
    assert len(names["embedding"].hessian) == len(names["old"].hessian) == 9600
    assert len(names["robust"].hessian) == 4800
    assert isinstance(names["old"], names["Embedding"])
