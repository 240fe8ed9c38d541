"""Layers, wrappers and couplings: small networks that each show one thing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .case import COUPLED, EXACT, RANDOM, Case, Inputs, Made

KIND = "layers"
CASES: list[Case] = []

Maker = Callable[[], Made]


def case(name: str, expect: str = EXACT, **options: Any) -> Callable[[Maker], Maker]:
    """Make a case of a function that returns a network and its batches."""

    def decorate(make: Maker) -> Maker:
        options.setdefault("thorough", True)
        CASES.append(Case(KIND, name, make, expect, **options))
        return make

    return decorate


def coupled(name: str, why: str, message: str = COUPLED, **options: Any) -> Callable[[Maker], Maker]:
    return case(name, why, message=message, **options)


def hidden(name: str, why: str, **options: Any) -> Callable[[Maker], Maker]:
    """A coupling that leaves no trace in the graph: only fisher() can see it, which runs examples alone."""
    return case(name, why, message=options.pop("message", COUPLED), ways=("fisher",), **options)


class Function(nn.Module):
    """A network whose forward is a function of it and its inputs; its layers are its attributes."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.function(self, *inputs, **named)


def rows(*shape: int, counts: Sequence[int] = (3, 2)) -> list[Tensor]:
    return [torch.randn(n, *shape) for n in counts]


def numbers(high: int, *shape: int, counts: Sequence[int] = (3, 2)) -> list[Tensor]:
    return [torch.randint(0, high, (n, *shape)) for n in counts]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def padded(lengths: Sequence[Sequence[int]], longest: int, width: int) -> list[Inputs]:
    """Batches of (rows [N, T, width], lengths [N]), zero after each length."""
    batches = []
    for each in lengths:
        length = torch.tensor(each)
        mask = torch.arange(longest) < length[:, None]
        batches.append((torch.randn(*mask.shape, width) * mask[:, :, None], length))
    return batches


def at_last(x: Tensor, lengths: Tensor) -> Tensor:
    """The row of each example's last valid token, of [N, T, D]."""
    return x[torch.arange(len(x)), lengths - 1]


def mean_of(x: Tensor) -> Tensor:
    """[N, D, ...] to [N, D]."""
    return x.flatten(2).mean(2)


def drawn_lengths(seed: int, counts: Sequence[int], longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, longest + 1, (n,), generator=generator).tolist() for n in counts]


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions.


def simple(name: str, network: Callable[[], nn.Module], batches: Callable[[], list[Inputs]], **options: Any) -> None:
    CASES.append(Case(KIND, name, lambda: (network(), batches()), thorough=True, **options))


class Flat(nn.Module):
    """A layer, then the mean over all axes but the first two, then a linear head."""

    def __init__(self, layer: nn.Module, width: int, nonlinear: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.nonlinear = nonlinear
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = x.tanh() if self.nonlinear else x
        return self.head(mean_of(x) if x.dim() > 2 else x)


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, padding=1), (3, 9)),
    "conv1d, stride, dilation and groups": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2), (4, 12)),
    "conv1d, reflected padding": (lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="reflect"), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 6, 6)),
    "conv2d, stride 2": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (3, 7, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 6, 6)),
    "conv2d, depthwise with a multiplier": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 6, 6)),
    "conv2d, groups and dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2), (4, 8, 8)),
    "conv2d, one by one": (lambda: nn.Conv2d(3, 6, 1), (3, 5, 5)),
    "conv2d, circular padding": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    "conv2d, replicated padding": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="replicate"), (3, 6, 6)),
    "conv2d, same padding of an even kernel": (lambda: nn.Conv2d(3, 6, 4, padding="same"), (3, 6, 6)),
    "conv2d, oblong kernel": (lambda: nn.Conv2d(3, 6, (1, 5), padding=(0, 2)), (3, 5, 7)),
    "conv2d, padding wider than the image": (lambda: nn.Conv2d(3, 6, 3, padding=2), (3, 1, 2)),
    "conv2d, without bias": (lambda: nn.Conv2d(3, 6, 3, bias=False), (3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 3, padding=1), (2, 4, 4, 4)),
    "conv3d, stride": (lambda: nn.Conv3d(2, 6, (3, 2, 2), stride=(1, 2, 2), padding=(1, 0, 0)), (2, 3, 4, 4)),
    "conv3d, kernel 3, padding 1, depth 1": (lambda: nn.Conv3d(2, 6, 3, padding=1), (2, 1, 4, 4)),
    "conv3d, kernel 3, padding 1, depth 1 and stride 2": (
        lambda: nn.Conv3d(2, 6, 3, padding=1, stride=2),
        (2, 1, 4, 4),
    ),
    "conv3d, kernel 3, padding 1, height 1": (lambda: nn.Conv3d(2, 6, 3, padding=1), (2, 3, 1, 4)),
    "conv2d, kernel 3, padding 1, height 1": (lambda: nn.Conv2d(2, 6, 3, padding=1), (2, 1, 4)),
    "conv1d, kernel 5, padding 2, length 1": (lambda: nn.Conv1d(2, 6, 5, padding=2), (2, 1)),
    "conv3d, depthwise": (lambda: nn.Conv3d(6, 6, 3, padding=1, groups=6), (6, 3, 3, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 6, 3, stride=2), (3, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    "transposed conv2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 4, 4)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 6, 2, stride=2), (2, 2, 2, 2)),
}
for _name, (_layer, _shape) in CONVOLUTIONS.items():
    simple(_name, lambda layer=_layer: Flat(layer(), 6), lambda shape=_shape: rows(*shape))

# ---------------------------------------------------------------------------------------------------------------------
# Norms.

NORMS = {
    "batch norm": (lambda: nn.BatchNorm2d(6), (6, 4, 4)),
    "batch norm without affine": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)),
        (6, 4, 4),
    ),
    "batch norm of rows": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(6), (6, 5)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(6), (6, 2, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(5), (6, 5)),
    "layer norm over two axes": (lambda: nn.LayerNorm((6, 5)), (6, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 4, 4)),
    "instance norm of sequences": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 5)),
    "instance norm with running statistics": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (6, 4, 4),
    ),
    "rms norm": (lambda: nn.RMSNorm(5), (6, 5)),
    "local response norm": (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.LocalResponseNorm(3)), (6, 4, 4)),
}
for _name, (_layer, _shape) in NORMS.items():
    simple(
        _name,
        lambda layer=_layer, shape=_shape: nn.Sequential(
            nn.Conv2d(shape[0], shape[0], 1) if len(shape) == 3 else nn.Identity(), Flat(layer(), 6)
        ),
        lambda shape=_shape: rows(*shape),
    )
simple(
    "layer norm in training mode",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(5),
    train=True,
)
simple(
    "group norm in training mode",
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), Flat(nn.Conv2d(6, 6, 1), 6)),
    lambda: rows(3, 5, 5),
    train=True,
)
simple(
    "instance norm in training mode",
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), Flat(nn.Conv2d(6, 6, 1), 6)),
    lambda: rows(3, 5, 5),
    train=True,
)


@coupled("batch norm in training mode", "its statistics are those of the batch", train=True)
def _() -> Made:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Flat(nn.Conv2d(6, 6, 1), 6)), rows(3, 5, 5)


@coupled("batch norm of rows in training mode", "its statistics are those of the batch", train=True)
def _() -> Made:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), rows(5)


@coupled("batch norm without running statistics", "its statistics are those of the batch")
def _() -> Made:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)), rows(5)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers and products.

simple("linear", lambda: nn.Linear(5, 4), lambda: rows(5))
simple("linear without bias", lambda: nn.Linear(5, 4, bias=False), lambda: rows(5))
simple(
    "perceptron", lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)),
    lambda: rows(5, counts=(3, 2, 4, 1)),
)  # fmt: skip
simple("linear over tokens", lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), lambda: rows(7, 5))
simple("linear over grids", lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), lambda: rows(2, 3, 5))
simple(
    "first batch of one example",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(5, counts=(1, 3, 2)),
)
simple(
    "tokens, first batch of one example",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(4, 5, counts=(1, 4, 2)),
)
simple(
    "as many tokens as examples",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(3, 5, counts=(3, 2)),
)


@case("bilinear")
def _() -> Made:
    def forward(self: Function, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.bilinear(x, y).tanh())

    network = Function(forward, bilinear=nn.Bilinear(5, 3, 6), head=nn.Linear(6, 4))
    return network, [(torch.randn(n, 5), torch.randn(n, 3)) for n in (3, 2)]


