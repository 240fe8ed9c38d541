"""A case of the coverage study, and the inputs that several kinds of cases share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any  # a tensor, a tuple of tensors or a mapping of tensors, examples along the first axis of each
Made = tuple[nn.Module, list[Inputs]]  # a network and its batches

EXACT = "exact"
# What the messages of rightful refusals say.
COUPLED = r"interact|alone|coupl|other examples|across examples|batch|shared out"
RANDOM = r"random|dropout|stochastic|draw|alone"


@dataclass(frozen=True)
class Case:
    """One network, the batches it is given, and what must become of it.

    ``make()`` returns the network and its batches; the judge seeds torch before. ``expect`` is ``"exact"``, or the
    reason why no exact answer exists, in words. A refusal is then due, and its message must match ``message``.
    ``ways``: the interfaces that are tried. FisherRecorder alone cannot see a coupling that leaves no trace in the
    graph, such as detached statistics of the batch, since it never runs the network; fisher() can.
    ``may_refuse``: where an exact answer exists but the library may say that it gives none, for a reason that matches.
    ``vary``: draw anew the parameters that initialisation makes constant. ``double``: compute in float64.
    """

    kind: str
    name: str
    make: Callable[[], Made] = field(repr=False)
    expect: str = EXACT
    message: str = ""
    may_refuse: str = ""
    ways: tuple[str, ...] = ("recorder", "fisher")
    train: bool = False
    vary: bool = True
    double: bool = True
    thorough: bool = False  # all modes and granularities, also where the default agrees
    trainable: bool = False  # only the parameters that the network's maker left trainable are wanted
    parameters: tuple[str, ...] = ()  # regular expressions of the wanted parameters; all where empty
    unsupported: tuple[str, ...] = ("error", "exact")  # the modes that are tried, until one does not refuse
    labels: Callable[[int], Tensor] | None = field(default=None, repr=False)  # of n examples, for logits as they are
    forward: Callable[[nn.Module, Inputs], Tensor] | None = field(default=None, repr=False)
    tolerance: float = 1e-9

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    def wanted(self, name: str) -> bool:
        return not self.parameters or any(re.search(pattern, name) for pattern in self.parameters)

    def call(self, network: nn.Module, inputs: Inputs) -> Tensor:
        """The network's output for a batch, examples along the first axis."""
        if self.forward is not None:
            return self.forward(network, inputs)
        if isinstance(inputs, Mapping):
            return network(**inputs)
        return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def images(size: int, counts: Sequence[int] = (3, 2), channels: int = 3) -> list[Tensor]:
    """Batches of images of noise."""
    return [torch.randn(n, channels, size, size) for n in counts]


# Three batches of padded sequences. The second and the third have as many tokens, shared out in another way.
LENGTHS = ((6, 4, 2), (3, 3), (5, 1))


def texts(
    lengths: Sequence[Sequence[int]] = LENGTHS, longest: int = 6, vocabulary: int = 60, first: int = 5
) -> list[dict[str, Tensor]]:
    """Batches of token numbers [N, T], padded on the right with token 0, and their masks.

    ``first`` is the least token number drawn: smaller ones have a meaning in some vocabularies.
    """
    batches = []
    for each in lengths:
        mask = torch.arange(longest) < torch.tensor(each)[:, None]
        tokens = torch.randint(first, vocabulary, mask.shape)
        batches.append({"input_ids": tokens * mask, "attention_mask": mask.long()})
    return batches
