"""One forward pass for features and Fisher gives what two give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small import PREPROCESSING, shapes, small_probe
from torch import Tensor, nn

from t2v_fast import DataError, Embedding, Probe, SelfCheckError, Task2Vec
from t2v_fast.estimation.allocation import FORWARD, OVERHEAD
from t2v_fast.estimation.one_forward import FeatureTap, by_need, graph_bytes, passes_through_graphs
from t2v_fast.estimation.sketches import packed

UNCERTAIN = {"head": "adam", "head_options": {"epochs": 1, "draws": 640}}  # a head under which needs differ


def runs_of(probe: Probe) -> list[int]:
    """The sizes of the batches that the probe's network is run on from now on."""
    sizes: list[int] = []
    probe.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def assert_same(got: Embedding, want: Embedding) -> None:
    np.testing.assert_allclose(got.hessian, want.hessian, rtol=1e-9)
    np.testing.assert_allclose(got.standard_error, want.standard_error, rtol=1e-7)
    assert got.fingerprint == want.fingerprint
    drop = ("seconds", "seconds_waiting_for_data")
    assert {k: v for k, v in got.meta.items() if k not in drop} == {k: v for k, v in want.meta.items() if k not in drop}


@pytest.mark.parametrize("estimator", ["exact", "deflated", "hutchinson", "monte_carlo", "empirical"])
@pytest.mark.parametrize("graphs", [5, 2, 0])
@pytest.mark.parametrize(
    "options",
    [
        {"samples": 2},
        {"samples": 3, "balanced": False},
        UNCERTAIN,
    ],
)
def test_it_equals_two_passes(estimator: str, graphs: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all batches, some or none are kept; with the same draws, in float64."""
    options = {"estimator": estimator, "batch_size": 7, "dtype": "float64", "seed": 3, **options}
    images, labels = shapes(30)[0], np.arange(30) % 5
    want = Task2Vec(small_probe(), activation_megabytes=0, **options).embed((images, labels))
    room = iter([0] * graphs + [math.inf] * 5)
    monkeypatch.setattr("t2v_fast.estimation.one_forward.graph_bytes", lambda *_: next(room))
    task2vec = Task2Vec(small_probe(), self_check=False, **options)
    sizes = runs_of(task2vec.probe)
    assert_same(task2vec.embed((images, labels)), want)
    assert sizes[:5] == [7, 7, 7, 7, 2]
    if estimator != "deflated":  # every image has as many cotangents as the others
        assert sum(sizes[5:]) == max(0, 30 - 7 * graphs)


@pytest.mark.parametrize("passes", [0, 1, 2, 3])
@pytest.mark.parametrize("graphs", [5, 2])
@pytest.mark.parametrize("task_type", ["multiclass", "multilabel"])
def test_cotangents_that_are_left_go_through_new_graphs(
    passes: int, graphs: int, task_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 7, "dtype": "float64", "samples": 3, "task_type": task_type, "self_check": False}
    images, labels = shapes(30)[0], np.arange(30) % 6
    if task_type == "multilabel":
        labels = np.eye(6, dtype=np.int64)[labels]
    want = Task2Vec(small_probe(), activation_megabytes=0, **options).embed((images, labels))
    room = iter([0] * graphs + [math.inf] * 5)
    monkeypatch.setattr("t2v_fast.estimation.one_forward.graph_bytes", lambda *_: next(room))
    monkeypatch.setattr("t2v_fast.estimation.one_forward.passes_through_graphs", lambda *counts: passes)
    task2vec = Task2Vec(small_probe(), **options)
    sizes = runs_of(task2vec.probe)
    assert_same(task2vec.embed((images, labels)), want)
    others = 0 if graphs == 5 else 16
    again = sum(sizes[5:]) - others
    if passes < 2:
        assert again > 0
    assert again == 30 - others if passes == 0 else again <= 30 - others


def test_images_are_run_once_where_memory_allows() -> None:
    images, labels = shapes(30)
    for options, passes in (
        ({}, 1),
        ({"activation_megabytes": 0}, 2),
        ({"method": "variational", "method_options": {"num_samples": 30}}, 2),
        ({"estimator": "batch_mean"}, 2),
    ):
        probe = small_probe()
        options = {"estimator": "exact", "self_check": False, "batch_size": 10, **options}
        if options.get("method"):
            options["estimator"] = "deflated"
        sizes = runs_of(probe)
        Task2Vec(probe, **options).embed((images, labels))
        assert sizes == [10] * 3 * passes
    probe = small_probe()
    sizes = runs_of(probe)
    Task2Vec(probe, batch_size=10, self_check=False).embed(_Stream(images, labels))
    assert sizes == [10] * 6  # an iterable cannot be read by number


class _Stream:
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.items = list(zip(images, labels.tolist(), strict=True))

    def __iter__(self):
        return iter(self.items)


class _Noisy:
    """Other noise in the images each time that they are read."""

    def __init__(self) -> None:
        self.images, self.labels = shapes(24)
        self.rng = np.random.default_rng(0)
        self.read: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        noise = self.rng.integers(0, 60, self.images[index].shape, dtype=np.uint8)
        image = self.images[index] // 2 + noise
        self.read.setdefault(index, image)
        return image, int(self.labels[index])


@pytest.mark.parametrize("estimator", ["exact", "deflated"])
def test_images_that_differ_at_each_read_are_read_once(estimator: str) -> None:
    noisy = _Noisy()
    options = {"estimator": estimator, "dtype": "float64", "batch_size": 7, "cache_megabytes": 0}
    got = Task2Vec(small_probe(), **options).embed(noisy)
    images = np.stack([noisy.read[k] for k in range(24)])
    want = Task2Vec(small_probe(), activation_megabytes=0, **options).embed((images, noisy.labels))
    assert_same(got, want)


def test_the_order_of_images_changes_nothing() -> None:
    images, labels = shapes(30)
    order = np.random.default_rng(0).permutation(30)
    options = {"estimator": "exact", "dtype": "float64", "batch_size": 7}
    one = Task2Vec(small_probe(), **options).embed((images, labels))
    other = Task2Vec(small_probe(), **options).embed((images[order], labels[order]))
    np.testing.assert_allclose(one.hessian, other.hessian, rtol=1e-6)  # heads are fitted to a tolerance


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.view(-1).mul_(0.5)  # a view that channels-last images do not have, so that no copy reaches the network
        return x


def test_a_network_that_writes_over_its_input() -> None:
    """Its inputs cannot serve again, and are read again."""

    def probe() -> Probe:
        network = small_probe().network
        return Probe(nn.Sequential(_InPlace(), *network), preprocessing=PREPROCESSING)

    images, labels = shapes(30)[0], np.arange(30) % 5
    options = {"dtype": "float64", "batch_size": 7, "self_check": False, **UNCERTAIN}
    want = Task2Vec(probe(), activation_megabytes=0, **options).embed((images, labels))
    other = probe()
    sizes = runs_of(other)
    assert_same(Task2Vec(other, **options).embed((images, labels)), want)
    assert sum(sizes) >= 60


def test_the_network_is_put_back() -> None:
    images, labels = shapes(24)
    probe = small_probe()
    head = probe.network[-1]
    probe.network[0].weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in probe.network.named_parameters()}
    task2vec = Task2Vec(probe)
    with pytest.raises(DataError, match="images of one class only"):
        task2vec.embed((images, np.zeros(24, int)))
    task2vec.embed((images, labels))
    assert probe.network[-1] is head
    after = dict(probe.network.named_parameters())
    assert list(after) == list(before)
    for name, (required, value) in before.items():
        assert after[name].requires_grad == required
        assert torch.equal(after[name], value)


class _Coupled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.detach().mean(0)


def test_the_self_check_watches_the_shared_pass() -> None:
    network = small_probe().network
    probe = Probe(nn.Sequential(_Coupled(), *network), preprocessing=PREPROCESSING)
    with pytest.raises(SelfCheckError, match="examples interact"):
        Task2Vec(probe).embed(shapes(24))


def test_features_that_are_mostly_zero_pass_the_self_check() -> None:
    """As behind a ReLU: their median spread is zero, and rounding is not."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        network[1].bias.fill_(-3.0)
    probe = Probe(network, preprocessing=PREPROCESSING)
    assert float((probe.features(torch.randn(9, 3, 12, 12)) == 0).double().mean()) > 0.5
    images, labels = shapes(24)
    assert np.isfinite(Task2Vec(probe, head_options={"weight_decay": 1.0}).embed((images, labels)).hessian).all()


def test_a_tap_needs_one_vector_for_each_example() -> None:
    with pytest.raises(ValueError, match=r"the features before the head are \[2, 5, 4\], expected \[2, 4\]"):
        FeatureTap(4)(torch.zeros(2, 5, 4))


@pytest.mark.parametrize("seed", range(6))
def test_passes_cost_the_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes, size = [4, 4, 3], 4
    counts = torch.randint(1, (2, 4, 9)[seed % 3], (11,), generator=generator)

    def cost(passes: int) -> float:
        through = sum((len(part) + OVERHEAD) * min(passes, int(part.max())) for part in counts.split(sizes))
        left = counts[counts > passes] - passes
        again = by_need(left, torch.arange(len(left)), size)
        return through + sum((len(b) + OVERHEAD) * (FORWARD + int(left[b].max())) for b in again)

    best = passes_through_graphs(sizes, counts, size)
    assert cost(best) == pytest.approx(min(cost(k) for k in range(int(counts.max()) + 1)))
    assert passes_through_graphs([], counts[:0], size) == 0


def test_packed_cotangents_keep_their_order() -> None:
    u = torch.zeros(4, 3, 2)
    u[0, 0], u[3, 0], u[2, 1] = 1, 2, 3
    front, counts = packed(u)
    assert counts.tolist() == [2, 1, 0]
    assert front[:, :, 0].tolist() == [[1, 3, 0], [2, 0, 0]]
    assert packed(u[:, 2:])[0].shape == (0, 1, 2)


def test_the_estimate_of_memory_is_high() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten())
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 3, 12, 12)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = network(x)
    inputs = sum(t.numel() * t.element_size() for t in (x, *network.parameters()))
    assert sum(saved.values()) - inputs <= graph_bytes(output)
    assert graph_bytes(output) == 4 * 2 * (2 * 8 * 10 * 10 + 2 * 4 * 4 * 4)  # of the layers but Flatten


