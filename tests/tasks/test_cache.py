"""The cache of decoded images: the same results, within its budget, shared with loaders."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import shapes, small_probe, write_folder

from t2v_fast import Task2Vec
from t2v_fast.tasks import data
from t2v_fast.tasks.cache import ImageCache


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_kept_comes_back(tmp_path: Path, on_disk: bool) -> None:
    cache = ImageCache(4, 10_000, tmp_path if on_disk else None)
    small, large, prepared = image(0, 3, 5, 7), image(1, 3, 40, 30), torch.randn(3, 6, 6)
    cache.put(2, small, prepared, torch.tensor(1 << 40))
    cache.put(0, large, prepared, torch.tensor([0.0, 1.0, 1.0]))
    cache.put(2, large, prepared, torch.tensor(3))  # there already
    assert cache.get(1) is None
    pixels, label = cache.get(2)
    assert torch.equal(pixels, small)
    assert (label.shape, label.dtype, int(label)) == ((), torch.int64, 1 << 40)
    floats, label = cache.get(0)
    assert torch.equal(floats, prepared)  # the smaller of the two
    assert torch.equal(label, torch.tensor([0.0, 1.0, 1.0]))
    assert cache.used == 112 + 8 + 432 + 16
    cache.put(1, image(2, 3, 57, 57), torch.randn(3, 60, 60), torch.tensor(0))  # 9747 bytes: no room
    assert cache.get(1) is None
    assert list(tmp_path.iterdir()) == []
    assert pickle.loads(pickle.dumps(cache)) is None


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="budget is 0 bytes"):
        ImageCache(1, 0)
    with pytest.raises(ValueError, match="cache_megabytes is -1"):
        Task2Vec(small_probe(), cache_megabytes=-1)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ImageCache(1, 1000, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("large", [False, True])
def test_files_are_decoded_once_and_results_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, large: bool
) -> None:
    images, labels = shapes(12)
    if large:  # then the prepared form is the smaller
        images = np.stack([np.array(Image.fromarray(i).resize((80, 70))) for i in images])
    folder = write_folder(tmp_path / "task", images, labels)
    reads = tmp_path / "reads"
    real = data.open_image
    two_passes = {"activation_megabytes": 0}
    want = {
        megabytes: Task2Vec(small_probe(), cache_megabytes=0, batch_size=5, activation_megabytes=megabytes).embed(
            folder
        )
        for megabytes in (0, 1024)
    }

    def counted(path):
        with open(reads, "ab") as file:
            file.write(b".")
        return real(path)

    monkeypatch.setattr(data, "open_image", counted)
    for options, count in (
        (two_passes, 12),
        (two_passes | {"cache_folder": str(tmp_path)}, 12),
        (two_passes | {"cache_megabytes": 0}, 24),
        ({"cache_megabytes": 0}, 12),
    ):
        reads.write_bytes(b"")
        task = data.TaskData.of(folder)
        got = Task2Vec(small_probe(), batch_size=5, num_workers=workers, **options).embed(task)
        assert len(reads.read_bytes()) == count
        same = want[options.get("activation_megabytes", 1024)]
        np.testing.assert_array_equal(got.hessian, same.hessian)
        assert 0 < got.meta["seconds_waiting_for_data"] < sum(got.meta["seconds"].values())
        assert task.cache is None


def test_unreadable_files_are_skipped_in_both_passes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "task", *shapes())
    (folder / "class 2" / "002.png").write_bytes(b"no picture")
    e = Task2Vec(small_probe()).embed(folder, skip_unreadable=True)
    assert e.num_examples == 23
