# ruff: noqa: NPY002 (the global generator is the one that networks draw from)
"""What a network draws shows in the states of the generators."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from t2v_fast.gradients.random_state import drawn, random_state

DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(1),
    "random": random.random,
    "random, a normal number": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, all words": lambda: np.random.rand(312),  # of 624 words, after which the position is the same
    "numpy, a small number": lambda: np.random.randint(0, 9, dtype=np.uint8),
    "numpy, a normal number": np.random.randn,
}


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    generator = np.random.get_bit_generator()
    before = np.random.get_state(), random.getstate()
    yield
    np.random.set_bit_generator(generator)
    np.random.set_state(before[0])
    random.setstate(before[1])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("earlier", range(3))  # the second of two normal numbers waits since the first
@pytest.mark.parametrize("looked", [False, True])
def test_every_draw_is_seen(draw: str, earlier: int, looked: bool) -> None:
    for _ in range(earlier):
        DRAWS[draw]()
        if looked:
            random_state()
    before = random_state()
    assert random_state() == before
    DRAWS[draw]()
    assert random_state() != before
    assert random_state() == random_state()


def test_a_normal_number_that_waits_is_part_of_the_state() -> None:
    np.random.seed(0)
    np.random.randn()
    waits = np.random.get_state()
    before = random_state()
    np.random.set_state((*waits[:3], 0, 0.0))  # without the number that waits
    without = random_state()
    assert without != before
    np.random.set_state(waits)
    assert random_state() == before
    np.random.randn()
    assert random_state() == without


def test_one_place_in_a_sequence_is_reached_with_and_without_a_number_that_waits() -> None:
    np.random.seed(0)
    np.random.rand(2)
    random_state()
    words = np.random.get_state()[1:3]
    np.random.seed(0)
    np.random.randn()
    assert [np.array_equal(*pair) for pair in zip(words, np.random.get_state()[1:3], strict=True)] == [True, True]
    before = random_state()
    np.random.randn()
    assert random_state() != before


def test_numpy_is_asked_only_after_it_has_drawn() -> None:
    np.random.randn(3)
    first = random_state()["NumPy's generator"]
    assert random_state()["NumPy's generator"] is first


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937])
def test_another_generator_of_numpy_is_seen(kind: type) -> None:
    before = random_state()
    np.random.set_bit_generator(kind(1))
    given = random_state()
    assert given != before
    np.random.rand()
    assert random_state() != given


@pytest.mark.parametrize("draw", DRAWS)
def test_the_generator_that_has_drawn_is_named(draw: str) -> None:
    before = random_state()
    assert drawn(before, random_state()) is None
    DRAWS[draw]()
    assert drawn(before, random_state()) in ("torch's generator", "Python's generator", "NumPy's generator")


def test_numpy_is_known_before_a_pass_imports_it() -> None:
    """From NumPy 2.5 on, "import numpy" leaves numpy.random out: a pass that imports it draws nothing."""
    program = "import sys, t2v_fast.gradients.random_state; assert 'numpy.random' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
