"""Rank pretrained networks as feature extractors for a task of one's own: :func:`rank_zoo`.

The networks run a race. Every network sees a few images of the task at first. A linear head is fitted to its features
with cross-validation, and the likelihood of the held-out labels is its score. Networks that are surely worse than the
leader leave, and the others see twice as many images. So a network that cannot win costs few forward passes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load, save
from tqdm import tqdm

from .analysis.feature_scores import held_out_likelihoods
from .files import canonical_json, write_atomically
from .gradients.fast_forward import fast_forward
from .tasks.data import DataError, TaskData
from .tasks.probe import Probe, load_probe

FIRST_IMAGES = 64  # at least so many in the first round
IMAGES_PER_CLASS = 5  # and at least so many of each class, one for each fold
CONFIDENCE = 3.0  # standard errors by which a network must be worse than the leader to leave


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
            cost more than the budget) or ``"unavailable"``.
        reason: Why a network is unavailable.
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

    @property
    def probability(self) -> float | None:
        return None if self.score is None else float(np.exp(self.score))


@dataclass(frozen=True)
class ZooRanking:
    """The networks, best first; those that are unavailable come last.

    Attributes:
        entries: One for each network.
        task: The task's name.
        images: The number of images in the task.
        classes: The number of classes.
        cost: The estimated time of what was computed, as a share of the time to run every network on every image.
    """

    entries: tuple[Entry, ...]
    task: str
    images: int
    classes: int
    cost: float

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
        if close:
            text += f" {', '.join(close)} may be as good: the difference is within two standard errors."
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
        return [entry.name, "", "", "", "", "", f"unavailable: {entry.reason}"]
    behind = f"{entry.behind:.3f} +- {entry.standard_error:.3f}" if entry.behind else "best"
    probability = f"{entry.probability:.3f}"
    counts = str(entry.images), f"{entry.seconds:.1f}", f"{entry.parameters / 1e6:.1f} M"
    return [entry.name, probability, behind, *counts, entry.outcome]


def rank_zoo(
    data: Any,
    networks: Sequence[str | Probe],
    *,
    budget: float = 1.0,
    confidence: float = CONFIDENCE,
    first_images: int = FIRST_IMAGES,
    batch_size: int = 32,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
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
        budget: The share of the time to run all networks on all images that may be spent, above 0 and at most 1. The
            first round always runs.
        confidence: A network leaves if its score is more than so many standard errors below the leader's.
        first_images: The images of the first round; more if the task has many classes.
        batch_size: Images in a forward pass.
        cache: A folder for features. With it, a race that was interrupted continues, and a later race over the same
            images uses them again. Needs a folder of images as data.
        device: Where the networks run.
        seed: Of the order in which images are drawn.
        progress: Whether to show a bar for each round.
        name: The task's name, by default the folder's.

    Returns:
        The ranking.

    Raises:
        ValueError: If no network is available, a name is given twice, an argument is out of range, or a class has fewer
            than two images.
        DataError: As for ``embed``.
    """
    if not 0 < budget <= 1 or confidence <= 0 or first_images < 2:
        raise ValueError(
            f"budget={budget}, confidence={confidence}, first_images={first_images}: expected a budget above 0 and at "
            "most 1, a positive confidence and at least two images"
        )
    names = [given if isinstance(given, str) else given.name for given in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    task = TaskData.of(data, name=name)
    if not task.is_map_style:
        raise DataError(f"task {task.name!r}: the images of an iterable cannot be read by number: pass a data set")
    labels = _labels(task)
    order = _interleaved(labels, seed)
    runners, unavailable = _load(networks, names)
    features = _FeatureStore(task, labels, cache, batch_size, torch.device(device), progress)
    racing, left = list(runners), list[_Runner]()
    seen = min(len(order), max(first_images, IMAGES_PER_CLASS * len(np.unique(labels))))
    spent, whole = 0.0, 0.0
    while True:
        for runner in racing:
            runner.look(features, labels, order[:seen])
        leader = max(racing, key=lambda runner: runner.score)
        for runner in racing:
            runner.compare(leader)
        if not whole:
            whole = sum(runner.seconds_an_image * len(order) for runner in racing)
            spent = sum(runner.seconds_an_image * seen for runner in racing)
        racing.sort(key=lambda runner: -runner.score)
        _drop(racing, left, "dropped", lambda runner: runner.behind > confidence * runner.error)
        if seen == len(order) or len(racing) == 1:
            break
        more = min(2 * seen, len(order)) - seen
        # The best networks that the rest of the budget can pay for stay.
        costs = np.cumsum([runner.seconds_an_image * more for runner in racing])
        affordable = len(racing) if budget == 1 else int((spent + costs <= budget * whole).sum())
        if affordable < 2:
            for runner in racing[1:]:
                runner.outcome = "budget"
            break
        _drop(racing, left, "budget", lambda runner, kept=racing[:affordable]: runner not in kept)  # type: ignore[misc]
        spent, seen = spent + float(costs[affordable - 1]), seen + more
    ranked = sorted(racing + left, key=lambda runner: (-len(runner.likelihoods), -runner.score))
    classes = len(np.unique(labels))
    entries = tuple(runner.entry() for runner in ranked) + tuple(unavailable)
    return ZooRanking(entries, task.name or "task", len(order), classes, spent / whole if whole else 0.0)


@dataclass
class _Runner:
    """A network in the race."""

    name: str
    load: Callable[[], Probe]
    parameters: int = 0
    seconds: float = 0.0
    seconds_an_image: float = 0.0
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros(0))
    behind: float = 0.0
    error: float = 0.0
    outcome: str = "finished"

    @property
    def score(self) -> float:
        return float(self.likelihoods.mean())

    def look(self, features: _FeatureStore, labels: np.ndarray, images: np.ndarray) -> None:
        """Score the network on these images."""
        start = time.perf_counter()
        values, self.seconds_an_image = features.get(self, images)
        self.likelihoods = held_out_likelihoods(values, labels[images])
        self.seconds += time.perf_counter() - start

    def compare(self, leader: _Runner) -> None:
        """Compare with the leader, image by image."""
        difference = leader.likelihoods - self.likelihoods
        self.behind = float(difference.mean())
        self.error = float(difference.std(ddof=1) / np.sqrt(len(difference)))

    def entry(self) -> Entry:
        counts = len(self.likelihoods), self.seconds, self.parameters
        return Entry(self.name, self.score, self.behind, self.error, *counts, self.outcome)


