"""The diagonals of TAK against plain autograd, over single images, features and classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from t2v_fast.adapters.tak import DiagComputer, LossDiagComputer

X = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
HEAD = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 5


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.class_embedding + torch.zeros_like(x[:, :1]), x], 1)


class Encoder(nn.Module):
    """A vision transformer in small: examples along the second axis within the block, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.cls_token_layer = nn.Linear(6, 8), ClassToken()
        self.positional = nn.Parameter(torch.randn(5, 8))
        self.ln_pre, self.mlp, self.lin_proj = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_pre(self.cls_token_layer(self.patches(x)) + self.positional).transpose(0, 1)
        x = x + self.mlp(x.cumsum(0).tanh())
        return self.lin_proj(x.transpose(0, 1)[:, 0] + x.mean(0))


NAMES = [
    "cls_token_layer.class_embedding",
    "ln_pre.weight",
    "ln_pre.bias",
    "mlp.weight",
    "mlp.bias",
    "lin_proj.weight",
    "positional",
]
DATASET = SimpleNamespace(train_loader=[(X[:2], None), (X[2:4], None), (X[4:], None)])


def truth(encoder: nn.Module, loss: bool, images: Tensor = X) -> dict[str, Tensor]:
    named = {name: p for name, p in encoder.named_parameters() if name in NAMES}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(images)):
        features = encoder(images[n : n + 1])[0]
        features = features / features.norm()
        logits = HEAD @ features
        terms = [(p, s) for p, s in zip(logits.softmax(0).tolist(), logits.log_softmax(0), strict=True)]
        for weight, output in terms if loss else [(1.0, f) for f in features]:
            for name, g in zip(
                named, torch.autograd.grad(output, list(named.values()), retain_graph=True), strict=True
            ):
                total[name] += weight * g.square()
    joined = {"mlp.weight": torch.cat([total["mlp.weight"], total["mlp.bias"][:, None]], 1)}
    joined["ln_pre.weight"] = torch.stack([total["ln_pre.weight"], total["ln_pre.bias"]], 1)
    return joined | {name: total[name] for name in ("cls_token_layer.class_embedding", "lin_proj.weight")}


@pytest.mark.parametrize("loss", [False, True])
def test_every_column(loss: bool) -> None:
    encoder = Encoder().train()
    net = SimpleNamespace(visual_encoder=encoder)
    kind = LossDiagComputer if loss else DiagComputer
    got, count = kind("cpu", False).compute(net, lambda f: f @ HEAD.T, NAMES, DATASET, use_head=loss)
    assert count == 5
    assert encoder.training
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == [
        name for name, _ in encoder.named_parameters() if name in NAMES
    ]
    want = truth(Encoder(), loss)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-14)


def test_random_directions_and_parts_of_the_data() -> None:
    net = SimpleNamespace(visual_encoder=Encoder())
    exact = DiagComputer("cpu", False).compute(net, None, NAMES, DATASET)[0]["mlp.weight"]
    drawn = DiagComputer("cpu", False, num_samples_expectation=300).compute(net, None, NAMES, DATASET)[0]["mlp.weight"]
    assert float((drawn / 300 - exact).norm()) < 0.15 * float(exact.norm())
    for computer, count in (
        (DiagComputer("cpu", True), 4),
        (DiagComputer("cpu", False, 0.1), 2),
        (DiagComputer("cpu", False, 0.5, fp_precision="fp32"), 4),
    ):
        found, examples = computer.compute(net, None, NAMES[3:5], DATASET)
        assert examples == count
        want = truth(Encoder(), False, X[:count])["mlp.weight"]
        torch.testing.assert_close(found["mlp.weight"], want, rtol=1e-5, atol=1e-9, check_dtype=False)
    assert found["mlp.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", [DiagComputer, LossDiagComputer])
def test_frozen_encoders_and_names_from_an_iterator(kind: type[DiagComputer]) -> None:
    """As Mammoth calls it: its task vectors leave the encoder frozen, and names are the keys of a dictionary."""
    encoder = Encoder().requires_grad_(False)
    net = SimpleNamespace(visual_encoder=encoder)
    loss = kind is LossDiagComputer
    want = truth(Encoder(), loss)
    computer = kind(torch.device("cpu"), debug_mode=False, train_percent=1.0, fp_precision="fp64")
    got, count = computer.compute(net, lambda f: f @ HEAD.T, iter(dict.fromkeys(NAMES)), DATASET, use_head=loss)
    assert count == len(X)
    assert not any(p.requires_grad for p in encoder.parameters())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-14)
    half = SimpleNamespace(train_loader=[(batch[0].bfloat16(), None) for batch in DATASET.train_loader])
    encoder.bfloat16()
    coarse, _ = computer.compute(net, lambda f: f @ HEAD.to(f).T, NAMES, half, use_head=loss)
    for name, value in want.items():
        assert coarse[name].dtype == torch.float64
        assert float((coarse[name] - value).norm()) < 0.2 * float(value.norm()), name
    with pytest.raises(ValueError, match="the loader gave no example"):
        computer.compute(net, lambda f: f @ HEAD.T, NAMES, SimpleNamespace(train_loader=[]), use_head=loss)


def test_what_is_refused() -> None:
    net = SimpleNamespace(visual_encoder=Encoder())
    with pytest.raises(ValueError, match=r"none of \['positional'\]"):
        DiagComputer("cpu", False).compute(net, None, ["positional"], DATASET)
    with pytest.raises(ValueError, match="head is None"):
        LossDiagComputer("cpu", False).compute(net, None, NAMES, DATASET, use_head=True)
    with pytest.raises(ValueError, match="the loss needs a head"):
        LossDiagComputer("cpu", False).compute(net, lambda f: f, NAMES, DATASET)
    for options in ({"train_percent": 0.0}, {"fp_precision": "bf16"}):
        with pytest.raises(ValueError, match="train_percent is"):
            DiagComputer("cpu", False, **options)
