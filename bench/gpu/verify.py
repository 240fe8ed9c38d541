"""What must be right: ops and networks against float64, no waits in a steady batch, captures in CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from typing import Any

import cases
import op_checks
import steady
import torch
from oracle import per_example_squares, reduce, relative_error
from small import shapes, small_probe
from torch import Tensor
from torch.utils._pytree import tree_map_only

import t2v_fast
from bench.gpu import tools
from bench.gpu.card import DTYPES, backends, messages_of, products
from bench.gpu.networks import network
from bench.gpu.pool import Job
from bench.gpu.report import Absent
from t2v_fast import ops
from t2v_fast.ops.reference import accumulate_dtype

# Geometries that reach every kernel of Triton and every branch of its addresses. Each takes seconds to compile.
TWELVE = (
    *("3x3", "1x1", "1x1_strided", "3x3_strided", "3x3_dilated", "3x3_grouped", "depthwise", "depthwise_multiplier"),
    *("stem_7x7", "patches_4x4", "4x2_even", "one_example"),
)
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


def geometries(backend: str, every: int = 1) -> list[cases.ConvCase]:
    """The convolutions of the tests; for Triton the twelve above, and in a rehearsal each ``every``-th one."""
    if backend != "triton":
        return cases.CONVOLUTIONS[::every]
    found = [case for case in cases.CONVOLUTIONS if case.name in TWELVE]
    assert len(found) == len(TWELVE), f"tests/helpers/cases.py lacks {set(TWELVE) - {case.name for case in found}}"
    return found[::every]


def convolutions(backend: str, dtype: torch.dtype, device: torch.device, chosen: Sequence[cases.ConvCase]) -> str:
    """Every op of convolutions on the device, within the bounds of the tests."""
    count = 0
    with ops.use_backend(backend), products("float32"):
        for case in chosen:
            x = op_checks.guarded((case.n, case.c, *case.size), dtype, 1, "channels_last")
            g = op_checks.guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2)
            gradients, terms = op_checks.conv_gradients(case, x, g), math.prod(case.out_size)
            want = op_checks.filter_sums(gradients)
            x, g = x.to(device), g.to(device)
            found = {path: ops.sq_conv(x, g, *case.geometry, path) for path in ("explicit", "gram")}
            found["sq_gram"] = ops.sq_gram(ops.conv_gram(x, *case.geometry), g)
            weight = torch.rand(len(g), dtype=accumulate_dtype(dtype))
            out = torch.zeros(gradients.shape[1:], dtype=weight.dtype, device=device)
            ops.sq_conv_acc_(out, x, g, weight.to(device), *case.geometry[1:])
            weighted = torch.tensordot(weight.double(), gradients.square(), 1)
            for what, q in (*found.items(), ("sq_conv_acc_", out)):
                with _naming(f"{case.name}, {what}"):
                    op_checks.assert_close(q.cpu(), weighted if what == "sq_conv_acc_" else want, dtype, terms)
            count += 4
    return f"{count} results within the bound"


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say what was compared where the comparison fails."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def other_ops(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """The ops of linear layers, norms and embeddings on the device, within the bounds of the tests."""
    count = 0
    with ops.use_backend(backend), products("float32"):
        for case in cases.OUTERS:
            x = op_checks.guarded((case.n, case.s, case.i), dtype, 1)
            g = op_checks.guarded((case.n * case.cotangents, case.s, case.o), dtype, 2)
            want = op_checks.filter_sums(op_checks.outer_gradients(x, g))
            for path in ops.OUTER_PATHS:
                op_checks.assert_close(ops.sq_outer(x.to(device), g.to(device), path).cpu(), want, dtype, case.s)
                weight, bias = ops.sq_linear(x.to(device), g.to(device), path).cpu()
                op_checks.assert_close(weight, want, dtype, case.s)
                op_checks.assert_close(bias, g.double().sum(1).square(), dtype, case.s)
                count += 2
        for n, s, c in ((3, 5, 7), (2, 70, 18), (1, 3, 1100)):
            x, g = op_checks.guarded((n, s, c), dtype, 1), op_checks.guarded((n, s, c), dtype, 2)
            q = ops.sq_norm(g.to(device), x.to(device)).cpu()
            op_checks.assert_close(q[0], op_checks.prod_gradients(g, x, None, None).square(), dtype, 4 * s)
            op_checks.assert_close(q[1], g.double().sum(1).square(), dtype, 4 * s)
            index = torch.randint(-1, 4, (n, s), generator=torch.Generator().manual_seed(n))
            want = op_checks.filter_sums(op_checks.scatter_gradients(index, g, 4))
            op_checks.assert_close(ops.sq_scatter(index.to(device), g.to(device), 4).cpu(), want, dtype, s + c)
            count += 2
        for case in op_checks.GROUPED if backend != "cuda" else ():  # CUDA tensors run on Triton's kernel
            offsets, groups = case.offsets(), case.groups().to(device)
            x = op_checks.guarded((int(offsets[-1]) + case.after, case.i), dtype, 1)
            g = op_checks.guarded((len(x) * case.cotangents, case.o), dtype, 2)
            gradients = op_checks.grouped_gradients(x, g, offsets)
            x, g, offsets = x.to(device), g.to(device), offsets.to(device)
            q = ops.sq_grouped(x, g, offsets).cpu()
            op_checks.assert_close(q, gradients.square().sum(2), dtype, 150)
            out = torch.zeros(len(case.sizes), case.o, case.i, dtype=q.dtype, device=device)
            ops.sq_grouped_acc_(out, x, g, offsets, groups, torch.ones(len(q), dtype=q.dtype, device=device))
            want = gradients.square().unflatten(0, (case.cotangents, -1)).sum(0)
            each = [want[start:stop].sum(0) for start, stop in pairwise(case.groups().tolist())]
            op_checks.assert_close(out.cpu(), torch.stack(each), dtype, 150)
            count += 2
    return f"{count} results within the bound"


def operator(name: str, device: torch.device) -> str:
    """torch's own checks of an operator."""
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in op_checks.OPCHECKS[name]()]
    torch.library.opcheck(getattr(torch.ops.t2v_fast, name), tuple(arguments))
    return "passed"


