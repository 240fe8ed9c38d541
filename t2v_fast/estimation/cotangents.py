"""Choose the directions to backpropagate: an estimator of the Fisher is a choice of cotangents of the logits.

Let S_n be the Fisher of the logits of example n (softmax: diag(p) - p p^T), and J_n the derivative of its logits with
respect to the parameters. The diagonal Fisher has entries that are quadratic forms in the cotangents. So for any
cotangents with E[sum_k u_k u_k^T] = S_n, the expectation of sum_k (J_n^T u_k)^2 is the diagonal Fisher.

===============  ================================================================================================
``exact``        the columns of a factor of S_n: no sampling error, C - 1 cotangents for a softmax over C classes
``deflated``     leading eigenvectors of S_n, and the mean of random-sign sketches of all others; unbiased. As many of
                 the ``samples`` are sketches as the spectrum suggests, one at least
                 (:mod:`t2v_fast.estimation.sketches`). ``samples`` may differ between examples
                 (:mod:`t2v_fast.estimation.allocation`)
``hutchinson``   random-sign sketches of the whole factor (Hutchinson, 1989); unbiased
``monte_carlo``  scores of labels drawn from the model, as in Task2Vec's public code; unbiased
``empirical``    the score of the data set's own label; this is the empirical Fisher, which is another quantity
===============  ================================================================================================

Everything is computed in float64. For a confident head 1 - p is around 1e-7, which float32 cannot represent. The logits
of a CUDA device stay there, and the host does not wait for them; those of any other device are brought to the CPU.

Random numbers are drawn on the CPU in the order of the examples, so a seed gives the same numbers on every device and
at every batch size. (The signs of tokens come after the numbers of their batch, so that those of logits [N, T, C]
depend on its size.) Where examples come in another order, or some are left out, each example has its own seed. One
thing depends on the device: with at most :data:`t2v_fast.estimation.likelihoods.DENSE_CLASSES` classes, the sketches of
``deflated`` combine eigenvectors on a CPU unless the probabilities are about equal, and classes on a CUDA device, where
no solver finds all eigenvectors without a wait. Both are unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..ops.asynchronous import to_device
from .deferred import DeferredChecks
from .likelihoods import Likelihood, Sigmoid, Softmax, get_likelihood, largest, random_signs
from .sketches import leading_of, sketches_of

ESTIMATORS = ("exact", "deflated", "hutchinson", "monte_carlo", "empirical")
LARGEST_EXACT = 2**30  # the most numbers in the exact cotangents of a batch of tokens
# The most logits that are brought to float64 at once. On a CPU, tensors that fit into a cache take half the time.
LARGEST_BLOCK = {"cpu": 2**17, "cuda": 2**20}
LEVELS = ("token", "sequence")
# The squared correlation of the gradients of two tokens, over that of the eigenvectors of one token. It is one where
# all tokens have the same features, and small where features are independent; 0.1 to 0.5 give about the same errors.
BETWEEN_TOKENS = 0.25


def check_estimator(estimator: str, samples: int | Tensor, known: Sequence[str] = ESTIMATORS) -> None:
    """Raise ValueError for an estimator that is not ``known``, or for fewer than one cotangent."""
    if estimator not in known:
        raise ValueError(f"unknown estimator {estimator!r}: expected one of {', '.join(known)}")
    least = samples if not isinstance(samples, Tensor) else int(samples.min()) if len(samples) else 1
    if least < 1:
        raise ValueError(f"samples is {least}, expected at least one cotangent for each example")


def cotangents(
    logits: Tensor,
    estimator: str = "deflated",
    samples: int | Tensor = 2,
    likelihood: str | Likelihood = "softmax",
    labels: Tensor | None = None,
    generator: torch.Generator | Tensor | None = None,
    mask: Tensor | None = None,
    level: str = "token",
    sketches: int = 1,
    checks: DeferredChecks | None = None,
    more: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return the cotangents of one batch, whose squared gradients sum to an estimate of its Fisher.

    Logits [N, T, C] have a label at each of T tokens, which are independent given the input, as the labels of a
    language model are given the text before them. All tokens of a sequence share a backward pass, with an independent
    sign or label for each token: the products of two tokens' gradients then vanish in expectation, and the squared
    gradient of the sequence estimates the sum of the tokens' squares. Two cases differ:

    - ``exact`` has one cotangent for each token and direction, and no sampling error.
    - ``empirical`` gives each token's score a random sign with ``level="token"``, so it is then an estimate as well.
      With ``level="sequence"`` there are no signs: the gradient of the whole sequence's log-likelihood is squared.

    Args:
        logits: [N, C], or [N, T, C] for tokens.
        estimator: One of :data:`ESTIMATORS`.
        samples: The number of cotangents K, for the sampling estimators. For ``deflated`` and logits [N, C] there are
            fewer where fewer are exact. It may then be one number for each example, int64 [N]: K is the largest, and
            u is zero where an example has fewer.
        likelihood: A name in :data:`t2v_fast.estimation.likelihoods.LIKELIHOODS`, or a likelihood.
        labels: The labels, for ``empirical`` only: class indices [N] (for tokens [N, T]) for softmax, else targets of
            the shape of the logits.
        generator: Where random numbers come from; by default torch's own generator. For ``deflated`` and logits
            [N, C] it may be a seed for each example, int64 [N]: an example's signs are then the same in every batch.
        mask: Which tokens have a label, [N, T]; by default all. The other tokens' cotangents are zero.
        level: ``"token"`` or ``"sequence"``, for ``empirical`` and tokens.
        sketches: For ``deflated`` and logits [N, C], the fewest independent random-sign sketches, each of which is one
            cotangent. With more than one there are ``samples`` - 1 + ``sketches`` cotangents. The sketches of an
            example come last, and differ by chance alone.
        more: For ``deflated`` and seeds of each example: leave the eigenvectors out, and return so many
            sketches of what they leave of each example, int64 [N].
        checks: Where logits of a CUDA device that are not finite are reported, so that the host need not wait; by
            default at once.
        segments: Which sequence each token of a packed row [1, T, C] belongs to, int64 [T]; by default all are one.

    Returns:
        The cotangents, [K, N, C] or [K, N, T, C], with the dtype and on the device of the logits.

    Raises:
        ValueError: An argument does not fit; the message names it.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
        >>> u = cotangents(logits, "exact")
        >>> p = logits.softmax(1)
        >>> torch.allclose(torch.einsum("knc,knd->ncd", u, u), torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        True
    """
    return drawn_cotangents(
        logits, estimator, samples, likelihood, labels, generator, mask, level, sketches, checks, more, segments
    )[0]


