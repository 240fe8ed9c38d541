"""What the self-check remembers of a network from call to call, and attempts to fool this memory.

A call over a network that was checked before runs one example of its first batch alone, or none if the pass is proved
to be row by row (test_row_wise.py), and nothing else of the first check. Each attempt below changes something between
two calls, and the second call must notice.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from oracle import per_example_squares, reduce
from torch import Tensor, nn

from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher
from t2v_fast.estimation.batches import forward_passes
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.estimation.label_sets import Heads, LabelSet, fisher_of_label_sets
from t2v_fast.estimation.plain_squares import PlainSquares
from t2v_fast.estimation.runs import spread
from t2v_fast.estimation.self_check import SelfCheck
from t2v_fast.gradients import network_state
from t2v_fast.gradients.factors import Outer
from t2v_fast.gradients.rules import RULES

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5)]
    return nn.Sequential(*layers).eval().double()


def unproved_network() -> nn.Module:
    """A network that looks at its values, so that only these can show whether examples interact."""
    return nn.Sequential(network(), Looks())


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.detach().isfinite().all()) else -x


class Centred(nn.Tanh):
    """Takes the mean over a batch away, in a way that the autograd graph does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0).detach())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of examples of the first batches that were checked in full."""
    seen: list[int] = []
    two, row = SelfCheck._compare_two, SelfCheck._compare_row

    def compare_two(self: SelfCheck, first: Any) -> None:
        seen.append(len(first.whole))
        two(self, first)

    def compare_row(self: SelfCheck, first: Any, *rest: Any) -> None:
        seen.append(len(first.whole))
        row(self, first, *rest)

    monkeypatch.setattr(SelfCheck, "_compare_two", compare_two)
    monkeypatch.setattr(SelfCheck, "_compare_row", compare_row)
    return seen


def assert_right(model: nn.Module, x: Tensor = X, **options: Any) -> None:
    got = fisher(model, x.split(3), "exact", **options)
    own = copy.deepcopy(model)
    with torch.no_grad():
        u = cotangents(own(x), "exact")
    squares = per_example_squares(own, x, u)
    for name, q in got.items():
        want = reduce(squares[name], options.get("granularity", "filter")).mean(0)
        torch.testing.assert_close(q, want, rtol=1e-9, atol=1e-12)


# ---- what is remembered


def test_a_network_is_checked_once(checks: list[int]) -> None:
    model = network()
    for _ in range(3):
        assert_right(model)
        fisher(model, [X[:3].clone()])  # other inputs of the same shape
    assert checks == [3]


def test_a_forward_function_may_be_made_anew(checks: list[int]) -> None:
    model = network()

    def scaled(by: float) -> Callable:
        return lambda m, x: m(x) * by

    for by in (1.0, 1.0, 2.0, 1.0):
        fisher(model, [X], forward=scaled(by))
    assert checks == [6, 6]


def test_a_head_of_the_same_shape_may_take_the_place_of_another(checks: list[int]) -> None:
    model = network()
    for classes in (5, 3, 5, 3):
        model[4] = nn.Linear(256, classes).double()
        assert_right(model)
    assert checks == [3, 3]


def test_label_sets_share_the_memory(checks: list[int]) -> None:
    model = network()
    for _ in range(2):
        sets = [LabelSet(nn.Linear(256, c).double(), torch.arange(6) % c) for c in (2, 3)]
        model[4] = Heads(sets)
        fisher_of_label_sets(model, X.split(3), sets)
    assert checks == [3]


def test_a_single_example_is_checked_once(monkeypatch: pytest.MonkeyPatch, checks: list[int]) -> None:
    model = network()
    for _ in range(2):
        fisher(model, X[:2].split(1))
    fisher(model, [X[:2]])
    assert checks == [1, 2]


def test_a_failed_check_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(network(), Centred(), nn.Linear(5, 4).double()).eval()
    for _ in range(3):
        with pytest.raises((SelfCheckError, UnsupportedError), match="examples interact"):
            fisher(model, [X])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_every_example_is_run_in_another_batch(n: int) -> None:
    """An interaction that changes one example only is found wherever the example is."""

    class Chosen(nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.linear, self.place = nn.Linear(4, 3), place

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            if len(z) < n:
                return z
            mask = torch.arange(len(z)) == self.place
            return torch.where(mask[:, None], z + 1, z)

    for place in range(n):
        with pytest.raises(SelfCheckError, match="examples interact"):
            fisher(Chosen(place), [torch.randn(n, 4)])


# ---- attempts to fool it: each changes a network so that its examples interact, or so that the result is another


def replaced(model: nn.Module) -> None:
    model[2] = Centred()


def hooked(model: nn.Module) -> None:
    model[2].register_forward_hook(lambda module, inputs, output: output - output.detach().mean(0))


def pre_hooked(model: nn.Module) -> None:
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] - inputs[0].detach().mean(0),))


def patched(model: nn.Module) -> None:
    own = model[2].forward
    model[2].forward = lambda x: own(x - x.detach().mean(0))


def bound(model: nn.Module) -> None:
    model[2].forward = MethodType(Centred.forward, Centred())


def other_class(model: nn.Module) -> None:
    model[2].__class__ = Centred


def appended(model: nn.Module) -> None:
    model.insert(3, Centred())


def axis_of_examples(model: nn.Module) -> None:
    model.insert(3, nn.Identity())
    model[3].forward = partial(torch.softmax, dim=0)


@pytest.mark.parametrize(
    "change",
    [replaced, hooked, pre_hooked, patched, bound, other_class, appended, axis_of_examples],
    ids=lambda f: f.__name__,
)
def test_a_change_that_mixes_examples_is_noticed(change: Callable[[nn.Module], None]) -> None:
    model = network()
    assert_right(model)
    change(model)
    with pytest.raises((SelfCheckError, UnsupportedError), match="examples interact"):
        fisher(model, X.split(3))


def test_changes_that_one_example_cannot_show_are_noticed(checks: list[int]) -> None:
    """The example that is run alone in later calls must not be needed to notice a change."""
    model = network()
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m.add_module("5", nn.Identity()),
        lambda m: (
            setattr(m[0], "padding", (1, 1)) or setattr(m[0], "stride", (2, 2)) or setattr(m[4], "weight", smaller)
        ),
        lambda m: setattr(m[1], "eps", 1e-3),
        lambda m: setattr(m[3], "options", {"mix": [1, 2]}),
        lambda m: m[3].options["mix"].append(3),
        lambda m: m.register_buffer("open", torch.tensor(True)),
        lambda m: m.open.fill_(False),
        lambda m: m[0].register_forward_hook(lambda module, inputs, output: None),
        lambda m: setattr(m[2], "forward", torch.tanh),
        lambda m: delattr(m[2], "forward"),
        lambda m: m[0].weight.requires_grad_(False) and None,
    ]
    smaller = nn.Parameter(torch.randn(5, 64, dtype=torch.float64) / 8)
    assert_right(model)
    for k, change in enumerate(changes[:-1], 2):
        change(model)
        assert_right(model)
        if k != 11:  # the last of these changes goes back to a network that was checked
            assert len(checks) == k, k


def test_class_attributes_and_methods_are_part_of_a_network(checks: list[int]) -> None:
    class Switch(nn.Module):
        mix = False

        def helper(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor) -> Tensor:
            x = self.helper(x)
            return x - x.detach().mean(0) if self.mix else x

    model = nn.Sequential(network(), Switch())
    assert_right(model)
    Switch.helper = lambda self, x: 2 * x
    assert_right(model)
    Switch.mix = True
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(model, X.split(3))
    assert checks == [3, 3, 3]


def test_each_change_of_a_class_changes_the_signature() -> None:
    """Also of a class that an attribute names before a module of it is met, and of code that a method shares."""
    captured = 1.0

    class Base(nn.Module):
        @property
        def fixed(self, by: float = 1.0) -> float:
            return by * captured

        def scale(self, x: Tensor, by: float = 1.0) -> Tensor:
            return by * x

        @staticmethod
        def shift(x: Tensor) -> Tensor:
            return x

    class Layer(Base):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return self.shift(self.scale(x))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind, self.layer = Layer, Layer()

    def capture() -> None:
        nonlocal captured
        captured = 2.0

    model = Named()
    before, fixed = Base.__dict__["scale"], Base.__dict__["fixed"]
    changes: list[Callable[[], object]] = [
        capture,
        lambda: setattr(fixed.fget, "__defaults__", (2.0,)),
        lambda: setattr(fixed.fget, "__code__", (lambda self, by=3.0: by + captured).__code__),
        lambda: setattr(Base, "fixed", property(lambda self: 5.0)),
        lambda: setattr(Layer, "forward", lambda self, x: x),
        lambda: setattr(Layer.forward, "__code__", (lambda self, x: 2 * x).__code__),
        lambda: setattr(Base, "shift", staticmethod(lambda x: x + 1)),
        lambda: setattr(Base.scale, "__defaults__", (2.0,)),
        lambda: setattr(Base.scale, "__kwdefaults__", {"by": 3.0}),
        lambda: Base.scale.__kwdefaults__.update(by=4.0),
        lambda: setattr(Base, "scale", lambda self, x: x),
        lambda: setattr(Base, "more", lambda self, x: x),
        lambda: delattr(Base, "more"),
    ]
    found = [network_state.signature_of(model)]
    assert found[0] is not None
    assert found[0] == network_state.signature_of(model)
    for k, change in enumerate(changes[:-1]):
        change()
        found.append(network_state.signature_of(model))
        assert found[-1] is not None, k
        assert found[-1] not in found[:-1], k
        assert found[-1] == network_state.signature_of(model), k
    changes[-1]()
    assert network_state.signature_of(model) != found[-1]
    Base.scale = before


def test_the_mode_belongs_to_the_network() -> None:
    model = network()
    assert_right(model)
    model.train()
    with pytest.raises(UnsupportedError, match="training mode"):
        fisher(model, X.split(3))
    model.eval()
    assert_right(model)


def test_weights_may_change_and_the_result_follows(checks: list[int]) -> None:
    model, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)

    def in_place(m: nn.Module) -> None:
        with torch.no_grad():
            m[0].weight.mul_(1.5)

    def through_data(m: nn.Module) -> None:
        m[0].weight.data.mul_(0.5)
        m[4].weight.data[0] += 1

    def assigned(m: nn.Module) -> None:
        m[0].weight.data = torch.randn_like(m[0].weight)

    def buffers(m: nn.Module) -> None:
        m[1].running_var.mul_(2)

    assert_right(model)
    for change in (in_place, through_data, assigned, buffers, lambda m: m.load_state_dict(other.state_dict())):
        before = fisher(model, [X[:3]], "exact").vector()
        change(model)
        assert_right(model)
        assert not torch.allclose(fisher(model, [X[:3]], "exact").vector(), before, rtol=1e-3)
    assert checks == [3]


def test_the_wanted_parameters_belong_to_the_check(checks: list[int]) -> None:
    model = network()
    assert_right(model)
    assert_right(model, parameters=["4.weight"])
    model[0].weight.requires_grad_(False)  # frozen parameters are wanted, too
    assert_right(model)
    assert model[0].weight.requires_grad is False
    assert_right(model, granularity="parameter")
    assert_right(model, unsupported="exact")
    assert checks == [3] * 4


def test_dtypes_shapes_and_batch_sizes_belong_to_the_check(checks: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    for _ in range(2):
        for x in (X.float(), X.float()[:4], X.float()[..., :6]):
            fisher(model.float(), [x])
        fisher(model.double(), [X])
        fisher(model.bfloat16(), [X.bfloat16()])
        with torch.autocast("cpu"):
            fisher(model.float(), [X.float()])
    assert len(checks) == 6


def test_a_batch_of_another_composition(checks: list[int]) -> None:
    """Owners come from the graph of each batch, whatever is remembered: tokens sorted by expert, and padding."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            flat = x[mask]  # [tokens, 4]
            chosen = (flat[:, 0] > 0).long()
            out = torch.zeros_like(flat)
            for k, expert in enumerate(self.experts):
                at = (chosen == k).nonzero()[:, 0]
                out = out.index_copy(0, at, expert(flat[at]))
            padded = torch.zeros_like(x).masked_scatter(mask[..., None], out)
            return self.head(padded.sum(1).tanh())

    model = Experts().double()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 7, 4, generator=generator, dtype=torch.float64)
        mask = torch.arange(7) < torch.randint(1, 8, (5, 1), generator=generator)
        got = fisher(model, [{"x": x, "mask": mask}], "exact")
        each = [fisher(copy.deepcopy(model), [{"x": x[n : n + 1], "mask": mask[n : n + 1]}], "exact") for n in range(5)]
        for name, q in got.items():
            torch.testing.assert_close(q, sum(e[name] for e in each) / 5, rtol=1e-9, atol=1e-12)
    assert checks.count(5) == 1


