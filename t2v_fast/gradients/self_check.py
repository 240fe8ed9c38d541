"""What is verified of a network while its batches go by: that examples do not interact, and that nothing is random.

The rules and the owners of activations follow from the graph, but the graph does not show everything: a statistic of
the batch that is detached, a random mask, a depth chosen from the data. So the network itself is watched.

- *Every batch*: no random number is drawn in its forward pass. Comparing the states of torch's, Python's and NumPy's
  generators costs some microseconds, and finds a dropout of any probability.
- *The first batch of two examples or more*: its logits are those of its two halves, run apart, and of two examples run
  alone. These two, as a batch of their own, must have squared gradients equal to those of plain autograd.
- *Later batches*: the second one's logits are those of its halves too. In the 4th, 8th, 16th and so on one example, run
  alone, has the batch's logits.

An interaction that the graph does not show, and that few batches have, may fall between these and stay unseen.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .ownership import nodes_of
from .recorder import FisherRecorder

# What two examples may differ by from plain autograd in the self-check, relative to the norm of a parameter's values.
# A wrong rule is wrong by order one; rounding (and the odd ReLU that flips) stays far below these.
SELF_CHECK_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}


class SelfCheckError(RuntimeError):
    """The fused computation disagreed with plain per-example autograd; the message names the parameter."""


class SelfCheck:
    """Watches a network's forward passes: ``logits = check.forward(inputs)``, then ``check.batch(inputs, logits)``.

    Both raise SelfCheckError. ``forward(model, inputs)`` runs the network of the recorder.
    """

    def __init__(self, recorder: FisherRecorder, forward: Callable[[nn.Module, Any], Tensor]) -> None:
        self.recorder = recorder
        recorder.verified = True
        self._forward = forward
        self._batches = 0  # of two examples or more
        self._single = False  # whether a batch of one was checked
        self._drew = False  # whether the last forward pass drew random numbers

    def forward(self, inputs: Any) -> Tensor:
        """The network's output, and a note of whether it drew random numbers."""
        before = _random_state()
        output = self._forward(self.recorder.model, inputs)
        self._drew = before != _random_state()
        return output

    def batch(self, inputs: Any, logits: Tensor) -> None:
        """Check one batch, by what has been checked before."""
        n = logits.shape[0]
        if not bool(logits.isfinite().all()):  # which is an error of its own
            return
        if n > 1:
            self._batches += 1
        single = n == 1 and not (self._batches or self._single)
        due = single or (n > 1 and self._batches & (self._batches - 1) == 0)
        drew = self._drew
        if not (due or drew):
            return
        self.recorder.check(logits)
        if drew:
            # What is made at first use may draw once.
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
        n = logits.shape[0]
        examples = [n // 2, n - 1] if n > 2 else [0, 1]
        self._gradients(inputs, examples, n)
        for e in examples:
            self._alone(inputs, logits, e)
        if n > 2:
            self._halves(inputs, logits)

    def _halves(self, inputs: Any, logits: Tensor) -> None:
        n = logits.shape[0]
        # In half precision the worst of many examples may differ by more than rounding does on the average.
        if SELF_CHECK_TOLERANCE[_coarsest(self.recorder, logits)] < 0.1:
            for half in (range(n // 2), range(n // 2, n)):
                self._compare(inputs, logits, list(half), "with half of its batch" if n > 2 else "alone")

    def _alone(self, inputs: Any, logits: Tensor, example: int) -> None:
        self._compare(inputs, logits, [example], "alone")

    def _compare(self, inputs: Any, logits: Tensor, examples: list[int], how: str) -> None:
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
        """The output for some of n examples as a batch of their own, and the rows in which they are."""
        try:
            return self.forward(_part(inputs, examples, n)), list(range(len(examples)))
        except Exception:  # as of a network that pairs examples: the others give way to copies of the first of these
            filled = [e if e in examples else examples[0] for e in range(n)]
            return self.forward(_part(inputs, filled, n)), examples

    def _gradients(self, inputs: Any, examples: list[int], n: int) -> None:
        """The squared gradients of some examples, as a batch of their own, against plain autograd of each."""
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
            # The gradient of one example's term, through the batch's own activations: run alone, rounding can push a
            # pre-activation over a kink, which in a narrow layer shows as percents.
            for name, g in recorder.plain_gradients(logits, cotangent, e, want).items():
                want[name][0 if summed else k] += recorder.reduce(name, g.double())
        dtype = _coarsest(recorder, logits)
        tolerance = SELF_CHECK_TOLERANCE[dtype]
        # A parameter whose true gradient vanishes (a bias that a softmax ignores) holds rounding of larger ones only.
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
    """How far apart the logits of an example lie, whatever is added to all of them; more than they round.

    ``robust``: typically, so that a masked class does not count; else at most, as half precision needs it.
    """
    z = logits.double().reshape(-1, logits.shape[-1])
    centre = z.median(1, keepdim=True).values if z.shape[1] > 1 else z.median()
    apart = (z - centre).abs().flatten()
    spread = float(apart[:: -(-len(apart) // 2**20)].quantile(0.5) if robust else apart.max())
    return max(spread, 1e3 * torch.finfo(logits.dtype).eps * float(z.abs().median()))


def _part(inputs: Any, examples: list[int], n: int) -> Any:
    """Some examples of a batch; what has no axis of examples goes along as it is."""
    return tree_map(
        lambda t: t[examples] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t,
        inputs,
    )


def _coarsest(recorder: FisherRecorder, logits: Tensor) -> torch.dtype:
    """The least precise of the floating-point types that the network computes in."""
    found = {p.dtype for p in recorder.parameters.values()}
    found |= {of.dtype for node in nodes_of(logits) for of in node._input_metadata}
    return max((d for d in found if d in SELF_CHECK_TOLERANCE), key=lambda d: torch.finfo(d).eps)


def _random_state() -> tuple:
    """What changes when a random number is drawn from a generator that networks draw from."""
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        _, keys, *rest = numpy_random.get_state()
        states += [keys.tobytes(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [g.get_offset() for g in torch.cuda.default_generators]
    return tuple(states)
