"""Packed sequences of very different lengths: groups of similar length, and memory that follows the tokens."""

from __future__ import annotations

import pytest
import torch
from test_tied import Largest
from texts import TOKENS, WIDTH, Decoder, packed, sequences
from torch import Tensor, nn

from t2v_fast import FisherRecorder
from t2v_fast.estimation.packing import segments_of
from t2v_fast.gradients.factors import Factors, Summed
from t2v_fast.gradients.grouped import Grouped
from t2v_fast.gradients.owners import EACH, ListedRows, Owned, Sole
from t2v_fast.gradients.ragged import Ragged, groups_of

LENGTHS = (29, 1, 2, 1, 3, 1, 9)


def batch(lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    row = {key: value for key, value in packed(sequences(lengths)).items() if key != "labels"}
    return row, segments_of(row, sum(lengths))


def test_groups() -> None:
    listed = torch.tensor([2, 0, 0, 0, 0, 0, 1, 1, -1, 3])
    groups = groups_of(Owned(1, ListedRows(listed)), 5)  # example 4 has no position
    assert groups is not None
    assert [examples.tolist() for examples, _ in groups] == [[2, 3, 4], [1], [0]]
    assert [own.rows.listed.tolist() for _, own in groups] == [
        [0, -1, -1, -1, -1, -1, -1, -1, -1, 1],
        [-1, -1, -1, -1, -1, -1, 0, 0, -1, -1],
        [-1, 0, 0, 0, 0, 0, -1, -1, -1, -1],
    ]
    assert all(own.axis == 1 for _, own in groups)
    for owner in (Sole(0), Owned(0, EACH), Owned(0, ListedRows(torch.tensor([0, 1, 1, 0, 1])))):
        assert groups_of(owner, 2) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["fused", "eager"])
@pytest.mark.parametrize("granularity", ["filter", "tensor", "parameter"])
def test_squares(tied: bool, attention: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = Decoder(attention, tied).double()
    row, segments = batch(LENGTHS)
    u = torch.randn(2, 1, sum(LENGTHS), TOKENS, dtype=torch.float64)
    weights = torch.rand(len(LENGTHS), dtype=torch.float64) if granularity == "parameter" else None
    kinds: dict[str, type[Factors]] = {}
    with FisherRecorder(
        model, granularity=granularity, filter_axis=lambda name, p: int("up.weight" in name)
    ) as recorder:
        recorder.observer = lambda use, factors, *rest: kinds.setdefault(use.parameter, type(factors))
        found = recorder.backward(model(**row), u, weights, segments=segments)
    # A linear weight takes rows as they lie. All other parameters have groups of examples. A tied table has fewer rows
    # than there are positions, so its gradients are formed.
    linear = {name for name, kind in kinds.items() if kind is Grouped}
    layers = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    assert linear == {name for name, p in model.named_parameters() if id(p) in layers - tables}
    assert {kinds[name] for name in kinds.keys() - linear - {"tokens.weight"}} == {Ragged}
    assert kinds["tokens.weight"] is (Summed if tied else Ragged)
    for name, p in model.named_parameters():
        each = []
        for e in range(len(LENGTHS)):
            alone = model(row["input_ids"][:, segments == e])
            gradients = [torch.autograd.grad(alone, p, c[:, segments == e], retain_graph=True)[0] for c in u]
            each.append(sum(g.square() for g in gradients))
        want = torch.stack(each)
        if granularity == "parameter":
            want = torch.einsum("n,n...->...", weights, want)
        elif granularity == "tensor":
            want = want.flatten(1).mean(1)
        else:
            want = want.movedim(1 + recorder.filter_axes[name], 1)
            want = want.reshape(*want.shape[:2], -1).mean(2)
        torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-12, msg=lambda m, k=name: f"{k}: {m}")


def test_memory_follows_the_tokens() -> None:
    """One long sequence and many short ones: nothing is padded to the longest, as N x longest would be."""
    torch.manual_seed(0)

    class Flat(nn.Module):
        """No attention, whose mask is quadratic in the tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, TOKENS)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).tanh())

    model, lengths = Flat(), (200, *(1,) * 200)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    with FisherRecorder(model) as recorder:
        logits = model(torch.randn(1, sum(lengths), WIDTH))
        u = torch.randn_like(logits)
        with Largest(model) as seen:
            recorder.backward(logits, u, segments=segments)
    assert seen.entries < 1.2 * sum(lengths) * 4 * WIDTH < len(lengths) * max(lengths)