def test_a_broken_rule_is_found_after_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    assert_right(model)
    rule = RULES["AddmmBackward0"]

    def broken(*args: Any) -> Any:
        factors = rule.factors(*args)
        return Outer(factors.x * 1.01, factors.g) if isinstance(factors, Outer) else factors

    monkeypatch.setitem(RULES, "AddmmBackward0", replace(rule, factors=broken))
    with pytest.raises(SelfCheckError, match=r"self-check failed for '4\.weight'"):
        fisher(model, X.split(3))


class Later(nn.Module):
    """Mixes examples once it has been called often enough; what counts the calls is hidden or is not."""

    def __init__(self, calls: int, hidden: bool) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 3), calls
        left = iter(range(calls))
        self.count = 0
        self.left: Any = (lambda: next(left, None) is None) if hidden else self._counted

    def _counted(self) -> bool:
        self.count += 1
        return self.count > self.calls

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0) if self.left() else x)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("calls", [5, 9, 14, 30])
def test_an_interaction_that_begins_after_some_calls(calls: int, hidden: bool) -> None:
    torch.manual_seed(0)
    model = Later(calls, hidden)
    done = 0
    with pytest.raises(SelfCheckError, match="examples interact"):  # noqa: PT012
        for _ in range(calls + 1):
            fisher(model, [torch.randn(4, 4)])
            done += 1
    # A call needs two forward passes at least, so the interaction began at most half as many calls before.
    assert done <= calls


