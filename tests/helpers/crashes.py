"""Record what a run does to a folder, and make the folder again as a crash may leave it at any moment.

The recorder stands between the library and the operating system. It keeps the writes, truncations, syncs, renames and
removals in order, with the files that they concern. A file is more than its name: a write is safe once its file was
synced, and a name is safe once its folder was. A journal keeps the order of names, so a crash leaves some first part of
the names that were not synced, and any part of the contents.
"""

from __future__ import annotations

import builtins
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Operation:
    """A change of a file (``write``, ``truncate``) or a name (``link``, ``unlink``), a sync, or the end of a call."""

    kind: str
    file: int = -1
    name: str = ""
    position: int = 0
    data: bytes = b""
    tasks: tuple[str, ...] = ()


@dataclass
class Recorder:
    """What happened in a folder since recording began."""

    folder: Path
    operations: list[Operation] = field(default_factory=list)
    files: int = 0  # how many there were so far
    names: dict[str, int] = field(default_factory=dict)  # in the folder now, with the numbers of their files
    start: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(self.folder.iterdir()):
            self.start[path.name] = path.read_bytes()
            self.names[path.name] = self.new_file()

    def new_file(self) -> int:
        self.files += 1
        return self.files - 1

    def done(self, *tasks: str) -> None:
        """The call that stored these tasks has returned."""
        self.operations.append(Operation("done", tasks=tasks))

    def inside(self, path: Any) -> str | None:
        path = Path(os.fspath(path)) if isinstance(path, (str, bytes, os.PathLike)) else None
        return path.name if path is not None and path.parent == self.folder else None

    def count(self, *kinds: str) -> int:
        return sum(operation.kind in kinds for operation in self.operations)


