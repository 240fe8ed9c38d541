"""Likelihoods p(y | z) of labels y given logits z, and factors of the Fisher information S_n of the logits.

A new likelihood implements :class:`Likelihood` and has an entry in :data:`LIKELIHOODS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.asynchronous import to_device

DENSE_CLASSES = 64  # above this many classes eigenvectors come from the secular equation, not from a dense solver
# The roots of the secular equation for which the classes behind so many likeliest ones count as one.
FEW_ROOTS, FEW_CLASSES = 16, 32
# The most eigenvectors that a sketch of classes combines before the classes. On a GPU each of them costs ten launches.
COMBINED = {"cpu": 4, "cuda": 2}
CLASSES_SHARE = 0.05  # of the variance of eigenvectors: so little more may a sketch of classes have


class Likelihood(ABC):
    """A model of the labels y given the logits z of a batch.

    All methods take z as float64 [N, C]. S_n is the Fisher information of the logits of example n.

    Attributes:
        on_device: Whether the methods take z on a CUDA device too, and do not make the host wait there. Each class says
            so of itself. Otherwise z is brought to the CPU.
    """

    on_device: ClassVar[bool] = False

    @abstractmethod
    def exact(self, z: Tensor) -> Tensor:
        """Return cotangents u [K, N, C] with sum_k u_k u_k^T = S_n."""

    @abstractmethod
    def rank(self, classes: int) -> int:
        """Return the rank of S_n. With at least this many cotangents, ``deflated`` is exact."""

    @abstractmethod
    def spectrum(self, z: Tensor) -> Tensor:
        """Return the eigenvalues of S_n, the largest first, [N, rank]. Small ones may be approximate, also in order."""

    @abstractmethod
    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        """Return tr(W^T S_n W), [N], with W the ``weight`` [C, D] of the layer that gave the logits.

        This is the trace of the Fisher information of the layer's input.
        """

    @abstractmethod
    def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        """Return leading eigenvectors of S_n and random-sign sketches of the rest, [max(leading) + K, N, C].

        The first max(leading) cotangents are eigenvectors, each scaled by the root of its eigenvalue. Example n has
        the first ``leading[n]`` of them and zeros after that. ``leading`` is on the CPU. Then comes one sketch of the
        remaining part of S_n for each row of ``signs`` [K, N, C]. The caller scales the signs by 1 / sqrt(K), so that
        the sketches' squares are averaged.
        """

    @abstractmethod
    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        """Return B_n @ signs_n, [..., N, C], for signs [..., N, C] and a factor with B_n B_n^T = S_n."""

    @abstractmethod
    def draw(self, z: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw ``samples`` labels for each example from the model: [samples, N, ...]."""

    @abstractmethod
    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of -log p(labels | z) with respect to z, [..., N, C]."""


def random_signs(
    n: int, k: int, c: int, source: torch.Generator | Tensor | None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return independent random signs [k, n, c] that depend neither on the batch size nor on the device.

    They are drawn example by example from a generator of the CPU, or from each example's own seed, int64 [n].
    """
    if isinstance(source, Tensor):
        # SplitMix64 (Steele, Lea and Flood, 2014) turns a counter into random bits. The highest bit is the sign.
        counters = torch.arange(1, k * c + 1, device=device) * _GOLDEN
        bits = mixed(mixed(to_device(source, device))[:, None] + counters)
        return (1 - 2 * (bits < 0).double()).view(n, k, c).transpose(0, 1)
    bits = torch.randint(0, 2, (n, k, c), generator=source, dtype=torch.uint8)
    return to_device(bits, device).double().mul_(2).sub_(1).transpose(0, 1)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer; sums and products wrap around


def mixed(x: Tensor) -> Tensor:
    """Mix int64 so that each bit of the result depends on every bit of x, by the finaliser of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * (factor - 2**64)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _uniform(z: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers in [0, 1), [N, *shape], example by example: they do not depend on the batch size."""
    return to_device(torch.rand((z.shape[0], *shape), generator=generator, dtype=z.dtype), z.device)


def _first(r: int, leading: Tensor, z: Tensor) -> Tensor:
    """Return which of r eigenvectors are among the leading ones of each example, [N, 1, r] on the device of z."""
    return to_device(torch.arange(r) < leading[:, None, None], z.device)


