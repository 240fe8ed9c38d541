"""A context of the whole process, which threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager


class ProcessWide:
    """Enter a context with the first of several users, and leave it with the last.

    Settings of the process are changed and restored in this order, whichever thread ends first.

    Example:
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def told():
        ...     print("begins")
        ...     yield
        ...     print("ends")
        >>> shared = ProcessWide(told)
        >>> with shared, shared:
        ...     print("used")
        begins
        used
        ends
    """

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make, self._lock = make, threading.RLock()
        self._users = 0
        self._context: AbstractContextManager | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                context = self._make()
                context.__enter__()
                self._context = context
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)
