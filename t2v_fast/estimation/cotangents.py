"""Choose the directions to backpropagate: an estimator of the Fisher is a choice of cotangents of the logits.

Let S_n be the Fisher of the logits of example n (softmax: diag(p) - p p^T), and J_n the derivative of its logits with
respect to the parameters. The diagonal Fisher has entries that are quadratic forms in the cotangents. So for any
cotangents with E[sum_k u_k u_k^T] = S_n, the expectation of sum_k (J_n^T u_k)^2 is the diagonal Fisher.

===============  ================================================================================================
``exact``        the columns of a factor of S_n: no sampling error, C - 1 cotangents for a softmax over C classes
``deflated``     the leading ``samples`` - 1 eigenvectors of S_n, and one random-sign sketch of all others; unbiased.
                 ``samples`` may differ between examples (:mod:`t2v_fast.estimation.allocation`). Examples with seeds of
                 their own get fewer eigenvectors and the mean of more sketches where that is better
                 (:mod:`t2v_fast.estimation.sketches`)
``hutchinson``   random-sign sketches of the whole factor (Hutchinson, 1989); unbiased
``monte_carlo``  scores of labels drawn from the model, as in Task2Vec's public code; unbiased
``empirical``    the score of the data set's own label; this is the empirical Fisher, which is another quantity
===============  ================================================================================================

Everything is computed in float64 on the CPU. For a confident head 1 - p is around 1e-7, which float32 cannot represent.
Random numbers are drawn on the CPU in the order of the examples, so a seed gives the same numbers on every device and
at every batch size. Where examples come in another order, or some are left out, each example has its own seed.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .likelihoods import Likelihood, Softmax, get_likelihood, random_signs
from .sketches import packed, sketches_of

ESTIMATORS = ("exact", "deflated", "hutchinson", "monte_carlo", "empirical")
LARGEST_EXACT = 2**30  # the most numbers in the exact cotangents of a batch of tokens
LEVELS = ("token", "sequence")


def check_estimator(estimator: str, samples: int | Tensor) -> None:
    """Raise ValueError for an unknown estimator, or for fewer than one cotangent."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")
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
        samples: The number of cotangents K, for the sampling estimators. ``deflated`` gives fewer where fewer are
            exact. For ``deflated`` and logits [N, C] it may be one number for each example, int64 [N]: K is then the
            largest, and u is zero where an example has fewer.
        likelihood: A name in :data:`t2v_fast.estimation.likelihoods.LIKELIHOODS`, or a likelihood.
        labels: The labels, for ``empirical`` only: class indices [N] (for tokens [N, T]) for softmax, else targets of
            the shape of the logits.
        generator: Where random numbers come from; by default torch's own generator. For ``deflated`` and logits
            [N, C] it may be a seed for each example, int64 [N]: an example's signs are then the same in every batch.
        mask: Which tokens have a label, [N, T]; by default all. The other tokens' cotangents are zero.
        level: ``"token"`` or ``"sequence"``, for ``empirical`` and tokens.
        sketches: For ``deflated`` and logits [N, C], the number of independent random-sign sketches, each of which is
            one cotangent. They come last, and differ by chance alone.

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
    for name, each in (("samples", samples), ("generator", generator)):
        if isinstance(each, Tensor) and (list(each.shape) != [len(logits)] or each.dtype != torch.int64):
            raise ValueError(f"{name} are {list(each.shape)} {each.dtype}, expected int64 [{len(logits)}]")
    # For everything but 'deflated' cotangents of logits [N, C].
    count, one_generator = cast(int, samples), cast(torch.Generator | None, generator)
    if logits.dim() == 3:
        return _of_tokens(logits, estimator, count, model, labels, one_generator, mask, level)
    if mask is not None:
        raise ValueError(f"a mask {list(mask.shape)} is for logits [N, T, C], got logits {list(logits.shape)}")
    z = logits.detach().to("cpu", torch.float64)
    if not z.isfinite().all():
        bad = int((~z.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the logits of example {bad} of the batch are not finite: {z[bad].tolist()[:8]}")
    if isinstance(model, Softmax) and z.shape[1] < 2:
        raise ValueError(
            "a softmax over one class has no Fisher information: use likelihood='sigmoid', or more classes"
        )
    if estimator == "exact":
        u = model.exact(z)
    elif estimator == "deflated":
        u = _deflated(model, z, samples, generator, sketches)
    elif estimator == "hutchinson":
        u = model.sketch(z, random_signs(z.shape[0], count, z.shape[1], one_generator)) / count**0.5
    elif estimator == "monte_carlo":
        u = model.score(z, model.draw(z, count, one_generator)) / count**0.5
    else:
        if labels is None:
            raise ValueError("estimator 'empirical' needs the labels of the batch, got none")
        u = model.score(z, _check_labels(labels.cpu(), z, model))[None]
    return u.to(logits.device, logits.dtype)


def _deflated(
    model: Likelihood, z: Tensor, samples: int | Tensor, source: torch.Generator | Tensor | None, sketches: int
) -> Tensor:
    """Return leading eigenvectors and sketches, without sketches where all examples of the batch are exact.

    Each example has ``samples`` - 1 + ``sketches`` cotangents. At least the last ``sketches`` are sketches.
    """
    n, c = z.shape
    if not isinstance(samples, Tensor):
        samples = torch.full((n,), samples)
    rank = model.rank(c)
    exact = samples >= rank
    own = isinstance(source, Tensor)  # seeds of each example
    counts = sketches_of(model, z, samples, sketches) if own else torch.where(exact, 0, sketches)
    leading = torch.where(exact, rank, samples - 1 + sketches - counts)
    most = max(sketches, int(counts.max())) if n else sketches
    scale = counts.clamp_min(1).rsqrt() * (torch.arange(most)[:, None] < counts)  # [most, N]
    signs = random_signs(n, most, c, source) * scale[:, :, None]
    if exact.all():
        return model.deflated(z, leading, signs[:0])
    u = model.deflated(z, leading, signs)
    if most == sketches:
        return u
    # Sketches take the places of eigenvectors that other examples have.
    vectors, last, more = u.split([len(u) - most, sketches, most - sketches])
    return torch.cat([packed(torch.cat([vectors, more]))[0], last])


def _of_tokens(
    logits: Tensor,
    estimator: str,
    samples: int,
    likelihood: Likelihood,
    labels: Tensor | None,
    generator: torch.Generator | None,
    mask: Tensor | None,
    level: str,
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
    there = mask.to(logits.device)
    of_each = cotangents(
        logits[there],
        estimator,
        samples,
        likelihood,
        None if labels is None else labels.cpu()[mask],
        generator,
    )  # [K, tokens, C]
    if estimator == "deflated" or (estimator == "empirical" and level == "token"):
        of_each = of_each * random_signs(of_each.shape[1], len(of_each), 1, generator).to(of_each)
    u = logits.new_zeros((len(of_each), *logits.shape))
    u[:, there] = of_each
    if estimator == "exact":  # [K, N, T, C] to [K T, N, T, C]: one token in each cotangent
        at = torch.eye(t, dtype=u.dtype, device=u.device)
        u = (u[:, None] * at[None, :, None, :, None]).flatten(0, 1)
    return u


def _check_labels(labels: Tensor, z: Tensor, model: Likelihood) -> Tensor:
    """Return the labels in the dtype that the likelihood needs. Raise ValueError where they do not fit."""
    n, c = z.shape
    if isinstance(model, Softmax):
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if list(labels.shape) != [n] or not whole:
            raise ValueError(f"labels are {list(labels.shape)} {labels.dtype}, expected integers [{n}]")
        if n and (int(labels.min()) < 0 or int(labels.max()) >= c):
            raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to {c - 1}")
        return labels.long()
    if list(labels.shape) != [n, c]:
        raise ValueError(f"labels are {list(labels.shape)}, expected targets [{n}, {c}]")
    return labels.to(z.dtype)
