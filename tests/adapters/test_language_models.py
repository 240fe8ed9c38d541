"""Hugging Face's decoders: sequences alone, padded and packed, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.texts import TOKENS, alone, by_filter, empirical, every_token, packed, padded, sequences
from t2v_fast import SelfCheckError, UnsupportedError, fisher

transformers = pytest.importorskip("transformers", reason="the networks are its models")
pytestmark = pytest.mark.slow

LENGTHS = (3, 5, 2, 4)
TEXTS = sequences(LENGTHS)
SMALL = {
    "vocab_size": TOKENS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama(attention: str, tied: bool = True) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, attn_implementation=attention)
    )


def gpt2(attention: str) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=TOKENS,
            n_embd=8,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
    )


def qwen3(attention: str) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, attn_implementation=attention))


def gemma2(attention: str) -> nn.Module:
    """Scores and logits are capped, layers take turns with a window, and the norms add one to their weights."""
    config = transformers.Gemma2Config(
        **SMALL,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=4,
        sliding_window=3,
        attn_implementation=attention,
    )
    return transformers.Gemma2ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama("sdpa"),
    "llama eager": lambda: llama("eager"),
    "llama with a head of its own": lambda: llama("sdpa", tied=False),
    "gpt2": lambda: gpt2("sdpa"),
    "gpt2 eager": lambda: gpt2("eager"),
    "qwen3": lambda: qwen3("sdpa"),
    "gemma2": lambda: gemma2("eager"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    with torch.no_grad():
        for p in model.parameters():  # so that norms are not ones, and logits not nearly equal
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def flattened(texts: list[Tensor]) -> dict[str, Any]:
    """A packed row from Hugging Face's own collator."""
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
    return dict(collate([{"input_ids": t.tolist()} for t in texts]))


FORMS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "alone": lambda: alone(TEXTS),
    "right": lambda: [padded(TEXTS[:2]), padded(TEXTS[2:])],
    "left": lambda: [padded(TEXTS[:3], left=True), padded(TEXTS[3:], left=True)],
    "packed": lambda: [packed(TEXTS[:2]), packed(TEXTS[2:])],
    "flattened": lambda: [flattened(TEXTS)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(model: nn.Module, form: str) -> None:
    options: dict[str, Any] = {"shift_labels": True, "packed": form in ("packed", "flattened")}
    found = fisher(model, FORMS[form](), "empirical", 1, level="sequence", **options)
    want = {name: by_filter(q.mean(0)) for name, q in empirical(model, TEXTS).items()}
    assert found.keys() == want.keys()
    for name, q in want.items():
        torch.testing.assert_close(found[name], q, rtol=1e-8, atol=1e-8 * float(q.max()) + 1e-15)


@pytest.mark.parametrize("form", ["left", "flattened"])
def test_every_token_and_label(form: str) -> None:
    torch.manual_seed(0)
    model = llama("sdpa").double().eval()
    tokens = sum(LENGTHS) - len(LENGTHS)
    found = fisher(model, FORMS[form](), "exact", shift_labels=True, packed=form == "flattened")
    for name, q in every_token(model, TEXTS).items():
        torch.testing.assert_close(found[name], by_filter(q.sum(0) / tokens), rtol=1e-8, atol=1e-12)


def test_rows_whose_sequences_see_each_other(model: nn.Module) -> None:
    """An attention mask switches off the masks that the models make from position_ids."""
    batch = packed(TEXTS)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises((UnsupportedError, SelfCheckError), match="must not attend to each other"):
        fisher(model, [batch], "empirical", 1, shift_labels=True, packed=True)
