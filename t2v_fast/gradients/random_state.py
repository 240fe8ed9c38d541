"""The states of the generators that a network may draw random numbers from."""

from __future__ import annotations

import ctypes
import random
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

    NumPy takes some fifty microseconds to write a state down, as long as a small network for a pass. To read the memory
    that holds the state takes two. It is the words of the bit generator, and the object around it. There a normal
    number waits that was drawn together with another. The same memory means the same state.
    """

    def __init__(self) -> None:
        self._known: tuple[bytes | None, tuple] = None, ()  # the memory, and the state that it holds

    def now(self, numpy_random: Any) -> tuple:
        """The present state."""
        memory = self._memory(numpy_random)
        before, state = self._known
        if memory is None or memory != before:
            state = self._ask(numpy_random)
            # Another thread may have drawn in between.
            self._known = (memory if memory == self._memory(numpy_random) else None), state
        return state

    @staticmethod
    def _ask(numpy_random: Any) -> tuple:
        found = numpy_random.get_state(legacy=False)
        if found["bit_generator"] != "MT19937":
            return (repr(found),)
        return "MT19937", found["state"]["key"].tobytes(), found["state"]["pos"], found["has_gauss"], found["gauss"]

    @staticmethod
    def _memory(numpy_random: Any) -> bytes | None:
        """The memory of a Mersenne twister; None where another generator is NumPy's global one."""
        generator: Any = getattr(numpy_random, "get_bit_generator", lambda: None)()  # NumPy has it from 1.24 on
        around = getattr(numpy_random.get_state, "__self__", None)
        if type(generator) is not numpy_random.MT19937 or type(around) is not numpy_random.RandomState:
            return None
        header = object.__basicsize__  # counts of references change with each look
        fields = ctypes.string_at(id(around) + header, around.__sizeof__() - header)
        return ctypes.string_at(generator.ctypes.state_address, 4 * 625) + fields


_numpy_states = _NumpyStates()
