"""The bank: many writers, deaths at any moment, full disks, damage, exports, neighbours."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from embeddings import make_for_bank as make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2v_fast import Bank, BankError, Embedding, FingerprintMismatch, cli, distance
from t2v_fast.bank import NotInBank
from t2v_fast.bank.export import export
from t2v_fast.bank.index import Index, scan
from t2v_fast.bank.manifest import encode_record

SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")  # its processes need not import torch, which takes seconds


def same(a: Embedding, b: Embedding) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("hessian", "scale"))
    errors = (a.standard_error is None) == (b.standard_error is None) and (
        a.standard_error is None or np.array_equal(a.standard_error, b.standard_error)
    )
    rest = ("layers", "num_examples", "meta", "fingerprint")
    return arrays and errors and all(getattr(a, f) == getattr(b, f) for f in rest)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    bank = Bank(tmp_path / "b")
    assert (len(bank), bank.tasks, bank.fingerprint, bank.vectors().shape) == (0, [], None, (0, 0))
    given_ = [make(f"t{k}", k) for k in range(3)]
    given_.append(make("no error", 3, standard_error=None))
    given_.append(make("scaled", 4, scale=np.arange(1.0, 8.0)))
    bank.add(*given_[:2])
    for e in given_[2:]:
        bank.add(e)
    for b in (bank, Bank(tmp_path / "b")):
        assert b.tasks == ["t0", "t1", "t2", "no error", "scaled"]
        assert all(same(x, y) for x, y in zip(b, given_, strict=True))
        assert isinstance(b.vectors(), np.memmap)
        assert not b.vectors().flags.writeable
        np.testing.assert_array_equal(b.vectors(), np.stack([e.hessian for e in given_]))
    assert "t1" in bank
    assert "t9" not in bank
    with pytest.raises(KeyError, match="'t9' is not in it"):
        bank["t9"]


def test_refusals(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.add(make("a"))
    with pytest.raises(BankError, match="task 'a' is there already"):
        bank.add(make("a", 1))
    with pytest.raises(BankError, match="task 'b' is there already"):
        bank.add(make("b"), make("b"))
    with pytest.raises(FingerprintMismatch, match=r"task 'b' cannot go .* probe \('p' against 'q'\)"):
        bank.add(make("c"), make("b", fingerprint={"probe": "q"}))
    with pytest.raises(FingerprintMismatch, match="the layers"):
        bank.add(make("b", layers=(("a", 0, 7),)))
    for name in ("", "x" * 1001, "a\nb", "\ud800"):
        with pytest.raises(BankError, match="a task's name is"):
            bank.add(make("b", meta={"task": name}))
    with pytest.raises(BankError, match="is finished, so it cannot have failed"):
        bank.fail("a", "no")
    with pytest.raises(BankError, match="has not failed"):
        bank.retry(["a"])
    assert bank.tasks == ["a"]  # all or none
    with pytest.raises(BankError, match="is no bank"):
        Bank(tmp_path / "none", create=False)


def test_failures_are_kept_until_retried(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.fail("bad", "no images \udc80")
    bank.fail("worse", "nothing")
    assert Bank(tmp_path).failed == {"bad": "no images \\udc80", "worse": "nothing"}
    assert not bank.claim("bad")
    with pytest.raises(KeyError, match="'worse' failed: nothing"):
        bank["worse"]
    assert bank.retry(["bad"]) == ["bad"]
    assert bank.claim("bad")
    bank.add(make("bad"))
    assert bank.retry() == ["worse"]
    assert (bank.failed, bank.tasks) == ({}, ["bad"])


def test_removed_tasks_can_be_added_again(tmp_path: Path) -> None:
    bank, other = Bank(tmp_path), Bank(tmp_path)
    bank.add(*(make(name, k) for k, name in enumerate("abcd")))
    assert len(other) == 4
    bank.fail("f", "no images")
    for names, state in ((["b", "e"], "is not in it"), (["b", "f"], "has failed: retry it"), ([""], "is not in it")):
        with pytest.raises(BankError, match=f"task {names[-1]!r} {state}"):
            bank.remove(*names)
    bank.remove()
    assert bank.tasks == ["a", "b", "c", "d"]  # all or none
    assert not bank.claim("b")
    bank.remove("b", "d", "b")
    for b in (bank, other, Bank(tmp_path)):
        assert (b.tasks, "b" in b, b.settled("b"), b.verify()) == (["a", "c"], False, False, {})
        np.testing.assert_array_equal(b.vectors(), np.stack([make("a", 0).hessian, make("c", 2).hessian]))
        assert not b.vectors().flags.writeable
        with pytest.raises(KeyError, match="task 'd' is not in it"):
            b["d"]
    assert bank.claim("b")
    other.add(make("d", 13), make("b", 11))
    expected = [make("a", 0), make("c", 2), make("d", 13), make("b", 11)]
    assert Bank.repair(tmp_path) == []
    for b in (bank, other, Bank(tmp_path)):
        assert b.verify() == {}
        assert all(same(x, y) for x, y in zip(b, expected, strict=True))
        np.testing.assert_array_equal(b.vectors(), np.stack([e.hessian for e in expected]))
    bank.remove("a", "b", "c", "d")
    assert (bank.tasks, bank.vectors().shape, bank.nearest(make("a"))) == ([], (0, 7), [])
    with pytest.raises(FingerprintMismatch):  # an empty bank keeps what its embeddings were made with
        bank.add(make("a", fingerprint={"probe": "q"}))


def test_an_embedding_takes_the_place_of_another(tmp_path: Path) -> None:
    bank, other = Bank(tmp_path), Bank(tmp_path)
    bank.add(make("a", 0), make("b", 1))
    with pytest.raises(BankError, match="task 'a' is there already"):
        bank.add(make("c", 2), make("a", 10))
    assert not bank.claim("a")
    assert bank.claim("a", again=True)
    assert not other.claim("a", again=True)
    bank.add(make("c", 2), make("a", 10), replace=True)
    bank.release("a")
    with pytest.raises(BankError, match="task 'd' is there already"):
        bank.add(make("d"), make("d", 1), replace=True)
    bank.fail("e", "no images")
    assert not bank.claim("e", again=True)
    expected = [make("b", 1), make("c", 2), make("a", 10)]
    assert Bank.repair(tmp_path) == []
    for b in (bank, other, Bank(tmp_path)):
        assert all(same(x, y) for x, y in zip(b, expected, strict=True))
        np.testing.assert_array_equal(b.vectors(), np.stack([e.hessian for e in expected]))


def test_a_task_that_is_missing_is_an_error_of_both_kinds(tmp_path: Path) -> None:
    """A mapping raises KeyError, and the command line catches errors about a bank."""
    Bank(tmp_path).add(make("a"))
    for error in (KeyError, BankError, NotInBank):
        with pytest.raises(error) as caught:
            Bank(tmp_path)["b"]
        assert str(caught.value) == f"bank {tmp_path}: task 'b' is not in it"


def test_names_are_read_while_others_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that looks at the folder waits until the names are sorted."""
    bank, own = Bank(tmp_path), Bank._order
    bank.add(make("a"), make("b"))
    looks = threading.Thread(target=len, args=(bank,))

    def order(self: Bank) -> list[str]:
        Bank(tmp_path).remove("a")
        looks.start()
        looks.join(0.2)
        return own(self)

    monkeypatch.setattr(Bank, "_order", order)
    assert bank.tasks == ["a", "b"]
    looks.join()
    monkeypatch.undo()
    assert bank.tasks == ["b"]


