"""Pieces of sequence networks, each from tokens [N, T, WIDTH] to tokens of the same shape, and read-outs.

A piece is *sound*: its output for an example does not depend on the other examples of the batch. The pieces differ in
how they move examples about (orders of axes, ragged tokens, routing, loops).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8
HEADS = 2
LONGEST = 8  # the largest number of tokens of an example
WORDS = 8  # the size of the vocabulary; the last word ends a sequence


class Made(nn.Module):
    """A function of tokens and their batch, with its layers and parameters as attributes."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor, batch: Any) -> Tensor:
        return self.run(self, x, batch)


@dataclass(frozen=True)
class Piece:
    """How to make a piece, and its traits."""

    make: Callable[[random.Random, int], nn.Module]  # from a generator and the number of tokens
    exact_only: bool = False  # the piece uses a parameter in a way that unsupported="error" may refuse
    fixed: bool = False  # all batches of the network must have the number of tokens that ``make`` got
    images: bool = False  # the piece maps images [N, WIDTH, H, W] to such images
    entangled: bool = False  # only a mask keeps examples apart in one node, so that every mode may refuse the piece


PIECES: dict[str, Piece] = {}
POOLINGS: dict[str, Piece] = {}


def piece(name: str, table: dict[str, Piece] = PIECES, **traits: bool) -> Callable:
    def decorate(make: Callable) -> Callable:
        assert name not in table, name
        table[name] = Piece(make, **traits)
        return make

    return decorate


def pooling(name: str, **traits: bool) -> Callable:
    return piece(name, POOLINGS, **traits)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias)


def heads(t: Tensor) -> Tensor:
    """Divide [..., WIDTH] into [..., HEADS, rest]."""
    return t.unflatten(-1, (HEADS, -1))


# Orders of axes. Each is a pair of maps: from [N, T, ...] to the tensor that a layer sees, and back, given N and T.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int, int], Tensor]]] = {
    "batch_first": (lambda x: x, lambda y, n, t: y),
    "sequence_first": (lambda x: x.transpose(0, 1), lambda y, n, t: y.transpose(0, 1)),
    "copied_sequence_first": (lambda x: x.transpose(0, 1).contiguous(), lambda y, n, t: y.transpose(0, 1)),
    "flat": (lambda x: x.flatten(0, 1), lambda y, n, t: y.unflatten(0, (n, t))),
    "flat_sequence_first": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, n, t: y.unflatten(0, (t, n)).transpose(0, 1),
    ),
    # The rows are read as if the tokens came first. No examples are coupled as long as each row is treated alone.
    "misread": (lambda x: x.reshape(x.shape[1], x.shape[0], *x.shape[2:]), lambda y, n, t: y.reshape(n, t, -1)),
    "four_axes": (lambda x: x[:, None].expand(-1, 2, -1, -1), lambda y, n, t: y.select(1, 1)),
    "flipped": (lambda x: x.flip(0), lambda y, n, t: y.flip(0)),
    "rolled_rows": (lambda x: x.flatten(0, 1).roll(3, 0), lambda y, n, t: y.roll(-3, 0).unflatten(0, (n, t))),
    "twice_outer": (
        lambda x: torch.cat([x, x.sin()]),
        lambda y, n, t: torch.add(*y.chunk(2)),
    ),
    "twice_inner": (
        lambda x: torch.stack([x, x.sin()], 1).flatten(0, 1),
        lambda y, n, t: y.unflatten(0, (n, 2)).sum(1),
    ),
}


def _tokenwise(name: str, layout: str) -> Callable[[random.Random, int], nn.Module]:
    make = TOKENWISE[name]
    to, back = LAYOUTS[layout]

    def made(rng: random.Random, t: int) -> nn.Module:
        return Made(lambda m, x, b: back(m.body(to(x)), *x.shape[:2]), body=make(rng))

    return made


