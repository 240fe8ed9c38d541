"""Cotangents against the Fisher of the logits, in exact arithmetic where floating point is not enough."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from t2v_fast import fisher
from t2v_fast.estimation import likelihoods
from t2v_fast.estimation.cotangents import ESTIMATORS, cotangents
from t2v_fast.estimation.likelihoods import LIKELIHOODS, Gaussian


def second_moment(u: torch.Tensor) -> torch.Tensor:
    return torch.einsum("kni,knj->nij", u, u)


def logit_fisher(z: torch.Tensor, likelihood: str) -> torch.Tensor:
    """S_n [N, C, C] for the unscaled Gaussian, the sigmoid, and the softmax in rational arithmetic."""
    if likelihood == "gaussian":
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)
    if likelihood == "sigmoid":
        return torch.diag_embed(z.sigmoid() * (-z).sigmoid())
    rows = []
    for row in z:
        e = [Fraction(v) for v in (row - row.max()).exp().tolist()]
        p = [v / sum(e) for v in e]
        rows.append([[float((a if i == j else 0) - a * b) for j, b in enumerate(p)] for i, a in enumerate(p)])
    return torch.tensor(rows, dtype=torch.float64)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_exact_is_a_factor_of_the_logit_fisher(likelihood: str, classes: int, scale: float) -> None:
    z = torch.randn(6, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(classes)) * scale
    u = cotangents(z, "exact", likelihood=likelihood)
    assert len(u) == classes - (likelihood == "softmax")
    assert error(second_moment(u), logit_fisher(z, likelihood)) < 1e-13


@pytest.mark.parametrize("gap", [200.0, 690.0])
def test_exact_does_not_underflow(gap: float) -> None:
    z = torch.tensor([[gap, 0.0, 1.0, 1.0]], dtype=torch.float64)
    found = second_moment(cotangents(z, "exact"))[0].diagonal()
    torch.testing.assert_close(found[1:] / z.softmax(1)[0, 1:], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("classes", "samples"), [(2, 1), (2, 2), (3, 2), (4, 9)])
def test_deflated_is_exact_once_it_has_all_eigenvectors(likelihood: str, classes: int, samples: int) -> None:
    rank = classes - (likelihood == "softmax")
    samples = max(samples, rank)
    z = torch.randn(5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    u = cotangents(z, "deflated", samples, likelihood)
    assert len(u) == rank  # no cotangent is spent on nothing
    assert error(second_moment(u), logit_fisher(z, likelihood)) < 1e-12


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("estimator", ["deflated", "hutchinson", "monte_carlo"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampling_estimators_are_unbiased(likelihood: str, estimator: str, samples: int) -> None:
    z = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = logit_fisher(z, likelihood)[0]
    copies = 60_000
    u = cotangents(z.expand(copies, -1), estimator, samples, likelihood, generator=torch.Generator().manual_seed(3))
    moments = second_moment(u)
    deviation = (moments.mean(0) - want).abs() / (moments.std(0) / copies**0.5 + 1e-12)
    assert float(deviation.max()) < 4.5  # standard errors, over at most 49 entries: p < 4e-4 with this one fixed seed
    assert error(moments.mean(0)[None], want[None]) < 0.05


def test_many_classes_are_unbiased_and_nearly_as_good_as_the_dense_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 8
    z[0, 3] = z[0, 4]  # a repeated probability has no root of the secular equation between the two
    want = logit_fisher(z, "softmax")
    z = z.expand(20_000, -1)
    dense = second_moment(cotangents(z, "deflated", 4, generator=torch.Generator().manual_seed(5)))
    monkeypatch.setattr(likelihoods, "DENSE_CLASSES", 5)
    secular = second_moment(cotangents(z, "deflated", 4, generator=torch.Generator().manual_seed(5)))
    deviation = (secular.mean(0) - want[0]).abs() / (secular.std(0) / len(z) ** 0.5 + 1e-12)
    assert float(deviation.max()) < 4.5
    spread = [float((m - want).flatten(1).norm(dim=1).square().mean().sqrt()) for m in (dense, secular)]
    assert spread[1] < 1.5 * spread[0]
    hutchinson = second_moment(cotangents(z, "hutchinson", 4, generator=torch.Generator().manual_seed(5)))
    assert spread[1] < 0.5 * float((hutchinson - want).flatten(1).norm(dim=1).square().mean().sqrt())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("estimator", ["deflated", "hutchinson", "monte_carlo"])
def test_a_seed_fixes_the_draw_whatever_the_batch_size(likelihood: str, estimator: str) -> None:
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def draw(seed: int, sizes: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        parts = [cotangents(part, estimator, 3, likelihood, generator=generator) for part in z.split(sizes)]
        return torch.cat(parts, 1)

    torch.testing.assert_close(draw(0, (7,)), draw(0, (7,)), rtol=0, atol=0)
    torch.testing.assert_close(draw(0, (7,)), draw(0, (2, 4, 1)), rtol=1e-12, atol=1e-12)
    assert not torch.equal(draw(0, (7,)), draw(1, (7,)))


def test_empirical_is_the_gradient_of_the_loss() -> None:
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 2, 1, 1])
    (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y, reduction="sum"), z)
    torch.testing.assert_close(cotangents(z, "empirical", labels=y)[0], want)
    t = torch.rand(4, 3, dtype=torch.float64)
    (want,) = torch.autograd.grad(torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="sum"), z)
    torch.testing.assert_close(cotangents(z, "empirical", likelihood="sigmoid", labels=t)[0], want)
    (want,) = torch.autograd.grad(((z - t) ** 2).sum() / (2 * 0.5**2), z)
    torch.testing.assert_close(cotangents(z, "empirical", likelihood=Gaussian(0.5), labels=t)[0], want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: cotangents(z, "sharp"), "unknown estimator 'sharp'.*deflated"),
        (lambda z: cotangents(z, samples=0), "samples is 0"),
        (lambda z: cotangents(z, likelihood="poisson"), "unknown likelihood 'poisson'.*softmax"),
        (lambda z: cotangents(z[0]), r"\[3\].*expected floating point \[N, C\]"),
        (lambda z: cotangents(z[:, :1]), "one class"),
        (lambda z: cotangents(z * float("nan")), "example 0 .* not finite"),
        (lambda z: cotangents(z, "empirical"), "needs the labels"),
        (lambda z: cotangents(z, "empirical", labels=torch.tensor([0, 3])), "labels go from 0 to 3, expected 0 to 2"),
        (lambda z: cotangents(z, "empirical", labels=torch.tensor([0.0, 1.0])), "expected integers"),
        (lambda z: cotangents(z, "empirical", likelihood="sigmoid", labels=torch.tensor([0, 1])), "targets"),
        (lambda z: Gaussian(0.0), "sigma is 0.0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_logits_that_mask_classes_by_minus_infinity() -> None:
    """The message says what to do, and doing so gives the Fisher of the other classes. An overflow gets no advice."""
    torch.manual_seed(0)
    network, x = torch.nn.Linear(4, 12), torch.randn(5, 4)

    class Masked(torch.nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            self.linear, self.fill = network, fill

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs).masked_fill(torch.arange(12) > 8, self.fill)

    advice = r"use torch\.finfo\(logits\.dtype\)\.min in place of -inf"
    with pytest.raises(ValueError, match=rf"example 0 of batch 0 are not finite: \[.*\]; .*{advice}"):
        fisher(Masked(-torch.inf), [x])
    for estimator in ("deflated", "exact", "hutchinson", "monte_carlo"):
        found = fisher(Masked(torch.finfo(torch.float32).min), [x], estimator=estimator)
        assert (found["linear.weight"][9:] == 0).all()
    found = fisher(Masked(torch.finfo(torch.float32).min), [x], estimator="exact")
    kept = torch.nn.Linear(4, 9)
    kept.load_state_dict({name: t[:9] for name, t in network.state_dict().items()})
    torch.testing.assert_close(found["linear.weight"][:9], fisher(kept, [x], estimator="exact")["weight"])
    with pytest.raises(ValueError, match=r"example 0 of the batch are not finite: \[inf, 0\.0\]$"):
        cotangents(torch.tensor([[torch.inf, 0.0]]))


def test_every_estimator_keeps_dtype_and_shape() -> None:
    z = torch.randn(4, 3)
    for estimator in ESTIMATORS:
        u = cotangents(z, estimator, labels=torch.zeros(4, dtype=torch.long))
        assert u.dtype == z.dtype
        assert u.shape[1:] == z.shape


@pytest.mark.parametrize("estimator", ["exact", "deflated", "hutchinson", "monte_carlo"])
def test_tokens_have_a_fisher_each_and_no_products(estimator: str) -> None:
    """E[u u^T] of a sequence is block diagonal: S of each token that counts, zero for padding and between tokens."""
    logits = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False]])
    want = torch.zeros(3, 4, 3, 4, dtype=torch.float64)
    for t in range(2):
        p = logits[0, t].softmax(0)
        want[t, :, t] = p.diag() - p[:, None] * p
    draws = 1 if estimator == "exact" else 40_000
    u = cotangents(
        logits.expand(draws, -1, -1),
        estimator,
        2,
        generator=torch.Generator().manual_seed(1),
        mask=mask.expand(draws, -1),
    )
    assert not u[:, :, 2].any()
    got = torch.einsum("knac,knbd->acbd", u, u) / draws
    assert (got - want).abs().max() < (1e-14 if estimator == "exact" else 0.01)


def test_empirical_tokens_and_sequences() -> None:
    logits = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(
        40_000, -1, -1
    )
    labels = torch.tensor([[2, 0, 3]]).expand(40_000, -1)
    scores = logits[0].softmax(1) - torch.nn.functional.one_hot(labels[0], 4)
    sequence = cotangents(logits[:2], "empirical", labels=labels[:2], level="sequence")
    assert torch.allclose(sequence, scores.expand(1, 2, 3, 4), atol=1e-15, rtol=0)
    u = cotangents(logits, "empirical", labels=labels, generator=torch.Generator().manual_seed(1))[0]
    got = torch.einsum("nac,nbd->acbd", u, u) / len(u)
    want = torch.einsum("ac,ad,ab->acbd", scores, scores, torch.eye(3, dtype=torch.float64))
    assert (got - want).abs().max() < 0.02


def test_tokens_that_do_not_fit_are_named() -> None:
    logits = torch.randn(2, 3, 4)
    for options, message in (
        ({"mask": torch.ones(2, 4)}, r"mask is \[2, 4\], expected one entry a token: \[2, 3\]"),
        ({"level": "word"}, "level is 'word'"),
        (
            {"estimator": "empirical", "labels": torch.zeros(2, dtype=torch.long)},
            r"labels are \[2\], expected one a token",
        ),
        ({"estimator": "empirical", "labels": torch.full((2, 3), -100)}, "labels go from -100"),
    ):
        with pytest.raises(ValueError, match=message):
            cotangents(logits, **options)
    with pytest.raises(ValueError, match=r"a mask .* is for logits"):
        cotangents(logits[0], mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"'exact' needs about .* cotangents"):
        cotangents(torch.zeros(1, 64, 5000), "exact")
    assert not cotangents(logits, mask=torch.zeros(2, 3)).any()


@pytest.mark.parametrize("classes", [3, 10, 64, 70])
def test_rounding_of_the_logits_changes_no_sign(classes: int) -> None:
    """Otherwise the draws of a seed would depend on the batch that an example is in."""
    z = 3 * torch.randn(100, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = z * (1 + 1e-14 * torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    seeds = torch.arange(100)
    for samples in (1, 2):
        each = torch.full((100,), samples)
        u, again = (cotangents(logits, "deflated", each, generator=seeds) for logits in (z, rounded))
        squares, others = (torch.einsum("knc,knd->ncd", t, t) for t in (u, again))
        torch.testing.assert_close(others, squares, rtol=1e-6, atol=1e-8)


def test_a_likelihood_may_keep_the_tensor_that_it_returns() -> None:
    class Kept(Gaussian):
        factor = torch.ones(2, 5, 3, dtype=torch.float64)

        def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
            return self.factor

    for _ in range(2):
        u = cotangents(torch.zeros(5, 3), "hutchinson", 2, Kept())
        torch.testing.assert_close(u, torch.full((2, 5, 3), 2**-0.5))
