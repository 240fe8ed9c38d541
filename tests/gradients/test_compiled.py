"""Networks that torch.compile has compiled: the numbers and names of the network itself, which stays compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import t2v_fast
from t2v_fast import FisherRecorder, UnsupportedError, fisher
from t2v_fast.estimation.variational import variational_fisher
from t2v_fast.gradients.network_state import signature_of
from t2v_fast.tasks.probe import Preprocessing, Probe

X = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(0))
PREPARED = Preprocessing(resize=12, crop=12)


class Layers(nn.Sequential):
    """Layers one after the other. torch 2.11 compiles nothing in place where all code is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return Layers(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


class Counting:
    """A backend that runs graphs as they are, and counts how often it compiles and runs one."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


def wrapped(backend: Any) -> nn.Module:
    return torch.compile(network(), backend=backend)


def in_place(backend: Any) -> nn.Module:
    model = network()
    model.compile(backend=backend)
    return model


def submodules(backend: Any) -> nn.Module:
    model = network()
    model[0] = torch.compile(model[0], backend=backend)
    model[0]._orig_mod[0] = torch.compile(model[0]._orig_mod[0], backend=backend)
    model[5].compile(backend=backend)
    return model


class Calls(nn.Module):
    """A network whose forward method calls a compiled function."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.layers = network()
        self.function = torch.compile(lambda x: self.layers[5](self.layers[4](x)), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers[:4](x))


WAYS = {"wrapped": wrapped, "in place": in_place, "submodules": submodules, "function": Calls}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_and_names_of_the_network(way: str) -> None:
    backend = Counting()
    model = WAYS[way](backend)
    truth = fisher(network(), X.split([2, 3, 2]), "exact")
    output = model(X)
    counts = backend.compiled, backend.ran
    assert min(counts) >= 1
    prefix = "layers." if way == "function" else ""
    for batches in (X.split([2, 3, 2]), X.split([2, 3, 2])):
        got = fisher(model, batches, "exact")
        assert list(got) == [f"{prefix}{name}" for name in truth]
        assert all(torch.equal(got[f"{prefix}{name}"], q) for name, q in truth.items())
    assert (backend.compiled, backend.ran) == counts
    assert torch.equal(model(X), output)  # compiled as before, without compiling anew
    assert backend.compiled == counts[0]
    assert backend.ran > counts[1]
    assert way == "function" or signature_of(model) is not None  # so that the self-check remembers the network
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("way", ["wrapped", "in place", "submodules"])
def test_own_loop(way: str) -> None:
    backend = Counting()
    u = torch.randn(2, 7, 3)
    with FisherRecorder(network(), granularity="parameter") as recorder:
        want = recorder.backward(recorder.model(X), u)
    model = WAYS[way](backend)
    with FisherRecorder(model, granularity="parameter") as recorder:
        got = recorder.backward(model(X), u)
    assert list(got) == list(want)
    assert all(torch.equal(got[name], q) for name, q in want.items())
    assert backend.compiled == 0


def test_names_may_be_given_either_way() -> None:
    model = submodules("aot_eager")
    names = [name for name, _ in model.named_parameters() if "_orig_mod._orig_mod" not in name]
    assert names[0] == "0._orig_mod.0._orig_mod.weight"
    for given in (names[:2], ["0.0.weight", "0.0.bias"], lambda name, p: name.startswith("0.0.")):
        assert list(fisher(model, [X], parameters=given)) == ["0.0.weight", "0.0.bias"]
    assert list(fisher(wrapped("aot_eager"), [X], parameters=["_orig_mod.3.weight"])) == ["3.weight"]
    with pytest.raises(ValueError, match=r"no floating-point parameter '0\.9\.weight'; it has 0\.0\.weight"):
        fisher(model, [X], parameters=["0._orig_mod.9.weight"])


def test_a_module_of_the_user_with_that_name() -> None:
    """Only the wrappers of torch.compile lose their part of a name."""
    model = nn.Module()
    model._orig_mod = nn.Linear(4, 3)
    model.forward = lambda x: model._orig_mod(x)
    assert list(fisher(model, [torch.randn(3, 4)])) == ["_orig_mod.weight", "_orig_mod.bias"]


def test_the_network_is_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="t2v_fast")
    model = network()
    for compiled in (torch.compile(model, backend="aot_eager"), torch.compile(model, backend="aot_eager")):
        for _ in range(2):
            fisher(compiled, [X])
    fisher(network(), [X])
    (line,) = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert line.startswith("Layers was compiled with torch.compile")


