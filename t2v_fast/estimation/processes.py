"""The Fisher of a network that is sharded over processes: sums over all their examples, and results in shards."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..gradients.recorder import FisherRecorder
from ..gradients.sharding import Sharding
from .moments import Moments, NamedMoments


def together(recorder: FisherRecorder) -> contextlib.AbstractContextManager[Any]:
    """A context that ends on all processes of a sharded network together, or with an error on all of them."""
    return contextlib.nullcontext() if recorder.sharding is None else recorder.sharding


def add_up(moments: NamedMoments, sharding: Sharding) -> dict[str, Moments]:
    """Add up moments over the processes of a sharded network.

    Args:
        moments: The moments of this process, which may have no example at all.
        sharding: The processes.

    Returns:
        The moments of each quantity that no batch of any process lacks.

    Raises:
        ValueError: No process has an example, or quantities of one name have different shapes.
    """
    own = moments.sums()
    shapes = {name: tuple(t.shape) for name, t in own.items()} if moments.weight or own else None
    every = [of for of in sharding.exchange(shapes) if of is not None]
    if not every:
        raise ValueError("the loaders of all processes gave no example")
    found: dict[str, Moments] = {}
    scalars = sharding.sum_(torch.tensor(moments.scalars, dtype=torch.float64)).tolist()
    for name, shape in every[0].items():
        if not all(name in of for of in every):
            continue
        if any(of[name] != shape for of in every):
            raise ValueError(f"the values of {name!r} have different shapes on the processes")
        t = own.pop(name) if name in own else torch.zeros(shape, dtype=torch.float64)
        m = found[name] = Moments()
        m.first, m.cross, m.second = sharding.sum_(t.contiguous())
        m.units, m.weight, m.weight2 = int(scalars[0]), scalars[1], scalars[2]
    return found


def in_shards(values: Tensor, parameter: Tensor, granularity: str, axis: int) -> Tensor:
    """Turn the values of a parameter, which every process has, into a DTensor that is sharded as the parameter is.

    Args:
        values: The values, float64 on the CPU.
        parameter: The parameter. If it is no DTensor, the values are returned unchanged.
        granularity: What the values are: ``"filter"``, ``"parameter"`` or ``"tensor"``.
        axis: The axis of the parameter's filters.

    Returns:
        A DTensor on the parameter's mesh. Where the parameter is sharded along its filters, so are their values;
        where it is sharded along another axis, every process has the values of all filters.
    """
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = []
    for placement in parameter.placements:  # type: ignore[attr-defined]
        dim = getattr(placement, "dim", None)  # of a shard
        if dim is None or granularity == "tensor" or not values.dim():
            placements.append(Replicate())
        elif granularity == "parameter":
            placements.append(placement)
        elif dim == axis:
            placements.append(_moved(placement))
        else:
            placements.append(Replicate())
    return distribute_tensor(values, parameter.device_mesh, placements, src_data_rank=None)  # type: ignore[attr-defined]


def shards_of(values: Mapping[str, Tensor], recorder: FisherRecorder) -> dict[str, Tensor]:
    """:func:`in_shards` of the values of each parameter."""
    of, axes = recorder.parameters, recorder.filter_axes
    return {name: in_shards(t, of[name], recorder.granularity, axes[name]) for name, t in values.items()}


def _moved(placement: Any) -> Any:
    """The placement of values [O] whose parameter is sharded along its filter axis."""
    from torch.distributed.tensor import Shard

    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing what only sharded networks need."""
    return type(t).__module__.startswith("torch.distributed.tensor") or hasattr(t, "placements")


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor on the CPU; of a DTensor on every process, if all of them ask."""
    return t.full_tensor().cpu() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`whole` of each tensor."""
    return {name: whole(t) for name, t in values.items()}
