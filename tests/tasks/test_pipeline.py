"""The whole pipeline on a small probe, against the same steps written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import per_example_squares, reduce, relative_error
from small import PREPROCESSING, shapes, small_probe, write_folder
from torch import nn

from t2v_fast import DataError, Embedding, FingerprintMismatch, Probe, Task2Vec, TaskData, UnsupportedError, distance
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.tasks.head import GRID, fit_head
from t2v_fast.tasks.task_run import TaskRun


@pytest.mark.parametrize("balanced", [True, False])
def test_embed_is_features_head_fisher(balanced: bool) -> None:
    images, labels = shapes(20)
    keep = np.r_[0:12, 13, 16]  # classes of unequal size
    images, labels = images[keep], labels[keep]
    probe = small_probe()
    embedding = Task2Vec(probe, estimator="exact", balanced=balanced, batch_size=5).embed((images, labels), name="t")

    x, y = torch.stack([PREPROCESSING(i) for i in images]), torch.from_numpy(labels)
    counts = torch.bincount(y).double()
    w = (1 / counts[y] if balanced else torch.ones(len(y))).double()
    w = w / w.sum()
    network = small_probe().network
    features = network[:7](x).detach()
    network[7] = fit_head(features, y, num_classes=3, weights=w).linear
    network, x = network.double(), x.double()
    with torch.no_grad():
        u = cotangents(network(x), "exact")
    squares = per_example_squares(network, x, u)
    want = torch.cat([torch.tensordot(w, reduce(squares[f"{k}.weight"], "filter"), 1) for k in (0, 1, 3)])
    assert relative_error(torch.from_numpy(embedding.hessian), want) < 1e-4
    assert embedding.layer_names == ["0.weight", "1.weight", "3.weight"]
    assert len(embedding) == 6 + 6 + 8
    assert embedding.num_examples == 14
    assert (embedding.scale == 1).all()
    assert embedding.standard_error is not None
    assert embedding.meta["task"] == "t"
    assert embedding.meta["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize("estimator", ["exact", "deflated", "hutchinson"])
def test_names_of_labels_change_nothing(estimator: str) -> None:
    images, labels = shapes(20)
    task2vec = Task2Vec(small_probe(), estimator=estimator)
    want = task2vec.embed((images, labels))
    for names in ([2, 1, 0], [100, 7, 50], [1, 2, 0]):
        found = task2vec.embed((images, np.array(names)[labels]))
        np.testing.assert_array_equal(found.hessian, want.hessian)
        np.testing.assert_array_equal(found.standard_error, want.standard_error)


def test_the_stages_one_by_one() -> None:
    """A task can be taken through the stages by hand; several runs at a time do not disturb each other."""
    task2vec = Task2Vec(small_probe(), activation_megabytes=0)
    runs = [TaskRun(TaskData.of(shapes(20, seed=seed), name="t")) for seed in range(2)]
    for run in runs:
        task2vec.compute_features(run)
    for run in runs:
        task2vec.encode_labels(run)
        task2vec.fit_heads([run])
        task2vec.allocate(run)
    for run in runs:
        task2vec.compute_fisher(run)
    for seed, run in enumerate(runs):
        found, want = task2vec.make_embedding(run), task2vec.embed(shapes(20, seed=seed), name="t")
        np.testing.assert_array_equal(found.hessian, want.hessian)
        assert found.fingerprint == want.fingerprint
        assert found.meta["seconds_waiting_for_data"] == round(run.waited, 3)
        assert run.waited > 0
    run, alone = runs[0], runs[0].fisher.vector()
    task2vec.compute_shared_fisher(TaskRun(run.data, labels=run.labels), [run])
    torch.testing.assert_close(run.fisher.vector(), alone, rtol=1e-4, atol=1e-12)


def test_related_tasks_are_near() -> None:
    task2vec = Task2Vec(small_probe())
    same, other = [task2vec.embed(shapes(60, seed=s)) for s in (0, 1)], task2vec.embed(shapes(60, 2, seed=2))
    d = distance.pdist([*same, other])
    assert d[0, 1] < d[0, 2]
    assert d[0, 1] < d[1, 2]


def test_seeds_files_and_fingerprints(tmp_path: Path) -> None:
    task = shapes()
    a = Task2Vec(small_probe(), seed=1).embed(task)
    assert np.array_equal(a.hessian, Task2Vec(small_probe(), seed=1, batch_size=32).embed(task).hessian)
    task2vec = Task2Vec(small_probe(), seed=1)
    with torch.inference_mode():
        assert np.array_equal(a.hessian, task2vec.embed(task).hessian)
    a.save(tmp_path / "a.safetensors")
    back = Embedding.load(tmp_path / "a.safetensors")
    assert distance.pdist([a, back])[0, 1] == 0
    comparable = Task2Vec(small_probe(), estimator="hutchinson", seed=5).embed(task)
    assert distance.pdist([a, comparable])[0, 1] < 0.5
    for other in (
        Task2Vec(small_probe(seed=3)),
        Task2Vec(small_probe(), estimator="batch_mean"),
        Task2Vec(small_probe(), balanced=False),
        Task2Vec(small_probe(), head="adam", head_options={"epochs": 1, "draws": 100}),
        Task2Vec(small_probe(), head_options={"weight_decay": "cv"}),
    ):
        with pytest.raises(FingerprintMismatch):
            distance.pdist([a, other.embed(task)])


def test_a_cross_validated_head() -> None:
    task2vec = Task2Vec(small_probe(), estimator="exact", head_options={"weight_decay": "cv"})
    found = task2vec.embed(shapes())
    assert found.fingerprint["head"] == {"method": "newton", "weight_decay": "cv"}
    assert found.meta["head_weight_decay"] in GRID
    told = {"weight_decay": found.meta["head_weight_decay"]}
    np.testing.assert_array_equal(
        found.hessian, Task2Vec(small_probe(), estimator="exact", head_options=told).embed(shapes()).hessian
    )
    assert Task2Vec(small_probe()).embed(shapes()).meta["head_weight_decay"] == 1e-4


def test_a_flat_head_has_the_fisher_of_equally_likely_classes() -> None:
    images, labels = shapes(18)
    t, options = 1000.0, {"estimator": "exact", "batch_size": 5}
    found = Task2Vec(small_probe(), head_options={"temperature": t}, **options).embed((images, labels))
    network, x = small_probe().network, torch.stack([PREPROCESSING(i) for i in images])
    network[7] = fit_head(network[:7](x).detach(), torch.from_numpy(labels), num_classes=3).linear
    # Every class has probability 1/3, whatever the head says: cotangents (e_c - 1/3) / sqrt(3).
    u = (torch.eye(3, dtype=torch.float64) - 1 / 3)[:, None].expand(-1, len(x), -1) / 3**0.5
    squares = per_example_squares(network.double(), x.double(), u)
    want = torch.cat([reduce(squares[f"{k}.weight"], "filter").mean(0) for k in (0, 1, 3)]) / t**2
    assert relative_error(torch.from_numpy(found.hessian), want) < 2e-2  # the classes are not quite equally likely
    hotter = Task2Vec(small_probe(), head_options={"temperature": 100 * t}, **options).embed((images, labels))
    assert relative_error(torch.from_numpy(hotter.hessian) * 100**2, want) < 1e-3
    assert found.fingerprint["head"] == {"method": "newton", "temperature": t}
    # What sharing a pass, and the default estimator, make of it.
    shared = Task2Vec(small_probe(), head_options={"temperature": t}, **options)
    again = shared.embed_label_sets((images, labels), {"a": labels, "b": labels % 2})["a"]
    np.testing.assert_allclose(again.hessian, found.hessian, rtol=1e-4)
    estimated = Task2Vec(small_probe(), samples=8, head_options={"temperature": t}).embed((images, labels))
    assert relative_error(torch.from_numpy(estimated.hessian), torch.from_numpy(found.hessian)) < 1e-4


def test_float16_has_no_flat_heads() -> None:
    """Gradients of equally likely classes are divided by the temperature, and too small for float16."""
    options = {"head_options": {"temperature": 1000}, "dtype": "float16"}
    with pytest.raises(ValueError, match="temperature is 1000, and float16 holds gradients for at most 100"):
        Task2Vec(small_probe(), **options).embed(shapes(18))
    assert Task2Vec(small_probe(), **options | {"dtype": "bfloat16"}).embed(shapes(18)).hessian.any()


def test_multilabel_tasks() -> None:
    images, labels = shapes(30)
    targets = np.stack([labels == 0, labels > 0], 1).astype(np.int64)
    e = Task2Vec(small_probe(), task_type="multilabel").embed((images, targets))
    assert e.meta["classes"] == ["0", "1"]
    assert e.hessian.sum() > 0


@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "monte_carlo", "empirical", "batch_mean"])
def test_every_estimator(estimator: str) -> None:
    e = Task2Vec(small_probe(), estimator=estimator, batch_size=7).embed(shapes())
    assert e.meta["estimator"] == estimator
    assert np.isfinite(e.hessian).all()
    assert e.hessian.sum() > 0


def test_a_bare_network_is_a_probe() -> None:
    network = small_probe().network
    e = Task2Vec(network).embed((torch.randn(12, 3, 12, 12), torch.arange(12) % 2))
    assert e.fingerprint["probe"] == "Sequential"


def test_the_probe_is_left_as_it_was() -> None:
    probe = small_probe()
    head, before = probe.network[7], {k: v.clone() for k, v in probe.network.state_dict().items()}
    Task2Vec(probe).embed(shapes())
    assert probe.network[7] is head
    for key, value in probe.network.state_dict().items():
        assert torch.equal(value, before[key])


def test_unreadable_images_are_reported(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "task", *shapes())
    (folder / "class 2" / "002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"task 'task': .*002\.png cannot be read"):
        Task2Vec(small_probe()).embed(folder)
    e = Task2Vec(small_probe()).embed(folder, skip_unreadable=True)
    assert e.num_examples == 23
    assert [Path(p).name for p in e.meta["skipped_images"]] == ["002.png"]
    assert e.meta["left_out"] == []
    (folder / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"left out class folders without an image \(1\): empty \(empty\)"):
        e = Task2Vec(small_probe()).embed(folder, skip_unreadable=True)
    assert e.meta["left_out"] == ["class folders without an image (1): empty (empty)"]
    assert e.meta["classes"] == ["class 0", "class 1", "class 2"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown task_type 'regression'"):
        Task2Vec(small_probe(), task_type="regression")
    with pytest.raises(ValueError, match="unknown estimator"):
        Task2Vec(small_probe(), estimator="best")
    with pytest.raises(ValueError, match="no head was found"):
        Task2Vec(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()))
    with pytest.raises(DataError, match="one class only"):
        Task2Vec(small_probe()).embed((shapes()[0], shapes()[1] * 0))
    probe = small_probe()
    probe.network.train()
    with pytest.raises(RuntimeError, match="batch norm in training mode"):
        Task2Vec(probe).embed(shapes())
    probe = small_probe()
    nn.init.constant_(probe.network[3].weight, float("inf"))
    with pytest.raises(ValueError, match="features of example 0 are not finite"):
        Task2Vec(probe).embed(shapes())
    data = TaskData.of(shapes())
    assert Task2Vec(small_probe()).embed(data).num_examples == 24


def test_batches_of_large_images_are_small() -> None:
    probe = small_probe()
    for size, images in ((32, 32), (112, 32), (128, 24), (224, 8), (448, 4)):
        probe.preprocessing = probe.preprocessing.sized(size)
        assert Task2Vec(probe).batch_size == images
        assert Task2Vec(probe, batch_size=17).batch_size == 17
        assert Task2Vec(probe, estimator="batch_mean").batch_size == 32  # whose result depends on it


def test_reduced_precision_is_close_and_kept_apart() -> None:
    probe = small_probe()
    full = Task2Vec(probe).embed(shapes())
    task2vec = Task2Vec(probe, dtype=torch.bfloat16)
    reduced = task2vec.embed(shapes())
    for module in task2vec.probe.network.modules():
        exact = isinstance(module, nn.BatchNorm2d)
        assert {p.dtype for p in module.parameters(recurse=False)} <= {torch.float32 if exact else torch.bfloat16}
    assert next(probe.network.parameters()).dtype == torch.float32  # the caller's own is not rounded
    a, b = full.hessian.astype(float), reduced.hessian.astype(float)
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.99
    with pytest.raises(FingerprintMismatch, match="dtype"):
        distance.pdist([full, reduced])
    with pytest.raises(ValueError, match="expected a floating-point one"):
        Task2Vec(probe, dtype=torch.int8)


def test_a_probe_that_transforms_its_weights() -> None:
    """Refused by name, or exact by request; label sets too."""

    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return torch.nn.functional.conv2d(x, w, self.bias)

    torch.manual_seed(0)
    network = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    probe = Probe(network, preprocessing=PREPROCESSING)
    images, labels = shapes()
    with pytest.raises(UnsupportedError, match=r"'0\.weight'.*transformed before use.*unsupported='exact'"):
        Task2Vec(probe).embed((images, labels))
    task2vec = Task2Vec(probe, unsupported="exact")
    embedding = task2vec.embed((images, labels))
    assert embedding.hessian.shape == (4,)
    assert embedding.hessian.all()
    (shared,) = task2vec.embed_label_sets((images, labels), {"t": labels}).values()
    np.testing.assert_allclose(shared.hessian, embedding.hessian, rtol=1e-5)
    with pytest.raises(ValueError, match="unsupported is 'skip'"):
        Task2Vec(probe, unsupported="skip")


def test_tolerance_is_met() -> None:
    """Cotangents and images are added until the error against `exact` is small enough, and the error is that said."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(300, 3, 12, 12, generator=generator), torch.arange(300) % 6  # nothing to be learned
    options = {"head_options": {"weight_decay": 1e-2}}
    probe, visited = small_probe(), []
    exact = Task2Vec(small_probe(), estimator="exact", **options).embed((images, labels))
    probe.network[0].register_forward_hook(lambda module, inputs, output: visited.append(len(inputs[0])))
    reached = []
    for tolerance in (0.3, 0.1, 1e-9):
        visited.clear()
        found = Task2Vec(probe, tolerance=tolerance, self_check=False, **options).embed((images, labels))
        assert found.meta["tolerance"] == tolerance
        assert found.num_examples == 300
        assert found.meta["relative_error"] <= tolerance
        error = relative_error(torch.from_numpy(found.hessian), torch.from_numpy(exact.hessian))
        assert error <= 2 * found.meta["relative_error"] + 1e-6
        assert distance.pdist([found, exact]).shape == (2, 2)  # comparable: another way to the same quantity
        assert sum(visited) >= 300 + found.meta["images"]
        reached.append((found.meta["images"], found.meta["samples"]))
    assert reached[0][0] <= reached[1][0] < reached[2][0] == 300
    assert reached[0][1] <= reached[1][1] < reached[2][1] == 5  # which are all there are
    for options in ({"tolerance": 0.0}, {"tolerance": 0.1, "estimator": "exact"}):
        with pytest.raises(ValueError, match="expected a positive number, with estimator='deflated'"):
            Task2Vec(small_probe(), **options)
    with pytest.raises(ValueError, match="tolerance has no shared form"):
        Task2Vec(small_probe(), tolerance=0.1).embed_label_sets((images, labels), {"a": labels})