class Own(nn.Module):
    """A function of one tensor, with its parameters and layers."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def own_norm(m: Own, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * m.weight + m.bias


def twice(m: Own, x: Tensor) -> Tensor:
    return m.f(m.f(x).tanh())


# Layers that treat each token alone, and so work with tokens in any order.
TOKENWISE: dict[str, Callable[[random.Random], nn.Module]] = {
    "linear": lambda rng: linear(rng.random() < 0.7),
    "matrix": lambda rng: Own(lambda m, x: x @ m.w, w=parameter(WIDTH, WIDTH)),
    "einsum": lambda rng: Own(lambda m, x: torch.einsum("...d,de->...e", x, m.w), w=parameter(WIDTH, WIDTH)),
    "tensordot": lambda rng: Own(lambda m, x: torch.tensordot(x, m.w, ([-1], [1])), w=parameter(WIDTH, WIDTH)),
    "left_matrix": lambda rng: Own(lambda m, x: (m.w @ x.mT).mT, w=parameter(WIDTH, WIDTH)),
    "by_heads": lambda rng: Own(
        lambda m, x: torch.einsum("...hd,hde->...he", heads(x), m.w).flatten(-2),
        w=parameter(HEADS, WIDTH // HEADS, WIDTH // HEADS),
    ),
    "linear_by_heads": lambda rng: Own(
        lambda m, x: m.f(heads(x).transpose(-2, -3)).transpose(-2, -3).flatten(-2),
        f=nn.Linear(WIDTH // HEADS, WIDTH // HEADS),
    ),
    "glu": lambda rng: Own(lambda m, x: F.glu(m.f(x)), f=nn.Linear(WIDTH, 2 * WIDTH)),
    "layer_norm": lambda rng: nn.LayerNorm(WIDTH),
    "rms_norm": lambda rng: nn.RMSNorm(WIDTH),
    "own_norm": lambda rng: Own(own_norm, weight=parameter(WIDTH), bias=parameter(WIDTH)),
    "scale_and_shift": lambda rng: Own(
        lambda m, x: x * m.scale + m.shift, scale=parameter(WIDTH), shift=parameter(WIDTH)
    ),
    "twice": lambda rng: Own(twice, f=linear()),
}
for _name in TOKENWISE:
    for _layout in LAYOUTS:
        # Where rows are read in the wrong order, examples may not lie along an axis, and need plain autograd.
        PIECES[f"{_name}@{_layout}"] = Piece(_tokenwise(_name, _layout), exact_only=_layout == "misread")


# ---- attention


def padded(b: Any) -> Tensor:
    """A mask [N, 1, 1, T] that is true for tokens that may be attended to."""
    return b.mask[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of queries, keys and values [N, H, T, E], written out."""
    scores = (q @ k.mT) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _encoder_layer(rng: random.Random, batch_first: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 12, 0.0, rng.choice(["relu", "gelu"]), batch_first=batch_first, norm_first=rng.random() < 0.5
    )


@piece("encoder_layer/batch_first")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x, src_key_padding_mask=~b.mask), f=_encoder_layer(rng, True))


@piece("encoder_layer/sequence_first")
def _(rng, t):
    return Made(
        lambda m, x, b: m.f(x.transpose(0, 1), src_key_padding_mask=~b.mask).transpose(0, 1),
        f=_encoder_layer(rng, False),
    )


@piece("encoder/sequence_first")
def _(rng, t):
    f = nn.TransformerEncoder(_encoder_layer(rng, False), 2, enable_nested_tensor=False)
    return Made(lambda m, x, b: m.f(x.transpose(0, 1), src_key_padding_mask=~b.mask).transpose(0, 1), f=f)


@piece("decoder_layer")
def _(rng, t):
    f = nn.TransformerDecoderLayer(WIDTH, HEADS, 12, 0.0, batch_first=rng.random() < 0.5)

    def run(m, x, b):
        memory = x.sin()
        if not m.f.self_attn.batch_first:
            y = m.f(x.transpose(0, 1), memory.transpose(0, 1), memory_key_padding_mask=~b.mask)
            return y.transpose(0, 1)
        return m.f(x, memory, memory_key_padding_mask=~b.mask)

    return Made(run, f=f)


@piece("multihead/batch_first")
def _(rng, t):
    f = nn.MultiheadAttention(WIDTH, HEADS, bias=rng.random() < 0.5, batch_first=True)
    weights = rng.random() < 0.5
    return Made(lambda m, x, b: m.f(x, x, x, key_padding_mask=~b.mask, need_weights=weights)[0], f=f)


@piece("multihead/sequence_first")
def _(rng, t):
    weights = rng.random() < 0.5

    def run(m, x, b):
        y = x.transpose(0, 1)
        return m.f(y, y, y, key_padding_mask=~b.mask, need_weights=weights)[0].transpose(0, 1)

    return Made(run, f=nn.MultiheadAttention(WIDTH, HEADS))


@piece("multihead/other_keys")
def _(rng, t):
    f = nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=4, batch_first=True, add_bias_kv=rng.random() < 0.5)
    return Made(lambda m, x, b: m.f(x, x[..., :4], x[..., 4:])[0], f=f)


@piece("attention/scaled_dot_product")
def _(rng, t):
    causal = rng.random() < 0.5

    def run(m, x, b):
        q, k, v = heads(m.qkv(x).unflatten(-1, (3, WIDTH))).permute(2, 0, 3, 1, 4)
        kwargs = {"is_causal": True} if causal else {"attn_mask": padded(b)}
        return m.out(F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(2))

    return Made(run, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=linear())


