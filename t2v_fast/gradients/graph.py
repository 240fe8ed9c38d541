"""Find where parameters are used in the autograd graph of a forward pass, and run backward passes through the graph.

The network runs unchanged: its autograd graph, not its modules, tells what was computed.
:mod:`t2v_fast.gradients.ownership` divides the graph into two parts. Examples own the outputs of the nodes in the first
part, which starts at the network's output. All examples share the outputs of the nodes in the second part, such as the
nodes that standardise a weight.

A *tap* is a node of the first part that a wanted parameter enters, either directly or through nodes of the second
part. Per-example gradients are computed at the taps, from the cotangents that reach them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from .attention import APART
from .owners import OWNERS, Interacting, Owned, Owner, RowLayout, Shape, Shared, Sole, Unknown
from .ownership import LEAF, Ownership, dense
from .stacks import Stack, stacks_of
from .transfers import ELEMENTWISE, FAST_CONVOLUTIONS, input_shape, kind_of


def bias_slot(node: Node) -> int:
    """The input of a layer's node that is its bias, if it has one."""
    return 0 if node.name() == "AddmmBackward0" else 2


class UnsupportedError(RuntimeError):
    """Raised where no exact per-example gradient exists; the message names the parameter and the autograd node.

    Example:
        A dropout in training mode leaves no example a gradient of its own:

        >>> import torch
        >>> import t2v_fast
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5)).train()
        >>> try:
        ...     with t2v_fast.FisherRecorder(network) as recorder:
        ...         recorder.backward(network(torch.ones(2, 4)), torch.ones(2, 3))
        ... except t2v_fast.UnsupportedError as error:
        ...     print(error)
        the layer '1' (Dropout, p=0.5) is in training mode and draws random numbers: call eval() on the network
    """


@dataclass(eq=False)
class Use:
    """One input of a tap that wanted parameters enter.

    Usually the input is one parameter, either itself or seen through the views and transposes named in ``chain``.
    Otherwise the nodes ``between`` compute the input from ``parameters``.
    """

    parameters: tuple[str, ...]
    node: Node
    slot: int  # the number of the input
    shape: Shape  # of the input, as the node sees it
    owners: tuple[Owner | None, ...]  # of each output of the node
    shared: bool = True  # whether all examples use all of the input, as they use a weight
    chain: tuple[str, ...] = ()
    between: frozenset[str] = frozenset()
    stack: Stack | None = None  # which matrices of the parameter a matrix product reads, if it is a stack of them
    kept: dict[str, Any] = field(default_factory=dict, init=False)  # small things that serve all cotangents

    @cached_property
    def parameter(self) -> str:
        """The first of the parameters; usually the only one."""
        return self.parameters[0]

    @property
    def source(self) -> GradientEdge:
        """The edge along which gradients of the input leave the node."""
        return GradientEdge(*self.node.next_functions[self.slot])

    @cached_property
    def direct(self) -> bool:
        """Whether a view, or one transpose, turns the gradient of the input into the gradient of the parameter.

        Only the rule of matrix products handles a transpose.
        """
        if self.between:
            return False
        exchanged = sum(name in TRANSPOSES for name in self.chain)
        factor = self.node.name() == "MmBackward0" or (self.node.name() == "AddmmBackward0" and self.slot > 0)
        return not exchanged or (factor and all(name in _MATRIX_TRANSPOSES for name in self.chain))

    @property
    def transposed(self) -> bool:
        """Whether the parameter is a matrix that the node sees transposed."""
        return self.direct and sum(name in TRANSPOSES for name in self.chain) % 2 == 1

    @property
    def is_weight(self) -> bool:
        """Whether the input is the weight of a convolution or of a matrix product."""
        kind = kind_of(self.node.name())
        return kind in _FIRST_WEIGHT and self.slot >= _FIRST_WEIGHT[kind]

    @property
    def rearranged(self) -> bool:
        """Whether the nodes in between only pick and move entries, and compute nothing."""
        return self.between <= _REARRANGING

    def __str__(self) -> str:
        names = " and ".join(map(repr, self.parameters[:3])) + (" and others" if len(self.parameters) > 3 else "")
        return f"{names} (input {self.slot} of {self.node.name()})"


