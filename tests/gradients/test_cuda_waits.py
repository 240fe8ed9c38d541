"""No layer and no network makes the host wait in a steady batch on a CUDA device, unless docs/gpu.md says so."""

from __future__ import annotations

import pytest
import torch
from networks import Function
from oracle import randomise_norms
from pretend_cuda import moved, pretended
from steady import steady
from test_cuda_graphs import LAYERS, NETWORKS, _logits, example
from torch import Tensor, nn
from waits import TO_DEVICE, TO_HOST, WAIT, Counted

from t2v_fast import fisher

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")
BATCHES = 7
# Which bag a look-up belongs to is known to the device alone: once for each of two cotangents.
ALLOWED_WAITS = {"embedding bag": {"gradients/rules.py": 2}}


def counted_batch(network: nn.Module, x: Tensor) -> Counted:
    """What one steady batch does."""
    network = Function(lambda self, x: _logits(self.body(x)), body=randomise_norms(network)).eval()
    with pretended():
        there = moved(network)
        with Counted() as counted:
            fisher(there, steady([x] * BATCHES, counted), "hutchinson", device="cuda:0")
    assert counted.numbers[TO_HOST] <= 20 + x.numel() * sum(waits(counted).values())
    assert counted.kinds[TO_DEVICE] >= 1
    return counted


def waits(counted: Counted) -> dict[str, int]:
    return {place[2].partition(":")[0]: n for place, n in counted.places.items() if place[0] == WAIT}


@pytest.mark.slow_unless(name=("conv 3d", "embedding", "embedding bag", "encoder layer", "GRU, cuDNN", "RMS norm"))
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    counted = counted_batch(make(), example(shape))
    assert waits(counted) == ALLOWED_WAITS.get(name, {})
    if "cuDNN" not in name:  # a node that is called for each example gets the owners of its entries from the host
        assert counted.kinds[TO_DEVICE] <= 9


WAITING = {"ghostnet_050", "edgenext_xx_small"}  # docs/gpu.md says so
NOT_COUNTED = {  # 224 pixels take minutes, and networks of texts are in tests/estimation/test_host.py
    *("levit_128s", "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "volo_d1_224", "tiny_vit_5m_224"),
    *("BERT", "GPT-2", "Llama", "ModernBERT"),
}


@pytest.mark.slow_unless(name=("resnet18",))
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in WAITING | NOT_COUNTED])
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    network, x = NETWORKS[name]()
    assert waits(counted_batch(network.eval(), x)) == {}
