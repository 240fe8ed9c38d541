"""The linear head, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from t2v_fast.head import fit_head


def blobs(n: int = 120, d: int = 20, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=g)
    x = (centres[labels] + torch.randn(n, d, generator=g)).relu() * torch.logspace(-3, 1, d)
    x[:, 5] = 0  # a dead feature
    x[:, 6] = 3  # a constant one
    return x, labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weight_decay", [1e-1, 1e-4])
def test_lbfgs_finds_the_optimum(weighted: bool, weight_decay: float) -> None:
    x, y = blobs()
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else torch.ones(len(x))
    fit = fit_head(x, y, num_classes=4, weights=w, weight_decay=weight_decay)
    assert fit.converged
    a = (w / w.sum()).double().numpy()
    # scikit-learn minimises C sum_n w_n l_n + |W|^2 / 2 on unscaled features; ours divided by the weight decay.
    reference = LogisticRegression(C=1 / weight_decay, tol=1e-10, max_iter=100_000)
    reference.fit(x.double().numpy(), y.numpy(), sample_weight=a)
    ours, theirs = fit.linear(x).softmax(1).detach().numpy(), reference.predict_proba(x.double().numpy())
    assert np.abs(ours - theirs).max() < (1e-5 if weight_decay == 1e-1 else 2e-3)
    objective = lambda weight, loss: loss + weight_decay / 2 * float(np.square(weight).sum())  # noqa: E731
    losses = -np.log(theirs[np.arange(len(y)), y.numpy()])
    best = objective(reference.coef_, float((a * losses).sum()))
    assert objective(fit.linear.weight.detach().numpy(), fit.loss) <= best * (1 + 1e-6)


def test_sigmoid_fits_each_label() -> None:
    x, y = blobs(classes=2)
    labels = torch.stack([y, 1 - y], 1)
    fit = fit_head(x, labels, num_classes=2, likelihood="sigmoid", weight_decay=1e-2)
    assert fit.converged
    torch.testing.assert_close(fit.linear.weight[0], -fit.linear.weight[1], rtol=1e-3, atol=1e-4)


def test_adam_is_the_public_schedule_and_reproducible() -> None:
    x, y = blobs()
    a = fit_head(x, y, num_classes=4, method="adam", epochs=2, draws=1000, seed=3)
    assert a.iterations == 2 * (1000 // 64)
    assert not a.converged
    b = fit_head(x, y, num_classes=4, method="adam", epochs=2, draws=1000, seed=3)
    assert torch.equal(a.linear.weight, b.linear.weight)
    longer = fit_head(x, y, num_classes=4, method="adam", epochs=8, draws=1000, seed=3)
    assert longer.loss < a.loss


def test_it_says_when_it_did_not_converge() -> None:
    x, y = blobs()
    with pytest.warns(UserWarning, match="did not converge: after 2 iterations"):
        assert not fit_head(x, y, num_classes=4, max_iterations=2).converged


X, Y = blobs(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": X * float("nan")}, "features of example 0 are not finite"),
        ({"features": X[:0], "labels": Y[:0]}, "N of at least 1"),
        ({"labels": Y.float()}, "expected integers"),
        ({"labels": Y + 1}, "from 1 to 4, expected 0 to 3"),
        ({"labels": Y - 1}, "from -1 to 2"),
        ({"num_classes": 5}, "class 4 of 5 has no example"),
        ({"num_classes": 1, "labels": Y * 0}, "at least two classes, got 1"),
        ({"weights": -torch.ones(8)}, "at least 0"),
        ({"weights": torch.ones(7)}, r"\[7\], expected \[8\]"),
        ({"method": "sgd"}, "unknown head method 'sgd': expected one of lbfgs, adam"),
        ({"likelihood": "sigmoid"}, r"expected \[8, 4\]"),
        ({"likelihood": "poisson"}, "'poisson'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    options = {"features": X, "labels": Y, "num_classes": 4, **options}
    with pytest.raises(ValueError, match=message):
        fit_head(options.pop("features"), options.pop("labels"), **options)
