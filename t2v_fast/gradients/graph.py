"""Walk the autograd graph of a forward pass: where each parameter is used, and what the graph hides.

The probe runs unchanged; its graph, not its modules, says what was computed. :mod:`t2v_fast.gradients.ownership` tells
two parts of it apart: nodes whose output examples own, from the network's output downwards, and nodes whose output all
examples share, such as the standardisation of a weight. A *tap* is a node of the first part that a wanted parameter
enters, itself or by way of the second part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from .owners import OWNERS, Interacting, Owned, Owner, RowLayout, Shape, Shared, Unknown
from .ownership import LEAF, Ownership
from .transfers import ELEMENTWISE, base, input_shape

# Nodes of one input that leave its entries as they are, in order.
VIEWS = frozenset(
    f"{name}Backward{version}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Alias")
    for version in range(3)
)
# ... and those that exchange two axes, or all.
TRANSPOSES = frozenset({"TBackward0", "TransposeBackward0", "PermuteBackward0"})
# Other nodes that only pick entries, repeat them or put them together.
SELECTIONS = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Narrow", "Diagonal", "AsStrided"),
        *("Index", "IndexSelect", "Gather", "Embedding", "Expand", "Repeat", "RepeatInterleave", "Cat", "Stack"),
        *("Flip", "Roll", "ConstantPadNd"),
    )
    for version in range(3)
)
# Layers with a weight, and the first of their inputs that may be one.
_WEIGHTED = {
    **dict.fromkeys(("Convolution", "MatrixConvolution", "WinogradConvolution", "StridedDepthwise", "OneDnnLinear"), 1),
    "Mm": 0,
    "Bmm": 0,
    "Addmm": 1,
    "Baddbmm": 1,
}
_MOVING = VIEWS | TRANSPOSES
_REARRANGING = _MOVING | SELECTIONS
# Nodes behind which parameters are used that the graph does not show, and what to do about them.
HIDING = {
    "CompiledFunctionBackward": "torch.compile hides the layers: pass the module that was compiled (its _orig_mod)",
    "CheckpointFunctionBackward": "activation checkpointing hides the layers: switch it off",
    "RegisterPostBackwardFunctionBackward": "FSDP2 (fully_shard) gathers the parameters outside of the graph: pass the "
    "network before it is sharded",
}


class UnsupportedError(RuntimeError):
    """No exact per-example gradient can be had; the message names the parameter and the autograd node."""


@dataclass(eq=False)
class Use:
    """One use of wanted parameters: input ``slot`` of ``node``.

    Mostly that input is one parameter, itself or through the views and transposes named in ``chain``; else it is
    computed from ``parameters`` by the nodes ``between``. ``owners``: which entries of each of the node's outputs
    belong to which example. ``shared``: whether all examples use all of the input, as they use weights.
    """

    parameters: tuple[str, ...]
    node: Node
    slot: int
    shape: Shape  # of that input, as the node sees it
    owners: tuple[Owner | None, ...]
    shared: bool = True
    chain: tuple[str, ...] = ()
    between: frozenset[str] = frozenset()

    @property
    def parameter(self) -> str:
        return self.parameters[0]

    @property
    def source(self) -> GradientEdge:
        """Where gradients of that input flow to."""
        return GradientEdge(*self.node.next_functions[self.slot])

    @cached_property
    def direct(self) -> bool:
        """Whether the gradient in the parameter's own shape follows from the node's by a view, or one transpose.

        Only the rule of matrix products knows of a transpose.
        """
        if self.between:
            return False
        exchanged = sum(name in TRANSPOSES for name in self.chain)
        factor = self.node.name() == "MmBackward0" or (self.node.name() == "AddmmBackward0" and self.slot > 0)
        return not exchanged or (factor and all(name in _PLAIN for name in self.chain))

    @property
    def transposed(self) -> bool:
        """Whether the node sees a parameter, which is a matrix, with its two axes exchanged."""
        return self.direct and sum(name in TRANSPOSES for name in self.chain) % 2 == 1

    @property
    def is_weight(self) -> bool:
        """Whether it is the weight of a convolution or of a matrix product."""
        return base(self.node.name()) in _WEIGHTED and self.slot >= _WEIGHTED[base(self.node.name())]

    @property
    def rearranged(self) -> bool:
        """Whether nothing is computed on the way: entries are only picked and moved."""
        return self.between <= _REARRANGING

    def __str__(self) -> str:
        names = " and ".join(map(repr, self.parameters[:3])) + (" and others" if len(self.parameters) > 3 else "")
        return f"{names} (input {self.slot} of {self.node.name()})"


_PLAIN = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0"})  # of a matrix


@dataclass(frozen=True)
class Taps:
    """All uses of the wanted parameters in one graph, and where its backward pass may stop."""

    uses: Mapping[Node, Sequence[Use]]  # in backward order
    unused: frozenset[str]  # wanted parameters that the output does not depend on
    order: Sequence[Node]  # the whole graph, each node before those that its gradients flow to
    ownership: Ownership
    # Wanted parameters below a tensor whose owners are not known, or where examples interact, and why.
    unknown: Mapping[str, str]
    interacting: Mapping[str, str]

    def __iter__(self) -> Iterator[Use]:
        return (use for uses in self.uses.values() for use in uses)

    @cached_property
    def last(self) -> list[Node]:
        """Tapped nodes below which no other lies: they are never run themselves."""
        below: set[Node] = set()  # nodes from which a tapped node can be reached
        last = []
        for node in reversed(self.order):
            if any(child in below or child in self.uses for child, _ in node.next_functions):
                below.add(node)
            elif node in self.uses:
                last.append(node)
        return last

    def of(self, parameters: Set[str]) -> Taps:
        """The uses of some of the parameters."""
        if all(parameters.issuperset(use.parameters) for use in self):
            return self
        uses = {node: [use for use in found if parameters & {*use.parameters}] for node, found in self.uses.items()}
        return replace(self, uses={node: found for node, found in uses.items() if found})


def views_of(node: Node | None) -> tuple[Tensor, tuple[str, ...]] | None:
    """The parameter behind ``node``, if nothing but views and transposes lies between, and their names."""
    chain: list[str] = []
    while node is not None and ((name := node.name()) in VIEWS or name in TRANSPOSES):
        chain.append(name)
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)  # only AccumulateGrad has one
    return None if variable is None else (variable, tuple(chain))


def find_taps(
    output: Tensor,
    parameters: Mapping[str, Tensor],
    met: Callable[[Node, str], None] = lambda node, name: None,
    tell_apart: bool = False,
) -> Taps:
    """Every use of ``parameters`` (name -> tensor, requiring gradients) in the graph of ``output``.

    ``met(node, name)`` is called for each node, before its inputs are looked at. ``tell_apart``: where one example
    reads a part of another's activations, find out entry by entry who owns them, instead of taking it that they
    interact. That part may hold nothing of the other example, such as a class token, or be how they interact.
    """
    names = {id(p): name for name, p in parameters.items()}
    ownership = Ownership(output, met)
    if tell_apart and (ownership.conflict or ownership.interacting):
        ownership = Ownership(output, met, exact=True)
    states = ownership.states
    uses: dict[Node, list[Use]] = {}
    unknown: dict[str, str] = {}
    interacting: dict[str, str] = {}
    below: dict[Node, tuple[tuple[str, ...], frozenset[str]]] = {}
    views = _views(ownership)
    for node, owners in ownership.owners.items():
        is_complex = node._input_metadata[0].dtype.is_complex
        for slot, edge in enumerate(node.next_functions):
            child = edge[0]
            if child is None:
                continue
            state = states.get(edge)
            found = views.get(child)
            if found is not None:
                name = names.get(id(found[0]))
                if name is None or node in views:  # what uses that view has the parameter
                    continue
                wanted, chain, between = (name,), found[1], frozenset()
            elif state is None or isinstance(state, OWNERS):
                continue
            else:
                if child not in below:
                    below[child] = _leaves(child, names)
                (wanted, between), chain = below[child], ()
            if wanted and (is_complex or child._input_metadata[edge[1]].dtype.is_complex):
                why = f"it enters {node.name()} with complex numbers, whose gradients are not squared by example here"
                unknown.update(dict.fromkeys(wanted, why))
            elif isinstance(state, Unknown):
                unknown.update(dict.fromkeys(wanted, state.reason))
            elif isinstance(state, Interacting) and found is None:
                interacting.update(dict.fromkeys(wanted, state.reason))
            elif isinstance(state, Owned) and isinstance(state.rows, RowLayout) and base(node.name()) in ELEMENTWISE:
                interacting[wanted[0]] = (
                    f"along its axis {state.axis} it has entries of its own for each of the {ownership.n} examples of "
                    "this batch, which cannot be shared out to those of another"
                )
            elif wanted:
                shared = isinstance(state, Shared)
                use = Use(wanted, node, slot, input_shape(node, slot), owners, shared, chain, between)
                uses.setdefault(node, []).append(use)
    reached = {name for found in uses.values() for use in found for name in use.parameters}
    unused = frozenset(names.values()) - reached - unknown.keys() - interacting.keys()
    return Taps(uses, unused, ownership.order, ownership, unknown, interacting)


def _views(ownership: Ownership) -> dict[Node, tuple[Tensor, tuple[str, ...]]]:
    """The nodes between which and a parameter there are but views and transposes: the parameter, and their names."""
    found: dict[Node, tuple[Tensor, tuple[str, ...]]] = {}
    for node, name in zip(reversed(ownership.order), reversed(ownership.names), strict=True):
        if name == LEAF:
            found[node] = node.variable, ()
        elif name in _MOVING:
            child = node.next_functions[0][0]
            if child in found:
                variable, chain = found[child]
                if name == "TransposeBackward0" and (node._saved_dim0 - node._saved_dim1) % max(1, variable.dim()) == 0:
                    name = "AliasBackward0"  # of an axis with itself
                found[node] = variable, (name, *chain)
    return found


def _leaves(root: Node, names: Mapping[int, str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The wanted parameters below ``root``, and the names of all nodes from it to them, without theirs."""
    wanted: dict[str, None] = {}
    nodes: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            if id(variable) in names:
                wanted[names[id(variable)]] = None
        elif node not in nodes:
            nodes.add(node)
            stack.extend(child for child, _ in node.next_functions if child is not None)
    return tuple(wanted), frozenset(node.name() for node in nodes)


