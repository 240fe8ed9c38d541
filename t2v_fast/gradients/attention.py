"""Transfers for packed rows, in which examples are segments of one sequence axis and attention mixes along that axis.

Segments are apart if no token attends to a token of another segment. The graph alone does not tell this: the mask does,
or the weights of the attention, which are zero where the mask forbids. The transfers below read them, for the batch at
hand. Where a token attends to another segment, examples interact, and the parameters below have no per-example
gradients. The tables of :mod:`t2v_fast.gradients.transfers` come after this one, which serves packed rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .owners import SHARED, Crossed, Interacting, Owned, Owner, State, owner_along
from .transfers import ELEMENTWISE, input_shape, kind_of, output_shape

BLOCK = 1024  # queries whose masks are looked at together

APART = (
    "packed sequences must not attend to each other: the attention needs a mask that is block-diagonal, as Hugging "
    "Face's models make it from position_ids that begin anew in each sequence, without an attention_mask and a cache"
)


PACKED: dict[str, Callable[[Node, Owner, int], Sequence[State | None] | None]] = {}


def _packed(*names: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        PACKED.update(dict.fromkeys(names, function))
        return function

    return register


@_packed(
    *("ScaledDotProductFlashAttentionForCpu", "ScaledDotProductEfficientAttention", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductCudnnAttention", "ScaledDotProductFusedAttentionOverrideable"),
)
def _attention(node: Node, own: Owner, n: int) -> Sequence[State | None] | None:
    """Queries, keys and values are [N, H, T, E], and the mask is added to the scores [N, H, T, S]."""
    if not isinstance(own, Owned) or own.axis != 2:
        return None
    queries, size = own.rows.owners(n), input_shape(node, 1)[2]
    mask = getattr(node, "_saved_attn_mask", None)
    mask = getattr(node, "_saved_attn_bias", None) if mask is None else mask
    why = Interacting(f"packed sequences interact: in {node.name()} a token attends to another sequence; {APART}")
    rest = [None] * (len(node.next_functions) - 3)
    if mask is None:  # all keys, or those before the query
        return [why, why, why, *rest]
    if mask.requires_grad:  # a bias that is computed from parameters
        return None
    mask = mask.detach().reshape(-1, *mask.shape[-2:])  # [N H, T, S]
    parts = [(part > _closed(part)).any(0) for part in mask.split(BLOCK, 1)]
    open_ = torch.cat(parts).expand(len(queries), size)  # [T, S], whether a head's query attends to the key
    # Where all keys are closed by a finite number, the weights are those of an attention without a mask.
    if not bool(open_.any(1).cpu()[queries >= 0].all()):
        return None
    keys = _owners_of_keys(open_, queries, n)
    if keys is None:
        return [why, why, why, *rest]
    of_keys = owner_along(2, keys, n)
    return [own, of_keys, of_keys, *rest]


def _closed(mask: Tensor) -> float:
    """The largest number in a mask that closes a key for certain: no score is large enough to open it again."""
    if not mask.is_floating_point():
        return 0
    return -torch.inf if mask.dtype == torch.float16 else torch.finfo(mask.dtype).min / 2


@_packed("Softmax", "SafeSoftmax")
def _softmax(node: Node, own: Owner, n: int) -> Sequence[State | None] | None:
    """Where a weight is zero, the gradient of the score is zero, too."""
    dims = len(output_shape(node))
    last = node._saved_dim in (dims - 1, -1, 2**64 - 1)
    if not isinstance(own, Owned) or dims < 3 or own.axis != dims - 2 or not last:
        return None
    queries = own.rows.owners(n)
    keys = _owners_of_keys((node._saved_result.detach() != 0).flatten(0, -3).any(0), queries, n)
    return None if keys is None else [Crossed(queries, keys)]


@_packed("Bmm")
def _product(node: Node, own: Owner, n: int) -> Sequence[State | None] | None:
    """Scores are products of queries and keys; what a query gets is a product of weights and values."""
    if isinstance(own, Crossed):
        return [owner_along(1, own.queries, n), owner_along(2, own.keys, n)]
    if not isinstance(own, Owned) or own.axis != 1 or (weights := node._saved_self) is None:
        return None
    keys = _owners_of_keys((weights.detach() != 0).any(0), own.rows.owners(n), n)
    return None if keys is None else [own, owner_along(1, keys, n)]


@_packed(*ELEMENTWISE, "Tanh", "ToCopy", "Clone", "Neg", "Alias", "View", "UnsafeView", "ReshapeAlias")
def _crossed(node: Node, own: Owner, n: int) -> Sequence[State | None] | None:
    """Scores are scaled, capped and masked, and heads are an axis of their own or not."""
    if not isinstance(own, Crossed):
        return None
    moves = kind_of(node.name()) in ("View", "UnsafeView", "ReshapeAlias")
    states: list[State | None] = []
    for slot, (child, _) in enumerate(node.next_functions):
        if child is None:
            states.append(None)
            continue
        here = input_shape(node, slot)[-2:]
        if here == output_shape(node)[-2:]:
            states.append(own)
        elif moves:
            return None
        else:
            found = [axis for axis, size in zip((-2, -1), here[-2:], strict=False) if size != 1]
            if found:  # a row or a column: the node itself tells who owns its entries
                return None
            states.append(SHARED)
    return states


def _owners_of_keys(open_: Tensor, queries: Tensor, n: int) -> Tensor | None:
    """Find the example of each key [S] from what queries attend to, [T, S], and whose these queries are, [T].

    A key that nobody attends to gets -1. None where queries of two examples attend to one key.
    """
    if len(open_) != len(queries):
        return None
    least = torch.full(open_.shape[1:], n, dtype=torch.int32)
    most = torch.full(open_.shape[1:], -1, dtype=torch.int32)
    for seen, of_queries in zip(open_.split(BLOCK), queries.int().split(BLOCK), strict=True):
        theirs = of_queries[:, None].expand(seen.shape)
        seen = seen.cpu() & (theirs >= 0)
        least = torch.minimum(least, theirs.masked_fill(~seen, n).amin(0))
        most = torch.maximum(most, theirs.masked_fill(~seen, -1).amax(0))
    return None if bool(((most >= 0) & (least != most)).any()) else most.long()
