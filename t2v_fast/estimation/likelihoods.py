"""Likelihoods p(y | z) of labels given logits, and the square roots of their Fisher information of the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

DENSE_CLASSES = 64  # above this many classes eigenvectors come from the secular equation, not from a dense solver


class Likelihood(ABC):
    """A model of labels y given the logits z [N, C] of a batch (float64)."""

    @abstractmethod
    def exact(self, z: Tensor) -> Tensor:
        """Cotangents [K, N, C] with sum_k u_k u_k^T = S_n."""

    @abstractmethod
    def rank(self, classes: int) -> int:
        """That of S_n: from this many cotangents on, ``deflated`` is exact."""

    @abstractmethod
    def spectrum(self, z: Tensor) -> Tensor:
        """The eigenvalues of S_n, the largest first, [N, rank]; of many classes the small ones only about."""

    @abstractmethod
    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        """tr(W^T S_n W), [N], W = ``weight`` [C, D] of the layer that gave the logits: the Fisher of its input."""

    @abstractmethod
    def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        """The ``leading`` [N] first eigenvectors of each S_n, [max(leading), N, C] with zeros where an example has
        fewer; then a sketch of the rest for each row of ``signs`` [K, N, C], whose squares are averaged."""

    @abstractmethod
    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        """B_n @ signs_n, where B_n B_n^T = S_n and signs [..., N, C]."""

    @abstractmethod
    def draw(self, z: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """``samples`` labels for each example, drawn from the model: [K, N, ...]."""

    @abstractmethod
    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log p(labels | z) with respect to z, [..., N, C]."""


def random_signs(n: int, k: int, c: int, source: torch.Generator | Tensor | None) -> Tensor:
    """Independent signs [k, n, c], which do not depend on the batch size: drawn example by example from a generator, or
    each example's own, from its seed [n]."""
    if isinstance(source, Tensor):
        # SplitMix64 (Steele, Lea and Flood, 2014): the numbers of a counter, whose highest bit is the sign.
        bits = mixed(mixed(source)[:, None] + torch.arange(1, k * c + 1) * _GOLDEN)
        return (1 - 2 * (bits < 0).double()).view(n, k, c).transpose(0, 1)
    return (torch.randint(0, 2, (n, k, c), generator=source, dtype=torch.float64) * 2 - 1).transpose(0, 1)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which wrap around


def mixed(x: Tensor) -> Tensor:
    """int64 of which each bit depends on every bit of x: the finaliser of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * (factor - 2**64)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _uniform(z: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), [N, *shape], drawn example by example for the same reason."""
    return torch.rand((z.shape[0], *shape), generator=generator, dtype=z.dtype)


def _first(r: int, leading: Tensor) -> Tensor:
    """Which of r eigenvectors are among the leading ones of each example, [N, 1, r]."""
    return torch.arange(r) < leading[:, None, None]


class Softmax(Likelihood):
    """One label in 0..C-1 for each example; S = diag(p) - p p^T."""

    def exact(self, z: Tensor) -> Tensor:
        # The Cholesky factor of a multinomial covariance in closed form (Tanabe and Sagae, 1992, J. R. Stat. Soc. B):
        # C - 1 columns, where sqrt(p_c) (e_c - p) needs C.
        p = z.softmax(1)
        tail = p.flip(1).cumsum(1).flip(1)  # [N, C], tail[c] = p[c] + p[c + 1] + ...; no 1 - sum, which would cancel
        here, after = tail[:, :-1], tail[:, 1:]
        diagonal = (p[:, :-1] * after / here.clamp_min(torch.finfo(z.dtype).tiny)).sqrt()  # [N, C - 1]
        ratio = p[:, None, :] / after[:, :, None].clamp_min(torch.finfo(z.dtype).tiny)  # [N, C - 1, C]
        factor = torch.eye(p.shape[1], dtype=z.dtype)[:-1] - ratio.triu(1)
        return (diagonal[:, :, None] * factor).transpose(0, 1)

    def rank(self, classes: int) -> int:
        return classes - 1

    def spectrum(self, z: Tensor) -> Tensor:
        p = z.softmax(1).sort(1, descending=True).values
        # The least eigenvalue of all classes is 0, of (1, ..., 1). Of many classes the likeliest have the large ones;
        # the others lie between neighbouring probabilities.
        values = torch.cat([torch.linalg.eigvalsh(_covariance(t)).flip(1) for t in p[:, :DENSE_CLASSES].split(1024)])
        return torch.cat([values, p[:, DENSE_CLASSES + 1 :]], 1)[:, : p.shape[1] - 1].clamp_min(0)

    def trace_through(self, z: Tensor, weight: Tensor) -> Tensor:
        p = z.softmax(1)
        # As a sum over classes of the distance from the likeliest, which does not cancel for a confident head.
        top = p.argmax(1)
        products = weight @ weight.T
        squares = products.diag()
        from_top = squares - 2 * products[top] + squares[top][:, None]  # [N, C], |w_c - w_top|^2
        mean = (p @ weight) - p.sum(1, keepdim=True) * weight[top]
        return ((p * from_top.clamp_min(0)).sum(1) - mean.square().sum(1)).clamp_min(0)

    def deflated(self, z: Tensor, leading: Tensor, signs: Tensor) -> Tensor:
        p = z.softmax(1)
        most = int(leading.max()) if len(leading) else 0
        if p.shape[1] <= DENSE_CLASSES:
            values, vectors = torch.linalg.eigh(_covariance(p))
            values, vectors = values.flip(1)[:, :-1], vectors.flip(2)[:, :, :-1]  # the least one is 0, of (1, ..., 1)
            columns = vectors * values.clamp_min(0).sqrt()[:, None, :]  # [N, C, C - 1]
            first = _first(columns.shape[2], leading)
            rest = torch.einsum("ncr,snr->snc", columns * ~first, signs[:, :, :-1])
            return torch.cat([(columns * first)[:, :, :most].permute(2, 0, 1), rest])
        if most == 0:
            return self.sketch(z, signs)
        # With B B^T = S, any orthonormal Q gives S = B Q Q^T B^T + B (I - Q Q^T) B^T, so the result is unbiased however
        # accurate Q is; the right singular vectors of B make the second part small.
        vectors = _leading_eigenvectors(p, most)  # [N, C, most]
        root = p.sqrt()[:, :, None]
        right = root * (vectors - (p[:, :, None] * vectors).sum(1, keepdim=True))  # B^T v
        q = torch.linalg.qr(right)[0] * _first(most, leading)
        signs = signs.permute(1, 2, 0)  # [N, C, sketches]
        remainder = signs - q @ (q.mT @ signs)
        return self.sketch(z, torch.cat([q, remainder], 2).permute(2, 0, 1))

    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        p = z.softmax(1)
        weighted = p.sqrt() * signs
        return weighted - p * weighted.sum(-1, keepdim=True)

    def draw(self, z: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        cumulative = z.softmax(1).cumsum(1)
        cumulative = cumulative / cumulative[:, -1:]  # so that rounding leaves no gap below one
        return torch.searchsorted(cumulative, _uniform(z, (samples,), generator), right=True).T

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        return z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])


