"""The robust Fisher against a plain implementation: noise of the whole weight tensor's variance, module by module."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_noise import Plain
from torch import Tensor, nn
from torch.nn import functional as F

import t2v_fast
from t2v_fast import distance
from t2v_fast.estimation.variational import WeightNoise, fixed_point, variational_fisher
from t2v_fast.tasks.data import DataError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, groups=4, dilation=2, padding=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 10),
            nn.ReLU(),
            nn.Linear(10, 3),
        )
        .double()
        .eval()
    )


NAMES = ["0.weight", "2.weight", "7.weight"]
X = torch.randn(12, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def test_equals_a_plain_implementation() -> None:
    beta, epochs = 1e-3, 5
    model = network()
    torch.manual_seed(5)
    found = variational_fisher(
        model,
        lambda epoch: [(X[:6], Y[:6]), (X[6:], Y[6:])],
        NAMES,
        head=model[-1].parameters(),
        epochs=epochs,
        beta=beta,
    )
    other = network()
    plain = Plain(other, NAMES)
    torch.manual_seed(5)
    groups = [
        {"params": [*plain.logvar, *plain.loglambda2], "lr": 1e-2},
        {"params": other[-1].parameters(), "lr": 5e-4},
    ]
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(epochs):
        each = []
        for part in (slice(0, 6), slice(6, 12)):
            loss = F.cross_entropy(other(X[part]), Y[part])
            optimizer.zero_grad()
            (loss + beta * plain.divergence()).backward()
            optimizer.step()
            each.append(loss.item())
        losses.append(sum(each) / 2)
    for k, name in enumerate(NAMES):
        torch.testing.assert_close(found.log_variance[name], plain.logvar[k].detach().flatten(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.log_prior[name], plain.loglambda2[k].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[-1].weight, other[-1].weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-9)
    assert found.num_examples == 12
    for p, q in zip(model[:-1].parameters(), network()[:-1].parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad
    assert found.scale["2.weight"].shape == found.precision["2.weight"].shape == (12,)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding="same"), (5, 4, 9)),
        (nn.Conv3d(2, 4, 3, groups=2), (1, 2, 4, 4, 3)),
        (nn.Linear(7, 5), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    ],
    ids=["conv1d", "conv3d", "tokens", "circular"],
)
def test_noise_has_the_variance_of_noisy_weights(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Against outputs of weights that are drawn, entry by entry."""
    torch.manual_seed(0)
    x, draws = torch.randn(shape), 600
    with torch.no_grad():
        noise = WeightNoise({"weight": layer.weight})
        with noise:
            outputs = torch.stack([layer(x) for _ in range(draws)])
        deviation = noise.log_variance["weight"].mul(0.5).exp().view(-1, *[1] * (layer.weight.dim() - 1))
        mean, weight = layer(x), layer.weight.clone()
        drawn = []
        for _ in range(draws):
            layer.weight.copy_(weight + deviation * torch.randn_like(weight))
            drawn.append(layer(x))
        layer.weight.copy_(weight)
    spread, want = outputs.var(0), torch.stack(drawn).var(0)
    floor = 1e-2 * weight[0].numel() * deviation.square().max()  # of the constant added to squared inputs
    assert ((spread - want).abs() <= 0.5 * want + floor).all()
    assert ((outputs.mean(0) - mean).abs() <= 6 * (spread / draws).sqrt() + 1e-6).all()


def test_attention_is_noisy_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2))
    found = variational_fisher(
        model, lambda epoch: [(torch.randn(4, 3, 8), torch.tensor([0, 1, 0, 1]))], head=model[-1].parameters()
    )
    assert set(found.log_variance) == {k for k, p in layer.named_parameters(prefix="0") if p.dim() > 1}


def test_fixed_point() -> None:
    """The derivatives of F / 2 variance + beta divergence vanish there, for the variances and for the prior."""
    model, beta = network(), 3e-4
    weights = dict(model.named_parameters())
    diagonal = t2v_fast.fisher(model, [(X, Y)], "exact", parameters=[*NAMES, "3.weight"])
    closed = fixed_point(diagonal, weights, beta)
    assert list(closed.log_variance) == NAMES  # a norm's weights are not noisy
    noise = WeightNoise({name: weights[name] for name in NAMES})
    quadratic = torch.zeros(())
    for name in NAMES:
        noise.log_variance[name] = closed.log_variance[name].requires_grad_()
        noise.log_prior[name] = closed.log_prior[name].requires_grad_()
        each = weights[name][0].numel()
        quadratic = quadratic + (diagonal[name] * each * noise.log_variance[name].exp()).sum() / 2
    divergence = noise.divergence()
    terms = torch.autograd.grad(divergence, noise.log_variance["0.weight"], retain_graph=True)[0].abs().max()
    for gradient in torch.autograd.grad(quadratic / beta + divergence, noise.parameters()):
        assert gradient.abs().max() < 1e-8 * terms


