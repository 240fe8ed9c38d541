"""Where cotangents are spent: counts from spectra, examples by importance; unbiased, calibrated, reproducible."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from networks import images, small_network
from oracle import relative_error
from torch import Tensor, nn

from t2v_fast import FisherDiagonal, fisher
from t2v_fast.estimation.allocation import (
    FORWARD,
    MIN_DRAWN,
    OVERHEAD,
    Allocation,
    SamplingStats,
    draw,
    full_allocation,
    seeds_of,
    share_out,
)
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.likelihoods import LIKELIHOODS, get_likelihood
from t2v_fast.estimation.sketches import ALIGNMENT
from t2v_fast.estimation.tolerance import sample_until


def logits(n: int, classes: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moments(z: Tensor, likelihood: str) -> Tensor:
    u = cotangents(z, "exact", likelihood=likelihood)
    return torch.einsum("knc,knd->ncd", u, u)


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize(("classes", "scale"), [(2, 1), (7, 1), (7, 9), (64, 3)])
def test_spectrum_and_trace(likelihood: str, classes: int, scale: float) -> None:
    model, z = get_likelihood(likelihood), logits(9, classes, scale)
    s, weight = second_moments(z, likelihood), logits(classes, 4, seed=1)
    want = torch.linalg.eigvalsh(s).flip(1)[:, : model.rank(classes)]
    torch.testing.assert_close(model.spectrum(z), want, rtol=1e-9, atol=1e-13)
    trace = torch.einsum("ncd,ck,dk->n", s, weight, weight)
    torch.testing.assert_close(model.trace_through(z, weight), trace, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scale", [0.1, 1, 3, 12])
@pytest.mark.parametrize("classes", [65, 200, 1000])
def test_spectrum_of_many_classes(classes: int, scale: float) -> None:
    z = logits(5, classes, scale)
    want = torch.linalg.eigvalsh(second_moments(z, "softmax")).flip(1)[:, : classes - 1]
    got = get_likelihood("softmax").spectrum(z)
    assert got.shape == want.shape
    trace = want.sum(1)
    assert ((got - want).abs().amax(1) / trace < 0.005).all()
    assert ((got.sum(1) - trace).abs() / trace < 0.02).all()


@pytest.mark.parametrize(("likelihood", "classes"), [("softmax", 6), ("softmax", 70), ("sigmoid", 5)])
def test_each_example_has_its_own_number_of_cotangents(likelihood: str, classes: int) -> None:
    """Those of a batch of its own, with the signs of its own seed, whatever else is in the batch."""
    z, k = logits(6, classes, 2), torch.tensor([1, 3, classes + 1, 2, 1, 4])
    seeds = seeds_of(torch.tensor([5, 0, 17, 2, 3, 4]), seed=3)
    together = cotangents(z, "deflated", k, likelihood, generator=seeds, sketches=2)
    for n in range(6):
        alone = cotangents(z[n : n + 1], "deflated", int(k[n]), likelihood, generator=seeds[n : n + 1], sketches=2)
        got = together[together[:, n].any(1), n]
        torch.testing.assert_close(got.square().sum(0), alone[:, 0].square().sum(0), rtol=1e-6, atol=1e-12)
    again = cotangents(z.flip(0), "deflated", k.flip(0), likelihood, generator=seeds.flip(0), sketches=2)
    torch.testing.assert_close(again.flip(1), together, rtol=1e-6, atol=1e-9)
    signs = [
        cotangents(z, "hutchinson" if s is None else "deflated", 1, likelihood, generator=s) for s in (None, seeds)
    ]
    assert signs[0].shape == signs[1].shape


def test_signs_of_seeds_are_independent() -> None:
    n = 20_000
    z = torch.zeros(n, 5, dtype=torch.float64)
    u = cotangents(z, "deflated", 1, generator=seeds_of(torch.arange(n), 0), sketches=2)
    got = torch.einsum("knc,knd->cd", u, u) / n
    assert (got - second_moments(z[:1], "softmax")[0]).abs().max() < 0.01
    assert (torch.einsum("nc,nd->cd", u[0], u[1]) / n).abs().max() < 0.005
    same = cotangents(logits(1, 5).expand(9, -1), "deflated", 1, generator=seeds_of(torch.ones(9, dtype=torch.long), 0))
    torch.testing.assert_close(same, same[:, :1].expand_as(same))
    different = [cotangents(z[:50], "deflated", 1, generator=seeds_of(torch.arange(50), s)) for s in (0, 1)]
    assert not torch.equal(*different)


def need_of(n: int = 40, classes: int = 6, scale: float = 4) -> SamplingStats:
    return SamplingStats.of(logits(n, classes, scale), logits(classes, 3, seed=1), 1 + torch.arange(n) % 3)


def test_variances_are_those_of_the_best_sketches() -> None:
    need = need_of(4)
    for sketches in (1, 2):
        got = need.variances(torch.arange(1, 8), sketches)
        for n, k in itertools.product(range(4), range(1, 8)):
            want = []
            for leading in range(k) if k < 5 else ():
                rest = need.spectrum[n, leading:]
                want.append(2 * (rest.sum().square() - rest.square().sum()) / (k - 1 + sketches - leading))
            best = ALIGNMENT * min(want, default=torch.zeros(()))
            assert float(got[n, k - 1]) == pytest.approx(float(best), rel=1e-6, abs=1e-15)


def test_cotangents_are_shared_out_best() -> None:
    need = need_of(3, classes=4)
    variances = need.variances(torch.arange(1, 4)) * need.importance[:, None].square()
    for total in range(3, 10):
        got = share_out(need, total / 3)
        assert int(got.sum()) <= total
        left = float(variances.gather(1, got[:, None] - 1).sum())
        best = min(
            float(sum(variances[n, k - 1] for n, k in enumerate(ks)))
            for ks in itertools.product((1, 2, 3), repeat=3)
            if sum(ks) <= total
        )
        assert left == pytest.approx(best)
    assert share_out(need, 99).tolist() == [3, 3, 3]
    assert share_out(need_of(5, classes=2), 2).tolist() == [1] * 5
    assert share_out(SamplingStats.of(torch.zeros(0, 3), torch.ones(3, 2)), 2).tolist() == []


@pytest.mark.parametrize("ordered", [False, True])
def test_batches_cost_the_least(ordered: bool) -> None:
    def cost(sizes: tuple[int, ...]) -> float:
        parts = allocation.samples[allocation.examples].split(sizes)
        return sum((len(p) + OVERHEAD) * (FORWARD + float(p.max())) for p in parts)

    allocation = full_allocation(torch.tensor([1, 9, 3, 3, 1, 1, 2, 1]))
    allocation = allocation.ordered() if ordered else allocation
    got = allocation.batches(4)
    assert torch.equal(torch.cat(got), allocation.examples)
    every = (s for k in range(1, 9) for s in itertools.product(range(1, 5), repeat=k) if sum(s) == 8)
    assert cost(tuple(len(b) for b in got)) == pytest.approx(min(cost(s) for s in every))


def test_examples_come_with_their_probabilities() -> None:
    need = need_of(300)
    seen, draws = torch.zeros(300), 200
    for seed in range(draws):
        allocation = draw(need, 0.2, seed)
        assert len(allocation.examples.unique()) == len(allocation.examples)
        assert abs(len(allocation.examples) - float(allocation.inclusion.sum())) <= 1
        seen[allocation.examples] += 1
    p = allocation.inclusion
    assert float((p < 1).double().mean()) > 0.2
    assert (seen[p == 1] == draws).all()
    assert ((seen / draws - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()
    assert torch.equal(draw(need, 0.2, 7).examples, draw(need, 0.2, 7).examples)
    assert not torch.equal(draw(need, 0.2, 7).examples, draw(need, 0.2, 8).examples)


def test_a_smaller_error_costs_more_and_none_takes_everything() -> None:
    need = need_of(300, classes=8)
    sums = [int(a.samples[a.examples].sum()) for a in (draw(need, e) for e in (0.5, 0.1, 0.03, 0.01, 0.0))]
    assert sums == sorted(sums)
    assert sums[-1] == 300 * 7
    idle = SamplingStats.of(logits(100, 4, 1e4), torch.ones(4, 2))  # nothing to be told from zero
    assert len(draw(idle, 0.1).examples) >= 64
    weighted = SamplingStats.of(logits(300, 4), logits(4, 2), (torch.arange(300) % 2).double())
    assert (draw(weighted, 0.1).examples % 2 == 1).all()  # the others have no weight


def drawn_fisher(
    network: nn.Module, x: Tensor, allocation: Allocation, seed: int, estimator_error: bool = True, **options
):
    batches = (x[b] for b in allocation.batches(100))
    return fisher(
        network, batches, allocation=allocation, seed=seed, estimator_error=estimator_error, self_check=False, **options
    )


@pytest.mark.slow_unless(classes=(5,), scale=(1,))
@pytest.mark.parametrize(("classes", "scale", "error"), [(5, 1, 0.15), (5, 20, 0.1), (80, 4, 0.15)])
def test_drawn_examples_are_unbiased_and_their_error_calibrated(classes: int, scale: float, error: float) -> None:
    """Over 50 seeds, 95 percent intervals cover the exact Fisher of all images for about 95 percent of the entries."""
    network, x = small_network(classes).float(), images(300, seed=9).float()
    names = [name for name, _ in network.named_parameters() if not name.startswith("7.")]
    with torch.no_grad():
        network[-1].weight.mul_(scale)  # the larger, the more confident
        network[-1].bias.mul_(scale)
        need = SamplingStats.of(network(x), network[-1].weight)
    want = fisher(network, [x], "exact", self_check=False, parameters=names).vector()
    alive = want > 1e-4 * want.max()
    found, covered, errors, said = [], [], [], []
    for seed in range(50):
        allocation = draw(need, error, seed)
        f = drawn_fisher(network, x, allocation, seed, parameters=names)
        found.append(f.vector())
        covered.append(((f.vector() - want).abs() <= 1.96 * f.error_vector())[alive])
        errors.append(relative_error(f.vector(), want))
        said.append(f.relative_error())
    assert len(allocation.examples) < 270
    assert 0.90 <= float(torch.stack(covered).double().mean()) <= 0.98
    values = torch.stack(found)
    assert ((values.mean(0) - want).abs() <= 4.5 * values.std(0) / 50**0.5 + 1e-6 * want)[alive].all()
    root_mean_square = (sum(e**2 for e in errors) / len(errors)) ** 0.5
    assert root_mean_square / 1.4 < sum(said) / len(said) < 1.4 * root_mean_square
    assert sum(said) / len(said) < error


def test_order_and_batches_change_nothing() -> None:
    network, x = small_network(), images(20)
    with torch.no_grad():
        need = SamplingStats.of(network(x), network[-1].weight)
    plain = full_allocation(share_out(need, 2.5))
    assert len(plain.samples.unique()) > 1
    w = 1.0 + torch.arange(20) % 4
    want = fisher(network, x.split(7), allocation=plain, weights=w, seed=1)
    got = drawn_fisher(network, x, plain.ordered(), 1, False, weights=w)
    assert relative_error(got.vector(), want.vector()) < 1e-9
    assert relative_error(got.standard_error_vector(), want.standard_error_vector()) < 1e-6
    assert want.samples == float(plain.samples.double().mean()) <= 2.5
    assert relative_error(drawn_fisher(network, x, plain, 2).vector(), want.vector()) > 1e-6
    exact = drawn_fisher(network, x, full_allocation(torch.full((20,), 4)), 0, weights=w)
    assert relative_error(exact.vector(), fisher(network, [x], "exact", weights=w).vector()) < 1e-9
    assert exact.relative_error() == 0
    some = drawn_fisher(network, x, Allocation(plain.samples, torch.arange(5), torch.full((20,), 0.25)), 0)
    assert (some.visited, some.num_examples, exact.visited) == (5, 20, 20)


@pytest.mark.parametrize("worse", [0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("every_example", [False, True])
def test_until_the_tolerance(worse: float, every_example: bool) -> None:
    """The draws' mean is within the tolerance, no draw is thrown away, and none has the signs of another."""
    need, tried, seeds = need_of(300), [], []
    truth = torch.arange(1.0, 6, dtype=torch.float64)

    def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
        error = worse * need.predicted_error(allocation) * truth.norm()
        noise = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        deviations = torch.full((5,), float(error) / 5**0.5, dtype=torch.float64)
        spread = (deviations.square() + 9).sqrt()
        tried.append(
            FisherDiagonal(
                {"w": truth + deviations * noise},
                {"w": spread},
                "filter",
                "deflated",
                float(allocation.samples[allocation.examples].double().mean()),
                300,
                estimator_error={"w": deviations},
                visited=len(allocation.examples),
            )
        )
        seeds.append(seed)
        return tried[-1]

    found = sample_until(need, 0.02, visit, seed=3, every_example=every_example)
    assert found.relative_error() <= 0.02
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == 3
    assert len(tried) == 1 if worse <= 1 else len(tried) > 1 or (worse == 1.5 and every_example)
    assert found.visited == 300 if every_example else max(t.visited for t in tried) <= found.visited <= 300
    spent = sum(t.samples * t.visited for t in tried)
    assert found.samples * found.visited == pytest.approx(spent)
    if len(tried) == 1:
        assert found is tried[0]
        return
    precisions = [(worse / float(t.estimator_error["w"][0])) ** 2 for t in tried]  # as predicted
    w = [p / sum(precisions) for p in precisions]
    torch.testing.assert_close(found["w"], sum(a * t["w"] for a, t in zip(w, tried, strict=True)))
    variance = sum(a**2 * t.estimator_error["w"] ** 2 for a, t in zip(w, tried, strict=True))
    torch.testing.assert_close(found.estimator_error["w"], variance.sqrt())
    torch.testing.assert_close(found.standard_error["w"], (9 + variance).sqrt())
    # Thrown away, the draws would have cost more than one that is good enough; together they cost about as much.
    alone = draw(need, 0.02 * 0.85 / worse, 0)
    assert spent < 2.5 * float(alone.samples[alone.examples].sum())


