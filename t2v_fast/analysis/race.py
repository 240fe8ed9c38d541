"""A race of networks: those that are surely worse than the leader leave before they cost many forward passes.

Every network sees a few images of a task at first. A linear head is fitted to its features with cross-validation, and
the likelihood of the held-out labels is its score. Networks that are surely worse than the leader leave, and the others
see more images (successive elimination, with standard errors of paired differences). Letters for shapes: N (images), D
(features).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

CONFIDENCE = 3.0  # standard errors by which a network must be worse than the leader to leave


@dataclass
class Runner:
    """A network in a race.

    Attributes:
        name: What it is called.
        look: Gives the log likelihoods [n] of the held-out labels of the first n images.
        pace: The cost of one image, in any unit; read after the first look.
        likelihoods: What the last look gave.
        behind: How far its score is below the leader's on the same images.
        error: The standard error of ``behind``, from the paired differences of the images.
        outcome: ``"finished"``, ``"dropped"`` (surely worse than the leader) or ``"budget"``.
    """

    name: str
    look: Callable[[int], np.ndarray]
    pace: float = 1.0
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros(0))
    behind: float = 0.0
    error: float = 0.0
    outcome: str = "finished"

    @property
    def score(self) -> float:
        """The mean log likelihood of held-out labels."""
        return float(self.likelihoods.mean())

    def compare(self, leader: Runner) -> None:
        """Compare with the leader, image by image."""
        difference = leader.likelihoods - self.likelihoods
        self.behind = float(difference.mean())
        self.error = float(difference.std(ddof=1) / np.sqrt(len(difference)))


def run_race(
    runners: Sequence[Runner],
    rounds: Sequence[int],
    *,
    budget: float = 1.0,
    confidence: float = CONFIDENCE,
    leaves: Callable[[Runner], None] = lambda runner: None,
) -> tuple[list[Runner], float]:
    """Let networks race, and rank them.

    Args:
        runners: The networks. Their likelihoods, ``behind``, ``error`` and ``outcome`` are set.
        rounds: How many images the networks have seen after each round, rising; the last is all of them.
        budget: The share of the cost of all networks on all images that may be spent. The first round always runs.
        confidence: A network leaves if its score is more than so many standard errors below the leader's.
        leaves: Called with each network that leaves before the last round, to free what it holds.

    Returns:
        The networks, best first, those that saw more images before the others; and the share of the cost that was
        spent.
    """
    racing, left = list(runners), list[Runner]()

    def drop(outcome: str, those: Sequence[Runner]) -> None:
        for runner in those:
            runner.outcome = outcome
            racing.remove(runner)
            left.append(runner)
            leaves(runner)

    for runner in racing:
        runner.outcome = "finished"
    spent = whole = 0.0
    before = 0
    for seen, following in zip(rounds, [*rounds[1:], 0], strict=True):
        for runner in racing:
            runner.likelihoods = runner.look(seen)
        leader = max(racing, key=lambda runner: runner.score)
        for runner in racing:
            runner.compare(leader)
        if not whole:
            whole = sum(runner.pace * rounds[-1] for runner in racing)
        spent += sum(runner.pace * (seen - before) for runner in racing)
        racing.sort(key=lambda runner: -runner.score)
        drop("dropped", [runner for runner in racing if runner.behind > confidence * runner.error])
        if not following or len(racing) == 1:
            break
        if budget < 1:  # the best networks that the rest of the budget can pay for stay
            costs = np.cumsum([runner.pace * (following - seen) for runner in racing])
            affordable = int((spent + costs <= budget * whole).sum())
            if affordable < 2:
                for runner in racing[1:]:
                    runner.outcome = "budget"
                break
            drop("budget", racing[affordable:])
        before = seen
    ranked = sorted(racing + left, key=lambda runner: (-len(runner.likelihoods), -runner.score))
    return ranked, spent / whole if whole else 0.0
