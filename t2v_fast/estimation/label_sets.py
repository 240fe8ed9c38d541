"""Estimate the Fishers of several label sets over the same images, from one forward pass.

The heads of all label sets stand side by side. A label set's cotangents are zero on the logits of the other label sets,
so its Fisher is the one that it would have alone. The forward pass, and whatever depends on the layers' inputs alone
(Gram matrices, unfolded or transformed inputs), is computed once. Where an example needs fewer cotangents of one label
set than its batch has passes, cotangents of another label set take the free places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gradients.recorder import FisherRecorder, ParameterFilter
from ..ops.asynchronous import to_device
from .allocation import Allocation
from .batches import Batch, Draws, Schedule, forward_passes
from .cotangents import check_estimator, cotangents
from .diagonal import FisherDiagonal, diagonal_of
from .likelihoods import Likelihood, get_likelihood
from .moments import NamedMoments, Units

LONGEST_SKIP = 4096  # the most examples whose random numbers are skipped at once


@dataclass(frozen=True)
class LabelSet:
    """One task over the images.

    Args:
        head: The fitted head.
        codes: The labels of all examples: class indices [N], or targets [N, C].
        weights: The weights of the examples, [N]; by default all count the same.
        allocation: How many ``deflated`` cotangents each example gets, where they differ. Only its ``samples`` are
            used, since every example is visited.
    """

    head: nn.Linear
    codes: Tensor
    weights: Tensor | None = None
    allocation: Allocation | None = None


class Heads(nn.Module):
    """The heads of all label sets, whose logits are concatenated. Each head's logits are bit-identical to its own.

    One wide linear layer would round differently. Where eigenvalues of a head's Fisher nearly coincide, a rounding
    error is enough for ``deflated`` to choose another basis, and so another random estimate.
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
    """Estimate the diagonal Fisher of each label set by filter: :func:`t2v_fast.fisher` of each, to rounding.

    One process may compute a part of the examples, with the random numbers of a single process: see ``first`` and
    ``reduce``.

    Args:
        network: A network that ends with :class:`Heads`.
        batches: Images [N, 3, H, W], in the order of the codes or of ``examples``.
        sets: The label sets.
        estimator: As for :func:`t2v_fast.fisher`, except ``"batch_mean"``.
        samples: The cotangents of each example, for label sets without an allocation.
        likelihood: As for :func:`t2v_fast.fisher`.
        parameters: As for :func:`t2v_fast.fisher`.
        unsupported: As for :func:`t2v_fast.fisher`.
        seed: As for :func:`t2v_fast.fisher`.
        self_check: As for :func:`t2v_fast.fisher`.
        first: The number of the first example of this process.
        examples: The numbers of the examples in the order of ``batches``, int64 [n]. By default they come in the order
            of the codes, starting with ``first``. Another order needs an allocation in every label set, since the
            examples otherwise draw from one generator.
        reduce: Adds up moments (in place) and numbers of examples over the processes: ``reduce(moments, count)``
            returns the total count.

    Returns:
        The result of each label set.

    Raises:
        UnsupportedError: A parameter has no exact per-example gradient.
        SelfCheckError: The self-check failed.
        ValueError: An argument or a batch does not fit, or the number of examples differs from the number of codes.
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
    sizes = [s.head.out_features for s in sets]
    total = sum(sizes)
    seen = 0
    adds_up = reduce is not None
    with forward_passes(recorder, _run, device, self_check=self_check, adds_up=adds_up, parts=sizes) as batches_of:
        for batch in batches_of(batches):
            if list(batch.logits.shape) != [batch.size, total]:
                raise ValueError(
                    f"the network gave logits {list(batch.logits.shape)}, expected [{batch.size}, {total}]"
                )
            draws = [schedule.take(batch.size) for schedule in schedules]
            blocks = _cotangents(batch, sets, draws, estimator, likelihood)
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
    batch: Batch, sets: Sequence[LabelSet], draws: Sequence[Draws], estimator: str, likelihood: Likelihood
) -> list[Tensor]:
    """Return each label set's cotangents [K, N, C of all sets], which are zero on the logits of the others."""
    logits = batch.logits
    blocks, start = [], 0
    for s, d in zip(sets, draws, strict=True):
        stop = start + s.head.out_features
        codes = s.codes[d.examples]
        u = cotangents(logits[:, start:stop], estimator, d.samples, likelihood, codes, d.source, checks=batch.checks)
        blocks.append(F.pad(u, (start, logits.shape[1] - stop)))
        start = stop
    return blocks


def _packed(recorder: FisherRecorder, logits: Tensor, blocks: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return the sums of squares of each block of cotangents [K, N, C], from as few backward passes as possible.

    A pass has one cotangent for each example, from any block. Cotangents that are zero are left out.
    """
    u = torch.cat(list(blocks))
    there = u.any(2).cpu()  # [all K, N]; on a CUDA device the host waits here, and nowhere else
    block = torch.cat([torch.full((len(b),), k) for k, b in enumerate(blocks)])
    place, example = there.nonzero(as_tuple=True)
    at = there.cumsum(0)[place, example] - 1  # the pass of each cotangent
    passes = u.new_zeros(max(1, int(there.sum(0).max())), *u.shape[1:])
    owner = torch.zeros(passes.shape[:2], dtype=torch.long)
    owner[at, example] = block[place]
    owner, at, place, example = (to_device(t, u.device) for t in (owner, at, place, example))
    passes[at, example] = u[place, example]
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
    """Advance the generator by the random numbers of ``count`` examples."""
    for start in range(0, count, LONGEST_SKIP):
        n = min(LONGEST_SKIP, count - start)
        if estimator != "empirical":
            cotangents(torch.zeros(n, classes), estimator, samples, likelihood, generator=generator)
