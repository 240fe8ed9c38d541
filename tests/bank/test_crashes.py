"""Crashes after every operation on the files of a bank, torn and lost writes, full disks, signals."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from crashes import Recorder, recording, states
from embeddings import make_for_bank

from t2v_fast import Bank, BankError, Embedding
from t2v_fast.bank import recovery


def make(task: str, seed: int = 0, length: int = 7, **changes) -> Embedding:
    """An embedding whose line of the manifest is long enough to be torn in many places."""
    return make_for_bank(task, seed, length, **{"meta": {"task": task, "note": "n" * 40}, **changes})


def same(a: Embedding, b: Embedding) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("hessian", "scale", "standard_error"))


def run(bank: Bank, recorder: Recorder, adds: int) -> dict[str, Embedding]:
    """Add tasks alone and in groups, let some fail and retry them, and embed one again and again.

    Returns:
        The embeddings by the names of their tasks; those of the task "again" by their notes.
    """
    made: dict[str, Embedding] = {}
    for k in range(adds):
        group = [make(f"t{k}-{j}", 10 * k + j) for j in range(1 + 2 * (k % 2))]
        if k >= adds // 2:  # a file of rows that comes late
            group[0] = make(f"t{k}-0", 10 * k, scale=np.arange(1.0, 8.0))
        bank.add(*group)
        made |= {e.meta["task"]: e for e in group}
        recorder.done(*(e.meta["task"] for e in group))
        if k % 3 == 0:
            bank.fail(f"bad {k}", "no images")
        if k % 3 == 2:
            bank.retry()
        if k % 4 == 1:
            if k % 8 == 1 and "again" in bank:
                bank.remove("again")
                recorder.done(f"no {k - 4}")
            made[str(k)] = make("again", 1000 + k, meta={"task": "again", "note": str(k)})
            bank.add(made[str(k)], replace=True)
            recorder.done(f"no {k - 4}")
    return made


def check_embeddings(bank: Bank, promised: set[str], made: dict[str, Embedding]) -> None:
    """Tasks that were stored are there, none is that was taken out, and each is as it was made."""
    assert {task for task in promised if not task.startswith("no ")} <= set(bank.tasks)
    for task in bank.tasks:
        note = bank[task].meta["note"]
        assert same(bank[task], made[note if task == "again" else task])
        assert f"no {note}" not in promised


def check(folder: Path, promised: set[str], made: dict[str, Embedding]) -> str:
    """Open what a crash left, and hold the bank to its promises; how it had to be opened."""
    outcome = "opened"
    try:
        bank = Bank(folder)
    except BankError:
        outcome = "repaired"
        problems = recovery.verify(folder)
        assert problems
        Bank.repair(folder)
        bank = Bank(folder)
    check_embeddings(bank, promised, made)
    behind = set(bank.verify())
    copies = {"manifest.copy.jsonl", "bank.copy.json"}
    if not any((folder / name).exists() for name in copies):
        behind -= {"hessian.f64", "standard_error.f64"}  # of an older bank, with rows that no line names
    assert behind <= copies
    promised, made = promised | {"more"}, made | {"more": make("more", 99)}
    bank.add(made["more"])
    check_embeddings(Bank(folder), promised, made)
    Bank.repair(folder)
    after = Bank(folder)
    assert after.verify() == {}
    check_embeddings(after, promised, made)
    return outcome


def crash(
    tmp_path: Path, recorder: Recorder, made: dict[str, Embedding], draws: int, before: Iterable[str] = ()
) -> Counter:
    """Make the folder again as a crash may leave it after each operation, and check each state once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # what is made again here need not survive
        return replay(tmp_path, recorder, made, draws, set(before))


def replay(tmp_path: Path, recorder: Recorder, made: dict[str, Embedding], draws: int, before: set[str]) -> Counter:
    rng, outcomes, folder, seen = random.Random(0), Counter(), tmp_path / "crashed", set()
    for stop in range(len(recorder.operations) + 1):
        promised = before | {task for o in recorder.operations[:stop] if o.kind == "done" for task in o.tasks}
        for kind, files in states(recorder, stop, rng, draws):
            if (state := (frozenset(promised), tuple(sorted(files.items())))) in seen:
                continue
            seen.add(state)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            try:
                outcomes[kind.split(",")[0], check(folder, promised, made)] += 1
            except BaseException as error:
                error.add_note(f"after {stop} of {len(recorder.operations)} operations, {kind}: {sorted(files)}")
                raise
    kinds = Counter(o.kind for o in recorder.operations)
    print(f"{len(recorder.operations)} operations {dict(kinds)}, {len(seen)} states {dict(outcomes)}")
    return outcomes


