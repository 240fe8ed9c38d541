"""The graphs that torch builds on a GPU: what each parameter gets there, and the numbers, without a GPU."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pretend_cuda
import pytest
import torch
from cuda_device import REAL, Pretend, dtype_of, moved, pretended
from networks import Function
from oracle import per_example_squares, randomise_norms, reduce
from pretend_cuda import aten
from torch import Tensor, nn

from t2v_fast import FisherRecorder, UnsupportedError, fisher, ops
from t2v_fast.gradients import graph
from t2v_fast.gradients.fast_layers import FastLayers
from t2v_fast.gradients.owners import EACH, Owned
from t2v_fast.gradients.ownership import nodes_of
from t2v_fast.gradients.refusals import taps_of
from t2v_fast.gradients.routes import routes_of
from t2v_fast.gradients.rules import factors_of, has_rule, unsupported_reason
from t2v_fast.ops import planner

# torch chooses the nodes of convolutions and batch norms by the libraries that it was built with, cuDNN among them.
pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")
N = 3
IMAGES, SEQUENCES, VOLUMES, TOKENS = (N, 4, 7, 6), (N, 4, 9), (N, 4, 3, 4, 3), (N, 5, 8)


def answers(network: nn.Module, x: Tensor) -> tuple[dict[str, str], Tensor]:
    """What each parameter gets: "rule" or "called" and the node, or a reason of refusal. And the logits [N, C]."""
    with FisherRecorder(network) as recorder:
        y = network(x)
        taps = taps_of(y, recorder.parameters, tell_apart=True)
        found = {name: f"refused: {why}" for name, why in taps.unknown.items()}
        for use in taps:
            why = unsupported_reason(use)
            kind = ("rule" if has_rule(use) else "called") if why is None else f"refused: {why}:"
            found |= {name: f"{kind} {use.node.name()}" for name in use.parameters}
        routes_of(taps, "error", set())
    assert taps.unused | found.keys() == recorder.parameters.keys()
    return found, y


def check(
    network: nn.Module, x: Tensor, dtype: torch.dtype, kernel: str = "math", cudnn: bool = True
) -> dict[str, str]:
    """What each parameter gets on CUDA. Nothing is refused there, and the numbers are those of autograd in float64."""
    network = randomise_norms(network.double())
    network = Function(lambda self, x: _logits(self.body(x)), body=network).eval()
    x = x.double() if x.is_floating_point() else x
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, *network(x).shape, dtype=torch.float64, generator=generator)
    want = {name: reduce(s, "filter") for name, s in per_example_squares(network, x, u).items()}
    on_cpu, _ = answers(network, x)
    assert not any("refused" in what for what in on_cpu.values())
    dtype = dtype_of(kernel, dtype)
    with torch.backends.cudnn.flags(enabled=cudnn), pretended(kernel):
        there = moved(network.to(dtype))
        images = Pretend(x.to(dtype) if x.is_floating_point() else x)
        found, _ = answers(there, images)
        assert {name: what for name, what in found.items() if "refused" in what} == {}
        with FisherRecorder(there) as recorder:
            got = recorder.backward(there(images), Pretend(u.to(dtype)))
    bound = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}[dtype]
    least = 1e-3 * max(squares.norm() for squares in want.values())  # a bias before a norm has no gradient
    for name, squares in want.items():
        assert got[name].is_cuda, name
        assert (got[name].held.double() - squares).norm() < bound * max(squares.norm(), least), (name, found[name])
    return found


def _logits(y: Tensor) -> Tensor:
    """Logits [N, C] from any output, with another weight for each entry."""
    y = getattr(y, "logits", y[0] if isinstance(y, tuple) else y)
    if y.dim() < 3:
        return y
    y = y.flatten(1)
    weight = torch.linspace(0.5, 1.5, 2 * y.shape[1], dtype=y.dtype, device=y.device).view(-1, 2)
    return (y / y.shape[1] ** 0.5) @ weight


class CudnnRnn(nn.Module):
    """What nn.LSTM and its like call on CUDA in training mode, the only mode with a backward pass."""

    def __init__(self, layer: nn.RNNBase, train: bool = True) -> None:
        super().__init__()
        self.layer, self.trains = layer, train

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        mode = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}[layer.mode]
        n = x.shape[0] if layer.batch_first else x.shape[1]
        states = layer.num_layers * (1 + layer.bidirectional)
        h = x.new_zeros(states, n, layer.hidden_size)
        if not isinstance(x, Pretend):
            return layer(x)[0]
        weights = layer._flat_weights
        options = (layer.num_layers, layer.batch_first, 0.0, self.trains, layer.bidirectional, [], None)
        cell = h if mode == 2 else None
        each = len(weights) // states
        return aten._cudnn_rnn(x, weights, each, None, h, cell, mode, layer.hidden_size, 0, *options)[0]


class Attention(nn.Module):
    def __init__(self, mask: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.mask, self.causal = nn.Linear(8, 48), nn.Linear(16, 3), mask, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = torch.linspace(-1, 1, 25, dtype=x.dtype, device=x.device).view(5, 5) if self.mask else None
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def last(layer: nn.Module, call: Callable = lambda layer, x: layer(x)[0]) -> nn.Module:
    return Function(lambda self, x: call(self.layer, x), layer=layer)


def cell(layer: nn.Module) -> nn.Module:
    def steps(self: nn.Module, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.layer(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    return Function(steps, layer=layer)


def after_conv(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), *layers)


INDICES = torch.tensor([[0, 2, 2, 5], [1, 1, 0, 3], [4, 5, 5, 5]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Tensor]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGES),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), SEQUENCES),
    "conv 3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), VOLUMES),
    "conv transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGES),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), IMAGES),
    "batch norm": (lambda: after_conv(nn.BatchNorm2d(4)), IMAGES),
    "batch norm of rows": (lambda: nn.BatchNorm1d(8), (N, 8)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), SEQUENCES),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), VOLUMES),
    "batch norm without affine": (lambda: after_conv(nn.BatchNorm2d(4, affine=False)), IMAGES),
    "group norm": (lambda: after_conv(nn.GroupNorm(2, 4)), IMAGES),
    "instance norm": (lambda: after_conv(nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), SEQUENCES),
    "instance norm, tracking": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGES),
    "layer norm": (lambda: nn.LayerNorm(8), TOKENS),
    "RMS norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-3)), TOKENS),
    "RMS norm of two axes": (lambda: nn.RMSNorm((5, 8), eps=1e-3), TOKENS),
    "RMS norm, tokens first": (
        lambda: Function(lambda self, x: self.norm(x.transpose(0, 1)).transpose(0, 1), norm=nn.RMSNorm(8, eps=1e-3)),
        TOKENS,
    ),
    "linear": (lambda: nn.Linear(8, 4), (N, 8)),
    "linear without bias": (lambda: nn.Linear(8, 4, bias=False), TOKENS),
    "embedding": (lambda: nn.Embedding(6, 4), INDICES),
    "embedding bag": (lambda: nn.EmbeddingBag(6, 4), INDICES),
    "PReLU": (lambda: after_conv(nn.PReLU(4)), IMAGES),
    "multi-head": (lambda: last(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)[0]), TOKENS),
    # The features behind the last norm sum to nearly zero. Logits that are such sums would be rounding errors.
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)),
        TOKENS,
    ),
    "decoder layer": (
        lambda: nn.Sequential(
            last(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x, x.flip(1))), nn.Linear(8, 3)
        ),
        TOKENS,
    ),
    **{
        f"upsample, {mode}": (lambda mode=mode: after_conv(nn.Upsample(scale_factor=2, mode=mode)), IMAGES)
        for mode in ("nearest", "bilinear", "bicubic", "nearest-exact")
    },
    "max pool": (lambda: after_conv(nn.MaxPool2d(2)), IMAGES),
    "average pool": (lambda: after_conv(nn.AvgPool2d(2)), IMAGES),
    "adaptive pools": (lambda: after_conv(nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(2)), IMAGES),
    "circular padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), IMAGES),
    "RNN, cuDNN": (lambda: CudnnRnn(nn.RNN(8, 3, batch_first=True)), TOKENS),
    "GRU, cuDNN": (lambda: CudnnRnn(nn.GRU(8, 3, batch_first=True, bidirectional=True)), TOKENS),
    "LSTM, cuDNN": (lambda: CudnnRnn(nn.LSTM(8, 3, 2, batch_first=True)), TOKENS),
    "LSTM, cuDNN, time first": (
        lambda: Function(lambda self, x: self.rnn(x.transpose(0, 1)).transpose(0, 1), rnn=CudnnRnn(nn.LSTM(8, 3))),
        TOKENS,
    ),
}


def example(shape: tuple[int, ...] | Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return shape if isinstance(shape, Tensor) else torch.randn(shape, generator=generator)


@pytest.mark.slow_unless(
    dtype=("torch.float64",), name=[name for name in LAYERS if "upsample" not in name and "pool" not in name]
)
@pytest.mark.slow_unless(dtype=("torch.bfloat16",), name=("conv", "batch norm", "group norm", "RMS norm"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    found = check(make(), example(shape), dtype)
    if "bag" not in name and "cuDNN" not in name:
        assert {what.partition(" ")[0] for what in found.values()} <= {"rule"}


def test_what_only_cuda_builds() -> None:
    """The nodes differ from those on a CPU, so the tests above test what they should."""
    for name, node in {
        "batch norm": "CudnnBatchNormBackward0",
        "RMS norm": "FusedRmsNormBackward0",
        "LSTM, cuDNN": "CudnnRnnBackward0",
    }.items():
        make, shape = LAYERS[name]
        with pretended():
            found, _ = answers(moved(make().eval()), Pretend(example(shape)))
        assert any(what.endswith(node) for what in found.values())


@pytest.mark.parametrize("kind", ["Cudnn", "Miopen"])
def test_the_rule_of_a_batch_norm_reads_what_its_node_saves(kind: str) -> None:
    """Nodes of AMD's library cannot be built here; the rule gets one with the same fields."""
    name = f"{kind}BatchNormBackward0"
    network, x, u = randomise_norms(nn.BatchNorm2d(4, eps=1e-2)).double(), example(IMAGES).double(), torch.randn(IMAGES)
    node = SimpleNamespace(name=lambda: name, _saved_input=x, _saved_epsilon=1e-2, _saved_training=False)
    node._saved_running_mean, node._saved_running_var = network.running_mean, network.running_var
    want = per_example_squares(network, x, u[None])
    for slot, parameter in ((1, "weight"), (2, "bias")):
        use = graph.Use((parameter,), node, slot, (4,), (Owned(0, EACH),))
        assert has_rule(use)
        gradients = factors_of(use, [u.double()], N).gradients(0, N)
        torch.testing.assert_close(gradients.square(), want[parameter])


