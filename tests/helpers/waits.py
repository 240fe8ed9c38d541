"""Count what makes the host wait for a pretended CUDA device, and what crosses from one to the other."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from pretend_cuda import Pinned, Pretend, tensors_in
from torch.utils._python_dispatch import TorchDispatchMode

WAIT, TO_HOST, TO_DEVICE = "wait", "copy to the host", "copy to the device"

# Operators whose result has a shape that depends on values, or that check a status: the host waits for them.
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "_linalg_eigh", "_linalg_svd", "linalg_inv_ex", "_linalg_solve_ex"),
    *("linalg_cholesky_ex", "repeat_interleave"),
}
_OF_STAND_INS = torch.ops.prim.device.default  # no other tensor is asked for its device in this way
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def waits(func: Any, args: tuple) -> bool:
    """Whether the host waits for an operator, some of whose arguments are on the device."""
    name = func.overloadpacket.__name__
    masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)] if name in _INDEXING else []
    return name in _WAITING or bool(masks)


class Counted(TorchDispatchMode):
    """Counts by kind, and by kind and place. Place this mode inside :func:`pretend_cuda.pretended`."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.kinds: Counter[str] = Counter()
        self.places: Counter[tuple[str, str, str]] = Counter()
        self.numbers: Counter[str] = Counter()  # that were copied
        self.operators: Counter[str] = Counter()  # of the device, without views

    def count(self, kind: str, what: str, numbers: int = 0) -> None:
        if not self.counting:
            return
        frames = [f for f in traceback.extract_stack() if "/t2v_fast/" in f.filename]
        if frames and frames[-1].name == "to_device":
            frames.pop()
        where = f"{frames[-1].filename.rpartition('/t2v_fast/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.kinds[kind] += 1
        self.places[kind, what, where] += 1
        self.numbers[kind] += numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = tensors_in(args, kwargs)
        there = any(isinstance(t, Pretend) for t in tensors)
        if self.counting and there and not func.is_view and func is not _OF_STAND_INS:
            self.operators[name] += 1
        if there and name in _WAITING:
            self.count(WAIT, name)
        elif name in ("_to_copy", "copy_"):
            self._copy(func, name, args, kwargs)
        elif there and name in _INDEXING:
            indices = [t for t in args[1] if t is not None]
            if any(isinstance(t, Pretend) and t.dtype in (torch.bool, torch.uint8) for t in indices):
                self.count(WAIT, f"{name} by a mask")
            if not all(isinstance(t, Pretend) for t in indices):
                self.count(WAIT, f"{name} by indices of the host")
        elif not there and torch.device(kwargs.get("device") or "cpu").type == "cuda" and tensors:
            self.count(WAIT, name)
        return func(*args, **kwargs)

    def _copy(self, func: Any, name: str, args: tuple, kwargs: dict) -> None:
        if name == "copy_":
            target, source = args[0].device, args[1]
            asynchronous = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and (
                isinstance(source, Pinned) or isinstance(args[0], Pinned)
            )
        else:
            source = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            asynchronous = kwargs.get("non_blocking", False) and isinstance(source, Pinned)
        if target.type == source.device.type:
            return
        if not source.dim() and name == "copy_" and not isinstance(source, Pretend):
            return  # a number of the host becomes an argument of the kernel
        self.count(TO_HOST if target.type == "cpu" else TO_DEVICE, name, source.numel())
        if not asynchronous:
            self.count(WAIT, f"{name} that is not asynchronous")
