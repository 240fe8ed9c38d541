"""Find which example owns which entries of every activation, from the autograd graph of one batch.

A per-example gradient is a sum over the entries that the example owns (:mod:`t2v_fast.gradients.owners`), so the rules
must know the owners. The values of the entries do not tell: a padded token or a closed gate hides an owner in one batch
and shows the owner in the next. The graph tells. This module starts from the fact that example n owns row n of the
output, and carries the owners from the output of each node to its inputs:

- A *transfer* (:mod:`t2v_fast.gradients.transfers`) knows how one kind of node moves entries. A transpose exchanges
  two axes, and a view regroups them in row-major order. An index node keeps the positions that it reads in its saved
  tensors. An elementwise node or a convolution keeps the axis of the examples.
- A node without a transfer is called with random cotangents of some examples at a time (:func:`probe_node`). Entries
  that its derivative does not reach in this batch have no owner. An input with an entry that two examples reach is
  shared.
- Where a tensor has several uses, their owners must agree.

Each batch is interpreted on its own, which takes some microseconds per node. Gradients flow through the same nodes that
were interpreted, so an entry can hold a cotangent of example n only if n owns the entry. Owners may therefore differ
from batch to batch (packed sequences, mixtures of experts).

An input without owners is *shared*: all examples use all of it, as they use a weight. The tensors that a shared tensor
is computed from are shared too. Examples *interact* in a tensor whose uses disagree: one use shares the tensor and
examples own it in another, or two uses have different owners. Parameters below such a tensor have no per-example
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .attention import PACKED
from .owners import (
    EACH,
    OWNERS,
    SHARED,
    USED_BOTH_WAYS,
    Interacting,
    Owned,
    Owner,
    RowLayout,
    Shared,
    Sole,
    State,
    Unknown,
    merge,
    owner_along,
    owners_of_field,
)
from .transfers import FAST_CONVOLUTIONS, MIXING, SELECTING, TRANSFERS, input_shape, interacting_inputs, kind_of


def nodes_of(output: Tensor) -> list[Node]:
    """All nodes of the graph below an output, each before the nodes that its gradients flow to."""
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
    """The owners of all activations in the graph below an output [N, ...], whose row n belongs to example n.

    If the output has no axes, or N is one, example 0 owns everything. With ``segments`` [T] the examples are segments
    of a packed row: the output is [1, T, ...], and position t belongs to example segments[t], or to none if that is -1.
    ``met(node, name)`` is called for each node
    before the node's inputs are looked at.

    Where a node reads a part of a tensor, the entries beside that part along other axes are taken to have the same
    owners, which holds in nearly all networks. With ``exact``, an example owns only the entries that it reaches. This
    takes longer, and is worth it where there is a ``conflict`` otherwise.
    """

    def __init__(
        self,
        output: Tensor,
        met: Callable[[Node, str], None] = lambda node, name: None,
        exact: bool = False,
        segments: Tensor | None = None,
    ) -> None:
        self.exact = exact
        self.packed = segments is not None
        self.conflict = False  # whether two uses of a tensor disagree about its owners
        start: State | None = Owned(0, EACH)
        if segments is None:
            self.n = output.shape[0] if output.dim() else 1
        else:
            self.n = int(segments.max()) + 1
            start = owner_along(1, segments.cpu(), self.n)
        self.order = nodes_of(output)  # each node before the nodes that its gradients flow to
        self.names = [node.name() for node in self.order]
        self.states: dict[tuple[Node, int], State] = {}  # of the outputs that cotangents reach, by node and number
        self.owners: dict[Node, tuple[State | None, ...]] = {}  # of all outputs of the nodes with an owned output
        self.interacting: str | None = None  # how examples interact in a tensor that needs no gradient
        self._several: set[Node] = set()  # nodes with a used output beyond the first
        self._of_parameters: dict[Node, bool] = {}  # whether a tensor is computed from parameters alone
        self._data: dict[tuple, State] = {}  # the states of saved tensors that need no gradient
        self._storages: dict[int, object] = {}  # whether the memory of such a tensor is shared or owned
        if output.grad_fn is None:
            return
        self.states[output.grad_fn, output.output_nr] = Sole(0) if self.n == 1 or start is None else start
        if output.output_nr:
            self._several.add(output.grad_fn)
        for node, name in zip(self.order, self.names, strict=True):
            if name != LEAF:
                met(node, name)
                self._visit(node, name)

    def _outputs(self, node: Node) -> dict[int, State]:
        """The states of the outputs of a node that cotangents reach, by number."""
        states = self.states
        numbers = range(len(node._input_metadata)) if node in self._several else (0,)
        return {number: states[node, number] for number in numbers if (node, number) in states}

    def mixed(self) -> Node | None:
        """The node nearest to the output with an output whose entries several examples share."""
        mixed = (node for node in self.order if any(isinstance(s, Interacting) for s in self._outputs(node).values()))
        return next(mixed, None)

    def _visit(self, node: Node, name: str) -> None:
        """Carry the states of a node's outputs to its inputs."""
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
                if (
                    isinstance(merged, Interacting)
                    and _is_used_in_part(before, state)
                    and self._is_of_parameters(child)
                ):
                    merged = SHARED
                self.conflict = self.conflict or isinstance(merged, Interacting)
                if merged is None:
                    del states[edge]
                else:
                    states[edge] = merged

    def _is_of_parameters(self, root: Node) -> bool:
        """Whether a node computes its output from parameters, and adds at most constants to them.

        The input of the network enters the graph as a factor that needs no gradient. A product of parameters without
        such a factor, as in a stack of experts with LoRA, belongs to no example: the expert of one example alone may
        use a part of it that no other example uses. (A batch that is added to parameters is not told from a frozen
        weight here. Examples that run alone show it.)
        """
        known, stack = self._of_parameters, [root]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            children = [child for child, _ in node.next_functions]
            hides = isinstance(node, torch.autograd.function.BackwardCFunction)
            if hides or not all(_is_added_or_scalar(node, k) for k, child in enumerate(children) if child is None):
                known[node] = False
            elif missing := [child for child in children if child is not None and child not in known]:
                stack += missing
            else:
                known[node] = all(known[child] for child in children if child is not None)
        return known[root]

    def _visit_data(self, node: Node, name: str, slot: int, state: State) -> None:
        """Record the state of an input that needs no gradient, such as the images; several uses of it must agree."""
        saved = _SAVED_DATA.get((kind_of(name), slot))
        if saved is None:
            return
        try:
            t = getattr(node, saved) if saved != "saved_tensors" else node.saved_tensors[0]
        except RuntimeError:  # for example where activation checkpointing holds the tensor
            return
        t = _in_memory(t)
        if t is None or not t.numel():  # not saved, because no gradient needs it
            return
        if isinstance(state, Owned) and t.stride(state.axis) == 0:  # expanded: all examples read the same memory
            return
        # Slices of one tensor must agree too: either all examples use the tensor, or they own its entries.
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
        """The states of all inputs in a list, or one state for all of them."""
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
        if name == PASSING:
            return [outputs.get(number) for number in range(len(node.next_functions))]
        if self.n == 1:
            return first
        kind = kind_of(name)
        if kind not in SELECTING and isinstance(first, Sole) and all(state == first for state in outputs.values()):
            return first
        try:
            found = None
            if self.packed and kind in PACKED and len(outputs) == 1:
                found = PACKED[kind](node, first, self.n)
            if found is not None:
                return found
            if kind in SELECTING and not self.exact:
                found = SELECTING[kind](node, outputs, self.n)
            elif kind in TRANSFERS and isinstance(first, Owned) and len(outputs) == 1:
                found = TRANSFERS[kind](node, first, self.n)
            if found is not None:
                return found
        except (AttributeError, RuntimeError, IndexError):  # other versions of torch may save other fields
            pass
        try:
            found = probe_node(node, outputs, self.n, self.exact)
        except (AttributeError, RuntimeError, TypeError) as error:
            return Unknown(f"the autograd node {name} does not tell which inputs belong to which example ({error})")
        if kind in MIXING and found[0] == SHARED:
            return interacting_inputs(node)
        return found


