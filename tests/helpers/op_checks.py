"""What the tests of every backend, and bench/, share: inputs, float64 oracles and the check of one op."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import emulated
import torch
from cases import ConvCase
from torch import Tensor
from torch.nn import functional as F

from t2v_fast import ops
from t2v_fast.ops.reference import accumulate_dtype

# What a wrong argument of a compiled operator raises, if it is called without the wrappers: torch 2.15 no longer
# translates std::invalid_argument.
OPERATOR_ERROR = ValueError if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15) else RuntimeError

# The instruction sets that the kernels are compiled for on this architecture, the best one first. Every processor of
# the architecture has the last one.
INSTRUCTION_SETS = {
    "x86_64": ["avx512bf16", "avx512", "avx2", "portable"],
    "aarch64": ["neonbf16", "neon"],
    "arm64": ["neonbf16", "neon"],
}.get(platform.machine(), ["portable"])

# What /proc/cpuinfo calls the instructions that each set needs.
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
_NEEDED = {
    "avx512bf16": _AVX512 | {"avx512_bf16", "avx512_vnni"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma"},
    "neonbf16": {"bf16"},
}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def best_instruction_set() -> str:
    """The best of INSTRUCTION_SETS that this processor has, by the system's own list of its features."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    features = set(found[1].split()) if found else set()
    return next(name for name in INSTRUCTION_SETS if _NEEDED.get(name, set()) <= features)


def _variants() -> list[str]:
    """Every backend that can run here: the CPU backend once for each instruction set, the CUDA backend by emulation."""
    variants = ["reference", "emulated"]
    if ops.backend_status()["cpu"] == "available":
        from t2v_fast.ops import extension

        best = extension.cpu_capability()
        for name in extension.build_info()["cpu"].split():
            try:
                extension.set_cpu_capability(name)
            except ValueError:
                continue  # this processor lacks it
            variants.append(f"cpu-{name}")
        extension.set_cpu_capability(best)
    return variants


VARIANTS = _variants()


