"""Eigenvectors and sketches divide the cotangents of an example: unbiased, and with the variance that is predicted."""

from __future__ import annotations

import itertools

import pytest
import torch
from pretend_cuda import Pretend, pretended
from torch import Tensor, nn

from t2v_fast import fisher
from t2v_fast.estimation import likelihoods
from t2v_fast.estimation.allocation import SamplingStats, full_allocation, seeds_of
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.likelihoods import (
    COMBINED,
    LIKELIHOODS,
    Likelihood,
    _are_flat,
    _jittered,
    _leading_eigenvalues,
    _reach,
    get_likelihood,
    random_signs,
)
from t2v_fast.estimation.sketches import least, packed, sketches_of, tails
from t2v_fast.estimation.tolerance import sample_until


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU computes on the CPU, where large steps towards a root take long."""
    monkeypatch.setattr(likelihoods, "LARGEST_STEP", 2**17)


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
    counts = sketches_of(model, z, torch.tensor([k]))
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


def few_probable(likely: int, classes: int = 90) -> Tensor:
    """Logits [1, C] with which a few of the classes, and not the first ones, have nearly all the probability."""
    z = logits(1, classes, 0.3, seed=3)
    z[0, torch.arange(likely) * 3 + 2] += 20
    return z


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("likely", "k", "s"), [(2, 1, 1), (3, 2, 1), (2, 1, 2), (3, 1, 1), (4, 2, 2), (6, 1, 1), (6, 5, 1)]
)
def test_few_probable_classes_are_sketched_by_eigenvectors(likely: int, k: int, s: int, gpu: bool) -> None:
    """Of many classes, or on a CUDA device, where the sketches of flat spectra combine classes.

    The estimate is unbiased, and its variance is that of the formula. A sketch of classes alone would have
    up to 2 sum_i l_i^2 more.
    """
    draws = 8000
    z = few_probable(likely, 20 if gpu else 90)
    jacobian = logits(z.shape[1], 4, 1.0, seed=2)
    values, vectors = torch.linalg.eigh(second_moment(cotangents(z, "exact"))[0])
    a = (vectors * values.clamp_min(0).sqrt()).T.flip(0) @ jacobian  # the leading ones first, [C, filters]
    number = int(sketches_of(get_likelihood("softmax"), z, torch.tensor([k]), s))
    assert number == s
    rest = a[k - 1 :]
    want = 4 / s * sum((rest[i] * rest[j]).square() for i, j in itertools.combinations(range(len(rest)), 2))
    z, seeds = z.expand(draws, -1), seeds_of(torch.arange(draws), 0)
    samples = torch.full((draws,), k)
    if gpu:
        with pretended():
            u = cotangents(Pretend(z), "deflated", samples, generator=seeds, sketches=s).held
    else:
        u = cotangents(z, "deflated", samples, generator=seeds, sketches=s)
    each = torch.einsum("knc,cf->knf", u, jacobian).square().sum(0)
    exact = a.square().sum(0)
    assert ((each.mean(0) - exact).abs() <= 5 * each.std(0) / draws**0.5 + 1e-6 * exact).all()
    behind = a[k - 1 + COMBINED["cuda" if gpu else "cpu"] :]  # where classes are combined
    classes = 2 / s * behind.pow(4).sum(0)
    least = 1e-6 * float(exact.square().max())
    if behind.square().sum() < 1e-6 * a.square().sum():
        assert (0.9 * want - least <= each.var(0)).all()
    assert (each.var(0) <= 1.1 * (want + classes) + least).all()


def test_classes_are_combined_where_eigenvectors_are_no_better() -> None:
    """With flat spectra, and where more eigenvalues are equal than a sketch combines."""
    equal = 20.0 * (torch.arange(90) < 12)[None].double()
    z = torch.cat([logits(1, 90, 0.3), *(few_probable(likely) for likely in (1, 2, 5, 12)), equal, few_probable(25)])
    leading = torch.tensor([0, 0, 1, 2, 3, 0, 0])
    p = z.softmax(1)
    values = _leading_eigenvalues(p, 7)
    assert (_reach(values, p, leading, 4) - leading).tolist() == [0, 1, 1, 2, 4, 0, 0]
    assert _are_flat(p).tolist() == [True, False, False, False, False, False, True]


def test_cotangents_do_not_depend_on_the_batch() -> None:
    """Examples beside others that take more eigenvectors, or combine fewer."""
    z = torch.cat([few_probable(1), few_probable(2), few_probable(3), few_probable(5), logits(2, 90, 0.3)])
    samples, seeds = torch.tensor([1, 1, 2, 1, 40, 70]), torch.arange(6)
    together = cotangents(z, "deflated", samples, generator=seeds)
    for n in range(6):
        alone = cotangents(z[n, None], "deflated", samples[n, None], generator=seeds[n, None])
        for u in (together[:, n, None], alone):
            assert torch.count_nonzero(u.any(2)) == samples[n]
        got, want = (second_moment(u)[0] for u in (together[:, n, None], alone))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_confident_example_has_the_same_cotangents_in_every_batch() -> None:
    """Also where 1 - p is near the rounding of p, and the last bits of a root of the secular equation show."""
    for gap in (10, 20, 27, 34):
        z = logits(40, 100, 0.5)
        z[:, 7] += gap
        z[::2, 9] += gap - 3
        seeds = torch.arange(40)
        for k in (1, 2):
            samples = torch.full((40,), k)
            together = second_moment(cotangents(z, "deflated", samples, generator=seeds))
            for n in (0, 1, 39):
                here = slice(n, n + 1)
                alone = second_moment(cotangents(z[here], "deflated", samples[here], generator=seeds[here]))
                assert (together[here] - alone).norm() < 1e-9 * alone.norm()


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes)).double().eval()


def check_reported_errors(model: nn.Module, x: Tensor, cotangents: int, seeds: int) -> None:
    """Intervals of two reported errors hold the exact value about 95 times in 100, with two sketches or more each."""
    exact = fisher(model, [x], "exact", parameters=["0.weight"]).vector()
    inside, ratios = [], []
    for seed in range(seeds):
        found = fisher(
            model,
            [x],
            parameters=["0.weight"],
            allocation=full_allocation(torch.full((len(x),), cotangents)),
            seed=seed,
            estimator_error=True,
            self_check=False,
        )
        error = found.error_vector()
        inside.append(((found.vector() - exact).abs() <= 1.96 * error).double())
        ratios.append((found.vector() - exact).square().sum() / error.square().sum())
    assert 0.92 <= float(torch.stack(inside).mean()) <= 0.98
    assert 0.7 <= float(torch.stack(ratios).mean()) <= 1.4


def test_reported_errors_are_calibrated() -> None:
    """With flat spectra."""
    model, x = network(80), logits(200, 6, 1.0)
    assert sketches_of(get_likelihood("softmax"), model(x), torch.full((len(x),), 4), 2).min() == 5
    check_reported_errors(model, x, cotangents=4, seeds=40)


def test_reported_errors_of_confident_examples_are_calibrated() -> None:
    """Two or three of the classes share the probability of each example."""
    model = network(80)
    with torch.no_grad():
        model[2].weight[3:].mul_(0.1)
        model[2].bias[3:].sub_(20)
    check_reported_errors(model, logits(100, 6, 1.0), cotangents=1, seeds=60)


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


@pytest.mark.parametrize("classes", [66, 100])
def test_all_eigenvectors_are_exact_where_shifted_probabilities_coincide(classes: int) -> None:
    """The solver shifts equal probabilities apart, and so brings others together, which then have one eigenvector."""
    shift = 1 + 1e-9 * torch.linspace(-1, 1, classes, dtype=torch.float64)
    z = torch.randn(200, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    steps = (torch.arange(200) % 5 - 2) * 2.0**-51
    z[:, 7], z[:, 60] = 1 + z[:, 7].abs(), 1 + z[:, 7].abs() + (shift[7] / shift[60]).log() + steps
    apart = _jittered(z.softmax(1))
    assert (apart[:, 7] == apart[:, 60]).any()
    want = second_moment(get_likelihood("softmax").exact(z))
    for k in (torch.arange(200) % 7 % 2 * (classes - 2) + 1, torch.full((200,), classes - 1)):
        got = second_moment(cotangents(z, "deflated", k, generator=torch.arange(200)))
        torch.testing.assert_close(got[k > 1], want[k > 1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gap", [40.0, 80.0, 300.0])
@pytest.mark.parametrize("classes", [2, 5, 70])
def test_sketches_of_very_confident_examples(classes: int, gap: float) -> None:
    """Their entries add up to zero, although the likeliest one is a tiny difference of two large numbers."""
    z = torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z[:, 1] += gap
    model, signs = get_likelihood("softmax"), random_signs(4, 64, classes, torch.Generator().manual_seed(2))
    u = model.sketch(z, signs)
    assert (u.sum(2).abs() <= 1e-12 * u.abs().amax(2)).all()
    others = [c for c in range(classes) if c != 1]
    p = z.softmax(1)[:, others]
    want = p.sqrt() * signs[:, :, others] - p * signs[:, :, 1:2]  # up to the rounding of the likeliest probability
    torch.testing.assert_close(u[:, :, others], want, rtol=1e-6, atol=0)


def test_the_score_of_a_very_confident_example() -> None:
    z = torch.tensor([[60.0, 0.0, 1.0]], dtype=torch.float64)
    (score,) = get_likelihood("softmax").score(z, torch.tensor([0]))
    p = z.softmax(1)[0]
    torch.testing.assert_close(score, torch.stack([-p[1] - p[2], p[1], p[2]]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize(("classes", "most"), [(2, 1), (5, 3), (17, 16), (90, 0), (90, 1), (90, 7), (90, 30)])
def test_sums_behind_the_leading_eigenvalues(likelihood: str, classes: int, most: int, gpu: bool) -> None:
    for scale in (0.0, 1.0, 6.0, 40.0):
        z = logits(4, classes, scale)
        model = get_likelihood(likelihood)
        most = min(most, model.rank(classes))
        exact = second_moment(model.exact(z))
        values = torch.linalg.eigvalsh(exact).flip(1).clamp_min(0)
        values = values / values.sum(1, keepdim=True)
        want = [torch.stack([values[:, first:].pow(power).sum(1) for first in range(most + 1)], 1) for power in (1, 2)]
        if gpu:
            with pretended():
                got = model.behind(Pretend(z), most)[0].held
        else:
            got = model.behind(z, most)[0]
        # Sixteen eigenvalues are found for 33 poles, and the others are approximated by probabilities.
        torch.testing.assert_close(got, torch.stack(want), rtol=0.01 if classes < 90 else 0.1, atol=1e-3)


def spread(u: Tensor, want: Tensor) -> float:
    """The relative error of an estimate of a diagonal Fisher [filters], from many examples [K, N, filters]."""
    return float((u.square().sum(0) - want).norm(dim=1).square().mean().sqrt() / want.norm())


@pytest.mark.parametrize("gpu", [False, True])
def test_one_number_of_cotangents_is_divided_as_the_spectrum_suggests(gpu: bool) -> None:
    """For flat spectra the error falls with the number, and is that of sketches. Steep ones keep their eigenvectors."""
    draws = 1000
    flat, steep = torch.zeros(1, 40, dtype=torch.float64), logits(1, 40, 8.0)
    errors = {}
    for name, z in (("flat", flat), ("steep", steep)):
        jacobian = logits(40, 30, 1.0, seed=2)
        want = torch.einsum("cd,cf,df->f", second_moment(cotangents(z, "exact"))[0], jacobian, jacobian)
        for estimator, k in itertools.product(("deflated", "hutchinson"), (2, 8)):
            generator, many = torch.Generator().manual_seed(k), z.expand(draws, -1)
            if gpu:
                with pretended():
                    u = cotangents(Pretend(many), estimator, k, generator=generator).held
            else:
                u = cotangents(many, estimator, k, generator=generator)
            assert len(u) == k
            errors[name, estimator, k] = spread(u @ jacobian, want)
    for k in (2, 8):
        assert errors["flat", "deflated", k] == pytest.approx(errors["flat", "hutchinson", k], rel=0.1)
        assert errors["steep", "deflated", k] < 0.5 * errors["steep", "hutchinson", k]
    assert errors["flat", "deflated", 8] == pytest.approx(errors["flat", "deflated", 2] / 2, rel=0.1)
    assert errors["steep", "deflated", 8] < 0.2 * errors["steep", "deflated", 2]


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize("tokens", [False, True])
def test_the_draws_of_an_example_do_not_depend_on_the_logits_of_others(likelihood: str, tokens: bool) -> None:
    """Where the logits decide how many eigenvectors each one gets."""
    z = torch.cat([logits(2, 9, 0.1), logits(2, 9, 9.0), logits(2, 9, 0.1, seed=4)])
    other = z.clone()
    if tokens:  # those of a sequence depend on each other
        other[3:], same = logits(3, 9, 1.0, seed=5), [0, 1, 2]
    else:
        other[[0, 3]], same = other[[3, 0]], [1, 2, 4, 5]
    drawn = []
    for each in (z, other):
        each = each.view(2, 3, 9) if tokens else each
        u = cotangents(each, "deflated", 4, likelihood, generator=torch.Generator().manual_seed(0))
        assert len(u) == 4
        drawn.append(u.reshape(4, 6, 9))
    torch.testing.assert_close(drawn[0][:, same], drawn[1][:, same], rtol=1e-9, atol=1e-12)


def of_tokens(kind: str, length: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits [T, C], and the gradients of each logit at each token [T, C, F, D], D entries in each of F filters."""
    z, width = logits(length, classes, 6.0), 16
    if kind == "one":  # all tokens but the first are confident
        z = logits(length, classes, 1.0)
        z[:, 0] += 25
        z[0] = 0
        z[0, :2] = 20
    elif kind == "flat":
        z = logits(length, classes, 0.3)
    features = logits(length, width, 1.0, seed=1) + (3 if kind == "alike" else 0)
    last = torch.eye(classes, dtype=torch.float64)[None, :, :, None] * features[:, None, None]  # the last layer
    below = logits(classes, 12, 1.0, seed=2)[None, :, :, None] * features[:, None, None]
    return z, torch.cat([last, below], 2)