def test_small_eigenvalues_that_were_taken_for_zero_end_in_an_exact_answer() -> None:
    need = SamplingStats(torch.full((4,), 0.25), torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1).double())
    asked = []

    def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
        asked.append(allocation.samples.tolist())
        error = {"w": torch.full((1,), 0.0 if min(asked[-1]) == 3 else 0.5)}
        return FisherDiagonal({"w": torch.ones(1)}, error, "filter", "deflated", 1, 4, estimator_error=error, visited=4)

    assert sample_until(need, 0.1, visit, every_example=True).relative_error() == 0
    assert asked[-1] == [3, 3, 3, 3]
    assert len(asked) == 2


@pytest.mark.parametrize("reported", [math.inf, math.nan])
def test_an_error_that_is_not_finite_takes_everything(reported: float) -> None:
    need, asked = need_of(300), []

    def visit(allocation: Allocation, seed: int) -> FisherDiagonal:
        asked.append(allocation)
        error = {"w": torch.tensor([reported if len(asked) == 1 else 0.0])}
        return FisherDiagonal({"w": torch.ones(1)}, error, "filter", "deflated", 1, 300, estimator_error=error)

    assert sample_until(need, 0.5, visit).relative_error() == 0
    assert len(asked) == 2
    assert len(asked[1].examples) == 300
    assert need.predicted_error(asked[1]) == 0