@case("bilinear over tokens")
def _() -> Made:
    def forward(self: Function, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.bilinear(x, y).tanh()).mean(1)

    network = Function(forward, bilinear=nn.Bilinear(5, 3, 6), head=nn.Linear(6, 4))
    return network, [(torch.randn(n, 4, 5), torch.randn(n, 4, 3)) for n in (3, 2)]


@case("einsum of a parameter")
def _() -> Made:
    return Function(
        lambda self, x: torch.einsum("ntd,hdk->nthk", x, self.w).tanh().sum((1, 2)), w=parameter(2, 5, 4)
    ), rows(3, 5)


@case("matmul from the left")
def _() -> Made:
    # [T, T] mixes tokens, as in an MLP-mixer.
    return Function(lambda self, x: (self.w @ x).tanh().flatten(1), w=parameter(3, 3)), rows(3, 4)


@case("batched weights for heads")
def _() -> Made:
    return Function(lambda self, x: torch.matmul(x, self.w).tanh().sum(2).flatten(1), w=parameter(2, 5, 4)), rows(
        2, 3, 5
    )


@case("bmm of a weight expanded to the batch")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w.expand(len(x), -1, -1)).tanh().sum(1)

    return Function(forward, w=parameter(5, 4)), rows(3, 5)


@case("bmm of heads that lie before the examples")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n, h, t, d = x.shape
        heads = x.transpose(0, 1).reshape(h, n * t, d)
        y = torch.bmm(heads, self.w).reshape(h, n, t, -1).transpose(0, 1)
        return y.tanh().mean(2).flatten(1)

    return Function(forward, w=parameter(2, 5, 4)), rows(2, 3, 5)


@case("outer product with a parameter")
def _() -> Made:
    return Function(lambda self, x: (x[:, :, None] * self.w).tanh().sum(1), w=parameter(4)), rows(3)


@case("low-rank linear, u @ v")
def _() -> Made:
    return Function(lambda self, x: F.linear(x, self.u @ self.v).tanh(), u=parameter(4, 2), v=parameter(2, 5)), rows(5)


@case("lora by hand")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.head((self.base(x) + 2.0 * self.b(self.a(x))).tanh())

    layers = {"base": nn.Linear(5, 6), "a": nn.Linear(5, 2, bias=False), "b": nn.Linear(2, 6, bias=False)}
    return Function(forward, **layers, head=nn.Linear(6, 4)), rows(5)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings.


class Tokens(nn.Module):
    """An embedding, a layer, the mean over tokens, a head."""

    def __init__(self, table: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.table = table
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.table(tokens)).tanh().mean(1))


simple("embedding", lambda: Tokens(nn.Embedding(9, 5)), lambda: numbers(9, 4))
simple("embedding with padding", lambda: Tokens(nn.Embedding(9, 5, padding_idx=0)), lambda: numbers(9, 6))
simple("embedding, sparse", lambda: Tokens(nn.Embedding(9, 5, sparse=True)), lambda: numbers(9, 4))
simple(
    "embedding of one token", lambda: nn.Sequential(nn.Embedding(9, 5), nn.Tanh(), nn.Linear(5, 4)), lambda: numbers(9)
)
simple("embedding with a largest norm", lambda: Tokens(nn.Embedding(9, 5, max_norm=100.0)), lambda: numbers(9, 4))


@coupled(
    "embedding with gradients by frequency",
    "gradients are divided by how often a token is in the batch",
    message="scale_grad_by_freq|frequen|often|interact",
)
def _() -> Made:
    return Tokens(nn.Embedding(9, 5, scale_grad_by_freq=True)), [torch.tensor([[1, 1, 2], [1, 3, 3], [2, 1, 1]])]


@coupled(
    "embedding with gradients by frequency, alone",
    "gradients are divided by how often a token is in the batch",
    message="scale_grad_by_freq|frequen|often|interact",
    parameters=("table",),
)
def _() -> Made:
    return Tokens(nn.Embedding(9, 5, scale_grad_by_freq=True)), [torch.tensor([[1, 4, 2], [1, 3, 3]])]


for _mode in ("sum", "mean", "max"):
    simple(
        f"embedding bag, {_mode}",
        lambda mode=_mode: nn.Sequential(nn.EmbeddingBag(9, 5, mode=mode), nn.Tanh(), nn.Linear(5, 4)),
        lambda: numbers(9, 4),
    )
simple(
    "embedding bag with padding",
    lambda: nn.Sequential(nn.EmbeddingBag(9, 5, padding_idx=0), nn.Tanh(), nn.Linear(5, 4)),
    lambda: numbers(4, 5),
)
simple(
    "embedding bag, sparse",
    lambda: nn.Sequential(nn.EmbeddingBag(9, 5, sparse=True, mode="sum"), nn.Tanh(), nn.Linear(5, 4)),
    lambda: numbers(9, 4),
)


@case("embedding bag with weights")
def _() -> Made:
    def forward(self: Function, tokens: Tensor, weights: Tensor) -> Tensor:
        return self.head(self.bag(tokens, per_sample_weights=weights).tanh())

    network = Function(forward, bag=nn.EmbeddingBag(9, 5, mode="sum"), head=nn.Linear(5, 4))
    return network, [(torch.randint(0, 9, (n, 4)), torch.rand(n, 4)) for n in (3, 2)]


@case("one-hot times a table")
def _() -> Made:
    return Function(lambda self, t: (F.one_hot(t, 9).to(self.w) @ self.w).tanh().mean(1), w=parameter(9, 4)), numbers(
        9, 3
    )


@case("a table indexed by tokens")
def _() -> Made:
    return Function(lambda self, t: self.w[t].tanh().mean(1), w=parameter(9, 4)), numbers(9, 3)


@case("a table by index_select")
def _() -> Made:
    def forward(self: Function, t: Tensor) -> Tensor:
        return self.w.index_select(0, t.flatten()).view(*t.shape, -1).tanh().mean(1)

    return Function(forward, w=parameter(9, 4)), numbers(9, 3)


@case("a table by gather")
def _() -> Made:
    def forward(self: Function, t: Tensor) -> Tensor:
        return self.w.expand(len(t), -1, -1).gather(1, t[:, :, None].expand(-1, -1, 4)).tanh().mean(1)

    return Function(forward, w=parameter(9, 4)), numbers(9, 3)


def behind(self: Function, t: Tensor) -> Tensor:
    return self.head(self.network(self.table.weight)[t].tanh().mean(1))


def behind_layers() -> dict[str, nn.Module]:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return {"table": nn.Embedding(9, 5), "network": network, "head": nn.Linear(6, 4)}


@case("a table behind a network, indexed with other tokens")
def _() -> Made:
    return Function(behind, **behind_layers()), [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 5], [6, 7]])]


@case("a table behind a network, by functional embedding")
def _() -> Made:
    def forward(self: Function, t: Tensor) -> Tensor:
        return self.head(F.embedding(t, self.network(self.table.weight)).tanh().mean(1))

    return Function(forward, **behind_layers()), [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 5], [1, 4]])]


@case("a table as long as the batch, behind a network")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        # The queries are one for all examples, and as many as there are examples in the first batch.
        queries = self.network(self.queries)
        return self.head(torch.softmax(queries @ x.transpose(1, 2), 2).matmul(x)).flatten(1)

    network = Function(forward, queries=parameter(3, 5), network=nn.Linear(5, 5), head=nn.Linear(5, 4))
    return network, rows(4, 5, counts=(3, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Sequences: attention with padding, read out at the last valid token.


class Encoder(nn.Module):
    """nn.TransformerEncoder over padded rows, with the read-out of the last valid token or the mean."""

    def __init__(self, first: bool = True, norm_first: bool = False, last: bool = True, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)
        self.first = first
        self.last = last

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) >= lengths[:, None]
        y = self.encoder(x if self.first else x.transpose(0, 1), src_key_padding_mask=mask)
        y = y if self.first else y.transpose(0, 1)
        if self.last:
            return self.head(at_last(y, lengths))
        return self.head((y * ~mask[:, :, None]).sum(1) / lengths[:, None])


for _seed in range(8):
    simple(
        f"transformer encoder, last valid token, two examples, lengths {_seed + 1}",
        Encoder,
        lambda seed=_seed: padded(drawn_lengths(seed, (2, 2, 2), 5), 5, 8),
    )
for _seed in range(3):
    simple(
        f"transformer encoder, sequences first, last valid token, lengths {_seed + 1}",
        lambda: Encoder(first=False),
        lambda seed=_seed: padded(drawn_lengths(10 + seed, (2, 3, 2), 5), 5, 8),
    )
simple(
    "transformer encoder, in training mode without dropout",
    Encoder,
    lambda: padded(((2, 5), (4, 1, 3)), 5, 8),
    train=True,
)
simple("transformer encoder, mean", lambda: Encoder(last=False), lambda: padded(((2, 5), (4, 1, 3)), 5, 8))
simple("transformer encoder, norm first", lambda: Encoder(norm_first=True), lambda: padded(((5, 2), (1, 4, 3)), 5, 8))
simple(
    "transformer encoder, sequences first, as many tokens as examples",
    lambda: Encoder(first=False),
    lambda: padded(((3, 1, 2), (2, 2, 3)), 3, 8),
)
simple(
    "transformer encoder, sequences first, one example and then three",
    lambda: Encoder(first=False),
    lambda: padded(((3,), (2, 4, 1)), 4, 8),
)


@case("transformer encoder, other lengths of tensors in each batch")
def _() -> Made:
    return Encoder(), [*padded(((2, 3),), 3, 8), *padded(((5, 1, 4),), 5, 8), *padded(((2, 1),), 2, 8)]


@case("transformer encoder, left padding")
def _() -> Made:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]).flip(0) >= lengths[:, None]
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, -1])

    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Function(forward, encoder=encoder, head=nn.Linear(8, 4)), padded(((2, 4), (3, 1)), 4, 8)


