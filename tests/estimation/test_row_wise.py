"""The proof that a forward pass is row by row: what it accepts, what it must not accept, and that the table is true."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import per_example_squares
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_fast import SelfCheckError, UnsupportedError, fisher
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.label_sets import Heads, LabelSet, fisher_of_label_sets
from t2v_fast.estimation.one_forward import FeatureTap, one_forward
from t2v_fast.estimation.row_wise import ROW_WISE, Program, RowWise
from t2v_fast.estimation.self_check import SelfCheck
from t2v_fast.gradients.fast_layers import FastLayers

N = 5


def inputs(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1))


def program(network: nn.Module, x: Any, *args: Any) -> Program | None:
    with FastLayers(), RowWise(network, x) as watch:
        output = network(x, *args)
    return watch.program_of(output)


class Run(nn.Module):
    """Runs a function between two layers. The function gets the module and the activations."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.run = nn.Linear(4, 6), nn.Linear(6, 3), run
        self.register_buffer("level", torch.zeros(6))
        self.register_buffer("by_place", torch.linspace(0, 1, N))
        self.register_buffer("square", torch.eye(6))
        self.centring = CentringWeight(torch.eye(6), requires_grad=False)
        self.kept: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.first(x)))


@torch.jit.script
def scripted_mean(x: Tensor) -> Tensor:
    return x.mean(0)


@torch.jit.script
def scripted_level(x: Tensor) -> float:
    return float(x.mean())


@torch.jit.script
def scripted_in_place(x: Tensor) -> None:
    x.sub_(x.detach().mean(0))


