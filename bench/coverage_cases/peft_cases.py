"""Adapters of PEFT on tiny networks of transformers: the trainable parameters, and in some cases all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import COUPLED, EXACT, Case, Inputs, Made
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
OFTEN = list(range(5, 35))  # tokens, some of which are in each text
add("LoRA", "LoraConfig", RANK)
add("LoRA", "LoraConfig", RANK, "gpt2")
add("LoRA", "LoraConfig", RANK, "bert")
add("LoRA", "LoraConfig", RANK, "vit")
add("LoRA and all other weights", "LoraConfig", RANK, trainable=False)
add("LoRA and all other weights", "LoraConfig", RANK, "bert", trainable=False)
add("LoRA with a bias", "LoraConfig", {**RANK, "bias": "lora_only"}, "bert")
add("LoRA with modules to save", "LoraConfig", {**RANK, "modules_to_save": ["lm_head"]})
add("LoRA of embeddings", "LoraConfig", {**RANK, "target_modules": ["embed_tokens", "q_proj"]})
add("LoRA of the head, tokens trained too", "LoraConfig", {**RANK, "trainable_token_indices": OFTEN})
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
add("trainable tokens", "TrainableTokensConfig", {"token_indices": OFTEN, "target_modules": ["embed_tokens"]})
add("adaption prompts", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}, targeted=False)

HOOKED = "hook on its gradient"  # which the adapter itself sets

add("LoRA with biases of its own", "LoraConfig", {**RANK, "lora_bias": True})
add("LoRA with dropout, in evaluation mode", "LoraConfig", {**RANK, "lora_dropout": 0.3})
add("LoRA of the upper layer", "LoraConfig", {**RANK, "layers_to_transform": [1]})
add("LoRA of layers that are used twice", "LoraConfig", {**RANK, "layer_replication": [[0, 2], [1, 2]]})
add("LoRA with a token table to save", "LoraConfig", {**RANK, "modules_to_save": ["embed_tokens", "lm_head"]})
add("LoRA with a tied token table to save", "LoraConfig", {**RANK, "modules_to_save": ["wte"]}, "gpt2")
add("LoRA of a tied token table", "LoraConfig", {**RANK, "target_modules": ["wte", "c_attn"]}, "gpt2")
add("LoRA, tokens of a tied table trained too", "LoraConfig", {**RANK, "trainable_token_indices": OFTEN}, "gpt2")
add("DoRA", "LoraConfig", {**RANK, "use_dora": True}, "gpt2")
add(
    "DoRA of a convolution", "LoraConfig", {**RANK, "use_dora": True, "target_modules": ["projection", "q_proj"]}, "vit"
)
add("DoRA of embeddings", "LoraConfig", {**RANK, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]})
add("IA3", "IA3Config", {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}, "vit")
add("IA3 of a convolution", "IA3Config", {"target_modules": ["projection"], "feedforward_modules": []}, "vit")
add("VeRA", "VeraConfig", {"r": 4, "target_modules": ["c_attn"]}, "gpt2")
add("VeRA", "VeraConfig", {"r": 4, "target_modules": ["query", "value"]}, "bert")
add("PVeRA", "PveraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]})
add("HiRA", "HiraConfig", {"r": 2})
add("BEFT", "BeftConfig")
add("GLoRA", "GloraConfig", {"r": 2})
add("Uni-LoRA", "UniLoraConfig")
add("GraLoRA", "GraloraConfig", {"r": 4})
add("TinyLoRA", "TinyLoraConfig")
add("PSOFT", "PsoftConfig", {"r": 2})
add("PEANuT", "PeanutConfig")
add("DEFT", "DeftConfig")
add("cartridge", "CartridgeConfig", {"num_virtual_tokens": 3}, targeted=False)
add("OSF", "OSFConfig", may_refuse=HOOKED)
add(
    "context-aware prompt tuning",
    "CPTConfig",
    {"cpt_token_ids": [6, 7, 8], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    targeted=False,
    may_refuse=HOOKED,
)
add("Lily", "LilyConfig", {"r": 2}, expect="its routers average over the tokens of the batch", message=COUPLED)


# ---- several adapters, in one network or in one batch


def lora(**options: Any) -> Any:
    import peft

    return peft.LoraConfig(**{**RANK, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options})


def adapted(network: str, *configs: Callable[[], Any], prepare: Callable[[nn.Module], None] | None = None) -> Made:
    """A network with adapters of the names "0", "1", ..., whose parameters are all trainable."""
    import peft

    inner, batches = base(network)
    model = peft.get_peft_model(inner, configs[0](), adapter_name="0")
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(str(k), config())
    if prepare is not None:
        prepare(model)
    return Adapted(model), batches()


class Mixed(Adapted):
    """A network whose examples use adapters of their own: ``which`` [N] has the number of each one's; -1 is none."""

    def forward(self, which: Tensor, **inputs: Tensor) -> Tensor:
        return super().forward(**inputs, adapter_names=[str(int(k)) if k >= 0 else "__base__" for k in which])


