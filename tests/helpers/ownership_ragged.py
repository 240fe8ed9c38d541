"""Pieces that pick, drop or route tokens and examples, differently in each batch."""

from __future__ import annotations

import torch
from ownership_pieces import LONGEST, WIDTH, WORDS, Made, linear, parameter, piece
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

# ---- recurrent layers


def _recurrent(rng, batch_first):
    kind = rng.choice([nn.RNN, nn.GRU, nn.LSTM])
    return kind(WIDTH, WIDTH // 2, batch_first=batch_first, bidirectional=True)


@piece("recurrent/batch_first")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x)[0], f=_recurrent(rng, True))


@piece("recurrent/sequence_first")
def _(rng, t):
    return Made(lambda m, x, b: m.f(x.transpose(0, 1))[0].transpose(0, 1), f=_recurrent(rng, False))


@piece("recurrent/packed")
def _(rng, t):
    def run(m, x, b):
        packed = pack_padded_sequence(x, b.lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.f(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    return Made(run, f=_recurrent(rng, True))


@piece("recurrent/packed_sequence_first")
def _(rng, t):
    def run(m, x, b):
        packed = pack_padded_sequence(x.transpose(0, 1), b.lengths, enforce_sorted=False)
        return pad_packed_sequence(m.f(packed)[0], total_length=x.shape[1])[0].transpose(0, 1)

    return Made(run, f=_recurrent(rng, False))


@piece("recurrent/packed_linear")
def _(rng, t):
    def run(m, x, b):
        packed = pack_padded_sequence(x, b.lengths, batch_first=True, enforce_sorted=False)
        y = packed._replace(data=m.f(packed.data))
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]

    return Made(run, f=linear())


@piece("recurrent/cell")
def _(rng, t):
    def run(m, x, b):
        h, y = x.new_zeros(len(x), WIDTH), []
        for u in x.unbind(1):
            h = m.f(u, h)
            y.append(h)
        return torch.stack(y, 1)

    return Made(run, f=nn.GRUCell(WIDTH, WIDTH))


@piece("recurrent/written_in_place")
def _(rng, t):
    def run(m, x, b):
        y = torch.zeros_like(x)
        for i in range(x.shape[1]):
            y[:, i] = m.f(x[:, i]) + m.r(x[:, i - 1] if i else x[:, 0]).tanh()
        return y

    return Made(run, f=linear(), r=linear(False))


# ---- embeddings


@piece("embedding")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(b.ids), f=nn.Embedding(WORDS, WIDTH, rng.choice([None, 0])))


@piece("embedding/sequence_first")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(b.ids.T).transpose(0, 1), f=nn.Embedding(WORDS, WIDTH))


@piece("embedding/tied")
def _(rng, t):
    return Made(
        lambda m, x, b: (x + m.f(b.ids)).tanh() @ m.f.weight.T @ m.back,
        f=nn.Embedding(WORDS, WIDTH),
        back=parameter(WORDS, WIDTH),
    )


@piece("embedding/one_hot")
def _(rng, t):
    return Made(lambda m, x, b: x + F.one_hot(b.ids, WORDS).to(x) @ m.w, w=parameter(WORDS, WIDTH))


@piece("embedding/unpadded")
def _(rng, t):
    def run(m, x, b):
        return x.masked_scatter(b.mask[..., None], x[b.mask] + m.f(b.ids[b.mask]))

    return Made(run, f=nn.Embedding(WORDS, WIDTH))


@piece("embedding/behind_network", exact_only=True)
def _(rng, t):
    return Made(
        lambda m, x, b: x + F.embedding(b.ids, m.f(m.table).tanh()), table=parameter(WORDS, 4), f=nn.Linear(4, WIDTH)
    )


@piece("embedding/indexed", exact_only=True)
def _(rng, t):
    return Made(lambda m, x, b: x + m.table[b.ids], table=parameter(WORDS, WIDTH))


@piece("embedding/index_select", exact_only=True)
def _(rng, t):
    return Made(
        lambda m, x, b: x + m.table.index_select(0, b.ids.T.flatten()).unflatten(0, b.ids.T.shape).transpose(0, 1),
        table=parameter(WORDS, WIDTH),
    )


@piece("embedding/bag", exact_only=True)
def _(rng, t):
    return Made(
        lambda m, x, b: x + m.f(b.ids)[:, None], f=nn.EmbeddingBag(WORDS, WIDTH, mode=rng.choice(["sum", "mean"]))
    )


@piece("positions")
def _(rng, t):
    return Made(lambda m, x, b: x + m.p[: x.shape[1]], p=parameter(LONGEST, WIDTH))


@piece("positions/sequence_first")
def _(rng, t):
    return Made(
        lambda m, x, b: (x.transpose(0, 1) + m.p[: x.shape[1], None]).transpose(0, 1), p=parameter(LONGEST, WIDTH)
    )


@piece("positions/expanded")
def _(rng, t):
    return Made(lambda m, x, b: x + m.p[:, : x.shape[1]].expand(len(x), -1, -1), p=parameter(1, LONGEST, WIDTH))


