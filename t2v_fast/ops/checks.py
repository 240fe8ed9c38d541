"""Checks of the ops' arguments.

Each check takes the name of the op first, and raises ValueError with what was given and what was expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .geometry import conv_output_size, winograd_fits

CONV_PATHS = ("explicit", "gram", "winograd")
CONV_ACC_PATHS = ("explicit", "winograd")
OUTER_PATHS = ("explicit", "gram")
WINOGRAD_DTYPES = torch.float32, torch.float64, torch.bfloat16
MAX_PASSED = 2**14  # most combinations of arguments that a check remembers


def show(t: Tensor) -> str:
    """Shape, dtype and device of a tensor, for an error message."""
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def require(condition: bool, name: str, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition`` holds.

    The message is a function because composing the text would take longer than a small op.
    """
    if not condition:
        raise ValueError(f"{name}: {message()}")


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """Make a check look at each combination of arguments once, if it reads only shapes, dtypes and devices of tensors.

    A network calls an op with the same shapes in every batch, and the check would take as long as a small op.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def once(name: str, *arguments: Any) -> None:
        key = (name, *[(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in arguments])
        try:
            known = key in passed
        except TypeError:  # a list, or a size that is a symbol while a function is traced
            check(name, *arguments)
            return
        if not known:
            check(name, *arguments)
            if len(passed) >= MAX_PASSED:
                passed.clear()
            passed.add(key)

    return once


def check_floating(name: str, **tensors: Tensor) -> None:
    """Check that all tensors are floating point, of one dtype and on one device."""
    first, reference_tensor = next(iter(tensors.items()))
    for key, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name}: {key} must be floating point, got {show(t)}")
        if t.dtype != reference_tensor.dtype or t.device != reference_tensor.device:
            raise ValueError(
                f"{name}: {key} is {show(t)} but {first} is {show(reference_tensor)}: expected one dtype and device"
            )


def check_rows(name: str, key: str, examples: Tensor, g: Tensor) -> None:
    """Check that the number of rows of ``g`` is a multiple of the number of examples."""
    n, m = examples.shape[0], g.shape[0]
    require(
        (m == 0) if n == 0 else m % n == 0,
        name,
        lambda: f"g has {m} rows, expected a multiple of the {n} examples of {key}: {show(g)} against {show(examples)}",
    )


def check_accumulator(
    name: str,
    out: Tensor,
    shape: Sequence[int],
    g: Tensor,
    weight: Tensor,
    rows: int | None = None,
    each: str = "row of g",
) -> None:
    """Check that ``out`` can be added to in place, and that ``weight`` has one entry for each of ``rows`` gradients.

    There is one gradient for each row of ``g``, unless ``rows`` is given; ``each`` names what has a gradient.
    """
    dtype = reference.accumulate_dtype(g.dtype)
    rows = g.shape[0] if rows is None else rows
    require(
        list(out.shape) == list(shape) and out.dtype == dtype and out.device == g.device and out.is_contiguous(),
        name,
        lambda: f"out is {show(out)}, expected contiguous {list(shape)} {dtype} on {g.device}",
    )
    require(
        list(weight.shape) == [rows] and weight.dtype == dtype and weight.device == g.device,
        name,
        lambda: f"weight is {show(weight)}, expected [{rows}] {dtype} on {g.device}: one weight a {each}",
    )


@remembered
def check_outer(name: str, x: Tensor, g: Tensor, path: str = "explicit") -> None:
    """Check the arguments of ``sq_outer``."""
    check_floating(name, x=x, g=g)
    require(path in OUTER_PATHS, name, lambda: f"path {path!r} is none of {', '.join(OUTER_PATHS)}")
    require(
        x.dim() == 3 and g.dim() == 3 and x.shape[1] == g.shape[1],
        name,
        lambda: f"expected x [N, S, I] and g [M, S, O] with one S, got x {show(x)} and g {show(g)}",
    )
    check_rows(name, "x", x, g)


@remembered
def check_conv(
    name: str,
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    path: str = "explicit",
) -> None:
    """Check the arguments of ``sq_conv``."""
    check_floating(name, x=x, g=g)
    require(path in CONV_PATHS, name, lambda: f"path {path!r} is none of {', '.join(CONV_PATHS)}")
    require(
        x.dim() == 4 and g.dim() == 4,
        name,
        lambda: f"expected x [N, C, H, W] and g [M, O, Ho, Wo], got x {show(x)} and g {show(g)}",
    )

    def geometry() -> str:
        return (
            f"kernel_size {list(kernel_size)}, stride {list(stride)}, padding {list(padding)}, "
            f"dilation {list(dilation)}, groups {groups}"
        )

    require(
        min(*kernel_size, *stride, *dilation, groups) >= 1 and min(padding) >= 0,
        name,
        lambda: f"expected positive sizes and padding of at least 0, got {geometry()}",
    )
    require(
        x.shape[1] % groups == 0 and g.shape[1] % groups == 0,
        name,
        lambda: f"groups {groups} must divide the {x.shape[1]} input and the {g.shape[1]} output channels",
    )
    expected = conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    require(
        list(g.shape[2:]) == expected and min(expected) >= 1,
        name,
        lambda: f"g is {show(g)} but x {show(x)} with {geometry()} gives spatial size {expected}",
    )
    require(
        path != "winograd" or winograd_fits(kernel_size, stride, dilation, groups),
        name,
        lambda: f"path 'winograd' is for 3x3 kernels of stride 1, dilation 1 and one group, got {geometry()}",
    )
    check_rows(name, "x", x, g)


def check_conv_acc(
    name: str,
    out: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    path: str,
) -> None:
    """Check the arguments of ``sq_conv_acc_``."""
    require(out.dim() == 4, name, lambda: f"out must be [O, C / groups, kh, kw], got {show(out)}")
    require(path in CONV_ACC_PATHS, name, lambda: f"path {path!r} is none of {', '.join(CONV_ACC_PATHS)}")
    check_conv(name, x, g, out.shape[2:], stride, padding, dilation, groups, path)
    check_accumulator(name, out, (g.shape[1], x.shape[1] // groups, *out.shape[2:]), g, weight)


def check_conv_gram(
    name: str,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Check the arguments of ``conv_gram``: those of ``sq_conv`` with a cotangent that takes no memory."""
    require(x.dim() == 4, name, lambda: f"expected x [N, C, H, W], got {show(x)}")
    size = conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    g = x.new_empty((1, 1, 1, 1)).expand(x.shape[0], groups, *size) if min(size) >= 1 else x
    check_conv(name, x, g, kernel_size, stride, padding, dilation, groups)