@pytest.mark.parametrize("opened", ["the same object", "another object"])
def test_an_index_does_not_outlive_removed_tasks(tmp_path: Path, opened: str) -> None:
    """The last task is removed, and another takes its name: all names are as before."""
    vectors = clustered(200, 7)
    bank = Bank(tmp_path)
    bank.add(*(make(str(k), hessian=v) for k, v in enumerate(vectors)))
    assert bank.nearest(make("x", hessian=vectors[199]), 1)[0][0] == "199"
    bank.remove("199")
    bank.add(make("199", hessian=vectors[7] * np.linspace(1, 1.01, 7)))
    bank = bank if opened == "the same object" else Bank(tmp_path)
    query = make("x", hessian=vectors[7] * np.linspace(1, 1.01, 7))
    assert bank.nearest(query, 1) == bank.nearest(query, 1, exact=True)
    assert bank.nearest(query, 1)[0][0] == "199"


def test_claims_exclude_threads_objects_and_processes(tmp_path: Path) -> None:
    bank, other = Bank(tmp_path), Bank(tmp_path)
    assert bank.claim("a")
    assert not bank.claim("a")
    assert not other.claim("a")
    del other
    Bank(tmp_path)  # opening and dropping another must not drop the lock of this process
    with SPAWN.Pool(1) as pool:
        assert pool.apply(_claim, (tmp_path, "a")) is False
        assert pool.apply(_claim, (tmp_path, "b")) is True
        assert not bank.claim("b")
        bank.release("a")
        assert pool.apply(_claim, (tmp_path, "a")) is True
    assert _until(lambda: bank.claim("b"))  # the other process is gone
    bank.add(make("b"))
    bank.release("b")
    assert not bank.claim("b")


