"""Verify during a computation that the examples of a batch do not interact, and that the network is not random.

The rules and the owners of activations follow from the autograd graph, and the graph does not show everything. A
detached statistic of the batch, a random mask and a depth chosen from the data stay hidden. So the network itself is
watched:

- *Every batch*: the forward pass must draw no random number. Comparing the states of torch's, Python's and NumPy's
  generators takes some microseconds, and finds a dropout of any probability.
- *The first batch of two or more examples*: two halves of the batch and two single examples, run apart, must have the
  logits of the batch. The two examples, as a batch of their own, must have the squared gradients of plain autograd.
- *Later batches*: the halves of the second batch must have its logits. In the 4th, 8th, 16th batch and so on, one
  example run alone must have the logits of the batch.

An interaction that the graph does not show, and that occurs in few batches, may escape these checks.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..gradients.ownership import nodes_of
from ..gradients.recorder import FisherRecorder

# How far the squares of two examples may differ from plain autograd, relative to the norm of a parameter's squares. The
# error of a wrong rule is of order one. Rounding, and a rare ReLU that flips, stay far below these tolerances.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}


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


class SelfCheck:
    """Watch a network's forward passes: call :meth:`forward` for the logits of each batch, then :meth:`batch`.

    Args:
        recorder: The recorder of the network. Its ``verified`` attribute is set.
        forward: Called as ``forward(model, inputs)`` to run the network.

    Example:
        >>> network = nn.Linear(4, 3)
        >>> check = SelfCheck(FisherRecorder(network), lambda model, inputs: model(inputs))
        >>> with check.recorder:
        ...     inputs = torch.randn(6, 4)
        ...     logits = check.forward(inputs)
        ...     check.batch(inputs, logits)  # raises no SelfCheckError
    """

    def __init__(self, recorder: FisherRecorder, forward: Callable[[nn.Module, Any], Tensor]) -> None:
        self.recorder = recorder
        recorder.verified = True
        self._forward = forward
        self._batches = 0  # the number of batches with two or more examples
        self._single = False  # whether a batch of one example was checked
        self._drew = False  # whether the last forward pass drew random numbers

    def forward(self, inputs: Any) -> Tensor:
        """Run the network, and note whether it draws random numbers.

        Args:
            inputs: The inputs of a batch.

        Returns:
            The network's output.
        """
        before = _random_state()
        output = self._forward(self.recorder.model, inputs)
        self._drew = before != _random_state()
        return output

    def batch(self, inputs: Any, logits: Tensor) -> None:
        """Check one batch; how thoroughly depends on how many batches came before.

        Args:
            inputs: The inputs of the batch.
            logits: The output that :meth:`forward` gave for them.

        Raises:
            SelfCheckError: Examples interact, the network is random, or squared gradients are wrong.
        """
        n = logits.shape[0]
        if n > 1:
            self._batches += 1
        single = n == 1 and not (self._batches or self._single)
        due = single or (n > 1 and self._batches & (self._batches - 1) == 0)
        drew = self._drew
        # The caller reports logits that are not finite. On a CUDA device, to look at them is to wait for them.
        if not (due or drew) or not bool(logits.isfinite().all()):
            return
        self.recorder.check(logits)
        if drew:
            # A network may draw random numbers once, for buffers that it creates at first use.
            with torch.no_grad():
                self._run(inputs, [n - 1], n)
            if self._drew:
                raise SelfCheckError(_RANDOM)
        if not due:
            return
        if single:
            self._single = True
            self._gradients(inputs, [0], 1)
        elif self._batches == 1:
            self._first(inputs, logits)
        elif self._batches == 2:
            self._halves(inputs, logits)
        else:
            self._alone(inputs, logits, self._batches * 7919 % n)

    def _first(self, inputs: Any, logits: Tensor) -> None:
        """Check the first batch of two or more examples."""
        n = logits.shape[0]
        examples = [n // 2, n - 1] if n > 2 else [0, 1]
        self._gradients(inputs, examples, n)
        for e in examples:
            self._alone(inputs, logits, e)
        if n > 2:
            self._halves(inputs, logits)

    def _halves(self, inputs: Any, logits: Tensor) -> None:
        """Compare the logits of the two halves of a batch, run apart, with those of the batch."""
        n = logits.shape[0]
        # In half precision, the worst of many examples may differ by more than the typical rounding error.
        if SELF_CHECK_TOLERANCE[_coarsest(self.recorder, logits)] < 0.1:
            for half in (range(n // 2), range(n // 2, n)):
                self._compare(inputs, logits, list(half), "with half of its batch" if n > 2 else "alone")

    def _alone(self, inputs: Any, logits: Tensor, example: int) -> None:
        self._compare(inputs, logits, [example], "alone")

    def _compare(self, inputs: Any, logits: Tensor, examples: list[int], how: str) -> None:
        """Compare the logits of some examples, run as a batch of their own, with those of the whole batch."""
        with torch.no_grad():
            found, rows = self._run(inputs, examples, logits.shape[0])
        found = found[rows]
        whole = logits.detach()[examples]
        tolerance = SELF_CHECK_TOLERANCE[_coarsest(self.recorder, logits)]
        if found.shape != whole.shape:
            raise SelfCheckError(
                f"the logits of example {examples[0]} are {list(found.shape[1:])} when it is run {how}, and "
                f"{list(whole.shape[1:])} in the batch: examples interact"
            )
        apart = (found - whole).abs().reshape(len(examples), -1).amax(1)
        if not bool((apart <= tolerance * _spread(logits.detach(), robust=tolerance < 0.1)).all()):
            if self._drew:
                raise SelfCheckError(_RANDOM)
            worst = int(apart.nan_to_num(torch.inf).argmax())
            raise SelfCheckError(
                f"the logits of example {examples[worst]} change by {float(apart[worst]):.2g} when it is run {how}: "
                "examples interact, or the network is random; call eval() on it, or change the layer that mixes them"
            )

    def _run(self, inputs: Any, examples: list[int], n: int) -> tuple[Tensor, list[int]]:
        """Run some of n examples as a batch of their own; return the output, and the rows of the examples in it."""
        try:
            return self.forward(_part(inputs, examples, n)), list(range(len(examples)))
        except Exception:  # the network may need n examples: fill the batch with copies of the first of these
            filled = [e if e in examples else examples[0] for e in range(n)]
            return self.forward(_part(inputs, filled, n)), examples

    def _gradients(self, inputs: Any, examples: list[int], n: int) -> None:
        """Compare squared gradients of some examples, as a batch of their own, with plain autograd of each example."""
        recorder = self.recorder
        logits, rows = self._run(inputs, examples, n)
        cotangent = torch.zeros_like(logits)
        directions = torch.randn(logits.shape, generator=torch.Generator().manual_seed(n))
        cotangent[rows] = directions[rows].to(logits)
        got = recorder.backward(logits, cotangent, retain_graph=True)
        if not got:
            return
        summed = recorder.granularity == "parameter"
        got = {name: q[None] if summed else q[rows] for name, q in got.items()}
        want = {name: torch.zeros_like(q, dtype=torch.float64) for name, q in got.items()}
        for k, e in enumerate(rows):
            # Differentiate one example's term through the activations of this batch. In a run of the example alone,
            # rounding can push a pre-activation over a kink, which changes a narrow layer's gradient by percents.
            for name, g in recorder.plain_gradients(logits, cotangent, e, want).items():
                want[name][0 if summed else k] += recorder.reduce(name, g.double())
        dtype = _coarsest(recorder, logits)
        tolerance = SELF_CHECK_TOLERANCE[dtype]
        # Where the true gradient is zero (a bias that a softmax ignores), only rounding errors of larger ones remain.
        floor = (1e3 * torch.finfo(dtype).eps) ** 2 * max(float(w.max()) for w in want.values() if w.numel())
        for name, wanted in want.items():
            for q, w in zip(got[name].double(), wanted, strict=True):
                difference = float((q - w).norm()) if w.numel() else 0.0
                if not difference <= tolerance * float(w.norm()) + floor * w.numel() ** 0.5:
                    raise SelfCheckError(
                        f"self-check failed for {name!r}: its squared per-example gradients differ from plain autograd "
                        f"by {difference / max(float(w.norm()), 1e-300):.2g} relative (allowed {tolerance:.0e}). The "
                        "result would be wrong; please report the layer, and leave it out with parameters=..."
                    )


_RANDOM = (
    "the network is random: it draws random numbers in its forward pass, so that no example has a gradient of its own; "
    "call eval() on it"
)


def _spread(logits: Tensor, robust: bool) -> float:
    """How far the logits of an example spread around their median; at least a multiple of their rounding error.

    ``robust`` takes the median spread, so that a masked class does not count. Otherwise the largest spread is taken,
    which half precision needs.
    """
    z = logits.double().reshape(-1, logits.shape[-1])
    # In the middle between the lower and the upper median: at the lower one of two logits, the spread would be the
    # smallest margin of all examples.
    centre = (z.median(1, keepdim=True).values - (-z).median(1, keepdim=True).values) / 2
    centre = centre if z.shape[1] > 1 else z.median()
    apart = (z - centre).abs().flatten()
    spread = float(apart[:: -(-len(apart) // 2**20)].quantile(0.5) if robust else apart.max())
    return max(spread, 1e3 * torch.finfo(logits.dtype).eps * float(z.abs().median()))


def _part(inputs: Any, examples: list[int], n: int) -> Any:
    """Some examples of a batch; inputs without an axis of n examples are passed on unchanged."""
    return tree_map(
        lambda t: t[examples] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t,
        inputs,
    )


def _coarsest(recorder: FisherRecorder, logits: Tensor) -> torch.dtype:
    """The least precise floating-point type among parameters and activations."""
    found = {p.dtype for p in recorder.parameters.values()}
    found |= {of.dtype for node in nodes_of(logits) for of in node._input_metadata}
    return max((d for d in found if d in SELF_CHECK_TOLERANCE), key=lambda d: torch.finfo(d).eps)


def _random_state() -> tuple:
    """The states of the generators that a network may draw random numbers from: torch's, Python's and NumPy's."""
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        _, keys, *rest = numpy_random.get_state()
        states += [keys.tobytes(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [g.get_offset() for g in torch.cuda.default_generators]
    return tuple(states)
