"""Networks that FSDP2 shards over processes give the Fisher of one process over all their examples."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import per_example_squares, reduce, relative_error
from shards import Experts, Language, Twice, convolutional, images, joined, rows, run, seeded, sentences
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import t2v_fast
from t2v_fast.adapters.sharded_checkpoints import load_shards, load_whole, save_shards, save_whole

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def nested(network: nn.Module, **options: Any) -> nn.Module:
    for layer in network.blocks if isinstance(network, Language) else [network[0], network[1]]:
        fully_shard(layer, **options)
    return fully_shard(network, **options)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def compiled_parts(network: nn.Module) -> nn.Module:
    """Compiled modules are sharded: a part before and the whole after, with another part that stays whole."""
    network[0] = compiled(network[0])
    network[3] = compiled(network[3])
    fully_shard(network[0], reshard_after_forward=True)
    return fully_shard(compiled(network))


# Each case: the network, how it is sharded, the examples, the options of fisher().
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], str, dict[str, Any]]] = {
    "nested": (convolutional, nested, "images", {"estimator": "exact"}),
    "parameter": (convolutional, nested, "images", {"estimator": "exact", "granularity": "parameter"}),
    "tensor": (convolutional, nested, "images", {"estimator": "exact", "granularity": "tensor"}),
    "kept": (
        convolutional,
        lambda network: nested(network, reshard_after_forward=False),
        "images",
        {"estimator": "exact"},
    ),
    "axis 1": (
        convolutional,
        lambda network: fully_shard(network, reshard_after_forward=True),
        "images",
        {"estimator": "exact", "filter_axis": {"3.weight": 1, "0.0.weight": 1}},
    ),
    "along axis 1": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda network: fully_shard(network, shard_placement_fn=lambda p: _along(p)),
        "rows",
        {"estimator": "exact", "self_check": False},
    ),
    "twice": (
        Twice,
        lambda network: fully_shard(_with(network, "again", "one", "idle")),
        "rows",
        {"estimator": "exact", "unsupported": "exact"},
    ),
    "twice by parameter": (
        Twice,
        lambda network: fully_shard(_with(network, "again", "head"), reshard_after_forward=True),
        "rows",
        {"estimator": "exact", "unsupported": "exact", "granularity": "parameter"},
    ),
    "ignored": (
        Twice,
        lambda network: fully_shard(network, ignored_params={network.again.weight, network.head.bias}),
        "rows",
        {"estimator": "exact", "unsupported": "exact"},
    ),
    "experts": (
        Experts,
        lambda network: fully_shard(_with(network, "first", *(f"experts.{k}" for k in range(3)))),
        "rows",
        {"estimator": "exact"},
    ),
    "weights": (convolutional, nested, "images", {"estimator": "exact", "weights": torch.arange(11.0)}),
    "kept in part": (
        convolutional,
        lambda network: nested(network, reshard_after_forward=2),
        "images",
        {"estimator": "exact"},
    ),
    "some": (
        convolutional,
        nested,
        "images",
        {"estimator": "exact", "parameters": ["5.weight", "0.1.weight", "1.0.bias"], "self_check": False},
    ),
    "tied": (Language, nested, "sentences", {"estimator": "exact"}),
    "tied by parameter": (Language, nested, "sentences", {"estimator": "exact", "granularity": "parameter"}),
    "sequences": (
        lambda: Language(tied=False),
        lambda network: nested(network, reshard_after_forward=False),
        "sentences",
        {"estimator": "exact", "level": "sequence"},
    ),
    "compiled": (convolutional, lambda network: compiled(nested(network)), "images", {"estimator": "exact"}),
    "compiled before": (convolutional, compiled_parts, "images", {"estimator": "exact"}),
    "half": (Language, lambda network: nested(network, mp_policy=HALF), "sentences", {"estimator": "exact"}),
}
SLOW = ("kept", "kept in part", "tensor", "twice by parameter", "sequences")
# Four processes show nothing else here than two do.
OF_TWO = ("parameter", "twice", "some", "tied by parameter", "compiled", "compiled before", "half")
# The batches of each process, as the numbers of the examples.
SHARES = [[[0, 1, 2], [3], [4, 5, 6, 7]], [[8, 9, 10]]]
OF_SENTENCES = [[[0, 1, 2], [3, 4]], [[5, 6]]]


def _along(p: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1) if p.dim() == 2 and p.shape[1] % 4 == 0 else None


def _with(network: nn.Module, *layers: str) -> nn.Module:
    for layer in layers:
        fully_shard(network.get_submodule(layer))
    return network


def _batches(kind: str, rank: int) -> list[Any]:
    if kind == "sentences":
        every = sentences()
        return [joined([every[n] for n in batch]) for batch in (OF_SENTENCES[rank] if rank < 2 else [])]
    x = images() if kind == "images" else rows()
    return [x[batch] for batch in (SHARES[rank] if rank < 2 else [])]


def _case(name: str, rank: int) -> dict[str, Any]:
    make, shard, kind, options = CASES[name]
    half = name == "half"
    network = shard(seeded(make, torch.float32 if half else torch.float64))
    network[5].bias.requires_grad_(False) if isinstance(network, nn.Sequential) and len(network) > 5 else None
    before = {key: (p.requires_grad, type(p), p.to_local().clone()) for key, p in _local(network)}
    batches = _batches(kind, rank)
    if "weights" in options:
        mine = [n for share in (SHARES[rank] if rank < 2 else []) for n in share]
        options = options | {"weights": options["weights"][mine]}
    result = t2v_fast.fisher(network, batches, **options)
    after = {key: (p.requires_grad, type(p), p.to_local().clone()) for key, p in _local(network)}
    assert before.keys() == after.keys()
    for key in before:
        assert before[key][:2] == after[key][:2]
        assert torch.equal(before[key][2], after[key][2])
    shares = {key: v.to_local().shape if hasattr(v, "to_local") else v.shape for key, v in result.items()}
    whole = result.full()
    return {"entries": whole.entries, "error": whole.standard_error, "count": whole.num_examples, "shares": shares}


def _local(network: nn.Module) -> list[tuple[str, Any]]:
    return [(key, p) for key, p in network.named_parameters() if hasattr(p, "to_local")]


def _cases(rank: int, names: list[str]) -> dict[str, Any]:
    return {name: _case(name, rank) for name in names}


def quick(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found = _cases(rank, [name for name in CASES if name not in SLOW])
    return found | {"loop": _loop(rank), "errors": _errors(rank), "saved": _save(rank, folder), "copies": _copies(rank)}


def at_four(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found = _cases(rank, [name for name in CASES if name not in OF_TWO])
    return found | {"mesh": _mesh(rank), "loaded": _load(folder)}


# Wrappers around whole copies of a network, in each order.
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": nn.parallel.DistributedDataParallel,
    "copy, compiled": lambda network: compiled(nn.parallel.DistributedDataParallel(network)),
    "compiled, copy": lambda network: nn.parallel.DistributedDataParallel(compiled(network)),
}


def _copies(rank: int) -> dict[str, Any]:
    """The Fisher of this process's examples, squares in a loop, and a step of training after them."""
    found: dict[str, Any] = {}
    for name, wrap in COPIES.items():
        model = wrap(seeded(convolutional))
        result = t2v_fast.fisher(model, _batches("images", rank), "exact")
        with t2v_fast.FisherRecorder(model) as recorder:  # a forward pass of copies exchanges their buffers
            x = images()[rank::2]
            squares = recorder.backward(model(x), torch.ones(len(x), 3).double())
        model(x).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        found[name] = {"entries": result.entries, "squares": squares, "gradients": gradients}
    return found


