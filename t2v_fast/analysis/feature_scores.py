"""Score how well networks serve a task, from the features that each network gives the task's images.

Each score needs one forward pass of a network over the task's images, and no training of the network.
:data:`SCORES` is the table of them, and :func:`score_networks` ranks networks by any entry of it. Higher is better for
every score. LEEP and LogME are in :mod:`t2v_fast.analysis.transferability`. This module needs scikit-learn.

The file is long because it is a table of scores, one function each.

Letters for shapes: N (images), C (classes of the task), D (features), Z (classes of a network), M (networks).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .transferability import check_examples, leep, logme

FOLDS = 5  # of the cross-validated scores
MIN_SHRINKAGE = 1e-10


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Compute the H-score with a shrunk covariance: how much of the features' variance the classes explain.

    It is tr(S^-1 B) (1 - a), where S is the Ledoit-Wolf estimate of the features' covariance, a is its shrinkage, and B
    is the covariance of the class means (Bao et al., 2019; with shrinkage: Ibrahim et al., 2021, arXiv 2110.06893,
    equation 6).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.

    Returns:
        A number from 0 to the smaller of C - 1 and D.

    Raises:
        ValueError: If features are not finite, shapes are wrong, or there are fewer than two classes.
    """
    covariance = _sklearn("covariance")
    f, codes, _ = check_examples(features, labels, "features")
    f = f - f.mean(0)
    shrunk, shrinkage = covariance.ledoit_wolf(f, assume_centered=True)
    between = _class_means(f, codes)[codes]  # [N, D]
    solved = np.linalg.lstsq(shrunk, between.T @ between / len(f), rcond=None)[0]
    return float((1 - shrinkage) * np.trace(solved))


