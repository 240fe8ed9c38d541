"""The loop of Task2Vec's public code: one backward pass for each batch, and the square of the batch's mean gradient."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bench.contestants import OTHER, Contestant, Sums, filter_means


def prepare(model: nn.Module) -> nn.Module:
    return model.train()  # as there: batch norm on the batch's own statistics


def run(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    model.zero_grad()
    logits = model(x)
    drawn = logits.detach().softmax(1).multinomial(1)[:, 0]
    F.cross_entropy(logits, drawn).backward()
    return {name: filter_means(p.grad.square()) for name, p in model.named_parameters()}


CONTESTANTS = {"task2vec": Contestant(run, prepare, OTHER)}
