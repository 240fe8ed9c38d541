"""fisher(): the diagonal Fisher information of a network over a data set."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from ..gradients.factors import Factors
from ..gradients.fast_forward import fast_forward
from ..gradients.graph import Use, fix_batch_norm_gradients
from ..gradients.ownership import nodes_of
from ..gradients.recorder import FilterAxis, FisherRecorder, ParameterFilter
from ..gradients.self_check import SelfCheck
from ..ops import planner
from .allocation import Allocation, seeds_of
from .cotangents import check_estimator, cotangents
from .diagonal import FisherDiagonal
from .likelihoods import Likelihood, get_likelihood
from .moments import DrawnExamples, NamedMoments, Units

log = logging.getLogger(__name__)

BATCH_MEAN = "batch_mean"
IGNORED = -100  # the label of a token that does not count, as cross_entropy has it


def _input(t: Any, device: str | torch.device) -> Any:
    """A tensor where the network is, such as autograd may save; anything else as it is."""
    if not isinstance(t, Tensor):
        return t
    return t.to(device, copy=t.is_inference())


def _split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """(input, labels) of what a loader yields: (input, labels, ...), the input alone, or a mapping with "labels"."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    return batch, None


def _default_forward(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output)


def _check_logits(logits: Any, n: int) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(logits).__name__}, expected logits [N, C]: pass forward=lambda model, x: ..."
        )
    if logits.dim() not in (2, 3) or logits.shape[0] != n:
        raise ValueError(
            f"the model gave logits {list(logits.shape)} for {n} examples, expected [{n}, C], or [{n}, T, C] for tokens"
        )
    return logits


