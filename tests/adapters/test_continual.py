"""Importances for elastic weight consolidation against the frontends' loops, written out over single examples."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from t2v_fast import SelfCheckError
from t2v_fast.adapters.continual import (
    accelerate_avalanche,
    accelerate_mammoth,
    compute_importances,
    online_ewc_fisher,
)
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.estimation.self_check import SelfCheck

X = torch.randn(7, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
DATA = TensorDataset(X, Y, torch.zeros(7))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)).double().eval()


def one_by_one(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], weighted: bool = False) -> dict[str, Tensor]:
    """Sum of squares over batches of one example, in the model's mode; the buffers are restored."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(X)):
        value = loss(model(X[n : n + 1]), Y[n : n + 1])
        scale = (-value.detach()).exp() if weighted else 1.0
        for name, g in zip(total, torch.autograd.grad(value, list(named.values())), strict=True):
            total[name] += scale * g.square()
    for name, b in model.named_buffers():
        b.copy_(before[name])
    return total


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), reduction="sum"),
        lambda z, y: (z - F.one_hot(y, 4)).abs().pow(3).mean(),
    ],
)
def test_importances_are_those_of_the_criterion(criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = network()
    want = one_by_one(model, criterion)
    model.train()
    for batch_size in (1, 3, 64):
        got = compute_importances(model, criterion, None, DATA, "cpu", batch_size)
        assert list(got) == list(want)
        for name, value in want.items():
            close(got[name], value / len(X))
    assert all(m.training for m in model.modules())


def test_frozen_parameters_have_zeros_and_the_scale_is_that_of_batches() -> None:
    model = network()
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    every = compute_importances(model, nn.CrossEntropyLoss(), None, DATA, "cpu", 3)
    assert list(every) == [name for name, _ in model.named_parameters()]
    assert [name for name, value in every.items() if not value.any()] == ["unused", "0.weight", "0.bias"]
    assert not model[0].weight.requires_grad
    scaled = compute_importances(model, nn.CrossEntropyLoss(), None, DATA, "cpu", 3, batch_scale=True)
    for name, value in every.items():  # batches of 3, 3 and 1
        close(scaled[name], value * (1 / 3 + 1 / 3 + 1) / 3)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 3.0]).double()])
def test_labels_that_the_criterion_ignores_do_not_count(weight: Tensor | None) -> None:
    model, criterion = network(), nn.CrossEntropyLoss(weight, ignore_index=-1)
    some = torch.tensor([0, 2, 3, 6])
    labels = torch.full_like(Y, -1)
    labels[some] = Y[some]
    data = TensorDataset(X, labels, DATA.tensors[-1])
    kept = TensorDataset(X[some], Y[some], DATA.tensors[-1][some])
    want = compute_importances(model, criterion, None, kept, "cpu", 3)
    for batch_size in (1, 3, 64):
        for name, value in compute_importances(model, criterion, None, data, "cpu", batch_size).items():
            close(value, want[name])
    scaled = compute_importances(model, criterion, None, data, "cpu", 3, batch_scale=True)
    for name, value in want.items():  # batches with 2, 1 and 1 labels that count
        close(scaled[name], value * (1 / 2 + 1 + 1) / 3)
    # A sum has a loss for such a label: zero.
    summed = nn.CrossEntropyLoss(weight, ignore_index=-1, reduction="sum")
    whole = compute_importances(model, summed, None, data, "cpu", 3)
    alone = compute_importances(model, summed, None, kept, "cpu", 3)
    for name, value in alone.items():
        close(whole[name], value * len(some) / len(X))
    none = TensorDataset(X, torch.full_like(Y, -1), DATA.tensors[-1])
    with pytest.raises(ValueError, match=r"every label is the criterion's ignore_index \(-1\)"):
        compute_importances(model, criterion, None, none, "cpu", 3)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(torch.tensor([0.0, 2.0, 0.5, 3.0]).double()),
        lambda outputs, labels: F.cross_entropy(outputs, labels, ignore_index=0),
    ],
)
def test_a_mean_over_no_label_is_refused(criterion: Any) -> None:
    """Its gradient is NaN, or zero, which would count as that of an example."""
    with pytest.raises(ValueError, match="gives the loss nan for the label 0"):
        compute_importances(network(), criterion, None, TensorDataset(X, Y * 0, DATA.tensors[-1]), "cpu", 3)
    some = Y != 0
    kept = TensorDataset(X[some], Y[some], DATA.tensors[-1][some])
    for value in compute_importances(network(), criterion, None, kept, "cpu", 3).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("check", [True, False])