@contextmanager
def variant(name: str) -> Iterator[None]:
    if name == "emulated":
        with emulated.running():
            yield
        return
    backend, _, capability = name.partition("-")
    if not capability:
        with ops.use_backend(backend):
            yield
        return
    from t2v_fast.ops import extension

    best = extension.cpu_capability()
    extension.set_cpu_capability(capability)
    try:
        with ops.use_backend(backend):
            yield
    finally:
        extension.set_cpu_capability(best)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    """Random values inside a larger buffer of NaN, so that a read outside them shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout in ("channels_last", "tokens_first"):
        axes = (0, *range(2, len(shape)), 1) if layout == "channels_last" else (1, 0, 2)
        buffer = torch.full((values.numel() + 256,), float("nan"), dtype=dtype)
        inner = buffer[64 : 64 + values.numel()].view([shape[a] for a in axes])
        inner.copy_(values.permute(axes))
        return inner.permute([axes.index(a) for a in range(len(shape))])
    if layout == "sliced":  # every axis strided, NaN between the values
        buffer = torch.full([2 * s + 3 for s in shape], float("nan"), dtype=dtype)
        view = buffer[tuple(slice(1, 1 + 2 * s, 2) for s in shape)]
        view.copy_(values)
        return view
    buffer = torch.full((values.numel() + 256,), float("nan"), dtype=dtype)
    return buffer[64 : 64 + values.numel()].view(shape).copy_(values)


def conv_gradients(case: ConvCase, x: Tensor, g: Tensor) -> Tensor:
    """[M, O, C / groups, kh, kw] by unfolding, in float64."""
    x, g = x.double(), g.double()
    n, m = len(x), len(g)
    if m == 0:
        return x.new_zeros(0, case.o, case.c // case.groups, *case.kernel)
    patches = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    patches = patches.view(n, case.groups, -1, patches.shape[-1])[torch.arange(m) % n]  # [M, G, D, P]
    g = g.reshape(m, case.groups, case.o // case.groups, -1)
    return torch.einsum("mgop,mgdp->mgod", g, patches).reshape(m, case.o, case.c // case.groups, *case.kernel)


def outer_gradients(x: Tensor, g: Tensor) -> Tensor:
    rows = torch.arange(len(g)) % max(len(x), 1)
    return torch.einsum("mso,msi->moi", g.double(), x.double()[rows])


def prod_gradients(g: Tensor, x: Tensor | None, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    if x is None:
        return g.double().sum(1)
    rows = torch.arange(len(g)) % len(x)
    shift = 0 if shift is None else shift.double()
    scale = 1 if scale is None else scale.double()
    return (g.double() * ((x.double() - shift) * scale)[rows]).sum(1)


def scatter_gradients(index: Tensor, g: Tensor, num_rows: int) -> Tensor:
    rows = index[torch.arange(len(g)) % len(index)]
    one_hot = torch.stack([rows == v for v in range(num_rows)], 2).double()
    return torch.einsum("msv,mso->mvo", one_hot, g.double())


def grouped_gradients(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """[K B, O, I], one segment after the other."""
    x, g = x.double(), g.double()
    each = [
        torch.einsum("ro,ri->oi", g[k * len(x) + start : k * len(x) + stop], x[start:stop])
        for k in range(len(g) // len(x) if len(x) else 1)
        for start, stop in pairwise(offsets.tolist())
    ]
    return torch.stack(each) if each else x.new_zeros(0, g.shape[1], x.shape[1])


@dataclass(frozen=True)
class GroupedCase:
    """Segments of rows in groups: sizes[e] has the rows of each segment of group e."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    i: int
    o: int
    cotangents: int = 1
    before: int = 0  # rows before the first segment and after the last
    after: int = 0

    def __str__(self) -> str:
        return self.name

    def offsets(self) -> Tensor:
        sizes = torch.tensor([self.before, *(size for group in self.sizes for size in group)])
        return sizes.cumsum(0)

    def groups(self) -> Tensor:
        return torch.tensor([0, *map(len, self.sizes)]).cumsum(0)

    def check(self, name: str, dtype: torch.dtype, layout: str) -> None:
        """Compare both forms of the op with the oracle."""
        offsets, groups = self.offsets(), self.groups()
        rows = int(offsets[-1]) + self.after
        x = guarded((rows, self.i), dtype, 1, layout)
        g = guarded((rows * self.cotangents, self.o), dtype, 2, layout)
        gradients = grouped_gradients(x, g, offsets)
        terms = max((size for group in self.sizes for size in group), default=1)
        with variant(name):
            q = ops.sq_grouped(x, g, offsets)
            assert_close(q, gradients.square().sum(2), dtype, terms)
            assert torch.equal(q, ops.sq_grouped(x, g, offsets))
            wide = accumulate_dtype(dtype)
            weight = torch.rand(len(gradients), generator=torch.Generator().manual_seed(9), dtype=wide)
            out = torch.rand(len(self.sizes), self.o, self.i, generator=torch.Generator().manual_seed(8), dtype=wide)
            want = out.double()
            group = torch.arange(len(self.sizes)).repeat_interleave(groups.diff()).repeat(self.cotangents)
            want.index_add_(0, group, weight.double()[:, None, None] * gradients.square())
            ops.sq_grouped_acc_(out, x, g, offsets, groups, weight)
            assert_close(out, want, dtype, terms)


GROUPED = [
    GroupedCase("two_experts", ((3, 1, 4), (2, 0, 5)), 9, 7),
    GroupedCase("one_row_each", ((1, 1), (1,), (1, 1, 1)), 33, 20),
    GroupedCase("an_expert_without_segments", ((2, 3), (), (4,)), 16, 32),
    GroupedCase("an_expert_without_rows", ((2, 3), (0, 0), (4,)), 18, 5),
    GroupedCase("one_example_has_nearly_all_rows", ((150, 1), (0, 70)), 12, 19),
    GroupedCase("more_rows_than_features", ((30,), (9, 40)), 3, 2),
    GroupedCase("one_feature", ((3, 4),), 1, 1),
    GroupedCase("rows_of_nobody", ((3, 4), (2,)), 8, 6, before=2, after=3),
    GroupedCase("three_cotangents", ((3, 0, 4), (2, 70)), 24, 13, cotangents=3, before=1, after=2),
    GroupedCase("no_rows", ((0, 0),), 4, 5),
    GroupedCase("no_segments", ((), ()), 4, 5, after=2),
    GroupedCase("many_filters", ((5, 2), (9,)), 48, 130),
    GroupedCase("one_row_and_many_in_turn", ((1, 1, 5, 1, 0, 1, 1, 70, 1), (1,), (0, 2, 1)), 40, 15, cotangents=2),
    GroupedCase("more_rows_than_are_taken_together", ((60, 60, 60, 1, 1, 60), (200, 3), (130,)), 70, 14),
]


