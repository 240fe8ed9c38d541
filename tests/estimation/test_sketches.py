"""Eigenvectors and sketches divide the cotangents of an example: unbiased, and with the variance that is predicted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from t2v_fast import fisher
from t2v_fast.estimation.allocation import SamplingStats, full_allocation, seeds_of
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.likelihoods import LIKELIHOODS, get_likelihood
from t2v_fast.estimation.sketches import least, packed, sketches_of, tails
from t2v_fast.estimation.tolerance import sample_until


def logits(n: int, classes: int, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moment(u: Tensor) -> Tensor:
    return torch.einsum("knc,knd->ncd", u, u)


def test_tails_are_sums_over_pairs() -> None:
    spectrum = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = tails(spectrum)
    for n, first in itertools.product(range(3), range(7)):
        pairs = itertools.combinations(spectrum[n, first:].tolist(), 2)
        assert float(got[n, first]) == pytest.approx(4 * sum(a * b for a, b in pairs), abs=1e-14)


def test_flat_spectra_get_sketches_and_steep_ones_eigenvectors() -> None:
    flat, steep = torch.full((1, 200), 1 / 200), 0.01 ** torch.arange(200.0)[None]
    for k in (1, 2, 6):
        assert least(tails(flat), k)[1].tolist() == [0]
        assert least(tails(steep), k)[1].tolist() == [k - 1]
    # Never worse than sketches alone.
    for k in range(1, 12):
        assert (least(tails(flat), k)[0] <= tails(flat)[:, 0] / k).all()


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize(("classes", "scale"), [(9, 0.3), (90, 0.3), (90, 3.0)])
@pytest.mark.parametrize("sketches", [1, 2])
def test_cotangents_are_unbiased(likelihood: str, classes: int, scale: float, sketches: int) -> None:
    """The mean over many draws is the Fisher of the logits, within five standard errors of its trace."""
    draws = 4000
    z = logits(1, classes, scale).expand(draws, -1)
    k = torch.full((draws,), 4)
    u = cotangents(z, "deflated", k, likelihood, generator=seeds_of(torch.arange(draws), 1), sketches=sketches)
    assert len(u) == 3 + sketches
    direction = logits(classes, 3, 1.0, seed=1)
    want = second_moment(cotangents(z[:1], "exact", likelihood=likelihood))[0]
    want = torch.einsum("cd,ck,dk->k", want, direction, direction)
    each = torch.einsum("knc,cj->knj", u, direction).square().sum(0)  # [draws, 3]
    assert ((each.mean(0) - want).abs() <= 5 * each.std(0) / draws**0.5 + 1e-9 * want).all()


def test_the_variance_is_that_of_the_formula() -> None:
    """4 / s sum_{i < j} m(a_i, a_j)^2, for the diagonal of J^T S J with a Jacobian J of one entry for each filter."""
    draws, classes, k = 20_000, 20, 3
    z = logits(1, classes, 0.2)
    jacobian = logits(classes, 4, 1.0, seed=2)
    model = get_likelihood("softmax")
    counts = sketches_of(model, z, k)
    assert counts.tolist() == [3]
    values, vectors = torch.linalg.eigh(second_moment(cotangents(z, "exact"))[0])
    a = (vectors * values.clamp_min(0).sqrt()).T @ jacobian  # [C, filters]
    pairs = itertools.combinations(range(classes), 2)
    want = 4 / 3 * sum((a[i] * a[j]).square() for i, j in pairs)
    many = z.expand(draws, -1)
    samples = torch.full((draws,), k)
    u = cotangents(many, "deflated", samples, generator=seeds_of(torch.arange(draws), 0))
    got = torch.einsum("knc,cf->knf", u, jacobian).square().sum(0).var(0)
    torch.testing.assert_close(got, want, rtol=0.08, atol=0)  # some five standard errors


def test_the_last_rows_are_sketches_of_every_example() -> None:
    z = torch.cat([logits(3, 90, 0.1), logits(3, 90, 12.0)])
    k = torch.tensor([5, 1, 3, 5, 1, 3])
    u = cotangents(z, "deflated", k, generator=seeds_of(torch.arange(6), 0), sketches=2)
    counts = sketches_of(get_likelihood("softmax"), z, k, 2)
    assert counts[:3].tolist() == [6, 2, 4]
    assert counts[3] == 2
    assert len(u) == 6
    assert u[-2:].any(2).all()
    assert torch.equal(u.any(2).sum(0), k + 1)
    assert packed(u)[1].tolist() == (k + 1).tolist()


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes)).double().eval()


def test_reported_errors_are_calibrated() -> None:
    """Intervals of two reported errors hold the exact value about 95 times in 100, with flat spectra."""
    classes, n = 80, 200
    model = network(classes)
    x = logits(n, 6, 1.0)
    exact = fisher(model, [x], "exact", parameters=["0.weight"]).vector()
    inside, ratios = [], []
    for seed in range(40):
        found = fisher(
            model,
            [x],
            parameters=["0.weight"],
            allocation=full_allocation(torch.full((n,), 4)),
            seed=seed,
            estimator_error=True,
            self_check=False,
        )
        assert sketches_of(get_likelihood("softmax"), model(x), 4, 2).min() == 5
        error = found.error_vector()
        inside.append(((found.vector() - exact).abs() <= 1.96 * error).double())
        ratios.append((found.vector() - exact).square().sum() / error.square().sum())
    assert 0.92 <= float(torch.stack(inside).mean()) <= 0.98
    assert 0.7 <= float(torch.stack(ratios).mean()) <= 1.4


def test_a_tolerance_is_met_with_flat_spectra() -> None:
    classes, n = 80, 100
    model, x = network(classes), logits(100, 6, 1.0)
    with torch.no_grad():
        z = model(x)
    need = SamplingStats.of(z, model[2].weight.detach())

    def visit(allocation, seed):
        batches = [x[b] for b in allocation.batches(32)]
        return fisher(
            model,
            batches,
            parameters=["0.weight"],
            allocation=allocation,
            seed=seed,
            estimator_error=True,
            self_check=False,
        )

    found = sample_until(need, 0.05, visit)
    exact = fisher(model, [x], "exact", parameters=["0.weight"]).vector()
    assert found.relative_error() <= 0.05
    assert float((found.vector() - exact).norm() / exact.norm()) <= 0.1  # twice what is reported
    assert found.samples * found.visited < 0.3 * n * (classes - 1)
