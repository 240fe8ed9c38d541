"""What is timed: ceilings of the card, layers by path, whole networks, and peers."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import t2v_fast
from bench import contestants
from bench.gpu.card import KINDS, apart, backends, longest, messages_of, products, rotated, seconds
from bench.gpu.networks import network
from bench.gpu.pool import Job
from bench.gpu.report import Absent, Report
from t2v_fast import ops
from t2v_fast.gradients.fast_forward import FastNetwork
from t2v_fast.ops import planner

LAYERS = {
    "3x3, 64 to 64, 56x56": planner.Conv(64, (56, 56), 64, (3, 3), padding=(1, 1)),
    "3x3, 128 to 128, 28x28": planner.Conv(128, (28, 28), 128, (3, 3), padding=(1, 1)),
    "3x3, 256 to 256, 14x14": planner.Conv(256, (14, 14), 256, (3, 3), padding=(1, 1)),
    "3x3, 512 to 512, 7x7": planner.Conv(512, (7, 7), 512, (3, 3), padding=(1, 1)),
    "1x1, 256 to 1024, 14x14": planner.Conv(256, (14, 14), 1024, (1, 1)),
    "7x7 stem, 224x224": planner.Conv(3, (224, 224), 64, (7, 7), (2, 2), (3, 3)),
    "7x7 depthwise, 96, 56x56": planner.Conv(96, (56, 56), 96, (7, 7), padding=(3, 3), groups=96),
    "linear 768 to 3072, 197 tokens": planner.Conv(768, (1, 197), 3072),
}
TOY_LAYERS = {
    "3x3, 8 to 8, 6x6": planner.Conv(8, (6, 6), 8, (3, 3), padding=(1, 1)),
    "3x3 depthwise, 8, 6x6": planner.Conv(8, (6, 6), 8, (3, 3), padding=(1, 1), groups=8),
}


def ceilings(report: Report, device: torch.device, size: int) -> None:
    """The rates of one large product in each precision, and of a copy."""

    def product(kind: str) -> float:
        with products(kind):
            a, b = torch.randn(2, size, size, device=device).to(KINDS[kind])
            return 2 * size**3 / seconds(lambda: a @ b) / 1e12

    def copy() -> float:
        source = torch.empty(size * size * 4, device=device)
        target = torch.empty_like(source)
        return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source)) / 1e9

    for kind in KINDS:
        report.line("ceilings", f"{kind}, TFLOP/s", partial(product, kind))
    report.line("ceilings", "copy, GB/s", copy)


def planner_rates(report: Report, device: torch.device) -> None:
    """The rates by which the planner chooses on this card."""

    def measured() -> dict[str, float]:
        try:
            rates = importlib.import_module("t2v_fast.ops.gpu_rates")
        except ImportError as error:
            raise Absent(f"the planner measures no rates: {error}") from error
        found = rates.measure(device)
        products = {", ".join(key): rate for key, rate in found.products.items()}
        return products | {"GB/s": found.bandwidth, "measured": found.measured}

    report.line("rates", "measured", measured, excused=device.type != "cuda")


def layer(conv: planner.Conv, path: str, backend: str, kind: str, batch: int, device: torch.device) -> dict[str, float]:
    """The time and the rates of one layer's squares, with inputs that are not in the cache."""
    inputs = rotated(partial(_inputs, conv, kind, batch, device), 2**28 if device.type == "cuda" else 1)
    with ops.use_backend(backend), products(kind):
        spent = seconds(lambda: ops.sq_conv(*next(inputs), *conv.arguments, path))
    work = planner.gpu_work(conv, path, KINDS[kind].itemsize)
    return {
        "us an example": 1e6 * spent / batch,
        "TFLOP/s": batch * (work.flops + work.sum_flops) / spent / 1e12,
        "GB/s": batch * work.bytes / spent / 1e9,
    }


def _inputs(conv: planner.Conv, kind: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, conv.channels, *conv.size, device=device)
    g = torch.randn(batch, conv.filters, *conv.out_size, device=device)
    x, g = (t.to(KINDS[kind]).contiguous(memory_format=torch.channels_last) for t in (x, g))
    return x, g