LEAF = "torch::autograd::AccumulateGrad"
# FSDP2's mark at the inputs of a module, which passes each cotangent on.
PASSING = "RegisterPostBackwardFunctionBackward"
# The field in which a layer saves its input, by kind of node and number of the input.
_SAVED_DATA = {
    ("Addmm", 1): "_saved_mat1",
    ("Mm", 0): "_saved_self",
    ("Bmm", 0): "_saved_self",
    ("Convolution", 0): "_saved_input",
    **{(f"{kind}BatchNorm", 0): "_saved_input" for kind in ("Native", "Cudnn", "Miopen")},
    ("NativeLayerNorm", 0): "_saved_input",
    ("FusedRmsNorm", 0): "_saved_input",
    **{(layer, 0): "saved_tensors" for layer in ("OneDnnLinear", "BatchNorm", *FAST_CONVOLUTIONS)},
}


def _is_used_in_part(a: State, b: State | None) -> bool:
    """Whether all examples use a tensor in one place, and some of them use a part of it in another."""
    other = b if isinstance(a, Shared) else a
    regular = isinstance(other, Owned) and isinstance(other.rows, RowLayout)
    return isinstance(a if other is b else b, Shared) and isinstance(other, OWNERS) and not regular


def _is_added_or_scalar(node: Node, slot: int) -> bool:
    """Whether an input that needs no gradient is added to the others, or is a number."""
    kind = kind_of(node.name())
    if kind in ("Mul", "Div"):
        other = getattr(node, "_saved_other", None) if slot == 1 else None
        return other is not None and other.dim() == 0
    return kind in ("Add", "Sub") or (kind in ("Addmm", "Addbmm", "Baddbmm") and slot == 0)