@contextmanager
def recording(folder: Path) -> Iterator[Recorder]:
    """Record every change in a folder while the block runs."""
    recorder = Recorder(folder)
    add = recorder.operations.append
    real = {name: getattr(os, name) for name in ("open", "pwrite", "ftruncate", "fsync", "replace", "rename", "unlink")}
    mine: dict[int, int] = {}  # open descriptors of files in the folder

    def created(name: str, descriptor: int) -> None:
        if name not in recorder.names:
            recorder.names[name] = recorder.new_file()
            add(Operation("link", recorder.names[name], name))
        mine[descriptor] = recorder.names[name]

    def open_(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        descriptor = real["open"](path, flags, *rest, **options)
        mine.pop(descriptor, None)
        if path == folder:
            mine[descriptor] = -1
        elif (name := recorder.inside(path)) is not None:
            created(name, descriptor)
        return descriptor

    def pwrite(file: int, data: Any, position: int) -> int:
        written = real["pwrite"](file, data, position)
        if file in mine:
            add(Operation("write", mine[file], position=position, data=bytes(data[:written])))
        return written

    def ftruncate(file: int, size: int) -> None:
        real["ftruncate"](file, size)
        if file in mine:
            add(Operation("truncate", mine[file], position=size))

    def fsync(file: int) -> None:
        real["fsync"](file)
        if file in mine:
            add(Operation("sync folder") if mine[file] == -1 else Operation("sync", mine[file]))

    def rename(old: Any, new: Any) -> None:
        real["replace"](old, new)
        file = recorder.names.pop(Path(old).name)
        recorder.names[Path(new).name] = file
        add(Operation("rename", file, Path(new).name, data=Path(old).name.encode()))

    def unlink(path: Any, **options: Any) -> None:
        real["unlink"](path, **options)
        if (name := recorder.inside(path)) is not None:
            add(Operation("unlink", recorder.names.pop(name), name))

    class Writer:
        """A file that is written from its start on, as :func:`open` gives it."""

        def __init__(self, path: Any, mode: str) -> None:
            self._file = builtins.open(path, mode, buffering=0)  # noqa: SIM115 (closed by __exit__)
            created(recorder.inside(path), self._file.fileno())

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            at = self._file.tell()
            written = self._file.write(data)
            add(Operation("write", mine[self.fileno()], position=at, data=bytes(data[:written])))
            return written

        def flush(self) -> None:
            self._file.flush()

        def fileno(self) -> int:
            return self._file.fileno()

    def open_file(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "w" in mode or "x" in mode:
            assert mode in ("xb", "wb")
            assert not rest
            assert not options
            if recorder.inside(path) is not None:
                return Writer(path, mode)
        assert "a" not in mode
        assert "+" not in mode
        return builtins.open(path, mode, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in {
            "open": open_,
            "pwrite": pwrite,
            "ftruncate": ftruncate,
            "fsync": fsync,
            "replace": rename,
            "rename": rename,
            "unlink": unlink,
        }.items():
            patch.setattr(os, name, replacement)
        for module in ("t2v_fast.files", "t2v_fast.bank.rows"):
            patch.setattr(f"{module}.open", open_file, raising=False)
        yield recorder


def states(recorder: Recorder, stop: int, rng: random.Random, draws: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield what the folder may hold if all stops after ``stop`` operations, each state with how it came about.

    A process that dies leaves all operations done, of the last write perhaps a part. A power cut leaves what was
    synced, and of the rest what chance wants.
    """
    past = recorder.operations[:stop]
    yield "process", _folder(recorder, past)
    last = past[-1] if past else None
    if last is not None and last.kind == "write" and len(last.data) > 1:
        for cut in {1, len(last.data) // 2, len(last.data) - 1}:
            torn = Operation("write", last.file, position=last.position, data=last.data[:cut])
            yield f"process, torn after {cut} bytes", _folder(recorder, [*past[:-1], torn])
    yield "power", _folder(recorder, _survivors(past, None))
    for _ in range(draws):
        yield "power, by chance", _folder(recorder, _survivors(past, rng))


def _survivors(past: list[Operation], rng: random.Random | None) -> list[Operation]:
    """What a power cut leaves: all that was synced, and nothing else or a part of it by chance."""
    synced: dict[int, int] = {}  # the last sync of each file
    named = -1  # the last sync of the folder
    for k, operation in enumerate(past):
        if operation.kind == "sync":
            synced[operation.file] = k
        elif operation.kind == "sync folder":
            named = k
    loose = [k for k, o in enumerate(past) if o.kind in ("link", "rename", "unlink") and k > named]
    lost = set(loose[rng.randint(0, len(loose)) if rng else 0 :])
    kept = []
    for k, operation in enumerate(past):
        if operation.kind in ("write", "truncate") and k > synced.get(operation.file, -1):
            if rng is None or rng.random() < 0.4:
                continue
            if operation.kind == "write" and len(operation.data) > 1 and rng.random() < 0.5:
                first = rng.randrange(len(operation.data))
                part = operation.data[first : rng.randint(first, len(operation.data))]
                operation = Operation("write", operation.file, position=operation.position + first, data=part)
        if k not in lost:
            kept.append(operation)
    return kept


def _folder(recorder: Recorder, operations: list[Operation]) -> dict[str, bytes]:
    first = list(recorder.start)
    contents = {number: bytearray(recorder.start[name]) for number, name in enumerate(first)}
    names = {name: number for number, name in enumerate(first)}
    for o in operations:
        content = contents.setdefault(o.file, bytearray()) if o.file >= 0 else bytearray()
        if o.kind == "write":
            content.extend(bytes(max(0, o.position - len(content))))
            content[o.position : o.position + len(o.data)] = o.data
        elif o.kind == "truncate":
            content.extend(bytes(max(0, o.position - len(content))))
            del content[o.position :]
        elif o.kind == "link":
            names[o.name] = o.file
        elif o.kind == "rename":
            names.pop(o.data.decode(), None)
            names[o.name] = o.file
        elif o.kind == "unlink":
            names.pop(o.name, None)
    return {name: bytes(contents.get(number, b"")) for name, number in names.items()}
