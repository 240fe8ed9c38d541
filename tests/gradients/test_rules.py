"""Layers, and ways to use a parameter, compared with per-example autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import Function
from oracle import per_example_squares, randomise_norms, reduce, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import FisherRecorder, UnsupportedError, fisher, profile
from t2v_fast.estimation.cotangents import cotangents
from t2v_fast.gradients.rules import register_rule
from t2v_fast.ops import planner


def pooled(t: Tensor) -> Tensor:
    """Reduce [N, C, ...] or [N, T, C] to logits [N, C], with another weight for each position."""
    w = torch.linspace(0.5, 1.5, t[0].numel() // t.shape[1], dtype=t.dtype)
    return (t.flatten(2) * w).sum(2).tanh() if t.dim() > 2 else t.tanh()


def layers(*modules: nn.Module) -> nn.Module:
    return Function(lambda self, x: pooled(self.body(x)), body=nn.Sequential(*modules))


def agree(network: nn.Module, x: Tensor, unsupported: str = "error", tolerance: float = 1e-11) -> None:
    """Check that fisher() equals per-example autograd at every granularity, for batches of several sizes."""
    network = randomise_norms(network).double()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        u = cotangents(network(x), "exact")
    squares = per_example_squares(network, x, u)
    for granularity in ("filter", "parameter", "tensor"):
        want = {name: reduce(s, granularity).mean(0) for name, s in squares.items()}
        for batches in ([x], [x[:1], x[1:]]):
            got = fisher(network, batches, "exact", granularity=granularity, unsupported=unsupported)
            assert list(got) == list(want)
            for name in want:
                assert got[name].shape == want[name].shape, name
                assert relative_error(got[name], want[name]) < tolerance, (name, granularity)
            assert not got.unused
    for name, p in network.named_parameters():
        assert not p.requires_grad or p.grad is None, name


IMAGES, VOLUMES, SEQUENCES, TOKENS = (4, 6, 5, 7), (3, 4, 3, 4, 5), (4, 6, 9), (4, 5, 8)
LAYERS = {
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1), SEQUENCES),
    "conv3d": (nn.Conv3d(4, 6, 2), VOLUMES),
    "conv3d_strided": (nn.Conv3d(4, 6, (3, 2, 3), (2, 1, 2), (1, 0, 2), bias=False), VOLUMES),
    "conv3d_grouped_dilated": (nn.Conv3d(4, 6, (2, 3, 1), 1, (2, 1, 0), (2, 1, 1), groups=2), VOLUMES),
    "conv3d_kernel_beyond": (nn.Conv3d(4, 3, (5, 1, 1), padding=(2, 0, 0)), VOLUMES),
    "conv_transpose1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), SEQUENCES),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), IMAGES),
    "conv_transpose2d_grouped": (nn.ConvTranspose2d(6, 4, (3, 2), dilation=(1, 2), groups=2, bias=False), IMAGES),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 3, (2, 3, 2), stride=(2, 1, 1)), VOLUMES),
    "group_norm": (nn.GroupNorm(3, 6), IMAGES),
    "group_norm_2d": (nn.GroupNorm(2, 8), (4, 8)),
    "instance_norm": (nn.InstanceNorm2d(6, affine=True), IMAGES),
    "instance_norm_tracking": (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), IMAGES),
    "instance_norm_1d": (nn.InstanceNorm1d(6, affine=True), SEQUENCES),
    "layer_norm": (nn.LayerNorm(8), TOKENS),
    "layer_norm_of_two_axes": (nn.LayerNorm((5, 8)), TOKENS),
    "rms_norm": (nn.RMSNorm(8), TOKENS),
    "prelu": (nn.PReLU(6), IMAGES),
    "prelu_of_one_number": (nn.PReLU(), IMAGES),
    "multihead_like": (nn.Linear(8, 8), (3, 2, 4, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    agree(layers(layer), torch.randn(shape))


def test_embeddings() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (4, 6))
    tokens[:, 4:] = 10

    def forward(self, x):
        positions = self.position(torch.arange(x.shape[1]))  # [T, D], the same for all examples
        return self.out((self.token(x) + positions).tanh().mean(1))

    embedding = nn.Embedding(11, 5, padding_idx=10)
    for integers in (tokens, tokens.int()):
        agree(Function(forward, token=embedding, position=nn.Embedding(6, 5), out=nn.Linear(5, 3)), integers)
    agree(Function(lambda self, x: pooled(self.w[x]), w=(11, 5)), tokens.int())
    counted = Function(lambda self, x: pooled(self.token(x)), token=nn.Embedding(11, 5, scale_grad_by_freq=True))
    with pytest.raises(UnsupportedError, match=r"'token.weight'.*scale_grad_by_freq"):
        fisher(counted, [tokens])


WAYS = {
    "matmul": (lambda self, x: x @ self.w, {"w": (8, 3)}),
    "matmul_transposed": (lambda self, x: x @ self.w.T, {"w": (3, 8)}),
    "from_the_left": (lambda self, x: self.w @ x.transpose(1, 2), {"w": (3, 8)}),
    "from_the_left_of_a_matrix": (lambda self, x: (self.w @ x[:, 0].T).T, {"w": (3, 8)}),
    "a_view": (lambda self, x: F.linear(x, self.w.view(3, 8)), {"w": (24,)}),
    "a_coarser_view": (lambda self, x: F.linear(x, self.w.view(3, 8)), {"w": (12, 2)}),
    "a_finer_view": (lambda self, x: F.linear(x, self.w.view(6, 8)), {"w": (3, 16)}),
    "einsum": (lambda self, x: torch.einsum("bld,de->ble", x, self.w), {"w": (8, 3)}),
    "einsum_first": (lambda self, x: torch.einsum("ed,bld->ble", self.w, x), {"w": (3, 8)}),
    "einsum_of_heads": (
        lambda self, x: torch.einsum("blhd,hde->blhe", x.unflatten(2, (2, 4)), self.w).flatten(2),
        {"w": (2, 4, 3)},
    ),
    "bmm_of_heads": (
        lambda self, x: torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), self.w).transpose(0, 1).reshape(len(x), 5, 6),
        {"w": (2, 4, 3)},
    ),
    "bmm_from_the_left": (
        lambda self, x: torch.bmm(self.w, x.reshape(-1, 2, 4).permute(1, 2, 0)).permute(2, 0, 1).reshape(len(x), 5, 6),
        {"w": (2, 3, 4)},
    ),
    "addmm": (lambda self, x: torch.addmm(x[:, 0, :3], x[:, 1], self.w), {"w": (8, 3)}),
    "tokens_first": (lambda self, x: (x.transpose(0, 1) @ self.w).transpose(0, 1), {"w": (8, 3)}),
    "gate": (lambda self, x: x * self.w.view(1, 1, -1), {"w": (8,)}),
    "gate_of_tokens": (lambda self, x: (x.transpose(0, 1) * self.w[:, None]).transpose(0, 1), {"w": (5, 8)}),
    "gate_of_some_axes": (lambda self, x: x * self.w, {"w": (5, 1)}),
    "subtracted": (lambda self, x: torch.sub(x, self.w, alpha=2).square(), {"w": (8,)}),
    "added": (lambda self, x: torch.add(x, self.w, alpha=-3).square(), {"w": (8,)}),
    "divisor": (lambda self, x: x / self.w, {"w": (8,)}),
    "dividend": (lambda self, x: self.w / (x + 9), {"w": (5, 8)}),
    "number": (lambda self, x: (x * self.w).sin(), {"w": ()}),
    "class_token": (lambda self, x: torch.cat([self.w.expand(len(x), -1, -1), x], 1).sin(), {"w": (1, 2, 8)}),
    "repeated": (lambda self, x: torch.cat([self.w.repeat(len(x), 2, 1), x], 1).sin(), {"w": (1, 2, 8)}),
    "repeated_along_the_second_axis": (
        lambda self, x: x.sin() * self.w.repeat(5, len(x), 1).transpose(0, 1),
        {"w": (1, 1, 8)},
    ),
    "slice": (lambda self, x: F.linear(x, self.w[1:3]), {"w": (4, 8)}),
    "thirds": (lambda self, x: sum(F.linear(x, w).sin() for w in self.w.chunk(3)), {"w": (9, 8)}),
    "looked_up": (
        lambda self, x: (x[:, :, :5] + self.w[torch.arange(5)[:, None] - torch.arange(5) + 4]).sin(),
        {"w": (9,)},
    ),
    "bags": (lambda self, x: F.embedding_bag(x.argmax(2), self.w), {"w": (8, 3)}),
    "bags_of_two": (
        lambda self, x: F.embedding_bag(x.topk(2, 2).indices.flatten(0, 1), self.w).unflatten(0, (len(x), 5)),
        {"w": (8, 3)},
    ),
    "bags_first_in_the_sequence": (
        lambda self, x: (
            F.embedding_bag(x.topk(2, 2).indices.transpose(0, 1).flatten(0, 1), self.w, mode="sum")
            .unflatten(0, (5, len(x)))
            .transpose(0, 1)
        ),
        {"w": (8, 3)},
    ),
    "padded_bags": (lambda self, x: F.embedding_bag(x.argmax(2), self.w, padding_idx=1), {"w": (8, 3)}),
    "padded_bags_summed": (
        lambda self, x: F.embedding_bag(x.argmax(2), self.w, mode="sum", padding_idx=-2),
        {"w": (8, 3)},
    ),
    "weighted_bags": (
        lambda self, x: F.embedding_bag(x.argmax(2), self.w, mode="sum", per_sample_weights=x[:, :, 0].sin()),
        {"w": (8, 3)},
    ),
    "bags_with_learned_weights": (
        lambda self, x: F.embedding_bag(
            x.argmax(2).int(), self.w, mode="sum", per_sample_weights=(x[:, :, 0] * self.v).sin()
        ),
        {"w": (8, 3), "v": (5,)},
    ),
    "ragged_bags": (
        lambda self, x: F.embedding_bag(
            x.argmax(2)[x[:, :, 0] > 0.8],  # some bags are empty
            self.w,
            torch.cat([torch.zeros(1, dtype=torch.long), (x[:, :, 0] > 0.8).sum(1).cumsum(0)]),
            include_last_offset=True,
        ),
        {"w": (8, 3)},
    ),
    "joined": (lambda self, x: F.linear(x, torch.cat([self.w, self.v.T])), {"w": (3, 8), "v": (8, 2)}),
    "twice": (lambda self, x: F.linear(F.linear(x, self.w).tanh(), self.w), {"w": (8, 8)}),
    "and_its_transpose": (lambda self, x: F.linear(F.linear(x, self.w).tanh(), self.w.T), {"w": (3, 8)}),
    "by_weight_and_by_token": (lambda self, x: F.linear(x, self.w) + self.w[:, 0], {"w": (3, 8)}),
    "added_twice": (lambda self, x: ((x + self.w).tanh() + self.w).sin(), {"w": (8,)}),
    "scaled_twice": (lambda self, x: ((x * self.w).tanh() * self.w).sin(), {"w": (8,)}),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_use_a_parameter(name: str) -> None:
    torch.manual_seed(0)
    function, shapes = WAYS[name]
    agree(Function(lambda self, x: pooled(function(self, x)), **shapes), torch.randn(4, 5, 8))


class Attention(nn.Module):
    def __init__(self, batch_first: bool, same: bool, **options: object) -> None:
        super().__init__()
        self.same, self.batch_first = same, batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.key = nn.Linear(8, self.attention.kdim)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        other = x if self.same else self.key(x)
        y = self.attention(x, other, other, need_weights=False)[0]
        y = pooled(y if self.batch_first else y.transpose(0, 1))
        return y * self.key(x).mean(1 if self.batch_first else 0)[:, :1]


@pytest.mark.slow_unless(batch_first=(True,), tokens=(5,))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 6, "vdim": 6}], ids=str)
@pytest.mark.parametrize("tokens", [5, 4])
def test_multihead_attention(batch_first: bool, options: dict, tokens: int) -> None:
    torch.manual_seed(0)
    for same in (True, False):
        if same and "kdim" in options:
            continue
        agree(Attention(batch_first, same, **options), torch.randn(4, tokens, 8))


@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTM"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(8, 4, num_layers=2, batch_first=batch_first, bidirectional=True)

    def forward(self, x):
        y = self.layer(x if batch_first else x.transpose(0, 1))[0]
        return pooled(y if batch_first else y.transpose(0, 1))

    agree(Function(forward, layer=layer), torch.randn(4, 5, 8), "exact")


def test_repeated_cells_and_shared_convolutions() -> None:
    torch.manual_seed(0)

    def unrolled(self, x):
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h

    agree(Function(unrolled, cell=nn.GRUCell(8, 4)), torch.randn(4, 5, 8))
    agree(Function(unrolled, cell=nn.RNNCell(8, 4)), torch.randn(4, 5, 8))

    def pyramid(self, x):  # one convolution at two image sizes, as in detectors
        return (self.conv(x).tanh() * 2).mean((2, 3)) + self.conv(F.avg_pool2d(x, 2)).tanh().mean((2, 3))

    agree(Function(pyramid, conv=nn.Conv2d(3, 4, 3, padding=1)), torch.randn(4, 3, 8, 6))

    def residual(self, x):
        for _ in range(2):
            x = F.relu_(self.norm(self.conv(x))) + x
        return pooled(x)

    agree(Function(residual, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3)), torch.randn(4, 3, 8, 6))


def test_tied_embedding_and_head() -> None:
    """A table is looked up, and its transpose gives the logits, as in language models."""
    torch.manual_seed(0)

    def forward(self, x):
        h = self.token(x) + self.position.weight[: x.shape[1]]
        return F.linear(self.mix(h).tanh().mean(1), self.token.weight)

    network = Function(forward, token=nn.Embedding(11, 5), position=nn.Embedding(7, 5), mix=nn.Linear(5, 5))
    agree(network, torch.randint(0, 11, (4, 6)))


def test_images_folded_into_the_batch_axis() -> None:
    torch.manual_seed(0)

    class Frames(nn.Module):
        def __init__(self, *body: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(*body)

        def forward(self, x: Tensor) -> Tensor:  # [N, T, 3, H, W]
            return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh().mean((1, 3, 4))

    video = torch.randn(3, 2, 3, 7, 6)
    agree(Frames(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), video)
    agree(Frames(nn.Conv2d(3, 4, (3, 2), (3, 2), (1, 2)), nn.GroupNorm(2, 4)), video)
    agree(Frames(nn.ConvTranspose2d(3, 4, 3, stride=2)), video)


def standardised(self: nn.Module, x: Tensor) -> Tensor:
    w = self.conv.weight
    w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, eps=1e-6).reshape_as(w) * self.gain
    return pooled(F.conv2d(x, w, self.conv.bias))


TRANSFORMED = {
    "standardised": lambda: Function(standardised, conv=nn.Conv2d(3, 4, 3), gain=(4, 1, 1, 1)),
    "weight_norm": lambda: layers(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral_norm": lambda: layers(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "orthogonal": lambda: layers(nn.Flatten(), nn.utils.parametrizations.orthogonal(nn.Linear(60, 4))),
    "low_rank": lambda: Function(
        lambda self, x: F.linear(x.flatten(1), self.w + 2 * self.b @ self.a), w=(4, 60), b=(4, 2), a=(2, 60)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_parameters(name: str) -> None:
    torch.manual_seed(0)
    network, x = TRANSFORMED[name](), torch.randn(3, 3, 4, 5)
    network.eval()
    with pytest.raises(UnsupportedError, match=r"transformed before use.*unsupported='exact'"):
        fisher(network, [x])
    agree(network, x, "exact")
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), network).double()
    everything, left = (fisher(plain, [x.double()], "exact", unsupported=how) for how in ("exact", "skip"))
    assert left.skipped
    assert left.skipped == everything.keys() - left.keys()
    assert all(torch.equal(left[name], everything[name]) for name in left)


# The node itself computes the gradients of one example at a time, or the tensor computed from a parameter is no weight.
WITHOUT_RULE = {
    "exponential": lambda: Function(lambda self, x: pooled(x * self.w.exp()), w=(3, 1, 1)),
    "both_ways": lambda: Function(lambda self, x: pooled(x * self.w.exp() + self.w), w=(3, 1, 1)),
    "table_behind_a_network": lambda: Function(
        lambda self, x: pooled((x + self.mlp(torch.linspace(-1, 1, 20, dtype=x.dtype).view(4, 5, 1))[..., 0]).sin()),
        mlp=nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1, bias=False), nn.Sigmoid()),
    ),
    "where": lambda: Function(lambda self, x: pooled(torch.where(x > 0, x, self.w)), w=(3, 1, 1)),
    "bilinear": lambda: layers(
        nn.Flatten(2), nn.Linear(20, 6), Function(lambda s, x: s.b(x, x), b=nn.Bilinear(6, 6, 2))
    ),
    "power": lambda: Function(lambda self, x: pooled((x.square() + 1).pow(self.w)), w=(3, 1, 1)),
    "maximum": lambda: Function(lambda self, x: pooled(torch.maximum(x, self.w)), w=(3, 1, 1)),
    "stacked": lambda: Function(
        lambda self, x: pooled(torch.stack([x[:, 0], self.w.expand(len(x), 4, 5)], 1).sin()), w=(4, 1)
    ),
    "input_of_a_convolution": lambda: Function(
        lambda self, x: F.conv2d(self.w, x.flatten(1)[:, :12].view(-1, 3, 2, 2)).sin().flatten(2)[0], w=(1, 3, 4, 5)
    ),
    "upsampled": lambda: Function(
        lambda self, x: pooled(x + F.interpolate(self.w, x.shape[2:], mode="bilinear")), w=(1, 3, 2, 2)
    ),
    "largest_of_a_bag": lambda: Function(
        lambda self, x: self.bag(x.flatten(1).argsort(1)[:, :4]).sin(), bag=nn.EmbeddingBag(60, 3, mode="max")
    ),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_layers_without_a_rule(name: str) -> None:
    torch.manual_seed(0)
    agree(WITHOUT_RULE[name](), torch.randn(3, 3, 4, 5))


def test_a_rule_handles_embedding_bags() -> None:
    for mode, path in (("sum", "pass"), ("mean", "pass"), ("max", "gradients")):
        report = profile(nn.EmbeddingBag(9, 5, mode=mode), torch.randint(0, 9, (4, 6)), rounds=1)
        assert report.layers[0].path == path


def test_to_skip_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="left no parameter"):
        fisher(TRANSFORMED["low_rank"](), [torch.randn(3, 3, 4, 5)], unsupported="skip")
    with pytest.raises(ValueError, match="unsupported is 'maybe'"):
        fisher(TRANSFORMED["low_rank"](), [torch.randn(3, 3, 4, 5)], unsupported="maybe")


def test_filter_axis() -> None:
    """Hugging Face's Conv1D has a weight [in, out], whose output features lie along axis 1."""
    torch.manual_seed(0)
    network = Function(
        lambda self, x: pooled(self.conv(torch.addmm(self.bias, x.flatten(0, 1), self.w).view(*x.shape[:2], 6))),
        w=(8, 6), bias=(6,), conv=nn.Conv1d(5, 4, 3),
    ).double()  # fmt: skip
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        u = cotangents(network(x), "exact")
    squares = {name: s.mean(0) for name, s in per_example_squares(network, x, u).items()}
    axes = {"w": 1, "conv.weight": 2}
    for choice in (axes, lambda name, p: axes.get(name, 0)):
        got = fisher(network, [x], "exact", filter_axis=choice)
        for name, s in squares.items():
            axis = axes.get(name, 0)
            want = s.movedim(axis, 0).flatten(1).mean(1) if s.dim() > 1 else s
            assert got[name].shape == want.shape
            assert relative_error(got[name], want) < 1e-11
    assert len(fisher(network, [x])["w"]) == 8  # the first axis, unless told otherwise
    with pytest.raises(ValueError, match="filter_axis is 2 for 'w'"):
        fisher(network, [x], filter_axis={"w": 2})
    with pytest.raises(ValueError, match="'v', which is none of"):
        fisher(network, [x], filter_axis={"v": 1})


