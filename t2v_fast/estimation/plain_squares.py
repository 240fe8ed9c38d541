"""Squared gradients of plain autograd, and how far the library's own may differ from them.

:mod:`t2v_fast.estimation.self_check` decides which examples are compared, and when. This module computes the squares of
an example by torch's autograd alone (:meth:`PlainSquares.add`), and compares (:meth:`PlainSquares.difference`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..gradients.ownership import dense, nodes_of
from ..gradients.recorder import FisherRecorder
from ..gradients.tensor_parallel import whole
from .runs import Place

Tolerances = Mapping[torch.dtype, float]  # by the least precise type that took part

# How far the squares of two examples may differ from plain autograd, relative to the norm of a parameter's squares. The
# error of a wrong rule is of order one. Rounding, and a rare ReLU that flips, stay far below these tolerances.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
# How far they may differ from an example that is run alone, if the activations of the batch explain the difference.
# Rounding pushes few pre-activations over a kink, and more in half precision. A hook or a custom backward function that
# depends on the other rows is not explained by them.
KINKS = {torch.float64: 0.1, torch.float32: 0.5, torch.bfloat16: 4.0, torch.float16: 4.0}

LEAST_HOOKED = 2**14  # smaller gradients are squared after the pass: a hook takes longer than they do
LARGEST_FLOAT64 = 2**22  # the most numbers of a gradient that are brought to float64 at once
LEAST_FLOAT32 = 1e-24  # smaller squares of float32 gradients are computed in float64, where none becomes zero

LEAST_PART = 1e-3  # how small the smallest cotangent of an example may be beside its largest, for a comparison


class PlainSquares:
    """Squared gradients by plain autograd, at the recorder's granularity, for some rows of the recorder's results.

    Args:
        recorder: The recorder, within its context.
        names: The parameters to differentiate by.

    Example:
        >>> network = torch.nn.Linear(4, 3)
        >>> with FisherRecorder(network) as recorder:
        ...     logits, u = network(torch.randn(5, 4)), torch.randn(5, 3)
        ...     plain = PlainSquares(recorder, recorder.parameters)
        ...     plain.add(2, logits, u, 2)
        ...     got = recorder.backward(logits, u)
        >>> plain.difference(got, [2], torch.float32, 1e-5) is None
        True
    """

    def __init__(self, recorder: FisherRecorder, names: Iterable[str]) -> None:
        self._recorder, self._names = recorder, list(names)
        self._rows: dict[int, dict[str, Tensor]] = {}  # by row and parameter, in float64

    def _add(self, row: int, name: str, gradient: Tensor) -> None:
        squares = _squares(self._recorder, name, dense(gradient)).double()
        of_row = self._rows.setdefault(row, {})
        of_row[name] = of_row[name].add_(squares) if name in of_row else squares

    def add(self, row: int, logits: Tensor, cotangent: Tensor, place: Place) -> None:
        """Add the squared gradients of one example's logits to those of a row. Only torch's autograd is used.

        Args:
            row: A row of the recorder's results; with granularity ``parameter`` there is one, 0, for all examples.
            logits: The logits of a batch, whose graph is kept.
            cotangent: A cotangent of the logits, in their shape.
            place: Where the logits of the example lie.
        """
        if not self._names:
            return
        recorder = self._recorder
        single = torch.zeros_like(cotangent)
        single[place] = cotangent[place]
        row = 0 if recorder.granularity == "parameter" else row
        options = {"retain_graph": True, "allow_unused": True}
        leaves = recorder.leaves
        if recorder.divided:  # what hooks would do to gradients is not theirs alone
            sharding = recorder.sharding
            chosen = {name: recorder.parameters[name] for name in self._names}
            for names in [self._names] if sharding is None else sharding.portions(chosen):
                gradients = torch.autograd.grad(
                    [logits], [leaves[name] for name in names], [single], materialize_grads=True, **options
                )
                for name, gradient in zip(names, gradients, strict=True):
                    self._add(row, name, whole(gradient))
            return

        taken: set[str] = set()

        def take(name: str, gradient: Tensor) -> Tensor | None:
            self._add(row, name, gradient)
            taken.add(name)
            return gradient.new_zeros(()).expand(gradient.shape) if gradient.layout == torch.strided else None

        # The hooks square each large gradient when it is there, and pass on one that takes no memory: a large network's
        # gradients would not fit beside its activations.
        wanted = {name: leaves[name] for name in self._names}
        hooks = [p.register_hook(partial(take, name)) for name, p in wanted.items() if p.numel() >= LEAST_HOOKED]
        try:
            found = torch.autograd.grad([logits], list(wanted.values()), [single], **options)
        finally:
            for hook in hooks:
                hook.remove()
        # Small gradients, and those of tensors that are not torch's own, which have no hooks.
        for name, gradient in zip(self._names, found, strict=True):
            if gradient is not None and name not in taken:
                self._add(row, name, gradient)

    def difference(
        self, got: Mapping[str, Tensor], rows: Iterable[int], dtype: torch.dtype, allowed: float
    ) -> str | None:
        """Say which parameter's squares differ from those of plain autograd in some rows; None if none does.

        Args:
            got: The recorder's results for the parameters.
            rows: The rows that are compared.
            dtype: The least precise type that took part.
            allowed: The largest difference, relative to the norm of a parameter's squares.
        """
        rows = [0] if self._recorder.granularity == "parameter" else list(rows)
        # Where the true gradient is zero (a bias that a softmax ignores), only rounding errors of larger ones remain.
        largest = [float(w.max()) for row in rows for n, w in self._rows.get(row, {}).items() if n in got and w.numel()]
        floor = (1e3 * torch.finfo(dtype).eps) ** 2 * max(largest, default=0)
        for name in got:
            for row in rows:
                q = got[name] if self._recorder.granularity == "parameter" else got[name][row]
                w = self._rows.get(row, {}).get(name)
                difference = float((q.double() if w is None else q.double() - w).norm()) if q.numel() else 0.0
                norm = 0.0 if w is None else float(w.norm())
                if not difference <= allowed * norm + floor * q.numel() ** 0.5:
                    if not q.isfinite().all():
                        return (
                            f"self-check failed for {name!r}: its squared per-example gradients are not finite in "
                            f"{str(q.dtype).removeprefix('torch.')}. The network's activations or gradients overflow; "
                            "scale the inputs, or use a type with a larger range"
                        )
                    return (
                        f"self-check failed for {name!r}: its squared per-example gradients differ from plain autograd "
                        f"by {difference / max(norm, 1e-300):.2g} relative (allowed {allowed:.0e}). The result would "
                        "be wrong; please report the layer, and leave it out with parameters=..."
                    )
        return None

    def each_agrees(self, got: Mapping[str, Tensor], row: int, dtype: torch.dtype, allowed: float) -> bool:
        """Whether each single entry of a row agrees, so that small entries count as much as large ones.

        The gradients are compared, not their squares: where the terms of a gradient cancel, its rounding error is a
        part of the largest gradient. This part is far below :data:`LEAST_PART`.

        Args:
            got: The recorder's results for the parameters, by example.
            row: The row that is compared.
            dtype: The least precise type that took part.
            allowed: The largest difference of an entry, relative to it.
        """
        of_row = self._rows.get(row, {})
        own = {name: q[row].flatten().double() for name, q in got.items() if q.numel()}
        if not own:
            return True
        plain = [of_row[name].flatten() if name in of_row else torch.zeros_like(q) for name, q in own.items()]
        largest = torch.stack([w.max() for w in plain]).sqrt()
        sizes = torch.tensor([len(w) for w in plain], device=largest.device)
        found, wanted = (torch.cat(of).clamp_min(0).sqrt() for of in (list(own.values()), plain))
        floor = 1e2 * torch.finfo(dtype).eps * largest.repeat_interleave(sizes)
        return bool(((found - wanted).abs() <= allowed / 2 * wanted + floor).all())


def row_to_compare(cotangents: Tensor) -> int | None:
    """Choose an example whose cotangents [N, C] show errors wherever they are, or None if there is none.

    The cotangents of its logits are the most alike in size. The first and the last example are not chosen: a number
    that unseen code takes from one of these is the same where an example is run alone.

    Example:
        >>> row_to_compare(torch.tensor([[1.0, -1.0], [1.0, -0.2], [-2.0, 2.0], [1.0, -1.0]]))
        2
        >>> row_to_compare(torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, 0.0], [1.0, -1.0]])) is None
        True
    """
    size = cotangents[1:-1].abs()
    if not size.numel():
        return None
    largest = size.amax(1)
    alike = torch.where(largest > 0, size.amin(1) / largest, 0)
    row = int(alike.argmax())
    return row + 1 if float(alike[row]) >= LEAST_PART else None


def _squares(recorder: FisherRecorder, name: str, gradient: Tensor) -> Tensor:
    """The squares of a gradient at the recorder's granularity, in float64, or in float32 where none becomes zero."""
    if gradient.dtype == torch.float32 and gradient.numel() >= LEAST_HOOKED:
        q = recorder.reduce(name, gradient)
        if not q.numel() or float(q.amax()) > LEAST_FLOAT32:
            return q
    if recorder.granularity == "parameter" or gradient.numel() <= LARGEST_FLOAT64:
        return recorder.reduce(name, gradient.double())
    # All filters have the same number of entries, so the mean over the parameter is the mean over its filters' means.
    filters = gradient.movedim(recorder.filter_axes[name], 0)
    filters = filters.reshape(len(filters), -1)
    some = filters.split(max(1, LARGEST_FLOAT64 // filters.shape[1]))
    q = torch.cat([part.double().square_().mean(1) for part in some])
    return q if recorder.granularity == "filter" else q.mean()


def coarsest(recorder: FisherRecorder, logits: Tensor) -> torch.dtype:
    """The least precise floating-point type among parameters and activations."""
    found = {p.dtype for p in recorder.parameters.values()}
    found |= {of.dtype for node in nodes_of(logits) for of in node._input_metadata}
    return max((d for d in found if d in SELF_CHECK_TOLERANCE), key=lambda d: torch.finfo(d).eps)
