"""What the Fisher of a decoder's adapters costs: over a training step of them, and over the Fisher of all weights.

    python -m bench.studies.adapted [--rounds 5] [--layers 6] [--width 256] [--write docs/adapters.md]

Needs PEFT (requirements/coverage.txt). A Llama of random weights reads 8 texts of 64 tokens. The Fisher is that of the
texts' own next tokens, one cotangent a text: a forward pass and ``FisherRecorder.backward``. The training step is a
forward pass and a backward pass of the same loss, without the optimiser. The loop forms the gradient of one text after
the other. All three take turns on one thread, and ratios are medians of the rounds' ratios. Memory is the peak over the
network's own of a second batch, in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # random weights only: nothing is to be fetched

import torch
from torch import Tensor, nn

from bench.harness import memory
from bench.pages import markdown, replace_section
from t2v_fast import FisherRecorder

TEXTS, TOKENS, VOCABULARY = 8, 64, 1000
ALL = "all weights"
# Arguments of each configuration of PEFT, and of the recorder.
ADAPTERS: dict[str, tuple[str, dict, dict]] = {
    "LoRA, rank 8": ("LoraConfig", {"r": 8, "lora_alpha": 16}, {}),
    "LoRA of the upper half": ("LoraConfig", {"r": 8, "lora_alpha": 16, "upper": True}, {}),
    "DoRA, rank 8": ("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}, {}),
    "AdaLoRA, rank 8": ("AdaLoraConfig", {"init_r": 8, "target_r": 4, "total_step": 10}, {"unsupported": "exact"}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, {}),
    "VeRA, rank 64": ("VeraConfig", {"r": 64}, {}),
}
TARGETS = {"IA3": ["k_proj", "v_proj", "down_proj"], "VeRA, rank 64": ["q_proj", "o_proj"]}


class Scored(nn.Module):
    """A decoder, from tokens [N, T] to logits [N, T - 1, V] of the next tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(input_ids=tokens).logits[:, :-1]


def decoder(adapter: str, layers: int, width: int) -> nn.Module:
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=8, bos_token_id=0, eos_token_id=0, **sizes
    )
    network = transformers.LlamaForCausalLM(config)
    if adapter != ALL:
        name, options, _ = ADAPTERS[adapter]
        options = {**options, "target_modules": TARGETS.get(adapter, ["q_proj", "k_proj", "v_proj", "o_proj"])}
        if options.pop("upper", False):
            options["layers_to_transform"] = list(range(layers // 2, layers))
        network = peft.get_peft_model(network, getattr(peft, name)(task_type="CAUSAL_LM", **options))
        with torch.no_grad():  # adapters begin with zeros, which would leave others without a gradient
            for p in network.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape))
    return Scored(network).eval()


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of each text, [N]."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)


def sides(adapter: str, layers: int, width: int) -> dict[str, Callable[[], object]]:
    """What is timed for one kind of adapter; the order is the one in which they take turns."""
    model = decoder(adapter, layers, width)
    tokens = torch.randint(0, VOCABULARY, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(1))
    wanted = [p for p in model.parameters() if p.requires_grad]
    options = {} if adapter == ALL else ADAPTERS[adapter][2]
    recorder = FisherRecorder(model, "trainable", "parameter", **options)

    def step() -> None:
        losses(model(tokens), tokens).sum().backward()
        for p in wanted:
            p.grad = None

    def fisher() -> dict[str, Tensor]:
        with recorder:
            logits = model(tokens)
            z = logits.detach().requires_grad_(True)
            (u,) = torch.autograd.grad(losses(z, tokens).sum(), z)
            return recorder.backward(logits, u)

    def loop() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in wanted]
        for text in tokens.split(1):
            for square, g in zip(total, torch.autograd.grad(losses(model(text), text).sum(), wanted), strict=True):
                square += g.square()
        return total

    return {"step": step, "fisher": fisher, "loop": loop}


def error(found: dict[str, Tensor], want: list[Tensor]) -> float:
    """The largest relative difference of a parameter's squares."""
    return max(float((q - w).norm() / w.norm()) for q, w in zip(found.values(), want, strict=True) if w.any())


def peak(adapter: str, side: str, layers: int, width: int) -> int:
    """Peak bytes of a side's second batch over what the process holds with the network. For a fresh process."""
    torch.set_num_threads(1)
    run = sides(adapter, layers, width)[side]
    before = memory()
    run()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return memory("VmHWM") - before


def page(rounds: int, layers: int, width: int) -> str:
    torch.set_num_threads(1)
    kinds = [ALL, *ADAPTERS]
    made = {kind: sides(kind, layers, width) for kind in kinds}
    errors = {kind: error(made[kind]["fisher"](), made[kind]["loop"]()) for kind in kinds}  # type: ignore[arg-type]
    seconds: dict[tuple[str, str], list[float]] = {}
    for kind in kinds:
        made[kind]["step"]()
    for _ in range(rounds):
        for kind in kinds:
            for side, run in made[kind].items():
                start = time.process_time()
                run()
                seconds.setdefault((kind, side), []).append(time.process_time() - start)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers", "bench.studies.adapted"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        jobs = [(kind, side, layers, width) for kind in kinds for side in ("step", "fisher")]
        peaks = dict(zip([job[:2] for job in jobs], pool.starmap(peak, jobs, chunksize=1), strict=True))

    def ratio(of: tuple[str, str], to: tuple[str, str]) -> str:
        return f"{statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True)):.2f}"

    times = ["step, ms", "Fisher, ms", "Fisher / step", "Fisher / Fisher of all", "loop / Fisher"]
    rows = [["trained", "parameters", *times, "memory of a step, MB", "of the Fisher, MB", "error"]]
    for kind in kinds:
        model = decoder(kind, layers, width)
        rows.append(
            [
                kind,
                f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
                *(f"{1e3 * statistics.median(seconds[kind, side]):.0f}" for side in ("step", "fisher")),
                ratio((kind, "fisher"), (kind, "step")),
                ratio((kind, "fisher"), (ALL, "fisher")),
                ratio((kind, "loop"), (kind, "fisher")),
                *(f"{peaks[kind, side] / 2**20:.0f}" for side in ("step", "fisher")),
                f"{errors[kind]:.0e}",
            ]
        )
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    text = page(arguments.rounds, arguments.layers, arguments.width)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "adapted", text)


if __name__ == "__main__":
    main()