@pytest.mark.slow_unless(weight_decay=(1.0,))
@pytest.mark.parametrize("weight_decay", [1e-4, 1.0])
def test_standard_error_within_a_tolerance_is_calibrated(weight_decay: float) -> None:
    """Over 50 seeds, intervals of two standard errors cover the exact embedding; a seed gives one embedding."""
    images, labels = shapes(200, 6)
    images = torch.stack([PREPROCESSING(i) for i in images])
    options = {"head_options": {"weight_decay": weight_decay}, "self_check": False, "batch_size": 100}
    exact = Task2Vec(small_probe(), estimator="exact", **options).embed((images, labels))
    alive, covered = exact.hessian > 0, []
    for seed in range(50):
        found = Task2Vec(small_probe(), tolerance=0.15, seed=seed, **options).embed((images, labels))
        covered.append((np.abs(found.hessian - exact.hessian) <= 1.96 * found.standard_error)[alive])
    assert found.meta["images"] < 200
    assert 0.90 <= np.mean(covered) <= 0.98
    again = Task2Vec(small_probe(), tolerance=0.15, seed=seed, **{**options, "batch_size": 7}).embed((images, labels))
    np.testing.assert_allclose(again.hessian, found.hessian, rtol=1e-4)
    other = Task2Vec(small_probe(), tolerance=0.15, seed=seed + 1, **options).embed((images, labels))
    assert not np.allclose(other.hessian, found.hessian, rtol=1e-4)