def filter_sums(gradients: Tensor) -> Tensor:
    return gradients.square().flatten(2).sum(2) if gradients.dim() > 2 else gradients.square()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Check that values agree within the rounding of the dtype of the sums. Inputs are exact in any dtype.

    A sum of S products has an error of about sqrt(S) eps relative to the root of the sum of its squared terms. The
    largest result stands for that root. A test below holds plain torch's own error against the same bound.
    """
    assert got.dtype == accumulate_dtype(dtype)
    assert got.shape == want.shape
    eps = torch.finfo(got.dtype).eps
    scale = want.abs().max() if want.numel() else 1.0
    assert float((got.double() - want).abs().max() if want.numel() else 0.0) <= 8 * eps * max(terms, 1) ** 0.5 * scale


def check(
    name: str,
    dtype: torch.dtype,
    run: Callable[[], Tensor],
    run_acc: Callable[[Tensor, Tensor], None],
    gradients: Tensor,
    terms: int,
) -> None:
    m = len(gradients)
    with variant(name):
        q = run()
        assert_close(q, filter_sums(gradients), dtype, terms)
        assert torch.equal(q, run())  # deterministic
        weight = torch.rand(m, generator=torch.Generator().manual_seed(9), dtype=accumulate_dtype(dtype))
        start = torch.rand(
            gradients.shape[1:], generator=torch.Generator().manual_seed(8), dtype=accumulate_dtype(dtype)
        )
        out = start.clone()
        run_acc(out, weight)
        want = start.double() + torch.tensordot(weight.double(), gradients.square(), 1)
        assert_close(out, want, dtype, terms)


def conv_paths(case: ConvCase) -> list[str]:
    kernel, stride, _, dilation, groups = case.geometry
    fits = ops.winograd_fits(kernel, stride, dilation, groups)
    return [path for path in ops.CONV_PATHS if path != "winograd" or fits]


LAYOUTS = ["contiguous", "channels_last", "sliced"]


OPCHECKS = {
    "sq_outer": lambda: (torch.randn(2, 3, 4), torch.randn(4, 3, 5)),
    "sq_linear": lambda: (torch.randn(2, 3, 4), torch.randn(4, 3, 5), torch.randn(2, 1, 3, 3).triu()),
    "sq_outer_acc_": lambda: (torch.zeros(5, 4), torch.randn(2, 3, 4), torch.randn(4, 3, 5), torch.ones(4)),
    "sq_conv": lambda: (torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "sq_conv_acc_": lambda: (
        torch.zeros(6, 2, 3, 3),
        torch.randn(2, 4, 5, 5),
        torch.randn(2, 6, 5, 5),
        torch.ones(2),
        (1, 1),
        (1, 1),
        (1, 1),
        2,
    ),
    "conv_gram": lambda: (torch.randn(2, 4, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "sq_gram": lambda: (torch.randn(2, 3, 4, 4), torch.randn(4, 6, 2, 2)),
    "sq_prod": lambda: (torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(5), torch.randn(5)),
    "sq_norm": lambda: (torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(5), torch.randn(5)),
    "sq_prod_acc_": lambda: (torch.zeros(5), torch.randn(4, 3, 5), torch.ones(4), torch.randn(2, 3, 5)),
    "sq_scatter": lambda: (torch.randint(0, 4, (2, 3)), torch.randn(4, 3, 5), 4),
    "sq_scatter_acc_": lambda: (torch.zeros(4, 5), torch.randint(0, 4, (2, 3)), torch.randn(4, 3, 5), torch.ones(4)),
    "sq_grouped": lambda: (torch.randn(5, 3), torch.randn(10, 4), torch.tensor([0, 2, 2, 5])),
    "sq_grouped_acc_": lambda: (
        torch.zeros(2, 4, 3),
        torch.randn(5, 3),
        torch.randn(10, 4),
        torch.tensor([0, 2, 2, 5]),
        torch.tensor([0, 2, 3]),
        torch.ones(6),
    ),
}