def _save(rank: int, folder: Path) -> dict[str, Any]:
    """Checkpoints of a Fisher, by parameter and by filter."""
    for granularity in ("parameter", "filter"):
        network = nested(seeded(convolutional))
        found = t2v_fast.fisher(network, _batches("images", rank), granularity=granularity)
        save_shards(found, folder / f"shards by {granularity}")
        save_whole(found, folder / f"whole by {granularity}", shard_bytes=2000)
        try:
            save_whole(found, folder / f"whole by {granularity}")
        except RuntimeError as error:
            text = str(error)
        entries = found.full().entries
    return {"entries": entries, "text": text}


def _load(folder: Path) -> dict[str, Any]:
    """The checkpoints on this number of processes."""
    network = nested(seeded(convolutional))
    found: dict[str, Any] = {}
    for granularity in ("parameter", "filter"):
        loaded = load_shards(folder / f"shards by {granularity}", network)
        whole = load_whole(folder / f"whole by {granularity}", network)
        for name, values in loaded.items():
            assert values.placements == whole[name].placements
            assert torch.equal(values.to_local(), whole[name].to_local())
        found[granularity] = loaded.full()
    return found


def _errors(rank: int) -> dict[str, Any]:
    """An error of one process, in different places, is an error of both."""
    found = {}
    for name, cause in {
        "data": _bad_data,
        "check": _bad_check,
        "empty": _no_data,
        "weights": _bad_weights,
        "loop": _bad_loop,
    }.items():
        network = nested(seeded(convolutional))
        try:
            cause(network, rank)
            found[name] = "no error"
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        result = t2v_fast.fisher(network, _batches("images", rank), "exact")  # and the network works as before
        found[name, "after"] = result.full().entries
    return found


def _bad_data(network: nn.Module, rank: int) -> None:
    batches = _batches("images", rank)
    if rank == 0:
        batches[2][1] = float("nan")
    t2v_fast.fisher(network, batches)


