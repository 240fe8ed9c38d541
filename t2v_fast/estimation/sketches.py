"""Divide an example's cotangents into leading eigenvectors of its Fisher and random-sign sketches of the rest.

Let S = sum_i l_i v_i v_i^T be the Fisher of an example's logits, with the largest eigenvalues first, and let
a_i = sqrt(l_i) J^T v_i be the gradients of the eigenvectors. The diagonal Fisher, averaged over each filter f, is
F_f = sum_i m_f(a_i, a_i), where m_f(a, b) is the mean over the filter of the products of entries. Let e_i be random
signs. A sketch of all eigenvectors but the first l estimates their part of F_f by::

    m_f(sum_{i > l} e_i a_i, sum_{i > l} e_i a_i) = sum_{i > l} m_f(a_i, a_i) + 2 sum_{l < i < j} e_i e_j m_f(a_i, a_j)

The products e_i e_j have mean zero and are uncorrelated. So the mean of s sketches is unbiased with the variance
4 / s * sum_{l < i < j} m_f(a_i, a_j)^2, and the first l eigenvectors add none. A softmax over many classes, or any
softmax on a CUDA device, has sketches that combine classes instead of eigenvectors. Their variance is up to
2 / s * sum_{i > l} m_f(a_i, a_i)^2 higher. That is much where few classes share the probability. There the sketches
combine some of the next eigenvectors, and what these leave of the classes.

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.asynchronous import to_device
from .likelihoods import Likelihood
from .moments import CHUNK, chunk_width

# The mean squared correlation of the gradients. With EfficientNet-Lite0 at 64 pixels, handwritten digits, 10 to 1,000
# classes and heads fitted to the end or stopped early, it was 0.1 to 0.9 behind the first eigenvector.
ALIGNMENT = 0.5
MEASURED = 8  # the most sketches, at the end of all, whose squares are taken one by one
LARGEST_MIXTURE = 32  # the most cotangents that are eigenvectors of some examples and sketches of others


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


def leading_of(
    likelihood: Likelihood, z: Tensor, samples: int, sketches: int = 1, others: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose how many leading eigenvectors each example gets, int64 [N] on the device of z.

    Also return what the likelihood knows then (:meth:`~t2v_fast.estimation.likelihoods.Likelihood.behind`).

    An example has ``samples`` - 1 + ``sketches`` cotangents, at least ``sketches`` of them sketches. Where all its
    eigenvectors are among them, no more sketches are needed, and some of the cotangents are zero.

    A token shares its backward passes with the other tokens of its sequence, and has random signs of its own. The
    products of two tokens' gradients vanish in expectation only. With w = c sum_m tr(S_m) / tr(S), where m are the
    other tokens and c is how much less the gradients of two tokens are correlated than those of the eigenvectors of
    one, they add 2 w sum_k e_k^2 to T(l) / s. Here e_k is the part of the trace that cotangent k has.

    Args:
        likelihood: The likelihood of the labels.
        z: The logits in float64, [N, C].
        samples: k, one number for all.
        sketches: The fewest sketches of an example.
        others: w, [N] on the device of z; by default no example shares its backward passes.
    """
    (first, second), known = likelihood.behind(z, min(samples - 1, likelihood.rank(z.shape[1])))  # [N, l]
    number = samples - 1 + sketches - torch.arange(first.shape[1], device=z.device)  # of sketches
    of_sketches = 2 * (first.square() - second).clamp_min(0)
    of_eigenvectors = torch.zeros_like(first)
    if others is not None:
        weight = 2 * others[:, None]
        of_sketches = of_sketches + weight * first.square()
        of_eigenvectors = weight * (second[:, :1] - second)
    return (of_sketches / number + of_eigenvectors).argmin(1), known


def sketches_of(likelihood: Likelihood, logits: Tensor, samples: Tensor, sketches: int = 1) -> Tensor:
    """Return how many sketches each example of a batch gets, int64 [N] on the CPU; 0 where its eigenvectors suffice.

    Args:
        likelihood: The likelihood of the labels.
        logits: [N, C].
        samples: k of each example, int64 [N]. An example has k - 1 + ``sketches`` cotangents.
        sketches: The fewest sketches of an example.
    """
    spectrum = likelihood.spectrum(logits.detach().to("cpu", torch.float64))
    return counts_of(
        tails(spectrum / spectrum.sum(1, True).clamp_min(torch.finfo(torch.float64).tiny)), samples, sketches
    )