def compilations(device: torch.device, sizes: Any) -> list[Job]:
    """What Triton and torch.compile compile for the lines below, into their caches on the disk.

    What is not compiled there is compiled later. A failure shows then, as one of the library's own.
    """
    found: dict[str, Callable[[], object]] = {}
    compiling = [name for name in backends(device) if name != "cuda"]  # nvcc has compiled those already
    for name, size, batch in sizes.cells:
        for kind in sizes.compiled:
            found[f"compiled step of {name}, {kind}"] = partial(_once, name, size, batch, kind, device, "step")
        for backend in compiling:
            for kind in KINDS:
                found[f"squares of {name}, {kind}"] = partial(_once, name, size, batch, kind, device, backend)
    for backend in compiling:
        for name, conv in sizes.layers.items():
            for kind in KINDS:
                for path in paths(conv):
                    found[f"{name}, {kind}, {path}"] = partial(_layer_once, conv, path, backend, kind, device, sizes)
    return [Job("compiled ahead", name, run, excused=True) for name, run in found.items()]


def _once(name: str, size: int, batch: int, kind: str, device: torch.device, what: str) -> None:
    model, x, u = _prepared(name, size, batch, kind, device)
    with products(kind):
        if what == "step":
            step_of(name, size, batch, kind, device, compiled=True)()
            return
        with ops.use_backend(what), _squares(model) as squares:
            squares(x, u)


def _layer_once(conv: planner.Conv, path: str, backend: str, kind: str, device: torch.device, sizes: Any) -> None:
    with ops.use_backend(backend), products(kind):
        ops.sq_conv(*_inputs(conv, kind, sizes.batch, device), *conv.arguments, path)


def paths(conv: planner.Conv) -> list[str]:
    """The paths of a layer that GPUs have."""
    return [path for path in conv.paths() if path != "winograd"]


def layers(report: Report, device: torch.device, table: dict[str, planner.Conv], batch: int) -> None:
    """Every layer by backend, precision and path."""
    for name, conv in table.items():
        for backend in backends(device):
            for kind in KINDS:
                for path in paths(conv):
                    key = f"{name}, {kind}, {backend}, {path}"
                    report.line("layers", key, partial(layer, conv, path, backend, kind, batch, device))


@contextmanager
def frozen(model: nn.Module) -> Iterator[list[Tensor]]:
    """No parameter needs a gradient, and the first layer's output does: it is in the list after a forward pass."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs[:] = [output.requires_grad_()]
        return outputs[0]

    handle = model.first.register_forward_hook(keep)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield outputs
    finally:
        handle.remove()
        for p in parameters:
            p.requires_grad_(True)


@functools.lru_cache(maxsize=1)
def _model(name: str, size: int, kind: str, device: torch.device) -> nn.Module:
    """A network that the lines of one cell share: they leave it as it was, and to make one takes seconds."""
    return network(name, size, device, KINDS[kind])


def step_of(name: str, size: int, batch: int, kind: str, device: torch.device, compiled: bool) -> Callable[[], object]:
    """A training step without the update, eager or compiled."""
    model, x, u = _prepared(name, size, batch, kind, device)
    parameters = list(model.parameters())
    # In a rehearsal nothing is compiled to machine code, which takes minutes.
    backend = "inductor" if device.type == "cuda" else "eager"
    forward = torch.compile(model, backend=backend) if compiled else model
    return lambda: torch.autograd.grad(forward(x), parameters, u)


def _prepared(name: str, size: int, batch: int, kind: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = _model(name, size, kind, device), _images(size, batch, kind, device)
    return model, x, torch.randn(batch, 10, device=device, dtype=KINDS[kind])


def _images(size: int, batch: int, kind: str, device: torch.device) -> Tensor:
    x = torch.randn(batch, 3, size, size, device=device, dtype=KINDS[kind])
    return x.contiguous(memory_format=torch.channels_last)


def time_floor(name: str, size: int, batch: int, kind: str, device: torch.device) -> dict[str, float]:
    """Forward, and backward to the first layer's output, without any weight gradient."""
    model, x, u = _prepared(name, size, batch, kind, device)

    def run() -> None:
        y = model(x)
        torch.autograd.grad(y, outputs, u)

    with products(kind), frozen(model) as outputs:
        return apart(run)


