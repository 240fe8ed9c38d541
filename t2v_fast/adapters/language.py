"""Task2Vec of text: a language model as the probe, and how diverse a collection of texts is by it.

The Fisher is that of the model's own predictions of next tokens, by its own head (Miranda et al., 2022, and Lee et al.,
2023, arXiv 2306.13840, embed batches of text so, and call the mean distance between batches the diversity coefficient).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..analysis import distance
from ..embedding import Embedding
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
    """The embedding of a collection of texts under a causal language model such as Hugging Face's GPT-2.

    ``batches`` yield token numbers [N, T], or mappings as a tokenizer makes them, with ``input_ids`` and, where texts
    are padded, ``attention_mask`` [N, T]. Position t predicts token t + 1, so a position counts where both are there:
    padding contributes nothing, and neither does a text's last token.

    ``estimator`` and ``samples`` choose the cotangents, one backward pass each for all tokens of a batch
    (``"monte_carlo"`` draws labels from the model, as the frontends do); ``level`` is ``"token"`` for the mean over
    tokens, or ``"sequence"`` for the mean over texts of the sum of a text's tokens. ``parameters``, by default the
    weights of all modules but embedding tables and the output head; their first axis is the filter, as in the public
    code, unless ``filter_axis`` says otherwise. ``options`` go to :func:`t2v_fast.fisher`. The model runs in
    evaluation mode and is left in its own.

    Raises ValueError for text without a token that predicts another, and what :func:`t2v_fast.fisher` raises.
    """
    if parameters is None:
        parameters = _weights(model)
    with evaluating(model):
        diagonal = fisher(
            model,
            map(_inputs, batches),
            estimator,
            samples,
            parameters=parameters,
            mask=_predicting,
            level=level,
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
            "probe": type(model).__name__,
            "weights": digest_of(model.state_dict()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "layers": hashlib.sha256("\n".join(diagonal).encode()).hexdigest(),
            "granularity": "filter",
            "family": family_of(estimator),
            "likelihood": "next token",
            "level": level,
            "filter_axis": {name: axis for name, axis in axes.items() if axis},
        },
    )


def diversity(embeddings: Sequence[Embedding], metric: str = "cosine") -> tuple[float, float]:
    """The mean distance between pairs of embeddings of batches of one collection, and its standard error.

    The error is the jackknife's over batches, as the pairs of one batch are not independent. Raises ValueError for
    fewer than two embeddings, and what :func:`t2v_fast.distance.pdist` raises.
    """
    n = len(embeddings)
    if n < 2:
        raise ValueError(f"a diversity is of at least 2 batches, got {n}")
    distances = distance.pdist(embeddings, metric)
    total = np.triu(distances, 1).sum()
    mean = total / (n * (n - 1) / 2)
    if n == 2:
        return float(mean), float("nan")
    without = (total - distances.sum(1)) / ((n - 1) * (n - 2) / 2)
    return float(mean), float(((n - 1) / n * np.square(without - without.mean()).sum()) ** 0.5)


def _weights(model: nn.Module) -> list[str]:
    """The weights of modules, without tables and the head; a tied head is the table itself."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is output for p in m.parameters()}
    return [
        name for name, p in model.named_parameters() if name.rpartition(".")[2] == "weight" and id(p) not in left_out
    ]


def _inputs(batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes and a mask needs: tokens from which others are predicted get a label, others -100."""
    batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "input_ids" not in batch:
        raise ValueError(
            f"a batch of text has {sorted(batch)}, expected input_ids and, for padded texts, attention_mask"
        )
    tokens = batch["input_ids"]
    there = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    following = torch.full_like(tokens, -100)
    following[:, :-1] = torch.where(there[:, :-1] & there[:, 1:], tokens[:, 1:], -100)
    if not (following != -100).any():
        raise ValueError(f"a batch of {len(tokens)} texts has no token that is followed by another")
    return {**{key: value for key, value in batch.items() if key != "labels"}, "labels": following}


def _predicting(inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    return labels.cpu() != -100