def test_bad_arguments() -> None:
    model, batch = network(), [(X, Y)]
    with pytest.raises(ValueError, match=r"'3.weight' is \[12\]: noise is for weights"):
        variational_fisher(model, lambda epoch: batch, ["3.weight"])
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        variational_fisher(model, lambda epoch: batch, ["nothing"])
    with pytest.raises(ValueError, match="epochs is 0"):
        variational_fisher(model, lambda epoch: batch, NAMES, epochs=0)
    with pytest.raises(ValueError, match="likelihood is 'gaussian'"):
        variational_fisher(model, lambda epoch: batch, NAMES, likelihood="gaussian")
    with pytest.raises(ValueError, match="no examples in epoch 1"):
        variational_fisher(model, lambda epoch: [], NAMES)
    with pytest.raises(ValueError, match="the loss is nan in epoch 1"):
        variational_fisher(model, lambda epoch: [(X * math.nan, Y)], NAMES)
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 11 * 10, 3)).double()
    with pytest.raises(ValueError, match=r"'0\.weight' is not the weight of a linear layer or a convolution"):
        variational_fisher(transposed, lambda epoch: batch, head=transposed[-1].parameters())
    assert all(p.requires_grad for p in transposed.parameters())


def tasks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.rand(30, 3, 32, 32, generator=generator) * 0.5
    images[torch.arange(30), labels] += 0.4
    return images, labels


def probe() -> t2v_fast.Probe:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return t2v_fast.Probe(model, preprocessing=t2v_fast.Preprocessing(resize=32, crop=32))


def test_task2vec() -> None:
    images, labels = tasks()
    options = {"num_samples": 60, "epochs": 2, "beta": 1e-3}
    task2vec = t2v_fast.Task2Vec(probe(), method="variational", method_options=options)
    first, again = task2vec.embed((images, labels)), task2vec.embed((images, labels))
    np.testing.assert_array_equal(first.hessian, again.hessian)
    assert first.layer_names == ["0.weight", "3.weight"]
    assert len(first) == 24
    assert first.num_examples == 60
    assert first.standard_error is None
    assert len(first.meta["losses"]) == 2
    assert len(np.unique(first.scale)) == 2
    assert (first.hessian > first.scale).mean() > 0.9
    plain = t2v_fast.Task2Vec(probe()).embed((images, labels))
    with pytest.raises(t2v_fast.FingerprintMismatch):
        distance.pdist([first, plain])
    assert distance.pdist([first, again], metric="cosine").shape == (1,) or distance.pdist([first, again]).shape == (
        2,
        2,
    )


def test_task2vec_multilabel() -> None:
    images, labels = tasks()
    targets = torch.stack([labels == 0, labels > 0], 1).float()
    options = {"num_samples": 40}
    task2vec = t2v_fast.Task2Vec(probe(), method="variational", method_options=options, task_type="multilabel")
    assert np.isfinite(task2vec.embed((images, targets)).hessian).all()


def test_task2vec_refuses() -> None:
    images, labels = tasks()
    with pytest.raises(ValueError, match="method is 'robust', expected one of fisher, variational"):
        t2v_fast.Task2Vec(probe(), method="robust")
    with pytest.raises(ValueError, match="method_options are for"):
        t2v_fast.Task2Vec(probe(), method_options={"epochs": 2})
    task2vec = t2v_fast.Task2Vec(probe(), method="variational", method_options={"num_samples": 0})
    with pytest.raises(ValueError, match="num_samples is 0"):
        task2vec.embed((images, labels))
    with pytest.raises(ValueError, match="no shared form"):
        task2vec.embed_label_sets((images, labels), {"a": labels})

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(images, labels.tolist(), strict=True))

    with pytest.raises(DataError, match="takes a map-style data set"):
        t2v_fast.Task2Vec(probe(), method="variational").embed(Stream())
