"""Owners in random networks whose layers move examples about, against plain autograd of each example alone.

A long run of 2,000 networks, with a summary by piece:

    T2V_FAST_NETWORKS=2000 python -m pytest tests/gradients/test_ownership.py -k random -s

``T2V_FAST_FIRST_SEED`` sets the first seed. A failure prints a recipe, which ``examine(Recipe(...))`` runs again.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache

import pytest
import torch
from ownership_couplings import COUPLINGS, DETACHED, RANDOM
from ownership_networks import Network, Outcome, Recipe, batches_of, drawn, examine, shrunk
from ownership_pieces import LAYOUTS, PIECES, POOLINGS, TOKENWISE

NETWORKS = int(os.environ.get("T2V_FAST_NETWORKS", "120"))
FIRST_SEED = int(os.environ.get("T2V_FAST_FIRST_SEED", "0"))
REFUSED = 0.03  # the largest share of sound networks that may be refused
REFUSED_ON_REQUEST = 0.005  # with unsupported="exact"
# Detached couplings that leave most examples unchanged, so that comparing halves of a batch may not show them.
PARTIAL = {"any_example_opens", "limited_experts"}
SHRUNK = 40  # the number of failures that are reduced to smallest recipes
NAMES = [name for name in PIECES if "@" not in name]

# Ignore warnings of torch about mixed types of masks and about its slower paths.
pytestmark = pytest.mark.filterwarnings("ignore")


def recipes_of(name: str) -> list[Recipe]:
    """Two networks that have one piece between a linear layer and a read-out, with different batches."""
    p = PIECES[name]
    exact = "exact" if p.exact_only else "error"
    if p.images:
        return [
            Recipe(seed, (name,), images=True, sizes=sizes, tokens=(8,) * 3, unsupported=exact)
            for seed, sizes in enumerate([(2, 3, 2), (3, 4, 1)])
        ]
    tokens = (4, 4, 4) if p.fixed else (4, 3, 5)
    return [
        Recipe(0, (name,), "last/indexed", sizes=(2, 3, 2), tokens=tokens, unsupported=exact),
        Recipe(
            1, (name,), "mean/masked", sizes=(1, 3, 4), tokens=(4, 4, 4), granularity="parameter", unsupported=exact
        ),
    ]


@cache
def seen(recipe: Recipe) -> Outcome:
    return examine(recipe)


def assert_sound(outcome: Outcome) -> None:
    assert not outcome.unsound, f"the tests' own network couples examples: {outcome.recipe}"
    assert outcome.kind in ("exact", "refused"), f"{outcome.recipe}: {outcome.wrong + outcome.crashed}"


@pytest.mark.slow_unless(name=NAMES[::3])
@pytest.mark.parametrize("name", NAMES)
def test_piece(name: str) -> None:
    for recipe in recipes_of(name):
        assert_sound(seen(recipe))


@pytest.mark.slow_unless(layout=list(LAYOUTS)[::2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    for name in TOKENWISE:
        assert_sound(seen(recipes_of(f"{name}@{layout}")[0]))


@pytest.mark.slow_unless(name=list(POOLINGS)[::2])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling(name: str) -> None:
    for seed, piece in enumerate(("linear@sequence_first", "encoder_layer/sequence_first", "unpadded/index_put")):
        assert_sound(seen(Recipe(seed, (piece,), name, sizes=(2, 3, 2), tokens=(4, 4, 4))))


@pytest.mark.slow
def test_few_pieces_are_refused() -> None:
    outcomes = [seen(recipe) for name in PIECES for recipe in recipes_of(name)[: 1 if "@" in name else 2]]
    refused = [o for o in outcomes if o.refused and not o.recipe.may_be_refused]
    names = sorted({o.recipe.pieces[0] for o in refused})
    assert len(refused) <= REFUSED * len(outcomes), f"{len(refused)} of {len(outcomes)}: {', '.join(names)}"


@pytest.mark.slow
def test_random_networks(capsys: pytest.CaptureFixture) -> None:
    outcomes, smallest = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + NETWORKS):
        outcome = examine(drawn(seed))
        outcomes.append(outcome)
        if outcome.kind != "exact" and len(smallest) < SHRUNK:
            smallest.append(shrunk(outcome))
        if NETWORKS >= 1000 and seed % 100 == 99:
            with capsys.disabled():
                print(f"seed {seed}: {dict(Counter(o.kind for o in outcomes))}", flush=True)
    text = summary(outcomes, smallest)
    print(text)
    assert not [o for o in outcomes if o.unsound], "the tests' own networks couple examples"
    assert not [o for o in outcomes if o.kind in ("wrong", "crashed")], text
    sound = [o for o in outcomes if not o.recipe.may_be_refused]
    asked = [o for o in sound if o.recipe.unsupported == "exact"]
    assert sum(bool(o.refused) for o in asked) <= REFUSED_ON_REQUEST * len(asked), text
    assert sum(bool(o.refused) for o in sound) <= REFUSED * len(sound), text


def test_random_networks_with_couplings() -> None:
    """fisher() refuses a coupling above random pieces wherever the coupling shows.

    The recorder need not refuse: where it reads single tokens of examples, their owners may agree anyway.
    """
    makes = {**COUPLINGS, **{f"detached/{name}": make for name, make in DETACHED.items() if name not in PARTIAL}}
    for k, name in enumerate(list(makes) * max(1, NETWORKS // 120)):
        recipe = drawn(FIRST_SEED + k)
        torch.manual_seed(k)
        outcome = examine(recipe, Network(recipe, makes[name]()), recorder=False)
        assert outcome.kind in ("exact", "refused"), f"{name}, {recipe}: {outcome.wrong + outcome.crashed}"


def summary(outcomes: list[Outcome], smallest: list[Outcome]) -> str:
    kinds = Counter(o.kind for o in outcomes)
    batches = sum(o.batches for o in outcomes)
    lines = [
        f"{len(outcomes)} networks from seed {FIRST_SEED}, {batches} batches: "
        + ", ".join(f"{kinds[kind]} {kind}" for kind in ("exact", "refused", "crashed", "wrong"))
    ]
    blamed: dict[str, Counter] = {}
    for o in smallest:
        of = ", ".join(o.recipe.pieces) or f"read-out {o.recipe.pooling}, head {o.recipe.head}"
        blamed.setdefault(of, Counter())[o.kind] += 1
    if blamed:
        lines.append(f"by what is left of the first {len(smallest)} when all else is left out:")
    lines += [f"  {of}: {', '.join(f'{n} {kind}' for kind, n in c.items())}" for of, c in sorted(blamed.items())]
    order = {"wrong": 0, "crashed": 1, "refused": 2}
    for o in sorted(smallest, key=lambda o: order[o.kind])[:12]:
        lines.append(f"{o.recipe}\n    {(o.wrong + o.crashed + o.refused)[0]}")
    return "\n".join(lines)


def couples(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether the first example's logits depend on other examples, or the last example alone has other logits."""
    x = batch["x"].clone().requires_grad_()
    logits = model(**{**batch, "x": x})
    (g,) = torch.autograd.grad(logits[0].sum(), x)
    apart = logits[-1:] - model(**{name: t[-1:] for name, t in batch.items()})
    return bool(g[1:].any()) or float(apart.detach().abs().max()) > 1e-6


