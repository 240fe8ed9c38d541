"""What adapters say of networks, batches and labels that do not fit, and that none of it gives a number silently."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from t2v_fast.adapters import mml
from t2v_fast.adapters.continual import compute_importances, online_ewc_fisher
from t2v_fast.adapters.curvlinops import LOSSES, diagonal_operator
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.adapters.language import embed_as_beyond_scale, embed_text
from t2v_fast.adapters.tak import LossDiagComputer

X, Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
NOT_FINITE = X.index_fill(0, torch.tensor([1]), torch.nan)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Heads(nn.Module):
    """A model of mml: a mapping from heads to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"task": self.net(x)}


class Pair(nn.Module):
    """Logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


def avalanche(x: Tensor, y: Tensor, net: nn.Module | None = None) -> object:
    data = TensorDataset(x, y, torch.zeros(len(x)))
    return compute_importances(net or network(), nn.CrossEntropyLoss(), None, data, "cpu", 4)


def mammoth(x: Tensor, y: Tensor, net: nn.Module | None = None) -> object:
    return online_ewc_fisher(net or network(), [(x, y)], "cpu")


def similarity(x: Tensor, y: Tensor, gradient: str = "log-likelihood") -> object:
    batch = {"image": x, "class": y}
    return mml.fim_diag(Heads(), [batch], ["net.2.bias"], "classification", True, gradient=gradient)


CALLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "fim": lambda x, y: fim_diag(network(), [(x, y)], labels="true"),
    "avalanche": avalanche,
    "mammoth": mammoth,
    "mml": similarity,
    "mml's logits": lambda x, y: similarity(x, y, "logit"),
}
LABELS = {
    "labels go from 0 to 3, expected 0 to 2": torch.tensor([0, 1, 2, 3]),
    "labels go from -1 to 2": torch.tensor([0, -1, 2, 1]),
    r"float32, expected integers \[4\]": Y.float(),
    r"labels are \[4, 1\]": Y[:, None],
    r"bool, expected integers \[4\]": Y.bool(),
}


@pytest.mark.parametrize("message", LABELS)
@pytest.mark.parametrize("name", CALLS)
def test_labels_that_do_not_fit(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CALLS[name](X, LABELS[message])


@pytest.mark.parametrize("name", CALLS)
def test_inputs_that_are_not_finite(name: str) -> None:
    with pytest.raises(ValueError, match="batch 0, example 1: the input has NaN"):
        CALLS[name](NOT_FINITE, Y)


def test_labels_may_be_of_any_integer_type() -> None:
    for call in CALLS.values():
        whole, narrow = call(X, Y), call(X, Y.to(torch.int32))
        pairs = zip(whole.values(), narrow.values(), strict=True) if isinstance(whole, dict) else [(whole, narrow)]
        assert all(a.equal(b) for a, b in pairs)


def test_examples_with_ignored_labels_are_left_out() -> None:
    ignored = Y.index_fill(0, torch.tensor([1]), -100)
    found, rest = avalanche(X, ignored), avalanche(X[[0, 2, 3]], Y[[0, 2, 3]])
    for name, value in rest.items():
        torch.testing.assert_close(found[name], value)


def test_targets_that_are_no_probabilities() -> None:
    for targets, kind, message in (
        (torch.full((4, 3), 2.0), "multi-label", "expected 0 to 1"),
        (torch.full((4, 3), torch.nan), "multi-label", "NaN or infinite"),
        (torch.full((4, 3), torch.nan), "regression", "NaN or infinite"),
        (Y, "regression", r"expected targets \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fim_diag(network(), [(X, targets)], kind, "true")
    assert fim_diag(network(), [(X, torch.full((4, 3), 2.0))], "regression", "true")


def test_outputs_that_are_no_logits() -> None:
    for labels in ("all", "pred", "true"):
        with pytest.raises(TypeError, match="the model returned tuple, expected logits"):
            fim_diag(Pair(), [(X, Y)], labels=labels)
    for call in (avalanche, mammoth):
        with pytest.raises(TypeError, match="wrap the model in a module that returns the logits alone"):
            call(X, Y, Pair())
    loss = next(iter(LOSSES))()
    pytest.importorskip("curvlinops", reason="makes its operators")
    with pytest.raises(TypeError, match="the model returned tuple"):
        diagonal_operator(net := Pair(), loss, list(net.parameters()), [(X, Y)])


def test_batches_that_have_another_form() -> None:
    for batch, what in (((X,), "1 entry"), ({"x": X}, "a dict"), (X, "a Tensor")):
        with pytest.raises(ValueError, match=f"train_loader gives batches of {what}, expected"):
            online_ewc_fisher(network(), [batch], "cpu")
    with pytest.raises(ValueError, match="dataset gives batches of 1 entry"):
        compute_importances(network(), nn.CrossEntropyLoss(), None, TensorDataset(X), "cpu", 2)
    with pytest.raises(TypeError, match="batch 0 is a tuple, expected a mapping with 'image'"):
        mml.fim_diag(Heads(), [(X, Y)], ["net.2.bias"], "classification")
    with pytest.raises(TypeError, match="the model returned Tensor, expected a mapping from heads to logits"):
        mml.fim_diag(network(), [{"image": X}], ["2.bias"], "classification")
    computer = LossDiagComputer("cpu", False)
    with pytest.raises(TypeError, match="Sequential without a module visual_encoder"):
        computer.compute(network(), nn.Identity(), ["2.weight"], SimpleNamespace(train_loader=[(X, Y)]), True)
    net = SimpleNamespace(visual_encoder=network())
    with pytest.raises(TypeError, match=r"batches that are a dict, expected \(images"):
        computer.compute(net, nn.Identity(), ["2.weight"], SimpleNamespace(train_loader=[{"x": X}]), True)


TOKENS = torch.randint(0, 16, (3, 6), generator=torch.Generator().manual_seed(1))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is its own")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).double()


@pytest.mark.parametrize("mapping", [True, False])
def test_the_likeliest_tokens_of_a_language_model(mapping: bool) -> None:
    """Also in batches of one and two texts, with a label that says that a position does not count."""
    model = gpt2().eval()
    labels = TOKENS.index_fill(1, torch.tensor([2]), -100)
    pairs = [(TOKENS[:2], labels[:2]), (TOKENS[2:], labels[2:])]
    batches = [{"input_ids": x, "labels": y} for x, y in pairs] if mapping else pairs
    found = fim_diag(model, batches, labels="pred", level="sequence")
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(3):
        z = model(TOKENS[n : n + 1]).logits[0]
        z = z[labels[n] != -100]
        gradients = torch.autograd.grad(F.cross_entropy(z, z.argmax(1), reduction="sum"), list(model.parameters()))
        for total, g in zip(want.values(), gradients, strict=True):
            total += g.square() / 3
    assert list(found) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)


def test_batches_of_text() -> None:
    model = gpt2()
    for call in (embed_text, embed_as_beyond_scale):
        for batch, message in (((TOKENS, TOKENS), "is a tuple"), ({"x": TOKENS}, r"has \['x'\]")):
            with pytest.raises(ValueError, match=f"a batch of text {message}, expected token numbers"):
                call(model, [batch])
    for call in (avalanche, mammoth):
        with pytest.raises(TypeError, match="the model returned CausalLMOutput"):
            call(TOKENS, Y[:3], gpt2())
