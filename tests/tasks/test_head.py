"""Linear heads against scikit-learn, and heads that are fitted together against heads that are fitted one by one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from t2v_fast.tasks import head
from t2v_fast.tasks import head_solvers as solvers
from t2v_fast.tasks.head import GRID, HeadTask, cross_validate, fit_head, fit_heads


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
@pytest.mark.parametrize("method", ["newton", "lbfgs"])
def test_it_finds_the_optimum(method: str, weighted: bool, weight_decay: float) -> None:
    x, y = blobs()
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else torch.ones(len(x))
    fit = fit_head(x, y, num_classes=4, weights=w, method=method, weight_decay=weight_decay)
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


def gradient_norm(fit, x: torch.Tensor, y: torch.Tensor, weight_decay: float, likelihood: str) -> float:
    """By autograd, at the float32 head."""
    weight, bias = (p.detach().double().requires_grad_() for p in (fit.linear.weight, fit.linear.bias))
    logits = x.double() @ weight.T + bias
    if likelihood == "softmax":
        loss = F.cross_entropy(logits, y)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="none").sum(1).mean()
    (loss + weight_decay / 2 * weight.square().sum()).backward()
    return float(torch.cat([weight.grad.flatten(), bias.grad]).norm())


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n", [40, 400])  # fewer and more examples than features
def test_newton_needs_few_iterations_where_features_are_ill_conditioned(likelihood: str, n: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = blobs(n, d=200)
    x = x @ torch.randn(200, 200, generator=g)  # correlated, too
    labels = y if likelihood == "softmax" else (torch.rand(n, 4, generator=g) < 0.3).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_head(x, labels, num_classes=4, likelihood=likelihood)
    assert fit.converged
    assert fit.iterations <= 25
    assert gradient_norm(fit, x, labels, 1e-4, likelihood) < 1e-5 * float(x.norm(dim=1).mean())
    if likelihood == "softmax":
        assert float(fit.linear.weight.detach().sum(0).abs().max()) < 1e-5


def test_newton_and_lbfgs_agree() -> None:
    x, y = blobs()
    newton, lbfgs = (fit_head(x, y, num_classes=4, method=m, weight_decay=1e-2) for m in ("newton", "lbfgs"))
    torch.testing.assert_close(newton.linear(x).softmax(1), lbfgs.linear(x).softmax(1), rtol=0, atol=1e-4)
    assert newton.loss == pytest.approx(lbfgs.loss, rel=1e-5)
    top = newton.linear(x).detach().softmax(1).amax(1).mean()
    assert newton.mean_top_probability == pytest.approx(float(top), abs=1e-6)


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
def test_sigmoid_fits_each_label(method: str) -> None:
    x, y = blobs(classes=2)
    labels = torch.stack([y, 1 - y], 1)
    fit = fit_head(x, labels, num_classes=2, likelihood="sigmoid", method=method, weight_decay=1e-2)
    assert fit.converged
    torch.testing.assert_close(fit.linear.weight[0], -fit.linear.weight[1], rtol=1e-3, atol=1e-4)
    reference = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-10, max_iter=100_000).fit(
        x.double().numpy(), y.numpy()
    )
    want = reference.predict_proba(x.double().numpy())[:, 1]
    assert np.abs(fit.linear(x)[:, 0].sigmoid().detach().numpy() - want).max() < 1e-4


def test_constant_features_leave_the_class_frequencies() -> None:
    y = torch.tensor([0, 0, 0, 1])
    fit = fit_head(torch.ones(4, 3), y, num_classes=2)
    assert fit.converged
    torch.testing.assert_close(fit.linear(torch.ones(1, 3)).softmax(1), torch.tensor([[0.75, 0.25]]))
    balanced = fit_head(torch.ones(4, 3), y, num_classes=2, weights=torch.tensor([1.0, 1, 1, 3]))
    assert balanced.converged  # the gradient is zero from the start
    assert fit_head(torch.ones(4, 3), y, num_classes=2, weights=torch.tensor([2.0, 1, 0, 3])).loss == pytest.approx(
        np.log(2)
    )


def test_it_works_without_autograd() -> None:
    x, y = blobs()
    with torch.inference_mode():
        fit = fit_head(x * 1, y, num_classes=4)
    assert fit.converged


def test_adam_is_the_public_schedule_and_reproducible() -> None:
    x, y = blobs()
    a = fit_head(x, y, num_classes=4, method="adam", epochs=2, draws=1000, seed=3)
    assert a.iterations == 2 * (1000 // 64)
    assert not a.converged
    b = fit_head(x, y, num_classes=4, method="adam", epochs=2, draws=1000, seed=3)
    assert torch.equal(a.linear.weight, b.linear.weight)
    longer = fit_head(x, y, num_classes=4, method="adam", epochs=8, draws=1000, seed=3)
    assert longer.loss < a.loss


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
def test_it_says_when_it_did_not_converge(method: str) -> None:
    x, y = blobs()
    with pytest.warns(UserWarning, match="did not converge: after 2 iterations the gradient's") as record:
        assert not fit_head(x, y, num_classes=4, method=method, max_iterations=2).converged
    assert record[0].filename == __file__  # the warning points at the caller


def several_tasks(n: int, likelihood: str) -> dict[str, HeadTask]:
    """Tasks of different numbers of classes, with and without weights, some of them zero."""
    g = torch.Generator().manual_seed(0)
    tasks = {}
    for k, classes in enumerate((2, 7, 3, 5, 2, 4, 11)):
        labels = torch.randperm(n, generator=g) % classes
        weights = torch.rand(n, generator=g) if k % 2 else None
        if weights is not None:
            weights[0] = 0
        if likelihood == "sigmoid":
            labels = (torch.rand(n, max(1, classes - 2), generator=g) < 0.4).float()
        tasks[f"task {k}"] = HeadTask(labels, labels.shape[1] if likelihood == "sigmoid" else classes, weights)
    return tasks


def rows_are_independent() -> bool:
    """Whether BLAS computes each row of a product as it does without the others."""
    g = torch.Generator().manual_seed(0)
    rows, matrix = (torch.randn(k, 104, dtype=torch.float64, generator=g) for k in (34, 104))
    whole = solvers._product(rows, matrix)
    return all(
        torch.equal(solvers._product(rows[i : i + k], matrix), whole[i : i + k])
        for i in range(24)
        for k in (1, 2, 3, 5, 10)
    )


@pytest.mark.parametrize(("n", "d", "limit"), [(37, 90, solvers.MAX_LOGITS), (101, 60, 1200)])  # one group, and several
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_together_as_if_alone(likelihood: str, n: int, d: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "MAX_LOGITS", limit)
    x, _ = blobs(n, d)
    tasks = several_tasks(n, likelihood)
    together = fit_heads(x, tasks, likelihood=likelihood, weight_decay=1e-3)
    assert list(together) == list(tasks)
    # To the last bit, or what another rounding on the way does to where the last step ends.
    bound = 0.0 if rows_are_independent() else 1e-4
    for name, task in tasks.items():
        options = {"num_classes": task.num_classes, "weights": task.weights, "likelihood": likelihood}
        alone, fit = fit_head(x, task.labels, weight_decay=1e-3, **options), together[name]
        torch.testing.assert_close(fit.linear.weight, alone.linear.weight, rtol=bound, atol=bound)
        torch.testing.assert_close(fit.linear.bias, alone.linear.bias, rtol=bound, atol=bound)
        assert fit.loss == pytest.approx(alone.loss, rel=1e-8)
        assert (fit.converged, alone.converged) == (True, True)


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_the_gradient_vanishes_at_every_optimum(likelihood: str) -> None:
    """By autograd, before the heads are rounded to float32."""
    x = blobs(50, d=60)[0].double()
    mean = x.mean(0)
    tasks = [head._checked(name, task, 50, likelihood) for name, task in several_tasks(50, likelihood).items()]
    for task, found in zip(tasks, solvers.newton(x, tasks, 1e-3, 100, 1e-10, likelihood == "softmax"), strict=True):
        weight, bias = (p.clone().requires_grad_() for p in (found.weight, found.bias + found.weight @ mean))
        logits = (x - mean) @ weight.T + bias
        if likelihood == "softmax":
            losses = F.cross_entropy(logits, task.labels, reduction="none")
        else:
            losses = F.binary_cross_entropy_with_logits(logits, task.labels, reduction="none").sum(1)
        (task.weights @ losses + 1e-3 / 2 * weight.square().sum()).backward()
        scale = float(1 + task.weights @ (x - mean).square().sum(1)) ** 0.5
        assert float(torch.cat([weight.grad.flatten(), bias.grad]).norm()) < 1.01e-10 * scale


def test_a_task_that_does_not_converge_is_named() -> None:
    x, y = blobs()
    easy = torch.tensor([0, 1]).repeat_interleave(2).repeat(30)
    constant = torch.cat([x[:, :1] * 0, x[:, 5:7]], 1)  # nothing to learn from: the first task's optimum is the start
    tasks = {"done": HeadTask(easy, 2), "hard": HeadTask(torch.where(y == 3, 0, y), 3)}
    with pytest.warns(UserWarning, match="task 'hard': the head did not converge: after 0 iterations") as record:
        fits = fit_heads(constant, tasks, max_iterations=0)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert (fits["done"].converged, fits["hard"].converged) == (True, False)


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_other_methods_take_one_task_after_another(method: str) -> None:
    x, y = blobs()
    options = {"method": method, "weight_decay": 1e-1, "epochs": 1}
    fits = fit_heads(x, {"a": HeadTask(y, 4), "b": HeadTask(y % 2, 2)}, **options)
    assert torch.equal(fits["b"].linear.weight, fit_head(x, y % 2, num_classes=2, **options).linear.weight)
    assert fit_heads(x, {}, **options) == fit_heads(x, {}) == {}


def test_errors_name_the_task() -> None:
    for wrong, message in ((HeadTask(Y, 5), "class 4 of 5 has no"), (HeadTask(Y, 4, torch.ones(7)), "weights are")):
        with pytest.raises(ValueError, match=f"task 'b': {message}"):
            fit_heads(X, {"a": HeadTask(Y, 4), "b": wrong})


X, Y = blobs(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": X * float("nan")}, "features of example 0 are not finite"),
        ({"features": X[:0], "labels": Y[:0]}, "N and D of at least 1"),
        ({"labels": Y.float()}, "expected integers"),
        ({"labels": Y + 1}, "from 1 to 4, expected 0 to 3"),
        ({"labels": Y - 1}, "from -1 to 2"),
        ({"num_classes": 5}, "class 4 of 5 has no example"),
        ({"num_classes": 1, "labels": Y * 0}, "at least two classes, got 1"),
        ({"weights": -torch.ones(8)}, "at least 0"),
        ({"weights": torch.full((8,), torch.inf)}, "finite numbers"),
        ({"weights": (Y != 2).float()}, "the examples of class 2 of 4 all have weight 0"),
        ({"weight_decay": 0}, "expected above 0"),
        ({"weight_decay": -1, "method": "adam"}, "weight_decay is -1"),
        ({"likelihood": "sigmoid", "labels": torch.eye(4).repeat(2, 1) * 2}, "between 0 and 1"),
        ({"likelihood": "sigmoid", "labels": torch.ones(8, 4)}, "label 0 of 4 is the same in every example"),
        ({"weights": torch.ones(7)}, r"\[7\], expected \[8\]"),
        ({"method": "sgd"}, "unknown head method 'sgd': expected one of newton, lbfgs, adam"),
        ({"likelihood": "sigmoid"}, r"expected \[8, 4\]"),
        ({"likelihood": "poisson"}, "'poisson'"),
        ({"temperature": 0}, "temperature is 0, expected a number from 1e-06 to 1e"),
        ({"temperature": 1e25}, r"temperature is 1e\+25"),  # the Fisher would be zero in float32
        ({"temperature": 1e-40}, "temperature is 1e-40"),  # the weights would be infinite
        ({"temperature": "2"}, "temperature is '2'"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    options = {"features": X, "labels": Y, "num_classes": 4, **options}
    with pytest.raises(ValueError, match=message):
        fit_head(options.pop("features"), options.pop("labels"), **options)


@pytest.mark.parametrize("options", [{}, {"weight_decay": "cv"}, {"method": "adam", "epochs": 2, "draws": 100}])
def test_a_temperature_divides_the_logits_of_the_fit(options: dict) -> None:
    x, y = blobs(40)
    plain, warm = (fit_head(x, y, num_classes=4, temperature=t, **options) for t in (1.0, 50.0))
    torch.testing.assert_close(warm.linear(x), plain.linear(x) / 50)
    logits = plain.linear(x).detach().double() / 50
    assert warm.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert warm.mean_top_probability == pytest.approx(float(logits.softmax(1).amax(1).mean()), rel=1e-5)
    assert warm.mean_top_probability < plain.mean_top_probability
    assert (warm.accuracy, warm.weight_decay) == (plain.accuracy, plain.weight_decay)
    labels = F.one_hot(y, 4)
    plain, warm = (fit_head(x, labels, num_classes=4, likelihood="sigmoid", temperature=t) for t in (1.0, 50.0))
    torch.testing.assert_close(warm.linear(x), plain.linear(x) / 50)


def held_out_losses(x: np.ndarray, y: np.ndarray, w: np.ndarray, decay: float, parts: list[np.ndarray]) -> float:
    """The weighted mean loss of the parts, each by scikit-learn's head of the others."""
    total = 0.0
    for part in parts:
        inside = np.setdiff1d(np.arange(len(y)), part)
        a = w[inside] / w[inside].sum()
        reference = LogisticRegression(C=1 / decay, tol=1e-10, max_iter=100_000)
        reference.fit(x[inside], y[inside], sample_weight=a)
        total += (w[part] * -reference.predict_log_proba(x[part])[np.arange(len(part)), y[part]]).sum()
    return total / w[np.concatenate(parts)].sum()


