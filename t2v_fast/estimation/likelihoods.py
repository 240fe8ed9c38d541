"""Likelihoods p(y | z) of labels y given logits z, and factors of the Fisher information S_n of the logits.

A new likelihood implements :class:`Likelihood` and has an entry in :data:`LIKELIHOODS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.asynchronous import to_device

DENSE_CLASSES = 64  # above this many classes eigenvectors come from the secular equation, not from a dense solver
FEW_SOLVED = 16  # up to this many, the solver finds them faster than the secular equation gives the eigenvalues alone
# The roots of the secular equation for which the classes behind so many likeliest ones count as one.
FEW_ROOTS, FEW_CLASSES = 16, 32
# The most eigenvectors that a sketch of classes combines before the classes. On a GPU each of them costs ten launches.
COMBINED = {"cpu": 4, "cuda": 2}
LARGEST_STEP = 2**26  # numbers that a step of the search for roots looks at on a GPU
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

    def trace(self, z: Tensor) -> Tensor:
        """Return the trace of S_n, [N]."""
        return self.spectrum(z).sum(1)

    def behind(self, z: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the eigenvalues of S_n behind the first l, and of their squares, [2, N, most + 1].

        l goes from 0 to ``most``, the rank at most. The eigenvalues are relative to their sum, and may be approximate.
        The second result is None, or the caller passes it to :meth:`deflated` as ``known``, which saves a search.
        """
        values = self.spectrum(z)
        values = values / values.sum(1, True).clamp_min(torch.finfo(z.dtype).tiny)
        sums = torch.stack([values, values.square()]).flip(2).cumsum(2).flip(2)
        return F.pad(sums, (0, 1))[:, :, : most + 1], None

    @abstractmethod
    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        """Return tr(W^T S_n W), [N], with W the ``weight`` [C, D] of the layer that gave the logits.

        This is the trace of the Fisher information of the layer's input.
        """

    @abstractmethod
    def deflated(
        self, z: Tensor, leading: Tensor, signs: Tensor, most: int | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Return leading eigenvectors of S_n and random-sign sketches of the rest, [most + K, N, C].

        The first ``most`` cotangents are eigenvectors, each scaled by the root of its eigenvalue. Example n has the
        first ``leading[n]`` of them and zeros after that. Then comes one sketch of the remaining part of S_n for each
        row of ``signs`` [K, N, C]. The caller scales the signs by 1 / sqrt(K), so that the sketches' squares are
        averaged.

        ``leading`` is int64 [N] on the CPU, and ``most`` is its largest entry. Only likelihoods that are
        :attr:`on_device` get a ``leading`` on a CUDA device, together with ``most``, which may then be larger.
        ``known`` is what :meth:`behind` found for at least ``most``; it is left out where that was None.
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


def largest(counts: Tensor) -> int:
    """Return the largest of some numbers, and 0 if there are none."""
    return int(counts.max()) if len(counts) else 0


def _first(r: int, leading: Tensor, z: Tensor) -> Tensor:
    """Return which of r eigenvectors are among the leading ones of each example, [N, 1, r] on the device of z."""
    return to_device(torch.arange(r, device=leading.device) < leading[:, None, None], z.device)


class Softmax(Likelihood):
    """One label in 0 to C - 1 for each example; S = diag(p) - p p^T, with rank C - 1."""

    on_device = True

    def exact(self, z: Tensor) -> Tensor:
        # The Cholesky factor of a multinomial covariance in closed form (Tanabe and Sagae, 1992, J. R. Stat. Soc. B).
        # It has C - 1 columns, while sqrt(p_c) (e_c - p) has C.
        p = z.softmax(1)
        tail = p.flip(1).cumsum(1).flip(1)  # [N, C], tail[c] = p[c] + p[c + 1] + ...; 1 - sum would cancel
        here, after = tail[:, :-1], tail[:, 1:]
        diagonal = (p[:, :-1] * (after / here.clamp_min(torch.finfo(z.dtype).tiny))).sqrt()  # [N, C - 1]
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

    def trace(self, z: Tensor) -> Tensor:
        return _traces(z.softmax(1))[0]

    def behind(self, z: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        p, known = z.softmax(1), None
        if z.device.type == "cpu" and p.shape[1] <= FEW_SOLVED:
            known = _eigencolumns(p)
            values = known[:, :, :most].square().sum(1)
        elif z.device.type == "cpu":
            few = min(most, FEW_ROOTS)
            values = _leading_eigenvalues(_jittered(p), few) if few else p[:, :0]
            if most > few:  # the others lie between neighbouring probabilities
                values = torch.cat([values, p.sort(1, descending=True).values[:, few + 1 : most + 1]], 1)
        else:
            known = _leading_eigenvalues(_jittered(p), _roots_of(z, most))
            values = known[:, :most]
        trace, squares = _traces(p)
        trace = trace.clamp_min(torch.finfo(z.dtype).tiny)[:, None]
        values = values / trace
        kept = F.pad(torch.stack([values, values.square()]).cumsum(2), (1, 0))
        whole = torch.stack([torch.ones_like(trace), squares[:, None] / trace / trace])
        return (whole - kept).clamp_min(0), known

    def deflated(
        self, z: Tensor, leading: Tensor, signs: Tensor, most: int | None = None, known: Tensor | None = None
    ) -> Tensor:
        p = z.softmax(1)
        rows = largest(leading) if most is None else most
        exact = leading >= self.rank(p.shape[1])
        if z.device.type != "cpu":  # where the host would wait for a dense solver, and for a choice among rows
            if most is not None or not exact.any():
                return self._deflated_by_roots(z, leading, signs, rows, known)
            if exact.all():
                return torch.cat([self.exact(z), z.new_zeros(len(signs), *z.shape)])
            found = self._deflated_by_roots(z, leading, signs, rows)
            found[:rows] = torch.where(to_device(exact, z.device)[:, None], self.exact(z), found[:rows])
            return found
        if known is not None:
            return _of_columns(known, leading, signs, rows)
        solved = p.shape[1] <= DENSE_CLASSES
        found = z.new_zeros(rows + len(signs), *z.shape)
        exact = exact & (not solved)  # all eigenvectors of the solver are as good
        if exact.any():  # no sketch would mend eigenvectors whose roots coincide
            found[:rows, exact] = self.exact(z[exact])
        if (flat := (leading == 0) & _are_flat(p)).any():
            found[rows:, flat] = self.sketch(z[flat], signs[:, flat])
        if (others := ~(exact | flat)).any():
            of_others = z[others], leading[others], signs[:, others], largest(leading[others])
            u = _of_columns(_eigencolumns(p[others]), *of_others[1:]) if solved else self._deflated_by_roots(*of_others)
            first = len(u) - len(signs)
            found[:first, others], found[rows:, others] = u[:first], u[first:]
        return found

    def _deflated_by_roots(
        self, z: Tensor, leading: Tensor, signs: Tensor, most: int, known: Tensor | None = None
    ) -> Tensor:
        """As :meth:`deflated`, with eigenvectors of the secular equation, which need not be exact.

        With B B^T = S, any orthonormal Q gives S = B Q Q^T B^T + B (I - Q Q^T) B^T. So the result is unbiased even
        where Q is inaccurate. The right singular vectors of B make the second part small.
        """
        p = z.softmax(1)
        apart, among = _jittered(p), _combined(z)
        values = _leading_eigenvalues(apart, _roots_of(z, most)) if known is None else known  # [N, r]
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

    def trace(self, z: Tensor) -> Tensor:
        return self.variance(z).sum(1)

    def spectrum(self, z: Tensor) -> Tensor:
        return self.variance(z).sort(1, descending=True).values

    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        return self.variance(z) @ weight.square().sum(1)

    def deflated(
        self, z: Tensor, leading: Tensor, signs: Tensor, most: int | None = None, known: Tensor | None = None
    ) -> Tensor:
        root = self.variance(z).sqrt()
        most = largest(leading) if most is None else most
        # Among equal ones the first: topk would choose others for another ``most``.
        likeliest = root.sort(dim=1, descending=True, stable=True).indices[:, :most]  # [N, most]
        first = _first(most, leading, z).squeeze(1).T.to(z.dtype)[:, :, None]  # [most, N, 1]
        kept = torch.zeros(most, *z.shape, dtype=z.dtype, device=z.device).scatter_(2, likeliest.T[:, :, None], first)
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


def _eigencolumns(p: Tensor) -> Tensor:
    """Return the eigenvectors of diag(p) - p p^T, scaled by the roots of their eigenvalues, [N, C, C - 1]."""
    values, vectors = torch.linalg.eigh(_covariance(_apart(p)))
    values, vectors = values.flip(1)[:, :-1], vectors.flip(2)[:, :, :-1]  # without the smallest, which is 0
    # The solver's choice between v and -v depends on rounding. A sketch of several eigenvectors would, too.
    turned = torch.arange(1, p.shape[1] + 1, dtype=p.dtype).cos() @ vectors < 0  # [N, C - 1]
    vectors = torch.where(turned[:, None], -vectors, vectors)
    return vectors * values.clamp_min(0).sqrt()[:, None, :]


def _of_columns(columns: Tensor, leading: Tensor, signs: Tensor, most: int) -> Tensor:
    """As :meth:`Softmax.deflated`, with all eigenvectors, from :func:`_eigencolumns`."""
    first = _first(columns.shape[2], leading, columns)
    rest = torch.einsum("ncr,snr->snc", columns * ~first, signs[:, :, :-1])
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
    """Separate equal probabilities, between which there is no root, by a shift far below any sampling error.

    The likeliest class stays as it is: with a confident head, a shift of it could exceed what it leaves to the others.
    """
    jitter = torch.linspace(-1e-9, 1e-9, p.shape[1], dtype=p.dtype, device=p.device)
    jitter = 1 + jitter - jitter[p.argmax(1)][:, None]
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
    # The first entry of the diagonal is p_(1) (1 - p_(1)). With a confident head, its complement is far below p_(1).
    first = p.max(1, keepdim=True)
    rest = p.scatter(1, first.indices, 0)
    of_first = first.values * rest.sum(1, keepdim=True)
    trace = of_first + (rest - rest.square()).sum(1, keepdim=True)  # the largest eigenvalue is at most this
    for start, stop, width in ((0, few, min(FEW_CLASSES, classes)), (few, r, classes)):
        if start < stop:
            top = p.topk(width, dim=1)
            moments = None
            if width < classes:
                rest = p.scatter(1, top.indices, 0)
                squares = rest.square()
                moments = squares.sum(1)[:, None, None], (squares * rest).sum(1)[:, None, None]
            high, low = top.values[:, None, start:stop], top.values[:, None, start + 1 : stop + 1]  # [N, 1, roots]
            if not start:
                high = torch.cat([torch.minimum(high[:, :, :1], trace[:, :, None]), high[:, :, 1:]], 2)
            found.append(_roots(top.values, of_first, moments, low, high)[:, 0])
    return torch.cat(found, 1)


def _eigenvectors(p: Tensor, values: Tensor) -> Tensor:
    """Return the eigenvectors [N, C, r] of diag(p) - p p^T with these eigenvalues, with the entries p_c / (p_c - l)."""
    gap = p[:, :, None] - values[:, None, :]
    vectors = p[:, :, None] / torch.where(gap == 0, torch.finfo(p.dtype).tiny, gap)
    return vectors / vectors.abs().amax(1, keepdim=True)


def _combined(z: Tensor) -> int:
    """Return how many eigenvectors a sketch combines at most."""
    return min(COMBINED["cpu" if z.device.type == "cpu" else "cuda"], z.shape[1] // 2)


def _roots_of(z: Tensor, most: int) -> int:
    """Return how many eigenvalues are needed for ``most`` eigenvectors and those that a sketch combines."""
    return min(most + _combined(z), z.shape[1] - 1)


def _traces(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the traces of S = diag(p) - p p^T and of S^2, [N] both. Nothing cancels for a confident head."""
    top = p.max(1, keepdim=True)
    rest = p.scatter(1, top.indices, 0)
    squared = rest.square()
    first, left, squares = top.values[:, 0], rest.sum(1), squared.sum(1)
    of_rest = rest - squared
    # The trace of S^2 is the sum of the squares of the diagonal of S, and of its other entries.
    second = (first * left).square() + of_rest.square().sum(1)
    second += 2 * first.square() * squares + squares.square() - squared.square().sum(1)
    return first * left + of_rest.sum(1), second


def _are_flat(p: Tensor) -> Tensor:
    """Return for which examples, [N], a sketch of classes alone is nearly as good as one of eigenvectors."""
    trace, second = _traces(p)
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


def _roots(top: Tensor, of_first: Tensor, moments: tuple[Tensor, Tensor] | None, low: Tensor, high: Tensor) -> Tensor:
    """Find the roots [N, 1, r] of 1 - sum_c p_c^2 / (p_c - l) + a^2 / (a l - b) between ``low`` and ``high``.

    ``top`` are the p_c, [N, c], with the likeliest first. ``of_first`` is p_1 (1 - p_1), [N, 1], which cannot be
    computed from p_1 where p_1 is nearly one: 1 - p_1^2 / (p_1 - l) is (p_1 (1 - p_1) - l) / (p_1 - l). And (a, b) are
    the sums of squares and of cubes of the other classes, [N, 1, 1], if there are any. The function falls from +inf to
    -inf between neighbouring poles. Each step looks at many points between them: a call costs more than what it
    computes, if that is little. The roots are found to 2^-60 of the intervals.
    """
    bits = _bits(len(top), top.shape[1], low.shape[2], top.device.type)
    steps = -(-60 // bits)
    inner = torch.arange(1, 2**bits, dtype=top.dtype, device=top.device)
    low, width = low[..., None], (high - low)[..., None]  # [N, 1, r, 1]
    moments = None if moments is None else (moments[0][..., None], moments[1][..., None])
    first, of_first = top[:, :1, None, None], of_first[:, :, None, None]
    p, squares = top[:, 1:, None, None], top[:, 1:].square()[:, :, None, None]
    for step in range(1, steps + 1):
        part = 2.0 ** (-bits * step)  # of the first interval
        points = torch.addcmul(low, width, inner, value=part)  # [N, 1, r, 2^bits - 1]
        others = (of_first - points) / (first - points)
        if moments is not None:
            others = others + _gathered_part(*moments, points)
        below = (squares / (p - points)).sum(1, keepdim=True) < others
        low = torch.addcmul(low, width, below.sum(3, keepdim=True, dtype=p.dtype), value=part)
    return torch.add(low, width, alpha=part / 2)[..., 0]


def _gathered_part(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The part of the secular function at x that the unlikely classes have."""
    return a * (a / (a * x - b).clamp_min(torch.finfo(x.dtype).tiny))


def _bits(rows: int, classes: int, roots: int, device: str) -> int:
    """How many bits of a root a step finds. It looks at 2^bits numbers for each class and root of a row.

    On a CPU this depends on the classes alone, so that a row is rounded in the same way in every batch.
    """
    if device == "cpu":
        return 3 if classes <= FEW_CLASSES else 1
    return min(8, max(1, int(math.log2(LARGEST_STEP / max(1, rows * classes * roots)))))


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
