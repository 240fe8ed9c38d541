"""Replayed passes give what the passes as they are give, to the last bit, or are refused with a reason.

The graphs of a card are tapes of operators here (``pretend_graphs``): a replay reads the same addresses and runs no
code of the host.
"""

from __future__ import annotations

import functools
import gc
import logging
import random
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import Function
from pretend_cuda import Pretend, moved, pretended
from pretend_graphs import CUDAGraph, with_graphs
from steady import ALLOWED_WAITS, CASES, STEADY, batches_of_images, batches_of_tokens, images, steady, tokens
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from waits import TO_HOST, WAIT, Counted

from t2v_fast import FisherDiagonal, FisherRecorder, fisher
from t2v_fast.estimation import graphs
from t2v_fast.estimation.allocation import Allocation
from t2v_fast.estimation.graph_obstacles import Snapshot, Watch
from t2v_fast.estimation.graphs import CudaCapture, GraphedPasses
from t2v_fast.estimation.self_check import SelfCheckError

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")
Network = Callable[[], nn.Module]
Loader = Callable[[nn.Module], Iterable[Any]]


def run(make: Network, loader: Loader | list[Any], **options: Any) -> FisherDiagonal:
    """The Fisher of a network on the pretended device; a loader may change the network between batches."""
    there = moved(make())
    return fisher(there, loader if isinstance(loader, list) else loader(there), device="cuda:0", **options)


def on_both(make: Network, loader: Loader | list[Any], **options: Any) -> tuple[FisherDiagonal, list[CUDAGraph]]:
    """Compare the result with graphs to that without, bit by bit. Return the result and the graphs."""
    with pretended():
        want = run(make, loader, **options)
        with with_graphs() as made:
            got = run(make, loader, cuda_graphs=True, **options)
    equal(got, want)
    return got, made


def equal(got: FisherDiagonal, want: FisherDiagonal) -> None:
    assert got.keys() == want.keys()
    assert (got.unused, got.skipped, got.samples) == (want.unused, want.skipped, want.samples)
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert torch.equal(got.standard_error[name].nan_to_num(), want.standard_error[name].nan_to_num()), name


def replays(made: list[CUDAGraph]) -> list[int]:
    return [graph.replays for graph in made]


@contextmanager
def said() -> Iterator[list[str]]:
    """The messages of the module's log."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = graphs.log.level
    graphs.log.addHandler(handler)
    graphs.log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        graphs.log.removeHandler(handler)
        graphs.log.setLevel(level)


# ---- the numbers


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch mean"])
def test_replays_give_the_same_bits(name: str) -> None:
    """For every estimator, granularity and level, weights of examples, masks of tokens, allocations and errors."""
    make, batches, options = CASES[name]
    with said() as messages:
        got, made = on_both(make, batches, **options)
    # The third and the fourth of seven batches are run as they are and replayed as well, the last three only replayed.
    assert replays(made) == [5, 5]
    assert messages == ["CUDA graphs: 3 of 7 batches were replayed, from 2 captured graphs"]
    if "estimator_error" in options:
        with pretended():
            want = run(make, batches, **options).estimator_error
        assert all(torch.equal(got.estimator_error[key], want[key]) for key in want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    _, made = on_both(lambda: images().to(dtype), [x.to(dtype) for x in batches_of_images()])
    assert replays(made) == [5, 5]


def test_batches_of_several_shapes() -> None:
    """The last batch is smaller, and others come in between; each shape has graphs of its own."""
    x = torch.randn(80, 4, 7, 6, generator=torch.Generator().manual_seed(3))
    sizes = [8, 8, 5, 8, 5, 8, 5, 8, 5, 8, 5, 2, 1, 2]
    _, made = on_both(images, list(x[: sum(sizes)].split(sizes)), samples=3)
    # Seven batches of 8: the third, the fourth (also of all) are compared. The 8th batch of all has 8 examples.
    assert len(made) == 6
    assert all(count > 0 for count in replays(made)[:4])


@pytest.mark.parametrize("granularity", ["filter", "tensor"])
def test_other_numbers_of_cotangents(granularity: str) -> None:
    """With an allocation, a batch has as many cotangents as its example with the most: graphs of their own for each."""
    most = torch.tensor([1, 1, 3, 3, 1, 3, 1, 3, 2, 1, 2, 3, 2, 1])
    samples = most.repeat_interleave(4)
    samples[1::4] = 1
    spread = Allocation(samples, torch.arange(56), torch.ones(56, dtype=torch.float64))
    x = torch.randn(56, 4, 7, 6, generator=torch.Generator().manual_seed(4)).split(4)
    for options in ({}, {"estimator_error": True}):
        _, made = on_both(images, list(x), allocation=spread, granularity=granularity, **options)
        assert len(made) > 3
        assert all(count > 0 for count in replays(made))


def test_each_replay_has_new_random_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images again and again: what differs is drawn. And labels that a graph froze would be noticed."""
    x = batches_of_images()[0]
    seen: list[Tensor] = []
    take = graphs._Backward.load

    def load(self: Any, u: Tensor, weights: Tensor | None) -> None:
        seen.append(u.held.clone())
        take(self, u, weights)

    monkeypatch.setattr(graphs._Backward, "load", load)
    _, made = on_both(images, [x] * 7, estimator="monte_carlo", samples=1)
    assert replays(made) == [5, 5]
    assert len({tuple(u.flatten().tolist()) for u in seen}) == 5
    monkeypatch.setattr(graphs._Backward, "load", lambda self, u, weights: None)  # frozen
    with pretended(), with_graphs() as made, said() as messages:
        got = run(images, [x] * 7, estimator="monte_carlo", samples=1, cuda_graphs=True)
    assert "no CUDA graphs are used: a replay changes the squares of" in messages[0]
    assert replays(made) == [1, 1]
    with pretended():
        equal(got, run(images, [x] * 7, estimator="monte_carlo", samples=1))


