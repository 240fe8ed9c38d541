"""Mixtures of experts in which examples take places from each other are refused by name, in whichever batch they do."""

from __future__ import annotations

import pytest
import torch
from oracle import per_example_squares, relative_error
from oracle import reduce as reduced
from torch import Tensor, nn

from t2v_fast import SelfCheckError, fisher
from t2v_fast.estimation.counting import Count, Counting, counting_over_examples

WIDTH, EXPERTS, CLASSES = 6, 2, 3


class Router(nn.Module):
    """Tokens [S, W] to the expert of each, or EXPERTS where the expert is full."""

    def __init__(self, kind: str, capacity: int) -> None:
        super().__init__()
        self.kind, self.expert_capacity = kind, capacity

    def forward(self, x: Tensor) -> Tensor:
        wanted = (x[..., 0] > 0).long()
        chosen = nn.functional.one_hot(wanted, EXPERTS)
        if self.kind == "none":
            return wanted
        if self.kind == "of_a_sequence":
            place = chosen.cumsum(-2)
        elif self.kind == "keyword":
            place = torch.cumsum(chosen.flatten(0, 1), dim=0).view_as(chosen)
        else:
            place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        kept = (place <= self.expert_capacity).gather(-1, wanted[..., None])[..., 0]
        return torch.where(kept, wanted, EXPERTS)


class Choosing(nn.Module):
    """Each expert chooses a number of tokens, half of all tokens of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.flatten(0, 1) @ torch.eye(WIDTH, EXPERTS, dtype=x.dtype)
        best = scores.topk(max(1, len(scores) // 2), dim=0).indices
        chosen = torch.full((len(scores),), EXPERTS)
        for e in range(EXPERTS):
            chosen[best[:, e]] = e
        return chosen.view(x.shape[:2])


class Network(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.ModuleDict({"router": router})
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.body["router"](x).flatten()
        tokens, y = x.flatten(0, 1), 0.1 * x.flatten(0, 1)
        for e in range(EXPERTS):
            rows = (chosen == e).nonzero()[:, 0]
            y = y.index_add(0, rows, tokens[rows] @ self.experts[e].T)
        return y.tanh().view(x.shape).sum(1) @ self.head.T


def batch(n: int, share: float, seed: int = 0, t: int = 4) -> Tensor:
    """[N, T, W]: about this share of all tokens wants the second expert."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, t, WIDTH, generator=generator, dtype=torch.float64)
    wants = share * n * t > torch.arange(n * t).view(t, n).T
    x[:, :, 0] = torch.where(wants, 1.0, -1.0) * x[:, :, 0].abs()
    return x


EVEN, CROWDED = batch(4, 0.5), batch(4, 1.0)  # 8 and 8 tokens for the experts; 0 and 16
NAMED = r"probably in the layer 'body\.router' \((Router|Choosing)"


@pytest.mark.parametrize("kind", ["of_the_batch", "keyword"])
@pytest.mark.parametrize("batches", [[CROWDED], [EVEN, CROWDED], [EVEN, EVEN, EVEN, EVEN, EVEN, CROWDED]], ids=len)
def test_a_capacity_that_examples_share_is_refused_by_name(kind: str, batches: list[Tensor]) -> None:
    """Tokens of the last examples are dropped because the first took the places, in the last batch only."""
    network = Network(Router(kind, 10))
    with pytest.raises(SelfCheckError, match=NAMED) as error:
        fisher(network, batches)
    assert "expert_capacity=10" in str(error.value)
    assert "batches of one example, or switch the capacity off" in str(error.value)


def test_a_network_that_passed_before_is_watched_as_closely() -> None:
    network = Network(Router("of_the_batch", 10))
    fisher(network, [EVEN, EVEN])
    fisher(network, [EVEN])
    with pytest.raises(SelfCheckError, match=NAMED):
        fisher(network, [EVEN, EVEN, EVEN, EVEN, CROWDED])


def test_experts_that_choose_tokens_of_the_batch() -> None:
    with pytest.raises(SelfCheckError, match=NAMED):
        fisher(Network(Choosing()), [EVEN])


def exact(network: nn.Module, batches: list[Tensor]) -> None:
    got = fisher(network, batches, "exact", granularity="parameter")
    want: dict[str, Tensor] = {}
    for x in batches:
        p = torch.cat([network(x[[n]]) for n in range(len(x))]).detach().softmax(1)
        u = torch.stack([p[:, [c]].sqrt() * (torch.eye(CLASSES)[c].double() - p) for c in range(CLASSES)])
        for n in range(len(x)):
            for name, squares in per_example_squares(Alone(network), x[[n]], u[:, [n]]).items():
                name = name.removeprefix("network.")
                want[name] = want.get(name, 0) + reduced(squares, "parameter").sum(0)
    for name, total in want.items():
        assert relative_error(got[name], total / sum(map(len, batches))) < 1e-10, name


