"""Job files: YAML or TOML that lists tasks, a probe and settings.

.. code-block:: yaml

    probe: efficientnet-lite0             # or {name: ..., weights: ..., head: ..., size: 96}
    settings: {estimator: deflated, samples: 2, batch_size: 32, seed: 0}
    tasks:
      - folder: flowers                   # one sub-folder for each class; the task is called flowers
      - folders: collections              # each sub-folder is a task
      - {name: birds, csv: birds.csv, path: file, label: species}
      - {name: scenes, csv: scenes.csv, labels: [sky, sea]}         # one multi-label task
      - {name: attributes, table: cub.csv, path: file}              # each other column is a task over the same images
      - {name: digits, dataset: mnist/train, image: image, label: label}    # written by datasets.save_to_disk
      - {name: web, shards: "web/*.tar", label: cls}                # WebDataset

``probe`` is a name for :func:`t2v_fast.load_probe`, or a mapping: ``weights`` are the probe's weights (``default``,
``none`` or a file), ``head`` is the name of its last linear layer, and ``size`` is the side of the images in pixels.
``none`` asks for random weights, which depend on the setting ``seed`` alone.

``settings`` are the options of :class:`t2v_fast.tasks.settings.Settings`, except ``progress``. Among them, ``head`` is
the method that fits the head of a task. In addition, ``skip_unreadable: true`` leaves out images that cannot be read.

Paths are relative to the folder of the job file, and paths in a CSV to the folder of the CSV. No path may lead out of
the root, which is the folder of the job file unless another root is given.
"""

from __future__ import annotations

import difflib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..tasks import probe as probes
from ..tasks import sources
from ..tasks.data import DataError, TaskData, contents_of_folder
from ..tasks.pipeline import Task2Vec
from ..tasks.settings import FOLDER, NOT_IN_JOBS, OPTIONS, SWITCH, SettingError, Settings, shown
from .store import BankError, check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOGETHER = 16  # tasks in one item that share images: more gain little, and a lost worker loses all of them
LARGEST = 64 << 20  # bytes in a job file


class JobError(ValueError):
    """A job that cannot be run. The message names the file, and the task and the key where the error is."""


@dataclass(frozen=True)
class WorkItem:
    """What a worker does at a time: one task, or several tasks that share their images.

    An item is small, because it is sent to other processes and machines.
    """

    kind: str
    tasks: dict[str, str]  # from names of tasks to label columns; a column only for tasks that share images
    paths: tuple[Path, ...]
    options: dict[str, Any]
    root: Path | None  # no path may lead out of this folder; None: paths may lead anywhere
    skip_unreadable: bool = False

    def data(self, task: str) -> TaskData:
        """The data of one of the tasks. Raises DataError, which names the task, for data that cannot be used."""
        return _READERS[self.kind](self, task)

    def contents(self) -> str | None:
        """What ``meta["contents"]`` of its task would be now; None for tasks that have none, or take long to look at.

        Raises DataError for data that cannot be used, or OSError.
        """
        if self.kind == "folder":
            return contents_of_folder(self.paths[0])
        if self.kind == "csv":
            labels = self.options["labels"] or [self.options["label"]]
            return _table(self, next(iter(self.tasks)), labels).contents(labels)
        return None

    def table(self) -> sources.Table:
        """The table of images that the tasks share."""
        return _table(self, next(iter(self.tasks)), sorted(set(self.tasks.values())))


