"""Scores of modules, ranks within a budget, and PEFT itself, which gives its adapters these ranks."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from oracle import per_example_squares
from torch import nn

from t2v_fast.adapters.peft import module_scores, rank_pattern

transformers = pytest.importorskip("transformers", reason="the base models are its own")
VOCABULARY = 16
TOKENS = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": TOKENS[:2], "labels": TOKENS[:2]}, {"input_ids": TOKENS[2:], "labels": TOKENS[2:]}]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **sizes
    )
    return transformers.LlamaForCausalLM(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double()


def test_scores_are_mean_fishers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[0].requires_grad_(False)
    x = torch.randn(6, 4).double()
    p = model(x).detach().softmax(1)
    u = p.sqrt().T[:, :, None] * (torch.eye(3).double()[:, None] - p)  # [K, N, C]
    squares = per_example_squares(model, x, u)
    want = {name: float(squares[f"{name}.weight"].mean()) for name in ("0", "2")}
    model.train()
    assert module_scores(model, x.split(4), ["2", "0"], estimator="exact") == pytest.approx(want, rel=1e-10)
    assert list(module_scores(model, x.split(4))) == ["0", "2", "4"]
    assert list(module_scores(model, x.split(4), "[02]")) == ["0", "2"]
    assert model.training
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("labels", [False, True])
def test_batches_as_tokenizers_make_them(labels: bool) -> None:
    """In their own mapping, from a generator, for a frozen model whose device is a name."""
    model, names = llama(), ["q_proj", "down_proj"]
    batches = [{key: t for key, t in batch.items() if labels or key != "labels"} for batch in BATCHES]
    want = module_scores(model, batches, names)
    found = module_scores(
        model.requires_grad_(False), (transformers.BatchEncoding(batch) for batch in batches), names, device="cpu"
    )
    assert found == want
    assert min(found.values()) > 0
    half = module_scores(model.bfloat16(), batches, names)
    assert half == pytest.approx(want, rel=0.1)
    with pytest.raises(ValueError, match="the loader gave no example"):
        module_scores(model, iter([]), names)


def test_targets_are_pefts() -> None:
    """all-linear, ends of names and regular expressions choose the modules that PEFT adapts."""
    peft = pytest.importorskip("peft", reason="compares with it")
    for base in (llama(), gpt2()):
        for targets in ("all-linear", ["q_proj", "down_proj", "c_attn"], r".*\.(0|1)\..*(k_proj|c_proj)"):
            names = list(module_scores(base, BATCHES, targets))
            model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets))
            prefix = "base_model.model."
            adapted = [name.removeprefix(prefix) for name, m in model.named_modules() if hasattr(m, "lora_A")]
            assert names == adapted


def test_ranks_are_proportional_and_keep_to_the_budget() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)))
    ranks = rank_pattern(model, {"0": 8.0, "1": 4.0, "2": 2.0, "3": 2.0}, r=8)["rank_pattern"]
    assert list(ranks.values()) == [16, 8, 4, 4]
    assert set(rank_pattern(model, {"0": 8.0, "1": 0.0}, r=8, power=0)["rank_pattern"].values()) == {8}
    clamped = rank_pattern(model, {"0": 1e9, "1": 1.0, "2": 1.0}, r=8, maximum=12, minimum=2)["rank_pattern"]
    assert list(clamped.values()) == [12, 6, 6]
    assert list(rank_pattern(model, {"0": 0.0, "1": 0.0}, r=8)["rank_pattern"].values()) == [1, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        sides = torch.randint(2, 40, (6, 2), generator=generator).tolist()
        model = nn.Sequential(*(nn.Linear(i, o) for i, o in sides))
        scores = {str(k): float(s) for k, s in enumerate(torch.rand(6, generator=generator).pow(4))}
        found = rank_pattern(model, scores, r=4)["rank_pattern"].values()
        spent, budget = (sum(r * sum(s) for r, s in zip(ranks, sides, strict=True)) for ranks in (found, [4] * 6))
        assert spent <= budget
        assert all(1 <= r <= min(16, *s) for r, s in zip(found, sides, strict=True))
        room = [sum(s) for r, s in zip(found, sides, strict=True) if r < min(16, *s)]
        assert not room or budget - spent < 6 * max(room)


def test_peft_takes_the_ranks() -> None:
    peft = pytest.importorskip("peft", reason="compares with it")
    for base in (llama(), gpt2()):
        scores = module_scores(base, BATCHES, "all-linear")
        patterns = rank_pattern(base, scores, r=4, lora_alpha=8)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(scores), **patterns)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert list(layers) == list(scores)
        wanted = dict(zip(scores, patterns["rank_pattern"].values(), strict=True))
        assert {name: layer.r["default"] for name, layer in layers.items()} == wanted
        assert len(set(wanted.values())) > 1
        assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
        uniform = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=list(scores)))
        trainable = model.get_nb_trainable_parameters()[0]
        assert 0.8 * uniform.get_nb_trainable_parameters()[0] < trainable <= uniform.get_nb_trainable_parameters()[0]


def test_a_wrapped_model_is_refused_by_name() -> None:
    """Its adapters would be scored as modules of their own."""
    peft = pytest.importorskip("peft", reason="wraps the model")
    for base, target in ((llama(), "q_proj"), (gpt2(), "c_attn")):
        want = module_scores(base, BATCHES, [target])
        for config in (
            peft.LoraConfig(target_modules=[target]),
            peft.IA3Config(target_modules=[target], feedforward_modules=[]),
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        ):
            wrapped = peft.get_peft_model(copy.deepcopy(base), config)
            for targets in ([target], "all-linear"):
                with pytest.raises(ValueError, match=r"PEFT has put adapters into this Peft.*model\.unload\(\)"):
                    module_scores(wrapped, BATCHES, targets)
            with pytest.raises(ValueError, match="pass the base model"):
                rank_pattern(wrapped, want)
        inner = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=[target]))
        with pytest.raises(ValueError, match=f"at '.*{target}'"):
            module_scores(inner.base_model.model, BATCHES)
        assert module_scores(inner.unload(), BATCHES, [target]) == want


@pytest.mark.slow
def test_axolotl_takes_the_ranks() -> None:
    """axolotl's schema and its own code, which makes PEFT's configuration of it (``requirements/axolotl.txt``)."""
    schemas = pytest.importorskip("axolotl.utils.schemas.peft", reason="compares with it: PYTHONPATH=FOLDER")
    peft = pytest.importorskip("peft", reason="axolotl hands the ranks to it")
    from axolotl.loaders.adapter import _build_peft_lora_config
    from axolotl.utils.dict import DictDefault

    base = llama()
    scores = module_scores(base, BATCHES)
    patterns = rank_pattern(base, scores, r=4, lora_alpha=8)
    chosen = schemas.LoraConfig(
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=list(scores),
        **{f"lora_{name}": values for name, values in patterns.items()},
    )
    model = peft.get_peft_model(base, _build_peft_lora_config(base, DictDefault(chosen.model_dump())))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert [layer.r["default"] for layer in layers] == list(patterns["rank_pattern"].values())
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    for targets, message in (
        (["q_proj"], "no module matches"),
        (["1"], "a ReLU without"),
        (["2"], "a LayerNorm without"),
    ):
        with pytest.raises(ValueError, match=message):
            module_scores(model, [torch.randn(2, 4)], targets)
    for scores, options, message in (
        ({}, {}, "scores is empty"),
        ({"0": float("nan")}, {}, "the score of '0' is nan"),
        ({"0": -1.0}, {}, "the score of '0' is -1.0"),
        ({"7": 1.0}, {}, "'7' is no module"),
        ({"0": 1.0}, {"minimum": 0}, "minimum is 0"),
        ({"0": 1.0}, {"budget": 7}, "budget is 7 parameters, but rank 1 everywhere has 8"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_pattern(model, scores, **options)


def test_the_page_runs() -> None:
    pytest.importorskip("peft", reason="compares with it")
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (block,) = re.findall(r"## Ranks for LoRA\n.*?```python\n(.*?)```", page, re.DOTALL)
    names = {"gpt2": gpt2(), "batches": BATCHES}
    exec(block, names)
    assert len(names["patterns"]["alpha_pattern"]) == len(names["scores"]) == 6
    (block,) = re.findall(r"## The Fisher of PEFT's adapters\n.*?```python\n(.*?)```", page, re.DOTALL)
    names = {"gpt2": gpt2(), "batches": BATCHES}
    exec(block, names)
    assert len(names["F"]) == 4
    assert all("lora" in name for name in names["F"])
