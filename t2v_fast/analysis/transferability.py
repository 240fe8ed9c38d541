"""Scores of how well a pretrained network would serve a task, from one forward pass over the task's images.

They need the images, unlike :mod:`t2v_fast.analysis.selection`, which compares embeddings. Letters for shapes: N
(images), C (classes of the task), Z (classes of the network), D (features).
"""

from __future__ import annotations

import numpy as np


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Compute LEEP, the Log Expected Empirical Prediction of an expert for a task; higher is better.

    It is the mean log likelihood of the labels if an image's expert class z is drawn from the expert's probabilities,
    and the label is then drawn from the empirical P(y | z) (Nguyen et al., 2020, arXiv 2002.12462, section 3).

    Args:
        probabilities: The expert's probabilities [N, Z] over its own Z classes for the task's images.
        labels: The labels [N] of the images in the task.

    Returns:
        A number of at most 0.

    Raises:
        ValueError: If rows do not sum to one, or there are fewer than two classes.

    Example:
        >>> import numpy as np
        >>> round(leep(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1])), 4)  # log 0.5
        -0.6931
    """
    theta, codes, classes = check_examples(probabilities, labels, "probabilities")
    if (theta < 0).any() or not np.allclose(theta.sum(1), 1, atol=1e-5):
        raise ValueError("probabilities: every row must be of numbers of at least 0 and sum to one")
    joint = np.eye(classes)[codes].T @ theta / len(theta)  # [C, Z]
    marginal = joint.sum(0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    return float(np.log((conditional[codes] * theta).sum(1)).mean())


def logme(features: np.ndarray, labels: np.ndarray, *, iterations: int = 100, tolerance: float = 1e-6) -> float:
    """Compute LogME, the log maximum evidence an example; higher is better.

    For each class, a Bayesian linear regression predicts its 0-1 indicator from the features, with weights ~
    N(0, 1/alpha) and noise ~ N(0, 1/beta). MacKay's fixed-point iteration finds the alpha and beta that maximise the
    evidence (You et al., 2021, arXiv 2102.11005, algorithm 1). The result is the mean over classes.

    Args:
        features: The expert's features [N, D] of the task's images.
        labels: The labels [N] of the images in the task.
        iterations: How many iterations at most.
        tolerance: The relative change of alpha and beta below which the iteration ends.

    Returns:
        The mean over classes of the log evidence, divided by N.

    Raises:
        ValueError: If features are not finite, or there are fewer than two classes.
    """
    f, codes, classes = check_examples(features, labels, "features")
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = np.square(s)
    targets = np.eye(classes)[codes]  # [N, C]
    projected = np.square(u.T @ targets)  # [min(N, D), C]
    # The part of a target outside the features' span, which no weights can explain.
    outside = np.maximum(np.square(targets).sum(0) - projected.sum(0), 0)
    alpha, beta = np.ones(classes), np.ones(classes)
    moving = np.ones(classes, bool)
    for _ in range(iterations):
        before = alpha[moving], beta[moving]
        m2, residual, gamma = _posterior(sigma, projected[:, moving], outside[moving], before[0] / before[1])
        # If the features explain a target exactly, or not at all, the optimum is at infinity.
        alpha[moving] = np.clip(gamma / np.maximum(m2, 1e-300), 1e-10, 1e10)
        beta[moving] = np.clip((n - gamma) / np.maximum(residual, 1e-300), 1e-10, 1e10)
        changes = [abs(x[moving] - old) > tolerance * x[moving] for x, old in zip((alpha, beta), before, strict=True)]
        moving[moving] = changes[0] | changes[1]
        if not moving.any():
            break
    m2, residual, _ = _posterior(sigma, projected, outside, alpha / beta)
    log_determinant = np.log(alpha + beta * sigma[:, None]).sum(0) + (d - len(sigma)) * np.log(alpha)
    evidence = n * np.log(beta / (2 * np.pi)) + d * np.log(alpha) - log_determinant - beta * residual - alpha * m2
    return float(evidence.mean() / 2 / n)


def _posterior(
    sigma: np.ndarray, projected: np.ndarray, outside: np.ndarray, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return |m|^2 of the posterior mean, the squared residual, and the effective number of weights, for C targets.

    Args:
        sigma: The squared singular values [K] of the features.
        projected: The squared projections [K, C] of the targets on the left singular vectors.
        outside: The squared part [C] of the targets that is outside the features' span.
        t: alpha / beta [C].
    """
    s = sigma[:, None]
    m2 = (s * projected / np.square(t + s)).sum(0)
    residual = (projected / np.square(1 + s / t)).sum(0) + outside
    return m2, residual, (s / (t + s)).sum(0)


def check_examples(values: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the values as float64 [N, D], the labels as codes from 0 to C - 1, and C."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or not values.size or labels.shape != (len(values),):
        raise ValueError(f"{name} are {list(values.shape)} and labels {list(labels.shape)}, expected [N, D] and [N]")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite")
    kinds, codes = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(f"labels are all {kinds[0]}: expected at least two classes")
    return values, codes, len(kinds)
