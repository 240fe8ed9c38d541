"""Estimate the diagonal Fisher information of a network over a data set: :func:`fisher`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from ..gradients.factors import Factors
from ..gradients.graph import Use, fix_batch_norm_gradients
from ..gradients.ownership import nodes_of
from ..gradients.recorder import FilterAxis, FisherRecorder, ParameterFilter
from ..ops import planner
from ..ops.asynchronous import to_device
from .allocation import Allocation
from .batches import Batch, Draws, Schedule, check_loader, default_forward, default_mask, forward_passes
from .cotangents import ESTIMATORS, check_estimator, cotangents, drawn_cotangents
from .diagonal import FisherDiagonal, check_finite, diagonal_of
from .graphs import GraphedPasses, Passes
from .likelihoods import LIKELIHOODS, Likelihood, get_likelihood
from .moments import DrawnUnits, NamedDrawnExamples, NamedMoments, SideBySide, Strata, Units
from .packing import Texts
from .processes import add_up, shards_of, together
from .sketches import Parts

BATCH_MEAN = "batch_mean"


def fisher(
    model: nn.Module,
    loader: Iterable[Any],
    estimator: str = "deflated",
    samples: int = 2,
    granularity: str = "filter",
    *,
    likelihood: str | Likelihood = "softmax",
    parameters: ParameterFilter = None,
    unsupported: str = "error",
    filter_axis: FilterAxis = None,
    weights: Tensor | None = None,
    seed: int = 0,
    self_check: bool = True,
    device: str | torch.device | None = None,
    forward: Callable[[nn.Module, Any], Tensor] = default_forward,
    mask: Callable[[Any, Tensor | None], Tensor | None] = default_mask,
    level: str = "token",
    shift_labels: bool | None = None,
    packed: bool | None = None,
    channels_last: bool = True,
    progress: bool = False,
    explain: bool = False,
    estimator_error: bool = False,
    allocation: Allocation | None = None,
    cuda_graphs: bool | None = None,
) -> FisherDiagonal:
    """Estimate the diagonal of the Fisher information of ``model`` over the examples of ``loader``.

    With g_n(y) the gradient of -log p(y | x_n) with respect to the parameters w, the result is the diagonal of the
    matrix of Achille et al. (2019), equation 1::

        F = sum_n a_n E_{y ~ p(y | x_n)} [g_n(y) g_n(y)^T]

    Each example has a weight a_n, and the diagonal is averaged over parts of each parameter (``granularity``).
    Gradients are squared for each example inside the backward pass, so no per-example gradient is stored. A batch costs
    one forward pass and the backward passes that the estimator needs. These are the estimators, for logits [N, C] with
    the Fisher S_n of the logits of example n (softmax: diag(p) - p p^T):

    ===============  ==================================================================  ==========================
    ``estimator``    what is squared                                                     backward passes a batch
    ===============  ==================================================================  ==========================
    ``deflated``     leading eigenvectors of S_n and random-sign sketches of the         ``samples``; exact from the
                     others, divided by the spectrum; unbiased, the default              rank of S_n on
    ``exact``        a factor B of S_n, with B B^T = S_n; no sampling error              C - 1 for softmax, else C
    ``hutchinson``   random-sign sketches of the whole factor; unbiased                  ``samples``
    ``monte_carlo``  g_n(y) for ``samples`` labels y drawn from the model; unbiased,     ``samples``
                     but with a large variance for a confident model
    ``empirical``    g_n(y) for the data set's own label y; this is the empirical        1
                     Fisher, a different quantity
    ``batch_mean``   the gradient of the mean loss of the whole batch, with drawn        1
                     labels, as in Task2Vec's public code; another different quantity
    ===============  ==================================================================  ==========================

    **Token models** give logits [N, T, C]: the examples are sequences, and each token has a label. All tokens of a
    sequence share the backward passes of the table, with an independent sign or label for each token: the products of
    two tokens' gradients then vanish in expectation, and the result is unbiased. So even ``estimator="empirical"`` is a
    random-sign estimate with ``level="token"``, not an exact value, and so is ``deflated`` with any number of
    ``samples``. ``exact`` takes one pass for each token and direction, (C - 1) * T for softmax, and has no sampling
    error.

    The model's parameters, its buffers and its mode are left as they are. Call ``model.eval()`` first: batch norm in
    training mode makes examples depend on each other, which only ``batch_mean`` allows.

    Args:
        model: A network that returns logits [N, C] or [N, T, C], or an object that has them as ``logits``.
        loader: Yields (inputs, labels, ...) or inputs alone, with the examples along the first axis. Mappings are
            passed to the model as keyword arguments, without their entry "labels". Only ``empirical`` needs labels.
        estimator: One of the table.
        samples: The number of backward passes of a batch for the sampling estimators, at least 1. ``exact``,
            ``empirical`` and ``batch_mean`` ignore it.
        granularity: ``"filter"``: the mean over all axes of a parameter but the first; ``"tensor"``: the mean over the
            whole parameter; ``"parameter"``: one value for each entry.
        likelihood: ``"softmax"``, ``"sigmoid"`` (C yes-or-no labels), ``"gaussian"`` (regression with unit variance),
            or a :class:`t2v_fast.estimation.likelihoods.Likelihood`.
        parameters: Names, or a function of name and parameter that says which to take; ``"trainable"`` takes those that
            require gradients; by default all, frozen or not.
        unsupported: ``"error"``, ``"exact"`` or ``"skip"``: what to do with a parameter without an exact fast path, as
            for :class:`t2v_fast.FisherRecorder`.
        filter_axis: The axis of a parameter's filters where it is not the first, as for
            :class:`t2v_fast.FisherRecorder`.
        weights: One number of at least 0 for each example, [number of examples], in the order of the loader. They are
            divided by their sum; by default all examples count the same.
        seed: Fixes the random signs and labels. They do not depend on the device, and those of logits [N, C] not on the
            batch size. (With at most 64 classes, ``deflated`` applies the signs differently on a CUDA device, where its
            estimate is another draw.)
        self_check: Compare some examples with plain autograd and with single-example forward passes, and raise an
            error where examples interact or the network is random (:mod:`t2v_fast.estimation.self_check`).
        device: Where inputs are moved to; by default where the first parameter is.
        forward: Runs the model: ``forward(model, inputs)`` returns the logits.
        mask: ``mask(inputs, labels)`` returns which tokens count, [N, T], or None for all. By default it leaves out
            tokens whose ``attention_mask`` is 0 (whose ``decoder_attention_mask`` is 0, for batches with
            ``decoder_input_ids``) and tokens whose label is -100; the label of logits[n, t] is labels[n, t].
        level: For token models: ``"token"`` is the mean over tokens of each token's Fisher; ``"sequence"`` is the mean
            over sequences of a whole sequence's Fisher, which is the sum over its tokens. The standard error counts
            sequences in both.
        shift_labels: True for labels [N, T] that are the tokens themselves, as Hugging Face's collators make them: the
            label of logits[n, t] is then labels[n, t + 1]. Neither padding nor the last token of a sequence counts.
            By default labels are taken as they are, and ``empirical`` refuses labels that equal the ``input_ids``.
        packed: True for rows that hold several sequences one after the other, each of which is an example
            (``DataCollatorWithFlattening``). They are found by ``segments``, ``seq_idx``, ``cu_seq_lens_q``,
            ``cu_seqlens`` or ``position_ids`` in the batch. By default, batches that look so are refused.
        channels_last: On a CPU or a GPU, convert images [N, C, H, W] and convolution weights to that memory format,
            which is faster. A network that fails with such inputs gets the original ones.
        progress: Show a progress bar.
        explain: Print, after the first batch, the path that each convolution and linear layer takes, its predicted
            cost and its measured cost (:mod:`t2v_fast.ops.planner`). Parameters without a predicted cost are left out;
            :func:`t2v_fast.profile` lists all of them.
        estimator_error: Also estimate the error of the random draws alone (``estimator_error`` of the result),
            from a second sketch of each example, which is one more backward pass. For ``deflated``, logits [N, C], and
            granularity ``"filter"`` or ``"tensor"``.
        allocation: Which examples of a larger data set the loader yields, in its order, and how many cotangents each
            gets in place of ``samples`` (:mod:`t2v_fast.estimation.allocation`). ``weights`` are then the weights of
            the whole data set, whose Fisher is estimated. Restricted as ``estimator_error`` is.
        cuda_graphs: On a CUDA device, capture the passes of batches of equal shapes in CUDA graphs and replay them,
            where that is possible; a log line says why it is not (:mod:`t2v_fast.estimation.graphs`). With True from
            the second batch on. With None, the default, once the device has waited for the host for some batches: the
            graphs take memory, and help where the host binds.

    Returns:
        A mapping from parameter names to float64 tensors on the CPU, with standard errors: [O] for a parameter
        [O, ...] with ``"filter"``, the parameter's shape with ``"parameter"``, and a scalar with ``"tensor"``.

    Raises:
        UnsupportedError: A parameter has no exact per-example gradient.
        SelfCheckError: The self-check failed.
        ValueError: An argument or a batch is not valid; the message names what is wrong.
        TypeError: A batch holds no tensor, or the model returns none.

    Example:
        >>> import torch, t2v_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        >>> inputs = torch.randn(6, 4)
        >>> result = t2v_fast.fisher(model, inputs.split(2))  # batches of two examples
        >>> {name: list(values.shape) for name, values in result.items()}
        {'0.weight': [8], '0.bias': [8], '2.weight': [3], '2.bias': [3]}
        >>> exact = t2v_fast.fisher(model, inputs.split(2), "exact")  # two directions, as deflated takes by default
        >>> torch.allclose(result.vector(), exact.vector(), rtol=1e-4)
        True
    """
    if estimator != BATCH_MEAN:
        check_estimator(estimator, samples, (*ESTIMATORS, BATCH_MEAN))
    likelihood = get_likelihood(likelihood)
    _check_options(estimator, granularity, estimator_error, allocation)
    recorder = FisherRecorder(model, parameters, granularity, unsupported=unsupported, filter_axis=filter_axis)
    if recorder.sharding is not None:
        if estimator_error or allocation is not None:
            raise ValueError("estimator_error and an allocation have no form for a network that processes share")
        seed += recorder.sharding.rank  # each process draws for examples of its own
        device = recorder.sharding.device if device is None else device
    schedule = _schedule(estimator, samples, weights, seed, allocation)
    check_loader(loader)
    if device is None:
        device = next(iter(recorder.parameters.values())).device
    automatic = cuda_graphs is None and estimator != BATCH_MEAN and torch.device(device).type == "cuda"
    passes = GraphedPasses(recorder, bool(cuda_graphs)) if cuda_graphs or automatic else Passes(recorder)
    if isinstance(passes, GraphedPasses) and estimator == BATCH_MEAN:
        passes.refuse("'batch_mean' needs the gradients of the whole batch")
    strata = None if allocation is None or recorder.divided else allocation.strata
    estimate = _Estimate(recorder, passes, estimator, likelihood, level, estimator_error, strata)
    self_check = self_check and estimator != BATCH_MEAN
    # The other estimators read no label, only which tokens have one.
    shift_labels = False if shift_labels is None and estimator != "empirical" else shift_labels
    with together(recorder):
        with forward_passes(
            recorder,
            forward,
            device,
            mask,
            channels_last=channels_last,
            self_check=self_check,
            texts=Texts(shift_labels, packed),
            adds_up=True,
            passes=passes,
            purpose=_purpose(estimator, likelihood),
        ) as batches_of:
            for batch in batches_of(tqdm(loader, desc="Fisher", unit="batch", disable=not progress, leave=False)):
                explained = explain and schedule.seen == 0 and estimator != BATCH_MEAN
                draws = schedule.take(batch.size)
                with _explained(recorder, batch.size) if explained else contextlib.nullcontext():
                    estimate.add(batch, draws)
        if recorder.sharding is not None:
            return estimate.result_of_all(schedule)
        schedule.check_finished()
        return estimate.result(schedule, allocation)


def _check_options(estimator: str, granularity: str, estimator_error: bool, allocation: Allocation | None) -> None:
    """Raise ValueError for options that only some estimators and granularities have."""
    for what, asked in (("estimator_error", estimator_error), ("an allocation", allocation is not None)):
        if asked and (estimator != "deflated" or granularity == "parameter"):
            raise ValueError(
                f"{what} is for estimator 'deflated' by filter or tensor, got {estimator!r} by {granularity}"
            )


def _purpose(estimator: str, likelihood: Likelihood) -> tuple[str, ...] | None:
    """What decides the kind of cotangents, by which the self-check remembers a network; None where that is unknown."""
    names = [name for name, kind in LIKELIHOODS.items() if type(likelihood) is kind]
    return (estimator, names[0]) if names else None


def _schedule(
    estimator: str, samples: int, weights: Tensor | None, seed: int, allocation: Allocation | None
) -> Schedule:
    """Return the schedule of the loader's examples. Raise ValueError for weights or an allocation that do not fit."""
    if allocation is not None:
        if weights is not None and len(weights) != len(allocation.samples):
            raise ValueError(f"weights has {len(weights)} entries, the allocation {len(allocation.samples)} examples")
        check_estimator(estimator, allocation.samples)
    if weights is not None and (weights.dim() != 1 or not (weights >= 0).all() or not weights.isfinite().all()):
        raise ValueError(f"weights {list(weights.shape)} must be one finite number of at least 0 for each example")
    if allocation is None:
        return Schedule(samples, seed, weights)
    if weights is None:
        weights = torch.ones(len(allocation.samples))
    return Schedule(allocation.samples, seed, weights, allocation.inclusion, allocation.examples, allocation.more)