def _drop(racing: list[_Runner], left: list[_Runner], outcome: str, leaves: Callable[[_Runner], bool]) -> None:
    """Move the networks that leave to the others that have left."""
    for runner in [runner for runner in racing if leaves(runner)]:
        runner.outcome = outcome
        racing.remove(runner)
        left.append(runner)


def _load(networks: Sequence[str | Probe], names: Sequence[str]) -> tuple[list[_Runner], list[Entry]]:
    """Load each network once, to know its size and whether it can be had at all."""
    runners, unavailable = [], []
    for given, name in zip(networks, names, strict=True):
        try:
            probe = _probe(given)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            unavailable.append(Entry(name, outcome="unavailable", reason=str(error).splitlines()[0]))
            continue
        runners.append(_Runner(name, partial(_probe, given), sum(p.numel() for p in probe.network.parameters())))
    if not runners:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in unavailable)
        raise ValueError(f"no network can be loaded: {reasons or 'none was given'}")
    return runners, unavailable


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


def _interleaved(labels: np.ndarray, seed: int) -> np.ndarray:
    """Order the images at random such that every prefix has classes in about the proportions of the whole."""
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for code in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == code))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
        place[rows[:2]] -= 1  # a head is fitted without each image in turn, so each class needs two from the start
    return np.argsort(place, kind="stable")


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

    def get(self, runner: _Runner, images: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the features [n, D] of these images, and the seconds that the network takes for an image."""
        known = self.known.setdefault(runner.name, {})
        missing = [k for k in images.tolist() if k not in known]
        if missing:
            probe = runner.load()
            path = None if self.folder is None else self.folder / f"{self._key(probe)}.safetensors"
            if path is not None and path.exists():
                stored = load(path.read_bytes())
                known.update(zip(stored["images"].tolist(), stored["features"], strict=True))
                self.paces.setdefault(runner.name, float(stored["pace"][0]))
                missing = [k for k in missing if k not in known]
            if missing:
                start = time.perf_counter()
                known.update(zip(missing, self._compute(probe, runner.name, missing), strict=True))
                # The first pace counts for the whole race, so that costs add up.
                self.paces.setdefault(runner.name, (time.perf_counter() - start) / len(missing))
                if path is not None:
                    arrays = {"images": np.array(list(known)), "features": np.stack(list(known.values()))}
                    write_atomically(path, save({**arrays, "pace": np.array([self.paces[runner.name]])}))
        return np.stack([known[k] for k in images.tolist()]), self.paces[runner.name]

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