def _default_mask(inputs: Any, labels: Tensor | None) -> Tensor | None:
    """Which tokens count, [N, T]: none of padding, none whose label is -100; None where all do."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    mask = None if mask is None else mask.bool().cpu()
    if labels is not None and not labels.is_floating_point():
        wanted = (labels != IGNORED).cpu()
        mask = wanted if mask is None else mask & wanted
    return mask


def _token_mask(mask: Tensor | None, labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """The mask, which must have an entry for each token of logits [N, T, C]."""
    if mask is not None and mask.shape != logits.shape[:2]:
        given = "" if labels is None else f", and the labels are {list(labels.shape)}"
        raise ValueError(
            f"the logits are {list(logits.shape)}, one of each token, but the mask of those that count is "
            f"{list(mask.shape)}{given}: expected {list(logits.shape[:2])}. Give a label for each token, or let the "
            "model pool its tokens (forward=...)"
        )
    return mask


def _check_inputs(inputs: Any, batch: int) -> int:
    """The number of examples of a batch, whose floating-point values must be finite."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(f"batch {batch} holds no tensor but {type(inputs).__name__}: expected tensors, examples first")
    for t in tensors:
        if t.is_floating_point() and not t.isfinite().all():
            bad = int((~t.flatten(1).isfinite().all(1)).nonzero()[0]) if t.dim() > 1 else 0
            raise ValueError(f"batch {batch}, example {bad}: the input has NaN or infinite values")
    return tensors[0].shape[0]


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
    forward: Callable[[nn.Module, Any], Tensor] = _default_forward,
    mask: Callable[[Any, Tensor | None], Tensor | None] = _default_mask,
    level: str = "token",
    channels_last: bool = True,
    progress: bool = False,
    explain: bool = False,
    estimator_error: bool = False,
    allocation: Allocation | None = None,
) -> FisherDiagonal:
    """The diagonal Fisher information of ``model`` over the examples of ``loader``, exactly per example.

    F = sum_n a_n E_{y ~ p(y | x_n)} [(d log p(y | x_n) / d w)^2] (Achille et al., 2019, equation 1), reduced by
    ``granularity``; a_n = 1/N, or ``weights`` [number of examples], in the loader's order, divided by their sum.

    ``loader`` yields (input, labels, ...) or inputs, examples along the first axis; mappings are passed as keyword
    arguments. ``estimator`` and ``samples`` choose the cotangents (:mod:`t2v_fast.estimation.cotangents`); besides
    those, ``"batch_mean"`` is the squared gradient of the batch's mean loss, labels drawn from the model, averaged over
    batches: what Task2Vec's public code computes. It is another quantity, and allows batch norm in training mode.
    ``likelihood``: ``"softmax"`` (logits [N, C]), ``"sigmoid"`` (C yes-or-no labels) or ``"gaussian"``. ``parameters``:
    names, or a function of name and parameter; default all. ``unsupported`` (``"error"``, ``"exact"`` or ``"skip"``)
    and ``filter_axis`` as in :class:`FisherRecorder`. The model's mode is left as it is.

    Logits [N, T, C] are those of a token model (:func:`t2v_fast.estimation.cotangents.cotangents`); examples are
    sequences. ``mask(inputs, labels)`` says which tokens count, [N, T]; by default those with an ``attention_mask``
    and, where there are labels (labels[n, t] is that of logits[n, t]), with another label than -100. ``level``:
    ``"token"`` for the mean over tokens of each token's Fisher, ``"sequence"`` for the mean over sequences of the
    Fisher of a whole sequence, the sum over its tokens; the standard error is over sequences in both.

    The network is watched as :mod:`t2v_fast.gradients.self_check` has it (``self_check``): two examples of the first
    batch against plain autograd, the batch's logits against those of its halves and of single examples, later batches
    at growing intervals, and random numbers that are drawn in any forward pass.

    ``channels_last``: give a network on the CPU its images [N, C, H, W] and the weights of convolutions in that memory
    format, which is faster; one that cannot take them so (it calls ``view`` on activations) gets them as they come.

    ``explain`` prints, after the first batch, which path each layer takes (:mod:`t2v_fast.ops.planner`), and what it
    was predicted to cost and did.

    ``estimator_error``: also say how far the draws of ``"deflated"`` may be off (:class:`FisherDiagonal`), from a
    second sketch of each example, one more cotangent. For logits [N, C], granularity ``"filter"`` or ``"tensor"``.

    ``allocation`` (:mod:`t2v_fast.estimation.allocation`): the examples that the loader yields, in its order, of a data
    set of which ``weights`` are then the weights, and how many ``"deflated"`` cotangents each gets, in place of
    ``samples``. The result is an estimate of the Fisher of the whole data set. For logits [N, C], granularity
    ``"filter"`` or ``"tensor"``.

    Raises UnsupportedError where no exact per-example gradient can be had, SelfCheckError when the check fails, and
    ValueError for bad input, naming what is wrong.
    """
    if estimator != BATCH_MEAN:
        check_estimator(estimator, samples)
    likelihood = get_likelihood(likelihood)
    for what, asked in (("estimator_error", estimator_error), ("an allocation", allocation is not None)):
        if asked and (estimator != "deflated" or granularity == "parameter"):
            raise ValueError(
                f"{what} is for estimator 'deflated' by filter or tensor, got {estimator!r} by {granularity}"
            )
    if allocation is not None:
        if weights is None:
            weights = torch.ones(len(allocation.samples))
        elif len(weights) != len(allocation.samples):
            raise ValueError(f"weights has {len(weights)} entries, the allocation {len(allocation.samples)} examples")
        check_estimator(estimator, allocation.samples)
    recorder = FisherRecorder(model, parameters, granularity, unsupported=unsupported, filter_axis=filter_axis)
    if device is None:
        device = next(iter(recorder.parameters.values())).device
    if weights is not None and (weights.dim() != 1 or not (weights >= 0).all() or not weights.isfinite().all()):
        raise ValueError(f"weights {list(weights.shape)} must be one finite number of at least 0 for each example")
    generator: torch.Generator | Tensor = torch.Generator().manual_seed(seed)
    moments = NamedMoments()
    drawn = {name: DrawnExamples() for name in recorder.parameters} if estimator_error else {}
    seen = 0
    skipped: frozenset[str] = frozenset()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        recorder,
        _unchanged_buffers(model),
        fast_forward(model, forward, device, channels_last) as forward,
    ):
        check = SelfCheck(recorder, forward) if self_check and estimator != BATCH_MEAN else None
        for index, batch in enumerate(tqdm(loader, desc="Fisher", unit="batch", disable=not progress, leave=False)):
            inputs, labels = _split_batch(batch)
            if labels is not None and not isinstance(labels, Tensor):
                labels = torch.as_tensor(labels)
            inputs = tree_map(lambda t: _input(t, device), inputs)
            n = _check_inputs(inputs, index)
            if n == 0:
                continue
            inclusion = torch.ones(n, dtype=torch.float64)
            if allocation is not None:
                numbers = allocation.examples[seen : seen + n]
                if len(numbers) < n:
                    raise ValueError(
                        f"the loader yields more than the allocation's {len(allocation.examples)} examples"
                    )
                a, inclusion = weights[numbers].double(), allocation.inclusion[numbers]
                samples, generator = allocation.samples[numbers], seeds_of(numbers, seed)
            else:
                a = torch.ones(n, dtype=torch.float64) if weights is None else weights[seen : seen + n].double()
            if len(a) < n:
                raise ValueError(f"weights has {len(weights)} entries but the loader yields more examples than that")
            logits = _check_logits(check.forward(inputs) if check else forward(model, inputs), n)
            tokens = None  # to divide by
            options: dict[str, Any] = {}
            if logits.dim() == 3:
                valid = _token_mask(mask(inputs, labels), labels, logits)
                options = {"mask": valid, "level": level}
                if level == "token":
                    tokens = _count_tokens(valid, logits)
            if estimator == BATCH_MEAN:
                values = _batch_mean(recorder, logits, likelihood, a, tokens, generator, options)
            else:
                if check:
                    check.batch(inputs, logits)
                if estimator_error:
                    options["sketches"] = 2
                u = cotangents(logits, estimator, samples, likelihood, labels, generator, **options)
                with _explained(recorder, n) if explain and seen == 0 else contextlib.nullcontext():
                    if estimator_error:
                        least = int(samples.min()) if isinstance(samples, Tensor) else samples
                        sketched = least < likelihood.rank(logits.shape[-1])
                        values = _doubted(recorder, logits, u, sketched, a, inclusion, drawn)
                    else:
                        values = recorder.backward(logits, u, a if granularity == "parameter" else None)
                if not values:
                    raise ValueError("unsupported='skip' left no parameter: see why with unsupported='error'")
            skipped |= recorder.skipped
            _accumulate(moments, values, a, tokens, estimator, granularity, inclusion)
            seen += n
    if seen == 0:
        raise ValueError("the loader gave no example")
    expected = len(allocation.examples) if allocation is not None else seen if weights is None else len(weights)
    if expected != seen:
        who = "weights has" if allocation is None else "the allocation visits"
        raise ValueError(
            f"{who} {expected} {'entries' if allocation is None else 'examples'} but the loader gave {seen}"
        )
    if allocation is not None:
        samples = float(allocation.samples[allocation.examples].double().mean())
        moments.set_weights(weights)
    if not moments.weight > 0:
        raise ValueError("the weights of all examples are zero")
    diagonal = _diagonal(moments, recorder, estimator, samples, seen, skipped)
    if allocation is not None:
        diagonal = replace(diagonal, num_examples=len(allocation.samples))
    if not estimator_error:
        return diagonal
    errors = {name: drawn[name].variance().sqrt() / moments.weight for name in diagonal}
    return replace(diagonal, estimator_error=errors)