@pytest.mark.parametrize("fast", [True, False])
def test_a_batch_norm_is_scaled_as_torch_scaled_it(fast: bool) -> None:
    """The rule reads the shift and the scale that the forward pass has computed, which are more precise than x."""
    torch.manual_seed(0)
    network = randomise_norms(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten())).bfloat16().eval()
    x, u = example(IMAGES).bfloat16(), torch.randn(N, 168).bfloat16()
    ran: list[str] = []
    inputs: list[Tensor] = []
    with pretended(), FastLayers() if fast else nullcontext(), FisherRecorder(there := moved(network)) as recorder:
        there[1].register_forward_hook(lambda layer, args, output: inputs.append(args[0].detach()))
        y = there(Pretend(x))
        pretend_cuda.listeners.append(lambda function, *rest: ran.append(str(function)))
        got = recorder.backward(y, Pretend(u))
        pretend_cuda.listeners.pop()
    assert not [name for name in ran if "rsqrt" in name or "copy" in name]
    assert REAL or ("aten.batch_norm_elemt.default" in ran) == fast
    norm = network[1].double()
    normalised = norm(inputs[0].held.double()) - norm.bias.view(-1, 1, 1)
    terms = normalised.flatten(2) * u.double().view(N, 4, 42)
    want = terms.sum(2).square() / norm.weight.square()
    torch.testing.assert_close(got["1.weight"].held.double(), want, rtol=1e-4, atol=1e-5)


