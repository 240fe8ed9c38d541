"""Embeddings of text against autograd, one token at a time."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from t2v_fast import distance
from t2v_fast.adapters.language import diversity, embed_as_beyond_scale, embed_text
from t2v_fast.adapters.patching import accelerate, restore

transformers = pytest.importorskip("transformers", reason="the probes are its models")
VOCABULARY = 7


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=9, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double().train()


TOKENS = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 2 + [1] * 4])


def truth(model: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], list[int]]:
    """{weight: [N, filters]} sums over predicting tokens and all their labels, and how many such tokens there are."""
    model.eval()
    named = {k: p for k, p in model.named_parameters() if k.endswith(".weight") and "wte" not in k and "wpe" not in k}
    sums = {k: torch.zeros(len(tokens), len(p), dtype=torch.float64) for k, p in named.items()}
    counts = []
    for n in range(len(tokens)):
        scores = model(input_ids=tokens[n : n + 1], attention_mask=mask[n : n + 1]).logits[0].log_softmax(1)
        here = [t for t in range(tokens.shape[1] - 1) if mask[n, t] and mask[n, t + 1]]
        counts.append(len(here))
        for t in here:
            for c in range(VOCABULARY):
                gradients = torch.autograd.grad(scores[t, c], list(named.values()), retain_graph=True)
                for key, g in zip(named, gradients, strict=True):
                    sums[key][n] += scores[t, c].exp().detach() * g.square().reshape(len(g), -1).mean(1)
    model.train()
    return sums, counts


@pytest.mark.parametrize("padded", [False, True])
def test_every_token_and_label(gpt2: nn.Module, padded: bool) -> None:
    mask = MASK if padded else torch.ones_like(MASK)
    sums, counts = truth(gpt2, TOKENS, mask)
    batches = [{"input_ids": t, "attention_mask": m} for t, m in zip(TOKENS.split(2), mask.split(2), strict=True)]
    given = batches if padded else TOKENS.split(2)
    by_token = embed_text(gpt2, given, estimator="exact", name="text")
    by_text = embed_text(gpt2, given, estimator="exact", level="sequence")
    assert gpt2.training
    assert list(by_token.layer_names) == list(sums)
    for name, value in sums.items():
        np.testing.assert_allclose(by_token.layer(name), value.sum(0) / sum(counts), rtol=1e-9, atol=1e-16)
        np.testing.assert_allclose(by_text.layer(name), value.mean(0), rtol=1e-9, atol=1e-16)
    assert by_token.meta["task"] == "text"
    assert len(distance.pdist([by_token, by_token])) == 2
    with pytest.raises(ValueError, match="level"):
        distance.pdist([by_token, by_text])


def test_padding_contributes_nothing(gpt2: nn.Module) -> None:
    other = torch.where(MASK.bool(), TOKENS, (TOKENS + 3) % VOCABULARY)
    first, second = (embed_text(gpt2, [{"input_ids": t, "attention_mask": MASK}], samples=2) for t in (TOKENS, other))
    np.testing.assert_allclose(first.hessian, second.hessian, rtol=1e-12)


@pytest.mark.slow_unless(estimator=("hutchinson",))
@pytest.mark.parametrize("estimator", ["hutchinson", "monte_carlo"])
def test_sampling_is_unbiased(gpt2: nn.Module, estimator: str) -> None:
    want = embed_text(gpt2, [TOKENS], estimator="exact").hessian
    draws = np.stack(
        [embed_text(gpt2, [TOKENS], estimator=estimator, seed=s, self_check=False).hessian for s in range(300)]
    )
    error = draws.std(0, ddof=1) / len(draws) ** 0.5
    z = (draws.mean(0) - want) / error
    assert abs(z.mean()) < 1.5  # entries share their draws
    assert np.abs(z).max() < 6


def test_other_quantities_are_not_compared(gpt2: nn.Module) -> None:
    by_text = [
        embed_text(gpt2, [TOKENS], estimator=e) for e in ("hutchinson", "monte_carlo", "batch_mean", "empirical")
    ]
    assert distance.pdist(by_text[:2]).shape == (2, 2)
    for other in by_text[2:]:
        with pytest.raises(ValueError, match="family"):
            distance.pdist([by_text[0], other])
    square = next(k for k in by_text[0].layer_names if k.endswith("attn.c_proj.weight"))
    with pytest.raises(ValueError, match="filter_axis"):
        distance.pdist([by_text[0], embed_text(gpt2, [TOKENS], filter_axis={square: 1})])


def test_diversity() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    # An untrained model is nearly indifferent; a confident one has texts that differ.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    generator = torch.Generator().manual_seed(0)
    wide = [embed_text(model, [torch.randint(0, 50, (4, 8), generator=generator)], samples=4) for _ in range(6)]
    narrow = [embed_text(model, [torch.randint(0, 2, (4, 8), generator=generator)], samples=4) for _ in range(6)]
    mean, error = diversity(wide)
    distances = distance.pdist(wide)
    assert mean == pytest.approx(distances[np.triu_indices(6, 1)].mean())
    assert 0 < error < mean
    few = [diversity(wide[:i] + wide[i + 1 :])[0] for i in range(6)]
    assert error == pytest.approx((5 / 6 * np.square(np.subtract(few, np.mean(few))).sum()) ** 0.5)
    assert np.isnan(diversity(wide[:2])[1])
    mixed, _ = diversity(wide + narrow)
    assert mixed > max(diversity(narrow)[0], 0)
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        diversity(wide[:1])


def test_the_steps_of_the_forks_for_text(gpt2: nn.Module) -> None:
    """A fine-tuned copy of the head, every position but the last, and the tables: by plain steps, then per token."""
    batches = [{"input_ids": t, "attention_mask": m} for t, m in zip(TOKENS.split(2), MASK.split(2), strict=True)]
    before = copy.deepcopy(gpt2.state_dict())
    for m in gpt2.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    found = embed_as_beyond_scale(gpt2, batches, estimator="exact", epochs=2, learning_rate=0.1, ignored_token=3)
    assert gpt2.training
    assert all(torch.equal(value, before[key]) for key, value in gpt2.state_dict().items())
    other = copy.deepcopy(gpt2)
    adam = torch.optim.AdamW(other.lm_head.parameters(), lr=0.1, weight_decay=1e-4)
    for _ in range(2):
        for batch in batches:
            adam.zero_grad()
            logits = other(**batch).logits[:, :-1].flatten(0, 1)
            wanted = batch["input_ids"][:, 1:].flatten()
            torch.nn.functional.cross_entropy(logits[wanted != 3], wanted[wanted != 3]).backward()
            adam.step()
    module = ModuleType("task2vec")
    module.Task2Vec = type("Task2Vec", (Task2Vec,), {})
    accelerate(module, text_estimator="exact", floor=0)
    task2vec = module.Task2Vec(other)
    with pytest.warns(UserWarning, match="floor=0 leaves it so"):  # tokens that no text has
        task2vec.montecarlo_fisher_autoregressive(Texts())
    np.testing.assert_allclose(found.hessian, task2vec.extract_embedding(other).numpy(), rtol=1e-6)
    assert "transformer.wte.weight" in found.layer_names
    same = embed_text(gpt2, batches, estimator="exact")
    with pytest.raises(ValueError, match="padding"):
        distance.pdist([found, same])
    with pytest.raises(ValueError, match="Linear has no module lm_head"):
        embed_as_beyond_scale(nn.Linear(2, 2), batches)


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index], "attention_mask": MASK[index]}


class Task2Vec:
    """As much of the forks for text as the Fisher concerns."""

    def __init__(self, model: nn.Module, loader_opts: dict | None = None, classifier_opts: dict | None = None) -> None:
        self.model, self.loader_opts, self.classifier_opts = model, loader_opts, classifier_opts
        self.skip_layers, self.max_samples, self.bernoulli = 0, None, False

    def montecarlo_fisher(self, dataset: Texts, epochs: int = 1) -> None:
        raise AssertionError("this one is for images")

    def montecarlo_fisher_autoregressive(self, dataset: Texts, epochs: int = 1) -> None:
        raise AssertionError("not replaced")

    def extract_embedding(self, model: nn.Module) -> Tensor:
        weights = [m.weight for m in model.modules() if m is not model.lm_head and hasattr(m, "weight")]
        return torch.cat([w.grad2_acc.flatten(1).mean(1) if w.dim() > 1 else w.grad2_acc for w in weights])


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_accelerated_forks_for_text(tied: bool, padding: bool) -> None:
    """Every weight that the forks read: tables, norms and layers; every position but the last of each text."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=9,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    model = transformers.GPT2LMHeadModel(config).double().train()
    module = ModuleType("task2vec")
    module.Task2Vec = type("Task2Vec", (Task2Vec,), {})
    original = Task2Vec.montecarlo_fisher_autoregressive
    accelerate(module, text_estimator="exact", padding=padding, granularity="parameter")
    task2vec = module.Task2Vec(model, {"batch_size": 2})
    task2vec.montecarlo_fisher_autoregressive(Texts(), epochs=3)
    assert model.training
    named = {k: p for k, p in model.named_parameters() if k != "lm_head.weight"}
    want, count = {k: torch.zeros_like(p) for k, p in named.items()}, 0
    model.eval()
    for n in range(len(TOKENS)):
        scores = model(input_ids=TOKENS[n : n + 1], attention_mask=MASK[n : n + 1]).logits[0].log_softmax(1)
        for t in range(TOKENS.shape[1] - 1):
            if not padding and not (MASK[n, t] and MASK[n, t + 1]):
                continue
            count += 1
            for c in range(VOCABULARY):
                gradients = torch.autograd.grad(scores[t, c], list(named.values()), retain_graph=True)
                for key, g in zip(named, gradients, strict=True):
                    want[key] += scores[t, c].exp().detach() * g.square()
    for name, p in named.items():
        torch.testing.assert_close(p.grad2_acc, want[name] / count, rtol=1e-9, atol=2e-8)
        alive = want[name] > 1e-20  # the others have the floor
        torch.testing.assert_close(p.grad2_acc[alive], (want[name] / count)[alive], rtol=1e-9, atol=0)
        assert p.grad_counter == 3
    assert hasattr(model.lm_head.weight, "grad2_acc") == tied
    whole = task2vec.extract_embedding(model)
    accelerate(module, text_estimator="exact", padding=padding, batch_scale=True)  # by filter
    task2vec.montecarlo_fisher_autoregressive(Texts())
    torch.testing.assert_close(task2vec.extract_embedding(model), whole / (count / 2), rtol=1e-9, atol=1e-15)
    module.Task2Vec(model, classifier_opts={"break_early": True}).montecarlo_fisher_autoregressive(Texts())
    assert model.transformer.wpe.weight.grad_counter == 3  # a batch of eight holds all texts
    module.Task2Vec(model, {"batch_size": 2}, {"break_early": True}).montecarlo_fisher_autoregressive(Texts())
    assert model.transformer.wpe.weight.grad_counter == 2
    with pytest.raises(ValueError, match="a batch of 1 texts has no token that is followed by another"):
        task2vec.montecarlo_fisher_autoregressive([{"input_ids": TOKENS[0, :1], "attention_mask": MASK[0, :1]}])
    task2vec.bernoulli = True
    with pytest.raises(ValueError, match="bernoulli=True has no meaning for a language model"):
        task2vec.montecarlo_fisher_autoregressive(Texts())
    restore(module)
    assert module.Task2Vec.montecarlo_fisher_autoregressive is original


def test_bad_text(gpt2: nn.Module) -> None:
    with pytest.raises(ValueError, match="no token that is followed by another"):
        embed_text(gpt2, [TOKENS[:, :1]])
    with pytest.raises(ValueError, match=r"\['tokens'\], expected token numbers .* input_ids"):
        embed_text(gpt2, [{"tokens": TOKENS}])
    with pytest.raises(ValueError, match="unknown estimator"):
        embed_text(gpt2, [TOKENS], estimator="best")


def test_the_page_runs(gpt2: nn.Module) -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "embed_text" in b]
    names = {"gpt2": gpt2, "collection": [TOKENS, {"input_ids": TOKENS.flip(1), "attention_mask": MASK}]}
    exec(block, names)
    assert names["mean"] > 0
