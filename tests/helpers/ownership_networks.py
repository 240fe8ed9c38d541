"""Random networks and batches from recipes, and the comparison of the library with plain autograd on them."""

from __future__ import annotations

import copy
import random
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ownership_mixing  # noqa: F401  (this import and the next three register pieces)
import ownership_orders  # noqa: F401
import ownership_ragged  # noqa: F401
import ownership_reads  # noqa: F401
import torch
from oracle import randomise_norms, reduce
from ownership_pieces import LONGEST, PIECES, POOLINGS, WIDTH, WORDS, Piece, linear
from torch import Tensor, nn
from torch.nn import functional as F

import t2v_fast
from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher

CLASSES = 3
SIZE = (4, 2)  # height and width of images
HEADS = ("pooled", "pooled", "pooled", "tokens", "tied")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a network and its batches; ``sizes`` has the number of examples of each batch."""

    seed: int
    pieces: tuple[str, ...]
    pooling: str = "mean"
    head: str = "pooled"
    images: bool = False
    stem: bool = True
    sizes: tuple[int, ...] = (2, 3)
    tokens: tuple[int, ...] = (3, 3)
    granularity: str = "filter"
    estimator: str = "exact"
    unsupported: str = "error"

    @property
    def used(self) -> list[Piece]:
        found = [PIECES[name] for name in self.pieces]
        return found + ([POOLINGS[self.pooling]] if self.head != "tokens" else [])

    @property
    def may_be_refused(self) -> bool:
        return any(p.entangled or (p.exact_only and self.unsupported == "error") for p in self.used)


def drawn(seed: int) -> Recipe:
    """Draw a random recipe."""
    rng = random.Random(seed)
    images = rng.random() < 0.25
    names = [name for name, p in PIECES.items() if images or not p.images]
    weights = [3 if PIECES[name].images else 1 for name in names]
    # Tokenwise layers are many, because each comes in all orders of axes: they get a third of all draws.
    tokenwise = sum("@" in name for name in names)
    weights = [
        w * (0.5 * (len(names) - tokenwise) / tokenwise if "@" in name else 1)
        for w, name in zip(weights, names, strict=True)
    ]
    pieces = tuple(rng.choices(names, weights, k=rng.randint(1, 4)))
    sizes = tuple(rng.choices(range(1, 6), (1, 3, 3, 2, 2), k=rng.randint(2, 4)))
    if rng.random() < 0.2:
        sizes = (1, 2, *sizes[2:])
    elif rng.random() < 0.3:
        sizes = (sizes[0],) * len(sizes)
    recipe = Recipe(
        seed,
        pieces,
        rng.choice(list(POOLINGS)),
        rng.choice(HEADS),
        images,
        rng.random() < 0.7,
        sizes,
        granularity=rng.choice(["filter", "parameter", "tensor"]),
        estimator=rng.choice(["exact", "empirical", "deflated"]),
    )
    tokens = [n if n > 1 and rng.random() < 0.3 else rng.randint(2, LONGEST - 2) for n in sizes]
    if any(p.fixed for p in recipe.used) or rng.random() < 0.4:
        tokens = [tokens[-1]] * len(sizes)
    if images:
        tokens = [SIZE[0] * SIZE[1]] * len(sizes)
    exact = any(p.exact_only for p in recipe.used) or rng.random() < 0.2
    return replace(recipe, tokens=tuple(tokens), unsupported="exact" if exact else "error")


class Network(nn.Module):
    """Pieces one after the other, a read-out and a head; ``couple`` is a layer on tokens that may couple examples."""

    def __init__(self, recipe: Recipe, couple: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.images, self.couple = recipe.images, couple
        self.stem = linear() if recipe.stem else None
        self.body, self.kinds = nn.ModuleList(), []
        met: dict[str, int] = {}
        for name in recipe.pieces:
            met[name] = met.get(name, 0) + 1
            rng = random.Random(f"{recipe.seed} {name} {met[name]}")  # does not change when other pieces are left out
            self.body.append(PIECES[name].make(rng, recipe.tokens[0]))
            self.kinds.append((PIECES[name].images, rng.random() < 0.5))
        rng = random.Random(f"{recipe.seed} {recipe.pooling}")
        self.pooling = POOLINGS[recipe.pooling].make(rng, recipe.tokens[0]) if recipe.head != "tokens" else None
        if recipe.head == "tied":
            self.words = nn.Embedding(CLASSES, WIDTH)
        else:
            self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        randomise_norms(self)
        self.double()

    def forward(self, x: Tensor, ids: Tensor, lengths: Tensor, open: Tensor) -> Tensor:
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batch = Batch(ids, lengths, open, mask)
        if self.stem is not None:
            x = self.stem(x.movedim(1, -1)).movedim(-1, 1) if self.images else self.stem(x)
        for body, (of_images, added) in zip(self.body, self.kinds, strict=True):
            tokens = self.images and not of_images
            y = body(x.flatten(2).transpose(1, 2) if tokens else x, batch)
            y = y.tanh()
            if tokens:
                y = y.transpose(1, 2).unflatten(2, SIZE)
            x = x + y if added else y
        if self.images:
            x = x.flatten(2).transpose(1, 2)
        if self.couple is not None:
            x = self.couple(x, batch)
        if self.pooling is not None:
            x = self.pooling(x, batch)
        if hasattr(self, "words"):
            return (x + self.words(ids[:, 0] % CLASSES)) @ self.words.weight.T
        return self.head(x)


@dataclass
class Batch:
    ids: Tensor  # [N, T]
    lengths: Tensor  # [N]
    open: Tensor  # [N]: 1 where gates let an example through, otherwise 0
    mask: Tensor  # [N, T], true for tokens


def batches_of(recipe: Recipe) -> list[dict[str, Tensor]]:
    """The inputs of a network for each batch, with lengths, gates and padding that differ from batch to batch."""
    rng = random.Random(f"{recipe.seed} batches")
    g = torch.Generator().manual_seed(recipe.seed)
    batches = []
    for n, t in zip(recipe.sizes, recipe.tokens, strict=True):
        shape = (n, WIDTH, *SIZE) if recipe.images else (n, t, WIDTH)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        kind = rng.choice(["full", "equal", "any", "any", "any", "short"])
        low, high = {"full": (t, t), "equal": (max(1, t // 2),) * 2, "any": (1, t), "short": (1, max(1, t // 2))}[kind]
        lengths = torch.randint(low, high + 1, (n,), generator=g)
        ids = torch.randint(0, WORDS - 1, (n, t), generator=g)
        ids[torch.arange(n), lengths - 1] = WORDS - 1
        open_ = torch.randint(0, 2, (n,), generator=g).double()
        if rng.random() < 0.4:
            open_.fill_(rng.choice([0.0, 1.0]))
        if not recipe.images and rng.random() < 0.3:  # padding with zeros
            x = x * (torch.arange(t) < lengths[:, None])[..., None]
        batches.append({"x": x, "ids": ids, "lengths": lengths, "open": open_})
    return batches


def alone(batch: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    return {name: t[e : e + 1] for name, t in batch.items()}


def fisher_cotangents(logits: Tensor, estimator: str, labels: Tensor) -> Tensor:
    """Cotangents whose squared gradients add up to the Fisher of one example: [K, 1, C], or [1, 1, T, C] for tokens."""
    p = logits.detach().softmax(-1)
    if estimator == "empirical" or logits.dim() == 3:
        return (F.one_hot(labels, CLASSES) - p)[None]
    return p.sqrt().T[:, :, None] * (torch.eye(CLASSES, dtype=p.dtype)[:, None] - p)


@dataclass
class Truth:
    """The expected results, by plain autograd of a copy of the network on each example alone."""

    recorded: list[dict[str, Tensor]] = field(default_factory=list)  # for each batch: squares [N, *shape]
    fisher: list[dict[str, Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class _StraightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.contiguous()


def with_straight_norms(model: nn.Module) -> nn.Module:
    """Make batch and instance norms see activations and gradients in one memory format.

    For a single image, torch's CPU kernel gives wrong gradients where the two formats differ. An instance norm is
    always computed as the batch norm of one image.
    """
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.register_forward_pre_hook(lambda m, inputs: (inputs[0].contiguous(),))
            m.register_forward_hook(lambda m, inputs, y: _StraightGradient.apply(y))
    return model


def squares(model: nn.Module, logits: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for u in cotangents:
        found = torch.autograd.grad(
            [logits], parameters, [u], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        total = [t + g.square() for t, g in zip(total, found, strict=True)]
    return dict(zip(names, total, strict=True))


def truth_of(model: nn.Module, recipe: Recipe, batches: list, cotangents: list, labels: list) -> Truth:
    model = with_straight_norms(copy.deepcopy(model))
    truth = Truth()
    for batch, u, y in zip(batches, cotangents, labels, strict=True):
        rows = []
        for e in range(len(batch["x"])):
            logits = model(**alone(batch, e))
            v = fisher_cotangents(logits, recipe.estimator, y[e : e + 1])
            rows.append((squares(model, logits, u[:, e : e + 1]), squares(model, logits, v), logits.detach()))
        for found, part in ((truth.recorded, 0), (truth.fisher, 1)):
            found.append({name: torch.stack([row[part][name] for row in rows]) for name in rows[0][part]})
        truth.logits.append(torch.cat([row[2] for row in rows]))
    return truth


def close(got: Tensor, want: Tensor, scale: float) -> bool:
    """Whether squared gradients agree to 1e-9, or to the rounding error next to larger gradients.

    ``scale`` is the sum of all squares of the network. The rounding error of a gradient is some 1e-15 of the largest
    gradient, so the error of a square is 2e-15 times the product of both gradients.
    """
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return False
    difference, norm = float((got.double() - want).norm()), float(want.norm())
    return difference <= 1e-9 * norm or difference <= 1e-12 * (norm * scale) ** 0.5 + 1e-24 * scale


@dataclass
class Outcome:
    """The outcome of one recipe: messages of wrong results, refusals and crashes, and the number of correct results."""

    recipe: Recipe
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    unsound: bool = False  # an example alone has other logits: a fault of these tests, or a coupling
    batches: int = 0
    exact: int = 0  # correct batches of the recorder and correct calls of fisher()

    @property
    def kind(self) -> str:
        return "wrong" if self.wrong else "crashed" if self.crashed else "refused" if self.refused else "exact"

    def failed(self, who: str, error: Exception) -> None:
        ours = isinstance(error, (UnsupportedError, SelfCheckError))
        if isinstance(error, ValueError):
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            ours = Path(t2v_fast.__file__).parent in Path(last).parents
        text = f"{who}: {type(error).__name__}: {str(error)[:300]}"
        (self.refused if ours else self.crashed).append(text)


def examine(
    recipe: Recipe, model: nn.Module | None = None, recorder: bool = True, plain: nn.Module | None = None
) -> Outcome:
    """Run the recorder and fisher() over the recipe's batches, and compare with plain autograd.

    ``plain`` is the network of plain autograd where it is another one.
    """
    model = Network(recipe) if model is None else model
    batches = batches_of(recipe)
    g = torch.Generator().manual_seed(recipe.seed + 1)
    outcome = Outcome(recipe)
    shapes = [
        (len(b["x"]), b["ids"].shape[1], CLASSES) if recipe.head == "tokens" else (len(b["x"]), CLASSES)
        for b in batches
    ]
    cotangents = [torch.randn((1 + recipe.seed % 2, *s), generator=g, dtype=torch.float64) for s in shapes]
    labels = [torch.randint(0, CLASSES, s[:-1], generator=g) for s in shapes]
    weights = [torch.rand(s[0], generator=g, dtype=torch.float64) + 0.1 for s in shapes]
    truth = truth_of(model if plain is None else plain, recipe, batches, cotangents, labels)
    with torch.no_grad():
        check = copy.deepcopy(model if plain is None else plain)
        with torch.enable_grad():
            together = [check(**batch).detach() for batch in batches]
    outcome.unsound = any(
        float((a - b).abs().max()) > 1e-9 * float(b.abs().max()) for a, b in zip(together, truth.logits, strict=True)
    )
    if recorder:
        _record(outcome, recipe, model, batches, cotangents, weights, truth)
    _fisher(outcome, recipe, model, batches, labels, weights, truth)
    return outcome


def _scale(values: dict[str, Tensor]) -> float:
    return sum(float(s.sum()) for s in values.values())


def _compare(outcome: Outcome, who: str, got: Any, want: dict[str, Tensor], scale: float) -> None:
    bad = [name for name in want if name not in got or not close(got[name], want[name], scale)]
    if not bad:
        outcome.exact += 1
        return
    worst = {n: float((got[n] - want[n]).norm() / want[n].norm().clamp_min(1e-300)) if n in got else None for n in bad}
    outcome.wrong.append(
        f"{who}: " + ", ".join(f"{n} {w:.2g}" if w is not None else f"{n} missing" for n, w in worst.items())
    )


def _record(
    outcome: Outcome, recipe: Recipe, model: nn.Module, batches: list, cotangents: list, weights: list, truth: Truth
) -> None:
    with FisherRecorder(
        copy.deepcopy(model), granularity=recipe.granularity, unsupported=recipe.unsupported
    ) as recorder:
        for k, (batch, u, w) in enumerate(zip(batches, cotangents, weights, strict=True)):
            outcome.batches += 1
            of_parameter = recipe.granularity == "parameter"
            try:
                got = recorder.backward(recorder.model(**batch), u, w if of_parameter else None)
            except Exception as error:
                outcome.failed(f"recorder, batch {k}", error)
                continue
            s = truth.recorded[k]
            want = {
                name: torch.einsum("n,n...->...", w, q) if of_parameter else reduce(q, recipe.granularity)
                for name, q in s.items()
            }
            if recipe.granularity == "filter":
                want = {name: q.reshape(q.shape[0], -1) for name, q in want.items()}
            _compare(outcome, f"recorder, batch {k}", got, want, _scale(s))


def _fisher(
    outcome: Outcome, recipe: Recipe, model: nn.Module, batches: list, labels: list, weights: list, truth: Truth
) -> None:
    weighted = recipe.seed % 3 == 0
    w = torch.cat(weights) if weighted else torch.ones(sum(map(len, weights)), dtype=torch.float64)
    tokens = recipe.head == "tokens"
    try:
        got = fisher(
            copy.deepcopy(model),
            list(zip(batches, labels, strict=True)),
            "empirical" if tokens else recipe.estimator,
            granularity=recipe.granularity,
            unsupported=recipe.unsupported,
            weights=w if weighted else None,
            level="sequence" if tokens else "token",
        )
    except Exception as error:
        outcome.failed("fisher", error)
        return
    everything = {name: torch.cat([part[name] for part in truth.fisher]) for name in truth.fisher[0]}
    means = {
        name: torch.einsum("n,n...->...", w / w.sum(), reduce(q, recipe.granularity)) for name, q in everything.items()
    }
    _compare(outcome, "fisher", got, means, _scale({name: q / len(q) for name, q in everything.items()}))


def shrunk(outcome: Outcome) -> Outcome:
    """Leave out pieces and batches for as long as the same kind of failure remains, and return the smallest outcome."""
    best = outcome
    go_on = True
    while go_on:
        go_on = False
        r = best.recipe
        fewer = [replace(r, pieces=r.pieces[:i] + r.pieces[i + 1 :]) for i in range(len(r.pieces))]
        fewer += [
            replace(r, sizes=r.sizes[:i] + r.sizes[i + 1 :], tokens=r.tokens[:i] + r.tokens[i + 1 :])
            for i in range(len(r.sizes))
            if len(r.sizes) > 1
        ]
        fewer += [replace(r, head="pooled")] * (r.head != "pooled") + [replace(r, pooling="mean")] * (
            r.pooling != "mean"
        )
        for recipe in fewer:
            found = examine(recipe)
            if found.kind == best.kind and not found.unsound:
                best, go_on = found, True
                break
    return best
