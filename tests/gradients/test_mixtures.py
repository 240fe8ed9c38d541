"""Mixtures of experts against per-example autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixtures import CLASSES, EXPERTS, HIDDEN, WAYS, WIDTH, Mixture, gated, tokens, twin
from oracle import per_example_squares, relative_error
from oracle import reduce as reduced
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import FisherRecorder, UnsupportedError, fisher
from t2v_fast.gradients import fast_layers

# Ways in which every product reads whole matrices of a stack.
FAST = [name for name in WAYS if name not in ("sliced", "batched_merged", "modules")]


def directions(n: int, k: int = 2) -> Tensor:
    return torch.randn(k, n, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def truth(network: nn.Module, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """{name: [N, *shape]} in float64."""
    knows_double = not getattr(network, "name", "").startswith("grouped")
    return per_example_squares(network.double() if knows_double else twin(network), x.double(), u)


def made(name: str, **options: object) -> Mixture:
    network = Mixture(name, **options)
    return network.float() if name.startswith("grouped") else network


def squares(network: nn.Module, x: Tensor, u: Tensor, granularity: str, **options: object) -> dict[str, Tensor]:
    dtype = next(network.parameters()).dtype
    with FisherRecorder(network, granularity=granularity, **options) as recorder:
        return recorder.backward(network(x.to(dtype)), u.to(dtype))


def agree(network: nn.Module, x: Tensor) -> None:
    """Check every granularity, for batches of different composition."""
    u = directions(len(x))
    want = truth(network, x, u)
    tolerance = 1e-11 if next(network.parameters()).dtype == torch.float64 else 1e-4
    batches = [[*range(len(x))], [0], [1, 0], [*range(1, len(x))], [2, 0, 1]]
    for granularity in ("filter", "parameter", "tensor"):
        for rows in batches:
            got = squares(network, x[rows], u[:, rows], granularity)
            for name, each in want.items():
                w = reduced(each[rows], granularity)
                w = w.sum(0) if granularity == "parameter" else w
                assert got[name].shape == w.shape, name
                assert relative_error(got[name], w) < tolerance, (name, granularity, rows)


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"skew": 3.0}, {"shared": True}], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_compute_experts(name: str, options: dict) -> None:
    agree(made(name, **options), tokens(4, 5))


@pytest.mark.parametrize("name", ["loop", "transposed", "batched", "grouped", "modules"])
def test_one_token_each(name: str) -> None:
    """Every gradient has rank one, unless both choices of a token were one expert."""
    agree(made(name), tokens(7, 1, padded=False))


@pytest.mark.parametrize("name", ["loop", "batched", "grouped"])
def test_biases_of_experts(name: str) -> None:
    agree(made(name, bias=True), tokens(4, 5))


@pytest.mark.parametrize("name", FAST)
def test_no_gradient_of_an_expert_is_formed(name: str) -> None:
    """All examples and experts of a stack go through one op, at the node of the product."""
    network = made(name)
    seen: dict[str, list[str]] = {}
    x = tokens(3, 4).to(next(network.parameters()).dtype)
    with FisherRecorder(network) as recorder:
        recorder.observer = lambda use, factors, *_: seen.setdefault(use.parameter, []).append(
            f"{type(factors).__name__} at {use.node.name()}"
        )
        recorder.backward(network(x), torch.ones(3, CLASSES, dtype=x.dtype))
    product = {"batched": "BmmBackward0", "grouped": "GroupedMmBackward0"}.get(name.split("_")[0], "MmBackward0")
    if name == "batched_by_choice":
        product = "BmmBackward0"
    assert seen["up"] == seen["down"] == [f"Grouped at {product}"]


@pytest.mark.parametrize("name", ["loop", "batched", "grouped"])
def test_an_expert_without_tokens_of_an_example_gets_exact_zeros(name: str) -> None:
    """The router sends each example to experts of its own."""
    network = made(name, top=1)
    with torch.no_grad():
        network.before.copy_(torch.eye(WIDTH))
        network.router.copy_(torch.eye(EXPERTS, WIDTH) * 9)
    x = tokens(4, 5, padded=False)
    x[:, :, :EXPERTS] = torch.eye(EXPERTS)[[0, 1, 3, 3], None] * 2.0  # nobody has expert 2
    got = squares(network, x, directions(4), "filter")
    for key in ("up", "down"):
        assert torch.equal(got[key] != 0, torch.eye(EXPERTS, dtype=torch.bool)[[0, 1, 3, 3]])
    agree(network, x)


@pytest.mark.parametrize("name", ["loop", "transposed", "flat", "batched", "grouped", "modules"])
def test_filters_along_other_axes(name: str) -> None:
    network, x, u = made(name), tokens(4, 5), directions(4)
    want = truth(network, x, u)
    for axis in range(1, 3):
        axes = {key: axis for key, p in network.named_parameters() if p.dim() > axis}
        got = squares(network, x, u, "filter", filter_axis=axes)
        for key, each in want.items():
            w = each.movedim(axes.get(key, 0) + 1, 1).flatten(2).mean(2)
            assert got[key].shape == w.shape
            assert relative_error(got[key], w) < (1e-4 if name == "grouped" else 1e-11), (key, axis)


class Several(nn.Module):
    """One stack that is used in several ways, whose gradients must be summed before they are squared."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.uses = uses.split()
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = x.flatten(0, 1)
        for number, use in enumerate(self.uses):
            index = (y.detach()[:, number % WIDTH] * 7).long() % EXPERTS
            y = y.tanh()
            if use == "loop":
                out = torch.zeros_like(y)
                for e in range(EXPERTS):
                    rows = (index == e).nonzero()[:, 0]
                    out = out.index_add(0, rows, y[rows] @ self.stack[e])
                y = out
            elif use == "turned":
                out = torch.zeros_like(y)
                for e in range(EXPERTS):
                    rows = (index == e).nonzero()[:, 0]
                    out = out.index_add(0, rows, F.linear(y[rows], self.stack[e]))
                y = out
            elif use == "batched":
                y = torch.bmm(self.stack[index], y[:, :, None])[:, :, 0]
            elif use == "looked_up_twice":  # one look-up serves two products
                looked_up = self.stack[index]
                y = torch.bmm(looked_up, y[:, :, None])[:, :, 0] + (y[:, None] @ looked_up)[:, 0]
            elif use == "all":
                y = torch.einsum("si,eoi->seo", y, self.stack).sum(1)
            elif use == "entry":
                y = y * self.stack[1, 2]
            elif use == "every_row":
                y = y @ self.stack[3].T
            elif use == "left":
                y = (self.stack[2] @ y.T).T
        return (y.view(n, t, -1) * x[:, :, -1:]).sum(1) @ self.head.T