def _doubted(
    recorder: FisherRecorder,
    logits: Tensor,
    u: Tensor,
    sketched: bool,
    a: Tensor,
    inclusion: Tensor,
    drawn: dict[str, DrawnExamples],
) -> dict[str, Tensor]:
    """A batch's values; to ``drawn`` is added by how much the last two cotangents, two sketches, disagree.

    They average q1 and q2, twice what each gives: the variance of the mean of two is estimated by (q1 - q2)^2 / 4.
    """
    if not sketched:
        values = recorder.backward(logits, u)
        apart = {name: torch.zeros_like(q) for name, q in values.items()}
    else:
        sizes = [len(u) - 2, 1, 1] if len(u) > 2 else [1, 1]
        groups = list(recorder.backward_groups(logits, u, sizes))
        values = {name: sum(g[name] for g in groups) for name in groups[0]}
        apart = {name: groups[-1][name] - groups[-2][name] for name in values}
    for name, q in values.items():
        drawn[name].add(q, apart[name].to("cpu", torch.float64).square(), a, inclusion)
    return values


def _diagonal(
    moments: NamedMoments,
    recorder: FisherRecorder,
    estimator: str,
    samples: int,
    count: int,
    skipped: frozenset[str] = frozenset(),
) -> FisherDiagonal:
    """What the moments of all examples say; ValueError where the network overflows."""
    values = moments.mean()
    for name, mean in values.items():
        if not mean.isfinite().all():
            raise ValueError(f"the Fisher of {name!r} is not finite: the network's activations or gradients overflow")
    return FisherDiagonal(
        values,
        moments.standard_error(),
        recorder.granularity,
        estimator,
        samples,
        count,
        recorder.unused,
        skipped,
        visited=count,
    )


