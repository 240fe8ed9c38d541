"""Adapters of PEFT on tiny networks of transformers: the trainable parameters, and in some cases all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import EXACT, Case, Inputs, Made
from .transformers_cases import GPT, IMAGE, ROTARY, SIZES, pictures, texts

KIND = "peft"


class Adapted(nn.Module):
    """A network with adapters, from its inputs to the logits of the last token that is no padding, or of the image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        logits = self.network(**inputs).logits
        if logits.dim() == 2:
            return logits
        mask = inputs["attention_mask"]
        logits = logits[:, -mask.shape[1] :]  # prompts come first
        return logits[torch.arange(len(mask)), mask.sum(1) - 1]


def base(name: str) -> tuple[nn.Module, Callable[[], list[Inputs]]]:
    import transformers

    if name == "gpt2":
        network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT))
    elif name == "llama":
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY))
    elif name == "bert":
        network = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=4))
    elif name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=4)), pictures
    else:
        raise ValueError(f"unknown network {name!r}")
    return network, texts


TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "vit": ["q_proj", "v_proj", "fc1"],
}
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}


def build(network: str, config: str, options: dict[str, Any], targeted: bool = True) -> Callable[[], Made]:
    def make() -> Made:
        import peft

        inner, batches = base(network)
        settings = {"task_type": TASKS[network], **options}
        if targeted:
            settings.setdefault("target_modules", TARGETS[network])
        adapted = peft.get_peft_model(inner, getattr(peft, config)(**settings))
        return Adapted(adapted), batches()

    return make


CASES: list[Case] = []


def add(
    name: str, config: str, options: dict[str, Any] | None = None, network: str = "llama", *, targeted: bool = True,
    expect: str = EXACT, trainable: bool = True, **more: Any,
) -> None:  # fmt: skip
    make = build(network, config, options or {}, targeted)
    CASES.append(Case(KIND, f"{name}, {network}", make, expect, trainable=trainable, **more))


RANK = {"r": 2, "lora_alpha": 4}
add("LoRA", "LoraConfig", RANK)
add("LoRA", "LoraConfig", RANK, "gpt2")
add("LoRA", "LoraConfig", RANK, "bert")
add("LoRA", "LoraConfig", RANK, "vit")
add("LoRA and all other weights", "LoraConfig", RANK, trainable=False)
add("LoRA and all other weights", "LoraConfig", RANK, "bert", trainable=False)
add("LoRA with a bias", "LoraConfig", {**RANK, "bias": "lora_only"}, "bert")
add("LoRA with modules to save", "LoraConfig", {**RANK, "modules_to_save": ["lm_head"]})
add("LoRA of embeddings", "LoraConfig", {**RANK, "target_modules": ["embed_tokens", "q_proj"]})
add("LoRA of the head, tokens trained too", "LoraConfig", {**RANK, "trainable_token_indices": [6, 7]})
add("LoRA of a convolution", "LoraConfig", {**RANK, "target_modules": ["projection", "q_proj"]}, "vit")
add("rsLoRA", "LoraConfig", {**RANK, "use_rslora": True})
add("rsLoRA", "LoraConfig", {**RANK, "use_rslora": True}, "gpt2")
add("DoRA", "LoraConfig", {**RANK, "use_dora": True})
add("DoRA", "LoraConfig", {**RANK, "use_dora": True}, "vit")
add("PiSSA", "LoraConfig", {**RANK, "init_lora_weights": "pissa"})
add("OLoRA", "LoraConfig", {**RANK, "init_lora_weights": "olora"})
add("AdaLoRA", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10})
add("AdaLoRA", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}, "bert")
add("IA3", "IA3Config", {"feedforward_modules": ["up_proj"]})
add("IA3", "IA3Config", {"feedforward_modules": ["c_fc"]}, "gpt2")
add("IA3", "IA3Config", {"feedforward_modules": ["intermediate.dense"]}, "bert")
add("VeRA", "VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]})
add("LoHa", "LoHaConfig", {"r": 2, "alpha": 4})
add("LoHa", "LoHaConfig", {"r": 2, "alpha": 4}, "vit")
add("LoKr", "LoKrConfig", {"r": 2, "alpha": 4})
add("LoKr", "LoKrConfig", {"r": 2, "alpha": 4}, "bert")
add("OFT", "OFTConfig", {"oft_block_size": 4})
add("OFT", "OFTConfig", {"oft_block_size": 4}, "bert")
add("BOFT", "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1})
add("prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 3}, targeted=False)
add("prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 3}, "gpt2", targeted=False)
add("prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 3}, "bert", targeted=False)
add("prefix tuning", "PrefixTuningConfig", {"num_virtual_tokens": 3}, targeted=False)
add("prefix tuning", "PrefixTuningConfig", {"num_virtual_tokens": 3}, "gpt2", targeted=False)
add(
    "prefix tuning with a projection",
    "PrefixTuningConfig",
    {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    "gpt2",
    targeted=False,
)
add("p-tuning", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, targeted=False)
add("p-tuning", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, "bert", targeted=False)
add(
    "p-tuning by an LSTM",
    "PromptEncoderConfig",
    {
        "num_virtual_tokens": 3,
        "encoder_hidden_size": 8,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 1,
    },
    "gpt2",
    targeted=False,
)
add("layer norm tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]})
add("layer norm tuning", "LNTuningConfig", {"target_modules": ["ln_1", "ln_2"]}, "gpt2")
add("FourierFT", "FourierFTConfig", {"n_frequency": 10})
add("HRA", "HRAConfig", {"r": 2})
add("VB-LoRA", "VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 8, "topk": 2})
add("RandLoRA", "RandLoraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]})
add("RoAd", "RoadConfig", {"group_size": 4, "target_modules": ["q_proj", "v_proj"]})
add("MiSS", "MissConfig", {"r": 2})
add("C3A", "C3AConfig", {"block_size": 4})
add("WaveFT", "WaveFTConfig", {"n_frequency": 10})
add("SHiRA", "ShiraConfig", {"r": 2})
add("DeLoRA", "DeloraConfig", {"r": 2})
add("trainable tokens", "TrainableTokensConfig", {"token_indices": [6, 7, 8], "target_modules": ["embed_tokens"]})
add("adaption prompts", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}, targeted=False)