@pytest.mark.parametrize(
    "uses",
    [
        *("loop loop", "loop turned", "batched batched", "loop batched", "looked_up_twice", "batched looked_up_twice"),
        *("loop all", "batched all", "loop entry", "batched entry", "loop every_row", "every_row", "left loop"),
        *("left", "turned batched every_row all entry"),
    ],
)
def test_a_stack_with_several_uses(uses: str) -> None:
    agree(Several(uses), tokens(4, 5))


def test_rows_in_any_order_are_not_padded() -> None:
    """A layer of which one example has nearly all rows: padding would cost as many rows for all others."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, HIDDEN, dtype=torch.float64)
            self.b = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            kept = (x[:, :, -1] > 0).flatten().nonzero()[:, 0]
            y = self.a(x.flatten(0, 1)[kept]).tanh()
            return (
                torch.zeros(x.shape[0] * x.shape[1], HIDDEN, dtype=x.dtype)
                .index_add(0, kept, y)
                .unflatten(0, x.shape[:2])
                .sum(1)
                @ self.b.weight.T
            )

    network, x = Ragged(), tokens(4, 6)
    agree(network, x)
    rows = {}
    with FisherRecorder(network) as recorder:
        recorder.observer = lambda use, factors, *_: rows.update({use.parameter: len(factors.g)})
        recorder.backward(network(x), directions(4)[0])
    assert rows["a.weight"] == int(x[:, :, -1].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["loop", "batched", "grouped"])
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    """Errors are those of plain torch in the same type, within a factor of two and a floor."""
    network, x, u = Mixture(name).to(dtype), tokens(4, 16, padded=False).to(dtype), directions(4, 1).to(dtype)
    want = truth(Mixture("loop") if name != "grouped" else Mixture(name), x, u)
    exact = Mixture("loop")
    exact.load_state_dict({key: p.double() for key, p in network.state_dict().items()})
    want = per_example_squares(exact, x.double(), u.double())
    plain = per_example_squares(network, x, u)
    got = squares(network, x, u, "filter")
    for key in ("up", "down"):
        wanted = reduced(want[key], "filter")
        error, own = (relative_error(q, wanted) for q in (got[key], reduced(plain[key].double(), "filter")))
        assert error < 2 * own + 8 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("name", ["loop", "batched", "grouped"])
@pytest.mark.parametrize("granularity", ["filter", "parameter", "tensor"])
def test_fisher_over_batches(name: str, granularity: str) -> None:
    """The whole estimator, with its self-check, over batches of different sizes and lengths."""
    network = made(name)
    batches = [tokens(3, 5), tokens(2, 7, seed=1), tokens(1, 4, seed=2)]
    dtype = next(network.parameters()).dtype
    got = fisher(network, [b.to(dtype) for b in batches], "exact", granularity=granularity)
    other = network if name != "grouped" else twin(network)
    sums: dict[str, Tensor] = {}
    for x in batches:
        with torch.no_grad():
            p = other(x).softmax(1)
        u = torch.stack([p[:, [c]].sqrt() * (torch.eye(CLASSES)[c].double() - p) for c in range(CLASSES)])
        for key, each in per_example_squares(other, x, u).items():
            sums[key] = sums.get(key, 0) + reduced(each, granularity).sum(0)
    for key, total in sums.items():
        assert relative_error(got[key], total / 6) < (1e-4 if name == "grouped" else 1e-10), key


def test_products_that_read_no_whole_matrix_are_exact() -> None:
    """A part of each matrix, and matrices in another order than the stack's."""

    def part(m: nn.Module, x: Tensor) -> Tensor:
        return x @ m.stack[1][:3].T

    def strided(m: nn.Module, x: Tensor) -> Tensor:
        return x @ m.stack[:, 2].T  # row 2 of every matrix

    def of_slice(m: nn.Module, x: Tensor) -> Tensor:
        return torch.bmm(m.stack[1:3][torch.tensor([0, 1]).repeat(len(x) // 2)], x[:, :, None])[:, :, 0]

    def permuted(m: nn.Module, x: Tensor) -> Tensor:
        return x @ m.stack.permute(1, 0, 2)[2].T

    def check(product: Callable[[nn.Module, Tensor], Tensor]) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                generator = torch.Generator().manual_seed(2)
                self.stack = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH, generator=generator, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return product(self, x.flatten(0, 1)).view(*x.shape[:2], -1).sum(1)[:, :CLASSES]

        agree(Network(), tokens(4, 6))

    for product in (part, strided, of_slice, permuted):
        check(product)


def test_rows_that_no_expert_takes() -> None:
    """Rows behind the last expert's, whose product is undefined, are left out."""

    class Network(nn.Module):
        def __init__(self, loop: bool) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(2)
            self.loop = loop
            self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator))
            self.head = nn.Parameter(torch.randn(CLASSES, WIDTH, generator=generator))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            expert = ((rows[:, 0] * 5).long() % (EXPERTS + 1)).sort(stable=True)  # EXPERTS: no expert
            ends = torch.bincount(expert.values, minlength=EXPERTS + 1)[:EXPERTS].cumsum(0).int()
            tokens = rows[expert.indices]
            if self.loop:
                starts = [0, *ends.tolist()[:-1]]
                parts = [tokens[a:b] @ w for a, b, w in zip(starts, ends.tolist(), self.stack, strict=True)]
                y = torch.cat([*parts, torch.zeros_like(tokens[ends[-1] :])])
            else:
                taken = (torch.arange(len(tokens)) < ends[-1])[:, None]
                y = F.grouped_mm(tokens, self.stack, offs=ends).masked_fill(~taken, 0)
            y = torch.zeros_like(rows).index_add(0, expert.indices, y.tanh())
            return y.view_as(x).sum(1) @ self.head.T

    x, u = tokens(4, 6), directions(4)
    want = per_example_squares(Network(True).double(), x, u)
    for granularity in ("filter", "parameter"):
        got = squares(Network(False), x, u, granularity)
        for name, each in want.items():
            w = reduced(each, granularity)
            assert relative_error(got[name], w.sum(0) if granularity == "parameter" else w) < 1e-4, name


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the faster layer is oneDNN's")
@pytest.mark.parametrize("shape", ["rows", "tokens"])
@pytest.mark.parametrize("name", ["loop", "transposed", "flat", "modules"])
def test_experts_among_the_faster_layers_of_fisher(monkeypatch: pytest.MonkeyPatch, name: str, shape: str) -> None:
    """fisher() on a CPU has a linear layer of its own."""
    monkeypatch.setattr(fast_layers, "MIN_MULTIPLICATIONS", 1)
    if shape == "tokens":  # every expert sees all tokens [N, T, W]
        dense = Experts3d(name).float()
        other: nn.Module = Experts3d(name)
    else:
        dense, other = Mixture(name).float(), Mixture(name)
    x, u = tokens(4, 5), directions(4)
    want = truth(other, x, u)
    kinds: dict[str, str] = {}
    for rows in ([0, 1, 2, 3], [2, 0], [1]):
        with FisherRecorder(dense) as recorder, fast_layers.FastLayers():
            recorder.observer = lambda use, factors, *_: kinds.update(
                {use.parameter: f"{type(factors).__name__} at {use.node.name()}"}
            )
            got = recorder.backward(dense(x[rows].float()), u[:, rows].float())
        for key, each in want.items():
            assert relative_error(got[key], reduced(each[rows], "filter")) < 1e-4, (key, rows)
        if name != "modules" and len(rows) > 1:
            assert kinds["up"] == kinds["down"] == "Grouped at OneDnnLinearBackward"


class Experts3d(nn.Module):
    """All experts see all tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        mixture = Mixture(name)
        self.mixture, self.name = mixture, "all"
        self.up, self.down = getattr(mixture, "up", None), getattr(mixture, "down", None)
        del mixture.before, mixture.router

    def forward(self, x: Tensor) -> Tensor:
        m, y = self.mixture, 0
        for e in range(EXPERTS):
            if m.name == "modules":
                up, down = m.ups[e].weight, m.downs[e].weight
            elif m.name == "transposed":
                up, down = m.up[e].T, m.down[e].T
            else:
                up, down = (w.view(EXPERTS, -1, w.shape[-1])[e] for w in (m.up, m.down))
            y = y + F.linear(gated(F.linear(x, up)), down)
        return (y * x[:, :, -1:]).tanh().sum(1) @ m.head.T


def test_weights_of_examples() -> None:
    network, x, u = Mixture("batched"), tokens(4, 5), directions(4)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    with FisherRecorder(network, granularity="parameter") as recorder:
        got = recorder.backward(network(x), u, weights=weights)
    for name, each in truth(network, x, u).items():
        assert relative_error(got[name], torch.tensordot(weights, each, 1)) < 1e-11, name


def test_noise_of_routers_is_refused_in_training_mode() -> None:
    network = Mixture("loop")
    network.jitter_noise = 0.1
    with pytest.raises(UnsupportedError, match=r"jitter_noise=0\.1.* call eval\(\)"):
        squares(network.train(), tokens(2, 3), directions(2), "filter")
    squares(network.eval(), tokens(2, 3), directions(2), "filter")


def test_a_stack_that_shows_some_parts_to_all_examples_and_others_to_one() -> None:
    """Not told apart by default, and exact if asked for."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, WIDTH, CLASSES, generator=torch.Generator().manual_seed(2)))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.stack.unbind()
            logits = x.sum(1) @ first
            return torch.cat([logits[:1] + (x[:1, 0, :, None] * second).sum(1), logits[1:]])

    network, x, u = Network().double(), tokens(3, 4), directions(3)
    with pytest.raises(
        UnsupportedError, match="'stack' is out of reach: UnbindBackward0 shows some of its parts to all"
    ):
        squares(network, x, u, "filter")
    got = squares(network, x, u, "filter", unsupported="exact")["stack"]
    for n in range(3):
        each = sum(torch.autograd.grad(network(x)[n], network.stack, d[n])[0].square() for d in u).flatten(1).mean(1)
        assert relative_error(got[n], each) < 1e-11


class Adapted(nn.Module):
    """A frozen stack of experts, to which factors of low rank are added, and a loop over experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

        self.register_buffer("stack", normal(EXPERTS, WIDTH, WIDTH))
        self.a, self.b = nn.Parameter(normal(EXPERTS, 2, WIDTH)), nn.Parameter(normal(WIDTH, 2, EXPERTS))
        self.head = nn.Parameter(normal(CLASSES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)
        stack = torch.baddbmm(self.stack, self.b.permute(2, 0, 1), self.a, alpha=0.5)
        expert, out = (y[:, 0] * 3).long() % EXPERTS, torch.zeros_like(y)
        for e in expert.unique().tolist():
            rows = (expert == e).nonzero()[:, 0]
            out = out.index_add(0, rows, F.linear(y[rows], stack[e]).tanh())
        return out.view(x.shape).sum(1) @ self.head.T


@pytest.mark.parametrize("length", [1, 2, 6])
def test_an_expert_with_low_rank_factors_that_one_example_alone_uses(length: int) -> None:
    """Other experts have rows of several examples. The stack is computed from parameters, and is no activation."""
    network = Adapted()
    for seed in range(4):
        x = tokens(4, length, seed, padded=False)
        u = directions(4)
        want = per_example_squares(network, x, u)
        for rows in ([0, 1, 2, 3], [2, 0], [3, 1, 2], [1]):
            for granularity in ("filter", "parameter", "tensor"):
                got = squares(network, x[rows], u[:, rows], granularity, unsupported="exact")
                for name, each in want.items():
                    w = reduced(each[rows], granularity)
                    w = w.sum(0) if granularity == "parameter" else w
                    assert relative_error(got[name], w) < 1e-11, (name, granularity, rows, seed)


def test_a_tensor_of_the_input_that_all_examples_and_one_alone_use_is_refused() -> None:
    """What is computed from the input stays an activation: here every example reads the first one."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            first = x[0] @ self.weight
            return torch.cat([first.sum()[None], first.sum() * x[1:].sum((1, 2))])[:, None].expand(-1, CLASSES)

    with pytest.raises(UnsupportedError, match="no per-example gradient"):
        squares(Reads(), tokens(4, 2), directions(4), "filter")