def _bad_check(network: nn.Module, rank: int) -> None:
    def forward(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return network(x - x.mean(0) if rank == 1 else x)

    t2v_fast.fisher(network, _batches("images", rank), forward=forward)


def _no_data(network: nn.Module, rank: int) -> None:
    t2v_fast.fisher(network, [])


def _bad_weights(network: nn.Module, rank: int) -> None:
    t2v_fast.fisher(network, _batches("images", rank), weights=torch.ones(8))  # rank 1 has 3 examples


def _bad_loop(network: nn.Module, rank: int) -> None:
    with t2v_fast.FisherRecorder(network) as recorder:
        for x in _batches("images", rank):
            output = network(x)
            recorder.backward(output, torch.ones(2 + rank, 3).double())  # rank 0 has three examples


def _mesh(rank: int) -> dict[str, Any]:
    """HSDP: two copies of the network, each sharded over two processes."""
    network = seeded(convolutional)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    nested(network, mesh=mesh)
    return {"entries": t2v_fast.fisher(network, _batches("images", rank), "exact").full().entries}


def _loop(rank: int) -> dict[str, Any]:
    """A loop of one's own, with several backward passes of one graph, and a step of training after it."""
    network = nested(seeded(convolutional))
    squares = []
    with t2v_fast.FisherRecorder(network) as recorder:
        for x in _batches("images", rank):
            output = network(x)
            u = torch.ones(2, *output.shape).double() * torch.tensor([1.0, -0.5, 2.0])
            found = recorder.backward(output, u, retain_graph=True)
            again = recorder.backward(output, u)
            for name, q in found.items():
                torch.testing.assert_close(q, again[name])
            squares.append(found)
    x = images()[rank::2]
    network(x).square().sum().backward()
    gradients = {name: p.grad.full_tensor() for name, p in network.named_parameters()}
    return {"squares": squares, "gradients": gradients}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run(folder, quick, 2)


def _alone(name: str) -> t2v_fast.FisherDiagonal:
    make, _, kind, options = CASES[name]
    if kind == "sentences":
        data: list[Any] = list(sentences())
    else:
        data = [images() if kind == "images" else rows()]
    return t2v_fast.fisher(seeded(make), data, **options)


def _compare(name: str, found: list[dict[str, Any]]) -> None:
    want = _alone(name)
    for of_rank in found:
        got = of_rank[name]
        assert got["count"] == want.num_examples
        assert list(got["entries"]) == list(want)
        for key, values in want.items():
            floor = 1e-12 * float(want.vector().max())
            torch.testing.assert_close(got["entries"][key], values, rtol=1e-9, atol=floor)
            if want.granularity != "parameter":  # whose errors come from the batches
                torch.testing.assert_close(got["error"][key], want.standard_error[key], rtol=1e-7, atol=floor)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*SLOW, "half")])
def test_two_processes_equal_one(two: list[dict[str, Any]], name: str) -> None:
    _compare(name, two)


def test_each_process_has_its_own_filters(two: list[dict[str, Any]]) -> None:
    assert [dict(of["nested"]["shares"])["0.0.weight"] for of in two] == [(3,), (2,)]
    assert [dict(of["parameter"]["shares"])["3.weight"] for of in two] == [(5, 28), (4, 28)]
    assert [dict(of["twice"]["shares"])["one.weight"] for of in two] == [(1,), (0,)]
    assert [dict(of["along axis 1"]["shares"])["2.weight"] for of in two] == [(3,), (3,)]


@pytest.mark.parametrize("name", COPIES)
def test_whole_copies_have_examples_of_their_own(two: list[dict[str, Any]], name: str) -> None:
    network = seeded(convolutional)
    (network(images()).square().sum() / 2).backward()
    gradients = {key: p.grad for key, p in network.named_parameters()}
    for rank, of_rank in enumerate(two):
        found = of_rank["copies"][name]
        want = t2v_fast.fisher(seeded(convolutional), _batches("images", rank), "exact")
        torch.testing.assert_close(found["entries"], want.entries, rtol=1e-12, atol=1e-25)
        assert list(found["entries"]) == list(want)
        x = images()[rank::2]
        for key, squares in per_example_squares(network, x, torch.ones(1, len(x), 3).double()).items():
            error = relative_error(found["squares"][key], reduce(squares, "filter"))
            assert error < 1e-12 or squares.abs().max() < 1e-25
        for got, (key, g) in zip(found["gradients"], gradients.items(), strict=True):
            torch.testing.assert_close(got, g, msg=key)  # the mean of both processes, as before