@case("transformer decoder")
def _() -> Made:
    def forward(self: Function, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.decoder(x, y, tgt_mask=mask)[:, -1])

    layer = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)
    network = Function(forward, decoder=nn.TransformerDecoder(layer, 2), head=nn.Linear(8, 4))
    return network, [(torch.randn(n, 3, 8), torch.randn(n, 4, 8)) for n in (3, 2)]


@case("multi-head attention")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, -1])

    return Function(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 4)), rows(4, 8)


@case("multi-head attention, sequences first")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x, need_weights=False)[0][-1])

    return Function(forward, attention=nn.MultiheadAttention(8, 2), head=nn.Linear(8, 4)), rows(4, 8)


@case("multi-head attention with a bias for keys and values and zero attention")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    return Function(forward, attention=attention, head=nn.Linear(8, 4)), rows(4, 8)


@case("multi-head attention with other widths of keys and values")
def _() -> Made:
    def forward(self: Function, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.attention(x, y[:, :, :5], y)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=6)
    return Function(forward, attention=attention, head=nn.Linear(8, 4)), [
        (torch.randn(n, 4, 8), torch.randn(n, 3, 6)) for n in (3, 2)
    ]


@case("attention with a learned query")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        scores = torch.einsum("qd,ntd->nqt", self.query, self.key(x)).softmax(-1)
        return self.head(scores @ x).mean(1)

    return Function(forward, query=parameter(2, 8), key=nn.Linear(8, 8), head=nn.Linear(8, 4)), rows(4, 8)


@case("attention with a table of relative positions")
def _() -> Made:
    place = torch.arange(4)[:, None] - torch.arange(4) + 3

    def forward(self: Function, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2) + self.table[place]
        return self.head((scores.softmax(-1) @ x)[:, -1])

    return Function(forward, table=parameter(7), head=nn.Linear(8, 4)), rows(4, 8)


@case("sequences first, linear layers, last valid token")
def _() -> Made:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.two(self.one(x.transpose(0, 1)).tanh())  # [T, N, D]
        return y[lengths - 1, torch.arange(len(lengths))]

    return Function(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 4)), padded(((2, 4), (4, 1), (3, 3)), 4, 5)


@case("sequences first, linear layers, first and then last token")
def _() -> Made:
    def forward(self: Function, x: Tensor, place: Tensor) -> Tensor:
        y = self.two(self.one(x.transpose(0, 1)).tanh())
        return y.gather(0, place[None, :, None].expand(1, -1, y.shape[-1]))[0]

    network = Function(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 4))
    return network, [(torch.randn(2, 2, 5), torch.tensor([0, 0])), (torch.randn(2, 2, 5), torch.tensor([1, 0]))]


@case("a read-out of each example's own token, moving from batch to batch")
def _() -> Made:
    def forward(self: Function, x: Tensor, place: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())[torch.arange(len(x)), place]

    places = ([0, 1], [1, 0], [1, 1], [0, 0])
    network = Function(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 4))
    return network, [(torch.randn(2, 2, 5), torch.tensor(place)) for place in places]


@case("tokens before examples in one axis")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n, t, d = x.shape
        y = self.one(x.transpose(0, 1).reshape(t * n, d)).tanh()
        return self.two(y).view(t, n, -1)[-1]

    return Function(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 4)), rows(3, 5, counts=(3, 2, 3))


@case("tokens before examples, one token of each read out")
def _() -> Made:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        n, t, d = x.shape
        y = self.two(self.one(x.transpose(0, 1).reshape(t * n, d)).tanh())
        return y[(lengths - 1) * n + torch.arange(n)]

    return Function(forward, one=nn.Linear(5, 6), two=nn.Linear(6, 4)), padded(((1, 2), (2, 1), (2, 2)), 2, 5)


