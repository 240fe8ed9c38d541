"""The result of an estimate: a diagonal Fisher by parameter name, with its errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class FisherDiagonal(Mapping[str, Tensor]):
    """A diagonal Fisher by parameter name, float64 on the CPU.

    Values: [O] for a parameter [O, ...] at granularity ``filter``, its shape at ``parameter``, a scalar at ``tensor``.
    ``standard_error`` has the same keys and shapes: the standard deviation of the estimate over data sets like this one
    and over the estimator's own draws, NaN where fewer than two units were seen. The units are examples, for
    ``parameter`` and ``batch_mean`` batches. ``estimator_error``, where it was asked for: the standard deviation of the
    estimator's own draws alone, of cotangents and of examples that an allocation left out, by which the values differ
    from ``exact`` on all examples. ``samples``: cotangents of an example, the mean where they differ; ``visited``: how
    many of the ``num_examples`` were backpropagated, all but with an allocation. ``unused`` parameters are those that
    no output depended on, ``skipped`` those that ``unsupported="skip"`` left out.
    """

    values_: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    granularity: str
    estimator: str
    samples: int | float
    num_examples: int
    unused: frozenset[str] = field(default_factory=frozenset)
    skipped: frozenset[str] = field(default_factory=frozenset)
    estimator_error: dict[str, Tensor] | None = None
    visited: int = 0

    def relative_error(self) -> float:
        """Norm of the ``estimator_error`` over the norm of the values; NaN where it was not asked for."""
        if self.estimator_error is None:
            return float("nan")
        return float(
            _joined(self.estimator_error).norm() / self.vector().norm().clamp_min(torch.finfo(torch.float64).tiny)
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def vector(self) -> Tensor:
        """All values in one vector, parameter after parameter."""
        return _joined(self.values_)

    def standard_error_vector(self) -> Tensor:
        """All standard errors in one vector, in the order of :meth:`vector`."""
        return _joined(self.standard_error)

    def error_vector(self) -> Tensor:
        """The ``estimator_error`` in one vector where it was asked for, else the standard errors."""
        return self.standard_error_vector() if self.estimator_error is None else _joined(self.estimator_error)

    def __repr__(self) -> str:
        return (
            f"FisherDiagonal({len(self)} parameters, granularity={self.granularity!r}, estimator={self.estimator!r}, "
            f"samples={self.samples}, num_examples={self.num_examples})"
        )


def _joined(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in values.values()])
