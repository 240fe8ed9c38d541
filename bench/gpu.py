"""Verify and measure this library on a GPU, and write a report.

    python -m bench.gpu [--output build/gpu] [--minutes 8]

Every backend that runs on the device is first compared with float64: each op on each geometry of the tests and in each
dtype, torch's own checks of the operators, and whole networks. Then CUDA events time the ceilings of the card, single
layers by path, and whole networks: the network alone (floor), a training step, this library in float32, TF32 and
bfloat16, and the peers that are installed. What a peer cannot do, and what is not timed for lack of memory or time, is
left out with the reason. Any other failure is wrong: a wrong result, an error, or a network that this library refuses.
The script writes gpu.json and gpu.md, and exits with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t2v_fast
from t2v_fast import ops
from t2v_fast.ops import gpu_specs, planner
from t2v_fast.ops.reference import accumulate_dtype

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
import cases
import op_checks
from oracle import per_example_squares, randomise_norms, reduce, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What products are made of, and torch's word for it.
MODES = {
    "float32": (torch.float32, "highest"),
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}
LAYERS = {
    "3x3, 64 to 64, 56x56": planner.Conv(64, (56, 56), 64, (3, 3), padding=(1, 1)),
    "3x3, 128 to 128, 28x28": planner.Conv(128, (28, 28), 128, (3, 3), padding=(1, 1)),
    "3x3, 256 to 256, 14x14": planner.Conv(256, (14, 14), 256, (3, 3), padding=(1, 1)),
    "3x3, 512 to 512, 7x7": planner.Conv(512, (7, 7), 512, (3, 3), padding=(1, 1)),
    "7x7 stem, 224x224": planner.Conv(3, (224, 224), 64, (7, 7), (2, 2), (3, 3)),
    "7x7 depthwise, 96, 56x56": planner.Conv(96, (56, 56), 96, (7, 7), padding=(3, 3), groups=96),
    "linear 768 to 3072, 197 tokens": planner.Conv(768, (1, 197), 3072),
}

TOY_LAYERS = {
    "3x3, 8 to 8, 6x6": planner.Conv(8, (6, 6), 8, (3, 3), padding=(1, 1)),
    "3x3 depthwise, 8, 6x6": planner.Conv(8, (6, 6), 8, (3, 3), padding=(1, 1), groups=8),
    "linear 16 to 24, 5 tokens": planner.Conv(16, (1, 5), 24),
}


@contextmanager
def products(precision: str) -> Iterator[None]:
    before = "high" if gpu_specs.allows_tf32() else "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Report:
    """Collects results, and what went wrong; nothing stops the rest."""

    def __init__(self, device: torch.device, minutes: float) -> None:
        self.device, self.end = device, time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {"wrong": [], "left_out": []}

    def attempt(self, section: str, name: str, run: Callable[[], Any], peer: bool = False) -> None:
        """Keep the result of a part, or why there is none. ``peer`` marks a part that measures other code."""
        verifies = section in ("ops", "against_float64")
        if time.monotonic() > self.end:
            self.results["wrong" if verifies else "left_out"].append(f"{section}: {name}: no time was left")
            return
        try:
            self.results.setdefault(section, {})[name] = run()
        except AssertionError as error:
            self.results["wrong"].append(f"{section}: {name}: {error or traceback.format_exc(limit=-1)}")
        except Exception as error:
            # A peer may be missing, or may refuse a network. What this library supports must not fail.
            excused = peer or (isinstance(error, torch.OutOfMemoryError) and not verifies)
            place = "left_out" if excused else "wrong"
            self.results[place].append(f"{section}: {name}: {type(error).__name__}: {error}")

    def seconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        """The median, by CUDA events where there are any, after three calls that warm up."""
        for _ in range(3):
            run()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


def backends(device: torch.device) -> list[str]:
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [name for name in wanted if ops.backend_status()[name] == "available"]


def verify_ops(backend: str, dtype: torch.dtype, device: torch.device, every: int = 1) -> str:
    """The tests' geometries on the device, or only each ``every``-th convolution, within the tests' bounds."""
    count = 0
    with ops.use_backend(backend):
        for case in cases.CONVOLUTIONS[::every]:
            x = op_checks.guarded((case.n, case.c, *case.size), dtype, 1, "channels_last")
            g = op_checks.guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2)
            gradients, terms = op_checks.conv_gradients(case, x, g), math.prod(case.out_size)
            x, g = x.to(device), g.to(device)
            found = [ops.sq_conv(x, g, *case.geometry, path) for path in ("explicit", "gram")]
            found.append(ops.sq_gram(ops.conv_gram(x, *case.geometry), g))
            for q in found:
                op_checks.assert_close(q.cpu(), op_checks.filter_sums(gradients), dtype, terms)
            weight = torch.rand(len(g), dtype=accumulate_dtype(dtype))
            out = torch.zeros(gradients.shape[1:], dtype=weight.dtype, device=device)
            ops.sq_conv_acc_(out, x, g, weight.to(device), *case.geometry[1:])
            want = torch.tensordot(weight.double(), gradients.square(), 1)
            op_checks.assert_close(out.cpu(), want, dtype, terms)
            count += 4
        for case in cases.OUTERS:
            x = op_checks.guarded((case.n, case.s, case.i), dtype, 1)
            g = op_checks.guarded((case.n * case.cotangents, case.s, case.o), dtype, 2)
            want = op_checks.filter_sums(op_checks.outer_gradients(x, g))
            for path in ops.OUTER_PATHS:
                op_checks.assert_close(ops.sq_outer(x.to(device), g.to(device), path).cpu(), want, dtype, case.s)
                count += 1
        for n, s, c in ((3, 5, 7), (2, 70, 18), (1, 3, 1100)):
            x, g = op_checks.guarded((n, s, c), dtype, 1), op_checks.guarded((n, s, c), dtype, 2)
            q = ops.sq_norm(g.to(device), x.to(device)).cpu()
            op_checks.assert_close(q[0], op_checks.prod_gradients(g, x, None, None).square(), dtype, 4 * s)
            op_checks.assert_close(q[1], g.double().sum(1).square(), dtype, 4 * s)
            index = torch.randint(-1, 4, (n, s), generator=torch.Generator().manual_seed(n))
            want = op_checks.filter_sums(op_checks.scatter_gradients(index, g, 4))
            op_checks.assert_close(ops.sq_scatter(index.to(device), g.to(device), 4).cpu(), want, dtype, s + c)
            count += 2
    return f"{count} results within the bound"


def verify_operator(name: str, device: torch.device) -> str:
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in op_checks.OPCHECKS[name]()]
    torch.library.opcheck(getattr(torch.ops.t2v_fast, name), tuple(arguments))
    return "passed"


def verify_capture(backend: str, device: torch.device) -> str:
    """Replays of a CUDA graph follow its inputs: no op waits for the device or keeps to another stream."""
    x, g = torch.randn(4, 16, 12, 12, device=device), torch.randn(4, 24, 12, 12, device=device)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    calls = {path: lambda path=path: ops.sq_conv(x, g, *geometry, path) for path in ("explicit", "gram")}
    calls["norm"] = lambda: ops.sq_norm(g.flatten(2).transpose(1, 2), g.flatten(2).transpose(1, 2))
    with ops.use_backend(backend):
        for name, call in calls.items():
            call()  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                q = call()
            for _ in range(2):
                g.normal_()
                graph.replay()
                assert torch.equal(q, call()), name
    return f"{len(calls)} captured and replayed"


def model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    if name == "toy":
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(8 * 14 * 14, 10))
    else:
        import torchvision

        torch.manual_seed(0)
        network = getattr(torchvision.models, name)(num_classes=10)
    return randomise_norms(network).to(device=device, dtype=dtype, memory_format=torch.channels_last)


def verify_network(name: str, backend: str, dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Relative error of all filters' squares together, against autograd with one example at a time in float64."""
    torch.manual_seed(1)
    x, u = torch.randn(4, 3, size, size, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    squares = per_example_squares(model(name, device, torch.float64), x.to(device), u[None].to(device))
    want = {key: reduce(value, "filter").sum(0) for key, value in squares.items()}
    network = model(name, device, dtype)
    with ops.use_backend(backend), t2v_fast.FisherRecorder(network) as recorder:
        logits = network(x.to(device, dtype))
        found = recorder.backward(logits, u.to(device, dtype))
    got = torch.cat([found[key].sum(0).flatten() for key in want])
    error = relative_error(got, torch.cat([value.flatten() for value in want.values()]))
    bound = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}[dtype]
    assert error <= bound, f"relative error {error:.1e}, expected at most {bound:.0e}"
    return error


