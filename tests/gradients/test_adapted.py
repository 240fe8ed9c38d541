"""Adapters on a frozen network, quantised or not: they are exact, and nothing below the lowest of them is visited."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from oracle import per_example_squares, relative_error
from torch import Tensor, nn
from torch.autograd.graph import Node

from t2v_fast import FisherRecorder, UnsupportedError, fisher
from t2v_fast.gradients.ownership import nodes_of
from t2v_fast.gradients.parameters import select_parameters
from t2v_fast.gradients.quantised import unpack

WIDTH, TOKENS, CLASSES = 8, 6, 4


class Dequantised(torch.autograd.Function):
    """x W^T for a weight of 8-bit integers and a scale for each row, as quantised layers compute it."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return x @ (packed.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        packed, scale = ctx.saved_tensors
        return g @ (packed.to(g.dtype) * scale), None, None


class MatMul4Bit(Dequantised):
    """The same under the name of a function of bitsandbytes, which has a transfer."""


class Quantised(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH).double()
        self.function = function
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.packed = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.packed, self.scale)

    def weight(self) -> Tensor:
        return self.packed.double() * self.scale


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.requires_grad_(False)


class Lora(nn.Module):
    """W x + s B A x, and with DoRA's magnitudes m (W x + s B A x) / |W + s B A|, whose norm is detached."""

    def __init__(self, base: nn.Module, dora: bool = False) -> None:
        super().__init__()
        self.base, self.scaling = base, 0.7
        self.A, self.B = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.magnitude = nn.Parameter(torch.rand(WIDTH) + 0.5) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.scaling * self.B(self.A(x))
        if self.magnitude is None:
            return y
        weight = self.base.weight() if isinstance(self.base, Quantised) else self.base.weight
        whole = weight + self.scaling * self.B.weight @ self.A.weight
        return y * (self.magnitude / whole.norm(dim=1).detach())


class Scaled(nn.Module):
    """IA3's scales of a layer's output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale


class Vera(nn.Module):
    """W x + b * (B (d * (A x))) with frozen A and B that all layers share."""

    A, B = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5)).double()

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.d, self.b = base, nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b * ((self.d * (x @ self.A.T)) @ self.B)


ADAPTERS = {
    "LoRA": Lora,
    "DoRA": lambda base: Lora(base, dora=True),
    "two LoRAs": lambda base: Lora(Lora(base)),
    "IA3": Scaled,
    "VeRA": Vera,
}
BASES = {
    "linear": Frozen,
    "a function": lambda: Quantised(Dequantised),
    "a known function": lambda: Quantised(MatMul4Bit),
}


class Network(nn.Module):
    """Frozen layers with residual connections over the tokens of a frozen table; adapters in some of them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.table.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(h.mean(1))


def network(adapter: str = "LoRA", base: str = "linear", adapted: tuple[int, ...] = (1, 2)) -> Network:
    torch.manual_seed(0)
    layers = [ADAPTERS[adapter](BASES[base]()) if k in adapted else BASES[base]() for k in range(3)]
    return Network(layers).double().eval()


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 20, (n, TOKENS), generator=g) for n in (2, 5, 1)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_exact(adapter: str, base: str) -> None:
    model = network(adapter, base)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with FisherRecorder(model, "trainable", "tensor") as recorder:
        assert list(recorder.parameters) == names
        for x in batches():
            u = torch.randn(2, len(x), CLASSES).double()
            found = recorder.backward(model(x), u)
            want = per_example_squares(model, x, u)
            assert list(found) == names
            for name in names:
                assert relative_error(found[name], want[name].flatten(1).mean(1)) < 1e-10, name
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    F = fisher(model, batches(), "exact", granularity="parameter", parameters="trainable")
    x = torch.cat(batches())
    p = model(x).detach().softmax(1)
    want = per_example_squares(model, x, p.sqrt().T[:, :, None] * (torch.eye(CLASSES).double()[:, None] - p))
    assert all(relative_error(F[name], want[name].mean(0)) < 1e-10 for name in names)


def test_known_functions_are_not_called_to_find_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backward = Dequantised.backward
    counted = staticmethod(lambda ctx, g: calls.append(len(g)) or backward(ctx, g))
    for function in (Dequantised, MatMul4Bit):
        monkeypatch.setattr(function, "backward", counted)
    (_, x, _) = batches()
    for base, expected in (("a known function", 1), ("a function", 7)):  # 5 examples have 3 binary digits
        model = network("LoRA", base, adapted=(1, 2))
        calls.clear()
        with FisherRecorder(model, "trainable") as recorder:
            recorder.backward(model(x), torch.randn(len(x), CLASSES).double())
        assert len(calls) == expected  # the layer between the adapters


def run_nodes(output: Tensor, backward) -> set[Node]:
    """The nodes of an output's graph that a call of ``backward`` runs."""
    ran: set[Node] = set()
    nodes = nodes_of(output)
    handles = [node.register_hook(lambda *_, node=node: ran.add(node)) for node in nodes]
    backward()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("base", ["linear", "a known function"])