def _claim(path: Path, task: str) -> bool:
    return Bank(path).claim(task)


def _until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_forked_child_holds_no_claim(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    ready, go = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=_claim_and_fork, args=(tmp_path, ready, go))
    process.start()
    assert ready.wait(60)
    assert not bank.claim("a")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert _until(lambda: bank.claim("a"))  # though its child lives on
    go.set()


def _claim_and_fork(path: Path, ready, go) -> None:
    Bank(path).claim("a")
    if os.fork() == 0:
        go.wait(60)
        os._exit(0)
    ready.set()
    time.sleep(60)


def _work(path: Path, names: list[str], seed: int) -> None:
    bank = Bank(path)
    random.Random(seed).shuffle(names)
    for name in names:
        if bank.claim(name):
            bank.add(make(name, int(name)))
            bank.release(name)


@pytest.mark.slow
def test_many_processes_killed_at_random(tmp_path: Path) -> None:
    """Every task ends up there exactly once with its own numbers, whenever writers die."""
    names, rng = [str(k) for k in range(120)], random.Random(0)
    workers, kills = [], 0
    deadline = time.monotonic() + 300
    while len(Bank(tmp_path)) < len(names):
        assert time.monotonic() < deadline
        workers = [w for w in workers if w.is_alive()]
        while len(workers) < 3:
            workers.append(FORK.Process(target=_work, args=(tmp_path, list(names), rng.random())))
            workers[-1].start()
        time.sleep(rng.random() * 0.1)
        if kills < 6 and len(Bank(tmp_path)) > 15 * kills:
            os.kill(rng.choice(workers).pid, signal.SIGKILL)
            kills += 1
    for w in workers:
        w.join()
    bank = Bank(tmp_path)
    assert kills  # all six, unless the others had finished before this process had its turn
    assert sorted(bank.tasks, key=int) == names
    assert bank.verify() == {}
    assert all(same(bank[name], make(name, int(name))) for name in names)
    states = [json.loads(line[33:])["task"] for line in (tmp_path / "manifest.jsonl").read_bytes().splitlines()]
    assert len(states) == len(names)


