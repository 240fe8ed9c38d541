"""The Fisher of a network that FSDP2 shards over processes.

    torchrun --nproc-per-node 2 examples/sharded_network.py

Each process has a shard of every weight, and images of its own. All processes call fisher() together, and the result is
the Fisher of all images, in shards as the weights are. The processes need not have equal numbers of images or batches.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import t2v_fast
from t2v_fast.adapters.sharded_checkpoints import load_shards, save_shards


def network() -> nn.Sequential:
    torch.manual_seed(0)  # the same weights in each process
    first = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(9, 16, 3), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(16 * 4 * 4, 10)).eval()


def own(values: torch.Tensor) -> torch.Tensor:
    """The shard of this process."""
    assert isinstance(values, DTensor)
    return values.to_local()


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    images = torch.tensor(load_digits().images[:100], dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]

    model = network()
    for layers in (model[0], model[1]):
        fully_shard(layers)
    fully_shard(model)
    mine = images[:40] if rank == 0 else images[40:]
    F = t2v_fast.fisher(model, mine.split(16), "exact")  # on all processes

    filters: list = [None] * size
    dist.all_gather_object(filters, {name: len(own(values)) for name, values in F.items()})
    whole = F.full()  # on all processes, too

    # A checkpoint has the shards of all processes, and loads on any number of them.
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    save_shards(F, Path(folder[0]))
    again = load_shards(Path(folder[0]), model)
    same = all(torch.equal(own(again[name]), own(F[name])) for name in F)

    if rank == 0:
        print(f"Fisher of {F.num_examples} images on {size} processes")
        for name, values in whole.items():
            print(f"{name:10} {values.numel():3} filters, in shards of", *(found[name] for found in filters))
        alone = t2v_fast.fisher(network(), images.split(50), "exact")
        difference = (whole.vector() - alone.vector()).norm() / alone.vector().norm()
        print("equal to one process:", bool(difference < 1e-4))
        print("equal after loading:", same)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