def test_cross_validation_is_scikit_learns() -> None:
    x, y = blobs(60, classes=3)
    y = torch.cat([y, torch.tensor([3])])  # a class of one example, which is never held out
    x = torch.cat([x, x[:1] + 1])
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1
    found = cross_validate(x, y, num_classes=4, weights=w, grid=(1e-2, 1.0), folds=4, seed=5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    # The drawn order, class after class; every fourth is a part.
    sequence = [int(i) for c in range(4) for i in order if y[i] == c]
    parts = [np.array([i for i in sequence[k::4] if i != len(x) - 1]) for k in range(4)]
    for part in parts:
        assert np.ptp(np.bincount(y[part], minlength=4)[:3]) <= 1  # each class evenly
    for decay in (1e-2, 1.0):
        want = held_out_losses(x.double().numpy(), y.numpy(), w.double().numpy(), decay, parts)
        assert found[decay] == pytest.approx(want, rel=1e-4)


def test_the_chosen_weight_decay_is_that_of_the_least_loss() -> None:
    x, y = blobs(60)
    losses = cross_validate(x, y, num_classes=4)
    assert list(losses) == list(GRID)
    fit = fit_head(x, y, num_classes=4, weight_decay="cv")
    assert losses[fit.weight_decay] == min(losses.values())
    plain = fit_head(x, y, num_classes=4, weight_decay=fit.weight_decay)
    assert torch.equal(fit.linear.weight, plain.linear.weight)
    # Labels that have nothing to do with the features: the more penalty the better.
    random = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    noise = fit_head(x, random, num_classes=4, weight_decay="cv")
    assert noise.weight_decay > fit.weight_decay
    assert noise.mean_top_probability < 0.5
    # An example of weight zero is as if it were not there.
    padded = fit_head(
        torch.cat([x, x[:5] * 100]),
        torch.cat([y, 3 - y[:5]]),
        num_classes=4,
        weights=torch.cat([torch.ones(60), torch.zeros(5)]),
        weight_decay="cv",
    )
    assert padded.weight_decay == fit.weight_decay


def test_cross_validation_of_several_labels() -> None:
    x, y = blobs(60)
    rare = (torch.arange(60) == 7).long()  # in one part it is out of the others
    labels = torch.stack([y % 2, y // 2, rare], 1)
    found = cross_validate(x, labels, num_classes=3, likelihood="sigmoid", grid=(1e-2, 1e3))
    assert found[1e-2] < found[1e3]
    assert fit_head(x, labels, num_classes=3, likelihood="sigmoid", weight_decay="cv").converged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_validate(X, Y, num_classes=4, folds=1), "folds is 1, expected at least 2"),
        (lambda: cross_validate(X, Y, num_classes=4, grid=(0.0,)), "weight_decay is 0.0, expected above 0"),
        (lambda: cross_validate(X[:4], Y[:4], num_classes=4), "no example can be held out"),
        (lambda: cross_validate(X, Y + 1, num_classes=4), "from 1 to 4"),
        (lambda: fit_head(X, Y, num_classes=4, weight_decay="best"), "weight_decay is 'best', of 'newton' expected a"),
        (lambda: fit_head(X, Y, num_classes=4, method="adam", weight_decay="cv"), "of 'adam' expected a number"),
    ],
)
def test_cross_validation_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