@pytest.mark.slow_unless(classes=(5,))
@pytest.mark.parametrize(
    ("classes", "scale", "tolerance", "optimism"), [(5, 20, 0.05, 4.0), (5, 20, 0.05, 2.2), (80, 4, 0.08, 4.0)]
)
def test_means_over_draws_are_unbiased_and_their_error_calibrated(
    classes: int, scale: float, tolerance: float, optimism: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 60 seeds with an optimistic prediction, so that most results are means over several draws.

    After a prediction that is a little too optimistic, the second draw visits few examples and has little weight.
    """
    network, x = small_network(classes).float(), images(300, seed=9).float()
    names = [name for name, _ in network.named_parameters() if not name.startswith("7.")]
    with torch.no_grad():
        network[-1].weight.mul_(scale)
        network[-1].bias.mul_(scale)
        need = SamplingStats.of(network(x), network[-1].weight)
    monkeypatch.setattr("t2v_fast.estimation.allocation.COHERENCE", optimism)
    want = fisher(network, [x], "exact", self_check=False, parameters=names).vector()
    alive = want > 1e-4 * want.max()
    found, covered, several, fewest = [], [], 0, len(x)
    for seed in range(60):
        draws = []

        def visit(allocation: Allocation, own: int, draws: list[int] = draws) -> FisherDiagonal:
            draws.append(len(allocation.examples))
            return drawn_fisher(network, x, allocation, own, parameters=names)

        f = sample_until(need, tolerance, visit, seed)
        several += len(draws) > 1
        fewest = min(fewest, *draws)
        assert f.relative_error() <= tolerance
        found.append(f.vector())
        covered.append(((f.vector() - want).abs() <= 1.96 * f.error_vector())[alive])
    assert several >= 30
    assert fewest < MIN_DRAWN or optimism == 4
    assert 0.90 <= float(torch.stack(covered).double().mean()) <= 0.98
    values = torch.stack(found)
    assert ((values.mean(0) - want).abs() <= 4.5 * values.std(0) / 60**0.5 + 1e-6 * want)[alive].all()


def test_errors() -> None:
    need, some = need_of(), full_allocation(torch.ones(5, dtype=torch.long))
    network, x = small_network(), images()
    for call, message in (
        (lambda: share_out(need, 0.5), r"samples is 0.5, expected at least one cotangent"),
        (lambda: draw(need, -1), r"error is -1, expected a relative error of at least 0"),
        (lambda: sample_until(need, 0.0, lambda a, s: None), r"tolerance is 0.0, expected a relative error above 0"),
        (lambda: SamplingStats.of(torch.ones(3, 2), torch.ones(3, 2)), r"logits .*\[3, 2\].* weight .*\[3, 2\]"),
        (lambda: SamplingStats.of(torch.ones(3, 2), torch.ones(2, 2), torch.ones(4)), r"weights are \[4\], .*: \[3\]"),
        (
            lambda: SamplingStats.of(torch.full((3, 2), torch.nan), torch.ones(2, 2)),
            r"logits of example 0 are not finite",
        ),
        (lambda: some.batches(0), r"size is 0, expected batches of at least one example"),
        (lambda: Allocation(some.samples, some.examples, torch.ones(4)), r"inclusion is \[4\], expected .*: \[5\]"),
        (lambda: Allocation(some.samples, some.examples + 1, torch.ones(5)), r"examples go from 1 to 5"),
        (lambda: Allocation(some.samples, some.examples, torch.zeros(5)), r"visited examples must be above 0"),
        (lambda: fisher(network, [x], "exact", allocation=some), r"an allocation is for estimator 'deflated'"),
        (lambda: fisher(network, [x], weights=torch.ones(4), allocation=some), r"weights has 4 entries, the alloc"),
        (lambda: fisher(network, [x, x], allocation=some), r"yields more than the 5 examples that are expected"),
        (lambda: fisher(network, [x[:3]], allocation=some), r"visits 5 examples but the loader gave 3"),
        (
            lambda: fisher(network, [x], allocation=full_allocation(0 * some.samples)),
            r"samples is 0, expected at least one",
        ),
        (lambda: cotangents(torch.ones(3, 2), "exact", torch.ones(3).long()), r"samples or seeds of each example"),
        (lambda: cotangents(torch.ones(3, 2), samples=torch.ones(2).long()), r"samples are \[2\] .* int64 \[3\]"),
        (lambda: cotangents(torch.ones(3, 2), generator=torch.ones(3)), r"generator are \[3\] torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