@remembered
def check_gram(name: str, gram: Tensor, g: Tensor) -> None:
    """Check the arguments of ``sq_gram``."""
    check_floating(name, g=g)
    require(
        gram.dim() == 4
        and g.dim() == 4
        and gram.shape[2] == gram.shape[3] == g.shape[2] * g.shape[3]
        and gram.shape[1] >= 1
        and g.shape[1] % gram.shape[1] == 0,
        name,
        lambda: f"expected gram [N, groups, P, P], g [M, O, Ho, Wo], P = Ho Wo; got {show(gram)} and {show(g)}",
    )
    require(
        gram.dtype == reference.accumulate_dtype(g.dtype) and gram.device == g.device,
        name,
        lambda: f"gram is {show(gram)}, expected {reference.accumulate_dtype(g.dtype)} for g {show(g)}",
    )
    check_rows(name, "gram", gram, g)


@remembered
def check_prod(
    name: str, g: Tensor, x: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """Check the arguments of ``sq_prod`` and ``sq_norm``."""
    require(g.dim() == 3, name, lambda: f"expected g [M, S, C], got {show(g)}")
    if x is None:
        check_floating(name, g=g)
        require(shift is None and scale is None, name, lambda: "shift and scale act on x, which was not given")
        return
    check_floating(name, g=g, x=x)
    require(
        x.dim() == 3 and x.shape[1:] == g.shape[1:],
        name,
        lambda: f"expected g [M, S, C] and x [N, S, C], got g {show(g)} and x {show(x)}",
    )
    for key, t in (("shift", shift), ("scale", scale)):
        if t is None:
            continue
        broadcasts = t.dim() <= 3 and all(
            a in (1, b) for a, b in zip(reversed(t.shape), reversed(x.shape), strict=False)
        )
        if not broadcasts or not t.is_floating_point() or t.device != x.device:
            raise ValueError(f"{name}: {key} is {show(t)}, expected floating point that broadcasts to x {show(x)}")
    check_rows(name, "x", x, g)


@remembered
def check_scatter(name: str, index: Tensor, g: Tensor, num_rows: int) -> None:
    """Check the arguments of ``sq_scatter``, except the values in ``index``: reading them would wait for the device."""
    check_floating(name, g=g)
    require(
        index.dim() == 2 and g.dim() == 3 and index.shape[1] == g.shape[1] and index.dtype == torch.int64,
        name,
        lambda: f"expected index [N, S] int64 and g [M, S, O], got index {show(index)} and g {show(g)}",
    )
    require(index.device == g.device, name, lambda: f"index is on {index.device} but g on {g.device}")
    require(num_rows >= 1, name, lambda: f"num_rows is {num_rows}, expected at least 1")
    check_rows(name, "index", index, g)


def check_scatter_acc(name: str, out: Tensor, index: Tensor, g: Tensor, weight: Tensor) -> None:
    """Check the arguments of ``sq_scatter_acc_``, except the values of ``index``."""
    require(out.dim() == 2, name, lambda: f"out must be [V, O], got {show(out)}")
    check_scatter(name, index, g, out.shape[0])
    check_accumulator(name, out, (out.shape[0], g.shape[2]), g, weight)


def check_grouped(name: str, x: Tensor, g: Tensor, offsets: Tensor) -> int:
    """Check the arguments of ``sq_grouped``, except the values of ``offsets``; return the number of cotangents."""
    check_floating(name, x=x, g=g)
    require(
        x.dim() == 2 and g.dim() == 2,
        name,
        lambda: f"expected x [R, I] and g [M, O], got x {show(x)} and g {show(g)}",
    )
    _check_bounds(name, "offsets", offsets, "B", g)
    check_rows(name, "x", x, g)
    return g.shape[0] // x.shape[0] if x.shape[0] else 1


def check_grouped_acc(
    name: str, out: Tensor, x: Tensor, g: Tensor, offsets: Tensor, groups: Tensor, weight: Tensor
) -> None:
    """Check the arguments of ``sq_grouped_acc_``, except the values of ``offsets`` and ``groups``."""
    rows = check_grouped(name, x, g, offsets) * (offsets.shape[0] - 1)
    _check_bounds(name, "groups", groups, "E", g)
    check_accumulator(
        name, out, (groups.shape[0] - 1, g.shape[1], x.shape[1]), g, weight, rows, "segment and cotangent"
    )


def _check_bounds(name: str, key: str, bounds: Tensor, letter: str, g: Tensor) -> None:
    require(
        bounds.dim() == 1 and bounds.shape[0] >= 1 and bounds.dtype == torch.int64 and bounds.device == g.device,
        name,
        lambda: f"expected {key} [{letter} + 1] int64 on {g.device}, got {show(bounds)}",
    )


def check_winograd_conv(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], transposed: bool
) -> None:
    """Check the arguments of ``winograd_conv``."""
    require(
        x.dim() == 4 and weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3) and len(padding) == 2,
        name,
        lambda: (
            f"expected x [N, C, H, W], a weight of kernels of 3x3 and 2 paddings, got {show(x)}, {show(weight)} "
            f"and {list(padding)}"
        ),
    )
    require(
        x.shape[1] == weight.shape[0 if transposed else 1],
        name,
        lambda: (
            f"x {show(x)} has {x.shape[1]} channels, the weight {show(weight)} takes "
            f"{weight.shape[0 if transposed else 1]}"
        ),
    )
    require(
        x.dtype == weight.dtype and x.dtype in WINOGRAD_DTYPES and x.device == weight.device,
        name,
        lambda: f"expected one of float32, float64 and bfloat16 on one device, got {show(x)} and {show(weight)}",
    )
    outputs = weight.shape[1 if transposed else 0]
    if bias is not None:
        require(
            tuple(bias.shape) == (outputs,) and bias.dtype == x.dtype and bias.device == x.device,
            name,
            lambda: f"bias is {show(bias)}, expected [{outputs}] {x.dtype} on {x.device}",
        )
    by = [2 - p for p in padding] if transposed else padding
    size = conv_output_size(x.shape[2:], (3, 3), (1, 1), by, (1, 1))
    require(
        min(padding) >= 0 and min(by) >= 0 and min(size) >= 1,
        name,
        lambda: f"x {show(x)} with padding {list(padding)} gives spatial size {size}",
    )
