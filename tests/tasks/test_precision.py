"""Lower precision: sums of kernels are kept, batch norms stay exact, and an embedding comes nearer to the truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from t2v_fast import FisherRecorder, fisher, reduce_precision
from t2v_fast.tasks.precision import dtype_of

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 7, 3),
        nn.Conv2d(8, 8, 5, groups=8),
        nn.Conv1d(4, 6, 4),
        nn.Conv3d(2, 3, 3),
        nn.ConvTranspose2d(4, 6, (2, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_kernels_keep_their_sums(layer: nn.Module, dtype: torch.dtype) -> None:
    own = layer.weight.detach().double()
    low = reduce_precision(copy.deepcopy(layer), dtype)
    assert {p.dtype for p in low.parameters()} == {dtype}
    least = own.flatten(2).abs().amin(2)
    off = (low.weight.detach().double() - own).flatten(2)
    # Half a last place of the least tap, which may have taken up as much of the one before and so be larger.
    assert bool((off.sum(2).abs() <= torch.finfo(dtype).eps * (least + off.abs().amax(2))).all())
    assert float(off.sum(2).norm()) < 0.5 * float((own.to(dtype).double() - own).flatten(2).sum(2).norm())
    assert float(off.abs().max()) <= 2 * torch.finfo(dtype).eps * float(own.abs().max())


class Network(nn.Module):
    """A shared convolution, a parametrised one, norms, integers, and a batch norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(3, 8, 3, padding=1)
        self.again.weight = self.one.weight
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.layer_norm, self.pointwise = nn.LayerNorm(4), nn.Conv2d(8, 8, 1)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.layer_norm(torch.relu(self.one(x) + self.again(x)))
        return self.fc(torch.relu(self.last(self.pointwise(self.normed(x)))).mean((2, 3)))


def test_a_network() -> None:
    torch.manual_seed(0)
    network = Network().eval()
    low = reduce_precision(copy.deepcopy(network), torch.bfloat16)
    assert low.one.weight is low.again.weight
    assert low.count.dtype == torch.int64
    for name, p in low.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith(("first", "last")) else torch.bfloat16), name
    assert low.last.running_var.equal(network.last.running_var)
    assert dtype_of(low) == torch.bfloat16
    assert dtype_of(nn.BatchNorm2d(3)) == dtype_of(nn.ReLU()) == torch.float32
    x = torch.randn(6, 3, 4, 4)
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert float((y.float() - network(x)).norm() / network(x).norm()) < 0.02
    data = [(x, torch.arange(6) % 5)]
    got = fisher(low, [(x.bfloat16(), data[0][1])], "empirical", unsupported="skip")
    want = fisher(network, data, "empirical", unsupported="skip")
    assert list(got) == list(want)
    a, b = got.vector(), want.vector()
    assert float(a @ b / (a.norm() * b.norm())) > 0.999


def test_higher_precision_is_an_ordinary_conversion() -> None:
    network = reduce_precision(Network(), torch.float64)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert {p.dtype for p in reduce_precision(network, torch.float32).parameters()} == {torch.float32}
    same = Network()
    assert reduce_precision(same, torch.float32) is same


def test_uniform_images_see_the_sum_of_the_taps() -> None:
    """A kernel whose taps cancel: rounded each by itself, they no longer do."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 16, 3, bias=False)
    with torch.no_grad():
        layer.weight -= layer.weight.mean((2, 3), keepdim=True)
    x = torch.full((1, 1, 3, 3), 6.0)
    exact = layer(x).double()
    rounded, kept = copy.deepcopy(layer).bfloat16(), reduce_precision(copy.deepcopy(layer), torch.bfloat16)
    errors = [float((m.float()(x).double() - exact).norm()) for m in (rounded, kept)]
    assert errors[1] < errors[0] / 3


class Background(nn.Module):
    """Depthwise kernels that cancel on the background, and a norm that enlarges what is left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        with torch.no_grad():
            self.depthwise.weight -= 0.98 * self.depthwise.weight.mean((2, 3), keepdim=True)
        self.norm = nn.BatchNorm2d(16)
        self.last, self.fc = nn.Conv2d(16, 24, 3), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(torch.relu(self.stem(x) + 3)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def test_an_embedding_in_bfloat16() -> None:
    network = Background()
    images = np.full((60, 16, 16, 3), 255, np.uint8)
    images[:, 4:12, 4:12] = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    network.train()(x)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        network(x)
    network.eval()
    y = torch.arange(60) % 10
    names = [name for name, p in network.named_parameters() if p.dim() == 4]

    def embedding(model: nn.Module, dtype: torch.dtype) -> Tensor:
        with FisherRecorder(model, names) as recorder:
            logits = model(x.to(dtype))
            u = torch.nn.functional.one_hot(y, 10).to(dtype) - 0.1
            return torch.cat([q.double().mean(0) for q in recorder.backward(logits, u).values()])

    want = embedding(copy.deepcopy(network).double(), torch.float64)
    errors = [
        float((embedding(model, torch.bfloat16) - want).norm() / want.norm())
        for model in (copy.deepcopy(network).bfloat16(), reduce_precision(copy.deepcopy(network), torch.bfloat16))
    ]
    assert errors[1] < errors[0] / 2
