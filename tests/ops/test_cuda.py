"""The CUDA sources without a GPU: emulated in every order, compiled for two GPUs, linked and imported.

test_ops.py compares the emulated kernels with float64 over the grid of geometries, as it does for every backend.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import resources
import symbols
import torch
from cuda_checks import CHECKS, TILED, conv_check
from op_checks import DTYPES, assert_close, guarded, prod_gradients
from oracle import per_example_squares, reduce, relative_error
from resources import NVCC

import t2v_fast
from t2v_fast import ops
from t2v_fast.ops import planner
from t2v_fast.ops.reference import accumulate_dtype

ROOT = Path(__file__).resolve().parents[2]
ORDERS = [(backwards, eager) for backwards in (False, True) for eager in (False, True)]


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_any_order_of_threads_and_copies(check: str, order: tuple[bool, bool]) -> None:
    with emulated.running(*order):
        assert CHECKS[check]() < (1e-14 if "float64" in check else 2e-6)


@pytest.mark.slow
def test_every_barrier_is_needed() -> None:
    """Skipping any one barrier, or wait for copies, changes a result in at least one order that a GPU might run."""
    with emulated.running():
        for check in CHECKS.values():
            check()
    sites = emulated.sites()
    assert len(sites) >= 6
    assert {site.split(":")[0] for site in sites} == {"tile.h", "lanes.h", "sq_prod.cu", "sq_scatter.cu"}
    survived = []
    for site in sites:
        caught = False
        for order in ORDERS:
            with emulated.running(*order, left_out=site):
                caught = caught or any(check() > 1e-3 for check in CHECKS.values())
        if not caught:
            survived.append(site)
    assert survived == []


SANITIZED = """
import sys
sys.path.insert(0, {helpers!r})
import cases, cuda_checks, emulated, op_checks
with emulated.running(backwards=True):
    for check in cuda_checks.CHECKS.values():
        assert check() < 2e-6
    for case in cases.CONVOLUTIONS:
        for dtype in op_checks.DTYPES:
            for path in ("explicit", "gram", "elementwise"):
                if case.n:
                    cuda_checks.conv_check(case, path, dtype)()
