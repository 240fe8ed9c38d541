"""Keep the memory of a pipeline's passes from one task to the next."""

from __future__ import annotations

import weakref
from contextlib import ExitStack

from ..gradients.fast_forward import kept_memory

_kept: weakref.WeakKeyDictionary[object, weakref.finalize] = weakref.WeakKeyDictionary()


def keep_memory_of(owner: object) -> None:
    """Keep freed memory in the process until the owner is deleted, or until :func:`release_memory_of`.

    Each task needs about as much memory as the one before. If the memory went back to the system after a task, the
    system would clear every page again for the next one. With EfficientNet-Lite0 at 96 pixels, this takes a quarter of
    the time of a task. The owner holds no reference to the memory, so it can be copied and pickled.

    Args:
        owner: Usually a :class:`t2v_fast.Task2Vec` on a CPU. A second call for the same owner does nothing.
    """
    if owner in _kept:
        return
    stack = ExitStack()
    stack.enter_context(kept_memory())
    _kept[owner] = weakref.finalize(owner, stack.close)


def release_memory_of(owner: object) -> None:
    """Give the memory that :func:`keep_memory_of` keeps for this owner back to the system."""
    if (release := _kept.pop(owner, None)) is not None:
        release()