def ceilings(report: Report, size: int) -> None:
    device = report.device

    def product(dtype: torch.dtype, precision: str) -> float:
        with products(precision):
            a, b = torch.randn(2, size, size, device=device).to(dtype)
            return 2 * size**3 / report.seconds(lambda: a @ b) / 1e12

    for kind, mode in MODES.items():
        report.attempt("ceilings", f"{kind}, TFLOP/s", lambda mode=mode: product(*mode))
    source = torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    report.attempt(
        "ceilings", "copy, GB/s", lambda: 2 * 4 * source.numel() / report.seconds(lambda: target.copy_(source)) / 1e9
    )


def time_layers(report: Report, layers: dict[str, planner.Conv], backend: str, kind: str, batch: int) -> None:
    dtype, precision = MODES[kind]
    for name, conv in layers.items():

        def run(conv: planner.Conv = conv, path: str = "explicit") -> dict[str, float]:
            layout = {"memory_format": torch.channels_last}
            x = torch.randn(batch, conv.channels, *conv.size, device=report.device).to(dtype=dtype, **layout)
            g = torch.randn(batch, conv.filters, *conv.out_size, device=report.device).to(dtype=dtype, **layout)
            with ops.use_backend(backend), products(precision):
                seconds = report.seconds(lambda: ops.sq_conv(x, g, *conv.arguments, path))
            work = planner.gpu_work(conv, path, x.element_size())
            return {
                "us an example": 1e6 * seconds / batch,
                "TFLOP/s": batch * (work.flops + work.sum_flops) / seconds / 1e12,
                "GB/s": batch * work.bytes / seconds / 1e9,
            }

        for path in (p for p in conv.paths() if p != "winograd"):
            key = f"{backend}, {kind}, {name}, {path}"
            report.attempt("layers", key, lambda path=path, run=run: run(path=path))