def test_static_inputs_and_weights_that_are_not_filled_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, method in ((graphs._Captured, "load"), (graphs._Backward, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, lambda *args: None)
            with said() as messages:
                on_both(images, batches_of_images(), granularity="parameter", weights=torch.rand(56) + 0.1)
            assert "no CUDA graphs are used: a replay changes" in messages[0]


def test_unused_and_skipped_parameters_are_told_after_a_replay() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        first, more = nn.Linear(6, 6), nn.Linear(3, 3)
        return Function(lambda self, x: self.first(x), first=first, more=more).eval()

    batches = list(torch.randn(42, 6, generator=torch.Generator().manual_seed(1)).split(6))
    got, made = on_both(make, batches, estimator="hutchinson")
    assert got.unused == {"more.weight", "more.bias"}
    assert replays(made) == [5, 5]


def test_inputs_with_numbers_beside_tensors() -> None:
    """A number is part of what tells batches apart, because a replay would use the former one."""

    def make() -> nn.Module:
        return Function(lambda self, batch: self.net(batch["x"][0] * batch["scale"]), net=images()).eval()

    batches = [{"x": [x], "scale": 1.0 + (k % 2)} for k, x in enumerate(batches_of_images() * 2)]
    _, made = on_both(make, batches, forward=lambda model, batch: model(batch))
    assert len(made) == 4
    assert all(replays(made))


# ---- the host


@pytest.mark.parametrize("name", ["hutchinson", "exact, by parameter", "with errors", "an allocation", "tokens"])
def test_a_replayed_batch_waits_for_nothing_and_launches_little(name: str) -> None:
    make, batches, options = CASES[name]
    launched = []
    for more in ({}, {"cuda_graphs": True}):
        with pretended(), with_graphs():
            there = moved(make())
            with Counted() as counted:
                fisher(there, steady(batches, counted), device="cuda:0", **options, **more)
        waits = {place[2].partition(":")[0]: n for place, n in counted.places.items() if place[0] == WAIT}
        assert waits == ALLOWED_WAITS.get(name, {})
        assert counted.numbers[TO_HOST] <= 20 + 8 * 5 * sum(waits.values())
        # Cotangents are made outside of the graphs, and may take more operators than this small network.
        launched.append({name for name in counted.operators if name.startswith(("convolution", "addmm", "sq_"))})
    as_they_are, replayed = launched
    assert as_they_are
    assert not replayed


# ---- what is refused


class Counting(nn.Module):
    """Counts its calls, as a replay would not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.list = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Listing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.list.append(x.shape)
        return x


class Writing(nn.Module):
    """Writes to a buffer, which each example leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


class Drawing(nn.Module):
    """Draws by a generator of its own, or by one that torch does not know."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.torchs, self.numpys = how, torch.Generator().manual_seed(0), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "torch":
            return x * torch.rand(x.shape[1:], generator=self.torchs).to(x.device)
        if self.how == "numpy":
            return x * float(self.numpys.random())
        if self.how == "global":
            return x * random.random()
        return x * torch.from_numpy(self.numpys.random(x.shape[1:])).to(x)


def of_images(function: Callable[[nn.Module, Tensor], Tensor], **parts: Any) -> Network:
    return lambda: Function(lambda self, x: self.net(function(self, x)), net=images(), **parts).eval()


def in_front(layer: nn.Module) -> Network:
    return lambda: nn.Sequential(layer, images()).eval()


def masked(self: nn.Module, x: Tensor) -> Tensor:
    """Whether an image is turned over depends on its values."""
    return torch.where((x.mean((1, 2, 3), keepdim=True) > 0), x, -x) if float(x.mean()) > -9 else x


def sparse(self: nn.Module, x: Tensor) -> Tensor:
    there = (x > 0).nonzero(as_tuple=True)
    return torch.zeros_like(x).index_put(there, x[there])


def picked(self: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = 0.5
    return y


def hooked_network() -> nn.Module:
    made = images()
    made[0].register_forward_hook(lambda module, inputs, output: None)
    return made


def hooking(add: Callable[[Tensor], Any]) -> Network:
    """A network whose forward pass adds a hook to the output of its first layer."""

    def make() -> nn.Module:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            x = self.net[0](x)
            if x.requires_grad:
                add(x)
            return self.net[1:](x)

        return Function(forward, net=images()).eval()

    return make


SCALES = [1.0]  # that hooks multiply gradients by, a number that no snapshot sees


def checkpointed() -> nn.Module:
    body = images()

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.net[2:](checkpoint(self.net[:2], x, use_reentrant=False))

    return Function(forward, net=body).eval()


class HostBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = [torch.tensor(2.0)]  # hidden from ``moved``

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor[0]


class Captured:
    """A tensor of the device that no module has."""

    def __init__(self) -> None:
        self.t: Tensor | None = None

    def __call__(self, self_: nn.Module, x: Tensor) -> Tensor:
        self.t = x.new_full((1, 1, 7, 6), 2.0) if self.t is None else self.t
        return x * self.t


REFUSED: dict[str, tuple[Network, dict[str, Any], str]] = {
    "batch mean": (images, {"estimator": "batch_mean"}, "'batch_mean' needs the gradients of the whole batch"),
    "a hook": (hooked_network, {}, r"the layer '0' has a hook \(_forward_hooks\)"),
    "a hook on a tensor": (
        hooking(lambda x: x.register_hook(lambda g: g * SCALES[0])),
        {},
        "Tensor.register_hook adds a hook, which a replay would not run",
    ),
    "a hook on a node": (
        hooking(lambda x: x.grad_fn.register_prehook(lambda g: (g[0] * SCALES[0],))),
        {},
        "Tensor.grad_fn reads an autograd node, which may get hooks",
    ),
    "hooks on several tensors": (
        hooking(lambda x: torch.autograd.graph.register_multi_grad_hook([x], lambda g: None)),
        {},
        "Tensor.grad_fn reads an autograd node",
    ),
    "checkpointing": (checkpointed, {}, "activation checkpointing"),
    "item": (of_images(masked), {}, "aten._local_scalar_dense.default makes the host wait"),
    "nonzero": (of_images(sparse), {}, "aten.nonzero.default makes the host wait"),
    "a mask": (of_images(picked), {}, "aten.index_put_.default makes the host wait"),
    "a count": (in_front(Counting()), {}, "changes attributes or the memory"),
    "a list": (in_front(Listing()), {}, "changes attributes or the memory"),
    "a buffer": (in_front(Writing()), {}, r"aten.add_.Tensor writes to a tensor \[\] of the network"),
    "the inputs": (in_front(nn.ReLU(inplace=True)), {"channels_last": False}, r"writes to a tensor \[8, 4, 7, 6\]"),
    "a number of the host": (in_front(HostBuffer()), {}, "aten.mul.Tensor reads or writes memory of the host"),
    "host to device": (
        of_images(lambda self, x: x + torch.linspace(0, 1, 6).to(x)),
        {},
        "_to_copy.default reads or writes memory of the host",
    ),
    "another tensor": (of_images(Captured()), {}, r"aten.mul.Tensor reads a tensor \[1, 1, 7, 6\] that is neither"),
    "a generator": (in_front(Drawing("torch")), {"self_check": False}, "draws random numbers from a generator of its"),
    "numpy's array": (in_front(Drawing("arrays")), {"self_check": False}, "reads or writes memory of the host"),
    "numpy's number": (in_front(Drawing("numpy")), {"self_check": False}, "a replay changes the logits by"),
    "Python's number": (
        in_front(Drawing("global")),
        {"self_check": False},
        "a pass draws random numbers from Python's generator",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_run_as_it_is(name: str) -> None:
    """The reason is logged once a network, and the numbers are those without graphs."""
    make, options, reason = REFUSED[name]
    batches = batches_of_images()
    with said() as messages, pretended(), with_graphs() as made:
        there = moved(make())
        for _ in range(2):
            got = fisher(there, batches, device="cuda:0", cuda_graphs=True, **options)
        if not name.endswith(("generator", "array", "number")):
            equal(got, run(make, batches, **options))
    warnings = [message for message in messages if message.startswith("no CUDA graphs")]
    assert len(warnings) == 1
    assert re.search(reason, re.sub(r" \(\S+:\d+\)", "", warnings[0]))
    assert sum(message.startswith("CUDA graphs: 0 of 7") for message in messages) == 2
    assert len(made) == (4 if "replay changes" in reason else 0)


def test_a_network_on_a_cpu_is_run_as_it_is() -> None:
    with said() as messages:
        got = fisher(images(), batches_of_images(), cuda_graphs=True)
    equal(got, fisher(images(), batches_of_images()))
    assert "the network has tensors on cpu, and graphs are for one CUDA device" in messages[0]


def test_a_hook_of_all_modules() -> None:
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with said() as messages:
            on_both(images, batches_of_images())
    finally:
        handle.remove()
    assert "every module has a hook (_forward_hooks)" in messages[0]


def test_graphs_by_default_where_the_host_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has never waited for the device, graphs are captured from the 18th batch on, else none."""
    batches = [torch.randn(8, 4, 7, 6, generator=torch.Generator().manual_seed(k)) for k in range(24)]
    with pretended():
        want = run(images, batches, cuda_graphs=False)
        with with_graphs() as made, said() as messages:
            got = run(images, batches)
            few = run(images, batches[:16])
        equal(got, want)
        assert messages == ["CUDA graphs: 5 of 24 batches were replayed, from 2 captured graphs"]
        assert replays(made) == [6, 6]
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)  # the device is always behind
        with with_graphs() as made, said() as messages:
            got = run(images, batches)
        equal(got, want)
        assert messages == replays(made) == []
        equal(few, run(images, batches[:16], cuda_graphs=False))


