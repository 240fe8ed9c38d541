"""On a processor without instructions for bfloat16, products are computed in float32, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import per_example_squares, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_fast import FisherRecorder, Task2Vec, fisher, ops
from t2v_fast.gradients.fast_layers import FastLayers
from t2v_fast.ops import processor

PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


@pytest.fixture(autouse=True)
def _without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "multiplies_bfloat16", lambda: False)


def leaf(*shape: int, last: bool = False) -> Tensor:
    t = torch.randn(*shape).bfloat16()
    return (t.contiguous(memory_format=torch.channels_last) if last else t).requires_grad_()


class Products(TorchDispatchMode):
    """Notes the dtypes of the products that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in PRODUCTS:
            self.seen.setdefault(next(a.dtype for a in args if isinstance(a, Tensor)), set()).add(name)
        return func(*args, **(kwargs or {}))


def in_float64(function: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = function(*wide)
    return [y.detach(), *torch.autograd.grad(y, wide, g.double())]


CONVOLUTIONS = {  # channels, filters, kernel, image, stride, padding, dilation, groups
    "plain": (6, 8, (3, 3), (9, 7), 1, 1, 1, 1),
    "1x1 with stride": (6, 8, (1, 1), (9, 7), 2, 0, 1, 1),
    "stride and padding": (4, 8, (5, 3), (10, 9), (3, 2), (2, 0), 1, 1),
    "dilation": (4, 6, (3, 3), (12, 11), 2, 2, (2, 3), 2),
    "depthwise": (6, 6, (3, 3), (8, 8), 1, 1, 1, 6),
    "strided depthwise": (6, 12, (3, 3), (9, 8), 2, 1, 1, 6),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str, bias: bool, last: bool) -> None:
    torch.manual_seed(0)
    channels, filters, kernel, image, *geometry, groups = CONVOLUTIONS[case]
    inputs = [leaf(3, channels, *image, last=last), leaf(filters, channels // groups, *kernel)]
    inputs += [leaf(filters)] if bias else []

    def function(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv2d(x * 1, w, b, *geometry, groups)

    with Products() as products, FastLayers():
        got = function(*inputs)
        g = torch.randn_like(got)
        gradients = torch.autograd.grad(got, inputs, g)
    assert got.dtype == torch.bfloat16
    assert got.grad_fn.name() == "WideConvolutionBackward"
    assert products.seen.keys() == {torch.float32}
    for a, b in zip([got.detach(), *gradients], in_float64(function, inputs, g), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a.double(), b) < 2**-8  # a rounding or two


def attention(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x * 1, x, x @ w)


OTHERS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], str]] = {
    "linear": (lambda x, w, b: F.linear(x * 1, w, b), ((5, 7, 12), (9, 12), (9,)), "OneDnnLinearBackward"),
    "small image": (lambda x, w: F.conv2d(x * 1, w, None, 1, 1), ((4, 8, 1, 1), (6, 8, 3, 3)), "MatrixConvolution"),
    "operator": (lambda x, w: x * 1 @ w, ((5, 12), (12, 4)), "ToCopy"),
    "bmm": (lambda x, w: torch.bmm(x * 1, w), ((3, 5, 12), (3, 12, 4)), "ToCopy"),
    "einsum": (lambda x, w: torch.einsum("nsi,oi->nso", x * 1, w), ((3, 5, 12), (4, 12)), "ToCopy"),
    "attention": (attention, ((3, 2, 6, 8), (8, 8)), "ToCopy"),
    "one axis": (lambda x, w: F.conv1d(x * 1, w, None, 2), ((3, 5, 12), (4, 5, 3)), "ToCopy"),
    "transposed": (lambda x, w: F.conv_transpose2d(x * 1, w), ((3, 5, 6, 4), (5, 4, 3, 3)), "ToCopy"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products(name: str) -> None:
    torch.manual_seed(0)
    function, shapes, node = OTHERS[name]
    inputs = [leaf(*shape) for shape in shapes]
    with Products() as products, FastLayers():
        got = function(*inputs)
        g = torch.randn_like(got)
        gradients = torch.autograd.grad(got, inputs, g)
    assert got.grad_fn.name().startswith(node)
    assert products.seen.keys() == {torch.float32}
    for a, b in zip([got.detach(), *gradients], in_float64(function, inputs, g), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a.double(), b) < 2**-6


def test_errors_and_dtypes_are_those_of_torch() -> None:
    x, w, b = leaf(2, 4, 5, 5), leaf(6, 4, 3, 3), torch.randn(6)
    for function in (
        lambda: F.conv2d(x * 1, w, b),
        lambda: F.conv2d(x * 1, w[:, :3]),
        lambda: F.linear(x * 1, torch.randn(3, 5).bfloat16(), b[:3]),
        lambda: torch.matmul(x * 1, torch.randn(5, 5)),
    ):
        for context in (FastLayers(), torch.enable_grad()):
            with pytest.raises(RuntimeError), context:
                function()
    with FastLayers():  # float32 is left alone
        assert torch.matmul(x.float(), torch.randn(5, 5)).dtype == torch.float32


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixed = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.depthwise(F.gelu(self.stem(x))))
        tokens = self.norm(y.flatten(2).mT)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens @ self.mixed).mean(1))


@pytest.mark.parametrize("granularity", ["parameter", "filter"])
def test_fisher(granularity: str) -> None:
    """Against autograd of single examples in float64, on the rounded weights; no product in bfloat16 remains."""
    torch.manual_seed(0)
    model = Network().eval().bfloat16()
    batches = [torch.randn(n, 3, 9, 8).bfloat16() for n in (5, 2)]
    truth = Network().eval().double()
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    for x in batches:
        u = torch.randn(len(x), 4).bfloat16()
        with FisherRecorder(model, granularity=granularity) as recorder, Products() as products, FastLayers():
            got = recorder.backward(model(x), u)
        assert products.seen.keys() == {torch.float32}
        squares = per_example_squares(truth, x.double(), u.double()[None])
        for name, value in squares.items():
            want = reduce(value, granularity)
            want = want.sum(0) if granularity == "parameter" else want
            assert relative_error(got[name].double(), want) < 6e-2, name
    # The same through the public function, which finds the fast layers by itself.
    F1 = fisher(model, batches, "exact", granularity=granularity)
    F2 = fisher(truth, [x.double() for x in batches], "exact", granularity=granularity)
    for name, value in F2.items():
        assert relative_error(torch.as_tensor(F1[name]).double(), torch.as_tensor(value)) < 1e-1, name


def test_a_task_warns() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*dtype='float32' is more exact"):
        task2vec = Task2Vec(network, dtype="bfloat16")
    images, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 2
    assert task2vec.embed((images, labels), name="noise").hessian.shape == (4,)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("instructions", [False, True])
def test_what_a_processor_multiplies(
    machine: str, onednn: bool, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(processor.torch.cpu, f"_is_{name}_supported", lambda: instructions, raising=False)
    found = processor.multiplies_bfloat16.__wrapped__()
    assert found == (onednn and (instructions or machine == "aarch64"))
