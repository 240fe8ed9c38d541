"""The result of an estimate: a diagonal Fisher by parameter name, with its errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gradients.recorder import FisherRecorder
from .moments import NamedMoments
from .processes import whole_of


@dataclass(frozen=True)
class FisherDiagonal(Mapping[str, Tensor]):
    """A diagonal Fisher: a mapping from parameter names to float64 tensors on the CPU.

    A parameter [O, ...] has values [O] with granularity ``"filter"``, values of its own shape with ``"parameter"`` and
    a scalar with ``"tensor"``.

    Args:
        entries: The values, by parameter name.
        standard_error: For each value the standard deviation of the estimate, over data sets like this one and over
            the estimator's random draws; same keys and shapes. It comes from the spread of the examples, or of the
            batches for granularity ``"parameter"`` and estimator ``"batch_mean"``, and is NaN where there are fewer
            than two of them.
        granularity: ``"filter"``, ``"parameter"`` or ``"tensor"``.
        estimator: The name of the estimator.
        samples: The cotangents of an example, on average where the examples differ.
        num_examples: The number of examples of the data set.
        unused: Parameters that no output depends on. Their values are zero.
        skipped: Parameters that ``unsupported="skip"`` left out.
        estimator_error: For each value the standard deviation that is due to the random draws alone: of cotangents,
            and of the examples that an allocation leaves out. It measures the distance from ``"exact"`` on all
            examples. None where it was not asked for.
        visited: The number of examples that were backpropagated. It is below ``num_examples`` only where an allocation
            leaves examples out.
    """

    entries: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    granularity: str
    estimator: str
    samples: int | float
    num_examples: int
    unused: frozenset[str] = field(default_factory=frozenset)
    skipped: frozenset[str] = field(default_factory=frozenset)
    estimator_error: dict[str, Tensor] | None = None
    visited: int = 0

    @property
    def values_(self) -> dict[str, Tensor]:
        """Former name of ``entries``."""
        warnings.warn("FisherDiagonal.values_ is now FisherDiagonal.entries", DeprecationWarning, stacklevel=2)
        return self.entries

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled object, also one of the time when ``entries`` were called ``values_``."""
        self.__dict__.update({"entries" if key == "values_" else key: value for key, value in state.items()})

    def relative_error(self) -> float:
        """Return the norm of ``estimator_error`` over the norm of the values, or NaN where there is none."""
        if self.estimator_error is None:
            return float("nan")
        return float(
            _joined(self.estimator_error).norm() / self.vector().norm().clamp_min(torch.finfo(torch.float64).tiny)
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def full(self) -> FisherDiagonal:
        """Return the whole result on this process, where the network is sharded over several.

        Every process must call this method, because each of them has a shard of the values. :meth:`vector`,
        :meth:`to_numpy` and the vectors of errors need all processes, too.

        Returns:
            The same result with all values in ordinary tensors on the CPU; equal on all processes.
        """
        errors = None if self.estimator_error is None else whole_of(self.estimator_error)
        return replace(
            self, entries=whole_of(self.entries), standard_error=whole_of(self.standard_error), estimator_error=errors
        )

    def vector(self) -> Tensor:
        """Return all values in one vector, parameter after parameter."""
        return _joined(self.entries)

    def to_numpy(self) -> np.ndarray:
        """Return :meth:`vector` as an array."""
        return self.vector().numpy()

    def standard_error_vector(self) -> Tensor:
        """Return all standard errors in one vector, in the order of :meth:`vector`."""
        return _joined(self.standard_error)

    def error_vector(self) -> Tensor:
        """Return ``estimator_error`` in one vector, or the standard errors where there is none."""
        return self.standard_error_vector() if self.estimator_error is None else _joined(self.estimator_error)

    def __repr__(self) -> str:
        return (
            f"FisherDiagonal({len(self)} parameters, granularity={self.granularity!r}, estimator={self.estimator!r}, "
            f"samples={self.samples}, num_examples={self.num_examples})"
        )


def combined(parts: Sequence[FisherDiagonal], weights: Tensor, visited: int) -> FisherDiagonal:
    """Return the weighted mean of independent estimates of the Fisher of one data set.

    Args:
        parts: The estimates, of the same parameters, each with its ``estimator_error``.
        weights: The weight of each estimate, [parts]; their sum is one.
        visited: The number of different examples that were backpropagated for any of them.
    """
    if len(parts) == 1:
        return parts[0]
    w = weights.tolist()
    entries, errors, standard = {}, {}, {}
    for name in parts[0]:
        values = [part.entries[name] for part in parts]
        own = [(part.estimator_error or {})[name].square() for part in parts]
        both = [part.standard_error[name].square() for part in parts]
        entries[name] = sum((a * q for a, q in zip(w, values, strict=True)), torch.zeros_like(values[0]))
        draws = sum((a * a * e for a, e in zip(w, own, strict=True)), torch.zeros_like(own[0]))
        # The spread of the data is the same in every estimate, and averaging does not reduce it.
        data = sum((a * (s - e).clamp_min(0) for a, s, e in zip(w, both, own, strict=True)), torch.zeros_like(own[0]))
        errors[name], standard[name] = draws.sqrt(), (data + draws).sqrt()
    return replace(
        parts[0],
        entries=entries,
        standard_error=standard,
        estimator_error=errors,
        samples=sum(part.samples * part.visited for part in parts) / max(1, visited),
        visited=visited,
    )


def diagonal_of(
    moments: NamedMoments,
    recorder: FisherRecorder,
    estimator: str,
    samples: int | float,
    num_examples: int,
    skipped: frozenset[str] = frozenset(),
) -> FisherDiagonal:
    """Return the result that the moments of all examples give. Raise ValueError where a value is not finite."""
    values = moments.mean()
    if not moments.are_finite():  # one look at all of them takes less than one at each
        for name, mean in values.items():
            check_finite(name, mean)

    return FisherDiagonal(
        values,
        moments.standard_error(),
        recorder.granularity,
        estimator,
        samples,
        num_examples,
        recorder.unused,
        skipped,
        visited=num_examples,
    )


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError where a value of a parameter is infinite or, with more than one unit, NaN."""
    # A sum over finite values may overflow, but a sum that is finite has finite values alone. It takes less time.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise ValueError(f"the Fisher of {name!r} is not finite: the network's activations or gradients overflow")


def _joined(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in whole_of(values).values()])
