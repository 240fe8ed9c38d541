"""Read-outs of sequence networks, from tokens [N, T, WIDTH] to [N, features], and pieces of image networks."""

from __future__ import annotations

import torch
from ownership_pieces import PIECES, POOLINGS, WIDTH, Made, Own, Piece, linear, parameter, piece, pooling
from torch import nn
from torch.nn import functional as F


def _plain(name, run):
    POOLINGS[name] = Piece(lambda rng, t: Made(lambda m, x, b: run(x, b)))


def _by_loop(x, b):
    return torch.stack([e[:k].mean(0) for e, k in zip(x, b.lengths.tolist(), strict=True)])


def _written_by_loop(x, b):
    y = x.new_zeros(len(x), WIDTH)
    for i, k in enumerate(b.lengths.tolist()):
        y[i] = x[i, k - 1]
    return y


def _segments(x, b):
    owner = torch.arange(len(x)).repeat_interleave(b.lengths)
    return x.new_zeros(len(x), WIDTH).index_add(0, owner, x[b.mask].sin())


_plain("last/indexed", lambda x, b: x[torch.arange(len(x)), b.lengths - 1])
_plain("last/sequence_first", lambda x, b: x.transpose(0, 1)[b.lengths - 1, torch.arange(len(x))])
_plain("last/gather", lambda x, b: x.gather(1, (b.lengths - 1)[:, None, None].expand(-1, 1, WIDTH)).squeeze(1))
_plain("last/along", lambda x, b: torch.take_along_dim(x, (b.lengths - 1)[:, None, None], 1)[:, 0])
_plain(
    "last/index_select",
    lambda x, b: x.flatten(0, 1).index_select(0, torch.arange(len(x)) * x.shape[1] + b.lengths - 1),
)
_plain("last/one_hot", lambda x, b: torch.einsum("nt,ntd->nd", F.one_hot(b.lengths - 1, x.shape[1]).to(x), x))
_plain("last/written_by_loop", _written_by_loop)
_plain("end_of_text", lambda x, b: x[torch.arange(len(x)), b.ids.argmax(-1)])
_plain("first", lambda x, b: x[:, 0])
_plain("first/sequence_first", lambda x, b: x.transpose(0, 1)[0])
_plain("final", lambda x, b: x[:, -1])
_plain("mean", lambda x, b: x.mean(1))
_plain("mean/masked", lambda x, b: (x * b.mask[..., None]).sum(1) / b.lengths[:, None])
_plain("mean/by_loop", _by_loop)
_plain("mean/product", lambda x, b: torch.bmm(b.mask[:, None].to(x), x).squeeze(1) / x.shape[1])
_plain("max", lambda x, b: x.max(1).values)
_plain("max/masked", lambda x, b: x.masked_fill(~b.mask[..., None], -torch.inf).amax(1))
_plain("max/pooled", lambda x, b: F.adaptive_max_pool1d(x.transpose(1, 2), 1).squeeze(-1))
_plain("logsumexp", lambda x, b: x.logsumexp(1))
_plain("segments", _segments)
_plain("best", lambda x, b: x.gather(1, x.sum(-1).argmax(1)[:, None, None].expand(-1, 1, WIDTH)).flatten(1))


@pooling("flattened", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.flatten(1)), f=nn.Linear(t * WIDTH, WIDTH))


@pooling("flattened/sequence_first", fixed=True)
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.permute(1, 2, 0).flatten(0, 1).T), f=nn.Linear(t * WIDTH, WIDTH))


@pooling("attention")
def _(rng, t):
    def run(m, x, b):
        scores = m.f(x).squeeze(-1).masked_fill(~b.mask, -torch.inf)
        return torch.einsum("nt,ntd->nd", scores.softmax(1), x)

    return Made(run, f=nn.Linear(WIDTH, 1))


@pooling("class_token")
def _(rng, t):
    def run(m, x, b):
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1)
        return m.f(x, x, x, need_weights=False)[0][:, 0]

    return Made(run, token=parameter(1, 1, WIDTH), f=nn.MultiheadAttention(WIDTH, 2, batch_first=True))


@pooling("class_token/sequence_first")
def _(rng, t):
    def run(m, x, b):
        x = torch.cat([m.token.repeat(1, len(x), 1), x.transpose(0, 1)])
        return m.f(x[:1], x, x, need_weights=False)[0][0]

    return Made(run, token=parameter(1, 1, WIDTH), f=nn.MultiheadAttention(WIDTH, 2))


@pooling("hidden_state")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(0, 1))[1][-1], f=nn.GRU(WIDTH, WIDTH))


@pooling("two_views")
def _(rng, t):
    def run(m, x, b):
        both = m.f(torch.cat([x[:, 0], x.mean(1)]))
        return (both[: len(x)] - both[len(x) :]).abs()

    return Made(run, f=linear())


# ---- images [N, WIDTH, H, W]


def image(name, **traits):
    return piece(f"image/{name}", images=True, **traits)


def _layer(name, make):
    PIECES[f"image/{name}"] = Piece(lambda rng, t: Made(lambda m, x, b: m.f(x), f=make(rng)), images=True)


def of(run, **parts):
    return lambda rng: Own(run, **{name: make() for name, make in parts.items()})


