"""Wrappers that other libraries put around a network: follow them to the network, or refuse them by name."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .graph import UnsupportedError


def network_of(model: Any) -> nn.Module:
    """Follow wrappers that keep the whole network in every process to the network itself.

    Args:
        model: The network, or a ``DistributedDataParallel`` module of it.

    Returns:
        The network, whose parameters have names without ``module.``.

    Raises:
        UnsupportedError: A wrapper hides parameters or layers; the message says what to pass.
        TypeError: This is no network.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> network_of(network) is network
        True
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    stages = getattr(sys.modules.get("torch.distributed.pipelining.stage"), "_PipelineStageBase", None)
    if stages is not None and isinstance(model, stages):
        raise UnsupportedError(
            f"a {type(model).__name__} has some of the network's layers, and the cotangents of its output are computed "
            "by another process: compute the Fisher of the whole network, before it is split into stages"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"the network is a {type(model).__name__}, expected a torch.nn.Module")
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    for name, module in model.named_modules():
        if fsdp1 is not None and isinstance(module, fsdp1):
            flat = getattr(module, "_flat_param", None)  # which knows the names of its parts
            first = ".".join(filter(None, (name, *getattr(flat, "_fqns", ())[:1])))
            raise UnsupportedError(
                f"the parameter {first!r} is flattened together with others by FSDP1 (FullyShardedDataParallel), so "
                "that its own gradient does not exist: shard the network with fully_shard (FSDP2), or pass the network "
                "before it is wrapped"
            )
        if module is not model and isinstance(module, nn.parallel.DistributedDataParallel):
            raise UnsupportedError(
                f"the layer {name!r} is a DistributedDataParallel, which exchanges tensors in its forward pass: wrap "
                "the whole network, or pass it before it is wrapped"
            )
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise UnsupportedError(
                f"the parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3, which frees it outside of the "
                "forward pass: shard the network with fully_shard (FSDP2), or use ZeRO stage 2 at most"
            )
    return model
