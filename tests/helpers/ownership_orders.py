"""Pieces that sort, permute or loop over examples, and pieces that use parameters in unusual ways."""

from __future__ import annotations

import torch
from ownership_pieces import HEADS, WIDTH, Made, linear, parameter, piece
from torch import nn
from torch.nn import functional as F

# ---- orders of examples


@piece("order/by_length")
def _(rng, t):
    def run(m, x, b):
        order = b.lengths.argsort(descending=True, stable=True)
        return m.f(x[order].transpose(0, 1)).transpose(0, 1)[order.argsort()]

    return Made(run, f=linear())


@piece("order/permuted")
def _(rng, t):
    def run(m, x, b):
        order = torch.argsort(torch.sin(7.0 * torch.arange(len(x)) + x.shape[1])).flip(0)
        return torch.zeros_like(x).index_copy(0, order, m.f(x.index_select(0, order)))

    return Made(run, f=linear())


@piece("order/rolled_back")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.roll(1, 0)).roll(-1, 0), f=linear())


@piece("order/loop_and_stack")
def _(rng, t):
    return Made(lambda m, x, b: torch.stack([m.f(e) for e in x]), f=linear())


@piece("order/loop_of_lengths")
def _(rng, t):
    def run(m, x, b):
        return torch.cat(
            [F.pad(m.f(e[:, :k]), (0, 0, 0, x.shape[1] - k)) for e, k in zip(x.split(1), b.lengths, strict=True)]
        )

    return Made(run, f=linear())


@piece("order/reversed_loop")
def _(rng, t):
    return Made(lambda m, x, b: torch.cat([m.f(e) for e in reversed(x.split(1))]).flip(0), f=linear())


@piece("order/small_batches")
def _(rng, t):
    return Made(
        lambda m, x, b: torch.cat([m.f(part.transpose(0, 1)).transpose(0, 1) for part in x.split(2)]), f=linear()
    )


@piece("order/even_and_odd")
def _(rng, t):
    def run(m, x, b):
        y = torch.zeros_like(x)
        y[1::2] = m.f(x[1::2])
        y[::2] = m.f(x[::2])
        return y

    return Made(run, f=linear())


@piece("order/unbind_tokens")
def _(rng, t):
    axis = rng.choice([0, 1, 2])
    return Made(lambda m, x, b: torch.stack([m.f(u) for u in x.unbind(1)], axis).movedim(axis, 1), f=linear())


@piece("order/written_by_example")
def _(rng, t):
    def run(m, x, b):
        y = x.clone()
        for i, k in enumerate(b.lengths.tolist()):
            y[i, :k] = m.f(x[i, :k])
        return y

    return Made(run, f=linear())


@piece("order/added_in_place")
def _(rng, t):
    def run(m, x, b):
        y = x.transpose(0, 1).clone()
        y[::2].add_(m.f(y[::2].clone()))
        y[-1].mul_(2.0)
        return y.transpose(0, 1)

    return Made(run, f=linear())


@piece("order/examples_last")
def _(rng, t):
    return Made(
        lambda m, x, b: torch.einsum("de,etn->dtn", m.w, x.permute(2, 1, 0)).permute(2, 1, 0), w=parameter(WIDTH, WIDTH)
    )


@piece("order/images_of_words")
def _(rng, t):
    """Examples lie along the width of one image; a kernel of one pixel does not mix them."""
    return Made(lambda m, x, b: m.f(x.permute(2, 1, 0)[None])[0].permute(2, 1, 0), f=nn.Conv2d(WIDTH, WIDTH, 1))


@piece("order/reversed_tokens")
def _(rng, t):
    def run(m, x, b):
        at = torch.arange(x.shape[1])
        back = torch.where(at < b.lengths[:, None], b.lengths[:, None] - 1 - at, at)[..., None].expand_as(x)
        return m.f(x.gather(1, back)).gather(1, back)

    return Made(run, f=linear())


# ---- parameters


@piece("parameters/scale_of_heads")
def _(rng, t):
    return Made(
        lambda m, x, b: (x.unflatten(2, (HEADS, -1)).permute(2, 1, 0, 3) * m.w).permute(2, 1, 0, 3).flatten(2),
        w=parameter(HEADS, 1, 1, 1),
    )


@piece("parameters/scale_of_examples_last")
def _(rng, t):
    return Made(
        lambda m, x, b: (x.permute(1, 2, 0) * m.w + m.p).permute(2, 0, 1), w=parameter(WIDTH, 1), p=parameter(1, 1, 1)
    )


@piece("parameters/prelu")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.PReLU(rng.choice([1, WIDTH])))


@piece("parameters/pieces_of_one")
def _(rng, t):
    return Made(
        lambda m, x, b: x @ m.w[:WIDTH] + (x.transpose(0, 1) @ m.w[WIDTH:]).transpose(0, 1),
        w=parameter(2 * WIDTH, WIDTH),
    )


@piece("parameters/concatenated")
def _(rng, t):
    return Made(
        lambda m, x, b: F.linear(x, torch.cat([m.w, m.v])), w=parameter(3, WIDTH), v=parameter(WIDTH - 3, WIDTH)
    )


@piece("parameters/low_rank")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x) + 2 * x @ m.a @ m.b, f=linear(), a=parameter(WIDTH, 2), b=parameter(2, WIDTH))


@piece("parameters/written_by_network")
def _(rng, t):
    return Made(
        lambda m, x, b: torch.bmm(x, m.f(x.mean(1)).unflatten(1, (WIDTH, WIDTH))), f=nn.Linear(WIDTH, WIDTH * WIDTH)
    )


@piece("parameters/weight_norm", exact_only=True)
def _(rng, t):
    return Made(
        lambda m, x, b: m.f(x.transpose(0, 1)).transpose(0, 1), f=nn.utils.parametrizations.weight_norm(linear())
    )


@piece("parameters/standardised", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: F.linear(x, m.w - m.w.mean(1, keepdim=True)), w=parameter(WIDTH, WIDTH))


@piece("parameters/merged_low_rank", exact_only=True)
def _(rng, t):
    return Made(
        lambda m, x, b: F.linear(x, m.w + m.a @ m.b),
        w=parameter(WIDTH, WIDTH),
        a=parameter(WIDTH, 2),
        b=parameter(2, WIDTH),
    )


@piece("parameters/temperature", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: (x * m.w.exp()).sin(), w=nn.Parameter(torch.tensor(0.3)))


@piece("parameters/addcmul", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: torch.addcmul(m.p, x.sin(), m.w), w=parameter(WIDTH), p=parameter(WIDTH))


@piece("parameters/power", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: (x.square() + 0.1) ** m.w, w=parameter(WIDTH))


@piece("parameters/bilinear", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x, x.roll(1, 1)), f=nn.Bilinear(WIDTH, WIDTH, WIDTH))


@piece("parameters/mixed_layers", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        return torch.einsum("k,kntd->ntd", m.w.softmax(0), torch.stack([x, m.f(x), x.sin()]))

    return Made(run, w=parameter(3), f=linear())
