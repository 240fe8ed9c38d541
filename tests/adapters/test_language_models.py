"""Hugging Face's decoders: sequences alone, padded and packed, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from texts import TOKENS, alone, by_filter, empirical, every_token, packed, padded, sequences
from torch import Tensor, nn

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


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
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


# These softmax in float32, where a finite mask in float64 is -inf: a token that sees nobody becomes NaN.
WITHOUT_LEFT = ("llama eager", "gemma2")
# Norms and eager attention compute in float32 within these models.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in MODELS for form in FORMS if form != "left" or name not in WITHOUT_LEFT]
)
def test_every_form(name: str, form: str) -> None:
    model = network(name)
    options: dict[str, Any] = {"shift_labels": True, "packed": form in ("packed", "flattened")}
    found = fisher(model, FORMS[form](), "empirical", 1, level="sequence", **options)
    want = {name: by_filter(q.mean(0)) for name, q in empirical(model, TEXTS).items()}
    assert found.keys() == want.keys()
    for key, q in want.items():
        torch.testing.assert_close(found[key], q, rtol=TOLERANCE, atol=TOLERANCE * float(q.max()))


@pytest.mark.parametrize("form", ["left", "flattened"])
def test_every_token_and_label(form: str) -> None:
    torch.manual_seed(0)
    model = llama("sdpa").double().eval()
    tokens = sum(LENGTHS) - len(LENGTHS)
    found = fisher(model, FORMS[form](), "exact", shift_labels=True, packed=form == "flattened")
    for name, q in every_token(model, TEXTS).items():
        want = by_filter(q.sum(0) / tokens)
        torch.testing.assert_close(found[name], want, rtol=TOLERANCE, atol=TOLERANCE * float(want.max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", ["attention_mask", "use_cache"])
@pytest.mark.parametrize("self_check", [True, False])
def test_rows_whose_sequences_see_each_other(name: str, change: str, self_check: bool) -> None:
    """An attention mask and a cache switch off the masks that the models make from position_ids."""
    batch = packed(TEXTS)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])} if change == "attention_mask" else {change: True}
    with pytest.raises((UnsupportedError, SelfCheckError), match="must not attend to each other"):
        fisher(network(name), [batch], "empirical", 1, shift_labels=True, packed=True, self_check=self_check)