def squares(name: str, size: int, backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of all filters' squares together, against autograd with one example at a time in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)
    u = torch.randn(4, 10, dtype=torch.float64, generator=generator)
    truth = per_example_squares(network(name, size, device, torch.float64), x.to(device), u[None].to(device))
    want = {key: reduce(value, "filter").sum(0) for key, value in truth.items()}
    reduced = network(name, size, device, dtype)
    with ops.use_backend(backend), products("float32"), t2v_fast.FisherRecorder(reduced) as recorder:
        found = recorder.backward(reduced(x.to(device, dtype)), u.to(device, dtype))
    got = torch.cat([found[key].sum(0).flatten() for key in want])
    return _bounded(relative_error(got, torch.cat([value.flatten() for value in want.values()])), dtype)


def _bounded(error: float, dtype: torch.dtype) -> float:
    assert error <= BOUNDS[dtype], f"relative error {error:.1e}, expected at most {BOUNDS[dtype]:.0e}"
    return error


def whole_fisher(name: str, size: int, device: torch.device) -> float:
    """Relative error of ``fisher()`` in float64 on the device against the same on the CPU, with C - 1 cotangents."""
    batches = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(k)).double() for k in range(2)]
    found = [
        t2v_fast.fisher(network(name, size, where, torch.float64, classes=3), batches, "exact").vector()
        for where in (device, torch.device("cpu"))
    ]
    return _bounded(relative_error(*found), torch.float64)


# The estimator "deflated" combines eigenvectors on a CPU and classes on a GPU. Both are unbiased, with other draws.
DRAWS_DIFFER = {"deflated", "with errors", "an allocation", "gaussian", "tokens"}


def estimator(case: str, device: torch.device) -> float:
    """Relative error of ``fisher()`` in float64 on the device against the CPU, for an estimator and granularity."""
    make, batches, options = steady.CASES[case]
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batches)
    found = [t2v_fast.fisher(make().double().to(where), wide, **options) for where in (device, torch.device("cpu"))]
    assert found[0].keys() == found[1].keys()
    return _bounded(relative_error(*(f.vector() for f in found)), torch.float64)


def pipeline(method: str, device: torch.device) -> float:
    """Relative error of the embeddings of one task in float32, its head included, on the device against the CPU.

    Methods are ``"embed"`` and ``"embed_label_sets"``.
    """
    images, labels = shapes(n=90)
    found = []
    for where in (device, torch.device("cpu")):
        task2vec = t2v_fast.Task2Vec(small_probe(), samples=3, batch_size=16, device=where)
        if method == "embed":
            found.append(task2vec.embed((images, labels)))
        else:
            found.append(task2vec.embed_label_sets((images, labels), {"task": labels})["task"])
    return _bounded(relative_error(*(torch.from_numpy(e.hessian) for e in found)), torch.float32)


def norms(device: torch.device) -> float:
    """Relative error of the norms of per-example gradients in float64 on the device against the CPU."""
    x, y = torch.randn(24, 4, 7, 6).double().split(8), (torch.arange(24) % 5).split(8)
    found = [
        torch.stack(
            [*t2v_fast.gradient_norms(steady.images().double().to(where), list(zip(x, y, strict=True))).values()]
        )
        for where in (device, torch.device("cpu"))
    ]
    return _bounded(relative_error(*found), torch.float64)


