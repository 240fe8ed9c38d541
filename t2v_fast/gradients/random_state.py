"""The states of the generators that a network may draw random numbers from."""

from __future__ import annotations

import random
import sys

import torch


def random_state() -> tuple:
    """The states of the generators that a network may draw random numbers from: torch's, Python's and NumPy's."""
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        _, keys, *rest = numpy_random.get_state()
        states += [keys.tobytes(), *rest]
    if torch.cuda.is_initialized():
        states += [g.get_offset() for g in torch.cuda.default_generators]
    return tuple(states)
