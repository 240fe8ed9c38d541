"""Cotangents of several passes that share an op, against plain autograd in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import per_example_squares, randomise_norms, reduce
from torch import Tensor, nn

from t2v_fast import FisherRecorder
from t2v_fast.gradients import squares

GROUPS = [1, 4, 2]


class Several(nn.Module):
    """Layers whose ops take several passes together, between others that take one pass after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))
        self.up, self.norm = nn.ConvTranspose2d(6, 4, 2), nn.GroupNorm(2, 4)
        self.wide, self.again = nn.Linear(36, 8), nn.Linear(8, 8, bias=False)
        self.tokens, self.scale, self.head = nn.LayerNorm(8), nn.Parameter(torch.ones(1)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.up(self.stem(x)))).flatten(1)
        h = torch.tanh(self.again(torch.tanh(self.again(self.wide(h)))))
        return self.head(self.tokens(h) * self.scale)


@pytest.mark.parametrize("granularity", ["filter", "tensor", "parameter"])
@pytest.mark.parametrize("most", [0, 2**7, 2**16])  # none, some, or all of the layers take passes together
@pytest.mark.parametrize("n", [1, 2, 5])
def test_groups_of_cotangents(granularity: str, most: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "MAX_TOGETHER", most)
    shared: set[int] = set()
    uses_at = squares.Squares._uses_at

    def watch(self: squares.Squares, node: object, cotangents: tuple, passes: int = 1) -> None:
        shared.add(passes)
        uses_at(self, node, cotangents, passes)

    monkeypatch.setattr(squares.Squares, "_uses_at", watch)
    torch.manual_seed(n)
    network = randomise_norms(Several()).eval().double()
    truth = copy.deepcopy(network)
    x, u = torch.randn(n, 2, 5, 5).double(), torch.randn(sum(GROUPS), n, 3).double()
    with FisherRecorder(network, granularity=granularity) as recorder:
        found = list(recorder.backward_groups(network(x), u, GROUPS))
    assert max(shared) == (1 if most == 0 or n == 1 else 4)  # one example alone owns everything, in no axis
    for got, part in zip(found, u.split(GROUPS), strict=True):
        for name, each in per_example_squares(truth, x, part).items():
            want = reduce(each, granularity)
            want = want.sum(0) if granularity == "parameter" else want
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("n", [2, 4])
def test_weights_and_totals(n: int) -> None:
    torch.manual_seed(n)
    network = randomise_norms(Several()).eval().double()
    x, u, weights = torch.randn(n, 2, 5, 5).double(), torch.randn(3, n, 3).double(), torch.rand(n).double()
    totals: dict[str, Tensor] = {}
    with FisherRecorder(network, granularity="parameter") as recorder:
        for _ in range(2):
            recorder.backward(network(x), u, weights, into=totals)
    for name, each in per_example_squares(network, x, u).items():
        torch.testing.assert_close(totals[name], 2 * torch.tensordot(weights, each, 1), rtol=1e-10, atol=1e-14)


class NothingOfZeros(torch.autograd.Function):
    """Gives no gradient at all for a cotangent of zeros, so that the nodes below run without a cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor | None:
        return g if g.any() else None


class WithoutSome(nn.Module):
    """A network whose first two layers get no cotangent where that of their part of the output is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([NothingOfZeros.apply(self.second(torch.tanh(self.first(x)))), self.other(x)], 1)


@pytest.mark.parametrize("granularity", ["filter", "parameter"])
@pytest.mark.parametrize("zeros", [[0], [1], [2], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_passes_that_do_not_reach_a_layer(granularity: str, zeros: list[int], retain_graph: bool) -> None:
    torch.manual_seed(0)
    network = WithoutSome().double()
    x, u = torch.randn(4, 3).double(), torch.randn(3, 4, 4).double()
    u[zeros, :, :2] = 0
    with FisherRecorder(network, granularity=granularity, unsupported="exact") as recorder:
        found = recorder.backward(network(x), u, retain_graph=retain_graph)
    for name, each in per_example_squares(network, x, u).items():
        want = reduce(each, granularity)
        want = want.sum(0) if granularity == "parameter" else want
        torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (24,)])
def test_a_parameter_that_a_layer_sees_through_a_view(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameters = nn.ParameterDict({"weight": torch.randn(shape).double(), "bias": torch.randn(2, 3).double()})
    x, u = torch.randn(3, 4).double(), torch.randn(5, 3, 6).double()

    def forward(p: nn.ParameterDict) -> Tensor:
        return nn.functional.linear(x, p["weight"].view(6, 4), p["bias"].view(6))

    with FisherRecorder(parameters) as recorder:
        got = recorder.backward(forward(parameters), u)
    outputs = forward(parameters)
    for name, p in parameters.items():
        each = [[torch.autograd.grad(outputs[e], p, v[e], retain_graph=True)[0] for v in u] for e in range(3)]
        want = torch.stack([torch.stack(grads).square().sum(0) for grads in each])
        want = reduce(want, "filter")
        torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n", [1, 3])
def test_a_mean_over_pixels_of_channels_last_images(n: int) -> None:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), pool, nn.Flatten()).double()
    x, u = torch.randn(n, 2, 9, 9).double(), torch.randn(1, n, 5).double()
    formats = []
    with FisherRecorder(network) as recorder:
        output = network(x.contiguous(memory_format=torch.channels_last))
        relu = output.grad_fn
        while relu.name() != "ReluBackward0":
            relu = relu.next_functions[0][0]
        got = recorder.backward(output, u, retain_graph=True)
        relu.register_prehook(lambda g: formats.append(g[0].is_contiguous(memory_format=torch.channels_last)))
        again = recorder.backward(output, u)
    assert formats == [True]
    for name, each in per_example_squares(network, x, u).items():
        for found in (got, again):
            torch.testing.assert_close(found[name], reduce(each, "filter"), rtol=1e-10, atol=1e-14)