def test_a_tolerance_without_skipping_images() -> None:
    """What can only be visited in order is visited whole; unreadable files are left out of every pass."""
    images, labels = shapes(120)

    class InOrder:
        def __iter__(self):
            return zip(images, labels, strict=True)

    exact = Task2Vec(small_probe(), estimator="exact").embed((images, labels))
    found = Task2Vec(small_probe(), tolerance=0.02).embed(InOrder())
    assert found.meta["images"] == 120
    assert found.meta["relative_error"] <= 0.02
    assert relative_error(torch.from_numpy(found.hessian), torch.from_numpy(exact.hessian)) < 0.06
    plain = Task2Vec(small_probe()).embed(InOrder())
    assert relative_error(torch.from_numpy(plain.hessian), torch.from_numpy(exact.hessian)) < 1e-4  # two cotangents do


def test_drawn_images_of_a_folder_with_an_unreadable_one(tmp_path: Path) -> None:
    images, labels = shapes(150)
    folder = write_folder(tmp_path / "task", images, labels)
    (folder / "class 0" / "003.png").write_bytes(b"no picture")
    exact = Task2Vec(small_probe(), estimator="exact").embed(folder, skip_unreadable=True)
    found = Task2Vec(small_probe(), tolerance=0.1).embed(folder, skip_unreadable=True)
    assert found.meta["images"] < 149
    assert [Path(p).name for p in found.meta["skipped_images"]] == ["003.png"]
    error = relative_error(torch.from_numpy(found.hessian), torch.from_numpy(exact.hessian))
    assert error < 3 * found.meta["relative_error"] + 1e-6