@pytest.mark.parametrize(("adds", "draws"), [(9, 0), pytest.param(40, 3, marks=pytest.mark.weekly)])
def test_a_crash_after_any_operation(tmp_path: Path, adds: int, draws: int) -> None:
    """The quick run stops after each of 154 operations, 82 of them writes, which gives some 400 states to check.

    The slow run has 647 operations, 375 of them writes. A bank opens in every state but a few: after some power cuts, a
    group that `add` had not returned for has lost lines in its middle, and the copy lacks more. Then `repair` opens it.
    """
    bank = Bank(tmp_path / "bank")
    with recording(tmp_path / "bank") as recorder:
        made = run(bank, recorder, adds)
    outcomes = crash(tmp_path, recorder, made, draws)
    assert recorder.count("write") > 7 * adds
    assert outcomes["process", "repaired"] == 0
    assert outcomes["power", "repaired"] <= outcomes["power", "opened"] / 100


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("end", ["removed", "failed", "retried"])
def test_a_manifest_that_lost_its_last_line_is_not_opened(tmp_path: Path, end: str, times: int) -> None:
    """Also if an equal line is still there."""
    bank = Bank(tmp_path)
    bank.add(make("a"))
    for _ in range(times):
        if end == "removed":
            bank.add(make("b"))
            bank.remove("b")
        else:
            bank.fail("b", "no images")
            if end == "retried" or times == 2:
                bank.retry()
    if end == "failed":
        bank.fail("b", "no images")
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BankError, match=r"lacks lines that its copy has \(1\)"):
        Bank(tmp_path)
    assert Bank.repair(tmp_path)
    assert (Bank(tmp_path).tasks, list(Bank(tmp_path).failed)) == (["a"], ["b"] if end == "failed" else [])


def test_what_a_dead_writer_left_is_no_damage(tmp_path: Path) -> None:
    """But a damaged last line that was added is."""
    bank = Bank(tmp_path)
    bank.add(make("a"), make("b", 1))
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    for residue in (b"half", bytes(50) + b"\n", b"\0" * 20 + b"\n" + whole.splitlines(keepends=True)[1]):
        manifest.write_bytes(whole + residue)
        assert Bank(tmp_path).tasks == ["a", "b"]
        assert Bank(tmp_path).verify() == {}
    Bank(tmp_path).fail("c", "x")
    assert manifest.read_bytes().startswith(whole)
    assert manifest.read_bytes() == (tmp_path / "manifest.copy.jsonl").read_bytes()
    flip(manifest, len(manifest.read_bytes()) - 5)
    with pytest.raises(BankError, match="line 3: its checksum does not fit"):
        Bank(tmp_path)
    Bank.repair(tmp_path)
    assert (Bank(tmp_path).tasks, Bank(tmp_path).failed) == (["a", "b"], {"c": "x"})


def older(folder: Path, adds: int = 3) -> dict[str, Embedding]:
    """Make a bank as versions without copies left it, with a row that a dead writer left."""
    bank, made = Bank(folder), {f"old {k}": make(f"old {k}", 50 + k) for k in range(adds)}
    bank.add(*made.values())
    for name in ("bank.copy.json", "manifest.copy.jsonl"):
        (folder / name).unlink()
    for field in ("hessian", "standard_error"):
        with open(folder / f"{field}.f64", "ab") as file:
            file.write(np.arange(7.0).tobytes())
    return made


def test_crashes_while_an_older_bank_gets_its_copies(tmp_path: Path) -> None:
    old = older(tmp_path / "bank")
    bank = Bank(tmp_path / "bank")
    with recording(tmp_path / "bank") as recorder:
        made = run(bank, recorder, 2)
    crash(tmp_path, recorder, old | made, 1, old)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "bank" / "unnamed-1-hessian.f64"), np.arange(7.0))