def partition(x):
    """Divide images into windows of 2x2 pixels, [N * windows, 4, WIDTH]."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)


def reverse(windows, n, h, w):
    return windows.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


def shifted_windows(m, x):
    y = partition(x.roll((-1, -1), (2, 3)))
    y = m.f(y, y, y, need_weights=False)[0]
    return reverse(y, len(x), *x.shape[2:]).roll((1, 1), (2, 3))


def windows_outer(m, x):
    """One window after the other, each with the pixels of all examples."""
    n, c, h, w = x.shape
    y = x.view(n, c, h // 2, 2, w // 2, 2).permute(2, 4, 0, 3, 5, 1).reshape(-1, c)
    y = m.f(y).view(h // 2, w // 2, n, 2, 2, c)
    return y.permute(2, 5, 0, 3, 1, 4).reshape(n, c, h, w)


def along_rows(m, x):
    n, c, h, w = x.shape
    return m.f(x.permute(0, 2, 1, 3).reshape(n * h, c, w)).view(n, h, c, w).permute(0, 2, 1, 3)


def along_columns_outer(m, x):
    n, c, h, w = x.shape
    return m.f(x.permute(3, 0, 1, 2).reshape(w * n, c, h)).view(w, n, c, h).permute(1, 2, 3, 0)


def patches_unfold(m, x):
    y = m.f(F.unfold(x, 2, stride=2).transpose(1, 2))
    return F.fold(y.transpose(1, 2), x.shape[2:], 2, stride=2)


def patches_rearranged(m, x):
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
    y = m.f(y).reshape(n, h // 2, w // 2, c, 2, 2)
    return y.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def patches_by_views(m, x):
    y = m.f(x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4))
    return F.interpolate(y.mean(-1), x.shape[2:])


def overlapping(m, x):
    return m.f(F.unfold(x, 3, padding=1).mT).mT.view_as(x)


def excited(m, x):
    return x * m.f(x.mean((2, 3), keepdim=True)).sigmoid()


def quadrants(m, x):
    """Halves of images as images of a larger batch: first all upper halves, then all lower halves."""
    return torch.cat(m.f(torch.cat(x.chunk(2, 2))).chunk(2), 2)


def rows_of_examples(m, x):
    n, c, h, w = x.shape
    return m.f(x.permute(2, 0, 3, 1).reshape(h * n, w, c)).view(h, n, w, c).permute(1, 3, 0, 2)


def batch_to_space(m, x):
    """All images side by side in one wide image, which a kernel of one pixel reads."""
    return torch.stack(m.f(torch.cat(list(x), 2)[None])[0].split(x.shape[3], 2))


def conv(kernel=3, **options):
    return nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, **options)


_layer("conv", lambda rng: conv(bias=rng.random() < 0.5))
_layer("pointwise", lambda rng: conv(1))
_layer("grouped", lambda rng: conv(groups=rng.choice([2, WIDTH])))
_layer("strided_and_up", lambda rng: nn.Sequential(conv(stride=2), nn.Upsample(scale_factor=2)))
_layer("transposed", lambda rng: nn.Sequential(conv(stride=2), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)))
_layer(
    "shuffle",
    lambda rng: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * WIDTH, 4 * WIDTH, 1, groups=4), nn.PixelShuffle(2)),
)
_layer("batch_norm", lambda rng: nn.Sequential(conv(1), nn.BatchNorm2d(WIDTH)))
_layer("group_norm", lambda rng: nn.GroupNorm(2, WIDTH))
_layer("instance_norm", lambda rng: nn.InstanceNorm2d(WIDTH, affine=True))
_layer("channel_norm", of(lambda m, x: m.f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), f=lambda: nn.LayerNorm(WIDTH)))
_layer("layer_scale", of(lambda m, x: x * m.s, s=lambda: parameter(WIDTH, 1, 1)))
_layer("excited", of(excited, f=lambda: conv(1)))
_layer("shifted_windows", of(shifted_windows, f=lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)))
_layer("windows_outer", of(windows_outer, f=linear))
_layer("along_rows", of(along_rows, f=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)))
_layer("along_columns_outer", of(along_columns_outer, f=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)))
_layer("patches_unfold", of(patches_unfold, f=lambda: nn.Linear(4 * WIDTH, 4 * WIDTH)))
_layer("patches_rearranged", of(patches_rearranged, f=lambda: nn.Linear(4 * WIDTH, 4 * WIDTH)))
_layer("patches_by_views", of(patches_by_views, f=lambda: nn.Linear(4, 4)))
_layer("overlapping", of(overlapping, f=lambda: nn.Linear(9 * WIDTH, WIDTH)))
_layer("quadrants", of(quadrants, f=conv))
_layer("rows_of_examples", of(rows_of_examples, f=linear))
_layer("side_by_side", of(batch_to_space, f=lambda: conv(1)))
_layer("pooled_and_up", lambda rng: nn.Sequential(conv(1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)))
_layer("flipped", of(lambda m, x: m.f(x.flip(0).flip(3)).flip(0), f=conv))
_layer("by_example", of(lambda m, x: torch.cat([m.f(e[None]) for e in x]), f=conv))
_layer("mirrored_batch", of(lambda m, x: sum(m.f(torch.cat([x, x.flip(3)])).chunk(2)), f=conv))


@image("open_examples_alone")
def _(rng, t):
    def run(m, x, b):
        y = x.clone()
        y[b.open > 0] = m.f(x[b.open > 0])
        return y

    return Made(run, f=conv())
