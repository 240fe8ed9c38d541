"""A small decoder, batches of text in every form, and the squared gradients of each sequence by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, WIDTH, HEADS = 7, 8, 2


class Decoder(nn.Module):
    """Two blocks; ``attention`` is "fused", "eager" (finite mask, capped scores) or "infinite" (mask of -inf).

    Without a mask, a token attends to the tokens before it in its sequence, as ``position_ids`` tell. ``apart=False``
    leaves the sequences of a row together.
    """

    def __init__(self, attention: str = "fused", tied: bool = True, apart: bool = True) -> None:
        super().__init__()
        self.attention, self.apart = attention, apart
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **other: int
    ) -> Tensor:
        count, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length).expand(count, -1)
        seen = torch.ones(length, length, dtype=torch.bool).tril().expand(count, -1, -1)
        if attention_mask is not None and attention_mask.dim() == 4:
            seen = attention_mask[:, 0]
        elif attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None] | torch.eye(length, dtype=torch.bool)
        elif self.apart:
            number = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
            seen = seen & (number[:, :, None] == number[:, None])
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, seen[:, None], self.attention)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor, seen: Tensor, attention: str) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        if attention == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            scores = 3 * torch.tanh(q @ k.transpose(2, 3) / 3)
            closed = torch.finfo(scores.dtype).min if attention == "eager" else -torch.inf
            mixed = scores.masked_fill(~seen, closed).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.second(x))))


def sequences(lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TOKENS, (length,), generator=generator) for length in lengths]


def alone(texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """A batch for each sequence."""
    return [{"input_ids": t[None], "labels": t[None]} for t in texts]


def padded(texts: Sequence[Tensor], left: bool = False) -> dict[str, Tensor]:
    """One batch, with labels of -100 at the padding, as Hugging Face's collators make it."""
    longest = max(map(len, texts))

    def fill(values: Sequence[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(t, (0, longest - len(t))[:: -1 if left else 1], value=value) for t in values])

    there = fill([torch.ones_like(t) for t in texts], 0)
    return {
        "input_ids": fill(texts, 3),
        "attention_mask": there,
        "position_ids": (there.cumsum(1) - 1).clamp_min(0),
        "labels": fill(texts, -100),
    }


def packed(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """One row, as Hugging Face's DataCollatorWithFlattening makes it."""
    labels = [torch.cat([t.new_full((1,), -100), t[1:]]) for t in texts]
    positions = [torch.arange(len(t)) for t in texts]
    return {
        "input_ids": torch.cat(list(texts))[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(positions)[None],
    }


def logits_of(model: nn.Module, text: Tensor) -> Tensor:
    """The logits of one sequence, [T, C]."""
    found = model(input_ids=text[None])
    return getattr(found, "logits", found)[0]


def empirical(model: nn.Module, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The squared gradients of each sequence's log-likelihood, [N, ...], by parameter."""
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for text in texts:
        scores = logits_of(model, text)[:-1].log_softmax(1).gather(1, text[1:, None]).sum()
        gradients = torch.autograd.grad(scores, list(named.values()), allow_unused=True, materialize_grads=True)
        for name, g in zip(named, gradients, strict=True):
            found[name].append(g.square())
    return {name: torch.stack(values) for name, values in found.items()}


def every_token(model: nn.Module, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The exact Fisher of each sequence: sums over its predicted tokens and over all labels, [N, ...]."""
    named = dict(model.named_parameters())
    found = {name: torch.zeros(len(texts), *p.shape, dtype=p.dtype) for name, p in named.items()}
    for n, text in enumerate(texts):
        scores = logits_of(model, text)[:-1].log_softmax(1)
        for score in scores.flatten():
            gradients = torch.autograd.grad(
                score, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, g in zip(named, gradients, strict=True):
                found[name][n] += score.detach().exp() * g.square()
    return found


def by_filter(values: Tensor) -> Tensor:
    """Means over all axes but the first: of a parameter [O, ...] -> [O]."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values
