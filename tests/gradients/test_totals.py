"""Squares that are added to the result of an earlier call, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import per_example_squares, randomise_norms
from torch import Tensor, nn

from t2v_fast import FisherRecorder


class Branches(nn.Module):
    """A convolution, a norm, a layer that is used twice, one that half of the batches miss, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.again, self.missed, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.misses = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.convolution(x)).relu().flatten(1)
        h = torch.tanh(self.again(torch.tanh(self.again(h))))
        return self.head(h if self.misses else torch.tanh(self.missed(h)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cotangents", [1, 2])
def test_batches_of_different_sizes_add_up(dtype: torch.dtype, cotangents: int) -> None:
    torch.manual_seed(0)
    network = randomise_norms(Branches()).eval().to(dtype)
    truth = Branches().eval().double()
    truth.load_state_dict(network.state_dict())
    want: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    with FisherRecorder(network, granularity="parameter") as recorder:
        for n, misses in [(5, True), (2, False), (3, True), (1, False), (4, False)]:
            network.misses = truth.misses = misses
            x, u, weights = torch.randn(n, 2, 4, 4), torch.randn(cotangents, n, 4), torch.rand(n)
            given = recorder.backward(network(x.to(dtype)), u.to(dtype), weights.to(dtype), into=totals)
            assert given is totals
            for name, squares in per_example_squares(truth, x.double(), u.double()).items():
                more = torch.tensordot(weights.to(dtype).double(), squares, 1)
                want[name] = want[name] + more if name in want else more
    assert totals.keys() == want.keys()
    for name, squares in want.items():
        worst = (totals[name].double() - squares).abs().max() / squares.abs().max()
        assert worst < (1e-12 if dtype is torch.float64 else 2e-6), name


def test_parameters_without_a_rule_add_up() -> None:
    """They take plain autograd or whole gradients, whose sums are made apart."""
    torch.manual_seed(0)
    network = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).eval().double()
    want: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    with FisherRecorder(network, granularity="parameter", unsupported="exact") as recorder:
        for n in (3, 2):
            x, u = torch.randn(n, 4).double(), torch.randn(1, n, 3).double()
            recorder.backward(network(x), u, into=totals)
            for name, squares in per_example_squares(network, x, u).items():
                want[name] = want.get(name, 0) + squares.sum(0)
    assert want.keys() == totals.keys()
    for name in want:
        torch.testing.assert_close(totals[name], want[name], rtol=1e-12, atol=1e-14)


def test_values_of_examples_have_no_total() -> None:
    network = nn.Linear(4, 3)
    with FisherRecorder(network) as recorder, pytest.raises(ValueError, match="granularity 'parameter', got 'filter'"):
        recorder.backward(network(torch.ones(2, 4)), torch.ones(2, 3), into={})
