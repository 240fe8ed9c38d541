"""Mutation tests, as in ``test_mutations.py``, for :mod:`t2v_fast.gradients.ownership`: wrong owners on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mutations import EITHER, PROPERTY, SELF_CHECK, Mutation, Patch, assert_found, case, function
from ownership_couplings import COUPLINGS

from t2v_fast.gradients import ownership, transfers
from t2v_fast.gradients.owners import ListedRows, Owned, RowLayout


def node(table: dict[str, Callable], name: str, change: Callable[[list, Any], Any]) -> Patch:
    """Change the states that a transfer returns for one kind of node."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        real = table[name]

        def found(node: Any, outputs: Any, n: int) -> Any:
            states = real(node, outputs, n)
            return states if states is None else change(states, outputs)

        mp.setitem(table, name, found)

    return patch


def kept(states: list, own: Any) -> list:
    """Take every owned input to have the owner of the output."""
    return [own if isinstance(state, Owned) else state for state in states]


OUTER_AND_INNER = function(
    RowLayout, "split", lambda real: lambda self, *rest: real(RowLayout(self.inner, self.outer), *rest)
)
SHIFTED = function(RowLayout, "split", lambda real: lambda self, *rest: real(self, *rest).roll(1, 0))
RAGGED = case("unpadded/index_put", seed=1)
SEQUENCE_FIRST = case("linear@copied_sequence_first")

MUTATIONS = [
    Mutation("outer and inner exchanged", OUTER_AND_INNER, case("linear@batch_first"), SELF_CHECK),
    Mutation("outer and inner exchanged, sequence first", OUTER_AND_INNER, SEQUENCE_FIRST, SELF_CHECK),
    Mutation("owners shifted by one", SHIFTED, case("linear@batch_first"), SELF_CHECK),
    Mutation(
        "listed owners reversed",
        function(ListedRows, "split", lambda real: lambda self, *rest: real(self, *rest).flip(0)),
        RAGGED,
        SELF_CHECK,
    ),
    Mutation(
        "listed owners shifted by a row",
        function(ListedRows, "split", lambda real: lambda self, *rest: real(ListedRows(self.listed.roll(1)), *rest)),
        RAGGED,
        SELF_CHECK,
    ),
    Mutation("a transpose not seen", node(transfers.TRANSFERS, "Transpose", kept), SEQUENCE_FIRST, EITHER),
    Mutation(
        "a permutation not seen",
        node(transfers.TRANSFERS, "Permute", kept),
        case("image/along_columns_outer"),
        EITHER,
    ),
    Mutation(
        "an index taken to keep the order of examples",
        node(transfers.SELECTING, "IndexSelect", lambda states, outputs: [outputs[0]]),
        case("order/permuted", sizes=(4, 3)),
        EITHER,
    ),
    Mutation(
        "the parts of a cat exchanged",
        node(transfers.TRANSFERS, "Cat", lambda states, own: states[::-1]),
        case("order/loop_and_stack", "order/reversed_loop"),
        SELF_CHECK,
    ),
    Mutation(
        "two uses by different owners taken for one",
        function(ownership, "merge", lambda real: lambda a, b, *rest: b if a is None else a),
        case(extra=COUPLINGS["roll"]),
        PROPERTY,
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(mutation, monkeypatch)
