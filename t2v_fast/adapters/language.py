"""Task2Vec of text, with a language model as the probe, and the diversity of a collection of texts.

The Fisher is that of the model's own predictions of the next token, with its own head. Miranda et al., 2022, and Lee et
al., 2023 (arXiv 2306.13840) embed batches of text in this way, and call the mean distance between batches the diversity
coefficient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..analysis import distance
from ..embedding import Embedding, network_fingerprint
from ..estimation.estimator import fisher
from ..gradients.recorder import ParameterFilter, filter_axes_of
from ..tasks.assemble import embedding_of, family_of
from ..tasks.probe import digest_of
from .fim import evaluating


def embed_text(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    name: str | None = None,
    estimator: str = "hutchinson",
    samples: int = 1,
    level: str = "token",
    parameters: ParameterFilter = None,
    seed: int = 0,
    **options: Any,
) -> Embedding:
    """Embed a collection of texts under a causal language model, such as Hugging Face's GPT-2.

    Position t predicts token t + 1, so a position counts if both tokens are there. Padding contributes nothing, and
    neither does the last token of a text. The model runs in evaluation mode and is left in its own mode.

    Args:
        model: A model that returns logits [N, T, C] for ``input_ids``, or an object with such ``logits``.
        batches: Token numbers [N, T]; or mappings as tokenizers make them, with ``input_ids`` [N, T] and, for padded
            texts, ``attention_mask`` [N, T].
        name: The name of the collection, for ``meta["task"]``.
        estimator: Chooses the cotangents, as in :func:`t2v_fast.fisher`. ``"monte_carlo"`` draws labels from the
            model, as the frontends do.
        samples: Cotangents, each of which costs one backward pass for all tokens of a batch.
        level: ``"token"`` for the mean over tokens, or ``"sequence"`` for the mean over texts of the sum over a text's
            tokens.
        parameters: The parameters to embed, by default the weights of all modules but embedding tables and the output
            head. Their first axis counts the filters, as in the public code, unless ``filter_axis`` says otherwise.
        seed: The seed of random cotangents.
        options: More arguments of :func:`t2v_fast.fisher`, such as ``filter_axis``.

    Returns:
        The embedding, with an entry for each filter.

    Raises:
        ValueError: For texts in which no token is followed by another, and for what :func:`t2v_fast.fisher` refuses.
    """
    if parameters is None:
        parameters = _weights(model)
    quantity = {"likelihood": "next token", "level": level}
    return _embed(model, map(next_tokens, batches), name, estimator, samples, parameters, seed, quantity, options)


def embed_as_beyond_scale(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    name: str | None = None,
    estimator: str = "hutchinson",
    samples: int = 1,
    epochs: int = 5,
    learning_rate: float = 5e-5,
    weight_decay: float = 1e-4,
    ignored_token: int = 50256,
    seed: int = 0,
    **options: Any,
) -> Embedding:
    """Embed texts by the steps of beyond-scale-language-data-diversity and DataFlow.

    1. The output head ``lm_head`` of a copy of the model is fine-tuned on the texts, with AdamW and dropout. A head
       that is tied to the table of tokens changes the table, too.
    2. The Fisher is a mean over all positions but the last of each text, padding included.
    3. The embedding has the weights of all modules but ``lm_head``: tables of tokens and positions, norms and layers.

    Two things differ. The frontends square the mean gradient of a batch, and this is the mean of squares, about the
    number of the batch's tokens times as much. And the frontends score a position against the label that they drew for
    the next position, in training mode; here each position has a label of its own, in evaluation mode.

    Args:
        model: A causal language model with the head ``lm_head``.
        batches: Token numbers [N, T], or mappings with ``input_ids`` and ``attention_mask``. The frontends put eight
            texts into a batch.
        name: The name of the collection, for ``meta["task"]``.
        estimator: Chooses the cotangents, as in :func:`t2v_fast.fisher`.
        samples: Cotangents.
        epochs: Epochs of the head; 0 leaves it as it is.
        learning_rate: The learning rate of the head.
        weight_decay: The weight decay of the head.
        ignored_token: A token that the head's loss leaves out as a target: the end of a text, in the frontends.
        seed: The seed of random cotangents, and of dropout.
        options: More arguments of :func:`t2v_fast.fisher`.

    Returns:
        The embedding, with an entry for each filter.

    Raises:
        ValueError: If the model has no ``lm_head``, or there is no text of two tokens.
    """
    if not isinstance(head := getattr(model, "lm_head", None), nn.Module):
        raise ValueError(f"{type(model).__name__} has no module lm_head, whose weights the frontends fine-tune")
    texts = [_every_token(batch) for batch in batches]
    model, head = copy.deepcopy((model, head))
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in texts * epochs:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            logits = model(**inputs).logits[:, :-1].transpose(1, 2)
            optimizer.zero_grad()
            F.cross_entropy(logits, inputs["input_ids"][:, 1:], ignore_index=ignored_token).backward()
            optimizer.step()
    model.zero_grad()
    left_out = {id(p) for p in head.parameters()}
    left_out -= {id(p) for m in model.modules() if m is not head for p in m._parameters.values()}
    parameters = [k for k, p in model.named_parameters() if k.rpartition(".")[2] == "weight" and id(p) not in left_out]
    quantity = {
        "likelihood": "next token",
        "level": "token",
        "padding": "counts",
        "head": [epochs, learning_rate, weight_decay, ignored_token],
    }
    return _embed(model, texts, name, estimator, samples, parameters, seed, quantity, options)


def _embed(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    name: str | None,
    estimator: str,
    samples: int,
    parameters: ParameterFilter,
    seed: int,
    quantity: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Embedding:
    """Embed batches whose labels say which positions count; ``quantity`` goes to the fingerprint."""
    with evaluating(model):
        diagonal = fisher(
            model,
            batches,
            estimator,
            samples,
            parameters=parameters,
            mask=_predicting,
            level=quantity["level"],
            shift_labels=False,
            device=next(model.parameters()).device,
            seed=seed,
            **options,
        )
    named = dict(model.named_parameters())
    axes = filter_axes_of({name: named[name] for name in diagonal}, options.get("filter_axis"))
    return embedding_of(
        diagonal,
        {"task": name, "estimator": estimator, "samples": samples, "seed": seed},
        {
            **network_fingerprint(
                type(model).__name__,
                digest_of(model.state_dict()),
                next(model.parameters()).dtype,
                diagonal,
                family_of(estimator),
            ),
            **quantity,
            "filter_axis": {name: axis for name, axis in axes.items() if axis},
        },
    )


def diversity(embeddings: Sequence[Embedding], metric: str = "cosine") -> tuple[float, float]:
    """Compute the mean distance between pairs of embeddings of one collection's batches, and its standard error.

    The standard error is the jackknife's over batches, because the pairs that share a batch are not independent.

    Args:
        embeddings: The embeddings of at least two batches.
        metric: A name in :data:`t2v_fast.analysis.distance.METRICS`.

    Returns:
        The mean and its standard error, which is NaN for two batches.

    Raises:
        ValueError: For fewer than two embeddings.
        FingerprintMismatch: If the embeddings cannot be compared.

    Example:
        >>> from t2v_fast import Embedding
        >>> def embedding(*values):
        ...     return Embedding(np.array(values), np.ones(2), [("conv.weight", 0, 2)], 10)
        >>> mean, error = diversity([embedding(1.0, 2.0), embedding(2.0, 1.0), embedding(1.0, 1.0)], "plain_cosine")
        >>> round(mean, 4), round(error, 4)
        (0.1009, 0.0991)
    """
    n = len(embeddings)
    if n < 2:
        raise ValueError(f"a diversity needs at least 2 batches, got {n}")
    distances = distance.pdist(embeddings, metric)
    total = np.triu(distances, 1).sum()
    mean = total / (n * (n - 1) / 2)
    if n == 2:
        return float(mean), float("nan")
    without = (total - distances.sum(1)) / ((n - 1) * (n - 2) / 2)
    return float(mean), float(((n - 1) / n * np.square(without - without.mean()).sum()) ** 0.5)


def _weights(model: nn.Module) -> list[str]:
    """Return the weights of modules, without embedding tables and the head. A tied head is the table itself."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is output for p in m.parameters()}
    return [
        name for name, p in model.named_parameters() if name.rpartition(".")[2] == "weight" and id(p) not in left_out
    ]


