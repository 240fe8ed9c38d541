"""Some examples of a batch as a batch of their own, and where the logits of each example lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_map

Place = int | tuple[int, Tensor]  # where an example's logits lie: a row, or positions of a packed row


def places_of(n: int, segments: Tensor | None) -> list[Place]:
    """Where the logits of n examples lie: a row each, or with ``segments`` [T] the positions of a packed row."""
    if segments is None:
        return list(range(n))
    return [(0, (segments == e).nonzero()[:, 0]) for e in range(n)]


@dataclass(frozen=True)
class Run:
    """The logits of a batch, and where those of each example lie."""

    logits: Tensor
    places: list[Place]
    segments: Tensor | None = None  # of a packed row

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.places)

    @property
    def rows(self) -> list[int]:
        """The rows of the examples among the recorder's results."""
        return [place if isinstance(place, int) else e for e, place in enumerate(self.places)]

    def each(self, examples: Sequence[int] | None = None) -> list[Tensor]:
        """The logits of some examples, without a graph: all in one tensor, or one for each sequence of a packed row."""
        places = self.places if examples is None else [self.places[e] for e in examples]
        logits = self.logits.detach()
        return [logits[cast(list[int], places)]] if self.segments is None else [logits[place][None] for place in places]


def part_of_batch(inputs: Any, examples: list[int], n: int) -> Any:
    """Some examples of a batch; inputs without an axis of n examples are passed on unchanged."""
    return tree_map(
        lambda t: t[examples] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t,
        inputs,
    )