@pytest.mark.parametrize("seed", range(20))
def test_lines_that_are_whole_in_one_copy_are_restored(tmp_path: Path, seed: int) -> None:
    """Also if both copies are damaged, and tasks fail, are taken out and are embedded again."""
    bank, rng = Bank(tmp_path), random.Random(seed)
    latest: dict[str, Embedding] = {}
    for k in range(30):
        name = rng.choice("abcd")
        if name in latest and rng.random() < 0.7:
            bank.remove(name)
            del latest[name]
        if name not in latest and rng.random() < 0.3:
            bank.fail(name, "no images")
            bank.retry()
        if name not in latest:
            latest[name] = make(name, k)
            bank.add(latest[name])
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    original = [rng.random() < 0.5 for _ in lines]
    copy = [not kept or rng.random() < 0.3 for kept in original]
    for name, kept in ("manifest.jsonl", original), ("manifest.copy.jsonl", copy):
        text = [line if whole else b"0" + line[1:] for line, whole in zip(lines, kept, strict=True)]
        (tmp_path / name).write_bytes(b"".join(text))
    with pytest.raises(BankError, match="its checksum does not fit"):
        Bank(tmp_path)
    Bank.repair(tmp_path)
    repaired = Bank(tmp_path)
    assert set(repaired.tasks) == set(latest)
    assert all(same(e, latest[e.meta["task"]]) for e in repaired)
    assert (repaired.failed, repaired.verify()) == ({}, {})


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "manifest flipped": lambda folder: flip(folder / "manifest.jsonl", 300),
    "manifest lost": lambda folder: (folder / "manifest.jsonl").unlink(),
    "manifest cut": lambda folder: os.truncate(folder / "manifest.jsonl", 300),
    "manifest empty": lambda folder: os.truncate(folder / "manifest.jsonl", 0),
    "copy flipped": lambda folder: flip(folder / "manifest.copy.jsonl", 300),
    "copy lost": lambda folder: (folder / "manifest.copy.jsonl").unlink(),
    "copy cut": lambda folder: os.truncate(folder / "manifest.copy.jsonl", 300),
    "header flipped": lambda folder: flip(folder / "bank.json", 60),
    "header lost": lambda folder: (folder / "bank.json").unlink(),
    "header of version 3": lambda folder: (folder / "bank.json").write_text(
        (folder / "bank.json").read_text().replace('"version": 1', '"version": 3')
    ),
    "copy of the header flipped": lambda folder: flip(folder / "bank.copy.json", 60),
    "copy of the header lost": lambda folder: (folder / "bank.copy.json").unlink(),
    "errors lost": lambda folder: (folder / "standard_error.f64").unlink(),
    "locks lost": lambda folder: (folder / "locks").unlink(),
    "index damaged": lambda folder: flip(folder / "index-cosine.npz", 300),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_file_may_be_lost_or_damaged(tmp_path: Path, damage: str) -> None:
    """`verify` reports it, nothing is overwritten, and `repair` brings everything back, also if it is interrupted."""
    folder = tmp_path / "bank"
    bank = Bank(folder)
    made = {f"t{k}": make(f"t{k}", k) for k in range(4)}
    bank.add(*list(made.values())[:2])
    bank.add(*list(made.values())[2:])
    bank.fail("bad", "no images")
    bank.nearest("t0")
    DAMAGE[damage](folder)
    problems = recovery.verify(folder)
    assert bool(problems) == (damage not in ("locks lost", "index damaged"))
    with recording(folder) as recorder:
        report = Bank.repair(folder)
    assert len(report) >= len(problems)
    assert Bank.repair(folder) == []
    bank = Bank(folder)
    assert (bank.tasks, bank.failed, bank.verify()) == (list(made), {"bad": "no images"}, {})
    lost = damage == "errors lost"
    for task in made:
        want = make(task, int(task[1:]), standard_error=None) if lost else made[task]
        np.testing.assert_array_equal(bank[task].hessian, want.hessian)
        assert (bank[task].standard_error is None) == lost
    assert len(bank.nearest("t0")) == 3
    if not lost and report:
        crash(tmp_path, recorder, made, 1, made)