def test_later_calls_run_each_example_alone_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alone = unproved_network(), []
    real = SelfCheck._alone

    def noted(self: SelfCheck, inputs: Any, logits: Tensor, example: int) -> None:
        alone.append(example)
        real(self, inputs, logits, example)

    monkeypatch.setattr(SelfCheck, "_alone", noted)
    for _ in range(6):
        fisher(model, [X[:5]])
    assert sorted(alone) == list(range(5))


def test_random_numbers_are_noticed_in_every_call() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, noise = nn.Linear(4, 3), [0.0]
            self.noise: Callable[[], float] = lambda: noise[0]
            self.set: Callable[[float], None] = lambda value: noise.__setitem__(0, value)

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            return z + self.noise() * torch.randn_like(z) if self.noise() else z

    model = Noisy()
    fisher(model, [torch.randn(4, 4)])
    model.set(1e-9)
    with pytest.raises(SelfCheckError, match="random"):
        fisher(model, [torch.randn(4, 4)])


# ---- copies, threads, wrappers, memory


def test_copies_and_pickles_carry_nothing(checks: list[int]) -> None:
    model = network()
    before = set(vars(model))
    assert_right(model)
    assert set(vars(model)) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert network_state.state_of(other) is not network_state.state_of(model)
        assert_right(other)
    assert checks == [3, 3, 3]


