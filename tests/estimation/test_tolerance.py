"""Refining a draw with more sketches of its examples: unbiased, with a calibrated error, and no eigenvector again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import images, small_network
from oracle import relative_error
from small import small_probe
from torch import Tensor, nn

from t2v_fast import FisherDiagonal, FisherRecorder, Task2Vec, fisher
from t2v_fast.estimation import cotangents as cotangents_module
from t2v_fast.estimation.allocation import Allocation, SamplingStats, full_allocation, seeds_of
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.likelihoods import get_likelihood
from t2v_fast.estimation.moments import CHUNK, Strata
from t2v_fast.estimation.sketches import MoreSketches, Parts, sketches_of
from t2v_fast.estimation.tolerance import MIN_STRATUM, _plan, _with, sample_until, strata_of


def some_logits(n: int, classes: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moment(u: Tensor) -> Tensor:
    return torch.einsum("knc,knd->ncd", u, u)


@pytest.mark.parametrize(("classes", "scale"), [(5, 2.0), (7, 0.1)])
def test_more_sketches_are_of_what_the_eigenvectors_leave(
    classes: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all signs, the mean of the new sketches and the old eigenvectors are together the Fisher of the logits."""
    z, seeds = some_logits(3, classes, scale), torch.arange(3)
    k, counts = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 2])
    for likelihood in ("softmax", "sigmoid", "gaussian"):
        model = get_likelihood(likelihood)
        leading = k + 1 - sketches_of(model, z, k, 2)
        eigenvectors = second_moment(model.deflated(z, leading, torch.empty(0, *z.shape)))
        mean = torch.zeros_like(eigenvectors)
        patterns = list(itertools.product([-1.0, 1.0], repeat=classes))
        for pattern in patterns:
            signs = torch.tensor(pattern, dtype=torch.float64)
            monkeypatch.setattr(
                cotangents_module, "random_signs", lambda n, m, c, *rest, s=signs: s.expand(m, n, c).clone()
            )
            u = cotangents(z, "deflated", k, likelihood, generator=seeds, sketches=2, more=counts)
            assert u.any(2).sum(0).tolist() == counts.tolist()
            assert u[-2:].any(2).all()  # they come last
            mean += second_moment(u) / len(patterns)
        torch.testing.assert_close(mean + eigenvectors, second_moment(model.exact(z)))