def _in_memory(t: Any) -> Any:
    """The part of a DTensor that this process has, when it has arrived; any other tensor unchanged."""
    t = getattr(t, "_local_tensor", t)
    return t.trigger_wait() if hasattr(t, "trigger_wait") else t


def call_node(node: Node, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Call a node with cotangents of its outputs, and return the gradients of its inputs."""
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
            if g.shape != shape:  # a node leaves it to the engine to sum over broadcast axes
                gradients[slot] = g.sum_to_size(shape)
    return tuple(gradients)


def _call_function(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Call a function written in Python, which returns gradients of all its arguments, tensors or not."""
    filled = [
        torch.zeros(tuple(of.shape), dtype=of.dtype, device=of.device) if g is None else g
        for g, of in zip(cotangents, node._input_metadata, strict=True)
    ]
    found = node.apply(*filled)
    each = found if isinstance(found, (tuple, list)) else [found]
    asked = iter([g for g, needed in zip(each, node.needs_input_grad, strict=False) if needed])
    return [None if child is None else next(asked, None) for child, _ in node.next_functions]


def probe_node(node: Node, outputs: Mapping[int, Owner], n: int, exact: bool = False) -> list[State | None]:
    """Find the states of a node's inputs from the entries that cotangents of some examples at a time reach.

    The binary digits of the examples' numbers tell the examples apart, with two calls of the node per digit. The
    cotangents are random, so a reached entry is missed only where the derivative is zero. No gradient reaches such an
    entry in the backward pass either.
    """
    metadata = node._input_metadata
    generator = torch.Generator().manual_seed(n)
    slots = len(node.next_functions)
    reached: list[list[Tensor | None]] = []  # one list for each digit and value, with one tensor for each input
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
            gradients = call_node(node, cotangents)
            lit = [None if g is None else dense(g) != 0 for g in (*gradients, *[None] * slots)[:slots]]
            reached.append([None if t is None else t.cpu() for t in lit])
    states: list[State | None] = []
    for slot in range(slots):
        if node.next_functions[slot][0] is None:
            states.append(None)
            continue
        field, told = None, None  # the owner of each entry, and the number of its digits that are known
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
            states.append(SHARED)  # two examples reach the same entry
        else:
            states.append(owners_of_field(field.masked_fill(told == 0, -1), n, exact))
    return states


def dense(t: Tensor) -> Tensor:
    """A gradient as a dense tensor; gradients of embeddings may be sparse."""
    return t.to_dense() if t.layout != torch.strided else t
