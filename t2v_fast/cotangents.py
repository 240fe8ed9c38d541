"""Which directions to backpropagate: an estimator of the Fisher is only a choice of cotangents of the logits.

With S_n the Fisher of the logits of example n (softmax: diag(p) - p p^T), any cotangents with E[sum_k u_k u_k^T] = S_n
give sum_k (J_n^T u_k)^2 with the diagonal Fisher as its expectation, since each entry is a quadratic form in u.

===============  ================================================================================================
``exact``        a factor of S_n: no sampling error, C - 1 cotangents for a softmax over C classes
``deflated``     the leading samples - 1 eigenvectors of S_n, and one random-sign sketch of all others; unbiased.
                 ``samples`` may differ from example to example (:mod:`t2v_fast.allocation`)
``hutchinson``   random-sign sketches of the whole factor (Hutchinson, 1989); unbiased
``monte_carlo``  scores of labels drawn from the model, as in Task2Vec's public code; unbiased
``empirical``    the score of the data set's own label (the "empirical Fisher": another quantity than the Fisher)
===============  ================================================================================================

Everything is float64 on the CPU: a confident head has 1 - p around 1e-7, which float32 cannot hold, and drawing signs
on the CPU in example order makes a seed give the same numbers on every device and at every batch size. Where examples
come in another order or not all, each has a seed of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

ESTIMATORS = ("exact", "deflated", "hutchinson", "monte_carlo", "empirical")
LARGEST_EXACT = 2**30  # numbers that the cotangents of all tokens may hold
LEVELS = ("token", "sequence")
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


def _signs(n: int, k: int, c: int, source: torch.Generator | Tensor | None) -> Tensor:
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


def check_estimator(estimator: str, samples: int | Tensor) -> None:
    """Raise ValueError for an unknown estimator or a number of cotangents that makes no sense."""
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
    """The cotangents of one batch: u [K, N, C] for logits [N, C], in the logits' dtype and on their device.

    ``samples`` counts the cotangents of the sampling estimators (``deflated`` may return fewer, when they are exact,
    and has one more for each of the ``sketches`` beyond the first, which come last and differ by chance alone);
    ``labels`` are needed by ``empirical`` alone: [N] class indices for softmax, [N, C] targets otherwise. Without a
    ``generator`` the default one of torch is used. Raises ValueError naming what does not fit.

    For ``deflated`` cotangents of logits [N, C], ``samples`` may be [N] integers, one number for each example: K is
    that of the largest, and u is zero where an example has fewer. ``generator`` may be [N] seeds, int64, of the
    examples: one's signs are then the same in whatever batch it comes.

    Logits [N, T, C] have a label at each of T tokens, independent given the input, as a language model's are given the
    text before them; u is [K, N, T, C], labels [N, T] (or [N, T, C]). Where ``mask`` [N, T] is false, there is no label
    and u is zero. All tokens of a sequence share a backward pass: with independent signs, or independent labels, the
    products of two tokens' gradients vanish in expectation, and the square is that of each token, summed. ``exact``
    takes one pass for each token and direction. For ``empirical``, ``level="sequence"`` squares the gradient of the
    whole sequence's log-likelihood instead.
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
    if logits.dim() == 3:
        return _of_tokens(logits, estimator, samples, model, labels, generator, mask, level)
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
        u = model.sketch(z, _signs(z.shape[0], samples, z.shape[1], generator)) / samples**0.5
    elif estimator == "monte_carlo":
        u = model.score(z, model.draw(z, samples, generator)) / samples**0.5
    else:
        if labels is None:
            raise ValueError("estimator 'empirical' needs the labels of the batch, got none")
        u = model.score(z, _check_labels(labels.cpu(), z, model))[None]
    return u.to(logits.device, logits.dtype)


def _deflated(
    model: Likelihood, z: Tensor, samples: int | Tensor, source: torch.Generator | Tensor | None, sketches: int
) -> Tensor:
    """Leading eigenvectors and sketches; no sketches where nothing is left for any example of the batch."""
    n, c = z.shape
    if not isinstance(samples, Tensor):
        samples = torch.full((n,), samples)
    rank = model.rank(c)
    exact = samples >= rank
    leading = torch.where(exact, rank, samples - 1)
    signs = _signs(n, sketches, c, source) / sketches**0.5 * ~exact[:, None]
    return model.deflated(z, leading, signs[: 0 if exact.all() else sketches])


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
    """The cotangents of logits [N, T, C]: every token that is not masked is an example of its own first."""
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
        of_each = of_each * _signs(of_each.shape[1], len(of_each), 1, generator).to(of_each)
    u = logits.new_zeros((len(of_each), *logits.shape))
    u[:, there] = of_each
    if estimator == "exact":  # [K, N, T, C] to [K T, N, T, C], each with one token
        at = torch.eye(t, dtype=u.dtype, device=u.device)
        u = (u[:, None] * at[None, :, None, :, None]).flatten(0, 1)
    return u


def _check_labels(labels: Tensor, z: Tensor, model: Likelihood) -> Tensor:
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