def coupled(make: object, sizes: tuple[int, ...]) -> tuple[Recipe, torch.nn.Module]:
    """Find a network with a coupling that shows in some batch."""
    for seed in range(20):
        recipe = Recipe(seed, ("linear@batch_first",), "mean/masked", sizes=sizes, tokens=(4,) * len(sizes))
        torch.manual_seed(seed)
        model = Network(recipe, make())
        # fisher() looks for a coupling that the graph does not show in the first two batches of several examples.
        several = [batch for batch in batches_of(recipe) if len(batch["x"]) > 1][:2]
        if any(couples(model, batch) for batch in several):
            return recipe, model
    raise AssertionError("this coupling never shows")


@pytest.mark.slow_unless(sizes=((2, 3),))
@pytest.mark.parametrize("sizes", [(1, 3, 2), (2, 3), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("name", [*COUPLINGS, *(f"detached/{name}" for name in DETACHED)])
def test_couplings_are_refused(name: str, sizes: tuple[int, ...]) -> None:
    """The recorder refuses couplings that the graph shows; fisher() refuses all."""
    make = COUPLINGS[name] if name in COUPLINGS else DETACHED[name.removeprefix("detached/")]
    outcome = examine(*coupled(make, sizes), recorder=name in COUPLINGS)
    assert outcome.kind == "refused", f"{outcome.recipe}: {outcome.wrong + outcome.crashed}"
    assert any(line.startswith("fisher") for line in outcome.refused)


@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_are_refused(name: str) -> None:
    for seed in range(3):
        recipe = Recipe(seed, ("linear@batch_first",), sizes=(2, 3), tokens=(4, 4))
        torch.manual_seed(seed)
        outcome = examine(recipe, Network(recipe, RANDOM[name]()), recorder=False)
        assert outcome.kind == "refused", f"{recipe}: {outcome.wrong + outcome.crashed}"
