"""fisher() against per-example autograd in float64, for whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mixtures import Mixture, tokens
from networks import generator, images, small_network
from oracle import per_example_squares, randomise_norms, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import t2v_fast
from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.gradients.factors import Outer
from t2v_fast.gradients.rules import RULES


def truth(network: nn.Module, x: Tensor, estimator: str, granularity: str, labels: Tensor | None = None, **options):
    with torch.no_grad():
        u = cotangents(network(x), estimator, labels=labels, **options)
    return {name: reduce(s, granularity).mean(0) for name, s in per_example_squares(network, x, u).items()}


def assert_agrees(got, want: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert list(got) == list(want)
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert relative_error(got[name], want[name]) < tolerance, name


TORCHVISION = {  # odd sizes, so that padding and strides leave remainders
    "resnet18": (49, 35),
    "resnet50": (33, 47),
    "mobilenet_v2": (37, 51),
    "efficientnet_b0": (33, 49),
    "densenet121": (35, 33),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_agrees_with_per_example_autograd(name: str) -> None:
    models = pytest.importorskip("torchvision", reason="this torch has no torchvision built for it").models
    torch.manual_seed(0)
    network = randomise_norms(getattr(models, name)(num_classes=7, weights=None)).double()
    x, y = images(3, TORCHVISION[name]), torch.tensor([0, 6, 2])
    with torch.no_grad():
        u = cotangents(network(x), "empirical", labels=y)
    squares = per_example_squares(network, x, u)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    for granularity in ("filter", "parameter", "tensor"):
        got = fisher(network, batches, "empirical", granularity=granularity)
        assert_agrees(got, {key: reduce(s, granularity).mean(0) for key, s in squares.items()})
        assert not got.unused


@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
@pytest.mark.parametrize("estimator", ["exact", "deflated", "hutchinson", "monte_carlo", "empirical"])
def test_every_estimator_and_granularity(estimator: str, granularity: str) -> None:
    network, x, y = small_network(), images(), torch.tensor([0, 1, 2, 3, 4])
    got = fisher(network, [(x[:2], y[:2]), (x[2:], y[2:])], estimator, 2, granularity, seed=3)
    want = truth(network, x, estimator, granularity, y, samples=2, generator=generator(3))
    assert_agrees(got, want)
    assert got.num_examples == 5
    assert len(got.vector()) == len(got.standard_error_vector()) == sum(v.numel() for v in want.values())


@pytest.mark.parametrize("likelihood", ["sigmoid", "gaussian"])
def test_other_likelihoods(likelihood: str) -> None:
    network, x = small_network(), images()
    got = fisher(network, [x], "exact", likelihood=likelihood)
    assert_agrees(got, truth(network, x, "exact", "filter", likelihood=likelihood))


@pytest.mark.slow_unless(samples=(2,), estimator=("deflated", "monte_carlo"))
@pytest.mark.parametrize("estimator", ["deflated", "hutchinson", "monte_carlo"])
@pytest.mark.parametrize("samples", [1, 2])
def test_sampling_converges_to_exact(estimator: str, samples: int) -> None:
    """The mean over many copies of the images lies within a few of its own standard errors from ``exact``."""
    network, x = small_network(), images()
    exact = fisher(network, [x], "exact")
    copies = 400
    many = fisher(network, [x] * copies, estimator, samples, seed=1)
    # The images are fixed here, so the spread of the draws alone bounds the error; the reported standard error, which
    # covers the spread of the images too, bounds it from above.
    difference, bound = (many.vector() - exact.vector()).abs(), 4.5 * many.standard_error_vector()
    assert (difference <= bound).all()  # both are zero where a filter is dead
    few = fisher(network, [x] * 4, estimator, samples, seed=1)
    error = relative_error(many.vector(), exact.vector())
    assert error < 0.05
    assert error < relative_error(few.vector(), exact.vector())


def test_weights_are_relative_and_follow_the_loader() -> None:
    network, x = small_network(), images()
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    with torch.no_grad():
        u = cotangents(network(x), "exact")
    squares = per_example_squares(network, x, u)
    for granularity in ("filter", "parameter", "tensor"):
        got = fisher(network, [x[:1], x[1:4], x[4:]], "exact", granularity=granularity, weights=10 * w)
        want = {name: torch.tensordot(w / w.sum(), reduce(s, granularity).double(), 1) for name, s in squares.items()}
        assert_agrees(got, want)


def test_standard_error_is_that_of_a_weighted_mean() -> None:
    network, x = small_network(), images(6)
    w = torch.tensor([1.0, 1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        u = cotangents(network(x), "exact")
    got = fisher(network, [x[:4], x[4:]], "exact", weights=w)
    for name, s in per_example_squares(network, x, u).items():
        q = reduce(s, "filter")
        a = (w / w.sum()).view(-1, *[1] * (q.dim() - 1))
        want = ((a * (q - (a * q).sum(0))).square().sum(0) / (1 - a.square().sum())).sqrt()
        assert relative_error(got.standard_error[name], want) < 1e-7


def test_standard_error_is_calibrated() -> None:
    """Over 60 data sets, 95 percent intervals cover the truth for about 95 percent of the entries."""
    network = small_network()
    everything = images(3000, seed=9)
    truth_ = fisher(network, everything.split(500), "exact", self_check=False).vector()
    covered = []
    for seed in range(60):
        x = everything[torch.randperm(3000, generator=generator(seed))[:200]]
        f = fisher(network, [x], "deflated", 2, seed=seed, self_check=False)
        covered.append((f.vector() - truth_).abs() <= 1.96 * f.standard_error_vector())
    rate = float(torch.stack(covered).double().mean())
    assert 0.90 <= rate <= 0.98


@pytest.mark.slow_unless(classes=(5,), scale=(6,))
@pytest.mark.parametrize(("classes", "samples", "scale"), [(5, 2, 1), (5, 2, 6), (80, 2, 4)])
def test_estimator_error_is_calibrated(classes: int, samples: int, scale: float) -> None:
    """Over 50 seeds on the same images, 95 percent intervals cover the exact Fisher for about 95 percent of entries."""
    network, x = small_network(classes), images(120, seed=9)
    with torch.no_grad():
        network[-1].weight.mul_(scale)  # the larger, the more confident
    want = fisher(network, [x], "exact", self_check=False).vector()
    covered, errors, said = [], [], []
    for seed in range(50):
        f = fisher(network, [x], "deflated", samples, seed=seed, self_check=False, estimator_error=True)
        error = torch.cat([v.reshape(-1) for v in f.estimator_error.values()])
        alive = want > 0
        covered.append(((f.vector() - want).abs() <= 1.96 * error)[alive])
        errors.append(relative_error(f.vector(), want))
        said.append(f.relative_error())
    assert 0.90 <= float(torch.stack(covered).double().mean()) <= 0.98
    root_mean_square = (sum(e**2 for e in errors) / len(errors)) ** 0.5
    assert root_mean_square / 1.3 < sum(said) / len(said) < 1.3 * root_mean_square


def test_estimator_error_where_nothing_is_drawn() -> None:
    network, x = small_network(3), images()
    exact = fisher(network, [x], "exact")
    for samples in (2, 7):
        found = fisher(network, [x], "deflated", samples, estimator_error=True)
        assert found.relative_error() == 0
        assert_agrees(found, dict(exact))
    assert math.isnan(exact.relative_error())
    for options in ({"estimator": "hutchinson"}, {"granularity": "parameter"}):
        with pytest.raises(ValueError, match="estimator_error is for estimator 'deflated'"):
            fisher(network, [x], estimator_error=True, **options)
    with pytest.raises(ValueError, match="more than one is for 'deflated'"):
        cotangents(torch.randn(2, 3), "exact", sketches=2)


def test_standard_error_of_parameters_comes_from_batches() -> None:
    network, x = small_network(), images(6)
    one = fisher(network, [x], "exact", granularity="parameter")
    assert one.standard_error_vector().isnan().all()
    three = fisher(network, x.split(2), "exact", granularity="parameter")
    parts = torch.stack([fisher(network, [b], "exact", granularity="parameter").vector() for b in x.split(2)])
    assert relative_error(three.standard_error_vector(), parts.std(0) / 3**0.5) < 1e-6


def test_seeds_and_batch_sizes() -> None:
    network, x = small_network(), images(6)
    a = fisher(network, [x], seed=1)
    assert torch.equal(a.vector(), fisher(network, [x], seed=1).vector())
    assert relative_error(fisher(network, x.split(1), seed=1).vector(), a.vector()) < 1e-12
    assert not torch.equal(a.vector(), fisher(network, [x], seed=2).vector())


def test_batch_mean_is_the_squared_gradient_of_the_mean_loss() -> None:
    network, x = small_network().train(), images(6)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    got = fisher(network, x.split(3), "batch_mean", seed=5, granularity="parameter")
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was changed"
    draws = generator(5)
    want = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for batch in x.split(3):
        logits = network(batch)
        u = cotangents(logits, "monte_carlo", 1, generator=draws)[0]
        labels = (logits.softmax(1) - u).argmax(1)  # what was drawn
        for (name, _), g in zip(
            network.named_parameters(),
            torch.autograd.grad(F.cross_entropy(logits, labels), list(network.parameters())),
            strict=True,
        ):
            want[name] += g.square() / 2
    assert float(want.pop("0.bias").max()) < 1e-25  # the norm takes it out again: rounding alone is left
    assert_agrees({name: got[name] for name in want}, want)


def test_the_model_is_left_as_it_was() -> None:
    network, x = small_network(), images()
    for p in list(network.parameters())[::2]:
        p.requires_grad_(False)
    required = [p.requires_grad for p in network.parameters()]
    with torch.no_grad():  # the caller's mode does not matter
        frozen = fisher(network, [x])
    assert [p.requires_grad for p in network.parameters()] == required
    assert all(p.grad is None for p in network.parameters())
    for p in network.parameters():
        p.requires_grad_(True)
    assert torch.equal(frozen.vector(), fisher(network, [x]).vector())
    with pytest.raises(ValueError, match="NaN"):
        fisher(network, [x * float("nan")])
    assert all(p.requires_grad for p in network.parameters())


def test_parameters_can_be_chosen() -> None:
    network, x = small_network(), images()
    everything = fisher(network, [x], "exact")
    named = fisher(network, [x], "exact", parameters=["7.weight", "3.bias"])
    assert list(named) == ["7.weight", "3.bias"]
    for name in named:
        torch.testing.assert_close(named[name], everything[name])
    weights = fisher(network, [x], "exact", parameters=lambda name, p: name.endswith("weight"))
    assert list(weights) == [name for name in everything if name.endswith("weight")]


def test_no_weight_gradient_is_computed() -> None:
    """Only input gradients are asked of convolutions above the first, and nothing at all below the last tap."""
    network, x = small_network(), images()
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                calls.append(args[-1])
            return func(*args, **(kwargs or {}))

    with FisherRecorder(network) as recorder:
        logits = network(x)
        with Watch(), t2v_fast.ops.use_backend("auto"):
            u = torch.ones_like(logits)
            taps = t2v_fast.gradients.refusals.taps_of(logits, recorder.parameters)
            t2v_fast.gradients.graph.backpropagate(logits, u, taps, lambda node, g: None, retain_graph=True)
    assert calls == [[True, False, False]]


class Tokens(nn.Module):
    """Linear layers over [T, N, D], [N, T, D] or [A, N, B, D] activations, as attention blocks use them."""

    def __init__(self, layout: str, class_token_only: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.class_token_only = layout, class_token_only
        self.mix = nn.Linear(6, 6, bias=bias)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 6]
        if self.layout == "token":
            x = x.transpose(0, 1)
        elif self.layout == "interleaved":
            x = x.unflatten(1, (2, -1)).transpose(0, 1)  # [2, N, T / 2, 6]
        x = self.mix(x.contiguous()).tanh()
        if self.layout == "token":
            x = x.transpose(0, 1)
        elif self.layout == "interleaved":
            x = x.transpose(0, 1).flatten(1, 2)
        return self.out(x[:, 0] if self.class_token_only else x.square().mean(1))


@pytest.mark.parametrize("layout", ["example", "token", "interleaved"])
@pytest.mark.parametrize("class_token_only", [False, True])
@pytest.mark.parametrize(("n", "tokens"), [(4, 4), (3, 6), (6, 2), (1, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_row_layouts_are_found(layout: str, class_token_only: bool, n: int, tokens: int, bias: bool) -> None:
    network = Tokens(layout, class_token_only, bias).double()
    x = torch.randn(n, tokens, 6, dtype=torch.float64, generator=generator())
    for granularity in ("filter", "parameter"):
        want = truth(network, x, "exact", granularity)
        assert_agrees(fisher(network, [x], "exact", granularity=granularity), want)
        smaller_last = fisher(network, [x[: n - 1], x[n - 1 :]] if n > 1 else [x], "exact", granularity=granularity)
        assert_agrees(smaller_last, want)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv1d(4, 6, 5, dilation=2, groups=2, bias=False),
        nn.Linear(9, 5),
        nn.Linear(9, 5, bias=False),
        nn.BatchNorm1d(4),
    ],
    ids=str,
)
def test_layers_in_one_dimension(layer: nn.Module) -> None:
    torch.manual_seed(0)
    network = randomise_norms(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)))
    x = torch.randn(5, 4, 9)
    network(x)
    network, x = network.double(), x.double()
    assert_agrees(fisher(network, [x], "exact"), truth(network, x, "exact", "filter"))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_padding_modes(mode: str, padding, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (3, 2), padding=padding, padding_mode=mode, dilation=(1, 2))
    network = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    network.to(memory_format=memory_format)
    x = images(3, (7, 8)).to(memory_format=memory_format)
    assert_agrees(fisher(network, [x], "exact"), truth(network, x, "exact", "filter"))


class Elementwise(nn.Module):
    """A parameter that activations are multiplied with, or that is added to them, before a mixing layer."""

    def __init__(self, shape: tuple[int, ...], how: str, left: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(shape))
        self.how, self.left = how, left
        self.mix = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 3, 4]
        p = self.parameter
        if self.how == "scale":
            x = p * x if self.left else x * p
        elif self.how == "shift":
            x = p + x if self.left else x + p
        else:  # a class token
            x = torch.cat([p.expand(len(x), -1, -1, -1), x[:, 1:]], 1)
        return self.mix(x.tanh().flatten(1))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("how", ["scale", "shift"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 1, 1), (2, 3, 1), (1, 1, 4), (1, 2, 3, 4), (1, 1, 3, 1), (1,), ()])
def test_elementwise_parameters(shape: tuple[int, ...], how: str, left: bool) -> None:
    network = Elementwise(shape, how, left).double()
    x = torch.randn(4, 2, 3, 4, dtype=torch.float64, generator=generator())
    for granularity in ("filter", "parameter", "tensor"):
        assert_agrees(fisher(network, [x], "exact", granularity=granularity), truth(network, x, "exact", granularity))


def test_class_tokens() -> None:
    network = Elementwise((1, 1, 3, 4), "expand").double()
    x = torch.randn(4, 2, 3, 4, dtype=torch.float64, generator=generator())
    for granularity in ("filter", "parameter"):
        assert_agrees(fisher(network, [x], "exact", granularity=granularity), truth(network, x, "exact", granularity))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("token_major", [False, True])
def test_layer_norm(axes: int, token_major: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.LayerNorm((3, 4)[2 - axes :])
            self.mix = nn.Linear(24, 3)
            with torch.no_grad():
                for p in self.norm.parameters():
                    p.copy_(torch.randn_like(p))

        def forward(self, x: Tensor) -> Tensor:  # [N, 2, 3, 4]
            y = self.norm(x.transpose(0, 1)).transpose(0, 1) if token_major else self.norm(x)
            return self.mix(y.tanh().flatten(1))

    network = Normed().double()
    x = torch.randn(4, 2, 3, 4, dtype=torch.float64, generator=generator())
    for granularity in ("filter", "parameter", "tensor"):
        assert_agrees(fisher(network, [x], "exact", granularity=granularity), truth(network, x, "exact", granularity))


def test_transformers_and_convnexts_agree_with_per_example_autograd() -> None:
    models = pytest.importorskip("torchvision", reason="this torch has no torchvision built for it").models
    torch.manual_seed(0)
    block = models.convnext.CNBlockConfig
    networks = {
        "vit": (models.VisionTransformer(24, 8, 2, 2, 12, 20, num_classes=4), (24, 24)),
        "convnext": (models.ConvNeXt([block(8, 12, 2), block(12, None, 1)], num_classes=4, layer_scale=0.5), (33, 26)),
    }
    for name, (network, size) in networks.items():
        network = network.eval().double()
        with torch.no_grad():
            for p in network.parameters():  # a fresh ViT has a head of zeros, whose gradients vanish
                p.add_(0.1 * torch.randn_like(p))
        x = images(3, size)
        for granularity in ("filter", "parameter"):
            got = fisher(network, [x[:2], x[2:]], "exact", granularity=granularity)
            assert_agrees(got, truth(network, x, "exact", granularity))
            assert not got.unused, name


@pytest.mark.parametrize("run", [fisher, t2v_fast.gradient_norms])
def test_what_yields_examples_in_place_of_batches_is_refused(run: Callable) -> None:
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model, data = nn.Linear(4, 3), TensorDataset(x, y)
    with pytest.raises(TypeError, match=r"the loader is a Tensor, expected batches: pass \[x\] if it is one batch"):
        run(model, x)
    with pytest.raises(TypeError, match=r"the loader is a TensorDataset, .* pass DataLoader\(data, batch_size="):
        run(model, data)
    assert len(run(model, DataLoader(data, batch_size=4))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="the device is 'cuda', and this torch sees no CUDA device"):
        fisher(nn.Linear(4, 3), [torch.randn(2, 4)], device="cuda")


class Middle(nn.Module):
    """Layers of which one mixes the examples."""

    def __init__(self, mix: Callable[[Tensor], Tensor], at: int) -> None:
        super().__init__()
        self.layers, self.mix, self.at = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), mix, at

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(x).relu()
            x = self.mix(x) if k == self.at else x
        return x


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: (x @ x.T).softmax(1) @ x,
        lambda x: x - x.mean(0),
        lambda x: x.softmax(0),
        lambda x: x.sort(0).values,
        lambda x: nn.functional.batch_norm(x, None, None, training=True),
    ],
    ids=["attention", "mean", "softmax", "sort", "batch norm"],
)
@pytest.mark.parametrize("unsupported", ["error", "exact"])
def test_the_layer_that_mixes_examples_is_found(mix: Callable[[Tensor], Tensor], at: int, unsupported: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"towards the input is 'layers\.{at}\.bias'"):
        fisher(Middle(mix, at), [torch.randn(5, 4)], unsupported=unsupported)


def test_interacting_examples_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            return z - z.mean(0)

    with pytest.raises(UnsupportedError, match=r"'linear\.\w+'.*examples interact"):
        fisher(Centred(), [torch.randn(4, 4)])

    class TokensCentred(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            z = self.mix(x)
            return self.out((z - z.mean(0)).square().mean(1))

    with pytest.raises(UnsupportedError, match=r"'mix\.\w+'.*examples interact"):
        fisher(TokensCentred("example"), [torch.randn(4, 3, 6)])


def test_the_self_check_catches_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = small_network(), images()

    def broken(use, g, layout, n):
        factors = RULES_BEFORE.factors(use, g, layout, n)
        return Outer(factors.x * 1.01, factors.g) if isinstance(factors, Outer) else factors

    RULES_BEFORE = RULES["AddmmBackward0"]
    monkeypatch.setitem(RULES, "AddmmBackward0", replace(RULES_BEFORE, factors=broken))
    for granularity in ("filter", "parameter", "tensor"):
        with pytest.raises(SelfCheckError, match=r"self-check failed for '7\.weight'"):
            fisher(network, [x], granularity=granularity)
        fisher(network, [x], granularity=granularity, self_check=False)


def test_two_classes_with_an_image_at_the_boundary_pass_the_self_check() -> None:
    """The tolerance follows the spread of all logits, not the smallest margin of one example."""
    torch.manual_seed(0)
    noise = iter(torch.randn(1000, 16, 1) * 3e-5)

    class Rounds(nn.Linear):  # as a network whose rounding depends on the size of the batch
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + next(noise)[: len(x)] * torch.tensor([1.0, -1.0])

    model = Rounds(1, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = 1 + torch.rand(16, 1)
    x[3] = 1e-4
    fisher(model, [x])


def test_a_dropout_left_on_is_caught() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    with pytest.raises(SelfCheckError, match="random"):
        fisher(network, [torch.randn(3, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_close(dtype: torch.dtype) -> None:
    network, x = small_network(), images()
    want = fisher(network, [x], "exact").vector()
    got = fisher(network.to(dtype), [x.to(dtype)], "exact").vector()
    assert got.dtype == torch.float64
    assert float(F.cosine_similarity(got, want, dim=0)) > (1 - 1e-6 if dtype == torch.float32 else 0.99)


def test_an_unused_parameter_is_zero_and_said_so() -> None:
    network = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    got = fisher(network, [torch.randn(3, 4)], forward=lambda m, x: m["used"](x))
    assert got.unused == {"unused.weight", "unused.bias"}
    assert not got["unused.weight"].any()
    assert got["used.weight"].all()


def test_inputs_of_every_kind() -> None:
    network, x, y = small_network(), images(4), torch.zeros(4, dtype=torch.long)
    want = fisher(network, [x]).vector()
    for batches in ([(x, y)], [[x, y, "names"]], [(x,)], [{"input": x}], [x, x[:0]]):
        assert torch.equal(fisher(network, batches).vector(), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "best"}, "unknown estimator 'best': expected one of exact, .*, empirical, batch_mean"),
        ({"granularity": "layer"}, "unknown granularity 'layer'"),
        ({"parameters": ["8.weight"]}, "no floating-point parameter '8.weight'"),
        ({"parameters": lambda name, p: False}, "no parameter is left"),
        ({"weights": torch.ones(4)}, "4 entries but the loader yields more"),
        ({"weights": torch.ones(6)}, "6 entries but the loader gave 5"),
        ({"weights": torch.zeros(5)}, "weights of all examples are zero"),
        ({"weights": -torch.ones(5)}, "at least 0"),
        ({"estimator": "empirical"}, "needs the labels"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher(small_network(), [images()], **options)


def test_bad_data() -> None:
    network, x = small_network(), images()
    with pytest.raises(ValueError, match="no example"):
        fisher(network, [])
    x[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="batch 1, example 1: the input has NaN or infinite"):
        fisher(network, x.split(2))
    with pytest.raises(TypeError, match="holds no tensor"):
        fisher(network, ["a batch"])
    with pytest.raises(TypeError, match="returned tuple"):
        fisher(network, [images()], forward=lambda m, x: (m(x),))
    with pytest.raises(ValueError, match=r"expected \[5, C\]"):
        fisher(network, [images()], forward=lambda m, x: m(x)[:3])


def test_recorder_errors() -> None:
    network, x = small_network(), images()
    recorder = FisherRecorder(network)
    with pytest.raises(RuntimeError, match="outside its context"):
        recorder.backward(network(x), torch.ones(5, 5))
    with recorder:
        logits = network(x)
        with pytest.raises(ValueError, match="cotangents are"):
            recorder.backward(logits, torch.ones(4, 5))
        with pytest.raises(ValueError, match="weights"):
            recorder.backward(logits, torch.ones_like(logits), weights=torch.ones(5))
        with torch.no_grad():
            logits = network(x)
        with pytest.raises(ValueError, match="no autograd graph"):
            recorder.backward(logits, torch.ones_like(logits))


def test_explain_prints_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    x = images(4).float()
    fisher(small_network().float(), [x[:2], x[2:]], explain=True)
    printed = capsys.readouterr().out
    if t2v_fast.ops.backend_status()["cpu"] == "available":
        assert printed.count("0.weight") == 1  # the first batch alone
        assert "predicted ms" in printed


def test_explain_shows_stacks_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """No time is predicted for them, and norms and biases are left out."""
    network = Mixture("loop")
    fisher(network, [tokens(3, 4)], explain=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"up", "down"} <= {name for row in rows if "segments" in row for name in row}
    fisher(small_network().float(), [images(2).float()], explain=True)
    assert "bias" not in capsys.readouterr().out


class Viewing(nn.Module):
    """Works only on contiguous images, as it says by the memory format that it saw."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.conv, self.linear, self.view, self.seen = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9 * 7, 3), view, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        z = self.conv(x).tanh()
        return self.linear(z.view(len(x), -1) if self.view else z.flatten(1))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_go_channels_last_where_they_can(view: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    network = Viewing(view).double()
    weight = network.conv.weight
    own, before = weight.data_ptr(), weight.stride()
    want = truth(network, images(4), "exact", "filter")
    network.seen.clear()
    x = images(4)
    got = fisher(network, [x[:2], x[2:]], "exact", channels_last=channels_last, self_check=False)
    assert_agrees(got, want)
    assert network.seen == ([False, False] if not channels_last else [True, False, False] if view else [True, True])
    assert (network.conv.weight is weight, weight.data_ptr(), weight.stride()) == (True, own, before)


def test_an_error_of_the_network_stays_its_own() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fisher(Broken(), [images(2).float()])


class Language(nn.Module):
    """Each token sees those before it; logits [N, T, V], embedding and head tied."""

    def __init__(self, words: int = 5, width: int = 6) -> None:
        super().__init__()
        self.token = nn.Embedding(words, width)
        self.mix = nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return F.linear(self.mix(self.token(input_ids).cumsum(1)).tanh(), self.token.weight)


@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
def test_language_models_with_padding(granularity: str) -> None:
    """Every token's Fisher by plain autograd, token by token; padding contributes nothing, whatever it is."""
    torch.manual_seed(0)
    network = Language().double()
    tokens = torch.randint(0, 5, (4, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    lengths = mask.sum(1)
    want = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for n, length in enumerate(lengths[:3]):
        for t in range(length):
            one = LastToken(network)
            prefix = tokens[n : n + 1, : t + 1]
            with torch.no_grad():
                u = cotangents(one(prefix), "exact")
            for name, s in per_example_squares(one, prefix, u).items():
                want[name.removeprefix("network.")] += s[0]
    batches = [
        {"input_ids": tokens[:3], "attention_mask": mask[:3]},
        {"input_ids": tokens[3:], "attention_mask": mask[3:]},
    ]
    options = {"estimator": "exact", "granularity": granularity}
    by_token = fisher(network, batches, **options)
    assert_agrees(by_token, {name: reduce(s[None] / 9, granularity)[0] for name, s in want.items()})
    by_sequence = fisher(network, batches[:1], level="sequence", **options)
    assert_agrees(by_sequence, {name: reduce(s[None] / 3, granularity)[0] for name, s in want.items()})
    other = tokens.where(mask.bool(), (tokens + 1) % 5)
    labels = torch.where(mask.bool(), tokens, -100)  # the other way to say what is padding
    again = fisher(network, [{"input_ids": other, "labels": labels}], **options)
    assert_agrees(again, dict(by_token), 1e-12)


class LastToken(nn.Module):
    """The logits of the last token alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(tokens)[:, -1]


@pytest.mark.slow
def test_sampled_tokens_converge_to_the_exact_fisher() -> None:
    torch.manual_seed(0)
    network, tokens = Language().double(), torch.randint(0, 5, (3, 4))
    exact = fisher(network, [tokens], "exact")
    for estimator in ("deflated", "hutchinson", "monte_carlo"):
        many = fisher(network, [tokens] * 400, estimator, seed=1)
        assert ((many.vector() - exact.vector()).abs() <= 4.5 * many.standard_error_vector()).all()
        assert relative_error(many.vector(), exact.vector()) < 0.05
    squared_mean = fisher(network, [tokens], "batch_mean", seed=2)
    assert squared_mean.vector().isfinite().all()


def test_the_former_name_of_the_entries_warns() -> None:
    found = fisher(small_network(), [images()])
    with pytest.warns(DeprecationWarning, match=r"values_ is now FisherDiagonal\.entries"):
        assert found.values_ is found.entries