@case("heads before examples in one axis")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n, t, d = x.shape
        heads = x.view(n, t, 2, d // 2).permute(2, 0, 1, 3).reshape(2 * n, t, d // 2)
        y = self.one(heads).tanh().mean(1).view(2, n, -1)
        return self.two(torch.cat([y[0], y[1]], 1))

    return Function(forward, one=nn.Linear(4, 6), two=nn.Linear(12, 4)), rows(3, 8, counts=(2, 3))


# Unpadded tokens.


def unpadded(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    y = self.two(self.one(x[mask]).tanh())
    example = mask.nonzero()[:, 0]
    return torch.zeros(len(x), y.shape[1], dtype=y.dtype).index_add(0, example, y)


def two_layers() -> dict[str, nn.Module]:
    return {"one": nn.Linear(5, 6), "two": nn.Linear(6, 4)}


UNPADDED = {
    "(2, 2) then (3, 1)": ((2, 2), (3, 1)),
    "(3, 1) then (1, 3)": ((3, 1), (1, 3)),
    "(2, 2, 2) then (3, 1, 2) then (2, 2, 2)": ((2, 2, 2), (3, 1, 2), (2, 2, 2)),
    "(1, 2) then (2, 1), an odd number": ((1, 2), (2, 1)),
}
for _name, _lengths in UNPADDED.items():
    simple(
        f"unpadded tokens, {_name}",
        lambda: Function(unpadded, **two_layers()),
        lambda lengths=_lengths: padded(lengths, 3, 5),
    )


@case("unpadded tokens, the last of each by cumulated lengths")
def _() -> Made:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        return self.two(self.one(x[mask]).tanh())[lengths.cumsum(0) - 1]

    return Function(forward, **two_layers()), padded(((2, 2), (3, 1)), 3, 5)


@case("unpadded tokens put back by masked_scatter")
def _() -> Made:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        y = self.one(x[mask]).tanh()
        back = torch.zeros(*mask.shape, 6, dtype=y.dtype)
        back[mask] = y
        return self.two(back.sum(1))

    return Function(forward, **two_layers()), padded(((2, 2), (3, 1)), 3, 5)


# Recurrent layers.


class Recurrent(nn.Module):
    """A recurrent layer over sequences, packed or not, read out at its last state."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool, **options: Any) -> None:
        super().__init__()
        self.layer = kind(5, 6, batch_first=True, **options)
        self.packed = packed
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(6 * directions, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.packed:
            return self.head(at_last(self.layer(x)[0], lengths))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(at_last(y, lengths))


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    for _packed in (False, True):
        for _only in (False, True):
            simple(
                f"{'packed ' if _packed else ''}{_kind.__name__}{', input weights alone' if _only else ''}",
                lambda kind=_kind, packed=_packed: Recurrent(kind, packed),
                lambda: padded(((2, 2), (3, 1), (1, 3)), 3, 5),
                parameters=("weight_ih", "head") if _only else (),
            )
simple(
    "packed LSTM, two layers and directions",
    lambda: Recurrent(nn.LSTM, True, num_layers=2, bidirectional=True),
    lambda: padded(((3, 2, 1), (2, 2)), 3, 5),
)
simple(
    "LSTM with a projection",
    lambda: nn.Sequential(Last(nn.LSTM(5, 6, proj_size=3, batch_first=True)), nn.Linear(3, 4)),
    lambda: rows(3, 5),
)


class Last(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@case("recurrent cells in a loop")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)

    return Function(forward, cell=nn.GRUCell(5, 6), head=nn.Linear(6, 4)), rows(3, 5)


@case("LSTM cells in a loop")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])

    return Function(forward, cell=nn.LSTMCell(5, 6), head=nn.Linear(6, 4)), rows(3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Gates and routes.


@case("a gate that is shut in the first batch")
def _() -> Made:
    def forward(self: Function, x: Tensor, gate: Tensor) -> Tensor:
        y = self.one(x.transpose(0, 1)).tanh() * gate.T[:, :, None]
        return self.two(y.sum(0))

    network = Function(forward, **two_layers())
    return network, [(torch.randn(2, 2, 5), torch.tensor(g).float()) for g in ([[1, 0], [1, 0]], [[1, 1], [1, 1]])]


@case("a gate that lets each example's own token through")
def _() -> Made:
    def forward(self: Function, x: Tensor, gate: Tensor) -> Tensor:
        return self.two((self.one(x.transpose(0, 1)).tanh() * gate.T[:, :, None]).sum(0))

    gates = ([[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 1]])
    return Function(forward, **two_layers()), [(torch.randn(2, 2, 5), torch.tensor(g).float()) for g in gates]


@case("a whole branch shut in the first batch")
def _() -> Made:
    def forward(self: Function, x: Tensor, gate: Tensor) -> Tensor:
        y = self.one(x).tanh()
        return self.two(y + gate[:, None] * self.branch(y).tanh())

    network = Function(forward, **two_layers(), branch=nn.Linear(6, 6))
    return network, [(torch.randn(2, 5), torch.zeros(2)), (torch.randn(2, 5), torch.ones(2))]


@case("a relu that is dead in the first batch")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.two(self.one(x.transpose(0, 1)).relu().sum(0))

    return Function(forward, **two_layers()), [torch.full((2, 3, 5), -50.0).abs().neg() * 0, torch.randn(2, 3, 5)]


class Mixture(nn.Module):
    """Linear experts; each token goes to the one with the highest score."""

    def __init__(self, how: str, experts: int = 3, tokens_first: bool = False) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(5, experts)
        self.experts = nn.ModuleList(nn.Linear(5, 6) for _ in range(experts))
        self.head = nn.Linear(6, 4)
        self.tokens_first = tokens_first

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        flat = (x.transpose(0, 1) if self.tokens_first else x).reshape(n * t, -1)
        scores = self.router(flat).softmax(-1)
        weight, chosen = scores.max(-1)
        if self.how == "all":
            y = sum(scores[:, e, None] * expert(flat) for e, expert in enumerate(self.experts))
        else:
            y = torch.zeros(n * t, 6, dtype=x.dtype)
            for e, expert in enumerate(self.experts):
                place = (chosen == e).nonzero()[:, 0]
                if self.how == "sparse" and not len(place):
                    continue
                y = y.index_add(0, place, expert(flat[place]) * weight[place, None])
        y = y.tanh().view(t, n, 6).transpose(0, 1) if self.tokens_first else y.tanh().view(n, t, 6)
        return self.head(y.mean(1))


simple("mixture of experts, all of them", lambda: Mixture("all"), lambda: rows(3, 5, counts=(2, 3)))
for _seed in range(3):
    simple(
        f"mixture of experts, routing that changes {_seed + 1}",
        lambda: Mixture("sparse"),
        lambda seed=_seed: [b + 0.5 * seed for b in rows(4, 5, counts=(2, 2, 3))],
    )
simple("mixture of experts, unused ones called", lambda: Mixture("dense"), lambda: rows(3, 5, counts=(2, 2, 3)))
simple(
    "mixture of experts, tokens first",
    lambda: Mixture("sparse", tokens_first=True),
    lambda: rows(2, 5, counts=(2, 2, 3)),
)
simple("mixture of experts, one token each", lambda: Mixture("sparse", 2), lambda: rows(1, 5, counts=(4, 4, 2)))


class Stacked(nn.Module):
    """Experts in two parameters, as newer networks have them; each token goes to two of four."""

    def __init__(self, how: str, capacity: int | None = None) -> None:
        super().__init__()
        self.how, self.capacity = how, capacity
        self.router = nn.Linear(5, 4)
        self.up = nn.Parameter(torch.randn(4, 6, 5))
        self.down = nn.Parameter(torch.randn(4, 5, 6))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).topk(2)
        if self.capacity is not None:
            place = nn.functional.one_hot(chosen.flatten(), 4).cumsum(0).gather(1, chosen.flatten()[:, None])
            weight = weight * (place <= self.capacity).view_as(weight)
        if self.how == "looked up":
            hidden = (self.up[chosen] @ tokens[:, None, :, None]).tanh()
            y = ((self.down[chosen] @ hidden)[..., 0] * weight[..., None]).sum(1)
        else:
            y = torch.zeros_like(tokens)
            for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
                place, choice = (chosen == e).nonzero(as_tuple=True)
                expert = (tokens[place] @ up.T).tanh() @ down.T
                y = y.index_add(0, place, expert * weight[place, choice, None])
        return self.head(y.tanh().view_as(x).mean(1))


for _how in ("looked up", "in a loop"):
    simple(f"mixture of experts, a stack {_how}", lambda how=_how: Stacked(how), lambda: rows(3, 5, counts=(2, 2, 3)))
simple(
    "mixture of experts, a capacity of the batch",
    lambda: Stacked("in a loop", capacity=2),
    lambda: rows(3, 5, counts=(3, 3)),
    expect="examples take the places of others at an expert",
    message="interact.*capacity",
    ways=("fisher",),
)


@case("an expert with as many rows as examples, of other examples")
def _() -> Made:
    def forward(self: Function, x: Tensor, chosen: Tensor) -> Tensor:
        n, t, _ = x.shape
        place = chosen.flatten().nonzero()[:, 0]
        y = torch.zeros(n * t, 6, dtype=x.dtype).index_add(0, place, self.one(x.flatten(0, 1)[place]).tanh())
        return self.two(y.view(n, t, 6).sum(1))

    # Two rows for two examples: one of each, then both of the first, then both of the second.
    routes = ([[1, 0], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [1, 1]])
    return Function(forward, **two_layers()), [(torch.randn(2, 2, 5), torch.tensor(r)) for r in routes]


@case("examples routed to two towers")
def _() -> Made:
    def forward(self: Function, x: Tensor, which: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4, dtype=x.dtype)
        y[which == 0] = self.one(x[which == 0])
        y[which == 1] = self.two(x[which == 1])
        return y

    network = Function(forward, one=nn.Linear(5, 4), two=nn.Linear(5, 4))
    return network, [(torch.randn(4, 5), torch.tensor(w)) for w in ([0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1])]


# ---------------------------------------------------------------------------------------------------------------------
# The batch axis moved about.

BATCH_AXIS = {
    "flipped there and back": lambda self, x: self.two(self.one(x.flip(0)).tanh()).flip(0),
    "rolled there and back": lambda self, x: self.two(self.one(x.roll(1, 0)).tanh()).roll(-1, 0),
    "doubled and averaged": lambda self, x: sum(self.two(self.one(torch.cat([x, x])).tanh()).chunk(2)) / 2,
    "doubled, the copy changed": lambda self, x: sum(self.two(self.one(torch.cat([x, x.flip(1)])).tanh()).chunk(2)),
    "repeated by repeat_interleave": lambda self, x: (
        self.two(self.one(x.repeat_interleave(2, 0)).tanh()).view(len(x), 2, -1).mean(1)
    ),
    "repeated by repeat": lambda self, x: self.two(self.one(x.repeat(2, 1)).tanh()).view(2, len(x), -1).mean(0),
    "in chunks": lambda self, x: torch.cat([self.two(self.one(c).tanh()) for c in x.chunk(2)]),
    "one after the other": lambda self, x: torch.stack([self.two(self.one(row).tanh()) for row in x]),
    "one after the other, backwards": lambda self, x: torch.stack(
        [self.two(self.one(row).tanh()) for row in x.flip(0)]
    ).flip(0),
    "unbound and put together": lambda self, x: torch.cat([self.two(self.one(r[None]).tanh()) for r in x.unbind()]),
    "sorted by a feature and put back": lambda self, x: self.two(self.one(x[x[:, 0].argsort()]).tanh())[
        x[:, 0].argsort().argsort()
    ],
    "as the second axis": lambda self, x: self.two(self.one(x[None].expand(3, -1, -1)).tanh()).sum(0),
    "as the last axis": lambda self, x: (self.two.weight @ (self.one.weight @ x.T).tanh()).T,
    "with an axis before it": lambda self, x: self.two(self.one(torch.stack([x, x.sin()])).tanh()).sum(0),
    "even and odd examples": lambda self, x: torch.stack(
        [self.two(self.one(x[::2]).tanh()), self.two(self.one(x[1::2]).tanh())], 1
    ).flatten(0, 1),
}
for _name, _function in BATCH_AXIS.items():
    simple(
        f"examples {_name}",
        lambda function=_function: Function(function, **two_layers()),
        lambda: rows(5, counts=(4, 2, 4)),
    )


@case("windows of an image, merged with the examples")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n, h, w, d = x.shape
        windows = x.view(n, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)
        y = self.one(windows).tanh()
        y = y.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return self.two(y).mean((1, 2))

    return Function(forward, **two_layers()), rows(4, 4, 5)


@case("windows before examples")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n, t, d = x.shape
        windows = x.view(n, t // 2, 2, d).permute(1, 0, 2, 3).reshape(-1, 2, d)  # windows x examples
        y = self.one(windows).tanh().sum(1).view(t // 2, n, -1)
        return self.two(y[0])

    return Function(forward, **two_layers()), rows(4, 5, counts=(2, 3))


@case("time and examples merged, for an image each")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1)).tanh().flatten(2).mean(2)
        return self.head(y.unflatten(0, x.shape[:2]).mean(1))

    return Function(forward, conv=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 4)), rows(2, 3, 5, 5)


@case("time before examples, for an image each")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(0, 1).flatten(0, 1)).tanh().flatten(2).mean(2)
        return self.head(y.view(x.shape[1], x.shape[0], -1)[-1])

    return Function(forward, conv=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 4)), rows(2, 3, 5, 5)


@case("groups for examples: a convolution of all in one image")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n = len(x)
        weight = self.weight.repeat(n, 1, 1, 1)
        y = F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), weight, groups=n)
        return self.head(y.view(n, 6, -1).tanh().mean(2))

    return Function(forward, weight=parameter(6, 3, 3, 3), head=nn.Linear(6, 4)), rows(3, 5, 5)


@case("weights mixed for each example, as in CondConv")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        n = len(x)
        mix = self.router(x.mean((2, 3))).softmax(1)
        weight = (mix @ self.experts.flatten(1)).view(n * 6, 3, 3, 3)
        y = F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), weight, groups=n)
        return self.head(y.view(n, 6, -1).tanh().mean(2))

    layers = {"experts": parameter(2, 6, 3, 3, 3), "router": nn.Linear(3, 2), "head": nn.Linear(6, 4)}
    return Function(forward, **layers), rows(3, 5, 5)


@case("weights made for each example, as in a hypernetwork")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        weight = self.one(x).view(len(x), 4, 5)
        return torch.bmm(weight, x[:, :, None])[:, :, 0].tanh()

    return Function(forward, one=nn.Linear(5, 20)), rows(5)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters in activations.

ADDED = {
    "added": lambda self, x: (x + self.p).tanh().sum(1),
    "multiplied": lambda self, x: (x * self.p).tanh().sum(1),
    "multiplied twice": lambda self, x: ((x * self.p).tanh() * self.p).sum(1),
    "subtracted": lambda self, x: (self.p - x).tanh().sum(1),
    "divided by": lambda self, x: (x / (2 + self.p)).tanh().sum(1),
    "dividend": lambda self, x: (self.p / (2 + x.abs())).tanh().sum(1),
    "with addcmul": lambda self, x: torch.addcmul(x, x, self.p).tanh().sum(1),
    "with addcmul and a factor": lambda self, x: torch.addcmul(self.p, x, x, value=2.0).tanh().sum(1),
    "with lerp": lambda self, x: torch.lerp(x, x.sin(), self.p.sigmoid()).tanh().sum(1),
    "in where": lambda self, x: torch.where(x > 0, x, self.p).tanh().sum(1),
    "as an exponent": lambda self, x: (x.abs() + 1).pow(self.p).tanh().sum(1),
    "as a base": lambda self, x: (self.p.abs() + 1).pow(x).tanh().sum(1),
    "in maximum": lambda self, x: torch.maximum(x, self.p).tanh().sum(1),
    "stacked": lambda self, x: torch.stack([x, self.p.expand_as(x)], 1).tanh().sum((1, 2)),
    "concatenated": lambda self, x: torch.cat([x, self.p.expand(len(x), -1, -1)], 1).cumsum(1).tanh().sum(1),
    "expanded as a class token": lambda self, x: (
        torch.cat([self.p[:1].expand(len(x), 1, -1), x], 1).cumsum(1).tanh().sum(1)
    ),
    "repeated as a class token": lambda self, x: (
        torch.cat([self.p[:1].repeat(len(x), 1, 1), x], 1).cumsum(1).tanh().sum(1)
    ),
    "as a prompt": lambda self, x: torch.cat([self.p.repeat(len(x), 1, 1), x], 1).softmax(1).tanh().sum(1),
    "written into an activation": lambda self, x: put(x, self.p),
    "written where a mask says": lambda self, x: put_masked(x, self.p),
    "rolled": lambda self, x: (x + self.p.roll(1, 0)).tanh().sum(1),
    "flipped": lambda self, x: (x + self.p.flip(0)).tanh().sum(1),
    "transposed": lambda self, x: (x[:, :, :3] + self.p[:, :3].T).tanh().repeat(1, 1, 2)[:, :, :4].sum(1),
    "squared": lambda self, x: (x * self.p.square()).tanh().sum(1),
    "behind exp": lambda self, x: (x * self.p.exp()).tanh().sum(1),
    "behind softmax": lambda self, x: (x * self.p.softmax(0)).tanh().sum(1),
    "behind softplus, of a row": lambda self, x: (x * F.softplus(self.p[0])).tanh().sum(1),
    "upsampled": lambda self, x: (
        (x + F.interpolate(self.p[None, :2], size=4, mode="linear")[0].repeat(2, 1)[:3]).tanh().sum(1)
    ),
    "used three times": lambda self, x: ((x + self.p).tanh() * self.p + self.p).sum(1),
}


def put(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = p[1]
    return y.cumsum(1).tanh().sum(1)


def put_masked(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y[x[:, :, 0] > 0] = p[0]
    return y.cumsum(1).tanh().sum(1)


for _name, _function in ADDED.items():
    simple(
        f"a parameter {_name}",
        lambda function=_function: nn.Sequential(
            nn.Linear(4, 4), Function(function, p=parameter(3, 4)), nn.Linear(4, 4)
        ),
        lambda: rows(3, 4),
    )

SCALARS = {
    "times logits, behind exp": lambda self, x: self.two(self.one(x).tanh()) * self.p.exp(),
    "times logits": lambda self, x: self.two(self.one(x).tanh()) * self.p,
    "as a gate behind sigmoid": lambda self, x: self.two(x.sum(1, keepdim=True) * self.p.sigmoid() + self.one(x)),
    "as a temperature": lambda self, x: self.two((self.one(x) / (1 + self.p.square())).softmax(1)),
    "added": lambda self, x: self.two(self.one(x).tanh() + self.p),
    "as the slope of a prelu": lambda self, x: self.two(F.prelu(self.one(x), self.p.view(1))),
    "of one entry, behind exp": lambda self, x: self.two(self.one(x).tanh()) * self.q.exp(),
}
for _name, _function in SCALARS.items():
    simple(
        f"a parameter without axes {_name}",
        lambda function=_function: Function(
            function, **two_layers(), p=nn.Parameter(torch.tensor(0.7)), q=nn.Parameter(torch.tensor([0.7]))
        ),
        lambda: rows(5),
    )


@case("clip: two towers and a logit scale, against fixed texts")
def _() -> Made:
    texts = F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1)

    def forward(self: Function, x: Tensor) -> Tensor:
        return self.logit_scale.exp() * F.normalize(self.one(x), dim=1) @ texts.to(x).T

    return Function(forward, one=nn.Linear(5, 6), logit_scale=nn.Parameter(torch.tensor(1.5))), rows(5)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are transformed before use.


def reparametrised(
    make: Callable[[nn.Module], nn.Module], layer: Callable[[], nn.Module] = lambda: nn.Linear(5, 6)
) -> nn.Module:
    return nn.Sequential(make(layer()), nn.Tanh(), nn.Linear(6, 4))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def quiet_weight_norm(layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(layer)


def registered(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


simple("weight norm", lambda: reparametrised(parametrizations.weight_norm), lambda: rows(5))
simple("weight norm, the old way", lambda: reparametrised(quiet_weight_norm), lambda: rows(5))
simple(
    "weight norm of a convolution",
    lambda: Flat(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), 6),
    lambda: rows(3, 5, 5),
)
simple("spectral norm", lambda: reparametrised(parametrizations.spectral_norm), lambda: rows(5))
simple(
    "spectral norm of a convolution",
    lambda: Flat(parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), 6),
    lambda: rows(3, 5, 5),
)
simple(
    "orthogonal weights", lambda: reparametrised(parametrizations.orthogonal, lambda: nn.Linear(6, 6)), lambda: rows(6)
)
simple(
    "symmetric weights",
    lambda: nn.Sequential(registered(nn.Linear(5, 5), Symmetric()), nn.Tanh(), nn.Linear(5, 4)),
    lambda: rows(5),
)
simple("standardised weights", lambda: Flat(Standardised(3, 6, 3), 6), lambda: rows(3, 5, 5))
simple(
    "normalised weights",
    lambda: Function(lambda self, x: F.linear(F.normalize(x), F.normalize(self.w)).mul(3).tanh(), w=parameter(4, 5)),
    lambda: rows(5),
)
simple(
    "a masked weight",
    lambda: Function(
        lambda self, x: F.linear(x, self.w * (torch.arange(20).view(4, 5) % 3 > 0)).tanh(), w=parameter(4, 5)
    ),
    lambda: rows(5),
)
simple(
    "a tanh of a weight",
    lambda: Function(lambda self, x: F.linear(x, self.w.tanh()), w=parameter(4, 5)),
    lambda: rows(5),
)
simple(
    "a part of a weight",
    lambda: Function(lambda self, x: F.linear(x, self.w[:4, 1:6]), w=parameter(6, 7)),
    lambda: rows(5),
)
simple(
    "two parts of a weight",
    lambda: Function(lambda self, x: F.linear(F.linear(x, self.w[:5]).tanh(), self.w[3:7]), w=parameter(7, 5)),
    lambda: rows(5),
)
simple(
    "a weight put together of two",
    lambda: Function(lambda self, x: F.linear(x, torch.cat([self.a, self.b])), a=parameter(2, 5), b=parameter(2, 5)),
    lambda: rows(5),
)
simple(
    "a weight plus its update",
    lambda: Function(
        lambda self, x: F.linear(x, self.w + 0.5 * self.b @ self.a),
        w=parameter(4, 5),
        a=parameter(2, 5),
        b=parameter(4, 2),
    ),
    lambda: rows(5),
)
simple(
    "a kronecker product for a weight",
    lambda: Function(lambda self, x: F.linear(x, torch.kron(self.a, self.b)), a=parameter(2, 3), b=parameter(2, 2)),
    lambda: rows(6),
)


@case("tied weights, as embedding and head")
def _() -> Made:
    def forward(self: Function, t: Tensor) -> Tensor:
        return F.linear(self.one(self.table(t)).tanh().mean(1), self.table.weight)

    return Function(forward, table=nn.Embedding(9, 5), one=nn.Linear(5, 5)), numbers(9, 3)


@case("tied weights, an encoder and its transpose")
def _() -> Made:
    return Function(lambda self, x: F.linear(F.linear(x, self.w).tanh(), self.w.T), w=parameter(6, 5)), rows(5)


@case("one layer applied three times")
def _() -> Made:
    return Function(lambda self, x: self.one(self.one(self.one(x).tanh()).tanh()), one=nn.Linear(5, 5)), rows(5)


@case("one layer for two inputs, tokens and their mean")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.head(self.one(x).tanh().sum(1) * self.one(x.mean(1)).tanh())

    return Function(forward, one=nn.Linear(5, 6), head=nn.Linear(6, 4)), rows(3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Activations, in place and not; views and copies.

for _first, _second in (
    (nn.ReLU6, nn.Hardswish), (nn.Hardswish, nn.ReLU), (nn.Hardswish, nn.ReLU6), (nn.ReLU6, nn.SiLU),
    (nn.Hardswish, nn.Hardswish), (nn.SiLU, nn.ReLU6), (nn.Hardsigmoid, nn.SiLU), (nn.SiLU, nn.Mish),
):  # fmt: skip
    simple(
        f"in-place {_first.__name__} followed by in-place {_second.__name__}",
        lambda first=_first, second=_second: nn.Sequential(
            nn.Conv2d(3, 6, 3), first(inplace=True), second(inplace=True), Flat(nn.Conv2d(6, 6, 1), 6)
        ),
        lambda: rows(3, 5, 5),
    )
simple(
    "in-place activations on a linear layer",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Hardswish(inplace=True), nn.ReLU(inplace=True), nn.Linear(6, 4)),
    lambda: rows(5),
)
simple(
    "in-place addition of a shortcut",
    lambda: Function(lambda self, x: self.two(self.one(x).add_(x[:, :1]).tanh()), **two_layers()),
    lambda: rows(5),
)
simple("prelu", lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 4)), lambda: rows(5))
simple("prelu for each channel", lambda: Flat(nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU(6)), 6), lambda: rows(3, 5, 5))
simple("glu", lambda: nn.Sequential(nn.Linear(5, 12), nn.GLU(), nn.Linear(6, 4)), lambda: rows(5))
simple(
    "maxout",
    lambda: nn.Sequential(nn.Linear(5, 12), Function(lambda self, x: x.view(len(x), 6, 2).amax(2)), nn.Linear(6, 4)),
    lambda: rows(5),
)
simple("pixel shuffle", lambda: Flat(nn.Sequential(nn.Conv2d(3, 24, 3), nn.PixelShuffle(2)), 6), lambda: rows(3, 5, 5))
simple(
    "pooling of all kinds",
    lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 1),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ),
    lambda: rows(3, 10, 10),
)
simple(
    "upsampling",
    lambda: Flat(
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 6, 3)), 6
    ),
    lambda: rows(3, 4, 4),
)
simple(
    "unfold and fold",
    lambda: Flat(nn.Sequential(nn.Unfold(2), nn.Conv1d(12, 12, 1), nn.Fold((4, 4), 2), nn.Conv2d(3, 6, 1)), 6),
    lambda: rows(3, 4, 4),
)
simple(
    "images in channels-last format",
    lambda: Flat(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3)), 6).to(
        memory_format=torch.channels_last
    ),
    lambda: [b.contiguous(memory_format=torch.channels_last) for b in rows(3, 7, 7, counts=(3, 1, 2))],
)
simple(
    "a batch norm of a single channels-last image",
    lambda: Flat(
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            Function(lambda self, x: x.contiguous(memory_format=torch.channels_last)),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        ),
        6,
    ),
    lambda: rows(3, 5, 5, counts=(1, 1)),
)
simple(
    "a float32 part in a float64 network",
    lambda: nn.Sequential(
        nn.Linear(5, 6),
        Function(
            lambda self, x: (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True)) * self.w.float()).to(x),
            w=parameter(6),
        ),
        nn.Linear(6, 4),
    ),
    lambda: rows(3, 5),
)
simple(
    "a parameter of no entries",
    lambda: Function(
        lambda self, x: self.two(torch.cat([self.one(x).tanh(), self.p.expand(len(x), -1)], 1)),
        **two_layers(),
        p=parameter(0),
    ),
    lambda: rows(5),
)
simple(
    "a parameter that is not used",
    lambda: Function(lambda self, x: self.two(self.one(x).tanh()), **two_layers(), p=parameter(3)),
    lambda: rows(5),
)
simple(
    "a parameter that only the second batch uses",
    lambda: Function(
        lambda self, x, flag: self.two(self.one(x).tanh() + (self.p if bool(flag.all()) else 0)),
        **two_layers(),
        p=parameter(6),
    ),
    lambda: [(torch.randn(2, 5), torch.zeros(2)), (torch.randn(3, 5), torch.ones(3))],
)
simple(
    "complex numbers on the way",
    lambda: Function(
        lambda self, x: self.two(torch.fft.rfft(self.one(x)).abs().tanh()), one=nn.Linear(5, 6), two=nn.Linear(4, 4)
    ),
    lambda: rows(5),
)
simple(
    "logits of many tokens and classes",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(3, 5),
)
simple("outputs of four axes", lambda: nn.Conv2d(3, 4, 3), lambda: rows(3, 5, 5))
simple(
    "tokens masked before the loss",
    lambda: Function(
        lambda self, x, lengths: (
            self.two(self.one(x).tanh()) * (torch.arange(x.shape[1]) < lengths[:, None])[:, :, None]
        ),
        **two_layers(),
    ),
    lambda: padded(((3, 1), (2, 3)), 3, 5),
)

# ---------------------------------------------------------------------------------------------------------------------
# Wrappers.


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def small_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Flat(nn.Conv2d(6, 6, 1), 6)
    ).eval()


simple("data parallel", lambda: nn.DataParallel(small()), lambda: rows(5))
simple(
    "a module list",
    lambda: Function(
        lambda self, x: functools.reduce(lambda y, layer: layer(y).tanh(), self.layers, x),
        layers=nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)]),
    ),
    lambda: rows(5),
)
simple(
    "a module dictionary and a parameter list",
    lambda: Function(
        lambda self, x: self.d["a"](x).tanh() @ self.p[0] + self.p[1],
        d=nn.ModuleDict({"a": nn.Linear(5, 6)}),
        p=nn.ParameterList([parameter(6, 4), parameter(4)]),
    ),
    lambda: rows(5),
)
simple("torch.jit.script", lambda: torch.jit.script(small()), lambda: rows(5), vary=False)
simple("torch.jit.trace", lambda: torch.jit.trace(small().double(), torch.randn(2, 5).double()), lambda: rows(5))
simple(
    "torch.jit.trace of convolutions",
    lambda: torch.jit.trace(small_convolutional().double(), torch.randn(2, 3, 5, 5).double()),
    lambda: rows(3, 5, 5),
)
simple("torch.jit.script of convolutions", lambda: torch.jit.script(small_convolutional()), lambda: rows(3, 5, 5))
simple("torch.jit.script, many batches", lambda: torch.jit.script(small()), lambda: rows(5, counts=(3, 2, 4, 2, 3)))
simple("torch.fx", lambda: torch.fx.symbolic_trace(small()), lambda: rows(5))
simple(
    "functional_call with other weights",
    lambda: Function(
        lambda self, x: torch.func.functional_call(
            self.inner, {name: p * 2 for name, p in self.inner.named_parameters()}, (x,)
        ),
        inner=small(),
    ),
    lambda: rows(5),
)
simple(
    "functional_call with its own weights",
    lambda: Function(
        lambda self, x: torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), (x,)), inner=small()
    ),
    lambda: rows(5),
)
simple("autocast that is off", lambda: Function(autocast_off, inner=small()), lambda: rows(5))
simple("frozen parameters", lambda: small().requires_grad_(False), lambda: rows(5))
simple("forward hooks that change the output", lambda: hooked(small()), lambda: rows(5))
simple("a tensor subclass for inputs", small, lambda: [Marked(b.double()) for b in rows(5)])
simple(
    "dropout and drop path in evaluation mode",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(5),
)
simple(
    "dropout of nothing in training mode",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.0), nn.Tanh(), nn.Linear(6, 4)),
    lambda: rows(5),
    train=True,
)


class Marked(Tensor):
    """A subclass without behaviour of its own."""


def autocast_off(self: Function, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.inner(x)


def hooked(network: nn.Module) -> nn.Module:
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


HIDING = r"checkpoint|compile|hid|custom function|custom autograd"


class Checkpointed(Function):
    """A network that runs ``run(function, x)`` for each of its two regions; the judge's own copy runs without it."""

    def __init__(self, run: Callable[[Callable, Tensor], Tensor]) -> None:
        super().__init__(lambda self, x: self.run_all(x), zero=nn.Linear(5, 5), **two_layers())
        self.run, self.as_written = run, False

    def run_all(self, x: Tensor) -> Tensor:
        run = (lambda function, x: function(x)) if self.as_written else self.run
        x = run(lambda x: self.one(x.sin()).tanh(), self.zero(x))
        return run(lambda x: self.two(x).sin(), x).exp()


def once(reentrant: bool, **options: Any) -> Callable[[Callable, Tensor], Tensor]:
    return lambda function, x: checkpoint(function, x, use_reentrant=reentrant, **options)


KEPT = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
for _name, _run in {
    "not reentrant": once(False),
    "reentrant": once(True),
    "not reentrant, to the end of each region": once(False, early_stop=False),
    "selective": once(False, context_fn=KEPT),
    "one region within another": lambda function, x: checkpoint(once(True), function, x, use_reentrant=False),
}.items():
    case(f"checkpointing, {_name}")(lambda run=_run: (Checkpointed(run), rows(5)))


@case("torch.compile", vary=False)
def _() -> Made:
    return Function(lambda self, x: compiled(self, x), inner=small(), as_written=False), rows(5)


@case("torch.compile in place", vary=False)
def _() -> Made:
    network = small()
    network.compile(backend="aot_eager")
    return Function(lambda self, x: self.inner(x), inner=network), rows(5)


def compiled(self: Function, x: Tensor) -> Tensor:
    if self.as_written:
        return self.inner(x)
    if "_compiled" not in self.__dict__:
        self.__dict__["_compiled"] = torch.compile(self.inner, backend="aot_eager")
    return self.__dict__["_compiled"](x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(context: Any, g: Tensor) -> Tensor:
        return 2 * g


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, w: Tensor) -> Tensor:
        context.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(context: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = context.saved_tensors
        return g @ w, g.T @ x


@case("an autograd function of its own, without parameters")
def _() -> Made:
    return Function(lambda self, x: self.two(Double.apply(self.one(x)).tanh()), **two_layers()), rows(5)


@case("an autograd function of its own, with a weight")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.two(OwnLinear.apply(x, self.w).tanh())

    return Function(forward, w=parameter(6, 5), two=nn.Linear(6, 4)), rows(5)


@case("an autograd function of its own, and a parameter that is not used", may_refuse=HIDING)
def _() -> Made:
    return Function(lambda self, x: self.two(OwnLinear.apply(x, self.one.weight).tanh()), **two_layers()), rows(5)


@case("straight-through rounding of activations")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.one(x).tanh()
        return self.two(y + (y.mul(4).round().div(4) - y).detach())

    return Function(forward, **two_layers()), rows(5)


# ---------------------------------------------------------------------------------------------------------------------
# Couplings that the graph shows.

COUPLINGS = {
    "the mean of the batch's activations is taken away": lambda self, x: self.two(centred(self.one(x)).tanh()),
    "a softmax over the batch": lambda self, x: self.two(self.one(x).softmax(0)),
    "a cumulated sum over the batch": lambda self, x: self.two(self.one(x).tanh().cumsum(0)),
    "attention over the batch": lambda self, x: self.two((self.one(x) @ self.one(x).T).softmax(1) @ self.one(x)),
    "similarities within the batch, as in contrastive losses": lambda self, x: (
        F.normalize(self.one(x)) @ F.normalize(self.one(x)).T
    ).flatten(1)[:, :2],
    "neighbours are mixed": lambda self, x: self.two((self.one(x) + self.one(x).roll(1, 0)).tanh()),
    "the batch is reversed": lambda self, x: self.two((self.one(x) * self.one(x).flip(0)).tanh()),
    "the largest of the batch divides": lambda self, x: self.two(self.one(x) / self.one(x).abs().max()),
    "the largest of each feature divides": lambda self, x: self.two(self.one(x) / self.one(x).abs().amax(0)),
    "the variance of the batch divides": lambda self, x: self.two(self.one(x) / (self.one(x).std(0) + 1)),
    "the norm of the batch divides": lambda self, x: self.two(self.one(x) / self.one(x).norm()),
    "the examples are sorted by an activation": lambda self, x: self.two(self.one(x).sort(0).values.tanh()),
    "mixup of activations": lambda self, x: self.two(0.7 * self.one(x) + 0.3 * self.one(x)[[*range(1, len(x)), 0]]),
    "the first example is added to all": lambda self, x: self.two((self.one(x) + self.one(x)[:1]).tanh()),
    "the outer product of examples": lambda self, x: self.two((self.one(x)[:, None] * self.one(x)[None]).sum(1)),
    "an LSTM along the batch": lambda self, x: self.two(self.lstm(self.one(x)[:, None])[0][:, 0]),
    "a convolution along the batch": lambda self, x: self.two(self.conv(self.one(x).T[None])[0].T.tanh()),
    "tokens and examples exchanged by a view": lambda self, x: self.two(
        self.one(x).view(6, -1).softmax(0).view(len(x), 6)
    ),
    "layer norm over the batch": lambda self, x: self.two(F.layer_norm(self.one(x).T, (len(x),)).T),
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


for _name, _function in COUPLINGS.items():
    coupled(f"coupled: {_name}", "the output of an example depends on others")(
        lambda function=_function: (
            Function(function, **two_layers(), lstm=nn.LSTM(6, 6), conv=nn.Conv1d(6, 6, 3, padding=1)),
            rows(5, counts=(4, 3)),
        )
    )
for _name in (
    "the mean of the batch's activations is taken away", "a softmax over the batch", "the largest of the batch divides",
):  # fmt: skip
    coupled(f"coupled from the second batch: {_name}", "the output of an example depends on others")(
        lambda function=COUPLINGS[_name]: (Function(function, **two_layers()), rows(5, counts=(1, 3)))
    )


@coupled("coupled: a tail that only the second batch has", "the second batch's examples are mixed")
def _() -> Made:
    def forward(self: Function, x: Tensor, flag: Tensor) -> Tensor:
        y = self.one(x)
        return self.two((centred(y) if bool(flag.all()) else y).tanh())

    return Function(forward, **two_layers()), [(torch.randn(3, 5), torch.zeros(3)), (torch.randn(3, 5), torch.ones(3))]


@coupled("coupled: experts of limited capacity, filled by the batch", "a token is dropped where others came before it")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.one(x)
        score = y[:, 0].softmax(0)
        return self.two(y.tanh() * (score > score.median())[:, None] * score[:, None])

    return Function(forward, **two_layers()), rows(5, counts=(4, 4))


# ... and those that it does not show.

DETACHED = {
    "the batch's own statistics": lambda self, x: self.two((self.one(x) - self.one(x).mean(0).detach()).tanh()),
    "the batch's variance": lambda self, x: self.two(self.one(x) / (self.one(x).std(0, correction=0).detach() + 1)),
    "the batch's largest value": lambda self, x: self.two(self.one(x) / self.one(x).detach().abs().max()),
    "the batch's largest input": lambda self, x: self.two(self.one(x / x.abs().max())),
    "the mean of the inputs": lambda self, x: self.two(self.one(x - x.mean(0)).tanh()),
    "ranks within the batch": lambda self, x: self.two((self.one(x) * x[:, :1].argsort(0).argsort(0)).tanh()),
    "a depth chosen from the batch": lambda self, x: self.two(
        functools.reduce(lambda y, _: self.again(y).tanh(), range(1 + int(x.sum() > 0)), self.one(x))
    ),
    "the number of examples": lambda self, x: self.two(self.one(x).tanh() * len(x)),
}
# The first of each pair couples at once; the other starts with one example, or with a batch that shows nothing.
for _name, _function in DETACHED.items():
    for _start in (False, True):
        hidden(
            f"coupled without a trace: {_name}{', after a first batch of one' if _start else ''}",
            "the output of an example depends on others",
        )(
            lambda function=_function, start=_start: (
                Function(function, **two_layers(), again=nn.Linear(6, 6)),
                [torch.randn(n, 5) - (0.5 if n == 1 else -0.1) for n in ((1, 4, 3) if start else (4, 3))],
            )
        )


@hidden("coupled without a trace: a depth chosen from the second batch", "the depth depends on others")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.one(x)
        for _ in range(2 if x.abs().max() > 10 else 1):
            y = self.again(y).tanh()
        return self.two(y)

    batches = [torch.rand(3, 5), torch.rand(3, 5)]
    batches[1][2] = 20.0  # the others are deeper for its sake
    return Function(forward, **two_layers(), again=nn.Linear(6, 6)), batches


@hidden("coupled without a trace: detached statistics from the second batch", "statistics are those of the batch")
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two((y - y.mean(0).detach() if len(x) > 3 else y).tanh())

    return Function(forward, **two_layers()), rows(5, counts=(3, 4, 3))


# Random networks.

RANDOM_NETWORKS = {
    "dropout": lambda p: nn.Dropout(p),
    "alpha dropout": lambda p: nn.AlphaDropout(p),
    "feature dropout": lambda p: nn.FeatureAlphaDropout(p),
    "channel dropout": lambda p: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Dropout1d(p), nn.Flatten()),
    "randomised leaky relu": lambda p: nn.RReLU(0.1, 0.1 + p),
}
for _name, _layer in RANDOM_NETWORKS.items():
    for _p in (0.01, 0.1):
        for _draw in range(2 if _name == "dropout" else 1):
            case(
                f"{_name} in training mode, {_p}{', again' if _draw else ''}",
                "the network is random",
                message=RANDOM,
                train=True,
            )(
                lambda layer=_layer, p=_p: (
                    nn.Sequential(nn.Linear(5, 6), layer(p), nn.Tanh(), nn.Linear(6, 4)),
                    rows(5, counts=(3, 2)),
                )
            )


class DropPath(nn.Module):
    """Leaves out a branch for some examples in training mode, as in timm."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.branch = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x).tanh()
        if self.training:
            keep = torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(1 - self.p) / (1 - self.p)
            y = y * keep
        return x + y


for _p in (0.01, 0.1, 0.5):
    case(f"drop path in training mode, {_p}", "the network is random", message=RANDOM, train=True, ways=("fisher",))(
        lambda p=_p: (nn.Sequential(nn.Linear(5, 6), DropPath(p), nn.Linear(6, 4)), rows(5, counts=(64,) * 8))
    )


@case("dropout by the functional form, 0.01", "the network is random", message=RANDOM, ways=("fisher",))
def _() -> Made:
    return Function(
        lambda self, x: self.two(F.dropout(self.one(x), 0.01, training=True).tanh()),
        one=nn.Linear(5, 200),
        two=nn.Linear(200, 4),
    ), rows(5)


@case("dropout by the functional form, 0.1", "the network is random", message=RANDOM, ways=("fisher",))
def _() -> Made:
    return Function(lambda self, x: self.two(F.dropout(self.one(x), 0.1, training=True).tanh()), **two_layers()), rows(
        5
    )


@case("noise on activations", "the network is random", message=RANDOM, ways=("fisher",))
def _() -> Made:
    return Function(
        lambda self, x: self.two((self.one(x) + torch.randn(len(x), 6).to(x)).tanh()), **two_layers()
    ), rows(5)


@case("dropout in attention, in training mode", "the network is random", message=RANDOM, train=True)
def _() -> Made:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, -1])

    attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    return Function(forward, attention=attention, head=nn.Linear(8, 4)), rows(4, 8)


@case("dropout in a transformer encoder, in training mode", "the network is random", message=RANDOM, train=True)
def _() -> Made:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(32, 4)), rows(4, 8)


@case("dropout in an LSTM, in training mode", "the network is random", message=RANDOM, train=True)
def _() -> Made:
    return nn.Sequential(Last(nn.LSTM(5, 6, 2, dropout=0.1, batch_first=True)), nn.Linear(6, 4)), rows(3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Odds and ends.


@case(
    "logits [N, T, C] with labels [N]",
    "tokens need a label each",
    message="label",
    ways=("fisher",),
    labels=lambda n: torch.arange(n) % 4,
)
def _() -> Made:
    return small(), rows(3, 5, counts=(2, 4))


@case(
    "logits [N, T, C] with labels [N], as many tokens as examples",
    "tokens need a label each",
    message="label",
    ways=("fisher",),
    labels=lambda n: torch.arange(n) % 4,
)
def _() -> Made:
    return small(), rows(3, 5, counts=(3, 3))


@case("a grouped product, one group an example", double=False, tolerance=1e-3)
def _() -> Made:
    def forward(self: Function, x: Tensor, chosen: Tensor) -> Tensor:
        n, t, _ = x.shape
        ends = torch.arange(t, n * t + 1, t, dtype=torch.int32)
        y = F.grouped_mm(self.one(x).flatten(0, 1), self.experts[chosen], offs=ends)
        return self.two(y.tanh().view(n, t, -1).sum(1))

    network = Function(forward, one=nn.Linear(8, 8), experts=parameter(3, 8, 8), two=nn.Linear(8, 4))
    return network, [(torch.randn(n, 4, 8), torch.arange(n) % 3) for n in (3, 2)]


@case("a grouped product, one group an expert", double=False, tolerance=1e-3)
def _() -> Made:
    def forward(self: Function, x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=3).cumsum(0).int()
        y = F.grouped_mm(self.one(x).flatten(0, 1)[order], self.experts, offs=ends)
        return self.two(y[order.argsort()].tanh().view(len(x), x.shape[1], -1).sum(1))

    network = Function(forward, one=nn.Linear(8, 8), experts=parameter(3, 8, 8), two=nn.Linear(8, 4))
    return network, [(torch.randn(2, 4, 8), torch.randint(0, 3, (2, 4))) for _ in range(3)]


def one_process() -> None:
    """A group of this process alone, which wrappers for several processes ask for."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


@case("FSDP1", "its parameters are flattened together", message=r"FSDP1", vary=False, double=False)
def _() -> Made:
    from torch.distributed.fsdp import FullyShardedDataParallel

    one_process()
    return FullyShardedDataParallel(small(), device_id=torch.device("cpu")), rows(5)
