"""Batches: run a network over the batches of a loader, and say how each example is weighted and sampled.

:func:`forward_passes` prepares a network and yields a function that turns a loader into :class:`Batch` objects. Every
check that concerns a single batch is here. :class:`Schedule` follows the loader and gives the :class:`Draws` of each
batch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from ..gradients.fast_forward import fast_forward
from ..gradients.graph import UnsupportedError
from ..gradients.members import modules_of
from ..gradients.recorder import FisherRecorder
from ..gradients.tensor_parallel import whole
from ..ops.asynchronous import to_device
from ..spans import forward_by_kind, stage
from .allocation import seeds_of
from .deferred import DeferredChecks
from .explanations import explanation
from .graphs import Passes
from .packing import AS_GIVEN, IGNORED, Texts, has_decoder_tokens, padding_mask
from .self_check import SelfCheck
from .sketches import MoreSketches

Forward = Callable[[nn.Module, Any], Tensor]
Mask = Callable[[Any, Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Batch:
    """One batch after its forward pass. The inputs are not kept, so that their memory is free for the next batch."""

    size: int  # N, the number of examples
    logits: Tensor  # [N, C], or [N, T, C] for tokens, or [1, T, C] for the tokens of a packed row
    labels: Tensor | None
    mask: Tensor | None  # [N, T], true where a token counts; None where every token does, and for logits [N, C]
    checks: DeferredChecks  # of values of this batch that the host need not wait for
    segments: Tensor | None = None  # [T], the example of each token of a packed row, on the CPU; -1 for padding
    check: SelfCheck | None = None  # to which the squares are to be handed over

    def count_tokens(self) -> Tensor:
        """Count the tokens of each example that the mask keeps, float64 [N]."""
        if self.segments is not None:
            assert self.mask is not None  # a packed row has one
            return torch.bincount(self.segments[self.mask[0].cpu()], minlength=self.size).double()
        if self.mask is None:
            return torch.full((self.size,), self.logits.shape[1], dtype=torch.float64)
        return self.mask.cpu().bool().sum(1).double()


@contextlib.contextmanager
def forward_passes(
    recorder: FisherRecorder,
    forward: Forward,
    device: str | torch.device,
    mask: Mask = lambda inputs, labels: None,
    *,
    channels_last: bool = True,
    self_check: bool = True,
    texts: Texts = AS_GIVEN,
    adds_up: bool = False,
    passes: Passes | None = None,
    parts: Sequence[int] = (),
    purpose: tuple[str, ...] | None = None,
) -> Iterator[Callable[[Iterable[Any]], Iterator[Batch]]]:
    """Prepare the recorder's network; yield a function that runs the network over a loader, batch after batch.

    The network is as it was when the context ends. With ``self_check``, every forward pass is checked by
    :class:`t2v_fast.estimation.self_check.SelfCheck`. ``texts`` says how batches of text are read. ``adds_up``
    says that the caller adds up what the processes of a sharded network find; others are refused. ``parts`` are the
    numbers of logits of the heads, where the logits are those of several heads. Logits that ``passes`` replays have no
    autograd graph: the caller takes the squares from ``passes`` as well. With a ``purpose``, the caller hands the
    squares of each batch that has a ``check`` over to it, as :class:`~t2v_fast.estimation.self_check.SelfCheck` says.
    """
    passes = Passes(recorder) if passes is None else passes
    if recorder.sharding is not None and not adds_up:
        raise UnsupportedError(
            f"the parameter {min(recorder.parameters)!r} is sharded over processes (fully_shard), whose results this "
            "function does not add up: t2v_fast.fisher, FisherRecorder and Task2Vec.embed do"
        )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        recorder,
        _unchanged_buffers(recorder.model),
        _forward_of(recorder, forward, device, channels_last) as fast,
        passes.of(fast),
    ):
        check = SelfCheck(recorder, fast, parts, purpose) if self_check else None

        def run(loader: Iterable[Any]) -> Iterator[Batch]:
            checks, copies = DeferredChecks(), DeviceCopies(torch.device(device))
            for inputs, labels, segments in _rows(loader, texts):
                checks.begin_batch()
                if forward is default_forward:
                    _check_decoder(recorder.model, inputs, labels)
                there = copies.of(inputs)
                n = _check_inputs(there, checks)
                if n == 0:
                    continue
                with stage("forward"):
                    checked = check is not None and check.is_due(n)
                    output = passes.replay(there, segments, checked, checks.host_binds)
                if output is None:
                    try:
                        with forward_by_kind(recorder.model, n):
                            output = check.forward(there) if check else fast(recorder.model, there)
                    except Exception as error:
                        if (clearer := explanation(error, recorder.model, there, checks.batch)) is None:
                            raise
                        raise clearer from error
                logits = _check_logits(output, n)
                valid = _check_mask(mask(inputs, labels), labels, logits) if logits.dim() == 3 else None
                if segments is not None:
                    n, valid = int(segments.max()) + 1, _mask_of_row(valid, segments, logits)
                if check:
                    with stage("check", whole=True):
                        check.batch(there, logits, segments)
                del there, output  # so that their memory is free for the next batch
                yield Batch(n, logits, labels, valid, checks, segments, check if check and check.waits else None)
                if check and check.waits:
                    raise RuntimeError("the squares of a batch were not handed over to its check")
            checks.finish()

        yield run


def _forward_of(
    recorder: FisherRecorder, forward: Forward, device: str | torch.device, channels_last: bool
) -> contextlib.AbstractContextManager[Forward]:
    """The forward function as fast as the device allows; with whole logits where processes share the weights."""
    if recorder.divided:
        return contextlib.nullcontext(lambda model, inputs: whole(forward(model, inputs)))
    return fast_forward(recorder.model, forward, device, channels_last)


@dataclass(frozen=True)
class Draws:
    """How the examples of one batch are weighted and sampled."""

    examples: Tensor | slice  # their numbers in the data set
    weights: Tensor  # float64 [N]
    inclusion: Tensor | None  # float64 [N], the probabilities of being visited; None where all of them are one
    samples: int | Tensor  # cotangents of each example: one number for all, or int64 [N]
    source: torch.Generator | Tensor  # of random numbers: one generator, or a seed for each example, int64 [N]
    more: MoreSketches | None = None  # for examples that were visited before


class Schedule:
    """The weights, inclusion probabilities, numbers of cotangents and random numbers of examples, batch after batch.

    ``samples`` is one number for all examples, and the random numbers come from one generator in the order of the
    loader. Or ``samples`` has one int64 entry for each example of the data set, and each example has its own seed.
    ``weights`` and ``inclusion`` have one entry for each example of the data set. ``examples`` are the numbers of the
    examples that the loader yields, in its order; by default 0, 1, 2 and so on. ``more`` are sketches for
    examples that were visited before.
    """

    def __init__(
        self,
        samples: int | Tensor,
        seed: int,
        weights: Tensor | None = None,
        inclusion: Tensor | None = None,
        examples: Tensor | None = None,
        more: MoreSketches | None = None,
    ) -> None:
        self.samples, self.seed, self.more = samples, seed, more
        self.weights = None if weights is None else weights.cpu()
        self.inclusion, self.examples = inclusion, examples
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0  # examples that batches have had so far

    def take(self, n: int) -> Draws:
        """Return the draws of the next ``n`` examples. Raise ValueError where the loader yields too many examples."""
        begin, self.seen = self.seen, self.seen + n
        examples: Tensor | slice = slice(begin, self.seen)
        if self.examples is not None:
            examples = self.examples[examples]
            if len(examples) < n:
                raise ValueError(f"the loader yields more than the {len(self.examples)} examples that are expected")
        if self.weights is None:
            weights = torch.ones(n, dtype=torch.float64)
        else:
            weights = self.weights[examples].double()
            if len(weights) < n:
                raise ValueError(
                    f"weights has {len(self.weights)} entries but the loader yields more examples than that"
                )
        inclusion = None if self.inclusion is None else self.inclusion[examples]
        if isinstance(self.samples, Tensor):
            assert isinstance(examples, Tensor)  # numbers of cotangents come with the numbers of the examples
            more = None if self.more is None else self.more.of(examples)
            return Draws(examples, weights, inclusion, self.samples[examples], seeds_of(examples, self.seed), more)
        return Draws(examples, weights, inclusion, self.samples, self.generator)

    def check_finished(self, at_least_one: bool = True) -> None:
        """Raise ValueError unless the loader gave at least one example, and as many as expected."""
        if at_least_one and self.seen == 0:
            raise ValueError("the loader gave no example")
        if self.examples is not None and len(self.examples) != self.seen:
            raise ValueError(f"the allocation visits {len(self.examples)} examples but the loader gave {self.seen}")
        if self.examples is None and self.weights is not None and len(self.weights) != self.seen:
            raise ValueError(f"weights has {len(self.weights)} entries but the loader gave {self.seen}")

    def mean_samples(self) -> int | float:
        """Return the number of cotangents of an example, on average where the examples differ."""
        if not isinstance(self.samples, Tensor):
            return self.samples
        samples = self.samples if self.examples is None else self.samples[self.examples]
        return float(samples.double().mean())


def _rows(loader: Iterable[Any], texts: Texts) -> Iterator[tuple[Any, Tensor | None, Tensor | None]]:
    """Yield the inputs and labels of each batch of a loader, or of each packed row, with the segments of the row."""
    for batch in loader:
        inputs, labels = split_batch(batch)
        if isinstance(inputs, Mapping) and not isinstance(inputs, dict):  # as what tokenizers return
            inputs = dict(inputs)
        if labels is not None and not isinstance(labels, Tensor):
            labels = torch.as_tensor(labels)
        yield from texts.rows(inputs, labels)


def _mask_of_row(valid: Tensor | None, segments: Tensor, logits: Tensor) -> Tensor:
    """Return which tokens of a packed row count, [1, T]: none of the padding does."""
    if list(logits.shape[:2]) != [1, len(segments)] or logits.dim() != 3:
        raise ValueError(f"the logits of a packed row are {list(logits.shape)}, expected [1, {len(segments)}, C]")
    theirs = (segments >= 0)[None]
    return theirs if valid is None else theirs & valid.cpu().bool()


def _default_forward(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model, mappings as keyword arguments; return its output, or the output's ``logits``."""
    if isinstance(inputs, Mapping):
        # A cache copies keys and values, and Hugging Face's models keep packed sequences apart only without one.
        cached = getattr(getattr(model, "config", None), "use_cache", False)
        if cached and "use_cache" in inspect.signature(model.forward).parameters:
            inputs = {"use_cache": False, **inputs}
        output = model(**inputs)
    else:
        output = model(inputs)
    return getattr(output, "logits", output)


