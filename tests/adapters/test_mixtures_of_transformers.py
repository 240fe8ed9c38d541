"""Mixtures of experts of transformers, with each implementation of their experts, against per-example autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.coverage_cases.transformers_cases import MIXTURES
from t2v_fast import FisherRecorder, SelfCheckError, fisher

transformers = pytest.importorskip("transformers", reason="the networks are its models")
pytest.importorskip("transformers.integrations.moe", reason="older versions have one implementation of experts")

NAMES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
VOCABULARY = 13
TOKENS = torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3, [1] * 6])


def network(name: str, implementation: str, dtype: torch.dtype, **options: object) -> nn.Module:
    stem, given = MIXTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**{**given, "vocab_size": VOCABULARY, **options})
    config._attn_implementation = "eager"
    made = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "gate.weight" in key or "router" in key:
                p.normal_()  # a sharper choice of experts than at initialisation
            elif "bias" in key:
                p.normal_(0, 0.1)
    made.set_experts_implementation(implementation)
    return made.to(dtype).eval()


def truth(of: nn.Module, tokens: Tensor, mask: Tensor, u: Tensor) -> dict[str, Tensor]:
    """{name: [N, *shape]} squared gradients, one example at a time."""
    named = dict(of.named_parameters())
    rows = []
    for n in range(len(tokens)):
        logits = of(input_ids=tokens[[n]], attention_mask=mask[[n]]).logits
        g = torch.autograd.grad(logits, list(named.values()), u[[n]], allow_unused=True, materialize_grads=True)
        rows.append([t.square() for t in g])
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(named)}


@pytest.mark.slow_unless(name=("mixtral", "gpt-oss"), implementation=IMPLEMENTATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_of_experts(name: str, implementation: str) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # the product knows no float64
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6 if name.startswith("deepseek") else 1e-9  # float32 inside
    u = torch.randn(4, 6, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u *= MASK[:, :, None]
    want = truth(network(name, "eager", torch.float64), TOKENS, MASK, u)
    own = network(name, implementation, dtype)
    kinds: dict[str, str] = {}
    for granularity in ("filter", "parameter", "tensor"):
        for rows in ([0, 1, 2, 3], [2, 0], [3, 1, 2], [1]):
            with FisherRecorder(own, granularity=granularity) as recorder:
                recorder.observer = lambda use, factors, *_: kinds.update({use.parameter: type(factors).__name__})
                logits = own(input_ids=TOKENS[rows], attention_mask=MASK[rows]).logits
                got = recorder.backward(logits, u[rows].to(dtype))
            for key, each in want.items():
                w = each[rows]
                if granularity == "parameter":
                    w = w.sum(0)
                else:
                    w = w.flatten(1).mean(1) if granularity == "tensor" else w.flatten(2).mean(2) if w.dim() > 2 else w
                error = (got[key].double() - w).norm() / w.norm().clamp_min(1e-30)
                assert error < tolerance, (key, granularity, rows)
    stacks = {kind for key, kind in kinds.items() if key.endswith(("gate_up_proj", "down_proj")) and "experts" in key}
    assert stacks == {"Grouped"}


def batches() -> list[dict[str, Tensor]]:
    return [
        {"input_ids": TOKENS, "attention_mask": MASK},
        {"input_ids": TOKENS[:2], "attention_mask": MASK[:2]},
        {"input_ids": TOKENS[2:], "attention_mask": MASK[2:]},
    ]


def last(of: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of the last position, where texts are padded on the left or not at all."""
    return of(**inputs).logits[:, -1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_passes(implementation: str, dtype: torch.dtype) -> None:
    """Routers choose alike in a batch and alone, also where rounding is coarse."""
    of = network("mixtral", implementation, dtype)
    diagonal = fisher(of, batches(), forward=last)
    assert all(torch.isfinite(torch.as_tensor(diagonal[name])).all() for name in diagonal)


def seq2seq(stem: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "num_experts": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{stem}Config")(**{**shared, "decoder_start_token_id": 0, **options})
    config._attn_implementation = "eager"
    model = {"NllbMoe": "NllbMoeForConditionalGeneration"}.get(stem, f"{stem}ForConditionalGeneration")
    return getattr(transformers, model)(config).double().eval()


def of_decoder(of: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return of(**inputs, decoder_input_ids=inputs["input_ids"][:, :3]).logits[:, -1]


SWITCH = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "num_sparse_encoder_layers": 1}
NLLB = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "max_position_embeddings": 32,
}


def test_a_capacity_of_each_sequence_is_exact() -> None:
    """Switch drops tokens beyond the capacity of an expert, which counts each sequence on its own."""
    of = seq2seq("SwitchTransformers", **SWITCH, num_sparse_decoder_layers=1, expert_capacity=2)
    u = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    with FisherRecorder(of) as recorder:
        got = recorder.backward(of_decoder(of, inputs), u)
        for n in range(4):
            alone = of_decoder(of, {key: t[[n]] for key, t in inputs.items()})
            for key, q in got.items():
                g = torch.autograd.grad(alone, recorder.parameters[key], u[[n]], retain_graph=True, allow_unused=True)[
                    0
                ]
                w = torch.zeros_like(q[n]) if g is None else g.square().reshape(len(q[n]), -1).mean(1)
                torch.testing.assert_close(q[n], w, rtol=1e-6, atol=1e-9)  # its router computes in float32
    fisher(of, [inputs], forward=of_decoder)  # the self-check agrees


def test_a_capacity_that_examples_share_is_refused() -> None:
    """NLLB-MoE counts the tokens of the batch. By default, its experts have room for all of them in eval mode."""
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    fisher(seq2seq("NllbMoe", **NLLB), [inputs], forward=of_decoder)
    of = seq2seq("NllbMoe", **NLLB, moe_eval_capacity_token_fraction=0.2)
    named = r"'model\.\w+coder\.layers\.1\.ffn\.router' \(NllbMoeTop2Router, expert_capacity"
    with pytest.raises(SelfCheckError, match=named):
        fisher(of, [inputs], forward=of_decoder)
    fisher(of, [{key: t[[n]] for key, t in inputs.items()} for n in range(2)], forward=of_decoder)
