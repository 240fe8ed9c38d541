"""Networks whose layers are divided over processes have the Fisher of the undivided network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import Language, joined, run, seeded, sentences
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import t2v_fast

ATTENTION = {f"attention.{name}": ColwiseParallel() for name in "qkv"}


def by_columns_and_rows(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {**ATTENTION, "attention.o": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in network.blocks:
        parallelize_module(block, mesh, plan)
    return network


def by_sequence(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in network.blocks:
        plan = {
            **ATTENTION,
            "norm1": SequenceParallel(),
            "norm2": SequenceParallel(),
            "attention": PrepareModuleInput(
                input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None), use_local_output=False
            ),
            "attention.o": RowwiseParallel(output_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
    plan = {
        "blocks.0": PrepareModuleInput(
            input_layouts=(Replicate(), None), desired_input_layouts=(Shard(1), None), use_local_output=True
        ),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(network, mesh, plan)


def with_vocabulary(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    by_columns_and_rows(network, mesh)
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(network, mesh, plan)


def replicated(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A norm whose parameters are copies, among activations that are divided by position."""
    return parallelize_module(network, mesh, {"norm": SequenceParallel(use_local_output=False)})


CASES: dict[str, tuple[Callable[[nn.Module, DeviceMesh], nn.Module], dict[str, Any]]] = {
    "columns and rows": (by_columns_and_rows, {}),
    "by parameter": (by_columns_and_rows, {"granularity": "parameter"}),
    "by axis 1": (by_columns_and_rows, {"filter_axis": {"blocks.0.down.weight": 1, "blocks.0.up.weight": 1}}),
    "sequence": (by_sequence, {}),
    "sequence by parameter": (by_sequence, {"granularity": "parameter"}),
    "sequence by tensor": (by_sequence, {"granularity": "tensor"}),
    "vocabulary": (with_vocabulary, {}),
}


def network() -> nn.Module:
    return seeded(lambda: Language(blocks=1, tied=False))


def batches() -> list[Any]:
    every = sentences()  # the same for all processes that divide the layers
    return [joined(every[:3], even=True), joined(every[3:], even=True)]


def plain(options: dict[str, Any], estimator: str) -> t2v_fast.FisherDiagonal:
    return t2v_fast.fisher(network(), batches(), estimator, **options)


def _divided(rank: int, size: int, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {}
    for name, (divide, options) in CASES.items():
        result = t2v_fast.fisher(divide(network(), mesh), batches(), **options)
        found[name] = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in result.items()}
        found[name, "shares"] = {key: tuple(v.to_local().shape) for key, v in result.items() if hasattr(v, "to_local")}
    return found | _refused(mesh)