class Softmax(Likelihood):
    """One label in 0 to C - 1 for each example; S = diag(p) - p p^T, with rank C - 1."""

    on_device = True

    def exact(self, z: Tensor) -> Tensor:
        # The Cholesky factor of a multinomial covariance in closed form (Tanabe and Sagae, 1992, J. R. Stat. Soc. B).
        # It has C - 1 columns, while sqrt(p_c) (e_c - p) has C.
        p = z.softmax(1)
        tail = p.flip(1).cumsum(1).flip(1)  # [N, C], tail[c] = p[c] + p[c + 1] + ...; 1 - sum would cancel
        here, after = tail[:, :-1], tail[:, 1:]
        diagonal = (p[:, :-1] * after / here.clamp_min(torch.finfo(z.dtype).tiny)).sqrt()  # [N, C - 1]
        ratio = p[:, None, :] / after[:, :, None].clamp_min(torch.finfo(z.dtype).tiny)  # [N, C - 1, C]
        factor = torch.eye(p.shape[1], dtype=z.dtype, device=z.device)[:-1] - ratio.triu(1)
        return (diagonal[:, :, None] * factor).transpose(0, 1)

    def rank(self, classes: int) -> int:
        return classes - 1

    def spectrum(self, z: Tensor) -> Tensor:
        p = z.softmax(1).sort(1, descending=True).values
        # The smallest eigenvalue is 0, with eigenvector (1, ..., 1). With many classes, the likeliest ones give the
        # large eigenvalues. The others lie between neighbouring probabilities, which approximate them.
        few = p.shape[1] - 1 if p.shape[1] <= DENSE_CLASSES else FEW_CLASSES
        values = torch.cat([torch.linalg.eigvalsh(_gathered(t, few)).flip(1)[:, :few] for t in p.split(1024)])
        return torch.cat([values, p[:, few + 1 :]], 1).clamp_min(0)

    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        p = z.softmax(1)
        # A sum over classes of the distance from the likeliest class does not cancel for a confident head.
        top = p.argmax(1)
        products = weight @ weight.T
        squares = products.diag()
        from_top = squares - 2 * products[top] + squares[top][:, None]  # [N, C], |w_c - w_top|^2
        mean = (p @ weight) - p.sum(1, keepdim=True) * weight[top]
        return ((p * from_top.clamp_min(0)).sum(1) - mean.square().sum(1)).clamp_min(0)

    def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        p = z.softmax(1)
        most = int(leading.max()) if len(leading) else 0
        exact = leading >= self.rank(p.shape[1])
        if z.device.type != "cpu":  # where the host would wait for a dense solver, and for a choice among rows
            if exact.any() and exact.all():
                return torch.cat([self.exact(z), z.new_zeros(len(signs), *z.shape)])
            found = self._deflated_by_roots(z, leading, signs)
            if exact.any():
                found[:most] = torch.where(to_device(exact, z.device)[:, None], self.exact(z), found[:most])
            return found
        if p.shape[1] <= DENSE_CLASSES:
            return _deflated_by_solver(p, leading, signs)
        flat = (leading == 0) & _are_flat(p)
        found = z.new_zeros(most + len(signs), *z.shape)
        if exact.any():  # no sketch would mend eigenvectors whose roots coincide
            found[:most, exact] = self.exact(z[exact])
        if flat.any():
            found[most:, flat] = self.sketch(z[flat], signs[:, flat])
        if (others := ~(exact | flat)).any():
            u = self._deflated_by_roots(z[others], leading[others], signs[:, others])
            first = len(u) - len(signs)
            found[:first, others], found[most:, others] = u[:first], u[first:]
        return found

    def _deflated_by_roots(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        """As :meth:`deflated`, with eigenvectors of the secular equation, which need not be exact.

        With B B^T = S, any orthonormal Q gives S = B Q Q^T B^T + B (I - Q Q^T) B^T. So the result is unbiased even
        where Q is inaccurate. The right singular vectors of B make the second part small.
        """
        p = z.softmax(1)
        most = int(leading.max()) if len(leading) else 0
        apart, among = _jittered(p), min(COMBINED["cpu" if z.device.type == "cpu" else "cuda"], p.shape[1] // 2)
        values = _leading_eigenvalues(apart, min(most + among, p.shape[1] - 1))  # [N, r]
        reach = _reach(values, p, to_device(leading, z.device), among)
        if z.device.type == "cpu":
            values = values[:, : int(reach.max()) if len(reach) else 0]
        vectors = _eigenvectors(apart, values)  # [N, C, r]
        right = p.sqrt()[:, :, None] * (vectors - (p[:, :, None] * vectors).sum(1, keepdim=True))  # B^T v
        q = _orthonormal(right)
        number = torch.arange(q.shape[2], device=z.device)
        alone = _first(q.shape[2], leading, z)  # [N, 1, r]
        kept = q * (number < reach[:, None, None])
        signs = signs.permute(1, 2, 0)  # [N, C, sketches]
        # The signs of the combined eigenvectors are products of two signs. So they have no correlation with each other
        # and with the signs of the classes, and all signs of an example come from one draw.
        pairs = (signs[:, : 2 * among : 2] * signs[:, 1 : 2 * among : 2].sign())[:, number % among]
        remainder = signs - kept @ (kept.mT @ signs) + (kept * ~alone) @ pairs
        return self.sketch(z, torch.cat([(q * alone)[:, :, :most], remainder], 2).permute(2, 0, 1))

    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        # With nearly all of the probability at one class, its sqrt(p) s - p sum_c sqrt(p_c) s_c would cancel.
        p = z.softmax(1)
        top = p.argmax(1, keepdim=True)
        others = p.scatter(1, top, 0).sum(1, keepdim=True)
        weighted = p.sqrt() * signs
        place = top.expand(*weighted.shape[:-1], 1)
        of_top = weighted.gather(-1, place)
        rest = weighted.scatter_(-1, place, 0).sum(-1, keepdim=True)
        weighted.addcmul_(p, rest + of_top, value=-1)
        return weighted.scatter_(-1, place, of_top * others - p.gather(1, top) * rest)

    def draw(self, z: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        cumulative = z.softmax(1).cumsum(1)
        cumulative = cumulative / cumulative[:, -1:]  # rounding must leave no gap below one
        return torch.searchsorted(cumulative, _uniform(z, (samples,), generator), right=True).T

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        p, labels = z.softmax(1).expand(*labels.shape, -1), labels[..., None]
        others = p.scatter(-1, labels, 0)
        return others.scatter_(-1, labels, -others.sum(-1, keepdim=True))  # p - 1 would cancel


class _Diagonal(Likelihood):
    """A likelihood whose outputs are independent given the logits, so that S is diagonal."""

    @abstractmethod
    def variance(self, z: Tensor) -> Tensor:
        """Return the diagonal of S, [N, C]."""

    def exact(self, z: Tensor) -> Tensor:
        return torch.diag_embed(self.variance(z).sqrt()).transpose(0, 1)

    def rank(self, classes: int) -> int:
        return classes

    def spectrum(self, z: Tensor) -> Tensor:
        return self.variance(z).sort(1, descending=True).values

    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        return self.variance(z) @ weight.square().sum(1)

    def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        root = self.variance(z).sqrt()
        most = int(leading.max()) if len(leading) else 0
        # Among equal ones the first: topk would choose others for another ``most``.
        largest = root.sort(dim=1, descending=True, stable=True).indices[:, :most]  # [N, most]
        first = _first(most, leading, z).squeeze(1).T.to(z.dtype)[:, :, None]  # [most, N, 1]
        kept = torch.zeros(most, *z.shape, dtype=z.dtype, device=z.device).scatter_(2, largest.T[:, :, None], first)
        return torch.cat([kept * root, root * (1 - kept.sum(0)) * signs])

    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        return self.variance(z).sqrt() * signs


class Sigmoid(_Diagonal):
    """C independent yes-or-no labels for each example (multi-label classification); S = diag(p (1 - p))."""

    on_device = True

    def variance(self, z: Tensor) -> Tensor:
        return z.sigmoid() * (-z).sigmoid()

    def draw(self, z: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        uniform = _uniform(z, (samples, z.shape[1]), generator).transpose(0, 1)
        return (uniform < z.sigmoid()).to(z.dtype)

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        return z.sigmoid() - labels


class Gaussian(_Diagonal):
    """Regression with noise of standard deviation ``sigma``: y = z + sigma * N(0, I); S = I / sigma^2."""

    on_device = True

    def __init__(self, sigma: float = 1.0) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}, expected a positive number")
        self.sigma = sigma

    def variance(self, z: Tensor) -> Tensor:
        return torch.full_like(z, self.sigma**-2)

    def draw(self, z: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        uniform = _uniform(z, (samples, z.shape[1]), generator).transpose(0, 1)
        return z + self.sigma * torch.special.ndtri(uniform.clamp_min(2**-54))

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        return (z - labels) / self.sigma**2


LIKELIHOODS: dict[str, type[Likelihood]] = {"softmax": Softmax, "sigmoid": Sigmoid, "gaussian": Gaussian}


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood with a name in :data:`LIKELIHOODS`, or the given likelihood."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}: expected one of {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[likelihood]()


def _covariance(p: Tensor) -> Tensor:
    """Return diag(p) - p p^T, [N, C, C], with a small relative error even for confident rows, where it is tiny."""
    top = p.argmax(1, keepdim=True)
    complement = (1 - p).scatter(1, top, p.scatter(1, top, 0).sum(1, keepdim=True))  # 1 - p, without cancellation
    covariance = -p[:, :, None] * p[:, None, :]
    covariance.diagonal(dim1=1, dim2=2).copy_(p * complement)
    return covariance


def _deflated_by_solver(p: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
    """As :meth:`Likelihood.deflated`, with all eigenvectors of the probabilities' covariance."""
    values, vectors = torch.linalg.eigh(_covariance(_apart(p)))
    values, vectors = values.flip(1)[:, :-1], vectors.flip(2)[:, :, :-1]  # without the smallest, which is 0
    # The solver's choice between v and -v depends on rounding. A sketch of several eigenvectors would, too.
    turned = torch.arange(1, p.shape[1] + 1, dtype=p.dtype).cos() @ vectors < 0  # [N, C - 1]
    vectors = torch.where(turned[:, None], -vectors, vectors)
    columns = vectors * values.clamp_min(0).sqrt()[:, None, :]  # [N, C, C - 1]
    first = _first(columns.shape[2], leading, p)
    rest = torch.einsum("ncr,snr->snc", columns * ~first, signs[:, :, :-1])
    most = int(leading.max()) if len(leading) else 0
    return torch.cat([(columns * first)[:, :, :most].permute(2, 0, 1), rest])


def _gathered(p: Tensor, few: int) -> Tensor:
    """Return a matrix [N, few + 1, few + 1] with about the largest eigenvalues of diag(p) - p p^T, for sorted rows p.

    The classes behind the first few count as one, with the same sums of squares and of cubes: a pole of the secular
    equation (:func:`_leading_eigenvalues`). With a single class behind them the eigenvalues are the same.
    """
    top, rest = p[:, :few], p[:, few:]
    squares = rest.square().sum(1, keepdim=True)
    pole = rest.pow(3).sum(1, keepdim=True) / squares.clamp_min(torch.finfo(p.dtype).tiny)
    root = torch.cat([top, squares.sqrt()], 1)
    matrix = -root[:, :, None] * root[:, None, :]
    complement = torch.cat([p[:, 1:].sum(1, keepdim=True), 1 - top[:, 1:]], 1)  # 1 - p, without cancellation
    matrix.diagonal(dim1=1, dim2=2).copy_(torch.cat([top * complement, (pole - squares).clamp_min(0)], 1))
    return matrix


def _apart(p: Tensor) -> Tensor:
    """Shift the probabilities of rows [N, C] that have equal ones, by far less than any rounding of a network.

    A solver's choice among the eigenvectors of equal eigenvalues depends on the place of the row in its batch.
    """
    ordered = p.sort(1).values
    equal = (ordered.diff(dim=1) < 1e-9 * ordered[:, 1:]).any(1, keepdim=True)
    shifted = p * (1 + 1e-11 * torch.linspace(-1, 1, p.shape[1], dtype=p.dtype, device=p.device))
    return torch.where(equal, shifted / shifted.sum(1, keepdim=True), p)


def _jittered(p: Tensor) -> Tensor:
    """Separate equal probabilities, between which there is no root, by a shift far below any sampling error."""
    jitter = 1 + 1e-9 * torch.linspace(-1, 1, p.shape[1], dtype=p.dtype, device=p.device)
    return p.clamp_min(torch.finfo(p.dtype).tiny) * jitter


def _leading_eigenvalues(p: Tensor, r: int) -> Tensor:
    """Approximate the r leading eigenvalues [N, r] of diag(p) - p p^T, from its secular equation.

    They interlace with the sorted probabilities, p_(i) >= lambda_i >= p_(i+1), and are the roots of
    1 - sum_c p_c^2 / (p_c - lambda). For the first :data:`FEW_ROOTS` of them, the classes behind the likeliest
    :data:`FEW_CLASSES` count as one pole with the same first two moments. A point of the search takes
    O(N FEW_CLASSES r) operations.
    """
    # Which classes count apart depends on the number of the root alone, so that other examples do not change it.
    few, classes = min(r, FEW_ROOTS), p.shape[1]
    found = []
    for start, stop, width in ((0, few, min(FEW_CLASSES, classes)), (few, r, classes)):
        if start < stop:
            top = p.topk(width, dim=1)
            moments = None
            if width < classes:
                rest = p.scatter(1, top.indices, 0)
                squares = rest.square()
                moments = squares.sum(1)[:, None, None], (squares * rest).sum(1)[:, None, None]
            high, low = top.values[:, None, start:stop], top.values[:, None, start + 1 : stop + 1]  # [N, 1, roots]
            found.append(_roots(top.values, moments, low, high)[:, 0])
    return torch.cat(found, 1)


def _eigenvectors(p: Tensor, values: Tensor) -> Tensor:
    """Return the eigenvectors [N, C, r] of diag(p) - p p^T with these eigenvalues, with the entries p_c / (p_c - l)."""
    gap = p[:, :, None] - values[:, None, :]
    vectors = p[:, :, None] / torch.where(gap == 0, torch.finfo(p.dtype).tiny, gap)
    return vectors / vectors.abs().amax(1, keepdim=True)


def _are_flat(p: Tensor) -> Tensor:
    """Return for which examples, [N], a sketch of classes alone is nearly as good as one of eigenvectors."""
    top = p.max(1, keepdim=True)
    rest = p.scatter(1, top.indices, 0)
    squared = rest.square()
    first, left, squares = top.values[:, 0], rest.sum(1), squared.sum(1)  # nothing cancels for a confident head
    of_rest = rest - squared
    trace = first * left + of_rest.sum(1)
    # The squared norm of S = diag(p) - p p^T: the squares of its diagonal, and of its other entries.
    second = (first * left).square() + of_rest.square().sum(1)
    second += 2 * first.square() * squares + squares.square() - squared.square().sum(1)
    return second <= CLASSES_SHARE * (trace.square() - second)


def _reach(values: Tensor, p: Tensor, leading: Tensor, among: int) -> Tensor:
    """Return how many eigenvectors of each example are kept apart from its classes, int64 [N]: at least ``leading``.

    A sketch that combines the columns b_c = sqrt(p_c) (e_c - p) of B has the variance 2 sum_i l_i^2 more than one that
    combines eigenvectors, if each eigenvector is spread over many columns. Next to 4 sum_{i < j} l_i l_j this is much
    where few eigenvalues are large. Up to ``among`` of them are combined: as many as leave little of it, or all if
    these leave half of it at most. The result depends on no other example.

    Args:
        values: The first r eigenvalues, [N, r].
        p: The probabilities, [N, C]. The sorted ones approximate the other eigenvalues.
        leading: The eigenvectors that are no part of a sketch, [N].
        among: The most eigenvectors that are a part of each sketch.
    """
    r = values.shape[1]
    number = torch.arange(among + 1, device=p.device)
    place = leading[:, None] + number[:among]
    here = torch.where(place < r, values.gather(1, place.clamp_max(r - 1)), 0)  # [N, among]
    top = p.topk(r + 1, dim=1)
    others = p.scatter(1, top.indices, 0)
    # What l_1, l_2, ... are at least, about. Then sums over i > m of l_i and of l_i^2, for m from ``leading`` on.
    behind = torch.stack([top.values[:, 1:], top.values[:, 1:].square()])
    behind = torch.cat([behind, torch.stack([others.sum(1), others.square().sum(1)])[:, :, None]], 2)
    end = (leading + among).clamp_max(r)[None, :, None].expand(2, -1, 1)
    behind = behind.flip(2).cumsum(2).flip(2).gather(2, end)
    tails = torch.cat([torch.stack([here, here.square()]), behind], 2)
    first, second = tails.flip(2).cumsum(2).flip(2)  # [N, among + 1]
    enough = second <= CLASSES_SHARE * (first[:, :1].square() - second[:, :1])
    fewest = torch.where(enough, number, among + 1).amin(1)
    half = torch.where(second[:, among] <= second[:, 0] / 2, among, 0)
    return (leading + torch.where(fewest <= among, fewest, half)).clamp_max(r)


def _roots(top: Tensor, moments: tuple[Tensor, Tensor] | None, low: Tensor, high: Tensor) -> Tensor:
    """Find the roots [N, 1, r] of 1 - sum_c p_c^2 / (p_c - l) + a^2 / (a l - b) between ``low`` and ``high``.

    ``top`` are the p_c, [N, c], and (a, b) the sums of squares and of cubes of the others, [N, 1, 1], if there are any.
    The function falls from +inf to -inf between neighbouring poles. Each step looks at many points between them: a call
    costs more than what it computes, if that is little. The roots are found to 2^-60 of the intervals.
    """
    bits = _bits(len(top), top.shape[1], low.shape[2], top.device.type)
    steps = -(-60 // bits)
    inner = torch.arange(1, 2**bits, dtype=top.dtype, device=top.device)
    low, width = low[..., None], (high - low)[..., None]  # [N, 1, r, 1]
    moments = None if moments is None else (moments[0][..., None], moments[1][..., None])
    p, squares = top[:, :, None, None], top.square()[:, :, None, None]
    for step in range(1, steps + 1):
        part = 2.0 ** (-bits * step)  # of the first interval
        points = torch.addcmul(low, width, inner, value=part)  # [N, 1, r, 2^bits - 1]
        below = (squares / (p - points)).sum(1, keepdim=True) < _others(moments, points)
        low = torch.addcmul(low, width, below.sum(3, keepdim=True, dtype=p.dtype), value=part)
    return torch.add(low, width, alpha=part / 2)[..., 0]


def _others(moments: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor | float:
    """One plus the part of the secular function at x that the unlikely classes have."""
    if moments is None:
        return 1.0
    a, b = moments
    return 1 + a * (a / (a * x - b).clamp_min(torch.finfo(x.dtype).tiny))


def _bits(rows: int, classes: int, roots: int, device: str) -> int:
    """How many bits of a root a step finds. It looks at 2^bits numbers for each class and root of a row.

    On a CPU this depends on the classes alone, so that a row is rounded in the same way in every batch.
    """
    if device == "cpu":
        return 3 if classes <= FEW_CLASSES else 1
    return min(8, max(1, int(math.log2(2**26 / max(1, rows * classes * roots)))))


def _orthonormal(columns: Tensor) -> Tensor:
    """Return columns [N, C, r] that are orthonormal or zero and span those given, each on the side of its own."""
    if columns.device.type == "cpu":
        q = torch.linalg.qr(columns)[0]
        return q * (q * columns).sum(1, keepdim=True).sign()  # the solver's signs depend on rounding
    # cuSOLVER would be called for each example. A column that is a combination of the former ones becomes zero, because
    # rounding noise could lie in their span. The second pass removes what the first one left of them.
    tiny = torch.finfo(columns.dtype).tiny
    columns = columns / columns.norm(dim=1, keepdim=True).clamp_min(tiny)
    q = columns[:, :, :1]
    for k in range(1, columns.shape[2]):
        v = columns[:, :, k : k + 1]
        v = torch.baddbmm(v, q, q.mT @ v, alpha=-1)
        norm = v.norm(dim=1, keepdim=True)
        v = v * ((norm > 1e-8) / norm.clamp_min(tiny))
        q = torch.cat([q, torch.baddbmm(v, q, q.mT @ v, alpha=-1)], 2)
    return q