def _default_mask(inputs: Any, labels: Tensor | None) -> Tensor | None:
    """Return which tokens count, [N, T]: all but padding and tokens with label -100. None means all tokens."""
    mask = padding_mask(inputs)
    if mask is not None and mask.dim() == 4 and mask.shape[0] == 1:  # of queries and keys, and labels are [1, T]
        mask = None
    mask = None if mask is None else mask.bool().cpu()
    if labels is not None and not labels.is_floating_point():
        wanted = (labels != IGNORED).cpu()
        mask = wanted if mask is None else mask & wanted
    return mask


# The defaults of other functions that run a network over a loader.
default_forward, default_mask = _default_forward, _default_mask


def check_loader(loader: Any) -> None:
    """Raise TypeError for what would yield single examples in place of batches: a tensor, or a map-style data set."""
    kind, instead = type(loader).__name__, "DataLoader(data, batch_size=...), with None if each item is a batch"
    if isinstance(loader, Tensor):
        instead = "[x] if it is one batch, or DataLoader(TensorDataset(x), batch_size=...) if it holds a data set"
    elif not isinstance(loader, Dataset) or isinstance(loader, IterableDataset):
        return
    raise TypeError(f"the loader is a {kind}, expected batches: pass {instead}")


def _check_decoder(model: nn.Module, inputs: Any, labels: Tensor | None) -> None:
    """Raise ValueError where an encoder-decoder would make up the tokens of its decoder without the labels."""
    config = getattr(model, "config", None)
    if labels is None or labels.dim() < 2 or not getattr(config, "is_encoder_decoder", False):
        return
    if isinstance(inputs, Mapping) and not has_decoder_tokens(inputs):
        raise ValueError(
            "the batch of an encoder-decoder has labels and no decoder_input_ids. The network does not get the labels: "
            "add decoder_input_ids, which model.prepare_decoder_input_ids_from_labels(labels) makes"
        )


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Split what a loader yields, (inputs, labels, ...), inputs alone or a mapping with "labels", into two."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    return batch, None


