"""Checks of values on a device, without a wait for each of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WINDOW = 8  # batches that show whether host or device binds; the first ones compile kernels and are checked

Judge = Callable[[Sequence[float]], None]  # raises an error where the numbers are those of a bad batch


class DeferredChecks:
    """Check numbers that a device computes. Errors are raised a little later, so that the host need not wait.

    On a CPU, a check is made at once. On CUDA, its numbers are copied to pinned memory, and a later batch looks at
    those that have arrived. The host is never more than :data:`AHEAD` batches ahead of the device: an error comes at
    most so many batches late, and the inputs of no more batches take memory.

    Example:
        >>> checks = DeferredChecks()
        >>> checks.begin_batch()
        >>> checks.finite(torch.tensor([[1.0], [float("nan")]]), lambda example, values: f"example {example}: {values}")
        Traceback (most recent call last):
            ...
        ValueError: example 1: [nan]
    """

    AHEAD = 2

    def __init__(self) -> None:
        self.batch = -1  # the number of the batch
        self._waited = -1  # the last batch at whose begin the host had to wait for the device
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event, Judge]] = deque()

    def begin_batch(self) -> None:
        """Count one more batch. Raise the error of an earlier one, if its numbers have arrived and are bad."""
        self.batch += 1
        while self._waiting:
            batch, _, arrived, _ = self._waiting[0]
            if not arrived.query():
                if batch > self.batch - self.AHEAD:
                    return
                self._waited = self.batch
            self._judge_first()

    @property
    def host_binds(self) -> bool:
        """Whether the device has waited for the host for some batches, and not the host for the device."""
        return self.batch >= 2 * _WINDOW and self.batch - self._waited > _WINDOW

    def finish(self) -> None:
        """Wait for all numbers, and raise the first error."""
        while self._waiting:
            self._judge_first()

    def finite(self, t: Tensor, message: Callable[[int, list[float]], str]) -> None:
        """Raise ValueError unless all entries of ``t`` [N, ...] are finite.

        Args:
            t: A floating-point tensor with the examples along its first axis.
            message: Called with the first bad example and its first eight values.

        Raises:
            ValueError: An entry is NaN or infinite; raised now on a CPU, and later on a CUDA device.
        """

        def judge(numbers: Sequence[float]) -> None:
            bad, example, *values = numbers
            if bad:
                raise ValueError(message(int(example), values))

        if not t.numel():
            return
        if t.device.type != "cuda":
            # A sum with an entry that is not finite is not finite, and takes a fraction of the time.
            if not math.isfinite(t.detach().sum()) and not t.isfinite().all():
                judge(_first_bad(t).tolist())
            return
        numbers = _first_bad(t)
        there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(t.device))
        self._waiting.append((self.batch, there, arrived, judge))

    def _judge_first(self) -> None:
        _, numbers, arrived, judge = self._waiting.popleft()
        arrived.synchronize()
        judge(numbers.tolist())


def _first_bad(t: Tensor) -> Tensor:
    """Return whether some entry is not finite, the first example with such an entry, and its first eight values."""
    rows = t.detach().reshape(len(t), -1)
    bad = ~rows.isfinite().all(1)
    example = bad.to(torch.uint8).argmax().reshape(1)
    values = rows[:, :8].index_select(0, example)[0]
    return torch.cat([bad.any().reshape(1).double(), example.double(), values.double()])
