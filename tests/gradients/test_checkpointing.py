"""Activation checkpointing of every kind: the numbers of the same network without it, with one region in memory."""

from __future__ import annotations

import copy
import logging
import os
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checkpointed import checkpoint_some, checkpointed
from oracle import per_example_squares, reduce
from ownership_networks import Network, drawn, examine
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import t2v_fast
from t2v_fast import FisherRecorder, UnsupportedError, fisher
from t2v_fast.estimation.one_forward import graph_bytes
from t2v_fast.estimation.variational import variational_fisher
from t2v_fast.gradients.checkpointing import Regions
from t2v_fast.gradients.fast_forward import FastNetwork
from t2v_fast.gradients.network_state import signature_of
from t2v_fast.gradients.ownership import nodes_of
from t2v_fast.tasks.probe import Preprocessing, Probe

NETWORKS = int(os.environ.get("T2V_FAST_NETWORKS", "20"))
FIRST_SEED = int(os.environ.get("T2V_FAST_FIRST_SEED", "0"))
WIDTH, CLASSES, WORDS = 8, 4, 11
SELECTIVE = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.mm.default])

# Ignore torch's warnings where the inputs of a reentrant region need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    """A layer of a transformer; ``drop`` is the probability of a functional dropout, which no module shows."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), drop
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + F.dropout(self.attention(y, y, y, need_weights=False)[0], self.drop)
        return x + F.dropout(self.mlp(x), self.drop)


class Tokens(nn.Module):
    """A transformer whose blocks run as ``run`` says."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor], drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.run = run
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self.blocks, self.words(ids))[:, 0])


class Images(nn.Module):
    """A residual network whose blocks run as ``run`` says. Its first layer sees images, which need no gradient."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(4)

        def block(channels: int) -> nn.Module:
            return nn.Sequential(
                *(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
                *(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.GroupNorm(2, 6), nn.Hardswish()),
            )

        self.blocks = nn.ModuleList([block(3), block(6), block(6)])
        self.head = nn.Linear(6, CLASSES)
        self.run = run
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.blocks, x).mean((2, 3)))


def plain(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def each(reentrant: bool, **options: Any) -> Callable[[nn.ModuleList, Tensor], Tensor]:
    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant, **options)
        return x

    return run


def sequential(reentrant: bool) -> Callable[[nn.ModuleList, Tensor], Tensor]:
    return lambda blocks, x: checkpoint_sequential(nn.Sequential(*blocks), 2, x, use_reentrant=reentrant)


def nested(outer: bool, inner: bool) -> Callable[[nn.ModuleList, Tensor], Tensor]:
    def two(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=inner)
        return x

    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        x = checkpoint(partial(two, blocks[:2]), x, use_reentrant=outer)
        return checkpoint(partial(two, blocks[2:]), x, use_reentrant=outer)

    return run


WAYS = {
    "not reentrant": each(False),
    "reentrant": each(True),
    "without early stop": each(False, early_stop=False),
    "without random states": each(False, preserve_rng_state=False),
    "selective": each(False, context_fn=SELECTIVE),
    "sequential": sequential(False),
    "sequential, reentrant": sequential(True),
    **{f"nested, {outer} {inner}": nested(outer, inner) for outer in (False, True) for inner in (False, True)},
}

QUICK = ["reentrant", "selective", "nested, False True"]


def ids_of(n: int, tokens: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (n, tokens), generator=torch.Generator().manual_seed(n))


def images_of(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def same_weights(make: Callable, run: Callable, **options: Any) -> nn.Module:
    network = make(run, **options)
    network.load_state_dict(make(plain).state_dict())
    return network


def assert_recorded(network: nn.Module, truth: nn.Module, x: Tensor, cotangents: int, granularity: str) -> Regions:
    """The recorder's squares are those of plain autograd of another network, example by example."""
    u = torch.randn(cotangents, len(x), CLASSES, dtype=torch.float64)
    with FisherRecorder(network, granularity=granularity) as recorder:
        got = recorder.backward(network(x), u)
    for name, q in per_example_squares(truth, x, u).items():
        want = q.sum(0) if granularity == "parameter" else reduce(q, granularity)
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-13 * float(want.max() + 1))
    return recorder.regions


