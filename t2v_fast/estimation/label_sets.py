"""The Fishers of several label sets over the same images, from one forward pass.

The heads of all label sets stand side by side. A label set's cotangents are its own on its own
logits and zero on the others', so its Fisher is what it would be alone; the forward pass and all that depends on the
layers' inputs (Gram matrices, unfolded or transformed inputs that the planner keeps) is computed once. Examples that
need fewer cotangents of one label set have room for another's in the same backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gradients.recorder import FisherRecorder, ParameterFilter
from .allocation import Allocation
from .batches import Draws, Schedule, forward_passes
from .cotangents import check_estimator, cotangents
from .diagonal import FisherDiagonal, diagonal_of
from .likelihoods import Likelihood, get_likelihood
from .moments import NamedMoments, Units

LONGEST_SKIP = 4096  # examples whose draws are skipped at once


@dataclass(frozen=True)
class LabelSet:
    """One task: its fitted head, the codes of all examples ([N], or targets [N, C]), their weights [N], and how many
    ``deflated`` cotangents each gets (all examples, in any order), if not equally many."""

    head: nn.Linear
    codes: Tensor
    weights: Tensor | None = None
    allocation: Allocation | None = None


class Heads(nn.Module):
    """The logits of all label sets, side by side, each to the last bit what its head gives alone.

    One wide linear layer would round differently, and where eigenvalues of a head's Fisher nearly coincide that is
    enough for ``deflated`` to take another basis, and so another draw.
    """

    def __init__(self, sets: Sequence[LabelSet]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(s.head) for s in sets)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self.heads], 1)


def fisher_of_label_sets(
    network: nn.Module,
    batches: Iterable[Tensor],
    sets: Sequence[LabelSet],
    estimator: str = "deflated",
    samples: int = 2,
    *,
    likelihood: str | Likelihood = "softmax",
    parameters: ParameterFilter = None,
    unsupported: str = "error",
    seed: int = 0,
    self_check: bool = True,
    first: int = 0,
    examples: Tensor | None = None,
    reduce: Callable[[list[NamedMoments], int], int] | None = None,
) -> list[FisherDiagonal]:
    """The filter-wise diagonal Fisher of each label set: that of :func:`t2v_fast.fisher` alone, to rounding.

    ``network`` ends with :class:`Heads`; ``batches`` are images [N, 3, H, W] in the order of the codes.

    A process may have only a part of the examples: ``first`` is the number of the first of them, and ``reduce`` adds up
    moments (in place) and numbers of examples over the processes. Random numbers are those of one process. With
    allocations, the examples may come in another order: ``examples`` [n] are their numbers.
    """
    check_estimator(estimator, samples)
    likelihood = get_likelihood(likelihood)
    recorder = FisherRecorder(network, parameters, unsupported=unsupported)
    device = next(iter(recorder.parameters.values())).device
    if examples is None:
        examples = torch.arange(first, len(sets[0].codes))
    schedules = [
        Schedule(samples if s.allocation is None else s.allocation.samples, seed, s.weights, examples=examples)
        for s in sets
    ]
    for s, schedule in zip(sets, schedules, strict=True):
        if s.allocation is None:  # the examples share one generator, so what earlier examples draw comes first
            _skip(first, s.head.out_features, estimator, samples, likelihood, schedule.generator)
    moments = [NamedMoments() for _ in sets]
    total = sum(s.head.out_features for s in sets)
    seen = 0
    with forward_passes(recorder, _run, device, self_check=self_check) as batches_of:
        for batch in batches_of(batches):
            if list(batch.logits.shape) != [batch.size, total]:
                raise ValueError(
                    f"the network gave logits {list(batch.logits.shape)}, expected [{batch.size}, {total}]"
                )
            draws = [schedule.take(batch.size) for schedule in schedules]
            blocks = _cotangents(batch.logits, sets, draws, estimator, likelihood)
            for into, values, d in zip(moments, _packed(recorder, batch.logits, blocks), draws, strict=True):
                into.add(values, Units(d.weights))
            seen += batch.size
    count = seen if reduce is None else reduce(moments, seen)
    if count != len(sets[0].codes):
        raise ValueError(f"the batches gave {count} examples, expected {len(sets[0].codes)}")
    return [diagonal_of(into, recorder, estimator, samples, count) for into in moments]


def _run(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def _cotangents(
    logits: Tensor, sets: Sequence[LabelSet], draws: Sequence[Draws], estimator: str, likelihood: Likelihood
) -> list[Tensor]:
    """Return each label set's cotangents [K, N, C of all sets], which are zero on the logits of the others."""
    blocks, start = [], 0
    for s, d in zip(sets, draws, strict=True):
        stop = start + s.head.out_features
        codes = s.codes[d.examples]
        u = cotangents(logits[:, start:stop], estimator, d.samples, likelihood, codes, d.source)
        blocks.append(F.pad(u, (start, logits.shape[1] - stop)))
        start = stop
    return blocks


def _packed(recorder: FisherRecorder, logits: Tensor, blocks: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """For each block of cotangents [K, N, C] its sums of squares, from as few backward passes as hold those of each
    example that are not zero: a pass has one cotangent for each example, of whichever block."""
    u = torch.cat(list(blocks))
    there = u.any(2)  # [all K, N]
    block = torch.cat([torch.full((len(b),), k) for k, b in enumerate(blocks)])
    place, example = there.nonzero(as_tuple=True)
    at = there.cumsum(0)[place, example] - 1  # in which pass
    passes = u.new_zeros(max(1, int(there.sum(0).max())), *u.shape[1:])
    passes[at, example] = u[place, example]
    owner = torch.zeros(passes.shape[:2], dtype=torch.long, device=u.device)
    owner[at, example] = block.to(u.device)[place]
    every = torch.arange(u.shape[1], device=u.device)
    sums: dict[str, Tensor] = {}  # [blocks, N, ...]
    for own, found in zip(owner, recorder.backward_groups(logits, passes, [1] * len(passes)), strict=True):
        for name, q in found.items():
            if name not in sums:
                sums[name] = q.new_zeros(len(blocks), *q.shape)
            sums[name][own, every] += q
    return [{name: q[k] for name, q in sums.items()} for k in range(len(blocks))]


def _skip(
    count: int, classes: int, estimator: str, samples: int, likelihood: Likelihood, generator: torch.Generator
) -> None:
    """Draw what ``count`` examples draw, so that the next ones get their own numbers."""
    for start in range(0, count, LONGEST_SKIP):
        n = min(LONGEST_SKIP, count - start)
        if estimator != "empirical":
            cotangents(torch.zeros(n, classes), estimator, samples, likelihood, generator=generator)
