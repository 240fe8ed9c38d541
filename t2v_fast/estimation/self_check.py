"""Verify during a computation that the examples of a batch do not interact, and that the network is not random.

The rules and the owners of activations follow from the autograd graph, and the graph does not show everything. A
detached statistic of the batch, a random mask and a depth chosen from the data stay hidden. So the network itself is
watched:

- *Every batch*: the forward pass must draw no random number. Comparing the states of torch's, Python's and NumPy's
  generators takes some microseconds, and finds a dropout of any probability.
- *The first batch of two or more examples*: the other examples, in halves of the batch, and two examples, each alone
  and both together, must have the logits of the batch. The two examples, as a batch of their own, must have the squared
  gradients of plain autograd.
- *Later batches*: the halves of the second batch must have its logits. In the 4th, 8th, 16th batch and so on, one
  example run alone must have the logits of the batch.
- *Every batch of two or more examples, in networks that count or rank the tokens of all examples*: each example alone
  must have the logits of the batch. Routers of experts that drop the tokens beyond a capacity do so in some batches
  only (:mod:`t2v_fast.estimation.counting`).

**Networks that are row by row** need less. The forward pass of each of these batches is watched
(:mod:`t2v_fast.estimation.row_wise`), which proves for most convolutional networks that no example depends on another.
The first batch is proved if its pass and that of one example alone have the same program. Then no halves are run, and
one of the two examples goes through plain autograd. Of a batch of two, both examples are run alone. A later batch is
proved if its pass has the program of the first batch that was proved. Then no further pass is run. Where there is no
proof, or the programs differ, the values are compared as above. So a proof may fail without harm.

Another interaction that the graph does not show, and that occurs in few batches, may escape these checks.

**Once a network.** A network that passed the check of a first batch is remembered
(:mod:`t2v_fast.gradients.network_state`). If a later call meets the network again, one example of the first batch is
run alone, another one in each call, unless that batch is proved. The second batch is not run in halves once that of
an earlier call was. The other checks stay as they are. A network that fails a check is forgotten. The network must be
unchanged: its modules and their classes, modes, attributes, hooks and forward methods, and the shapes, dtypes and
devices of its parameters. The call must be unchanged, too: the forward function, the wanted parameters, and the
shapes and dtypes of the first batch, with its number of examples.

Weights may change in between, for two reasons. Which rule, which owner and which kernel takes part follows from the
nodes and the shapes, so a rule that is right for some weights is right for others. And whether examples interact is
decided by the code that runs. Code that asks the values of weights, of inputs or of global variables what to do may run
differently in a later batch of the same call as well; there, too, only the program of a watched pass, or the example
that is run alone, can show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients import network_state
from ..gradients.attention import APART
from ..gradients.fast_forward import FastNetwork
from ..gradients.graph import fix_batch_norm_gradients
from ..gradients.ownership import nodes_of
from ..gradients.random_state import random_state
from ..gradients.recorder import FisherRecorder
from ..gradients.refusals import random_layer
from ..gradients.rules import RULES
from ..ops import planner
from .counting import (
    Count,
    Counting,
    counting_over_examples,
    described,
    is_half,
    layer_with_capacity,
    reads_unevenly,
    sorting_over_examples,
)
from .packing import part_of
from .plain_squares import KINKS, SELF_CHECK_TOLERANCE, PlainSquares, Tolerances, coarsest
from .row_wise import Program, RowWise
from .runs import Run, part_of_batch, places_of


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
        parts: The numbers of logits of the heads, where logits [N, C] are those of several heads.

    Example:
        >>> network = nn.Linear(4, 3)
        >>> check = SelfCheck(FisherRecorder(network), lambda model, inputs: model(inputs))
        >>> with check.recorder:
        ...     inputs = torch.randn(6, 4)
        ...     logits = check.forward(inputs)
        ...     check.batch(inputs, logits)  # raises no SelfCheckError
    """

    def __init__(
        self, recorder: FisherRecorder, forward: Callable[[nn.Module, Any], Tensor], parts: Sequence[int] = ()
    ) -> None:
        self.recorder, self.parts = recorder, list(parts)
        recorder.verified = True
        self._forward = forward
        self._network: network_state.Signature | None = None  # of the network, before its first forward pass
        self._looked = False  # whether the signature was taken
        self._verdict = _Verdict(None)  # of the first batch, in this call or in an earlier one
        self._whole = _NOTHING  # the batch that is checked
        self._batches = 0  # the number of batches with two or more examples
        self._single = False  # whether a batch of one example was checked
        self._drew = False  # whether the last forward pass drew random numbers
        self._program: Program | None = None  # of the last forward pass, if it was watched and is row by row
        self._sorting = False  # whether whole numbers of all examples are sorted
        self._counting: str | None = None  # the layer that counts over the tokens of all examples
        self._dtype: torch.dtype | None = None  # the least precise type among parameters and activations

    def forward(self, inputs: Any) -> Tensor:
        """Run the network, and note whether it draws random numbers.

        Args:
            inputs: The inputs of a batch.

        Returns:
            The network's output.
        """
        if not self._looked:  # before the network runs, which may change its attributes
            self._looked = True
            if not self.recorder.divided:  # the processes must come to the same decisions
                of_call = _call_of(self.recorder, self._forward)
                self._network = network_state.signature_of(self.recorder.model, *of_call)
        return self._pass(inputs, watched=_is_due(self._batches + 1))

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
        self._drew = before != random_state()
        return output

    def is_due(self, n: int) -> bool:
        """Whether :meth:`batch` needs the autograd graph of the next batch, which has ``n`` examples."""
        if n == 1:
            return not (self._batches or self._single)
        return bool(self._verdict.mixing or self._verdict.sorting) or _is_due(self._batches + 1)

    def batch(self, inputs: Any, logits: Tensor, segments: Tensor | None = None) -> None:
        """Check one batch; how thoroughly depends on how many batches came before, in this call and in earlier ones.

        Args:
            inputs: The inputs of the batch.
            logits: The output that :meth:`forward` gave for them.
            segments: The examples of a packed row, whose logits are [1, T, C], as for
                :meth:`t2v_fast.FisherRecorder.backward`.

        Raises:
            SelfCheckError: Examples interact, the network is random, or squared gradients are wrong.
        """
        try:
            self._check_batch(inputs, logits, segments)
        except SelfCheckError:  # the next call must not trust what an earlier batch or call showed
            network_state.state_of(self.recorder.model).clear()
            raise
        finally:
            self._whole = _NOTHING  # the graph takes memory

    def _check_batch(self, inputs: Any, logits: Tensor, segments: Tensor | None) -> None:
        n = logits.shape[0] if segments is None else int(segments.max()) + 1
        program = self._program if segments is None else None
        self._whole = whole = Run(logits, places_of(n, segments), segments)
        if n > 1:
            self._batches += 1
        single = n == 1 and not (self._batches or self._single)
        due = single or (n > 1 and _is_due(self._batches))
        drew = self._drew
        mixing = n > 1 and bool(self._verdict.mixing or (self._verdict.sorting and reads_unevenly(logits)))
        # The caller reports logits that are not finite. On a CUDA device, to look at them is to wait for them.
        if not (due or drew or mixing) or not bool(logits.isfinite().all()):
            return
        first = single or self._batches == 1
        state = network_state.state_of(self.recorder.model)
        # A packed row does not tell by its shape how many examples it has.
        key = network_state.extended(self._network, (inputs, n)) if due and first else None
        verdict: _Verdict | None = state.get(key)
        if drew or (due and verdict is None):
            self.recorder.check(logits, segments)
        if drew:
            # A network may draw random numbers once, for buffers that it creates at first use.
            with torch.no_grad():
                self._run(inputs, [n - 1])
            if self._drew:
                raise SelfCheckError(_random(self.recorder.model))
        if mixing:
            self._each_alone(inputs, whole)
        if not due:
            return
        if single:
            self._single = True
        if verdict is not None:
            self._verdict, self._dtype = verdict, verdict.dtype
            verdict.calls += 1
            if n > 1 and verdict.mixing:
                self._counting = verdict.mixing
                self._each_alone(inputs, whole)
            elif n > 1 and verdict.sorting and reads_unevenly(logits):
                self._each_alone(inputs, whole)
            elif n > 1 and not verdict.has(program):
                self._alone(inputs, whole, verdict.calls * 7919 % n)
        elif first:
            proved = self._first(inputs, whole, program)
            self._verdict = _Verdict(
                self._coarsest(logits), program if proved else None, mixing=self._counting, sorting=self._sorting
            )
            state.put(key, self._verdict)
        elif self._verdict.has(program):
            pass  # the pass was row by row, and computed what was verified before
        elif self._batches > 2:
            self._alone(inputs, whole, self._batches * 7919 % n)
        elif not self._verdict.second:
            self._halves(inputs, whole, range(n))
            self._verdict.second = True

    def _first(self, inputs: Any, whole: Run, program: Program | None) -> bool:
        """Check the first batch of two or more examples, or the first batch of one.

        Returns:
            Whether it is proved that examples do not interact. ``program`` is that of the batch, if it is row by row.
        """
        n = len(whole)
        examples = [n // 2, n - 1] if n > 2 else list(range(n))
        if n > 1 and (layer := layer_with_capacity(self.recorder.model)) is not None:
            self._counting = described(self.recorder.model, layer)
        proved = self._gradients(inputs, whole, examples, program)
        if n > 2 and not proved and not self._may_mix_tokens(whole):
            self._halves(inputs, whole, [e for e in range(n) if e not in examples])
        return proved

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
        return self._counting is not None or (self._sorting and reads_unevenly(whole.logits))

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
        logits = whole.logits.detach()
        tolerance = self._tolerance(whole.logits)
        pairs = list(zip(found.each(), whole.each(examples), strict=True))
        for one, other in pairs:
            if one.shape != other.shape:
                raise SelfCheckError(
                    f"the logits of example {examples[0]} are {list(one.shape[1:])} when it is run {how}, and "
                    f"{list(other.shape[1:])} in the batch: examples interact"
                )
        differences = [(one - other).abs().reshape(len(one), -1) for one, other in pairs]
        apart = torch.cat([d.amax(1) for d in differences])
        blocks = [(apart[:, None], logits)]
        if sum(self.parts) == logits.shape[-1]:  # each head is compared at its own scale
            both = (torch.cat(differences), logits)
            blocks = list(zip(*(t.split(self.parts, 1) for t in both), strict=True))
        if not all(bool((d <= tolerance * _spread(part, robust=tolerance < 0.1)).all()) for d, part in blocks):
            if self._drew:
                raise SelfCheckError(_random(self.recorder.model))
            worst = int(apart.nan_to_num(torch.inf).argmax())
            change = f"the logits of example {examples[worst]} change by {float(apart[worst]):.2g} when it is run {how}"
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

    def _gradients(self, inputs: Any, whole: Run, examples: list[int], program: Program | None) -> bool:
        """Compare squared gradients of some examples, as a batch of their own, with plain autograd of each example.

        The logits of the batch of their own, and of each example alone, are compared with those of the ``whole`` batch.
        Where the first one alone has the ``program`` of a batch of more than two, plain autograd is run of this one
        only. (All rows of such a network go through the same calls: a rule is right for all of them or for none.)

        Returns:
            Whether it is proved that examples do not interact: the examples alone have the ``program`` of the batch.
        """
        recorder, n = self.recorder, len(whole)
        with Counting() as counting:  # compiled layers, which the mode would not see into, run as they are written
            both = self._run(inputs, examples) if n > 1 else whole
        if n > 1:
            if counting.counts:
                self._look_for_counting(inputs, counting.counts, examples[0], whole)
            self._agree(both, whole, examples, "in a batch of two")
            if self._may_mix_tokens(whole):  # before the gradients differ, so that the error names the layer
                self._each_alone(inputs, whole)
        logits = both.logits
        cotangent = torch.zeros_like(logits)
        generator = torch.Generator().manual_seed(n)
        for place in both.places:
            shape = cotangent[place].shape
            cotangent[place] = torch.randn(shape, generator=generator, dtype=logits.dtype).to(logits.device)
        got = recorder.backward(logits, cotangent, retain_graph=True, segments=both.segments)
        summed = recorder.granularity == "parameter"
        if not summed:
            got = {name: q[both.rows] for name, q in got.items()}
        plain = PlainSquares(recorder, got)
        # Plain autograd of an example that is run alone costs least. But rounding can push a pre-activation of this run
        # over a kink, which changes a narrow layer's gradient by percents, and more in half precision. So where the
        # squares differ, the example is differentiated through the activations of the batch of two.
        wrong, proved = None, n > 1 and program is not None
        checked = [] if n > 1 else [0]  # rows of ``both``
        if n > 1:
            # The first of these is in the middle of a batch of more than two. A number that unseen code takes from the
            # first or the last example of a batch differs when it is run alone.
            for k in range(len(examples)):
                if k and proved and n > 2 and not summed:
                    break
                checked.append(k)
                e, place = examples[k], both.places[k]
                alone = self._run(inputs, [e], watched=program is not None)
                proved = proved and self._program == program
                self._agree(alone, whole, [e], "alone")
                (own,) = alone.places
                if alone.logits[own].shape != cotangent[place].shape or not alone.logits.requires_grad:
                    wrong = "another graph"
                    continue
                self._add_alone(plain, k, alone, cotangent[place])
            if wrong is None:
                wrong = self._difference(plain, got, checked, logits, SELF_CHECK_TOLERANCE)
                if wrong is not None and self._difference(plain, got, checked, logits, KINKS) is not None:
                    raise SelfCheckError(
                        f"{wrong}. If it has a hook or a backward function of its own, these may mix the examples"
                    )
        if got and (n == 1 or wrong is not None):
            plain = PlainSquares(recorder, got)
            for k in checked:
                with recorder.regions.reading():  # the graph serves several passes
                    plain.add(k, logits, cotangent, both.places[k])
            if (wrong := self._difference(plain, got, checked, logits, SELF_CHECK_TOLERANCE)) is not None:
                raise SelfCheckError(wrong)
        return proved

    def _add_alone(self, plain: PlainSquares, row: int, alone: Run, cotangent: Tensor) -> None:
        """Add the squared gradients of an example that was run alone, with a cotangent of its own logits."""
        with self.recorder.regions.reading():
            fix_batch_norm_gradients(nodes_of(alone.logits))
        (place,) = alone.places
        direction = torch.zeros_like(alone.logits)
        direction[place] = cotangent
        plain.add(row, alone.logits, direction, place)

    def _difference(
        self, plain: PlainSquares, got: dict[str, Tensor], rows: list[int], logits: Tensor, allowed: Tolerances
    ) -> str | None:
        dtype = self._coarsest(logits)
        return plain.difference(got, rows, dtype, allowed[dtype])


_NOTHING = Run(torch.empty(0), [])


@dataclass
class _Verdict:
    """What is remembered of a network that passed the check of a first batch."""

    dtype: torch.dtype | None  # the least precise type among parameters and activations
    program: Program | None = None  # of the first batch, if it is proved that its examples do not interact
    calls: int = 0  # how many calls have met the network since
    second: bool = False  # whether the second batch of a call passed, too
    sorting: bool = False  # whether it sorts tokens of all examples by whole numbers, such as those of experts
    mixing: str | None = None  # a layer that may mix examples in some batches, so that each example is run alone

    def has(self, program: Program | None) -> bool:
        """Whether a pass with this program is row by row and computes what was verified."""
        return program is not None and program == self.program


def _is_due(batch: int) -> bool:
    """Whether a batch of two or more examples, counted from one, is checked: the 1st, 2nd, 4th, 8th and so on."""
    return batch & (batch - 1) == 0


def _call_of(recorder: FisherRecorder, forward: Callable[[nn.Module, Any], Tensor]) -> tuple:
    """What a verdict depends on beside the network and its inputs: how the network is called, and by which code."""
    return (
        (forward.forward, forward.works) if isinstance(forward, FastNetwork) else forward,
        tuple(recorder.parameters),
        (recorder.granularity, recorder.unsupported, *recorder.filter_axes.values()),
        planner.forced(),
        tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        (torch.is_autocast_cache_enabled(), torch.get_default_dtype(), torch._C._get_mkldnn_enabled()),
        tuple(f"{dtype}: {tolerance}" for dtype, tolerance in SELF_CHECK_TOLERANCE.items()),
        [network_state.ByIdentity(rule) for rule in RULES.values()],
    )


def _random(model: nn.Module) -> str:
    """Say that a network is random, and which layer makes it so, if a layer in training mode is known to."""
    layer = random_layer(model)
    where = "" if layer is None else f" (the layer {layer} is in training mode)"
    return (
        f"the network is random: it draws random numbers in its forward pass{where}, so that no example has a gradient "
        "of its own; call eval() on it"
    )


_NO_CAPACITY = "pass batches of one example, or switch the capacity off"


def _spread(logits: Tensor, robust: bool) -> float:
    """How far the logits of an example spread around their median; at least a multiple of their rounding error.

    ``robust`` takes the median spread, so that a masked class does not count. Otherwise the largest spread is taken,
    which half precision needs. Rows whose logits are all alike do not count, such as tokens with zero vectors.
    """
    z = logits.reshape(-1, logits.shape[-1])
    z = z[:: -(-z.numel() // 2**22)].double()  # of a language model's tokens, some are enough
    # In the middle between the lower and the upper median: at the lower one of two logits, the spread would be the
    # smallest margin of all examples.
    centre = (z.median(1, keepdim=True).values - (-z).median(1, keepdim=True).values) / 2
    centre = centre if z.shape[1] > 1 else z.median()
    apart = (z - centre).abs()
    differs = (apart > 0).any(1)
    if bool(differs.any()):
        z, apart = z[differs], apart[differs]
    apart = apart.flatten()
    spread = float(apart[:: -(-len(apart) // 2**20)].quantile(0.5) if robust else apart.max())
    return max(spread, 1e3 * torch.finfo(logits.dtype).eps * float(z.abs().median()))
