"""A table of tokens that is also the weight of the output head, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t2v_fast
from t2v_fast import FisherRecorder
from t2v_fast.gradients import tied as tied_module

ROWS, WIDTH = 11, 5


class Text(nn.Module):
    """Tokens are looked up, mixed along the sequence, and compared with the table; ``twice`` adds a second lookup."""

    def __init__(self, rows: int, padding: int | None, twice: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH, padding)
        nn.init.normal_(self.table.weight)
        self.mix, self.twice = nn.Linear(WIDTH, WIDTH), twice

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        h = torch.tanh(self.mix(x.cumsum(1)))
        if self.twice:
            h = h + self.table(tokens.flip(1))
        return nn.functional.linear(h, self.table.weight)


def truth(model: nn.Module, tokens: Tensor, u: Tensor) -> Tensor:
    """The gradients of the table for each example, [N, rows, D]."""
    return torch.stack(
        [torch.autograd.grad(model(t[None]), model.table.weight, c[None])[0] for t, c in zip(tokens, u, strict=True)]
    )


@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("tokens", [[[1, 3, 1, 0]], [[0, 0, 0, 10], [3, 3, 7, 3], [1, 2, 5, 0]]])
def test_squares(
    tokens: list[list[int]], padding: int | None, twice: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_module, "TIED_ROWS", block)
    torch.manual_seed(0)
    model, ids = Text(ROWS, padding, twice).double(), torch.tensor(tokens)
    u = torch.randn(2, *ids.shape, ROWS, dtype=torch.float64)
    want = sum(truth(model, ids, c).square() for c in u)
    weights = torch.rand(len(ids), dtype=torch.float64)
    for granularity, expected in (
        ("filter", want.mean(2)),
        ("tensor", want.mean((1, 2))),
        ("parameter", torch.einsum("n,nrd->rd", weights, want)),
    ):
        with FisherRecorder(model, granularity=granularity) as recorder:
            seen: list[type] = []
            recorder.observer = lambda use, found, *rest, seen=seen: seen.append(type(found))
            q = recorder.backward(model(ids), u, weights if granularity == "parameter" else None)["table.weight"]
        torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-13)
        assert (tied_module.Tied in seen) == (ids.shape[1] * (1 + twice) < ROWS)


def test_more_positions_than_rows_are_summed_first() -> None:
    torch.manual_seed(0)
    model, ids = Text(3, None, False).double(), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    with FisherRecorder(model) as recorder:
        q = recorder.backward(model(ids), u)["table.weight"]
    torch.testing.assert_close(q, truth(model, ids, u).square().mean(2), rtol=1e-10, atol=1e-13)


class Largest(TorchDispatchMode):
    """Note the most entries of a new tensor that an operator returns: not of a view of a parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entries = 0
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.entries = max(self.entries, t.untyped_storage().nbytes() // t.element_size())
        return found


@pytest.mark.parametrize("estimator", ["empirical", "monte_carlo", "hutchinson"])
def test_filter_sums_need_no_buffer_of_the_tables_size(estimator: str) -> None:
    """The logits have fewer entries than the table, and no new tensor of a batch is larger than they are."""
    torch.manual_seed(0)
    rows, positions = 3000, 4
    model, ids = Text(rows, None, False), torch.randint(rows, (1, positions))
    # The first call of a library on a machine measures its speed, which takes memory of its own.
    t2v_fast.fisher(model, [(ids, ids.flip(1))], estimator, 1, self_check=False)
    with Largest(model) as seen:
        t2v_fast.fisher(model, [(ids, ids.flip(1))], estimator, 1, self_check=False)
    assert positions * rows <= seen.entries < 1.1 * positions * rows < rows * WIDTH
    with Largest(model) as seen:
        t2v_fast.fisher(model, [(ids, ids.flip(1))], estimator, 1, "parameter", self_check=False)
    assert seen.entries >= rows * WIDTH
