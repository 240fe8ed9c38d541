"""The Fisher of PEFT's own adapters, also on bases that bitsandbytes and torchao quantised.

The many kinds of adapters are cases of the coverage study (bench/coverage_cases/peft_cases.py). Here are the kinds that
are used most, and what a case of one network and one call does not show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn

from bench.coverage_cases import cases, judge
from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher
from t2v_fast.gradients.ownership import nodes_of

transformers = pytest.importorskip("transformers", reason="the base models are its own")
peft = pytest.importorskip("peft", reason="the adapters are its own")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

OFTEN = (
    "LoRA, gpt2",
    "LoRA of embeddings, llama",
    "LoRA of a convolution, vit",
    "LoRA with modules to save, llama",
    "LoRA with dropout, in evaluation mode, llama",
    "rsLoRA, llama",
    "DoRA, llama",
    "DoRA of a convolution, vit",
    "LoRA and DoRA at once, llama",
    "IA3, llama",
    "VeRA, llama",
    "AdaLoRA, llama",
    "LoHa, llama",
    "LoKr, llama",
    "prompt tuning, llama",
    "prefix tuning, gpt2",
    "trainable tokens, llama",
    "a batch of two LoRAs and none, llama",
    "a batch of two LoRAs and none, a convolution, vit",
    "a batch of two LoRAs with a head each, bert",
    "Lily, llama",
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit weights are packed in blocks of 64
VOCABULARY = 16
LAST = 5


@pytest.mark.parametrize("name", OFTEN)
def test_adapters_that_are_used_most(name: str) -> None:
    (case,) = [case for case in cases(["peft"]) if case.name == name]
    verdict = judge.judge(case)
    good = (judge.AGREES, judge.BY_REQUEST) if case.expect == "exact" else (judge.REFUSED,)
    assert verdict.verdict in good, verdict.reason
    assert not verdict.without


class Scored(nn.Module):
    """A language model, from tokens and names of adapters to the logits of the last token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        names = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
        return self.network(input_ids=tokens, **names).logits[:, -1]


def llama(quantise: Callable[[nn.Module], None] | None = None, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**WIDE, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, attention_bias=True, **sizes
    )
    model = transformers.LlamaForCausalLM(config)
    if quantise is not None:
        quantise(model)
    return model


def adapted(base: nn.Module, *configs: Any) -> Scored:
    """A model with adapters "0", "1", ... of fixed random weights."""
    model = peft.get_peft_model(base, configs[0], adapter_name="0")
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(str(k), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return Scored(model).eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "up_proj"], **options})


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (n, 6), generator=generator) for n in (2, 5, 1)]


def truth(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], names: Sequence[str]) -> dict[str, Tensor]:
    """The Fisher, by plain autograd of one example after the other."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name].requires_grad_(True) for name in names]
    total = {name: torch.zeros(parameters[name].shape, dtype=torch.float64) for name in names}
    for one in inputs:
        z = model(*one)
        p = z.detach().softmax(1)
        for c in range(z.shape[1]):
            u = p[:, c].sqrt() * (torch.eye(z.shape[1], dtype=p.dtype)[c] - p)
            if z.requires_grad:
                gradients = torch.autograd.grad(
                    z, wanted, u, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for name, g in zip(names, gradients, strict=True):
                    total[name] += g.double().square()
    return {name: t / len(inputs) for name, t in total.items()}


def largest_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(relative_error(got[name], want[name]) for name in want)


EXACT = {"estimator": "exact", "granularity": "parameter", "parameters": "trainable"}


# ---- adapters that change


def test_adapters_of_each_example_are_named_in_a_list() -> None:
    """``adapter_names`` is no tensor, so that a part of a batch is run with copies of examples in the other rows."""
    model = adapted(llama(), lora(), lora(r=3, target_modules=["v_proj", "up_proj"])).double()
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    names = [["0", "1"], ["1", "__base__", "0", "0", "1"], ["1"]]
    loader = [{"tokens": x, "adapter_names": who} for x, who in zip(batches(), names, strict=True)]
    found = fisher(model, loader, **EXACT)
    each = [(x[n : n + 1], who[n : n + 1]) for x, who in zip(batches(), names, strict=True) for n in range(len(x))]
    assert len(found) == 16
    assert largest_error(found, truth(copy.deepcopy(model), each, list(found))) < 1e-6  # norms compute in float32


def test_mixed_batches_of_dora_are_refused_by_peft() -> None:
    model = adapted(llama(), lora(use_dora=True), lora(use_dora=True))
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when DoRA is enabled"):
        fisher(model, [{"tokens": batches()[0], "adapter_names": ["0", "1"]}], parameters="trainable")


def test_a_network_whose_adapter_changes_between_calls() -> None:
    """The self-check remembers a network. It must not take one adapter for the other."""
    model = adapted(llama(), lora(), lora()).double()
    each = [(x[n : n + 1],) for x in batches() for n in range(len(x))]
    for active in ("0", "1", "0"):
        model.network.set_adapter(active)
        found = fisher(model, batches(), **EXACT)
        assert {name.split(".")[-2] for name in found} == {active}
        assert largest_error(found, truth(copy.deepcopy(model), each, list(found))) < 1e-6
    model.network.merge_adapter(["0"])
    merged = fisher(
        model, batches(), "exact", granularity="parameter", parameters=["network.base_model.model.lm_head.weight"]
    )
    model.network.unmerge_adapter()
    with model.network.disable_adapter():
        base = fisher(model, batches(), "exact", granularity="parameter", parameters=list(merged))
    active = fisher(model, batches(), "exact", granularity="parameter", parameters=list(merged))
    assert largest_error(merged, active) < 1e-6 < 1e-3 < largest_error(base, active)


def test_merged_adapters_are_refused() -> None:
    """The output of a merged network does not depend on the adapter's parameters."""
    model = adapted(llama(), lora(modules_to_save=["lm_head"]))
    model.network.merge_adapter()
    names = [name for name, p in model.named_parameters() if "lora" in name and p.requires_grad]
    with pytest.raises(UnsupportedError, match="the output depends on none of the wanted parameters"):
        fisher(model, batches(), parameters=names)
    with FisherRecorder(model, "trainable") as recorder:
        found = recorder.backward(model(batches()[0]), torch.randn(2, VOCABULARY))
    assert recorder.unused == set(names)  # where others are wanted too, these are named, and have zeros
    assert not any(found[name].any() for name in names)