@pytest.mark.parametrize("length", [1, 2, 8, 30])
@pytest.mark.parametrize("kind", ["steep", "alike", "flat", "one"])
@pytest.mark.parametrize("samples", [1, 2, 8, 12])
def test_tokens_get_the_better_of_eigenvectors_and_sketches(length: int, kind: str, samples: int) -> None:
    """Gradients of tokens that share a backward pass are averaged over their signs, which takes many passes.

    That counts where tokens are about equally uncertain and have similar features. One uncertain token gets
    eigenvectors as if it were alone.
    """
    draws, classes = 600, 10
    z, jacobian = of_tokens(kind, length, classes)
    want = torch.einsum("tcd,tcfe,tdfe->f", second_moment(cotangents(z, "exact")), jacobian, jacobian)
    errors = {}
    for estimator in ("deflated", "hutchinson"):
        generator = torch.Generator().manual_seed(samples)
        u = cotangents(z.expand(draws, -1, -1), estimator, samples, generator=generator)
        assert len(u) == samples
        squares = torch.einsum("kntc,tcfe->knfe", u, jacobian).square().sum((0, 3))
        errors[estimator] = float((squares - want).norm(dim=1).square().mean().sqrt() / want.norm())
        deviation = (squares.mean(0) - want).abs() / (squares.std(0) / draws**0.5 + 1e-6 * want)
        assert float(deviation.max()) < 5  # unbiased
    # Sketches of ten equal classes are better in the last layer than those of eigenvectors.
    assert errors["deflated"] <= (1.1 if kind != "flat" else 1.6) * errors["hutchinson"]
    if kind == "one":
        assert errors["deflated"] < 0.01
    if kind == "steep" and length <= 2 and samples > 1:
        assert errors["deflated"] < 0.5 * errors["hutchinson"]


