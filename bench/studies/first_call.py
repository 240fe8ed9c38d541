"""What a call of fisher() costs beyond its batches, and what the hooks of a backward pass cost.

    python -m bench.studies.first_call [--rounds 5] [--batches 4] [--cells resnet18-32-64 ...] [--threads 1] [--toy]

A cell is a model, an image size and a batch size. Each round makes a copy of the network, which the library has not
seen, and calls fisher() over one batch (the first call), again over one batch (a later call), and over several batches,
of which the last ones are steady. The printed times are processor times of the process: other programs on the machine
disturb them less. ``beyond`` is the median over the rounds of (call - steady batch) / steady batch. The process keeps
memory that it has touched before, as one that embeds task after task does: otherwise new pages, whose price depends on
the system, would count for either call by chance.

The second table has a backward pass of ResNet-50 whose ops return zeros at once, so that rules and hooks are left. The
columns are the time within the hooks, the search for taps and owners (once a batch), and the whole of ``backward``
beside the same pass of torch without hooks.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from bench import harness
from bench.report import table
from t2v_fast import FisherRecorder, fisher, ops
from t2v_fast.gradients import squares
from t2v_fast.gradients.fast_forward import fast_forward, kept_memory
from t2v_fast.ops import dispatch

CELLS = ("resnet18-32-64", "resnet18-64-64", "resnet18-224-8")
TOUCHED = 2**30  # bytes of memory that are touched before each round
ESTIMATORS = (("monte_carlo", 1), ("deflated", 2))  # with their numbers of cotangents


def called(model: nn.Module, x: Tensor, batches: int, estimator: str, samples: int) -> tuple[float, list[float]]:
    """Seconds of a call over so many batches, and of each batch in it."""
    times: list[float] = []

    def loader() -> Iterator[Tensor]:
        for _ in range(batches):
            times.append(time.process_time())
            yield x
        times.append(time.process_time())

    start = time.process_time()
    fisher(model, loader(), estimator, samples)
    return time.process_time() - start, [b - a for a, b in itertools.pairwise(times)]


def of_calls(model: nn.Module, x: Tensor, rounds: int, batches: int, estimator: str, samples: int) -> list[float]:
    """Milliseconds of a steady batch, of the first and of a later call, and what the calls take beyond it."""
    called(copy.deepcopy(model), x, 2, estimator, samples)  # the planner measures the machine once
    steady, first, later = [], [], []
    with kept_memory():
        for _ in range(rounds):
            torch.ones(TOUCHED // 4)
            new = copy.deepcopy(model)
            first.append(called(new, x, 1, estimator, samples)[0])
            later.append(called(new, x, 1, estimator, samples)[0])
            steady.append(statistics.median(called(new, x, batches + 1, estimator, samples)[1][1:]))
    medians = [1e3 * statistics.median(t) for t in (steady, first, later)]
    beyond = [statistics.median(c / s - 1 for c, s in zip(call, steady, strict=True)) for call in (first, later)]
    return [*medians, *beyond]


def no_op(name: str, *arguments: Any) -> Tensor:
    """An op that returns zeros of the right shape."""
    if name in ("winograd_conv", "conv_gram"):  # a layer of the network, and what later cotangents need
        return REAL(name, *arguments)
    g = arguments[0] if name in ("sq_prod", "sq_norm") else arguments[1]
    width = arguments[2] if name == "sq_scatter" else g.shape[1 if name in ("sq_conv", "sq_gram") else 2]
    key = (name, g.shape[0], width)
    if key not in ZEROS:
        ZEROS[key] = g.new_zeros(*([2] if name in ("sq_linear", "sq_norm") else []), g.shape[0], width)
    return ZEROS[key]


REAL, ZEROS = dispatch.call, {}


def of_hooks(model: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Milliseconds in the hooks, in the search for taps, and of backward passes with and without hooks."""
    inside = [0]
    real = squares.backpropagate

    def timed(output: Tensor, cotangent: Tensor, taps: Any, visit: Any, retain_graph: bool) -> None:
        def each(node: Node, gradients: tuple) -> None:
            start = time.thread_time_ns()
            visit(node, gradients)
            inside[0] += time.thread_time_ns() - start

        real(output, cotangent, taps, each, retain_graph)

    rows = []
    dispatch.call, squares.backpropagate = no_op, timed
    try:
        with FisherRecorder(model) as recorder, fast_forward(model, lambda m, x: m(x), "cpu") as run:
            for _ in range(rounds + 1):
                inside[0] = 0
                output = run(model, x)
                u = torch.ones_like(output)
                times = [time.process_time()]
                recorder.backward(output, u)
                times.append(time.process_time())
                output = run(model, x)
                times.append(time.process_time())
                taps = recorder._taps(output)
                times.append(time.process_time())
                ends = [GradientEdge(node, k) for node in taps.last for k in range(len(node._input_metadata))]
                torch.autograd.grad([output], ends, [u], allow_unused=True)
                times.append(time.process_time())
                spent = [b - a for a, b in itertools.pairwise(times)]
                rows.append((inside[0] / 1e9, spent[2], spent[0], spent[3]))
    finally:
        dispatch.call, squares.backpropagate = REAL, real
    return [1e3 * statistics.median(column) for column in zip(*rows[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a small network, for the tests")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    extension = ops.cpu_capability() if ops.backend_status()["cpu"] == "available" else "none"
    print(f"instruction set: torch {torch.backends.cpu.get_cpu_capability()}, extension {extension}")
    print(f"threads: {options.threads}; processor times; medians of {options.rounds} rounds\n")
    rows = []
    for cell in ["toy-32-4"] if options.toy else options.cells:
        name, size, batch = cell.rsplit("-", 2)
        torch.manual_seed(0)
        model = harness.MODELS[name](int(size)).eval()
        x = torch.randn(int(batch), 3, int(size), int(size))
        for estimator, samples in ESTIMATORS:
            found = of_calls(model, x, options.rounds, options.batches, estimator, samples)
            rows.append((name, f"{size}, batch of {batch}", f"{estimator}, {samples}", *(f"{t:.2f}" for t in found)))
    heads = "model images estimator", "steady", "first", "later", "first beyond", "later beyond"
    table((*heads[0].split(), *heads[1:]), rows)
    model_name = "toy" if options.toy else "resnet50"
    model, x = harness.MODELS[model_name](32).eval(), torch.randn(2, 3, 32, 32)
    found = of_hooks(model, x, max(options.rounds, 1) * (1 if options.toy else 3))
    heads = "model", "in the hooks", "search for taps", "backward", "backward without hooks"
    table(heads, [(model_name, *(f"{t:.2f}" for t in found))])


if __name__ == "__main__":
    main()
