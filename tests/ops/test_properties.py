"""Random small networks of all supported layers against per-example autograd."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import per_example_squares, randomise_norms, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import FisherRecorder
from t2v_fast.ops import planner

CHANNELS = (2, 4, 6)


class Tokens(nn.Module):
    """A block over tokens, applied to the pixels of an image."""

    def __init__(self, body: nn.Module, tokens_first: bool) -> None:
        super().__init__()
        self.body, self.tokens_first = body, tokens_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(*((2, 0, 1) if self.tokens_first else (0, 2, 1)))
        y = self.body(tokens)
        return y.permute(*((1, 2, 0) if self.tokens_first else (0, 2, 1))).unflatten(2, x.shape[2:])


class SelfAttention(nn.Module):
    def __init__(self, width: int, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1 + (width % 2 == 0), batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Gated(nn.Module):
    """Squeeze and excitation, with a scale for each channel and a scale for each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.position = nn.Parameter(torch.randn(1, 1, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        position = F.interpolate(self.position.detach(), x.shape[2:]) if x.shape[2] != 5 else self.position
        return x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid() * self.scale + position


class Residual(nn.Module):
    def __init__(self, body: nn.Module, times: int) -> None:
        super().__init__()
        self.body, self.times = body, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):  # several times, so that the weights are shared
            x = x + self.body(x).tanh()
        return x


@st.composite
def blocks(draw: st.DrawFn, channels: int, depth: int = 0) -> tuple[nn.Module, int]:
    """A block, and its number of output channels."""
    kinds = ["conv", "transposed", "norm", "activation", "attention", "linear", "gated", *["residual"] * (depth < 1)]
    kind = draw(st.sampled_from(kinds))
    out = draw(st.sampled_from(CHANNELS))
    tokens_first = draw(st.booleans())
    bias = draw(st.booleans())
    if kind in ("conv", "transposed"):
        groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0 and out % g == 0]))
        kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) if depth == 0 else 1
        layer = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
        padding = tuple(k // 2 for k in kernel) if kind == "conv" else 0
        return layer(channels, out, kernel, stride, padding, groups=groups, bias=bias), out
    if kind == "norm":
        norm = draw(st.sampled_from(["batch", "group", "instance", "layer", "rms"]))
        made = {
            "batch": lambda: nn.BatchNorm2d(channels),
            "group": lambda: nn.GroupNorm(draw(st.sampled_from([1, channels])), channels),
            "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
            "layer": lambda: Tokens(nn.LayerNorm(channels), tokens_first),
            "rms": lambda: Tokens(nn.RMSNorm(channels), tokens_first),
        }[norm]()
        return made, channels
    if kind == "activation":
        return draw(st.sampled_from([nn.Tanh, lambda: nn.PReLU(channels), lambda: nn.GELU("tanh")]))(), channels
    if kind == "attention":
        return Tokens(SelfAttention(channels, not tokens_first), tokens_first), channels
    if kind == "linear":
        return Tokens(nn.Linear(channels, out, bias), tokens_first), out
    if kind == "gated":
        return Gated(channels), channels
    inner, given_ = draw(blocks(channels, depth + 1))
    return Residual(nn.Sequential(inner, nn.Conv2d(given_, channels, 1)), draw(st.integers(1, 2))), channels


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    parts, channels = [], 3
    for _ in range(draw(st.integers(1, 5))):
        part, channels = draw(blocks(channels))
        parts.append(part)
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return randomise_norms(network).double()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    network=networks(),
    n=st.integers(1, 5),
    cotangents=st.integers(1, 3),
    granularity=st.sampled_from(["filter", "parameter", "tensor"]),
    path=st.sampled_from([None, "explicit", "gram", "winograd"]),
    channels_last=st.booleans(),
)
def test_random_networks(
    network: nn.Module, n: int, cotangents: int, granularity: str, path: str | None, channels_last: bool
) -> None:
    x = torch.randn(n, 3, 5, 6, dtype=torch.float64)
    u = torch.randn(cotangents, n, 3, dtype=torch.float64)
    weights = torch.rand(n, dtype=torch.float64)
    try:
        with torch.no_grad():
            network(x)
    except RuntimeError:  # a kernel larger than the image
        return
    squares = per_example_squares(network, x, u)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with (
        planner.force(path) if path else torch.enable_grad(),
        FisherRecorder(network, granularity=granularity) as recorder,
    ):
        got = recorder.backward(network(x), u, weights if granularity == "parameter" else None)
    scale = sum(float(s.sum()) for s in squares.values())
    for name, s in squares.items():
        want = torch.einsum("n,n...->...", weights, s) if granularity == "parameter" else reduce(s, granularity)
        assert got[name].shape == want.shape, name
        # A gradient that is only rounding error (a bias before a norm) is compared with the size of the whole Fisher.
        assert relative_error(got[name], want) < 1e-9 or float((got[name] - want).norm()) < 1e-24 * scale, name