@torch.jit.script
def scripted_writes(x: Tensor, into: Tensor) -> None:
    into.copy_(x.detach().mean(0))


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def in_another_thread(run: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def rounded(x: Tensor) -> float:
    """The same number for an example alone and in a batch, where the last digits may differ."""
    return round(float(x.detach()), 2)


def writes_in_a_thread(m: Any, x: Tensor) -> Tensor:
    def write() -> None:
        with torch.no_grad():
            x.sub_(x.mean(0))

    in_another_thread(write)
    return x


def without_torch_functions(run: Callable[[], Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return run()


@torch.jit.script
def scripted_last(x: Tensor) -> float:
    return float(x[-1].mean())


def centred_tanh(result: Tensor, func: Any) -> Tensor:
    """What a tanh gives, less the mean over the examples."""
    mixed = func in (Tensor.tanh, torch.ops.aten.tanh.default)
    return result - result.detach().mean(0) if mixed else result


class Centring(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return centred_tanh(func(*args, **(kwargs or {})), func)


class CentringOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return centred_tanh(func(*args, **(kwargs or {})), func)


class CentringWeight(nn.Parameter):
    """A weight that quantises its input by a scale of the batch would work in this way."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result - result.detach().mean(0) if func is F.linear else result


class CentringTensor(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return centred_tanh(func(*args, **(kwargs or {})), func)


class CentringNumber(float):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0]
        return x - x.detach().mean(0)


def within(mode: Any, x: Tensor) -> Tensor:
    with mode:
        return x.tanh()


def kept(m: Any, x: Tensor) -> Tensor:
    m.kept, before = x.detach(), m.kept
    return x if before is None else x + before.mean(0)


def flat(m: Any, x: Tensor) -> Tensor:
    """A linear layer along the axis of the examples: five examples of six features are six rows of five."""
    return F.linear(x.T, m.by_place[None].expand(N, N)).T if len(x) == N else x


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": lambda m, x: x - x.mean(0),
    "mean of all": lambda m, x: x - x.mean(),
    "detached": lambda m, x: x - x.detach().mean(0),
    "sum of all axes": lambda m, x: x * x.sum((0, 1)).sigmoid(),
    "softmax over examples": lambda m, x: x.softmax(0),
    "softmax over the first of two axes": lambda m, x: F.softmax(x, -2),
    "neighbour": lambda m, x: x + x.roll(1, 0),
    "reversed": lambda m, x: x + x.flip(0),
    "permuted": lambda m, x: x + x[torch.arange(len(x)).flip(0)],
    "attention": lambda m, x: x + (x @ x.T).softmax(1) @ x,
    "einsum": lambda m, x: x + torch.einsum("ni,mi->nm", x, x) @ x,
    "number": lambda m, x: x * float(x.detach().mean()),
    "item": lambda m, x: x * x.detach().abs().max().item(),
    "list": lambda m, x: x + max(x.detach()[:, 0].tolist()),
    "branch": lambda m, x: x + 1 if 0 < int((x[:, 0] > 0).sum()) < len(x) else x * 2,
    "numpy": lambda m, x: x - torch.from_numpy(np.asarray(x.detach()).mean(0)),
    "number of examples": lambda m, x: x * len(x),
    "shape": lambda m, x: x / x.shape[0],
    "size": lambda m, x: x / x.size(0),
    "one place": lambda m, x: torch.where((torch.arange(len(x)) == 3)[:, None], x + x.mean(0), x),
    "beyond a place": lambda m, x: torch.cat([x[:3], x[3:] - x[3:].mean(0)]) if len(x) > 3 else x,
    "one place written": lambda m, x: x.index_add(0, torch.tensor([3 % len(x)]), x[:1]),
    "concatenated over examples": lambda m, x: torch.cat([x[1:], x[:1]], 0),
    "flattened": lambda m, x: x.flatten().flip(0).view_as(x),
    "training mode": lambda m, x: F.batch_norm(x, None, None, training=True),
    "training mode, by place": lambda m, x: F.batch_norm(x, m.level.clone(), m.level + 1, None, None, True),
    "transposed": lambda m, x: x + x.T.softmax(1).T,
    "permuted axes": lambda m, x: x + torch.permute(F.layer_norm(torch.permute(x, (1, 0)), [len(x)]), (1, 0)),
    "norm over all axes": lambda m, x: F.layer_norm(x, list(x.shape)),
    "unbatched pooling": lambda m, x: x + F.avg_pool1d(x.T[None], 3, 1, 1)[0].T,
    "broadcast": lambda m, x: x + (x[:, None, :] + x).sum(0),
    "scripted": lambda m, x: x - scripted_mean(x).detach(),
    "scripted number": lambda m, x: x * scripted_level(x),
    "scripted, in place": lambda m, x: (scripted_in_place(x), x)[1],
    "scripted, into a buffer": lambda m, x: (scripted_writes(x, m.level), x - m.level)[1],
    "into a buffer": lambda m, x: (m.level.copy_(x.detach().mean(0)), x - m.level)[1],
    "into the data of a buffer": lambda m, x: (m.level.data.copy_(x.detach().mean(0)), x - m.level)[1],
    "custom function": lambda m, x: Function.apply(x),
    "another thread": lambda m, x: x - in_another_thread(lambda: x.detach().mean(0)),
    "number from another thread": lambda m, x: x * in_another_thread(lambda: rounded(x.mean())),
    "number of the first, from another thread": lambda m, x: x * in_another_thread(lambda: rounded(x[0].mean())),
    "number of the last, from another thread": lambda m, x: x * in_another_thread(lambda: rounded(x[-1].mean())),
    "scripted number of the last": lambda m, x: x * round(scripted_last(x), 2),
    "number of the last, without torch functions": lambda m, x: (
        x * without_torch_functions(lambda: rounded(x[-1].mean()))
    ),
    "scripted, into a buffer after its use": lambda m, x: (x + m.level, scripted_writes(x, m.level))[0],
    "a mode": lambda m, x: within(Centring(), x),
    "a mode of operators": lambda m, x: within(CentringOperators(), x),
    "another class": lambda m, x: (setattr(x, "__class__", CentringTensor), x.tanh())[1],
    "a number of its own class": lambda m, x: x * CentringNumber(2),
    "a weight of its own class": lambda m, x: F.linear(x, m.centring),
    "another thread, in place": writes_in_a_thread,
    "sorted": lambda m, x: x + x.sort(0).values,
    "counted": lambda m, x: x * x.detach().gt(0).cumsum(0).clamp(max=2),
    "kept from the last pass": kept,
    "along the examples": flat,
    "in place, by the mean": lambda m, x: x.sub_(x.detach().mean(0)),
    "assigned": lambda m, x: (x.__setitem__(0, x[-1]), x)[1],
    "vmap with a mean": lambda m, x: torch.vmap(lambda r: r - x.mean(0))(x),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_not_proved(name: str) -> None:
    """Whatever the watch sees of such a network, its pass has no program that equals that of an example alone."""
    network, x = Run(MIXING[name]), inputs(4)
    with torch.no_grad():
        whole = program(network, x)
        assert whole is None or whole != program(network, x[N // 2 : N // 2 + 1]) or whole != program(network, x)


@pytest.mark.parametrize("name", sorted(set(MIXING) - {"kept from the last pass", "custom function"}))
@pytest.mark.parametrize("batches", [1, 2])
def test_what_mixes_examples_is_refused(name: str, batches: int) -> None:
    """Also where all batches after the first one mix them, and where the network was verified before."""
    run, quiet = MIXING[name], [True]
    network = Run(lambda m, x: x if quiet[0] else run(m, x))
    with pytest.raises((SelfCheckError, UnsupportedError, RuntimeError)):  # noqa: PT012
        for k in range(batches + 1):
            quiet[0] = k < batches - 1
            fisher(network, [inputs(4)] * 2)
        pytest.fail("nothing was raised")


@pytest.mark.parametrize("which", ["", " of the first,", " of the last,"])
def test_two_examples_are_both_run_alone(which: str) -> None:
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(Run(MIXING[f"number{which} from another thread"]), [inputs(4)[:2]])


def test_the_pass_before_and_custom_functions_are_run_again() -> None:
    for name in ("kept from the last pass", "custom function"):
        with pytest.raises((SelfCheckError, UnsupportedError)):
            fisher(Run(MIXING[name]), [inputs(4)] * 2)


OWN_NUMBERS, OWN_GENERATOR = random.Random(0), torch.Generator()
HIDDEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "private random numbers": lambda m, x: x * OWN_NUMBERS.uniform(0.5, 1.5),
    "private random numbers of numpy": lambda m, x: x * float(np.random.default_rng().uniform(0.5, 1.5)),
    "a private generator": lambda m, x: x + torch.randn(6, generator=OWN_GENERATOR),
    "a counter": lambda m, x: (setattr(m, "calls", m.calls + 1), x * m.calls)[1],
    "a depth": lambda m, x: (setattr(m, "calls", m.calls + 1), x.tanh() if m.calls % 2 else x)[1],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_differs_from_pass_to_pass_has_other_programs(name: str) -> None:
    network, x = Run(HIDDEN[name]), inputs(4)
    first = program(network, x)
    assert first is None or first != program(network, x)
    with pytest.raises(SelfCheckError):
        fisher(network, [x])


def test_a_network_that_is_not_proved_is_checked_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interaction of single examples, at each place, in a network whose other calls are all in the table."""

    class Chosen(Run):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z if len(z) < N else torch.where((torch.arange(N) == self.calls)[:, None], z + 1, z)

    for place in range(N):
        network = Chosen(lambda m, x: x.tanh())
        network.calls = place
        with pytest.raises(SelfCheckError, match="examples interact"):
            fisher(network, [inputs(4)])


def test_it_ends_at_inputs_and_outputs_that_are_no_rows() -> None:
    network, x = nn.Linear(4, 4), inputs(4)
    assert program(network, x) is not None
    with RowWise(network, x) as watch:
        outputs = [network(x[0]), network(x).T, x.new_zeros(N, 3)]
    assert [watch.program_of(output) for output in outputs] == [None] * 3
    pair = Run(lambda m, x: x)
    for a, b in ((x, torch.tensor(1.0)), (x, inputs(4)[:2])):
        with RowWise(pair, (a, b)) as watch:
            output = pair(a)
        assert watch.program_of(output) is None
    with torch.inference_mode():
        assert program(network, torch.randn(N, 4)) is None
    inner = Run(lambda m, x: m.level)
    inner.run = lambda m, x: torch.inference_mode()(torch.relu)(x)
    with torch.no_grad():
        assert program(inner, x) is None


def test_it_does_not_write_to_what_is_not_its_own() -> None:
    """In place, only memory that was made in the pass is written to: inputs may overlap."""
    relu = Run(lambda m, x: x.relu_())
    assert program(relu, inputs(4)) is not None
    x = inputs(6)
    for network in (nn.ReLU(inplace=True), nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))):
        assert program(network, x.clone().view(N, 2, 3)) is None
    both = Run(lambda m, x: (x.relu_(), x + x)[1])
    assert program(both, inputs(4)) is not None
    view = Run(lambda m, x: (x.permute(0, 1).relu_(), x)[1])
    assert program(view, inputs(4)) is None


def test_what_other_code_may_change_is_not_proved() -> None:
    """Also where the code of this pass keeps rows apart: the next pass may not, and the gradient may not."""

    class SeenForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g - g.mean(0)

    def replaces_a_buffer(m: Any, x: Tensor) -> Tensor:
        m.level = x  # the rows of this pass are a constant of the next one
        return x.tanh()

    x, plain = inputs(4), Run(lambda m, x: x.tanh())
    assert program(plain, x) is not None
    assert program(Run(lambda m, x: SeenForward.apply(x)), x) is None
    assert program(Run(replaces_a_buffer), x) is None
    for mode in (Centring(), CentringOperators()):
        with mode:
            assert program(plain, x) is None
    weighted = Run(MIXING["a weight of its own class"])
    assert program(weighted, x) is None


def test_programs_tell_numbers_rows_and_constants_apart() -> None:
    runs: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: x * 1,
        lambda m, x: x * 1.0,
        lambda m, x: x * 2,
        lambda m, x: x + 1,
        lambda m, x: x * m.level,
        lambda m, x: x * m.last.weight[0] if m.kept else x * m.first.bias,
        lambda m, x: x * x,
        lambda m, x: x.tanh() * x,
        lambda m, x: x * x.tanh(),
        lambda m, x: F.leaky_relu(x, 0.1),
        lambda m, x: F.leaky_relu(x, 0.2),
        lambda m, x: torch.no_grad()(Tensor.tanh)(x),
        lambda m, x: x.tanh(),
        lambda m, x: F.linear(x, m.square).float(),
        lambda m, x: torch.autocast("cpu", torch.bfloat16)(F.linear)(x, m.square).float(),
    ]
    found = [program(Run(run), inputs(4)) for run in runs]
    assert None not in found
    assert len(set(found)) == len(runs)


# ---- the table


class Constants(nn.Module):
    """Weights of layers, as the parameters of a network."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in {
            "over_tokens": (2, 4, 3),
            "over_images": (2, 3, 3, 3),
            "over_volumes": (2, 2, 2, 2, 2),
            "matrix": (2, 6),
            "zeros": (3,),
            "channels": (3,),
            "features": (6,),
            "tokens": (1, 4, 6),
            "square": (N, N),
            "by_row": (N, 6),
            "wider": (1, N, 6),
            "table": (7, 4),
            "first_token": (1, 1, 6),
            "mask": (4, 4),
            "six": (6, 6),
            "of_all": (N, 4, 4),
        }.items():
            self.register_buffer(name, torch.rand(shape, generator=generator) + 0.5)


C = Constants()
IMAGE, HEADS, TOKENS, VECTOR = (3, 6, 6), (2, 4, 6), (4, 6), (6,)
Calls = list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]


def indices(x: Tensor) -> Tensor:
    return x.clamp(-1, 1).to(torch.int64) * 2 + 2  # 0, 2 or 4


CALLS: dict[Callable, Calls] = {
    F.conv1d: [(TOKENS, lambda x: F.conv1d(x, C.over_tokens, padding=1))],
    F.conv2d: [(IMAGE, lambda x: F.conv2d(x, C.over_images, None, 2, "valid"))],
    F.conv3d: [((2, 3, 4, 4), lambda x: F.conv3d(x, C.over_volumes))],
    F.linear: [(VECTOR, lambda x: F.linear(x, C.matrix)), (TOKENS, lambda x: F.linear(x, C.matrix))],
    F.batch_norm: [(IMAGE, lambda x: F.batch_norm(x, C.zeros, C.channels))],
    F.group_norm: [(IMAGE, lambda x: F.group_norm(x, 3, C.channels)), (VECTOR, lambda x: F.group_norm(x, 2))],
    F.layer_norm: [(TOKENS, lambda x: F.layer_norm(x, (4, 6))), (VECTOR, lambda x: F.layer_norm(x, (6,), C.features))],
    F.adaptive_avg_pool2d: [(IMAGE, lambda x: F.adaptive_avg_pool2d(x, 1))],
    F.avg_pool2d: [(IMAGE, lambda x: F.avg_pool2d(x, 2))],
    F.max_pool2d: [(IMAGE, lambda x: F.max_pool2d(x, 3, 2, 1))],
    F.dropout: [(VECTOR, lambda x: F.dropout(x, 0.5, False))],
    F.dropout2d: [(IMAGE, lambda x: F.dropout2d(x, 0.5, training=False))],
    F.embedding: [
        ((4,), lambda x: F.embedding(indices(x), C.table)),
        ((), lambda x: F.embedding(indices(x), C.table, 1)),
    ],
    F.scaled_dot_product_attention: [
        (TOKENS, lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos())),
        (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, C.mask, scale=0.5)),
        (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.transpose(1, 2)))),
        (HEADS, lambda x: F.scaled_dot_product_attention(x, x, x, C.mask)),
    ],
    F.rms_norm: [(TOKENS, lambda x: F.rms_norm(x, (6,), C.features))],
    F.normalize: [(TOKENS, lambda x: F.normalize(x, dim=-1)), (VECTOR, lambda x: F.normalize(x, 1.0))],
    F.glu: [(TOKENS, lambda x: F.glu(x)), (TOKENS, lambda x: F.glu(x, 1))],
    F.pad: [(TOKENS, lambda x: F.pad(x, (1, 0, 2, 1))), (TOKENS, lambda x: F.pad(x, [1, 1], "reflect"))],
    F.adaptive_avg_pool1d: [(TOKENS, lambda x: F.adaptive_avg_pool1d(x, 2))],
    F.adaptive_avg_pool3d: [((2, 3, 4, 4), lambda x: F.adaptive_avg_pool3d(x, 1))],
    Tensor.unflatten: [(TOKENS, lambda x: x.unflatten(-1, (2, 3))), (TOKENS, lambda x: x.unflatten(1, [2, -1]))],
    torch.stack: [(TOKENS, lambda x: torch.stack([x, x.sin()], 1)), (TOKENS, lambda x: torch.stack((x, x), -1))],
    Tensor.__getitem__: [
        *((TOKENS, lambda x, i=i: x[i]) for i in (np.s_[:, 0], np.s_[:, :, 1:3], np.s_[..., -1], np.s_[:, None, 1:])),
        *((TOKENS, lambda x, i=i: x[i]) for i in (np.s_[:], np.s_[...], np.s_[:, ..., 0], np.s_[..., None, ::2])),
    ],
    Tensor.expand: [
        (TOKENS, lambda x: C.first_token.expand(len(x), -1, -1) + x),
        (TOKENS, lambda x: C.features.expand([x.shape[0], 4, 6]) + x),
        ((1, 6), lambda x: x.expand(-1, 4, 6)),
        ((1, 6), lambda x: x.expand(len(x), 4, -1)),
    ],
    torch.cat: [(VECTOR, lambda x: torch.cat([x, x], 1)), (TOKENS, lambda x: torch.cat((x, x), -2))],
    torch.permute: [(TOKENS, lambda x: torch.permute(x, (0, 2, 1)))],
    Tensor.permute: [(TOKENS, lambda x: x.permute(0, 2, 1)), (TOKENS, lambda x: x.permute((0, 2, 1)))],
    torch.transpose: [(TOKENS, lambda x: torch.transpose(x, 1, 2))],
    Tensor.transpose: [(TOKENS, lambda x: x.transpose(-1, 1))],
    torch.clamp: [(TOKENS, lambda x: torch.clamp(x, -0.5, 0.5))],
    Tensor.clamp: [(TOKENS, lambda x: x.clamp(min=0.1))],
}
for _f in (torch.reshape, Tensor.reshape, Tensor.view):
    CALLS[_f] = [
        (TOKENS, lambda x, f=_f: f(x, (x.shape[0], -1))),
        (TOKENS, lambda x, f=_f: f(x, (-1, 2, 12))),
        ((), lambda x, f=_f: f(x, (x.size(0), 1))),
    ]
for _f in (torch.squeeze, Tensor.squeeze):
    CALLS[_f] = [((1, 6, 1), lambda x, f=_f: f(x, 1)), ((1, 6, 1), lambda x, f=_f: f(x, (-1, 1)))]
for _f in (torch.unsqueeze, Tensor.unsqueeze):
    CALLS[_f] = [(VECTOR, lambda x, f=_f: f(x, 1)), (VECTOR, lambda x, f=_f: f(x, dim=-1))]
for _f in (torch.flip, Tensor.flip):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x, (1,))), (TOKENS, lambda x, f=_f: f(x, [-1, 1]))]
for _f in (torch.roll, Tensor.roll):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x, 1, 1)), (TOKENS, lambda x, f=_f: f(x, (1, 2), dims=(2, 1)))]
for _f in (torch.unbind, Tensor.unbind):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: sum(f(x, 1))), (TOKENS, lambda x, f=_f: f(x, dim=-1)[2])]
for _f in (torch.chunk, Tensor.chunk, torch.split, Tensor.split):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x, 2, 1)[1]), (TOKENS, lambda x, f=_f: torch.cat(f(x, 4, dim=-1), 2))]
for _f in (torch.split, Tensor.split):
    CALLS[_f].append((TOKENS, lambda x, f=_f: f(x, [1, 5], -1)[1]))
for _f in (torch.matmul, Tensor.matmul):
    CALLS[_f] = [
        (TOKENS, lambda x, f=_f: f(x, x.transpose(1, 2))),
        (HEADS, lambda x, f=_f: f(x.transpose(-1, -2), x)),
        (VECTOR, lambda x, f=_f: f(x, C.six)),
        (TOKENS, lambda x, f=_f: f(C.mask, x)),
    ]
for _f in (torch.bmm, Tensor.bmm):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x, x.transpose(1, 2)))]
for _f in (torch.pow, Tensor.pow, Tensor.__pow__):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x, 2)), (TOKENS, lambda x, f=_f: f(x.square(), 0.5))]
for _f in (torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt, torch.log, Tensor.log):
    CALLS[_f] = [(TOKENS, lambda x, f=_f: f(x.square() + 1))]
CALLS[Tensor.to] = [(TOKENS, lambda x: x.to(torch.float64)), (TOKENS, lambda x: x.to("cpu", torch.float32))]
for _f in (torch.flatten, Tensor.flatten):
    CALLS[_f] = [(IMAGE, lambda x, f=_f: f(x, 1)), (IMAGE, lambda x, f=_f: f(x, -2))]
for _f in (F.softmax, F.log_softmax, torch.softmax, Tensor.softmax):
    CALLS[_f] = [(VECTOR, lambda x, f=_f: f(x, 1)), (TOKENS, lambda x, f=_f: f(x, dim=-1))]
for _f in (torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax):
    CALLS[_f] = [(IMAGE, lambda x, f=_f: f(x, (2, 3))), (IMAGE, lambda x, f=_f: f(x, dim=-1, keepdim=True))]


def calls_of(f: Callable) -> Calls:
    if f in CALLS:
        return CALLS[f]
    if f.__name__.strip("_") in ("add", "sub", "rsub", "mul", "div", "rdiv"):
        others = [lambda x: x, lambda x: 2.0, lambda x: C.features, lambda x: C.tokens]
        return [(TOKENS, lambda x, other=other: f(x.tanh(), other(x))) for other in others]
    return [(TOKENS, lambda x: f(x.tanh()))]


@pytest.mark.parametrize("function", ROW_WISE, ids=lambda f: getattr(f, "__qualname__", str(f)))
def test_the_functions_of_the_table_keep_rows_apart(function: Callable) -> None:
    """The call is accepted, and each row of its result is that of the row alone, whatever the others are."""
    for shape, call in calls_of(function):
        x = inputs(*shape)
        with RowWise(C, x) as watch:
            result = call(x)
        found = watch.program_of(result)
        assert found is not None
        assert function in [step[0] for step in found]
        alone = [call(x[n : n + 1].clone()) for n in range(N)]
        torch.testing.assert_close(result, torch.cat(alone), rtol=1e-4, atol=1e-5)


REFUSED: Calls = [
    ((6, 6), lambda x: F.conv2d(x.tanh(), torch.ones(2, N, 3, 3))),
    ((6, 6), lambda x: F.max_pool2d(x, 2)),
    ((N,), lambda x: F.linear(x, C.square) + F.linear(C.square, x)),
    ((), lambda x: F.linear(x, C.square)),
    (VECTOR, lambda x: F.linear(x, C.six, C.by_row)),
    (TOKENS, lambda x: F.linear(x, C.six, bias=C.by_row[:, None])),
    ((), lambda x: x.softmax(0)),
    (VECTOR, lambda x: x.softmax(-2)),
    (VECTOR, lambda x: torch.softmax(x, dim=0)),
    (VECTOR, lambda x: x + x.sum()),
    (VECTOR, lambda x: x + x.sum((0, 1))),
    (VECTOR, lambda x: x + x.sum(dim=[])),
    (VECTOR, lambda x: x + x.mean(dim=(1, 0), keepdim=True)),
    (VECTOR, lambda x: x + torch.sum(x, 0)),
    (VECTOR, lambda x: F.layer_norm(x, (N, 6))),
    (VECTOR, lambda x: torch.flatten(x)),
    (TOKENS, lambda x: x.flatten(0, 1)),
    (TOKENS, lambda x: x.flatten(start_dim=-3)),
    ((N,), lambda x: x.permute(1, 0)),
    ((N,), lambda x: torch.permute(x, [1, 0])),
    ((N,), lambda x: x.transpose(0, 1)),
    ((N,), lambda x: torch.transpose(x, -1, -2)),
    (VECTOR, lambda x: torch.cat([x, x])),
    (VECTOR, lambda x: torch.cat([x, x], dim=-2)),
    (VECTOR, lambda x: torch.cat([x, C.by_row], 1)),
    (VECTOR, lambda x: torch.cat([x, x], 1, out=torch.empty(N, 12))),
    (VECTOR, lambda x: x + C.by_row),
    (VECTOR, lambda x: C.by_row * x),
    (VECTOR, lambda x: (x + C.wider)[0]),
    ((N, 6), lambda x: x + x.mean(1)),
    ((N, N), lambda x: x * x.sum(2)),
    (VECTOR, lambda x: torch.add(x, x, out=torch.empty(N, 6))),
    (VECTOR, lambda x: C.by_row.clone().add_(x)),
    (IMAGE, lambda x: F.batch_norm(x, None, None, training=True)),
    (IMAGE, lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), None, None, True)),
    (IMAGE, lambda x: F.dropout(x)),
    (IMAGE, lambda x: F.dropout2d(x, 0.5, True)),
    (VECTOR, lambda x: x.clamp(max=x.mean(0))),
    (VECTOR, lambda x: x * x.stride(1)),
    ((4,), lambda x: F.embedding(indices(x), C.table, scale_grad_by_freq=True)),
    ((4,), lambda x: F.embedding(indices(x), C.table, None, None, 2.0, True)),
    ((4,), lambda x: F.embedding(indices(x), C.table.clone(), max_norm=1.0)),
    ((4,), lambda x: F.embedding(indices(x), x)),
    (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, C.of_all)),
    (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
    (VECTOR, lambda x: F.scaled_dot_product_attention(x, x, x)),
    (VECTOR, lambda x: F.normalize(x, dim=0)),
    (VECTOR, lambda x: F.normalize(x, 2.0, -2)),
    (VECTOR, lambda x: F.pad(x, (0, 0, 1, -1))),
    (IMAGE, lambda x: F.pad(x[..., :1], (1, -1, 0, 0), "circular")),
    (IMAGE, lambda x: F.pad(x[..., :1], (0, 0, -1, 1), mode="circular")),
    (VECTOR, lambda x: F.pad(x[:, None, None], (0, 0, 0, 0, 0, 0, 1, -1))),
    ((N,), lambda x: x.t().reshape(N, N)),
    ((N, N), lambda x: x.view(-1, N)[:N]),
    ((2,), lambda x: x.view(2, N).view(-1)),
    ((N, 2), lambda x: x.unflatten(0, (1, N))[0]),
    (VECTOR, lambda x: torch.stack([x, x])[0]),
    (VECTOR, lambda x: torch.stack([x, x], -3)[0]),
    (VECTOR, lambda x: torch.stack([x[0] * n for n in range(N)], 0)),
    (VECTOR, lambda x: x[[0] * N]),
    (VECTOR, lambda x: x[0].expand(N, 6)),
    (VECTOR, lambda x: x[-N:]),
    (VECTOR, lambda x: x[None][0]),
    (VECTOR, lambda x: x[torch.arange(N)]),
    ((), lambda x: x[..., [0] * N]),
    ((N,), lambda x: x[..., 0, :]),
    (VECTOR, lambda x: x[True][0]),
    (VECTOR, lambda x: x.expand(N, N, 6)),
    (VECTOR, lambda x: C.by_row.expand(N, 6) + x),
    (VECTOR, lambda x: C.wider.expand(N, N, 6)[0] + x),
    (TOKENS, lambda x: x.flip(1, 0)),
    (TOKENS, lambda x: x.flip((1, 0))),
    (TOKENS, lambda x: torch.flip(x, dims=[0])),
    (TOKENS, lambda x: x.roll(1)),
    (TOKENS, lambda x: x.roll(1, 0)),
    (TOKENS, lambda x: x.roll((1, 1), (1, 0))),
    (TOKENS, lambda x: x.roll((1, 1), dims=(1, -3))),
    (TOKENS, lambda x: x.squeeze()),
    ((N, 1), lambda x: x.unsqueeze(0)[0]),
    ((N, 1), lambda x: x.unsqueeze(-4)[0]),
    (TOKENS, lambda x: torch.stack(x.unbind())),
    (TOKENS, lambda x: torch.cat(x.chunk(2))),
    (TOKENS, lambda x: torch.cat(torch.split(x, 2, 0))),
    (TOKENS, lambda x: torch.cat(x.split([1, N - 1]))),
    ((N,), lambda x: x @ x),
    (VECTOR, lambda x: C.square @ x),
    ((N, N), lambda x: x @ C.square[0]),
    (TOKENS, lambda x: C.of_all @ x),
    (TOKENS, lambda x: torch.matmul(C.of_all, x)),
    (TOKENS, lambda x: torch.bmm(C.of_all, x)),
    (TOKENS, lambda x: torch.pow(x, x.mean(0))),
    (TOKENS, lambda x: x.to(x.mean(0))),
]


@pytest.mark.parametrize("k", range(len(REFUSED)))
def test_calls_that_mix_rows_are_refused(k: int) -> None:
    shape, call = REFUSED[k]
    x = inputs(*shape)
    with RowWise(C, x) as watch:
        result = call(x)
    assert watch.program_of(result) is None


@pytest.mark.parametrize(("shape", "keys"), [(TOKENS, 2), (HEADS, 1)])
def test_fewer_keys_than_values_are_refused(shape: tuple[int, ...], keys: int) -> None:
    """torch's kernel for CPUs reads past such keys, into those of the next example. torch 2.11 refuses some of them."""
    x = inputs(*shape)
    with RowWise(C, x) as watch:
        try:
            result = F.scaled_dot_product_attention(x, x[..., :keys, :], x)
        except RuntimeError as error:
            if "Expected size" not in str(error):
                raise
            return
    assert watch.program_of(result) is None


NUMBERED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * x.size(0),
    lambda x: x * x.size(-2),
    lambda x: x / x.shape[0],
    lambda x: x + len(x),
    lambda x: x * (x.numel() // 6),
    lambda x: x.tanh() if len(x) > 1 else x,
    lambda x: x.pow(len(x)),
    lambda x: F.leaky_relu(x, 1 / len(x)),
    lambda x: x.roll(len(x), 1),
    lambda x: x[:, : len(x)].sum(1, keepdim=True) * x,
    lambda x: x.unflatten(1, (-1, 3 if len(x) > 1 else 2)).flip(2).flatten(1),
    lambda x: x.view(len(x), -1, 3 if len(x) > 1 else 2).flip(2).flatten(1),
    lambda x: C.features.expand(len(x), 6) * x * torch.Size((len(x),)).numel(),
]


@pytest.mark.parametrize("k", range(len(NUMBERED)))
def test_the_number_of_examples_shows_in_the_program(k: int) -> None:
    """Code may read the number. Where the result depends on it, the program of an example alone is another one."""
    run, x = NUMBERED[k], inputs(6)
    programs = []
    for rows in (x, x[:1].clone(), x[:2].clone()):
        with RowWise(C, rows) as watch:
            result = run(rows)
        programs.append(watch.program_of(result))
    assert programs[0] != programs[1]
    assert None not in programs
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(Run(lambda m, z: run(z)), [inputs(4)])


def test_shapes_of_the_batch_are_no_obstacle() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        n, width = x.shape
        tokens = torch.cat([C.first_token.expand(n, -1, -1), x[:, None].expand(-1, 2, width)], 1)
        q, k, v = F.linear(tokens, C.six).view(n, 3, 2, 3).transpose(1, 2).sin(), tokens.view(n, 3, 2, -1), tokens
        q = q @ k.transpose(1, 2).transpose(-1, -2)
        return q.softmax(-1).mean((1, 2, 3))[:, None] * v[:, 0]

    network = Run(attention)
    network.constants = C
    found = [program(network, inputs(4)[:n].clone()) for n in (N, 1, 2)]
    assert found[0] is not None
    assert found == found[:1] * 3


# ---- what fisher() makes of it


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of examples of the self-check's own forward passes."""
    seen: list[int] = []
    real = SelfCheck._run

    def run(self: SelfCheck, inputs: Any, examples: list[int], watched: bool = False) -> Any:
        seen.append(len(examples))
        return real(self, inputs, examples, watched)

    monkeypatch.setattr(SelfCheck, "_run", run)
    return seen


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "efficientnet_b0", "densenet121"])
def test_usual_networks_are_proved(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="this torch has no torchvision built for it")
    network = getattr(models, name)(num_classes=3).eval()
    found = [program(network, images(n)) for n in (4, 1)]
    assert found[0] is not None
    assert found[0] == found[1]


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).eval().double()


