"""Diagonals against the diagonals of curvlinops' own operators, multiplied out in float64."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Mapping

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def problem() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return model, torch.randn(7, 1, 4, 4).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_diagonals_are_those_of_their_operators(loss: type[nn.Module], reduction: str) -> None:
    from curvlinops import EFLinearOperator, GGNLinearOperator

    from t2v_fast.adapters.curvlinops import diagonal_operator

    model, x = problem()
    y = CLASSES if loss is nn.CrossEntropyLoss else torch.rand(7, 3).double()
    data, params = [(x[:3], y[:3]), (x[3:], y[3:])], list(model.parameters())[::-1]
    for estimator, theirs in (("exact", GGNLinearOperator), ("empirical", EFLinearOperator)):
        operator = theirs(model, loss(reduction=reduction), params, data, check_deterministic=False)
        ours = diagonal_operator(model, loss(reduction=reduction), params, data, estimator=estimator)
        unit = torch.eye(ours.shape[0]).double()
        torch.testing.assert_close(ours @ unit, (operator @ unit).diag().diag(), rtol=1e-10, atol=1e-13)
    assert [d.shape for d in ours.diagonal] == [p.shape for p in params]
    v = torch.rand(ours.shape[1]).double()
    torch.testing.assert_close((2 * ours + operator) @ v, 2 * (ours @ v) + operator @ v)
    torch.testing.assert_close(torch.from_numpy(ours.to_scipy() @ v.numpy()), ours @ v)
    assert ours.adjoint() is ours


def test_the_arguments_are_those_of_curvlinops() -> None:
    """All of them by position; parameters in an iterator, and frozen ones; inputs in a mapping; bfloat16."""
    from curvlinops import GGNLinearOperator

    from t2v_fast.adapters.curvlinops import diagonal_operator

    names = list(inspect.signature(GGNLinearOperator).parameters)
    assert list(inspect.signature(diagonal_operator).parameters)[: len(names)] == names

    class OfMapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = problem()[0].requires_grad_(False)

        def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return self.inside(inputs["x"])

    model, x = OfMapping(), problem()[1]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, 0.05)):
        model.to(dtype)
        data = [(UserDict(x=x.to(dtype)[part]), CLASSES[part]) for part in (slice(3), slice(3, 7))]
        rest = False, False, 7, None, lambda inputs: len(inputs["x"])
        ours = diagonal_operator(model, nn.CrossEntropyLoss(), model.parameters(), iter(data), *rest)
        theirs = GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data, *rest)
        want = (theirs @ torch.eye(ours.shape[0], dtype=dtype)).diag().double()
        got = torch.cat([d.flatten() for d in ours.diagonal])
        assert got.dtype == dtype
        assert float((got.double() - want).norm()) <= tolerance * float(want.norm())


def test_estimates_have_the_exact_diagonal_as_their_mean() -> None:
    from t2v_fast.adapters.curvlinops import diagonal_operator

    model, x = problem()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, CLASSES)] * 100
    exact = torch.cat([d.flatten() for d in diagonal_operator(*arguments).diagonal])
    for estimator in ("monte_carlo", "hutchinson"):
        found = diagonal_operator(*arguments, estimator=estimator, samples=4).diagonal
        assert float((torch.cat([d.flatten() for d in found]) - exact).norm()) < 0.2 * float(exact.norm())


def test_what_is_refused() -> None:
    from t2v_fast.adapters.curvlinops import diagonal_operator

    model, x = problem()
    params, data = list(model.parameters()), [(x, CLASSES)]
    good = {"model_func": model, "loss_func": nn.CrossEntropyLoss(), "params": params, "data": data}
    for change, error, message in (
        ({"model_func": model.forward}, TypeError, "model_func is method"),
        ({"loss_func": nn.CrossEntropyLoss(torch.ones(3).double())}, ValueError, "loss_func is"),
        ({"loss_func": nn.CrossEntropyLoss(label_smoothing=0.1)}, ValueError, "loss_func is"),
        ({"loss_func": nn.CrossEntropyLoss(reduction="none")}, ValueError, "loss_func is"),
        ({"loss_func": nn.CrossEntropyLoss(ignore_index=2)}, ValueError, "ignore_index"),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError, r"params\[0\] \[2\] is no parameter"),
        ({"params": params[:1] * 2}, ValueError, "a parameter twice"),
        ({"estimator": "batch_mean"}, ValueError, "estimator is 'batch_mean'"),
        ({"num_data": 8}, ValueError, "num_data is 8, but the data has 7 examples"),
        ({"data": []}, ValueError, "gave no example"),
    ):
        with pytest.raises(error, match=message):
            diagonal_operator(**(good | change))
