"""The Triton kernels in Triton's interpreter: the geometries of the other backends, against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import CONVOLUTIONS, OUTERS, ConvCase, OuterCase
from op_checks import (
    DTYPES,
    GROUPED,
    LAYOUTS,
    assert_close,
    check,
    conv_gradients,
    filter_sums,
    guarded,
    outer_gradients,
    prod_gradients,
    scatter_gradients,
)
from oracle import per_example_squares, reduce
from torch import Tensor

from t2v_fast import FisherRecorder, ops
from t2v_fast.ops import planner
from t2v_fast.ops.reference import accumulate_dtype

pytest.importorskip("triton", reason="this torch comes without Triton")
from t2v_fast.kernels import (
    backend,
    launch,
    sq_conv_depthwise,
    sq_conv_explicit,
    sq_conv_gram,
    sq_prod,
)
from t2v_fast.kernels.launch import power_of_two

BLOCKS = {
    "explicit_blocks": sq_conv_explicit,
    "gram_blocks": sq_conv_gram,
    "depthwise_blocks": sq_conv_depthwise,
}


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, and so few programs: the interpreter's time grows with programs, not with elements."""
    two = power_of_two
    monkeypatch.setattr(
        sq_conv_explicit,
        "explicit_blocks",
        lambda dtype, o, d, p: [(two(o, 16, 64), two(d, 16, 512), two(p, 16, 1024), 4, 1)],
    )
    monkeypatch.setattr(
        sq_conv_depthwise,
        "depthwise_blocks",
        lambda g: [(two(g.shape[1], 1, 64), two(g.shape[2] * g.shape[3], 16, 1024), 4)],
    )
    monkeypatch.setattr(
        sq_conv_gram,
        "gram_blocks",
        lambda dtype, o, p, d, wide=False: [(two(o, 16, 64), two(p, 16, 512), two(d, 16, 512), 4, 1)],
    )
    monkeypatch.setattr(sq_prod, "prod_blocks", lambda g: [(two(g.shape[1], 1, 512), two(g.shape[2], 1, 512), 4)])


def check_conv(case: ConvCase, x: Tensor, g: Tensor) -> None:
    gradients, terms = conv_gradients(case, x, g), case.out_size[0] * case.out_size[1]
    for path in ("explicit", "gram"):
        check(
            "triton",
            x.dtype,
            lambda path=path: ops.sq_conv(x, g, *case.geometry, path),
            lambda out, w: ops.sq_conv_acc_(out, x, g, w, *case.geometry[1:]),
            gradients,
            terms,
        )
    with ops.use_backend("triton"):
        q = ops.sq_gram(ops.conv_gram(x, *case.geometry), g)
    assert_close(q, filter_sums(gradients), x.dtype, terms)


@pytest.mark.weekly_unless(
    case=("3x3", "3x3_grouped", "3x3_stride_of_each_axis", "1x1_padded", "depthwise_multiplier"),
    dtype=("torch.bfloat16",),
)
@pytest.mark.weekly_unless(case=("empty_batch", "one_filter", "1x1_strided"), dtype=("torch.float32",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_sq_conv(case: ConvCase, dtype: torch.dtype, large_blocks: None) -> None:
    for k, layout in enumerate(LAYOUTS if dtype == torch.float32 else ["contiguous"]):
        x = guarded((case.n, case.c, *case.size), dtype, 1, layout)
        g = guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2, LAYOUTS[(k + 1) % 3])
        check_conv(case, x, g)


SOME = [c for c in CONVOLUTIONS if c.name in ("3x3_wide", "3x3_grouped_dilated", "stem_7x7", "three_cotangents")]


@pytest.mark.weekly_unless(case=("three_cotangents",), dtype=("torch.bfloat16",))
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_blocks(case: ConvCase, dtype: torch.dtype) -> None:
    """Several tiles along every axis."""
    check_conv(
        case,
        guarded((case.n, case.c, *case.size), dtype, 1),
        guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2, "channels_last"),
    )


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if request.param == "ieee" else "high")
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_either_setting_allows_tf32(tf32_by_backend: None) -> None:
    assert launch.precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert launch.precision() == "ieee"