@pytest.mark.slow_unless(granularity=["filter"])
@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
@pytest.mark.parametrize("way", WAYS)
def test_transformer(way: str, granularity: str) -> None:
    network, truth = same_weights(Tokens, WAYS[way]), Tokens(plain)
    for n, tokens, cotangents in ((2, 5, 1), (4, 3, 3), (1, 4, 2), (2, 6, 2)):
        assert_recorded(network, truth, ids_of(n, tokens), cotangents, granularity)


@pytest.mark.parametrize("way", WAYS)
def test_residual_network(way: str) -> None:
    network, truth = same_weights(Images, WAYS[way]), Images(plain)
    for n, cotangents in ((2, 1), (3, 2), (1, 2)):
        assert_recorded(network, truth, images_of(n), cotangents, "filter")


@pytest.mark.slow_unless(way=QUICK)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [Tokens, Images])
def test_fisher(make: Callable, way: str) -> None:
    """With the self-check, the faster layers, and every estimator that squares per-example gradients."""
    network, truth = same_weights(make, WAYS[way]), make(plain)
    x = ids_of(7) if make is Tokens else images_of(7)
    before = copy.deepcopy(network.state_dict())
    for options in (
        {"estimator": "exact"},
        {"estimator": "deflated", "estimator_error": True},
        {"estimator": "exact", "granularity": "parameter", "unsupported": "exact"},
        {"estimator": "batch_mean"},
    ):
        for _ in range(2):  # the second call meets a network that passed the self-check
            got = fisher(network, x.split([2, 3, 2]), **options)
            want = fisher(truth, x.split([2, 3, 2]), **options)
            for name, q in want.items():
                torch.testing.assert_close(got[name], q, rtol=1e-9, atol=1e-14)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