class DeviceCopies:
    """Copies of the inputs of batches on a device.

    They are copied to a CUDA device from pinned memory, on a stream of its own. The host does not wait for the device.
    It reads a batch and starts the copy while the device still computes the batch before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        except RuntimeError as error:
            if torch.cuda.is_available():
                raise
            raise RuntimeError(f"the device is {str(device)!r}, and this torch sees no CUDA device") from error

    def of(self, inputs: Any) -> Any:
        """Return the inputs of a batch on the device, ready for the current stream."""
        if self._stream is None:
            return tree_map(lambda t: _usable(_moved(t, self.device)), inputs)
        with torch.cuda.stream(self._stream):
            there = tree_map(lambda t: _moved(t, self.device), inputs)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._stream.record_event())
        for t, before in zip(tree_leaves(there), tree_leaves(inputs), strict=True):
            # The allocator must not reuse the memory before the current stream has read it. What the loader made on
            # the device was not copied, and belongs to the stream that the loader used.
            if isinstance(t, Tensor) and t is not before:
                t.record_stream(current)
        return tree_map(_usable, there)


def _moved(t: Any, device: torch.device) -> Any:
    return to_device(t, device) if isinstance(t, Tensor) else t


def _usable(t: Any) -> Any:
    """Copy an inference tensor, which autograd cannot save."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