def counts_of(tail: Tensor, samples: Tensor, sketches: int) -> Tensor:
    """Return how many sketches each example gets, as :func:`sketches_of` does, from its T(l), [N, R + 1]."""
    counts = torch.zeros_like(samples)
    for k in samples.unique().tolist():
        if k < tail.shape[1] - 1:
            some = samples == k
            counts[some] = k - 1 + sketches - least(tail[some], k, sketches)[1]
    return counts


@dataclass(frozen=True)
class MoreSketches:
    """More sketches for examples that were visited before, of what their leading eigenvectors leave.

    The logits are those of the first visit. Those of a second one may round differently, and so exchange eigenvectors
    of nearly equal eigenvalues: the sum would then miss one of them and have another one twice.

    Attributes:
        counts: How many sketches each example gets, int64 [N].
        logits: The logits of the first visit, [N, C].
    """

    counts: Tensor
    logits: Tensor

    def of(self, examples: Tensor) -> MoreSketches:
        """Return those of some examples."""
        return MoreSketches(self.counts[examples], self.logits[examples])


@dataclass(frozen=True)
class Parts:
    """How the squares of a batch's cotangents are taken apart, so that sketches tell their variance and their sum.

    The sketches of an example are its last cotangents, and eigenvectors come before them. The squares q_j of s sketches
    have the same distribution. So the variance of their sum is s times the variance of one, which is estimated from
    those whose squares are taken one by one.

    Attributes:
        sizes: The number of cotangents of each group. Groups of one are taken one by one.
        counts: The number of sketches of each example, int64 [N], on the CPU or on the device of the squares.
        are_apart: Whether no group has eigenvectors of one example and sketches of another.
        only_sketches: Whether there are no eigenvectors at all.
    """

    sizes: list[int]
    counts: Tensor
    are_apart: bool
    only_sketches: bool

    @classmethod
    def of(cls, cotangents: int, counts: Tensor, only_sketches: bool = False) -> Parts:
        """Divide K ``cotangents`` of examples that have ``counts`` [N] sketches, some of them at least two."""
        if counts.device.type == "cpu":
            few, most = int(counts[counts > 0].min()), int(counts.max())
        else:  # where the host would wait for them
            few, most = min(2, cotangents), cotangents
        apart = only_sketches or most - few <= LARGEST_MIXTURE
        if apart and not only_sketches:
            last = min(few, MEASURED)
            sizes = [cotangents - most, *[1] * (most - few), few - last, *[1] * last]
        else:
            last = min(cotangents, MEASURED)
            sizes = [cotangents - last, *[1] * last]
        return cls([size for size in sizes if size], counts, apart, only_sketches)

    def sums_and_variances(self, squares: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums over the sketches of each example and their estimated variances, [N, D] both in float64.

        Args:
            squares: The sums over each group of cotangents, [N, D].
        """
        squares = [q if q.device.type in CHUNK else q.cpu() for q in squares]  # other devices may lack float64
        device = squares[0].device
        sizes = to_device(torch.tensor(self.sizes), self.counts.device)
        left = sizes.flip(0).cumsum(0).flip(0)[:, None]  # the cotangents from each group on
        there = self.counts >= left  # which groups have sketches of which examples, [G, N]
        alone = there & (sizes == 1)[:, None]
        seen = alone.cumsum(0)
        shares, scale = alone.double() / seen.clamp_min(1), self.counts.double() / (seen[-1] - 1).clamp_min(1)
        factors = to_device(torch.cat([there, shares, scale[None]]), device)[:, :, None]
        found = torch.zeros(2, *squares[0].shape, dtype=torch.float64, device=device)
        columns = (q.split(chunk_width(squares[0]), 1) for q in (*found, *squares))
        for total, spread, *groups in zip(*columns, strict=True):
            mean = torch.zeros_like(total)
            for g, (q, size) in enumerate(zip(groups, self.sizes, strict=True)):
                q = q.double()  # squares of squares leave the range of float32
                total.add_(q) if self.only_sketches else total.addcmul_(q, factors[g])
                if size == 1:  # Welford's (1962) updates, which do not cancel
                    apart = q - mean
                    mean.addcmul_(apart, factors[len(sizes) + g])
                    spread.addcmul_(apart.mul_(q - mean), factors[g])
            spread.mul_(factors[-1])
        return found[0], found[1]


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
