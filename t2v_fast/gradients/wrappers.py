"""Wrappers that other libraries put around a network: follow them to the network, or refuse them by name.

A wrapper is a module around one other module, of which it keeps every parameter as it is: those of torch.compile, of
DistributedDataParallel and of DataParallel. One rule holds for all of them, in any order and number. Wrappers around
the whole network are followed, because the numbers are those of the network itself. The part of a wrapper never appears
in a name.

Within a network, a wrapper is called by the network's own forward pass. One of torch.compile only changes how its
layers run. One that exchanges tensors with other processes or devices there is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from .graph import UnsupportedError
from .members import modules_of, name_of, parameters_of

COMPILED = "_orig_mod"  # the name of a module within the one that torch.compile has wrapped around it
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def is_compiled(module: object) -> bool:
    """Whether ``torch.compile`` has returned this module, wrapped around another one."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _inside(module: object) -> str | None:
    """The name of the module within a wrapper; None where this is no wrapper."""
    if is_compiled(module):
        return COMPILED
    return "module" if isinstance(module, _PARALLEL) else None


def network_of(model: Any) -> nn.Module:
    """Follow the wrappers around a network to the network itself, and check that it is whole in this process.

    Args:
        model: The network, or wrappers of it: ``torch.compile(DistributedDataParallel(network))``, for instance.

    Returns:
        The network. A compiled module with hooks of its own, such as those of ``fully_shard``, counts as the network,
        because the hooks run only where it is called.

    Raises:
        UnsupportedError: A wrapper hides parameters or layers; the message says what to pass.
        TypeError: This is no network.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> network_of(nn.DataParallel(network)) is network
        True
    """
    while (inside := _inside(model)) is not None:
        hooks = (model._forward_pre_hooks, model._forward_hooks, model._backward_pre_hooks, model._backward_hooks)
        if any(hooks):
            if is_compiled(model):
                break
            raise UnsupportedError(
                f"the {type(model).__name__} around the network has hooks of its own, which the network does not run: "
                "register them on the network, or pass the network before it is wrapped"
            )
        model = getattr(model, inside)
    stages = getattr(sys.modules.get("torch.distributed.pipelining.stage"), "_PipelineStageBase", None)
    if stages is not None and isinstance(model, stages):
        raise UnsupportedError(
            f"a {type(model).__name__} has some of the network's layers, and the cotangents of its output are computed "
            "by another process: compute the Fisher of the whole network, before it is split into stages"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"the network is a {type(model).__name__}, expected a torch.nn.Module")
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    for module in modules_of(model):
        if fsdp1 is not None and isinstance(module, fsdp1):
            flat = getattr(module, "_flat_param", None)  # which knows the names of its parts
            key = original_name(model, name_of(model, module) or "")
            first = ".".join(filter(None, (key, *getattr(flat, "_fqns", ())[:1])))
            raise UnsupportedError(
                f"the parameter {first!r} is flattened together with others by FSDP1 (FullyShardedDataParallel), so "
                "that its own gradient does not exist: shard the network with fully_shard (FSDP2), or pass the network "
                "before it is wrapped"
            )
        alone = isinstance(module, nn.DataParallel) and len(module.device_ids) < 2  # which calls its module as it is
        if isinstance(module, _PARALLEL) and not alone:
            key = original_name(model, name_of(model, module) or "")
            raise UnsupportedError(
                f"the layer {key!r} is a {type(module).__name__}, which exchanges tensors in its "
                "forward pass: wrap the whole network, or pass it before it is wrapped"
            )
    if any(hasattr(p, "ds_id") for p in parameters_of(model)):
        name = next(name for name, p in named_parameters(model) if hasattr(p, "ds_id"))
        raise UnsupportedError(
            f"the parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3, which frees it outside of the "
            "forward pass: shard the network with fully_shard (FSDP2), or use ZeRO stage 2 at most"
        )
    return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are no wrappers, by the names that they have without wrappers."""
    return {original_name(model, name): module for name, module in model.named_modules() if _inside(module) is None}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters, as ``model.named_parameters()`` has them without wrappers."""
    if not any(_inside(module) is not None for module in modules_of(model)):  # to follow every name takes long
        yield from model.named_parameters()
        return
    for name, p in model.named_parameters():
        yield original_name(model, name), p


def original_name(model: nn.Module, name: str) -> str:
    """The name that a parameter, a buffer or a module has without wrappers.

    Args:
        model: The network, which may be wrapped.
        name: The name in the network, with the parts of all wrappers, of some, or of none.

    Returns:
        The name without them.

    Example:
        >>> model = nn.Sequential(nn.DataParallel(nn.Linear(2, 3)))
        >>> [original_name(model, name) for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    parts, module = [], model
    for part in name.split("."):
        while (inside := _inside(module)) not in (None, part):
            module = getattr(module, inside)
        if inside is None:
            parts.append(part)
        module = getattr(module, part, None)  # type: ignore[assignment]
    return ".".join(parts)