@piece("attention/heads_before_parts")
def _(rng, t):
    def run(m, x, b):
        q, k, v = m.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
        return m.out(attend(q, k, v, padded(b)).transpose(1, 2).flatten(2))

    return Made(run, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=linear())


@piece("attention/einsum")
def _(rng, t):
    def run(m, x, b):
        q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
        scores = torch.einsum("nthe,nshe->nhts", q, k).masked_fill(~padded(b), -torch.inf)
        return torch.einsum("nhts,nshe->nthe", scores.softmax(-1), v).flatten(2)

    return Made(run, q=linear(), k=linear(), v=linear())


@piece("attention/einsum_sequence_first")
def _(rng, t):
    def run(m, x, b):
        x = x.transpose(0, 1)
        q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
        scores = torch.einsum("ibnd,jbnd->ijbn", q, k).masked_fill(~b.mask.T[None, :, :, None], -torch.inf)
        return torch.einsum("ijbn,jbnd->ibnd", scores.softmax(1), v).flatten(2).transpose(0, 1)

    return Made(run, q=linear(), k=linear(False), v=linear())


@piece("attention/bmm_sequence_first")
def _(rng, t):
    def run(m, x, b):
        n, t = x.shape[:2]
        x = x.transpose(0, 1)
        q, k, v = (f(x).contiguous().view(t, n * HEADS, -1).transpose(0, 1) for f in (m.q, m.k, m.v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(n, HEADS, t, t).masked_fill(~padded(b), -torch.inf)
        y = torch.bmm(scores.view(n * HEADS, t, t).softmax(-1), v)
        return m.out(y.transpose(0, 1).contiguous().view(t, n, WIDTH)).transpose(0, 1)

    return Made(run, q=linear(), k=linear(), v=linear(), out=linear())


@piece("attention/heads_outermost")
def _(rng, t):
    def run(m, x, b):
        n = len(x)
        q, k, v = (torch.cat(f(x).split(WIDTH // HEADS, 2), 0) for f in (m.q, m.k, m.v))
        scores = (q @ k.mT).masked_fill(~b.mask.repeat(HEADS, 1)[:, None], -torch.inf)
        return torch.cat((scores.softmax(-1) @ v).split(n, 0), 2)

    return Made(run, q=linear(), k=linear(), v=linear())


@piece("attention/projected_by_einsum")
def _(rng, t):
    def run(m, x, b):
        q, k, v = (torch.einsum("ntd,dhe->hnte", x, w) for w in (m.q, m.k, m.v))
        y = attend(q, k, v, b.mask[None, :, None, :])
        return torch.einsum("hnte,hed->ntd", y, m.out)

    shape = (WIDTH, HEADS, WIDTH // HEADS)
    return Made(run, q=parameter(*shape), k=parameter(*shape), v=parameter(*shape), out=parameter(*shape[1:], WIDTH))


@piece("attention/learned_queries")
def _(rng, t):
    def run(m, x, b):
        q = m.queries.expand(len(x), -1, -1) if m.expanded else m.queries
        scores = (q @ m.k(x).mT).masked_fill(~b.mask[:, None], -torch.inf)
        latents = scores.softmax(-1) @ m.v(x)  # [N, 3, WIDTH]
        return (x @ latents.mT).softmax(-1) @ latents

    f = Made(run, queries=parameter(3, WIDTH), k=linear(), v=linear())
    f.expanded = rng.random() < 0.5
    return f


@piece("attention/relative_table", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        at = torch.arange(x.shape[1])
        bias = m.table[at[:, None] - at[None] + LONGEST].permute(2, 0, 1)
        scores = torch.einsum("nthe,nshe->nhts", heads(m.q(x)), heads(x)) + bias
        return scores.masked_fill(~padded(b), -torch.inf).softmax(-1).mean(1) @ x

    return Made(run, q=linear(), table=parameter(2 * LONGEST + 1, HEADS))


@piece("attention/relative_network", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        at = torch.arange(x.shape[1])
        table = m.mlp(torch.linspace(-1, 1, 2 * LONGEST + 1, dtype=x.dtype)[:, None])
        scores = x @ m.q(x).mT + table[at[:, None] - at[None] + LONGEST].squeeze(-1)
        return scores.masked_fill(~b.mask[:, None], -torch.inf).softmax(-1) @ x

    return Made(run, q=linear(), mlp=nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))


@piece("attention/linear_kernel")
def _(rng, t):
    def run(m, x, b):
        q, k = m.q(x).exp(), m.k(x).exp() * b.mask[..., None]
        state = torch.einsum("ntd,nte->nde", k, m.v(x))
        return torch.einsum("ntd,nde->nte", q, state) / torch.einsum("ntd,nd->nt", q, k.sum(1))[..., None]

    return Made(run, q=linear(), k=linear(), v=linear())