def drawn_cotangents(
    logits: Tensor,
    estimator: str,
    samples: int | Tensor,
    likelihood: str | Likelihood,
    labels: Tensor | None,
    generator: torch.Generator | Tensor | None,
    mask: Tensor | None,
    level: str,
    sketches: int,
    checks: DeferredChecks | None,
    more: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`cotangents`, and how many sketches each example has.

    The number of sketches is int64 [N], on the CPU, or on the logits' device where the host would wait for it. It is
    None for logits [N, T, C], for other estimators than ``deflated``, and where all examples are exact.
    """
    check_estimator(estimator, samples)
    model = get_likelihood(likelihood)
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"logits are {list(logits.shape)} {logits.dtype}, expected floating point [N, C] or [N, T, C]")
    if sketches < 1 or (sketches > 1 and (estimator != "deflated" or logits.dim() == 3)):
        raise ValueError(f"sketches is {sketches}: more than one is for 'deflated' cotangents of logits [N, C]")
    own = isinstance(samples, Tensor) or isinstance(generator, Tensor)
    if own and (estimator != "deflated" or logits.dim() == 3):
        raise ValueError(
            f"samples or seeds of each example are for 'deflated' cotangents of logits [N, C], got {estimator!r} of "
            f"{list(logits.shape)}"
        )
    if more is not None and not (isinstance(generator, Tensor) and estimator == "deflated"):
        raise ValueError(f"more sketches are for 'deflated' cotangents with a seed for each example, got {estimator!r}")
    for name, each in (("samples", samples), ("generator", generator), ("more", more)):
        if isinstance(each, Tensor) and (list(each.shape) != [len(logits)] or each.dtype != torch.int64):
            raise ValueError(f"{name} are {list(each.shape)} {each.dtype}, expected int64 [{len(logits)}]")
    if segments is not None and (logits.dim() != 3 or [1, *segments.shape] != list(logits.shape[:2])):
        raise ValueError(
            f"segments are {list(segments.shape)}, expected one for each token of one row [1, T, C], got logits "
            f"{list(logits.shape)}"
        )
    if logits.dim() == 3:
        # Tokens have one number of cotangents and one generator.
        count, one_generator = cast(int, samples), cast(torch.Generator | None, generator)
        return _of_tokens(logits, estimator, count, model, labels, one_generator, mask, level, checks, segments), None
    if mask is not None:
        raise ValueError(f"a mask {list(mask.shape)} is for logits [N, T, C], got logits {list(logits.shape)}")
    blocks = [*_blocks(logits, None, estimator, samples, model, labels, generator, checks, sketches, more)]
    if len(blocks) == 1:
        return blocks[0][1:]
    counts = [part for *_, part in blocks if part is not None]  # of all blocks, or of none
    return torch.cat([u for _, u, _ in blocks], 1), torch.cat(counts) if counts else None


def _blocks(
    logits: Tensor,
    at: tuple[Tensor, ...] | None,
    estimator: str,
    samples: int | Tensor,
    model: Likelihood,
    labels: Tensor | None,
    generator: torch.Generator | Tensor | None,
    checks: DeferredChecks | None,
    sketches: int = 1,
    more: Tensor | None = None,
    others: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the examples' slice, their cotangents [K, n, C] and their numbers of sketches, some examples at a time.

    The examples are the rows of logits [..., C] with the indices ``at``; by default all rows of logits [N, C].
    """
    count, classes = len(logits if at is None else at[0]), logits.shape[-1]
    if isinstance(model, Softmax) and classes < 2:
        raise ValueError(
            "a softmax over one class has no Fisher information: use likelihood='sigmoid', or more classes"
        )
    if estimator != "empirical":
        labels = None
    elif labels is None:
        raise ValueError("estimator 'empirical' needs the labels of the batch, got none")
    else:
        labels = _check_labels(labels.cpu(), count, classes, model)
    reported = DeferredChecks() if checks is None else checks
    own = isinstance(samples, Tensor) or isinstance(generator, Tensor)
    width = max(1, classes) ** (2 if estimator == "exact" else 1)  # numbers of an example
    for rows, given, z in _in_float64(logits, at, model, width, count if own else None):
        reported.finite(given, partial(_not_finite, checks, rows.start))
        y = None if labels is None else labels[rows]
        near = None if others is None else others[rows]
        u, counts = _of_block(z, estimator, samples, model, y, generator, sketches, more, near)
        yield rows, u.to(logits.device, logits.dtype), counts
    if checks is None:
        reported.finish()


def _in_float64(
    logits: Tensor, at: tuple[Tensor, ...] | None, model: Likelihood, width: int, size: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the slice of some examples, their logits, and these in float64 where the likelihood takes them.

    By default there are as many examples as have :data:`LARGEST_BLOCK` numbers, ``width`` each.
    """
    on_device = logits.is_cuda and vars(type(model)).get("on_device", False)
    size = max(1, LARGEST_BLOCK["cuda" if on_device else "cpu"] // width if size is None else size)
    count = len(logits if at is None else at[0])
    for start in range(0, max(1, count), size):
        rows = slice(start, min(start + size, count))
        z = logits.detach()[rows if at is None else tuple(index[rows] for index in at)]
        yield rows, z, z.to(logits.device if on_device else "cpu", torch.float64)


def _not_finite(checks: DeferredChecks | None, start: int, example: int, values: list[float]) -> str:
    batch = "the batch" if checks is None else f"batch {checks.batch}"
    message = f"the logits of example {start + example} of {batch} are not finite: {values}"
    if any(math.isnan(value) or value == math.inf for value in values):
        return message
    # These are the first values only: the -inf may come later.
    return f"{message}; if -inf masks classes, use torch.finfo(logits.dtype).min in place of -inf"


def _of_block(
    z: Tensor,
    estimator: str,
    samples: int | Tensor,
    model: Likelihood,
    labels: Tensor | None,
    source: torch.Generator | Tensor | None,
    sketches: int,
    more: Tensor | None,
    others: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the cotangents of some examples, from their logits z in float64 [n, C], and their numbers of sketches."""
    if estimator == "deflated":
        return _deflated(model, z, samples, source, sketches, more, others)
    # The other estimators have one number of cotangents and one generator.
    count, generator = cast(int, samples), cast(torch.Generator | None, source)
    if estimator == "exact":
        u = model.exact(z)
    elif estimator == "hutchinson":
        u = model.sketch(z, random_signs(z.shape[0], count, z.shape[1], generator, z.device)) / count**0.5
    elif estimator == "monte_carlo":
        u = model.score(z, model.draw(z, count, generator)) / count**0.5
    else:
        assert labels is not None  # since the estimator is "empirical"
        u = model.score(z, to_device(labels, z.device))[None]
    return u, None


def _deflated(
    model: Likelihood,
    z: Tensor,
    samples: int | Tensor,
    source: torch.Generator | Tensor | None,
    sketches: int,
    more: Tensor | None,
    others: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return leading eigenvectors and sketches, and how many sketches each example has; None where none has any.

    ``others`` weighs the tokens that share the backward passes of each one, as :func:`leading_of` takes it.
    """
    (n, c), own = z.shape, isinstance(source, Tensor)
    rank, known = model.rank(c), None
    if isinstance(samples, Tensor):
        samples = samples.cpu()
        # The random numbers of a generator are for examples in a row: how many one gets may not depend on another.
        counts = sketches_of(model, z, samples, sketches) if own else torch.where(samples < rank, sketches, 0)
        leading = torch.where(samples < rank, samples - 1 + sketches - counts, rank)
        width = largest(leading + counts)
    elif samples >= rank and others is None:
        every = torch.full((n,), rank)
        return model.deflated(z, every, z.new_zeros(0, n, c)), None
    else:
        width = samples - 1 + sketches
        leading, known = leading_of(model, z, samples, sketches, others)
        counts = width - leading
    given: dict[str, Any] = {} if known is None else {"known": known}
    if leading.device.type == "cpu":
        most, rows = largest(leading), largest(counts) if n else sketches
    else:  # where the host would wait for them
        most, rows = min(width - sketches, rank), width
        given["most"] = most
    if more is not None:
        signs = random_signs(n, max(1, largest(more)), c, source, z.device)
        u = model.deflated(z, leading, _averaged(signs, more), **given)[most:]
        return _aligned(u, torch.zeros_like(more), more, 0, len(u)), more
    # A generator goes on by as many numbers for each example, whatever the logits are.
    drawn = rows if own else sketches if isinstance(samples, Tensor) else width
    signs = random_signs(n, drawn, c, source, z.device)[:rows]
    u = model.deflated(z, leading, _averaged(signs, counts), **given)
    return (_aligned(u, leading, counts, most, width) if rows > sketches else u), counts if rows else None


def _averaged(signs: Tensor, counts: Tensor) -> Tensor:
    """Scale the first ``counts`` [N] of some rows of signs, so that the squares of sketches are averaged.

    The other rows become zero.
    """
    scale = counts.clamp_min(1).double().rsqrt() * (torch.arange(len(signs), device=counts.device)[:, None] < counts)
    return signs * to_device(scale, signs.device)[:, :, None]


def _aligned(u: Tensor, leading: Tensor, sketches: Tensor, most: int, width: int) -> Tensor:
    """Move the cotangents of each example, so that those of all examples end together.

    Sketches then take the places of eigenvectors that other examples have.

    Args:
        u: Eigenvectors, and then sketches, [K, N, C]. The first ones of both are those of an example.
        leading: How many eigenvectors each example has, int64 [N].
        sketches: How many sketches each example has, int64 [N].
        most: How many of the K are eigenvectors.
        width: The most cotangents of an example.
    """
    # The place of each cotangent among those of its example, [width, N].
    place = torch.arange(width, device=leading.device)[:, None] - (width - leading - sketches)
    index = torch.where(place < leading, place, place + (most - leading))
    index, there = to_device(index.clamp_min(0), u.device), to_device(place >= 0, u.device)
    return u.take_along_dim(index[:, :, None], 0) * there[:, :, None]


def _of_tokens(
    logits: Tensor,
    estimator: str,
    samples: int,
    likelihood: Likelihood,
    labels: Tensor | None,
    generator: torch.Generator | None,
    mask: Tensor | None,
    level: str,
    checks: DeferredChecks | None,
    segments: Tensor | None,
) -> Tensor:
    """Return the cotangents of logits [N, T, C]. Every token that is not masked is first treated as an example."""
    n, t, c = logits.shape
    if estimator == "exact" and c * t * logits.numel() > LARGEST_EXACT:
        raise ValueError(
            f"'exact' needs about {c * t} cotangents of {n} sequences of {t} tokens over {c} labels, a backward "
            "pass each: use 'deflated'"
        )
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(LEVELS)}")
    if mask is None:
        mask = torch.ones(n, t, dtype=torch.bool)
    if list(mask.shape) != [n, t]:
        raise ValueError(f"the mask is {list(mask.shape)}, expected one entry a token: {[n, t]}")
    mask = mask.to("cpu", torch.bool)
    if labels is not None and list(labels.shape[:2]) != [n, t]:
        raise ValueError(f"labels are {list(labels.shape)}, expected one a token: {[n, t]}")
    chosen_tokens = mask.nonzero(as_tuple=True)
    sequence, place = (to_device(index, logits.device) for index in chosen_tokens)
    at = sequence, place
    chosen = None if labels is None else labels.cpu()[mask]
    u = logits.new_zeros((0, *logits.shape))
    if not len(place):  # no token counts: a cotangent of zeros, for the batches that follow have some
        return logits.new_zeros((1, *logits.shape))
    others = None
    if estimator == "deflated":
        traces = torch.cat([likelihood.trace(z) for *_, z in _in_float64(logits, at, likelihood, max(1, c))])
        owner = chosen_tokens[0] if segments is None else segments.cpu()[chosen_tokens[1]]
        owner = to_device(owner.unique(return_inverse=True)[1], traces.device)  # the sequence of each token
        whole = torch.zeros_like(traces).index_add_(0, owner, traces)[owner]
        others = BETWEEN_TOKENS * (whole - traces) / traces.clamp_min(torch.finfo(traces.dtype).tiny)
    for rows, part, _ in _blocks(logits, at, estimator, samples, likelihood, chosen, generator, checks, others=others):
        u = u if len(u) else logits.new_zeros((len(part), *logits.shape))
        u[:, sequence[rows], place[rows]] = part
    if estimator == "deflated" or (estimator == "empirical" and level == "token"):
        signs = logits.new_ones((len(u), n, t))
        signs[:, sequence, place] = random_signs(len(place), len(u), 1, generator, logits.device)[:, :, 0].to(u.dtype)
        u *= signs[..., None]
    if estimator == "exact":  # [K, N, T, C] to [K T, N, T, C]: one token in each cotangent
        single = torch.eye(t, dtype=u.dtype, device=u.device)
        u = (u[:, None] * single[None, :, None, :, None]).flatten(0, 1)
    return u


def _check_labels(labels: Tensor, n: int, c: int, model: Likelihood) -> Tensor:
    """Return the labels in the dtype that the likelihood needs. Raise ValueError where they do not fit."""
    if isinstance(model, Softmax):
        return class_indices(labels, n, c)
    if list(labels.shape) != [n, c]:
        raise ValueError(f"labels are {list(labels.shape)}, expected targets [{n}, {c}]")
    if not bool(labels.isfinite().all()):
        raise ValueError("labels have NaN or infinite values, expected finite targets")
    if isinstance(model, Sigmoid) and n and not 0 <= float(labels.min()) <= float(labels.max()) <= 1:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to 1, as probabilities of yes")
    return labels.double()


def class_indices(labels: Tensor, n: int, c: int) -> Tensor:
    """Return labels [N] as int64. Raise ValueError unless they are whole numbers from 0 to C - 1, one an example."""
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if list(labels.shape) != [n] or not whole:
        raise ValueError(f"labels are {list(labels.shape)} {labels.dtype}, expected integers [{n}]")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= c):
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to {c - 1}")
    return labels.long()
