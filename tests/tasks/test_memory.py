"""A pipeline keeps its memory from task to task, and gives it back."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
from small import shapes, small_probe

from t2v_fast import Task2Vec, ops
from t2v_fast.gradients import fast_forward
from t2v_fast.tasks.memory import keep_memory_of, release_memory_of


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the allocator was told."""
    gc.collect()
    assert not fast_forward._contexts
    if fast_forward._release is not None:  # memory of an earlier test, which is kept for some seconds
        fast_forward._release.cancel()
        fast_forward._release, fast_forward._looks_at = None, math.inf
    fast_forward._keep(False)
    found: list[bool] = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in list(fast_forward.os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(ops, "keep_freed_memory", lambda keep: found.append(keep))
    return found


def test_memory_stays_until_the_pipeline_is_deleted(told: list[bool]) -> None:
    task2vec = Task2Vec(small_probe())
    for seed in range(2):
        task2vec.embed(shapes(seed=seed))
    other = pickle.loads(pickle.dumps(copy.deepcopy(task2vec)))
    assert told == [True]
    other.embed(shapes())
    del other
    gc.collect()
    assert told == [True]
    del task2vec
    gc.collect()
    assert told == [True, False]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError, "no memory"),
        # as the compiled CUDA ops raise it
        (RuntimeError, "aten::new_empty failed: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_memory_goes_back_before_a_task_is_tried_again(
    error: type[Exception], words: str, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    task2vec = Task2Vec(small_probe(), batch_size=8)
    own, sizes = Task2Vec.compute_features, []

    def scarce(self, run) -> None:
        sizes.append(self.batch_size)
        if self.batch_size > 4:
            raise error(words)
        own(self, run)

    monkeypatch.setattr(Task2Vec, "compute_features", scarce)
    with pytest.warns(UserWarning, match="out of memory with batches of 8 images"):
        task2vec.embed(shapes())
    assert sizes == [8, 4]
    assert told == [True, False, True]


def test_an_owner_keeps_memory_once(told: list[bool]) -> None:
    class Owner:
        pass

    owner = Owner()
    release_memory_of(owner)
    for _ in range(2):
        keep_memory_of(owner)
        release_memory_of(owner)
        keep_memory_of(owner)
        keep_memory_of(owner)
        release_memory_of(owner)
    assert told == [True, False] * 4


def test_a_pipeline_that_is_collected_while_a_context_begins_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of garbage may begin anywhere, also in a thread that changes the number of contexts."""
    lock = fast_forward._lock

    class Collecting:
        def __enter__(self) -> None:
            assert lock.acquire(timeout=5), "waits for itself"
            gc.collect()

        def __exit__(self, *error: object) -> None:
            lock.release()

    class Owner:
        pass

    def leave_garbage() -> None:
        owner = Owner()
        owner.itself = owner
        keep_memory_of(owner)

    gc.collect()
    before = fast_forward._contexts
    gc.disable()
    try:
        leave_garbage()
        with monkeypatch.context() as changed:
            changed.setattr(fast_forward, "_lock", Collecting())
            with fast_forward.kept_memory():
                assert fast_forward._contexts == before + 1
                leave_garbage()
    finally:
        gc.enable()
    assert fast_forward._contexts == before
