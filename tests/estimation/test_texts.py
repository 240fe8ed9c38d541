"""The Fisher of language models: sequences alone, padded on either side, and packed, against autograd in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracle import relative_error
from texts import TOKENS, Decoder, alone, by_filter, empirical, every_token, packed, padded, sequences
from torch import Tensor, nn

from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher, gradient_norms
from t2v_fast.estimation import plain_squares
from t2v_fast.estimation.packing import part_of, segments_of, shifted
from t2v_fast.gradients.tied import Tied

LENGTHS = (3, 6, 2, 4, 1, 5)
TEXTS = sequences(LENGTHS)
FORMS: dict[str, Callable[[list[Tensor]], list[dict[str, Tensor]]]] = {
    "alone": alone,
    "right": lambda texts: [padded(texts[:2]), padded(texts[2:])],
    "left": lambda texts: [padded(texts[:4], left=True), padded(texts[4:], left=True)],
    "packed": lambda texts: [packed(texts[:3]), packed(texts[3:])],
    "one row": lambda texts: [packed(texts)],
    "a row each": lambda texts: [packed([t]) for t in texts],
}


@pytest.fixture(params=["fused", "eager", "infinite"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(request.param).double().eval()


def estimate(model: nn.Module, form: str, *rest: Any, texts: list[Tensor] = TEXTS, **options: Any) -> Any:
    return fisher(
        model, FORMS[form](texts), *rest, shift_labels=True, packed="pack" in form or "row" in form, **options
    )


def agree(found: Mapping[str, Tensor], want: Mapping[str, Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == want.keys()
    for name in want:
        largest = float(want[name].abs().max())
        torch.testing.assert_close(
            found[name], want[name].double(), rtol=rtol, atol=rtol * largest + 1e-15, msg=lambda m, k=name: f"{k}: {m}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_log_likelihoods_of_sequences(model: nn.Module, form: str) -> None:
    want = {name: q.mean(0) for name, q in empirical(model, TEXTS).items()}
    found = estimate(model, form, "empirical", 1, "parameter", level="sequence")
    agree(found, want)
    assert found.num_examples == len(TEXTS)
    found = estimate(model, form, "empirical", 1, level="sequence")
    agree(found, {name: by_filter(q) for name, q in want.items()})
    each = torch.stack([q.mean() for q in empirical(model, TEXTS)["blocks.0.up.weight"]])
    found = estimate(model, form, "empirical", 1, "tensor", level="sequence")
    torch.testing.assert_close(found["blocks.0.up.weight"], each.mean())
    torch.testing.assert_close(found.standard_error["blocks.0.up.weight"], each.std() / len(each) ** 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_every_token_and_every_label(form: str) -> None:
    torch.manual_seed(0)
    model = Decoder(tied=form != "alone").double()
    tokens = sum(LENGTHS) - len(LENGTHS)
    sums = {name: by_filter(q.sum(0)) for name, q in every_token(model, TEXTS).items()}
    agree(estimate(model, form, "exact"), {name: q / tokens for name, q in sums.items()})
    agree(estimate(model, form, "exact", level="sequence"), {name: q / len(TEXTS) for name, q in sums.items()})


@pytest.mark.parametrize("estimator", ["monte_carlo", "hutchinson", "empirical", "batch_mean"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_draws_are_those_of_padded_batches(estimator: str, level: str) -> None:
    """All forms draw the same numbers for the same tokens; weights go by sequence."""
    torch.manual_seed(0)
    model, weights = Decoder("eager").double(), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0, 3.0])
    forms = (padded(TEXTS), padded(TEXTS, left=True), packed(TEXTS))
    want, *rest = (
        fisher(model, [b], estimator, 2, level=level, shift_labels=True, packed=k == 2, weights=weights, seed=3)
        for k, b in enumerate(forms)
    )
    for found in rest:
        agree(found, want)


@pytest.mark.parametrize("key", ["segments", "seq_idx", "cu_seqlens", "cu_seq_lens_q"])
def test_every_way_to_say_where_sequences_begin(key: str) -> None:
    torch.manual_seed(0)
    sizes = torch.tensor(LENGTHS)
    value = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
    if key.startswith("cu"):
        value = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
    seen: list[set[str]] = []

    class Noting(Decoder):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(set(kwargs))
            return super().forward(*args, **kwargs)

    model = Noting().double()
    found = fisher(
        model, [packed(TEXTS) | {key: value}], "empirical", 1, level="sequence", shift_labels=True, packed=True
    )
    assert all((key in names) == (key != "segments") for names in seen)
    want = fisher(model, [packed(TEXTS)], "empirical", 1, level="sequence", shift_labels=True, packed=True)
    agree(found, want)


def test_rows_and_padding_within_a_packed_batch() -> None:
    """Two packed rows, whose ends are padding of a segment -1, with a mask of queries and keys."""
    torch.manual_seed(0)
    model = Decoder().double()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, -1], [2, 2, 3, 3, 3, 3, 4, -1, -1, -1]])
    texts = list(TEXTS[:5])
    tokens, labels = torch.zeros(2, 10, dtype=torch.long), torch.full((2, 10), -100)
    tokens[segments >= 0] = labels[segments >= 0] = torch.cat(texts)
    positions = torch.zeros_like(tokens)
    positions[segments >= 0] = torch.cat([torch.arange(len(t)) for t in texts])
    batch = {"input_ids": tokens, "position_ids": positions, "segments": segments, "labels": labels}
    found = fisher(model, [batch], "empirical", 1, level="sequence", shift_labels=True, packed=True)
    agree(found, {name: by_filter(q.mean(0)) for name, q in empirical(model, texts).items()})
    same = segments[0][:, None] == segments[0]
    seen = (same & torch.ones(10, 10, dtype=torch.bool).tril())[None, None]
    row = {"attention_mask": seen} | {key: value[:1] for key, value in batch.items()}
    found = fisher(model, [row], "empirical", 1, level="sequence", shift_labels=True, packed=True)
    agree(found, {name: by_filter(q.mean(0)) for name, q in empirical(model, texts[:2]).items()})


@pytest.mark.parametrize("attention", ["fused", "eager", "infinite"])
@pytest.mark.parametrize("self_check", [True, False])
def test_sequences_that_see_each_other_are_refused(attention: str, self_check: bool) -> None:
    model = Decoder(attention, apart=False).double()
    with pytest.raises((UnsupportedError, SelfCheckError), match="must not attend to each other"):
        fisher(model, [packed(TEXTS)], "empirical", 1, shift_labels=True, packed=True, self_check=self_check)
    one_leak = torch.block_diag(*(torch.ones(n, n).tril() for n in LENGTHS)).bool()
    one_leak[-1, 0] = True
    batch = packed(TEXTS) | {"attention_mask": one_leak[None, None]}
    with pytest.raises((UnsupportedError, SelfCheckError), match="must not attend to each other"):
        fisher(model, [batch], "empirical", 1, shift_labels=True, packed=True, self_check=self_check)


def test_a_row_of_closed_keys_is_an_attention_without_a_mask() -> None:
    """With a finite mask, a token that may attend to nobody attends to all."""
    model = Decoder().double()

    def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = model.tokens(inputs["input_ids"])
        closed = x.new_full((6, 6), torch.finfo(x.dtype).min)
        closed[:3, :3] = closed[3:5, 3:5] = 0
        q = x.unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=closed[None, None])
        return model.head(mixed.squeeze(1))

    batch = {"input_ids": torch.arange(6)[None], "segments": torch.tensor([[0, 0, 0, 1, 1, 1]])}
    with pytest.raises(UnsupportedError, match="must not attend to each other"):
        fisher(model, [batch], "hutchinson", 1, forward=forward, packed=True, self_check=False)


def test_what_the_graph_does_not_show_is_found_by_running_a_sequence_alone() -> None:
    class Counting(Decoder):
        """The positions count on through the row, whatever position_ids say."""

        def forward(self, input_ids: Tensor, position_ids: Tensor, **other: Any) -> Tensor:
            self.shift = torch.arange(input_ids.shape[1])[None] - position_ids
            return super().forward(input_ids, None, position_ids) * (1 + self.shift[..., None])

    with pytest.raises(SelfCheckError, match="must not attend to each other"):
        fisher(Counting().double(), [packed(TEXTS)], "empirical", 1, shift_labels=True, packed=True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"packed": None}, "position_ids begin anew within a row. packed=True"),
        ({"cu_seqlens": torch.tensor([0, 21])}, {"packed": None}, "it has cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4, 20])}, {}, "expected numbers that rise from 0 to 21"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 21])}, {}, "expected numbers that rise from 0 to 21"),
        ({"segments": torch.arange(21)[None] % 2}, {}, "are not next to each other"),
        ({"segments": torch.zeros(21).long()}, {}, "segments is [21], expected [1, 21]"),
        ({"position_ids": None}, {}, "packed=True needs segments, seq_idx"),
        ({"attention_mask": torch.zeros(1, 21).long()}, {}, "a packed row has no token"),
        ({"labels": None}, {}, "needs integer labels [N, T], one for each token, got none"),
        ({"labels": torch.zeros(1, 21)}, {}, "got [1, 21] torch.float32"),
    ],
)
def test_errors(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    batch = {key: value for key, value in (packed(TEXTS) | change).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        fisher(Decoder().double(), [batch], "monte_carlo", 1, **{"packed": True, "shift_labels": True, **options})


def test_labels_that_are_the_tokens_are_refused() -> None:
    model, batch = Decoder().double(), padded(TEXTS)
    with pytest.raises(ValueError, match=re.escape("pass shift_labels=True, or False")):
        fisher(model, [batch], "empirical", 1)
    with pytest.raises(ValueError, match=re.escape("pass shift_labels=True, or False")):
        fisher(model, [(TEXTS[0][None], TEXTS[0][None])], "empirical", 1)
    here = fisher(model, [batch], "empirical", 1, shift_labels=False)
    assert not torch.allclose(here.vector(), estimate(model, "alone", "empirical", 1).vector())
    with pytest.raises(ValueError, match="give each row as a batch of its own"):
        fisher(
            model, [{k: v.expand(2, -1) for k, v in packed(TEXTS).items()} | {"cu_seqlens": torch.tensor([0, 21])}],
            "empirical", packed=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="packed=True needs batches that are mappings"):
        fisher(model, [TEXTS[0][None]], packed=True)


def test_own_loop() -> None:
    torch.manual_seed(0)
    model, batch = Decoder("eager", tied=False).double(), packed(TEXTS)
    inputs, segments = {k: v for k, v in batch.items() if k != "labels"}, segments_of(batch, sum(LENGTHS))
    with FisherRecorder(model) as recorder:
        logits = model(**inputs)
        u = torch.randn(2, *logits.shape, dtype=torch.float64)
        recorder.check(logits, segments)
        found = recorder.backward(logits, u, segments=segments)
    for e, text in enumerate(TEXTS):
        want: dict[str, Any] = dict.fromkeys(found, 0)
        for k in range(2):
            gradients = torch.autograd.grad(model(text[None]), list(model.parameters()), u[k][:, segments == e])
            for name, g in zip(found, gradients, strict=True):
                want[name] = want[name] + by_filter(g.square())
        agree({name: q[e] for name, q in found.items()}, want)
    for wrong, message in (
        (segments[:-1], "expected int64 [T] for [1, T, ...]"),
        (segments.float(), "expected int64 [T]"),
        (segments + 1, "expected 0, 1, ..., or -1"),
        (segments - 1, "a cotangent is not zero at a position that belongs to no sequence"),
    ):
        with FisherRecorder(model) as recorder, pytest.raises(ValueError, match=re.escape(message)):
            recorder.backward(model(**inputs), u, segments=wrong)


class Hiding(torch.autograd.Function):
    """A function that cannot be called outside of a backward pass, so that owners stay unknown below it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if torch._C._current_autograd_node() is None:
            raise RuntimeError("called from outside")
        return 2 * g


