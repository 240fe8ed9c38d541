"""Small mixtures of experts, written in the ways that networks compute them, with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HIDDEN, EXPERTS, CLASSES = 8, 16, 4, 3
Experts = Callable[["Mixture", Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Experts] = {}


def way(function: Experts) -> Experts:
    """Add a way to apply the experts: from tokens [S, W], their experts [S, K] and weights [S, K] to outputs [S, W]."""
    WAYS[function.__name__] = function
    return function


class Mixture(nn.Module):
    """Tokens [N, T, W], the last feature of which is 1 for a token and 0 for padding, to logits [N, C].

    The stacks are ``up`` [E, 2 H, W] and ``down`` [E, W, H], or transposed matrices for the ways that take them.
    """

    def __init__(self, name: str, top: int = 2, skew: float = 0.0, bias: bool = False, shared: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6)

        self.name, self.top, self.skew = name, top, skew
        self.before, self.router = weight(WIDTH, WIDTH), weight(EXPERTS, WIDTH)
        up, down = weight(EXPERTS, 2 * HIDDEN, WIDTH), weight(EXPERTS, WIDTH, HIDDEN)
        self.up, self.down = (nn.Parameter(self.laid_out(w.detach())) for w in (up, down))
        if name == "modules":
            del self.up, self.down
            self.ups, self.downs = (
                nn.ModuleList(nn.Linear(w.shape[2], w.shape[1], bias=False).double() for _ in w) for w in (up, down)
            )
            for layers, w in ((self.ups, up), (self.downs, down)):
                for layer, matrix in zip(layers, w, strict=True):
                    layer.weight.data = matrix.detach().clone()
        self.up_bias = weight(EXPERTS, 2 * HIDDEN) if bias else None
        self.shared = weight(WIDTH, WIDTH) if shared else None
        self.head = weight(CLASSES, WIDTH)

    def laid_out(self, stack: Tensor) -> Tensor:
        """A stack [E, O, I] as this way keeps it."""
        if self.name in ("transposed", "grouped_transposed", "batched_from_the_left"):
            return stack.mT.contiguous()
        return stack.flatten(0, 1) if self.name in ("flat", "grouped_flat") else stack

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        tokens = (x @ self.before.T).tanh().flatten(0, 1)
        scores = tokens @ self.router.T
        scores = scores + self.skew * torch.arange(EXPERTS, 0, -1).to(scores)
        weights, chosen = scores.softmax(1).topk(self.top)
        if self.top > 1:  # the weight of one choice alone would be 1, and the router without a gradient
            weights = weights / weights.sum(1, keepdim=True)
        y = WAYS[self.name](self, tokens, chosen, weights)
        if self.shared is not None:
            y = y + tokens @ self.shared
        y = (y.view(n, t, WIDTH) * x[:, :, -1:]).cumsum(1)
        return (y.tanh() * x[:, :, -1:]).sum(1) @ self.head.T


def gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def _loop(
    m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor, up: Callable[[int], Tensor], down: Callable[[int], Tensor]
) -> Tensor:
    """Expert after expert, each with its tokens by their first choice, then by their second."""
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        choice, token = (e == chosen.T).nonzero(as_tuple=True)
        if len(token):
            h = F.linear(x[token], up(e), None if m.up_bias is None else m.up_bias[e])
            out = F.linear(gated(h), down(e)) * weights[token, choice, None]
            y.index_add_(0, token, out)
    return y


@way
def loop(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _loop(m, x, chosen, weights, lambda e: m.up[e], lambda e: m.down[torch.tensor(e)])


@way
def index_put(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """A loop that writes by index, and takes the matrices of the stack apart first."""
    y = x.new_zeros(*chosen.shape, x.shape[1])
    for e, (up, down) in enumerate(zip(m.up, m.down.unbind(), strict=True)):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        h = gated(x[token] @ up.T)
        y = y.index_put((token, choice), F.linear(h, down) * weights[token, choice, None])
    return y.sum(1)


@way
def transposed(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _loop(m, x, chosen, weights, lambda e: m.up[e].T, lambda e: m.down.mT[e])


@way
def flat(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The matrices lie one below the other in one matrix [E O, I]."""
    up, down = m.up.view(EXPERTS, -1, WIDTH), m.down.view(EXPERTS, -1, HIDDEN)
    return _loop(m, x, chosen, weights, lambda e: up[e], lambda e: down[e])