class Alone(nn.Module):
    """Runs the first example alone: the oracle passes each example twice."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[:1])


def test_no_example_takes_a_place_of_another() -> None:
    """Batches of one example, a capacity of each sequence, and a capacity that nobody reaches are exact."""
    exact(Network(Router("of_the_batch", 2)), [x[None] for x in CROWDED])
    exact(Network(Router("of_a_sequence", 2)), [EVEN, CROWDED, batch(2, 0.7, 1)])
    exact(Network(Router("of_the_batch", 16)), [EVEN, CROWDED, batch(2, 0.7, 1)])
    exact(Network(Router("none", 0)), [EVEN, CROWDED])


def test_half_precision_cannot_tell() -> None:
    network = Network(Router("of_the_batch", 10)).bfloat16()
    with pytest.raises(SelfCheckError, match=r"'body\.router' \(Router, expert_capacity=10\).*too coarse to tell"):
        fisher(network, [EVEN.bfloat16()])
    fisher(network, [x[None].bfloat16() for x in EVEN])


def test_what_counts_along_other_axes_costs_no_further_passes() -> None:
    """Positions of tokens, the best experts of a token, and the ends of the experts' rows."""
    passes = []

    class Counts(Network):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(len(x))
            places = torch.ones(x.shape[:2]).cumsum(1)
            ends = torch.bincount(x[..., 0].gt(0).flatten().long(), minlength=EXPERTS).cumsum(0)
            weight = x.topk(2).values.sum(-1, keepdim=True)
            return super().forward(x * weight) + 0 * (places.sum() + ends.sum())

    fisher(Counts(Router("none", 0)), [EVEN] * 3)
    assert sum(n == 1 for n in passes) == 3  # in the first batch: one to compare the counts, and two examples alone


def test_which_calls_are_noted() -> None:
    x = torch.ones(4, 3)
    with Counting() as counting:
        x.cumsum(0)
        torch.cumsum(x, dim=-1)
        torch.topk(x, 2, 0)
        x.topk(k=2)
        x.sum(0)
    assert [(c.operator, c.size) for c in counting.counts] == [("cumsum", 4), ("cumsum", 3), ("topk", 4), ("topk", 3)]
    longer = [c._replace(size=c.size * 2) for c in counting.counts[:1]]
    assert counting_over_examples(longer, counting.counts) == Count("cumsum", 8, None)
    assert counting_over_examples(counting.counts, counting.counts) is None


class Words(nn.Module):
    """A network [1, T] to [1, T, C] for packed rows, with a capacity that the sequences of a row share."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.inner = Network(Router("of_the_batch", capacity))
        self.words = nn.Parameter(batch(2, 0.5, t=1)[:, 0])  # each wants an expert of its own

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(self.words[input_ids[0]].unsqueeze(1))[None]


@pytest.mark.parametrize("together", [False, True])
def test_rows_of_one_sequence_say_nothing_about_rows_of_several(together: bool) -> None:
    """All rows have one shape, and only the last has more tokens for an expert than it takes."""
    half, crowded = torch.arange(12)[None] % 2, torch.zeros(1, 12, dtype=torch.long)
    one, several = torch.zeros(1, 12, dtype=torch.long), torch.arange(12)[None] // 4
    first = [{"input_ids": half, "segments": one}]
    rest = [{"input_ids": ids, "segments": several} for ids in (half, half, crowded)]
    network = Words(6)
    fisher(network, [*first, *rest[:2]] if together else first, packed=True)
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(network, [*first, *rest] if together else rest, packed=True)


class Ranked(nn.Module):
    """A router that drops the tokens beyond a capacity by a sort, and calls the capacity by no name."""

    def __init__(self, order: str, share: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.order, self.share = order, share
        self.router = nn.Parameter(torch.randn(WIDTH, 3, generator=generator))
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH, generator=generator) * 0.5)
        self.head = nn.Parameter(torch.randn(WIDTH, CLASSES, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)
        gate, expert = (y @ self.router).softmax(1).max(1)
        most = int(self.share * len(y)) + 1
        order = torch.argsort(expert, stable=True)
        ends = torch.bincount(expert, minlength=3).cumsum(0)
        place = torch.arange(len(y)) - (ends - torch.bincount(expert, minlength=3))[expert[order]]
        z = y
        for e in range(3):
            if self.order == "scores":
                best = gate.detach().masked_fill(expert != e, -1).sort(descending=True).indices
                kept = best[: min(most, int((expert == e).sum()))]
            else:
                rows = order[expert[order] == e]
                kept = rows[place[expert[order] == e] < most] if self.order == "compared" else rows[:most]
            z = z.index_add(0, kept, (y[kept] @ self.experts[e]).tanh() * gate[kept, None])
        return z.view(x.shape).mean(1) @ self.head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["scores", "compared", "sliced"])
def test_routers_that_sort_give_no_wrong_number(order: str, dtype: torch.dtype) -> None:
    """Whether a token is lost depends on the batch. Every result is right, or refused, and both occur."""
    seen = set()
    for seed in range(6):
        for share in (0.45, 0.6, 2.0):
            network = Ranked(order, share).to(dtype)
            generator = torch.Generator().manual_seed(seed)
            loader = [torch.randn(n, 4, WIDTH, generator=generator, dtype=dtype) for n in (4, 2, 3, 5, 2, 4, 3)]
            try:
                found = fisher(network, loader, "exact", granularity="parameter")
            except SelfCheckError as error:
                seen.add("refused" if "examples interact" in str(error) else str(error))
                continue
            alone = fisher(
                network, [x[n : n + 1] for x in loader for n in range(len(x))], "exact", granularity="parameter"
            )
            for name in found:
                assert relative_error(found[name], alone[name]) < (1e-3 if dtype == torch.float32 else 1e-9), name
            seen.add("right")
    assert seen == {"refused", "right"}