@contextlib.contextmanager
def _explained(recorder: FisherRecorder, examples: int) -> Iterator[None]:
    """Print what the planner chose for the backward passes of this context, and what they cost."""
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


@contextlib.contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what a forward in training mode changes: the running statistics of batch norm."""
    before = [(b, b.clone()) for b in model.buffers()] if any(m.training for m in model.modules()) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in before:
                b.copy_(value)


def _accumulate(
    moments: NamedMoments,
    values: dict[str, Tensor],
    a: Tensor,
    tokens: Tensor | None,
    estimator: str,
    granularity: str,
    inclusion: Tensor,
) -> None:
    """Add a batch's values; ``tokens`` [N]: of how many in each example they are sums, if the mean is over tokens."""
    if tokens is not None:
        a = a * tokens
        each = tokens.clamp_min(1)
    if estimator == BATCH_MEAN:
        units, values = Units(torch.ones(1)), {name: q[None] for name, q in values.items()}
    elif granularity == "parameter":  # summed over the batch already
        total = a.sum()
        if not total > 0:
            return
        units, values = Units(total[None]), {name: q[None] / total for name, q in values.items()}
    else:
        units = Units(a, inclusion)
        if tokens is not None:
            values = {name: q / each.to(q).view(-1, *(1,) * (q.dim() - 1)) for name, q in values.items()}
    moments.add(values, units)


def _count_tokens(mask: Tensor | None, logits: Tensor) -> Tensor:
    """How many tokens of each example count, [N]."""
    n, t = logits.shape[:2]
    return torch.full((n,), t, dtype=torch.float64) if mask is None else mask.cpu().bool().sum(1).double()


def _batch_mean(
    recorder: FisherRecorder,
    logits: Tensor,
    likelihood: Likelihood,
    a: Tensor,
    tokens: Tensor | None,
    generator: torch.Generator,
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Squares of the gradient of the weighted mean loss of one batch, labels drawn from the model."""
    u = cotangents(logits, "monte_carlo", 1, likelihood, generator=generator, **options)[0]
    total = a.sum() if tokens is None else (a * tokens).sum()
    u = u * (a / total).to(u.device, u.dtype).view(-1, *(1,) * (u.dim() - 1))
    fix_batch_norm_gradients(nodes_of(logits))
    gradients = torch.autograd.grad(
        [logits], list(recorder.parameters.values()), [u], allow_unused=True, materialize_grads=True
    )
    return {name: recorder.reduce(name, g.detach()) for name, g in zip(recorder.parameters, gradients, strict=True)}