def _check_tokens(counts: Sequence[float | None]) -> None:
    """Raise ValueError where a network of tokens was given none that counts, from how many each process had."""
    known = [count for count in counts if count is not None]
    if known and not any(known):
        raise ValueError(
            "no token counts: every label is -100, or the mask leaves out every token. Pass the labels of the tokens "
            "that count; with shift_labels=True, the label of a token is that of the next one, so that a sequence "
            "needs two tokens"
        )


class _Estimate:
    """The running estimate of one call of :func:`fisher`: sums over the batches so far, and the result."""

    def __init__(
        self,
        recorder: FisherRecorder,
        passes: Passes,
        estimator: str,
        likelihood: Likelihood,
        level: str,
        estimator_error: bool,
        strata: Strata | None,
    ) -> None:
        self.recorder, self.passes = recorder, passes
        self.estimator, self.likelihood, self.level = estimator, likelihood, level
        self.moments = NamedMoments()
        self.drawn = NamedDrawnExamples() if estimator_error else None
        self.strata = strata
        self.skipped: frozenset[str] = frozenset()
        self.tokens: float | None = None  # how many tokens have counted so far; None for networks without tokens

    def add(self, batch: Batch, draws: Draws) -> None:
        """Add the squared gradients of one batch."""
        tokens = batch.count_tokens() if batch.logits.dim() == 3 else None
        if tokens is not None:
            self.tokens = (self.tokens or 0) + float(tokens.sum())
            tokens = tokens if self.level == "token" else None
        if tokens is not None and not bool(tokens.any()):
            return  # no token of the batch counts
        if self.estimator == BATCH_MEAN:
            values = self._batch_mean(batch, draws, tokens)
        else:
            values = self._per_example(batch, draws)
            if not values:
                raise ValueError("unsupported='skip' left no parameter: see why with unsupported='error'")
        self.skipped |= self.recorder.skipped
        self._accumulate(values, draws, tokens)

    def _per_example(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return each example's estimate, [N, ...], or for granularity ``parameter`` their weighted sum."""
        u, sketches = drawn_cotangents(
            batch.logits if draws.more is None else draws.more.logits.to(batch.logits),
            self.estimator,
            draws.samples,
            self.likelihood,
            batch.labels,
            draws.source,
            mask=batch.mask,
            level=self.level,
            sketches=1 if self.drawn is None else 2,
            checks=batch.checks,
            more=None if draws.more is None else draws.more.counts,
            segments=batch.segments,
        )
        if self.drawn is not None:
            return self._with_estimator_error(batch, draws, u, sketches, self.drawn)
        summed = self.recorder.granularity == "parameter"
        weights = draws.weights if summed else None
        (found,) = self._squares(batch, u, weights=weights)
        return found

    def _squares(
        self, batch: Batch, u: Tensor, groups: Sequence[int] | None = None, weights: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the squares of each group of cotangents, or of all of them. Those of a first batch are checked."""

        def squares(groups: Sequence[int] | None) -> list[dict[str, Tensor]]:
            return self.passes.squares(batch.logits, u, groups, weights, batch.segments)

        return squares(groups) if batch.check is None else batch.check.compared(u, squares, groups)

    def _with_estimator_error(
        self, batch: Batch, draws: Draws, u: Tensor, counts: Tensor | None, drawn: NamedDrawnExamples
    ) -> dict[str, Tensor]:
        """Return each example's estimate, and record how much its sketches differ, which are its last cotangents.

        ``counts`` are the numbers of sketches; None if every example is exact. The variance of the sketches' sum goes
        to ``drawn``, and to the strata of the examples, if there are any.
        """
        if counts is None:
            (values,) = self._squares(batch, u)
            variances = {name: torch.zeros_like(q) for name, q in values.items()}
        else:
            parts = Parts.of(len(u), counts, only_sketches=draws.more is not None)
            groups = self._squares(batch, u, parts.sizes)
            values, sketched, variances = _taken_apart(groups, parts)
            if self.strata is not None and parts.are_apart:
                examples = torch.as_tensor(draws.examples)
                self.strata.add(examples, draws.weights, batch.logits, sketched, variances)
        drawn.add(values, variances, DrawnUnits(draws.weights, draws.inclusion))
        return values

    def _batch_mean(self, batch: Batch, draws: Draws, tokens: Tensor | None) -> dict[str, Tensor]:
        """Return the squared gradient of the batch's weighted mean loss, with labels drawn from the model."""
        u = cotangents(
            batch.logits,
            "monte_carlo",
            1,
            self.likelihood,
            generator=draws.source,
            mask=batch.mask,
            level=self.level,
            checks=batch.checks,
        )[0]
        total = draws.weights.sum() if tokens is None else (draws.weights * tokens).sum()
        share = (draws.weights / total).to(u.dtype)
        if batch.segments is not None:  # [1, T, 1]; padding has no cotangent
            share = share[batch.segments.clamp_min(0)][None]
        u *= to_device(share, u.device).view(*share.shape, *(1,) * (u.dim() - share.dim()))
        parameters = self.recorder.leaves
        with self.recorder.regions.reading():
            fix_batch_norm_gradients(nodes_of(batch.logits))
            gradients = torch.autograd.grad(
                [batch.logits], list(parameters.values()), [u], allow_unused=True, materialize_grads=True
            )
        return {name: self.recorder.reduce(name, g.detach()) for name, g in zip(parameters, gradients, strict=True)}

    def _accumulate(self, values: dict[str, Tensor], draws: Draws, tokens: Tensor | None) -> None:
        """Add a batch's values to the moments.

        Where the mean is over tokens, each example's values are sums over its tokens, and ``tokens`` [N] counts them.
        """
        weights = draws.weights if tokens is None else draws.weights * tokens
        if self.estimator == BATCH_MEAN:
            units, values = Units(torch.ones(1)), {name: q[None] for name, q in values.items()}
        elif self.recorder.granularity == "parameter":  # summed over the batch already
            total = weights.sum()
            if not total > 0:
                return
            units, values = Units(total[None]), {name: q[None] / total for name, q in values.items()}
        else:
            units = Units(weights, draws.inclusion)
            if tokens is not None:
                each = tokens.clamp_min(1)
                there = {device: to_device(each, device) for device in {q.device for q in values.values()}}
                values = {
                    name: q / there[q.device].to(q.dtype).view(-1, *(1,) * (q.dim() - 1)) for name, q in values.items()
                }
        self.moments.add(values, units)

    def result_of_all(self, schedule: Schedule) -> FisherDiagonal:
        """Return the means over the examples of all processes of a sharded network, in shards as its parameters are."""
        recorder, sharding = self.recorder, self.recorder.sharding
        assert sharding is not None
        schedule.check_finished(at_least_one=False)
        found = add_up(self.moments, sharding)
        told = sharding.exchange((schedule.seen, recorder.unused, self.skipped, self.tokens))
        _check_tokens([tokens for *_, tokens in told])
        if not next(iter(found.values())).weight > 0:
            raise ValueError("the weights of all examples are zero")

        for name, moments in found.items():
            check_finite(name, moments.mean())
        with_examples = [unused for seen, unused, *_ in told if seen]
        return FisherDiagonal(
            shards_of({name: moments.mean() for name, moments in found.items()}, recorder),
            shards_of({name: moments.standard_error() for name, moments in found.items()}, recorder),
            recorder.granularity,
            self.estimator,
            schedule.mean_samples(),
            sum(seen for seen, *_ in told),
            frozenset(set.intersection(*map(set, with_examples))),
            frozenset().union(*(skipped for _, _, skipped, _ in told)),
            visited=sum(seen for seen, *_ in told),
        )

    def result(self, schedule: Schedule, allocation: Allocation | None) -> FisherDiagonal:
        """Return the means over all examples and their errors. Raise ValueError where all weights are zero."""
        if allocation is not None:
            assert schedule.weights is not None  # one for each example of the allocation
            self.moments.set_weights(schedule.weights)
        _check_tokens([self.tokens])
        if not self.moments.weight > 0:
            raise ValueError("the weights of all examples are zero")
        samples, visited = schedule.mean_samples(), schedule.seen
        diagonal = diagonal_of(self.moments, self.recorder, self.estimator, samples, visited, self.skipped)
        if self.recorder.divided:  # among processes with the same examples
            entries, errors = diagonal.entries, diagonal.standard_error
            entries, errors = shards_of(entries, self.recorder), shards_of(errors, self.recorder)
            diagonal = replace(diagonal, entries=entries, standard_error=errors)
        if allocation is not None:
            diagonal = replace(diagonal, num_examples=len(allocation.samples))
        if self.drawn is None:
            return diagonal
        if self.strata is not None:
            self.strata.divide(self.moments.weight)
        variances = self.drawn.variance()
        errors = {name: variances[name].sqrt() / self.moments.weight for name in diagonal}
        return replace(diagonal, estimator_error=shards_of(errors, self.recorder))


def _taken_apart(
    groups: Sequence[Mapping[str, Tensor]], parts: Parts
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return sums over all groups of cotangents, sums over the sketches, and the estimated variances of the latter.

    The quantities of a device are laid side by side, because many small operations take longer than a few large ones.
    """
    sides = SideBySide(groups[0])
    found: tuple[list[Tensor], ...] = [], [], []
    for squares in zip(*(sides.join(group, len(parts.counts)) for group in groups), strict=True):
        for into, whole in zip(found, (sum(squares[1:], squares[0]), *parts.sums_and_variances(squares)), strict=True):
            into.append(whole)
    values, sketched, variances = map(sides.split, found)
    return values, sketched, variances


@contextlib.contextmanager
def _explained(recorder: FisherRecorder, examples: int) -> Iterator[None]:
    """Print what the planner chose for the backward passes in this context, and what they cost."""
    calls: dict[str, tuple[str, float | None, float]] = {}

    def observe(use: Use, factors: Factors, cotangents_: int, start: float, end: float) -> None:
        spent = calls[use.parameter][2] if use.parameter in calls else 0.0
        path, predicted = factors.work(cotangents_)[0], factors.predict(cotangents_)
        calls[use.parameter] = path, None if predicted is None else predicted * examples, spent + end - start

    recorder.observer = observe
    try:
        yield
    finally:
        recorder.observer = None
    Console().print(planner.explanation((name, *call) for name, call in calls.items()))