def test_a_packed_row_has_the_cotangents_of_its_sequences() -> None:
    sizes = [2, 30, 1, 3]
    z = logits(sum(sizes), 9, 3.0)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    packed_row, padded = torch.cat([z, z[:2]])[None], z.new_zeros(4, 30, 9)
    there = torch.arange(30) < torch.tensor(sizes)[:, None]
    padded[there] = z
    for k in (1, 3, 9):
        sources = [torch.Generator().manual_seed(7) for _ in range(2)]
        apart = cotangents(padded, "deflated", k, generator=sources[0], mask=there)[:, there]
        mask = torch.ones(1, 38, dtype=torch.bool)
        mask[0, 36:] = False
        where = torch.cat([segments, torch.tensor([-1, -1])])
        row = cotangents(packed_row, "deflated", k, generator=sources[1], mask=mask, segments=where)
        torch.testing.assert_close(row[:, 0, :36], apart)
        assert not row[:, 0, 36:].any()


def test_segments_fit_the_row() -> None:
    row = torch.zeros(1, 5, 3)
    for logits_, segments in (
        (row, torch.zeros(4)),
        (row, torch.zeros(6)),
        (row[0], torch.zeros(5)),
        (row[:, :, 0], torch.zeros(3)),
    ):
        with pytest.raises(
            ValueError, match=r"segments are \[\d\], expected one for each token of one row \[1, T, C\]"
        ):
            cotangents(logits_, "deflated", segments=segments.long())
    with pytest.raises(ValueError, match="segments are"):
        cotangents(row.expand(2, -1, -1), "deflated", segments=torch.zeros(5).long())


