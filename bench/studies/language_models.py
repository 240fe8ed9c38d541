"""Tokens a second and memory of the Fisher of language models, next to the plain passes.

    python -m bench.studies.language_models [--only LINE ...] [--list] [--write PAGE]

Each line runs in a process of its own. Memory is the peak over what the process had before: weights, and the library
itself. The lines of a model are run one after the other, so compare their ratios, on a quiet machine.

``1b`` has the configuration of Llama-3.2-1B with random weights in bfloat16: 1.24 billion parameters, a tied head of
128256 tokens, one sequence of 512 tokens. ``small`` has eight layers of 512 features and a head of 32000 tokens in
float32, with four sequences of 256 tokens. ``long`` is one sequence of 512, 2048 or 8192 tokens for four layers of 256
features. ``packed`` are sequences of 30 to 1000 tokens in one row, and ``padded`` the same sequences as a batch.

The Fisher is that of the log-likelihoods of whole sequences, by filter, without the self-check of a first call
(``fisher, first call`` is with it). A training step is a forward and a backward pass with gradients of all parameters.
The loop does that for one sequence after the other and squares the gradients. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness import memory
from bench.pages import markdown, replace_section
from t2v_fast import fisher, ops

LENGTHS = (1000, 30, 400, 60, 120, 40, 250, 90)


@dataclass(frozen=True)
class Model:
    """A Llama of random weights, and the lengths of the sequences of a batch."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    tokens: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    rounds: int = 3
    packed: bool = False

    def build(self) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.tokens,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.hidden // self.heads,
            tie_word_embeddings=True,
            rope_theta=5e5,
            max_position_embeddings=131072,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(self.dtype)
        model.to_empty(device="cpu").tie_weights()
        model.model.rotary_emb.__init__(config)  # its buffers are computed, not initialised
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.uniform_(-0.03, 0.03, generator=generator)
                else:
                    p.fill_(1)
        return model.eval()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randint(1, self.tokens, (length,), generator=generator) for length in self.lengths]
        if self.packed:
            positions = torch.cat([torch.arange(length) for length in self.lengths])
            return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None]}
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        there = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        ragged = len(set(self.lengths)) > 1
        return {"input_ids": padded, **({"attention_mask": there} if ragged else {})}


_LLAMA_1B = Model(2048, 8192, 16, 32, 8, 128256, torch.bfloat16, (512,), rounds=1)
_SMALL = Model(512, 1408, 8, 8, 4, 32000, torch.float32, (256,) * 4)
MODELS = {
    "1b": _LLAMA_1B,
    "small": _SMALL,
    **{f"long {t}": Model(256, 704, 4, 4, 2, 4096, torch.float32, (t,), rounds=1) for t in (512, 2048, 8192)},
    "padded": Model(256, 704, 4, 4, 2, 4096, torch.float32, LENGTHS),
    "packed": Model(256, 704, 4, 4, 2, 4096, torch.float32, LENGTHS, packed=True),
    "toy": Model(16, 24, 1, 2, 1, 50, torch.float32, (5, 3), rounds=1, packed=True),  # for the tests of this folder
}


def _forward(model: nn.Module, batch: dict[str, Tensor], options: dict) -> None:
    with torch.no_grad():
        model(**batch, use_cache=False)


def _floor(model: nn.Module, batch: dict[str, Tensor], options: dict) -> None:
    """A forward pass, and a backward pass down to the embeddings of the tokens, without gradients of weights."""
    model.requires_grad_(False)
    x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    logits = model(inputs_embeds=x, **rest, use_cache=False).logits
    torch.autograd.grad([logits], [x], [torch.full_like(logits, 1e-3)])


def _step(model: nn.Module, batch: dict[str, Tensor], options: dict) -> None:
    model.requires_grad_(True)
    logits = model(**batch, use_cache=False).logits
    logits.backward(torch.full_like(logits, 1e-3))
    model.zero_grad(set_to_none=True)


def _fisher(model: nn.Module, batch: dict[str, Tensor], options: dict) -> None:
    fisher(
        model,
        [batch | {"labels": batch["input_ids"], "use_cache": False}],
        "empirical",
        1,
        level="sequence",
        shift_labels=True,
        packed="position_ids" in batch,
        **options,
    )


def _loop(model: nn.Module, batch: dict[str, Tensor], options: dict) -> None:
    model.requires_grad_(True)
    there = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    texts = [ids[mask][None] for ids, mask in zip(batch["input_ids"], there, strict=True)]
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        sizes = torch.tensor([*starts, batch["input_ids"].shape[1]]).diff().tolist()
        texts = list(batch["input_ids"].split(sizes, 1))
    for text in texts:
        scores = model(input_ids=text, use_cache=False).logits[0, :-1].log_softmax(1)
        scores.gather(1, text[0, 1:, None]).sum().backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.square_().flatten(1).mean(1) if p.dim() > 1 else p.grad.square_()
        model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Way:
    """One way through a batch."""

    run: Callable[[nn.Module, dict[str, Tensor], dict], None]
    options: dict = field(default_factory=dict)
    first: bool = False  # whether the first call is measured


WAYS = {
    "forward": Way(_forward),
    "forward and input gradients": Way(_floor),
    "fisher": Way(_fisher, {"self_check": False}),
    "fisher, first call": Way(_fisher, first=True),
    "training step": Way(_step),
    "loop": Way(_loop),
}
LINES = [(name, way) for name in ("1b", "small") for way in WAYS]
LINES += [
    (name, way) for name in MODELS if name.startswith("long") for way in ("forward and input gradients", "fisher")
]
LINES += [(name, way) for name in ("padded", "packed") for way in ("forward and input gradients", "fisher", "loop")]


def measure(name: str, way: str) -> dict[str, float]:
    """Seconds of a batch and its peak memory in bytes, in this process."""
    here = MODELS[name]
    model, batch, todo = here.build(), here.batch(), WAYS[way]
    before = memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds = []
    for _ in range(1 if todo.first else 1 + here.rounds):
        start = time.perf_counter()
        todo.run(model, batch, todo.options)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": memory("VmHWM") - before, "weights": _bytes(model)}


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def table(lines: list[tuple[str, str]]) -> str:
    """The table of some lines, each of which a process of its own measures."""
    rows = [("model", "way", "tokens a second", "seconds", "weights, GB", "more memory, GB")]
    for name, way in lines:
        command = [sys.executable, "-m", "bench.studies.language_models", "--child", name, way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows.append(
                (name, way, (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1], "", "", "")
            )
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        tokens = sum(MODELS[name].lengths) / found["seconds"]
        memory_ = (f"{found[key] / 1e9:.2f}" for key in ("weights", "bytes"))
        rows.append((name, way, f"{tokens:.0f}", f"{found['seconds']:.2f}", *memory_))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return f"{markdown(rows)}\n\nInstruction set: {ops.dispatch.cpu_capability()}, {torch.get_num_threads()} threads."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="models, or lines as 'model: way'; by default all")
    parser.add_argument("--list", action="store_true", help="print the lines and stop")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    known = [*LINES, *(("toy", way) for way in WAYS)]
    lines = (
        [(n, w) for n, w in known if n in arguments.only or f"{n}: {w}" in arguments.only] if arguments.only else LINES
    )
    if arguments.list or not lines:
        print("\n".join(f"{name}: {way}" for name, way in known))
        return
    text = table(lines)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "language models", text)


if __name__ == "__main__":
    main()
