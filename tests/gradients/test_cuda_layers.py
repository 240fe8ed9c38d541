"""Layers that only a GPU has, or that take another way there; docs/gpu.md lists what is exact and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_device import LIBRARIES, Pretend, dtype_of, moved, pretended
from pretend_cuda import aten
from test_cuda_graphs import LAYERS, TOKENS, check, example, last
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from t2v_fast import FisherRecorder, UnsupportedError

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")


class RawAttention(nn.Module):
    """Attention by the operators that libraries call directly, whose heads are behind the tokens."""

    def __init__(self, kernel: str, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.kernel, self.causal = nn.Linear(8, 48), nn.Linear(16, 3), kernel, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        t = x.shape[1]
        if not isinstance(x, Pretend):
            q, k, v = (s.transpose(1, 2) for s in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)
        elif self.kernel == "flash":
            y = aten._flash_attention_forward(q, k, v, None, None, t, t, 0.0, self.causal, False)[0]
        else:
            y = aten._efficient_attention_forward(q, k, v, None, None, None, t, t, 0.0, int(self.causal), True)[0]
        return self.out(y.flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_attention_operators_that_are_called_directly(kernel: str, causal: bool) -> None:
    torch.manual_seed(0)
    found = check(RawAttention(kernel, causal), example(TOKENS), dtype_of(kernel, torch.float64))
    assert all(what.startswith("rule") for what in found.values())


class Recurrent(nn.Module):
    """An LSTM, GRU or RNN as cuDNN or MIOpen computes it, of padded or packed sequences."""

    def __init__(self, layer: nn.RNNBase, library: str, packed: bool, train: bool = True) -> None:
        super().__init__()
        self.layer, self.library, self.packed, self.trains = layer, library, packed, train

    def forward(self, x: Tensor) -> Tensor:
        layer, sizes = self.layer, []
        data: Tensor | PackedSequence = x
        if self.packed:  # each example has a length of its own, from 2 to 5
            values = x.held if isinstance(x, Pretend) else x
            lengths = (values[:, 0, 0].double() * 1000).long() % 4 + 2
            data = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        if isinstance(x, Pretend):
            mode = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}[layer.mode]
            states = layer.num_layers * (1 + layer.bidirectional)
            h = x.new_zeros(states, len(x), layer.hidden_size)
            cell = h if mode == 2 else None
            weights, hidden = layer._flat_weights, layer.hidden_size
            if self.packed:
                packed = data
                sizes, data = packed.batch_sizes.tolist(), packed.data
            options = (layer.num_layers, layer.batch_first and not self.packed, 0.0, self.trains, layer.bidirectional)
            each = len(weights) // states
            if self.library == "cuDNN":
                y = aten._cudnn_rnn(data, weights, each, None, h, cell, mode, hidden, 0, *options, sizes, None)[0]
            else:
                y = aten.miopen_rnn(data, weights, each, h, cell, mode, hidden, *options, sizes, None)[0]
            y = PackedSequence(y, *packed[1:]) if self.packed else y
        else:
            y = layer(data)[0]
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0] if self.packed else y


RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(8, 3, 2, batch_first=True),
    "GRU": lambda: nn.GRU(8, 3, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(8, 3, batch_first=True),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers(kind: str, library: str, packed: bool) -> None:
    torch.manual_seed(0)
    check(Recurrent(RECURRENT[kind](), library, packed), example(TOKENS), torch.float64)


@pytest.mark.parametrize("name", ["conv", "depthwise", "batch norm", "group norm", "layer norm", "RMS norm", "linear"])
def test_float16(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    check(make(), example(shape), torch.float16)


def test_mamba() -> None:
    """A state-space model without its own kernels: torch's operators alone."""
    library = pytest.importorskip("transformers")
    config = library.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2)
    torch.manual_seed(0)
    network = library.MambaForCausalLM(config)
    network = last(network, lambda m, x: m(x, use_cache=False).logits)
    check(network.eval(), torch.randint(1, 50, (2, 6)), torch.float32)  # it computes in float32 itself


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_backward_pass_in_eval_mode(library: str) -> None:
    network = Recurrent(nn.LSTM(8, 3, batch_first=True), library, False, train=False)
    with pretended(), FisherRecorder(there := moved(network)) as recorder:
        y = there(Pretend(example(TOKENS))).flatten(1)
        with pytest.raises(UnsupportedError, match=r"cudnn\.flags\(enabled=False\)"):
            recorder.check(y)