def mixed(network: str, *configs: Callable[[], Any]) -> Callable[[], Made]:
    def make() -> Made:
        model, batches = adapted(network, *configs)
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name or "modules_to_save" in name)
        for batch, which in zip(batches, ([0, 1, -1], [1, 0], [1, -1]), strict=False):
            batch["which"] = torch.tensor(which)
        return Mixed(model.network), batches

    return make


def several(name: str, make: Callable[[], Made], **more: Any) -> None:
    CASES.append(Case(KIND, name, make, trainable=True, **more))


several(
    "a batch of two LoRAs and none, llama",
    mixed("llama", lora, lambda: lora(r=3, target_modules=["v_proj", "up_proj"])),
)
several(
    "a batch of two LoRAs and none, embeddings, llama",
    mixed("llama", lambda: lora(target_modules=["embed_tokens"]), lambda: lora(r=3, target_modules=["embed_tokens"])),
)
several(
    "a batch of two LoRAs and none, gpt2",
    mixed("gpt2", lambda: lora(target_modules=["c_attn"]), lambda: lora(r=3, target_modules=["c_fc"])),
)
several(
    "a batch of two LoRAs and none, a convolution, vit",
    mixed(
        "vit",
        lambda: lora(task_type=None, target_modules=["projection"]),
        lambda: lora(r=3, task_type=None, target_modules=["projection", "fc1"]),
    ),
)
several(
    "a batch of two LoRAs with a head each, bert",
    mixed("bert", *[lambda: lora(task_type="SEQ_CLS", target_modules=["query", "value"])] * 2),
)
several(
    "LoRA and DoRA at once, llama",
    lambda: adapted(
        "llama", lora, lambda: lora(r=3, use_dora=True), prepare=lambda model: model.base_model.set_adapter(["0", "1"])
    ),
)
several(
    "two LoRAs joined, llama",
    lambda: adapted(
        "llama",
        lora,
        lambda: lora(r=3),
        prepare=lambda model: (
            model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "both", combination_type="cat"),
            model.set_adapter("both"),
        ),
    ),
)
several(
    "LoRA merged, with a module to save, llama",
    lambda: adapted("llama", lambda: lora(modules_to_save=["lm_head"]), prepare=lambda model: model.merge_adapter()),
)
several(
    "LoRA below inputs that require gradients, llama",
    lambda: adapted("llama", lora, prepare=lambda model: model.enable_input_require_grads()),
)


def invoked() -> Made:
    """Activated LoRA acts from a given token on, at another place in each text."""
    model, batches = adapted("llama", lambda: lora(alora_invocation_tokens=[7]))
    for batch in batches:
        tokens = batch["input_ids"]
        tokens[tokens == 7] = 8
        tokens[0, 1] = tokens[1, 0] = 7
    return model, batches


several("activated LoRA, llama", invoked)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head(self.attention(h, h, h)[0].mean(1))


def attention() -> Made:
    import peft

    config = peft.LoraConfig(**RANK, target_modules=["attention", "inner"])
    return peft.get_peft_model(Attends(), config), [torch.randn(3, 5, 6), torch.randn(2, 5, 6)]


several("LoRA of torch's attention", attention)


def experts(**options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import peft
        import transformers

        sizes = {**ROTARY, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
        inner = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
        return Adapted(peft.get_peft_model(inner, lora(**options))), texts()

    return make


several("LoRA of a router, mixtral", experts(target_modules=["q_proj", "gate"]))
several(
    "LoRA of the parameters of experts, mixtral",
    experts(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
)
