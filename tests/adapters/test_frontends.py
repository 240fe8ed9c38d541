"""Adapters against plain implementations of the same quantities."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from oracle import per_example_squares
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from t2v_fast.adapters.continual import compute_importances
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.adapters.merging import apply_task_vectors, fisher_merge, task_vector


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, outputs)).double()


def plain(model: nn.Module, x: Tensor, losses) -> dict[str, Tensor]:
    """Mean over examples of sum_k weight_k (d loss_k)^2 by batch-size-1 autograd; losses(z) yields (weight, loss)."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        z = model(x[n : n + 1])
        for weight, loss in losses(z, n):
            for name, g in zip(total, torch.autograd.grad(loss, model.parameters(), retain_graph=True), strict=True):
                total[name] += weight * g.square() / len(x)
    return total


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-14)


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
TARGETS = (torch.arange(28).reshape(7, 4) % 3 == 0).double()


def test_fim_diag_of_every_choice() -> None:
    model = network().train()
    loader = DataLoader(TensorDataset(X, Y), 3)

    def everything(z: Tensor, n: int):
        p = z.detach().softmax(1)[0]
        return [(p[c], F.cross_entropy(z, torch.tensor([c]))) for c in range(4)]

    assert_same(fim_diag(model, loader), plain(model, X, everything))
    of_true = plain(model, X, lambda z, n: [(1, F.cross_entropy(z, Y[n : n + 1]))])
    assert_same(fim_diag(model, loader, labels="true"), of_true)
    likeliest = plain(model, X, lambda z, n: [(1, F.cross_entropy(z, z.argmax(1)))])
    assert_same(fim_diag(model, loader, labels="pred"), likeliest)
    unlabelled = TensorDataset(X, Y.index_fill(0, torch.tensor([1, 4]), -100))  # the data's labels play no part
    assert_same(fim_diag(model, DataLoader(unlabelled, 3), labels="pred"), likeliest)
    many = fim_diag(model, [(X, Y)] * 400, labels="sample", samples=4)
    exact = fim_diag(model, loader)
    for name, value in exact.items():
        assert float((many[name] - value).norm()) < 0.1 * float(value.norm()), name
    assert all(m.training for m in model.modules())

    def yes_or_no(z: Tensor, n: int):
        return [(1, F.binary_cross_entropy_with_logits(z, TARGETS[n : n + 1], reduction="sum"))]

    targets = [(X, TARGETS)]
    assert_same(fim_diag(model, targets, "multi-label", "true"), plain(model, X, yes_or_no))
    squared = plain(model, X, lambda z, n: [(1, (z - TARGETS[n : n + 1]).square().sum() / 2)])
    assert_same(fim_diag(model, targets, "regression", "true"), squared)
    model[0].requires_grad_(False)
    assert "0.weight" not in fim_diag(model, loader)
    for options, message in (({"labels": "best"}, "labels is 'best'"), ({"task_type": "ranking"}, "task_type is")):
        with pytest.raises(ValueError, match=message):
            fim_diag(model, loader, **options)


def test_importances_are_those_of_batch_size_one() -> None:
    """Avalanche squares the gradient of the criterion's mean over a batch: at batch size 1 it computes this."""
    model, data = network(), TensorDataset(X, Y, torch.zeros(7))
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for x, y, _ in DataLoader(data, 1):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for name, g in zip(want, gradients, strict=True):
            want[name] += g.square() / len(data)
    for batch_size in (1, 3, 64):
        assert_same(compute_importances(model, nn.CrossEntropyLoss(), None, data, "cpu", batch_size), want)


def test_merging_by_hand() -> None:
    models = [{"w": torch.tensor(w), "n": torch.tensor(3)} for w in ([1.0, 2.0], [3.0, 6.0])]
    fishers = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([0.0, 2.0])}]  # of mean 2 and 1
    merged = fisher_merge(models, fishers, [1, 2], floor=0)
    assert merged["w"].tolist() == [1.0, pytest.approx((0.5 * 2 + 2 * 2 * 6) / 4.5)]
    assert merged["n"] == 3
    vector = task_vector(models[0], models[1])
    assert vector["w"].tolist() == [2, 4]
    assert apply_task_vectors(models[0], [vector, vector], [0.5, -1])["w"].tolist() == [0, 0]
    for call, message in (
        (lambda: fisher_merge(models, fishers[:1]), "2 models, 1 Fishers"),
        (lambda: fisher_merge(models, [{"w": torch.ones(1)}] * 2), r"'w' of model 0 is \[1\], expected"),
        (lambda: fisher_merge(models, [{"w": torch.zeros(2)}] * 2), "model 0 is 0.0 in all"),
        (lambda: fisher_merge(models, fishers, [0, 0]), "weights are"),
        (lambda: task_vector(models[0], {"v": torch.ones(2)}), "having or lacking"),
        (lambda: apply_task_vectors(models[0], [vector], [1, 2]), "1 task vectors but 2 coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_merging_on_real_digits() -> None:
    """Two models, each fine-tuned on half of the digits: merged they know all ten better than either, and by Fishers
    not worse than by their mean; a negated task vector forgets its half and keeps more of the other."""
    from bench.studies.merging import PARTS, accuracies

    found = accuracies()
    start, first, second, mean, merged, forgot = (list(found[name].values()) for name in found)
    assert merged[0] > max(first[0], second[0]) + 0.1
    assert merged[0] > mean[0] - 0.02
    assert mean[0] > start[0]
    assert forgot[1] - start[1] < forgot[2] - start[2]
    assert [list(parts) for parts in found.values()] == [list(PARTS)] * 6


# The tests of the other frontends run the other sections.
SECTIONS = (
    "A Fisher as a dictionary",
    "Continual learning",
    "Merging fine-tuned models",
    "mml-similarity",
    "From BackPACK and Opacus",
)


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    model = network().float()
    names = {"model": model, "loader": DataLoader(TensorDataset(X.float(), Y), 3), "torch": torch}
    names["images"], names["labels"] = X.float(), Y
    names |= {"dataset": TensorDataset(X.float(), Y), "first": copy.deepcopy(model), "second": copy.deepcopy(model)}
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    for title in SECTIONS:
        blocks = re.findall(r"```python\n(.*?)```", sections[title], re.DOTALL)
        assert blocks, title
        for block in blocks:
            exec(block, names)
    logits = model(X.float()).detach()
    squares = per_example_squares(model, X.float(), (logits.softmax(1) - F.one_hot(Y, logits.shape[1]))[None])
    for name, value in squares.items():
        torch.testing.assert_close(names["sum_grad_squared"][name], value.sum(0).double(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            names["batch_l2"][name], value[:3].flatten(1).sum(1), check_dtype=False, rtol=1e-4, atol=1e-6
        )
    assert names["importances"].keys() == names["merged"].keys() == dict(model.named_parameters()).keys()