@pytest.mark.weekly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate that tuning may pick is correct: each is put first in turn."""
    assert launch.precision() == precision
    case = ConvCase("candidates", 2, 18, (7, 6), 35)
    deep = ConvCase("depthwise", 1, 33, (5, 4), 33, groups=33)
    originals = {name: getattr(module, name) for name, module in BLOCKS.items()}
    for rank in range(4):
        for name, original in originals.items():

            def ranked(*args: object, original=original, rank=rank) -> list[tuple[int, ...]]:
                candidates = original(*args)
                return candidates[rank % len(candidates) :]

            monkeypatch.setattr(BLOCKS[name], name, ranked)
        for c in (case, deep):
            x, g = guarded((c.n, c.c, *c.size), dtype, 1), guarded((c.n, c.o, *c.out_size), dtype, 2)
            with ops.use_backend("triton"):
                for path in ("explicit", "gram"):
                    if c is case or path == "explicit":
                        q = ops.sq_conv(x, g, *c.geometry, path)
                        assert_close(q, filter_sums(conv_gradients(c, x, g)), dtype, 42)


def test_the_grid_of_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits the second and third axis of a grid to 65,535 programs. Launches are caught; nothing is computed."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(sq_conv_gram, "gram_kernel", Kernel())
    monkeypatch.setattr(sq_conv_gram, "quadratic_kernel", Kernel())
    x = torch.empty(2, 4, 1, 16_384, device="meta")
    geometry = sq_conv_gram.ConvGeometry(x, sq_conv_gram.POINTWISE, 2)
    blocks = (16, 64, 16, 8, 2)
    sq_conv_gram._gram(geometry, sq_conv_gram.PATCHES, None, True, blocks)
    sq_conv_gram._quadratic(geometry, torch.empty(2, 6, 1, 16_384, device="meta"), sq_conv_gram.PATCHES, None, blocks)
    assert grids == [(2 * 2 * 256**2,), (2 * 2 * 256**2, 1)]
    assert all(axis <= 65_535 for grid in grids for axis in grid[1:])
    many = torch.empty(40_000, 4, 1, 16_384, device="meta")
    with pytest.raises(ValueError, match="smaller batches"):
        sq_conv_gram.gram_grid(sq_conv_gram.ConvGeometry(many, sq_conv_gram.POINTWISE, 1), 64)


@pytest.mark.weekly_unless(name=("3x3_strided",))
@pytest.mark.parametrize("source", [sq_conv_gram.PATCHES, sq_conv_gram.PIXELS])
@pytest.mark.parametrize("name", ["3x3", "3x3_strided", "3x3_grouped_dilated", "three_cotangents", "1x1_strided"])
def test_both_sources_of_the_gram_matrix(name: str, source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CONVOLUTIONS if c.name == name)
    monkeypatch.setattr(sq_conv_gram, "gram_source", lambda geometry: source)
    x = guarded((case.n, case.c, *case.size), torch.float32, 1)
    g = guarded((case.n * case.cotangents, case.o, *case.out_size), torch.float32, 2)
    want = filter_sums(conv_gradients(case, x, g))
    with ops.use_backend("triton"):
        whole = ops.sq_conv(x, g, *case.geometry, "gram")
        assert_close(whole, want, x.dtype, 50)
        assert_close(ops.sq_gram(ops.conv_gram(x, *case.geometry), g), want, x.dtype, 50)
        monkeypatch.setattr(sq_conv_gram, "LARGEST_WORKSPACE", 1)  # an example at a time
        assert torch.equal(ops.sq_conv(x, g, *case.geometry, "gram"), whole)


def test_rows_are_shared_out(monkeypatch: pytest.MonkeyPatch, large_blocks: None) -> None:
    """With enough processors, elementwise sums are computed in several chunks of rows."""
    for module in (launch, sq_conv_gram):
        monkeypatch.setattr(module, "processors", lambda t: 64)
    for case in (ConvCase("rows", 5, 3, (4, 4), 6), ConvCase("depthwise", 5, 6, (4, 4), 6, groups=6)):
        x, g = guarded((5, case.c, 4, 4), torch.float32, 1), guarded((5, 6, 4, 4), torch.float32, 2)
        weight, out = torch.rand(5), torch.zeros(6, case.c // case.groups, 3, 3)
        with ops.use_backend("triton"):
            ops.sq_conv_acc_(out, x, g, weight, *case.geometry[1:])
            assert_close(
                ops.sq_conv(x, g, *case.geometry, "gram"), filter_sums(conv_gradients(case, x, g)), x.dtype, 16
            )
        want = torch.tensordot(weight.double(), conv_gradients(case, x, g).square(), 1)
        assert_close(out, want, x.dtype, 16)


@pytest.mark.parametrize("shape", [(1, 1, 18), (1, 300, 1), (2, 1, 1), (2, 300, 18)], ids=str)
def test_positions_are_shared_out(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """With enough processors, several programs sum the positions of a row; the last one has fewer."""
    monkeypatch.setattr(sq_prod, "processors", lambda t: 64)
    x, g = guarded((2, 300, 18), torch.float32, 1), guarded((4, 300, 18), torch.float32, 2)
    shift, scale = guarded(shape, torch.float32, 3), guarded(shape, torch.float32, 4)
    block = sq_prod.prod_blocks(g)[0][0]
    assert sq_prod._parts(g, 1, block) > 1
    with ops.use_backend("triton"):
        weight, bias = ops.sq_norm(g, x, shift, scale)
    assert_close(weight, filter_sums(prod_gradients(g, x, shift, scale)), x.dtype, 1200)
    assert_close(bias, g.double().sum(1).square(), x.dtype, 300)


@pytest.mark.weekly_unless(case=("one_token", "few_tokens", "no_tokens", "empty_batch"), dtype=("torch.bfloat16",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OUTERS, ids=str)
def test_sq_outer(case: OuterCase, dtype: torch.dtype, large_blocks: None) -> None:
    for layout in LAYOUTS if dtype == torch.float32 else ["contiguous"]:
        x = guarded((case.n, case.s, case.i), dtype, 1, layout)
        g = guarded((case.n * case.cotangents, case.s, case.o), dtype, 2, layout)
        for path in ops.OUTER_PATHS:
            check(
                "triton",
                dtype,
                lambda x=x, g=g, path=path: ops.sq_outer(x, g, path),
                lambda out, w, x=x, g=g: ops.sq_outer_acc_(out, x, g, w),
                outer_gradients(x, g),
                case.s,
            )


@pytest.mark.weekly_unless(affine=("none",), dtype=("torch.float32",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", ["none", "channel", "row", "element", "shift_only"])
def test_sq_prod(dtype: torch.dtype, affine: str) -> None:
    wide = accumulate_dtype(dtype)
    for n, s, c, k in ((3, 5, 7, 1), (2, 1, 33, 1), (2, 70, 18, 2), (0, 4, 3, 1)):
        for layout in LAYOUTS:
            x, g = guarded((n, s, c), dtype, 1, layout), guarded((n * k, s, c), dtype, 2, layout)
            shape = {"row": (n, s, 1), "element": (n, s, c)}.get(affine, (c,))
            shift = None if affine == "none" else guarded(shape, wide, 3)
            scale = None if affine in ("none", "shift_only") else guarded(shape, wide, 4)
            gradients = prod_gradients(g, x, shift, scale) if n else x.new_zeros(0, c, dtype=torch.float64)
            check(
                "triton",
                dtype,
                lambda g=g, x=x, a=shift, b=scale: ops.sq_prod(g, x, a, b),
                lambda out, w, g=g, x=x, a=shift, b=scale: ops.sq_prod_acc_(out, g, w, x, a, b),
                gradients,
                4 * s,
            )
            with ops.use_backend("triton"):
                both, bias = ops.sq_norm(g, x, shift, scale), ops.sq_prod(g)
            plain = filter_sums(prod_gradients(g, None, None, None))
            assert_close(both[0], filter_sums(gradients), dtype, 4 * s)
            assert_close(both[1], plain, dtype, 4 * s)
            assert_close(bias, plain, dtype, 4 * s)


LINEAR = {  # N, S, I, O, K
    "one position": (2, 1, 3, 4, 1),
    "few positions": (3, 5, 9, 33, 2),
    "one block": (1, 70, 18, 70, 1),
    "two blocks": (1, 130, 6, 20, 2),
    "no example": (0, 3, 4, 5, 1),
}


@pytest.mark.weekly_unless(case=("few positions", "no example"), kind=("tf32", "torch.bfloat16"))
@pytest.mark.weekly_unless(case=("two blocks",), kind=("torch.bfloat16",))
@pytest.mark.parametrize("kind", [*map(str, DTYPES), "tf32"])
@pytest.mark.parametrize("case", LINEAR)
def test_sq_linear(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight and the bias of a linear layer, by blocks of at most 64 positions and of 128."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind.removeprefix("torch."))
    monkeypatch.setattr(launch, "allows_tf32", lambda: kind == "tf32")  # the interpreter does not round to TF32
    n, s, i, o, k = LINEAR[case]
    for layout in ("contiguous", "sliced"):
        x, g = guarded((n, s, i), dtype, 1, layout), guarded((n * k, s, o), dtype, 2, layout)
        gradients = torch.einsum("knso,nsi->knoi", g.double().unflatten(0, (k, n)), x.double())
        with ops.use_backend("triton"):
            assert ops.fuses_bias(x, g)
            weight, bias = ops.sq_linear(x, g, "gram")
            assert torch.equal(torch.stack([weight, bias]), ops.sq_linear(x, g, "gram"))
            assert torch.equal(weight, ops.sq_outer(x, g, "gram"))
            image = x.transpose(1, 2).unsqueeze(2)
            kept = ops.sq_linear(x, g, "gram", ops.conv_gram(image, (1, 1), (1, 1), (0, 0), (1, 1), 1))
            explicit = ops.sq_linear(x, g)
        want = gradients.square().sum(3).flatten(0, 1), g.double().sum(1).square()
        for found in ((weight, bias), kept, explicit):
            assert_close(found[0], want[0], dtype, s * i)
            assert_close(found[1], want[1], dtype, s)


class Tokens(torch.nn.Module):
    """Linear layers over tokens, without the bias of one, and one whose bias is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 9), torch.nn.Linear(9, 5, bias=False)
        self.third, self.last = torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x).tanh())).tanh() + self.third.bias
        return self.last(x.tanh()).mean(1)