def _check_inputs(inputs: Any, checks: DeferredChecks) -> int:
    """Return the number of examples of a batch. Raise ValueError where floating-point inputs are not finite."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    batch = checks.batch
    if not tensors:
        raise TypeError(f"batch {batch} holds no tensor but {type(inputs).__name__}: expected tensors, examples first")
    for t in tensors:
        if t.is_floating_point() and t.dim():
            checks.finite(t, lambda n, _: f"batch {batch}, example {n}: the input has NaN or infinite values")
        elif t.is_floating_point() and not t.isfinite():
            raise ValueError(f"batch {batch}: an input is NaN or infinite")
    return tensors[0].shape[0]


def _check_logits(logits: Any, n: int) -> Tensor:
    """Raise an error unless these are the logits of n examples."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(logits).__name__}, expected logits [N, C]: pass forward=lambda model, x: ..., "
            "or wrap the model in a module that returns the logits alone"
        )
    if logits.dim() not in (2, 3) or logits.shape[0] != n:
        raise ValueError(
            f"the model gave logits {list(logits.shape)} for {n} examples, expected [{n}, C], or [{n}, T, C] for tokens"
        )
    return logits


def _check_mask(mask: Tensor | None, labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """Raise ValueError unless the mask has an entry for each token of logits [N, T, C]."""
    if mask is not None and mask.shape != logits.shape[:2]:
        given = "" if labels is None else f", and the labels are {list(labels.shape)}"
        raise ValueError(
            f"the logits are {list(logits.shape)}, one row for each token, but the mask of the tokens that count is "
            f"{list(mask.shape)}{given}: expected {list(logits.shape[:2])}. Give a label for each token, or let the "
            "model pool its tokens (forward=...)"
        )
    return mask


@contextlib.contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers that a forward pass in training mode changes, such as batch norm's running statistics."""
    before = [(b, b.clone()) for b in model.buffers()] if any(m.training for m in modules_of(model)) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in before:
                b.copy_(value)