@pytest.mark.parametrize("kernel", ["efficient", "flash", "cudnn"])
def test_attention_kernels(kernel: str) -> None:
    """The seeds of dropout that they keep on the host stand in no way."""
    torch.manual_seed(0)
    layer, head = nn.MultiheadAttention(8, 1, batch_first=True), nn.Linear(8, 3)
    make = functools.partial(
        Function, lambda self, x: self.head(self.layer(x, x, x, need_weights=False)[0][:, 0]), layer=layer, head=head
    )
    batches = [torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(k)) for k in range(7)]
    with pretended(kernel):
        want = run(make, batches, cuda_graphs=False)
        with with_graphs() as made:
            got = run(make, batches, cuda_graphs=True)
    equal(got, want)
    assert replays(made) == [5, 5]


def test_packed_rows_and_odd_inputs() -> None:
    inputs = torch.ones(2, 3)
    there = SimpleNamespace(model=nn.Linear(3, 3), divided=False, observer=None)
    for batch, segments, reason in (
        (inputs, torch.zeros(2), "packed rows"),
        ({"x": object()}, None, "an input is a object"),
        (inputs, None, "an input [2, 3] is on cpu"),
    ):
        passes = GraphedPasses(there)
        passes._device = torch.device("cuda", 0)
        assert passes.replay(batch, segments, False, False) is None
        assert reason in passes.reason
    with GraphedPasses(SimpleNamespace(model=nn.Linear(3, 3), divided=True, observer=None)).of(lambda m, x: x) as _:
        pass
    divided = GraphedPasses(SimpleNamespace(model=nn.Linear(3, 3), divided=True, observer=None))
    with divided.of(lambda model, x: x):
        assert divided.reason == "several processes share the network's parameters"


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that CUDA refuses although nobody saw it before, and too little memory: the batches go on."""
    monkeypatch.setattr(Watch, "_obstacle", lambda *args: None)
    make, _, _ = REFUSED["item"]
    with said() as messages, pretended(), with_graphs():
        current = torch.cuda.current_stream()
        got = run(make, batches_of_images(), cuda_graphs=True)
        assert torch.cuda.current_stream() is current
        equal(got, run(make, batches_of_images()))
    assert "a capture failed (RuntimeError: CUDA error: operation failed due to a previous error" in messages[0]

    def full(self: CudaCapture, *args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(CudaCapture, "capture", full)
    with said() as messages:
        on_both(images, batches_of_images())
    assert "a capture failed (OutOfMemoryError: CUDA out of memory" in messages[0]


def test_a_device_copy_in_a_capture_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host copies from pinned memory would be the same in each replay; the comparison notices."""
    monkeypatch.setattr(Watch, "_obstacle", lambda *args: None)
    numbers = np.random.default_rng(0)

    def drawn(self: nn.Module, x: Tensor) -> Tensor:
        pinned = torch.empty(6, pin_memory=True).copy_(torch.from_numpy(numbers.random(6)))
        return x * pinned.to(x.device, non_blocking=True)

    with said() as messages, pretended(), with_graphs() as made:
        run(of_images(drawn), batches_of_images(), cuda_graphs=True, self_check=False)
    assert replays(made) == [1, 1]
    assert "a replay changes the logits" in messages[0]


