"""Verify during a computation that the examples of a batch do not interact, and that the network is not random.

The rules and the owners of activations follow from the autograd graph, and the graph does not show everything. A
detached statistic of the batch, a random mask and a depth chosen from the data stay hidden. So the network itself is
watched:

- *Every batch*: the forward pass must draw no random number. Comparing the states of torch's, Python's and NumPy's
  generators takes some microseconds, and finds a dropout of any probability.
- *The first batch of two or more examples*: the other examples, in halves of the batch, and two examples, each alone
  and both together, must have the logits of the batch. The two examples, as a batch of their own, must have the squared
  gradients of plain autograd for a random cotangent.
- *The first batch, if it has one example*: its logits must be the same when it is run again.
- *Later batches*: the halves of the second batch must have its logits. In the 4th, 8th, 16th batch and so on, and in
  the first batch of each further number of examples, one example run alone must have the logits of the batch. Code that
  guesses axes from their sizes goes wrong where the number of examples equals another size.
- *Every batch of two or more examples, in networks that count or rank the tokens of all examples*: each example alone
  must have the logits of the batch. Routers of experts that drop the tokens beyond a capacity do so in some batches
  only (:mod:`t2v_fast.estimation.counting`).

**Networks that are row by row** need less. The forward pass of each of these batches is watched
(:mod:`t2v_fast.estimation.row_wise`), which proves for most convolutional networks that no example depends on another.
The first batch is proved if its pass and that of one example alone have the same program. Then no halves are run. Of a
batch of two, both examples are run alone. A later batch is proved if its pass has the program of the first batch that
was proved. Then no further pass is run. Where only the program differs, it is compared as a first batch is: its graph
may be another one, which no logit shows. Where there is no proof, or the programs differ, the values are compared as
above. So a proof may fail without harm.

The squares of the two examples are then replaced by squares that are needed anyway (:meth:`SelfCheck.compared`). The
caller hands over the cotangents of its first batch and the squares that it finds. Those of one example, for the last
cotangent, must be those of plain autograd of this example alone. The kernels have the size of the batch, which a batch
of two does not show. Two things could make this weaker than a random cotangent of two examples, and each has an answer:

- *A cotangent that is zero, or small, for some logits* hides what belongs to them. The example is the one whose logits'
  cotangents are the most alike, neither the first nor the last of the batch. Where the smallest of them is below
  :data:`~t2v_fast.estimation.plain_squares.LEAST_PART` of the largest, the two examples are used.
- *Gradients that depend on the other rows* show less in a large batch than in one of two. So each filter must agree, to
  one part in as many as the batch has examples. Where one does not, which may be a kink, the two examples are compared
  as well, and the example is differentiated through the activations of its own batch.

The verdict of such a comparison holds for the caller's own estimator and likelihood. Granularities that show no single
example or no single filter, tokens, and half precision keep the two examples.

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..gradients import network_state
from ..gradients.fast_forward import FastNetwork
from ..gradients.graph import fix_batch_norm_gradients
from ..gradients.ownership import nodes_of
from ..gradients.recorder import FisherRecorder
from ..gradients.rules import RULES
from ..ops import planner
from ..spans import stage
from .counting import Counting, described, layer_with_capacity, may_mix_tokens
from .plain_squares import KINKS, SELF_CHECK_TOLERANCE, PlainSquares, Tolerances, row_to_compare
from .reruns import NOTHING, Reruns, SelfCheckError, random_network
from .row_wise import Program
from .runs import Run, places_of


class SelfCheck(Reruns):
    """Watch a network's forward passes: call :meth:`forward` for the logits of each batch, then :meth:`batch`.

    Args:
        recorder: The recorder of the network. Its ``verified`` attribute is set.
        forward: Called as ``forward(model, inputs)`` to run the network.
        parts: The numbers of logits of the heads, where logits [N, C] are those of several heads.
        purpose: What decides the cotangents of a caller who hands over the squares of a batch (:meth:`compared`)
            whenever :attr:`waits` is true; None for other callers.

    Example:
        >>> network = nn.Linear(4, 3)
        >>> check = SelfCheck(FisherRecorder(network), lambda model, inputs: model(inputs))
        >>> with check.recorder:
        ...     inputs = torch.randn(6, 4)
        ...     logits = check.forward(inputs)
        ...     check.batch(inputs, logits)  # raises no SelfCheckError
    """

    def __init__(
        self,
        recorder: FisherRecorder,
        forward: Callable[[nn.Module, Any], Tensor],
        parts: Sequence[int] = (),
        purpose: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(recorder, forward, parts)
        self.purpose = purpose
        recorder.verified = True
        self._network: network_state.Signature | None = None  # of the network, before its first forward pass
        self._looked = False  # whether the signature was taken
        self._verdict = _Verdict(None)  # of the first batch, in this call or in an earlier one
        self._waiting: _Waiting | None = None
        self._batches = 0  # the number of batches with two or more examples
        self._sizes = {1}  # the numbers of examples that batches had
        self._single = False  # whether a batch of one example was checked

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
        return self._pass(inputs, watched=self._is_due(_count(inputs)))

    def is_due(self, n: int) -> bool:
        """Whether :meth:`batch` needs the autograd graph of the next batch, which has ``n`` examples."""
        if n == 1:
            return not (self._batches or self._single)
        return bool(self._verdict.mixing or self._verdict.sorting) or self._is_due(n)

    def _is_due(self, n: int) -> bool:
        """Whether the next batch, of two or more examples, is checked: the 1st, 2nd, 4th, ... or one of a new size."""
        batch = self._batches + 1
        return batch & (batch - 1) == 0 or n not in self._sizes

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
        with self._checking():
            self._check_batch(inputs, logits, segments)

    @contextmanager
    def _checking(self) -> Iterator[None]:
        try:
            yield
        except SelfCheckError:  # the next call must not trust what an earlier batch or call showed
            network_state.state_of(self.recorder.model).clear()
            raise
        finally:
            self._whole = NOTHING  # the graph takes memory

    @property
    def waits(self) -> bool:
        """Whether the last batch is still to be :meth:`compared`."""
        return self._waiting is not None

    def compared(
        self,
        cotangents: Tensor,
        squares: Callable[[Sequence[int] | None], list[dict[str, Tensor]]],
        groups: Sequence[int] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Compute the squares of the batch that :attr:`waits`, and compare those of one example with plain autograd.

        Args:
            cotangents: The cotangents [K, N, C] of the batch's logits.
            squares: Called with numbers of cotangents that add up to K, or None for one group of all: returns the
                squares of each group, as :meth:`t2v_fast.FisherRecorder.backward_groups` does. It may use up the graph.
            groups: The groups that are wanted.

        Returns:
            The squares of the wanted groups.

        Raises:
            SelfCheckError: Examples interact, or squared gradients are wrong.
        """
        first, self._waiting = self._waiting, None
        assert first is not None
        row = row_to_compare(cotangents[-1])
        before: dict[str, Tensor] = {}  # the squares of this example for the other cotangents of the last group

        def note(squares: dict[str, Tensor]) -> None:
            before.update({name: q[row] for name, q in squares.items()})

        self.recorder.before_last = note if row is not None else None
        try:
            found = squares(groups)
        finally:
            self.recorder.before_last = None
        # After the batch's own passes: its activations are free by now, and their memory serves the comparison.
        with self._checking(), stage("check", whole=True), self._unchanged_recorder():
            self._whole = first.whole
            if row is None:
                self._compare_two(first)
            else:
                last = {name: q[row, None] - before.get(name, 0) for name, q in found[-1].items()}
                self._compare_row(first, last, row, cotangents[-1], before)
        return found

    @contextmanager
    def _unchanged_recorder(self) -> Iterator[None]:
        """Passes of the check are not the caller's: they are not observed, and leave no word on unused parameters."""
        recorder = self.recorder
        before = recorder.observer, recorder.unused, recorder.skipped
        recorder.observer = None
        try:
            yield
        finally:
            recorder.observer, recorder.unused, recorder.skipped = before

    def _may_wait(self, whole: Run, program: Program | None) -> bool:
        """Whether the squares of a first batch may replace those of two of its examples."""
        return (
            program is not None
            and len(whole) > 2
            and whole.logits.dim() == 2
            and self.recorder.granularity == "filter"
            and self.recorder.unsupported != "exact"
            and self._tolerance(whole.logits) < 0.1
            and layer_with_capacity(self.recorder.model) is None
        )

    def _compare_row(
        self, first: _Waiting, found: dict[str, Tensor], row: int, cotangent: Tensor, others: dict[str, Tensor]
    ) -> None:
        """Compare the squares [1, ...] of an example with plain autograd, and remember the network if they agree.

        They were found as the difference of two sums, of which ``others`` is one.
        """
        n, dtype = len(first.whole), self._coarsest(first.whole.logits)
        tolerance = SELF_CHECK_TOLERANCE[dtype]
        alone = self._run(first.inputs, [row], watched=True)
        if not alone.logits.requires_grad:
            self._compare_two(first)
            return
        proved = self._program == first.program
        self._agree(alone, first.whole, [row], "alone")
        plain = PlainSquares(self.recorder, found)
        self._add_alone(plain, 0, alone, cotangent[row])
        agrees = plain.each_agrees(found, 0, dtype, min(tolerance, 1 / n))
        if proved and agrees:
            self._verdict = _Verdict(dtype, first.program)
            network_state.state_of(self.recorder.model).put(first.own_key, self._verdict)
            return
        if agrees or any(_is_rounded_away(found[name], q, tolerance) for name, q in others.items() if name in found):
            self._compare_two(first)
            return
        # Code that reads the number of examples may cut the graph of a larger batch alone, and change no logit.
        allowed = KINKS[dtype] if proved else tolerance
        if (wrong := plain.difference(found, [0], dtype, allowed)) is not None:
            raise SelfCheckError(f"{wrong}. {_MAY_MIX if proved else _MAY_COUNT}")
        self._compare_two(first)
        # A kink changes the squares of an example that is run alone, and not those of the batch's own activations.
        again = self._run(first.inputs, list(range(n)))
        own = PlainSquares(self.recorder, found)
        with self.recorder.regions.reading():
            fix_batch_norm_gradients(nodes_of(again.logits))
            own.add(0, again.logits, cotangent, row)
        if (wrong := own.difference(found, [0], dtype, tolerance)) is not None:
            raise SelfCheckError(wrong)

    def _compare_two(self, first: _Waiting) -> None:
        """Check a first batch by two of its examples, and remember the network for every estimator."""
        proved = self._first(first.inputs, first.whole, first.program)
        self._verdict = _Verdict(
            self._coarsest(first.whole.logits),
            first.program if proved else None,
            mixing=self._counting,
            sorting=self._sorting,
        )
        network_state.state_of(self.recorder.model).put(first.key, self._verdict)

    def _check_batch(self, inputs: Any, logits: Tensor, segments: Tensor | None) -> None:
        n = logits.shape[0] if segments is None else int(segments.max()) + 1
        program = self._program if segments is None else None
        self._whole = whole = Run(logits, places_of(n, segments), segments)
        single = n == 1 and not (self._batches or self._single)
        due = single or (n > 1 and self._is_due(n if segments is None else 1))
        if n > 1:
            self._batches += 1
        if segments is None:
            self._sizes.add(n)
        drew = self._drew
        mixing = n > 1 and self._verdict.may_mix_tokens(logits)
        # The caller reports logits that are not finite. On a CUDA device, to look at them is to wait for them.
        if not (due or drew or mixing) or not bool(logits.isfinite().all()):
            return
        first = single or self._batches == 1
        state = network_state.state_of(self.recorder.model)
        # A packed row does not tell by its shape how many examples it has.
        key = network_state.extended(self._network, (inputs, n)) if due and first else None
        verdict: _Verdict | None = state.get(key)
        waiting = None
        if due and first and verdict is None and self.purpose is not None:
            own_key = network_state.extended(self._network, (inputs, n, self.purpose))
            verdict = state.get(own_key)
            if verdict is None and self._may_wait(whole, program):
                waiting = _Waiting(inputs, Run(logits.detach(), whole.places), program, key, own_key)
        if drew or (due and verdict is None and waiting is None):
            self.recorder.check(logits, segments)
        if drew:
            # A network may draw random numbers once, for buffers that it creates at first use.
            with torch.no_grad():
                self._run(inputs, [n - 1])
            if self._drew:
                raise SelfCheckError(random_network(self.recorder.model))
        if mixing:
            self._each_alone(inputs, whole)
        if not due:
            return
        if single:
            self._single = True
        if verdict is not None:
            self._verdict, self._dtype = verdict, verdict.dtype
            verdict.calls += 1
            if n > 1 and verdict.may_mix_tokens(logits):
                self._counting = verdict.mixing or self._counting
                self._each_alone(inputs, whole)
            elif n > 1 and not verdict.has(program):
                self._alone(inputs, whole, verdict.calls * 7919 % n)
        elif waiting is not None:
            self._waiting = waiting
        elif first:
            self._compare_two(_Waiting(inputs, whole, program, key, None))
        elif self._verdict.has(program):
            pass  # the pass was row by row, and computed what was verified before
        elif self.purpose is not None and self._verdict.program is not None and self._may_wait(whole, program):
            self._waiting = _Waiting(inputs, Run(logits.detach(), whole.places), program, None, None)
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
        if n == 1:  # it has no others to depend on, but the network may draw from a generator of its own
            self._compare(inputs, whole, [0], "again")
        if n > 1 and (layer := layer_with_capacity(self.recorder.model)) is not None:
            self._counting = described(self.recorder.model, layer)
        proved = self._gradients(inputs, whole, examples, program)
        if n > 2 and not proved and not self._may_mix_tokens(whole):
            self._halves(inputs, whole, [e for e in range(n) if e not in examples])
        return proved

    def _gradients(self, inputs: Any, whole: Run, examples: list[int], program: Program | None) -> bool:
        """Compare squared gradients of some examples, as a batch of their own, with plain autograd of each example.

        The logits of the batch of their own, and of each example alone, are compared with those of the ``whole`` batch.
        Where the first one alone has the ``program`` of a batch of more than two, only this one is run alone. (All rows
        of such a network go through the same calls: a rule is right for all of them or for none.) Where the squares are
        sums over both, both are run alone: the graph of the two would agree with itself in what mixes their gradients.

        Returns:
            Whether it is proved that examples do not interact: the examples alone have the ``program`` of the batch.
        """
        recorder, n = self.recorder, len(whole)
        first, proved = None, False
        if n > 1 and program is not None:
            first = self._run(inputs, examples[:1], watched=True)
            proved = self._program == program
        # Compiled layers, which the mode would not see into, run as they are written.
        with nullcontext() if proved else Counting() as counting:
            both = self._run(inputs, examples) if n > 1 else whole
        if n > 1:
            if counting is not None and counting.counts:
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
        wrong = None
        checked = [] if n > 1 else [0]  # rows of ``both``
        if n > 1:
            # The first of these is in the middle of a batch of more than two. A number that unseen code takes from the
            # first or the last example of a batch differs when it is run alone.
            for k in range(len(examples)):
                if k and proved and n > 2 and not summed:
                    break
                checked.append(k)
                e, place = examples[k], both.places[k]
                alone = first if k == 0 and first is not None else self._run(inputs, [e], watched=proved)
                proved = proved and (k == 0 or self._program == program)
                self._agree(alone, whole, [e], "alone")
                (own,) = alone.places
                if alone.logits[own].shape != cotangent[place].shape or not alone.logits.requires_grad:
                    wrong = "another graph"
                    continue
                self._add_alone(plain, k, alone, cotangent[place])
            if wrong is None:
                wrong = self._difference(plain, got, checked, logits, SELF_CHECK_TOLERANCE)
                if wrong is not None and self._difference(plain, got, checked, logits, KINKS) is not None:
                    raise SelfCheckError(f"{wrong}. {_MAY_MIX}")
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


_MAY_MIX = "If it has a hook or a backward function of its own, these may mix the examples"
_MAY_COUNT = "The number of examples decides which functions the network calls: look where it reads a shape or a length"


@dataclass(frozen=True)
class _Waiting:
    """A batch that is not checked yet: the first, or one with another program than the first that was proved."""

    inputs: Any
    whole: Run
    program: Program | None
    key: network_state.Signature | None  # of the network with this batch, for any cotangents
    own_key: network_state.Signature | None  # for those of the caller


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

    def may_mix_tokens(self, logits: Tensor) -> bool:
        """Whether each example of a batch with these logits is compared alone."""
        return may_mix_tokens(self.mixing, self.sorting, logits)


def _is_rounded_away(difference: Tensor, of: Tensor, tolerance: float) -> bool:
    """Whether the rounding error of a sum ``of`` many terms is large beside its difference from another sum."""
    rounding = 100 * torch.finfo(of.dtype).eps * float(of.double().norm())
    return rounding > tolerance * float(difference.double().norm())


def _count(inputs: Any) -> int:
    """The number of examples of a batch, which is that of rows of its first tensor; 0 where there is none."""
    return next((len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 0)


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
