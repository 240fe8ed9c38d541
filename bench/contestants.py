"""What is measured: ``run(prepare(model), x, y)`` gives {parameter name: filter means [O], summed over the examples}.

``prepare`` is called once and may change the model. ``run`` is timed. A contestant that cannot do a model raises, and
the suites report its message.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from t2v_fast import fisher
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.gradients.fast_forward import FastNetwork, kept_memory
from t2v_fast.gradients.graph import backpropagate
from t2v_fast.gradients.recorder import FisherRecorder
from t2v_fast.gradients.refusals import taps_of

# What a contestant's numbers are meant to be, and so what they are judged by.
LABELS = "labels"  # the sum of squared per-example gradients, for the given labels
FISHER = "fisher"  # the same in expectation over the model's labels
ESTIMATE = "estimate"  # an estimate of that
OTHER = "other"  # another quantity
NOTHING = "nothing"  # no numbers: a yardstick for time and memory

Sums = dict[str, Tensor]


class Unsupported(RuntimeError):
    """The contestant cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    run: Callable[[Any, Tensor, Tensor], Sums | None]
    prepare: Callable[[nn.Module], Any] = lambda model: model
    target: str = LABELS
    dtype: torch.dtype = torch.float32
    session: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around batch after batch
    compiles: bool = False  # whether the first batch of a shape compiles


def filter_means(square: Tensor) -> Tensor:
    """[O, ...] to [O]."""
    return square.reshape(max(square.shape[:1], default=1), -1).mean(1)


def forward_only(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        model(x)


def floor(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward, and backward down to the first layer, with no weight gradient: what any Fisher of this batch costs."""
    loss = F.cross_entropy(model(x), y, reduction="sum")
    taps = taps_of(loss, dict(model.named_parameters()))
    backpropagate(loss, torch.ones_like(loss), taps, lambda node, g: None, retain_graph=False)


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward and full backward: an ordinary training step without the update."""
    torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))


def compiled_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The same step of a network that torch.compile has compiled. An open recorder would run it as it is written."""
    with torch.compiler.set_stance("default"):
        step(model, x, y)


def naive(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    """The batch-size-1 loop."""
    parameters = dict(model.named_parameters())
    sums = dict.fromkeys(parameters, 0.0)
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            sums[name] = sums[name] + filter_means(g.square())
    return sums


def per_example_vmap(model: nn.Module, x: Tensor, y: Tensor, chunk: int | None = None) -> Sums:
    """torch.func: vmap over grad. Every per-example gradient of a chunk exists at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    chunk = min(chunk or len(x), len(x))
    size = chunk * sum(p.numel() * p.element_size() for p in parameters.values())
    if size > VMAP_BYTES:
        raise Unsupported(f"{size / 2**30:.0f} GiB of per-example gradients")

    def loss(p: Sums, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (p, buffers), (image[None],)), label[None])

    sums = dict.fromkeys(parameters, 0.0)
    # By hand: the chunks of vmap's own chunk_size are concatenated before they can be squared.
    for images, labels in zip(x.split(chunk), y.split(chunk), strict=True):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, images, labels)
        for name in parameters:
            g = gradients.pop(name)
            g = g.square_() if g.is_contiguous() else g.square()
            sums[name] = sums[name] + g.reshape(*g.shape[:2], -1).mean(2).sum(0)
    return sums


VMAP_BYTES = 8 * 2**30  # twice this is the peak


def fused(state: tuple[FisherRecorder, FastNetwork], x: Tensor, y: Tensor, estimator: str, samples: int = 1) -> Sums:
    """A batch as fisher() has it."""
    recorder, forward = state
    logits = forward(recorder.model, x)
    q = recorder.backward(logits, cotangents(logits, estimator, samples, labels=y))
    return {name: values.sum(0) for name, values in q.items()}


def batch_mean(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    return dict(fisher(model, [(x, y)], "batch_mean"))


def _fused(estimator: str, samples: int = 1, **settings: Any) -> Contestant:
    # Entered once for all batches, as fisher() does: a recorder remembers the layouts that it probed.
    def prepare(model: nn.Module) -> tuple[FisherRecorder, FastNetwork]:
        return FisherRecorder(model).__enter__(), FastNetwork(model, lambda model, x: model(x)).__enter__()

    run = functools.partial(fused, estimator=estimator, samples=samples)
    return Contestant(run, prepare, session=kept_memory, **settings)


OWN = {
    "forward": Contestant(forward_only, target=NOTHING),
    "floor": Contestant(floor, target=NOTHING),
    "step": Contestant(step, target=NOTHING),
    # Compiled for each shape: a graph for all shapes would be slower than what a user compiles for one size of batch.
    "step_compiled": Contestant(
        compiled_step, functools.partial(torch.compile, dynamic=False), target=NOTHING, compiles=True
    ),
    "fisher": _fused("empirical"),
    "fisher_bfloat16": _fused("empirical", dtype=torch.bfloat16),
    "fisher_exact": _fused("exact", target=FISHER),
    "fisher_deflated": _fused("deflated", 2, target=ESTIMATE),
    "fisher_hutchinson": _fused("hutchinson", target=ESTIMATE),
    "fisher_monte_carlo": _fused("monte_carlo", target=ESTIMATE),
    "fisher_batch_mean": Contestant(batch_mean, target=OTHER),
    "naive": Contestant(naive),
    "vmap": Contestant(per_example_vmap),
    "vmap_chunked": Contestant(functools.partial(per_example_vmap, chunk=4)),
}
PEERS = {  # name: its module in peers/, imported when asked for, because it needs a package of its own
    "backpack": "backpack",
    "backpack_save_memory": "backpack",
    "opacus": "opacus",
    "nngeometry": "nngeometry",
    "asdl": "asdl",
    "curvlinops": "curvlinops",
    "task2vec": "task2vec",
}
NAMES = (*OWN, *PEERS)


def find(name: str) -> Contestant:
    """The contestant of that name; ImportError where its package is missing."""
    return OWN[name] if name in OWN else importlib.import_module(f"bench.peers.{PEERS[name]}").CONTESTANTS[name]
