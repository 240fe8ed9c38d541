"""Wrappers for several processes are followed to the network, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from oracle import per_example_squares, reduce, relative_error
from shards import Twice, convolutional, images, rows, seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import t2v_fast
from t2v_fast.adapters.squares import summed_squares
from t2v_fast.estimation.variational import variational_fisher


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if own:
        dist.destroy_process_group()


def test_whole_copies_are_followed_to_the_network() -> None:
    network = seeded(convolutional)
    want = t2v_fast.fisher(network, [images()], "exact")
    wrapped = nn.parallel.DistributedDataParallel(seeded(convolutional))
    found = t2v_fast.fisher(wrapped, [images()], "exact")
    assert list(found) == list(want)
    torch.testing.assert_close(found.entries, want.entries)
    with t2v_fast.FisherRecorder(wrapped) as recorder:
        squares = recorder.backward(wrapped(images()), torch.ones(11, 3).double())
    with t2v_fast.FisherRecorder(network) as recorder:
        torch.testing.assert_close(squares, recorder.backward(network(images()), torch.ones(11, 3).double()))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


COPY, SPREAD = nn.parallel.DistributedDataParallel, nn.DataParallel
ORDERS = [(compiled,), (SPREAD,), (compiled, COPY), (COPY, compiled), (SPREAD, compiled), (compiled, COPY, compiled)]


@pytest.mark.parametrize("around", ORDERS, ids=lambda around: " ".join(w.__name__ for w in around))
def test_wrappers_in_any_order(around: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    network = seeded(convolutional)
    want = t2v_fast.fisher(seeded(convolutional), images().split(4), "exact")
    model = network
    for wrap in around:
        model = wrap(model)
    found = t2v_fast.fisher(model, images().split(4), "exact")
    assert list(found) == list(want)
    torch.testing.assert_close(found.entries, want.entries)
    wrapped_names = [name for name, _ in model.named_parameters()]
    for given in (wrapped_names, list(want), lambda name, p: name in want.entries):
        recorder = t2v_fast.FisherRecorder(model, given)
        assert recorder.model is network
        assert list(recorder.parameters) == list(want)
    u = torch.ones(11, 3).double()
    with recorder:
        squares = recorder.backward(model(images()), u)
    for name, q in per_example_squares(network, images(), u[None]).items():
        assert relative_error(squares[name], reduce(q, "filter")) < 1e-12 or q.abs().max() < 1e-25


def test_a_name_of_the_network_comes_before_a_name_of_the_wrapper() -> None:
    """A network with a layer 'module' keeps its names, although wrappers add a part of this name."""
    network = nn.Module()
    network.module, network.weight = nn.Linear(4, 3), nn.Parameter(torch.ones(4))
    network.forward = lambda x: network.module(x * network.weight)
    model = SPREAD(network)
    assert list(t2v_fast.FisherRecorder(model).parameters) == ["weight", "module.weight", "module.bias"]
    assert list(t2v_fast.FisherRecorder(model, ["module.weight"]).parameters) == ["module.weight"]
    assert list(t2v_fast.FisherRecorder(model, ["module.module.weight"]).parameters) == ["module.weight"]


def test_hooks_of_a_wrapper_are_not_lost() -> None:
    """A compiled module with hooks runs as it is; other wrappers with hooks are refused."""
    want = t2v_fast.fisher(seeded(convolutional), [2 * images()], "exact")
    model = compiled(seeded(convolutional))
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    found = t2v_fast.fisher(model, [images()], "exact")
    assert list(found) == list(want)
    torch.testing.assert_close(found.entries, want.entries)
    for wrap in (COPY, SPREAD):
        model = compiled(wrap(seeded(convolutional)))
        model._orig_mod.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(t2v_fast.UnsupportedError, match=f"the {wrap.__name__} around the network has hooks"):
            t2v_fast.fisher(model, [images()])


def test_a_part_that_is_spread_over_devices_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), SPREAD(nn.Linear(3, 2)))
    assert list(t2v_fast.fisher(network, [torch.ones(2, 4)])) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    network[1].device_ids = [0, 1]
    for model in (network, compiled(network)):
        with pytest.raises(t2v_fast.UnsupportedError, match="the layer '1' is a DataParallel, which exchanges"):
            t2v_fast.fisher(model, [torch.ones(2, 4)])


def test_a_part_that_is_wrapped_is_refused() -> None:
    for part in (COPY(nn.Linear(3, 2)), compiled(COPY(nn.Linear(3, 2))), COPY(compiled(nn.Linear(3, 2)))):
        network = nn.Sequential(nn.Linear(4, 3), part)
        for model in (network, compiled(network)):
            with pytest.raises(t2v_fast.UnsupportedError, match="the layer '1' is a DistributedDataParallel"):
                t2v_fast.fisher(model, [torch.ones(2, 4)])


def test_fsdp1_is_refused_by_name() -> None:
    network = FullyShardedDataParallel(seeded(convolutional), device_id=torch.device("cpu"))
    for model in (network, nn.Sequential(network), compiled(network)):
        with pytest.raises(t2v_fast.UnsupportedError, match=r"'(0\.)?0\.0\.weight' is flattened.*fully_shard"):
            t2v_fast.FisherRecorder(model)


def test_deepspeed_and_pipelines_are_refused_by_name() -> None:
    network = nn.Linear(4, 3)
    network.weight.ds_id = 0  # as DeepSpeed marks what it partitions
    with pytest.raises(t2v_fast.UnsupportedError, match="'weight' is partitioned by DeepSpeed"):
        t2v_fast.FisherRecorder(network)
    from torch.distributed.pipelining import PipelineStage

    stage = PipelineStage(nn.Linear(4, 3), 0, 1, torch.device("cpu"))
    with pytest.raises(t2v_fast.UnsupportedError, match="PipelineStage has some of the network's layers"):
        t2v_fast.fisher(stage, [torch.ones(2, 4)])
    with pytest.raises(TypeError, match="the network is a int"):
        t2v_fast.FisherRecorder(3)


@pytest.mark.parametrize("granularity", ["filter", "parameter"])
def test_fsdp2_over_one_process(granularity: str) -> None:
    mesh = init_device_mesh("cpu", (1,))
    network = seeded(Twice)
    for layer in (network.again, network.head):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh)
    options = {"granularity": granularity, "unsupported": "exact"}
    for x in (rows(), rows()[:5]):
        found = t2v_fast.fisher(network, x.split(4), "exact", **options)
        want = t2v_fast.fisher(seeded(Twice), x.split(4), "exact", **options)
        assert found.unused == want.unused == {"idle.weight", "idle.bias"}
        torch.testing.assert_close(found.full().entries, want.entries)
        torch.testing.assert_close(found.full().standard_error, want.standard_error, rtol=1e-6, atol=1e-12)
    found = t2v_fast.fisher(network, x.split(4), "batch_mean", seed=3, **options)
    want = t2v_fast.fisher(seeded(Twice), x.split(4), "batch_mean", seed=3, **options)
    torch.testing.assert_close(found.to_numpy(), want.to_numpy())
    network(rows()).sum().backward()
    with pytest.raises(ValueError, match="an allocation have no form"):
        t2v_fast.fisher(network, x.split(4), estimator_error=True)


def test_a_gradient_that_is_not_reduced_is_refused() -> None:
    network = fully_shard(seeded(convolutional), mesh=init_device_mesh("cpu", (1,)))
    network.set_requires_gradient_sync(False)
    network(images()).sum().backward()
    with pytest.raises(t2v_fast.UnsupportedError, match=r"'0\.0\.weight' has a gradient that FSDP2 has not reduced"):
        t2v_fast.FisherRecorder(network)


def test_what_does_not_add_up_over_processes_is_refused() -> None:
    network = fully_shard(seeded(convolutional), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(t2v_fast.UnsupportedError, match=r"'0\.0\.bias' is sharded over processes"):
        summed_squares(network, [images()], lambda outputs, labels: torch.ones_like(outputs))
    with pytest.raises(t2v_fast.UnsupportedError, match=r"'0\.0\.weight' is divided over processes"):
        variational_fisher(network, lambda epoch: [(images(), torch.zeros(11).long())])
    t2v_fast.fisher(network, [images()])
