"""Run a network, watch its passes, and run examples of a batch again: their logits must be those of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.attention import APART
from ..gradients.fast_forward import FastNetwork
from ..gradients.random_state import drawn, random_state
from ..gradients.recorder import FisherRecorder
from ..gradients.refusals import random_layer
from .counting import (
    Count,
    Counting,
    counting_over_examples,
    described,
    is_half,
    may_mix_tokens,
    sorting_over_examples,
)
from .packing import part_of
from .plain_squares import SELF_CHECK_TOLERANCE, coarsest
from .row_wise import Program, RowWise
from .runs import Run, part_of_batch, places_of

NOTHING = Run(torch.empty(0), [])
_NO_CAPACITY = "pass batches of one example, or switch the capacity off"


class SelfCheckError(RuntimeError):
    """Raised where the self-check finds a wrong result, examples that interact, or a random network.

    If the squared gradients differ from plain autograd, the message names the parameter.

    Example:
        A mean over the batch couples the examples. The autograd graph does not show this mean, because the inputs need
        no gradient:

        >>> import t2v_fast
        >>> class Centred(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x - x.mean(0))
        >>> network = Centred(4, 3)
        >>> try:
        ...     t2v_fast.fisher(network, [torch.eye(4)])
        ... except t2v_fast.SelfCheckError as error:
        ...     print("examples interact" in str(error))
        True
    """


class Reruns:
    """The passes of a network over a batch and over some of its examples, whose logits are compared.

    Args:
        recorder: The recorder of the network.
        forward: Called as ``forward(model, inputs)`` to run the network.
        parts: The numbers of logits of the heads, where logits [N, C] are those of several heads.
    """

    def __init__(
        self, recorder: FisherRecorder, forward: Callable[[nn.Module, Any], Tensor], parts: Sequence[int]
    ) -> None:
        self.recorder, self.parts = recorder, list(parts)
        self._forward = forward
        self._whole = NOTHING  # the batch that is checked
        self._drew = False  # whether the last forward pass drew random numbers
        self._program: Program | None = None  # of the last forward pass, if it was watched and is row by row
        self._sorting = False  # whether whole numbers of all examples are sorted
        self._counting: str | None = None  # the layer that counts over the tokens of all examples
        self._dtype: torch.dtype | None = None  # the least precise type among parameters and activations

    def _pass(self, inputs: Any, watched: bool) -> Tensor:
        """Run the network. Note whether it draws random numbers and, if it is ``watched``, its program."""
        watched = watched and not self.recorder.divided  # the processes must come to the same decisions
        watches: list[RowWise] = []

        def observe(given: Any) -> RowWise:
            watches.append(RowWise(self.recorder.model, given))
            return watches[-1]

        before = random_state()
        if not watched:
            output = self._forward(self.recorder.model, inputs)
        elif isinstance(self._forward, FastNetwork):
            self._forward.observe = observe
            try:
                output = self._forward(self.recorder.model, inputs)
            finally:
                self._forward.observe = nullcontext
        else:
            with observe(inputs):
                output = self._forward(self.recorder.model, inputs)
        self._program = watches[-1].program_of(output) if watches else None
        self._drew = drawn(before, random_state()) is not None
        return output

    def _look_for_counting(self, inputs: Any, counts: Sequence[Count], example: int, whole: Run) -> None:
        """Note a layer that counts along a longer axis for two examples, which gave ``counts``, than for one."""
        with Counting() as counting, torch.no_grad():
            self._run(inputs, [example])
        self._sorting = sorting_over_examples(counts, counting.counts)
        if (count := counting_over_examples(counts, counting.counts)) is None:
            return
        self._counting = described(self.recorder.model, count.layer)
        dtype = self._coarsest(whole.logits)
        if "capacity" in self._counting and is_half(dtype):
            raise SelfCheckError(
                f"{self._counting} counts over the tokens of all examples ({count.operator}), so that an example may "
                f"depend on others, and {dtype} is too coarse to tell: {_NO_CAPACITY}, or use float32"
            )

    def _may_mix_tokens(self, whole: Run) -> bool:
        """Whether a layer counts or sorts the tokens of all examples, so that each example is compared alone."""
        return may_mix_tokens(self._counting, self._sorting, whole.logits)

    def _each_alone(self, inputs: Any, whole: Run) -> None:
        for example in range(len(whole)):
            self._alone(inputs, whole, example)

    def _halves(self, inputs: Any, whole: Run, examples: Sequence[int]) -> None:
        """Compare the logits of some examples, each half of the batch run apart, with those of the batch."""
        n = len(whole)
        # In half precision, the worst of many examples may differ by more than the typical rounding error.
        if self._tolerance(whole.logits) < 0.1:
            for half in (range(n // 2), range(n // 2, n)):
                if some := [e for e in half if e in examples]:
                    self._compare(inputs, whole, some, "with half of its batch" if n > 2 else "alone")

    def _alone(self, inputs: Any, whole: Run, example: int) -> None:
        self._compare(inputs, whole, [example], "alone")

    def _coarsest(self, logits: Tensor) -> torch.dtype:
        if self._dtype is None:
            self._dtype = coarsest(self.recorder, logits)
        return self._dtype

    def _tolerance(self, logits: Tensor) -> float:
        return SELF_CHECK_TOLERANCE[self._coarsest(logits)]

    def _compare(self, inputs: Any, whole: Run, examples: list[int], how: str) -> None:
        """Compare the logits of some examples, run as a batch of their own, with those of the whole batch."""
        with torch.no_grad():
            found = self._run(inputs, examples)
        self._agree(found, whole, examples, how)

    def _agree(self, found: Run, whole: Run, examples: list[int], how: str) -> None:
        """Raise SelfCheckError unless the logits that were found for some examples are those of the whole batch."""
        for one, other in zip(found.each(), whole.each(examples), strict=True):
            if one.shape != other.shape:
                raise SelfCheckError(
                    f"the logits of example {examples[0]} are {list(one.shape[1:])} when it is run {how}, and "
                    f"{list(other.shape[1:])} in the batch: examples interact"
                )
        apart = found.apart(whole, examples, self._tolerance(whole.logits), self.parts)
        if apart is None:
            return
        if self._drew:
            raise SelfCheckError(random_network(self.recorder.model))
        example, by = apart
        change = f"the logits of example {example} change by {by:.2g} when it is run {how}"
        if len(whole) == 1:
            raise SelfCheckError(f"{change}: the network is random, or each pass changes it; call eval() on it")
        if self._counting is not None and whole.segments is None:
            raise SelfCheckError(
                f"{change}: examples interact, probably in {self._counting}, which counts over the tokens of all "
                "examples or has a capacity: tokens of one example take the places of another's. "
                f"{_NO_CAPACITY.capitalize()}"
            )
        raise SelfCheckError(
            f"{change}: examples interact, or the network is random; call eval() on it, or change the layer that "
            "mixes them" + ("" if whole.segments is None else f" ({APART})")
        )

    def _run(self, inputs: Any, examples: list[int], watched: bool = False) -> Run:
        """Run some examples of the batch as a batch of their own."""
        if self._whole.segments is not None:
            part, segments = part_of(inputs, self._whole.segments, examples)
            return Run(self._pass(part, watched), places_of(len(examples), segments), segments)
        n = len(self._whole)
        try:
            return Run(self._pass(part_of_batch(inputs, examples, n), watched), list(range(len(examples))))
        except Exception:  # the network may need n examples: fill the batch with copies of the first of these
            filled = [e if e in examples else examples[0] for e in range(n)]
            return Run(self._pass(part_of_batch(inputs, filled, n), watched), list(examples))


def random_network(model: nn.Module) -> str:
    """Say that a network is random, and which layer makes it so, if a layer in training mode is known to."""
    layer = random_layer(model)
    where = "" if layer is None else f" (the layer {layer} is in training mode)"
    return (
        f"the network is random: it draws random numbers in its forward pass{where}, so that no example has a gradient "
        "of its own; call eval() on it"
    )
