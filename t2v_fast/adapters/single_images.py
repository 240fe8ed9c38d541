"""A network in training mode whose batch norms see one image at a time: :class:`SingleImages`."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[_BatchNorm, list[tuple[Tensor, Tensor]]]  # of each call of a norm: means and variances, [N, C] each

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

# The functions that run a network are the same in every call, so that the self-check meets them again. They find the
# statistics of this call here.
_current: ContextVar[SingleImages] = ContextVar("single images")


class SingleImages:
    """Run batches as a loop over batches of one image would, with what such a loop leaves in batch norms.

    A batch norm in training mode normalises each image by the image's own statistics, and each image moves the running
    statistics. Within the context, such norms do the former for all images of a batch at once. If batches run with
    :func:`noting`, :meth:`take` keeps the statistics of a batch, and :meth:`store` moves the running statistics as the
    loop over all of these batches would have.

    Args:
        net: The network. Its modules may be in training mode or not.

    Raises:
        ValueError: A norm in training mode sees one value for each channel of an image, which has no variance. Or it
            has a forward method of its own, which may compute more than a batch norm does.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with SingleImages(norm) as single:
        ...     single.take(noting(norm, torch.randn(4, 2, 5)))
        >>> single.store()
        >>> int(norm.num_batches_tracked)
        4
    """

    def __init__(self, net: nn.Module) -> None:
        self._norms = {
            name: module
            for name, module in net.named_modules()
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        }
        self._of_pass: Statistics | None = None  # while a pass is noted
        self._passes: list[tuple[int, Statistics]] = []  # the address of each pass's outputs, and its statistics
        self._taken: list[Statistics] = []
        self._changed: str | None = None  # a buffer that a pass has changed

    def __enter__(self) -> SingleImages:
        for name, norm in self._norms.items():
            if "forward" in vars(norm) or type(norm).forward not in _FORWARDS:
                raise ValueError(
                    f"the batch norm {name!r} ({type(norm).__name__}) is in training mode and has a forward method of "
                    "its own, about which nothing is known: call eval() on it, or pass mode='eval'"
                )
        for name, norm in self._norms.items():
            vars(norm)["forward"] = functools.partial(_normalised_alone, norm, name)
        self._token = _current.set(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _current.reset(self._token)
        for norm in self._norms.values():
            del vars(norm)["forward"]

    def take(self, outputs: Tensor) -> None:
        """Keep the statistics of the pass that gave these outputs, which must have been alive since."""
        address = outputs.data_ptr()
        found = [statistics for pointer, statistics in self._passes if pointer == address]
        if not found:
            raise RuntimeError(f"the outputs {list(outputs.shape)} are of no pass that was noted")
        self._taken.append(found[-1])  # outputs that had this address before are gone
        self._passes = []

    @torch.no_grad()
    def store(self) -> None:
        """Move the running statistics as a loop over the images of all batches that were taken would have.

        Raises:
            ValueError: The passes changed another buffer, about which nothing is known.
        """
        if self._changed is not None:
            raise ValueError(
                f"each forward pass changes the buffer {self._changed!r}, and a loop over single images would leave "
                "another value in it: call eval() on its module, or pass update_statistics=False to leave all buffers"
            )
        for norm in self._norms.values():
            if not _has_statistics(norm):
                continue
            for taken in self._taken:
                if norm not in taken:
                    continue
                # [N, calls, C] to [N calls, C]: each image goes through all calls of the norm before the next image.
                means, variances = (torch.stack(s, 1).flatten(0, 1) for s in zip(*taken[norm], strict=True))
                _move(norm, norm.running_mean, means)
                _move(norm, norm.running_var, variances)
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked += len(means)


def noting(net: nn.Module, inputs: Any) -> Tensor:
    """Run a network within :class:`SingleImages`, and note the statistics of its batch norms."""
    single = _current.get()
    versions = {name: (b, b._version) for name, b in net.named_buffers() if not b.is_inference()}
    statistics: Statistics = {}
    single._of_pass = statistics
    try:
        outputs = net(inputs)
    finally:
        single._of_pass = None
    changed = [name for name, (b, version) in versions.items() if b._version != version]
    single._changed = single._changed or next(iter(changed), None)
    if isinstance(outputs, Tensor):  # the caller says what is wrong with others
        single._passes.append((outputs.data_ptr(), statistics))
    return outputs


def _normalised_alone(norm: _BatchNorm, name: str, x: Tensor) -> Tensor:
    """Return x [N, C, ...] with each channel of each example normalised: a group norm with one group a channel."""
    if x.dim() < 3 or x[0, 0].numel() == 1:
        raise ValueError(
            f"the batch norm {name!r} is in training mode and sees one value for each channel of an example "
            f"{list(x.shape)}, which has no variance: call eval() on it, or pass mode='eval'"
        )
    noted = _current.get()._of_pass
    if noted is not None and _has_statistics(norm):
        noted.setdefault(norm, []).append(_mean_and_variance(x.detach()))
    return F.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance of each channel, both [N, C]. ``torch.var_mean`` is far slower."""
    pixels = tuple(range(2, x.dim()))
    mean = x.mean(pixels, keepdim=True)
    variance = (x - mean).square_().sum(pixels) / (x[0, 0].numel() - 1)
    return mean.reshape(variance.shape), variance


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.training and norm.track_running_stats and norm.running_mean is not None


def _move(norm: _BatchNorm, running: Tensor | None, values: Tensor) -> None:
    """Move a running statistic [C] by values [N, C], one after the other, as ``nn.BatchNorm2d`` does."""
    assert running is not None  # _has_statistics says so
    n = len(values)
    if norm.momentum is None:  # the plain mean of all
        if norm.num_batches_tracked is None:
            return  # torch moves nothing without the count
        total = int(norm.num_batches_tracked) + n
        kept, weights = 1 - n / total, torch.full((n,), 1 / total, dtype=torch.float64)
    else:
        kept = (1 - norm.momentum) ** n
        weights = norm.momentum * (1 - norm.momentum) ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    running.copy_(kept * running.double() + weights.to(running.device) @ values.double())