def test_dropout_in_training_mode_is_refused_by_name() -> None:
    model = adapted(llama(), lora(lora_dropout=0.3)).train()
    named = r"lora_dropout.*' \(Dropout, p=0.3\) is in training mode"
    with pytest.raises(SelfCheckError, match=named):
        fisher(model, batches(), parameters="trainable")
    with FisherRecorder(model, "trainable") as recorder, pytest.raises(UnsupportedError, match=named):
        recorder.backward(model(batches()[0]), torch.randn(2, VOCABULARY))


def test_the_regulariser_of_adalora_is_no_part_of_the_likelihood() -> None:
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=9, target_modules=["q_proj"])
    model = adapted(llama(), config).double()
    with pytest.raises(UnsupportedError, match=r"lora_E.0'.* is transformed before use"):
        fisher(model, batches(), **EXACT)
    found = fisher(model, batches(), **EXACT, unsupported="exact")
    model.network.peft_config["0"].orth_reg_weight = 100.0
    model.network.base_model.trainable_adapter_name = "0"
    assert fisher(model, batches(), **EXACT, unsupported="exact").vector().equal(found.vector())
    each = [(x[n : n + 1],) for x in batches() for n in range(len(x))]
    assert largest_error(found, truth(copy.deepcopy(model), each, list(found))) < 1e-6


def test_adapters_of_the_upper_layers_shorten_the_graph() -> None:
    sizes = []
    for layers in ([0, 1, 2, 3], [3]):
        model = adapted(llama(layers=4), lora(layers_to_transform=layers))
        with FisherRecorder(model, "trainable") as recorder:
            output = model(batches()[1])
            recorder.check(output)
            sizes.append(sum(node.name().startswith("Mm") for node in nodes_of(output)))
    assert sizes[1] < sizes[0] / 3


# ---- quantised bases


def replace_layers(model: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, made(layer))


def four_bit(kind: str, twice: bool = False) -> Callable[[nn.Module], None]:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantised layers are its own")

    def made(layer: nn.Linear) -> nn.Module:
        weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=twice
        )
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type=kind
        )
        quantised.weight = weight
        quantised.bias = layer.bias
        return quantised.to("cpu")

    def quantise(model: nn.Module) -> None:
        replace_layers(model, made)
        model.is_loaded_in_4bit = True  # PEFT asks

    return quantise


def eight_bit(threshold: float = 0.0) -> Callable[[nn.Module], None]:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantised layers are its own")

    def made(layer: nn.Linear) -> nn.Module:
        quantised = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, threshold=threshold
        )
        quantised.bias = layer.bias
        quantised.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        return quantised.to("cpu")

    def quantise(model: nn.Module) -> None:
        replace_layers(model, made)
        model.is_loaded_in_8bit = True

    return quantise


def dequantised(model: nn.Module) -> nn.Module:
    """A copy in float64 with ordinary layers of the same weights in place of the 4-bit ones."""
    import bitsandbytes

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.bias = layer.bias
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.weight = nn.Parameter(weight)
            model.set_submodule(name, plain)
    return model.double()