@dataclass(frozen=True)
class Taps:
    """All uses of the wanted parameters in one graph."""

    uses: Mapping[Node, Sequence[Use]]  # in the order of the backward pass
    unused: frozenset[str]  # wanted parameters that the output does not depend on
    order: Sequence[Node]  # the whole graph, each node before the nodes that its gradients flow to
    ownership: Ownership
    unknown: Mapping[str, str]  # wanted parameters below a tensor with unknown owners: why they are unknown
    interacting: Mapping[str, str]  # wanted parameters below a tensor where examples interact: how they interact

    def __iter__(self) -> Iterator[Use]:
        return (use for uses in self.uses.values() for use in uses)

    @cached_property
    def last(self) -> list[Node]:
        """The taps below which there is no other tap. A backward pass stops here and never runs these nodes."""
        below: set[Node] = set()  # nodes from which a tap can be reached
        last = []
        for node in reversed(self.order):
            if any(child in below or child in self.uses for child, _ in node.next_functions):
                below.add(node)
            elif node in self.uses:
                last.append(node)
        return last

    @cached_property
    def ends(self) -> tuple[list[GradientEdge], list[Node]]:
        """The outputs of the last taps, as edges at which a backward pass ends, and the other taps."""
        edges = [GradientEdge(node, number) for node in self.last for number in range(len(node._input_metadata))]
        last = set(self.last)
        return edges, [node for node in self.uses if node not in last]

    def of(self, parameters: Set[str]) -> Taps:
        """Restrict the uses to those of some parameters."""
        if all(parameters.issuperset(use.parameters) for use in self):
            return self
        uses = {node: [use for use in found if parameters & {*use.parameters}] for node, found in self.uses.items()}
        return replace(self, uses={node: found for node, found in uses.items() if found})


def find_taps(
    output: Tensor,
    parameters: Mapping[str, Tensor],
    met: Callable[[Node, str], None] = lambda node, name: None,
    tell_apart: bool = False,
    segments: Tensor | None = None,
) -> Taps:
    """Find every use of ``parameters`` (name -> tensor that requires gradients) in the graph of ``output``.

    ``met(node, name)`` is called for each node before the node's inputs are looked at.

    ``tell_apart`` decides what happens where one example reads a part of another example's activations. Without
    ``tell_apart`` the examples are taken to interact. With it, the owners are found entry by entry, because the part
    that is read may hold nothing of the other example (a class token, for instance).

    ``segments`` [T] are the examples of a packed row, whose output is [1, T, ...], as in :class:`Ownership`.
    """
    names = {id(p): name for name, p in parameters.items()}
    ownership = Ownership(output, met, segments=segments)
    if tell_apart and (ownership.conflict or ownership.interacting):
        ownership = Ownership(output, met, exact=True, segments=segments)
    states = ownership.states
    uses: dict[Node, list[Use]] = {}
    unknown: dict[str, str] = {}
    interacting: dict[str, str] = {}
    below: dict[Node, tuple[tuple[str, ...], frozenset[str]]] = {}
    views = _parameter_views(ownership)
    stacks, passed = stacks_of(ownership)
    for node, owners in ownership.owners.items():
        if node in passed:
            continue  # the products that read the matrices of a stack are the taps
        is_complex = node._input_metadata[0].dtype.is_complex
        for slot, edge in enumerate(node.next_functions):
            child = edge[0]
            if child is None:
                continue
            state = states.get(edge)
            found = views.get(child)
            if found is not None:
                name = names.get(id(found[0]))
                if name is None or node in views:  # the node that uses the view is the tap
                    continue
                wanted, chain, between = (name,), found[1], frozenset()
            elif state is None or isinstance(state, OWNERS):
                read = stacks.get((node, slot))
                if read is not None and read.alone and id(read.variable) in names:
                    shape, between = input_shape(node, slot), frozenset(step.name() for step in read.path)
                    of = (names[id(read.variable)],)
                    uses.setdefault(node, []).append(Use(of, node, slot, shape, owners, True, (), between, read.stack))
                continue
            else:
                if child not in below:
                    below[child] = parameters_below(child, names)
                (wanted, between), chain = below[child], ()
            if wanted and (is_complex or child._input_metadata[edge[1]].dtype.is_complex):
                why = f"it enters {node.name()} with complex numbers, whose gradients are not squared by example here"
                unknown.update(dict.fromkeys(wanted, why))
            elif isinstance(state, Unknown):
                unknown.update(dict.fromkeys(wanted, state.reason))
            elif not all(owner is None or isinstance(owner, OWNERS) for owner in owners):
                why = f"{node.name()} shows some of its parts to all examples, and others to one of them"
                unknown.update(dict.fromkeys(wanted, why))
            elif isinstance(state, Interacting) and found is None:
                interacting.update(dict.fromkeys(wanted, state.reason))
            elif isinstance(state, Owned) and isinstance(state.rows, RowLayout) and kind_of(node.name()) in ELEMENTWISE:
                interacting[wanted[0]] = (
                    f"along its axis {state.axis} it has entries of its own for each of the {ownership.n} examples of "
                    "this batch, which cannot be shared out to those of another"
                )
            elif wanted:
                shared = isinstance(state, Shared)
                read = stacks.get((node, slot)) if shared or isinstance(owners[0], Sole) else None
                stack = read.stack if read is not None and (names.get(id(read.variable)),) == wanted else None
                use = Use(wanted, node, slot, input_shape(node, slot), owners, shared, chain, between, stack)
                uses.setdefault(node, []).append(use)
    if segments is not None:
        interacting = {name: why if APART in why else f"{why} ({APART})" for name, why in interacting.items()}
    for at_node in uses.values():  # the sums of a bias may come with those of its layer's weight
        at_node.sort(key=lambda use: use.slot == bias_slot(use.node))
    reached = {name for found in uses.values() for use in found for name in use.parameters}
    unused = frozenset(names.values()) - reached - unknown.keys() - interacting.keys()
    return Taps(uses, unused, ownership.order, ownership, unknown, interacting)