def test_death_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that stops after any number of bytes leaves what was there, and the next one goes on."""

    class Death(BaseException):
        pass

    real, budget = os.pwrite, 0

    def pwrite(file, data, position):
        nonlocal budget
        if budget <= 0:
            raise Death
        written = real(file, data[:budget], position)
        budget -= written
        return written

    total = 3 * 7 * 8 + 400
    for stop in range(0, total, 13):
        folder = tmp_path / str(stop)
        bank = Bank(folder)
        bank.add(make("a"))
        monkeypatch.setattr(os, "pwrite", pwrite)
        budget = stop
        with contextlib.suppress(Death):
            bank.add(make("b", 1))
        monkeypatch.undo()
        after = Bank(folder)
        assert same(after["a"], make("a"))
        if "b" not in after:
            after.add(make("b", 1))
        after.add(make("c", 2))
        assert Bank(folder).tasks == ["a", "b", "c"]
        assert Bank(folder).verify() == {}


@pytest.mark.parametrize("room", [0, 20, 100, 150, 300])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    bank = Bank(tmp_path)
    bank.add(make("a"))
    left, real = room, os.pwrite

    def pwrite(file, data, position):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, data[:left], position)
        left -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"task 'b' was not stored: No space left on device") as caught:
        bank.add(make("b", 1))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert bank.tasks == Bank(tmp_path).tasks == ["a"]
    if room <= 100:
        assert (tmp_path / "hessian.f64").stat().st_size == 56  # the space was given back
    bank.add(make("b", 1))
    assert Bank(tmp_path).verify() == {}
    assert same(bank["b"], make("b", 1))


def _fill(path: Path) -> str:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        for k in range(100):
            Bank(path).add(make(str(k), k))
    except OSError as error:
        return str(error)
    return "no error"


def test_a_limit_of_the_operating_system(tmp_path: Path) -> None:
    with SPAWN.Pool(1) as pool:
        error = pool.apply(_fill, (tmp_path,))
    bank = Bank(tmp_path)
    assert f"task '{len(bank)}' was not stored: File too large" in error
    assert 1 <= len(bank) < 100
    assert bank.verify() == {}
    bank.add(make("more"))


def test_damage_is_found_named_and_repaired(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.add(*(make(f"t{k}", k) for k in range(4)))
    with open(tmp_path / "hessian.f64", "r+b") as file:
        file.seek(56 + 8)
        file.write(b"\x01")
    with pytest.raises(BankError, match=r"task 't1' is damaged: hessian in row 1 does not fit its checksum"):
        bank["t1"]
    assert list(bank.verify()) == ["t1"]
    with pytest.raises(BankError, match="'t1'"):
        export(bank, tmp_path / "out", "numpy")
    assert not (tmp_path / "out").exists()
    assert "task 't1'" in Bank.repair(tmp_path)[0]
    assert bank.tasks == ["t0", "t2", "t3"]
    np.testing.assert_array_equal(bank.vectors()[1], make("", 2, meta={}).hessian)
    assert bank.claim("t1")
    bank.add(make("t1", 1))
    assert bank.tasks == ["t0", "t2", "t3", "t1"]
    assert bank.verify() == {}
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"t2"', b'"t7"')
    for copy in ("bank.copy.json", "manifest.copy.jsonl"):  # a bank of an older version
        (tmp_path / copy).unlink()
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(BankError, match=r"manifest\.jsonl, line 3: its checksum does not fit; .*repair"):
        Bank(tmp_path)
    assert Bank.repair(tmp_path) == ["line 3 of the manifest: its checksum does not fit"]
    assert bank.tasks == ["t0", "t3", "t1"]
    (tmp_path / "standard_error.f64").write_bytes(b"")
    assert set(Bank(tmp_path).verify()) == {"t0", "t3", "t1"}
    (tmp_path / "hessian.f64").write_bytes(b"")
    with pytest.raises(BankError, match="it was cut off"):
        Bank(tmp_path).vectors()


def test_a_bank_of_a_newer_version(tmp_path: Path) -> None:
    Bank(tmp_path).add(make("a"))
    shared = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**shared, "version": 2}))
    with pytest.raises(BankError, match="has version 2, this t2v-fast reads 1"):
        Bank(tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps({**shared, "fingerprint": {"probe": "q"}}))
    with pytest.raises(BankError, match="checksum"):
        Bank(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever one file holds, what reads back is what was written, or `repair` mends it from the other files."""
    folder = tmp_path_factory.mktemp("bank")
    bank = Bank(folder)
    bank.add(make("a"), make("b", 1, scale=np.arange(1.0, 8.0)))
    bank.fail("c", "why")
    bank.nearest("a")
    path = folder / data.draw(st.sampled_from(sorted({p.name for p in folder.iterdir()} - {"locks"})))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "replace", "checked"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(max_size=60))
    elif kind == "replace":
        content[:] = data.draw(st.binary(max_size=300))
    else:  # lines with a good checksum and any content
        records = st.fixed_dictionaries(
            {"task": JSON, "state": st.sampled_from(["done", "failed", "open"]) | JSON},
            optional=dict.fromkeys(("row", "examples", "sums", "meta", "scale", "error"), JSON),
        )
        line = encode_record(data.draw(records | JSON))
        path = folder / "manifest.jsonl"
        content = path.read_bytes() + line
    path.write_bytes(bytes(content))
    try:
        again = Bank(folder)
        again.vectors()
        for task, original in (("a", make("a")), ("b", make("b", 1, scale=np.arange(1.0, 8.0)))):
            if task in again:
                assert same(again[task], original)
        assert again.verify().keys() <= {*again.tasks, *(p.name for p in folder.iterdir())}
        again.nearest("a")
    except (BankError, KeyError):
        pass
    Bank.repair(folder)
    again = Bank(folder)
    assert again.verify() == {}
    if path.suffix != ".f64" and kind != "checked":
        assert again.tasks == ["a", "b"]
        assert again.failed == {"c": "why"}
    again.add(make("new", 3))
    assert same(again["new"], make("new", 3))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def full(tmp_path: Path) -> Bank:
    bank = Bank(tmp_path / "bank")
    bank.add(*(make(f"t/{k} %", k) for k in range(5)), make(".hidden", 9, standard_error=None))
    return bank