def test_squares_that_overflow_are_refused(check: bool) -> None:
    """The squares of gradients of 1e20 are infinite in float32. The loss and its gradients are finite."""
    model = nn.Linear(2, 2).eval()
    data = TensorDataset(torch.tensor([[1.0, 2.0], [1e20, 1.0], [2.0, 1.0]]), torch.tensor([0, 1, 0]))
    with torch.no_grad():
        model.weight.zero_()
    error = SelfCheckError if check else ValueError
    with pytest.raises(error, match=r"'weight'.* not finite"):
        compute_importances(model, nn.CrossEntropyLoss(), None, data, "cpu", 3, self_check=check)


@pytest.mark.parametrize("labels", ["true", "all", "pred"])
def test_squares_that_half_precision_cannot_hold_are_refused(labels: str) -> None:
    """They are summed in float32, and the result has the type of the parameters."""
    model = nn.Linear(2, 2).eval().half()
    with torch.no_grad():
        model.weight.zero_()
    data = TensorDataset(torch.tensor([[1500.0, 1.0], [1500.0, 2.0]]).half(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="the Fisher of 'weight' is not finite"):
        compute_importances(model, nn.CrossEntropyLoss(), None, data, "cpu", 2, labels=labels)


def test_an_example_counts_if_one_of_its_positions_does() -> None:
    class Positions(nn.Module):
        """Two positions with logits of four classes: [N, 4, 2]."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor) -> Tensor:
            z = self.network(x)
            return torch.stack([z, 2 * z], 2)

    labels = torch.stack([Y, Y], 1)
    labels[0], labels[1, 0] = -100, -100
    model, criterion = Positions(), nn.CrossEntropyLoss()
    tasks = DATA.tensors[-1]
    want = compute_importances(model, criterion, None, TensorDataset(X[1:], labels[1:], tasks[1:]), "cpu", 3)
    for name, value in compute_importances(model, criterion, None, TensorDataset(X, labels, tasks), "cpu", 3).items():
        close(value, want[name])


class Numbered(Dataset):
    """Examples whose labels are their numbers modulo 3."""

    def __init__(self, count: int, entries: int) -> None:
        self.x = torch.randn(count, entries, generator=torch.Generator().manual_seed(2)).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> tuple[Tensor, int, int]:
        return self.x[n], n % 3, 0


class InTurn(IterableDataset):
    """The examples of a data set, without their number."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from (self.data[n] for n in range(start, len(self.data), step))


def sizes_of_passes(model: nn.Module, sizes: list[int]) -> nn.Module:
    """Note the number of examples of each forward pass of a model."""
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return model


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_turn", [False, True])
def test_batches_are_joined_in_the_memory_of_the_gradients(in_turn: bool, workers: int) -> None:
    torch.manual_seed(0)
    sizes: list[int] = []
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    data = Numbered(50, 20)
    sizes_of_passes(model, sizes)
    got = compute_importances(
        model,
        nn.CrossEntropyLoss(),
        None,
        InTurn(data) if in_turn else data,
        "cpu",
        4,
        workers,
        batch_scale=True,
        self_check=False,
    )
    parameters, example = 20 * 30 + 30 + 30 * 3 + 3, 20 + 2 * 30 + 3  # numbers
    assert sizes[0] == 4 < max(sizes) <= parameters / example + 4
    assert sum(sizes) == 50
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(50):
        loss = F.cross_entropy(model(data.x[n : n + 1]), torch.tensor([n % 3]))
        for name, g in zip(want, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            want[name] += g.square() / 50
    # The plugin has 12 batches of 4 and one of 2. If each of two workers yields 25 examples, 12 of 4 and two of one.
    scale = (12 / 4 + 1 + 1) / 14 if in_turn and workers else (12 / 4 + 1 / 2) / 13
    for name, value in want.items():
        close(got[name], value * scale)


def test_batches_stay_as_they_are_where_activations_take_more_memory() -> None:
    sizes: list[int] = []
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3))
    model = sizes_of_passes(model.double(), sizes)
    compute_importances(model, nn.CrossEntropyLoss(), None, Numbered(9, 20), "cpu", 4, self_check=False)
    assert sizes == [4, 4, 1]