class Viewed(nn.Module):
    """A network whose output is a view of its head's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).view(len(x), -1)


def test_an_output_that_is_a_view_of_the_head_s() -> None:
    torch.manual_seed(0)
    probe = Probe(Viewed().double(), preprocessing=PREPROCESSING)
    data = shapes(12)[0], np.arange(12) % 3
    want = Task2Vec(probe, activation_megabytes=0).embed(data)
    assert_same(Task2Vec(probe).embed(data), want)


def test_a_tap_knows_its_own_outputs_only() -> None:
    tap = FeatureTap(3)
    features = torch.randn(2, 3, requires_grad=True)
    output = tap(features)
    assert tap.features_of(output) is features
    assert tap.features_of(output.view(2, -1)) is features
    for other in (output * 1, output[:, :3]):
        with pytest.raises(ValueError, match="must end with its head"):
            tap.features_of(other)


_IMAGES = [0]


def _count_images(module: nn.Module, inputs: tuple[Tensor]) -> None:
    _IMAGES[0] += len(inputs[0])  # a global: a list in a closure would be state of the network, which changes


def test_the_verdict_of_the_self_check_serves_the_next_task() -> None:
    probe = small_probe()
    probe.network.register_forward_pre_hook(_count_images)
    task2vec, counts = Task2Vec(probe, batch_size=8), []
    for seed in range(3):
        before = _IMAGES[0]
        task2vec.embed(shapes(24, seed=seed), name=f"task {seed}")
        counts.append(_IMAGES[0] - before)
    assert counts[1] == counts[2] < counts[0]