def test_numpy_export(full: Bank, tmp_path: Path) -> None:
    assert export(full, tmp_path / "out", "numpy") == 6
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "hessian.npy"), full.vectors())
    assert np.isnan(np.load(tmp_path / "out" / "standard_error.npy")[5]).all()
    header = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [t["task"] for t in header["tasks"]] == full.tasks
    assert header["fingerprint"] == {"probe": "p"}
    with pytest.raises(FileExistsError):
        export(full, tmp_path / "out", "numpy")
    with pytest.raises(ValueError, match="unknown form 'xml'"):
        export(full, tmp_path / "other", "xml")
    with pytest.raises(BankError, match="no finished task"):
        export(Bank(tmp_path / "empty"), tmp_path / "other", "numpy")


def test_parquet_export(full: Bank, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export(full, tmp_path / "out.parquet", "parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["task"].to_pylist() == full.tasks
    np.testing.assert_array_equal(np.array(table["hessian"].to_pylist()), full.vectors())
    assert table["standard_error"][5].as_py() is None
    assert json.loads(table.schema.metadata[b"fingerprint"]) == {"probe": "p"}


def test_pickle_export(full: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as the public code reads them, by a class of its form."""
    export(full, tmp_path / "out", "pickle")
    module = types.ModuleType("task2vec")

    class Public:
        def __init__(self, hessian, scale, meta=None):
            raise AssertionError("pickle makes objects without this")

    module.Embedding = Public
    monkeypatch.setitem(sys.modules, "task2vec", module)
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["%2Ehidden.p", *(f"t%2F{k} %25.p" for k in range(5))]
    full.add(make("ü" * 500), make("ü" * 501))
    assert export(full, tmp_path / "long", "pickle") == len(list((tmp_path / "long").iterdir())) == 8
    with open(files[1], "rb") as file:
        e = pickle.load(file)
    assert type(e) is Public
    np.testing.assert_array_equal(e.hessian, full["t/0 %"].hessian)
    np.testing.assert_array_equal(e.scale, np.ones(7))
    assert e.meta["task_name"] == e.meta["task"] == "t/0 %"


def clustered(tasks: int, length: int, seed: int = 0) -> np.ndarray:
    """Log-normal Fisher vectors around a few centres, of different scales, some filters dead."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 2, (40, length))
    axes = rng.normal(0, 1, (20, length))
    logs = centres[rng.integers(0, 40, tasks)] + rng.normal(0, 0.3, (tasks, 20)) @ axes + rng.normal(0, 3, (tasks, 1))
    vectors = np.exp(logs + rng.normal(0, 0.2, (tasks, length)))
    vectors[:, rng.random(length) < 0.02] = 0
    vectors[rng.random(vectors.shape) < 0.01] = 0
    return vectors


@pytest.mark.parametrize("metric", ["cosine", "plain_cosine"])
def test_neighbours_are_those_of_a_full_scan(metric: str) -> None:
    vectors = clustered(3000, 200)
    index, hits = Index(vectors[:2000], metric), 0
    index.extend(vectors)
    for query in range(0, 3000, 100):
        want = np.sort(distance.cdist(vectors[query : query + 1], vectors, metric)[0])[:10]
        rows, got = index.query(vectors, vectors[query], 10)
        np.testing.assert_allclose(
            got, distance.cdist(vectors[query : query + 1], vectors[rows], metric)[0], atol=1e-12
        )
        np.testing.assert_allclose(scan(vectors, vectors[query], 10, metric, chunk=700)[1], want, atol=1e-12)
        hits += np.isin(np.round(got, 12), np.round(want, 12)).sum()
    assert hits >= 0.99 * 300


def test_nearest_in_a_bank(tmp_path: Path) -> None:
    vectors = clustered(300, 7)
    bank = Bank(tmp_path)
    bank.add(*(make(str(k), hessian=v) for k, v in enumerate(vectors[:200])))
    want = [str(j) for j in np.argsort(distance.cdist(vectors[7:8], vectors[:200])[0])[1:4]]
    assert [t for t, _ in bank.nearest("7", 3, candidates=150)] == want
    assert [t for t, _ in bank.nearest("7", 3, exact=True)] == want
    assert bank.nearest(make("new", hessian=vectors[7]), 1, exact=True) == [("7", 0.0)]
    bank.add(*(make(str(k), hessian=v) for k, v in enumerate(vectors) if k >= 200))
    again = Bank(tmp_path)
    want = [str(j) for j in np.argsort(distance.cdist(vectors[7:8], vectors)[0])[1:4]]
    for b in (bank, again):
        assert [t for t, _ in b.nearest("7", 3, candidates=200)] == want
    (tmp_path / "index-cosine.npz").write_bytes(b"PK\x03\x04 damaged")
    assert [t for t, _ in Bank(tmp_path).nearest("7", 3, exact=False, candidates=200)] == want
    with pytest.raises(FingerprintMismatch):
        bank.nearest(make("x", fingerprint={}))
    with pytest.raises(ValueError, match="unknown metric"):
        bank.nearest("7", metric="best")
    assert Bank(tmp_path / "empty").nearest(make("x")) == []


def test_distances_say_that_they_take_a_list(full: Bank) -> None:
    assert distance.pdist(list(full)).shape == (6, 6)
    calls = [distance.pdist, distance.centred_distance, distance.layerwise_pdist, distance.to_frame]
    for call in (*calls, lambda bank: distance.cdist(list(bank), bank)):
        with pytest.raises(TypeError, match=r"lists? of Embedding, as list\(bank\)"):
            call(full)


def test_threads(tmp_path: Path) -> None:
    bank, names = Bank(tmp_path), [str(k) for k in range(30)]

    def work() -> None:
        for name in names:
            if bank.claim(name):
                bank.add(make(name, int(name)))
                bank.release(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(bank.tasks, key=int) == names
    assert bank.verify() == {}


def test_commands(full: Bank, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    full.fail("broken", "no such image")
    folder = str(full.folder)
    full.add(make("another"), make("one more"))

    def run(*arguments: str) -> tuple[int, str]:
        status = cli.main(["bank", *arguments])
        out = capsys.readouterr()
        return status, out.out + out.err

    assert "task 't1' is not in it" in run("rm", folder, "another", "t1")[1]
    assert "task 'broken' has failed: retry it" in run("rm", folder, "broken")[1]
    assert "no task to take out" in run("rm", folder, "--", "--")[1]
    assert run("rm", folder, "another", "one more", "another") == (0, "2 tasks taken out\n")
    assert run("ls", folder)[1].count("\n") == 7
    assert "6 tasks, 1 failed" in run("ls", folder)[1]
    assert "broken: no such image" in run("failed", folder)[1]
    assert "t/1 %" in run("nearest", folder, "t/0 %", "-k", "5")[1]
    assert run("export", folder, str(tmp_path / "o"), "--form", "numpy") == (0, f"6 tasks -> {tmp_path / 'o'}\n")
    assert run("verify", folder)[0] == 0
    assert "1 task" in run("retry", folder)[1]
    assert full.failed == {}
    with open(full.folder / "hessian.f64", "r+b") as file:
        file.write(b"x")
    status, text = run("verify", folder)
    assert status == 1
    assert "'t/0 %' is damaged" in text
    assert "'t/0 %' is damaged" in run("repair", folder)[1]
    assert run("verify", folder)[0] == 0
    (full.folder / "bank.json").unlink()
    status, text = run("verify", folder)
    assert (status, "bank.json is missing" in text, "1 problem in" in text) == (1, True, True)
    assert "restores" in run("ls", folder)[1]
    assert "repaired: " in run("repair", folder)[1]
    assert run("verify", folder) == (0, "all 5 tasks are whole\n")
    full.fail("broken", "no such \x1b[31mimage\n")
    assert run("failed", folder)[1] == "broken: no such \\x1b[31mimage\\x0a\n"
    assert run("ls", str(tmp_path / "nothing")) == (
        1,
        f"t2v-fast: error: {tmp_path / 'nothing'} is no bank: it has no manifest.jsonl\n",
    )
    assert Bank(tmp_path / "begun").claim("cats")
    for action in ("ls", "failed", "verify", "repair"):
        status, text = run(action, str(tmp_path / "begun"))
        assert (status, "begun has no task yet" in text, "run the same command again" in text) == (1, True, True)
