"""Random calls of the functions that are proved row by row: whatever the proof accepts must keep rows apart.

Arguments are drawn with no regard for what a function expects. Most calls raise an error, many mix rows, and the proof
must tell these from the others.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2v_fast.estimation.row_wise import ROW_WISE, RowWise

CALLS = 100  # of each function
DIMS = (1, 2, 3, 4)
NAMES = ("dim", "dims", "keepdim", "start_dim", "end_dim", "training", "normalized_shape", "weight", "dropout_p", "pad")
NAMES += ("attn_mask", "is_causal", "scale", "other", "input", "value", "p", "eps", "shape", "size", "sizes", "out")


class Part:
    """An argument whose value depends on the rows that a call gets."""

    def __init__(self, of: Callable[[list[Tensor], list[Tensor]], Any]) -> None:
        self.of = of

    def given(self, rows: list[Tensor], constants: list[Tensor]) -> Any:
        return self.of(rows, constants)


def value(argument: Any, rows: list[Tensor], constants: list[Tensor]) -> Any:
    if isinstance(argument, Part):
        return argument.given(rows, constants)
    if isinstance(argument, (list, tuple)):
        return type(argument)(value(entry, rows, constants) for entry in argument)
    if isinstance(argument, dict):
        return {name: value(entry, rows, constants) for name, entry in argument.items()}
    return argument


class Draw:
    """Tensors and arguments of a random call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.n = self.random.choice((2, 3, 4))
        torch.manual_seed(seed)
        dims = self.random.choice(DIMS)
        sizes = [self.random.choice((1, 2, 3, 4, self.n)) for _ in range(dims - 1)]
        shapes = [sizes, sizes[::-1], sizes]
        self.rows = [torch.randn(self.n, *shape, dtype=torch.float64) for shape in shapes]
        self.rows.append(torch.randint(0, 2, (self.n, *sizes)))
        around = [
            [*sizes],
            [self.n, *sizes],
            [1, *sizes],
            sizes[-1:],
            [3, *sizes[-1:]],
            [*sizes[-1:], 2],
            [1, 1, *sizes],
        ]
        around += [[2, 2], [self.n, self.n], [1, *sizes, 1]]
        self.constants = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in around]

    def tensor(self, constants: float = 0.2) -> Part:
        if self.random.random() < constants:
            k = self.random.randrange(len(self.constants))
            return Part(lambda rows, held: held[k])
        k = self.random.choice((0, 0, 0, 0, 1, 2, 3))
        way = self.random.randrange(6)
        if way == 0:  # not contiguous
            return Part(lambda rows, held: rows[k].transpose(1, -1) if rows[k].dim() > 1 else rows[k])
        if way == 1:  # as many axes as attention and products of matrices take
            return Part(lambda rows, held: rows[k].flatten(1)[:, None, :, None] if rows[k].dim() > 1 else rows[k])
        return Part(lambda rows, held: rows[k])

    def number(self) -> Any:
        way = self.random.randrange(10)
        if way == 0:
            return Part(lambda rows, held: len(rows[0]))
        if way == 1:
            return Part(lambda rows, held: rows[0].shape[-1])
        if way > 7:
            return self.random.choice((1, -1))
        if way == 2:
            return Part(lambda rows, held: rows[0].numel())
        return self.random.randrange(-4, 5)

    def one(self, deep: bool = True) -> Any:
        way = self.random.randrange(14 if deep else 9)
        if way < 4:
            return self.number()
        if way == 4:
            return self.random.choice((True, False, None, 0.5, 0.0, "sum", torch.float32))
        if way == 5:
            return self.random.choice(
                (..., slice(None), slice(0, None), slice(1, None), slice(None, 2), slice(None, None, 2))
            )
        if way == 6:
            return slice(None)
        if way == 7:
            return self.tensor()
        if way == 8:
            return -1
        kind = self.random.choice((tuple, list))
        return kind(self.one(False) if way > 11 else self.number() for _ in range(self.random.randrange(5)))

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        first: Any = self.tensor()
        if self.random.random() < 0.15:
            first = [self.tensor(0.1) for _ in range(self.random.randrange(1, 4))]
        rest = [self.one() for _ in range(self.random.choice((0, 1, 1, 1, 2, 2, 3, 4)))]
        way = self.random.random()
        if way < 0.2:
            rest = [self.tensor(), *rest[1:]]
        elif way < 0.4:
            rest = [self.tensor(0.1), self.tensor(0.1), *rest[2:]]
        elif way < 0.7:  # sizes or axes
            rest = [self.number() for _ in range(self.random.randrange(1, 5))]
            if self.random.random() < 0.5:
                rest[0] = Part(lambda rows, held: len(rows[0]))
            if self.random.random() < 0.3:
                rest = [rest]
        named = {self.random.choice(NAMES): self.one() for _ in range(self.random.choice((0, 0, 0, 0, 0, 1, 2)))}
        return [first, *rest], named


class Held(nn.Module):
    def __init__(self, constants: list[Tensor]) -> None:
        super().__init__()
        for k, constant in enumerate(constants):
            self.register_buffer(f"constant{k}", constant)


def attempt(function: Callable, draw: Draw, args: list[Any], named: dict[str, Any], rows: list[Tensor]) -> Any:
    """The tensors that a call returns for some rows, and its program."""
    network, rows = Held(draw.constants), [row.clone() for row in rows]
    with RowWise(network, rows) as watch:
        given = value(args, rows, draw.constants)
        result = function(*given, **value(named, rows, draw.constants))
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    programs = [watch.program_of(t) for t in results]
    return results, None if None in programs else programs


def kept_apart(function: Callable, seed: int) -> bool | None:
    """Whether a random call is proved; None where it raises an error. A proved call that mixes rows fails the test."""
    draw = Draw(seed)
    args, named = draw.call()
    try:
        whole, program = attempt(function, draw, args, named, draw.rows)
    except Exception:  # whatever the function makes of arguments that it does not expect
        return None
    if program is None:
        return False
    for n in range(draw.n):
        try:
            alone, same = attempt(function, draw, args, named, [row[n : n + 1] for row in draw.rows])
        except Exception:
            return False  # such a network cannot run an example alone, and its batches are not proved
        if same != program:
            return False
        for t, u in zip(whole, alone, strict=True):
            torch.testing.assert_close(t[n : n + 1], u, rtol=1e-9, atol=1e-12, equal_nan=True)
    return True


@pytest.mark.parametrize("function", ROW_WISE, ids=lambda f: getattr(f, "__qualname__", str(f)))
def test_random_calls_that_are_proved_keep_rows_apart(function: Callable) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(CALLS):
            kept_apart(function, seed)


def test_random_calls_are_proved_and_refused() -> None:
    """Of functions that can do both, the draws have calls that are proved, and calls that run and are refused."""
    some = (Tensor.view, Tensor.__getitem__, Tensor.expand, torch.matmul, torch.unbind, Tensor.sum, Tensor.flip)
    for function in some:
        found = [kept_apart(function, seed) for seed in range(3 * CALLS)]
        assert found.count(True) >= 1, function
        assert found.count(False) >= 2, function