def _parameter_views(ownership: Ownership) -> dict[Node, tuple[Tensor, tuple[str, ...]]]:
    """The nodes whose output is a parameter seen through views and transposes: the parameter and the nodes' names."""
    found: dict[Node, tuple[Tensor, tuple[str, ...]]] = {}
    for node, name in zip(reversed(ownership.order), reversed(ownership.names), strict=True):
        if name == LEAF:
            found[node] = node.variable, ()
        elif name in _MOVING:
            child = node.next_functions[0][0]
            if child in found:
                variable, chain = found[child]
                if name == "TransposeBackward0" and (node._saved_dim0 - node._saved_dim1) % max(1, variable.dim()) == 0:
                    name = "AliasBackward0"  # the transpose exchanges an axis with itself
                elif name == "PermuteBackward0" and len(node._saved_dims) == 2:  # from matrix.T, for instance
                    name = "TBackward0" if node._saved_dims[0] % 2 else "AliasBackward0"
                found[node] = variable, (name, *chain)
    return found


def parameters_below(root: Node, names: Mapping[int, str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The wanted parameters below ``root``, and the names of ``root`` and of all nodes below it except the leaves."""
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


def nearest_parameter(root: Node, names: Mapping[int, str]) -> str | None:
    """The wanted parameter with the fewest nodes between itself and ``root``, which it lies below."""
    queue, seen = deque([root]), {root}
    while queue:
        node = queue.popleft()
        if id(getattr(node, "variable", None)) in names:
            return names[id(node.variable)]
        children = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(children)
        queue.extend(children)
    return None


def views_of(node: Node | None) -> tuple[Tensor, tuple[str, ...]] | None:
    """The parameter that ``node`` shows through views and transposes alone, and their names; None if there is none."""
    chain: list[str] = []
    while node is not None and ((name := node.name()) in VIEWS or name in TRANSPOSES):
        chain.append(name)
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)  # only AccumulateGrad has one
    return None if variable is None else (variable, tuple(chain))


def backpropagate(
    output: Tensor,
    cotangent: Tensor,
    taps: Taps,
    visit: Callable[[Node, tuple[Tensor | None, ...]], None],
    retain_graph: bool,
) -> None:
    """Run one backward pass of ``cotangent`` from ``output``, and call ``visit(node, cotangents)`` at each tap.

    ``cotangents`` has one entry for each output of the node. All entries are None where the pass runs the node without
    a cotangent. What the node has saved is gone afterwards, unless the graph is kept. The pass computes no weight
    gradient, and stops at the last taps. ``visit`` sees the caller's context variables.
    """

    # Autograd calls the hooks of CUDA nodes on a thread of its own, where context variables have their defaults. Hooks
    # of two devices may run at once, and only one thread at a time can be in a context: each call gets a copy.
    context, caller = copy_context(), get_ident()

    def hook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def pre(gradients: tuple[Tensor | None, ...]) -> None:
            if get_ident() == caller and not torch.is_grad_enabled():  # the usual case on a CPU
                visit(node, gradients)
                return
            with torch.no_grad():
                context.copy().run(visit, node, gradients)

        return pre

    ends, others = taps.ends
    handles = [node.register_prehook(hook(node)) for node in others]
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
            "activation checkpointing lets what the layers saw be read only once, because the forward pass did not run "
            "in the thread and the context of the recorder: run it there, or switch checkpointing off"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def fix_batch_norm_gradients(nodes: Iterable[Node]) -> None:
    """Correct the gradients that torch computes for batch norms of a single image on a CPU.

    torch's kernel takes a cotangent [1, C, H, W] to be in the memory format of the layer's input. Where the formats
    differ, the gradients of the input, the weight and the bias are wrong (torch 2.13 and 2.14, in training and in
    evaluation mode). A hook on each such node brings the cotangent into the input's format.
    """
    for node in nodes:
        if node.name() != "NativeBatchNormBackward0":
            continue
        metadata = node._input_metadata[0]
        if metadata.device.type == "cpu" and len(metadata.shape) == 4 and metadata.shape[0] == 1:
            _bring_into(node, image_format(node._saved_input))


def image_format(x: Tensor) -> torch.memory_format:
    """The memory format in which torch's batch norms on a CPU read a single image [1, C, H, W] and its cotangent."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def keep_channels_last(taps: Taps) -> None:
    """Bring the cotangents of means over all pixels into the memory format of the channels-last images below.

    torch gives them in its usual format. A ReLU on a CPU that reads a cotangent in another format than its own
    activations takes thirty times as long. On a CUDA device the cotangents would keep this format down to the first
    strided convolution, and each layer would copy them.
    """
    for node, name in zip(taps.order, taps.ownership.names, strict=True):
        if name != "MeanBackward1" or len(node._saved_self_sym_sizes) != 4:
            continue
        below = node.next_functions[0][0]
        if below is None or below.name() != "ReluBackward0":
            continue
        x = below._saved_result
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            _bring_into(below, torch.channels_last)


_FORMAT = "t2v_fast: the memory format of the cotangent"


def _bring_into(node: Node, wanted: torch.memory_format) -> None:
    """Bring the cotangent of a node into a memory format in every pass. A graph that is kept gets one hook a node."""
    if _FORMAT not in node.metadata:
        node.metadata[_FORMAT] = wanted
        node.register_prehook(partial(_in_format, wanted))


def _in_format(wanted: torch.memory_format, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, the first of them in the wanted memory format."""
    if gradients[0] is None:
        return gradients
    return gradients[0].contiguous(memory_format=wanted), *gradients[1:]


def onward(use: Use, parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """The map from gradients [k, entries] of a node's input to those of a parameter that the input is computed from."""
    if use.direct:
        return lambda t: t

    def pull(t: Tensor) -> Tensor:
        child, number = use.node.next_functions[use.slot]
        assert child is not None  # parameters enter this input
        dtype = child._input_metadata[number].dtype
        gradients = t.view(-1, *use.shape).to(dtype)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            (g,) = torch.autograd.grad([use.source], [parameter], [gradients], is_grads_batched=True, **options)
        except (RuntimeError, NotImplementedError):  # a function that does not support batched gradients
            each = [torch.autograd.grad([use.source], [parameter], [g], **options)[0] for g in gradients]
            g = torch.stack([dense(part) for part in each])
        return g.reshape(len(g), parameter.numel()).to(t.dtype)

    return pull


# ---- names of autograd nodes

# Nodes with one input that leave its entries unchanged and in the same order.
VIEWS = frozenset(
    f"{name}Backward{version}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Alias")
    for version in range(3)
)
# Nodes that exchange axes.
TRANSPOSES = frozenset({"TBackward0", "TransposeBackward0", "PermuteBackward0"})
# Other nodes that only pick entries, repeat them or join them.
SELECTIONS = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Narrow", "Diagonal", "AsStrided"),
        *("Index", "IndexSelect", "Gather", "Embedding", "Expand", "Repeat", "RepeatInterleave", "Cat", "Stack"),
        *("Flip", "Roll", "ConstantPadNd"),
    )
    for version in range(3)
)
_MOVING = VIEWS | TRANSPOSES
_REARRANGING = _MOVING | SELECTIONS
# Nodes through which a matrix product may see a weight that is a transposed matrix.
_MATRIX_TRANSPOSES = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0"})
# Layers with a weight, and the number of the first input that may be the weight.
_FIRST_WEIGHT = {
    **dict.fromkeys(("Convolution", *FAST_CONVOLUTIONS, "OneDnnLinear"), 1),
    "Mm": 0,
    "Bmm": 0,
    "Addmm": 1,
    "Baddbmm": 1,
}
