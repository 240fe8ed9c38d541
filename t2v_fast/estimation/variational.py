"""The robust Fisher: how much noise each filter of a network bears (Achille et al., 2019, section 3.2).

Weights become Gaussian, w ~ N(w0, Lambda) with one variance a filter, and the variances minimise

    E_w[loss] + beta 2 KL(N(w0, Lambda) || N(0, lambda^2 I)),

with one prior variance lambda^2 a layer, learned along. A small variance marks a filter that the task needs; 1 /
variance takes the place of the Fisher. Where the loss is quadratic in the noise, 1 / variance = F / (2 beta) + 1 /
lambda^2 with F the filter's mean diagonal Fisher: :func:`fixed_point`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# Functions whose second argument is a weight of filters along its first axis, with their axis of channels.
_LAYERS: dict[Callable, int | None] = {F.linear: None, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
# Added to squared inputs, so that a filter without input has noise, too; as in the public code.
_FLOOR = 1e-2
LOSSES = {"softmax": F.cross_entropy, "sigmoid": F.binary_cross_entropy_with_logits}


@dataclass(frozen=True)
class RobustFisher:
    """What :func:`variational_fisher` learned, by parameter name: ``log_variance`` [O] and ``log_prior`` [],

    the logarithms of each filter's variance and of each layer's lambda^2; ``losses``: the mean loss of each epoch,
    without the divergence; ``num_examples`` seen in an epoch.
    """

    log_variance: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    losses: tuple[float, ...]
    num_examples: int

    @property
    def precision(self) -> dict[str, Tensor]:
        """1 / variance of each filter, [O]: the entries of the embedding."""
        return {name: (-v).exp() for name, v in self.log_variance.items()}

    @property
    def scale(self) -> dict[str, Tensor]:
        """1 / lambda^2 of each filter's layer, [O]: what the precision is where the task needs nothing."""
        return {name: (-self.log_prior[name]).exp().expand_as(v) for name, v in self.log_variance.items()}


class WeightNoise(TorchFunctionMode):
    """While active, linear layers and convolutions with these weights answer as if the weights were noisy.

    By the local reparametrisation trick (Kingma et al., 2015): noise is added to the outputs, whose variance is that of
    the filter times the sum of the squared inputs that it sees, which all filters of a group share. ``weights``: at
    least two axes, filters along the first. ``generator`` draws the noise; torch's own where it is None.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, w in weights.items():
            if w.dim() < 2:
                raise ValueError(f"{name!r} is {list(w.shape)}: noise is for weights of at least two axes")
        self.weights, self.generator = dict(weights), generator
        self._names = {id(w): name for name, w in weights.items()}
        self.met: set[str] = set()
        # First guesses, as in the public code: a twentieth of the weights' variance in the filter; their mean square.
        self.log_variance = {
            name: (0.05 * w.detach().flatten(1).var(1).nan_to_num() + 1e-8).log().requires_grad_()
            for name, w in weights.items()
        }
        self.log_prior = {
            name: (w.detach().square().mean() + 1e-8).log().requires_grad_() for name, w in weights.items()
        }

    def parameters(self) -> list[Tensor]:
        return [*self.log_variance.values(), *self.log_prior.values()]

    def divergence(self) -> Tensor:
        """Twice the KL divergence from the prior, of all weights together."""
        total = torch.zeros(())
        for name, w in self.weights.items():
            variance, prior = self.log_variance[name], self.log_prior[name]
            each = w[0].numel()
            spread = w.detach().square().sum() + each * variance.exp().sum()
            total = total + spread / prior.exp() + w.numel() * (prior - 1) - each * variance.sum()
        return total

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            # It would hand itself over to this mode again: inside of it, only what it calls shall.
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if func not in _LAYERS:
            return output
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if (name := self._names.get(id(weight))) is None:
            return output
        self.met.add(name)
        axis, variance = _LAYERS[func], self.log_variance[name].exp()
        energy = x.square() + _FLOOR
        if axis is None:
            energy = energy.sum(-1, keepdim=True)
        else:
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            ones = weight.detach().new_ones((groups, *weight.shape[1:]))
            rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
            energy = func(energy, ones, None, *args[3:], **rest).repeat_interleave(len(weight) // groups, 1)
            variance = variance.view(-1, *[1] * (weight.dim() - 2))
        noise = torch.empty_like(output).normal_(generator=self.generator)
        return output + (variance * energy).clamp_min(1e-30).sqrt() * noise


@contextmanager
def _only(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone."""
    required, wanted = [(p, p.requires_grad) for p in model.parameters()], {id(p) for p in trained}
    try:
        for p, _ in required:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, before in required:
            p.requires_grad_(before)


