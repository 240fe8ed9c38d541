"""The backends for laplace-torch against laplace-torch's own, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from t2v_fast import UnsupportedError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Residual(nn.Module):
    """Batch norms and an addition, which BackPACK's exact diagonal refuses."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.head((h + self.second(h)).relu().flatten(1))


def task(likelihood: str, outputs: int, frozen: bool = False) -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = Residual(outputs).double()
    x = torch.randn(11, 1, 4, 4).double()
    model(x)
    model.first.requires_grad_(not frozen)
    classes = torch.randint(0, outputs, (11,))
    y = classes if likelihood == "classification" else torch.randn(11, outputs).double()
    return model, DataLoader(TensorDataset(x, y), 4)


def fitted(model: nn.Module, loader: DataLoader, likelihood: str, backend: Any, subset: str = "all", **options: Any):
    from laplace import Laplace

    torch.manual_seed(1)
    la = Laplace(model, likelihood, subset, "diag", backend=backend, **options)
    la.fit(loader)
    return la


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours.H, theirs.H, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), rtol=1e-10, atol=1e-10, check_dtype=False
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("likelihood", "outputs"), [("classification", 4), ("regression", 1), ("regression", 3)])
def test_diagonals_are_those_of_their_backends(likelihood: str, outputs: int, frozen: bool) -> None:
    from laplace.curvature import AsdlEF, AsdlGGN, CurvlinopsEF, CurvlinopsGGN

    from t2v_fast.adapters.laplace import T2VEF, T2VGGN

    model, loader = task(likelihood, outputs, frozen)
    for ours, theirs in ((T2VGGN, [CurvlinopsGGN, AsdlGGN]), (T2VEF, [CurvlinopsEF, AsdlEF])):
        for backend in theirs:
            same(fitted(model, loader, likelihood, ours), fitted(model, loader, likelihood, backend))
    last = {"subset": "last_layer"}
    # The empirical Fisher of CurvlinopsEF is zero for a last layer (laplace-torch 0.3), so ASDL's is compared.
    for ours, backend in ((T2VGGN, CurvlinopsGGN), (T2VEF, AsdlEF)):
        same(fitted(model, loader, likelihood, ours, **last), fitted(model, loader, likelihood, backend, **last))


@pytest.mark.parametrize(("likelihood", "outputs"), [("classification", 4), ("regression", 3)])
def test_subnetworks_and_drawn_labels(likelihood: str, outputs: int) -> None:
    from laplace.curvature import CurvlinopsGGN

    from t2v_fast.adapters.laplace import T2VGGN

    model, loader = task(likelihood, outputs)
    for options in (
        {"subset": "subnetwork", "subnetwork_indices": torch.LongTensor([0, 7, 45, 200, 190])},
        {"backend_kwargs": {"stochastic": True}},
    ):
        same(*(fitted(model, loader, likelihood, backend, **options) for backend in (T2VGGN, CurvlinopsGGN)))
    exact = fitted(model, loader, likelihood, T2VGGN).H
    options = {"stochastic": True, "num_samples": 400}
    drawn = fitted(model, loader, likelihood, T2VGGN, backend_kwargs=options).H
    assert float((drawn - exact).norm()) < 0.1 * float(exact.norm())
    options = {"estimator": "hutchinson", "num_samples": 400}
    assert float((fitted(model, loader, likelihood, T2VGGN, backend_kwargs=options).H - exact).norm()) < 0.1 * float(
        exact.norm()
    )


def test_what_follows_from_a_fit_works() -> None:
    from t2v_fast.adapters.laplace import T2VGGN

    model, loader = task("classification", 4)
    la = fitted(model, loader, "classification", T2VGGN)
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(method="marglik")
    assert float(la.log_marginal_likelihood()) > before
    x = next(iter(loader))[0]
    torch.testing.assert_close(la(x).sum(1), torch.ones(len(x)).double())
    assert la.sample(5).shape == (5, la.n_params)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_refused() -> None:
    from t2v_fast.adapters.laplace import T2VGGN

    model, loader = task("classification", 4)
    x, y = next(iter(loader))
    for options, message in (
        ({"estimator": "empirical"}, "estimator is 'empirical'"),
        ({"estimator": "deflated", "stochastic": True}, "stochastic is True"),
        ({"unsupported": "skip"}, "Laplace needs every parameter"),
        ({"num_samples": 0}, "num_samples is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            T2VGGN(model, "classification", **options)
    with pytest.raises(UnsupportedError, match="norm"):
        T2VGGN(model.train(), "classification").diag(x, y)
    with pytest.raises(TypeError, match="got data_average"):
        T2VGGN(model.eval(), "classification").diag(x, y, N=11, data_average=True)
    tokens = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"outputs are \[2, 5, 2\]"):
        T2VGGN(tokens, "classification").diag(torch.randn(2, 5, 3).double(), torch.zeros(2, 5).long())


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backend", ["T2VGGN", "T2VEF"])
def test_squares_that_overflow_are_refused(backend: str, subset: str) -> None:
    from t2v_fast.adapters import laplace

    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    data = TensorDataset(torch.tensor([[1.0, 2, 3], [3, 2, 1], [1e20, 1, 1]]), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"weight' is not finite"):
        fitted(model, DataLoader(data, 2), "classification", getattr(laplace, backend), subset)


def test_the_page_runs() -> None:
    """The sections on laplace-torch and on curvlinops."""
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    model, loader = task("classification", 4)
    names = {"model": model, "loader": loader, "torch": torch}
    for title in ("laplace-torch", "curvlinops"):
        (block,) = re.findall(rf"## {title}\n.*?```python\n(.*?)```", page, re.DOTALL)
        exec(block, names)
    diagonal = torch.cat([d.flatten() for d in names["diagonal"].diagonal])
    torch.testing.assert_close(diagonal * 11, names["la"].H)