@pytest.mark.parametrize("spread", [3, 60])
def test_parts_tell_sums_and_variances_of_sketches(spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of examples with different numbers of eigenvectors and sketches, whose cotangents end together."""
    monkeypatch.setitem(CHUNK, "cpu", 1024)  # so that there are several chunks of columns
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([2, 0, 3, 2 + spread])
    k = int(counts.max()) + 2
    each = torch.rand(k, 4, 600, dtype=torch.float64, generator=generator)  # squares of each cotangent
    parts = Parts.of(k, counts)
    assert sum(parts.sizes) == k
    assert parts.are_apart == (spread == 3)
    groups = [part.sum(0) for part in each.split(parts.sizes)]
    before = [q.clone() for q in groups]
    totals, variances = parts.sums_and_variances(groups)
    assert all(map(torch.equal, groups, before))
    for n, s in enumerate(counts.tolist()):
        own = each[k - s :, n]
        if parts.are_apart:
            torch.testing.assert_close(totals[n], own.sum(0))
        measured = own if parts.are_apart else own[-8:]
        want = s * measured.var(0) if s else torch.zeros(600, dtype=torch.float64)
        torch.testing.assert_close(variances[n], want)


def test_parts_of_sketches_alone_are_always_apart() -> None:
    """However much their numbers differ, which a refinement of examples in their own order comes to."""
    counts = torch.tensor([2, 0, 9, 90])
    each = torch.rand(90, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each *= (torch.arange(90)[:, None] >= 90 - counts)[:, :, None]
    parts = Parts.of(90, counts, only_sketches=True)
    totals, variances = parts.sums_and_variances([part.sum(0) for part in each.split(parts.sizes)])
    assert parts.are_apart
    torch.testing.assert_close(totals, each.sum(0))
    for n, s in enumerate(counts.tolist()):
        want = s * each[-min(s, 8) :, n].var(0) if s else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(variances[n], want)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_errors_of_squares_at_the_ends_of_float32(scale: float) -> None:
    """The squares of squares are beyond its range."""
    squares = [scale * torch.tensor([[1.0], [3.0]]), scale * torch.tensor([[2.0], [3.0]])]
    total, variance = Parts.of(2, torch.tensor([2, 2])).sums_and_variances(squares)
    torch.testing.assert_close(total / scale, torch.tensor([[3.0], [6.0]], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance / scale**2, torch.tensor([[1.0], [0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("likelihood", "classes"), [("gaussian", 20), ("sigmoid", 20), ("softmax", 5), ("softmax", 33), ("softmax", 70)]
)
def test_equal_eigenvalues_have_the_same_eigenvectors_in_every_batch(likelihood: str, classes: int) -> None:
    """At each place of a batch, beside examples with more eigenvectors, and alone."""
    model, z = get_likelihood(likelihood), torch.zeros(6, classes, dtype=torch.float64)
    alone = second_moment(model.deflated(z[:1], torch.tensor([2]), torch.empty(0, 1, classes)))[0]
    leading = torch.tensor([2, 3, 2, 3, 2, 2])
    found = second_moment(model.deflated(z, leading, torch.empty(0, 6, classes)))
    for n in (0, 2, 4, 5):
        torch.testing.assert_close(found[n], alone, rtol=0, atol=2e-3 * float(alone.abs().max()))


class Watched:
    """A network of random features with many classes, its statistics, and a ``visit`` that notes its allocations."""

    def __init__(self, classes: int = 80, n: int = 40, scale: float = 4.0, batch: int = 12) -> None:
        self.network, self.x = small_network(classes).float(), images(n, seed=9).float()
        self.parameters = [name for name, _ in self.network.named_parameters() if not name.startswith("7.")]
        with torch.no_grad():
            self.network[-1].weight.mul_(scale)
            self.network[-1].bias.mul_(scale)
            self.need = SamplingStats.of(self.network(self.x), self.network[-1].weight)
        self.batch, self.visits = batch, []

    def __call__(self, allocation: Allocation, seed: int) -> FisherDiagonal:
        self.visits.append(allocation)
        return self.fisher((self.x[b] for b in allocation.batches(self.batch)), allocation=allocation, seed=seed)

    def fisher(self, batches, *args, **options) -> FisherDiagonal:
        options = {"estimator_error": "allocation" in options, **options}
        return fisher(self.network, batches, *args, self_check=False, parameters=self.parameters, **options)


@pytest.mark.slow_unless(classes=(80,))
@pytest.mark.parametrize(("classes", "scale", "tolerance", "optimism"), [(80, 4, 0.06, 1.0), (9, 1, 0.06, 0.9)])
def test_refined_draws_are_unbiased_and_their_error_calibrated(
    classes: int, scale: float, tolerance: float, optimism: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 60 seeds with an optimistic prediction, so that most draws of all examples miss and are refined."""
    watched = Watched(classes, 40, scale)
    monkeypatch.setattr("t2v_fast.estimation.allocation.COHERENCE", optimism)
    monkeypatch.setattr("t2v_fast.estimation.tolerance.MIN_DRAWN", 1000)  # every example
    want = watched.fisher([watched.x], "exact").vector()
    alive = want > 1e-4 * want.max()
    found, covered, refined, errors, said = [], [], 0, [], []
    for seed in range(60):
        watched.visits.clear()
        f = sample_until(watched.need, tolerance, watched, seed)
        others = watched.visits[1:]
        assert all(again.more is not None for again in others)  # no second draw
        refined += bool(others)
        spent = sum(int((a.numbers[a.examples] + (a.more is None)).sum()) for a in watched.visits)
        assert f.samples * f.visited <= spent  # samples do not count the second sketch
        assert f.relative_error() <= tolerance
        assert f.visited == f.num_examples == 40
        found.append(f.vector())
        covered.append(((f.vector() - want).abs() <= 1.96 * f.error_vector())[alive])
        errors.append(relative_error(f.vector(), want))
        said.append(f.relative_error())
    assert refined >= 30
    assert 0.90 <= float(torch.stack(covered).double().mean()) <= 0.98
    values = torch.stack(found)
    assert ((values.mean(0) - want).abs() <= 4.5 * values.std(0) / 60**0.5 + 1e-6 * want)[alive].all()
    root_mean_square = (sum(e**2 for e in errors) / len(errors)) ** 0.5
    assert root_mean_square / 1.3 < sum(said) / len(said) < 1.3 * root_mean_square


def test_a_refinement_is_the_mean_over_all_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain passes in float64: eigenvectors once, and each stratum's sketches of both visits averaged."""
    watched = Watched(80, 40)
    watched.network, watched.x = watched.network.double(), watched.x.double()
    monkeypatch.setattr("t2v_fast.estimation.allocation.COHERENCE", 1.0)
    monkeypatch.setattr("t2v_fast.estimation.tolerance.MIN_DRAWN", 1000)
    calls: list[int] = []

    def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
        calls.append(seed)
        return watched(allocation, seed)

    f = sample_until(watched.need, 0.06, visit, seed=5)
    first, *others = watched.visits
    assert others
    z = watched.network(watched.x)
    counts = sketches_of(get_likelihood("softmax"), z, first.samples, 2)
    q = {}  # eigenvectors' squares and the sketches' mean of each visit, of each example
    with FisherRecorder(watched.network, watched.parameters) as recorder:
        for n in range(40):
            one, k, s = watched.x[n : n + 1], first.samples[n : n + 1], int(counts[n])
            logits = recorder.model(one)
            number = torch.tensor([n])
            u = cotangents(logits, "deflated", k, generator=seeds_of(number, calls[0]), sketches=2)
            means = []
            if len(u) > s:
                means.append(recorder.backward(logits, u[: len(u) - s], retain_graph=True))
            sums = [(s, recorder.backward(logits, u[len(u) - s :], retain_graph=True))]
            for again, seed in zip(others, calls[1:], strict=True):
                if n in again.examples:
                    more = again.more.counts[n : n + 1]
                    u = cotangents(logits, "deflated", k, generator=seeds_of(number, seed), sketches=2, more=more)
                    sums.append((int(more), recorder.backward(logits, u, retain_graph=True)))
            q[n] = means, sums
    number, parts = first.strata.number, range(first.strata.count)
    assert min(int((number == p).sum()) for p in parts) >= MIN_STRATUM
    for name in watched.parameters:
        want = torch.zeros_like(f[name])
        for p in parts:
            members = (number == p).nonzero()[:, 0].tolist()
            want += sum(float(1 / 40) * m[name][0] for n in members for m in q[n][0])
            sets = [sum(q[n][1][i][1][name][0] for n in members) / 40 for i in range(len(q[members[0]][1]))]
            sizes = [sum(q[n][1][i][0] for n in members) for i in range(len(sets))]
            want += sum(size / sum(sizes) * mean for size, mean in zip(sizes, sets, strict=True))
        torch.testing.assert_close(f[name], want, rtol=1e-9, atol=1e-12)


def test_parameters_that_some_batch_did_not_use_stay_left_out() -> None:
    """The strata have sums for them, the result of the first visit does not."""
    first, again = (Strata(torch.zeros(2, dtype=torch.long), 1) for _ in range(2))
    first.sums = {name: torch.full((2, 1, 3), 4.0, dtype=torch.float64) for name in ("used", "unused")}
    again.sums = {"used": torch.full((2, 1, 3), 2.0, dtype=torch.float64)}
    entries = {"used": torch.full((3,), 10.0, dtype=torch.float64)}
    errors = {"used": torch.full((3,), 3.0, dtype=torch.float64)}
    found = FisherDiagonal(entries, errors, "filter", "deflated", 2, 2, estimator_error=errors, visited=2)
    mean = _with(found, first, again, torch.tensor([0.5], dtype=torch.float64), 4)
    assert list(mean) == ["used"]
    assert mean["used"].tolist() == [9.0] * 3
    # Of the variance 9, 4 was that of the sketches, of which a quarter is left, and a quarter of 2 comes.
    torch.testing.assert_close(mean.estimator_error["used"], torch.full((3,), 6.5, dtype=torch.float64).sqrt())
    assert mean.samples == 4


@pytest.mark.parametrize(("have", "refined"), [(4, True), (18, False)])
def test_no_example_gets_more_sketches_than_would_be_exact(have: int, refined: bool) -> None:
    strata = Strata(torch.tensor([0, 0, 1, 1]), 2)
    strata.sums = {"w": torch.ones(2, 2, 3, dtype=torch.float64)}
    entries, errors = ({"w": torch.full((3,), value, dtype=torch.float64)} for value in (10.0, 2.0**0.5))
    found = FisherDiagonal(entries, errors, "filter", "deflated", 2, 4, estimator_error=errors, visited=4)
    single, counts = torch.ones(4, dtype=torch.float64), torch.full((4,), have)
    plan = _plan(found, strata, single, counts, 19, 0.13)
    assert (plan is not None) == refined
    assert plan is None or (int(plan[1].max()) <= 19 - have and plan[0].any())


def test_strata_do_not_depend_on_batches() -> None:
    watched = Watched(80, 40)
    allocation = full_allocation(2 + torch.arange(40) % 4).ordered()
    found = []
    for watched.batch in (40, 12, 1):
        strata = strata_of(watched.need, allocation)
        watched(replace(allocation, strata=strata), 3)
        assert strata.complete
        found.append(strata)
    assert found[0].count == 40 // MIN_STRATUM
    for other in found[1:]:
        for name, sums in found[0].sums.items():
            torch.testing.assert_close(other.sums[name], sums, rtol=1e-3, atol=1e-6 * float(sums.max()))


def test_only_certain_examples_with_sketches_have_strata() -> None:
    watched = Watched(9, 40)
    inclusion = torch.full((40,), 1.0, dtype=torch.float64)
    inclusion[:10] = 0.5
    samples = torch.full((40,), 2)
    samples[10:20] = 8  # exact
    number = strata_of(watched.need, Allocation(samples, torch.arange(5, 40), inclusion)).number
    assert (number[:20] == -1).all()
    assert number[20:].tolist() == [0] * 10 + [1] * 10


def test_more_sketches_leave_out_the_eigenvectors_of_the_first_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that round differently exchange equal eigenvectors. The first visit's logits decide."""
    z = torch.zeros(1, 70, dtype=torch.float64)
    z[0, :5] = 3 + 1e-6 * torch.arange(5)  # the four leading eigenvalues are nearly equal
    other = z.clone()
    other[0, :5] = z[0, [2, 4, 0, 1, 3]]
    network = nn.Linear(1, 70).double()
    with torch.no_grad():
        network.bias.copy_(other[0])
    model = get_likelihood("softmax")
    leading = torch.tensor([2])
    monkeypatch.setattr(cotangents_module, "sketches_of", lambda model, z, samples, sketches: samples + 1 - leading)
    k = 3
    allocation = replace(full_allocation(torch.tensor([k])), more=MoreSketches(torch.tensor([2000]), z))
    x, options = torch.zeros(1, 1, dtype=torch.float64), {"estimator_error": True, "self_check": False}
    found = fisher(network, [x], parameters=["bias"], allocation=allocation, **options)["bias"]

    def left(logits: Tensor) -> Tensor:
        taken = model.deflated(logits, leading, torch.empty(0, 1, 70))
        return (model.exact(z).square().sum(0) - taken.square().sum(0))[0]

    torch.testing.assert_close(found[:5], left(z)[:5], rtol=0.1, atol=1e-4)
    assert ((left(z) - left(other))[:5].abs() > 0.3 * left(z)[:5]).any()


@pytest.mark.parametrize("in_order", [False, True])
def test_a_task_is_refined(in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where images come in an order of their own, and all of them are visited again."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(90, 3, 12, 12, generator=generator), torch.arange(90) % 30  # nothing to be learned
    options = {"head_options": {"weight_decay": 1e-2}, "batch_size": 16}
    exact = Task2Vec(small_probe(), estimator="exact", **options).embed((x, y))
    monkeypatch.setattr("t2v_fast.estimation.allocation.COHERENCE", 1.0)
    monkeypatch.setattr("t2v_fast.estimation.tolerance.MIN_DRAWN", 1000)
    refined: list[int] = []
    of = MoreSketches.of
    monkeypatch.setattr(MoreSketches, "of", lambda self, some: refined.append(len(some)) or of(self, some))

    class InOrder(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(x, y.tolist(), strict=True)

    f = Task2Vec(small_probe(), tolerance=0.05, **options).embed(InOrder() if in_order else (x, y))
    assert f.meta["relative_error"] <= 0.05
    assert refined
    assert sum(refined) % 90 == 0 or not in_order
    assert relative_error(torch.from_numpy(f.hessian), torch.from_numpy(exact.hessian)) <= 0.12


def test_errors() -> None:
    z, ones = some_logits(2, 5), torch.ones(2, dtype=torch.long)
    plain = full_allocation(ones)
    errors: list[tuple[Callable[[], object], str]] = [
        (lambda: replace(plain, more=MoreSketches(ones, z[:1])), r"2 numbers of sketches and 1 logits, expected 2"),
        (lambda: cotangents(z, "deflated", 2, more=ones), r"more sketches are for .* with a seed for each example"),
        (lambda: cotangents(z, "deflated", ones, generator=ones, more=ones.float()), r"more are \[2\] torch.float32"),
    ]
    for call, message in errors:
        with pytest.raises(ValueError, match=message):
            call()
    assert Strata(torch.tensor([-1]), 1).complete
    watched = Watched(9, 20)
    allocation = replace(full_allocation(torch.full((20,), 2)), strata=Strata(torch.zeros(20, dtype=torch.long), 1))
    watched(allocation, 0)
    with pytest.raises(RuntimeError, match="each call needs strata of its own"):
        watched(allocation, 1)