@way
def sliced(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Gate and up are parts of one matrix: no product reads a whole matrix of the first stack."""
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        gate, up = m.up[e].chunk(2)
        h = F.silu(x[token] @ gate.T) * (x[token] @ up.T)
        y = y.index_add(0, token, F.linear(h, m.down[e]) * weights[token, choice, None])
    return y


@way
def modules(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _loop(m, x, chosen, weights, lambda e: m.ups[e].weight, lambda e: m.downs[e].weight)


def _batched(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor, product: Callable) -> Tensor:
    """A matrix is looked up for each token and choice."""
    index = chosen.flatten()
    h = product(m.up[index], x.repeat_interleave(m.top, 0))
    if m.up_bias is not None:
        h = h + m.up_bias[index]
    y = product(m.down[index], gated(h)) * weights.flatten()[:, None]
    return y.view(len(x), m.top, -1).sum(1)


@way
def batched(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _batched(m, x, chosen, weights, lambda w, x: torch.bmm(w, x.unsqueeze(-1)).squeeze(-1))


@way
def batched_from_the_left(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _batched(m, x, chosen, weights, lambda w, x: (x.unsqueeze(1) @ w).squeeze(1))


@way
def batched_einsum(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _batched(m, x, chosen, weights, lambda w, x: torch.einsum("soi,si->so", w, x))


@way
def batched_by_choice(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The index has two axes, and is negative: -1 is the last expert."""
    index = chosen - EXPERTS
    h = (m.up[index] @ x[:, None, :, None])[..., 0]
    y = (m.down.index_select(0, chosen.flatten()).view(*chosen.shape, WIDTH, HIDDEN) @ gated(h)[..., None])[..., 0]
    return (y * weights[..., None]).sum(1)


@way
def batched_merged(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The matrices of a token's experts are one product: rows of the looked-up stack are mixed."""
    h = gated(torch.einsum("skoi,si->sko", m.up[chosen], x))
    return torch.einsum("skoi,ski,sk->so", m.down[chosen], h, weights)


def _grouped(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Tokens are sorted by expert; the matrices of the stacks are [E, I, O] here."""
    expert, order = chosen.flatten().sort()
    ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0).int()
    h = F.grouped_mm(x[order // m.top], up, offs=ends)
    if m.up_bias is not None:
        h = h + m.up_bias[expert]
    y = F.grouped_mm(gated(h), down, offs=ends) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return y[back].view(len(x), m.top, -1).sum(1)


@way
def grouped(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _grouped(m, x, chosen, weights, m.up.mT, m.down.mT)


@way
def grouped_transposed(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return _grouped(m, x, chosen, weights, m.up, m.down)


@way
def grouped_flat(m: Mixture, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    up, down = m.up.view(EXPERTS, -1, WIDTH), m.down.view(EXPERTS, -1, HIDDEN)
    return _grouped(m, x, chosen, weights, up.mT, down.mT)


def twin(network: Mixture) -> Mixture:
    """The same mixture in float64 for the ways that know no float64: as a loop, with the parameters' own layout."""
    way = {"grouped": "loop", "grouped_transposed": "transposed", "grouped_flat": "flat"}[network.name]
    other = Mixture(way, network.top, network.skew, network.up_bias is not None, network.shared is not None)
    other.load_state_dict(network.state_dict())
    return other.double()


def tokens(n: int, t: int, seed: int = 0, padded: bool = True) -> Tensor:
    """A batch [N, T, W]; example k ends in k tokens of padding."""
    x = torch.randn(n, t, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :, -1] = 1
    if padded:
        for k in range(n):
            x[k, max(1, t - k) :] = 0
    return x
