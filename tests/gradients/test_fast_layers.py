"""Fast layers have the values and gradients of torch's, have rules, and are not used where they do not apply."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from oracle import per_example_squares, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_fast import FisherRecorder, fisher, ops
from t2v_fast.gradients import graph
from t2v_fast.gradients.fast_layers import NODES, FastLayers, convolution_matrix
from t2v_fast.gradients.graph import backpropagate
from t2v_fast.gradients.refusals import taps_of
from t2v_fast.ops.geometry import conv_output_size

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
PAIRS = {  # kernel, image, stride, padding, dilation
    "pixel": ((3, 3), (1, 1), 1, 1, 1),
    "2x2": ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    "stride": ((3, 3), (2, 2), (2,), [1], 1),
    "oblong": ((5, 3), (2, 3), (2, 1), (2, 1), 1),
    "dilation": ((3, 3), (2, 2), 1, 2, 2),
    "1x1": ((1, 1), (2, 2), 1, 0, 1),
}


@pytest.fixture(autouse=True)
def _with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs the tests: test_bfloat16_layers.py has those for processors without instructions."""
    monkeypatch.setattr(ops, "multiplies_bfloat16", lambda: True)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def assert_same(function: Callable[..., Tensor], node: str, *inputs: Tensor) -> None:
    """Check that values and gradients with and without fast layers agree, and that ``node`` made the output."""
    torch.manual_seed(7)
    want = function(*inputs)
    with FastLayers():
        got = function(*inputs)
    assert got.grad_fn.name() == node
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[want.dtype]
    assert relative_error(got.detach(), want.detach()) < tolerance
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", PAIRS)
def test_convolutions_over_few_pixels(case: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    kernel, image, *geometry = PAIRS[case]
    x, w = leaf(260, 64, *image, dtype=dtype), leaf(68, 64, *kernel, dtype=dtype)
    b = [leaf(68, dtype=dtype)] if bias else []
    assert_same(lambda x, w, b=None: F.conv2d(x * 1, w, b, *geometry), "MatrixConvolutionBackward", x, w, *b)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", sorted(set(PAIRS) - {"1x1"}))
def test_a_single_image_of_few_pixels(case: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Its weight gradient is one product, whatever the memory format."""
    torch.manual_seed(0)
    kernel, image, *geometry = PAIRS[case]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, w = (
        torch.randn(*shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        for shape in ((1, 64, *image), (68, 64, *kernel))
    )
    assert_same(
        lambda x, w, b: F.conv2d(x * 1, w, b, *geometry), "MatrixConvolutionBackward", x, w, leaf(68, dtype=dtype)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(65,), (5, 13), (2, 3, 11)])
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, w = leaf(*shape, 264, dtype=torch.float32), leaf(256, 264, dtype=torch.float32)
    b = [leaf(256, dtype=torch.float32)] if bias else []
    assert_same(lambda x, w, b=None: F.linear(x * 1, w, b), "OneDnnLinearBackward", x, w, *b)


def nhwc(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_convolutions_by_winograd(size: tuple[int, int], padding: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = nhwc(10, 40, *size, dtype=dtype), leaf(100, 40, 3, 3, dtype=dtype)
    b = [leaf(100, dtype=dtype)] if bias else []
    inputs = x, w, *b
    assert_same(lambda x, w, b=None: F.conv2d(x * 1, w, b, padding=padding), "WinogradConvolutionBackward", *inputs)


def test_in_bfloat16_the_input_gradient_alone_is_coarse() -> None:
    """With few tiles for many kernels, torch computes the forward pass, or float32 products do."""
    torch.manual_seed(0)
    w = leaf(512, 512, 3, 3, dtype=torch.bfloat16)
    for n in (8, 32):
        x = nhwc(n, 512, 7, 7, dtype=torch.bfloat16)
        want = F.conv2d(x.double(), w.double(), None, 1, 1)
        with FastLayers():
            got = F.conv2d(x * 1, w, None, 1, 1)
        assert got.grad_fn.name() == "WinogradConvolutionBackward"
        assert relative_error(got.detach(), want.detach()) < 2**-9
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (5, 2, 0, 1), (3, (1, 3), (2, 0), 2), ((2, 4), 3, 0, 1)]
)
def test_strided_depthwise_convolutions(
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int,
    bias: bool,
) -> None:
    torch.manual_seed(0)
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    w = leaf(12, 1, high, wide, dtype=torch.bfloat16)
    b = [leaf(12, dtype=torch.bfloat16)] if bias else []
    for size in ((9, 12), (10, 11)):
        x = leaf(3, 6, *size, dtype=torch.bfloat16)
        assert_same(
            lambda x, w, b=None: F.conv2d(x * 1, w, b, stride, padding, dilation, 6),
            "StridedDepthwiseBackward",
            *(x, w, *b),
        )


def test_fisher_of_a_strided_depthwise_convolution() -> None:
    """The same network in bfloat16 and in float64, with values that bfloat16 represents exactly."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6), nn.Flatten()
    model = nn.Sequential(*layers).bfloat16()
    x, u = torch.randn(5, 3, 7, 6).bfloat16(), torch.randn(5, 12 * 4 * 3).bfloat16()
    with FisherRecorder(model) as recorder, FastLayers():
        y = model(x)
        assert y.grad_fn.next_functions[0][0].name() == "StridedDepthwiseBackward"
        got = recorder.backward(y, u)
    model.double()
    with FisherRecorder(model) as recorder:
        want = recorder.backward(model(x.double()), u.double())
    for name, value in want.items():
        assert relative_error(got[name].double(), value) < 2e-2, name


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("dtype", "own"), [*((dtype, dtype) for dtype in TOLERANCE), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (4, 5, 6, 7), (1, 5, 6, 7), (3, 5, 2, 3, 4)])
def test_batch_norms_in_evaluation_mode(
    shape: tuple[int, ...], dtype: torch.dtype, own: torch.dtype, affine: bool
) -> None:
    torch.manual_seed(0)
    mean, variance = torch.randn(5, dtype=own), torch.rand(5, dtype=own) + 0.5
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    parameters = [leaf(5, dtype=own), leaf(5, dtype=own)] if affine else []
    for memory_format in formats:
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        assert_same(lambda x, *p: F.batch_norm(x * 1, mean, variance, *p, eps=0.1), "BatchNormBackward", x, *parameters)


def test_a_batch_norm_gets_a_cotangent_in_another_memory_format() -> None:
    """torch itself is wrong for one image with an odd stride of its batch, so the gradients are written out."""
    torch.manual_seed(0)
    mean, variance = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    w, b = leaf(5), leaf(5)
    root = (variance + 1e-5).sqrt().view(-1, 1, 1)
    usual, last = torch.contiguous_format, torch.channels_last
    for formats, n, stride in itertools.product(((usual, last), (last, usual)), (1, 3), (None, 5)):
        x, g = (torch.randn(n, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=f) for f in formats)
        if stride is not None and n == 1:
            g = g.as_strided(g.shape, (stride, *g.stride()[1:]))
        x.requires_grad_()
        with FastLayers():
            y = F.batch_norm(x * 1, mean, variance, w, b)
        assert y.grad_fn.name() == "BatchNormBackward"
        normalised = (x.detach() - mean.view(-1, 1, 1)) / root
        want = g * w.detach().view(-1, 1, 1) / root, (g * normalised).sum((0, 2, 3)), g.sum((0, 2, 3))
        for got, expected in zip(torch.autograd.grad(y, (x, w, b), g), want, strict=True):
            assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("kind", ["a mean over all pixels", "a batch norm of one image"])
def test_a_kept_graph_brings_cotangents_into_a_format_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    in_format = graph._in_format

    def counted(wanted: torch.memory_format, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        calls.append(wanted)
        return in_format(wanted, gradients)

    monkeypatch.setattr(graph, "_in_format", counted)
    mean = kind == "a mean over all pixels"
    top = (nn.ReLU(), nn.AdaptiveAvgPool2d(1)) if mean else (nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(4))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *top, nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.randn(3 if mean else 1, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with FisherRecorder(network.to(memory_format=torch.channels_last)) as recorder:
        logits = network(x)
        u = torch.randn_like(logits)
        first = recorder.backward(logits, u, retain_graph=True)
        assert len(calls) == 1
        for k in (2, 3):
            again = recorder.backward(logits, u, retain_graph=True)
            assert len(calls) == k
            assert all(again[name].equal(value) for name, value in first.items())


def test_relu6_in_place() -> None:
    torch.manual_seed(0)
    x = leaf(3, 4, 5, 5)
    assert_same(lambda x: F.hardtanh(x * 9, 0.0, 6.0, inplace=True), "InPlaceHardtanhBackward", x)
    edges = torch.tensor([0.0, 6.0, 3.0, -1.0, 7.0]).requires_grad_()
    with FastLayers():
        y = nn.ReLU6(inplace=True)(edges * 1)
    (g,) = torch.autograd.grad(y.sum(), edges)
    assert g.tolist() == [0, 0, 1, 0, 0]


def test_the_matrix_of_a_convolution() -> None:
    """Over one pixel, the matrix is the middle of a 3x3 kernel; over two pixels, their parts of each other's output."""
    w = torch.arange(2 * 5 * 9.0).view(2, 5, 3, 3)
    assert convolution_matrix(w, (1, 1), (1, 1), (1, 1), (1, 1)).equal(w[:, :, 1, 1])
    m = convolution_matrix(w, (1, 2), (1, 1), (1, 1), (1, 1)).view(2, 2, 2, 5)
    assert m[0, :, 1].equal(w[:, :, 1, 2])
    assert m[1, :, 0].equal(w[:, :, 1, 0])
    assert m[0, :, 0].equal(m[1, :, 1])


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (5, 4)])
def test_the_matrix_of_a_convolution_is_the_convolution(kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 2, *kernel, dtype=torch.float64)
    images = [(1, 1), (2, 2), (3, 2), (4, 5)]
    strides, paddings, dilations = [(1, 1), (2, 3)], [(0, 0), (2, 1), (3, 3)], [(1, 1), (2, 1), (2, 3)]
    compared = 0
    for image, *geometry in itertools.product(images, strides, paddings, dilations):
        if min(conv_output_size(image, kernel, *geometry)) < 1:
            continue
        x = torch.randn(4, 2, *image, dtype=torch.float64)
        want = F.conv2d(x, w, None, *geometry)
        rows = x.permute(0, 2, 3, 1).reshape(4, -1) @ convolution_matrix(w, image, *geometry).mT
        assert torch.allclose(rows.view(4, *want.shape[2:], 3).permute(0, 3, 1, 2), want), (image, geometry)
        compared += 1
    assert compared >= 20


def test_outputs_may_be_modified_in_place() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    with FastLayers():
        got = layers(x)
    g = torch.randn_like(got)
    want = layers(x)
    for a, b in zip(
        torch.autograd.grad(got, layers[0].weight, g), torch.autograd.grad(want, layers[0].weight, g), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_a_changed_weight_makes_a_new_matrix() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    fast = FastLayers()
    for _ in range(2):
        with fast:
            got = layer(x)
        torch.testing.assert_close(got, layer(x))
        with torch.no_grad():
            layer.weight += 1
    other = nn.Conv2d(3, 4, 3, padding=1).double()
    for each in (layer, other):  # each weight has a matrix of its own
        with fast:
            got = each(x)
        torch.testing.assert_close(got, each(x))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_computed_that_is_not_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(256, 256)).append(nn.Linear(256, 256))
    with FastLayers():
        y = model(torch.randn(80, 3, 2, 2))
    taps = taps_of(y, dict(model.named_parameters()))
    with Calls() as calls:
        backpropagate(y, torch.ones_like(y), taps, lambda node, g: None, retain_graph=True)
    assert calls.names.count("_linear_pointwise") == 3  # down to the first layer
    assert not {"convolution_backward", "mm", "sum"} & {*calls.names}
    with Calls() as calls:
        torch.autograd.grad(y, [model[3].weight], torch.ones_like(y))
    assert calls.names.count("_linear_pointwise") == 1
    assert calls.names.count("mm") == 1


def plain(name: str) -> Callable[[Tensor], Tensor]:
    w, v = leaf(256, 256, dtype=torch.float32), leaf(8, 8, 3, 3, dtype=torch.float32)
    a, b = (torch.randn(*shape) for shape in ((70, 256), (5, 8, 2, 2)))

    u, large = leaf(64, 32, 3, 3, dtype=torch.float32), nhwc(4, 32, 16, 16).detach()

    def reference(function: Callable[[], Tensor]) -> Tensor:
        with ops.use_backend("reference"):
            return function()

    def disabled(function: Callable[[], Tensor]) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return function()

    def with_tiles(function: Callable[[], Tensor]) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("t2v_fast.gradients.fast_layers._has_bfloat16_tiles", lambda: True)
            return function()

    def autocast(function: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    return {
        "small linear": lambda: F.linear(a[:1], w),
        "linear of a vector": lambda: F.linear(a[0], w),
        "linear in float64": lambda: F.linear(a.double(), w.double()),
        "linear of a parameter": lambda: F.linear(leaf(70, 256, dtype=torch.float32), w),
        "linear of a parameter's view": lambda: F.linear(leaf(256, 70, dtype=torch.float32).mT, w),
        "linear without oneDNN": lambda: disabled(lambda: F.linear(a, w)),
        "linear under autocast": lambda: autocast(lambda: F.linear(a, w)),
        "convolution without oneDNN": lambda: disabled(lambda: F.conv2d(b, v, None, 1, 1)),
        "convolution under autocast": lambda: autocast(lambda: F.conv2d(b, v, None, 1, 1)),
        "groups": lambda: F.conv2d(b, v[:, :4], None, 1, 1, 1, 2),
        "padding by name": lambda: F.conv2d(b, v, None, 1, "same"),
        "one image": lambda: F.conv2d(b[0], v, None, 1, 1),
        "large images": lambda: F.conv2d(torch.randn(2, 8, 3, 3), v, None, 1, 1),
        "computed weight": lambda: F.conv2d(b, v * 2, None, 1, 1),
        "winograd of images as they come": lambda: F.conv2d(large.contiguous() * 1, u, None, 1, 1),
        "winograd in float64": lambda: F.conv2d(large.double(), u.double(), None, 1, 1),
        "winograd in bfloat16 where that has tiles": lambda: with_tiles(
            lambda: F.conv2d(large.bfloat16() * 1, u.bfloat16(), None, 1, 1)
        ),
        "winograd of a stride": lambda: F.conv2d(large * 1, u, None, 2, 1),
        "winograd of 6x6": lambda: F.conv2d(large[:, :, :6, :6] * 1, u, None, 1, 1),
        "winograd on the reference": lambda: reference(lambda: F.conv2d(large * 1, u, None, 1, 1)),
        "batch norm in training mode": lambda: F.batch_norm(b * v[0, 0, 0, 0], None, None, training=True),
        "relu6 of a view": lambda: F.hardtanh((a * w[0])[:3], 0.0, 6.0, inplace=True),
        "relu6 out of place": lambda: F.hardtanh(a * w[0], 0.0, 6.0),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("small linear", "linear of a vector", "linear in float64", "linear of a parameter"),
        *("linear of a parameter's view", "linear without oneDNN", "linear under autocast"),
        *("convolution without oneDNN", "convolution under autocast", "groups", "padding by name", "one image"),
        *("large images", "computed weight", "relu6 of a view", "relu6 out of place"),
        *("winograd of images as they come", "winograd in float64", "winograd of a stride", "winograd of 6x6"),
        *(
            "winograd in bfloat16 where that has tiles",
            "winograd on the reference",
            "batch norm in training mode",
        ),
    ],
)
def test_left_alone(name: str) -> None:
    torch.manual_seed(0)
    function = plain(name)
    torch.manual_seed(1)
    want = function()
    torch.manual_seed(1)
    with FastLayers():
        got = function()
    assert got.equal(want)
    assert got.grad_fn.name() == want.grad_fn.name()


def test_errors_are_torchs_own() -> None:
    with FastLayers():
        for wrong in (
            lambda: F.linear(torch.randn(90, 256), torch.randn(256, 250)),
            lambda: F.conv2d(torch.randn(2, 5, 2, 2), torch.randn(8, 4, 3, 3), None, 1, 1),
            lambda: F.conv2d(torch.randn(2, 4, 2, 2), torch.randn(8, 4, 3, 3)),
            lambda: F.hardtanh(leaf(3), 0.0, 6.0, inplace=True),
            lambda: F.conv2d(nhwc(4, 30, 16, 16), torch.randn(64, 32, 3, 3), None, 1, 1),
            lambda: F.conv2d(nhwc(4, 32, 16, 16), torch.randn(64, 32, 3, 3), torch.randn(3), 1, 1),
            lambda: F.batch_norm(torch.randn(2, 3, 4), torch.zeros(4), torch.ones(4)),
            lambda: F.batch_norm(torch.randn(2, 3, 4).double(), torch.zeros(3), torch.ones(3)),
        ):
            with pytest.raises(RuntimeError):
                wrong()


class Network(nn.Module):
    """A network with all fast layers, a layer that is used twice, tied weights and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.relu6 = nn.ReLU6(inplace=True)
        self.few = nn.Conv2d(32, 32, 3, padding=1)
        self.large = nn.Conv2d(32, 32, 3, padding=1)
        self.wide = nn.Linear(128, 256)
        self.deep = nn.Linear(256, 256)
        self.narrow = nn.Linear(256, 128)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.norm(self.stem(x)) * 3)
        x = self.few(torch.relu(self.few(F.avg_pool2d(self.large(torch.relu(self.large(x))), 4)))).flatten(1)
        x = torch.tanh(self.deep(torch.tanh(self.deep(self.wide(x)))))
        x = torch.tanh(F.linear(self.narrow(x), self.wide.weight))
        return self.head(torch.tanh(F.linear(x, self.narrow.weight)))


@pytest.mark.slow_unless(granularity=("filter",))
@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
def test_fisher_agrees_with_plain_autograd(granularity: str) -> None:
    torch.manual_seed(0)
    network = Network().eval()
    x = torch.randn(150, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with FastLayers():
        y = network(x)
    names: set[str] = set()
    stack = [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
        if node is not None:
            stack.extend(child for child, _ in node.next_functions)
    assert names >= NODES - {"StridedDepthwiseBackward", "WideConvolutionBackward"}  # for bfloat16
    got = fisher(network, [x], "exact", granularity=granularity)
    network.double()
    logits = network(x.double())
    p = logits.detach().softmax(1)
    u = [p[:, c : c + 1].sqrt() * (torch.eye(5, dtype=p.dtype)[c] - p) for c in range(5)]
    want = per_example_squares(network, x.double(), torch.stack(u))
    assert got.unused == {"unused.weight", "unused.bias"}
    for name, square in want.items():
        if name not in got.unused:
            assert relative_error(got[name], reduce(square, granularity).mean(0)) < 1e-4, name


class Table(nn.Module):
    """A bias that a small network computes from a constant table, like the position biases of Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(256, 128))
        self.mlp = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 4))
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.mlp(self.places)[:, 0]))


def test_gradients_through_a_fast_layer_in_batches() -> None:
    torch.manual_seed(0)
    network, x = Table(), torch.randn(6, 256)
    got = fisher(network, [x], "exact", unsupported="exact")
    network.double()
    logits = network(x.double())
    p = logits.detach().softmax(1)
    u = [p[:, c : c + 1].sqrt() * (torch.eye(4, dtype=p.dtype)[c] - p) for c in range(4)]
    for name, square in per_example_squares(network, x.double(), torch.stack(u)).items():
        assert relative_error(got[name], reduce(square, "filter").mean(0)) < 1e-4, name


def test_frames_of_examples() -> None:
    """Each example has several images, as in video networks."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    model = nn.Sequential(nn.Flatten(0, 1), layer, nn.Unflatten(0, (5, 3)), nn.Flatten())
    x, u = torch.randn(5, 3, 4, 2, 2), torch.randn(5, 72)
    with FisherRecorder(model) as recorder:
        want = recorder.backward(model(x), u)
        with FastLayers():
            y = model(x)
        got = recorder.backward(y, u)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