@piece("positions/repeated")
def _(rng, t):
    return Made(lambda m, x, b: x + m.p[:, : x.shape[1]].repeat(len(x), 1, 1), p=parameter(1, LONGEST, WIDTH))


@piece("positions/embedded")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(torch.arange(x.shape[1])), f=nn.Embedding(LONGEST, WIDTH))


@piece("positions/embedded_sequence_first")
def _(rng, t):
    def run(m, x, b):
        return (x.transpose(0, 1) + m.f(torch.arange(x.shape[1]))[:, None]).transpose(0, 1)

    return Made(run, f=nn.Embedding(LONGEST, WIDTH))


@piece("positions/from_the_end")
def _(rng, t):
    def run(m, x, b):
        return x + m.f((b.lengths[:, None] - torch.arange(x.shape[1])).clamp_min(0))

    return Made(run, f=nn.Embedding(LONGEST + 1, WIDTH))


@piece("prompt")
def _(rng, t):
    def run(m, x, b):
        y = torch.cat([m.p.expand(len(x), -1, -1), x], 1)
        return x + m.f(y)[:, 2:] + m.f(y)[:, :2].mean(1, keepdim=True)

    return Made(run, p=parameter(1, 2, WIDTH), f=linear())


@piece("prompt/sequence_first")
def _(rng, t):
    def run(m, x, b):
        y = m.f(torch.cat([m.p[:, None].expand(-1, len(x), -1), x.transpose(0, 1)]))
        return (y[2:] + y[:2].mean(0)).transpose(0, 1)

    return Made(run, p=parameter(2, WIDTH), f=linear())


@piece("prompt/mask_token", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        return m.f(torch.where(b.mask[..., None], x, m.p))

    return Made(run, p=parameter(WIDTH), f=linear())


@piece("prompt/mask_token_in_place", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        x = x.clone()
        x[b.ids == 3] = m.p
        return m.f(x)

    return Made(run, p=parameter(WIDTH), f=linear())


# ---- gates that are closed for some examples or for whole batches


def opened(b):
    return b.open[:, None, None]


@piece("gate/zero")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(x) * opened(b), f=linear())


@piece("gate/zero_sequence_first")
def _(rng, t):
    return Made(lambda m, x, b: x + (m.f(x.transpose(0, 1)) * b.open[:, None]).transpose(0, 1), f=linear())


@piece("gate/dead_relu")
def _(rng, t):
    return Made(lambda m, x, b: x + F.relu(m.f(x.transpose(0, 1)).transpose(0, 1) - 99 * (1 - opened(b))), f=linear())


@piece("gate/where")
def _(rng, t):
    return Made(lambda m, x, b: torch.where(opened(b) > 0, m.f(x), x), f=linear())


@piece("gate/by_word")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(x) * (b.ids % 2)[..., None], f=linear())


@piece("gate/skipped_layer")
def _(rng, t):
    return Made(lambda m, x, b: x + m.f(x) * opened(b) if bool(b.open.any()) else x, f=linear())


@piece("gate/branch_of_examples")
def _(rng, t):
    return Made(
        lambda m, x, b: torch.stack([m.f(e) if on else m.g(e) for e, on in zip(x, b.open, strict=True)]),
        f=linear(),
        g=linear(),
    )


@piece("gate/open_examples_alone")
def _(rng, t):
    def run(m, x, b):
        at = b.open.nonzero()[:, 0]
        return x.index_copy(0, at, m.f(x[at]))

    return Made(run, f=linear())


@piece("gate/mask")
def _(rng, t):
    return Made(lambda m, x, b: x.sin() + (m.f(x.transpose(0, 1)) * b.mask.T[..., None]).transpose(0, 1), f=linear())


# ---- unpadded tokens


@piece("unpadded/index_put")
def _(rng, t):
    def run(m, x, b):
        y = torch.zeros_like(x)
        y[b.mask] = m.f(x[b.mask])
        return y

    return Made(run, f=rng.choice([linear(), nn.LayerNorm(WIDTH)]))


@piece("unpadded/masked_scatter")
def _(rng, t):
    return Made(lambda m, x, b: x.masked_scatter(b.mask[..., None], m.f(x[b.mask])), f=linear())


@piece("unpadded/index_add")
def _(rng, t):
    def run(m, x, b):
        at = b.mask.flatten().nonzero()[:, 0]
        flat = x.flatten(0, 1)
        return flat.index_add(0, at, m.f(flat[at])).view_as(x)

    return Made(run, f=linear())


@piece("unpadded/scatter")
def _(rng, t):
    def run(m, x, b):
        at = b.mask.flatten().nonzero().expand(-1, WIDTH)
        flat = x.flatten(0, 1)
        return torch.zeros_like(flat).scatter(0, at, m.f(flat.gather(0, at))).view_as(x)

    return Made(run, f=linear())