def time_network(report: Report, name: str, size: int, batch: int) -> None:
    """Milliseconds a batch; one cotangent."""
    network = model(name, report.device)
    x = torch.randn(batch, 3, size, size, device=report.device).to(memory_format=torch.channels_last)
    u = torch.randn(batch, 10, device=report.device)
    parameters = list(network.parameters())
    frozen = x.clone().requires_grad_()

    def floor() -> None:
        for p in parameters:
            p.requires_grad_(False)
        try:
            torch.autograd.grad(network(frozen), frozen, u)
        finally:
            for p in parameters:
                p.requires_grad_(True)

    def step() -> None:
        torch.autograd.grad(network(x), parameters, u)

    def alone() -> None:
        for n in range(min(batch, 8)):
            torch.autograd.grad(network(x[n : n + 1]), parameters, u[n : n + 1])

    def vmap() -> None:
        state = {k: p.detach() for k, p in network.named_parameters()}
        buffers = dict(network.named_buffers())

        def score(state: dict[str, Tensor], image: Tensor, cotangent: Tensor) -> Tensor:
            return (torch.func.functional_call(network, state | buffers, image[None])[0] * cotangent).sum()

        torch.func.vmap(torch.func.grad(score), in_dims=(None, 0, 0))(state, x, u)

    def fisher(backend: str, dtype: torch.dtype, precision: str) -> float:
        probe = model(name, report.device, dtype)
        images, cotangents = x.to(dtype), u.to(dtype)
        with products(precision), ops.use_backend(backend), t2v_fast.FisherRecorder(probe) as recorder:
            return 1e3 * report.seconds(lambda: recorder.backward(probe(images), cotangents))

    title = f"{name}, {size}, batch {batch}: "
    report.attempt("networks", title + "floor", lambda: 1e3 * report.seconds(floor))
    report.attempt("networks", title + "step", lambda: 1e3 * report.seconds(step))
    for backend in backends(report.device):
        for kind, mode in MODES.items():
            report.attempt("networks", f"{title}fisher, {backend}, {kind}", lambda b=backend, m=mode: fisher(b, *m))
    scale = batch / min(batch, 8)
    report.attempt("networks", title + "batch of one, autograd", lambda: 1e3 * scale * report.seconds(alone, 3))
    report.attempt("networks", title + "vmap", lambda: 1e3 * report.seconds(vmap, 3), peer=True)

    def backpack() -> float:
        from backpack import backpack as context
        from backpack import extend
        from backpack.extensions import SumGradSquared

        extended = extend(model(name, report.device), use_converter=True)
        loss = extend(nn.CrossEntropyLoss(reduction="sum"))
        labels = torch.zeros(batch, dtype=torch.int64, device=report.device)

        def run() -> None:
            with context(SumGradSquared()):
                loss(extended(x), labels).backward()

        return 1e3 * report.seconds(run, 3)

    report.attempt("networks", title + "BackPACK", backpack, peer=True)