@pytest.mark.parametrize("granularity", ["filter", "parameter"])
def test_plain_autograd_goes_by_sequence(granularity: str) -> None:
    class Hidden(Decoder):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return Hiding.apply(super().forward(*args, **kwargs))

    torch.manual_seed(0)
    model = Hidden().double()
    with pytest.raises(UnsupportedError, match="is out of reach"):
        estimate(model, "packed", "empirical", 1, self_check=False)
    found = estimate(model, "packed", "empirical", 1, granularity, level="sequence", unsupported="exact")
    want = {name: q.mean(0) for name, q in empirical(model, TEXTS).items()}
    agree(found, {name: by_filter(q) for name, q in want.items()} if granularity == "filter" else want)


@pytest.mark.parametrize("granularity", ["filter", "tensor", "parameter"])
def test_the_check_squares_a_gradient_at_a_time(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, without gradients in ``grad`` and without the hooks of those who train. A wrong rule is found."""
    monkeypatch.setattr(plain_squares, "LARGEST_FLOAT64", 12)
    torch.manual_seed(0)
    model = Decoder().double()
    before, called = torch.randn_like(model.tokens.weight), []
    model.tokens.weight.grad = before.clone()
    model.tokens.weight.register_post_accumulate_grad_hook(called.append)
    axis = {"blocks.0.up.weight": 1}
    estimate(model, "packed", "empirical", 1, granularity, filter_axis=axis)
    assert torch.equal(model.tokens.weight.grad, before)
    assert not called
    monkeypatch.setattr(Tied, "_looked_up", lambda self, n: iter(()))  # the lookups are left out
    for form in ("packed", "right", "a row each"):
        with pytest.raises(SelfCheckError, match=r"self-check failed for 'tokens\.weight'"):
            estimate(Decoder().double(), form, "empirical", 1, granularity)


def test_helpers() -> None:
    assert shifted({}, torch.tensor([[4, 5, 6]])).tolist() == [[5, 6, -100]]
    there = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])}
    assert shifted(there, torch.tensor([[9, 5, 6], [4, 5, 9]])).tolist() == [[-100, 6, -100], [5, -100, -100]]
    segments = torch.tensor([0, 0, 1, 2, 2, 2])
    assert shifted({}, torch.arange(6)[None], segments).tolist() == [[1, -100, -100, 4, 5, -100]]
    inputs = {
        "input_ids": torch.arange(6)[None],
        "cu_seq_lens_q": torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        "max_length_q": 3,
        "attention_mask": torch.arange(36).view(1, 1, 6, 6),
        "use_cache": False,
    }
    part, theirs = part_of(inputs, segments, [2, 0])
    assert part["input_ids"].tolist() == [[3, 4, 5, 0, 1]]
    assert theirs.tolist() == [0, 0, 0, 1, 1]
    assert part["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert part["cu_seq_lens_q"].dtype == torch.int32
    assert part["max_length_q"] == 3
    assert part["use_cache"] is False
    assert part["attention_mask"][0, 0, 0].tolist() == [21, 22, 23, 18, 19]


@pytest.mark.parametrize("form", FORMS)
def test_gradient_norms_of_sequences(model: nn.Module, form: str) -> None:
    packs = "pack" in form or "row" in form
    found = gradient_norms(model, FORMS[form](TEXTS), shift_labels=True, packed=packs)
    for name, q in empirical(model, TEXTS).items():
        torch.testing.assert_close(found[name], q.flatten(1).sum(1).sqrt(), rtol=1e-9, atol=1e-12)


def test_gradient_norms_refuse_texts_that_could_be_read_in_two_ways() -> None:
    model = Decoder().double()

    def loss(logits: Tensor, labels: Tensor | None) -> Tensor:
        """Shifts the labels itself."""
        assert labels is not None
        return nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").sum(1)

    with pytest.raises(ValueError, match=re.escape("pass shift_labels=True, or False")):
        gradient_norms(model, [padded(TEXTS)])
    with pytest.raises(ValueError, match=re.escape("position_ids begin anew within a row. packed=True")):
        gradient_norms(model, [packed(TEXTS)], shift_labels=True)
    with pytest.raises(ValueError, match="is for the default loss"):
        gradient_norms(model, [packed(TEXTS)], loss, packed=True)
    own = gradient_norms(model, [padded(TEXTS)], loss)
    assert torch.allclose(own.total, gradient_norms(model, [padded(TEXTS)], shift_labels=True).total)


@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
@pytest.mark.parametrize("estimator", ["empirical", "exact", "deflated", "monte_carlo", "hutchinson"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sequences_without_a_token_that_counts(level: str, estimator: str, granularity: str) -> None:
    """They add nothing to the sum over tokens, and a zero to the mean over sequences."""
    torch.manual_seed(0)
    model = Decoder(tied=False).double()
    x, labels = torch.randint(TOKENS, (2, 4, 5))
    nothing = {"input_ids": x, "labels": torch.full_like(x, -100)}
    some = [{"input_ids": x, "labels": labels.masked_fill(torch.tensor([[False], [True], [False], [True]]), -100)}]
    options = {"estimator": estimator, "granularity": granularity, "level": level}
    want = fisher(model, [{"input_ids": x[[0, 2]], "labels": labels[[0, 2]]}], **options)
    found = fisher(model, some, **options)
    share = 0.5 if level == "sequence" else 1.0
    assert relative_error(found.vector(), share * want.vector()) < 1e-9
    assert relative_error(fisher(model, [*some, nothing], **options).vector(), share**2 * want.vector()) < 1e-9
    with pytest.raises(ValueError, match=r"no token counts: every label is -100"):
        fisher(model, [nothing], **options)


def test_the_mean_of_a_batch_leaves_out_batches_without_a_token_that_counts() -> None:
    torch.manual_seed(0)
    model = Decoder(tied=False).double()
    x, labels = torch.randint(TOKENS, (2, 4, 5))
    some, nothing = {"input_ids": x, "labels": labels}, {"input_ids": x, "labels": torch.full_like(x, -100)}
    want = fisher(model, [some], "batch_mean").vector()
    assert torch.equal(fisher(model, [some, nothing], "batch_mean").vector(), want)
    with pytest.raises(ValueError, match="no token counts"):
        fisher(model, [nothing], "batch_mean")
