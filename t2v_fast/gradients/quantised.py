"""Frozen layers with quantised weights: the nodes of bitsandbytes, and the packing that takes their derivative away.

A quantised weight is no parameter that could be wanted. A backward pass only goes through its layer, to the adapters
below. On CPUs with AVX-512 and bfloat16, bitsandbytes packs the weights of its 4-bit layers the first time that they
run in evaluation mode on an input that needs no gradient. The kernel for packed weights has no derivative: torch warns,
and takes the gradient of the layer's input to be zero. So one evaluation under ``torch.no_grad()`` is enough to make
all later gradients of the adapters below wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .members import modules_of

# The kinds of nodes of layers y = x W^T + b with a quantised W, which are functions written in Python.
LINEAR = ("MatMul4Bit", "MatMul8bitLt", "MatMul8bitFp")
_PACKS = "support_avx512bf16_for_cpu"  # the attribute of a 4-bit layer that lets it pack its weight


def is_quantised(parameter: Tensor) -> bool:
    """Say whether a tensor of a floating-point type holds numbers of another type, as quantised weights of torchao do.

    Args:
        parameter: A parameter.

    Returns:
        Whether the parameter is quantised, so that it has no gradient.
    """
    flatten = getattr(parameter, "__tensor_flatten__", None)  # of tensors that wrap other tensors
    if flatten is None:
        return False
    wrapped = (getattr(parameter, name) for name in flatten()[0])
    return any(isinstance(t, Tensor) and t.dtype != parameter.dtype for t in wrapped)


def unpack(model: nn.Module) -> list[nn.Module]:
    """Unpack the weights of 4-bit layers, and keep them from being packed.

    Args:
        model: The network.

    Returns:
        The layers that may pack their weights, for :func:`allow_packing`.
    """
    layers = [module for module in modules_of(model) if vars(module).get(_PACKS, False)]
    for layer in layers:
        setattr(layer, _PACKS, False)
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # bitsandbytes unpacks a weight to save it, and leaves it so
    return layers


def allow_packing(layers: Iterable[nn.Module]) -> None:
    """Let layers pack their weights again, the next time that they run without gradients."""
    for layer in layers:
        setattr(layer, _PACKS, True)