def test_mixed_precision_is_near_double_precision(two: list[dict[str, Any]]) -> None:
    want = _alone("half")
    got = two[0]["half"]["entries"]
    vector = torch.cat([got[name].flatten() for name in want])
    assert torch.cosine_similarity(vector, want.vector(), 0) > 0.999
    assert 0.9 < float(vector.norm() / want.vector().norm()) < 1.1


def test_own_loop_and_training_after_it(two: list[dict[str, Any]]) -> None:
    network = seeded(convolutional)
    for rank, of_rank in enumerate(two):
        for x, found in zip(_batches("images", rank), of_rank["loop"]["squares"], strict=True):
            u = torch.ones(2, len(x), 3).double() * torch.tensor([1.0, -0.5, 2.0])
            for name, squares in per_example_squares(network, x, u).items():
                assert relative_error(found[name], reduce(squares, "filter")) < 1e-12 or squares.abs().max() < 1e-25
    network = seeded(convolutional)
    x = images()
    (network(x).square().sum() / 2).backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(two[0]["loop"]["gradients"][name], p.grad)


def test_an_error_of_one_process_is_an_error_of_both(two: list[dict[str, Any]]) -> None:
    first, second = (of["errors"] for of in two)
    assert first["data"].startswith("ValueError: batch 2, example 1: the input has NaN")
    assert second["data"].startswith("ProcessError: process 0: ValueError: batch 2, example 1: the input has NaN")
    assert "examples interact" in second["check"]
    assert first["check"].startswith("ProcessError: process 1: SelfCheckError: the logits of example")
    assert first["empty"] == second["empty"] == "ValueError: the loaders of all processes gave no example"
    assert second["weights"] == "ValueError: weights has 8 entries but the loader gave 3"
    assert first["weights"] == f"ProcessError: process 1: {second['weights']}"
    assert first["loop"].startswith("ValueError: cotangents are [2, 3], expected [3, 3]")
    assert second["loop"] == f"ProcessError: process 0: {first['loop']}"
    want = t2v_fast.fisher(seeded(convolutional), [images()], "exact")
    for of_rank in (first, second):
        for name in ("data", "check", "empty", "weights", "loop"):
            for key, values in want.items():
                torch.testing.assert_close(of_rank[name, "after"][key], values, rtol=1e-9, atol=1e-15)


def test_checkpoints_load_on_one_process(two: list[dict[str, Any]], folder: Path) -> None:
    network = seeded(convolutional)
    assert "FileExistsError" in two[0]["saved"]["text"]
    assert two[0]["saved"]["text"] == two[1]["saved"]["text"]
    assert len(list((folder / "whole by parameter").glob("*.safetensors"))) > 1
    for granularity in ("parameter", "filter"):
        found = load_shards(folder / f"shards by {granularity}")
        assert (found.granularity, found.num_examples, found.estimator) == (granularity, 11, "deflated")
        whole = load_whole(folder / f"whole by {granularity}", network)
        again = load_shards(folder / f"shards by {granularity}", network)
        for name, values in found.items():
            assert torch.equal(whole[name], values)
            assert torch.equal(again[name], values)
            assert found.standard_error[name].shape == values.shape
    for name, values in two[0]["saved"]["entries"].items():
        assert torch.equal(found[name], values)
    with pytest.raises(ValueError, match=r"no parameter '0\.0\.weight'"):
        load_shards(folder / "shards by filter", nn.Linear(2, 3))
    network[3].weight = nn.Parameter(torch.ones(4, 28))
    with pytest.raises(ValueError, match=r"values of '3\.weight' are \[9, 28\], but the parameter is \[4, 28\]"):
        load_whole(folder / "whole by parameter", network)


def dies(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The second process ends within its first batch, as if it were killed."""

    def forward(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            os._exit(0)
        return network(x)

    try:
        t2v_fast.fisher(nested(seeded(convolutional)), _batches("images", rank), forward=forward)
    except RuntimeError as error:
        (folder / "error.txt").write_text(str(error))
    os._exit(0)


@pytest.mark.slow
def test_the_death_of_a_process_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # neither process returns a result
        run(tmp_path, dies, 2)
    assert "closed by peer" in (tmp_path / "error.txt").read_text().replace("reset", "closed")


@pytest.mark.slow
def test_four_processes_equal_one(two: list[dict[str, Any]], folder: Path) -> None:
    found = run(folder, at_four, 4)
    for of_rank in found:
        for granularity in ("parameter", "filter"):
            want = load_shards(folder / f"shards by {granularity}")
            for name, values in want.items():
                assert torch.equal(of_rank["loaded"][granularity][name], values)
    for name in CASES:
        if name not in OF_TWO:
            _compare(name, found)
    want = t2v_fast.fisher(seeded(convolutional), [images()], "exact")
    for of_rank in found:
        for name, values in want.items():
            torch.testing.assert_close(of_rank["mesh"]["entries"][name], values, rtol=1e-9, atol=1e-15)
