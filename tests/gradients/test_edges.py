"""Attempts to break the library: cases that once gave a wrong result, or an error that explained nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import Function
from oracle import per_example_squares, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher


def agrees(network: nn.Module, x: Tensor, unsupported: str = "error") -> None:
    """Check that the recorder equals per-example autograd for batches of several sizes."""
    network = network.double()
    with FisherRecorder(network, unsupported=unsupported) as recorder:
        for part in (x[:1], x, x[1:]):
            logits = recorder.model(part)
            u = torch.randn(1, *logits.shape, dtype=torch.float64)
            got = recorder.backward(logits, u)
            for name, squares in per_example_squares(network, part, u).items():
                assert relative_error(got[name], reduce(squares, "filter")) < 1e-11, name


class Scaled(torch.autograd.Function):
    """A linear layer with other arguments before, between and after its tensors."""

    @staticmethod
    def forward(ctx, scale, x, times, weight, name=None):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale * times
        return ctx.scale * x @ weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return None, ctx.scale * g @ weight.T, None, ctx.scale * x.T @ g, None


CASES: dict[str, Callable[[], nn.Module]] = {
    "function_with_other_arguments": lambda: Function(
        lambda s, x: s.out(Scaled.apply(2.0, s.stem(x), 3, s.w, "name").tanh()),
        stem=nn.Linear(6, 6), w=(6, 6), out=nn.Linear(6, 3),
    ),
    "transpose_of_an_axis_with_itself": lambda: Function(lambda s, x: (x @ s.w.transpose(0, 0)).tanh(), w=(6, 4)),
    "elementwise_transpose": lambda: Function(lambda s, x: (x.view(-1, 3, 2) * s.w.T).sum(2).tanh(), w=(2, 3)),
    "a_weight_and_its_view": lambda: Function(
        lambda s, x: F.linear(x, s.w).tanh() @ torch.ones(4, 3).to(x) + F.linear(x[:, :3], s.w.view(8, 3)).sin()[:, :3],
        w=(4, 6),
    ),
    "a_bias_masked_by_example": lambda: Function(
        lambda s, x: (s.l(x) + s.b.masked_fill(x[:, :4] > 0, 0)).tanh(), l=nn.Linear(6, 4), b=(4,)
    ),
    "two_wheres_around_a_pole": lambda: Function(
        lambda s, x: torch.where(x > 1, torch.where(x > 1, s.l(x).square() + 2, 1.0).acosh(), s.l(x)), l=nn.Linear(6, 6)
    ),
    "rows_that_nobody_looks_up": lambda: Function(
        lambda s, x: s.l(x) + s.w[torch.zeros(0, dtype=torch.long)].sum(0), l=nn.Linear(6, 4), w=(5, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    torch.manual_seed(0)
    agrees(CASES[name](), torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (4, 5))
    results = []
    for sparse in (False, True):
        torch.manual_seed(1)
        network = Function(
            lambda s, x: s.out(s.table(x).flatten(1)), table=layer(9, 4, sparse=sparse),
            out=nn.Linear(20 if layer is nn.Embedding else 4, 3),
        ).double()  # fmt: skip
        results.append(fisher(network, [tokens[:1], tokens, tokens[2:]], "exact", unsupported="exact").vector())
    assert relative_error(results[1], results[0]) < 1e-12


COMPLEX = {
    "filter": lambda s, h: torch.fft.irfft(torch.fft.rfft(h) * torch.view_as_complex(s.w), n=6),
    "real_scale": lambda s, h: torch.fft.irfft(torch.fft.rfft(h) * s.w[:, 0], n=6),
    "rotation": lambda s, h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 3, 2)) * torch.polar(s.w[1:, 0].abs(), s.w[1:, 1])
    ).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_refused_or_exact(name: str) -> None:
    torch.manual_seed(0)
    network = Function(lambda s, x: s.out(COMPLEX[name](s, s.stem(x)).tanh()),
                       stem=nn.Linear(6, 6), w=(4, 2), out=nn.Linear(6, 3)).double()  # fmt: skip
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"'w'.*complex numbers.*unsupported='exact'"):
        fisher(network, [x])
    agrees(network, x, "exact")


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_that_the_forward_pass_writes(channels_last: bool) -> None:
    """A layer masks its weight through ``data``, as PixelCNN does, so the weight's version does not change.

    The image is smaller than the kernel.
    """

    class Masked(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data *= (torch.arange(9).view(3, 3) < 5).to(self.weight)
            return super().forward(x)

    torch.manual_seed(0)
    network = nn.Sequential(Masked(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(4, 8, 2, 2)
    with torch.no_grad():
        network(x)
    want = fisher(network.double(), [x.double()], "exact", channels_last=False).vector()
    network = network.float()
    with torch.no_grad():
        network[0].weight.data.add_(torch.randn(8, 8, 3, 3) * (torch.arange(9).view(3, 3) >= 5))
    got = fisher(network, [x], "exact", channels_last=channels_last)
    assert relative_error(got.vector(), want) < 1e-5
    assert not network[0].weight.flatten(2)[..., 5:].any()


@pytest.mark.parametrize("disguise", ["plain", "offset", "masked_class"])
def test_a_coupling_is_seen_whatever_the_logits_lie_around(disguise: str) -> None:
    def forward(s, x):
        h = s.l(x)
        z = s.out((h - h.mean(0).detach()).tanh())
        if disguise == "offset":
            return z + 1000
        return z - 1e4 * torch.tensor([0.0, 0.0, 1.0]).to(z) if disguise == "masked_class" else z

    torch.manual_seed(0)
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(Function(forward, l=nn.Linear(6, 6), out=nn.Linear(6, 3)), [torch.randn(4, 6)])


def test_errors_say_what_to_do() -> None:
    network, x = nn.Linear(4, 3), torch.randn(3, 4)
    with FisherRecorder(network) as recorder, pytest.raises(RuntimeError, match="in use"):
        recorder.__enter__()
    assert all(p.requires_grad for p in network.parameters())
    with FisherRecorder(network) as recorder:
        with pytest.raises(UnsupportedError, match=r"none of the wanted parameters.*'bias'"):
            recorder.backward(nn.Linear(4, 3)(x), torch.ones(3, 3))
        with pytest.raises(ValueError, match=r"expected a tensor \[N, \.\.\.\]"):
            recorder.backward(network(x).sum(), torch.ones(()))
    with pytest.raises(ValueError, match="the string 'weight'"):
        FisherRecorder(network, parameters="weight")
    with pytest.raises(ValueError, match=r"filter_axis is 1\.0"):
        FisherRecorder(network, filter_axis={"weight": 1.0})
    with pytest.raises(UnsupportedError, match="without running statistics"):
        fisher(nn.Sequential(network, nn.BatchNorm1d(3, track_running_stats=False)).eval(), [x])
    with pytest.raises(ValueError, match=r"label for each token"):
        fisher(network, [(torch.randn(2, 5, 4), torch.zeros(2, dtype=torch.long))])
    network.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(UnsupportedError, match=r"'weight' has a hook"):
        fisher(network, [x])