def assert_right(network: nn.Module, x: Tensor) -> None:
    found = fisher(network, x.split(4), "exact", granularity="parameter")
    own = copy.deepcopy(network)
    with torch.no_grad():
        u = cotangents(own(x), "exact")
    for name, want in per_example_squares(own, x, u).items():
        torch.testing.assert_close(found[name], want.mean(0), rtol=1e-9, atol=1e-12)


def test_a_proved_network_has_few_further_passes(passes: list[int]) -> None:
    network, x = small(), images(36).double()
    fisher(network, x.split(4))
    assert passes == [1]  # in nine batches
    fisher(network, x.split(4))
    assert passes == [1]
    assert_right(network, x[:8])


def test_the_proof_holds_for_a_batch_and_not_for_the_next(passes: list[int]) -> None:
    """A later batch goes through other calls: the self-check falls back on the values."""
    network = small()
    network.add_module("branch", Branch())
    fine, odd = images(4).double(), 10 * images(4).double()
    fisher(network, [fine])
    assert passes == [1]
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(network, [fine, odd])


def without_graph(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(len(x) <= 3):
        y = x.sin()
    return x + y


CUT: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: x + (x.sin().detach() if len(x) > 3 else x.sin()),
    without_graph,
    lambda m, x: x * (len(x) <= 3) - x.detach() * (len(x) <= 3) + x.detach(),
]