def time_step(
    name: str, size: int, batch: int, kind: str, device: torch.device, compiled: bool = False
) -> dict[str, float]:
    """Forward, and backward with all weight gradients."""
    with products(kind):
        return apart(step_of(name, size, batch, kind, device, compiled))


@contextmanager
def _squares(model: nn.Module) -> Iterator[Callable[[Tensor, Tensor], object]]:
    """A pass with squares of one cotangent, as ``fisher()`` makes it: images x, cotangents u."""
    forward = FastNetwork(model, lambda model, x: model(x))
    with t2v_fast.FisherRecorder(model) as recorder, forward:
        yield lambda x, u: recorder.backward(forward(model, x), u)


def time_squares(name: str, size: int, batch: int, kind: str, device: torch.device, backend: str) -> dict[str, float]:
    """Forward, and backward with squared per-example gradients of one cotangent."""
    model, x, u = _prepared(name, size, batch, kind, device)
    with products(kind), ops.use_backend(backend), _squares(model) as squares:
        return apart(lambda: squares(x, u))


def time_kernels(
    name: str, size: int, batch: int, kind: str, device: torch.device, backend: str | None
) -> dict[str, float]:
    """The kernels of one pass that take longest: milliseconds by name. With squares, unless the backend is None."""
    model, x, u = _prepared(name, size, batch, kind, device)
    with products(kind):
        if backend is None:
            with frozen(model) as outputs:
                return longest(lambda: torch.autograd.grad(model(x), outputs, u), 30)
        with ops.use_backend(backend), _squares(model) as squares:
            for _ in range(2):
                squares(x, u)
            return longest(lambda: squares(x, u), 30)


def time_replayed(name: str, size: int, batch: int, kind: str, device: torch.device, backend: str) -> dict[str, float]:
    """Forward, backward and squares as one CUDA graph, replayed: what the host costs without it."""
    model, x, u = _prepared(name, size, batch, kind, device)
    with products(kind), ops.use_backend(backend), _squares(model) as squares:
        for _ in range(2):
            squares(x, u)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            squares(x, u)
        return apart(graph.replay)


