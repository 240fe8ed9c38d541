"""Embeddings: validation, files that survive, fingerprints."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from embeddings import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2v_fast.embedding import Embedding, FingerprintMismatch, check_comparable, escaped, stack


def test_round_trip(tmp_path: Path) -> None:
    e = make()
    e.save(tmp_path / "a.safetensors")
    back = Embedding.load(tmp_path / "a.safetensors")
    for name in ("hessian", "scale", "standard_error"):
        np.testing.assert_array_equal(getattr(back, name), getattr(e, name))
    for name in ("layers", "num_examples", "meta", "fingerprint", "fingerprint_id", "norm"):
        assert getattr(back, name) == getattr(e, name)
    without = make(standard_error=None)
    without.save(tmp_path / "a.safetensors")
    assert Embedding.load(tmp_path / "a.safetensors").standard_error is None


def test_a_fingerprint_survives_its_file(tmp_path: Path) -> None:
    e = make(fingerprint={"mean": (0.485, 0.456), "levels": {3: "x"}})
    e.save(tmp_path / "a")
    check_comparable([e, Embedding.load(tmp_path / "a")])
    assert e.fingerprint == {"mean": [0.485, 0.456], "levels": {"3": "x"}}


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_layers_and_repr() -> None:
    e = make()
    assert e.layer_names == ["stem.weight", "block.weight"]
    np.testing.assert_array_equal(e.layer("block.weight"), e.hessian[2:])
    with pytest.raises(KeyError, match=r"no layer 'x'; there are stem\.weight, block\.weight"):
        e.layer("x")
    assert "'a', 5 entries in 2 layers, 7 examples" in repr(e)
    assert len(e) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hessian": np.ones((5, 1))}, r"hessian has shape \(5, 1\)"),
        ({"scale": np.ones(4)}, r"scale has shape \(4,\), expected one axis of 5"),
        ({"hessian": np.array([1, 2, np.nan, 1, 1])}, r"hessian\[2\] is nan"),
        ({"standard_error": np.array([1, -2, 1, 1, 1])}, r"standard_error\[1\] is -2"),
        ({"layers": (("a", 0, 2), ("b", 3, 5))}, r"layer 'b' covers \[3, 5\), expected a start at 2"),
        ({"num_examples": 0}, "num_examples is 0, expected at least 1"),
        ({"meta": {"x": np.ones(2)}}, "meta must be JSON: .*ndarray"),
        ({"fingerprint": {"x": float("nan")}}, "fingerprint must be JSON"),
        ({"layers": (("a", 0, 4),)}, "the layers cover 4 entries, but the embedding has 5"),
    ],
)
def test_bad_embeddings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_the_old_file_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, where: str
) -> None:
    path = tmp_path / "a.safetensors"
    make("old").save(path)

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(type(failure)):
            make("new").save(path)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert Embedding.load(path).meta["task"] == "old"


def test_a_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    make("old").save(path)

    class FullDisk(io.FileIO):
        def write(self, data: bytes) -> int:
            super().write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", FullDisk)
        with pytest.raises(OSError, match="No space left"):
            make("new").save(path)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert Embedding.load(path).meta["task"] == "old"


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        Embedding.load(path)
    path.write_bytes(b"a pickle, perhaps")
    with pytest.raises(ValueError, match=r"x\.safetensors is no embedding: it is not a complete safetensors file"):
        Embedding.load(path)
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    with pytest.raises(ValueError, match="but no embedding"):
        Embedding.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Embedding.load(path)
    header = {"format": "t2v-fast embedding", "version": "2"}
    safetensors.numpy.save_file({"hessian": np.ones(3)}, path, metadata=header)
    with pytest.raises(ValueError, match="format version 2: upgrade"):
        Embedding.load(path)
    safetensors.numpy.save_file({"hessian": np.ones(3)}, path, metadata={**header, "version": "one"})
    with pytest.raises(ValueError, match=r"x\.safetensors is a damaged embedding: its format version is 'one'"):
        Embedding.load(path)
    safetensors.numpy.save_file({"hessian": np.ones(3)}, path, metadata={**header, "version": "1"})
    with pytest.raises(ValueError, match="damaged embedding"):
        Embedding.load(path)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """The file is refused, unless the bit is in the name of the checksum: then everything it covers is whole."""
    path, e = tmp_path / "a.safetensors", make()
    e.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        try:
            back = Embedding.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (not every bit matters)
            continue
        for name in ("hessian", "scale", "standard_error"):
            np.testing.assert_array_equal(getattr(back, name), getattr(e, name))
        assert (back.layers, back.meta, back.fingerprint) == (e.layers, e.meta, e.fingerprint)
    content = bytearray(whole)
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged embedding: it does not fit its checksum"):
        Embedding.load(path)


def test_a_file_without_a_checksum(tmp_path: Path) -> None:
    """As versions before the checksum wrote it."""
    path, e = tmp_path / "a.safetensors", make()
    e.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        header, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header.pop("checksum")
    safetensors.numpy.save_file(arrays, path, metadata=header)
    np.testing.assert_array_equal(Embedding.load(path).hessian, e.hessian)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path} is no regular file"):
            Embedding.load(path)
    make().save(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert Embedding.load(tmp_path / "link").meta["task"] == "a"


def test_names_that_would_act_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for name, shown in (
        ("\x1b[31mR", r"\x1b[31mR"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("a\nb\x9b\x7f", r"a\x0ab\x9b\x7f"),
        ("\udcff", r"\udcff"),
    ):
        make(meta={"task": name, "family": name}).save(path)
        with pytest.warns(UserWarning, match="has control characters"):
            back = Embedding.load(path)
        assert back.meta == {"task": shown, "family": shown}
    for name in ("ünïcode 日本語", "a & <b>", "\u200d\u200c", "C:\\x"):
        make(meta={"task": name}).save(path)
        assert Embedding.load(path).meta["task"] == name == escaped(name)
    make(meta={"task": "x" * 1001}).save(path)
    with pytest.raises(ValueError, match="its task has 1001 characters, expected at most 1000"):
        Embedding.load(path)


def test_only_comparable_embeddings_are_stacked() -> None:
    a, b = make("a", 0), make("b", 1)
    assert stack([a, b]).shape == (2, 5)
    check_comparable([])
    other = make("c", fingerprint={"probe": "q", "preprocessing": {"crop": 224}})
    with pytest.raises(FingerprintMismatch, match=r"0 \('a'\) and 2 \('c'\).*probe \('p' against 'q'\)"):
        stack([a, b, other])
    with pytest.raises(FingerprintMismatch, match="the layers"):
        stack([a, make(layers=(("stem.weight", 0, 5),))])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARRAYS = st.sampled_from(
    [np.ones(5), np.ones((5, 1)), np.ones(4), np.full(5, np.nan), np.ones(5, np.int8), np.ones(0), np.ones(5, np.bool_)]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files(tmp_path: Path, data: st.DataObject) -> None:
    """A file is either an embedding or a ValueError that names it."""
    path = tmp_path / "a.safetensors"
    make().save(path)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "replace", "header"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(max_size=40))
    elif kind == "replace":
        content[:] = data.draw(st.binary(max_size=200))
    else:  # a whole safetensors file with anything in it
        text = st.text(max_size=8) | JSON.map(json.dumps) | st.just("[" * 100_000)
        good = {"layers": '[["a",0,5]]', "num_examples": "3", "meta": "{}", "fingerprint": "{}", "version": "1"}
        header = good | data.draw(st.dictionaries(st.sampled_from(list(good)), text, max_size=2))
        names = st.sampled_from(["hessian", "scale", "standard_error", "other"])
        arrays = {"hessian": np.ones(5), "scale": np.ones(5)} | data.draw(st.dictionaries(names, ARRAYS, max_size=2))
        header["format"] = "t2v-fast embedding"
        content = safetensors.numpy.save(arrays, metadata=header)
    path.write_bytes(bytes(content))
    try:
        e = Embedding.load(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (some files are whole)
        return
    assert np.isfinite(e.hessian).all()
    assert e.layers[-1][2] == len(e)
    assert isinstance(e.meta, dict)
    repr(e)


def test_in_a_notebook_and_as_an_array() -> None:
    e = Embedding(np.array([3.0, 4.0]), np.ones(2), [("a", 0, 2)], 10, meta={"task": "<b>\x1b", "classes": ["x", "y"]})
    page = e._repr_html_()
    assert "<th>task</th><td>&lt;b&gt;\\x1b</td>" in page
    assert "<th>norm</th><td>5</td>" in page
    array = e.to_numpy()
    array[0] = 0
    assert e.hessian[0] == 3
