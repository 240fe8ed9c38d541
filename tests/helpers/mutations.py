"""Ways to break the library on purpose, and the check that a break is found.

How a break is found:

- ``SELF_CHECK``: fisher() raises SelfCheckError, and the recorder differs from plain autograd.
- ``PROPERTY``: the comparison of ``tests/helpers/ownership_networks.py`` finds a difference. These are breaks that the
  self-check cannot see, or breaks of the self-check itself.
- ``EITHER``: fisher() raises some error, because the wrong owners may not fit the next node either.
- ``UNSEEN``: fisher() no longer refuses what it refused before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from ownership_couplings import COUPLINGS, DETACHED, RANDOM
from ownership_networks import Network, Outcome, Recipe, examine
from torch import nn

SELF_CHECK, PROPERTY, EITHER, UNSEEN = "self-check", "property", "either", "unseen"


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    extra: Callable[[], nn.Module] | None = None  # a layer above the pieces of the recipe
    recorder: bool = True

    def examined(self) -> Outcome:
        torch.manual_seed(self.recipe.seed)
        model = Network(self.recipe, None if self.extra is None else self.extra())
        return examine(self.recipe, model, self.recorder)


def case(*pieces: str, extra: Callable[[], nn.Module] | None = None, recorder: bool = True, **options: Any) -> Case:
    images = any(name.startswith("image/") for name in pieces)
    sizes, seed = options.pop("sizes", (3, 2)), options.pop("seed", 2)
    tokens = (8 if images else 6,) * len(sizes)
    return Case(Recipe(seed, pieces, images=images, sizes=sizes, tokens=tokens, **options), extra, recorder)


Patch = Callable[[pytest.MonkeyPatch], None]


def function(owner: Any, name: str, change: Callable[[Callable], Callable]) -> Patch:
    """Replace a function or method by one that is made from it."""
    return lambda mp: mp.setattr(owner, name, change(getattr(owner, name)))


class Mutation(NamedTuple):
    name: str
    patch: Patch
    case: Case
    found_by: str


@cache
def unbroken(case: Case) -> Outcome:
    return case.examined()


def assert_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = unbroken(mutation.case)
    coupled = mutation.case.extra in (*COUPLINGS.values(), *DETACHED.values(), *RANDOM.values())
    assert before.kind == ("refused" if coupled else "exact"), before.wrong + before.crashed + before.refused
    mutation.patch(monkeypatch)
    broken = mutation.case.examined()
    if mutation.found_by == SELF_CHECK:
        assert any(line.startswith("fisher: SelfCheckError") for line in broken.refused)
        assert any(line.startswith("recorder") for line in broken.wrong)
    elif mutation.found_by == EITHER:
        assert any(line.startswith("fisher: ") for line in broken.refused)
    elif mutation.found_by == UNSEEN:
        assert not broken.refused
    else:
        assert broken.wrong, broken.crashed + broken.refused