KERNELS = {"efficient": "Efficient", "flash": "Flash", "cudnn": "Cudnn"}


@pytest.mark.parametrize("kind", ["plain", "causal", "masked", "multi-head"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention(kernel: str, kind: str) -> None:
    if kind == "multi-head":
        layer = nn.MultiheadAttention(8, 1, batch_first=True)  # no kernel takes heads of less than 8 numbers
        network = last(layer, lambda m, x: m(x, x, x, need_weights=False)[0])
    else:
        network = Attention(kind == "masked", kind == "causal")
    found = check(network, example(TOKENS), torch.float64, kernel)
    assert all(what.startswith("rule") for what in found.values())
    if kernel != "flash" or kind != "masked":
        with pretended(kernel), FisherRecorder(there := moved(network)):
            there.to(dtype := dtype_of(kernel, torch.float64))
            names = {node.name() for node in nodes_of(there(Pretend(example(TOKENS).to(dtype))))}
        assert f"ScaledDotProduct{KERNELS[kernel]}AttentionBackward0" in names


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(8, 3, 2, batch_first=True), nn.GRU(8, 3, batch_first=True, bidirectional=True), nn.RNN(8, 3)],
    ids=["LSTM", "GRU", "RNN"],
)
def test_recurrent_layers_without_cudnn(layer: nn.RNNBase) -> None:
    """In eval mode cuDNN must be off. The layers are then one fused cell for each step."""
    first = layer.batch_first
    network = last(layer, lambda m, x: m(x)[0] if first else m(x.transpose(0, 1))[0].transpose(0, 1))
    found = check(network, example(TOKENS), torch.float64, cudnn=False)
    assert all(what.startswith(("rule", "called ThnnFused")) for what in found.values())