@pytest.mark.parametrize("how", ["lost", "empty", "cut"])
def test_rows_of_an_older_bank_without_a_manifest_stay(tmp_path: Path, how: str) -> None:
    """No copy says what the manifest said, so the rows are reported and kept."""
    folder = tmp_path / "bank"
    old = older(folder)
    rows = (folder / "hessian.f64").read_bytes()
    manifest = folder / "manifest.jsonl"
    first = manifest.read_bytes().split(b"\n")[0] + b"\n"
    if how == "lost":
        manifest.unlink()
        with pytest.raises(BankError, match=r"manifest\.jsonl is missing, but rows of embeddings are there"):
            Bank(folder)
    else:
        manifest.write_bytes(first if how == "cut" else b"")
    named = ["old 0"] if how == "cut" else []
    assert "rows that no line of the manifest names" in recovery.verify(folder)["hessian.f64"]
    if how == "lost":
        assert any("were moved to unnamed-1-hessian.f64" in line for line in Bank.repair(folder))
    Bank(folder).add(make("new", 1))  # without a repair, too
    kept = rows[: 56 * len(named)] + (folder / "unnamed-1-hessian.f64").read_bytes()
    assert kept == rows
    bank = Bank(folder)
    assert (bank.tasks, bank.verify()) == ([*named, "new"], {})
    assert all(same(bank[task], old[task]) for task in named)


