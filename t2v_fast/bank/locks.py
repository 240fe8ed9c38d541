"""Locks on bytes of a file, shared by processes and threads: who writes, and who has claimed which task."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # no POSIX system: a bank says so when it is opened, all else works
    fcntl = None
AVAILABLE = fcntl is not None


class Locks:
    """Exclusive locks on single bytes of a file, for processes and threads.

    POSIX record locks, because the kernel releases them when their process dies and no child inherits them: a loader's
    worker that outlives its parent must not hold the parent's claims. They have two traps: they know no threads, and
    closing *any* descriptor of the file drops all of a process's locks on it. So a process has one object a file, for
    good.
    """

    _all: ClassVar[dict[tuple[int, int, int], Locks]] = {}
    _making = threading.Lock()

    @classmethod
    def of(cls, path: Path) -> Locks:
        path.touch()
        status = path.stat()
        with cls._making:
            key = (os.getpid(), status.st_dev, status.st_ino)  # locks are not inherited, so a fork starts anew
            if key not in cls._all:
                cls._all[key] = cls(path)
            return cls._all[key]

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        self._held: set[int] = set()
        self._changed = threading.Condition()

    def acquire(self, offset: int, wait: bool = True) -> bool:
        with self._changed:
            while offset in self._held:
                if not wait:
                    return False
                self._changed.wait()
            self._held.add(offset)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, offset)
        except BaseException as error:
            self._drop(offset)
            if isinstance(error, (BlockingIOError, PermissionError)):  # POSIX allows either
                return False
            raise
        return True

    def release(self, offset: int) -> None:
        if offset in self._held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset)
            self._drop(offset)

    def _drop(self, offset: int) -> None:
        with self._changed:
            self._held.discard(offset)
            self._changed.notify_all()


def task_offset(task: str) -> int:
    """The byte that stands for a task; byte 0 is the writer's. Two tasks that share one only wait for each other."""
    return 1 + int.from_bytes(hashlib.blake2b(task.encode(), digest_size=8).digest()) % (1 << 62)
