"""Batches of text: labels that are not shifted yet, and rows of several sequences one after the other (packed rows).

A packed row has inputs [1, T] without padding. Each sequence is a *segment* of it, and an example of its own. The
attention must keep segments apart, which :mod:`t2v_fast.gradients.attention` verifies for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that does not count, as in torch's cross_entropy
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # where sequences begin, and the number of tokens
LONGEST = ("max_length_q", "max_length_k", "max_seqlen")
SEGMENTS = "segments"  # the number of each token's sequence; not an argument of the model


@dataclass(frozen=True)
class Texts:
    """How batches of text are read.

    Attributes:
        shift_labels: Whether ``labels[n, t]`` is the token ``t`` itself, which the logits at ``t - 1`` predict. None
            means no, and refuses labels that are the tokens themselves.
        packed: Whether rows are packed. None means no, and refuses batches that look packed.
    """

    shift_labels: bool | None = None
    packed: bool | None = None

    def rows(self, inputs: Any, labels: Tensor | None) -> Iterator[tuple[Any, Tensor | None, Tensor | None]]:
        """Yield inputs, labels of the logits at the same positions, and segments [T].

        A batch that is not packed is yielded as it is, with None for the segments. A packed one is yielded row by row.

        Raises:
            ValueError: The batch does not fit; the message says what is expected.
        """
        if not self.packed:
            if self.packed is None and (why := _looks_packed(inputs)):
                raise ValueError(
                    f"the batch looks packed: {why}. packed=True takes each sequence of a row as an example; "
                    "packed=False takes a whole row as one"
                )
            yield inputs, self._labels(inputs, labels, None), None
            return
        if not isinstance(inputs, Mapping) or not any(_is_row(t) for t in inputs.values()):
            raise ValueError(
                "packed=True needs batches that are mappings with input_ids [1, T] (or [rows, T]) and one of "
                f"{SEGMENTS}, seq_idx, {', '.join(CUMULATIVE)} or position_ids, got {_shown(inputs)}"
            )
        rows = [t.shape[:2] for t in inputs.values() if _is_row(t)]
        count, length = max(rows, key=lambda shape: shape[1])  # a mask [1, 1, T, T] may come first
        if count > 1 and (alone := [key for key in CUMULATIVE if key in inputs]):
            raise ValueError(f"{alone[0]} is for one row, got {count} rows: give each row as a batch of its own")
        for row in range(count):
            here = {key: t[row : row + 1] if _has_rows(t, count) else t for key, t in inputs.items()}
            segments = segments_of(here, length)
            y = self._labels(here, None if labels is None else labels[row : row + 1], segments)
            yield {key: t for key, t in here.items() if key != SEGMENTS}, y, segments

    def _labels(self, inputs: Any, labels: Tensor | None, segments: Tensor | None) -> Tensor | None:
        name = "decoder_input_ids" if isinstance(inputs, Mapping) and has_decoder_tokens(inputs) else "input_ids"
        tokens = inputs.get(name) if isinstance(inputs, Mapping) else inputs
        tokens = tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.dim() == 2 else None
        if (
            self.shift_labels is not False
            and labels is not None
            and tokens is not None
            and labels.shape == tokens.shape
        ):
            labels_, tokens_ = labels.cpu(), tokens.cpu()
            themselves = _same(labels_, tokens_)
            if self.shift_labels is None and themselves:
                raise ValueError(
                    "the labels are the input tokens themselves. Models for the next token predict labels[t + 1] at "
                    "position t: pass shift_labels=True, or False if labels[t] is what the logits at t predict"
                )
            if self.shift_labels and not themselves and _same(labels_[:, :-1], tokens_[:, 1:]):
                raise ValueError(
                    f"shift_labels is True, but labels[n, t] is {name}[n, t + 1] already, as for encoder-decoders: the "
                    "labels would be shifted twice. Leave shift_labels out"
                )
        if self.shift_labels:
            return shifted(inputs, labels, segments)
        return labels


AS_GIVEN = Texts(shift_labels=False, packed=False)


def _same(labels: Tensor, tokens: Tensor) -> bool:
    """Whether labels are these tokens, as far as they count, and differ from each other."""
    counts = labels != IGNORED
    return bool((labels == tokens)[counts].all()) and len(labels[counts].unique()) > 1


def padding_mask(inputs: Any) -> Tensor | None:
    """Return the mask of a batch [N, T] that is 0 where a token of the output is padding; None if the batch has none.

    The output of an encoder-decoder has the tokens of its decoder, and ``attention_mask`` is of the encoder's.
    """
    if not isinstance(inputs, Mapping):
        return None
    return inputs.get("decoder_attention_mask" if has_decoder_tokens(inputs) else "attention_mask")


def has_decoder_tokens(inputs: Mapping[str, Any]) -> bool:
    """Return whether a batch has the tokens of a decoder beside those of an encoder."""
    return any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def shifted(inputs: Any, labels: Tensor | None, segments: Tensor | None = None) -> Tensor:
    """Return the label of the next token at each position, and -100 where there is none.

    Neither padding (:func:`padding_mask`) nor the last token of a sequence has a label.

    Args:
        inputs: The inputs of the batch.
        labels: A label for each token, int64 [N, T], as Hugging Face's collators make them.
        segments: The sequence of each token of a packed row, [T].

    Raises:
        ValueError: There are no such labels.

    Example:
        >>> shifted({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, torch.tensor([[5, 6, 7, 8]]))
        tensor([[-100,    7,    8, -100]])
    """
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        shape = "none" if labels is None else f"{list(labels.shape)} {labels.dtype}"
        raise ValueError(f"shift_labels=True needs integer labels [N, T], one for each token, got {shape}")
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    there = padding_mask(inputs)
    if isinstance(there, Tensor) and there.shape == labels.shape:
        there = there.to(labels.device).bool()
        following[:, :-1].masked_fill_(~(there[:, 1:] & there[:, :-1]), IGNORED)
    if segments is not None:
        following[0, :-1].masked_fill_((segments[1:] != segments[:-1]).to(labels.device), IGNORED)
    return following


def segments_of(inputs: Mapping[str, Any], length: int) -> Tensor:
    """Return the number of the sequence of each token of a packed row, int64 [T] on the CPU, and -1 for padding.

    Args:
        inputs: The inputs of one row: ``segments`` or ``seq_idx`` [1, T], the sequence of each token; ``cu_seq_lens_q``
            or ``cu_seqlens`` [sequences + 1], where the sequences begin; or ``position_ids`` [1, T], which count on
            within a sequence. The first of these that is there counts. ``attention_mask`` [1, T] may mark padding.
        length: The number of tokens T.

    Raises:
        ValueError: None of these is there, or they contradict the row.

    Example:
        >>> segments_of({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, 5).tolist()
        [0, 0, 0, 1, 1]
    """
    given = next((k for k in (SEGMENTS, "seq_idx", *CUMULATIVE, "position_ids") if inputs.get(k) is not None), None)
    if given is None:
        raise ValueError(
            f"packed=True needs {SEGMENTS}, seq_idx, {', '.join(CUMULATIVE)} or position_ids, got {_shown(inputs)}"
        )
    values = torch.as_tensor(inputs[given]).cpu().long()
    if given in CUMULATIVE:
        sizes = values.diff()
        if values.dim() != 1 or not len(sizes) or int(values[0]) or int(values[-1]) != length or int(sizes.min()) < 1:
            raise ValueError(f"{given} is {values.tolist()}, expected numbers that rise from 0 to {length} tokens")
        found = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    else:
        if list(values.shape) != [1, length]:
            raise ValueError(f"{given} is {list(values.shape)}, expected [1, {length}]")
        values = values[0]
        apart = values.diff() != (1 if given == "position_ids" else 0)
        found = torch.cat([torch.zeros(1, dtype=torch.long), apart.long().cumsum(0)])
        if given != "position_ids":
            found[values < 0] = -1
            runs = len(found[found >= 0].unique())
            if runs != len(values[values >= 0].unique()):
                raise ValueError(f"the tokens of a sequence in {given} are not next to each other")
    there = inputs.get("attention_mask")
    if isinstance(there, Tensor) and list(there.shape) == [1, length]:
        found[~there[0].cpu().bool()] = -1
    mine = found >= 0
    if not mine.any():
        raise ValueError("a packed row has no token")
    found[mine] = found[mine].unique(return_inverse=True)[1]
    return found


def part_of(inputs: Mapping[str, Any], segments: Tensor, examples: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """Return a packed row of some of the sequences, and its segments."""
    positions = torch.cat([(segments == e).nonzero()[:, 0] for e in examples])
    sizes = torch.stack([(segments == e).sum() for e in examples])
    length = len(segments)

    def chosen(key: str, t: Any) -> Any:
        if key in CUMULATIVE:
            return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(t)
        if key in LONGEST:
            return t.new_tensor(int(sizes.max())) if isinstance(t, Tensor) else int(sizes.max())
        if not isinstance(t, Tensor):
            return t
        index = positions.to(t.device)
        if t.dim() == 4 and list(t.shape[-2:]) == [length, length]:  # a mask of queries and keys
            return t[:, :, index[:, None], index]
        return t.index_select(1, index) if t.dim() > 1 and t.shape[1] == length else t

    return {k: chosen(k, t) for k, t in inputs.items()}, torch.repeat_interleave(torch.arange(len(examples)), sizes)


def _looks_packed(inputs: Any) -> str | None:
    """Say why a batch looks packed; None if it does not."""
    if not isinstance(inputs, Mapping):
        return None
    for key in (SEGMENTS, "seq_idx", *CUMULATIVE):
        if inputs.get(key) is not None:
            return f"it has {key}"
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    there = inputs.get("attention_mask")
    there = there.bool() if isinstance(there, Tensor) and there.shape == positions.shape else positions >= 0
    again = (positions.diff() < 0) & there[:, 1:] & there[:, :-1]
    return "its position_ids begin anew within a row" if bool(again.any()) else None


def _is_row(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() > 1


def _has_rows(t: Any, count: int) -> bool:
    return _is_row(t) and t.shape[0] == count


def _shown(inputs: Any) -> str:
    return f"a mapping with {', '.join(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
