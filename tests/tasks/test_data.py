"""Data sets of every kind, and the errors for bad ones."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from small import PREPROCESSING, shapes, write_folder
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from t2v_fast.tasks.data import DataError, TaskData, balanced_weights, open_image


def collect(data: TaskData, **options) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(data.batches(PREPROCESSING, 5, **options))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


class Stream(IterableDataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.items = list(zip(images, labels.tolist(), strict=True))

    def __iter__(self):
        return iter(self.items)


class Mapped(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int):
        return self.images[k], torch.tensor(self.labels[k]), "a name"


def test_every_kind_of_data_gives_the_same_batches(tmp_path: Path) -> None:
    images, labels = shapes()
    order = np.argsort(labels, kind="stable")  # as a folder lists them
    images, labels = images[order], labels[order]
    want_x = torch.stack([PREPROCESSING(image) for image in images])
    folder = write_folder(tmp_path / "task", images, labels)
    (folder / "class 0" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    kinds = [
        (images, labels),
        (images, labels.tolist()),
        (torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)),
        folder,
        str(folder),
        Mapped(images, labels),
        Stream(images, labels),
        list(zip(images, labels.tolist(), strict=True)),
        TensorDataset(want_x, torch.from_numpy(labels)),
    ]
    for kind in kinds:
        data = TaskData.of(kind)
        for _ in range(2):
            x, y = collect(data)
            torch.testing.assert_close(x, want_x)
            assert torch.equal(y, torch.from_numpy(labels)), type(kind)
    x, y = collect(TaskData.of(folder), num_workers=2)
    torch.testing.assert_close(x, want_x)
    assert TaskData.of(folder).name == "task"
    assert TaskData.of(folder).classes == ["class 0", "class 1", "class 2"]


def test_labels_become_codes() -> None:
    data = TaskData.of(shapes())
    codes, classes = data.encode_labels(torch.tensor([7, 3, 7, 100]))
    assert codes.tolist() == [0, 1, 0, 2]  # in the order in which they occur
    assert classes == [7, 3, 100]


def test_balanced_weights() -> None:
    w = balanced_weights(torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(w, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2], dtype=torch.float64))


def test_multilabel() -> None:
    images, _ = shapes(4)
    labels = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])
    data = TaskData.of((images, labels), task_type="multilabel")
    _, y = collect(data)
    assert y.dtype == torch.float32
    assert data.encode_labels(y)[1] == [0, 1]
    with pytest.raises(DataError, match="label 1 is the same for every image"):
        data.encode_labels(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    with pytest.raises(DataError, match=r"image 0 has label .*, expected a vector of 0 and 1"):
        collect(TaskData.of((images, labels * 2), task_type="multilabel"))
    with pytest.raises(DataError, match="image 2 has 3 labels but image 0 has 2"):
        collect(TaskData.of((images, [[0, 1], [1, 1], [0, 0, 1], [1, 0]]), task_type="multilabel"))
    with pytest.raises(ValueError, match="unknown task_type 'regression'"):
        TaskData.of((images, labels), task_type="regression")


def changed(k: int, value) -> tuple[list, np.ndarray]:
    images, labels = shapes()
    items = [PREPROCESSING(image) for image in images]
    items[k] = value
    return items, labels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((0, 4, 4), np.uint8), np.zeros(0, int)), "task 't' has no image"),
        ((shapes()[0], shapes()[1][:5]), "24 images but 5 labels"),
        ((shapes()[0], shapes()[1] + 0.5), r"image 0 has label .*0\.5.*, expected one integer"),
        ((shapes()[0], shapes()[1] - 1), "image 0 has label -1, expected at least 0"),
        ((shapes()[0].astype(np.int32), shapes()[1]), "image 0: no image: got ndarray .14, 16, 3. int32"),
        ((shapes()[0][..., :2], shapes()[1]), r"no image: got ndarray \[14, 16, 2\] uint8"),
        (list(zip(*changed(3, torch.full((3, 12, 12), float("nan"))), strict=True)), "image 3 has NaN or infinite"),
        (list(zip(*changed(2, torch.zeros(3, 9, 12)), strict=True)), r"image 2 is \[3, 9, 12\] .* but image 0 is"),
        ([(torch.zeros(3, 8 + k // 5, 8), k % 2) for k in range(8)], r"image 5 is \[3, 9, 8\] .* but image 0 is"),
        ([(torch.zeros(3, 4, 4), None)], "image 0 has label None, expected one integer"),
        ([(torch.zeros(3, 4, 4), "cat")], "image 0 has label 'cat', expected one integer"),
        ((shapes()[0], np.array(3)), r"images are \[24, 14, 16, 3\] and labels ndarray, expected"),
        (DataLoader([(torch.zeros(3, 4, 4), 0)]), "a DataLoader makes batches of its own: pass its data set"),
        ([torch.zeros(3, 4, 4)], "image 0 is Tensor, expected"),
        (iter([]), "can be visited only once"),
        (3, "int is no data set"),
    ],
)
def test_bad_data_is_named(data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        collect(TaskData.of(data, name="t"))


def test_one_class() -> None:
    images, labels = shapes()
    data = TaskData.of((images, labels * 0 + 4))
    with pytest.raises(DataError, match=r"one class only \(4\)"):
        data.encode_labels(collect(data)[1])


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        TaskData.of(tmp_path / "missing")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no image"):
        TaskData.of(tmp_path / "empty")
    folder = write_folder(tmp_path / "task", *shapes())
    good = (folder / "class 1" / "001.png").read_bytes()
    (folder / "class 1" / "001.png").write_bytes(good[: len(good) // 2])
    (folder / "class 2" / "002.png").write_bytes(b"no picture")
    for workers in (0, 1):  # a worker's traceback must not bury the file's name
        with pytest.raises(DataError, match=r"^task 'task': .*class 1/001\.png cannot be read: .*truncated"):
            collect(TaskData.of(folder), num_workers=workers)
    data = TaskData.of(folder, skip_unreadable=True)
    _, y = collect(data)
    assert len(y) == 22
    assert [Path(s).name for s in data.skipped] == ["001.png", "002.png"]


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = write_folder(tmp_path / "task", *shapes())
    first = folder / "class 0" / "000.png"
    for hidden in ("._000.png", ".trash/000.png"):  # as macOS leaves them, and what a file manager keeps
        (folder / "class 0" / hidden).parent.mkdir(exist_ok=True)
        (folder / "class 0" / hidden).write_bytes(b"no picture")
    (folder / "class 0" / "notes.txt").write_text("not an image")
    (folder / "._1.png").write_bytes(b"no picture")
    Image.open(first).save(folder / "class 0" / "24.JFIF", "JPEG")
    data = TaskData.of(folder)
    assert not recwarn
    assert data.left_out == []
    assert len(collect(data)[1]) == 25
    (folder / "class 3").mkdir()
    (folder / "class 4").mkdir()
    (folder / "class 4" / "1.heic").write_bytes(b"a picture")
    (folder / "class 1" / "2.AVIF").write_bytes(b"a picture")
    for k in range(7):
        (folder / f"{k}.png").write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match=r"task 'task': .*left out class .*\(expected .*\.jpg") as found:
        data = TaskData.of(folder)
    assert len(found) == 1
    assert data.left_out == [
        "class folders without an image (2): class 3 (empty), class 4 (.heic)",
        "images outside of a class folder (7): 0.png, 1.png, 2.png, 3.png, 4.png and 2 more",
        "images with another suffix (1): class 1/2.AVIF",
    ]
    assert len(collect(data)[1]) == 25
    for name in ("class 0", "class 1", "class 2"):
        shutil.rmtree(folder / name)
    with pytest.raises(DataError, match=r"holds no image: expected .*; found class folders .*; images outside"):
        TaskData.of(folder)


def test_links_and_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to an image is an image, and a class may be a link to a folder. Other links are named."""
    folder = write_folder(tmp_path / "task", *shapes())
    (tmp_path / "elsewhere").mkdir()
    (folder / "class 0" / "000.png").rename(tmp_path / "elsewhere" / "000.png")
    (folder / "class 0" / "000.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (folder / "class 1").rename(tmp_path / "class 1")
    (folder / "class 1").symlink_to(tmp_path / "class 1")
    assert len(collect(TaskData.of(folder))[1]) == 24
    (folder / "class 0" / "gone.png").symlink_to(tmp_path / "gone.png")
    (folder / "class 0" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "class 3").mkdir()
    (folder / "class 3" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match="links to folders or to nothing"):
        data = TaskData.of(folder)
    assert data.left_out == [
        "class folders without an image (1): class 3 (links only)",
        "links to folders or to nothing (3): class 0/gone.png, class 0/more, class 3/gone.png",
    ]
    assert len(collect(data)[1]) == 24
    real = os.scandir

    def refuse(path: str | Path) -> Iterator[os.DirEntry]:
        if Path(path).name == "class 2":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="class 2"):
        TaskData.of(folder)


