"""Which entries of every activation belong to which example: an interpretation of the autograd graph of one batch.

A cotangent of one example's output, sent backwards, reaches some entries of each activation: those the example *owns*.
A per-example gradient is a sum over them, so the rules have to know the owners. Entry values cannot tell: a padded
token or a shut gate hides an owner in one batch and shows it in the next. The graph can. This module starts from what
is given, that example n owns row n of the output, and takes the owners from each node's output to its inputs:

- A *transfer* knows how one kind of node moves entries. A transpose exchanges two axes, a view regroups them in
  row-major order, an index node keeps the positions that it read (in its saved tensors), an elementwise node or a
  convolution keeps the axis of the examples. A transfer reads shapes and saved positions, never values.
- A node without a transfer is asked itself: it is called with random cotangents of some examples only
  (:func:`ask`). What its derivative in this batch does not reach has no owner, and what two examples reach is shared.
- Where a tensor has several uses, the owners of all of them must agree.

The argument holds for each batch on its own, since each batch is interpreted anew: a gradient flows through the very
nodes that were interpreted, so an entry can hold a cotangent of example n only if it is owned by n. Owners may
therefore differ from batch to batch (packed sequences, mixtures of experts). The interpretation costs some
microseconds a node.

An input that is not owned entry by entry is *shared*: all examples use all of it, as they use weights. What a shared
tensor is computed from is shared too. A tensor that some node shares and another owns by example is how examples
*interact*, and parameters below it have no per-example gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .owners import (
    EACH,
    OWNERS,
    SHARED,
    USED_BOTH_WAYS,
    Interacting,
    Owned,
    Owner,
    Shared,
    Sole,
    State,
    Unknown,
    merge,
    owners_of_field,
)
from .transfers import MIXING, SELECTING, TRANSFERS, acted, input_shape, kind_of


def nodes_of(output: Tensor) -> list[Node]:
    """All nodes of the graph below an output, each before those that its gradients flow to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [] if output.grad_fn is None else [(output.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
    order.reverse()
    return order


class Ownership:
    """The owners of all activations in the graph below an output [N, ...]; row n of the output belongs to example n.

    ``order`` has all nodes, each before those that its gradients flow to, and ``states`` the state of each output of a
    node. An output without axes, or of one example, belongs to example 0, and so does all that lies below.
    ``met(node, name)`` is called for each node, before its inputs are looked at.

    Where a node reads a part of a tensor, the rest along other axes is taken to belong to the same examples, as it does
    in nearly all networks. ``exact``: nothing is taken to belong to one that does not reach it, which takes longer, and
    is worth it where otherwise there is a ``conflict``.
    """

    def __init__(
        self, output: Tensor, met: Callable[[Node, str], None] = lambda node, name: None, exact: bool = False
    ) -> None:
        self.exact = exact
        self.conflict = False  # whether two uses of a tensor disagree
        self.n = output.shape[0] if output.dim() else 1
        self.order = nodes_of(output)
        self.names = [node.name() for node in self.order]
        self.states: dict[tuple[Node, int], State] = {}  # of each node's outputs that something flows to
        self.owners: dict[Node, tuple[State | None, ...]] = {}  # of all outputs, where examples own one
        self.interacting: str | None = None  # how examples interact in a tensor without gradients
        self._several: set[Node] = set()  # nodes of which an output beyond the first is used
        self._data: dict[tuple, State] = {}  # the states of tensors without gradients that nodes have saved
        self._storages: dict[int, object] = {}  # whether their memory is for all examples
        if output.grad_fn is None:
            return
        self.states[output.grad_fn, output.output_nr] = Sole(0) if self.n == 1 else Owned(0, EACH)
        if output.output_nr:
            self._several.add(output.grad_fn)
        for node, name in zip(self.order, self.names, strict=True):
            if name != LEAF:
                met(node, name)
                self._visit(node, name)

    def _outputs(self, node: Node) -> dict[int, State]:
        """The states of those outputs of a node that something flows to."""
        states = self.states
        numbers = range(len(node._input_metadata)) if node in self._several else (0,)
        return {number: states[node, number] for number in numbers if (node, number) in states}

    def _visit(self, node: Node, name: str) -> None:
        outputs = self._outputs(node)
        if not outputs:
            return
        inputs = self._inputs(node, name, outputs)
        if any(isinstance(state, OWNERS) for state in outputs.values()):
            self.owners[node] = tuple(outputs.get(number) for number in range(max(outputs) + 1))
        each = isinstance(inputs, (list, tuple))
        states = self.states
        for slot, edge in enumerate(node.next_functions):
            state = inputs[slot] if each else inputs
            child, number = edge
            if child is None:
                if slot < 2 and self.n > 1 and state is not None:
                    self._visit_data(node, name, slot, state)
                continue
            if number:
                self._several.add(child)
            before = states.get(edge)
            if before is None:
                if state is not None:
                    states[edge] = state
            elif before is not state:
                merged = merge(before, state, lambda slot=slot: input_shape(node, slot), self.n)
                self.conflict = self.conflict or isinstance(merged, Interacting)
                if merged is None:
                    del states[edge]
                else:
                    states[edge] = merged

    def _visit_data(self, node: Node, name: str, slot: int, state: State) -> None:
        """An input without gradients, such as the images: where a node saves it, two uses of it must agree."""
        saved = _SAVED_DATA.get((kind_of(name), slot))
        if saved is None:
            return
        try:
            t = getattr(node, saved) if saved != "saved_tensors" else node.saved_tensors[0]
        except RuntimeError:  # as where activation checkpointing keeps it
            return
        if t is None or not t.numel():  # where no gradient needs it
            return
        if isinstance(state, Owned) and t.stride(state.axis) == 0:  # one for all examples after all
            return
        # Slices of one tensor, too, are either for all examples or for some.
        kind = SHARED if isinstance(state, Shared) else EACH
        if self._storages.setdefault(t.untyped_storage().data_ptr(), kind) != kind:
            self.interacting = USED_BOTH_WAYS
        key = (t.data_ptr(), t.shape, t.stride())
        merged = merge(self._data.get(key), state, lambda: tuple(t.shape), self.n)
        if isinstance(merged, Interacting):
            self.interacting = merged.reason
        elif merged is not None:
            self._data[key] = merged

    def _inputs(self, node: Node, name: str, outputs: dict[int, State]) -> Sequence[State | None] | State:
        """The states of all inputs, in a list, or one for all."""
        first = next(iter(outputs.values()))
        if len(outputs) == 1 and not isinstance(first, OWNERS):
            return SHARED if isinstance(first, Shared) else first
        if len(outputs) > 1:
            for kind in (Interacting, Unknown, Shared):
                bad = [state for state in outputs.values() if isinstance(state, kind)]
                if bad and kind is Shared and len(bad) < len(outputs):
                    return Interacting(USED_BOTH_WAYS)
                if bad:
                    return SHARED if kind is Shared else bad[0]
        if self.n == 1:
            return first
        kind = kind_of(name)
        if kind not in SELECTING and isinstance(first, Sole) and all(state == first for state in outputs.values()):
            return first
        try:
            found = None
            if kind in SELECTING and not self.exact:
                found = SELECTING[kind](node, outputs, self.n)
            elif kind in TRANSFERS and isinstance(first, Owned) and len(outputs) == 1:
                found = TRANSFERS[kind](node, first, self.n)
            if found is not None:
                return found
        except (AttributeError, RuntimeError, IndexError):  # another torch may save other things
            pass
        try:
            found = ask(node, outputs, self.n, self.exact)
        except (AttributeError, RuntimeError, TypeError) as error:
            return Unknown(f"the autograd node {name} does not tell which inputs belong to which example ({error})")
        if kind in MIXING and found[0] == SHARED:
            return acted(node)
        return found


LEAF = "torch::autograd::AccumulateGrad"
# Where layers save their input, by the layer and the slot of the input.
_SAVED_DATA = {
    ("Addmm", 1): "_saved_mat1",
    ("Mm", 0): "_saved_self",
    ("Bmm", 0): "_saved_self",
    ("Convolution", 0): "_saved_input",
    ("NativeBatchNorm", 0): "_saved_input",
    ("NativeLayerNorm", 0): "_saved_input",
    **{
        (layer, 0): "saved_tensors"
        for layer in ("OneDnnLinear", "MatrixConvolution", "WinogradConvolution", "StridedDepthwise", "BatchNorm")
    },
}


def call(node: Node, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs, by the node itself."""
    edges = node.next_functions
    with torch.no_grad():
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            gradients = _call_function(node, cotangents)
        else:
            found = node(*cotangents)
            gradients = list(found) if isinstance(found, (tuple, list)) else [found]
        for slot, (child, number) in enumerate(edges):
            g = gradients[slot]
            if child is None or g is None:
                continue
            shape = child._input_metadata[number].shape
            if g.shape != shape:  # nodes leave the sums over what was broadcast to the engine
                gradients[slot] = g.sum_to_size(shape)
    return tuple(gradients)


def _call_function(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same of a function written in Python, whose gradients are of all its arguments, tensors or not."""
    filled = [
        torch.zeros(tuple(of.shape), dtype=of.dtype, device=of.device) if g is None else g
        for g, of in zip(cotangents, node._input_metadata, strict=True)
    ]
    found = node.apply(*filled)
    each = found if isinstance(found, (tuple, list)) else [found]
    asked = iter([g for g, needed in zip(each, node.needs_input_grad, strict=False) if needed])
    return [None if child is None else next(asked, None) for child, _ in node.next_functions]


def ask(node: Node, outputs: Mapping[int, Owner], n: int, exact: bool = False) -> list[State | None]:
    """The states of a node's inputs by what its own derivative reaches, from outputs of some examples at a time.

    The examples are told apart by the binary digits of their numbers: two calls a digit. Cotangents are random, so
    that a reached entry is missed only if its derivative is zero, in which case no gradient comes there either.
    """
    metadata = node._input_metadata
    generator = torch.Generator().manual_seed(n)
    slots = len(node.next_functions)
    reached: list[list[Tensor | None]] = []  # by digit and value, by slot
    digits = max(1, math.ceil(math.log2(n)))
    fields = {number: owner.field(len(metadata[number].shape), n) for number, owner in outputs.items()}
    for digit in range(digits):
        for value in (0, 1):
            cotangents: list[Tensor | None] = []
            for number, of in enumerate(metadata):
                if number not in fields:
                    cotangents.append(None)
                    continue
                field, shape = fields[number], tuple(of.shape)
                mask = (field >= 0) & ((field >> digit) & 1 == value)
                random = torch.rand(shape, generator=generator) + 0.5
                if of.dtype.is_complex:
                    random = torch.complex(random, torch.rand(shape, generator=generator))
                cotangents.append((random * mask).to(of.device, of.dtype))
            gradients = call(node, cotangents)
            lit = [None if g is None else dense(g) != 0 for g in (*gradients, *[None] * slots)[:slots]]
            reached.append([None if t is None else t.cpu() for t in lit])
    states: list[State | None] = []
    for slot in range(slots):
        if node.next_functions[slot][0] is None:
            states.append(None)
            continue
        field, told = None, None  # the owner of each entry, and how many digits of its number are known
        for digit in range(digits):
            zero, one = (reached[2 * digit + value][slot] for value in (0, 1))
            if zero is None and one is None:
                continue
            zero, one = (torch.zeros_like(other) if t is None else t for t, other in ((zero, one), (one, zero)))
            if field is None:
                field, told = torch.zeros(zero.shape, dtype=torch.long), torch.zeros(zero.shape, dtype=torch.long)
            field += one.long() << digit
            told += zero.long() + one.long()
        if field is None:
            states.append(None)
        elif bool(((told != 0) & (told != digits)).any()):
            states.append(SHARED)  # some entry is reached from two examples
        else:
            states.append(owners_of_field(field.masked_fill(told == 0, -1), n, exact))
    return states


def dense(t: Tensor) -> Tensor:
    """A gradient that may be sparse, as those of embeddings."""
    return t.to_dense() if t.layout != torch.strided else t
