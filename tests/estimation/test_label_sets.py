"""Tasks that share images take one pass together, and each gets the result that it gets alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from oracle import relative_error
from small import shapes, small_probe
from torch import nn

from t2v_fast import DataError, FisherRecorder, Task2Vec
from t2v_fast.estimation.label_sets import Heads, LabelSet, fisher_of_label_sets


def label_sets(n: int = 30) -> dict[str, np.ndarray]:
    k = np.arange(n)
    return {"three": k % 3, "two": (k % 3 == 1).astype(int), "five": k % 5, "sparse": 4 * (k % 4) + 1}


@pytest.mark.parametrize("estimator", ["exact", "deflated", "hutchinson", "monte_carlo", "empirical"])
def test_each_equals_its_own_run(estimator: str) -> None:
    images, _ = shapes(30)
    task2vec = Task2Vec(small_probe(), estimator=estimator, batch_size=7, seed=3)
    together = task2vec.embed_label_sets((images, np.zeros(30, int)), label_sets())
    assert list(together) == list(label_sets())
    for name, labels in label_sets().items():
        alone = task2vec.embed((images, labels), name=name)
        got = together[name]
        assert relative_error(torch.from_numpy(got.hessian), torch.from_numpy(alone.hessian)) < 1e-5
        np.testing.assert_allclose(got.standard_error, alone.standard_error, rtol=1e-4)
        assert got.fingerprint == alone.fingerprint
        assert (got.layers, got.num_examples) == (alone.layers, 30)
        drop = ("seconds", "seconds_waiting_for_data", "head_loss")
        assert {k: v for k, v in got.meta.items() if k not in drop} == {
            k: v for k, v in alone.meta.items() if k not in drop
        }


def test_multilabel_sets_and_names_of_classes() -> None:
    images, labels = shapes(30)
    targets = np.stack([labels == 0, labels > 0], 1).astype(np.int64)
    task2vec = Task2Vec(small_probe(), task_type="multilabel")
    got = task2vec.embed_label_sets(
        (images, labels), {"a": targets, "b": targets[:, ::-1].copy()}, classes={"a": ["x", "y"]}
    )
    alone = task2vec.embed((images, targets))
    assert relative_error(torch.from_numpy(got["a"].hessian), torch.from_numpy(alone.hessian)) < 1e-5
    assert (got["a"].meta["classes"], got["b"].meta["classes"]) == (["x", "y"], ["0", "1"])


def test_one_forward_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = shapes(30)
    probe, calls = small_probe(), []
    probe.network[0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    Task2Vec(probe, batch_size=10, self_check=False).embed_label_sets((images, labels), label_sets())
    assert calls == [10] * 6  # features, then the Fisher


def test_sums_of_groups() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)), torch.randn(5, 2, 5, 5)
    u = torch.randn(6, 5, 4)
    with FisherRecorder(model) as recorder:
        got = recorder.backward_groups(model(x), u, [2, 1, 3])
        for block, q in zip(u.split([2, 1, 3]), got, strict=True):
            want = recorder.backward(model(x), block)
            for name, w in want.items():
                torch.testing.assert_close(q[name], w)
        with pytest.raises(ValueError, match=r"groups are \[2, 1\], expected whole numbers that add up to 6"):
            recorder.backward_groups(model(x), u, [2, 1])


def test_errors_name_the_task() -> None:
    images, labels = shapes(30)
    task2vec = Task2Vec(small_probe())
    with pytest.raises(DataError, match="task 'b' has 29 labels for 30 images"):
        task2vec.embed_label_sets((images, labels), {"a": labels, "b": labels[1:]})
    with pytest.raises(DataError, match="task 'b' has images of one class only"):
        task2vec.embed_label_sets((images, labels), {"a": labels, "b": labels * 0})
    with pytest.raises(DataError, match=r"task 'b': image 2 has label -1, expected at least 0"):
        task2vec.embed_label_sets((images, labels), {"b": np.where(np.arange(30) == 2, -1, labels)})
    with pytest.raises(ValueError, match="label_sets is empty"):
        task2vec.embed_label_sets((images, labels), {})
    with pytest.raises(ValueError, match="has no shared form"):
        Task2Vec(small_probe(), estimator="batch_mean").embed_label_sets((images, labels), {"a": labels})


def test_batches_are_halved_when_memory_runs_out() -> None:
    """The embedding is that of a smaller batch; what fails at one image fails."""
    images, labels = shapes(30)

    def limited(largest: int) -> Task2Vec:
        probe = small_probe()

        def hook(module, inputs):
            if len(inputs[0]) > largest:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
                )

        probe.network[0].register_forward_pre_hook(hook)
        return Task2Vec(probe, batch_size=16)

    task2vec = limited(5)
    with pytest.warns(UserWarning, match="task 't': out of memory with batches of 8 images, going on with 4"):
        got = task2vec.embed((images, labels), name="t")
    assert got.meta["batch_size"] == 4
    # Activations that are kept may be why memory ran out.
    want = Task2Vec(small_probe(), batch_size=4, activation_megabytes=0).embed((images, labels))
    np.testing.assert_array_equal(got.hessian, want.hessian)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task2vec.embed((images, labels))  # it remembers
    hopeless = limited(0)
    hopeless.batch_size = 1
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        hopeless.embed((images, labels))


def test_other_errors_are_not_taken_for_memory() -> None:
    probe = small_probe()

    def hook(module, inputs):
        raise RuntimeError("broken")

    probe.network[0].register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="broken"):
        Task2Vec(probe).embed(shapes())


def test_too_many_images_are_told_without_an_allocation() -> None:
    sets = [LabelSet(nn.Linear(4, 2), torch.tensor([0, 1]))]
    network = nn.Sequential(nn.Linear(4, 4), Heads(sets)).eval()
    with pytest.raises(ValueError, match="yields more than the 2 examples that are expected"):
        fisher_of_label_sets(network, [torch.randn(3, 4)], sets, parameters=["0.weight"])