def n_leep(features: np.ndarray, labels: np.ndarray, *, components: int = 5, seed: int = 0) -> float:
    """Compute N-LEEP: LEEP with the clusters of the features in place of the network's own classes.

    The clusters are those of a Gaussian mixture, fitted to the principal components that have 80 percent of the
    variance (Li et al., 2021, arXiv 2011.11200, section 3.2).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        components: The number of clusters for each class. There are at most N / 2 clusters in all.
        seed: Of the mixture's start.

    Returns:
        A number of at most 0.

    Raises:
        ValueError: As for :func:`h_score`, and if the features of all images are equal.
    """
    mixture = _sklearn("mixture")
    f, codes, classes = check_examples(features, labels, "features")
    reduced = _principal_components(f, 0.8)
    clusters = max(1, min(components * classes, len(f) // 2))
    # A cluster of few images has a singular covariance. A relative ridge makes the score independent of the scale.
    ridge = 1e-6 * float(reduced.var(0).mean())
    fitted = mixture.GaussianMixture(clusters, reg_covar=ridge, random_state=seed).fit(reduced)
    return leep(fitted.predict_proba(reduced), codes)


def gbc(features: np.ndarray, labels: np.ndarray, *, components: int = 64) -> float:
    """Compute the Gaussian Bhattacharyya coefficient: minus the overlap of the classes, summed over ordered pairs.

    Each class is a Gaussian with one variance for all directions, in the first principal components (Pandy et al.,
    2022, arXiv 2111.12780, equations 3 to 5).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        components: The number of principal components.

    Returns:
        A number from -C (C - 1) to 0.

    Raises:
        ValueError: As for :func:`h_score`, and if the features of all images are equal.
    """
    f, codes, classes = check_examples(features, labels, "features")
    reduced = _principal_components(f, min(components, *f.shape))
    d = reduced.shape[1]
    means = _class_means(reduced, codes)
    variances = np.array([reduced[codes == c].var(0).mean() for c in range(classes)])
    # A class of one image has no variance. A floor far below the spread of the data keeps the logarithms finite.
    variances = np.maximum(variances, 1e-12 * float(reduced.var(0).mean()))
    both = (variances[:, None] + variances) / 2  # [C, C]
    squared = np.square(means[:, None] - means).sum(2)
    distance = squared / (8 * both) + d / 2 * np.log(both / np.sqrt(variances[:, None] * variances))
    return float(-np.exp(-distance)[~np.eye(classes, dtype=bool)].sum())


def transrate(features: np.ndarray, labels: np.ndarray, *, epsilon: float = 1e-4) -> float:
    """Compute TransRate: the coding rate of all features less the mean coding rate of the classes.

    It estimates the mutual information of features and labels (Huang et al., 2022, arXiv 2106.09362, equations 4 and
    5). Classes count by their share of the images. Features are scaled to unit total variance, as the rate depends on
    their scale.

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        epsilon: The distortion of the code.

    Returns:
        A number of at least 0, up to rounding.

    Raises:
        ValueError: As for :func:`h_score`.
    """
    f, codes, classes = check_examples(features, labels, "features")
    f = f - f.mean(0)
    f = f / max(np.sqrt(np.square(f).sum() / len(f)), np.finfo(np.float64).tiny)
    parts = [f[codes == c] for c in range(classes)]
    within = sum(len(part) / len(f) * _coding_rate(part, epsilon) for part in parts)
    return _coding_rate(f, epsilon) - float(within)


def sfda(features: np.ndarray, labels: np.ndarray) -> float:
    """Compute SFDA, the log likelihood of a regularised discriminant analysis after images challenge it.

    The regularisation falls with the largest eigenvalue of the covariance within classes. A first analysis says how
    sure each image's class is. The features of unsure images move toward the mean of the other classes, and a second
    analysis scores them (Shao et al., 2022, arXiv 2207.03036, equations 4 to 9).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.

    Returns:
        The mean log likelihood of the labels, at most 0.

    Raises:
        ValueError: As for :func:`h_score`.
    """
    f, codes, classes = check_examples(features, labels, "features")
    rows = np.arange(len(f))
    log_probabilities, shrinkage = _discriminant(f, codes)
    probabilities = np.exp(log_probabilities)
    softened = np.exp(probabilities)
    sure = (softened / softened.sum(1, keepdims=True))[rows, codes][:, None]  # [N, 1]
    counts = np.bincount(codes, minlength=classes)
    sums = np.eye(classes)[codes].T @ f
    others = (sums.sum(0) - sums) / (len(f) - counts)[:, None]  # [C, D], the mean of all other classes
    moved = sure * f + (1 - sure) * others[codes]
    return float(_discriminant(moved, codes, shrinkage)[0][rows, codes].mean())


def ped(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    reference: np.ndarray | None = None,
    radius: float = 0.6,
    time_step: float = 1.0,
    steps: int = 6,
    exit_ratio: float = 0.5,
) -> float:
    """Compute PED: SFDA after classes that overlap have pushed each other apart, as fine-tuning would.

    Each class is a ball whose radius is ``radius`` standard deviations. Two balls that overlap repel each other in
    proportion to the overlap, until the motion falls below ``exit_ratio`` of the first step's (Li et al., 2023, arXiv
    2308.15074, section 3.3).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        reference: Features [R, D] of general images, which set the scale of each feature. The paper takes ImageNet. By
            default the task's own features set it.
        radius: The radius of a class in standard deviations.
        time_step: The duration of a step; a step moves by half its square times the force.
        steps: The number of steps at most.
        exit_ratio: The share of the first motion below which the simulation ends.

    Returns:
        The mean log likelihood of the labels, at most 0.

    Raises:
        ValueError: As for :func:`h_score`.
    """
    f, codes, classes = check_examples(features, labels, "features")
    if reference is not None:
        reference = np.asarray(reference, dtype=np.float64)
        if reference.ndim != 2 or reference.shape[1] != f.shape[1] or not np.isfinite(reference).all():
            raise ValueError(f"reference is {list(reference.shape)}, expected finite features [R, {f.shape[1]}]")
    scale = np.maximum((f if reference is None else reference).std(0), 1e-3)
    f, first = f / scale, 0.0
    for step in range(steps):
        means = _class_means(f, codes)
        radii = radius * np.sqrt(np.array([f[codes == c].var(0).sum() for c in range(classes)]))
        apart = means[:, None] - means  # [C, C, D], from the second class to the first
        length = np.sqrt(np.square(apart).sum(2))
        overlap = np.maximum(radii[:, None] + radii - length, 0)
        size = np.minimum(0.5 * time_step**2 * overlap, overlap)
        # Two classes with one mean have no direction in which to move.
        direction = np.divide(apart, length[..., None], out=np.zeros_like(apart), where=length[..., None] > 0)
        motion = (direction * size[..., None]).sum(1)  # [C, D]
        total = float(np.abs(motion).sum())
        if step == 0:
            first = total
        elif total <= exit_ratio * first:
            break
        f = f + motion[codes]
    return sfda(f * scale, codes)


def ncti_terms(features: np.ndarray, labels: np.ndarray, *, components: int = 64) -> tuple[float, float, float]:
    """Compute the three terms of NCTI, which say how near the features are to neural collapse.

    NCTI compares networks: :func:`score_networks` scales each term over the networks and adds them (Wang et al., 2023,
    ICCV, "How far pre-trained models are from neural collapse on the target dataset informs their transferability",
    section 3).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        components: The number of principal components in which a discriminant analysis finds C - 1 directions.

    Returns:
        The nuclear norm of the projected features; the mean probability of the nearest class centre; and minus the
        logarithm of the summed nuclear norms of each class's probabilities. Higher is better for each.

    Raises:
        ValueError: As for :func:`h_score`, and if the features of all images are equal.
    """
    discriminant_analysis = _sklearn("discriminant_analysis")
    f, codes, classes = check_examples(features, labels, "features")
    reduced = _principal_components(f, min(components, f.shape[1], len(f) - 1))
    shrinkage = float(np.exp(-reduced[:, :32].var(0, ddof=1).sum()))
    if shrinkage <= MIN_SHRINKAGE:
        model = discriminant_analysis.LinearDiscriminantAnalysis(solver="svd")
    else:
        model = discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen", shrinkage=min(shrinkage, 1.0))
    projected = model.fit(reduced, codes).transform(reduced)
    probabilities = model.predict_proba(reduced)
    collapse = sum(np.linalg.norm(probabilities[codes == c], ord="nuc") for c in range(classes))
    nearest = probabilities[np.arange(len(f)), codes].mean()
    return float(np.linalg.norm(projected - projected.mean(0), ord="nuc")), float(nearest), float(-np.log(collapse))


def etran_terms(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Compute the two terms of ETran for a classification task.

    The first term says whether the images look familiar to the network: the mean log-sum-exp of the features, minus
    their energy. The second is the mean probability of the labels in a linear discriminant analysis. ETran compares
    networks: :func:`score_networks` scales each term over the networks, and weighs them with 0.15 and 0.85, the weights
    of the authors' code (Gholami et al., 2023, arXiv 2308.02027, section 3).

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.

    Returns:
        The energy score and the classification score.

    Raises:
        ValueError: As for :func:`h_score`.
    """
    f, codes, _ = check_examples(features, labels, "features")
    top = f.max(1, keepdims=True)
    energy = float((top[:, 0] + np.log(np.exp(f - top).sum(1))).mean())
    log_probabilities, _ = _discriminant(f, codes)
    return energy, float(np.exp(log_probabilities[np.arange(len(f)), codes]).mean())


def knn(features: np.ndarray, labels: np.ndarray, *, neighbours: int = 5) -> float:
    """Compute the leave-one-out accuracy of the nearest neighbours by cosine similarity.

    A plain and strong baseline (Sorkhei et al., 2025, arXiv 2503.18528). A tie goes to the class whose neighbours are
    nearest in sum.

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        neighbours: How many neighbours vote, at most N - 1.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: As for :func:`h_score`.
    """
    f, codes, classes = check_examples(features, labels, "features")
    length = np.sqrt(np.square(f).sum(1, keepdims=True))
    f = f / np.maximum(length, np.finfo(np.float64).tiny)
    similarity = f @ f.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(neighbours, len(f) - 1)]
    voters = np.eye(classes)[codes[nearest]]  # [N, K, C]
    closeness = (voters * np.take_along_axis(similarity, nearest, 1)[..., None]).sum(1)
    # Votes are whole numbers, and a sum of K cosines is at most K: a small share of it only breaks ties.
    votes = voters.sum(1) + closeness / (4 * nearest.shape[1])
    return float((votes.argmax(1) == codes).mean())


def linear_probe(features: np.ndarray, labels: np.ndarray, *, weight_decay: float = 1e-2, folds: int = FOLDS) -> float:
    """Compute the cross-validated log likelihood of a logistic regression on the features.

    It is the score nearest to what a user does with a feature extractor: fit a linear head.

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images; each class needs two images.
        weight_decay: The L2 penalty of the mean loss, w^2 times half of it.
        folds: The number of folds; no more than the smallest class has images.

    Returns:
        The mean over images of :func:`held_out_likelihoods`, at most 0.

    Raises:
        ValueError: As for :func:`h_score`, and for a class with one image.
    """
    return float(held_out_likelihoods(features, labels, weight_decay=weight_decay, folds=folds).mean())


def held_out_likelihoods(
    features: np.ndarray, labels: np.ndarray, *, weight_decay: float = 1e-2, folds: int = FOLDS
) -> np.ndarray:
    """Compute the log likelihood of each image's label under a linear head that was fitted without the image.

    Features are standardised by the training part of each fold. The folds depend on the labels only, so two networks'
    likelihoods for the same images can be compared in pairs.

    Args:
        features: As for :func:`linear_probe`.
        labels: As for :func:`linear_probe`.
        weight_decay: As for :func:`linear_probe`.
        folds: As for :func:`linear_probe`.

    Returns:
        The log likelihoods [N].

    Raises:
        ValueError: As for :func:`linear_probe`.
    """
    model_selection = _sklearn("model_selection")
    f, codes, _ = check_examples(features, labels, "features")
    smallest = int(np.bincount(codes).min())
    if smallest < 2:
        raise ValueError("a class has one image: a cross-validated head needs at least two images of each class")
    likelihoods = np.empty(len(f))
    split = model_selection.StratifiedKFold(min(folds, smallest), shuffle=True, random_state=0)
    for train, test in split.split(f, codes):
        logs = _linear_head(f[train], codes[train], f[test], weight_decay)
        likelihoods[test] = logs[np.arange(len(test)), codes[test]]
    return np.maximum(likelihoods, np.log(np.finfo(np.float64).tiny))


def held_out_accuracy(
    features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, answers: np.ndarray, *, weight_decay: float = 1e-2
) -> float:
    """Compute the share of held-out images that a linear head puts into the right class.

    The head is that of :func:`held_out_likelihoods`, fitted to all of ``features``.

    Args:
        features: The network's features [N, D] of the task's images.
        labels: The labels [N] of the images.
        held_out: The features [M, D] of other images.
        answers: The labels [M] of these. A label that is not among ``labels`` counts as a mistake.
        weight_decay: As for :func:`linear_probe`.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: As for :func:`h_score`, for ``features`` and for ``held_out``; and if there is no held-out image.
    """
    f, codes, _ = check_examples(features, labels, "features")
    x, y = np.asarray(held_out, dtype=np.float64), np.asarray(answers)
    if x.ndim != 2 or not len(x) or x.shape[1] != f.shape[1] or y.shape != (len(x),) or not np.isfinite(x).all():
        raise ValueError(
            f"held_out is {list(x.shape)} and answers is {list(y.shape)}: expected finite features [M, {f.shape[1]}] "
            "and a label of each, and at least one image"
        )
    named = np.unique(labels)[_linear_head(f, codes, x, weight_decay).argmax(1)]
    return float((named == y).mean())


def _linear_head(f: np.ndarray, codes: np.ndarray, other: np.ndarray, weight_decay: float) -> np.ndarray:
    """Return the log probabilities [M, C] that a logistic regression on ``f`` gives to the classes of other images."""
    mean, scale = f.mean(0), f.std(0) + 1e-3
    with warnings.catch_warnings():  # few images of each class are what a first look has
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        model = _sklearn("linear_model").LogisticRegression(C=1 / (weight_decay * len(f)), max_iter=1000)
        model.fit((f - mean) / scale, codes)
    with np.errstate(divide="ignore"):  # a sure head gives the other classes a probability of zero
        return model.predict_log_proba((other - mean) / scale)


@dataclass(frozen=True)
class Score:
    """An entry of :data:`SCORES`.

    Attributes:
        function: Gives the score of one network, or the terms of which the score is made.
        paper: Where the score is from.
        inputs: What the function takes with the labels: ``"features"`` [N, D], or the network's own
            ``"probabilities"`` [N, Z].
        weights: If the function gives terms, their weights. Each term is first scaled to the range from 0 to 1 over
            the networks that are compared.
    """

    function: Callable[..., Any]
    paper: str
    inputs: str = "features"
    weights: tuple[float, ...] = ()


SCORES: Mapping[str, Score] = {
    "leep": Score(leep, "Nguyen et al., 2020", "probabilities"),
    "n_leep": Score(n_leep, "Li et al., 2021"),
    "logme": Score(logme, "You et al., 2021"),
    "h_score": Score(h_score, "Ibrahim et al., 2021"),
    "gbc": Score(gbc, "Pandy et al., 2022"),
    "transrate": Score(transrate, "Huang et al., 2022"),
    "sfda": Score(sfda, "Shao et al., 2022"),
    "ped": Score(ped, "Li et al., 2023"),
    "ncti": Score(ncti_terms, "Wang et al., 2023", weights=(1.0, 1.0, 1.0)),
    "etran": Score(etran_terms, "Gholami et al., 2023", weights=(0.15, 0.85)),
    "knn": Score(knn, "Sorkhei et al., 2025"),
    "linear_probe": Score(linear_probe, "cross-validated logistic regression"),
}


def score_networks(inputs: Sequence[np.ndarray], labels: np.ndarray, score: str) -> np.ndarray:
    """Score several networks for one task; the highest score is the best network.

    Args:
        inputs: For each network, its features [N, D] of the task's images, D of its own; for ``"leep"`` its
            probabilities [N, Z].
        labels: The labels [N] of the images.
        score: A name of :data:`SCORES`.

    Returns:
        The scores [M]. Those of ``"ncti"`` and ``"etran"`` depend on which networks are compared.

    Raises:
        ValueError: For an unknown score, no network, and as for :func:`h_score`.

    Warns:
        UserWarning: If several networks share the highest score. ``"sfda"`` and ``"ped"`` do so when there are fewer
            images than features: a discriminant analysis then separates the images perfectly, and both likelihoods are
            one.

    Example:
        >>> import numpy as np
        >>> rng, labels = np.random.default_rng(0), np.repeat([0, 1], 20)
        >>> noise = rng.normal(size=(40, 4))
        >>> scores = score_networks([noise, noise + 3 * labels[:, None]], labels, "h_score")
        >>> bool(scores[1] > scores[0])
        True
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}: expected one of {', '.join(SCORES)}")
    if not len(inputs):
        raise ValueError("there is no network to score")
    entry = SCORES[score]
    scores = combine_terms(np.array([entry.function(values, labels) for values in inputs]), score)
    if (tied := int((scores == scores.max()).sum())) > 1:
        warnings.warn(
            f"{score} gives {tied} of {len(scores)} networks the same highest score, {scores.max():g}, so it does "
            f"not tell "
            "them apart: take more images, or another score such as 'linear_probe'",
            stacklevel=2,
        )
    return scores


def combine_terms(terms: np.ndarray, score: str) -> np.ndarray:
    """Make scores of several networks from what the function of a score gave for each of them.

    Args:
        terms: One number [M] for each network, or the terms [M, K] of a score that has weights.
        score: A name of :data:`SCORES`.

    Returns:
        The scores [M]: the numbers themselves, or the weighted sum of the scaled terms.
    """
    weights = SCORES[score].weights
    if not weights:
        return terms
    span = np.ptp(terms, axis=0)
    scaled = np.divide(terms - terms.min(0), span, out=np.zeros_like(terms), where=span > 0)
    return scaled @ np.array(weights)


def _sklearn(name: str) -> Any:
    """Import a module of scikit-learn, or say how to install it."""
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise ImportError("this score needs scikit-learn: pip install t2v-fast[selection]") from error


def _principal_components(f: np.ndarray, components: float) -> np.ndarray:
    """Project features [N, D] on a number of principal components, or on those with a share of the variance."""
    if np.ptp(f, axis=0).max() == 0:
        raise ValueError("the features of all images are equal: the network does not tell these images apart")
    decomposition = _sklearn("decomposition")
    return decomposition.PCA(components, svd_solver="full").fit_transform(f)


def _class_means(f: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the mean feature [C, D] of each class."""
    one_hot = np.eye(codes.max() + 1)[codes]
    return one_hot.T @ f / one_hot.sum(0)[:, None]


def _coding_rate(f: np.ndarray, epsilon: float) -> float:
    """Return half the log determinant of I + f^T f / (N epsilon), from the smaller Gram matrix."""
    gram = f.T @ f if f.shape[1] <= len(f) else f @ f.T
    return 0.5 * float(np.linalg.slogdet(np.eye(len(gram)) + gram / (len(f) * epsilon))[1])


def _discriminant(f: np.ndarray, codes: np.ndarray, shrinkage: float | None = None) -> tuple[np.ndarray, float]:
    """Return the log probabilities [N, C] of a linear discriminant analysis with a shrunk covariance, on its own data.

    The covariance within classes is (1 - s) S + s m I, with m the mean of S's diagonal. By default the shrinkage s is
    SFDA's: exp(-5 times the largest eigenvalue of S). It is returned too.
    """
    counts = np.bincount(codes)
    means = _class_means(f, codes)
    within = f - means[codes]
    _, s, vt = np.linalg.svd(within / np.sqrt(len(f)), full_matrices=False)
    if shrinkage is None:
        shrinkage = max(float(np.exp(-5 * np.square(s[0]))), MIN_SHRINKAGE)
    ridge = shrinkage * np.square(s).sum() / f.shape[1]
    # Without any spread within classes, every class is a point, and the ridge only has to be above zero.
    ridge = max(ridge, np.finfo(np.float64).tiny ** 0.5)
    # Solve with the covariance in the span of its singular vectors; outside the span it is the ridge alone.
    centred = means - f.mean(0)
    inside = centred @ vt.T
    outside = centred - inside @ vt
    outside -= outside @ vt.T @ vt  # once more: the small ridge would blow up what rounding left inside the span
    solved = (inside / ((1 - shrinkage) * np.square(s) + ridge)) @ vt + outside / ridge  # [C, D]
    logits = (f - f.mean(0)) @ solved.T - 0.5 * (centred * solved).sum(1) + np.log(counts / len(f))
    logits -= logits.max(1, keepdims=True)
    # The sum without its largest term, which is one. A sure class then has a tiny loss, and not the same zero in all
    # networks.
    others = np.exp(logits)
    others[np.arange(len(f)), logits.argmax(1)] = 0
    return logits - np.log1p(others.sum(1, keepdims=True)), shrinkage