@pytest.mark.parametrize("layer", [nn.LSTMCell(8, 3), nn.GRUCell(8, 3), nn.RNNCell(8, 3)], ids=["LSTM", "GRU", "RNN"])
def test_recurrent_cells(layer: nn.Module) -> None:
    check(cell(layer), example(TOKENS), torch.float64)


def _shallow(network: nn.Module) -> nn.Module:
    """Of blocks in a row that are alike, two are kept: layers of Swin Transformers come in pairs."""
    for row in network.modules():
        if isinstance(row, nn.Sequential):
            # The chance that a block is dropped in training is another one for each.
            kinds = [re.sub(r"(p|drop_prob)=[\d.e-]+", "", repr(block)) for block in row]
            for k in reversed(range(2, len(kinds))):
                if kinds[k] == kinds[k - 1] == kinds[k - 2]:
                    del row[k]
    return network


def _torchvision(name: str) -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    if name == "densenet121":  # whose layers are never alike
        network = models.DenseNet(block_config=(2, 2, 2, 2), num_classes=4)
    else:
        network = getattr(models, name)(num_classes=4, **({"image_size": 64} if name.startswith("vit") else {}))
    return _shallow(network), torch.randn(2, 3, 64, 64)


def _timm(name: str, size: int = 64) -> tuple[nn.Module, Tensor]:
    create = pytest.importorskip("timm").create_model
    depth = {"depth": 2} if name.startswith(("xcit", "eva02")) else {}
    return _shallow(create(name, num_classes=4, **depth)), torch.randn(2, 3, size, size)


def _transformers(name: str, head: str, **options: int) -> tuple[nn.Module, Tensor]:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(library, f"{name}Config")(vocab_size=50, **sizes | options)
    network = getattr(library, f"AutoModelFor{head}").from_config(config)
    return last(network, lambda m, x: m(x, attention_mask=torch.ones_like(x)).logits), torch.randint(1, 50, (2, 6))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        name: lambda name=name: _torchvision(name)
        for name in (
            *("resnet18", "convnext_tiny", "vit_b_16", "efficientnet_b0", "mobilenet_v3_small", "densenet121"),
            *("swin_t", "swin_v2_t", "shufflenet_v2_x0_5", "regnet_y_400mf"),
        )
    },
    **{
        name: lambda name=name: _timm(name)
        for name in (
            *("edgenext_xx_small", "fastvit_t8", "ghostnet_050", "poolformer_s12", "repvgg_a0", "resnest14d"),
            *("hrnet_w18_small", "convnextv2_atto"),
        )
    },
    **{
        name: lambda name=name: _timm(name, 224)
        for name in ("levit_128s", "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "volo_d1_224", "tiny_vit_5m_224")
    },
    "BERT": lambda: _transformers("Bert", "SequenceClassification", num_labels=3),
    "GPT-2": lambda: _transformers("GPT2", "CausalLM"),
    "Llama": lambda: _transformers("Llama", "CausalLM", num_key_value_heads=1),
    "ModernBERT": lambda: _transformers("ModernBert", "SequenceClassification", num_labels=3, pad_token_id=0),
}


