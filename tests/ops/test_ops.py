"""Every op, form, path, backend, instruction set and dtype against a float64 oracle written out with einsum."""

from __future__ import annotations

import pytest
import torch
from cases import CONVOLUTIONS, OUTERS, ConvCase, OuterCase
from op_checks import (
    DTYPES,
    GROUPED,
    INSTRUCTION_SETS,
    LAYOUTS,
    OPCHECKS,
    OPERATOR_ERROR,
    VARIANTS,
    GroupedCase,
    assert_close,
    check,
    conv_gradients,
    conv_paths,
    filter_sums,
    guarded,
    outer_gradients,
    prod_gradients,
    scatter_gradients,
    variant,
)
from torch import Tensor

from t2v_fast import ops
from t2v_fast.ops.reference import accumulate_dtype

# The emulation takes most of the time. Channels that are a page apart matter to a CPU alone, and have one layout there.
QUICK = [name for name in VARIANTS if name != "emulated"]


def test_the_extension_is_built() -> None:
    """The C++ kernels are under test, and not silently absent."""
    assert ops.backend_status()["cpu"] == "available"
    assert f"cpu-{INSTRUCTION_SETS[-1]}" in VARIANTS


@pytest.mark.weekly_unless(name=QUICK)
@pytest.mark.weekly_unless(
    name=("emulated",),
    case=("3x3_grouped_dilated", "3x3_strided", "stem_7x7_of_vectors", "three_cotangents_depthwise"),
    dtype=("torch.float32",),
)
@pytest.mark.weekly_unless(name=("emulated",), dtype=("torch.float16",))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_sq_conv(case: ConvCase, dtype: torch.dtype, name: str) -> None:
    every = dtype in (torch.float32, torch.bfloat16) and (name in QUICK or "a_page_apart" not in case.name)
    for k, layout in enumerate(LAYOUTS if every else ["contiguous"]):
        x = guarded((case.n, case.c, *case.size), dtype, 1, layout)
        g = guarded((case.n * case.cotangents, case.o, *case.out_size), dtype, 2, LAYOUTS[(k + 1) % 3])
        gradients = conv_gradients(case, x, g)
        terms = case.out_size[0] * case.out_size[1]
        for path in conv_paths(case):
            check(
                name,
                dtype,
                lambda x=x, g=g, path=path: ops.sq_conv(x, g, *case.geometry, path),
                lambda out, w, x=x, g=g, path=path: ops.sq_conv_acc_(
                    out, x, g, w, *case.geometry[1:], "winograd" if path == "winograd" else "explicit"
                ),
                gradients,
                terms,
            )
        with variant(name):
            q = ops.sq_gram(ops.conv_gram(x, *case.geometry), g)
        assert_close(q, filter_sums(gradients), dtype, terms)


@pytest.mark.weekly_unless(name=QUICK)
@pytest.mark.weekly_unless(name=("emulated",), dtype=("torch.float32", "torch.float16"))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OUTERS, ids=str)
def test_sq_outer(case: OuterCase, dtype: torch.dtype, name: str) -> None:
    for layout in LAYOUTS:
        x = guarded((case.n, case.s, case.i), dtype, 1, layout)
        g = guarded((case.n * case.cotangents, case.s, case.o), dtype, 2, layout)
        gradients = outer_gradients(x, g)
        for path in ops.OUTER_PATHS:
            check(
                name,
                dtype,
                lambda x=x, g=g, path=path: ops.sq_outer(x, g, path),
                lambda out, w, x=x, g=g: ops.sq_outer_acc_(out, x, g, w),
                gradients,
                case.s,
            )


