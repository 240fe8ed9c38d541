"""Layers from tokens [N, T, WIDTH] to tokens that make examples of a batch interact, or a network random."""

from __future__ import annotations

import random

import numpy as np
import torch
from ownership_pieces import HEADS, WIDTH, Made, linear, parameter
from torch import nn
from torch.nn import functional as F

COUPLINGS = {}  # the graph shows the coupling: a cotangent of one example reaches others
DETACHED = {}  # only the values show the coupling
RANDOM = {}


def _plain(table, name, run):
    table[name] = lambda: Made(lambda m, x, b: run(x, b))


def _layer(table, name, make, run):
    table[name] = lambda: Made(run, f=make())


def _attention_of_all(x, b):
    flat = x.flatten(0, 1)
    return F.scaled_dot_product_attention(flat, flat, flat).view_as(x)


def _neighbours(x, b):
    return x * torch.cat([x[-1:], x[:-1]])


def _similar(x, b):
    pooled = F.normalize(x.mean(1), dim=1)
    return x + (pooled @ pooled.T).logsumexp(1)[:, None, None]


def _memory(x, b):
    scores = torch.einsum("ntd,mtd->nm", x, x)
    return torch.einsum("nm,mtd->ntd", scores.softmax(1), x)


def _written(x, b):
    y = x.clone()
    y[0] = x.mean(0)
    return y


for _name, _run in {
    "batch_mean": lambda x, b: x - x.mean(0, keepdim=True),
    "batch_statistics": lambda x, b: (x - x.mean((0, 1))) / (x.var((0, 1)) + 1e-5).sqrt(),
    "softmax": lambda x, b: x.softmax(0),
    "largest": lambda x, b: x / x.abs().amax(),
    "norm": lambda x, b: x / x.norm(),
    "attention": _attention_of_all,
    "memory": _memory,
    "similarity": _similar,
    "roll": lambda x, b: x + 0.1 * x.roll(1, 0),
    "flip": lambda x, b: x.lerp(x.flip(0), 0.1),
    "sum": lambda x, b: x + x.sum(0),
    "neighbours": _neighbours,
    "misread_sum": lambda x, b: x.reshape(x.shape[1], x.shape[0], -1).cumsum(0).reshape(x.shape),
    "cumsum": lambda x, b: x.cumsum(0),
    "sort": lambda x, b: x.sort(0).values,
    "maximum": lambda x, b: x - x.max(0).values,
    "layer_norm": lambda x, b: F.layer_norm(x.permute(1, 2, 0), (len(x),)).permute(2, 0, 1),
    "straight_through": lambda x, b: x + x.roll(1, 0) - x.roll(1, 0).detach(),
    "written_in_place": _written,
    "late_sum": lambda x, b: x if len(x) < 3 else x + 0.1 * x.sum(0),
}.items():
    _plain(COUPLINGS, _name, _run)


def _training(make, table=COUPLINGS):
    """A layer that stays in training mode in any mode of the network."""

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = make()

        def train(self, mode=True):
            return super().train(True)

        def forward(self, x):
            return self.f(x)

    return Training


_layer(COUPLINGS, "batch_norm", _training(lambda: nn.BatchNorm1d(WIDTH)), lambda m, x, b: m.f(x.transpose(1, 2)).mT)
_layer(COUPLINGS, "wrong_batch_first", lambda: nn.MultiheadAttention(WIDTH, HEADS), lambda m, x, b: m.f(x, x, x)[0])
_layer(COUPLINGS, "recurrent", lambda: nn.GRU(WIDTH, WIDTH), lambda m, x, b: m.f(x)[0])
_layer(
    COUPLINGS,
    "convolution",
    lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    lambda m, x, b: m.f(x.permute(1, 2, 0)).permute(2, 0, 1),
)


def _limited_experts(m, x, b):
    """Experts whose number of tokens is limited by the size of the batch; the first examples are served first."""
    flat = x.flatten(0, 1)
    chosen, y = m.f(flat)[:, :2].argmax(-1), torch.zeros_like(flat)
    for e, expert in enumerate((m.f, torch.sin)):
        at = (chosen == e).nonzero()[: len(flat) // 3, 0]
        y = y.index_copy(0, at, expert(flat[at]))
    return x + y.view_as(x)


def _deeper(m, x, b):
    for _ in range(1 + int(b.lengths.sum()) % 3):
        x = x + m.f(x).tanh()
    return x


def _trimmed(x, b):
    return x + x[:, : int(b.lengths.max())].mean(1, keepdim=True)


for _name, _run in {
    "mean": lambda x, b: x - x.mean(0, keepdim=True).detach(),
    "largest": lambda x, b: x / x.detach().abs().max(),
    "statistics": lambda x, b: (x - x.detach().mean((0, 1))) / (x.detach().var((0, 1)) + 1e-5).sqrt(),
    "median": lambda x, b: x * (x > x.detach().median()),
    "count": lambda x, b: x * len(x),
    "place_in_batch": lambda x, b: x + torch.arange(len(x))[:, None, None] / 7,
    "trimmed": _trimmed,
}.items():
    _plain(DETACHED, _name, _run)
_layer(DETACHED, "limited_experts", linear, _limited_experts)
_layer(DETACHED, "deeper", linear, _deeper)
_layer(DETACHED, "any_example_opens", linear, lambda m, x, b: x + m.f(x) if bool(b.open.any()) else x)


class DropPath(nn.Module):
    """Leaves out whole residual branches, for each example, like timm's DropPath."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.p) / (1 - self.p)


for _p in (0.01, 0.1, 0.5):
    for _kind in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, DropPath):
        _layer(
            RANDOM,
            f"{_kind.__name__.lower()}/{_p}",
            _training(lambda kind=_kind, p=_p: kind(p)),
            lambda m, x, b: x + m.f(x),
        )
    _layer(
        RANDOM,
        f"encoder_layer/{_p}",
        _training(lambda p=_p: nn.TransformerEncoderLayer(WIDTH, HEADS, 8, p, batch_first=True)),
        lambda m, x, b: m.f(x),
    )
    _plain(RANDOM, f"functional_dropout/{_p}", lambda x, b, p=_p: F.dropout(x, p))
    _layer(
        RANDOM,
        f"attention_dropout/{_p}",
        linear,
        lambda m, x, b, p=_p: F.scaled_dot_product_attention(m.f(x), x, x, dropout_p=p),
    )
    _layer(RANDOM, f"skipped_by_torch/{_p}", linear, lambda m, x, b, p=_p: x if torch.rand(()) < p else m.f(x))
_layer(RANDOM, "rrelu", _training(nn.RReLU), lambda m, x, b: m.f(x))
_plain(RANDOM, "noise/torch", lambda x, b: x + 0.01 * torch.randn_like(x))
_plain(RANDOM, "noise/python", lambda x, b: x * random.uniform(0.99, 1.01))
_plain(RANDOM, "noise/numpy", lambda x, b: x * float(np.random.default_rng().uniform(0.99, 1.01)))
RANDOM["scaled_parameter"] = lambda: Made(lambda m, x, b: x + m.p * torch.rand(()), p=parameter(WIDTH))
