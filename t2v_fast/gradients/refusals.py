"""Refuse what has no exact answer: hidden layers, examples that interact, layers that draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .fast_layers import NODES
from .graph import Taps, UnsupportedError, find_taps, nearest_parameter, parameters_below
from .members import modules_of, name_of
from .ownership import PASSING, Ownership
from .quantised import LINEAR
from .tensor_parallel import BETWEEN, check_local_parts

# Nodes that hide the parameters used behind them from the graph, and what the user can do.
HIDING = {
    "CompiledFunctionBackward": "a compiled function hides its layers. Run the forward pass within the recorder's "
    "context, and call torch.compile before that; or pass the function as it was before it was compiled",
    "CheckpointFunctionBackward": "activation checkpointing hides the layers. It is not torch.utils.checkpoint, or "
    "the forward pass did not run in the thread and the context of the recorder. Switch it off otherwise",
}

# The node of an operator without a derivative. Autograd warns, and sends no gradient to what is below.
WITHOUT_DERIVATIVE = "torch::autograd::WarnNotImplemented"
# Functions written in Python that use no other parameters than those that enter them.
_OPEN = {*NODES, *BETWEEN, PASSING, *(f"{kind}Backward" for kind in LINEAR)}


def taps_of(
    output: Tensor, parameters: Mapping[str, Tensor], tell_apart: bool = False, segments: Tensor | None = None
) -> Taps:
    """Find every use of ``parameters`` in the graph of ``output`` [N, ...]; other arguments as in :func:`find_taps`.

    Raises UnsupportedError where a node of the graph hides layers, or where examples interact.
    """
    custom: list[str] = []
    names = {id(p): name for name, p in parameters.items()}

    def met(node: Node, name: str) -> None:
        if why := HIDING.get(name):
            raise UnsupportedError(f"the autograd node {name} is in the way: {why}")
        if name in ("CudnnRnnBackward0", "MiopenRnnBackward0") and not getattr(node, "_saved_train", True):
            raise UnsupportedError(
                "the recurrent layers of cuDNN and MIOpen (LSTM, GRU, RNN) have no backward pass in eval mode: run the "
                "network within `with torch.backends.cudnn.flags(enabled=False):`"
            )
        if name == WITHOUT_DERIVATIVE and (below := parameters_below(node, names)[0]):
            raise UnsupportedError(
                f"the parameter {below[0]!r} lies below an operator without a derivative, which keeps a part of its "
                "gradient back (autograd only warns): replace the operator, or leave the parameter out with "
                "parameters=.... A 4-bit layer of bitsandbytes has such an operator once its weight is packed: run the "
                "forward pass inside the recorder's context, which unpacks it"
            )
        if isinstance(node, torch.autograd.function.BackwardCFunction) and name not in _OPEN:
            custom.append(name)

    taps = find_taps(output, parameters, met, tell_apart, segments)
    if taps.unused and custom:
        raise UnsupportedError(
            f"the parameter {min(taps.unused)!r} is nowhere in the autograd graph, and the custom function "
            f"{custom[0]}, which is, may hide it: leave the parameter out with parameters=..., or the function"
        )
    if (why := taps.ownership.interacting) is not None:
        raise UnsupportedError(
            f"the parameter {min(parameters)!r} and others have no per-example gradients: in what is computed from the "
            f"network's input, {why}. Change the layer that mixes examples{_place_of(taps.ownership, names)}"
        )
    sharded = [name for name in sorted(taps.unused) if _is_sharded(parameters[name])]
    if sharded:
        raise UnsupportedError(
            f"the parameter {sharded[0]!r} is a DTensor that the output does not depend on, as where FSDP2 "
            "(fully_shard) gathers parameters outside of the graph: run the forward pass inside the recorder's context"
        )
    if parameters and taps.unused == parameters.keys():
        raise UnsupportedError(
            f"the output depends on none of the wanted parameters ({min(parameters)!r}, ...): run the forward pass "
            "inside the recorder's context, with the same network, and without detaching"
        )
    check_local_parts(taps, parameters)
    for name, why in taps.interacting.items():
        raise UnsupportedError(
            f"the parameter {name!r} has no per-example gradient: {why}. Leave it out with parameters=..., or change "
            "the layer"
        )
    return taps


def _place_of(ownership: Ownership, names: Mapping[int, str]) -> str:
    """What the layer that mixes examples reads; nothing where that needs no gradient, such as the network's input."""
    node = ownership.mixed()
    name = None if node is None else nearest_parameter(node, names)
    if node is None or name is None:
        return ""
    return f": it reads what {node.name()} computes, and the nearest parameter towards the input is {name!r}"


def _is_sharded(parameter: Tensor) -> bool:
    return type(parameter).__module__.startswith("torch.distributed.tensor")


def random_layer(model: nn.Module) -> str | None:
    """The name and type of a layer in training mode that draws random numbers; None if there is none."""
    for module in modules_of(model):
        if module.training and (kind := _random_kind(module)) is not None:
            return f"{name_of(model, module)!r} ({kind})"
    return None


def _random_kind(module: nn.Module) -> str | None:
    """The type of a module that draws random numbers in training mode, with the attribute that says so."""
    kind = type(module).__name__
    if isinstance(module, nn.RReLU):
        return kind
    noise = getattr(module, "jitter_noise", None)  # of routers of experts
    if isinstance(noise, (int, float)) and noise > 0:
        return f"{kind}, jitter_noise={noise}"
    drops = "drop" in kind.lower() or isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return None
    for attribute in ("p", "drop_prob", "dropout") if drops else ():
        value = getattr(module, attribute, None)
        if isinstance(value, (int, float)) and value > 0:
            return f"{kind}, {attribute}={value}"
    return None


def check_segments(segments: Tensor, output: Tensor, cotangents: Tensor) -> int:
    """Return the number of sequences of a packed row. Raise ValueError where the segments do not fit the output."""
    if output.dim() < 2 or list(output.shape[:2]) != [1, len(segments)] or segments.dtype != torch.int64:
        raise ValueError(
            f"segments are {list(segments.shape)} {segments.dtype} for an output {list(output.shape)}, expected int64 "
            "[T] for [1, T, ...]"
        )
    n = int(segments.max()) + 1 if len(segments) else 0
    if n < 1 or int(segments.min()) < -1 or len(segments.unique()) < n + int((segments < 0).any()):
        raise ValueError(f"segments are numbered {segments.unique().tolist()}, expected 0, 1, ..., or -1 for padding")
    if bool((cotangents[:, 0, segments < 0] != 0).any()):
        raise ValueError("a cotangent is not zero at a position that belongs to no sequence (-1 in segments)")
    return n