@pytest.mark.weekly_unless(name=QUICK)
@pytest.mark.weekly_unless(name=("emulated",), affine=("channel",), dtype=("torch.float32",))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", ["none", "channel", "row", "element", "shift_only"])
def test_sq_prod(dtype: torch.dtype, affine: str, name: str) -> None:
    wide = accumulate_dtype(dtype)
    for n, s, c, k in ((3, 5, 7, 1), (2, 1, 33, 1), (2, 70, 18, 2), (2, 1100, 2, 1), (1, 3, 1100, 1), (0, 4, 3, 1)):
        for layout in LAYOUTS:
            x = guarded((n, s, c), dtype, 1, layout)
            g = guarded((n * k, s, c), dtype, 2, layout)
            shapes = {"channel": (c,), "row": (n, s, 1), "element": (n, s, c), "shift_only": (c,)}
            shift = scale = None
            if affine != "none":
                shift = guarded(shapes[affine], wide, 3)
                scale = None if affine == "shift_only" else guarded(shapes[affine], wide, 4)
            if n == 0 and affine == "none":
                continue  # covered below, without x
            gradients = prod_gradients(g, x, shift, scale) if n else x.new_zeros(0, c, dtype=torch.float64)
            check(
                name,
                dtype,
                lambda g=g, x=x, a=shift, b=scale: ops.sq_prod(g, x, a, b),
                lambda out, w, g=g, x=x, a=shift, b=scale: ops.sq_prod_acc_(out, g, w, x, a, b),
                gradients,
                4 * s,
            )
            if n:
                with variant(name):
                    weight, bias = ops.sq_norm(g, x, shift, scale)
                assert_close(weight, filter_sums(gradients), dtype, 4 * s)
                assert_close(bias, filter_sums(prod_gradients(g, None, None, None)), dtype, 4 * s)
            if affine == "none":
                check(
                    name,
                    dtype,
                    lambda g=g: ops.sq_prod(g),
                    lambda out, w, g=g: ops.sq_prod_acc_(out, g, w),
                    prod_gradients(g, None, None, None),
                    s,
                )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sq_scatter(dtype: torch.dtype, name: str) -> None:
    for n, s, o, v, k in ((3, 6, 5, 4, 1), (2, 9, 17, 3, 2), (2, 1, 3, 8, 1), (1, 5, 70, 2, 1)):
        index = torch.randint(-1, v, (n, s), generator=torch.Generator().manual_seed(n))
        for layout in LAYOUTS:
            g = guarded((n * k, s, o), dtype, 2, layout)
            check(
                name,
                dtype,
                lambda g=g, index=index, v=v: ops.sq_scatter(index, g, v),
                lambda out, w, g=g, index=index: ops.sq_scatter_acc_(out, index, g, w),
                scatter_gradients(index, g, v),
                s,
            )


@pytest.mark.parametrize("name", QUICK)  # CUDA tensors run on Triton's kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_sq_grouped(case: GroupedCase, dtype: torch.dtype, name: str) -> None:
    for layout in ("contiguous", "channels_last", "sliced"):
        case.check(name, dtype, layout)


@pytest.mark.parametrize("name", QUICK)
def test_offsets_out_of_range(name: str) -> None:
    x, g, groups, weight = torch.ones(4, 3), torch.ones(4, 2), torch.tensor([0, 2]), torch.ones(2)
    with variant(name):
        for bad in ([0, 3, 2], [0, 2, 5], [-1, 2, 4]):
            with pytest.raises((IndexError, RuntimeError), match="out of range"):
                ops.sq_grouped(x, g, torch.tensor(bad))
        for bad in ([1, 0], [0, 3], [-1, 2]):
            with pytest.raises((IndexError, RuntimeError), match="out of range"):
                ops.sq_grouped_acc_(torch.zeros(1, 2, 3), x, g, torch.tensor([0, 2, 4]), torch.tensor(bad), weight)
        ops.sq_grouped_acc_(torch.zeros(1, 2, 3), x, g, torch.tensor([0, 2, 4]), groups, weight)


@pytest.mark.parametrize("name", VARIANTS)
def test_expanded_inputs(name: str) -> None:
    """Cotangents with a stride of zero, like the gradient of a mean."""
    case = ConvCase("expanded", 3, 4, (6, 5), 7)
    x, g = torch.randn(3, 4, 6, 5), torch.randn(3, 7, 1, 1).expand(3, 7, 6, 5)
    with variant(name):
        for path in conv_paths(case):
            assert_close(ops.sq_conv(x, g, *case.geometry, path), filter_sums(conv_gradients(case, x, g)), x.dtype, 30)
        g = torch.randn(3, 1, 4).expand(3, 5, 4)
        assert_close(ops.sq_prod(g), g.double().sum(1).square(), g.dtype, 5)