@dataclass(frozen=True)
class Job:
    """Tasks, probe and settings; see :func:`load_job`."""

    file: Path
    probe: dict[str, Any]
    settings: dict[str, Any]
    work: tuple[WorkItem, ...] = field(repr=False)

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks, in order."""
        return [task for work in self.work for task in work.tasks]

    def task2vec(self) -> Task2Vec:
        """The pipeline that embeds the tasks. Raises JobError for settings that do not fit the probe."""
        seed = self.settings.get("seed", 0)
        with torch.random.fork_rng(devices=[]):
            # Random weights are the same at every start and in every worker, or a job could not be resumed.
            torch.manual_seed(seed if isinstance(seed, int) else 0)
            probe = probes.load_probe(**self.probe)
        try:
            return Task2Vec.from_settings(probe, Settings(**self.settings))
        except (TypeError, ValueError) as error:
            raise JobError(f"{self.file}: settings: {error}") from error


def load_job(file: str | os.PathLike, *, root: str | os.PathLike | None = None, allow_outside: bool = False) -> Job:
    """Read a job file, and check everything in it that can be checked without images.

    Nothing in the file is executed. All values have fixed types, and unknown keys are refused.

    Args:
        file: YAML, or TOML if its suffix is ``.toml``.
        root: the folder in which all paths must stay after symbolic links are followed; by default the file's folder.
        allow_outside: paths may lead anywhere.

    Returns:
        The job, for :func:`t2v_fast.bank.driver.run_job`.

    Raises:
        JobError: the file cannot be read, or is not a job as this module describes it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     (Path(name) / "flowers").mkdir()
        ...     file = Path(name) / "job.yaml"
        ...     written = file.write_text("settings: {samples: 3}\\ntasks: [{folder: flowers}]")
        ...     job = load_job(file)
        >>> job.tasks, job.settings
        (['flowers'], {'samples': 3})
    """
    file = Path(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise JobError(f"{file} is no regular file, as a job file is: write its text to a file")
        if file.stat().st_size > LARGEST:
            raise JobError(f"{file} has {file.stat().st_size} bytes, more than a job file may have ({LARGEST})")
        text = file.read_bytes().decode()
        content = tomllib.loads(text) if file.suffix.lower() == ".toml" else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror or error}") from None
    except JobError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
        kind = "TOML" if file.suffix.lower() == ".toml" else "YAML"
        raise JobError(f"{file} is no {kind}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return _Checker(file, None if allow_outside else Path(root or file.parent).resolve()).job(content)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice, or << is used", node.start_mark)
        return mapping


SETTINGS = {name: option for name, option in OPTIONS.items() if name not in NOT_IN_JOBS}
KEYS_OF_SETTINGS = {*SETTINGS, "skip_unreadable"}
PROBE: dict[str, Any] = {"name": str, "weights": str, "head": str, "size": int}
PROBE_MINIMUMS = {"size": 1}
KINDS: dict[str, dict[str, Any]] = {  # the key that names the place of the data: other keys and their defaults
    "folder": {},
    "folders": {},
    "csv": {"path": "path", "label": None, "labels": None},
    "table": {"path": "path", "labels": None},
    "dataset": {"image": "image", "label": "label"},
    "shards": {"label": "cls"},
}


class _Checker:
    """Turn the content of a file into a Job, or raise JobError."""

    def __init__(self, file: Path, root: Path | None) -> None:
        self.file, self.root, self.folder = file, root, file.parent

    def job(self, content: Any) -> Job:
        self._mapping(content, {"probe", "settings", "tasks"}, "")
        probe = content.get("probe", {})
        probe = {"name": probe} if isinstance(probe, str) else probe
        self._check_probe(probe)
        probe = dict(probe)
        if probe.get("weights") not in (None, "default", "none"):
            probe["weights"] = str(self._path(probe["weights"], "probe: weights: "))
        settings, skip_unreadable = self._settings(content.get("settings", {}))
        entries = content.get("tasks")
        if not isinstance(entries, list) or not entries:
            raise self._error(f"tasks: got {shown(entries)}, expected a list of at least one task")
        multilabel = settings.get("task_type") == "multilabel"
        work: list[WorkItem] = []
        names: dict[str, int] = {}
        for number, entry in enumerate(entries, 1):
            for w in self._task(entry, number, multilabel):
                for name in w.tasks:
                    where = f"task {number} ({name!r}): "
                    try:
                        check_name(name)
                    except BankError as error:
                        raise self._error(f"{where}name: {error}") from None
                    if name in names:
                        raise self._error(f"{where}name: task {names[name]} is called so too")
                    names[name] = number
                work.append(replace(w, skip_unreadable=skip_unreadable))
        return Job(self.file, probe, settings, tuple(work))

    def _task(self, entry: Any, number: int, multilabel: bool) -> Iterator[WorkItem]:
        where = f"task {number}: "
        if not isinstance(entry, dict):
            raise self._error(f"{where}got {shown(entry)}, expected a mapping with one of the keys {', '.join(KINDS)}")
        where = f"task {number} ({str(entry['name'])[:80]!r}): " if "name" in entry else where
        kinds = [kind for kind in KINDS if kind in entry]
        if len(kinds) != 1:
            self._mapping(entry, {"name", *KINDS, *(key for keys in KINDS.values() for key in keys)}, where)
            raise self._error(
                f"{where}has {' and '.join(kinds) or 'none'} of the keys {', '.join(KINDS)}, expected one"
            )
        kind = kinds[0]
        self._mapping(entry, {"name", kind, *KINDS[kind]}, where)
        for key, value in entry.items():
            many = key == "labels" or (key == "shards" and isinstance(value, list))
            if many and not (isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)):
                raise self._error(f"{where}{key}: got {shown(value)}, expected a list of names")
            if many and len(set(value)) < len(value):
                raise self._error(f"{where}{key}: one name stands twice")
            if not many and not (isinstance(value, str) and value):
                raise self._error(f"{where}{key}: got {shown(value)}, expected text")
        options = {key: entry.get(key, default) for key, default in KINDS[kind].items()}
        if kind == "csv" and (options["label"] is None) == (options["labels"] is None):
            raise self._error(f"{where}expected either label (one column) or labels (columns of 0 and 1)")
        if multilabel != (kind == "csv" and options["labels"] is not None):
            expected = "csv with labels" if multilabel else "task_type: multilabel in settings"
            raise self._error(f"{where}one bank holds tasks of one type: expected {expected}")
        yield from self._work(kind, entry, options, where)

    def _work(self, kind: str, entry: Mapping[str, Any], options: dict[str, Any], where: str) -> Iterator[WorkItem]:
        if kind == "shards":
            paths = self._shards(entry["shards"], where)
        else:
            paths = (self._path(entry[kind], f"{where}{kind}: "),)
            expected = "file" if kind in ("csv", "table") else "folder"
            if not (paths[0].is_file() if expected == "file" else paths[0].is_dir()):
                raise self._error(f"{where}{kind}: there is no {expected} {entry[kind]!r}")
        if kind == "folders":
            prefix = f"{entry['name']}/" if "name" in entry else ""
            folders = sorted(p for p in paths[0].iterdir() if p.is_dir() and p.name[0] != ".")
            if not folders:
                raise self._error(f"{where}folders: {entry[kind]!r} has no sub-folder")
            for folder in folders:
                inside = self._path(str(folder.absolute()), f"{where}folders: ")
                yield WorkItem("folder", {f"{prefix}{folder.name}": ""}, (inside,), {}, self.root)
            return
        name = entry.get("name") or (paths[0].name if kind == "folder" else None)
        if name is None:
            raise self._error(f"{where}name: is missing")
        work = WorkItem(kind, {name: ""}, paths, options, self.root)
        if kind == "table":
            try:
                table = _table(work, name, options["labels"])
            except DataError as error:
                raise self._error(f"{where}table: {error}") from None
            labels = list(table.cells)
            for start in range(0, len(labels), TOGETHER):
                tasks = {f"{name}/{label}": label for label in labels[start : start + TOGETHER]}
                yield replace(work, tasks=tasks)
            return
        yield work

    def _shards(self, given: str | list[str], where: str) -> tuple[Path, ...]:
        paths: list[Path] = []
        for pattern in [given] if isinstance(given, str) else given:
            folder, file = os.path.split(pattern)
            if "*" in folder or "?" in folder:
                raise self._error(f"{where}shards: {pattern!r} has a wildcard before its last part")
            place = self._path(folder or ".", f"{where}shards: ")
            try:
                found = sorted(place.glob(file)) if file not in ("", ".", "..") else []
            except (ValueError, NotImplementedError, OSError) as error:
                raise self._error(f"{where}shards: {pattern!r} is no pattern: {error}") from None
            if not found:
                raise self._error(f"{where}shards: no file is called {pattern!r}")
            paths += [self._path(str(p), f"{where}shards: ") for p in found]
        return tuple(paths)

    def _path(self, given: str, where: str) -> Path:
        try:
            return confine(given, self.folder, self.root)
        except ValueError as error:
            raise self._error(f"{where}{error}") from None

    def _mapping(self, value: Any, keys: set[str], where: str) -> None:
        if not isinstance(value, dict):
            raise self._error(f"{where}got {shown(value)}, expected a mapping with {', '.join(sorted(keys))}")
        for key in value:
            if key not in keys:
                near = difflib.get_close_matches(str(key)[:80], keys, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(keys))}"
                if key in KEYS_OF_SETTINGS:
                    hint = f"it is a key of settings, as in `settings: {{{key}: ...}}`"
                raise self._error(f"{where}unknown key {shown(key)}: {hint}")

    def _check_probe(self, probe: Any) -> None:
        self._mapping(probe, set(PROBE), "probe: ")
        for key, given in probe.items():
            if not isinstance(given, PROBE[key]) or isinstance(given, bool):
                expected = "a whole number" if PROBE[key] is int else "text"
                raise self._error(f"probe: {key}: got {shown(given)}, expected {expected}")
            if key in PROBE_MINIMUMS and not PROBE_MINIMUMS[key] <= given < 1 << 62:
                raise self._error(f"probe: {key}: got {shown(given)}, expected at least {PROBE_MINIMUMS[key]}")

    def _settings(self, given: Any) -> tuple[dict[str, Any], bool]:
        """The settings of the pipeline, with confined paths, and whether unreadable images are left out."""
        for name, reason in NOT_IN_JOBS.items():
            if isinstance(given, dict) and name in given:
                raise self._error(f"settings: {name} is not for a job: {reason}")
        self._mapping(given, KEYS_OF_SETTINGS, "settings: ")
        settings = dict(given)
        skip_unreadable = settings.pop("skip_unreadable", False)
        try:
            if not isinstance(skip_unreadable, bool):
                raise SettingError("skip_unreadable", skip_unreadable, SWITCH.expected)
            Settings(**settings)
        except SettingError as error:
            text = f"{error.option}: got {shown(error.given)}, expected {error.expected}"
            raise self._error(f"settings: {text}") from None
        except ValueError as error:
            raise self._error(f"settings: {error}") from None
        for name, option in SETTINGS.items():
            if option.kind is FOLDER and settings.get(name) is not None:
                settings[name] = str(self._path(settings[name], f"settings: {name}: "))
        return settings, skip_unreadable

    def _error(self, text: str) -> JobError:
        return JobError(f"{self.file}: {text}")


def confine(given: str, folder: Path, root: Path | None) -> Path:
    """Resolve a path that is relative to ``folder``, links included; ValueError if it leads out of ``root``."""
    try:
        path = (folder / given).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links, or a name that is too long
        raise ValueError(f"{given[:80]!r} is no path: {error}") from None
    if root is not None and not path.is_relative_to(root):
        raise ValueError(f"{given[:200]!r} leads out of {root}; if it should, allow that (--allow-outside)")
    return path


def _table(work: WorkItem, task: str, labels: Sequence[str] | None) -> sources.Table:
    file = work.paths[0]
    return sources.Table(file, work.options["path"], labels, lambda path: confine(path, file.parent, work.root), task)


def _read_folder(work: WorkItem, task: str) -> TaskData:
    return TaskData.of(work.paths[0], name=task, skip_unreadable=work.skip_unreadable)


def _read_csv(work: WorkItem, task: str) -> TaskData:
    labels = work.options["labels"]
    if labels is not None:
        return sources.multilabel_task(_table(work, task, labels), labels, task, work.skip_unreadable)
    label = work.options["label"]
    return sources.table_task(_table(work, task, [label]), label, task, work.skip_unreadable)


def _read_table(work: WorkItem, task: str) -> TaskData:
    label = work.tasks[task]
    return sources.table_task(_table(work, task, [label]), label, task, work.skip_unreadable)


def _read_dataset(work: WorkItem, task: str) -> TaskData:
    return sources.saved_dataset(
        work.paths[0], work.options["image"], work.options["label"], task, work.skip_unreadable
    )


def _read_shards(work: WorkItem, task: str) -> TaskData:
    return sources.shards_task(work.paths, work.options["label"], task, work.skip_unreadable)


_READERS: dict[str, Callable[[WorkItem, str], TaskData]] = {
    "folder": _read_folder,
    "csv": _read_csv,
    "table": _read_table,
    "dataset": _read_dataset,
    "shards": _read_shards,
}
