"""Some examples of a batch as a batch of their own: where the logits of each lie, and how far they are from others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
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
    _spreads: dict[tuple, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def apart(
        self, whole: Run, examples: Sequence[int], tolerance: float, parts: Sequence[int] = ()
    ) -> tuple[int, float] | None:
        """Compare these logits with those of some examples of a ``whole`` batch, of the same shapes.

        Args:
            whole: The batch.
            examples: The numbers that these examples have there.
            tolerance: The largest difference, relative to the spread of the logits of the batch.
            parts: The numbers of logits of the heads, which are compared at their own scales.

        Returns:
            The example that differs most and by how much, or None where all logits are close.
        """
        pairs = zip(self.each(), whole.each(examples), strict=True)
        differences = [(one - other).abs().reshape(len(one), -1) for one, other in pairs]
        apart = torch.cat([d.amax(1) for d in differences])
        heads = tuple(parts) if sum(parts) == whole.logits.shape[-1] else ()  # each is compared at its own scale
        blocks = torch.cat(differences).split(heads, 1) if heads else [apart]
        allowed = [tolerance * by for by in whole._spread_of(heads, robust=tolerance < 0.1)]
        if all(bool((d <= most).all()) for d, most in zip(blocks, allowed, strict=True)):
            return None
        worst = int(apart.nan_to_num(torch.inf).argmax())
        return examples[worst], float(apart[worst])

    def _spread_of(self, heads: tuple[int, ...], robust: bool) -> list[float]:
        """The :func:`spread` of the logits of each head, or of all. It serves all comparisons with this batch."""
        key = *heads, robust
        if key not in self._spreads:
            logits = self.logits.detach()
            blocks = logits.split(heads, -1) if heads else [logits]
            self._spreads[key] = [spread(block, robust) for block in blocks]
        return self._spreads[key]


def part_of_batch(inputs: Any, examples: list[int], n: int) -> Any:
    """Some examples of a batch; inputs without an axis of n examples are passed on unchanged."""
    return tree_map(
        lambda t: t[examples] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t,
        inputs,
    )


def spread(logits: Tensor, robust: bool) -> float:
    """How far the logits of an example spread around their median; at least a multiple of their rounding error.

    ``robust`` takes the median spread, so that a masked class does not count. Otherwise the largest spread is taken,
    which half precision needs. Rows whose logits are all alike do not count, such as tokens with zero vectors. Neither
    do classes whose logit is the same in every row, such as the masked classes of other tasks. Nothing is close within
    a spread that is not finite, so it is NaN.
    """
    z = logits.reshape(-1, logits.shape[-1])
    z = z[:: -(-z.numel() // 2**22)]  # of a language model's tokens, some are enough
    varied = z[0] != z[-1]
    if len(z) > 1 and not bool(varied.all()):  # only then every row is looked at
        varied[~varied] = (z[:, ~varied] != z[:1, ~varied]).any(0)
        z = z[:, varied] if bool(varied.any()) else z
    z = z if z.dtype == torch.float64 else z.float()
    centre = _median(z) if z.shape[1] > 1 else z.median()
    apart = (z - centre).abs()
    differs = (apart > 0).any(1)
    if bool(differs.any()):
        z, apart = z[differs], apart[differs]
    apart = apart.flatten()
    found = float(_median(apart[:: -(-len(apart) // 2**20)]) if robust else apart.max())
    least = 1e3 * torch.finfo(logits.dtype).eps
    if not least * float(z.abs().amax()) <= found:  # rarely, and a median takes longer
        found = max(found, least * float(z.abs().median()))
    return found if math.isfinite(found) else math.nan


def _median(t: Tensor) -> Tensor:
    """The middle between the lower and the upper median along the last axis, which is kept.

    At the lower one of two logits, the spread would be the smallest margin of all examples.
    """
    low = t.median(-1, keepdim=True).values
    above = torch.where(t > low, t, torch.inf).amin(-1, keepdim=True)
    high = torch.where(2 * (t <= low).sum(-1, keepdim=True) > t.shape[-1], low, above)
    return ((low.double() + high.double()) / 2).to(t.dtype)
