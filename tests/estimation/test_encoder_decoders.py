"""Batches of encoder-decoders have two masks: the tokens of the source and those of the target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from t2v_fast import fisher, gradient_norms

TOKENS, START = 12, 1


class EncoderDecoder(nn.Module):
    """The mean of the source's tokens beside each target token. As in BART, the source may stand in for a target."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.shared, self.encoder, self.head = nn.Embedding(TOKENS, 5), nn.Linear(5, 5), nn.Linear(5, TOKENS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        there = attention_mask[:, :, None]
        source = (self.encoder(self.shared(input_ids)).tanh() * there).sum(1) / there.sum(1)
        target = input_ids if decoder_input_ids is None else decoder_input_ids
        return self.head((self.shared(target) + source[:, None]).tanh())


def transformer(name: str) -> nn.Module:
    library = pytest.importorskip("transformers")
    if name == "T5":
        config = library.T5Config(
            vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=START
        )
        return library.T5ForConditionalGeneration(config)
    of = {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "decoder_start_token_id": START, "pad_token_id": 0}
    return library.BartForConditionalGeneration(library.BartConfig(vocab_size=TOKENS, d_model=8, **of, **sizes))


NETWORKS = {"own": EncoderDecoder, "T5": lambda: transformer("T5"), "BART": lambda: transformer("BART")}


def texts(targets: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a source and a target, of different lengths."""
    g = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(3, TOKENS, (length,), generator=g) for length in lengths)
        for lengths in zip((6, 2, 4, 5), targets, strict=True)
    ]


def batch_of(pairs: list[tuple[Tensor, Tensor]], with_mask: bool) -> dict[str, Tensor]:
    source = pad_sequence([s for s, _ in pairs], batch_first=True)
    labels = pad_sequence([t for _, t in pairs], batch_first=True, padding_value=-100)
    target = torch.cat([torch.full((len(pairs), 1), START), labels[:, :-1].clamp_min(0)], 1)
    lengths = torch.tensor([len(s) for s, _ in pairs])[:, None]
    batch = {"input_ids": source, "attention_mask": (torch.arange(source.shape[1]) < lengths).long(), "labels": labels}
    batch["decoder_input_ids"] = target
    if with_mask:
        batch["decoder_attention_mask"] = (labels >= 0).long()
    return batch


def squares(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """The squared gradients of the log-likelihood of each target, each pair alone and without padding."""
    found = []
    for pair in pairs:
        batch = batch_of([pair], True)
        labels = batch.pop("labels")
        logits = model(**batch)
        logits = getattr(logits, "logits", logits)
        loss = F.cross_entropy(logits[0], labels[0], reduction="sum")
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append(
            {k: torch.zeros_like(p) if g is None else g**2 for (k, p), g in zip(named.items(), grads, strict=True)}
        )
    return found


@pytest.mark.slow_unless(network=("own",))
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("targets", [(6, 4, 2, 3), (3, 1, 2, 2), (7, 8, 6, 5)], ids=["as long", "shorter", "longer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_mask_of_the_source_is_not_that_of_the_target(
    network: str, targets: tuple[int, ...], with_mask: bool
) -> None:
    torch.manual_seed(0)
    model, pairs = NETWORKS[network]().double().eval(), texts(targets)
    want = squares(model, pairs)
    batches = [batch_of(pairs[:3], with_mask), batch_of(pairs[3:], with_mask)]
    found: Any = fisher(model, batches, "empirical", granularity="parameter", level="sequence")
    for name, values in found.items():
        mean = torch.stack([w[name] for w in want]).mean(0)
        torch.testing.assert_close(values, mean, rtol=1e-9, atol=1e-9 * float(mean.max()) + 1e-18, msg=name)
    norms = gradient_norms(model, batches)
    alone = torch.stack([torch.stack([q.sum() for q in w.values()]).sum().sqrt() for w in want])
    torch.testing.assert_close(norms.total.double(), alone, rtol=1e-5, atol=1e-9)
    every = fisher(model, batches, "hutchinson", 1)  # the mean over tokens
    without = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    if with_mask:
        for name, values in fisher(model, without, "hutchinson", 1).items():
            torch.testing.assert_close(values, every[name], msg=name)


def test_a_network_that_would_make_up_its_target_is_refused() -> None:
    """It does not get the labels, and would take the source for its target."""
    batch = batch_of(texts((6, 4, 2, 3)), False)
    del batch["decoder_input_ids"]
    with pytest.raises(ValueError, match=r"add decoder_input_ids, which model\.prepare_decoder_input_ids_from_labels"):
        fisher(EncoderDecoder(), [batch], "hutchinson", 1)
    labels = torch.tensor([0, 1, 0, 1])  # of whole texts
    assert fisher(EncoderDecoder(), [batch | {"labels": labels}], forward=lambda m, x: m(**x).mean(1)).num_examples == 4
    del batch["labels"]
    assert fisher(EncoderDecoder(), [batch], "hutchinson", 1).num_examples == 4


@pytest.mark.parametrize("shape", ["encoder-decoder", "decoder"])
def test_labels_are_not_shifted_twice(shape: str) -> None:
    batch = batch_of(texts((6, 6, 6, 6)), False)
    model: nn.Module = EncoderDecoder()
    if shape == "decoder":
        batch = {"input_ids": batch["decoder_input_ids"], "labels": batch["labels"]}
        model = nn.Sequential(nn.Embedding(TOKENS, 4), nn.Linear(4, TOKENS))
        model.forward = lambda input_ids: model[1](model[0](input_ids))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="would be shifted twice"):
        fisher(model, [batch], "empirical", shift_labels=True)