def test_cotangents_of_a_product_from_the_right_share_no_gram_matrix() -> None:
    """Where the layer's input is ``g``, a kept Gram matrix would be that of the first cotangent."""
    torch.manual_seed(0)
    with planner.force("gram"):
        agree(Function(lambda self, x: pooled(x @ self.w), w=(64, 48)), torch.randn(2, 4, 64))


def frozen(network: nn.Module) -> nn.Module:
    for p in network.parameters():
        p.requires_grad_(False)
    return network


def small() -> nn.Module:
    return layers(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_frozen_networks_and_contexts_without_gradients(context: Callable) -> None:
    torch.manual_seed(0)
    network = frozen(small())
    with context():
        got = fisher(network.eval(), [torch.randn(3, 3, 6, 6)])
    assert all(v.any() for v in got.values())
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Casts lie between the parameters and their layers; the expected result is autograd through the same casts."""
    torch.manual_seed(0)
    network = layers(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 8), nn.LayerNorm(8)
    )

    def forward(network: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return network(x).float()

    x = torch.randn(3, 3, 6, 6)
    got = fisher(network, [x], "exact", forward=forward)  # the self-check compares with autograd, example by example
    exact = fisher(network.double(), [x.double()], "exact")
    assert relative_error(got.vector(), exact.vector()) < 0.1
    assert all(p.dtype == torch.float64 for p in network.parameters())


def test_layers_that_the_graph_hides_are_refused_by_name() -> None:
    torch.manual_seed(0)

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            return layer(x).detach() + x

        @staticmethod
        def backward(ctx, g):
            return g, None

    network = Function(lambda self, x: self.out(Hidden.apply(self.stem(x), self.inner)),
                       stem=nn.Linear(4, 4), inner=nn.Linear(4, 4), out=nn.Linear(4, 3))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'inner.bias' is nowhere.*HiddenBackward"):
        fisher(network, [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("network", "x", "message"),
    [
        (Function(lambda self, x: pooled(x + self.w), w=(3, 2, 4)), (3, 2, 4), "'w'.*cannot be shared out"),
        (layers(nn.BatchNorm2d(3)).train(), (4, 3, 2, 2), "batch norm in training mode"),
        (
            Function(lambda self, x: F.linear((x @ x.T).softmax(1) @ self.v(x), self.w), v=nn.Linear(4, 4), w=(3, 4)),
            (5, 4),
            "examples interact|transformed before use",
        ),
    ],
    ids=["batch_sized", "training", "attention_across_the_batch"],
)  # fmt: skip
def test_what_has_no_exact_answer_is_refused_by_name(network: nn.Module, x: tuple[int, ...], message: str) -> None:
    for unsupported in ("error", "exact"):
        with pytest.raises((UnsupportedError, RuntimeError), match=message):
            fisher(network, [torch.randn(x)], "exact", unsupported=unsupported)


def test_a_rule_of_your_own() -> None:
    with pytest.raises(ValueError, match="already has a rule"):
        register_rule("MmBackward0")(lambda use, g, layout, n: None)


def test_the_recorder_names_what_it_skips() -> None:
    network = TRANSFORMED["low_rank"]().double()
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    with FisherRecorder(nn.Sequential(nn.Conv2d(3, 3, 1).double(), network), unsupported="skip") as recorder:
        out = recorder.model(x)
        assert list(recorder.backward(out, torch.ones_like(out))) == ["0.weight", "0.bias"]
        assert recorder.skipped == {"1.w", "1.a", "1.b"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_of_one_before_a_batch_norm_that_feeds_tokens(training: bool, channels_last: bool) -> None:
    """torch's own gradient is wrong here: the cotangent's memory format differs from that of the norm's input."""
    torch.manual_seed(0)

    def forward(self, x):
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = self.norm(self.conv(x))
        y = y.flatten(2) if channels_last else y.flatten(2).transpose(1, 2)
        return self.out(y.contiguous()).tanh().mean(1)

    out = nn.Linear(20 if channels_last else 6, 4)
    network = Function(forward, conv=nn.Conv2d(3, 6, 1), norm=nn.BatchNorm2d(6), out=out)
    if not training:
        agree(network, torch.randn(3, 3, 4, 5))
        return
    network, x = network.train().double(), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    got = fisher(network, [x], "batch_mean")
    # Compare with a batch norm that is written out.
    norm = network.norm
    network.norm = Function(
        lambda self, x: (
            (x - x.mean((0, 2, 3), keepdim=True))
            / (x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
            * self.weight.view(1, -1, 1, 1)
            + self.bias.view(1, -1, 1, 1)
        ),
        weight=(6,),
        bias=(6,),
    ).double()
    network.norm.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    want = fisher(network, [x], "batch_mean")
    for name, values in want.items():
        assert relative_error(got[name], values) < 1e-9 or float(values.norm()) < 1e-20, name