def test_a_wrapper_is_another_network(checks: list[int]) -> None:
    model = network()
    assert_right(model)
    assert_right(nn.Sequential(model))
    for name, q in fisher(nn.DataParallel(model), X.split(3)).items():
        torch.testing.assert_close(q, fisher(model, X.split(3))[name])
    assert fisher(torch.compile(model, backend="aot_eager"), X.split(3))
    assert_right(model)
    assert checks[:2] == [3, 3]  # torch's own wrappers may share the verdict of the network in them


def test_the_memory_ends_with_the_network() -> None:
    def cyclic() -> nn.Module:
        model = network()
        model[2].parent = [model]  # as some networks do
        model[2].forward = lambda x, own=model: torch.tanh(x)
        model.register_forward_hook(lambda module, inputs, output, own=model: output)
        return model

    for make in (network, cyclic):
        model = make()
        fisher(model, [X], forward=lambda m, x, own=model: own(x))
        key, alive = id(model), weakref.ref(model)
        assert key in network_state._states
        del model
        gc.collect()
        assert alive() is None
        assert key not in network_state._states


def test_a_network_has_room_for_some_signatures(checks: list[int]) -> None:
    model = network()
    for k in (*range(network_state.MAX_SIGNATURES + 1), network_state.MAX_SIGNATURES, 0):
        model.kind = k
        fisher(model, [X[:2]])
    assert len(checks) == network_state.MAX_SIGNATURES + 2  # 0 was forgotten


def test_what_cannot_be_described_is_checked_anew(checks: list[int]) -> None:
    class Slots:
        __slots__ = ("flag",)

    model = network()
    model.options = Slots()  # nobody can tell whether this changes
    for _ in range(2):
        assert_right(model)
    assert checks == [3, 3]


def test_a_scripted_network_is_checked_anew_or_once(checks: list[int]) -> None:
    model = torch.jit.trace(network(), X[:3])
    before = fisher(network(), X.split(3), "exact").vector()
    for _ in range(2):
        torch.testing.assert_close(fisher(model, X.split(3), "exact").vector(), before)
    assert set(checks) == {3}