def test_nested_recorders_and_errors_restore_the_compiler() -> None:
    backend = Counting()
    model = wrapped(backend)
    with FisherRecorder(model):
        with pytest.raises(ValueError, match="expected a tensor"), FisherRecorder(model) as inner:
            inner.backward(model, X)
        model(X)
    assert backend.compiled == 0
    model(X)
    assert backend.compiled == 1


def test_threads_restore_the_compiler_in_any_order() -> None:
    backend = Counting()
    model = wrapped(backend)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with FisherRecorder(network()):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with FisherRecorder(model):
        thread.start()
        inside.wait(20)
    with FisherRecorder(model) as recorder:
        recorder.backward(model(X), torch.randn(7, 3))
        leave.set()
        thread.join()
        recorder.backward(model(X), torch.randn(7, 3))
    assert backend.compiled == 0
    model(X)
    assert backend.compiled == 1


def test_checkpointed_and_compiled() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.layers[0], x, use_reentrant=False)
            return self.layers[1:](x)

    got = fisher(torch.compile(Both(), backend="aot_eager"), X.split(4), "exact")
    want = fisher(network(), X.split(4), "exact")
    for name, q in want.items():
        torch.testing.assert_close(got[f"layers.{name}"], q)


def test_a_graph_of_a_compiled_function_is_refused_by_name() -> None:
    """Such as one that was made outside of the context."""
    model = wrapped("aot_eager")
    logits = model(X)
    with FisherRecorder(model) as recorder:
        with pytest.raises(UnsupportedError, match="CompiledFunctionBackward is in the way: a compiled function"):
            recorder.backward(logits, torch.ones_like(logits))
        assert recorder.backward(model(X), torch.ones_like(logits))


# ---- probes and tasks


def resnet_like() -> nn.Module:
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(
        stem, nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8)
    ).eval()


def compiled_parts() -> nn.Module:
    model = resnet_like()
    model[0] = torch.compile(model[0], backend="aot_eager")
    model[5] = torch.compile(model[5], backend="aot_eager")
    return model


def compiled_whole() -> nn.Module:
    return torch.compile(resnet_like(), backend="aot_eager")


def compiled_in_place() -> nn.Module:
    model = resnet_like()
    model.compile(backend="aot_eager")
    return model


IMAGES = [(torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(k)), k % 3) for k in range(12)]


@pytest.mark.parametrize("make", [compiled_parts, compiled_whole, compiled_in_place])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "exact"}, {"skip_layers": 1}, {"method": "variational"}], ids=str
)
def test_embeddings(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    own, other = (t2v_fast.Task2Vec(Probe(m, preprocessing=PREPARED), **options) for m in (resnet_like(), make()))
    want, got = own.embed(IMAGES), other.embed(IMAGES)
    assert got.layer_names == want.layer_names
    assert (got.hessian == want.hessian).all()
    assert got.fingerprint == want.fingerprint


def test_probes_are_the_same() -> None:
    probes = [Probe(make(), preprocessing=PREPARED) for make in (resnet_like, compiled_parts, compiled_whole)]
    assert len({probe.fingerprint() for probe in probes}) == 1
    assert {probe.head for probe in probes} == {"5"}


def test_variances() -> None:
    y = torch.arange(7) % 3
    found = [
        variational_fisher(model, lambda epoch: [(X, y)], generator=torch.Generator().manual_seed(0), parameters=names)
        for model, names in ((network(), ["0.0.weight"]), (submodules("aot_eager"), ["0._orig_mod.0._orig_mod.weight"]))
    ]
    assert all(torch.equal(q, found[1].log_variance[name]) for name, q in found[0].log_variance.items())
