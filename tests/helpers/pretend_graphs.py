"""CUDA graphs of pretended tensors: a tape of operators.

A capture writes down each operator with the very tensors that it read and made. A replay runs these operators on these
tensors and runs nothing else. So it does what a replay on a card does: it reads the same addresses, it uses the numbers
of the host that were there at the capture, and no code of the host runs. As on a card,

- nothing has been computed when a capture ends (the results are NaN until the first replay),
- an operator for which the host waits makes the capture fail, also where the error was caught inside,
- a capture that has failed leaves its stream the current one,
- what the host had in pinned memory is what it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pretend_cuda
import pytest
import torch
from pretend_cuda import Pinned, replaced, tensors_in
from torch import Tensor
from waits import waits

CAPTURING = "CUDA error: operation not permitted when stream is capturing"


class CUDAGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable, tuple, dict[str, Any], list[Tensor]]] = []
        self.failed = False
        self.replays = 0
        self._fresh: set[int] = set()  # the addresses of what the capture has made

    def write(
        self, func: Any, function: Callable, args: tuple, kwargs: dict[str, Any], here: list[Tensor], found: Any
    ) -> None:
        results = tensors_in(found)
        to_host = any(t is other for t in here for other in results)
        pageable = any(t.dim() and not isinstance(t, Pinned) for t in here)
        if waits(func, args) or to_host or pageable:
            self.failed = True
            raise RuntimeError(f"{CAPTURING} ({func})")
        assert func not in pretend_cuda._RESHAPING_IN_PLACE, f"{func} would be repeated on its own result"
        frozen = {id(t) for t in here}
        args, kwargs = replaced(Tensor, lambda t: t.clone() if id(t) in frozen else t, (args, kwargs))
        given = {_address(t) for t in tensors_in(args, kwargs)}
        self._fresh |= {_address(t) for t in results} - given
        self.steps.append((function, args, kwargs, results))

    def end(self) -> None:
        for *_, results in self.steps:
            for t in results:
                if t.is_floating_point() and _address(t) in self._fresh:
                    t.fill_(float("nan"))

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.steps:
                found = tensors_in(function(*args, **kwargs))
                for t, new in zip(results, found, strict=True):
                    if t.numel() and _address(t) != _address(new):
                        t.copy_(new)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@contextmanager
def _graph(graph: CUDAGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
    context = torch.cuda.stream(stream)
    _entered.append(context)  # so that it is not left when it is collected
    context.__enter__()
    pretend_cuda.listeners.append(graph.write)
    try:
        yield
    finally:
        pretend_cuda.listeners.pop()
        if graph.failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        context.__exit__(None, None, None)
    graph.end()


_entered: list[Any] = []


@contextmanager
def with_graphs() -> Iterator[list[CUDAGraph]]:
    """A context, within :func:`pretend_cuda.pretended`, in which graphs can be captured. Yields those that were."""
    made: list[CUDAGraph] = []

    def make() -> CUDAGraph:
        made.append(CUDAGraph())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", make)
        patch.setattr(torch.cuda, "graph", _graph)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        yield made
