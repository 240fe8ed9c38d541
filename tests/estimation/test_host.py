"""In a steady batch on a CUDA device the host waits for nothing, and the numbers are those of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pretend_cuda import Pretend, moved, pretended
from steady import ALLOWED_WAITS, CASES, batches_of_images, images, steady
from torch import Tensor, nn
from waits import TO_DEVICE, TO_HOST, WAIT, Counted

import t2v_fast
from t2v_fast import fisher
from t2v_fast.estimation.batches import DeviceCopies, forward_passes
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.deferred import DeferredChecks
from t2v_fast.estimation.label_sets import Heads, LabelSet, fisher_of_label_sets
from t2v_fast.estimation.likelihoods import (
    LIKELIHOODS,
    Gaussian,
    _bits,
    _eigenvectors,
    _leading_eigenvalues,
    _orthonormal,
    random_signs,
)
from t2v_fast.estimation.moments import NamedMoments
from t2v_fast.gradients.recorder import FisherRecorder

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs"
)
# Eigenvectors are combined on a CPU, classes on a GPU: these are other draws of the same estimate.
OTHER_DRAWS = {"deflated", "with errors", "an allocation", "tokens"}


@needs_cuda_build
@pytest.mark.parametrize("name", CASES)
def test_a_steady_batch_waits_for_nothing(name: str) -> None:
    make, batches, options = CASES[name]
    want = fisher(make(), batches, **options)
    with pretended():
        there = moved(make())
        with Counted() as counted:
            got = fisher(there, steady(batches, counted), device="cuda:0", **options)
    waits = {place[2].partition(":")[0]: n for place, n in counted.places.items() if place[0] == WAIT}
    assert waits == ALLOWED_WAITS.get(name, {})
    # What goes to the host says whether inputs and logits are finite: ten numbers each. Spectra need logits [8, 5].
    assert counted.numbers[TO_HOST] <= 20 + 8 * 5 * sum(waits.values())
    assert 1 <= counted.kinds[TO_DEVICE] <= 9
    for key, value in want.items():
        assert not isinstance(got[key], Pretend)
        if name in OTHER_DRAWS:
            error = want.standard_error[key] + got.standard_error[key]
            assert ((got[key] - value).abs() <= 5 * error + 1e-9).all()
        else:
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(got.standard_error[key], want.standard_error[key], rtol=1e-3, atol=1e-8)


def on_both(z: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The cotangents on a CPU and on a CUDA device, with the same random numbers."""
    seed = options.pop("seed", 0)
    cpu = cotangents(z, *args, generator=torch.Generator().manual_seed(seed), **options)
    with pretended():
        there = cotangents(Pretend(z), *args, generator=torch.Generator().manual_seed(seed), **options)
    assert isinstance(there, Pretend)
    return cpu, there.held


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("classes", [2, 5, 70])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "monte_carlo", "empirical"])
def test_cotangents_are_those_of_a_cpu(likelihood: str, classes: int, estimator: str) -> None:
    z = torch.randn(6, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    labels = torch.arange(6) % 2 if likelihood == "softmax" else torch.rand(6, classes)
    cpu, there = on_both(z, estimator, 3, likelihood, labels=labels)
    torch.testing.assert_close(there, cpu, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("samples", [1, 2, 4, 6, 9])
def test_deflated_cotangents_are_unbiased(likelihood: str, samples: int) -> None:
    z = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    u = cotangents(z, "exact", likelihood=likelihood)
    want = torch.einsum("kni,knj->nij", u, u)[0]
    cpu, there = on_both(z.expand(20_000, -1), "deflated", samples, likelihood)
    assert len(there) == len(cpu)
    moments, of_cpu = (torch.einsum("kni,knj->nij", u, u) for u in (there, cpu))
    deviation = (moments.mean(0) - want).abs() / (moments.std(0) / len(moments) ** 0.5 + 1e-12)
    assert float(deviation.max()) < 4.5
    # The error of one draw is about that of the dense solver, and vanishes where all eigenvectors are taken.
    spread = [float((m - want).flatten(1).norm(dim=1).square().mean().sqrt()) for m in (moments, of_cpu)]
    assert spread[0] < 1.5 * spread[1] + 1e-12


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_examples_that_take_all_eigenvectors_are_exact(classes: int, scale: float) -> None:
    """Also beside others that take fewer, and where probabilities coincide or vanish."""
    z = torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * scale
    samples, seeds = torch.tensor([1, classes - 1, 2, classes + 3]), torch.arange(4)
    with pretended():
        u = cotangents(Pretend(z), "deflated", samples, generator=seeds).held
    want = cotangents(z, "exact")
    for n in (1, 3):
        torch.testing.assert_close(u[:, n].T @ u[:, n], want[:, n].T @ want[:, n], rtol=1e-11, atol=1e-13)
    assert u.isfinite().all()
    assert not u[0, 0].any()  # no eigenvector, one sketch


def test_the_secular_equation_is_solved_as_well_in_larger_steps() -> None:
    p = (torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 5).softmax(1)
    want = _eigenvectors(p, _leading_eigenvalues(p, 3))
    with pretended():
        got = _eigenvectors(Pretend(p), _leading_eigenvalues(Pretend(p), 3)).held
    cosines = torch.nn.functional.cosine_similarity(got, want, dim=1)
    assert float((1 - cosines).abs().max()) < 1e-12
    assert [_bits(1, n, 1, "cuda") for n in (0, 2**20, 2**24, 2**25, 2**40)] == [8, 6, 2, 1, 1]
    assert {_bits(rows, 32, roots, "cpu") for rows in (0, 1, 2**10) for roots in (1, 16)} == {3}
    assert {_bits(rows, 65, roots, "cpu") for rows in (0, 1, 2**10) for roots in (1, 16)} == {1}


def test_columns_become_orthonormal_and_dependent_ones_zero() -> None:
    """Their projection is what keeps an estimate unbiased."""
    a = torch.randn(3, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    a[0, :, 2] = a[0, :, 0] - 2 * a[0, :, 1]
    a[1, :, 3] = a[1, :, 0] * (1 + 1e-9)
    a[2, :, 1] = 0
    with pretended():
        q = _orthonormal(Pretend(a)).held
    products = q.mT @ q
    want = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).clone()
    want[0, 2, 2] = want[1, 3, 3] = want[2, 1, 1] = 0
    torch.testing.assert_close(products, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("classes", "probable", "k"), [(20, 3, 8), (20, 3, 11), (64, 3, 62), (300, 10, 16)])
def test_more_eigenvectors_than_probable_classes(classes: int, probable: int, k: int) -> None:
    """Masked classes have no probability, so that the eigenvectors behind the others are rounding noise."""
    for logits in (torch.zeros(probable), torch.linspace(0, 0.5, probable)):
        z = torch.full((1, classes), -1e4, dtype=torch.float64)
        z[0, -probable:] = logits.double()
        with pretended():
            u = cotangents(Pretend(z.expand(40, -1)), "deflated", k, generator=torch.Generator().manual_seed(0)).held
        p = z[0].softmax(0)
        found = torch.einsum("knc,knd->ncd", u, u)
        torch.testing.assert_close(found, (p.diag() - p[:, None] * p).expand_as(found), rtol=0, atol=1e-7)


def test_random_signs_depend_on_no_device() -> None:
    seeds = torch.arange(7) * 2**40 - 2**60
    for source in (3, seeds):
        each = [source if isinstance(source, Tensor) else torch.Generator().manual_seed(source) for _ in range(2)]
        with pretended():
            there = random_signs(7, 2, 5, each[0], "cuda:0").held
        assert torch.equal(there, random_signs(7, 2, 5, each[1]))
        assert there.unique().tolist() == [-1, 1]


def test_logits_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(10, 6, generator=torch.Generator().manual_seed(6))
    for estimator in ("deflated", "hutchinson", "monte_carlo", "exact", "empirical"):
        labels = torch.arange(10) % 6
        whole = on_both(z, estimator, 2, labels=labels)[1]
        with monkeypatch.context() as patch:
            patch.setattr(t2v_fast.estimation.cotangents, "LARGEST_BLOCK", {"cpu": 20, "cuda": 20})  # three examples
            torch.testing.assert_close(on_both(z, estimator, 2, labels=labels)[1], whole, rtol=1e-6, atol=1e-7)


def test_a_likelihood_of_someone_else_gets_logits_on_the_cpu() -> None:
    seen: list[torch.device] = []

    class Own(Gaussian):
        def variance(self, z: Tensor) -> Tensor:
            seen.append(z.device)
            return torch.full(z.shape, 4.0, dtype=z.dtype)

    with pretended():
        u = cotangents(Pretend(torch.zeros(3, 2)), "exact", likelihood=Own())
    assert {device.type for device in seen} == {"cpu"}
    assert torch.equal(u.held, 2 * torch.eye(2)[:, None].expand(2, 3, 2))


@needs_cuda_build
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_finite_is_found_a_little_later(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """The message names the batch and the example, and comes before any result."""
    read: list[int] = []

    def loader(batches: list[Tensor]) -> Iterator[Tensor]:
        for k, x in enumerate(batches):
            read.append(k)
            yield x

    for bad, where, message in (
        (float("nan"), 3, "batch 3, example 5: the input has NaN or infinite values"),
        (3e38, 6, r"the logits of example 5 of batch 6 are not finite: \[.*nan|inf.*\]"),
    ):
        batches = [x.clone() for x in batches_of_images()]
        batches[where][5] = bad
        read.clear()
        with pretended():
            if late:
                monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)
            with pytest.raises(ValueError, match=message):
                fisher(moved(images()), loader(batches), device="cuda:0")
        # The error of the last batch comes after the loader has ended.
        assert read[-1] == min(len(batches) - 1, where + (DeferredChecks.AHEAD if late else 1))


def test_checks_are_made_at_once_on_a_cpu() -> None:
    checks = DeferredChecks()
    checks.finite(torch.ones(2, 3), lambda example, values: "none")
    checks.finite(torch.ones(0, 3), lambda example, values: "none")
    with pytest.raises(ValueError, match=r"example 1 has \[1.0, inf\]"):
        checks.finite(torch.tensor([[0.0, 0.0], [1.0, torch.inf]]), lambda n, v: f"example {n} has {v}")


@needs_cuda_build
def test_inputs_are_copied_on_a_stream_of_their_own() -> None:
    with pretended():
        here = Pretend(torch.ones(2, 3))
        with torch.inference_mode():
            frozen = torch.ones(2, 3)
        inputs = {"x": torch.ones(2, 3), "more": [frozen, here, "text", 7]}
        copies = DeviceCopies(torch.device("cuda:0"))
        current = torch.cuda.current_stream()
        found = copies.of(inputs)
        assert found["more"][1] is here  # it belongs to the stream of the loader
        assert found["more"][2:] == ["text", 7]
        moved_ = [found["x"], found["more"][0]]
        assert all(t.is_cuda and not t.is_inference() for t in moved_)
        assert len(current.awaited) == 1
        assert [id(t) for t in current.read] == [id(t) for t in moved_]
        assert torch.cuda.current_stream() is current
        assert copies._stream is not current
        last = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        grey = torch.arange(8.0).view(2, 1, 2, 2).expand(-1, 3, -1, -1)
        for t in (last, grey, last[:, 1:], torch.empty_like(last, pin_memory=True).copy_(last)):
            with Counted() as counted:
                counted.counting = True
                copy = copies.of(t)
            assert torch.equal(copy.held, t)
            assert counted.kinds == {TO_DEVICE: 1}
        assert copies.of(last).is_contiguous(memory_format=torch.channels_last)
    x = torch.ones(2)
    assert DeviceCopies(torch.device("cpu")).of([x])[0] is x
    with torch.inference_mode():
        frozen = torch.ones(2)
    assert not DeviceCopies(torch.device("cpu")).of(frozen).is_inference()


@needs_cuda_build
def test_a_loader_that_fails_and_a_loop_that_stops() -> None:
    def loader() -> Iterator[Tensor]:
        yield from batches_of_images()[:2]
        raise OSError("the disk is gone")

    with pretended():
        there = moved(images())
        required = [p.requires_grad for p in there.parameters()]
        with pytest.raises(OSError, match="the disk is gone"):
            fisher(there, loader(), device="cuda:0")
        recorder = FisherRecorder(there)
        with (
            forward_passes(recorder, lambda model, x: model(x), "cuda:0") as batches_of,
        ):
            for batch in batches_of(iter(batches_of_images())):
                assert batch.logits.is_cuda
                break
        assert [p.requires_grad for p in there.parameters()] == required
        got = fisher(there, iter(batches_of_images()), "exact", device="cuda:0")
    want = fisher(images(), batches_of_images(), "exact")
    torch.testing.assert_close(got.vector(), want.vector(), rtol=1e-4, atol=1e-8)


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_batches_of_any_size_and_precision(dtype: torch.dtype) -> None:
    sizes = (5, 1, 2, 8, 2)
    x = torch.randn(sum(sizes), 4, 7, 6, generator=torch.Generator().manual_seed(8)).to(dtype)
    network = images().to(dtype)
    weights = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(9))
    want = fisher(network, x.split(sizes), "exact", weights=weights)
    with pretended():
        there = moved(network)
        for _ in range(2):  # the second call finds nothing of the first
            got = fisher(there, x.split(sizes), "exact", weights=Pretend(weights), device="cuda:0")
            rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
            torch.testing.assert_close(got.vector(), want.vector(), rtol=rtol, atol=rtol * float(want.vector().max()))
            torch.testing.assert_close(
                got.standard_error_vector(), want.standard_error_vector(), rtol=10 * rtol, atol=rtol
            )


@needs_cuda_build
def test_label_sets_on_a_device() -> None:
    torch.manual_seed(0)
    body, heads = images()[:-1], [nn.Linear(24, classes) for classes in (3, 4)]
    codes = torch.arange(14)
    sets = [LabelSet(head, codes % head.out_features, torch.rand(14)) for head in heads]
    x = torch.randn(14, 4, 7, 6)
    want = fisher_of_label_sets(nn.Sequential(body, Heads(sets)), x.split(2), sets, "exact")
    reduced: list[set[str]] = []

    def reduce(moments: list[NamedMoments], count: int) -> int:
        reduced.append({t.device.type for m in moments for part in m.parts for t in (part.first, part.cross)})
        return count

    with pretended():
        there = moved(nn.Sequential(body, Heads(sets)))
        with Counted() as counted:
            got = fisher_of_label_sets(there, steady(x.split(2), counted), sets, "exact", reduce=reduce)
    assert counted.kinds[WAIT] == 1  # which cotangents there are decides how many passes there are
    assert reduced == [{"cpu"}]  # processes add up what is on the CPU
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.vector(), other.vector(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_values_are_finite_although_their_sum_is_not(dtype: torch.dtype) -> None:
    def message(example: int, values: list[float]) -> str:
        return f"example {example}"

    checks = DeferredChecks()
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    checks.finite(large, message)
    for bad in (float("nan"), float("inf"), -float("inf")):
        t = large.clone()
        t[1, 2] = bad
        with pytest.raises(ValueError, match="example 1"):
            checks.finite(t, message)
    both = torch.zeros(3, 4, dtype=dtype)
    both[2, 0], both[2, 1] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match="example 2"):
        checks.finite(both, message)