def markdown(results: dict[str, Any]) -> str:
    lines = [f"# {results['machine']['device']}", ""]
    for section, found in results.items():
        lines += [f"## {section.replace('_', ' ').capitalize()}", ""]
        if isinstance(found, list):
            lines += [f"- {' '.join(text.split())}" for text in found] or ["None."]
        else:
            lines += ["| | |", "| --- | --- |"]
            for name, value in found.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{v:.4g} {k}" for k, v in value.items())
                lines.append(f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=8, help="what has not begun by then is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--toy", action="store_true", help="a small network, small layers and small products: tries the script"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: see nvidia-smi, or try the script with --device cpu --toy")
    report = Report(device, arguments.minutes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report.results["machine"] = {"device": name, "torch": torch.__version__} | ops.backend_status()
    if not (found := backends(device)):
        report.results["wrong"].append(f"no backend but the reference runs on {device}")
    network, size, batch, product = ("toy", 32, 4, 256) if arguments.toy else ("resnet18", 64, 64, 8192)
    every = 6 if arguments.toy else 1  # on a CPU the tests have them all
    for backend in found:
        for dtype in DTYPES:
            key = f"{backend}, {dtype}"
            report.attempt("ops", key, lambda b=backend, d=dtype: verify_ops(b, d, device, every))
            report.attempt(
                "against_float64",
                f"{network}, {key}",
                lambda b=backend, d=dtype: verify_network(network, b, d, device, size),
            )
        if device.type == "cuda":
            report.attempt("cuda_graphs", backend, lambda b=backend: verify_capture(b, device))
    for op in ops.SCHEMAS:
        report.attempt("opcheck", op, lambda op=op: verify_operator(op, device))
    ceilings(report, product)
    for backend in found:
        for kind in MODES:
            time_layers(report, *((TOY_LAYERS, backend, kind, 2) if arguments.toy else (LAYERS, backend, kind, 64)))
    time_network(report, network, size, batch)
    if not arguments.toy:
        time_network(report, "resnet18", 224, 32)
        time_network(report, "vit_b_16", 224, 16)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.json").write_text(json.dumps(report.results, indent=1))
    (arguments.output / "gpu.md").write_text(markdown(report.results))
    print(f"{arguments.output / 'gpu.md'}: {len(report.results['wrong'])} wrong")
    sys.exit(bool(report.results["wrong"]))


if __name__ == "__main__":
    main()