@pytest.mark.weekly_unless(name=QUICK)
@pytest.mark.parametrize("name", VARIANTS)
def test_thread_counts_change_nothing(name: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = []
            with variant(name):
                for case in CONVOLUTIONS:
                    x = guarded((case.n, case.c, *case.size), torch.float32, 1)
                    g = guarded((case.n * case.cotangents, case.o, *case.out_size), torch.float32, 2)
                    out = torch.zeros(case.o, case.c // case.groups, *case.kernel)
                    ops.sq_conv_acc_(out, x, g, torch.ones(len(g)), *case.geometry[1:])
                    found += [ops.sq_conv(x, g, *case.geometry, path) for path in conv_paths(case)] + [out]
                for grouped in GROUPED if name != "emulated" else ():
                    offsets, groups = grouped.offsets(), grouped.groups()
                    x = guarded((int(offsets[-1]), grouped.i), torch.float32, 1)
                    g = guarded((int(offsets[-1]), grouped.o), torch.float32, 2)
                    out = torch.zeros(len(grouped.sizes), grouped.o, grouped.i)
                    ops.sq_grouped_acc_(out, x, g, offsets, groups, torch.ones(len(offsets) - 1))
                    found += [ops.sq_grouped(x, g, offsets), out]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    if name == "reference":  # plain torch does not guarantee this
        return
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_plain_torch_is_no_more_accurate() -> None:
    """The bound of assert_close is not loose: plain torch's float32 error is within a factor of the bound."""
    case = ConvCase("large", 4, 64, (28, 28), 64)
    x, g = guarded((4, 64, 28, 28), torch.float32, 1), guarded((4, 64, 28, 28), torch.float32, 2)
    want = filter_sums(conv_gradients(case, x, g))

    def error(q: Tensor) -> float:
        return float((q.double() - want).norm() / want.norm())

    errors = {}
    for name in VARIANTS:
        with variant(name):
            for path in ("explicit", "gram", "winograd"):
                errors[name, path] = error(ops.sq_conv(x, g, *case.geometry, path))
    floor = 4 * torch.finfo(torch.float32).eps
    for key, value in errors.items():
        assert value <= 2 * errors["reference", "explicit"] + floor, key


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.t2v_fast, op), OPCHECKS[op]())


X, G = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
BAD = {
    "conv_size": (lambda o: o.sq_conv(X, G[:, :, 1:], *SAME), r"\[2, 6, 4, 5\]"),
    "conv_dtype": (lambda o: o.sq_conv(X, G.double(), *SAME), "one dtype"),
    "conv_axes": (lambda o: o.sq_conv(X[0], G, *SAME), r"\[4, 5, 5\]"),
    "conv_groups": (lambda o: o.sq_conv(X, G, (3, 3), (1, 1), (1, 1), (1, 1), 3), "groups 3 must divide the 4 input"),
    "conv_stride": (lambda o: o.sq_conv(X, G, (3, 3), (0, 1), (1, 1), (1, 1), 1), "positive sizes"),
    "conv_rows": (lambda o: o.sq_conv(X, G[:1], *SAME), "g has 1 rows, expected a multiple of the 2 examples"),
    "conv_path": (lambda o: o.sq_conv(X, G, *SAME, "fast"), "path 'fast' is none of explicit, gram, winograd"),
    "conv_winograd": (
        lambda o: o.sq_conv(X, G[:, :, :3, :3], (3, 3), (2, 2), (1, 1), (1, 1), 1, "winograd"),
        "path 'winograd' is for 3x3 kernels of stride 1",
    ),
    "conv_acc_path": (
        lambda o: o.sq_conv_acc_(torch.zeros(6, 4, 3, 3), X, G, torch.ones(2), *SAME[1:], "gram"),
        "path 'gram' is none of explicit, winograd",
    ),
    "gram_empty": (lambda o: o.conv_gram(X, (9, 9), (1, 1), (0, 0), (1, 1), 1), r"\[2, 4, 5, 5\]"),
    "gram_groups": (lambda o: o.conv_gram(X, *SAME[:4], 3), "groups 3 must divide the 4 input"),
    "gram_size": (lambda o: o.sq_gram(torch.zeros(2, 1, 24, 24), G), r"\[2, 1, 24, 24\]"),
    "gram_dtype": (
        lambda o: o.sq_gram(torch.zeros(2, 1, 25, 25), G.double()),
        r"expected .*gram|gram .*expected|float64",
    ),
    "outer_path": (
        lambda o: o.sq_outer(torch.ones(2, 3, 4), torch.ones(2, 3, 4), "winograd"),
        "path 'winograd' is none",
    ),
    "conv_kernel": (
        lambda o: o.sq_conv(X, G, (9, 3), (1, 1), (1, 1), (1, 1), 1),
        r"kernel(_size)? \[9, 3\]",
    ),
    "outer_tokens": (lambda o: o.sq_outer(torch.ones(2, 3, 4), torch.ones(2, 4, 4)), "one S"),
    "outer_integer": (lambda o: o.sq_outer(torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int32)), "dtype|float"),
    "prod_shape": (lambda o: o.sq_prod(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), r"g \[M, S, C\] and x \[N, S, C\]"),
    "prod_shift": (lambda o: o.sq_prod(torch.ones(2, 3, 4), None, torch.ones(4)), "act on x"),
    "scatter_index": (lambda o: o.sq_scatter(torch.ones(2, 3), torch.ones(2, 3, 4), 3), "index .* int64"),
    "scatter_rows": (lambda o: o.sq_scatter(torch.ones(2, 3).long(), torch.ones(2, 3, 4), 0), "num_rows is 0"),
    "grouped_axes": (
        lambda o: o.sq_grouped(torch.ones(1, 2, 3), torch.ones(2, 3), torch.tensor([0, 2])),
        r"\[1, 2, 3\]",
    ),
    "grouped_rows": (
        lambda o: o.sq_grouped(torch.ones(2, 3), torch.ones(3, 3), torch.tensor([0, 2])),
        "g has 3 rows, expected a multiple of the 2",
    ),
    "grouped_offsets": (
        lambda o: o.sq_grouped(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2], dtype=torch.int32)),
        r"offsets \[B \+ 1\] int64",
    ),
    "grouped_groups": (
        lambda o: o.sq_grouped_acc_(
            torch.zeros(2, 3, 3), torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), torch.ones(3), torch.ones(1)
        ),
        r"groups .*\[3\]",
    ),
    "grouped_out": (
        lambda o: o.sq_grouped_acc_(
            torch.zeros(2, 3, 4),
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.tensor([0, 2]),
            torch.tensor([0, 1, 1]),
            torch.ones(1),
        ),
        r"out is \[2, 3, 4\]",
    ),
    "grouped_weight": (
        lambda o: o.sq_grouped_acc_(
            torch.zeros(2, 3, 3),
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.tensor([0, 2]),
            torch.tensor([0, 1, 1]),
            torch.ones(2),
        ),
        r"weight is \[2\]",
    ),
    "acc_shape": (
        lambda o: o.sq_conv_acc_(torch.zeros(6, 4, 3, 2), X, G, torch.ones(2), *SAME[1:]),
        r"kernel(_size)? \[3, 2\]",
    ),
    "acc_channels": (
        lambda o: o.sq_conv_acc_(torch.zeros(6, 3, 3, 3), X, G, torch.ones(2), *SAME[1:]),
        r"out is \[6, 3, 3, 3\]",
    ),
    "acc_weight": (
        lambda o: o.sq_conv_acc_(torch.zeros(6, 4, 3, 3), X, G, torch.ones(3), *SAME[1:]),
        r"weight is \[3\]",
    ),
    "acc_dtype": (
        lambda o: o.sq_outer_acc_(torch.zeros(4, 4).double(), torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2)),
        "out is",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("level", ["python", "operator"])