@pytest.mark.slow_unless(name=("resnet18",), kernel=("efficient",))
@pytest.mark.parametrize("kernel", ["efficient", "flash"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    network, x = NETWORKS[name]()
    if kernel == "flash" and not any("ttention" in type(module).__name__ for module in network.modules()):
        pytest.skip("the network has no attention")
    check(network.eval(), x, torch.float64, kernel)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_whole_fisher_is_channels_last(wanted: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(2)]
    network = randomise_norms(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 3)))
    x = torch.randn(8, 4, 7, 6)
    want = fisher(network, [x], "exact")
    formats: list[bool] = []
    with pretended():
        there = moved(network)
        own = {name: (p, p.data_ptr()) for name, p in there.named_parameters()}
        there[3].register_forward_hook(
            lambda layer, inputs, output: formats.extend(
                t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, layer.weight, output)
            )
        )
        got = fisher(there, [x], "exact", device="cuda:0", channels_last=wanted)
    assert set(formats) == {wanted}
    assert {name: (p, p.data_ptr()) for name, p in there.named_parameters()} == own
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-9)


def test_a_network_that_refuses_channels_last() -> None:
    head = last(nn.Linear(120, 3), lambda layer, x: layer(x.view(len(x), 120)))
    network = nn.Sequential(nn.Conv2d(4, 6, 3), head)
    with pretended():
        there = moved(network)
        got = fisher(there, [example(IMAGES)], "exact", device="cuda:0")
        weight = there[0].weight
        assert weight.is_contiguous()
    for name, value in fisher(network, [example(IMAGES)], "exact", channels_last=False).items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-9)


def test_cudnn_has_no_backward_pass_in_eval_mode() -> None:
    network = CudnnRnn(nn.LSTM(8, 3, batch_first=True), train=False)
    with pretended(), FisherRecorder(there := moved(network)) as recorder:
        y = there(Pretend(example(TOKENS))).flatten(1)
        with pytest.raises(UnsupportedError, match=r"cudnn\.flags\(enabled=False\)"):
            recorder.check(y)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode_is_refused(affine: bool) -> None:
    for network in (nn.BatchNorm2d(4, track_running_stats=False), after_conv(nn.BatchNorm2d(4, affine=affine).train())):
        with pretended(), FisherRecorder(there := moved(network)) as recorder:
            if not recorder.parameters:
                continue
            y = there(Pretend(example(IMAGES))).flatten(1)
            with pytest.raises(UnsupportedError, match="have no per-example gradients"):
                recorder.check(y)


def test_an_input_that_examples_share() -> None:
    """Where the network's input is normalised over the batch, the norm is found on CUDA too."""
    network = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(168, 2))
    for there, x in ((network, example(IMAGES)), (None, Pretend(example(IMAGES)))):
        with pretended() if there is None else nullcontext():
            there = moved(network) if there is None else there
            with FisherRecorder(there) as recorder, pytest.raises(UnsupportedError, match="network's input"):
                recorder.check(there(x))


def test_hooks_see_the_callers_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd calls the hooks of CUDA nodes on a thread of its own."""
    seen: list[tuple[str, str, int]] = []
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(2, 3)

    class Handle:
        def remove(self) -> None:
            pass

    hooks: list[Callable] = []
    conv = planner.Conv(8, (6, 6), 4, (3, 3))

    def visit(node: object, cotangents: object) -> None:
        path = planner.choose(conv, torch.empty(1, 8, 6, 6))
        seen.append((ops.dispatch.backend_for(x), path, threading.get_ident()))

    class Tapped:
        """A node that only remembers its hook."""

        def register_prehook(self, hook: Callable) -> Handle:
            hooks.append(hook)
            return Handle()

    tapped = Tapped()
    taps = SimpleNamespace(last=(), ends=([], [tapped]), uses={tapped: ()})
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: _on_threads(hooks))
    with ops.use_backend("reference"), planner.force("gram"):
        graph.backpropagate(network(x), torch.ones(2, 2), taps, visit, False)
    assert [(backend, path) for backend, path, _ in seen] == [("reference", "gram")] * 2
    assert threading.get_ident() not in [thread for *_, thread in seen]
    assert ops.dispatch.backend_for(x) != "reference"


def _on_threads(hooks: list[Callable]) -> tuple:
    """Call each hook on two threads at once, as autograd does where there are two devices."""
    both = threading.Barrier(2)

    def call(hook: Callable) -> None:
        both.wait()
        hook((torch.ones(2, 2),))

    threads = [threading.Thread(target=call, args=(hook,)) for hook in hooks for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ()
