"""The modules and parameters of a network, as torch lists them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
