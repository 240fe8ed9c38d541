"""The clock charges every moment to one stage, changes no result, and divides passes into kinds of layers."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from small import shapes, small_probe
from torch import nn

from t2v_fast import FisherRecorder, Task2Vec, fisher, spans
from t2v_fast.spans import KINDS, Spans, collect, count, kind_of_module, kind_of_node, stage


class Clock:
    """A clock that moves only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(spans, "perf_counter", found)
    return found


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every pass is divided into kinds of layers."""
    monkeypatch.setattr(spans._Budget, "due", property(lambda self: True))
    return


def test_nested_stages_add_up(clock: Clock) -> None:
    with collect() as found:
        clock.now = 1
        with stage("outer"):
            clock.now = 3
            with stage("inner"):
                clock.now = 7
            clock.now = 15
        clock.now = 31
    assert found.seconds == {"rest": 17, "outer": 10, "inner": 4}


def test_a_whole_stage_hides_what_is_in_it(clock: Clock) -> None:
    with collect() as found:
        with stage("check", whole=True), stage("forward"):
            count("decoded")
            clock.now = 4
        with stage("forward"):
            clock.now = 5
    assert found.seconds == {"rest": 0, "check": 4, "forward": 1}
    assert found.counts == {}


def test_an_error_ends_its_stages(clock: Clock) -> None:
    with collect() as found:
        with pytest.raises(ZeroDivisionError), stage("outer"), stage("inner"):
            clock.now = 1 / 0
        clock.now = 5
    assert found.seconds == {"rest": 5, "outer": 0, "inner": 0}


def test_an_outer_collector_does_not_see_an_inner_one(clock: Clock) -> None:
    with collect() as outer:
        with collect() as inner, stage("head"):
            clock.now = 2
        clock.now = 3
    assert inner.seconds["head"] == 2
    assert "head" not in outer.seconds


def test_parts_and_sums() -> None:
    a = Spans()
    a.seconds, a.counts = {"head": 6.0, "wait": 3.0}, {"decoded": 9}
    a.add_size("forward", 4, 0.5)
    part = a.part(3)
    assert (part.seconds, part.counts, part.shared) == ({"head": 2.0, "wait": 1.0}, {"decoded": 3.0}, 3)
    part.add(part)
    assert part.seconds == {"head": 4.0, "wait": 2.0}
    assert part.sizes["forward"] == pytest.approx([2 / 3, 8 / 3, 32 / 3, 1 / 3, 4 / 3, 1 / 6])
    again = pickle.loads(pickle.dumps(part))
    assert (again.seconds, again.counts, again.sizes, again.shared) == (
        *(part.seconds, part.counts, part.sizes, part.shared),
    )


def test_kinds() -> None:
    modules = [nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Linear(1, 1), nn.LayerNorm(1), nn.Embedding(1, 1)]
    assert [kind_of_module(m) for m in modules] == ["convolution", "convolution", "linear", "norm", "embedding"]
    assert kind_of_module(nn.Sequential(nn.Linear(1, 1))) == kind_of_module(nn.ReLU()) == "other"
    names = {
        "StridedDepthwiseBackward": "convolution",
        "MatrixConvolutionBackward": "convolution",
        "OneDnnLinearBackward": "linear",
        "MmBackward0": "linear",
        "BmmBackward0": "other",
        "NativeLayerNormBackward0": "norm",
        "LinalgVectorNormBackward0": "other",
        "EmbeddingBackward0": "embedding",
    }
    assert {name: kind_of_node(name) for name in names} == names


class Text(nn.Module):
    """Every kind of layer, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.conv, self.linear, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.table(x))
        h = self.conv(h.mT).mT
        return self.head(self.linear(self.linear(h).relu()).mean(1))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("granularity", ["filter", "parameter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dividing_a_pass_changes_no_result(granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Text().eval().to(dtype)
    batches = [torch.randint(5, (n, 6)) for n in (5, 2)]
    want = fisher(model, batches, granularity=granularity)
    with collect() as found:
        got = fisher(model, batches, granularity=granularity)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for name in ("forward", "backward"):
        assert all(found.seconds[f"{name}.{kind}"] > 0 for kind in KINDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.usefixtures("always")
def test_an_error_in_a_layer_leaves_no_hook() -> None:
    class Refuses(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(4, 4), Refuses(4, 3)).eval()
    with collect() as found, stage("fisher"):
        with pytest.raises(RuntimeError, match="no"):
            fisher(model, [torch.ones(2, 4)])
        assert found._stage == "fisher"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.usefixtures("always")
def test_two_recorders_share_a_network() -> None:
    model = Text().eval()
    x, u = torch.randint(5, (3, 6)), torch.randn(3, 3)
    with FisherRecorder(model, ["head.weight"]) as one, collect():
        first = one.backward(model(x), u)
    with FisherRecorder(model) as both, collect():
        second = both.backward(model(x), u)
    torch.testing.assert_close(first["head.weight"], second["head.weight"], rtol=1e-5, atol=0)


def test_the_budget_bounds_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = spans._Budget()
    assert not budget.due  # the first pass of a process
    budget.watched = 1.0
    assert budget.due
    budget.spent = 2 * spans.SHARE
    assert not budget.due
    budget.watched = 3.0
    assert budget.due


def test_the_stages_of_a_task_add_up() -> None:
    task2vec, data = Task2Vec(small_probe(), batch_size=8), shapes(20)
    want = task2vec.embed(data, name="plain")
    start = time.perf_counter()
    with collect() as found:
        got = task2vec.embed(data, name="timed")
    whole = time.perf_counter() - start
    np.testing.assert_array_equal(got.hessian, want.hessian)
    assert sum(found.seconds.values()) == pytest.approx(whole, abs=0.01)
    assert {"decode", "wait", "features", "head", "fisher", "check"} <= found.seconds.keys()
    assert found.counts == {"decoded": 20}  # one forward pass prepares each image once