# ---- stale addresses


class Moded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.more = 1.0, torch.ones(1, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * self.more * (2 if self.training else 1)


def another(model: nn.Module) -> None:
    model[1][-1] = moved(nn.Linear(24, 5))


CHANGES: dict[str, tuple[Callable[[nn.Module], object], bool]] = {  # and whether graphs must be captured anew
    "values in place": (lambda model: model[1][0].weight.data.mul_(1.5), False),
    "a weight's memory": (lambda model: setattr(model[1][0].weight, "data", model[1][0].weight.data * 1.5), True),
    "a buffer": (lambda model: setattr(model[1][1], "running_var", model[1][1].running_var * 3), True),
    "a buffer's memory": (lambda model: setattr(model[1][1].running_mean, "data", model[1][1].running_mean + 1), True),
    "a mode": (lambda model: model[0].train(), True),
    "a number": (lambda model: setattr(model[0], "factor", 1.5), True),
    "a tensor": (lambda model: setattr(model[0], "more", model[0].more * 1.5), True),
    "a tensor's memory": (lambda model: setattr(model[0].more, "data", model[0].more * 1.5), True),
    "a method": (lambda model: setattr(model[0], "forward", lambda x: x * 0.5), True),
    "a state": (
        lambda model: model[1][-1].load_state_dict({"weight": 2 * model[1][-1].weight, "bias": model[1][-1].bias}),
        False,
    ),
    "an activation": (lambda model: model[1].__setitem__(2, nn.Tanh()), True),
}


def changing(change: Callable[[nn.Module], object], at: int) -> Loader:
    def loader(model: nn.Module) -> Iterator[Tensor]:
        for k, x in enumerate(batches_of_images() * 2):
            if k == at:
                with torch.no_grad():
                    change(model)
            yield x

    return loader


def changeable() -> nn.Module:
    return nn.Sequential(Moded(), images()).eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_network_that_changes_between_batches(name: str) -> None:
    """Values may change where they are; for anything else graphs are captured anew."""
    change, anew = CHANGES[name]
    with said() as messages:
        _, made = on_both(changeable, changing(change, 5))
    assert len(made) == (4 if anew else 2)
    assert all(replays(made))
    assert ("the network has changed: its CUDA graphs are captured anew" in messages) == anew


@pytest.mark.slow_unless(name=("a mode", "a weight's memory"))
@pytest.mark.parametrize("name", [name for name, (_, anew) in CHANGES.items() if anew])
def test_what_the_snapshot_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, replays are stale, and the next batch that the self-check looks at raises an error."""
    monkeypatch.setattr(Snapshot, "holds", lambda self: True)
    with pretended(), with_graphs(), pytest.raises(SelfCheckError, match=r"a replay changes .* relative, although"):
        run(changeable, changing(CHANGES[name][0], 5), cuda_graphs=True)


def test_a_hook_that_comes_later() -> None:
    calls: list[int] = []

    def change(model: nn.Module) -> None:
        model[1][0].register_forward_hook(lambda module, inputs, output: calls.append(1))

    with said() as messages:
        _, made = on_both(changeable, changing(change, 5))
    assert len(made) == 2
    assert "the layer '1.0' has a hook" in messages[1]
    assert len(calls) > 18


def test_what_no_snapshot_sees_is_an_error() -> None:
    """A global variable decides what the network does: the batch that the self-check looks at tells."""
    factor = [1.0]
    everywhere.append(factor)

    def loader(model: nn.Module) -> Iterator[Tensor]:
        for k, x in enumerate(batches_of_images() * 2):
            factor[0] = 1.0 if k < 6 else 1.01
            yield x

    make = of_images(lambda self, x: x * everywhere[-1][0])
    with pretended(), with_graphs(), pytest.raises(SelfCheckError, match="pass cuda_graphs=False"):
        run(make, loader, cuda_graphs=True)


everywhere: list[list[float]] = []


def test_settings_tell_batches_apart() -> None:
    def loader(model: nn.Module) -> Iterator[Tensor]:
        for k, x in enumerate(batches_of_images() * 2):
            torch.use_deterministic_algorithms(k >= 7)
            yield x

    try:
        _, made = on_both(images, loader)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) == 4


# ---- how many graphs there are


def test_the_least_recently_used_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_KEPT", 2)
    x = torch.randn(200, 4, 7, 6, generator=torch.Generator().manual_seed(5))
    sizes = [3, 4, 5] * 3 + [3] * 3 + [4, 4, 4, 5, 5, 5]
    kept: list[int] = []
    learn = GraphedPasses._learn

    def counted(self: GraphedPasses, *args: Any) -> None:
        learn(self, *args)
        kept.append(sum(kind.captured is not None for kind in self._kinds.values()))

    monkeypatch.setattr(GraphedPasses, "_learn", counted)
    _, made = on_both(images, list(x[: sum(sizes)].split(sizes)))
    assert max(kept) == 2
    assert len(made) > 6  # some were captured again
    monkeypatch.setattr(graphs, "MOST_CAPTURES", 3)
    with said() as messages:
        _, made = on_both(images, list(x[: sum(sizes)].split(sizes)))
    assert len(made) == 4  # the last of them with its backward passes
    assert messages[-1].endswith("from 4 captured graphs")


def test_nothing_is_kept_after_the_call() -> None:
    held: list[Any] = []
    with pretended(), with_graphs() as made:
        run(images, batches_of_images(), cuda_graphs=True)
        held += [weakref.ref(graph) for graph in made]
        made.clear()
        gc.collect()
        assert all(of() is None for of in held)


def test_an_error_in_a_replayed_batch_names_it() -> None:
    """Inputs that are not finite are found as without graphs."""
    batches = [x.clone() for x in batches_of_images()]
    batches[STEADY][5] = float("nan")
    with pretended(), with_graphs(), pytest.raises(ValueError, match=f"batch {STEADY}, example 5: the input has NaN"):
        run(images, batches, cuda_graphs=True)


def test_explaining_the_first_batch(capsys: pytest.CaptureFixture) -> None:
    _, made = on_both(images, batches_of_images(), explain=True)
    assert replays(made) == [5, 5]
    assert "explicit" in capsys.readouterr().out


def test_groups_keep_their_graph() -> None:
    network, x = nn.Linear(4, 3), torch.randn(5, 4)
    u = torch.randn(3, 5, 3)
    with FisherRecorder(network) as recorder:
        y = network(x)
        first = list(recorder.backward_groups(y, u, [1, 2], retain_graph=True))
        again = list(recorder.backward_groups(y, u, [1, 2]))
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_tokens_of_several_lengths() -> None:
    batches = batches_of_tokens()
    short = [{key: t[:, :4].clone() for key, t in batch.items()} for batch in batches]
    mixed = [batch for pair in zip(batches, short, strict=True) for batch in pair]
    _, made = on_both(tokens, mixed, forward=lambda model, batch: model(batch), estimator="hutchinson")
    assert len(made) == 4
    assert all(replays(made))


def test_the_tape_reads_the_same_addresses() -> None:
    """The stand-in for a card itself: nothing is computed in a capture, and a replay follows the buffers alone."""
    with pretended(), with_graphs():
        x, factor = Pretend(torch.ones(3)), [2.0]
        capture = CudaCapture(x.device)
        replay, y = capture.capture(lambda: (x * factor[0]).exp().sum(), capture.pool())
        assert bool(y.held.isnan())
        for value in (0.0, 1.0):
            x.held.fill_(value)
            factor[0] += 1
            replay()
            torch.testing.assert_close(y.held, 3 * torch.tensor(2.0 * value).exp())
        with pytest.raises(RuntimeError, match="previous error during capture"):
            capture.capture(lambda: x.sum().item(), capture.pool())