@pytest.mark.parametrize("wanted", [None, ["first.bias", "last.weight"]])
def test_biases_come_with_the_weights_of_linear_layers(
    wanted: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, x, u = Tokens(), torch.randn(3, 7, 6), torch.randn(2, 3, 3)
    truth = per_example_squares(copy.deepcopy(network).double(), x.double(), u.double())
    passes: list[Tensor] = []
    monkeypatch.setattr(backend, "sq_prod", lambda g, *rest: passes.append(g) or sq_prod.sq_prod(g, *rest))
    names = None if wanted is None else lambda name, parameter: name in wanted
    with ops.use_backend("triton"), planner.force("gram"), FisherRecorder(network, parameters=names) as recorder:
        for _ in range(2):
            found = recorder.backward(network(x), u)
            assert found.keys() == set(wanted or truth)
            for name, squares in found.items():
                torch.testing.assert_close(squares.double(), reduce(truth[name], "filter"), rtol=1e-4, atol=1e-7)
    # A bias without its weight has passes of its own, and so has the one that is used twice: two in each batch.
    assert [g.shape[2] for g in passes] == [5 if wanted is None else 9] * 4


def test_large_blocks_need_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.zeros(1, 197, 64, dtype=torch.bfloat16), torch.zeros(1, 197, 256, dtype=torch.bfloat16)
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        sq_conv_gram, "_quadratic", lambda geometry, g, source, gram, blocks, *_: sizes.append(blocks) or g
    )
    for memory in (227, 200, 163, 99):
        monkeypatch.setattr(sq_conv_gram, "shared_memory", lambda t, memory=memory: memory << 10)
        backend.sq_linear(x, g)
    assert [blocks[1] for blocks in sizes] == [128, 128, 64, 64]


