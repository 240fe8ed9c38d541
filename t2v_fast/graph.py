"""Walk the autograd graph of a forward pass: where each parameter is used, and which rows belong to which example.

The probe runs unchanged; its graph, not its modules, says what was computed. A *tap* is a graph node with a rule
(:mod:`t2v_fast.rules`) that a wanted parameter enters, perhaps through transposes and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# Nodes that only re-arrange or cast a parameter before a layer uses it; a rule sees their names in Use.chain.
TRANSPARENT = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0"})


class UnsupportedError(RuntimeError):
    """No exact per-example gradient can be had; the message names the parameter and the autograd node."""


@dataclass(frozen=True)
class Use:
    """One use of a parameter: input ``slot`` of ``node``, reached through the transparent nodes named in ``chain``."""

    parameter: str
    node: Node
    slot: int
    chain: tuple[str, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether the node sees the parameter with its two axes exchanged."""
        return sum(name != "ToCopyBackward0" for name in self.chain) % 2 == 1

    def __str__(self) -> str:
        return f"{self.parameter!r} (input {self.slot} of {self.node.name()})"


@dataclass(frozen=True)
class Taps:
    """All uses of the wanted parameters in one graph, and where its backward pass may stop."""

    uses: Mapping[Node, Sequence[Use]]  # in backward order
    last: Sequence[Node]  # tapped nodes below which no other lies: they are never run themselves
    unused: frozenset[str]  # wanted parameters that the output does not depend on


def _resolve(node: Node, names: Mapping[int, str]) -> tuple[str, tuple[str, ...]] | None:
    """The wanted parameter behind ``node``, if nothing but transparent nodes lies between, and their names."""
    chain: list[str] = []
    while node.name() in TRANSPARENT:
        chain.append(node.name())
        node = node.next_functions[0][0]
        if node is None:
            return None
    variable = getattr(node, "variable", None)  # only AccumulateGrad has one
    if variable is None or id(variable) not in names:
        return None
    return names[id(variable)], tuple(chain)


def find_taps(output: Tensor, parameters: Mapping[str, Tensor]) -> Taps:
    """Every use of ``parameters`` (name -> tensor, requiring gradients) in the graph of ``output``."""
    names = {id(p): name for name, p in parameters.items()}
    order = _backward_order(output.grad_fn)
    uses: dict[Node, list[Use]] = {}
    tapped_below: set[Node] = set()  # nodes from which a tapped node can be reached
    last = []
    for node in reversed(order):
        if node.name() in TRANSPARENT and _resolve(node, names):
            continue  # belongs to the use of the node above it
        below = False
        for slot, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            below = below or child in tapped_below or child in uses
            found = _resolve(child, names)
            if found:
                uses.setdefault(node, []).append(Use(found[0], node, slot, found[1]))
        if below:
            tapped_below.add(node)
        elif node in uses:
            last.append(node)
    in_order = {node: uses[node] for node in order if node in uses}
    reached = {use.parameter for found in in_order.values() for use in found}
    return Taps(in_order, last, frozenset(names.values()) - reached)


def _backward_order(root: Node | None) -> list[Node]:
    """All nodes reachable from ``root``, each before those that its gradients flow to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)] if root is not None else []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
    return order[::-1]


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
    finally:
        for handle in handles:
            handle.remove()


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

    known: dict[tuple[str, int], RowLayout] = field(default_factory=dict)  # by parameter and rows per example

    def get(self, parameter: str, rows: int, n: int) -> RowLayout:
        """The layout of ``rows`` rows over ``n`` examples at the tap of ``parameter``."""
        return RowLayout(1, rows) if n == 1 else self.known[parameter, rows // n]

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
        for use in (use for uses in taps.uses.values() for use in uses):
            count = rows_of(use, output_like(use.node)).shape[0]
            if count % n:
                raise UnsupportedError(f"{use}: {count} rows cannot be shared out over {n} examples")
            per_example = count // n
            if (use.parameter, per_example) not in self.known:
                divisors = [b for b in range(1, per_example + 1) if per_example % b == 0]
                candidates[use] = [RowLayout(per_example // b, b) for b in reversed(divisors)]
        if not candidates:
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
                        f"{use}: a cotangent on example {example} alone reaches rows of other examples; "
                        "examples interact in this network, so per-example gradients do not exist"
                    )
                candidates[use] = left
            if all(len(left) == 1 for left in candidates.values()):
                break
        for use, left in candidates.items():
            # Where several remain they agree on every row that any cotangent can reach.
            self.known[use.parameter, left[0].outer * left[0].inner] = left[0]