print("clean")
"""


@pytest.mark.weekly
def test_no_access_is_out_of_bounds() -> None:
    """The whole grid under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = os.environ.get("CXX", "g++")
    environment = os.environ | {
        # Python was not built with sanitizers, so their runtime and the library that it wraps are loaded first.
        "LD_PRELOAD": " ".join(
            subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so")
        ),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks
        emulated.SANITIZE: "address,undefined",
    }
    script = SANITIZED.format(helpers=str(ROOT / "tests" / "helpers"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "clean" in done.stdout


@pytest.mark.weekly
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA sources were not compiled for a GPU")
def test_no_kernel_spills() -> None:
    found = resources.of_cuda_kernels()
    assert [row["name"] for row in found if row["stores"] != "0" or row["loads"] != "0"] == []
    launches = resources.cuda_launches(found)
    assert {name for name, _ in launches} == {
        *("squares", "gradient", "split", "gram", "shift", "form", "depthwise"),
        *("along_channels", "along_positions", "square", "weigh", "filter", "element"),
    }
    assert all(cells.keys() == resources.CARD.keys() for cells in launches.values())


LOADED = """
import torch
from t2v_fast import ops

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
geometry = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups


def run(name, *args):
    return getattr(torch.ops.t2v_fast, name).default.redispatch(CUDA, *args)


for name in ops.SCHEMAS.keys() - ops.TRITON_ONLY:
    assert "bindings.cpp" in torch._C._dispatch_dump(f"t2v_fast::{name}").split("CUDA:")[1].splitlines()[0], name
# Tensors on the CPU will do for a batch of no examples, for which nothing is launched.
x, g, weight = torch.ones(0, 3, 4), torch.ones(0, 3, 5), torch.ones(0)
image, cotangent, index = torch.ones(0, 3, 6, 6), torch.ones(0, 8, 6, 6), torch.zeros(0, 3, dtype=torch.long)
cases = {
    "sq_outer": ((x, g, "gram"), [0, 5]),
    "sq_linear": ((x, g, torch.ones(0, 1, 3, 3)), [2, 0, 5]),
    "sq_outer_acc_": ((torch.zeros(5, 4), x, g, weight), None),
    "sq_conv": ((image, cotangent, [3, 3], *geometry, "explicit"), [0, 8]),
    "sq_conv_acc_": ((torch.zeros(8, 3, 3, 3), image, cotangent, weight, *geometry, "explicit"), None),
    "conv_gram": ((image, [3, 3], *geometry), [0, 1, 36, 36]),
    "sq_gram": ((torch.ones(0, 1, 36, 36), cotangent), [0, 8]),
    "sq_prod": ((g, g, torch.ones(1, 1, 5), None), [0, 5]),
    "sq_norm": ((g, g, None, torch.ones(1, 1, 5)), [2, 0, 5]),
    "sq_prod_acc_": ((torch.zeros(5), g, weight, None, None, None), None),
    "sq_scatter": ((index, g, 7), [0, 7]),
    "sq_scatter_acc_": ((torch.zeros(7, 5), index, g, weight), None),
}
assert cases.keys() == ops.SCHEMAS.keys() - ops.TRITON_ONLY
for name, (args, shape) in cases.items():
    found = run(name, *args)
    assert found is None if shape is None else list(found.shape) == shape, name
# And for wrong arguments, which are found before.
for name, args, words in (
    ("sq_outer", (torch.ones(2, 3, 4), torch.ones(2, 4, 5), "gram"), "with one S, got [2, 3, 4] and [2, 4, 5]"),
    ("sq_conv", (image, cotangent, [3, 3], *geometry, "short"), "path 'short' is none of explicit, gram, winograd"),
    ("sq_scatter", (index, g, 0), "num_rows is 0, expected at least 1"),
    ("sq_prod_acc_", (torch.zeros(4), g, weight, None, None, None), "out is [4] Float, expected contiguous [5] Float"),
):
    try:
        run(name, *args)
    except (ValueError, RuntimeError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(name)
print(ops.backend_status()["cuda"])
"""


@pytest.mark.weekly
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA library cannot be built")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it loads no CUDA library")
def test_the_library_has_the_kernels(tmp_path: Path) -> None:
    """The CUDA library is built by nvcc and loaded, with or without a GPU, and reads its arguments."""
    package = tmp_path / "t2v_fast"
    shutil.copytree(ROOT / "t2v_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    choices = {"T2V_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "T2V_FAST_BUILD_DIR": "build/cuda"}
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temporary"]
    subprocess.run(build, cwd=ROOT, env=os.environ | choices, check=True)
    run = [sys.executable, "-c", LOADED]
    found = subprocess.run(run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert found.returncode == 0, found.stderr
    expected = "available" if torch.cuda.is_available() else "torch finds no CUDA device"
    assert found.stdout.decode().strip() == expected
    # It takes C functions of torch, nothing of Python, and no CUDA runtime but the one that it contains.
    taken = symbols.taken(package / f"libt2v_cuda{torch.version.cuda.split('.')[0]}.so")
    assert {"torch_call_dispatcher", "aoti_torch_get_current_cuda_stream"} <= taken
    assert [name for name in taken if name.startswith("cuda")] == []


def test_tf32_is_used_where_it_is_allowed(precision: str) -> None:
    with emulated.running():
        errors = [conv_check(TILED, path, torch.float32)() for path in ("explicit", "gram", "elementwise")]
    assert all(1e-5 < e < 2e-3 if precision == "high" else e < 2e-6 for e in errors)


def test_tf32_is_allowed_by_the_newer_setting(tf32_by_backend: None) -> None:
    with emulated.running():
        errors = [conv_check(TILED, path, torch.float32)() for path in ("explicit", "gram", "elementwise")]
    assert all(1e-5 < e < 2e-3 for e in errors)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Memory that is allocated and not written has NaN in it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


LINEAR = {  # N, S, I, O, K
    "one position": (2, 1, 3, 4, 1),
    "few positions": (3, 5, 9, 33, 2),
    "one tile": (2, 64, 16, 64, 1),
    "several parts": (1, 197, 18, 136, 2),
    "examples in turn": (3, 130, 8, 24, 2),
    "many blocks": (2, 70, 8, 1160, 1),
    "no example": (0, 3, 4, 5, 1),
}


@pytest.mark.parametrize("kind", [*map(str, DTYPES), "tf32"])
@pytest.mark.parametrize("case", LINEAR)
def test_sq_linear(case: str, kind: str, nan_in_new_memory: None) -> None:
    """The weight and the bias of a linear layer come from one kernel. No value of a Gram matrix is read unwritten."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind.removeprefix("torch."))
    n, s, i, o, k = LINEAR[case]
    before = torch.get_float32_matmul_precision()
    calls: list[str] = []
    for layout in ("contiguous", "sliced"):
        x, g = guarded((n, s, i), dtype, 1, layout), guarded((n * k, s, o), dtype, 2, layout)
        gradients = torch.einsum("knso,nsi->knoi", g.double().unflatten(0, (k, n)), x.double())
        try:
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            with emulated.running(calls=calls):
                assert ops.fuses_bias(x, g)
                both = ops.sq_linear(x, g, "gram")
                assert torch.equal(both, ops.sq_linear(x, g, "gram"))
                assert calls == ["sq_linear"] * 2
                outer = ops.sq_outer(x, g, "gram")
                gram = ops.conv_gram(x.transpose(1, 2).unsqueeze(2), (1, 1), (1, 1), (0, 0), (1, 1), 1)
                kept, explicit = ops.sq_linear(x, g, "gram", gram), ops.sq_linear(x, g)
                calls.clear()
        finally:
            torch.set_float32_matmul_precision(before)
        if s > 1:  # the square of one token's gradient is a product of squares
            assert torch.equal(both[0], outer)
        want = gradients.square().sum(3).flatten(0, 1), g.double().sum(1).square()
        for weight, bias in (both, kept, explicit):
            if kind != "tf32" or n == 0:
                assert_close(weight, want[0], dtype, s * i)
            else:
                assert relative_error(weight, want[0]) < 2e-3
            assert_close(bias, want[1], dtype, s)


def test_biases_come_with_the_weights_of_linear_layers() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5), torch.nn.Flatten()
    network, x, cotangents = torch.nn.Sequential(*layers), torch.randn(3, 70, 6), torch.randn(2, 3, 350)
    want = per_example_squares(network.double(), x.double(), cotangents.double())
    network.float()
    calls: list[str] = []
    with planner.force("gram"), emulated.running(calls=calls), t2v_fast.FisherRecorder(network) as recorder:
        found = recorder.backward(network(x), cotangents)
    assert set(calls) == {"sq_linear"}
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert relative_error(value, reduce(want[name], "filter")) < 1e-5, name


# Shapes N, S, C of x, and the layout. With 8 half-precision values in a vector, or 4, 2 or 1.
PRODUCTS = {
    "vectors of channels": (2, 37, 48, "contiguous"),
    "a last block of few channels": (2, 30, 264, "contiguous"),
    "channels of no whole vector": (2, 70, 12, "contiguous"),
    "odd channels": (2, 9, 7, "contiguous"),
    "one position": (3, 1, 40, "contiguous"),
    "few rows of many positions": (1, 5000, 16, "contiguous"),
    "vectors of positions": (2, 264, 5, "channels_last"),
    "positions of no whole vector": (2, 49, 5, "channels_last"),
    "many positions along memory": (1, 17000, 3, "channels_last"),
    "any strides": (2, 70, 12, "sliced"),
}
# Shapes of the shift and the scale.
NORMS = {
    "no shift": lambda n, s, c: (None, None),
    "by channel": lambda n, s, c: ((c,), (c,)),
    "by example": lambda n, s, c: ((n, 1, c), (n, 1, c)),
    "by position": lambda n, s, c: ((n, s, 1), (n, s, 1)),
    "scale by position": lambda n, s, c: (None, (n, s, 1)),
    "shift by channel, scale by position": lambda n, s, c: ((c,), (s, 1)),
    "by element": lambda n, s, c: ((n, s, c), (n, s, c)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case: str, norm: str, dtype: torch.dtype) -> None:
    """Every way in which sq_prod.cu reads its tensors."""
    *shape, layout = PRODUCTS[case]
    wide = accumulate_dtype(dtype)
    x, g = guarded(tuple(shape), dtype, 1, layout), guarded((2 * shape[0], *shape[1:]), dtype, 2, layout)
    shift, scale = (given and guarded(given, wide, 3) for given in NORMS[norm](*shape))
    with emulated.running():
        found, plain = ops.sq_norm(g, x, shift, scale)
        assert torch.equal(ops.sq_prod(g, x, shift, scale), found)
        bias = ops.sq_prod(g)
    assert_close(found, prod_gradients(g, x, shift, scale).square(), dtype, 4 * shape[1])
    for each in (plain, bias):
        assert_close(each, prod_gradients(g, None, None, None).square(), dtype, 4 * shape[1])


def test_a_whole_network() -> None:
    """A Fisher runs every op on the CUDA kernels."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, stride=2, groups=16),
        torch.nn.Conv2d(16, 40, 1),
        torch.nn.GELU(),
        torch.nn.Flatten(2),
        torch.nn.Linear(16, 24),
        torch.nn.LayerNorm(24),
        torch.nn.Flatten(),
        torch.nn.Linear(40 * 24, 5),
    ).eval()
    x, cotangents = torch.randn(6, 3, 10, 10), torch.randn(2, 6, 5)
    want = per_example_squares(model.double(), x.double(), cotangents.double())
    model.float()
    for granularity, path in (("filter", "explicit"), ("filter", "gram"), ("parameter", "explicit")):
        # A path is forced, so that the planner does not measure the emulation.
        with (
            planner.force(path),
            emulated.running(),
            t2v_fast.FisherRecorder(model, granularity=granularity) as recorder,
        ):
            found = recorder.backward(model(x), cotangents)
        assert found.keys() == want.keys()
        for name, value in found.items():
            truth = reduce(want[name], granularity)
            assert relative_error(value, truth.sum(0) if granularity == "parameter" else truth) < 1e-5, name
