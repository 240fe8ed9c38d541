"""Each adapter against the plain way to the same quantity: autograd, one example or token at a time.

    python -m bench.studies.adapters [--images 256] [--size 64] [--rounds 3] [--write docs/adapters.md]

The variances of the replaced Task2Vec are compared with the public code's way, a convolution with the variance of every
weight. BackPACK and Opacus take part if `make peers` has installed them, driven as in bench/peers. Prints Markdown;
--write puts it into the page. Rounds are interleaved, and a ratio is the median of the rounds' ratios. The times of the
adapters contain their self-check on the first batch, a fixed cost.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench.pages import replace_section
from t2v_fast import fisher
from t2v_fast.adapters.continual import compute_importances
from t2v_fast.adapters.fim import fim_diag
from t2v_fast.adapters.language import embed_text
from t2v_fast.adapters.task2vec import ProbeNetwork, Task2Vec, accelerate

BATCH = 32


class Network(nn.Module):
    """ResNet-18 as the public Task2Vec code's probe networks are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torchvision.models.resnet18(num_classes=10).eval()

    def forward(self, x: Tensor, start_from: int = 0) -> Tensor:
        return self.network(x)


def add_squares(total: dict[str, Tensor], model: nn.Module, loss: Tensor) -> None:
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    for name, g in zip(named, gradients, strict=True):
        if g is not None:
            total[name] = total.get(name, 0) + g.square()


def one_by_one(model: nn.Module, x: Tensor, labels: Callable[[Tensor, int], Tensor]) -> None:
    total: dict[str, Tensor] = {}
    for n in range(len(x)):
        logits = model(x[n : n + 1])
        add_squares(total, model, F.cross_entropy(logits, labels(logits, n)))


def token_by_token(model: nn.Module, tokens: Tensor) -> None:
    total: dict[str, Tensor] = {}
    for n in range(len(tokens)):
        logits = model(input_ids=tokens[n : n + 1]).logits[0, :-1]
        for score in logits:
            add_squares(total, model, F.cross_entropy(score[None], torch.multinomial(score.softmax(0), 1)))


def pairs(images: int, size: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """{what is computed: (plain, adapter)}."""
    model = Network()
    x, y = torch.randn(images, 3, size, size), torch.randint(0, 10, (images,))
    data = TensorDataset(x, y)
    module = ModuleType("task2vec")
    # As much of the frontend's class as the replacement touches.
    module.Task2Vec = type("Task2Vec", (SimpleNamespace,), {"montecarlo_fisher": lambda self, dataset: None})
    accelerate(module, estimator="monte_carlo", samples=1)
    options = {"skip_layers": 0, "max_samples": None, "loader_opts": {"batch_size": BATCH}, "bernoulli": False}
    task2vec = module.Task2Vec(model=model, **options)
    frozen = copy.deepcopy(model).requires_grad_(False)
    replaced = Task2Vec(
        ProbeNetwork.of(copy.deepcopy(model.network)),
        method="variational",
        loader_opts={"batch_size": BATCH, "num_samples": images, "drop_last": False},
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=2000, n_embd=192, n_layer=4, n_head=6, bos_token_id=0, eos_token_id=0)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 2000, (max(images // 8, 1), 32))

    def drawn(logits: Tensor, n: int) -> Tensor:
        return torch.multinomial(logits.softmax(1), 1)[:, 0]

    def given(logits: Tensor, n: int) -> Tensor:
        return y[n : n + 1]

    image_task = f"ResNet-18, {images} images of {size} x {size}"
    loss = nn.CrossEntropyLoss()
    return {
        f"`fim_diag`, {image_task}, their labels": (
            lambda: one_by_one(model, x, given),
            lambda: fim_diag(model, DataLoader(data, BATCH), labels="true"),
        ),
        f"`compute_importances`, {image_task}, their labels": (
            lambda: one_by_one(model, x, given),
            lambda: compute_importances(model, loss, None, data, "cpu", BATCH),
        ),
        f"`accelerate`, {image_task}, one drawn label each": (
            lambda: one_by_one(model, x, drawn),
            lambda: task2vec.montecarlo_fisher(data),
        ),
        f"`embed_text`, GPT-2 of 4 layers, width 192, {len(tokens)} texts of 32 tokens, one drawn label a token": (
            lambda: token_by_token(gpt2, tokens),
            lambda: embed_text(gpt2, [tokens], estimator="monte_carlo"),
        ),
        f'`Task2Vec(method="variational")`, {image_task}, one epoch': (
            lambda: noisy_steps(frozen, x, y),
            lambda: replaced.variational_fisher(data),
        ),
        **peers(x, y),
    }


class NoisyWeights(torch.overrides.TorchFunctionMode):
    """Noise by a second convolution of the squares, with every weight's variance, as the public code has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        self.variances = {id(m.weight): torch.full((len(m.weight), 1, 1, 1), -9.0, requires_grad=True) for m in layers}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is not F.conv2d:
            return output
        variance = self.variances[id(args[1])].expand_as(args[1]).exp()
        return output + func(args[0] ** 2 + 1e-2, variance, None, *args[3:]).sqrt() * torch.randn_like(output)


def noisy_steps(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One epoch of variances, the rest frozen."""
    noise = NoisyWeights(model)
    adam = torch.optim.Adam(noise.variances.values(), lr=1e-2)
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        with noise:
            loss = F.cross_entropy(model(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()


def peers(x: Tensor, y: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    found = {}
    for name, title in (("backpack", "BackPACK `SumGradSquared`"), ("opacus", "Opacus `grad_sample`")):
        try:
            contestants = importlib.import_module(f"bench.peers.{name}").CONTESTANTS
        except ImportError:
            continue
        # BackPACK with the memory option, which is the faster one here.
        contestant = contestants.get(f"{name}_save_memory", contestants.get(name))
        model = torchvision.models.resnet18(num_classes=10).eval()
        prepared = contestant.prepare(copy.deepcopy(model))

        def theirs(run: Callable = contestant.run, prepared: nn.Module = prepared) -> None:
            for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
                run(prepared, images, labels)

        def ours(model: nn.Module = model) -> None:
            fisher(model, list(zip(x.split(BATCH), y.split(BATCH), strict=True)), "empirical", granularity="parameter")

        found[f"`fisher` for {title}, ResNet-18, {len(x)} images of {x.shape[2]} x {x.shape[3]}"] = (theirs, ours)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(images: int, size: int, rounds: int) -> str:
    lines = ["| adapter and task | plain, s | adapter, s | times faster |", "| --- | --- | --- | --- |"]
    for title, (plain, adapter) in pairs(images, size).items():
        adapter()  # the planner measures this machine at its first call
        times = [(seconds(plain), seconds(adapter)) for _ in range(rounds)]
        first, second = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        lines.append(f"| {title} | {first:.2f} | {second:.3f} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="of images, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    text = table(arguments.images, arguments.size, arguments.rounds)
    print(text)
    if arguments.write:
        replace_section(arguments.write, "speed", text)


if __name__ == "__main__":
    main()
