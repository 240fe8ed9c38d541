"""Embeddings for tests that compute none: of five numbers, and of as many as a test of banks asks for."""

from __future__ import annotations

import numpy as np

from t2v_fast.embedding import Embedding


def make(task: str = "a", seed: int = 0, **changes) -> Embedding:
    h = np.random.default_rng(seed).random(5)
    options = {
        "hessian": h,
        "scale": np.ones(5),
        "standard_error": h / 10,
        "layers": (("stem.weight", 0, 2), ("block.weight", 2, 5)),
        "num_examples": 7,
        "meta": {"task": task, "seconds": {"fisher": 0.5}},
        "fingerprint": {"probe": "p", "preprocessing": {"crop": 224}},
    }
    return Embedding(**{**options, **changes})


def make_for_bank(task: str, seed: int = 0, length: int = 7, **changes) -> Embedding:
    h = np.random.default_rng(seed).random(length)
    options = {
        "hessian": h,
        "scale": np.ones(length),
        "standard_error": h / 10,
        "layers": (("a", 0, 3), ("b", 3, length)),
        "num_examples": 5 + seed,
        "meta": {"task": task, "seconds": {"fisher": 0.5}},
        "fingerprint": {"probe": "p"},
    }
    return Embedding(**{**options, **changes})