def backpropagate(
    output: Tensor,
    cotangent: Tensor,
    taps: Taps,
    visit: Callable[[Node, tuple[Tensor | None, ...]], None],
    retain_graph: bool,
) -> None:
    """One backward pass of ``cotangent`` from ``output`` that calls ``visit(node, cotangents)`` at each tapped node.

    The cotangents are those of the node's outputs, one at least. No weight gradient is computed, and nothing below the
    last taps.
    """

    def hook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def pre(gradients: tuple[Tensor | None, ...]) -> None:
            if any(g is not None for g in gradients):
                with torch.no_grad():
                    visit(node, gradients)

        return pre

    last = set(taps.last)
    ends = [GradientEdge(node, number) for node in taps.last for number in range(len(node._input_metadata))]
    handles = [node.register_prehook(hook(node)) for node in taps.uses if node not in last]
    try:
        captured = torch.autograd.grad(
            [output],
            ends,
            [cotangent],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        with torch.no_grad():
            found = iter(captured)
            for node in taps.last:
                gradients = tuple(next(found) for _ in node._input_metadata)
                if any(g is not None for g in gradients):
                    visit(node, gradients)
    except CheckpointError as error:
        raise UnsupportedError(
            "activation checkpointing recomputes what the layers saw, and lets it be read only once: switch it off"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def fix_batch_norm_gradients(nodes: Iterable[Node]) -> None:
    """Make the gradients right that torch computes for batch norms of a single image on a CPU.

    Its kernel mistakes a cotangent [1, C, H, W] for one in the memory format of the layer's input where they differ,
    and gives wrong gradients for the input, the weight and the bias (torch 2.13 and 2.14, in either mode).
    """
    for node in nodes:
        if node.name() != "NativeBatchNormBackward0":
            continue
        shape = node._input_metadata[0].shape
        if shape[0] != 1 or len(shape) != 4:
            continue
        node.register_prehook(partial(_in_format_of, node._saved_input))


def _in_format_of(x: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if gradients[0] is None:
        return gradients
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.channels_last if last else torch.contiguous_format
    return gradients[0].contiguous(memory_format=wanted), *gradients[1:]


def random_layer(model: nn.Module) -> str | None:
    """The name and kind of a layer in training mode that draws random numbers, if there is one."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.RReLU):
            return f"{name!r} ({kind})"
        drops = "drop" in kind.lower() or isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
        if isinstance(module, nn.RNNBase) and module.num_layers == 1:
            continue
        for attribute in ("p", "drop_prob", "dropout") if drops else ():
            value = getattr(module, attribute, None)
            if isinstance(value, (int, float)) and value > 0:
                return f"{name!r} ({kind}, {attribute}={value})"
    return None
