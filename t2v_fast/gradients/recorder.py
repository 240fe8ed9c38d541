"""FisherRecorder: squares of per-example gradients, computed inside the backward pass of a loop that the caller writes.

A *cotangent* of a tensor is what a backward pass carries to the tensor: the gradient, with respect to the tensor, of
the inner product of the network's output [N, ...] with a direction of the same shape. The direction itself is the
cotangent of the output. Row n of the direction belongs to example n, and sends its cotangents through the part of the
graph that example n owns. The recorder reads the cotangents at the taps (:mod:`t2v_fast.gradients.graph`) and turns
them into factors (:mod:`t2v_fast.gradients.rules`), from which the ops compute squares of per-example gradients
(:mod:`t2v_fast.gradients.squares`). No per-example gradient of a weight is stored on the usual route.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.reference import accumulate_dtype
from .checkpointing import Regions
from .compiled import eager, say_once
from .factors import Factors, Plan, Reuse
from .graph import Taps, UnsupportedError, Use, fix_batch_norm_gradients, keep_channels_last
from .members import parameters_of
from .ownership import dense
from .parameters import FilterAxis, ParameterFilter, filter_axes_of, select_parameters
from .quantised import allow_packing, unpack
from .refusals import check_segments, random_layer, taps_of
from .routes import GradientRoutes, routes_of
from .rules import has_rule
from .sharding import sharding_of
from .squares import Squares
from .tensor_parallel import check_parameters, check_whole, is_distributed, whole
from .wrappers import network_of

GRANULARITIES = ("filter", "parameter", "tensor")
UNSUPPORTED = ("error", "exact", "skip")
_NOTHING = nullcontext()


class FisherRecorder:
    """Compute squares of per-example gradients inside the backward pass of your own loop.

    Run the network's forward pass inside the recorder's context, then call :meth:`backward` with the output and its
    cotangents. While the context is open, exactly the wanted parameters require gradients; what they required before is
    restored on exit.

    A parameter that is used several times, or in parts, is exact: its gradients are summed over the uses before they
    are squared. Where a parameter enters a layer without a rule, the layer's own backward function computes the
    gradients of one example after the other.

    The result is exact for the batch as it is: row n holds the gradients of row n of the output. Whether example n
    would have the same output in another batch is seen only as far as the autograd graph shows it.
    :func:`t2v_fast.fisher` runs some examples alone to find out.

    Args:
        model: The network.
        parameters: Names of parameters, or a function of name and parameter; ``"trainable"`` takes those that require
            gradients now; None takes every floating-point parameter, frozen or not.
        granularity: ``"filter"`` for the mean of the squares over all axes of a parameter except its filter axis;
            ``"tensor"`` for the mean over all axes, which :meth:`t2v_fast.GradientNorms.of` turns into the gradient
            norm of each example; ``"parameter"`` for the squares of all entries, summed over examples.
        unsupported: What to do with a parameter from which the weight of a convolution or a linear layer is computed
            (a standardised or normalised weight), and with a parameter below a node whose inputs cannot be divided
            among the examples. ``"error"`` raises UnsupportedError. ``"exact"`` computes the weight's gradients of each
            example and takes them through the transformation, or runs plain autograd for each example in turn.
            ``"skip"`` leaves the parameter out. With ``"error"`` and ``"skip"``, examples are taken to interact where
            one reads a part of another's activations; ``"exact"`` finds the owners entry by entry.
        filter_axis: The axis of the filters where it is not the first, by parameter name or as a function of name and
            parameter. (GPT-2's Conv1D holds its output features along axis 1.)

    Attributes:
        parameters: The wanted parameters by name.
        filter_axes: The axis of the filters of each wanted parameter.
        unused: Wanted parameters that the last output did not depend on.
        sharding: How FSDP2 (``fully_shard``) shards the network; None where it does not.
        skipped: Parameters that ``unsupported="skip"`` left out of the last result.
        verified: Whether the caller runs examples alone to verify that they do not interact, as
            :func:`t2v_fast.fisher` does. Owners are then found entry by entry, as with ``unsupported="exact"``.
        regions: The regions of activation checkpointing in the forward passes.
        observer: Called after each op with the use, its factors, the number of cotangents, and the times in seconds at
            which the op began and ended.
        before_last: Called before the last cotangent of a call, with the result of its group so far. Parameters that
            ``unsupported="exact"`` leaves to plain autograd are not in it.

    Raises:
        ValueError: An argument is none of those above, or no parameter is left.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        >>> with FisherRecorder(network) as recorder:
        ...     logits = network(torch.randn(5, 4))  # [N, C]
        ...     squares = recorder.backward(logits, torch.randn(2, 5, 3))  # cotangents [K, N, C]
        >>> for name, q in squares.items():
        ...     print(name, tuple(q.shape))
        0.weight (5, 8)
        0.bias (5, 8)
        2.weight (5, 6)
        2.bias (5, 6)
        4.weight (5, 3)
        4.bias (5, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: ParameterFilter = None,
        granularity: str = "filter",
        *,
        unsupported: str = "error",
        filter_axis: FilterAxis = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if unsupported not in UNSUPPORTED:
            raise ValueError(f"unsupported is {unsupported!r}, expected one of {', '.join(UNSUPPORTED)}")
        self.model = network_of(model)
        self.sharding = sharding_of(self.model)  # before the parameters are named, because gathered ones are others
        # Whether several processes share the network's parameters, so that each has a part of some of them.
        self.divided = self.sharding is not None or any(map(is_distributed, parameters_of(self.model)))
        self.granularity = granularity
        self.unsupported = unsupported
        self.parameters = select_parameters(model, parameters)  # by names with or without wrappers
        check_parameters(self.parameters)
        self.filter_axes = filter_axes_of(self.parameters, filter_axis)
        self.unused: frozenset[str] = frozenset()
        self.skipped: frozenset[str] = frozenset()
        self.verified = False
        self.observer: Callable[[Use, Factors, int, float, float], None] | None = None
        self.before_last: Callable[[dict[str, Tensor]], None] | None = None
        self.regions = Regions()
        self._contexts = ExitStack()
        say_once(model, self.model)
        self._plans: dict[tuple[str, int], Plan] = {}  # of the layers, by the first parameter and input
        self._reported: set[str] = set()  # parameters whose slower route was logged
        self._looked_for_random_layers = False  # since the context was entered
        self._required: list[tuple[nn.Parameter, bool]] | None = None  # requires_grad of each parameter before
        # Of outputs that were checked, as long as they exist: the last node, and what was found.
        self._checked = WeakTensorKeyDictionary()

    def __enter__(self) -> FisherRecorder:
        if self._required is not None:
            raise RuntimeError("this recorder is in use: its context was entered before and has not been left")
        for name, p in self.parameters.items():
            if p._backward_hooks:
                raise UnsupportedError(
                    f"the parameter {name!r} has a hook on its gradient (register_hook), which squares of per-example "
                    "gradients do not pass through: remove the hook, or leave the parameter out with parameters=..."
                )
        self._looked_for_random_layers = False
        if self.sharding is not None:
            self._contexts.enter_context(self.sharding)
        self._required = [(p, p.requires_grad) for p in parameters_of(self.model)]
        wanted = {id(p) for p in self.parameters.values()}
        for p, _ in self._required:
            p.requires_grad_(id(p) in wanted)
        self._contexts.callback(allow_packing, unpack(self.model))
        self._contexts.enter_context(eager)
        self.regions = self._contexts.enter_context(self.regions.followed())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._required is not None  # since the context was entered
        try:
            self._contexts.__exit__(kind, error, trace)  # other processes of a sharded network hear of the error
        finally:
            for p, required in self._required:
                p.requires_grad_(required)
            self._required = None

    def backward(
        self,
        output: Tensor,
        cotangents: Tensor,
        weights: Tensor | None = None,
        retain_graph: bool = False,
        segments: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Backpropagate ``cotangents`` and return squares of per-example gradients, summed over the cotangents.

        Args:
            output: The output [N, ...] of the model's forward pass inside the recorder's context.
            cotangents: Cotangents of the output, of its shape or [K, N, ...].
            weights: Weights [N] of the examples in the sums of granularity ``"parameter"``; one each if None. Other
                granularities take no weights.
            retain_graph: Whether to keep the graph for another backward pass.
            segments: For a row of packed sequences, whose output is [1, T, ...]: the number of the example of each
                position, int64 [T], or -1 for padding. N is then the number of sequences.
            into: For granularity ``"parameter"``: the result of an earlier call, or an empty dictionary. The squares
                are added to it in place, and it is returned. After an error its values mean nothing.

        Returns:
            One tensor for each parameter. A parameter with O filters gets [N, O] at granularity ``"filter"``, [N] at
            ``"tensor"``, and its own shape at ``"parameter"``. Parameters that the output does not depend on get zeros,
            and are listed in :attr:`unused`.

        Raises:
            UnsupportedError: There is no exact answer for a parameter; the message names the parameter.
            ValueError: A shape does not fit, or the output has no autograd graph.
            RuntimeError: The recorder's context is not open.

        Example:
            The squares are those of plain autograd, one example at a time:

            >>> network = nn.Linear(4, 3, bias=False)
            >>> x, u = torch.randn(5, 4), torch.randn(5, 3)
            >>> with FisherRecorder(network, granularity="parameter") as recorder:
            ...     total = recorder.backward(network(x), u)["weight"]
            >>> each = [torch.autograd.grad(network(x)[n], network.weight, u[n])[0] for n in range(5)]
            >>> bool(torch.allclose(total, sum(g.square() for g in each), atol=1e-5))
            True
        """
        if not isinstance(output, Tensor) or not output.dim():
            what = f"{list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the output is {what}, expected a tensor [N, ...] with the examples along its first axis")
        if cotangents.shape == output.shape:
            cotangents = cotangents[None]
        if into is not None and self.granularity != "parameter":
            raise ValueError(
                f"into is for granularity 'parameter', got {self.granularity!r}, whose values are those of examples"
            )
        totals = {} if into is None else into
        (found,) = self._backward(output, cotangents, [len(cotangents)], weights, retain_graph, segments, totals)
        if into is None:
            return found
        for name, squares in found.items():
            into[name] = into[name].add_(squares) if name in into else squares
        return into

    def backward_groups(
        self, output: Tensor, cotangents: Tensor, groups: Sequence[int], retain_graph: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Backpropagate groups of cotangents, with sums of squares of their own for each group.

        What depends on the layers' inputs alone is computed once for all groups.

        Args:
            output: The output [N, ...] of the model's forward pass.
            cotangents: Cotangents [K, N, ...] of the output.
            groups: The number of cotangents in each group; the numbers add up to K.
            retain_graph: Whether to keep the graph for another backward pass.

        Returns:
            An iterator over the results of the groups, each as :meth:`backward` returns it. A group's backward passes
            run when its result is asked for.

        Raises:
            ValueError: The numbers do not add up to K, or one of them is below 1.

        Example:
            >>> network = nn.Linear(4, 3)
            >>> with FisherRecorder(network) as recorder:
            ...     logits = network(torch.randn(5, 4))
            ...     parts = list(recorder.backward_groups(logits, torch.randn(3, 5, 3), [1, 2]))
            >>> [tuple(part["weight"].shape) for part in parts]
            [(5, 3), (5, 3)]
        """
        if sum(groups) != len(cotangents) or min(groups, default=0) < 1:
            raise ValueError(f"groups are {list(groups)}, expected whole numbers that add up to {len(cotangents)}")
        return self._backward(output, cotangents, groups, None, retain_graph)

    def check(self, output: Tensor, segments: Tensor | None = None) -> None:
        """Raise UnsupportedError where :meth:`backward` would, from the graph of ``output`` alone.

        Args:
            output: The output [N, ...] of the model's forward pass inside the recorder's context.
            segments: As for :meth:`backward`.

        Raises:
            UnsupportedError: There is no exact answer for a parameter.
        """
        with self.regions.reading():
            found = self._routed(output, segments)
        # Gathered and recomputed tensors are others later, and segments may be written to.
        if segments is None and self.sharding is None and not self.regions.alive:
            self._checked[output] = output.grad_fn, found

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """Square one gradient of a parameter, and take means at the recorder's granularity.

        Args:
            name: The parameter's name.
            gradient: A gradient of the parameter, in the parameter's shape.

        Returns:
            The mean squares [O] of the filters at granularity ``"filter"``, one number at ``"tensor"``, and the
            squares of all entries at ``"parameter"``.

        Example:
            >>> recorder = FisherRecorder(nn.Linear(4, 3))
            >>> recorder.reduce("weight", torch.full((3, 4), 2.0))
            tensor([4., 4., 4.])
        """
        if self.granularity == "parameter":
            return gradient.square()
        if self.granularity == "filter" and gradient.dim() < 2:  # most parameters: each filter has one entry
            return gradient.reshape(-1).square()
        rows = self._rows(name, gradient)
        squares = torch.linalg.vector_norm(rows, dim=1).square()  # without a tensor of the squares
        return squares / max(1, rows.shape[1]) if self.granularity == "filter" else squares.sum() / max(1, rows.numel())

    def plain_gradients(
        self, output: Tensor, cotangent: Tensor, example: int, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """Compute the gradients of one example by plain autograd; the graph is kept.

        Args:
            output: The output [N, ...] of the model's forward pass inside the recorder's context.
            cotangent: A cotangent of the output, in its shape. Only the example's row is used.
            example: The number of the example.
            names: The parameters to differentiate by.

        Returns:
            The gradients by parameter name, in the parameters' shapes.
        """
        names = list(names)
        single = torch.zeros_like(cotangent)
        single[example] = cotangent[example]
        wanted = [*map(self.leaves.__getitem__, names)]
        with self.regions.reading():
            gradients = torch.autograd.grad(
                [output], wanted, [single], retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return {name: dense(whole(g)) for name, g in zip(names, gradients, strict=True)}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What the autograd graph has for each wanted parameter: the parameter, or what FSDP2 gathered of it."""
        return dict(self.parameters) if self.sharding is None else self.sharding.leaves(self.parameters)

    def reading(self) -> AbstractContextManager[None]:
        """A context in which what the graph has saved may be read."""
        return _NOTHING if self.sharding is None else self.sharding.read()

    def _backward(
        self,
        output: Tensor,
        cotangents: Tensor,
        groups: Sequence[int],
        weights: Tensor | None,
        retain_graph: bool,
        segments: Tensor | None = None,
        totals: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Iterator[dict[str, Tensor]]:
        """The results of the groups, one after the other, without what was added to ``totals``."""
        if self._required is None:
            raise RuntimeError(
                "FisherRecorder.backward outside its context: use `with FisherRecorder(model) as recorder:`"
            )
        if cotangents.shape[1:] != output.shape or not len(cotangents):
            raise ValueError(
                f"cotangents are {list(cotangents.shape)}, expected {list(output.shape)} or [K >= 1, ...] of them"
            )
        if not self._looked_for_random_layers:
            self._looked_for_random_layers = True
            if (layer := random_layer(self.model)) is not None:
                raise UnsupportedError(
                    f"the layer {layer} is in training mode and draws random numbers: call eval() on the network"
                )
        n = output.shape[0] if segments is None else check_segments(segments, output, cotangents)
        if weights is not None and (self.granularity != "parameter" or list(weights.shape) != [n]):
            raise ValueError(
                f"weights are {list(weights.shape)} at granularity {self.granularity!r}, expected [{n}] at 'parameter' "
                "(other values are per example: weigh those)"
            )
        check_whole(output, cotangents)
        if output.grad_fn is None:
            raise ValueError(
                "the output has no autograd graph: run the forward inside the recorder, with gradients enabled"
            )
        node, found = self._checked.pop(output, (None, None))
        known = segments is None and node is output.grad_fn
        with self.regions.reading():
            taps, routes = found if known else self._routed(output, segments)
            fix_batch_norm_gradients(taps.order)
            if not self.regions.alive:  # to look at a ReLU's activations would compute them again
                keep_channels_last(taps)
            tapped = taps.of(routes.single | routes.summed)
            called = not all(map(has_rule, tapped))
        self.unused, self.skipped = taps.unused, routes.skipped
        squares = Squares(self, output, n, tapped, routes, len(cotangents), weights, totals)
        left = len(cotangents)
        for group in cotangents.split(list(groups)):
            for k, cotangent in enumerate(group, 1):
                left -= 1
                if not left and self.before_last is not None:
                    self.before_last(self._means(squares.so_far()))
                if tapped.uses:
                    with self.regions.reading():
                        squares.add(cotangent, len(group) - k, retain_graph or bool(routes.plain) or called or left > 0)
            sums = squares.take()
            if routes.plain:
                sums |= self._one_by_one(output, group, routes.plain, n, weights, segments)
            wanted = [name for name in self.parameters if name in sums or name not in totals]
            found = {name: sums[name] if name in sums else self.zeros(name, n) for name in wanted}
            yield self._means({name: q for name, q in found.items() if name not in routes.skipped})

    def reuse_at(self, uses: Sequence[Use], cotangents: int, single: Set[str]) -> Reuse:
        """What the cotangents of a batch share at a node, with the plan that the node's layer had in the last batch."""
        reuse = Reuse(cotangents, sum(use.parameter in single for use in uses))
        reuse.plan = self._plans.setdefault((uses[0].parameter, uses[0].slot), reuse.plan)
        return reuse

    def _routed(self, output: Tensor, segments: Tensor | None) -> tuple[Taps, GradientRoutes]:
        """The uses of the wanted parameters in the graph of an output, and their routes."""
        taps = self._taps(output, segments)
        return taps, routes_of(taps, self.unsupported, self._reported)

    def _taps(self, output: Tensor, segments: Tensor | None = None) -> Taps:
        with self.reading():
            return taps_of(output, self.leaves, self.verified or self.unsupported == "exact", segments)

    def _one_by_one(
        self,
        output: Tensor,
        cotangents: Tensor,
        names: Iterable[str],
        n: int,
        weights: Tensor | None,
        segments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sums of squares by plain autograd, for one example and one cotangent at a time."""
        totals = {name: self.zeros(name, n) for name in names}
        numbers = [1.0] * n if weights is None else weights.tolist()
        for e in range(n):
            for cotangent in cotangents:
                row, own = e, cotangent
                if segments is not None:  # one row, with zeros for the other sequences
                    row, own = 0, cotangent.movedim(1, -1).mul((segments == e).to(cotangent)).movedim(-1, 1)
                for name, g in self.plain_gradients(output, own, row, totals).items():
                    square = g.to(totals[name].dtype).square()
                    if self.granularity == "parameter":
                        totals[name] += numbers[e] * square
                    else:
                        totals[name][e] += self._rows(name, square).sum(1)
        return totals

    def _rows(self, name: str, t: Tensor) -> Tensor:
        """A tensor of a parameter's shape as [filters, entries of each], the entries in any order."""
        if t.dim() == 0:
            return t.reshape(1, 1)
        t = t.movedim(self.filter_axes[name], 0)
        if t.dim() == 4 and not t.is_contiguous():  # channels-last, most often: a view in the order of memory
            t = t.permute(0, 2, 3, 1)
        return t.reshape(len(t), math.prod(t.shape[1:]))

    def zeros(self, name: str, n: int) -> Tensor:
        """Sums of squares of a parameter that nothing has been added to."""
        p = self.parameters[name]
        shape = p.shape if self.granularity == "parameter" else (n, p.shape[self.filter_axes[name]] if p.dim() else 1)
        return torch.zeros(shape, dtype=accumulate_dtype(p.dtype), device=p.device)

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn sums of squares into means at the recorder's granularity; sums over filters are divided in place."""
        if self.granularity == "parameter":
            return sums
        sizes = {name: self.parameters[name].numel() for name in sums}
        if self.granularity == "tensor":
            return {name: q.sum(1) / max(1, sizes[name]) for name, q in sums.items()}
        if sums:  # one call for all: calling a small op between large ones takes longer than the op itself
            torch._foreach_div_(
                list(sums.values()), [max(1, sizes[name]) / max(1, q.shape[1]) for name, q in sums.items()]
            )
        return sums
