"""Networks whose layers ``torch.distributed.tensor.parallel`` divides over processes.

The parameters of such a layer are DTensors, and so are the tensors that the layer's nodes save and the cotangents that
reach them. A DTensor stands for the whole tensor, of which each process holds a shard, a copy, or a term of a sum. So
the graph of these nodes is that of the undivided layer, and the rules are right for it if they read whole tensors
(:func:`whole`, :func:`with_whole_tensors`). This sums up the terms of a sum before anything is squared.

Between such layers the processes compute with ordinary tensors (``to_local``, ``from_local``). A parameter there has
whole gradients only if every process has the whole activations. :func:`check_local_parts` refuses all others: each
process would square its term of a sum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .factors import Factors
from .graph import Taps, UnsupportedError, Use
from .owners import Owned, State, Unknown
from .rules import factors_of, has_rule
from .transfers import transfer

# Nodes between ordinary tensors and DTensors, and from one placement of a DTensor to another.
TO_LOCAL, FROM_LOCAL, REDISTRIBUTE = "_ToTorchTensorBackward", "_FromTorchTensorBackward", "RedistributeBackward"
BETWEEN = frozenset({TO_LOCAL, FROM_LOCAL, REDISTRIBUTE})


def is_distributed(t: Any) -> bool:
    """Whether a tensor is a DTensor; torch.distributed.tensor is not imported for the answer."""
    return hasattr(t, "full_tensor")


def whole(t: Any) -> Any:
    """The whole of a DTensor, as an ordinary tensor on each process; anything else unchanged."""
    return t.full_tensor() if is_distributed(t) else t


class _WholeNode:
    """An autograd node whose saved DTensors are read as whole tensors."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._node, name)
        return tuple(map(whole, found)) if name == "saved_tensors" else whole(found)


def with_whole_tensors(use: Use) -> Use:
    """The same use of a parameter, at a node that is read through :func:`whole`."""
    found = copy.copy(use)
    found.node = _WholeNode(use.node)  # type: ignore[assignment]
    return found


def factors_of_use(use: Use, cotangents: Sequence[Tensor | None], n: int, alone: bool) -> Factors:
    """The factors of a use, from whole tensors where the layer is divided over processes; ``alone`` as there."""
    if not any(map(is_distributed, cotangents)):
        return factors_of(use, cotangents, n, alone)
    if not has_rule(use):
        raise UnsupportedError(
            f"the parameter {use} is divided over processes, and its layer has no rule: leave it out with "
            "parameters=..., or the layer undivided"
        )
    return factors_of(with_whole_tensors(use), [whole(g) for g in cotangents], n, alone)


@transfer("_ToTorchTensor", "_FromTorchTensor", "Redistribute")
def _same_entries(node: Node, owner: Owned, n: int) -> Sequence[State | None]:
    """Examples own the same positions of the whole tensor and of a shard along another axis."""
    placements = () if node.name() == REDISTRIBUTE else _placements(node)
    if any(getattr(placement, "dim", None) == owner.axis for placement in placements):
        return [Unknown(f"the autograd node {node.name()} divides the axis of the examples over processes")]
    return [owner]


