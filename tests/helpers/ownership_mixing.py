"""Pieces that mix the tokens of an example: mixers, convolutions, windows, and norms over more than a token."""

from __future__ import annotations

import torch
from ownership_pieces import WIDTH, Made, linear, parameter, piece
from torch import Tensor, nn
from torch.nn import functional as F

# ---- mixing over tokens


@piece("mixer", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.Linear(t, t))


@piece("mixer/sequence_last_by_einsum", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: torch.einsum("st,ntd->nsd", m.w, x), w=parameter(t, t))


@piece("state_space_scan")
def _(rng, t):
    def run(m, x, b):
        state, y = torch.zeros_like(x[:, 0]), []
        for u in m.f(x).unbind(1):
            state = 0.5 * state + u * m.decay
            y.append(state)
        return torch.stack(y, 1)

    return Made(run, f=linear(), decay=parameter(WIDTH))


# ---- convolutions


def frames(x: Tensor) -> Tensor:
    """Tokens as small images [N, T, 2, 2, 2]."""
    return x.unflatten(2, (2, 2, 2))


@piece("frames/examples_outer")
def _(rng, t):
    return Made(
        lambda m, x, b: m.f(frames(x).flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2]),
        f=nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)),
    )


@piece("frames/tokens_outer")
def _(rng, t):
    def run(m, x, b):
        y = m.f(frames(x).transpose(0, 1).flatten(0, 1)).flatten(1)
        return y.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    norm = rng.choice([nn.Identity(), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True)])
    return Made(run, f=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), norm))


@piece("conv3d")
def _(rng, t):
    f = nn.Conv3d(2, 2, (rng.choice([1, 3]), 1, 1), padding="same")
    return Made(lambda m, x, b: m.f(frames(x).transpose(1, 2)).transpose(1, 2).flatten(2), f=f)


@piece("conv1d")
def _(rng, t):
    f = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=rng.choice([1, 2, WIDTH]))
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=f)


@piece("conv1d/causal_sequence_first")
def _(rng, t):
    f = nn.Conv1d(WIDTH, WIDTH, 2)
    return Made(lambda m, x, b: m.f(F.pad(x.transpose(0, 1).permute(1, 2, 0), (1, 0))).permute(0, 2, 1), f=f)


@piece("conv1d/over_features")
def _(rng, t):
    f = nn.Conv1d(1, 1, 3, padding=1)
    return Made(lambda m, x, b: m.f(x.reshape(-1, 1, WIDTH)).view_as(x), f=f)


@piece("conv1d/transposed")
def _(rng, t):
    f = nn.ConvTranspose1d(WIDTH, WIDTH, 2, stride=2)
    return Made(lambda m, x, b: m.f(x.transpose(1, 2))[..., ::2].transpose(1, 2), f=f)


@piece("conv2d/tokens_by_features")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x[:, None]).squeeze(1), f=nn.Conv2d(1, 1, 3, padding=1))


@piece("windows/unfold")
def _(rng, t):
    def run(m, x, b):
        return m.f(F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2))

    return Made(run, f=nn.Linear(3 * WIDTH, WIDTH))


@piece("windows/as_strided")
def _(rng, t):
    def run(m, x, b):
        n, t = x.shape[:2]
        x = F.pad(x, (0, 0, 0, 1)).contiguous()
        return m.f(x.as_strided((n, t, 2 * WIDTH), ((t + 1) * WIDTH, WIDTH, 1)))

    return Made(run, f=nn.Linear(2 * WIDTH, WIDTH))


# ---- norms over more than a token


@piece("batch_norm/flat")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.flatten(0, 1)).view_as(x), f=nn.BatchNorm1d(WIDTH))


@piece("batch_norm/flat_sequence_first")
def _(rng, t):
    def run(m, x, b):
        return m.f(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)

    return Made(run, f=nn.BatchNorm1d(WIDTH))


@piece("batch_norm/over_tokens")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.BatchNorm1d(WIDTH))


@piece("group_norm/flat_sequence_first")
def _(rng, t):
    def run(m, x, b):
        return m.f(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)

    return Made(run, f=nn.GroupNorm(2, WIDTH))


@piece("group_norm/over_tokens")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.GroupNorm(2, WIDTH))


@piece("instance_norm", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.InstanceNorm1d(WIDTH, affine=True))


@piece("layer_norm/over_all_tokens", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x), f=nn.LayerNorm((t, WIDTH)))