@pytest.mark.parametrize("run", CUT, ids=["detached", "without a graph", "times zero"])
@pytest.mark.parametrize("sizes", [(5,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_of_examples_that_cuts_the_graph_is_refused(run: Any, sizes: tuple[int, ...], dtype: Any) -> None:
    """No logit shows it, and neither do two examples: the squares of the batch itself do."""
    with pytest.raises(SelfCheckError, match="The number of examples decides"):
        fisher(Run(run).to(dtype), [torch.randn(n, 4, dtype=dtype) for n in sizes])


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("later", [False, True])
def test_the_first_batch_of_each_size_is_checked(shown: bool, later: bool) -> None:
    """The last batch has as many examples as the activations have entries, and code guesses the axes from that."""
    network = Run(lambda m, x: x if len(x) != 6 else x - (x if shown else x.cumsum(1)).detach().mean(0))
    batches = [torch.randn(n, 4) for n in (5, 5, 6)]
    if later:
        fisher(network, batches[:2])
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(network, batches)


def test_another_size_of_a_proved_network_needs_no_further_pass(passes: list[int]) -> None:
    x = images(15).double()
    fisher(small(), x.split(4))
    fisher(small(), [x[:4], x[4:7], x[7:9], x[9:]])
    assert passes == [1, 1]


class Branch(nn.Module):
    """Mixes examples where the values are large. The look at the values is hidden in another thread."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.detach().mean(0) if in_another_thread(lambda: float(x.detach().square().mean())) > 2 else x * 1.0


def test_label_sets_and_embeddings_use_it(passes: list[int]) -> None:
    network, x = small(), images(8).double()
    sets = [LabelSet(nn.Linear(16, c).double(), torch.arange(8) % c) for c in (2, 3)]
    network[5] = Heads(sets)
    fisher_of_label_sets(network, x.split(4), sets)
    assert passes == [1, 2]
    network[5] = tap = FeatureTap(16).double()
    head = nn.Linear(16, 3).double()
    with one_forward(network, tap, budget=2**30) as run:
        list(run.features(x.split(4)))
        found = run.fisher(head, 8, lambda batches: [x[b] for b in batches], 4, "exact")
    assert passes == [1, 2] * 2
    network[5] = head
    wanted = fisher(network, x.split(4), "exact", parameters=list(found))
    torch.testing.assert_close(found.vector(), wanted.vector(), rtol=1e-6, atol=1e-12)
