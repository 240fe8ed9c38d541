"""What the exact Fisher of a mixture of experts costs, with each implementation of the experts.

    python -m bench.studies.mixtures [--rounds 7] [--texts 8] [--tokens 32] [--dtype float32] [--toy]

A Mixtral decoder of transformers with random weights (two of eight experts for each token), and a dense decoder of the
same active size, read a batch of random texts; every token is predicted. Prints Markdown: the milliseconds of a
training step (forward and backward, all gradients), and as ratios to it: forward and backward without weight gradients,
the squares of all per-example gradients by filter and by parameter (forward, ownership and one cotangent), and a loop
over the texts that squares the gradients of each. Rounds are interleaved, and ratios are medians. A second table has
the products of the experts alone: what the flops of both forms predict, against what the ops take.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench import harness
from bench.report import table
from t2v_fast import FisherRecorder, ops

VOCABULARY = 1000
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SIZES = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
TOY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
EXPERTS, TOP = 8, 2


def decoder(implementation: str | None, sizes: dict[str, int], dtype: torch.dtype) -> nn.Module:
    """A Mixtral decoder, or a dense one that has the size of the experts of a token."""
    import transformers

    shared = {
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "sdpa",
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    if implementation is None:
        dense = {**sizes, "intermediate_size": TOP * sizes["intermediate_size"]}
        return transformers.MistralForCausalLM(transformers.MistralConfig(**shared, **dense)).to(dtype).eval()
    config = transformers.MixtralConfig(**shared, **sizes, num_local_experts=EXPERTS, num_experts_per_tok=TOP)
    network = transformers.MixtralForCausalLM(config)
    network.set_experts_implementation(implementation)
    return network.to(dtype).eval()


def ways(network: nn.Module, tokens: Tensor, u: Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, each from the tokens on."""
    parameters = list(network.parameters())
    embedded = network.get_input_embeddings()(tokens).detach().requires_grad_()

    def require(required: bool) -> None:
        for p in parameters:
            p.requires_grad_(required)

    def step() -> None:
        require(True)
        network(input_ids=tokens).logits.backward(u)
        for p in parameters:
            p.grad = None

    def floor() -> None:
        require(False)
        torch.autograd.grad(network(inputs_embeds=embedded).logits, embedded, u)

    def squares(granularity: str) -> None:
        with FisherRecorder(network, granularity=granularity) as recorder:
            recorder.backward(network(input_ids=tokens).logits, u)

    def loop() -> None:
        require(True)
        total = [torch.zeros_like(p) for p in parameters]
        for n in range(len(tokens)):
            logits = network(input_ids=tokens[n : n + 1]).logits
            gradients = torch.autograd.grad(logits, parameters, u[n : n + 1], allow_unused=True)
            for into, g in zip(total, gradients, strict=True):
                if g is not None:
                    into.addcmul_(g, g)

    return {
        "step": step,
        "floor": floor,
        "by filter": lambda: squares("filter"),
        "by parameter": lambda: squares("parameter"),
        "loop": loop,
    }


def growth(run: Callable[[], object]) -> int:
    """The bytes of a run beyond what the process has."""
    before = harness.settled()
    run()
    return max(0, harness.memory("VmHWM") - before)


def figures(network: nn.Module, tokens: Tensor, rounds: int) -> tuple[dict[str, int], dict[str, list[float]]]:
    """The memory of each way in bytes, and its seconds in each round."""
    u = torch.randn(*tokens.shape, VOCABULARY, generator=torch.Generator().manual_seed(1))
    runs = ways(network, tokens, u.to(next(network.parameters()).dtype))
    memory = {name: growth(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(harness.timed(run))
    return memory, seconds


def measure(network: nn.Module, tokens: Tensor, rounds: int) -> Sequence[str]:
    memory, seconds = figures(network, tokens, rounds)
    step = seconds.pop("step")
    ratios = [statistics.median(a / b for a, b in zip(s, step, strict=True)) for s in seconds.values()]
    return [
        f"{1e3 * statistics.median(step):.0f}",
        *(f"{r:.2f}" for r in ratios),
        *(f"{m / 2**20:.0f}" for m in memory.values()),
    ]


def products(sizes: dict[str, int], texts: int, tokens: int, rounds: int) -> Sequence[Sequence[str]]:
    """One stack [E, O, I]: the ops against the products of a weight gradient of as many rows."""
    inputs, outputs = sizes["hidden_size"], 2 * sizes["intermediate_size"]
    rows = []
    for each in (1, 4, tokens * TOP // EXPERTS, 64):
        segments = EXPERTS * texts
        count = segments * each
        x, g = torch.randn(count, inputs), torch.randn(count, outputs)
        offsets, groups = torch.arange(segments + 1) * each, torch.arange(EXPERTS + 1) * texts
        out, weight = torch.zeros(EXPERTS, outputs, inputs), torch.ones(segments)
        by_expert = [t.view(EXPERTS, -1, t.shape[1]) for t in (x, g)]
        runs: list[Callable[[], object]] = [
            functools.partial(torch.bmm, by_expert[1].mT, by_expert[0]),
            functools.partial(ops.sq_grouped, x, g, offsets),
            functools.partial(ops.sq_grouped_acc_, out, x, g, offsets, groups, weight),
        ]
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds + 1):
            for run, taken in zip(runs, seconds, strict=True):
                taken.append(harness.timed(run))
        gradient, *others = (statistics.median(taken[1:]) for taken in seconds)
        explicit = 2 * each * outputs * inputs
        flops = min(explicit, each**2 * (inputs + outputs)) / explicit
        rows.append([str(each), f"{1e3 * gradient:.2f}", f"{flops:.2f}", *(f"{s / gradient:.2f}" for s in others)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--toy", action="store_true", help="a tiny decoder: tries the script")
    arguments = parser.parse_args()
    dtype, sizes = getattr(torch, arguments.dtype), TOY if arguments.toy else SIZES
    tokens = torch.randint(
        0, VOCABULARY, (arguments.texts, arguments.tokens), generator=torch.Generator().manual_seed(0)
    )
    rows = []
    for implementation in (None, *IMPLEMENTATIONS):
        network = decoder(implementation, sizes, dtype)
        size = sum(p.numel() for p in network.parameters()) / 1e6
        name = "dense" if implementation is None else f"mixture, {implementation}"
        rows.append([name, f"{size:.1f}", *measure(network, tokens, arguments.rounds)])
    ratios = ("floor", "by filter", "by parameter", "loop")
    head = ["decoder", "million parameters", "ms a step", *(f"{name} / step" for name in ratios)]
    table([*head, "MB a step", *(f"MB {name}" for name in ratios)], rows)
    head = ["rows of a segment", "ms of a weight gradient", "flops by filter / gradient", "by filter", "by parameter"]
    table(head, products(sizes, arguments.texts, arguments.tokens, arguments.rounds))


if __name__ == "__main__":
    main()
