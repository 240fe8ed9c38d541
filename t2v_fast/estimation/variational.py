"""The robust Fisher: how much noise each filter of a network tolerates (Achille et al., 2019, section 3.2).

The weights become Gaussian, w ~ N(w0, Lambda), with one variance for each filter. The variances minimise::

    E_w[loss] + beta 2 KL(N(w0, Lambda) || N(0, lambda^2 I))

Each layer has a prior variance lambda^2, which is learned too. A small variance marks a filter that the task needs, and
1 / variance takes the place of the Fisher. Where the loss is quadratic in the noise, and F is the filter's mean
diagonal Fisher, 1 / variance = F / (2 beta) + 1 / lambda^2: see :func:`fixed_point`.
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

from ..gradients.checkpointing import not_checkpointed
from ..gradients.compiled import eager
from ..gradients.graph import UnsupportedError
from ..gradients.tensor_parallel import is_distributed
from ..gradients.wrappers import named_parameters, network_of, original_name

# Functions whose second argument is a weight with filters along its first axis, and the axis of their channels.
_LAYERS: dict[Callable, int | None] = {F.linear: None, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
# Added to squared inputs, as in Task2Vec's public code, so that a filter without input has noise too.
_FLOOR = 1e-2
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": F.cross_entropy,
    "sigmoid": F.binary_cross_entropy_with_logits,
}


@dataclass(frozen=True)
class RobustFisher:
    """The result of :func:`variational_fisher`.

    Args:
        log_variance: By parameter name, the logarithm of each filter's variance, [O].
        log_prior: By parameter name, the logarithm of the layer's prior variance lambda^2, a scalar.
        losses: The mean loss of each epoch, without the KL divergence.
        num_examples: The number of examples of an epoch.
    """

    log_variance: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    losses: tuple[float, ...]
    num_examples: int

    @property
    def precision(self) -> dict[str, Tensor]:
        """1 / variance of each filter by parameter name, [O]: the entries of the embedding."""
        return {name: (-v).exp() for name, v in self.log_variance.items()}

    @property
    def scale(self) -> dict[str, Tensor]:
        """1 / lambda^2 of each filter's layer, [O]: the precision of a filter that the task does not need."""
        return {name: (-self.log_prior[name]).exp().expand_as(v) for name, v in self.log_variance.items()}


