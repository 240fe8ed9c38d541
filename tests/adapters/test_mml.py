"""The Fisher of mml-similarity against its loop, written out over single images and all labels."""

from __future__ import annotations

import enum

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast.adapters.mml import fim_diag

X = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])
BATCHES = [{"image": X[:2], "class": Y[:2]}, {"image": X[2:], "class": Y[2:]}]
NAMES = ["backbone.weight", "head.bias"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"task": self.head(self.norm(self.backbone(x)).tanh().flatten(1)), "other": x}


class TaskType(enum.StrEnum):
    CLASSIFICATION = "classification"
    SEMANTIC_SEGMENTATION = "semantic_segmentation"


@pytest.mark.parametrize("empirical", [False, True])
@pytest.mark.parametrize("gradient", ["log-likelihood", "logit"])
def test_every_choice(gradient: str, empirical: bool) -> None:
    model = Model()
    got = fim_diag(model, BATCHES, NAMES[::-1], TaskType.CLASSIFICATION, empirical, gradient=gradient)
    assert list(got) == NAMES
    assert not model.training
    wanted = [dict(model.named_parameters())[name] for name in NAMES]
    want = [torch.zeros_like(p) for p in wanted]
    for n in range(len(X)):
        logits = model(X[n : n + 1])["task"][0]
        scores = logits if gradient == "logit" else logits.log_softmax(0)
        for c in [int(Y[n])] if empirical else range(3):
            chance = 1.0 if empirical else float(F.softmax(logits, 0)[c])
            for total, g in zip(want, torch.autograd.grad(scores[c], wanted, retain_graph=True), strict=True):
                total += chance * g.square() / len(X)
    for found, value in zip(got.values(), want, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-14)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_refused() -> None:
    for arguments, options, error, message in (
        ((BATCHES, NAMES, TaskType.SEMANTIC_SEGMENTATION), {}, NotImplementedError, "semantic_segmentation"),
        ((BATCHES, ["backbone"], "classification"), {}, ValueError, "no floating-point parameter 'backbone'"),
        (([{"image": X}], NAMES, "classification", True), {}, ValueError, r"batch 0 has \['image'\], expected 'class'"),
        (([], NAMES, "classification"), {}, ValueError, "gave no example"),
        ((BATCHES, NAMES, "classification"), {"gradient": "score"}, ValueError, "gradient is 'score'"),
    ):
        with pytest.raises(error, match=message):
            fim_diag(Model(), *arguments, **options)
