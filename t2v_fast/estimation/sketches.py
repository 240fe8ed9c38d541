"""Divide an example's cotangents into leading eigenvectors of its Fisher and random-sign sketches of the rest.

Let S = sum_i l_i v_i v_i^T be the Fisher of an example's logits, with the largest eigenvalues first, and let
a_i = sqrt(l_i) J^T v_i be the gradients of the eigenvectors. The diagonal Fisher, averaged over each filter f, is
F_f = sum_i m_f(a_i, a_i), where m_f(a, b) is the mean over the filter of the products of entries. Let e_i be random
signs. A sketch of all eigenvectors but the first l estimates their part of F_f by::

    m_f(sum_{i > l} e_i a_i, sum_{i > l} e_i a_i) = sum_{i > l} m_f(a_i, a_i) + 2 sum_{l < i < j} e_i e_j m_f(a_i, a_j)

The products e_i e_j have mean zero and are uncorrelated. So the mean of s sketches is unbiased with the variance
4 / s * sum_{l < i < j} m_f(a_i, a_j)^2, and the first l eigenvectors add none.

Before any backward pass only the eigenvalues are known. As a proxy, every eigenvector has a part of the Fisher in
proportion to its eigenvalue, and all gradients have the same squared correlation :data:`ALIGNMENT` within the filters.
The sum over the filters, relative to the squared norm of F, is then ALIGNMENT * T(l) / s, with
T(l) = 4 sum_{l < i < j} l_i l_j / tr(S)^2.

With k cotangents, s = k - l. A confident head has a spectrum that falls steeply, and l = k - 1 is best. Where a
spectrum is flat, as with an uncertain head of many classes, one more eigenvector reduces T little. Then more sketches
are better, because their variance falls as 1 / s. The choice of l never depends on the random signs, so the estimate is
unbiased for every choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .likelihoods import Likelihood

# The mean squared correlation of the gradients. With EfficientNet-Lite0 at 64 pixels, handwritten digits, 10 to 1,000
# classes and heads fitted to the end or stopped early, it was 0.1 to 0.9 behind the first eigenvector.
ALIGNMENT = 0.5


def tails(spectrum: Tensor) -> Tensor:
    """Return T(l) for l from 0 to R, [N, R + 1], from spectra [N, R] that are divided by their sums."""
    zero = spectrum.new_zeros(len(spectrum), 1)
    after = torch.cat([spectrum.flip(1).cumsum(1).flip(1)[:, 1:], zero], 1)  # sum_{j > i} l_j
    # A sum over i of l_i sum_{j > i} l_j does not cancel.
    return 4 * torch.cat([(spectrum * after).flip(1).cumsum(1).flip(1), zero], 1)


def least(tail: Tensor, samples: int, sketches: int = 1) -> tuple[Tensor, Tensor]:
    """Choose the number of leading eigenvectors that leaves the least variance T(l) / s.

    Args:
        tail: T(l) of each example for l from 0 to R, as :func:`tails` gives it, [N, R + 1].
        samples: k. An example has k - 1 + ``sketches`` cotangents.
        sketches: The fewest sketches of an example.

    Returns:
        The least T(l) / s and its l, both [N]. With k of at least R, all eigenvectors are taken, and the variance is 0.

    Example:
        A steep and a flat spectrum:

        >>> spectrum = torch.stack([9 * 0.1 ** torch.arange(1.0, 11), torch.full((10,), 0.1)])
        >>> least(tails(spectrum), samples=3)[1]
        tensor([2, 0])
    """
    n, rank = tail.shape[0], tail.shape[1] - 1
    if samples >= rank:
        return tail.new_zeros(n), torch.full((n,), rank)
    number = samples - 1 + sketches - torch.arange(samples)  # of sketches, for l from 0 to k - 1
    found = (tail[:, :samples] / number).min(1)
    return found.values, found.indices


def sketches_of(likelihood: Likelihood, logits: Tensor, samples: int | Tensor, sketches: int = 1) -> Tensor:
    """Return how many sketches each example of a batch gets, int64 [N]; 0 where its eigenvectors suffice.

    Args:
        likelihood: The likelihood of the labels.
        logits: [N, C].
        samples: k, one number for all or int64 [N]. An example has k - 1 + ``sketches`` cotangents.
        sketches: The fewest sketches of an example.
    """
    spectrum = likelihood.spectrum(logits.detach().to("cpu", torch.float64))
    tail = tails(spectrum / spectrum.sum(1, True).clamp_min(torch.finfo(torch.float64).tiny))
    each = samples if isinstance(samples, Tensor) else torch.full((len(tail),), samples)
    counts = torch.zeros_like(each)
    for k in each.unique().tolist():
        if k < likelihood.rank(logits.shape[1]):
            some = each == k
            counts[some] = k - 1 + sketches - least(tail[some], k, sketches)[1]
    return counts


def packed(u: Tensor) -> tuple[Tensor, Tensor]:
    """Move the cotangents of each example that are not zero to the front.

    Args:
        u: Cotangents [K, N, C].

    Returns:
        The cotangents [k, N, C], with k the most that an example has, and their numbers [N].
    """
    there = u.any(2)
    counts = there.sum(0)
    place, example = there.nonzero(as_tuple=True)
    front = u.new_zeros(int(counts.max()) if len(counts) else 0, *u.shape[1:])
    front[there.cumsum(0)[place, example] - 1, example] = u[place, example]
    return front, counts