def test_nothing_below_the_lowest_adapter_is_visited(base: str) -> None:
    """The graph of the output ends at the lowest adapter, and the pass runs fewer nodes than a training step."""
    (_, x, _) = batches()
    sizes, passed = {}, {}
    for lowest in (0, 2):
        model = network("LoRA", base, adapted=tuple(range(lowest, 3)))
        with FisherRecorder(model, "trainable") as recorder:
            output = model(x)
            sizes[lowest] = len(nodes_of(output))
            ran = run_nodes(output, lambda r=recorder, o=output: r.backward(o, torch.randn_like(o), retain_graph=True))
            step = run_nodes(output, lambda o=output: o.sum().backward())
        assert ran < step
        assert not any("AccumulateGrad" in node.name() for node in ran)  # no gradient of a weight is formed
        passed[lowest] = sum(node.name() in ("AddmmBackward0", "MatMul4BitBackward") for node in ran)
    # Of the frozen layers, those above the lowest adapter pass cotangents on. The head is one of four.
    frozen = {"linear": (3, 1), "a known function": (3, 1)}[base]
    assert (passed[0], passed[2]) == frozen
    assert sizes[2] < sizes[0] / 2


def test_inputs_that_require_gradients_do_not_lengthen_the_pass() -> None:
    """PEFT lets the embeddings of a checkpointed network require gradients. The pass still ends at the adapter."""
    (_, x, _) = batches()
    model = network(adapted=(2,))
    u = torch.randn(len(x), CLASSES).double()
    with FisherRecorder(model, "trainable") as recorder:
        want = recorder.backward(model(x), u)
    model.table.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    with FisherRecorder(model, "trainable") as recorder:
        output = model(x)
        found = {}
        ran = run_nodes(output, lambda: found.update(recorder.backward(output, u, retain_graph=True)))
    assert all(torch.equal(found[name], q) for name, q in want.items())
    assert sum(node.name() == "TanhBackward0" for node in nodes_of(output)) == 3
    assert sum(node.name() == "TanhBackward0" for node in ran) == 1


def test_trainable_selects_what_requires_gradients() -> None:
    model = network("VeRA")
    names = ["layers.1.d", "layers.1.b", "layers.2.d", "layers.2.b"]
    assert list(select_parameters(model, "trainable")) == names
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter is trainable.*requires_grad=False"):
        FisherRecorder(model, "trainable")


class Packing(nn.Module):
    """A frozen layer that packs its weight as the 4-bit layers of bitsandbytes do on some CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = type("QuantState", (), {"packing_format_for_cpu": False})()
        self.support_avx512bf16_for_cpu = True

    def _save_to_state_dict(self, *arguments) -> None:
        self.weight.quant_state.packing_format_for_cpu = False
        super()._save_to_state_dict(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        if not self.training and self.support_avx512bf16_for_cpu and not x.requires_grad:
            state.packing_format_for_cpu = True
        return torch.ops.t2v_fast_tests.undifferentiable(x) if state.packing_format_for_cpu else 2 * x


LIBRARY = torch.library.Library("t2v_fast_tests", "FRAGMENT")
LIBRARY.define("undifferentiable(Tensor x) -> Tensor")
LIBRARY.impl("undifferentiable", lambda x: 2 * x.detach(), "CPU")


def packing_network() -> Network:
    torch.manual_seed(0)
    return Network([Lora(Frozen()), Packing(), Lora(Frozen())]).double().eval()


def test_packed_weights_do_not_take_gradients_away() -> None:
    model, (x, *_) = packing_network(), batches()
    u = torch.randn(1, len(x), CLASSES).double()
    want = per_example_squares(model, x, u)
    F = fisher(model, batches(), parameters="trainable")
    assert [layer.support_avx512bf16_for_cpu for layer in model.layers if isinstance(layer, Packing)] == [True]
    with torch.no_grad():
        model(x)
    assert model.layers[1].weight.quant_state.packing_format_for_cpu
    with FisherRecorder(model, "trainable", "tensor") as recorder:
        found = recorder.backward(model(x), u)
    for name, q in found.items():
        assert relative_error(q, want[name].flatten(1).mean(1)) < 1e-10, name
    again = fisher(model, batches(), parameters="trainable")  # its self-check runs forward passes without gradients
    assert all(torch.equal(again[name], F[name]) for name in F)
    assert unpack(model) == [model.layers[1]]


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_operators_without_a_derivative_are_refused() -> None:
    """Above a wanted parameter they leave a part of its gradient out. Below all of them they do nothing."""
    model, (x, *_) = packing_network(), batches()
    model.layers[1] = Lora(nn.Identity()).double()
    model.layers[1].base.forward = torch.ops.t2v_fast_tests.undifferentiable
    for parameters in ("trainable", ["layers.0.A.weight", "layers.2.A.weight"]):
        with pytest.raises(UnsupportedError, match=r"'layers.0.[AB].weight'.* operator without a derivative"):
            fisher(model, [x], parameters=parameters, unsupported="exact")
        with (
            FisherRecorder(model, parameters) as recorder,
            pytest.raises(UnsupportedError, match=r"layers.0.[AB].weight"),
        ):
            recorder.backward(model(x), torch.randn(len(x), CLASSES).double())
    above = [name for name in select_parameters(model, "trainable") if not name.startswith("layers.0")]
    u = torch.randn(1, len(x), CLASSES).double()
    want = per_example_squares(model, x, u)
    with FisherRecorder(model, above, "tensor") as recorder:
        found = recorder.backward(model(x), u)
    for name in above:
        assert relative_error(found[name], want[name].flatten(1).mean(1)) < 1e-10, name
