"""Estimate the Fisher of a task from the forward passes that gave its features.

A head can only be fitted when the features of all examples are known, and the cotangents need the head. Usually the
network therefore runs twice over each example: once for its features, and once for its Fisher. Here the first pass
keeps the autograd graphs of its batches, as far as a budget of memory allows, and the Fisher is backpropagated through
these graphs.

Examples get different numbers of cotangents, and the batches of the first pass do not know about it: a backward pass
through a kept graph costs as much as its whole batch. So each kept graph takes the first few cotangents of its
examples only, and the few examples that need more are visited once more, those with equal needs together.
:func:`passes_through_graphs` chooses the number that costs the least. The network's last layer is the head, so the
cotangents u [K, N, C] of the logits become the cotangents u W of the features, with W the head's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..gradients.checkpointing import Regions
from ..gradients.graph import TRANSPOSES, VIEWS
from ..gradients.ownership import nodes_of
from ..gradients.recorder import FisherRecorder, ParameterFilter
from .allocation import FORWARD, OVERHEAD, Allocation
from .batches import Batch, Draws, Schedule, forward_passes
from .cotangents import cotangents
from .diagonal import FisherDiagonal, diagonal_of
from .likelihoods import Likelihood, get_likelihood
from .moments import NamedMoments, Units
from .sketches import packed

DIRECTIONS = 16  # outputs of a FeatureTap


# The features behind each output of a tap, as long as the output exists. They are no attribute of the tap, so that all
# taps of a network are alike: the verdict of its self-check then serves the next task, too.
_FEATURES = WeakTensorKeyDictionary()


class FeatureTap(nn.Module):
    """A head that remembers its input, the features. Its own output is only for the self-check.

    The output holds random projections of the features. The self-check measures differences of outputs by their
    spread, and features behind a ReLU may be zero for the most part.

    Args:
        dim: The number of features of an example.
    """

    directions: Tensor  # [outputs, dim]

    def __init__(self, dim: int) -> None:
        super().__init__()
        directions = torch.randn(DIRECTIONS, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions)

    def forward(self, features: Tensor) -> Tensor:
        # The size of one axis, not the shape: the self-check's proof allows no look at the number of examples.
        if features.dim() != 2 or features.size(1) != self.directions.shape[1]:
            raise ValueError(
                f"the features before the head are {list(features.shape)}, expected "
                f"[{len(features)}, {self.directions.shape[1]}]: one feature vector for each example"
            )
        output = F.linear(features, self.directions)
        _FEATURES[output] = features
        return output

    def features_of(self, output: Tensor) -> Tensor:
        """Return the features that gave an output of this module, or a view of an output."""
        whole = output if output._base is None else output._base
        if whole.shape != output.shape or whole not in _FEATURES:
            raise ValueError("the network's output is not that of its head: a probe must end with its head")
        return _FEATURES[whole]


@dataclass
class _Kept:
    """A batch of the first pass whose graph is kept."""

    inputs: Tensor  # [N, ...]
    features: Tensor  # [N, D], with their graph


@dataclass
class _Rest:
    """Examples of a kept batch that need more cotangents than go through the graph."""

    examples: Tensor  # their numbers, int64 [R]
    inputs: Tensor  # [R, ...]
    directions: Tensor  # the cotangents of the features that are left, [K, R, D]
    counts: Tensor  # how many of them each example has, int64 [R]
    squares: dict[str, Tensor]  # sums over the other cotangents, [R, O]; empty where there are none


class OneForward:
    """A first pass over examples, and their Fisher. Use :func:`one_forward` to make one.

    Call :meth:`features` once, and then :meth:`fisher` once.
    """

    def __init__(
        self, recorder: FisherRecorder, run: Callable[[Iterable], Iterator[Batch]], tap: FeatureTap, budget: int
    ) -> None:
        self._recorder, self._run, self._tap, self._budget = recorder, run, tap, budget
        self._kept: list[_Kept] = []
        self._moments = NamedMoments()
        self._written = False  # whether the network writes over its inputs, which then cannot serve again

    @property
    def kept(self) -> int:
        """The number of examples whose graphs are kept. They are the first ones."""
        return sum(len(batch.features) for batch in self._kept)

    def features(self, loader: Iterable[Tensor]) -> Iterator[Tensor]:
        """Run the network over batches of inputs [N, ...], and yield their features [N, D] without a graph.

        The graphs of the first batches are kept, until one does not fit into the budget.
        """
        left: float = self._budget
        for inputs, features in self._passes(loader):
            left -= graph_bytes(features, self._recorder.regions) + inputs.numel() * inputs.element_size()
            if left < 0 or self._written:
                left = -math.inf  # no later batch either, so that the kept examples are the first ones
            else:
                self._kept.append(_Kept(inputs, features))
            yield features.detach()

    def fisher(
        self,
        head: nn.Linear,
        count: int,
        visit: Callable[[list[Tensor]], Iterable[Tensor]],
        batch_size: int,
        estimator: str = "deflated",
        samples: int = 2,
        *,
        likelihood: str | Likelihood = "softmax",
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        allocation: Allocation | None = None,
        seed: int = 0,
    ) -> FisherDiagonal:
        """Estimate the Fisher by filter: :func:`t2v_fast.fisher` of the network with this head, to rounding.

        Args:
            head: The head.
            count: The number of examples.
            visit: ``visit([int64 [b], ...])`` yields the inputs of batches of examples, given by their numbers. It is
                called for the examples without a kept graph.
            batch_size: The most examples of a batch.
            estimator: As for :func:`t2v_fast.fisher`, except ``"batch_mean"``.
            samples: As for :func:`t2v_fast.fisher`.
            likelihood: As for :func:`t2v_fast.fisher`.
            labels: The labels of all examples, for ``"empirical"``.
            weights: As for :func:`t2v_fast.fisher`.
            allocation: How many ``deflated`` cotangents each example gets. Only its ``samples`` are used, since every
                example is visited.
            seed: As for :func:`t2v_fast.fisher`.

        Returns:
            The Fisher and its standard errors.

        Raises:
            UnsupportedError: A parameter has no exact per-example gradient.
            SelfCheckError: The self-check failed.
            ValueError: The weights of all examples are zero, or a value is not finite.
        """
        model = get_likelihood(likelihood)
        weight, bias = (t.detach().to("cpu", torch.float64) for t in (head.weight, head.bias))
        each = None if allocation is None else allocation.samples
        others = torch.arange(self.kept, count)
        batches = list(others.split(batch_size)) if len(others) else []
        if each is not None:
            batches = by_need(each[others], others, batch_size)
        order = torch.cat([torch.arange(self.kept), *batches])
        schedule = Schedule(samples if each is None else each, seed, weights, examples=order)

        def directions(features: Tensor) -> tuple[Tensor, Tensor, Draws]:
            """The cotangents of the next batch's features, [K, N, D], and how many each example has, [N]."""
            draws = schedule.take(len(features))
            logits = F.linear(features.detach().to("cpu", torch.float64), weight, bias)
            targets = None if labels is None else labels[draws.examples]
            u = cotangents(logits, estimator, draws.samples, model, targets, draws.source)
            if each is None:
                counts = torch.full((len(features),), len(u))
            else:
                u, counts = packed(u)
                u = u if len(u) else u.new_zeros(1, *u.shape[1:])
            precise = torch.promote_types(features.dtype, torch.float32)
            u, w = u.to(features.device, precise), weight.to(features.device, precise)
            return (u @ w).to(features.dtype), counts, draws

        rest = self._through_graphs(directions, each, batch_size)
        for _, features in self._passes(visit(batches) if batches else ()):
            v, _, draws = directions(features)
            self._moments.add(self._recorder.backward(features, v), Units(draws.weights))
        self._visit_again(rest, weights, batch_size)
        schedule.check_finished()
        if not self._moments.weight > 0:
            raise ValueError("the weights of all examples are zero")
        return diagonal_of(self._moments, self._recorder, estimator, schedule.mean_samples(), schedule.seen)

    def _through_graphs(
        self, directions: Callable[[Tensor], tuple[Tensor, Tensor, Draws]], each: Tensor | None, batch_size: int
    ) -> list[_Rest]:
        """Backpropagate the first cotangents of the kept batches. Return the examples that need more of them."""
        passes = None
        if each is not None:
            passes = passes_through_graphs([len(batch.features) for batch in self._kept], each[: self.kept], batch_size)
        rest = []
        while self._kept:
            batch = self._kept.pop(0)  # so that its graph is freed
            v, counts, draws = directions(batch.features)
            done = len(v) if passes is None else min(passes, len(v))
            squares = self._recorder.backward(batch.features, v[:done]) if done else {}
            more = counts > done if done else torch.ones_like(counts, dtype=torch.bool)
            if not more.all():
                whole = {name: q[~more.to(q.device)] for name, q in squares.items()}
                self._moments.add(whole, Units(draws.weights[~more]))
            if more.any():
                there = more.to(v.device)
                part = {name: q[there] for name, q in squares.items()}
                examples = torch.as_tensor(draws.examples)[more]
                rest.append(_Rest(examples, batch.inputs[there], v[done:, there], counts[more] - done, part))
        return rest

    def _visit_again(self, rest: list[_Rest], weights: Tensor | None, batch_size: int) -> None:
        """Backpropagate what is left, and add the sums over all cotangents to the moments."""
        if not rest:
            return
        most = max(len(r.directions) for r in rest)
        v = torch.cat([F.pad(r.directions, (0, 0, 0, 0, 0, most - len(r.directions))) for r in rest], 1)
        inputs, examples, counts = (
            torch.cat([getattr(r, of) for r in rest]) for of in ("inputs", "examples", "counts")
        )
        squares = {name: torch.cat([r.squares[name] for r in rest]) for name in rest[0].squares}
        a = torch.ones(len(examples)) if weights is None else weights[examples]
        batches = by_need(counts, torch.arange(len(counts)), batch_size)
        for rows, (_, features) in zip(batches, self._passes(inputs[rows] for rows in batches), strict=True):
            passes = max(1, int(counts[rows].max()))
            found = self._recorder.backward(features, v[:passes, rows])
            for name, q in squares.items():
                found[name] += q[rows]
            self._moments.add(found, Units(a[rows]))

    def _passes(self, loader: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the network over batches; yield the inputs and the features, with their graph."""
        inputs: list[Tensor] = []

        def noted() -> Iterator[Tensor]:
            for x in loader:
                version = 0 if x.is_inference() else x._version
                inputs[:] = [x]
                yield x
                self._written |= not x.is_inference() and x._version != version

        for batch in self._run(noted()):
            (x,) = inputs
            yield x, self._tap.features_of(batch.logits)


@contextmanager
def one_forward(
    network: nn.Module,
    tap: FeatureTap,
    parameters: ParameterFilter = None,
    *,
    budget: int,
    unsupported: str = "error",
    self_check: bool = True,
) -> Iterator[OneForward]:
    """Prepare a network for one forward pass that serves its features and its Fisher.

    Args:
        network: A network that ends with ``tap``. It is as it was when the context ends.
        tap: The head of the network.
        parameters: As for :func:`t2v_fast.fisher`.
        budget: Bytes that the inputs and activations of kept batches may take, as :func:`graph_bytes` counts them.
        unsupported: As for :func:`t2v_fast.fisher`.
        self_check: As for :func:`t2v_fast.fisher`.

    Returns:
        A context whose value makes the two passes.
    """
    recorder = FisherRecorder(network, parameters, unsupported=unsupported)
    device = next(iter(recorder.parameters.values())).device
    with forward_passes(recorder, _run, device, self_check=self_check) as run:
        yield OneForward(recorder, run, tap, budget)


def _run(network: nn.Module, inputs: Tensor) -> Tensor:
    return network(inputs)


def graph_bytes(output: Tensor, regions: Regions | None = None) -> int:
    """Estimate the memory that the graph of ``output`` keeps: the outputs of all nodes that are not views.

    The estimate is high. It counts the outputs that no node saves, and layers that work in place twice. Of a
    checkpointed region, it counts what is used outside.
    """
    region_of = (regions or Regions()).region_of()
    total, nodes = 0, nodes_of(output)
    inside = {node: region for node in nodes if (region := region_of(node)) is not None}
    edges = [(node, child) for node in nodes for child, _ in node.next_functions if child is not None]
    used_outside = {child for node, child in edges if inside.get(child) is not inside.get(node)}
    moving = VIEWS | TRANSPOSES
    for node in nodes:
        if node.name() not in moving and node.next_functions and (node not in inside or node in used_outside):
            total += sum(math.prod(of.shape) * of.dtype.itemsize for of in node._input_metadata)
    return total


def by_need(counts: Tensor, examples: Tensor, size: int) -> list[Tensor]:
    """Divide examples with ``counts`` [n] cotangents into batches that cost the least, those that need the most first.

    Args:
        counts: The number of cotangents of each example, int64 [n].
        examples: The numbers of the examples, int64 [n].
        size: The most examples of a batch.

    Returns:
        The numbers of each batch's examples.
    """
    every = Allocation(counts, torch.arange(len(counts)), torch.ones(len(counts), dtype=torch.float64))
    return [examples[rows] for rows in every.ordered().batches(size)]


def passes_through_graphs(sizes: Sequence[int], counts: Tensor, size: int) -> int:
    """Choose how many cotangents of each example go through the kept graphs.

    The others go through the graphs of new forward passes, over batches of examples with equal needs. The costs are
    those of :meth:`t2v_fast.estimation.allocation.Allocation.batches`.

    Args:
        sizes: The number of examples of each kept batch.
        counts: The number of cotangents of each kept example, int64 [N].
        size: The most examples of a new batch.

    Returns:
        The number that costs the least. With 0, no kept graph is used.

    Example:
        A few examples that need many cotangents are visited again. Many that need one more are not:

        >>> passes_through_graphs([8, 8], torch.tensor([9, *[1] * 15]), size=8)
        1
        >>> passes_through_graphs([8, 8], torch.tensor([2] * 16), size=8)
        2
    """
    if not len(counts):
        return 0
    most = [int(part.max()) for part in counts.split(list(sizes))]
    best, least = 0, math.inf
    for passes in range(max(most) + 1):
        cost = sum((n + OVERHEAD) * min(passes, k) for n, k in zip(sizes, most, strict=True))
        if cost >= least:
            break
        left = counts[counts > passes] - passes
        for rows in by_need(left, torch.arange(len(left)), size):
            cost += (len(rows) + OVERHEAD) * (FORWARD + int(left[rows].max()))
        if cost < least:
            best, least = passes, cost
    return best