def variational_fisher(
    model: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    parameters: Sequence[str] | None = None,
    *,
    head: Iterable[nn.Parameter] = (),
    likelihood: str = "softmax",
    epochs: int = 1,
    beta: float = 1e-7,
    learning_rate: float = 1e-2,
    head_learning_rate: float = 5e-4,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> RobustFisher:
    """Learn the variances by Adam, with the public code's settings where none are given.

    ``batches(epoch)`` yields (inputs, targets): codes, or 0-1 vectors for ``likelihood="sigmoid"``. ``parameters``: the
    names of the weights to make noisy, by default all of at least two axes but those of ``head``, whose parameters are
    trained along. The model runs in the mode that it is in, its own weights unchanged. Raises ValueError for a weight
    that no linear layer or convolution uses, naming it, and for a loss that is not finite.
    """
    if likelihood not in LOSSES:
        raise ValueError(f"likelihood is {likelihood!r}, expected one of {', '.join(LOSSES)}")
    if epochs < 1 or not beta > 0:
        raise ValueError(f"epochs is {epochs} and beta {beta}, expected at least 1 and a positive number")
    head, named = list(head), dict(model.named_parameters())
    if parameters is None:
        parameters = [k for k, p in named.items() if p.dim() > 1 and all(p is not q for q in head)]
    if missing := [name for name in parameters if name not in named]:
        raise ValueError(f"the model has no parameter {missing[0]!r}")
    noise = WeightNoise({name: named[name] for name in parameters}, generator)
    groups = [{"params": noise.parameters()}]
    if head:
        groups.append({"params": head, "lr": head_learning_rate})
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    losses, seen = [], 0
    with _only(model, head):
        for epoch in range(epochs):
            total, seen = 0.0, 0
            for x, y in tqdm(batches(epoch), desc=f"variances, epoch {epoch + 1}", disable=not progress, leave=False):
                with noise:
                    output = model(x)
                if strangers := _not_met(noise):
                    raise ValueError(
                        f"parameter {strangers[0]!r} is not the weight of a linear layer or a convolution of this "
                        "network's forward: leave it out of `parameters`"
                    )
                loss = LOSSES[likelihood](output, y)
                if not math.isfinite(value := float(loss.detach())):
                    raise ValueError(f"the loss is {value} in epoch {epoch + 1}, after {seen} examples")
                optimizer.zero_grad()
                (loss + beta * noise.divergence().to(loss)).backward()
                optimizer.step()
                total, seen = total + value * len(x), seen + len(x)
            if not seen:
                raise ValueError(f"there are no examples in epoch {epoch + 1}")
            losses.append(total / seen)
    return RobustFisher(
        {name: v.detach() for name, v in noise.log_variance.items()},
        {name: v.detach() for name, v in noise.log_prior.items()},
        tuple(losses),
        seen,
    )


def _not_met(noise: WeightNoise) -> list[str]:
    """The weights that no layer has used so far."""
    return [name for name in noise.weights if name not in noise.met]


def fixed_point(
    diagonal: Mapping[str, Tensor], weights: Mapping[str, Tensor], beta: float = 1e-7, rounds: int = 10_000
) -> RobustFisher:
    """What the variances converge to where the loss is quadratic in the noise, from one Fisher.

    ``diagonal``: {name: [O]}, the Fisher of each filter's weights on average, as ``fisher(..., granularity="filter")``
    gives it; ``weights`` those of these names. 1 / variance = F / (2 beta) + 1 / lambda^2, and lambda^2 is the mean of
    w^2 + variance.
    """
    log_variance, log_prior = {}, {}
    for name, f in diagonal.items():
        w = weights[name].detach()
        if w.dim() < 2:
            continue
        squares = w.double().square().mean()
        prior = squares.clamp_min(1e-30)
        for _ in range(rounds):
            variance = 1 / (f.double() / (2 * beta) + 1 / prior)
            before, prior = prior, squares + variance.mean()
            if float((prior - before).abs() / prior) < 1e-13:
                break
        log_variance[name], log_prior[name] = variance.log(), prior.log()
    return RobustFisher(log_variance, log_prior, (), getattr(diagonal, "num_examples", 0))