class Wide(nn.Module):
    """Layers that run faster than torch's own in float32, also when a region is recomputed."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True), nn.Conv2d(32, 32, 1)
            )
            for c in (3, 32)
        )
        self.head = nn.Linear(32, CLASSES)
        self.run = run
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.blocks, x).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_faster_layers(n: int, reentrant: bool) -> None:
    network, truth = same_weights(Wide, each(reentrant)), Wide(plain)
    for size in (12, 16):
        x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))
        with FisherRecorder(network), FastNetwork(network, lambda model, x: model(x)) as fast:
            kinds = {node.name() for node in nodes_of(fast(network, x))}
        assert {"BatchNormBackward", "InPlaceHardtanhBackward"} <= kinds
        got, want = (fisher(model, [x, x + 1], "exact") for model in (network, truth))
        for name, q in want.items():
            torch.testing.assert_close(got[name], q, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"estimator": "exact", "batch_size": 4}], ids=str)
def test_embeddings(options: dict[str, Any]) -> None:
    """The pipeline keeps the graphs of its first pass, whose regions are recomputed later."""
    data = [(torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(k)), k % 3) for k in range(10)]
    size = Preprocessing(resize=12, crop=12)
    want, *others = (
        t2v_fast.Task2Vec(Probe(same_weights(Wide, run), preprocessing=size), **options).embed(data)
        for run in (plain, each(True), each(False))
    )
    for got in others:
        assert got.fingerprint == want.fingerprint
        torch.testing.assert_close(torch.as_tensor(got.hessian), torch.as_tensor(want.hessian), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_drawn_again(reentrant: bool) -> None:
    """The recomputed activations have the forward pass's own dropout."""
    network, truth = (same_weights(Tokens, run, drop=0.4).train() for run in (each(reentrant), plain))
    x, u = ids_of(3), torch.randn(2, 3, CLASSES, dtype=torch.float64)
    torch.manual_seed(7)
    with FisherRecorder(network, granularity="parameter") as recorder:
        got = recorder.backward(network(x), u)
    torch.manual_seed(7)
    logits = truth(x)
    want = dict.fromkeys(dict(truth.named_parameters()), 0)
    for n in range(3):
        for k in range(2):
            gradients = torch.autograd.grad(logits[n] @ u[k, n], list(truth.parameters()), retain_graph=True)
            want = {name: q + g.square() for (name, q), g in zip(want.items(), gradients, strict=True)}
    for name, q in want.items():
        torch.testing.assert_close(got[name], q, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast(reentrant: bool) -> None:
    """A region is recomputed in the precision of its forward pass, whether it began or was entered there."""

    def inside(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        def cast(block: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return block(x)

        for block in blocks:
            x = checkpoint(partial(cast, block), x, use_reentrant=reentrant)
        return x

    x, u = ids_of(4), torch.randn(2, 4, CLASSES)
    found = []
    for run in (plain, each(reentrant), inside):
        network = same_weights(Tokens, run).float()
        with FisherRecorder(network) as recorder, torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        with recorder:
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(x)
            found.append(recorder.backward(logits, u))
    for other in found[1:]:
        for name, q in found[0].items():
            assert torch.equal(other[name], q), name


def test_parameters_and_groups() -> None:
    network, truth = same_weights(Tokens, each(True)), Tokens(plain)
    u = torch.randn(3, 4, CLASSES, dtype=torch.float64)
    wanted = ["blocks.1.mlp.1.weight", "blocks.0.norm.weight"]
    groups = []
    for model in (network, truth):
        with FisherRecorder(model, wanted) as recorder:
            groups.append(list(recorder.backward_groups(model(ids_of(4)), u, [1, 2])))
    for got, want in zip(*groups, strict=True):
        assert list(got) == wanted
        for name, q in want.items():
            torch.testing.assert_close(got[name], q, rtol=1e-9, atol=1e-14)


class Tied(nn.Module):
    """One block that runs three times, and words that are also the head."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words, self.block, self.reentrant = nn.Embedding(CLASSES, WIDTH), Block(), reentrant
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids % CLASSES)
        for _ in range(3):
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x.mean(1) @ self.words.weight.T


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("granularity", ["filter", "parameter"])
def test_shared_parameters(reentrant: bool, granularity: str) -> None:
    for n, cotangents in ((2, 1), (3, 2)):
        assert_recorded(Tied(reentrant), Tied(None), ids_of(n), cotangents, granularity)


def test_a_region_of_transformed_weights() -> None:
    """The weights are standardised within the region, and the nodes in between are recomputed too."""

    class Standardised(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.one, self.two = nn.Linear(5, 6).double(), nn.Linear(6, CLASSES).double()
            self.checkpointed = checkpointed

        def body(self, x: Tensor) -> Tensor:
            return F.linear(x, self.one.weight - self.one.weight.exp().mean(1, keepdim=True), self.one.bias).sin()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))

    x, u = torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, CLASSES, dtype=torch.float64)
    with FisherRecorder(Standardised(True), granularity="parameter", unsupported="exact") as recorder:
        got = recorder.backward(recorder.model(x), u)
    for name, q in per_example_squares(Standardised(False), x, u).items():
        torch.testing.assert_close(got[name], q.sum(0), rtol=1e-9, atol=1e-14)


# ---- memory, and how often regions run


class Counted:
    """Counts the activations that are alive at once."""

    def __init__(self) -> None:
        self.seen: list[StorageWeakRef] = []
        self.most = 0

    def add(self, t: Tensor) -> None:
        self.seen.append(StorageWeakRef(t.untyped_storage()))
        self.most = max(self.most, sum(not of.expired() for of in self.seen))


def activations_alive(run: Callable, blocks: int, cotangents: int = 2, shared: bool = False) -> int:
    """How many outputs of tanh layers are alive at once in the passes over a deep network."""
    counted = Counted()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for linear in self.linears:
                x = linear(x).tanh()
                counted.add(x)
            return x

    torch.manual_seed(0)
    body, head = nn.ModuleList(Layer() for _ in range(blocks)), nn.Linear(WIDTH, CLASSES)
    if shared:
        body = nn.ModuleList([body[0]] * blocks)
    network = nn.ModuleList([body, head])
    with FisherRecorder(network) as recorder:
        logits = head(run(body, torch.randn(4, 50, WIDTH)).mean(1))
        recorder.backward(logits, torch.randn(cotangents, 4, CLASSES))
    return counted.most


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_region_is_held(reentrant: bool) -> None:
    assert activations_alive(plain, 6) >= 24
    few, many = (activations_alive(each(reentrant), blocks) for blocks in (4, 12))
    assert many - few == 8  # of each further region its output alone
    assert many <= 12 + 2 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_shared_layers_hold_one_region_and_their_gradients(reentrant: bool) -> None:
    """The inputs of a layer that all regions use are not kept until the last region has run."""
    few, many = (activations_alive(each(reentrant), blocks, shared=True) for blocks in (4, 12))
    assert many - few == 8
    assert many <= 12 + 3 * 4


def test_recomputations() -> None:
    """A region runs once for each cotangent. Where owners depend on what it saved, it runs once more."""
    network = same_weights(Tokens, each(False))
    for cotangents in (1, 3):
        with FisherRecorder(network) as recorder:
            recorder.backward(network(ids_of(3)), torch.randn(cotangents, 3, CLASSES, dtype=torch.float64))
        assert recorder.regions.recomputations == 3 * cotangents
    order = torch.tensor([0, 1, 2, 3])
    network = two_layers(lambda one, x: checkpoint(lambda x: one(x)[order].tanh(), x, use_reentrant=False))
    with FisherRecorder(network) as recorder:
        recorder.backward(network(X), torch.randn(2, 4, CLASSES, dtype=torch.float64))
    assert recorder.regions.recomputations == 3


def test_nothing_is_held_afterwards() -> None:
    network = same_weights(Tokens, nested(False, False))
    with FisherRecorder(network) as recorder:
        logits = network(ids_of(3))
        regions = list(recorder.regions._alive)
        u = torch.randn(2, 3, CLASSES, dtype=torch.float64)
        first = recorder.backward(logits, u, retain_graph=True)
        for region in regions:
            assert not region.kept
            assert not region.frame.recomputed
            assert not any(of().handles for of in region.frame.weak_holders)
        again = recorder.backward(logits, u)
        assert all(torch.equal(first[name], again[name]) for name in first)
        del logits, regions, region
        assert not recorder.regions._alive
    assert torch.utils.checkpoint._checkpoint_hook.__name__ == "_checkpoint_hook"
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"


def test_the_budget_of_kept_graphs_counts_regions_once() -> None:
    sizes = {}
    for name, run in (("plain", plain), ("each", each(True)), ("nested", nested(False, False))):
        network = same_weights(Tokens, run)
        with FisherRecorder(network) as recorder:
            sizes[name] = graph_bytes(network(ids_of(6)), recorder.regions)
    assert sizes["nested"] < sizes["each"] < 0.4 * sizes["plain"]


def test_training_in_another_thread_is_left_alone() -> None:
    """Other threads get torch's own checkpointing, also while a recorder is open."""
    kinds = []

    def train() -> None:
        layer = nn.Linear(3, 3)
        y = checkpoint(layer, torch.ones(2, 3, requires_grad=True), use_reentrant=True)
        kinds.append(y.grad_fn.name())
        y.sum().backward()
        kinds.append(layer.weight.grad is not None)

    with FisherRecorder(nn.Linear(2, 2)):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert kinds == ["CheckpointFunctionBackward", True]


def test_own_training_within_the_context() -> None:
    """A caller's own backward pass through a followed region works, also twice."""
    for run in (each(True), each(False, context_fn=SELECTIVE)):
        network, truth = same_weights(Tokens, run), Tokens(plain)
        with FisherRecorder(network):
            loss = network(ids_of(3)).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        truth(ids_of(3)).square().sum().backward()
        for p, q in zip(network.parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(p.grad, 2 * q.grad)


def test_variances_are_learned_without_checkpointing() -> None:
    """The robust Fisher draws noise in its layers, which a recomputation would draw anew."""
    x, y = images_of(6).float(), torch.arange(6) % CLASSES
    found = []
    for run in (plain, each(True), each(False)):
        network = same_weights(Images, run).float()
        generator = torch.Generator().manual_seed(0)
        found.append(variational_fisher(network, lambda epoch: [(x, y)], generator=generator, epochs=2).log_variance)
    for other in found[1:]:
        assert all(torch.equal(q, other[name]) for name, q in found[0].items())


# ---- refusals


def two_layers(run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(run(self.one, self.stem(x)))

    return Two().double()


def record(network: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    with FisherRecorder(network, **options) as recorder:
        return recorder.backward(network(x), torch.randn(2, len(x), CLASSES, dtype=torch.float64))


X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("unsupported", ["error", "exact"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_of_another_shape_is_refused(reentrant: bool, unsupported: str) -> None:
    calls = []

    def region(one: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        return (one(x) if len(calls) == 1 else one(x[:3])).tanh()

    network = two_layers(lambda one, x: checkpoint(partial(region, one), x, use_reentrant=reentrant))
    with pytest.raises(UnsupportedError, match=r"region '.*region' fails when it is recomputed.*switch checkpointing"):
        record(network, X, unsupported=unsupported)


def test_a_region_that_saves_more_is_refused() -> None:
    calls = []

    def region(one: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        return one(x).tanh() if len(calls) == 1 else one(x)

    network = two_layers(lambda one, x: checkpoint(partial(region, one), x, use_reentrant=False))
    with pytest.raises(UnsupportedError, match=r"fails when it is recomputed.*number of tensors"):
        record(network, X)


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        ("torch's", lambda x: F.dropout(x, 0.5)),
        ("Python's", lambda x: x * (1 + random.random())),
        ("NumPy's", lambda x: x * (1 + np.random.rand())),  # noqa: NPY002
    ],
)
def test_other_random_numbers_are_refused(generator: str, draw: Callable[[Tensor], Tensor]) -> None:
    """Without the random state, a region recomputes another function. Python's own generator is never restored."""
    network = two_layers(
        lambda one, x: checkpoint(lambda x: one(draw(x)).tanh(), x, use_reentrant=False, preserve_rng_state=False)
    )
    message = f"draws other random numbers from {generator} generator when it is recomputed"
    with pytest.raises(UnsupportedError, match=message):
        record(network, X)


@pytest.mark.parametrize("wanted", ["one.bias", "one.weight"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_weights_that_change_before_the_backward_pass_are_refused(reentrant: bool, wanted: str) -> None:
    """Plain autograd notices this too, but torch's checkpointing computes with the new weights."""
    network = two_layers(lambda one, x: checkpoint(lambda x: one(x).tanh(), x, use_reentrant=reentrant))
    with FisherRecorder(network, ["stem.weight", wanted]) as recorder:
        output = network(X)
        with torch.no_grad():
            network.one.weight.mul_(2)
        with pytest.raises(UnsupportedError, match=r"region '.*' reads a parameter that was changed in place"):
            recorder.backward(output, torch.ones_like(output))
    record(network, X)  # a new forward pass has the new weights


@pytest.mark.parametrize("reentrant", [False, True])
def test_changes_of_what_a_gradient_needs_are_refused(reentrant: bool) -> None:
    """The slope of a sigmoid follows from its output, which the region overwrites. Plain autograd notices this."""
    network = two_layers(
        lambda one, x: checkpoint(lambda x: one(x).sigmoid().mul_(2).tanh(), x, use_reentrant=reentrant)
    )
    with pytest.raises(UnsupportedError, match="or changes a tensor in place that a gradient needs"):
        record(network, X)


def test_changes_before_a_tensor_is_saved_are_allowed() -> None:
    """Also where the region's input was changed before, and its output is changed afterwards."""

    def run(way: Callable) -> nn.Module:
        return two_layers(lambda one, x: way(lambda x: one(x).mul_(2).sigmoid(), x.mul_(3)).mul_(2))

    def squares(network: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(5)  # of the cotangents
        return record(network, X)

    want = squares(run(lambda function, x: function(x).clone()))
    for hooks in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        with hooks:
            got = squares(run(partial(checkpoint, use_reentrant=False)))
        for name, q in want.items():
            torch.testing.assert_close(got[name], q)


def test_an_error_of_the_region_is_named() -> None:
    calls = []

    def region(one: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > 1:
            raise KeyError("gone")
        return one(x).tanh()

    def outer(one: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(partial(region, one), x.sin(), use_reentrant=False).sin()

    for run in (region, outer):
        calls.clear()
        network = two_layers(lambda one, x, run=run: checkpoint(partial(run, one), x, use_reentrant=False))
        with pytest.raises(UnsupportedError, match=r"region '.*' fails when it is recomputed \(KeyError: 'gone'\)"):
            record(network, X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_examples_that_interact_in_a_region_are_refused(reentrant: bool) -> None:
    network = two_layers(lambda one, x: checkpoint(lambda x: one(x - x.mean(0)), x, use_reentrant=reentrant))
    with pytest.raises((UnsupportedError, t2v_fast.SelfCheckError), match="interact"):
        fisher(network, [X])
    norm = nn.BatchNorm1d(6).double().train()
    network = two_layers(lambda one, x: checkpoint(lambda x: norm(one(x)), x, use_reentrant=reentrant))
    network.norm = norm
    with pytest.raises(UnsupportedError, match="batch norm in training mode"):
        record(network, X)


def test_what_is_read_in_a_region_tells_owners() -> None:
    """An index within a region is read where it was recomputed: rows of other examples are noticed."""
    order = torch.tensor([1, 0, 3, 2])
    network = two_layers(lambda one, x: checkpoint(lambda x: one(x)[order], x, use_reentrant=False))
    got = record(network, X)
    assert got.keys() == dict(network.named_parameters()).keys()
    with pytest.raises((t2v_fast.SelfCheckError, UnsupportedError)):  # no two examples can be run, as the order says
        fisher(network, [X])


def test_a_forward_pass_in_another_thread_is_refused() -> None:
    def elsewhere(of: Callable[[], Tensor]) -> Tensor:
        found = []
        thread = threading.Thread(target=lambda: found.append(of()))
        thread.start()
        thread.join()
        return found[0]

    for reentrant in (True, False):
        network = two_layers(
            lambda one, x, reentrant=reentrant: checkpoint(lambda x: one(x).tanh(), x, use_reentrant=reentrant)
        )
        with FisherRecorder(network) as recorder:
            logits = elsewhere(partial(network, X))
            with pytest.raises(UnsupportedError, match=r"activation checkpointing.*thread and the context"):
                recorder.backward(logits, torch.ones_like(logits))


class CheckpointFunction(torch.autograd.Function):
    """As another library's checkpointing."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return None, g


def test_the_checkpointing_of_other_libraries_is_refused() -> None:
    network = two_layers(lambda one, x: CheckpointFunction.apply(one, x))
    with pytest.raises(UnsupportedError, match="CheckpointFunctionBackward is in the way: activation checkpointing"):
        record(network, X)


# ---- random networks


def test_random_networks(caplog: pytest.LogCaptureFixture) -> None:
    """Random modules of random networks are checkpointed. The outcome is that of the network without it."""
    caplog.set_level(logging.ERROR)
    for seed in range(FIRST_SEED, FIRST_SEED + NETWORKS):
        recipe = drawn(seed)
        network = Network(recipe)
        done = checkpoint_some(network, seed)
        outcome = examine(recipe, network, plain=Network(recipe))
        assert outcome.kind == "exact" or examine(recipe).kind == outcome.kind == "refused", (
            f"{recipe}, checkpointed {done}: {outcome.wrong + outcome.crashed + outcome.refused}"
        )


# ---- transformers


MODELS = {
    "BERT": ("Bert", "SequenceClassification", {"num_labels": CLASSES, "intermediate_size": 24}),
    "GPT-2": ("GPT2", "SequenceClassification", {"num_labels": CLASSES, "pad_token_id": 0}),
    "Llama": ("Llama", "CausalLM", {"num_key_value_heads": 1, "intermediate_size": 24}),
    "ViT": ("ViT", "ImageClassification", {"num_labels": CLASSES, "image_size": 8, "patch_size": 4}),
}


@pytest.mark.slow_unless(name=["BERT", "Llama"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(name: str, reentrant: bool) -> None:
    """``gradient_checkpointing_enable`` works in training mode only, so all dropout is zero."""
    library = pytest.importorskip("transformers")
    kind, head, options = MODELS[name]
    config = getattr(library, f"{kind}Config")(
        **{"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **options}
    )
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    truth = getattr(library, f"{kind}For{head}")(config).double().train()
    network = copy.deepcopy(truth)
    network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    x = {"pixel_values": torch.randn(5, 3, 8, 8, dtype=torch.float64)}
    if name != "ViT":
        ids = torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(6) < torch.tensor([6, 3, 4, 6, 2])[:, None]
        x = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    batches = [{key: t[rows] for key, t in x.items()} for rows in (slice(0, 2), slice(2, 5))]
    with FisherRecorder(network) as recorder:
        logits = network(**batches[0]).logits
        recorder.backward(logits, torch.randn(2, *logits.shape, dtype=torch.float64))
    # Three layers, for two cotangents each. In Llama, owners depend on what the rotations of positions have saved.
    assert recorder.regions.recomputations == 3 * (2 + (name == "Llama"))
    assert signature_of(network) is not None  # so that the self-check remembers the network
    got, want = (fisher(model, batches, "exact", level="sequence") for model in (network, truth))
    for key, q in want.items():
        torch.testing.assert_close(got[key], q, rtol=1e-8, atol=1e-14)


def test_a_checkpointed_module_may_be_copied() -> None:
    block = checkpointed(nn.Linear(5, 5).double(), True)
    assert torch.equal(copy.deepcopy(block)(X), block(X))
