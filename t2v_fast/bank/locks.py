"""Locks on bytes of a file, for processes and threads: one for the writer, one for each claimed task."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # not a POSIX system: opening a bank raises an error, and everything else works
    fcntl = None  # type: ignore[assignment]
AVAILABLE = fcntl is not None
LOCKS = "locks"  # the file in the folder of a bank
WRITER = 0  # byte that the one process that is writing locks


class Locks:
    """Exclusive locks on single bytes of a file, for processes and threads.

    These are POSIX record locks. The kernel releases them when their process dies, and no child process inherits them:
    a data loader's worker that outlives its parent must not keep the parent's claims. They have two traps. They do not
    distinguish threads, and closing *any* descriptor of the file drops all of a process's locks on it. So a process has
    one object for each file and never closes it.

    If somebody removes the file, the next lock goes to a new file. The process then locks its claims there too.
    """

    _all: ClassVar[dict[tuple[int, int, int], Locks]] = {}
    _latest: ClassVar[dict[tuple[int, Path], Locks]] = {}  # the last object for each path
    _making = threading.Lock()

    @classmethod
    def of(cls, path: Path) -> Locks:
        """Return this process's one object for a file, which is made if it is missing."""
        try:
            status = path.stat()
        except FileNotFoundError:
            path.touch()
            status = path.stat()
        with cls._making:
            key = (os.getpid(), status.st_dev, status.st_ino)  # a forked process starts anew: it inherits no locks
            if key not in cls._all:
                cls._all[key] = cls(path)
                former = cls._latest.get((os.getpid(), path))
                cls._latest[os.getpid(), path] = cls._all[key]
                for offset in former._held if former else ():
                    if offset != WRITER:
                        cls._all[key].acquire(offset, wait=False)
            return cls._all[key]

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        self._held: set[int] = set()
        self._changed = threading.Condition()

    def acquire(self, offset: int, wait: bool = True) -> bool:
        """Lock a byte. Without ``wait``, return False if it is locked already."""
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
            if isinstance(error, (BlockingIOError, PermissionError)):  # POSIX allows either error for a locked byte
                return False
            raise
        return True

    def release(self, offset: int) -> None:
        """Unlock a byte, if this process has locked it."""
        if offset in self._held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset)
            self._drop(offset)

    def _drop(self, offset: int) -> None:
        with self._changed:
            self._held.discard(offset)
            self._changed.notify_all()


def task_offset(task: str) -> int:
    """Return the byte that stands for a task; byte 0 is the writer's.

    Two tasks with the same byte cannot be claimed at the same time, which is harmless.
    """
    return 1 + int.from_bytes(hashlib.blake2b(task.encode(), digest_size=8).digest(), "big") % (1 << 62)