@pytest.mark.weekly_unless(dtype=("torch.float32",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sq_scatter(dtype: torch.dtype) -> None:
    for n, s, o, v, k in ((3, 6, 5, 4, 1), (2, 9, 17, 3, 2), (2, 1, 3, 8, 1), (1, 5, 600, 2, 1)):
        index = torch.randint(-1, v, (n, s), generator=torch.Generator().manual_seed(n))
        g = guarded((n * k, s, o), dtype, 2, "sliced")
        check(
            "triton",
            dtype,
            lambda g=g, index=index, v=v: ops.sq_scatter(index, g, v),
            lambda out, w, g=g, index=index: ops.sq_scatter_acc_(out, index, g, w),
            scatter_gradients(index, g, v),
            s,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sq_grouped(dtype: torch.dtype) -> None:
    for case in GROUPED:
        if case.name != "one_example_has_nearly_all_rows" or dtype == torch.float32:  # slow in the interpreter
            case.check("triton", dtype, "sliced")


def test_an_index_beyond_the_table() -> None:
    with ops.use_backend("triton"), pytest.raises(IndexError, match="index 3 is out of range for a table of 3 rows"):
        ops.sq_scatter(torch.tensor([[0, 3]]), torch.ones(1, 2, 4), 3)


def test_every_op_has_a_kernel() -> None:
    assert set(backend.__all__) - {"interpreted"} == ops.SCHEMAS.keys()


def test_tuning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tuning on, every candidate is timed once per geometry, and candidates that do not fit are skipped."""
    times = {(1,): 3.0, (2,): 1.0}

    def bench(run, **_: object) -> float:
        return times[tuple(run().tolist())]

    def run(candidate: tuple[int, ...]) -> Tensor:
        if candidate == (3,):
            raise launch.triton.runtime.errors.OutOfResources(200, 100, "shared memory")
        return torch.tensor(candidate)

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(launch.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    candidates = [(1,), (2,), (3,)]
    assert launch.best("key", candidates, run) == (1,)
    monkeypatch.setenv(launch.TUNE, "1")
    assert launch.best("key", candidates, run) == (2,)
    times.clear()
    assert launch.best("key", candidates, run) == (2,)  # remembered