@piece("unpadded/sequence_first")
def _(rng, t):
    def run(m, x, b):
        y = torch.zeros_like(x.transpose(0, 1))
        y[b.mask.T] = m.f(x.transpose(0, 1)[b.mask.T])
        return y.transpose(0, 1)

    return Made(run, f=linear())


@piece("unpadded/shuffled")
def _(rng, t):
    def run(m, x, b):
        at = b.mask.flatten().nonzero()[:, 0]
        at = at[torch.argsort(torch.sin(13.0 * at))]
        flat = x.flatten(0, 1)
        return flat.index_copy(0, at, m.f(flat[at])).view_as(x)

    return Made(run, f=linear())


@piece("unpadded/split_and_pad")
def _(rng, t):
    def run(m, x, b):
        y = pad_sequence(m.f(x[b.mask]).split(b.lengths.tolist()), batch_first=True)
        return F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))

    return Made(run, f=linear())


@piece("unpadded/cat_of_examples")
def _(rng, t):
    def run(m, x, b):
        y = m.f(torch.cat([e[:k] for e, k in zip(x, b.lengths.tolist(), strict=True)]))
        out = torch.zeros_like(x)
        start = 0
        for i, k in enumerate(b.lengths.tolist()):
            out[i, :k] = y[start : start + k]
            start += k
        return out

    return Made(run, f=linear())


@piece("unpadded/attention_of_segments", entangled=True)
def _(rng, t):
    def run(m, x, b):
        y, owner = x[b.mask], torch.arange(len(x)).repeat_interleave(b.lengths)
        scores = (y @ m.f(y).T).masked_fill(owner[:, None] != owner[None], -torch.inf)
        return x.masked_scatter(b.mask[..., None], scores.softmax(-1) @ y)

    return Made(run, f=linear())


# ---- mixtures of experts


def experts():
    return nn.ModuleList(linear() for _ in range(3))


def _mixture(run):
    return lambda rng, t: Made(run, router=nn.Linear(WIDTH, 3), experts=experts())


def _loop(m, x, b):
    flat = x.flatten(0, 1)
    weights, chosen = m.router(flat).softmax(-1).topk(2)
    y = torch.zeros_like(flat)
    for e, f in enumerate(m.experts):
        token, rank = (chosen == e).nonzero(as_tuple=True)
        y.index_add_(0, token, f(flat[token]) * weights[token, rank, None])
    return y.view_as(x)


def _where(m, x, b):
    gates = m.router(x).softmax(-1)
    chosen, y = gates.argmax(-1), torch.zeros_like(x)
    for e, f in enumerate(m.experts):
        here = chosen == e
        if bool(here.any()):
            y[here] = f(x[here]) * gates[here][:, e : e + 1]
    return y


def _sorted(m, x, b):
    flat = x.transpose(0, 1).flatten(0, 1)
    gate, chosen = m.router(flat).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    parts = flat[order].split(chosen.bincount(minlength=3).tolist())
    y = torch.cat([f(part) for f, part in zip(m.experts, parts, strict=True)])
    return (y[order.argsort()] * gate[:, None]).unflatten(0, (x.shape[1], -1)).transpose(0, 1)


def _one_hot(m, x, b):
    gates = m.router(x).softmax(-1)
    taken = F.one_hot(gates.argmax(-1), 3).to(x) * gates
    return torch.einsum("nte,nted->ntd", taken, torch.stack([f(x) for f in m.experts], 2))


def _of_examples(m, x, b):
    chosen = m.router(x.mean(1)).argmax(-1)
    y = torch.empty_like(x)
    for e, f in enumerate(m.experts):
        at = (chosen == e).nonzero()[:, 0]
        y = y.index_copy(0, at, f(x[at]))
    return y


def _slots(m, x, b):
    """Assigns tokens to slots of their expert. All experts have as many slots as the fullest needs: none is dropped."""
    flat = x.flatten(0, 1)
    gate, chosen = m.router(flat).softmax(-1).max(-1)
    taken = F.one_hot(chosen, 3)
    rank = (taken.cumsum(0) * taken).sum(1) - 1
    slots = flat.new_zeros(3, int(rank.max()) + 1, WIDTH).index_put((chosen, rank), flat)
    y = torch.stack([f(slot) for f, slot in zip(m.experts, slots, strict=True)])
    return (y[chosen, rank] * gate[:, None]).view_as(x)


for _name, _run in {
    "loop": _loop,
    "where": _where,
    "sorted": _sorted,
    "one_hot": _one_hot,
    "of_examples": _of_examples,
    "slots": _slots,
}.items():
    piece(f"experts/{_name}")(_mixture(_run))


@piece("experts/one_parameter", exact_only=True)
def _(rng, t):
    def run(m, x, b):
        flat = x.flatten(0, 1)
        gate, chosen = m.router(flat).softmax(-1).max(-1)
        return (torch.bmm(flat[:, None], m.w[chosen]).squeeze(1) * gate[:, None]).view_as(x)

    return Made(run, router=nn.Linear(WIDTH, 3), w=parameter(3, WIDTH, WIDTH))