def check_local_parts(taps: Taps, parameters: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError where an ordinary tensor is only a part on each process, and the result needs the whole.

    The nodes with ordinary tensors fall into parts of the graph that only nodes of ``BETWEEN`` connect. Within such a
    part, the tensors are whole if all placements at its borders say so.
    """
    names = taps.ownership.names
    if BETWEEN.isdisjoint(names):
        return
    wanted = {id(p): name for name, p in parameters.items()}
    above: dict[Node, Node] = {}  # a node of the same part of the graph

    def part_of(node: Node) -> Node:
        while node in above:
            node = above[node]
        return node

    order = taps.ownership.order
    ordinary = {order[0]: True}  # whether the output of a node is an ordinary tensor
    borders: list[tuple[Node, str]] = []
    complete: list[Node] = []  # nodes that give an ordinary tensor which is whole, and take its cotangents as whole
    leaves: list[tuple[Node, str]] = []
    for node, kind in zip(order, names, strict=True):
        outside = ordinary[node]
        inside = outside if kind not in (TO_LOCAL, FROM_LOCAL) else kind == FROM_LOCAL
        if kind == TO_LOCAL and (divided := _divided(node)):
            borders.append((node, divided))
        elif kind == TO_LOCAL:
            complete.append(node)
        for child, _ in node.next_functions:
            if child is None:
                continue
            variable = getattr(child, "variable", None)
            ordinary[child] = inside
            if kind == FROM_LOCAL and (divided := _divided(node)):
                borders.append((child, divided))
            if variable is not None and inside and id(variable) in wanted:
                leaves.append((child if kind == FROM_LOCAL else node, wanted[id(variable)]))
            elif variable is None and inside and outside and part_of(child) is not part_of(node):
                above[part_of(child)] = part_of(node)
    partial = {part_of(node): why for node, why in borders}
    if (why := partial.get(part_of(order[0]))) is not None:
        raise UnsupportedError(
            f"the parameter {min(parameters)!r} and others have no exact result: the output is computed from tensors "
            f"of which each process has a part ({why}). Let the last layer return the whole on each process "
            "(output_layouts=Replicate())"
        )
    for node in complete:
        if (why := partial.get(part_of(node))) is not None:
            raise UnsupportedError(
                f"the parameter {min(parameters)!r} and others have no exact result: a whole DTensor is turned into "
                f"ordinary tensors among others of which each process has a part ({why}), so that its cotangents are "
                "terms of a sum: say so by to_local(grad_placements=[Partial()])"
            )
    for node, name in leaves:
        if (why := partial.get(part_of(node))) is not None:
            raise UnsupportedError(
                f"the parameter {name!r} is an ordinary tensor among activations of which each process has a part "
                f"({why}), so that each process has a term of its gradients: divide its layer over the processes, too "
                "(parallelize_module), or leave it out with parameters=..."
            )


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError where a parameter is a DTensor whose shards are terms of a sum."""
    for name, p in parameters.items():
        if is_distributed(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"the parameter {name!r} is a sum of which each process has a term ({p.placements}): "  # type: ignore[attr-defined]
                "redistribute it as shards or copies"
            )


def check_transformed(name: str, parameter: Tensor) -> None:
    """Raise UnsupportedError for a DTensor whose gradients would have to be taken through a transformation."""
    if is_distributed(parameter):
        raise UnsupportedError(
            f"the parameter {name!r} is divided over processes and transformed before use, or used in different ways: "
            "leave it out with parameters=..., or its layer undivided"
        )


def check_whole(output: Tensor, cotangents: Tensor) -> None:
    """Raise ValueError where an output or its cotangents are DTensors."""
    if is_distributed(output) or is_distributed(cotangents):
        raise ValueError("the output or a cotangent is a DTensor: take its full_tensor()")


def _placements(node: Any) -> Sequence[Any]:
    """The placements at a node from or to ordinary tensors."""
    if node.name() == TO_LOCAL:
        return node.dtensor_spec.placements
    found = getattr(node, "forward_input_placements", None)
    return node.previous_placement if found is None else found  # its name in older versions of torch


def _divided(node: Any) -> str:
    """The placements of an ordinary tensor that is not whole, or whose cotangents are not; empty if both are."""
    mesh = node.dtensor_spec.mesh if node.name() == TO_LOCAL else _mesh(node)
    every = [_placements(node), getattr(node, "grad_placements", None) or ()]
    for placements in every:
        for axis, placement in enumerate(placements):
            if not placement.is_replicate() and mesh.size(axis) > 1:
                return str(tuple(placements))
    return ""


def _mesh(node: Any) -> Any:
    found = getattr(node, "forward_input_device_mesh", None)
    return node.previous_device_mesh if found is None else found