class WeightNoise(TorchFunctionMode):
    """A context in which linear layers and convolutions with given weights compute as if the weights were noisy.

    By the local reparametrisation trick (Kingma et al., 2015), the noise is added to the outputs. Its variance is the
    filter's variance times the sum of the squared inputs that the filter sees, which all filters of a group share.

    Args:
        weights: The weights by name, each with at least two axes, and filters along the first.
        generator: Draws the noise; by default torch's own generator.

    Raises:
        ValueError: A weight has fewer than two axes.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, w in weights.items():
            if w.dim() < 2:
                raise ValueError(f"{name!r} is {list(w.shape)}: noise is for weights of at least two axes")
        self.weights, self.generator = dict(weights), generator
        self._names = {id(w): name for name, w in weights.items()}
        self.met: set[str] = set()
        # Initial values, as in the public code: a twentieth of the variance of the filter's weights, and the weights'
        # mean square.
        self.log_variance = {
            name: (0.05 * w.detach().flatten(1).var(1).nan_to_num() + 1e-8).log().requires_grad_()
            for name, w in weights.items()
        }
        self.log_prior = {
            name: (w.detach().square().mean() + 1e-8).log().requires_grad_() for name, w in weights.items()
        }

    def parameters(self) -> list[Tensor]:
        """Return the logarithms of all variances and prior variances."""
        return [*self.log_variance.values(), *self.log_prior.values()]

    def divergence(self) -> Tensor:
        """Return twice the KL divergence from the prior, summed over all weights."""
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
            # It would dispatch to this mode again. Only the functions that it calls should.
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
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
        variance = self.output_variance(name, func, x.square() + _FLOOR, args[3:], rest)
        noise = torch.empty_like(output).normal_(generator=self.generator)
        return output + variance.clamp_min(1e-30).sqrt() * noise

    def output_variance(
        self, name: str, func: Callable, energy: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return the variance of a layer's outputs.

        Args:
            name: The name of the layer's weight.
            func: The layer's function.
            energy: The squared inputs.
            args: The function's arguments after input, weight and bias.
            kwargs: Its keyword arguments, without these three.

        Returns:
            A tensor that broadcasts to the outputs' shape.
        """
        variance, weight = self.log_variance[name].exp(), self.weights[name]
        if _LAYERS[func] is None:
            return variance * energy.sum(-1, keepdim=True)
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        ones = weight.detach().new_ones((groups, *weight.shape[1:]))
        energy = func(energy, ones, None, *args, **kwargs).repeat_interleave(len(weight) // groups, 1)
        return variance.view(-1, *[1] * (weight.dim() - 2)) * energy


@contextmanager
def _only(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Require gradients of these parameters alone; at the end, restore the setting of every parameter."""
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
    """Learn the variances and the prior variances by Adam. The defaults are the settings of Task2Vec's public code.

    The model runs in its current mode, and its own weights do not change.

    Args:
        model: The network.
        batches: ``batches(epoch)`` yields (inputs, targets). Targets are class indices [N], or 0-1 vectors [N, C] for
            ``"sigmoid"``.
        parameters: The names of the weights that become noisy. By default these are all parameters of at least two
            axes, except those of ``head``.
        head: Parameters that are trained at the same time.
        likelihood: ``"softmax"`` or ``"sigmoid"``.
        epochs: The number of passes over the data, at least 1.
        beta: The factor of the KL divergence, above 0.
        learning_rate: The learning rate of the variances.
        head_learning_rate: The learning rate of ``head``.
        generator: Draws the noise; by default torch's own generator.
        progress: Show a progress bar.

    Returns:
        The learned variances.

    Raises:
        UnsupportedError: Processes share the network's parameters.
        ValueError: An argument is not valid, no linear layer or convolution uses one of the weights, an epoch has no
            example, or the loss is not finite.
    """
    head, named = list(head), dict(named_parameters(model))
    if (divided := next((name for name, p in named.items() if is_distributed(p)), None)) is not None:
        raise UnsupportedError(f"the parameter {divided!r} is divided over processes, which share no noise: use one")
    if parameters is None:
        parameters = [k for k, p in named.items() if p.dim() > 1 and all(p is not q for q in head)]
    parameters = [name if name in named else original_name(model, name) for name in parameters]
    if missing := [name for name in parameters if name not in named]:
        raise ValueError(f"the model has no parameter {missing[0]!r}")
    noise = WeightNoise({name: named[name] for name in parameters}, generator)
    return learn_variances(
        noise, network_of(model), batches, head, likelihood, epochs, beta, learning_rate, head_learning_rate, progress
    )


def learn_variances(
    noise: WeightNoise,
    model: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    head: Sequence[nn.Parameter] = (),
    likelihood: str = "softmax",
    epochs: int = 1,
    beta: float = 1e-7,
    learning_rate: float = 1e-2,
    head_learning_rate: float = 5e-4,
    progress: bool = False,
) -> RobustFisher:
    """Learn the variances of a given noise: :func:`variational_fisher` has the other arguments, and the errors."""
    if likelihood not in LOSSES:
        raise ValueError(f"likelihood is {likelihood!r}, expected one of {', '.join(LOSSES)}")
    if epochs < 1 or not beta > 0:
        raise ValueError(f"epochs is {epochs} and beta {beta}, expected at least 1 and a positive number")
    groups: list[dict[str, Any]] = [{"params": noise.parameters()}]
    if head:
        groups.append({"params": head, "lr": head_learning_rate})
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    losses, seen = [], 0
    with _only(model, head), eager, not_checkpointed():  # noise is drawn anew where a layer runs again
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
    """Return the weights that no layer has used so far."""
    return [name for name in noise.weights if name not in noise.met]


def fixed_point(
    diagonal: Mapping[str, Tensor], weights: Mapping[str, Tensor], beta: float = 1e-7, rounds: int = 10_000
) -> RobustFisher:
    """Compute the variances that follow from a Fisher where the loss is quadratic in the noise.

    The equations are 1 / variance = F / (2 beta) + 1 / lambda^2, and lambda^2 = mean of w^2 + variance.

    Args:
        diagonal: The mean Fisher of each filter's weights, [O], by parameter name, as
            ``fisher(..., granularity="filter")`` returns it. Parameters with one axis are left out.
        weights: The weights, by the same names.
        beta: The factor of the KL divergence.
        rounds: The most iterations of the two equations.

    Returns:
        The variances, without losses.

    Example:
        >>> found = fixed_point({"w": torch.tensor([0.0, 2.0])}, {"w": torch.ones(2, 3)}, beta=1.0)
        >>> (found.precision["w"] - found.scale["w"]).numpy().round(6).tolist()  # F / (2 beta)
        [0.0, 1.0]
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