VERA = {"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
IA3 = {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("adapter", "kind", "twice"),
    [
        ("LoRA", "nf4", False),
        ("LoRA", "fp4", False),
        ("LoRA", "nf4", True),
        ("LoRA and biases", "nf4", False),
        ("DoRA", "nf4", True),
        ("IA3", "nf4", False),
        ("VeRA", "nf4", False),
    ],
)
def test_adapters_of_4_bit_bases(adapter: str, kind: str, twice: bool) -> None:
    """Against a network in float64 with the same weights, also after an evaluation without gradients."""
    config = {
        "LoRA": lambda: lora(),
        "LoRA and biases": lambda: lora(bias="all"),
        "DoRA": lambda: lora(use_dora=True),
        "IA3": lambda: peft.IA3Config(**IA3),
        "VeRA": lambda: peft.VeraConfig(**VERA),
    }[adapter]()
    model = adapted(llama(four_bit(kind, twice)), config)
    each = [(x[n : n + 1],) for x in batches() for n in range(len(x))]
    for _ in range(2):
        found = fisher(model, batches(), **EXACT)
        plain = dequantised(model)
        # PEFT's IA3 of a 4-bit layer casts to float32.
        want = truth(plain.float() if adapter == "IA3" else plain, each, list(found))
        assert all(q.any() for q in want.values())
        assert largest_error(found, want) < 1e-4
        # On some CPUs, bitsandbytes packs the weights in an evaluation, for a kernel that has no derivative. It also
        # rounds their scales, so that the network is another one from now on.
        with torch.no_grad():
            model(batches()[0])
        with FisherRecorder(model, "trainable"):
            pass  # unpacks the weights


def test_packed_4_bit_weights_are_unpacked_without_loss() -> None:
    model = adapted(llama(four_bit("nf4")), lora())
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "in_features")]
    if not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in layers):
        pytest.skip("bitsandbytes packs weights only on CPUs with AVX-512 and bfloat16")
    layers = [m for m in layers if getattr(m, "support_avx512bf16_for_cpu", False)]
    before = [m.weight.data.clone() for m in layers]
    with torch.no_grad():
        model(batches()[0])
    assert all(m.weight.quant_state.packing_format_for_cpu for m in layers)
    with FisherRecorder(model, "trainable"):
        assert all(torch.equal(m.weight.data, w) for m, w in zip(layers, before, strict=True))
        assert not any(m.support_avx512bf16_for_cpu for m in layers)
    assert all(m.support_avx512bf16_for_cpu for m in layers)
    assert model(batches()[0]).requires_grad


@pytest.mark.parametrize("adapter", ["LoRA", "LoRA and biases", "VeRA"])
def test_adapters_of_8_bit_bases(adapter: str) -> None:
    """The layers round activations to 8 bits, and pass gradients on as if they did not: torch says which gradients."""
    config = {
        "LoRA": lambda: lora(),
        "LoRA and biases": lambda: lora(bias="all"),
        "VeRA": lambda: peft.VeraConfig(**VERA),
    }[adapter]()
    model = adapted(llama(eight_bit()), config)
    found = fisher(model, batches(), **EXACT)
    want = truth(model, [(x[n : n + 1],) for x in batches() for n in range(len(x))], list(found))
    assert all(q.any() for q in want.values())
    assert largest_error(found, want) < 1e-4


def test_outliers_of_8_bit_layers_make_examples_interact() -> None:
    """A threshold lets layers look for columns with large activations in the whole batch."""
    with pytest.raises(SelfCheckError, match="examples interact"):
        fisher(adapted(llama(eight_bit(threshold=0.5)), lora()), batches(), parameters="trainable")
    far = fisher(adapted(llama(eight_bit(threshold=100.0)), lora()), batches(), parameters="trainable")
    without = fisher(adapted(llama(eight_bit()), lora()), batches(), parameters="trainable")
    assert torch.allclose(far.vector(), without.vector(), rtol=1e-4)


def test_a_checkpoint_that_transformers_quantises(tmp_path: Path) -> None:
    """As users come by a quantised base, prepared for training, which lets the embeddings require gradients."""
    pytest.importorskip("bitsandbytes", reason="the quantised layers are its own")
    llama().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = adapted(peft.prepare_model_for_kbit_training(base), lora())
    found = fisher(model, batches(), **EXACT)
    each = [(x[n : n + 1],) for x in batches() for n in range(len(x))]
    assert len(found) == 8
    assert largest_error(found, truth(dequantised(model), each, list(found))) < 1e-4


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_lora_of_bases_of_torchao(kind: str) -> None:
    """Against a network in float64 with the same weights. The quantised weights themselves are never wanted."""
    quantization = pytest.importorskip("torchao.quantization", reason="the quantised weights are its own")

    def quantise(model: nn.Module) -> None:
        def chosen(layer: nn.Module, name: str) -> bool:
            return type(layer) is nn.Linear and name != "lm_head"

        options = {"weight_dtype": torch.int4} if kind.startswith("Intx") else {}
        quantization.quantize_(model, getattr(quantization, kind)(**options), filter_fn=chosen)

    model = adapted(llama(quantise), lora())
    plain = adapted(llama(), lora())
    with torch.no_grad():
        for to, of in zip(plain.parameters(), model.parameters(), strict=True):
            to.copy_(of if type(of) is nn.Parameter else of.dequantize())
    found = fisher(model, batches(), **EXACT)
    each = [(x[n : n + 1],) for x in batches() for n in range(len(x))]
    assert largest_error(found, truth(plain.double(), each, list(found))) < 1e-4
    everything = fisher(model, batches())
    assert "network.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" not in everything
    assert "network.base_model.model.model.norm.weight" in everything
