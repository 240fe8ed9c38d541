"""The modules and parameters of a network, as torch lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2v_fast import fisher
from t2v_fast.gradients.members import modules_of, name_of, parameters_of


def _shared() -> nn.Module:
    """A layer at three places, a module that is None, a parameter of two layers, and one that is None."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), nn.Linear(2, 2))
    network[1].append(network[0])
    network.register_module("again", network[1])
    network.register_module("none", None)
    network[2].weight = network[0].weight
    return network


@pytest.mark.parametrize("wrapped", [False, True])
def test_members_are_those_of_torch_in_its_order(wrapped: bool) -> None:
    networks = [_shared(), nn.ReLU(), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2)]
    networks.append(torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    for network in networks:
        network = nn.DataParallel(network) if wrapped else network
        assert [id(m) for m in modules_of(network)] == [id(m) for m in network.modules()]
        assert all(name_of(network, module) == name for name, module in network.named_modules())
        assert [id(p) for p in parameters_of(network)] == [id(p) for p in network.parameters()]


def test_members_of_a_network_that_defines_equality() -> None:
    """Two different layers are two members, even if they are equal."""

    class Equal(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    network = nn.Sequential(Equal(2, 2), Equal(2, 2))
    assert len(modules_of(network)) == 3
    assert name_of(network, nn.ReLU()) is None
    assert len(parameters_of(network)) == 4


class _WithGain(nn.Linear):
    """A layer that shows a parameter which it keeps in a list."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gains = [nn.Parameter(torch.rand(self.out_features))]

    def named_parameters(self, prefix: str = "", *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, *args, **kwargs)
        yield "gain", self.gains[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gains[0]


class _WithLayer(nn.Module):
    """A network that shows a layer which it keeps in a list."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(*sizes)]
        self.norm = nn.BatchNorm1d(sizes[1])

    def named_modules(self, memo: Any = None, prefix: str = "", **options: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_modules(memo, prefix, **options)
        yield f"{prefix}.layer".lstrip("."), self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[0](x))


@pytest.mark.parametrize(("kind", "hidden"), [(_WithGain, "gain"), (_WithLayer, "layer.weight")])
def test_members_that_only_the_methods_of_a_network_show(kind: type[nn.Module], hidden: str) -> None:
    """They are frozen, and become differentiable for the time of the estimate."""
    network = kind(3, 4).eval()
    for p in network.parameters():
        p.requires_grad_(False)
    assert list(map(id, modules_of(network))) == list(map(id, network.modules()))
    assert list(map(id, parameters_of(network))) == list(map(id, network.parameters()))
    x = torch.randn(5, 3)
    found = fisher(network, x.split(3), "exact")
    for p in network.parameters():
        p.requires_grad_()
    assert hidden in found
    torch.testing.assert_close(found[hidden], fisher(network, x.split(3), "exact")[hidden])


class _Counting(nn.Module):
    """Counts its calls in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


def test_buffers_of_a_layer_that_only_a_method_shows_are_restored() -> None:
    """``eval()`` does not reach it."""
    network = _WithLayer(3, 3)
    network.layers[0] = _Counting()
    fisher(network.eval(), [torch.randn(5, 3)], "exact")
    assert not network.layers[0].calls