def test_one_generator_and_a_number_of_each_example() -> None:
    """Another example's number changes no draw."""
    z, samples = logits(4, 9, 2.0), torch.tensor([1, 2, 8, 3])
    together = cotangents(z, "deflated", samples, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for n in range(4):
        alone = cotangents(z[n : n + 1], "deflated", samples[n : n + 1], generator=generator)[:, 0]
        torch.testing.assert_close(second_moment(alone[:, None]), second_moment(together[:, n : n + 1]))


def test_a_likelihood_of_someone_else_needs_no_more_than_before() -> None:
    """It may implement the abstract methods alone, without the arguments that only a CUDA device needs."""

    class Own(type(get_likelihood("softmax"))):
        behind = Likelihood.behind

        def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
            assert leading.device == signs.device == torch.device("cpu")
            return super().deflated(z, leading, signs)

    z = torch.cat([logits(3, 6, 0.1), logits(3, 6, 9.0)])
    for k in (1, 2, 4, 7):
        u, want = (
            cotangents(z, "deflated", k, likelihood, generator=torch.Generator().manual_seed(0))
            for likelihood in (Own(), "softmax")
        )
        torch.testing.assert_close(u, want)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("k", [2, 4])
def test_the_error_of_confident_examples_does_not_depend_on_how_confident_they_are(
    classes: int, k: int, gpu: bool
) -> None:
    """The Fisher of nearly all examples of a fitted head is a multiple of one matrix. Only its scale falls."""
    jacobian, errors = logits(classes, 30, 1.0, seed=2), []
    for gap in (12.0, 20.0, 25.0, 30.0, 60.0):
        z = logits(1, classes, 2.0, seed=classes)
        z[0, 3] = z.max() + gap
        want = torch.einsum("cd,cf,df->f", second_moment(cotangents(z, "exact"))[0], jacobian, jacobian)
        many, generator = z.expand(300, -1), torch.Generator().manual_seed(0)
        if gpu:
            with pretended():
                u = cotangents(Pretend(many), "deflated", k, generator=generator).held
        else:
            u = cotangents(many, "deflated", k, generator=generator)
        errors.append(spread(u @ jacobian, want))
    assert errors[1:] == pytest.approx(errors[:1] * 4, rel=0.01)
