"""The moments of several quantities are those of each quantity alone, however they are stored together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2v_fast.estimation.moments import DrawnExamples, DrawnUnits, Moments, NamedDrawnExamples, NamedMoments, Units

SHAPES = {"filter": (5,), "tensor": (), "none": (0,), "large": (40, 3), "small": (2, 2), "double": (7,)}


def batch(n: int) -> dict[str, Tensor]:
    return {
        name: torch.rand(n, *shape, dtype=torch.float64 if name == "double" else torch.float32)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("together", [1, 8, 100, 2**16])
def test_named_moments(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(NamedMoments, "TOGETHER", together)
    torch.manual_seed(0)
    named, alone = NamedMoments(), {name: Moments() for name in SHAPES}
    for n in (3, 1, 6):
        values, units = batch(n), Units(torch.rand(n), torch.rand(n))
        named.add(values, units)
        for name, q in values.items():
            alone[name].add(q, units)
    mean, error = named.mean(), named.standard_error()
    assert list(mean) == list(error) == list(SHAPES)
    assert named.weight == alone["filter"].weight
    for name, moments in alone.items():
        torch.testing.assert_close(mean[name], moments.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(error[name], moments.standard_error(), rtol=1e-9, atol=1e-12)
        assert mean[name].untyped_storage().nbytes() == mean[name].numel() * 8  # none keeps all the others alive


def test_what_a_batch_lacks_is_left_out() -> None:
    torch.manual_seed(0)
    named, alone = NamedMoments(), Moments()
    for missing in ("small", "large", None):
        values = {name: q for name, q in batch(4).items() if name != missing}
        named.add(values, Units(torch.ones(4)))
        alone.add(values["filter"], Units(torch.ones(4)))
    assert list(named.mean()) == [name for name in SHAPES if name not in ("small", "large")]
    torch.testing.assert_close(named.mean()["filter"], alone.mean())
    named.set_weights(torch.full((24,), 2.0))
    torch.testing.assert_close(named.mean()["filter"], alone.mean() / 4)


def test_no_batch_weighs_nothing() -> None:
    assert NamedMoments().weight == 0


def test_quantities_side_by_side() -> None:
    """Of any shape and with one missing; the variances are those of each alone."""
    torch.manual_seed(0)
    shapes = {"a": (3,), "b": (), "c": (2, 4)}
    named, alone = NamedDrawnExamples(), {name: DrawnExamples() for name in shapes}
    for n in (5, 2, 7):
        values, variances = ({name: torch.rand(n, *shape) for name, shape in shapes.items()} for _ in range(2))
        units = DrawnUnits(torch.rand(n) + 0.1, torch.rand(n).clamp(0.2, 1))
        if n == 2:
            del values["b"], variances["b"]
        named.add(values, variances, units)
        for name, q in values.items():
            alone[name].add(q, variances[name], units)
    found = named.variance()
    assert list(found) == ["a", "c"]
    for name, variance in found.items():
        torch.testing.assert_close(variance, alone[name].variance())
    assert NamedDrawnExamples().variance() == {}


@pytest.mark.parametrize("sizes", [(30, 30), (57, 3), (50, *[1] * 10), (16, 16, 16, 12)])
def test_the_variance_of_a_mean_over_batches_of_any_sizes_is_unbiased(sizes: tuple[int, ...]) -> None:
    """Each of 40,000 entries is a data set of 60 examples with variance one."""
    generator = torch.Generator().manual_seed(0)
    moments = Moments()
    for size in sizes:
        moments.add(torch.randn(1, 40_000, generator=generator) / size**0.5, Units(torch.tensor([float(size)])))
    assert abs(float(moments.standard_error().square().mean()) * 60 - 1) < 0.03


@pytest.mark.parametrize("scale", [1e-160, 1e150])
def test_weights_of_any_size(scale: float) -> None:
    moments = Moments()
    moments.add(torch.tensor([1.0, 2.0, 6.0]), Units(scale * torch.ones(3, dtype=torch.float64)))
    torch.testing.assert_close(float(moments.mean()), 3.0)
    assert float(moments.standard_error()) == pytest.approx((7 / 3) ** 0.5, rel=1e-9) or scale < 1  # underflows to 0


def test_one_unit_that_counts_has_no_standard_error() -> None:
    moments = Moments()
    moments.add(torch.tensor([1.0, 2.0]), Units(torch.tensor([3.0, 0.0])))
    assert moments.standard_error().isnan()


def test_the_spread_of_few_drawn_units_is_not_that_around_their_own_mean() -> None:
    """Eight of a thousand units: the spread of all is that of a sample of eight."""
    values = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    named = NamedMoments()
    named.add({"q": values}, Units(torch.ones(8), torch.full((8,), 0.008)))
    named.set_weights(torch.ones(1000))
    torch.testing.assert_close(named.standard_error()["q"], values.std() / 1000**0.5)
