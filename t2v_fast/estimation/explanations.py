"""Say why a network's forward pass has failed, where its inputs show it.

Nothing here runs unless a forward pass raises an error. So the values of inputs are not looked at in a steady batch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path

# What torch says where two types meet that must be one.
_TYPES_DIFFER = re.compile(r"dtype|datatype|scalar type|Input type|must have the type")
# What torch calls types of whole numbers there, such as "Long", "long int" and "torch.int64".
_WHOLE_TYPES = re.compile(r"\b(Byte|(unsigned |signed )?[Cc]har|[Ss]hort|[Ii]nt|[Ll]ong|[Bb]ool|u?int\d+)\b")


def explanation(error: Exception, model: nn.Module, inputs: Any, batch: int) -> ValueError | None:
    """Explain the error of a forward pass.

    Args:
        error: What the forward pass has raised.
        model: The network.
        inputs: The inputs of the batch.
        batch: The number of the batch.

    Returns:
        An error that names the batch and what to change; None where the inputs do not show a reason.

    Example:
        >>> import torch
        >>> network, images = nn.Linear(4, 3), torch.zeros(2, 4, dtype=torch.float64)
        >>> try:
        ...     network(images)
        ... except RuntimeError as error:
        ...     print(str(explanation(error, network, images, 0))[:79])
        batch 0: the input is torch.float64, and the network has torch.float32 weights:
    """
    if isinstance(error, TypeError) and isinstance(inputs, Mapping):
        why = _other_names(error, model, inputs)
    elif isinstance(error, IndexError):
        why = _outside_of_a_table(error, model, inputs)
    elif type(error) in (RuntimeError, ValueError) and _TYPES_DIFFER.search(str(error)):
        why = _other_type(str(error), model, inputs)
    else:
        why = None
    return None if why is None else ValueError(f"batch {batch}: {why}")


def _fields(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, with the words for each."""
    for path, t in tree_flatten_with_path(inputs)[0]:
        if isinstance(t, Tensor):
            yield f"the input{keystr(path)}", t


def _other_type(message: str, model: nn.Module, inputs: Any) -> str | None:
    """The input whose type no weight of the network has.

    Whole numbers are most often tokens or masks, which the network looks up. They are named only where the message
    names such a type, and not where indices are what has another one.
    """
    weights = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    fields = [(name, t) for name, t in _fields(inputs) if str(t.dtype) not in weights]
    if not _WHOLE_TYPES.search(message) or "'indices'" in message:
        fields = [(name, t) for name, t in fields if t.is_floating_point() or t.is_complex()]
    fields.sort(key=lambda field: not field[1].is_floating_point())
    if not fields or not weights:
        return None
    name, t = fields[0]
    convert = f"convert the input to {weights[0]}"
    if t.is_floating_point():
        convert += f", or the network by model.to({t.dtype})"
    return f"{name} is {t.dtype}, and the network has {' and '.join(weights)} weights: {convert}"


def _outside_of_a_table(error: Exception, model: nn.Module, inputs: Any) -> str | None:
    """The number that a table of the network was asked for, and has no row for."""
    for frame in _frames(error.__traceback__):
        if frame.f_code is not F.embedding.__code__:
            continue
        asked, table = frame.f_locals["input"], frame.f_locals["weight"]
        outside = (asked < 0) | (asked >= len(table))
        if not outside.any():
            continue
        place = outside.nonzero()[0]
        number, rows = int(asked[tuple(place)]), len(table)
        named = next((f" {name!r}" for name, p in model.named_parameters() if p is table), "")
        given = next((name for name, t in _fields(inputs) if t.shape == asked.shape and t.equal(asked)), None)
        if given is None:  # such as the position of a token
            return (
                f"the network looks up the number {number} in the table{named}, which has {rows} rows (0 to {rows - 1})"
                ": shorten texts to the length that the network was made for"
            )
        return (
            f"{given} has the number {number} in example {int(place[0])}, and the table{named} has {rows} rows "
            f"(0 to {rows - 1}): use the network's own tokenizer, or enlarge the table"
        )
    return None


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _other_names(error: Exception, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """The fields of a batch that are no arguments of the network."""
    forward = getattr(model.forward, "__qualname__", "forward")
    if f"{forward}()" not in str(error):  # something further inside was called with other arguments
        return None
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError:
        fields, arguments = ", ".join(map(str, inputs)), ", ".join(signature.parameters)
        some = "input_ids" if "input_ids" in inputs else next(iter(inputs), "input_ids")
        return (
            f"the fields of the batch ({fields}) are passed by name, and {forward} takes other ones ({arguments}): "
            f"pass forward=lambda model, inputs: model(inputs[{some!r}]), or rename the arguments"
        )
    return None
