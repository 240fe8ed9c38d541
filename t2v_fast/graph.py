"""Walk the autograd graph of a forward pass: where each parameter is used, and which rows belong to which example.

The probe runs unchanged; its graph, not its modules, says what was computed. The graph has two parts. Nodes whose
output has examples, from the network's output downwards; and nodes that see parameters alone, such as the
standardisation of a weight. A *tap* is a node of the first part that a wanted parameter enters, itself or by way of
the second part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

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
# Nodes behind which parameters are used that the graph does not show, and what to do about them.
HIDING = {
    "CompiledFunctionBackward": "torch.compile hides the layers: pass the module that was compiled (its _orig_mod)",
    "CheckpointFunctionBackward": "activation checkpointing hides the layers: switch it off",
}


class UnsupportedError(RuntimeError):
    """No exact per-example gradient can be had; the message names the parameter and the autograd node."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """One use of wanted parameters: input ``slot`` of ``node``.

    Mostly that input is one parameter, itself or through the views and transposes named in ``chain``; else it is
    computed from ``parameters`` by the nodes ``between``.
    """

    parameters: tuple[str, ...]
    node: Node
    slot: int
    shape: Shape  # of that input, as the node sees it
    chain: tuple[str, ...] = ()
    between: frozenset[str] = frozenset()
    number: int = 0  # among the uses of its first parameter

    @property
    def parameter(self) -> str:
        return self.parameters[0]

    @property
    def key(self) -> str:
        """Tells it from all other uses."""
        return f"{self.parameter}#{self.number}"

    @property
    def source(self) -> GradientEdge:
        """Where gradients of that input flow to."""
        return GradientEdge(*self.node.next_functions[self.slot])

    @cached_property
    def direct(self) -> bool:
        """Whether the gradient in the parameter's own shape follows from the node's by a view, or one transpose."""
        if self.between:
            return False
        exchanged = sum(name in TRANSPOSES for name in self.chain)
        return not exchanged or (len(self.shape) == 2 and all(name in _PLAIN for name in self.chain))

    @property
    def transposed(self) -> bool:
        """Whether the node sees a parameter, which is a matrix, with its two axes exchanged."""
        return self.direct and sum(name in TRANSPOSES for name in self.chain) % 2 == 1

    @property
    def rearranged(self) -> bool:
        """Whether nothing is computed on the way: entries are only picked and moved."""
        return self.between <= VIEWS | TRANSPOSES | SELECTIONS

    def __str__(self) -> str:
        names = " and ".join(map(repr, self.parameters[:3])) + (" and others" if len(self.parameters) > 3 else "")
        return f"{names} (input {self.slot} of {self.node.name()})"


_PLAIN = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0"})  # of a matrix


@dataclass(frozen=True)
class Taps:
    """All uses of the wanted parameters in one graph, and where its backward pass may stop."""

    uses: Mapping[Node, Sequence[Use]]  # in backward order
    unused: frozenset[str]  # wanted parameters that the output does not depend on
    both: frozenset[str]  # wanted parameters behind nodes that belong to both parts of the graph
    order: Sequence[Node]  # the first part of the graph, each node before those that its gradients flow to

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
        uses = {node: [use for use in found if parameters & {*use.parameters}] for node, found in self.uses.items()}
        return replace(self, uses={node: found for node, found in uses.items() if found})


def input_shape(node: Node, slot: int) -> Shape:
    """Of what enters a node there."""
    child, number = node.next_functions[slot]
    variable = getattr(child, "variable", None)
    return tuple(child._input_metadata[number].shape if variable is None else variable.shape)


def views_of(node: Node | None) -> tuple[Tensor, tuple[str, ...]] | None:
    """The parameter behind ``node``, if nothing but views and transposes lies between, and their names."""
    chain: list[str] = []
    while node is not None and ((name := node.name()) in VIEWS or name in TRANSPOSES):
        chain.append(name)
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)  # only AccumulateGrad has one
    return None if variable is None else (variable, tuple(chain))


def find_taps(
    output: Tensor, parameters: Mapping[str, Tensor], shared: Callable[[Node, int], bool] = lambda node, slot: False
) -> Taps:
    """Every use of ``parameters`` (name -> tensor, requiring gradients) in the graph of ``output``.

    ``shared(node, slot)`` says whether that input is one for all examples, where it is not simply a parameter, viewed
    or transposed.
    """
    names = {id(p): name for name, p in parameters.items()}
    uses: dict[Node, list[Use]] = {}
    count: dict[str, int] = {}
    second: set[Node] = set()
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output.grad_fn, False)] if output.grad_fn is not None else []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        for slot, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            found = views_of(child)
            chain: tuple[str, ...] = ()
            between: frozenset[str] = frozenset()
            if found and id(found[0]) in names:
                wanted, chain = (names[id(found[0])],), found[1]
            elif shared(node, slot):
                wanted, nodes = _leaves(child, names)
                between = frozenset(n.name() for n in nodes)
                second |= nodes
            else:
                stack.append((child, False))
                continue
            if wanted:
                number = count[wanted[0]] = count.get(wanted[0], -1) + 1
                use = Use(wanted, node, slot, input_shape(node, slot), chain, between, number)
                uses.setdefault(node, []).append(use)
    order.reverse()
    reached = {name for found in uses.values() for use in found for name in use.parameters}
    both = {name for node in second & seen for name in _leaves(node, names)[0]}
    in_order = {node: uses[node] for node in order if node in uses}
    return Taps(in_order, frozenset(names.values()) - reached, frozenset(both), order)


def _leaves(root: Node, names: Mapping[int, str]) -> tuple[tuple[str, ...], set[Node]]:
    """The wanted parameters below ``root``, and all nodes from it to them, without theirs."""
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
    return tuple(wanted), nodes


def backpropagate(
    output: Tensor, cotangent: Tensor, taps: Taps, visit: Callable[[Node, Tensor], None], retain_graph: bool
) -> None:
    """One backward pass of ``cotangent`` from ``output`` that calls ``visit(node, its cotangent)`` at each tapped node.

    No weight gradient is computed, and nothing below the last taps.
    """

    def hook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def pre(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                with torch.no_grad():
                    visit(node, gradients[0])

        return pre

    last = set(taps.last)
    handles = [node.register_prehook(hook(node)) for node in taps.uses if node not in last]
    try:
        captured = torch.autograd.grad(
            [output],
            [GradientEdge(node, 0) for node in taps.last],
            [cotangent],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        with torch.no_grad():
            for node, gradient in zip(taps.last, captured, strict=True):
                if gradient is not None:
                    visit(node, gradient)
    except CheckpointError as error:
        raise UnsupportedError(
            "activation checkpointing recomputes what the layers saw, and lets it be read only once: switch it off"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def mend_batch_norms(nodes: Iterable[Node]) -> None:
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


def output_like(node: Node) -> Tensor:
    """A tensor without data, of the shape of what ``node`` put out in the forward pass and so of its cotangent."""
    return torch.empty(tuple(node._input_metadata[0].shape), device="meta")


@dataclass(frozen=True)
class RowLayout:
    """Rows of a flattened activation in terms of examples: row (a, n, b) of shape [outer, N, inner] is of example n."""

    outer: int
    inner: int

    def split(self, t: Tensor, n: int) -> Tensor:
        """[outer * n * inner, F] -> [n, outer * inner, F], a view where strides allow."""
        t = t.unflatten(0, (self.outer, n, self.inner))  # [A, N, B, F]
        if self.outer == 1:
            return t[0]
        return t.transpose(0, 1).flatten(1, 2)


@dataclass
class Layouts:
    """The row layouts of a network's taps, found once by probing and remembered across batches."""

    known: dict[tuple[str, int], RowLayout] = field(default_factory=dict)  # by use and rows per example
    _met: set[tuple[str, int, Shape]] = field(default_factory=set)  # uses at shapes whose layouts are known

    def get(self, use: Use, rows: int, n: int) -> RowLayout:
        """The layout of ``rows`` rows over ``n`` examples at a tap."""
        return RowLayout(1, rows) if n == 1 else self.known[use.key, rows // n]

    def probe(self, output: Tensor, taps: Taps, rows_of: Callable[[Use, Tensor], Tensor]) -> None:
        """Find the layouts of the taps that are not yet known.

        ``rows_of(use, g)`` views the cotangent at a tap as rows, [R, ...]. A forward pass cannot tell which of them
        belong to one example, so a cotangent is sent from one example at a time to see which rows light up, until one
        layout remains at each tap. Raises UnsupportedError where they fit no layout: there examples interact.
        """
        n = output.shape[0]
        if n == 1:
            return
        candidates: dict[Use, list[RowLayout]] = {}
        lit: dict[Use, Tensor] = {}
        new: set[tuple[str, int, Shape]] = set()
        for use in taps:
            shape = (use.key, n, tuple(use.node._input_metadata[0].shape))
            if shape in self._met:
                continue
            new.add(shape)
            count = rows_of(use, output_like(use.node)).shape[0]
            if count % n:
                raise UnsupportedError(
                    f"the parameter {use} meets {count} rows, which cannot be shared out over {n} examples: expected "
                    "an activation with all of them along one axis"
                )
            per_example = count // n
            if (use.key, per_example) not in self.known:
                divisors = [b for b in range(1, per_example + 1) if per_example % b == 0]
                candidates[use] = [RowLayout(per_example // b, b) for b in reversed(divisors)]
        if not candidates:
            self._met |= new
            return

        def visit(node: Node, g: Tensor) -> None:
            for use in taps.uses[node]:
                if use in candidates:
                    lit[use] = (rows_of(use, g) != 0).flatten(1).any(1)

        # From the middle outwards and example 0 last: row 0 belongs to example 0 in every layout and tells nothing.
        examples = sorted(range(n), key=lambda e: (e == 0, abs(e - n // 2)))
        for example in examples:
            lit.clear()
            cotangent = torch.zeros_like(output)
            cotangent[example] = torch.linspace(1, 2, output[example].numel()).view_as(output[example])
            backpropagate(output, cotangent, taps, visit, retain_graph=True)
            for use, rows in lit.items():
                left = []
                for layout in candidates[use]:
                    mine = rows.view(layout.outer, n, layout.inner)
                    if int(mine.sum()) == int(mine[:, example].sum()):
                        left.append(layout)
                if not left:
                    raise UnsupportedError(
                        f"the parameter {use}: a cotangent on example {example} alone reaches rows of other examples; "
                        "examples interact in this network, so per-example gradients do not exist"
                    )
                candidates[use] = left
            if all(len(left) == 1 for left in candidates.values()):
                break
        for use, left in candidates.items():
            # Where several remain they agree on every row that any cotangent can reach.
            self.known[use.key, left[0].outer * left[0].inner] = left[0]
        self._met |= new