def waits(name: str, size: int, device: torch.device) -> str:
    """A steady batch of ``fisher()`` makes no call for which the host waits; torch raises at the first one."""

    def loader(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for k, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if k == 5 else "default")
            yield batch

    batches = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(k)) for k in range(7)]
    try:
        t2v_fast.fisher(network(name, size, device), loader(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def replayed(name: str, size: int, device: torch.device) -> str:
    """With ``cuda_graphs=True``, ``fisher()`` gives what it gives without, from batches of two sizes."""
    batches = [torch.randn(4 - k % 2, 3, size, size, generator=torch.Generator().manual_seed(k)) for k in range(14)]
    found = {}
    for cuda_graphs in (False, True):
        with messages_of("t2v_fast.estimation.graphs") as messages:
            found[cuda_graphs] = t2v_fast.fisher(network(name, size, device), batches, cuda_graphs=cuda_graphs)
    error = relative_error(found[True].vector(), found[False].vector())
    said = "; ".join(messages)
    if any("CUDA graphs: 0 of" in message for message in messages):
        raise Absent(said)
    return f"relative difference {_bounded(error, torch.float32):.1e}: {said}"


def capture(backend: str, device: torch.device) -> str:
    """Replays of a CUDA graph follow its inputs: no op waits for the device or keeps to another stream."""
    x, g = torch.randn(4, 16, 12, 12, device=device), torch.randn(4, 24, 12, 12, device=device)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    calls: dict[str, Callable[[], Tensor]] = {
        path: partial(ops.sq_conv, x, g, *geometry, path) for path in ("explicit", "gram")
    }
    calls["norm"] = lambda: ops.sq_norm(g.flatten(2).transpose(1, 2), g.flatten(2).transpose(1, 2))
    with ops.use_backend(backend):
        for name, call in calls.items():
            call()  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                q = call()
            for _ in range(2):
                if device.type == "cuda":  # in a rehearsal nothing was captured
                    g.normal_()
                graph.replay()
                assert torch.equal(q, call()), name
    return f"{len(calls)} captured and replayed"


def capture_backward(name: str, size: int, device: torch.device) -> str:
    """Whether forward pass, backward pass and squares can be captured as they are, and what stands in the way."""
    made, x = network(name, size, device), torch.randn(4, 3, size, size, device=device)
    u = torch.randn(4, 10, device=device)
    with t2v_fast.FisherRecorder(made) as recorder:
        want = recorder.backward(made(x), u)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = recorder.backward(made(x), u)
        graph.replay()
        torch.cuda.synchronize()
    for key, value in want.items():
        assert torch.equal(got[key], value), f"{key} differs in a replay"
    return "captured and replayed"


def jobs(device: torch.device, sizes: Any) -> list[Job]:
    """All of it, what takes longest first."""
    found, names = backends(device), sizes.verified
    every: list[Job] = []
    for case, backend, check in product(sizes.small, found, ("memcheck", "racecheck")):
        run: Callable[[], object] = partial(tools.sanitized, case, backend, check, sizes.more)
        every.append(Job("sanitizer", f"{case}, {backend}, {check}", run))
    for backend in found:
        for dtype in DTYPES:
            key = f"{backend}, {str(dtype).removeprefix('torch.')}"
            chosen = geometries(backend, sizes.every)
            # Triton compiles some kernels for each geometry, so that processes share those.
            parts = {f", {case.name}": [case] for case in chosen} if backend == "triton" else {"": chosen}
            for part, some in parts.items():
                run = partial(convolutions, backend, dtype, device, some)
                every.append(Job("ops", f"convolutions, {key}{part}", run))
            every.append(Job("ops", f"others, {key}", partial(other_ops, backend, dtype, device)))
        every.append(Job("cuda_graphs", f"ops, {backend}", partial(capture, backend, device)))
    for name, size in names:
        for backend in found:
            for dtype in DTYPES:
                key = f"{name}, {backend}, {str(dtype).removeprefix('torch.')}"
                every.append(Job("against_float64", key, partial(squares, name, size, backend, dtype, device)))
        every.append(Job("against_float64", f"{name}, fisher()", partial(whole_fisher, name, size, device)))
        every.append(Job("waits", name, partial(waits, name, size, device)))
        every.append(Job("cuda_graphs", f"{name}, fisher()", partial(replayed, name, size, device)))
        # Whether a pass can be captured in one graph. The library captures in two, so that a refusal is not wrong.
        run = partial(capture_backward, name, size, device)
        every.append(Job("cuda_graphs", f"{name}, backward", run, excused=True))
    for case in (name for name in steady.CASES if name not in DRAWS_DIFFER):
        every.append(Job("against_the_cpu", f"fisher(), {case}", partial(estimator, case, device)))
    for method in ("embed", "embed_label_sets"):
        every.append(Job("against_the_cpu", f"Task2Vec.{method}", partial(pipeline, method, device)))
    every.append(Job("against_the_cpu", "gradient_norms", partial(norms, device)))
    every += [Job("opcheck", op, partial(operator, op, device)) for op in ops.SCHEMAS]
    if not found:
        every.append(Job("ops", "backends", partial(_none, device)))
    return every


def _none(device: torch.device) -> None:
    raise AssertionError(f"no backend but the reference runs on {device}")