def test_a_second_pass_must_be_like_the_first() -> None:
    images, labels = shapes()

    class Shuffled(Mapped):
        def __getitem__(self, k: int):
            return self.images[k], int(np.random.default_rng(next(turns)).integers(3))

    turns = iter(range(1000))
    data = TaskData.of(Shuffled(images, labels))
    collect(data)
    with pytest.raises(DataError, match="the first pass gave 24 images, the second has other labels from image 0 on"):
        next(data.batches(PREPROCESSING, 5))  # before a batch of it is used


@pytest.mark.parametrize(("change", "message"), [(10, "the second has more"), (-10, "the second has 14")])
def test_a_second_pass_must_be_as_long_as_the_first(change: int, message: str) -> None:
    items = list(zip(*shapes(), strict=True))

    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(items if self.passes == 1 else (items + items)[: len(items) + change])

    data = TaskData.of(Changing())
    collect(data)
    with pytest.raises(DataError, match=f"the first pass gave 24 images, {message}"):
        collect(data)


def test_reading_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    collect(TaskData.of(shapes()))
    assert torch.equal(state, torch.get_rng_state())


def test_sources_travel_to_spawned_workers(tmp_path: Path) -> None:
    for data in (shapes(), write_folder(tmp_path / "task", *shapes())):
        assert pickle.loads(pickle.dumps(TaskData.of(data).describe))(0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_are_turned_as_exif_says(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # wide, and white on the left
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif, quality=100)
    Image.fromarray(pixels).save(tmp_path / f"plain.{suffix}", quality=100)
    turned, plain = (np.asarray(open_image(tmp_path / f"{name}.{suffix}")) for name in ("turned", "plain"))
    assert plain.shape == (16, 32, 3)
    assert turned.shape == (32, 16, 3)
    assert turned[:15].min() > 200
    assert turned[17:].max() < 50


def test_damaged_exif_data_do_no_harm(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_image(tmp_path / "a.jpg").size == (8, 4)