class _Diagonal(Likelihood):
    """Outputs that are independent given the logits: S is diagonal."""

    @abstractmethod
    def variance(self, z: Tensor) -> Tensor:
        """The diagonal of S, [N, C]."""

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
        largest = root.topk(most, dim=1).indices  # [N, most]
        first = _first(most, leading).squeeze(1).T.to(z.dtype)[:, :, None]  # [most, N, 1]
        kept = torch.zeros(most, *z.shape, dtype=z.dtype).scatter_(2, largest.T[:, :, None], first)
        return torch.cat([kept * root, root * (1 - kept.sum(0)) * signs])

    def sketch(self, z: Tensor, signs: Tensor) -> Tensor:
        return self.variance(z).sqrt() * signs


class Sigmoid(_Diagonal):
    """C independent yes-or-no labels for each example (multi-label); S = diag(p (1 - p))."""

    def variance(self, z: Tensor) -> Tensor:
        return z.sigmoid() * (-z).sigmoid()

    def draw(self, z: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        uniform = _uniform(z, (samples, z.shape[1]), generator).transpose(0, 1)
        return (uniform < z.sigmoid()).to(z.dtype)

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        return z.sigmoid() - labels


class Gaussian(_Diagonal):
    """Regression, y = z + sigma * standard normal noise; S = I / sigma^2."""

    def __init__(self, sigma: float = 1.0) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}, expected a positive number")
        self.sigma = sigma

    def variance(self, z: Tensor) -> Tensor:
        return torch.full_like(z, self.sigma**-2)

    def draw(self, z: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        uniform = _uniform(z, (samples, z.shape[1]), generator).transpose(0, 1)
        return z + self.sigma * torch.special.ndtri(uniform.clamp_min(2**-54))

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        return (z - labels) / self.sigma**2


LIKELIHOODS: dict[str, type[Likelihood]] = {"softmax": Softmax, "sigmoid": Sigmoid, "gaussian": Gaussian}


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood by its name in :data:`LIKELIHOODS`, or the given one."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}: expected one of {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[likelihood]()


def _covariance(p: Tensor) -> Tensor:
    """diag(p) - p p^T, [N, C, C], accurate relative to its own size, which for a confident row is 1 - max p."""
    top = p.argmax(1, keepdim=True)
    complement = (1 - p).scatter(1, top, p.scatter(1, top, 0).sum(1, keepdim=True))  # 1 - p without cancellation
    covariance = -p[:, :, None] * p[:, None, :]
    covariance.diagonal(dim1=1, dim2=2).copy_(p * complement)
    return covariance


def _leading_eigenvectors(p: Tensor, r: int) -> Tensor:
    """About the r leading eigenvectors [N, C, r] of diag(p) - p p^T, by bisection on its secular equation.

    The eigenvalues interlace with the sorted probabilities, p_(i) >= lambda_i >= p_(i+1), and are the roots of
    1 - sum_c p_c^2 / (p_c - lambda); the eigenvector of lambda is p_c / (p_c - lambda). O(N C r) a step.
    """
    # Equal probabilities have no root between them; a relative shift far below any sampling error tells them apart.
    jitter = 1 + 1e-9 * torch.linspace(-1, 1, p.shape[1], dtype=p.dtype)
    p = p.clamp_min(torch.finfo(p.dtype).tiny) * jitter
    top = p.topk(r + 1, dim=1).values
    high, low = top[:, None, :r].clone(), top[:, None, 1:].clone()  # [N, 1, r]
    for _ in range(60):
        middle = (high + low) / 2
        secular = 1 - (p.square()[:, :, None] / (p[:, :, None] - middle)).sum(1, keepdim=True)
        above = secular > 0  # the secular function falls from +inf at p_(i+1) to -inf at p_(i)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    gap = p[:, :, None] - (high + low) / 2
    vectors = p[:, :, None] / torch.where(gap == 0, torch.finfo(p.dtype).tiny, gap)
    return vectors / vectors.abs().amax(1, keepdim=True)