class Padded(Dataset):
    """Sequences of several lengths, which are padded to the longest of a batch."""

    lengths = (3, 3, 3, 5, 5, 2, 7, 7, 7, 7, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, n: int) -> tuple[Tensor, int, int]:
        x = torch.randn(self.lengths[n], 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        return x, n % 4, 0

    @staticmethod
    def collate_fn(examples: list) -> tuple[Tensor, Tensor, Tensor]:
        x, labels, tasks = zip(*examples, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.tensor(labels), torch.tensor(tasks)


class MeanOfTokens(nn.Module):
    """A network without a mask: padding changes its output. It has memory of gradients to spare."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(3, 4), nn.Linear(200, 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().mean(1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_examples_are_padded_as_in_the_plugins_batches(batch_size: int, workers: int) -> None:
    torch.manual_seed(0)
    model, data, sizes = MeanOfTokens().double(), Padded(), []
    want = {name: torch.zeros_like(p) for name, p in model.linear.named_parameters()}
    for x, labels, _ in DataLoader(data, batch_size, collate_fn=data.collate_fn):
        for n in range(len(x)):
            loss = F.cross_entropy(model(x[n : n + 1]), labels[n : n + 1])
            for name, g in zip(want, torch.autograd.grad(loss, list(model.linear.parameters())), strict=True):
                want[name] += g.square() / len(data)
    sizes_of_passes(model, sizes)
    got = compute_importances(model, nn.CrossEntropyLoss(), None, data, "cpu", batch_size, workers, self_check=False)
    for name, value in want.items():
        close(got[f"linear.{name}"], value)
    assert sizes == {1: [1, 2, 2, 1, 4, 1], 2: [2, 4, 4, 1], 5: [5, 5, 1]}[batch_size]


@pytest.mark.parametrize("of_classes", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_positions_is_that_of_an_example_alone(reduction: str, smoothing: float, of_classes: bool) -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(3, 4, 3, padding=1).double()
    x, y = torch.randn(6, 3, 5).double(), torch.randint(0, 4, (6, 5))
    y[0, :2] = y[3, 1:] = -100  # do not count
    if of_classes:
        y = torch.rand(6, 4, 5).double().softmax(1)
    criterion = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    got = compute_importances(model, criterion, None, TensorDataset(x, y, torch.zeros(6)), "cpu", 4)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(6):
        loss = criterion(model(x[n : n + 1]), y[n : n + 1])
        for name, g in zip(want, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            want[name] += g.square() / 6
    for name, value in want.items():
        close(got[name], value)


def test_labels_of_the_model_are_for_one_row_of_logits_an_example() -> None:
    model = nn.Conv1d(3, 4, 3, padding=1).double()
    data = TensorDataset(torch.randn(6, 3, 4).double(), torch.randint(0, 4, (6, 4)), torch.zeros(6))
    for labels in ("all", "sample", "pred"):
        with pytest.raises(ValueError, match=r"outputs \[\d, 4, 4\], expected \[N, C\]"):
            compute_importances(model, nn.CrossEntropyLoss(), None, data, "cpu", 2, labels=labels)


def test_the_data_sets_own_batches() -> None:
    class Nested(TensorDataset):
        def __getitem__(self, k: int) -> dict[str, Tensor]:
            x, y, _ = super().__getitem__(k)
            return {"x": x, "y": y}

        @staticmethod
        def collate_fn(items: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
            batch = default_collate(items)
            return batch["x"], batch["y"], torch.zeros(len(items))

    want = compute_importances(network(), nn.CrossEntropyLoss(), None, DATA, "cpu", 3)
    got = compute_importances(network(), nn.CrossEntropyLoss(), None, Nested(*DATA.tensors), "cpu", 3)
    for name, value in want.items():
        close(got[name], value)


def test_labels_of_the_model_need_a_likelihood() -> None:
    model = network()
    for labels in ("all", "sample", "pred"):
        found = compute_importances(model, nn.CrossEntropyLoss(), None, DATA, "cpu", 3, labels=labels)
        want = fim_diag(model, DataLoader(DATA, 3), labels=labels)
        assert list(found) == list(want) == [name for name, _ in model.named_parameters()]
        for name, value in want.items():
            close(found[name], value)
    for criterion in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(torch.ones(4)), nn.MSELoss()):
        with pytest.raises(ValueError, match="criterion is"):
            compute_importances(network(), criterion, None, DATA, "cpu", 4, labels="all")
    with pytest.raises(ValueError, match="expected one number"):
        compute_importances(network(), lambda z, y: z[0], None, DATA, "cpu", 4)


def test_accelerating_a_plugin() -> None:
    class Plugin:
        def compute_importances(self) -> None:
            raise AssertionError("replaced")

    plugin = accelerate_avalanche(Plugin())
    got = plugin.compute_importances(network(), nn.CrossEntropyLoss(), None, DATA, "cpu", 64, num_workers=0)
    want = compute_importances(network(), nn.CrossEntropyLoss(), None, DATA, "cpu", 64)
    for name, value in want.items():
        close(got[name], value / len(X))
    for wrong in (Plugin, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="expected an EWC plugin"):
            accelerate_avalanche(wrong)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_online_ewc_is_mammoths_loop(training: bool, frozen: bool) -> None:
    """One image after the other, weighted by the probability of its label, in the network's own mode."""
    model = network().train(training)
    model[3].requires_grad_(not frozen)
    want = one_by_one(model, F.cross_entropy, weighted=True)
    flat = torch.cat([want.get(name, torch.zeros_like(p)).flatten() for name, p in model.named_parameters()])
    loader = [(X[:3], Y[:3], "not used"), (X[3:], Y[3:], "not used")]
    before = {name: b.clone() for name, b in model.named_buffers()}
    close(online_ewc_fisher(model, loader, "cpu"), flat / len(X))
    close(online_ewc_fisher(model, loader, "cpu", 4), flat / 8)
    assert all(m.training is training for m in model.modules())
    assert all(b.equal(before[name]) for name, b in model.named_buffers())
    assert all("forward" not in vars(m) for m in model.modules())
    evaluated = online_ewc_fisher(model, loader, "cpu", mode="eval")
    assert torch.allclose(evaluated, flat / len(X)) is not training


def test_online_ewc_refuses() -> None:
    loader = [(X, Y)]
    with pytest.raises(ValueError, match="train_loader has no examples"):
        online_ewc_fisher(network(), [], "cpu")
    with pytest.raises(ValueError, match="mode is 'train'"):
        online_ewc_fisher(network(), loader, "cpu", mode="train")
    with pytest.raises(SelfCheckError, match="draws random numbers"):
        online_ewc_fisher(nn.Sequential(network(), nn.Dropout()).double().train(), loader, "cpu")
    narrow = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(50), nn.Linear(50, 4)).double().train()
    with pytest.raises(ValueError, match="batch norm '1' is in training mode"):
        online_ewc_fisher(narrow, loader, "cpu")
    assert "forward" not in vars(narrow[1])


def test_accelerating_mammoth() -> None:
    """A stand-in with what the replaced method of EwcOn touches."""

    class EwcOn:
        def __init__(self) -> None:
            self.net, self.device, self.fish = network().train(), "cpu", None
            self.net.get_params = lambda: nn.utils.parameters_to_vector(self.net.parameters())
            self.args = types.SimpleNamespace(batch_size=4, gamma=0.5)

        def end_task(self, dataset: object) -> None:
            raise AssertionError("replaced")

        def get_penalty_grads(self) -> None: ...

    dataset = types.SimpleNamespace(train_loader=DataLoader(DATA, 4))
    first = online_ewc_fisher(network().train(), dataset.train_loader, "cpu", 4)
    want = one_image_at_a_time(network().train())
    for model in (accelerate_mammoth(EwcOn()), accelerate_mammoth(type("Own", (EwcOn,), {}))()):
        model.end_task(dataset)
        for name, b in model.net.named_buffers():
            close(b, want[name])
        close(model.fish, first)
        close(model.checkpoint, nn.utils.parameters_to_vector(model.net.parameters()).detach())
        model.end_task(dataset)
        close(model.fish, 1.5 * first)
    as_trained = accelerate_mammoth(EwcOn(), update_statistics=False)
    as_trained.end_task(dataset)
    close(as_trained.fish, first)
    assert all(b.equal(dict(network().named_buffers())[name]) for name, b in as_trained.net.named_buffers())
    with pytest.raises(TypeError, match="expected Mammoth's EwcOn"):
        accelerate_mammoth(nn.Linear(1, 1))


def one_image_at_a_time(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a loop over single images leaves, in the model's own mode."""
    model = copy.deepcopy(model)
    for n in range(len(X)):
        model(X[n : n + 1])
    return dict(model.named_buffers())


def with_a_shared_norm() -> nn.Module:
    model = network()
    return nn.Sequential(model[:3], model[1], *model[3:])


@pytest.mark.parametrize("cuts", [(7,), (3, 6, 7), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("make", [network, with_a_shared_norm])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_norms_end_in_the_state_of_the_loop(make: Callable, momentum: float | None, cuts: tuple[int, ...]) -> None:
    """Also where a norm has seen batches before, is called twice, or is in evaluation mode."""
    model = make().train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    model(X)
    last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1].eval()
    want = one_image_at_a_time(model)
    assert int(want[next(name for name in want if name.endswith("tracked"))]) >= 8
    loader = [(X[a:b], Y[a:b]) for a, b in pairwise((0, *cuts))]
    before = {name: b.clone() for name, b in model.named_buffers()}
    kept = online_ewc_fisher(model, loader, "cpu")
    assert all(b.equal(before[name]) for name, b in model.named_buffers())
    close(online_ewc_fisher(model, loader, "cpu", update_statistics=True), kept)
    for name, b in model.named_buffers():
        assert b.dtype == want[name].dtype
        close(b, want[name])
    assert not last.training
    moved = {name: b.clone() for name, b in model.named_buffers()}
    online_ewc_fisher(model, loader, "cpu", mode="eval", update_statistics=True)
    assert all(b.equal(moved[name]) for name, b in model.named_buffers())
    with pytest.raises(ValueError, match="batches of 1 entry"):  # an error leaves the statistics, too
        online_ewc_fisher(model, [*loader, (X[:1],)], "cpu", update_statistics=True)
    assert all(b.equal(moved[name]) for name, b in model.named_buffers())


def test_logits_of_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \[2, 4, 5\], expected \[N, C\]"):
        online_ewc_fisher(nn.Conv1d(3, 4, 1), [(torch.randn(2, 3, 5), torch.zeros(2, 5).long())], "cpu")


def test_a_hook_on_the_criterion_counts() -> None:
    criterion = nn.CrossEntropyLoss()
    want = compute_importances(network(), criterion, None, DATA, "cpu", 3)
    criterion.register_forward_hook(lambda module, inputs, loss: 3 * loss)
    for name, value in compute_importances(network(), criterion, None, DATA, "cpu", 3).items():
        close(value, 9 * want[name])


def test_norms_without_a_count_stay_as_they_are_where_torch_leaves_them() -> None:
    model = network().train()
    model[1].momentum, model[1].num_batches_tracked = None, None
    want = one_image_at_a_time(model)
    online_ewc_fisher(model, [(X, Y)], "cpu", update_statistics=True)
    for name, b in model.named_buffers():
        close(b, want[name])


class NormAndReLU(nn.BatchNorm2d):
    """As norms of timm, which are followed by their activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_norms_that_compute_more_are_refused() -> None:
    model = network().train()
    model[1] = NormAndReLU(3).double()
    with pytest.raises(ValueError, match=r"the batch norm '1' \(NormAndReLU\) .* forward method of its own"):
        online_ewc_fisher(model, [(X, Y)], "cpu")
    online_ewc_fisher(model, [(X, Y)], "cpu", mode="eval")
    model = network().train()
    theirs = model[1].forward
    model[1].forward = lambda x: theirs(x).relu()
    with pytest.raises(ValueError, match="forward method of its own"):
        online_ewc_fisher(model, [(X, Y)], "cpu")


def test_another_buffer_that_changes_is_refused() -> None:
    model = network().train()
    model[1] = nn.InstanceNorm2d(3, track_running_stats=True).double()
    with pytest.raises(ValueError, match=r"changes the buffer '1\.running_mean'.*update_statistics=False"):
        online_ewc_fisher(model, [(X, Y)], "cpu", update_statistics=True)
    online_ewc_fisher(model, [(X, Y)], "cpu")


def test_a_network_is_remembered_although_its_norms_count_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    first, model = Mock(side_effect=SelfCheck._first, autospec=True), network().train()
    monkeypatch.setattr(SelfCheck, "_first", lambda *args: first(*args))
    for _ in range(3):
        online_ewc_fisher(model, [(X, Y)], "cpu", update_statistics=True)
    assert first.call_count == 1
