"""Rank pretrained networks as feature extractors for a task of one's own: :func:`rank_zoo`.

The networks run a race. Every network sees a few images of the task at first. A linear head is fitted to its features
with cross-validation, and the likelihood of the held-out labels is its score. Networks that are surely worse than the
leader leave, and the others see twice as many images. So a network that cannot win costs few forward passes.

The race is over some images only, drawn with classes in equal parts, as many images tell little more about which
network is best. Images that had no part in it say how accurate the chosen network is.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load, save
from tqdm import tqdm

from .analysis.feature_scores import held_out_accuracy, held_out_likelihoods
from .analysis.race import CONFIDENCE, Runner, run_race
from .files import canonical_json, write_atomically
from .gradients.fast_forward import fast_forward
from .tasks.data import DataError, TaskData
from .tasks.probe import Probe, load_probe

IMAGES = 120  # to score networks by; docs/selection.md measures what fewer do
FIRST_IMAGES = 64  # at least so many in the first round
IMAGES_PER_CLASS = 5  # and at least so many of each class, one for each fold
HELD_OUT = 5  # one of so many images of each class is held out
SHORTLIST = 4  # networks with the best priors that run
HELD_GIGABYTES = 4.0  # of networks that stay in memory between rounds


@dataclass(frozen=True)
class Entry:
    """What the race found out about one network.

    Attributes:
        name: As it was given.
        score: The mean log likelihood of held-out labels over the images that the network saw; None without a result.
        probability: exp(score), the geometric mean of the probabilities of held-out labels.
        behind: How far the score is below the leader's on the same images, at least 0 for all but the leader.
        standard_error: Of ``behind``, from the paired differences of the images.
        images: How many images the network saw.
        seconds: The time to load it, to run it and to fit its heads.
        parameters: The number of its parameters.
        outcome: ``"finished"``, ``"dropped"`` (surely worse than the leader), ``"budget"`` (more images would have
            cost more than the budget), ``"not shortlisted"`` or ``"unavailable"``.
        reason: Why a network is unavailable.
        prior: What was expected of the network before it ran, if that was given.
    """

    name: str
    score: float | None = None
    behind: float | None = None
    standard_error: float | None = None
    images: int = 0
    seconds: float = 0.0
    parameters: int = 0
    outcome: str = "finished"
    reason: str = ""
    prior: float | None = None

    @property
    def probability(self) -> float | None:
        return None if self.score is None else float(np.exp(self.score))


@dataclass(frozen=True)
class ZooRanking:
    """The networks, best first; those that are unavailable come last.

    Attributes:
        entries: One for each network.
        task: The task's name.
        images: The number of images by which networks were scored.
        available: The number of images in the task.
        classes: The number of classes.
        cost: The estimated time of what was computed, as a share of the time to run every network on every image. A
            network that was not shortlisted counts like the mean of those that ran. The held-out images do not count.
        seed: The seed by which images were drawn.
        held_out: The number of held-out images. They are not among ``images``, and have classes in equal parts as far
            as there are images.
        accuracy: The share of held-out images that the head of the first network names rightly. The head is fitted to
            the images that the network saw. None without held-out images.
        accuracy_error: The standard error of ``accuracy``.
    """

    entries: tuple[Entry, ...]
    task: str
    images: int
    available: int
    classes: int
    cost: float
    seed: int
    held_out: int = 0
    accuracy: float | None = None
    accuracy_error: float | None = None

    @property
    def best(self) -> Entry:
        """The network to use. Others whose ``behind`` is within two standard errors may be as good."""
        return self.entries[0]

    def explain(self) -> str:
        """Say in a sentence or two why the first network is first, and which others may be as good."""
        ranked = [entry for entry in self.entries if entry.score is not None]
        first = ranked[0]
        close = [
            e.name for e in ranked[1:] if e.images == first.images and (e.behind or 0) <= 2 * (e.standard_error or 0)
        ]
        text = (
            f"{first.name} gives held-out labels a geometric mean probability of {first.probability:.3f} over "
            f"{first.images} images; chance gives {1 / self.classes:.3f}."
        )
        if self.accuracy is None:
            text += f" No class has {HELD_OUT} images, so none is held out, and its accuracy is not measured."
        else:
            text += (
                f" On {self.held_out} other images, which had no part in the choice, its accuracy is "
                f"{100 * self.accuracy:.1f} % (standard error {100 * (self.accuracy_error or 0):.1f} %)."
            )
        if close:
            text += f" {', '.join(close)} may be as good: the difference is within two standard errors."
        reasons = {
            "dropped": "surely worse than the leader",
            "budget": "left to stay within the budget",
            "not shortlisted": "expected to be worse and never run",
            "unavailable": "could not be loaded",
        }
        counts = [(sum(entry.outcome == outcome for entry in self.entries), text) for outcome, text in reasons.items()]
        if rest := ", ".join(f"{count} {reason}" for count, reason in counts if count):
            text += f" Of the others: {rest}."
        return text

    def as_dict(self) -> dict[str, Any]:
        """Everything, in a form that JSON can hold."""
        return {**asdict(self), "explanation": self.explain()}

    def rows(self) -> list[list[str]]:
        """A table as text, header first: ``probability`` and ``behind`` are those of :class:`Entry`."""
        header = ["network", "probability", "behind", "images", "seconds", "parameters", "outcome"]
        return [header, *(_row(entry) for entry in self.entries)]


def _row(entry: Entry) -> list[str]:
    if entry.score is None:
        return [entry.name, "", "", "", "", "", ": ".join(filter(None, (entry.outcome, entry.reason)))]
    behind = f"{entry.behind:.3f} +- {entry.standard_error:.3f}" if entry.behind else "best"
    probability = f"{entry.probability:.3f}"
    counts = str(entry.images), f"{entry.seconds:.1f}", f"{entry.parameters / 1e6:.1f} M"
    return [entry.name, probability, behind, *counts, entry.outcome]


def rank_zoo(
    data: Any,
    networks: Sequence[str | Probe],
    *,
    prior: Mapping[str, float] | None = None,
    shortlist: int = SHORTLIST,
    images: int | None = IMAGES,
    budget: float = 1.0,
    confidence: float = CONFIDENCE,
    first_images: int = FIRST_IMAGES,
    batch_size: int = 32,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    held_gigabytes: float = HELD_GIGABYTES,
    seed: int = 0,
    progress: bool = False,
    name: str | None = None,
) -> ZooRanking:
    """Rank networks as feature extractors for a task.

    Args:
        data: A task with one label an image, in any form that :meth:`t2v_fast.Task2Vec.embed` takes but an iterable:
            images are read by number.
        networks: Names as for :func:`t2v_fast.load_probe`, ``"NAME=FILE"`` for the weights of a file, or probes. A
            network that cannot be loaded is listed with the reason.
        prior: What is expected of networks, by their names; higher is better. Only the networks with the highest priors
            run, and those without one. :func:`t2v_fast.analysis.selection.predict_errors` predicts errors, whose
            negatives are priors.
        shortlist: How many networks with priors run. The next takes the place of one that cannot be loaded.
        images: How many images to score networks by, drawn with classes in equal parts as far as there are images; more
            if the task has so many classes that five images of each are more. None takes all. A fifth of each class,
            and at most as many images, is held out before that, to measure the accuracy of the network that is chosen.
        budget: The share of the time to run all networks on all images that may be spent, above 0 and at most 1. The
            first round always runs.
        confidence: A network leaves if its score is more than so many standard errors below the leader's.
        first_images: The images of the first round; more if the task has many classes.
        batch_size: Images in a forward pass.
        cache: A folder for features. With it, a race that was interrupted continues, and a later race over the same
            images uses them again. Needs a folder of images as data.
        device: Where the networks run.
        held_gigabytes: How much weights may stay in memory between rounds. A network beyond that is loaded again for
            each round.
        seed: Of the draw of images.
        progress: Whether to show a bar for each round.
        name: The task's name, by default the folder's.

    Returns:
        The ranking.

    Raises:
        ValueError: If no network is available, a name is given twice, an argument is out of range, or a class has fewer
            than two images.
        DataError: As for ``embed``.
    """
    if not 0 < budget <= 1 or confidence <= 0 or first_images < 2 or shortlist < 1 or (images or 2) < 2:
        raise ValueError(
            f"budget={budget}, confidence={confidence}, images={images}, first_images={first_images}, "
            f"shortlist={shortlist}: expected a budget above 0 and at most 1, a positive confidence, at least two "
            "images and a shortlist of at least 1"
        )
    names = [given if isinstance(given, str) else given.name for given in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    task = TaskData.of(data, name=name)
    if not task.is_map_style:
        raise DataError(f"task {task.name!r}: the images of an iterable cannot be read by number: pass a data set")
    labels = _labels(task)
    order, held_out = _draw(labels, images, seed)
    features = _FeatureStore(task, labels, cache, batch_size, torch.device(device), progress)
    classes = len(np.unique(labels))
    rounds = [min(len(order), max(first_images, IMAGES_PER_CLASS * classes))]
    while rounds[-1] < len(order):
        rounds.append(min(2 * rounds[-1], len(order)))
    zoo = [_Network(given, name, features, labels, order) for given, name in zip(networks, names, strict=True)]
    if prior is not None:
        for network in zoo:
            network.prior = prior.get(network.name)
        if all(network.prior is None for network in zoo):
            raise ValueError(
                f"no prior is of a network: priors are of {', '.join(prior)}; networks are {', '.join(names)}"
            )
        zoo.sort(key=lambda network: -np.inf if network.prior is None else -network.prior)
    there = _first_look(zoo, rounds[0], shortlist, held_gigabytes)
    by_name = {network.name: network for network in there}
    ranked, cost = run_race(
        [Runner(network.name, network.look, network.pace) for network in there],
        rounds,
        budget=budget,
        confidence=confidence,
        leaves=lambda runner: by_name[runner.name].release(),
    )
    entries = [by_name[runner.name].entry(runner) for runner in ranked]
    for outcome in ("not shortlisted", "unavailable"):
        entries += [
            Entry(network.name, outcome=outcome, reason=network.reason, prior=network.prior)
            for network in zoo
            if network.outcome == outcome
        ]
    unseen = sum(network.outcome == "not shortlisted" for network in zoo)
    cost *= len(there) / (len(there) + unseen)
    ranking = ZooRanking(tuple(entries), task.name or "task", len(order), len(labels), classes, cost, seed)
    if not len(held_out):
        return ranking
    accuracy = by_name[ranking.best.name].accuracy(ranking.best.images, held_out)
    error = math.sqrt(accuracy * (1 - accuracy) / len(held_out))
    return replace(ranking, held_out=len(held_out), accuracy=accuracy, accuracy_error=error)


class _Network:
    """A network in the race. It is loaded once and stays in memory until it leaves, if there is room."""

    def __init__(
        self, given: str | Probe, name: str, features: _FeatureStore, labels: np.ndarray, order: np.ndarray
    ) -> None:
        self.given, self.name, self.features, self.labels, self.order = given, name, features, labels, order
        self.probe: Probe | None = None
        self.parameters = self.gigabytes = 0.0
        self.seconds = 0.0
        self.outcome = self.reason = ""  # why it has no score
        self.prior: float | None = None
        self.stays = True  # in memory between rounds

    @property
    def pace(self) -> float:
        """The seconds for an image."""
        return self.features.paces[self.name]

    def load(self) -> Probe:
        if self.probe is None:
            start = time.perf_counter()
            self.probe = _probe(self.given)
            values = list(self.probe.network.parameters())
            self.parameters = sum(value.numel() for value in values)
            self.gigabytes = sum(value.numel() * value.element_size() for value in values) / 1e9
            self.seconds += time.perf_counter() - start
        return self.probe

    def release(self) -> None:
        self.probe = None

    def look(self, count: int) -> np.ndarray:
        """The log likelihoods of the held-out labels of the first images of the order."""
        images = self.order[:count]
        values = self.features.get(self, images)
        if not self.stays:
            self.release()
        start = time.perf_counter()
        likelihoods = held_out_likelihoods(values, self.labels[images])
        self.seconds += time.perf_counter() - start
        return likelihoods

    def accuracy(self, count: int, held_out: np.ndarray) -> float:
        """The share of held-out images that a head names rightly, fitted to the first images of the order."""
        images = self.order[:count]
        seen, others = self.features.get(self, images), self.features.get(self, held_out)
        return held_out_accuracy(seen, self.labels[images], others, self.labels[held_out])

    def entry(self, runner: Runner) -> Entry:
        counts = len(runner.likelihoods), self.seconds, int(self.parameters)
        return Entry(self.name, runner.score, runner.behind, runner.error, *counts, runner.outcome, prior=self.prior)


def _first_look(zoo: Sequence[_Network], count: int, shortlist: int, held_gigabytes: float) -> list[_Network]:
    """Load each network and compute its first features; return those that are there.

    Of the networks with priors, only the first ones of the shortlist are loaded. Networks beyond the memory's limit are
    released, and loaded again if they see more images.
    """
    there, held = list[_Network](), 0.0
    for network in zoo:
        if network.prior is not None and sum(n.prior is not None for n in there) == shortlist:
            network.outcome = "not shortlisted"
            continue
        try:
            network.load()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            network.outcome, network.reason = "unavailable", str(error).splitlines()[0]
            continue
        network.features.get(network, network.order[:count])
        there.append(network)
        network.stays = held + network.gigabytes <= held_gigabytes
        if network.stays:
            held += network.gigabytes
        else:
            network.release()
    if not there:
        reasons = "; ".join(f"{network.name}: {network.reason}" for network in zoo if network.reason)
        raise ValueError(f"no network can be loaded: {reasons or 'none was given'}")
    return there


def _probe(given: str | Probe) -> Probe:
    """Return the probe itself, or load ``NAME`` or ``NAME=FILE`` with the weights of the file."""
    if isinstance(given, Probe):
        return given
    name, _, weights = given.partition("=")
    return load_probe(name, weights or "default")


def _labels(task: TaskData) -> np.ndarray:
    """Read the label [N] of each image. A folder has them in its paths; other data are read once."""
    source = cast(Any, task.source)
    files = getattr(source, "files", None)
    given = [label for _, label in files] if files is not None else [source[k][1] for k in range(len(source))]
    codes, classes = task.encode_labels(task.check_labels(given))
    if codes.dim() != 1:
        raise DataError(f"task {task.name!r} has several labels an image: networks are ranked for one label an image")
    counts = np.bincount(codes.numpy())
    if counts.min() < 2:
        raise ValueError(f"task {task.name!r}: class {classes[int(counts.argmin())]} has one image, expected two")
    return codes.numpy()


def _draw(labels: np.ndarray, most: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images to score networks by, and others to test on.

    Both are in an order of which every prefix has classes in equal parts, as far as there are images. So each class has
    two images from the start, which a head needs that is fitted without each image in turn.
    """
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == code)) for code in np.unique(labels)]
    most = len(labels) if most is None else max(most, IMAGES_PER_CLASS * len(classes))

    def in_turn(parts: Sequence[np.ndarray]) -> np.ndarray:
        place = np.concatenate([np.arange(len(rows)) + rng.random(len(rows)) for rows in parts])
        return np.concatenate(parts)[np.argsort(place, kind="stable")][:most]

    tests = [rows[: len(rows) // HELD_OUT] for rows in classes]
    return in_turn([rows[len(rows) // HELD_OUT :] for rows in classes]), in_turn(tests)


class _FeatureStore:
    """Features of the task's images, kept in memory and, if there is a folder, on disk."""

    def __init__(
        self,
        task: TaskData,
        labels: np.ndarray,
        cache: str | os.PathLike | None,
        batch_size: int,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.task, self.batch_size, self.device, self.progress = task, batch_size, device, progress
        self.known: dict[str, dict[int, np.ndarray]] = {}
        self.paces: dict[str, float] = {}  # seconds for an image
        self.folder = None if cache is None else Path(cache)
        if self.folder is not None:
            files = getattr(task.source, "files", None)
            if files is None:
                raise ValueError("a cache of features needs a folder of images as data")
            stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
            self.data_key = hashlib.sha256(canonical_json(stats).encode()).hexdigest()
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, network: _Network, images: np.ndarray) -> np.ndarray:
        """Return the features [n, D] of these images; ``paces`` then has the network's seconds for an image."""
        known = self.known.setdefault(network.name, {})
        missing = [k for k in images.tolist() if k not in known]
        if missing:
            probe = network.load()
            path = None if self.folder is None else self.folder / f"{self._key(probe)}.safetensors"
            if path is not None and not known and path.exists():
                stored = load(path.read_bytes())
                known.update(zip(stored["images"].tolist(), stored["features"], strict=True))
                self.paces.setdefault(network.name, float(stored["pace"][0]))
                missing = [k for k in missing if k not in known]
            if missing:
                start = time.perf_counter()
                known.update(zip(missing, self._compute(probe, network.name, missing), strict=True))
                network.seconds += time.perf_counter() - start
                # The first pace counts for the whole race, so that costs add up.
                self.paces.setdefault(network.name, (time.perf_counter() - start) / len(missing))
                if path is not None:
                    arrays = {"images": np.array(list(known)), "features": np.stack(list(known.values()))}
                    write_atomically(path, save({**arrays, "pace": np.array([self.paces[network.name]])}))
        return np.stack([known[k] for k in images.tolist()])

    def _key(self, probe: Probe) -> str:
        parts = [self.data_key, probe.name, probe.fingerprint(), probe.preprocessing.as_dict()]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]

    def _compute(self, probe: Probe, name: str, images: Sequence[int]) -> np.ndarray:
        probe.network.to(self.device)
        source, parts = cast(Any, self.task.source), []
        with fast_forward(probe.network, lambda _, batch: probe.features(batch), self.device) as forward:
            starts = range(0, len(images), self.batch_size)
            for start in tqdm(starts, desc=name, unit="batch", disable=not self.progress, leave=False):
                batch = [probe.preprocessing(source[k][0]) for k in images[start : start + self.batch_size]]
                parts.append(forward(probe.network, torch.stack(batch).to(self.device)).float().cpu().numpy())
        return np.concatenate(parts)
