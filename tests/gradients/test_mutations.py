"""Mutation tests: the library is broken on purpose, in one way after the other, and each break must be found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutations import PROPERTY, SELF_CHECK, UNSEEN, Mutation, Patch, assert_found, case, function
from ownership_couplings import DETACHED, RANDOM
from ownership_pieces import WIDTH, WORDS, Made, parameter
from torch import Tensor, nn

import t2v_fast.estimation.moments
import t2v_fast.estimation.reruns
import t2v_fast.estimation.self_check
import t2v_fast.gradients.factors
import t2v_fast.gradients.grouped
import t2v_fast.gradients.recorder
import t2v_fast.gradients.squares
import t2v_fast.ops
from t2v_fast import FisherRecorder
from t2v_fast.estimation import estimator as fisher_module
from t2v_fast.estimation.self_check import SelfCheck
from t2v_fast.gradients.factors import Convolution, Factors, Outer, Product, Scatter
from t2v_fast.gradients.rules import RULES
from t2v_fast.ops import planner

# ---- networks to break the library under


def experts(stack: Tensor, x: Tensor) -> Tensor:
    """Each token goes through one of three matrices, in an order that depends on the tokens."""
    tokens = x.flatten(0, 1)
    index = (tokens.detach()[:, 0] * 10).long() % 3
    return torch.bmm(stack[index], tokens[:, :, None])[:, :, 0].view_as(x)


def layer(run: Callable[..., Tensor], **makes: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Made(run, **{name: make() for name, make in makes.items()})


LINEAR = case("linear@batch_first")
NORM = case("layer_norm@batch_first")
IMAGES = case("image/conv")
EMBEDDING = case(
    extra=layer(lambda m, x, b: (x + m.f(b.ids)).sin(), f=lambda: nn.Embedding(WORDS, WIDTH, padding_idx=0))
)
BAG = case(extra=layer(lambda m, x, b: (x + m.f(b.ids)[:, None]).sin(), f=lambda: nn.EmbeddingBag(WORDS, WIDTH)))
DEPTHWISE = case(
    extra=layer(
        lambda m, x, b: m.f(x.transpose(1, 2)).transpose(1, 2), f=lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
    )
)
SCALE = case(extra=layer(lambda m, x, b: x * m.w, w=lambda: parameter(WIDTH)))
QUOTIENT = case(extra=layer(lambda m, x, b: x / m.w, w=lambda: parameter(WIDTH)))
MIXTURE = case(extra=layer(lambda m, x, b: (x + experts(m.w, x)).sin(), w=lambda: parameter(3, WIDTH, WIDTH)))
# Parameters among complex numbers get their gradients by plain autograd.
SPECTRUM = layer(lambda m, x, b: torch.fft.irfft(torch.fft.rfft(x) * m.w, WIDTH), w=lambda: parameter(WIDTH // 2 + 1))
SEVERAL = case("twice@batch_first")
TWO_KINDS = case("embedding/tied")  # the table is looked up, and multiplied


BATCH_NORMS = ("NativeBatchNormBackward0", "BatchNormBackward")  # torch's own, and fisher()'s on a CPU


# ---- ways to break it


def factors_of(nodes: str | Sequence[str], slot: int | None, change: Callable[[Any], Factors]) -> Patch:
    """Change the factors that a rule returns."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        for name in [nodes] if isinstance(nodes, str) else nodes:
            rule = RULES[name]

            def factors(use: Any, *rest: Any, made: Callable = rule.factors) -> Factors:
                found = made(use, *rest)
                return change(found) if slot is None or use.slot == slot else found

            mp.setitem(RULES, name, replace(rule, factors=factors))

    return patch


def exchanged(f: Outer) -> Factors:
    return Outer(f.g, f.x, f.of_input) if f.x.shape == f.g.shape else f


def rolled(f: Convolution, axis: int) -> Factors:
    return replace(f, x=f.x.roll(1, axis))


