"""The states of the generators that a network may draw random numbers from."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import numpy.random  # from NumPy 2.5 on, "import numpy" leaves it out, and a pass that imports it would seem to draw
import torch


def random_state() -> dict[str, object]:
    """The states of the generators that a network may draw random numbers from, by name: torch's, Python's, NumPy's."""
    states: dict[str, object] = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "Python's generator": random.getstate(),
        "NumPy's generator": _numpy_states.now(numpy.random),
    }
    if torch.cuda.is_initialized():
        states |= {f"the generator of cuda:{k}": g.get_offset() for k, g in enumerate(torch.cuda.default_generators)}
    return states


def drawn(before: dict[str, object], after: dict[str, object]) -> str | None:
    """The name of a generator that has drawn numbers between two states; None if none has."""
    return next((name for name, state in after.items() if before.get(name, state) != state), None)


class _NumpyStates:
    """The states of NumPy's global generator, which is asked for one only after its memory has changed.

    NumPy takes some hundred microseconds to write a state down, as long as a small network for a pass. The words of the
    generator can be read from its memory in less than one. A state has one more number, where a normal number was drawn
    together with another and waits for its use. It begins to wait when the generator draws, which changes the words. So
    the same words mean the same state, unless a number waits. (``set_state`` may let a number wait and keep the
    words. Then the draw that takes this number goes unnoticed. The next draw is noticed.)
    """

    def __init__(self) -> None:
        self._known: tuple[bytes | None, tuple] = None, ()  # the words, and the state that they mean

    def now(self, numpy_random: Any) -> tuple:
        """The present state."""
        words = self._words(numpy_random)
        before, state = self._known
        if words is None or words != before:
            state = self._ask(numpy_random)
            waits = len(state) == 1 or state[3]
            self._known = (None if waits or words != b"".join(state[1:3]) else words), state
        return state

    @staticmethod
    def _ask(numpy_random: Any) -> tuple:
        found = numpy_random.get_state(legacy=False)
        if found["bit_generator"] != "MT19937":
            return (repr(found),)
        words, position = found["state"]["key"].tobytes(), int(found["state"]["pos"]).to_bytes(4, sys.byteorder)
        return "MT19937", words, position, found["has_gauss"], found["gauss"]

    @staticmethod
    def _words(numpy_random: Any) -> bytes | None:
        """The words and the position of a Mersenne twister; None where another generator is NumPy's global one."""
        generator: Any = getattr(numpy_random, "get_bit_generator", lambda: None)()  # NumPy has it from 1.24 on
        if type(generator) is not numpy_random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, 4 * 625)


_numpy_states = _NumpyStates()