@pytest.mark.parametrize("within", ["_gradients", "_add_alone", "_compare_row"])
def test_an_error_within_a_call_is_not_remembered_as_a_success(within: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, real = unproved_network() if within == "_gradients" else network(), [], getattr(SelfCheck, within)

    def interrupted(self: SelfCheck, *rest: Any) -> Any:
        seen.append(within)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(SelfCheck, within, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fisher(model, X.split(3))
    for _ in range(2):
        fisher(model, X.split(3))
    assert seen == [within] * 2
    assert_right(model)


def test_two_threads(checks: list[int]) -> None:
    """Networks of their own in two threads, which come and go."""
    errors: list[BaseException] = []
    original = network()  # a copy draws no random number, which a check in the other thread would notice

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                model = copy.deepcopy(original)
                for _ in range(2):
                    assert_right(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert checks == [3] * 10


def test_a_mismatch_with_an_example_alone_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plain autograd of an example alone differs (a kink), the batch's own activations decide."""
    found: list[str | None] = []
    real = PlainSquares.difference

    def noted(self: PlainSquares, got: dict[str, Tensor], *rest: Any) -> str | None:
        if len(found) < 2:
            got = {name: 1.05 * q for name, q in got.items()}
        found.append(real(self, got, *rest))
        return found[-1]

    monkeypatch.setattr(PlainSquares, "difference", noted)
    assert_right(network())
    assert [why is None for why in found] == [False, True, True]


class Coupled(nn.Linear):
    """Adds the mean of a batch, unseen by the graph, wherever the batch has a large entry."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x.mean() if float(x.max()) > 50 else y


def coupled_in_the_second_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Coupled(4, 3), torch.randn(16, 4)
    x[9, 0] = 100
    return model, x


def test_a_call_that_failed_is_not_trusted_later() -> None:
    """The first batch of the call passed its check before the second one failed."""
    model, x = coupled_in_the_second_batch()
    for _ in range(3):
        with pytest.raises(SelfCheckError, match="examples interact"):
            fisher(model, x.split(8))


def test_the_second_batch_is_checked_once_whichever_call_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = coupled_in_the_second_batch()
    fisher(model, [x[:8]])
    with pytest.raises(SelfCheckError, match="half of its batch"):
        fisher(model, x.split(8))

    halves: list[int] = []
    real = SelfCheck._halves

    def noted(self: SelfCheck, inputs: Any, logits: Tensor, examples: Any) -> None:
        halves.append(len(examples))
        real(self, inputs, logits, examples)

    monkeypatch.setattr(SelfCheck, "_halves", noted)
    fine = unproved_network()
    for batches in ([X[:3]], X.split(3), X.split(3)):
        fisher(fine, batches)
    assert halves == [1, 3]


class Slotted:
    __slots__ = ("__weakref__", "mix")

    def __init__(self) -> None:
        self.mix = False


class Chain:
    def __init__(self, length: int) -> None:
        self.mix, self.after = False, Chain(length - 1) if length else None

    def last(self) -> Chain:
        return self if self.after is None else self.after.last()


class Keys(dict):
    mix = False


def switches(kind: str) -> tuple[nn.Module, Callable[[], Any]]:
    """A network with a switch at some place, and a function that turns it on."""
    closed = {"mix": False}

    class Switch(nn.Module):
        names: Any = ("plain",)
        table: ClassVar[dict[str, bool]] = {"mix": False}
        asked: Any = property(lambda self: False)

        def forward(self, x: Tensor, how: tuple = ("plain",)) -> Tensor:
            on = closed["mix"] or how[0] == "mix" or self.names[0] == "mix" or self.table["mix"] or self.asked
            held = vars(self).get("held")
            if isinstance(held, list):
                on = on or held[0].training
            elif isinstance(held, Chain):
                on = on or held.last().mix
            elif isinstance(held, (np.ndarray, Tensor)):
                on = on or bool(held.any())
            elif held is not None:
                on = on or held.mix
            elif "flag" in self._buffers:
                on = on or bool(self.flag)
            return torch.cat([x[:1] + x[1:].detach().sum(0), x[1:]]) if on else x

    switch = Switch().eval()
    held = {
        "slots": Slotted(),
        "deep": Chain(6),
        "attribute of a dict": Keys(),
        "array": np.zeros(1),
        "module in a list": [nn.Identity().eval()],
    }
    if kind in held:
        switch.held = held[kind]
    turn_on = {
        "closure of a method": lambda: closed.update(mix=True),
        "default of a method": lambda: setattr(Switch.forward, "__defaults__", (("mix",),)),
        "tuple of a class": lambda: setattr(Switch, "names", ("mix",)),
        "dict of a class": lambda: Switch.table.update(mix=True),
        "property of a class": lambda: setattr(Switch, "asked", property(lambda self: True)),
        "slots": lambda: setattr(switch.held, "mix", True),
        "deep": lambda: setattr(switch.held.last(), "mix", True),
        "attribute of a dict": lambda: setattr(switch.held, "mix", True),
        "array": lambda: switch.held.fill(1),
        "module in a list": lambda: switch.held[0].train(),
        "buffer": lambda: switch.flag.fill_(1),
    }
    if kind == "buffer":
        switch.register_buffer("flag", torch.tensor(0.0))
    return nn.Sequential(nn.Linear(4, 3), switch).eval(), turn_on[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "closure of a method",
        "default of a method",
        "tuple of a class",
        "dict of a class",
        "property of a class",
        "slots",
        "deep",
        "attribute of a dict",
        "array",
        "module in a list",
        "buffer",
    ],
)
def test_a_switch_is_noticed_wherever_it_is(kind: str) -> None:
    """It mixes the first example with the others; the example that is run alone does not show it."""
    model, turn_on = switches(kind)
    x = torch.randn(3, 4)
    fisher(model, [x])
    turn_on()
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(model, [x])


def test_rows_without_any_spread_do_not_count() -> None:
    """Most tokens are padding with a zero vector, so that the median spread would be zero, and rounding an error."""
    logits = torch.zeros(2, 5, 3, dtype=torch.float64)
    assert spread(logits, robust=True) == 0
    logits[1, 2:4] = torch.tensor([2.0, 0.0, -2.0])
    assert spread(logits, robust=True) == spread(logits[1, 2:4], robust=True) == 2


@pytest.mark.parametrize("fill", [-100.0, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [1, 5, 8])
@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_masked_classes_do_not_hide_that_examples_interact(fill: float, masked: int, strength: float) -> None:
    """The classes of other tasks have the same large negative logit in every row. The mixing has no gradient."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            z = self.last(h - strength * h.detach().mean(0))
            z[:, 10 - masked :] = fill
            return z

    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(SelfCheckError, match="examples interact"):
            fisher(Masked().eval(), [torch.randn(16, 6)], "exact")


def test_a_spread_that_is_not_finite_compares_nothing() -> None:
    assert math.isnan(spread(torch.tensor([[0.1], [0.2], [-math.inf], [-math.inf]]), robust=True))


def test_each_head_is_compared_at_its_own_scale() -> None:
    """The logits of one head are so large that what another head does to examples is lost among them."""

    class TwoHeads(nn.Module):
        def __init__(self, mixing: float) -> None:
            super().__init__()
            self.large, self.small, self.mixing = nn.Linear(4, 9), nn.Linear(4, 2), mixing

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([1e6 * self.large(x), self.small(x) + self.mixing * x.mean()], 1)

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    for mixing in (0.0, 1.0):
        recorder = FisherRecorder(TwoHeads(mixing))
        check = SelfCheck(recorder, lambda model, inputs: model(inputs), [9, 2])
        with recorder:
            logits = check.forward(x)
            if mixing:
                with pytest.raises(SelfCheckError, match="examples interact"):
                    check.batch(x, logits)
            else:
                check.batch(x, logits)


def _mean_over_rows(g: Tensor) -> Tensor:
    return g - g.mean(0)


def _first_row(g: Tensor) -> Tensor:
    return torch.cat([3 * g[:1], g[1:]])


class _Backward(torch.autograd.Function):
    """The identity, whose backward function is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.change(g), None


class _Changed(nn.Module):
    """Gradients of the hidden features are changed on their way back, by a hook or by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor], hook: bool) -> None:
        super().__init__()
        self.below, self.above, self.change, self.hook = nn.Linear(4, 6), nn.Linear(6, 3), change, hook

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        if not self.hook:
            h = _Backward.apply(h, self.change)
        elif h.requires_grad:
            h.register_hook(self.change)
        return self.above(h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [6, 3, 2])
@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("change", [_mean_over_rows, _first_row])
def test_gradients_that_depend_on_other_rows(change: Any, hook: bool, size: int, dtype: torch.dtype) -> None:
    """The graph of the batch agrees with itself. Only an example that is run alone tells."""
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=dtype)
    with pytest.raises(SelfCheckError, match=r"below\..*mix the examples"):
        fisher(_Changed(change, hook).to(dtype), x.split(size), "exact")


