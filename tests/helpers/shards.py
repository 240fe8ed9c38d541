"""Networks that several processes share, and what one process computes of them alone."""

from __future__ import annotations

import datetime
import gc
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm

SECONDS = 120  # after which a process that waits for another one gives up


class Attention(nn.Module):
    """Self-attention with separate projections, as tensor parallelism divides them by heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Token model with a tied head, whose vocabulary does not divide by the processes."""

    def __init__(self, vocabulary: int = 5, width: int = 8, blocks: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(6, width) / 3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Twice(nn.Module):
    """A layer that is called twice, a parameter of no axes, one that nothing uses, and a row for two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.one = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.scale, self.idle = nn.Parameter(torch.tensor([1.3])), nn.Linear(3, 3)
        self.head = weight_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.again(torch.tanh(self.first(x) * self.scale)))
        return self.head(torch.tanh(self.again(y)) + self.one(y))


class Experts(nn.Module):
    """A layer for each kind of example: a batch reaches only some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kind = (x[:, 0] > 0.4).long() + (x[:, 0] > -0.4).long()
        h = torch.tanh(self.first(x))
        y = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            if (kind == k).any():
                y = y.index_put((kind == k,), torch.tanh(expert(h[kind == k])))
        return self.head(y)


def convolutional() -> nn.Module:
    """Convolutions, norms and buffers; none of the sizes is even."""
    first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(5, 7, 3, stride=2), nn.GroupNorm(1, 7), nn.GELU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(7 * 4, 9), nn.Tanh(), nn.Linear(9, 3))


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with the same weights in each process."""
    torch.manual_seed(0)
    network = make().to(dtype).eval()
    with torch.no_grad():
        for b in network.buffers():
            if b.is_floating_point() and b.dim():
                b.copy_(torch.rand(b.shape, dtype=torch.float64) + 0.5)
        for p in network.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, dtype=torch.float64).to(dtype) / 5)
    return network


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(11, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def rows() -> Tensor:
    return torch.randn(11, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sentences(count: int = 7) -> list[dict[str, Tensor]]:
    """Sentences of different lengths, one by one."""
    g = torch.Generator().manual_seed(2)
    found = []
    for n in range(count):
        length = 3 + n % 3
        mask = torch.ones(1, length, dtype=torch.long)
        mask[0, length - n % 2 :] = 0
        found.append({"tokens": torch.randint(0, 5, (1, length), generator=g), "attention_mask": mask})
    return found


def joined(parts: list[dict[str, Tensor]], even: bool = False) -> dict[str, Tensor]:
    """One padded batch, whose positions divide by two if wanted."""
    width = max(p["tokens"].shape[1] for p in parts)
    width += even and width % 2
    return {
        key: torch.cat([nn.functional.pad(p[key], (0, width - p[key].shape[1])) for p in parts]) for key in parts[0]
    }


def _process(rank: int, size: int, folder: str, work: Callable[[int, int, Path], Mapping[str, Any]]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    torch.save(dict(work(rank, size, Path(folder))), f"{folder}/{rank}.pt")
    gc.collect()  # networks end before the process group that they use
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path, work: Callable[[int, int, Path], Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """What ``work(rank, size, folder)`` returns on each of some processes."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.start_processes(_process, (size, str(folder), work), size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