def next_tokens(batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's inputs with labels: the next token where it is predicted, and -100 elsewhere."""
    batch = _mapping(batch)
    tokens = batch["input_ids"]
    there = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    following = torch.full_like(tokens, -100)
    following[:, :-1] = torch.where(there[:, :-1] & there[:, 1:], tokens[:, 1:], -100)
    if not (following != -100).any():
        raise ValueError(f"a batch of {len(tokens)} texts has no token that is followed by another")
    return {**{key: value for key, value in batch.items() if key != "labels"}, "labels": following}


def _every_token(batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's inputs with labels at all positions but the last."""
    batch = _mapping(batch)
    tokens = batch["input_ids"]
    following = torch.full_like(tokens, -100)
    following[:, :-1] = tokens[:, 1:]
    if tokens.shape[1] < 2:
        raise ValueError(f"a batch of {len(tokens)} texts has no token that is followed by another")
    return {**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}, "labels": following}


def _mapping(batch: Any) -> dict[str, Tensor]:
    """Return a batch of text as a mapping with ``input_ids``. Raise ValueError for another."""
    batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        what = f"has {sorted(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ValueError(
            f"a batch of text {what}, expected token numbers [N, T], or a mapping with input_ids and, for padded "
            "texts, attention_mask"
        )
    return dict(batch)


def _predicting(inputs: Any, labels: Tensor | None) -> Tensor:
    assert labels is not None  # next_tokens adds them
    return labels.cpu() != -100