@pytest.mark.parametrize("hook", [True, False])
def test_gradients_that_are_changed_row_by_row(hook: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    model = _Changed(lambda g: g * g.abs().amax(1, keepdim=True), hook).double()
    alone = fisher(copy.deepcopy(model), x.split(1), "exact")
    for name, q in fisher(model, x.split(5), "exact").items():
        torch.testing.assert_close(q, alone[name])


# ---- the squares of a first batch, compared with plain autograd (networks that are row by row)


def within_the_batch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The examples whose own squares are compared, and whether they agree."""
    rows: list[int] = []
    seen: list[tuple[int, bool]] = []
    compare, agrees = SelfCheck._compare_row, PlainSquares.each_agrees

    def compare_row(self: SelfCheck, first: Any, found: Any, row: int, *rest: Any) -> None:
        rows.append(row)
        compare(self, first, found, row, *rest)

    def each_agrees(*args: Any) -> bool:
        seen.append((rows[-1], agrees(*args)))
        return seen[-1][1]

    monkeypatch.setattr(SelfCheck, "_compare_row", compare_row)
    monkeypatch.setattr(PlainSquares, "each_agrees", each_agrees)
    return seen


BROKEN: dict[str, Callable[[Outer], Outer]] = {
    "in every batch": lambda f: Outer(f.x * 1.01, f.g),
    "in batches of more than three": lambda f: Outer(f.x * (1.01 if len(f.x) > 3 else 1), f.g),
    "in batches of one or two": lambda f: Outer(f.x * (1.01 if len(f.x) < 3 else 1), f.g),
    "in one class": lambda f: Outer(f.x, f.g * (1 + 0.01 * (torch.arange(f.g.shape[-1]) == 4))),
    "by the mean of the other rows": lambda f: Outer(f.x, f.g - f.g.mean(0)),
    "in the next row": lambda f: Outer(f.x, f.g.roll(1, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("estimator", "samples"), [("monte_carlo", 1), ("deflated", 2), ("empirical", 1)])
@pytest.mark.parametrize("how", sorted(set(BROKEN) - {"in batches of one or two"}))
def test_a_broken_rule_is_found_in_the_batch_itself(
    how: str, estimator: str, samples: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = RULES["AddmmBackward0"]

    def broken(*args: Any) -> Any:
        factors = rule.factors(*args)
        return BROKEN[how](factors) if isinstance(factors, Outer) else factors

    monkeypatch.setitem(RULES, "AddmmBackward0", replace(rule, factors=broken))
    for granularity in ("filter", *(["tensor", "parameter"] if how == "in every batch" else [])):
        with pytest.raises(SelfCheckError, match=r"self-check failed for '4\."):
            fisher(network().to(dtype), [(X.to(dtype), torch.arange(6) % 5)], estimator, samples, granularity)


def saturated(scale: float) -> nn.Module:
    """Cotangents of a softmax that are zero for most classes, or all, the more the logits are scaled."""
    model = network()
    with torch.no_grad():
        model[4].weight *= scale
        model[4].bias *= scale
    return model


@pytest.mark.parametrize("scale", [300.0, 1e4])
@pytest.mark.parametrize("estimator", ["monte_carlo", "deflated", "exact"])
def test_a_saturated_softmax_keeps_the_random_cotangent(
    scale: float, estimator: str, checks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = within_the_batch(monkeypatch)
    fisher(saturated(scale), [X], estimator)
    assert checks == [6]
    assert not compared
    rule = RULES["AddmmBackward0"]

    def broken(*args: Any) -> Any:  # for a class that has no probability
        factors = rule.factors(*args)
        return (
            Outer(factors.x, factors.g * torch.tensor([1.01] + [1] * 3 + [1.01])) if type(factors) is Outer else factors
        )

    monkeypatch.setitem(RULES, "AddmmBackward0", replace(rule, factors=broken))
    with pytest.raises(SelfCheckError, match=r"self-check failed for '4\."):
        fisher(saturated(scale), [X], estimator)


def test_the_example_with_usable_cotangents_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first nor the last, nor one whose softmax is saturated."""
    compared = within_the_batch(monkeypatch)
    for row in range(6):
        scale = torch.full((6, 1), 1e4, dtype=torch.float64)
        scale[[0, row, 5]] = 1.0
        model = Scaled(network())
        compared.clear()
        result = fisher(model, [{"x": X, "scale": scale}], "monte_carlo", 1)
        assert compared == ([(row, True)] if 0 < row < 5 else [])
        assert all(bool(q.isfinite().all()) for q in result.values())


class Scaled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.network(x) * scale


@pytest.mark.parametrize("granularity", ["filter", "tensor", "parameter"])
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", "gaussian"])
@pytest.mark.parametrize("options", [{}, {"estimator_error": True}, {"parameters": ["4.weight", "0.bias"]}])
def test_squares_are_those_without_a_check(
    granularity: str, likelihood: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if granularity == "parameter":
        options = {name: value for name, value in options.items() if name != "estimator_error"}  # it has none
    compared = within_the_batch(monkeypatch)
    for samples in (1, 2, 3):
        model, settings = network(), {"likelihood": likelihood, "granularity": granularity, "samples": samples}
        batches = [X, X[:3].clone(), X[:4] * 2, X[:2], X[:1]]
        got = fisher(model, batches, **settings, **options)
        want = fisher(copy.deepcopy(model), batches, self_check=False, **settings, **options)
        for name, q in want.items():
            assert torch.equal(got[name], q)
            assert torch.equal(got.standard_error[name], want.standard_error[name])
    # The sketches of a diagonal Fisher are zero for the outputs that its eigenvectors show.
    of_diagonal = 1 if "estimator_error" in options else 2
    times = 0 if granularity != "filter" else 3 if likelihood == "softmax" else of_diagonal
    assert [agrees for _, agrees in compared] == [True] * times


def test_estimators_have_verdicts_of_their_own(checks: list[int]) -> None:
    """What the cotangents of a softmax do not show, those of other likelihoods may."""
    model = network()
    for _ in range(2):
        for estimator, likelihood in (("deflated", "softmax"), ("monte_carlo", "softmax"), ("deflated", "gaussian")):
            fisher(model, [X], estimator, likelihood=likelihood)
    assert checks == [6] * 3
    other = network()
    fisher(other, [X], granularity="parameter")  # a random cotangent
    assert checks == [6] * 4
    fisher(other, [X], "exact", granularity="parameter")
    assert checks == [6] * 4


def test_squares_that_are_not_handed_over_are_an_error() -> None:
    passes = forward_passes(FisherRecorder(network()), lambda m, x: m(x), "cpu", purpose=("deflated", "softmax"))
    with passes as batches_of, pytest.raises(RuntimeError, match="not handed over"):
        list(batches_of([X]))


@pytest.mark.parametrize("by", [1.02, 1.3, 3.0])
def test_a_kink_between_the_batch_and_an_example_alone(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch's own activations decide. Where they do not explain the difference, it is an error."""
    compared, real = within_the_batch(monkeypatch), SelfCheck._add_alone
    ours = iter([by])  # the first call is for the batch itself

    def apart(self: SelfCheck, plain: PlainSquares, row: int, *rest: Any) -> None:
        real(self, plain, row, *rest)
        scale = next(ours, 1)
        plain._rows[row] = {name: scale * w for name, w in plain._rows[row].items()}

    monkeypatch.setattr(SelfCheck, "_add_alone", apart)
    monkeypatch.setattr("t2v_fast.estimation.self_check.row_to_compare", lambda u: 4)
    if by > 1.1:  # no kink does this
        with pytest.raises(SelfCheckError, match="mix the examples"):
            fisher(network(), [X])
    else:
        want = fisher(network(), [X], self_check=False)
        assert torch.equal(fisher(network(), [X]).vector(), want.vector())
    assert compared == [(4, False)]


HIDDEN_HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "the mean over the batch": _mean_over_rows,
    "the first row": _first_row,
    "the last row": lambda g: torch.cat([g[:-1], 3 * g[-1:]]),
    "another row": lambda g: g.roll(1, 0),
    "the number of rows": lambda g: g * (1 + 0.3 * (len(g) - 1)),
    "the largest row": lambda g: g / (1 + g.norm(dim=1).max()),
}


class _HookedElsewhere(nn.Module):
    """Another thread sets a hook on a network that is row by row, whose gradients are then those of no example."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.below, self.above, self.change = nn.Linear(4, 6), nn.Linear(6, 3), HIDDEN_HOOKS[how]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        thread = threading.Thread(target=lambda: h.requires_grad and h.register_hook(self.change))
        thread.start()
        thread.join()
        return self.above(h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [3, 6, 32, 200])
@pytest.mark.parametrize("how", HIDDEN_HOOKS)
def test_hooks_that_the_proof_does_not_see(how: str, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(size, 4, dtype=dtype)
    for estimator, samples in (("monte_carlo", 1), ("deflated", 2)):
        with pytest.raises(SelfCheckError, match="self-check failed for 'below"):
            fisher(_HookedElsewhere(how).to(dtype), [x], estimator, samples)


@pytest.mark.parametrize("size", [3, 6, 32])
@pytest.mark.parametrize("how", HIDDEN_HOOKS)
def test_hooks_that_the_proof_does_not_see_in_sums_over_examples(how: str, size: int) -> None:
    """The squares are sums over the two examples that are compared. The graph of both agrees with itself."""
    torch.manual_seed(0)
    x = torch.randn(size, 4, dtype=torch.float64)
    with pytest.raises(SelfCheckError, match="self-check failed for 'below"):
        fisher(_HookedElsewhere(how).double(), [x], "exact", granularity="parameter")


@pytest.mark.parametrize("by", [1.0, 1e3, 1e5])
def test_a_last_cotangent_that_is_small_beside_the_others(by: float, checks: list[int]) -> None:
    """Its squares are lost to rounding in the sums of all cotangents. That is no error of a rule."""
    recorder, generator = FisherRecorder(network().float()), torch.Generator().manual_seed(1)
    u = torch.randn(3, 6, 5, generator=generator) * torch.tensor([by, by, 1.0])[:, None, None]
    with forward_passes(recorder, lambda m, x: m(x), "cpu", purpose=("deflated", "softmax")) as batches_of:
        for batch in batches_of([X.float()]):
            assert batch.check is not None
            got = batch.check.compared(u, lambda groups, logits=batch.logits: [recorder.backward(logits, u)])
        want = recorder.backward(recorder.model(X.float()), u)
    assert checks == [6] * (1 if by == 1 else 2)
    for name, q in want.items():
        torch.testing.assert_close(got[0][name], q, rtol=1e-4, atol=0)


class DrawsByItself(nn.Module):
    """Scales its output by numbers that no common generator gives."""

    def __init__(self, source: str) -> None:
        super().__init__()
        own, numpys, pythons = torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)
        draws: dict[str, Callable[[], float]] = {
            "torch": lambda: float(torch.rand((), generator=own)),
            "numpy": numpys.random,
            "python": pythons.random,
            "system": random.SystemRandom().random,
        }
        self.linear, self.draw = nn.Linear(3, 2), draws[source]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (0.1 + self.draw())


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "system"])
@pytest.mark.parametrize("size", [1, 2])
def test_generators_of_a_networks_own_are_found_in_batches_of_any_size(source: str, size: int) -> None:
    torch.manual_seed(0)
    network = DrawsByItself(source).eval()
    for _ in range(2):  # a network that failed is not remembered
        with pytest.raises(SelfCheckError, match="the network is random"):
            fisher(network, [torch.randn(size, 3) for _ in range(2)])


@pytest.mark.parametrize("kind", ["random", "ties", "a masked class", "an offset", "all alike"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (5, 1), (7, 10), (3, 5, 41)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_spread_is_that_of_its_definition(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "ties":
        z = z.round()
    elif kind == "a masked class":
        z[..., 0] = -1e4
    elif kind == "an offset":
        z += 100
    elif kind == "all alike":
        z[0] = 2.0
    z = z.to(dtype)
    rows = z.double().reshape(-1, shape[-1])
    if (varied := (rows != rows[0]).any(0)).any():
        rows = rows[:, varied]
    if (classes := rows.shape[1]) > 1:
        ordered = rows.sort(1).values
        centre = (ordered[:, [(classes - 1) // 2]] + ordered[:, [classes // 2]]) / 2
    else:
        centre = rows.flatten().sort().values[(len(rows) - 1) // 2]
    apart = (rows - centre).abs()
    differs = (apart > 0).any(1)
    if differs.any():
        rows, apart = rows[differs], apart[differs]
    least = 1e3 * torch.finfo(dtype).eps * float(rows.abs().median())
    for robust, found in ((True, apart.flatten().quantile(0.5)), (False, apart.max())):
        assert spread(z, robust) == pytest.approx(max(float(found), least), rel=1e-5)


def test_the_graph_of_a_checked_output_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    looks: list[Tensor] = []
    plain = FisherRecorder._taps

    def look(self: FisherRecorder, output: Tensor, segments: Tensor | None = None) -> Any:
        looks.append(output)
        return plain(self, output, segments)

    monkeypatch.setattr(FisherRecorder, "_taps", look)
    x, u = torch.randn(6, 4), torch.randn(6, 3)
    with FisherRecorder(network) as recorder:
        first, second = network(x), network(x)
        recorder.check(first)
        other = recorder.backward(second, u)  # the uses in another graph are others
        found = recorder.backward(first, u)
        assert len(looks) == 2
        changed = network(x)
        recorder.check(changed)
        changed *= 2  # which gives it another graph
        twice = recorder.backward(changed, u)
        assert len(looks) == 4
    for name, q in found.items():
        assert torch.equal(q, other[name])
        torch.testing.assert_close(twice[name], 4 * q)


def test_segments_that_change_after_a_check_count() -> None:
    network = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)).eval()
    ids, u = torch.randint(0, 10, (1, 7)), torch.randn(2, 1, 7, 3)
    segments, later = torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 2, 2])
    with FisherRecorder(network) as recorder:
        output = network(ids)
        want = recorder.backward(output, u, segments=later, retain_graph=True)
        recorder.check(output, segments)
        segments.copy_(later)
        got = recorder.backward(output, u, segments=segments)
    for name, q in want.items():
        torch.testing.assert_close(got[name], q)


def test_a_checked_output_is_not_kept() -> None:
    network = nn.Linear(4, 3)
    with FisherRecorder(network) as recorder:
        output = network(torch.randn(6, 4))
        output.grad_fn.metadata["label"] = label = nn.Identity()  # which lasts as long as the node
        recorder.check(output)
        kept = weakref.ref(label)
        del output, label
        gc.collect()
        assert kept() is None
