"""Job files: every kind of task, errors that name file, task and key, paths that stay inside."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jobs import png, write_job, write_table
from PIL import Image
from small import shapes, small_probe, write_folder

from t2v_fast import DataError, Task2Vec
from t2v_fast.bank.job import JobError, load_job


def write_shards(root: Path, images: np.ndarray, labels: np.ndarray, shards: int = 2) -> None:
    for s in range(shards):
        with tarfile.open(root / f"part-{s}.tar", "w") as tar:
            for k in range(s, len(images), shards):
                for suffix, data in (("png", png(images[k])), ("cls", str(labels[k]).encode())):
                    info = tarfile.TarInfo(f"../x/{k:04}.{suffix}")  # a name that would lead outside if it were used
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    images, labels = shapes(12)
    for name in ("many/one", "many/two", "flowers"):
        write_folder(tmp_path / name, images, labels)
    write_table(tmp_path, images, {"kind": [f"k{v}" for v in labels], "wing": [*"01" * 6], "beak": [*"0011" * 3]})
    write_shards(tmp_path, images, labels)
    return tmp_path


def test_every_kind(root: Path) -> None:
    images, labels = shapes(12)
    content = {
        "tasks": [
            {"folder": "flowers"},
            {"folders": "many"},
            {"name": "birds", "csv": "table.csv", "label": "kind"},
            {"name": "cub", "table": "table.csv"},
            {"name": "web", "shards": "part-*.tar"},
        ],
    }
    job = load_job(write_job(root / "job.yaml", content))
    assert job.tasks == ["flowers", "one", "two", "birds", "cub/kind", "cub/wing", "cub/beak", "web"]
    assert [len(w.tasks) for w in job.work] == [1, 1, 1, 1, 3, 1]
    task2vec = Task2Vec(small_probe(), estimator="exact")
    want = task2vec.embed((images, labels)).hessian
    for work in job.work:
        for task in work.tasks:
            if task in ("cub/wing", "cub/beak"):
                continue
            data = work.data(task)
            embedding = task2vec.embed(data)
            assert embedding.meta["task"] == task
            np.testing.assert_allclose(embedding.hessian, want, rtol=1e-3)
    assert job.work[3].data("birds").classes == ["k0", "k1", "k2"]
    assert job.work[5].data("web").describe(0).startswith("../x/0000 in ")


def test_probe_and_settings(root: Path) -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    content = {
        "probe": {"name": "torchvision/resnet18", "weights": "none", "size": 32},
        "settings": {"samples": 1, "seed": 3, "dtype": "float64"},
        "tasks": [{"folder": "flowers"}],
    }
    job = load_job(write_job(root / "job.yaml", content))
    with pytest.warns(UserWarning, match="random weights"):
        pipeline = job.task2vec()
    assert (pipeline.samples, pipeline.seed, pipeline.probe.preprocessing.crop) == (1, 3, 32)
    assert next(pipeline.probe.network.parameters()).dtype == torch.float64


def test_random_weights_are_the_same_at_every_start(root: Path) -> None:
    """Or a job could not be resumed, nor have two workers."""
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")

    def fingerprint(seed: int) -> str:
        content = {
            "probe": {"name": "torchvision/shufflenet_v2_x0_5", "weights": "none", "size": 32},
            "settings": {"seed": seed},
            "tasks": [{"folder": "flowers"}],
        }
        job = load_job(write_job(root / "job.yaml", content))
        before = torch.random.get_rng_state()
        with pytest.warns(UserWarning, match="random weights"):
            weights = job.task2vec().fingerprint()["weights"]
        assert torch.equal(before, torch.random.get_rng_state())
        return weights

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


def test_saved_datasets(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, labels = shapes(12)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(root / "saved"))
    job = load_job(write_job(root / "job.yaml", {"tasks": [{"name": "s", "dataset": "saved"}]}))
    data = job.work[0].data("s")
    assert data.classes == ["a", "b", "c"]
    task2vec = Task2Vec(small_probe(), estimator="exact")
    want = task2vec.embed((images, labels)).hessian
    np.testing.assert_allclose(task2vec.embed(data).hessian, want, rtol=1e-3)
    job = load_job(write_job(root / "job.yaml", {"tasks": [{"name": "s", "dataset": "saved", "label": "x"}]}))
    with pytest.raises(DataError, match=r"task 's': .*saved has no column 'x'; it has image, label"):
        job.work[0].data("s")
    job = load_job(write_job(root / "job.yaml", {"tasks": [{"name": "s", "dataset": "many"}]}))
    with pytest.raises(DataError, match=r"task 's': .*many is no data set"):
        job.work[0].data("s")


def test_toml_and_multilabel(root: Path) -> None:
    text = """
        probe = "efficientnet-lite0"
        [settings]
        task_type = "multilabel"
        [[tasks]]
        name = "both"
        csv = "table.csv"
        labels = ["wing", "beak"]
    """
    job = load_job(write_job(root / "job.toml", text))
    data = job.work[0].data("both")
    assert data.classes == ["wing", "beak"]
    assert Task2Vec(small_probe(), task_type="multilabel").embed(data).meta["classes"] == ["wing", "beak"]


def test_empty_cells_leave_rows_out(root: Path) -> None:
    images, labels = shapes(12)
    cells = [f"k{v}" for v in labels]
    write_table(root, images, {"kind": [*cells[:9], "", "", ""], "other": cells}, "holes.csv")
    job = load_job(write_job(root / "job.yaml", {"tasks": [{"name": "h", "table": "holes.csv"}]}))
    assert len(job.work[0].data("h/kind").source) == 9
    assert len(job.work[0].data("h/other").source) == 12


TASK = {"folder": "flowers"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [", "is no YAML: while parsing"),
        ("a: 1\na: 2\n", "is no YAML: .*a key stands twice"),
        ("[" * 5000, "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML: could not determine a constructor"),
        ("2001-99-99", "is no YAML"),
        ([], "got list, expected a mapping with probe, settings, tasks"),
        ({"tasks": []}, "tasks: got list, expected a list of at least one task"),
        ({"task": [TASK]}, "unknown key 'task': did you mean 'tasks'"),
        (
            {"skip_unreadable": True, "tasks": [TASK]},
            "'skip_unreadable': it is a key of settings, as in `settings: {skip",
        ),
        ({"tasks": [{"samples": 2, **TASK}]}, "task 1: unknown key 'samples': it is a key of settings"),
        ({"settings": {"zzz": 1}, "tasks": [TASK]}, "settings: unknown key 'zzz': expected one of .*skip_unreadable"),
        ({"tasks": [TASK, "x"]}, "task 2: got 'x', expected a mapping with one of the keys folder, "),
        ({"tasks": [{"name": "n", "folder": "flowers", "lable": "x"}]}, r"task 1 \('n'\): unknown key 'lable'"),
        ({"tasks": [{"name": "n"}]}, r"task 1 \('n'\): has none of the keys"),
        ({"tasks": [{"folder": "a", "csv": "b"}]}, "task 1: has folder and csv of the keys"),
        ({"tasks": [{"folder": 3}]}, "task 1: folder: got 3, expected text"),
        ({"tasks": [{"folder": "none"}]}, "task 1: folder: there is no folder 'none'"),
        ({"tasks": [TASK, TASK]}, r"task 2 \('flowers'\): name: task 1 is called so too"),
        ({"tasks": [{"csv": "table.csv", "label": "kind"}]}, "task 1: name: is missing"),
        ({"tasks": [{"name": "a\nb", **TASK}]}, "name: a task's name is"),
        ({"tasks": [{"name": "n", "csv": "table.csv"}]}, "expected either label .* or labels"),
        (
            {"tasks": [{"name": "n", "csv": "table.csv", "labels": ["wing"]}]},
            "expected task_type: multilabel in settings",
        ),
        ({"settings": {"task_type": "multilabel"}, "tasks": [TASK]}, "expected csv with labels"),
        (
            {"tasks": [{"name": "n", "table": "table.csv", "labels": ["tail"]}]},
            "has no column 'tail'; it has path, kind",
        ),
        ({"tasks": [{"name": "n", "table": "table.csv", "labels": ["wing", "wing"]}]}, "one name stands twice"),
        ({"tasks": [{"name": "n", "shards": "none-*.tar"}]}, "shards: no file is called 'none-\\*.tar'"),
        ({"settings": {"samples": "2"}, "tasks": [TASK]}, "settings: samples: got '2', expected a whole number"),
        ({"settings": {"samples": True}, "tasks": [TASK]}, "settings: samples: got True, expected a whole number"),
        ({"settings": {"samples": 0}, "tasks": [TASK]}, "settings: samples: got 0, expected at least 1"),
        (
            {"settings": {"estimator": "best"}, "tasks": [TASK]},
            "settings: estimator: got 'best', expected one of exact",
        ),
        ({"probe": {"nam": "x"}, "tasks": [TASK]}, "probe: unknown key 'nam': did you mean 'name'"),
        ({"tasks": [{"folder": "../elsewhere"}]}, "task 1: folder: '../elsewhere' leads out of .*--allow-outside"),
        ({"tasks": [{"folder": "/etc"}]}, "task 1: folder: '/etc' leads out of"),
        ({"tasks": [{"folder": "link"}]}, "task 1: folder: 'link' leads out of"),
        ({"tasks": [{"folders": "links"}]}, "task 1: folders: .* leads out of"),
        ({"tasks": [{"name": "n", "shards": "../*.tar"}]}, "task 1 .*shards: '..' leads out of"),
        ({"tasks": [{"folder": "a\0b"}]}, "task 1: folder: .* is no path"),
        ({"tasks": [{"name": "n", "table": "outside.csv"}]}, r"outside\.csv: '/etc/passwd' leads out of"),
        ({"probe": {"name": "x", "weights": "../w.pt"}, "tasks": [TASK]}, "probe: weights: '../w.pt' leads out of"),
    ],
)
def test_errors(root: Path, content: object, message: str) -> None:
    (root / "link").symlink_to("/etc")
    (root / "links").mkdir()
    (root / "links" / "x").symlink_to("/etc")
    (root / "outside.csv").write_text("path,kind\n/etc/passwd,1\n")
    with pytest.raises(JobError, match=message) as caught:
        load_job(write_job(root / "job.yaml", content))
    assert str(root / "job.yaml") in str(caught.value)


def test_paths_may_lead_outside_if_allowed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("jobs")
    path = write_job(elsewhere / "job.yaml", {"tasks": [{"folder": str(root / "flowers")}]})
    with pytest.raises(JobError, match="leads out of"):
        load_job(path)
    assert load_job(path, allow_outside=True).tasks == ["flowers"]
    assert load_job(path, root=root).tasks == ["flowers"]
    with pytest.raises(JobError, match="cannot be read: No such file"):
        load_job(elsewhere / "none.yaml")


def test_unusable_tables_and_shards(root: Path) -> None:
    def fails(entry: dict, message: str) -> None:
        job = load_job(write_job(root / "job.yaml", {"tasks": [{"name": "n", **entry}]}))
        with pytest.raises(DataError, match=f"task 'n': {message}"):
            job.work[0].data("n")

    for text, message in (
        ("path,kind\na.png\n", r".*bad\.csv, line 2 has 1 cells, expected 2"),
        ("path,path\na,b\n", r".*bad\.csv names a column twice"),
        ("", r".*bad\.csv has no column 'path'; it has no header"),
        ("path,kind\n", r".*bad\.csv has no row"),
        ("path,kind\n../../x.png,1\n", r".*bad\.csv: '\.\./\.\./x\.png' leads out of"),
        ('path,kind\n"a,1\n', r".*bad\.csv cannot be read"),
        ("path,kind\na.png,\n", "column 'kind' is empty"),
    ):
        (root / "bad.csv").write_text(text)
        fails({"csv": "bad.csv", "label": "kind"}, message)
    (root / "bad.tar").write_bytes(b"no archive" * 100)
    fails({"shards": "bad.tar"}, r".*bad\.tar is no tar archive")
    with tarfile.open(root / "odd.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        tar.addfile(info, io.BytesIO())
    fails({"shards": "odd.tar"}, r"example '/0' of .*odd\.tar has no file \.cls")
    with tarfile.open(root / "odd.tar", "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    fails({"shards": "odd.tar"}, r".*odd\.tar hold no example")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("name", "folder", "folders", "csv", "table", "dataset", "shards", "path", "label", "labels", "image")
VALUES = st.sampled_from(["flowers", "many", "table.csv", "part-0.tar", "*", "..", "kind", ["wing"], "path"]) | JSON
JOBS = st.fixed_dictionaries(
    {"tasks": st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | JSON, max_size=3) | JSON},
    optional={"probe": JSON, "settings": st.dictionaries(st.sampled_from(["samples", "seed", "head"]), JSON) | JSON},
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=JOBS.map(lambda job: yaml.dump(job).encode())
    | JSON.map(lambda j: repr(j).encode())
    | st.binary(max_size=80)
)
@example(b"&a [*a]")
@example(b"? {a: b}\n: 1")
@example(b"tasks: &a [*a]")
@example(b"<<: 3")
@example(b"!!binary x")
@example(b"1__0:\n0x_:\n")
def test_fuzzed_jobs(root: Path, content: bytes) -> None:
    """A job file is either a job or a JobError."""
    for name in ("job.yaml", "job.toml"):
        (root / name).write_bytes(content)
        try:
            job = load_job(root / name)
        except JobError as error:
            assert str(root / name) in str(error)  # noqa: PT017 (not every file fails)
            continue
        for work in job.work:
            assert all(path.is_relative_to(root.resolve()) for path in work.paths)
            for task in work.tasks:
                try:
                    work.data(task)
                except (DataError, ImportError) as error:
                    assert task in str(error) or "is no folder" in str(error) or "no image" in str(error)  # noqa: PT017