def _refused(mesh: DeviceMesh) -> dict[str, str]:
    found = {}

    def attempt(name: str, divide: Callable[[], nn.Module], data: list[Any], **options: Any) -> None:
        try:
            t2v_fast.fisher(divide(), data, "exact", **options)
            found[name] = "no error"
        except (t2v_fast.UnsupportedError, ValueError) as error:
            found[name] = str(error)

    class Scale(nn.Module):
        """A layer whose scale is an ordinary tensor of the size of a part."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    def scaled() -> nn.Module:
        layers = seeded(lambda: nn.Sequential(nn.Linear(8, 8), Scale(), nn.Linear(8, 3)))
        return parallelize_module(layers, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * self.weight, self.bias)

    def transformed() -> nn.Module:
        plan = {"0": ColwiseParallel(output_layouts=Replicate())}
        return parallelize_module(seeded(lambda: nn.Sequential(Squared(8, 4))), mesh, plan)

    class Sliced(nn.Module):
        """Each process takes its own columns of a whole tensor, and does not say that their cotangents are terms."""

        def __init__(self, honest: bool) -> None:
            super().__init__()
            self.honest = honest

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to_local(grad_placements=[Partial()]) if self.honest else x.to_local()
            mine = x.chunk(mesh.size(), 1)[mesh.get_local_rank()]
            return DTensor.from_local(mine.tanh(), mesh, [Shard(1)])

    def sliced(honest: bool = False) -> nn.Module:
        layers = seeded(lambda: nn.Sequential(nn.Linear(8, 8), Sliced(honest), nn.Linear(8, 3)))
        first = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
        return parallelize_module(layers, mesh, {"0": first, "2": RowwiseParallel()})

    def half_logits() -> nn.Module:
        return parallelize_module(seeded(lambda: nn.Sequential(nn.Linear(8, 4))), mesh, {"0": ColwiseParallel()})

    def distributed_logits() -> nn.Module:
        plan = {"0": ColwiseParallel(use_local_output=False)}
        return parallelize_module(seeded(lambda: nn.Sequential(nn.Linear(8, 4))), mesh, plan)

    def divided_batch() -> nn.Module:
        plan = {"0": ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))}
        return parallelize_module(seeded(lambda: nn.Sequential(nn.Linear(8, 4))), mesh, plan)

    x = [torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)]
    attempt("scale", scaled, x)
    attempt("sliced", sliced, x)
    want = t2v_fast.fisher(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))), x, "exact")
    torch.testing.assert_close(t2v_fast.fisher(sliced(honest=True), x, "exact").full().entries, want.entries)
    attempt("half of the logits", half_logits, x)
    layers = distributed_logits()
    with t2v_fast.FisherRecorder(layers) as recorder, pytest.raises(ValueError, match="take its full_tensor"):
        recorder.backward(layers(x[0]), torch.ones(4, 4).double())
    want = t2v_fast.fisher(seeded(lambda: nn.Sequential(nn.Linear(8, 4))), x, "exact")
    torch.testing.assert_close(t2v_fast.fisher(layers, x, "exact").full().entries, want.entries)
    attempt("divided batch", divided_batch, x)
    attempt("transformed", transformed, x, unsupported="exact")
    return found


def _square(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """FSDP2 over the first axis of a mesh, tensor parallelism over the second."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    found = {}
    every = sentences()
    mine = [[every[:3], every[3:4]], [every[4:]]][rank // 2]
    for name, (divide, options) in CASES.items():
        model = divide(network(), mesh["layer"])
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        parts = [joined(part, even=True) for part in mine]
        result = t2v_fast.fisher(model, parts, "exact", **options).full()
        found[name] = result.entries
        found[name, "count"] = result.num_examples
    return found


def _compare(found: list[dict[str, Any]], name: str, estimator: str = "deflated") -> None:
    want = plain(CASES[name][1], estimator)
    floor = 1e-12 * float(want.vector().max())
    for of_rank in found:
        assert list(of_rank[name]) == list(want)
        for key, values in want.items():
            torch.testing.assert_close(of_rank[name][key], values, rtol=1e-9, atol=floor)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("divided"), _divided, 2)


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one(two: list[dict[str, Any]], name: str) -> None:
    _compare(two, name)


def test_each_process_has_its_own_filters(two: list[dict[str, Any]]) -> None:
    shares = two[1]["columns and rows", "shares"]
    assert shares["blocks.0.up.weight"] == (8,)  # of 16
    assert shares["blocks.0.down.weight"] == (8,)  # whose columns are divided
    assert two[1]["by parameter", "shares"]["blocks.0.down.weight"] == (8, 8)
    assert two[1]["vocabulary", "shares"]["head.weight"] == (2,)  # of 5


def test_parts_without_a_whole_are_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "'1.scale' is an ordinary tensor among activations of which each process has a part" in found["scale"]
        assert "to_local(grad_placements=[Partial()])" in found["sliced"]
        assert "the output is computed from tensors of which each process has a part" in found["half of the logits"]
        assert "each process has a part ((Shard(dim=0),))" in found["divided batch"]
        assert "'0.weight' is divided over processes and transformed" in found["transformed"]


@pytest.mark.slow
def test_four_processes_in_a_square_equal_one(tmp_path: Path) -> None:
    found = run(tmp_path, _square, 4)
    for name in CASES:
        _compare(found, name, "exact")  # each process draws signs of its own
        assert all(of_rank[name, "count"] == 7 for of_rank in found)
