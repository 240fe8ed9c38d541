"""PEFT: Fisher scores of modules for ranks of LoRA, against squared gradients of single texts.

    python -m bench.studies.frontends.peft [--rounds 5]

The proposal of a Fisher score in PEFT (huggingface/peft, issue 3203) squares gradients of batches, which is the Fisher
for batches of one text. Both sides here have the squared gradients of each text's own loss. The reference is a loop
over texts.
"""

from __future__ import annotations

import argparse
import copy

import torch
import transformers
from torch import nn

from bench.studies.frontends.table import Row, main, times
from t2v_fast.adapters.peft import module_scores, rank_pattern

TEXTS, TOKENS, VOCABULARY = 64, 32, 500


def small() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def shifted(tokens: torch.Tensor) -> torch.Tensor:
    """Return the label of each position: the next token."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)


def rows(arguments: argparse.Namespace) -> list[Row]:
    from peft import LoraConfig, get_peft_model

    model = small()
    tokens = torch.randint(0, VOCABULARY, (TEXTS, TOKENS))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head]

    def theirs() -> dict[str, float]:
        wanted = [model.get_submodule(name).weight for name in names]
        total = [torch.zeros_like(p) for p in wanted]
        for text in tokens:
            loss = nn.functional.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="sum")
            for square, g in zip(total, torch.autograd.grad(loss, wanted), strict=True):
                square += g.square()
        return {name: float(t.mean()) / TEXTS for name, t in zip(names, total, strict=True)}

    def ours() -> dict[str, float]:
        batches = [{"input_ids": part, "labels": shifted(part)} for part in tokens.split(16)]
        return module_scores(model, batches, estimator="empirical", level="sequence")

    model.double()
    want, got = theirs(), ours()
    worst = max(abs(got[name] / want[name] - 1) for name in names)
    patterns = rank_pattern(model, got, r=8, lora_alpha=16, power=0.5)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules=names, **patterns))
    uniform = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, target_modules=names))
    spent, budget = (m.get_nb_trainable_parameters()[0] for m in (wrapped, uniform))
    ranks = patterns["rank_pattern"].values()
    model.float()
    ratio = times(theirs, ours, arguments.rounds).ratio
    return [
        Row(
            f"PEFT, scores of {len(names)} modules of a Llama of width 96, {TEXTS} texts of {TOKENS} tokens",
            2,
            f"{worst:.0e} relative in float64; ranks {min(ranks)} to {max(ranks)} with {spent} trainable parameters of "
            f"{budget}",
            ratio,
            ratio,
        )
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, needs=False)
