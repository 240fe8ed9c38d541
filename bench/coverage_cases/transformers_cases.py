"""Networks of transformers: their smallest configurations with random weights, and padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .case import COUPLED, EXACT, LENGTHS, RANDOM, Case, Inputs, Made, images, texts

KIND = "transformers"
TOKENS = 60
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
ROTARY = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


class ReadOut(nn.Module):
    """A network of transformers, from its inputs to one row of numbers for each example.

    ``how``: ``"logits"`` as they are, ``"last"`` for those of the last token that is no padding, ``"mean"`` for the
    mean of the last hidden state over what is no padding, and ``"pooled"`` for the pooler's output.
    """

    def __init__(self, network: nn.Module, how: str, parts: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.how = how
        self.parts = parts

    def forward(self, **inputs: Tensor) -> Tensor:
        network = self.network if self.parts is None else getattr(self.network, self.parts)
        output = network(**inputs)
        if self.how == "last":
            last = inputs["attention_mask"].sum(1) - 1
            return output.logits[torch.arange(len(last), device=last.device), last]
        if self.how == "mean":
            hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
            mask = inputs.get("attention_mask")
            if hidden.dim() == 3 and mask is not None and mask.shape == hidden.shape[:2]:
                return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            # Images [N, C, H, W] and sequences [N, T, C].
            return hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.flatten(1, -2).mean(1)
        if self.how == "pooled":
            return output.pooler_output.flatten(1)
        return output if isinstance(output, Tensor) else getattr(output, self.how)


def waves(lengths: Sequence[Sequence[int]] = ((640, 480, 400), (640, 500)), longest: int = 640) -> list[Inputs]:
    """Batches of sounds [N, L], padded with silence, and their masks."""
    batches = []
    for each in lengths:
        mask = torch.arange(longest) < torch.tensor(each)[:, None]
        batches.append({"input_values": torch.randn(mask.shape) * mask, "attention_mask": mask.long()})
    return batches


def named(name: str, tensors: list[Tensor]) -> list[Inputs]:
    return [{name: t} for t in tensors]


def videos(frames: int = 2, size: int = 16) -> list[Inputs]:
    return named("pixel_values", [torch.randn(n, frames, 3, size, size) for n in (3, 2)])


def pictures(size: int = 32) -> list[Inputs]:
    return named("pixel_values", images(size))


def both_sides(lengths: Sequence[Sequence[int]] = LENGTHS, longest: int = 6) -> list[Inputs]:
    """For encoders with decoders: the decoder sees tokens of its own."""
    batches = texts(lengths, longest)
    for batch in batches:
        batch["decoder_input_ids"] = torch.randint(5, TOKENS, (len(batch["input_ids"]), 4))
    return batches


def boxed() -> list[Inputs]:
    """Texts with the place of each token on a page."""
    batches = texts()
    for batch in batches:
        corner = torch.randint(0, 8, (*batch["input_ids"].shape, 2))
        batch["bbox"] = torch.cat([corner, corner + torch.randint(1, 8, corner.shape)], -1)
    return batches


def pairs(size: int = 32) -> list[Inputs]:
    """Texts, and an image with each."""
    batches = texts()
    for batch in batches:
        batch["pixel_values"] = torch.randn(len(batch["input_ids"]), 3, size, size)
    return batches


def tables() -> list[Inputs]:
    """Texts with the seven kinds of token types of TAPAS."""
    batches = texts()
    for batch in batches:
        batch["token_type_ids"] = torch.randint(0, 2, (*batch["input_ids"].shape, 7))
    return batches


def without_mask(batches: list[Inputs]) -> list[Inputs]:
    return [{name: t for name, t in batch.items() if name != "attention_mask"} for batch in batches]


def whole_texts(longest: int = 6) -> list[Inputs]:
    """Texts without padding, for networks that have no mask."""
    return without_mask(texts(((longest,) * 3, (longest,) * 2), longest))


def build(
    model: str, config: str, options: dict[str, Any], how: str, batches: Callable[[], list[Inputs]], parts: str | None
) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        configuration = getattr(transformers, config)(**options)
        network = getattr(transformers, model)(configuration)
        if hasattr(network.config, "use_cache"):
            network.config.use_cache = False
        return ReadOut(network, how, parts), batches()

    return make


CASES: list[Case] = []


def add(
    name: str,
    model: str,
    config: str,
    options: dict[str, Any],
    how: str = "mean",
    batches: Callable[[], list[Inputs]] = texts,
    *,
    parts: str | None = None,
    expect: str = EXACT,
    **more: Any,
) -> None:
    CASES.append(Case(KIND, name, build(model, config, options, how, batches, parts), expect, **more))


def text(name: str, stem: str, options: dict[str, Any], **more: Any) -> None:
    """An encoder, read out as the mean over what is no padding."""
    add(name, f"{stem}Model", f"{stem}Config", options, "mean", **more)


def language(name: str, stem: str, options: dict[str, Any] = ROTARY, head: str = "ForCausalLM", **more: Any) -> None:
    """A language model, read out at the last token that is no padding."""
    add(name, f"{stem}{head}", f"{stem}Config", options, "last", **more)


# Encoders of text.
add("bert", "BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 5}, "logits")
add(
    "bert eager",
    "BertForSequenceClassification",
    "BertConfig",
    {**SIZES, "num_labels": 5, "attn_implementation": "eager"},
    "logits",
)
add("bert tokens", "BertForTokenClassification", "BertConfig", {**SIZES, "num_labels": 3}, "logits")
TRAINING = "BertForSequenceClassification", "BertConfig"
NO_DROPOUT = {**SIZES, "num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
add("bert, training without dropout", *TRAINING, NO_DROPOUT, "logits", train=True)
add(
    "bert, training",
    *TRAINING,
    {**SIZES, "num_labels": 5},
    "logits",
    train=True,
    expect="its dropout is drawn anew in each forward pass",
    message=RANDOM,
)
add(
    "bert, training with dropout of attention alone",
    *TRAINING,
    {**NO_DROPOUT, "attention_probs_dropout_prob": 0.1},
    "logits",
    train=True,
    expect="its dropout is drawn anew in each forward pass",
    message=RANDOM,
    ways=("fisher",),
)
text("bert mean", "Bert", SIZES)
add("bert masked lm", "BertForMaskedLM", "BertConfig", SIZES, "last")
add(
    "roberta",
    "RobertaForSequenceClassification",
    "RobertaConfig",
    {**SIZES, "max_position_embeddings": 40, "num_labels": 5},
    "logits",
)
text("xlm-roberta", "XLMRoberta", {**SIZES, "max_position_embeddings": 40})
text("camembert", "Camembert", {**SIZES, "max_position_embeddings": 40})
text("roberta prelayernorm", "RobertaPreLayerNorm", {**SIZES, "max_position_embeddings": 40})
add(
    "albert",
    "AlbertForSequenceClassification",
    "AlbertConfig",
    {**SIZES, "embedding_size": 16, "num_labels": 5},
    "logits",
)
add(
    "distilbert",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    {
        "vocab_size": TOKENS,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 32,
        "num_labels": 5,
    },
    "logits",
)
add(
    "electra",
    "ElectraForSequenceClassification",
    "ElectraConfig",
    {**SIZES, "embedding_size": 16, "num_labels": 5},
    "logits",
)
DEBERTA = {
    **SIZES,
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 8,
}
text("deberta", "Deberta", DEBERTA)
text("deberta absolute", "Deberta", {**SIZES, "type_vocab_size": 2})
text("deberta-v2", "DebertaV2", {**DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True})
text("mpnet", "MPNet", {**SIZES, "pad_token_id": 1})
text("ernie", "Ernie", SIZES)
text("convbert", "ConvBert", {**SIZES, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3})
text("mobilebert", "MobileBert", {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16})
text(
    "squeezebert",
    "SqueezeBert",
    {
        **SIZES,
        "embedding_size": 32,
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
        "intermediate_groups": 2,
        "output_groups": 2,
    },
)
text("megatron-bert", "MegatronBert", SIZES)
text("rembert", "RemBert", {**SIZES, "input_embedding_size": 16, "output_embedding_size": 16})
text("roformer", "RoFormer", {**SIZES, "embedding_size": 32})
text("nomic-bert", "NomicBert", SIZES)
text(
    "modernbert",
    "ModernBert",
    {
        **SIZES,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
text("esm", "Esm", {**SIZES, "position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": False})
text("ibert", "IBert", {**SIZES, "max_position_embeddings": 40})
text(
    "nystromformer",
    "Nystromformer",
    {**SIZES, "num_landmarks": 6, "segment_means_seq_len": 6, "conv_kernel_size": 3},
)
add(
    "nystromformer landmarks",
    "NystromformerModel",
    "NystromformerConfig",
    {**SIZES, "num_landmarks": 3, "segment_means_seq_len": 6, "conv_kernel_size": 3},
    "mean",
    lambda: whole_texts(6),
    expect="the iteration for its inverse starts from the largest value of the batch",
    message=COUPLED,
)
# No window of these holds padding alone, which would make the gradient not a number.
WINDOWED = ((8, 7, 6), (7, 6))
text(
    "longformer",
    "Longformer",
    {**SIZES, "max_position_embeddings": 40, "attention_window": 4},
    batches=lambda: texts(WINDOWED, 8),
)
text("bigbird", "BigBird", {**SIZES, "attention_type": "original_full"})
text(
    "bigbird sparse",
    "BigBird",
    {**SIZES, "max_position_embeddings": 64, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    batches=lambda: texts(((48, 40, 20), (30, 30)), 48),
)
add("fnet", "FNetModel", "FNetConfig", {**SIZES, "use_tpu_fourier_optimizations": False}, "mean", whole_texts)
add(
    "canine",
    "CanineModel",
    "CanineConfig",
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "downsampling_rate": 2,
        "num_hash_buckets": 30,
        "local_transformer_stride": 8,
        "upsampling_kernel_size": 2,
    },
    "pooled",
    lambda: whole_texts(16),
    double=False,  # its mask is the least number of float64 in a tensor of float32
    tolerance=1e-3,
)
text(
    "funnel",
    "Funnel",
    {
        "vocab_size": TOKENS,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
    },
)
add(
    "funnel base",
    "FunnelBaseModel",
    "FunnelConfig",
    {
        "vocab_size": TOKENS,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
    },
    "mean",
)
text("xlnet", "XLNet", {"vocab_size": TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48})
add(
    "xlnet classification",
    "XLNetForSequenceClassification",
    "XLNetConfig",
    {"vocab_size": TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 5},
    "logits",
)
text(
    "xlm",
    "XLM",
    {"vocab_size": TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1, "max_position_embeddings": 32},
)
text(
    "flaubert",
    "Flaubert",
    {"vocab_size": TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1, "max_position_embeddings": 32},
)
text("splinter", "Splinter", {**SIZES, "question_token_id": 3})
text(
    "lilt",
    "Lilt",
    {
        **SIZES,
        "max_position_embeddings": 40,
        "hidden_size": 48,
        "channel_shrink_ratio": 4,
        "max_2d_position_embeddings": 32,
    },
    batches=boxed,
)
text("layoutlm", "LayoutLM", {**SIZES, "max_2d_position_embeddings": 32}, batches=boxed)
text(
    "layoutlmv3",
    "LayoutLMv3",
    {
        **SIZES,
        "max_position_embeddings": 40,
        "max_2d_position_embeddings": 32,
        "coordinate_size": 4,
        "shape_size": 8,
        "visual_embed": False,
        "rel_pos_bins": 8,
        "rel_2d_pos_bins": 8,
        "max_rel_pos": 16,
        "max_rel_2d_pos": 16,
    },
    batches=boxed,
)
text(
    "markuplm",
    "MarkupLM",
    {
        **SIZES,
        "max_position_embeddings": 40,
        "max_depth": 4,
        "xpath_unit_hidden_size": 8,
        "max_xpath_tag_unit_embeddings": 12,
        "max_xpath_subs_unit_embeddings": 12,
        "tag_pad_id": 10,
        "subs_pad_id": 10,
    },
)
text("tapas", "Tapas", {**SIZES, "type_vocab_sizes": [3, 8, 8, 2, 8, 8, 2]}, batches=tables)
text("visual-bert", "VisualBert", {**SIZES, "visual_embedding_dim": 16})
text("luke", "Luke", {**SIZES, "max_position_embeddings": 40, "entity_vocab_size": 10, "entity_emb_size": 8})
text(
    "reformer",
    "Reformer",
    {
        "attention_head_size": 8,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": True,
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "feed_forward_size": 48,
        "vocab_size": TOKENS,
        "max_position_embeddings": 8,
        "is_decoder": False,
        "pad_token_id": 0,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    batches=lambda: texts(((8, 5, 3), (4, 4)), 8),
    train=True,
    expect="its layers are hidden in an autograd function that accumulates their gradients itself",
    message="custom function|hid",
)

# Encoders with decoders.
T5 = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 8,
}
add("t5 encoder", "T5EncoderModel", "T5Config", T5, "mean")
add("t5", "T5ForConditionalGeneration", "T5Config", T5, "logits", both_sides)
add("t5 gated", "T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, "mean")
add("mt5 encoder", "MT5EncoderModel", "MT5Config", T5, "mean")
add("umt5 encoder", "UMT5EncoderModel", "UMT5Config", T5, "mean")
add(
    "longt5 encoder",
    "LongT5EncoderModel",
    "LongT5Config",
    {**T5, "local_radius": 2, "encoder_attention_type": "local"},
    "mean",
)
add(
    "switch transformer",
    "SwitchTransformersEncoderModel",
    "SwitchTransformersConfig",
    {**T5, "num_sparse_encoder_layers": 1, "num_experts": 3, "expert_capacity": 32},
    "mean",
)
BART = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
}
add("bart", "BartForConditionalGeneration", "BartConfig", BART, "logits", both_sides)
add("mbart", "MBartForConditionalGeneration", "MBartConfig", BART, "logits", both_sides)
add("marian", "MarianMTModel", "MarianConfig", BART, "logits", both_sides)
add("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", BART, "logits", both_sides)
add("blenderbot small", "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", BART, "logits", both_sides)
add("m2m-100", "M2M100ForConditionalGeneration", "M2M100Config", BART, "logits", both_sides)
add(
    "led",
    "LEDForConditionalGeneration",
    "LEDConfig",
    {
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 32,
        "attention_window": 4,
    },
    "logits",
    lambda: both_sides(WINDOWED, 8),
)
add(
    "prophetnet",
    "ProphetNetForConditionalGeneration",
    "ProphetNetConfig",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "encoder_ffn_dim": 48,
        "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 32,
        "num_buckets": 4,
        "relative_max_distance": 8,
        "disable_ngram_loss": True,
    },
    "logits",
    lambda: without_mask(both_sides()),
)

# Language models.
GPT = {
    "vocab_size": TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
language("gpt2", "GPT2", GPT, "LMHeadModel")
language("gpt2 eager", "GPT2", {**GPT, "attn_implementation": "eager"}, "LMHeadModel")
add("gpt2 all tokens", "GPT2LMHeadModel", "GPT2Config", GPT, "logits")
add("gpt2 classification", "GPT2ForSequenceClassification", "GPT2Config", {**GPT, "num_labels": 5}, "logits")
add("openai gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, "last")
language(
    "gpt-neo",
    "GPTNeo",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
language("gpt-neox", "GPTNeoX")
language("gpt-j", "GPTJ", {**GPT, "rotary_dim": 4})
language("gpt-bigcode", "GPTBigCode", GPT)
language("codegen", "CodeGen", {**GPT, "n_ctx": 32, "rotary_dim": 4})
language(
    "ctrl",
    "CTRL",
    {"vocab_size": TOKENS, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "LMHeadModel",
)
language(
    "opt",
    "OPT",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 16,
        "pad_token_id": 0,
    },
)
language(
    "bloom",
    "Bloom",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
language("biogpt", "BioGpt", SIZES)
language(
    "xglm",
    "XGLM",
    {
        "vocab_size": TOKENS,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    },
    double=False,  # its mask is the least number of float64 in a tensor of float32
    tolerance=1e-3,
)
language("llama", "Llama")
add("llama classification", "LlamaForSequenceClassification", "LlamaConfig", {**ROTARY, "num_labels": 5}, "logits")
add("llama all tokens", "LlamaForCausalLM", "LlamaConfig", ROTARY, "logits")
language("llama tied", "Llama", {**ROTARY, "tie_word_embeddings": True})
language("mistral", "Mistral", {**ROTARY, "sliding_window": 4})
language("ministral", "Ministral", {**ROTARY, "head_dim": 8})
MOE = {**ROTARY, "num_experts_per_tok": 2, "num_local_experts": 4}
EXPERTS = {**ROTARY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
MIXTURES = {
    "mixtral": ("Mixtral", MOE),
    "qwen2-moe": ("Qwen2Moe", SHARED),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "phimoe": ("Phimoe", MOE),
    "olmoe": ("Olmoe", {**EXPERTS, "intermediate_size": 16}),
    "gpt-oss": ("GptOss", {**MOE, "head_dim": 8, "sliding_window": 4}),
    "granitemoe": ("GraniteMoe", MOE),
    "qwen3-next": (
        "Qwen3Next",
        {
            **EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **ROTARY,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **ROTARY,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **ROTARY,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
}
# The grouped product of matrices knows no float64, and is compared in float32.
GROUPED = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3")
for name, (stem, options) in MIXTURES.items():
    language(name, stem, {**options, "experts_implementation": "eager"})
    if name in GROUPED:
        grouped = {**options, "experts_implementation": "grouped_mm"}
        language(f"{name} grouped", stem, grouped, double=False, tolerance=1e-3)
for name in GROUPED:
    stem, options = MIXTURES[name]
    language(f"{name} batched", stem, {**options, "experts_implementation": "batched_mm"})
NLLB = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_experts": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
add("nllb-moe", "NllbMoeModel", "NllbMoeConfig", NLLB, "mean", both_sides, double=False, tolerance=1e-3)
add(
    "nllb-moe, a capacity of the batch",
    "NllbMoeModel",
    "NllbMoeConfig",
    {**NLLB, "moe_eval_capacity_token_fraction": 0.1},
    "mean",
    both_sides,
    expect="tokens of all examples share the capacity of an expert",
    message="interact.*NllbMoeTop2Router.*capacity",
    ways=("fisher",),
)
language("qwen2", "Qwen2")
language("qwen3", "Qwen3", {**ROTARY, "head_dim": 8})
language("gemma", "Gemma", {**ROTARY, "head_dim": 8})
language(
    "gemma2",
    "Gemma2",
    {
        **ROTARY,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    batches=lambda: texts(((6, 4, 3), (3, 4), (4, 3))),
)
add(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    {**ROTARY, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "last",
)
language("phi", "Phi", {**ROTARY, "partial_rotary_factor": 0.5})
language("phi3", "Phi3")
language("olmo", "Olmo")
language("olmo2", "Olmo2")
language("olmo3", "Olmo3", {**ROTARY, "sliding_window": 4})
language(
    "falcon",
    "Falcon",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)
language(
    "falcon alibi",
    "Falcon",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "multi_query": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)
language(
    "mpt",
    "Mpt",
    {"vocab_size": TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32, "expansion_ratio": 2},
)
language("stablelm", "StableLm", {**ROTARY, "partial_rotary_factor": 0.5})
language("cohere", "Cohere")
language("cohere2", "Cohere2", {**ROTARY, "sliding_window": 4})
language("granite", "Granite")
language("persimmon", "Persimmon", SIZES)
language("nemotron", "Nemotron", {**ROTARY, "head_dim": 8})
language("starcoder2", "Starcoder2")
language("glm", "Glm", {**ROTARY, "head_dim": 8})
language("glm4", "Glm4", {**ROTARY, "head_dim": 8})
language("ernie4.5", "Ernie4_5", {**ROTARY, "head_dim": 8})
language("exaone4", "Exaone4", {**ROTARY, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]})
language("smollm3", "SmolLM3")
language("helium", "Helium", {**ROTARY, "head_dim": 8})
language("seed-oss", "SeedOss", {**ROTARY, "head_dim": 8})
language("arcee", "Arcee")
language("bitnet", "BitNet")
language("diffllama", "DiffLlama")
language("apertus", "Apertus")
language(
    "jetmoe",
    "JetMoe",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    },
)
MAMBA = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
language("mamba", "Mamba", MAMBA)
language("mamba2", "Mamba2", {**MAMBA, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4})
language("falcon-mamba", "FalconMamba", MAMBA)
language(
    "bamba",
    "Bamba",
    {
        **ROTARY,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
        "attn_layer_indices": [1],
    },
)
language(
    "recurrent-gemma",
    "RecurrentGemma",
    {
        **SIZES,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "head_dim": 8,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
)
add(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    {
        "vocab_size": TOKENS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "context_length": 16,
        "attention_hidden_size": 16,
        "intermediate_size": 24,
    },
    "logits",
    whole_texts,
)
language("lfm2", "Lfm2", {**ROTARY, "layer_types": ["conv", "full_attention"]})

# Images.
CLIP_TEXT = {**SIZES, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1}
add(
    "clip vision",
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    {**IMAGE, "projection_dim": 16},
    "image_embeds",
    pictures,
)
add("clip text", "CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_TEXT, "text_embeds")
add("clip text, last token", "CLIPTextModel", "CLIPTextConfig", {**CLIP_TEXT, "eos_token_id": 59}, "pooled")
add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 16}, "projection_dim": 16},
    "logits_per_image",
    pairs,
    expect="images are compared with the texts of other examples, whose network sees no example of the output's",
    message=COUPLED,
    ways=("fisher",),
)
add("siglip vision", "SiglipVisionModel", "SiglipVisionConfig", IMAGE, "pooled", pictures)
add("siglip text", "SiglipTextModel", "SiglipTextConfig", SIZES, "pooled")
add("vit", "ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 5}, "logits", pictures)
add(
    "vit eager",
    "ViTForImageClassification",
    "ViTConfig",
    {**IMAGE, "num_labels": 5, "attn_implementation": "eager"},
    "logits",
    pictures,
)
add("deit", "DeiTForImageClassification", "DeiTConfig", {**IMAGE, "num_labels": 5}, "logits", pictures)
add(
    "beit",
    "BeitForImageClassification",
    "BeitConfig",
    {**IMAGE, "num_labels": 5, "use_relative_position_bias": True},
    "logits",
    pictures,
)
add(
    "beit shared",
    "BeitForImageClassification",
    "BeitConfig",
    {**IMAGE, "num_labels": 5, "use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "logits",
    pictures,
)
add(
    "data2vec vision",
    "Data2VecVisionModel",
    "Data2VecVisionConfig",
    {**IMAGE, "use_relative_position_bias": True},
    "mean",
    pictures,
)
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
add("swin", "SwinForImageClassification", "SwinConfig", SWIN, "logits", pictures)
add("swinv2", "Swinv2ForImageClassification", "Swinv2Config", SWIN, "logits", pictures)
add(
    "convnext",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "convnextv2",
    "ConvNextV2ForImageClassification",
    "ConvNextV2Config",
    {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "dinov2",
    "Dinov2ForImageClassification",
    "Dinov2Config",
    {**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "dinov2 upsampled",
    "Dinov2Model",
    "Dinov2Config",
    {k: v for k, v in IMAGE.items() if k != "intermediate_size"},
    "mean",
    lambda: pictures(48),
)
add(
    "dinov2 swiglu",
    "Dinov2Model",
    "Dinov2Config",
    {**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, "use_swiglu_ffn": True},
    "mean",
    pictures,
)
add("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, "pooled", pictures)
add("ijepa", "IJepaModel", "IJepaConfig", IMAGE, "mean", pictures)
add(
    "sam vision encoder",
    "SamVisionModel",
    "SamVisionConfig",
    {
        "hidden_size": 32,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    },
    "mean",
    pictures,
)
add(
    "segformer",
    "SegformerForImageClassification",
    "SegformerConfig",
    {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "segformer decoder",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 3,
        "decoder_hidden_size": 8,
    },
    "logits",
    pictures,
)
add(
    "mobilevit",
    "MobileViTForImageClassification",
    "MobileViTConfig",
    {
        "image_size": 32,
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
        "num_attention_heads": 2,
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "mobilevitv2",
    "MobileViTV2ForImageClassification",
    "MobileViTV2Config",
    {
        "image_size": 64,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [32, 64, 64],
        "num_labels": 5,
    },
    "logits",
    lambda: pictures(64),
)
add(
    "poolformer",
    "PoolFormerForImageClassification",
    "PoolFormerConfig",
    {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 5},
    "logits",
    pictures,
)
add(
    "pvt",
    "PvtForImageClassification",
    "PvtConfig",
    {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "pvt-v2",
    "PvtV2ForImageClassification",
    "PvtV2Config",
    {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "levit",
    "LevitForImageClassification",
    "LevitConfig",
    {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
        "num_labels": 5,
    },
    "logits",
    lambda: pictures(64),
)
add(
    "cvt",
    "CvtForImageClassification",
    "CvtConfig",
    {
        "embed_dim": [8, 16, 16],
        "num_heads": [1, 2, 2],
        "depth": [1, 2, 3],
        "drop_path_rate": [0.0, 0.0, 0.0],
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "resnet",
    "ResNetForImageClassification",
    "ResNetConfig",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
    "logits",
    pictures,
)
add(
    "regnet",
    "RegNetForImageClassification",
    "RegNetConfig",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "bit",
    "BitForImageClassification",
    "BitConfig",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "mobilenet-v1",
    "MobileNetV1ForImageClassification",
    "MobileNetV1Config",
    {"depth_multiplier": 0.25, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "mobilenet-v2",
    "MobileNetV2ForImageClassification",
    "MobileNetV2Config",
    {"depth_multiplier": 0.25, "num_labels": 5},
    "logits",
    pictures,
)
add(
    "focalnet",
    "FocalNetForImageClassification",
    "FocalNetConfig",
    {
        "image_size": 32,
        "embed_dim": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "hiera",
    "HieraForImageClassification",
    "HieraConfig",
    {
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True, False],
        "num_query_pool": 1,
        "num_labels": 5,
    },
    "logits",
    pictures,
)
add(
    "swiftformer",
    "SwiftFormerForImageClassification",
    "SwiftFormerConfig",
    {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "num_labels": 5},
    "logits",
    pictures,
)
add(
    "efficientnet",
    "EfficientNetForImageClassification",
    "EfficientNetConfig",
    {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "num_labels": 5},
    "logits",
    pictures,
)
add("vit-msn", "ViTMSNModel", "ViTMSNConfig", IMAGE, "mean", pictures)
add(
    "vit-mae",
    "ViTMAEModel",
    "ViTMAEConfig",
    {**IMAGE, "mask_ratio": 0.5},
    "mean",
    pictures,
    expect="the patches that are left out are drawn at random for each example of each forward pass",
    message=RANDOM,
    ways=("fisher",),
)
add(
    "yolos",
    "YolosModel",
    "YolosConfig",
    {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 3},
    "pooled",
    pictures,
)
add(
    "dpt",
    "DPTModel",
    "DPTConfig",
    {**IMAGE, "is_hybrid": False, "backbone_out_indices": [0, 0, 1, 1]},
    "mean",
    pictures,
)
add(
    "perceiver",
    "PerceiverForSequenceClassification",
    "PerceiverConfig",
    {
        "vocab_size": TOKENS,
        "d_model": 16,
        "d_latents": 16,
        "num_latents": 4,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "max_position_embeddings": 8,
        "num_labels": 5,
    },
    "logits",
    lambda: [{"inputs": b["input_ids"], "attention_mask": b["attention_mask"]} for b in texts()],
)
add(
    "imagegpt",
    "ImageGPTForImageClassification",
    "ImageGPTConfig",
    {**GPT, "vocab_size": TOKENS + 1, "num_labels": 5},
    "logits",
    whole_texts,
)
add("vilt", "ViltModel", "ViltConfig", {**SIZES, **IMAGE}, "pooled", pairs)
add("clipseg vision", "CLIPSegVisionModel", "CLIPSegVisionConfig", IMAGE, "pooled", pictures)
add("flava image", "FlavaImageModel", "FlavaImageConfig", IMAGE, "pooled", pictures)
add("blip vision", "BlipVisionModel", "BlipVisionConfig", IMAGE, "pooled", pictures)

# Videos.
VIDEO = {**IMAGE, "image_size": 16, "num_frames": 2}
add(
    "timesformer",
    "TimesformerForVideoClassification",
    "TimesformerConfig",
    {**VIDEO, "num_labels": 5},
    "logits",
    videos,
)
add(
    "timesformer joint",
    "TimesformerForVideoClassification",
    "TimesformerConfig",
    {**VIDEO, "num_labels": 5, "attention_type": "joint_space_time"},
    "logits",
    videos,
)
add(
    "videomae",
    "VideoMAEForVideoClassification",
    "VideoMAEConfig",
    {**VIDEO, "tubelet_size": 2, "num_labels": 5},
    "logits",
    videos,
)
add(
    "vivit",
    "VivitForVideoClassification",
    "VivitConfig",
    {**VIDEO, "tubelet_size": [2, 8, 8], "num_labels": 5},
    "logits",
    videos,
)

# Sounds.
WAVE = {
    **SIZES,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "classifier_proj_size": 8,
    "num_labels": 5,
}
add("wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAVE, "logits", waves)
add(
    "wav2vec2 stable",
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2Config",
    {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "logits",
    waves,
)
add("hubert", "HubertForSequenceClassification", "HubertConfig", WAVE, "logits", waves)
add(
    "wavlm",
    "WavLMForSequenceClassification",
    "WavLMConfig",
    {**WAVE, "num_buckets": 4, "max_bucket_distance": 8},
    "logits",
    waves,
)
add("unispeech", "UniSpeechForSequenceClassification", "UniSpeechConfig", WAVE, "logits", waves)
add(
    "data2vec audio",
    "Data2VecAudioForSequenceClassification",
    "Data2VecAudioConfig",
    {**WAVE, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "logits",
    waves,
)
add("sew", "SEWForSequenceClassification", "SEWConfig", {**WAVE, "squeeze_factor": 1}, "logits", waves)
add(
    "whisper encoder",
    "WhisperModel",
    "WhisperConfig",
    {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8},
    "mean",
    lambda: named("input_features", [torch.randn(n, 8, 16) for n in (3, 2)]),
    parts="encoder",
)
add(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8},
    "logits",
    lambda: [
        {"input_features": torch.randn(n, 8, 16), "decoder_input_ids": torch.randint(5, TOKENS, (n, 4))} for n in (3, 2)
    ],
)
add(
    "speech-to-text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    {
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        "input_feat_per_channel": 8,
        "conv_channels": 8,
        "max_source_positions": 32,
        "max_target_positions": 32,
    },
    "logits",
    lambda: [
        {"input_features": torch.randn(n, 16, 8), "decoder_input_ids": torch.randint(5, TOKENS, (n, 4))} for n in (3, 2)
    ],
)
add(
    "ast",
    "ASTForAudioClassification",
    "ASTConfig",
    {
        **{k: v for k, v in IMAGE.items() if k != "image_size"},
        "max_length": 16,
        "num_mel_bins": 16,
        "frequency_stride": 4,
        "time_stride": 4,
        "num_labels": 5,
    },
    "logits",
    lambda: named("input_values", [torch.randn(n, 16, 16) for n in (3, 2)]),
)
add(
    "moonshine encoder",
    "MoonshineModel",
    "MoonshineConfig",
    {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "mean",
    lambda: named("input_values", [torch.randn(n, 4000) for n in (3, 2)]),
    parts="encoder",
)

# Series and trajectories.
add(
    "patchtst",
    "PatchTSTForClassification",
    "PatchTSTConfig",
    {
        "num_input_channels": 2,
        "context_length": 16,
        "patch_length": 4,
        "patch_stride": 4,
        "d_model": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "num_targets": 3,
        "use_cls_token": True,
        "norm_type": "layernorm",
    },
    "prediction_logits",
    lambda: named("past_values", [torch.randn(n, 16, 2) for n in (3, 2)]),
)
add(
    "patchtsmixer",
    "PatchTSMixerForTimeSeriesClassification",
    "PatchTSMixerConfig",
    {
        "num_input_channels": 2,
        "context_length": 16,
        "patch_length": 4,
        "patch_stride": 4,
        "d_model": 8,
        "num_layers": 2,
        "num_targets": 3,
    },
    "prediction_outputs",
    lambda: named("past_values", [torch.randn(n, 16, 2) for n in (3, 2)]),
)