def test_bad_arguments(case: str, level: str) -> None:
    """Both the wrappers and the compiled operators report what was given, and neither reads out of bounds."""
    call, message = BAD[case]
    with pytest.raises(ValueError if level == "python" else OPERATOR_ERROR, match=message):
        call(ops if level == "python" else torch.ops.t2v_fast)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_index_beyond_the_table(name: str) -> None:
    with variant(name), pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        ops.sq_scatter(torch.tensor([[0, 3]]), torch.ones(1, 2, 4), 3)


def test_a_check_that_passed_hides_no_other_argument() -> None:
    """The checks remember which arguments passed. Shape, dtype, path and geometry are looked at in each new call."""
    x, g = torch.rand(2, 3, 6, 6), torch.rand(2, 4, 4, 4)
    geometry = (3, 3), (1, 1), (0, 0), (1, 1), 1
    for _ in range(2):
        ops.sq_conv(x, g, *geometry)
        with pytest.raises(ValueError, match="gives spatial size"):
            ops.sq_conv(x[:, :, 1:], g, *geometry)
        with pytest.raises(ValueError, match="one dtype and device"):
            ops.sq_conv(x.double(), g, *geometry)
        with pytest.raises(ValueError, match="is none of"):
            ops.sq_conv(x, g, *geometry, "fast")
        with pytest.raises(ValueError, match="gives spatial size"):
            ops.sq_conv(x, g, (3, 3), (2, 2), (0, 0), (1, 1), 1)
    lists = ops.sq_conv(x, g, [3, 3], [1, 1], [0, 0], [1, 1], 1)  # cannot be remembered
    assert torch.equal(lists, ops.sq_conv(x, g, *geometry))
    with pytest.raises(ValueError, match="gives spatial size"):
        ops.sq_conv(x, g, [3, 3], [2, 2], [0, 0], [1, 1], 1)
    product = torch.rand(2, 5, 3)
    for _ in range(2):
        ops.sq_prod(product, product, product[0, 0], None)
        with pytest.raises(ValueError, match="shift is"):
            ops.sq_prod(product, product, torch.rand(2), None)