def test_an_older_bank_without_its_header(tmp_path: Path) -> None:
    older(tmp_path)
    (tmp_path / "bank.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for action in (Bank, Bank.repair):
        with pytest.raises(BankError, match=r"bank\.json"):
            action(tmp_path)
    assert "bank.json" in recovery.verify(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Faults:
    """Raise an error at the k-th of the operations that take space."""

    def __init__(self, patch: pytest.MonkeyPatch, k: int, error: int) -> None:
        self.left, self.error = k, error
        for name in ("pwrite", "fsync"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr("t2v_fast.files.open", self.counted(open), raising=False)

    def counted(self, real):
        def call(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_at_any_write(tmp_path: Path, error: int) -> None:
    """The call raises and the bank is as before, or the call stores the task; with room again, all goes on."""
    ends = 0
    for empty in (True, False):
        for k in range(40):
            bank = Bank(tmp_path / f"{empty} {k}")
            if not empty:
                bank.add(make("a"))
            before, raised = bank.tasks, False
            with pytest.MonkeyPatch.context() as patch:
                faults = Faults(patch, k, error)
                try:
                    bank.add(make("b", 1), make("c", 2, scale=np.arange(1.0, 8.0)))
                except OSError as caught:
                    raised = True
                    assert caught.errno == error  # noqa: PT017 (the last rounds raise nothing)
                    assert "task \"'b' to 'c'\" was not stored" in str(caught)  # noqa: PT017
            for b in (bank, Bank(bank.folder)):
                assert b.tasks == before + ([] if raised else ["b", "c"])
            if raised:
                bank.add(make("b", 1), make("c", 2, scale=np.arange(1.0, 8.0)))
            bank.add(make("d", 3))
            after = Bank(bank.folder)
            assert (after.tasks, after.verify()) == ([*before, "b", "c", "d"], {})
            if faults.left >= 0:
                ends += 1
                break
    assert ends == 2  # rounds without a fault


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Everything can be read, and what writes raises and changes nothing."""
    bank = Bank(tmp_path / "bank")
    bank.add(make("a"), make("b", 1))
    code = f"""if True:
        import mmap, os, sys, torch  # imported late otherwise, and another user may not be allowed to read them
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]!r}
        from test_crashes import Bank, make
        if os.getuid() == 0:
            os.setuid(65534)
        bank = Bank({str(bank.folder)!r}, create=False)
        assert bank.tasks == ["a", "b"] and bank.verify() == {{}}
        assert bank.nearest("a")[0][0] == "b" and bank["a"].num_examples == 5
        for action in (lambda: bank.add(make("c")), lambda: bank.claim("c"), lambda: bank.fail("c", "x")):
            try:
                action()
            except OSError as error:
                print(type(error).__name__)
    """
    files = {path.name: path.read_bytes() for path in bank.folder.iterdir()}
    for folder in (bank.folder, *bank.folder.parents):
        if folder == Path("/tmp"):
            break
        os.chmod(folder, 0o755)
    os.chmod(bank.folder, 0o555)
    for path in bank.folder.iterdir():
        os.chmod(path, 0o444)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    os.chmod(bank.folder, 0o755)
    assert found.stdout.split() == ["PermissionError"] * 3, found.stderr
    assert {path.name: path.read_bytes() for path in bank.folder.iterdir()} == files


def test_names_and_metadata_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not UTF-8, very long names, thousands of classes, and a clock that goes backwards."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bank \xff\xfe"))
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    bank, classes = Bank(folder), [f"class {k} \u00fc" for k in range(20_000)]
    bank.add(make("x" * 1000), make("y" * 999 + "z", 1, meta={"task": "y" * 999 + "z", "classes": classes}))
    bank.add(make("日本語 ünï 🎉", 2))
    again = Bank(folder)
    assert again.tasks == ["x" * 1000, "y" * 999 + "z", "日本語 ünï 🎉"]
    assert again["y" * 999 + "z"].meta["classes"] == classes
    assert again.verify() == {}
    for name in ("\udcff", "a\x1b[31m", "\u202eabc", "x" * 1001, "a\rb"):
        with pytest.raises(BankError, match="a task's name is"):
            again.add(make(name))
    os.truncate(folder / "manifest.jsonl", 10)
    assert Bank.repair(folder)
    assert Bank(folder).tasks == again.tasks


def test_locks_that_are_lost_leave_claims_and_one_writer(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    assert bank.claim("a")
    (tmp_path / "locks").unlink()
    assert not Bank(tmp_path).claim("a")
    bank.add(make("a"))
    bank.release("a")
    assert Bank(tmp_path).claim("b")


def _write(folder: Path, name: str) -> None:
    """Add to a bank until a signal comes, and note in a file what is added."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bank = Bank(folder / "bank")
    with open(folder / name, "w") as notes:
        print("ready", file=notes, flush=True)
        for k in range(100_000):
            try:
                bank.add(*(make(f"{name} {k} {j}", k) for j in range(1 + k % 3)))
                print(k, file=notes, flush=True)
            except KeyboardInterrupt:
                print("interrupted", file=notes, flush=True)
                break


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_two_writers_get_a_signal_at_any_moment(tmp_path: Path, kind: signal.Signals) -> None:
    """Two processes add to one bank, and one after the other is ended; what `add` returned for is there."""
    rng, fork = random.Random(int(kind)), get_context("fork")  # a new process would import torch for seconds
    for round_ in range(6):
        names = [f"{round_}{name}" for name in "ab"]
        children = [fork.Process(target=_write, args=(tmp_path, name)) for name in names]
        for child in children:
            child.start()
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in names):
            assert all(child.is_alive() for child in children)
            time.sleep(0.01)
        for child, name in zip(children, names, strict=True):
            time.sleep(rng.uniform(0.1, 0.6))
            os.kill(child.pid, kind)
            child.join(120)
            assert child.exitcode == (0 if kind == signal.SIGINT else -kind)
            lines = (tmp_path / name).read_text().split()
            bank = Bank(tmp_path / "bank")
            tasks = set(bank.tasks)
            for k in (int(line) for line in lines if line.isdecimal()):
                for j in range(1 + k % 3):
                    assert f"{name} {k} {j}" in tasks
        assert set(bank.verify()) <= {"manifest.copy.jsonl"}
    bank.add(make("more"))
    assert bank.verify() == {}
    for task in bank.tasks[:-1]:
        assert same(bank[task], make(task, int(task.split()[1])))


def test_what_an_addition_costs(tmp_path: Path) -> None:
    """Syncs, writes and bytes of 100 additions."""
    bank, e = Bank(tmp_path / "bank"), [make(f"t{k}", k, length=10_000) for k in range(101)]
    bank.add(e[0])
    with recording(tmp_path / "bank") as recorder:
        for k in range(1, 101):
            bank.add(e[k])
    assert recorder.count("sync", "sync folder") == 300
    assert recorder.count("write") == 400
    assert recorder.count("truncate") == 0
    written = sum(len(o.data) for o in recorder.operations)
    lines = os.path.getsize(tmp_path / "bank" / "manifest.jsonl")
    assert written < 100 * 2 * 80_000 + 2 * lines
    print(f"{written} bytes, of which the copy takes {lines}")
