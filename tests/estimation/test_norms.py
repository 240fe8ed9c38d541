"""Gradient norms of single examples: against plain autograd of each example alone, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import beside_itself, per_example_squares, randomise_norms, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import t2v_fast
from t2v_fast import FisherRecorder, GradientNorms, SelfCheckError, UnsupportedError, gradient_norms

CLASSES = 5


class Everything(nn.Module):
    """Convolutions (plain, grouped, transposed), batch, group and layer norm, attention, a token table that is also the
    output layer, and parameters that are added and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.group_norm = nn.GroupNorm(2, 8)
        self.upwards = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.place = nn.Parameter(torch.randn(64, 8) / 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.layer_norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(CLASSES, 8)
        self.head = nn.Linear(8, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, images: Tensor) -> Tensor:
        words = (images.detach().mean((2, 3)) * 50).long() % CLASSES  # [N, 3]
        h = self.batch_norm(self.conv(images)).relu()
        h = self.upwards(self.group_norm(self.grouped(h)) + h)  # [N, 8, 8, 8]
        h = torch.cat([h.flatten(2).transpose(1, 2) * self.scale + self.place, self.table(words)], 1)
        h = self.layer_norm(h)
        return self.head((h + self.attention(h, h, h)[0]).mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Everything().double())


def batches(sizes: tuple[int, ...] = (2, 5, 1)) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=g).double(), torch.randint(0, CLASSES, (n,), generator=g)) for n in sizes
    ]


def truth(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Norms [N] by plain autograd of a copy, one example at a time."""
    model = copy.deepcopy(model).requires_grad_(True)
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(beside_itself(x, n))[:1], y[n : n + 1])
        rows.append([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))])
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def test_norms_are_those_of_plain_autograd() -> None:
    model = network()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    want = truth(model, x, y)
    norms = gradient_norms(model, batches())
    assert list(norms) == list(want) == list(dict(model.named_parameters()))
    for name, norm in norms.items():
        assert (norm.dtype, norm.shape) == (torch.float64, (8,))
        assert relative_error(norm, want[name]) < 1e-10, name
    total = torch.stack(list(want.values())).square().sum(0).sqrt()
    assert relative_error(norms.total, total) < 1e-10
    some = gradient_norms(model, batches((3, 3, 2))[:2], parameters=lambda name, p: "norm" in name)
    assert len(some) == 6
    model.requires_grad_(False)
    model.grouped.weight.requires_grad_(True)
    trainable = gradient_norms(model, batches(), parameters="trainable")
    assert list(trainable) == ["grouped.weight"]
    assert relative_error(trainable.total, want["grouped.weight"]) < 1e-10
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["grouped.weight"]


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
def test_norms_of_a_loop_of_ones_own(granularity: str) -> None:
    model = network()
    for x, _ in batches():
        u = torch.randn(2, len(x), CLASSES).double()
        want = per_example_squares(model, x, u)
        with FisherRecorder(model, granularity=granularity) as recorder:
            norms = GradientNorms.of(recorder, recorder.backward(model(x), u))
        for name, norm in norms.items():
            assert relative_error(norm, want[name].flatten(1).sum(1).sqrt()) < 1e-10, name
    recorder = FisherRecorder(model, granularity="parameter")
    with pytest.raises(ValueError, match="sums over examples: expected 'tensor'"):
        GradientNorms.of(recorder, {})


def test_any_loss_of_single_examples() -> None:
    model, loader = network(), batches()

    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return 3 * F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")

    norms = gradient_norms(model, loader, smoothed)
    x, y = loader[1]
    for n in range(len(x)):
        loss = 3 * F.cross_entropy(model(beside_itself(x, n))[:1], y[n : n + 1], label_smoothing=0.2)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert float(norms.total[2 + n]) == pytest.approx(float(sum(g.square().sum() for g in gradients)) ** 0.5)
    usual = gradient_norms(model, loader, lambda z, y: F.cross_entropy(z, y, reduction="none"))
    assert torch.allclose(usual.total, gradient_norms(model, loader).total, rtol=1e-12)
    unlabelled = [x for x, _ in loader]
    entropy = gradient_norms(model, unlabelled, lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1))
    assert entropy.total.gt(0).all()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.layer = nn.Linear(6, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.table(input_ids).cumsum(1).tanh())


def test_norms_of_sequences_leave_padding_out() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    loader, want = [], []
    for lengths in ((4, 2), (3, 5, 1)):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        tokens = torch.randint(0, 9, mask.shape)
        labels = torch.randint(0, 9, mask.shape)
        loader.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
        for n, length in enumerate(lengths):
            z = model(tokens[n : n + 1, :length], None)
            loss = F.cross_entropy(z[0], labels[n, :length], reduction="sum")
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            want.append(sum(g.square().sum() for g in gradients).sqrt())
    assert relative_error(gradient_norms(model, loader).total, torch.stack(want)) < 1e-10


def test_what_is_refused() -> None:
    model, loader = network(), batches()
    with pytest.raises(ValueError, match="needs the labels"):
        gradient_norms(model, [x for x, _ in loader])
    with pytest.raises(ValueError, match="no example"):
        gradient_norms(model, [])
    with pytest.raises(ValueError, match=r"the loss returned \[\], expected one number for each example, \[2\]"):
        gradient_norms(model, loader, F.cross_entropy)
    for coupled in (
        lambda z, y: F.cross_entropy(z - z.mean(0), y, reduction="none"),
        lambda z, y: F.cross_entropy(z, y, reduction="none") / F.cross_entropy(z, y),
        lambda z, y: z.flip(0)[:, 0],
    ):
        with pytest.raises(ValueError, match="depends on the logits of others"):
            gradient_norms(model, loader, coupled)
    with pytest.raises(UnsupportedError, match="batch norm in training mode"):
        gradient_norms(network().train(), loader)
    couples = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
    with pytest.raises(SelfCheckError, match="examples interact"):
        gradient_norms(couples, loader, forward=lambda model, x: model(x - x.mean(0)))
    normalised = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, CLASSES)
    ).double()
    with pytest.raises(UnsupportedError, match="original0"):
        gradient_norms(normalised, loader)
    whole, part = (gradient_norms(normalised, loader, unsupported=how) for how in ("exact", "skip"))
    assert part.skipped == whole.keys() - part.keys()
    assert len(part.skipped) == 2
    assert (whole.total > part.total).all()


def test_parameters_that_are_not_used_have_zeros() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
    model.spare = nn.Linear(2, 2).double()
    norms = gradient_norms(model, batches(), forward=lambda model, x: model[1](model[0](x)))
    assert norms.unused == {"spare.weight", "spare.bias"}
    assert not norms["spare.weight"].any()
    assert norms.total.all()
    assert t2v_fast.gradient_norms is gradient_norms


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_norms_are_those_of_opacus() -> None:
    """Its ghost norms are of linear layers and embeddings; for others it forms the gradients of each example."""
    pytest.importorskip("opacus", reason="compares with it")
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 5)
    ).double()
    (_, (x, y), _) = batches()
    norms = gradient_norms(model, [(x, y)])
    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(model), max_grad_norm=1.0, loss_reduction="sum")
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    theirs = {name.removeprefix("_module."): p._norm_sample for name, p in wrapped.named_parameters()}
    assert theirs.keys() == norms.keys()
    assert all(relative_error(norms[name], theirs[name]) < 1e-10 for name in norms)
    assert relative_error(norms.total, wrapped.get_norm_sample()) < 1e-10