class Apart(Factors):
    """Squares the gradients of each use and adds the squares, instead of adding the gradients first."""

    def __init__(self, parts: Sequence[Factors]) -> None:
        self.parts = parts

    def filter_sums(self, reuse: Any) -> Tensor:
        return sum(t2v_fast.gradients.grouped.concatenated([part]).filter_sums(reuse) for part in self.parts)

    def accumulate_(self, out: Tensor, weight: Tensor) -> None:
        for part in self.parts:
            part.accumulate_(out, weight)

    def gradients(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def work(self, cotangents: int) -> Any:
        raise NotImplementedError


def squared_positions(real: Callable) -> Callable:
    def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
        return torch.einsum("nsi,nso->no", x.square(), g.square())

    return sq_outer


def old_grams(real: Callable) -> Callable:
    kept: dict[Any, Tensor] = {}

    def conv_gram(x: Tensor, *geometry: Any) -> Tensor:
        return kept.setdefault((x.shape, geometry), real(x, *geometry))

    return conv_gram


def by_gram(patch: Patch) -> Patch:
    def whole(mp: pytest.MonkeyPatch) -> None:
        mp.setattr(planner, "choose", lambda *args, **kwargs: "gram")
        patch(mp)

    return whole


def onward_doubled(real: Callable) -> Callable:
    def onward(use: Any, *rest: Any) -> Callable:
        pull = real(use, *rest)
        return pull if use.direct else lambda t: 2 * pull(t)

    return onward


def all_together(real: Callable) -> Callable:
    """Return the plain gradients of the whole batch in place of those of one example."""

    def plain_gradients(self: Any, output: Tensor, cotangent: Tensor, example: int, *rest: Any) -> Any:
        everything = torch.zeros_like(cotangent)
        everything[example] = cotangent.sum(0)
        return real(self, output, everything, example, *rest)

    return plain_gradients


def equal_batches(real: Callable) -> Callable:
    def init(self: Any, weights: Tensor, *rest: Any) -> None:
        real(self, weights / len(weights), *rest)

    return init


def layer_alone(real: Callable) -> Callable:
    return lambda self, reuse: self.layer.filter_sums(reuse)


def first_part(real: Callable) -> Callable:
    return lambda self, start, stop: real(replace(self, parts=self.parts[:1]), start, stop)


MUTATIONS = [
    Mutation("a linear weight's axes exchanged", factors_of("AddmmBackward0", 2, exchanged), LINEAR, SELF_CHECK),
    Mutation(
        "a linear layer's input left out",
        factors_of("AddmmBackward0", 2, lambda f: replace(f, g=torch.ones_like(f.g))),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "a linear bias summed over one position less",
        factors_of("AddmmBackward0", 0, lambda f: replace(f, g=f.g[:, 1:])),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "an embedding's padding index ignored",
        factors_of("EmbeddingBackward0", None, lambda f: replace(f, index=f.index.clamp_min(0))),
        EMBEDDING,
        SELF_CHECK,
    ),
    Mutation(
        "an embedding's indices shifted",
        factors_of("EmbeddingBackward0", None, lambda f: Scatter(f.index.roll(1, 1), f.g, f.rows)),
        EMBEDDING,
        SELF_CHECK,
    ),
    Mutation(
        "a bag's sum taken for its mean",
        factors_of("EmbeddingBagBackward0", None, lambda f: replace(f, g=f.g * f.index.shape[1])),
        BAG,
        SELF_CHECK,
    ),
    Mutation(
        "a convolution's input shifted by a pixel",
        factors_of("ConvolutionBackward0", 1, lambda f: rolled(f, 2)),
        IMAGES,
        SELF_CHECK,
    ),
    Mutation(
        "a convolution's height and width exchanged",
        factors_of("ConvolutionBackward0", 1, lambda f: replace(f, x=f.x.mT.reshape(f.x.shape))),
        IMAGES,
        SELF_CHECK,
    ),
    Mutation(
        "the groups of a convolution shifted",
        factors_of("ConvolutionBackward0", 1, lambda f: rolled(f, 1)),
        DEPTHWISE,
        SELF_CHECK,
    ),
    Mutation(
        "a layer norm's mean left out",
        factors_of("NativeLayerNormBackward0", 1, lambda f: replace(f, shift=None)),
        NORM,
        SELF_CHECK,
    ),
    Mutation(
        "a layer norm's scale squared",
        factors_of("NativeLayerNormBackward0", 1, lambda f: replace(f, scale=f.scale.square())),
        NORM,
        SELF_CHECK,
    ),
    Mutation(
        "a layer norm's weight taken for its bias",
        factors_of("NativeLayerNormBackward0", 1, lambda f: Product(f.g)),
        NORM,
        SELF_CHECK,
    ),
    Mutation(
        "a batch norm's variance left out",
        factors_of(BATCH_NORMS, 1, lambda f: replace(f, scale=torch.ones_like(f.scale))),
        case("image/batch_norm"),
        SELF_CHECK,
    ),
    Mutation(
        "the other factor of a product left out",
        factors_of("MulBackward0", None, lambda f: Product(f.g)),
        SCALE,
        SELF_CHECK,
    ),
    Mutation(
        "the numerator of a quotient left out",
        factors_of("DivBackward0", 1, lambda f: replace(f, x=torch.ones_like(f.x))),
        QUOTIENT,
        SELF_CHECK,
    ),
    Mutation(
        "only one of two uses of a parameter counted",
        function(t2v_fast.gradients.squares, "concatenated", lambda real: lambda factors: factors[0]),
        SEVERAL,
        SELF_CHECK,
    ),
    Mutation(
        "two uses of a parameter squared before they are added",
        function(t2v_fast.gradients.squares, "concatenated", lambda real: Apart),
        SEVERAL,
        SELF_CHECK,
    ),
    Mutation(
        "only one of two kinds of uses of a parameter counted",
        function(t2v_fast.gradients.tied.Tied, "filter_sums", layer_alone),
        TWO_KINDS,
        SELF_CHECK,
    ),
    Mutation(
        "the rows of an expert given to the next",
        factors_of("BmmBackward0", 0, lambda f: replace(f, key=(f.key + f.examples) % (f.experts * f.examples))),
        MIXTURE,
        SELF_CHECK,
    ),
    Mutation(
        "a row of an expert given to the next row's owner",
        factors_of("BmmBackward0", 0, lambda f: replace(f, key=f.key.roll(1))),
        MIXTURE,
        SELF_CHECK,
    ),
    Mutation(
        "rows of experts squared in their first order",
        function(t2v_fast.gradients.grouped.Segments, "arrange", lambda real: lambda self, t: t),
        MIXTURE,
        SELF_CHECK,
    ),
    Mutation(
        "the positions of an example squared before they are added",
        function(t2v_fast.ops, "sq_outer", squared_positions),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "the sums of the examples reversed",
        function(
            t2v_fast.gradients.factors._Layer, "filter_sums", lambda real: lambda self, reuse: real(self, reuse).flip(0)
        ),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "the sums of the examples shifted by one",
        function(
            t2v_fast.gradients.factors.Product,
            "filter_sums",
            lambda real: lambda self, reuse: real(self, reuse).roll(1, 0),
        ),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "sums given for means",
        function(FisherRecorder, "_means", lambda real: lambda self, sums: sums),
        LINEAR,
        SELF_CHECK,
    ),
    Mutation(
        "what flows on through a transformation doubled",
        function(t2v_fast.gradients.squares, "onward", onward_doubled),
        case("parameters/weight_norm", unsupported="exact"),
        SELF_CHECK,
    ),
    Mutation(
        "the Gram matrix of another batch",
        by_gram(function(t2v_fast.ops, "conv_gram", old_grams)),
        case("linear@batch_first", sizes=(2, 2)),
        PROPERTY,
    ),
    Mutation(
        "the weights of examples ignored",
        function(
            t2v_fast.ops,
            "sq_outer_acc_",
            lambda real: lambda out, x, g, weight: real(out, x, g, torch.ones_like(weight)),
        ),
        case("linear@batch_first", granularity="parameter"),
        PROPERTY,
    ),
    Mutation(
        "gradients of batch norms of one image not fixed",
        function(t2v_fast.gradients.recorder, "fix_batch_norm_gradients", lambda real: lambda nodes: None),
        case("image/instance_norm", sizes=(1, 2)),
        PROPERTY,
    ),
    Mutation(
        "plain gradients of a whole batch for those of an example",
        function(FisherRecorder, "plain_gradients", all_together),
        case(extra=SPECTRUM, unsupported="exact"),
        SELF_CHECK,
    ),
    Mutation(
        "a direction of the exact estimator left out",
        function(
            fisher_module,
            "drawn_cotangents",
            lambda real: lambda *args, **kwargs: (real(*args, **kwargs)[0][:-1], None),
        ),
        LINEAR,
        PROPERTY,
    ),
    Mutation(
        "labels ignored",
        function(
            fisher_module,
            "drawn_cotangents",
            lambda real: (
                lambda logits, estimator, samples, likelihood, labels, *rest, **kwargs: real(
                    logits, estimator, samples, likelihood, labels * 0, *rest, **kwargs
                )
            ),
        ),
        case("linear@batch_first", estimator="empirical"),
        PROPERTY,
    ),
    Mutation(
        "batches weighed alike, whatever their sizes",
        function(t2v_fast.estimation.moments.Units, "__init__", equal_batches),
        LINEAR,
        PROPERTY,
    ),
    Mutation(
        "a self-check that checks nothing, and detached statistics",
        function(SelfCheck, "batch", lambda real: lambda *args, **kwargs: None),
        case(extra=DETACHED["statistics"], recorder=False),
        PROPERTY,
    ),
    Mutation(
        "a self-check that checks nothing, and noise",
        function(SelfCheck, "batch", lambda real: lambda *args, **kwargs: None),
        case(extra=RANDOM["noise/torch"], recorder=False),
        PROPERTY,
    ),
    Mutation(
        "a self-check that allows everything",
        lambda mp: mp.setitem(t2v_fast.estimation.self_check.SELF_CHECK_TOLERANCE, torch.float64, 1e9),
        case(extra=DETACHED["largest"], recorder=False),
        PROPERTY,
    ),
    Mutation(
        "a self-check of the first batch only, which has one example",
        function(SelfCheck, "batch", lambda real: lambda self, *rest: None if self._single else real(self, *rest)),
        case(extra=DETACHED["largest"], recorder=False, sizes=(1, 3)),
        PROPERTY,
    ),
    Mutation(
        "random numbers that are not noticed",
        function(t2v_fast.estimation.reruns, "random_state", lambda real: dict),
        case(extra=RANDOM["skipped_by_torch/0.01"], recorder=False),
        UNSEEN,
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(mutation, monkeypatch)


def test_there_are_enough() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