def time_fisher(
    name: str,
    size: int,
    batch: int,
    kind: str,
    device: torch.device,
    batches: int,
    cuda_graphs: bool | None = None,
    calls: int = 2,
) -> dict[str, float]:
    """Milliseconds of a steady batch of ``fisher()`` with one cotangent, and what a call costs beyond its batches.

    A batch is steady in the later half of a call. There the self-check looks at none if ``batches`` is a power of two.
    The host is at most two batches ahead of the device, so that the times at which it asks for batches show the
    device's. Raises Absent, with the reason, where ``cuda_graphs`` is True and no graph can be captured.
    """
    model = _model(name, size, kind, device)
    x = torch.randn(batch, 3, size, size, dtype=KINDS[kind])
    x = x.pin_memory() if device.type == "cuda" else x

    def call() -> tuple[float, float]:
        asked: list[float] = []

        def loader() -> Iterator[Tensor]:
            for _ in range(batches):
                asked.append(time.perf_counter())
                yield x

        begin = time.perf_counter()
        t2v_fast.fisher(model, loader(), "hutchinson", 1, cuda_graphs=cuda_graphs)
        torch.cuda.synchronize()
        steady = (asked[-1] - asked[batches // 2 + 1]) / (batches - batches // 2 - 2)
        return 1e3 * steady, 1e3 * (time.perf_counter() - begin - batches * steady)

    with products(kind), messages_of("t2v_fast.estimation.graphs") as messages:
        found = [call() for _ in range(calls)]
    if cuda_graphs and "CUDA graphs: 0 of" in messages[-1]:
        raise Absent("; ".join(messages))
    names = ("first call's own", "later call's own")
    return {"ms": found[-1][0], **{name: own for name, (_, own) in zip(names, found, strict=False)}}


def time_peer(
    peer: str, name: str, size: int, batch: int, kind: str, device: torch.device, examples: int
) -> dict[str, float]:
    """Milliseconds of a batch by another way to per-example squares, from ``examples`` of the batch.

    A way to the squares for given labels is compared with the loop: its relative error, and what it leaves out.
    """
    contestant = contestants.find(peer)
    model = network(name, size, device, KINDS[kind])  # its own: peers leave hooks in a network
    x = _images(size, min(batch, examples), kind, device)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    state = contestant.prepare(model)
    with products(kind), contestant.session():
        spent = seconds(lambda: contestant.run(state, x, y), 3)
        found = {"ms": 1e3 * spent * batch / len(x), "examples": len(x)}
        if contestant.target != contestants.LABELS:
            return found
        got = contestant.run(state, x[:2], y[:2])
        want = contestants.naive(network(name, size, device, KINDS[kind]), x[:2], y[:2])
    both = [(got[key].double().flatten(), value.double().flatten()) for key, value in want.items() if key in got]
    difference, whole = torch.cat([g - w for g, w in both]), torch.cat([w for _, w in both])
    return found | {"error": float(difference.norm() / whole.norm()), "left out": len(want) - len(both)}


# By name: the examples that it gets at once. A loop takes time, and vmap holds the gradients of all of them.
PEERS = {"naive": 4, "vmap_chunked": 16, "curvlinops": 16, "opacus": 16, "backpack_save_memory": 16}


def networks(report: Report, device: torch.device, cells: list[tuple[str, int, int]], batches: int) -> None:
    """Floor, step, compiled step, squares and ``fisher()`` of each network in each precision."""
    for kind in KINDS:
        for name, size, batch in cells:
            cell = (name, size, batch, kind, device)
            title = f"{name}, {size}, batch {batch}, {kind}: "
            report.line("networks", f"{title}floor", partial(time_floor, *cell))
            report.line("networks", f"{title}step", partial(time_step, *cell))
            for backend in backends(device):
                report.line("networks", f"{title}squares, {backend}", partial(time_squares, *cell, backend))
            report.line("networks", f"{title}fisher()", partial(time_fisher, *cell, batches, calls=1))
            run = partial(time_fisher, *cell, batches // 4, cuda_graphs=False)
            report.line("networks", f"{title}fisher(), as it is", run)
            for backend in (None, *backends(device)):
                what = "floor" if backend is None else f"squares, {backend}"
                report.line("kernels", f"{title}{what}", partial(time_kernels, *cell, backend))
            torch.cuda.empty_cache()


def compiled(report: Report, device: torch.device, cells: list[tuple[str, int, int]], kinds: tuple[str, ...]) -> None:
    """Compiled steps, whose compilation takes long."""
    for name, size, batch in cells:
        for kind in kinds:
            title = f"{name}, {size}, batch {batch}, {kind}: compiled step"
            run = partial(time_step, name, size, batch, kind, device, compiled=True)
            report.line("networks", title, run)
            torch.compiler.reset()
            torch.cuda.empty_cache()


def graphs(report: Report, device: torch.device, cells: list[tuple[str, int, int]], kinds: tuple[str, ...]) -> None:
    """Squares of one cotangent as one CUDA graph: what the host costs without it, if everything can be captured."""
    for name, size, batch in cells:
        for kind in kinds:
            for backend in backends(device):
                title = f"{name}, {size}, batch {batch}, {kind}: squares replayed, {backend}"
                run = partial(time_replayed, name, size, batch, kind, device, backend)
                report.line("networks", title, run, excused=True)


def replays(report: Report, device: torch.device, cells: Iterable[tuple[str, int, int]], batches: int) -> None:
    """``fisher()`` with and without CUDA graphs. A network that replays nothing is left out, and says why."""
    for kind in KINDS:
        for name, size, batch in cells:
            for replayed in (False, True):
                title = f"{name}, {size}, batch {batch}, {kind}: fisher(), {'replayed' if replayed else 'as it is'}"
                run = partial(time_fisher, name, size, batch, kind, device, batches, replayed)
                report.line("networks", title, run)
            torch.cuda.empty_cache()


def peers(report: Report, device: torch.device, cells: list[tuple[str, int, int]], kind: str = "TF32") -> None:
    """Other ways to the same squares, in the precision that suits them."""
    for name, size, batch in cells:
        for peer, examples in PEERS.items():
            run = partial(time_peer, peer, name, size, batch, kind, device, examples)
            report.line("peers", f"{name}, {size}, batch {batch}, {kind}: {peer}", run, excused=True)
            torch.cuda.empty_cache()
