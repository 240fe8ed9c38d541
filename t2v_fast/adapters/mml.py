"""The diagonal Fisher of mml-similarity (the DKFZ's MML toolkit): :func:`fim_diag` with its argument list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..estimation.cotangents import class_indices, cotangents
from .squares import in_type_of, summed_squares

IMAGES, LABELS = "image", "class"  # the keys of a batch
GRADIENTS = ("log-likelihood", "logit")


def fim_diag(
    model: nn.Module,
    data_loader: Iterable[Mapping[str, Any]],
    fim_params: Sequence[str],
    task_type: Any,
    empirical: bool = False,
    device: str | torch.device | None = None,
    *,
    gradient: str = "log-likelihood",
    estimator: str = "exact",
    samples: int = 2,
    seed: int = 0,
    unsupported: str = "error",
    self_check: bool = True,
) -> dict[str, Tensor]:
    """Compute the diagonal Fisher with the argument list of mml-similarity's ``fim_diag``.

    To let mml-similarity use it::

        import mml_similarity.scripts.fisher
        mml_similarity.scripts.fisher.fim_diag = fim_diag

    mml-similarity draws one label for each image and squares the gradient of the label's *logit*, one image at a time.
    The Fisher has the gradient of the label's log-likelihood instead. This function gives the Fisher, exactly, unless
    ``gradient="logit"`` asks for the expectation of mml-similarity's own number.

    Args:
        model: A model from images to a mapping, whose first value is the logits [N, C]. It is moved to ``device`` and
            left in evaluation mode, as in mml-similarity. Which parameters require gradients does not change.
        data_loader: Batches as mappings with ``"image"`` and, for the empirical Fisher, ``"class"``.
        fim_params: The names of the parameters.
        task_type: ``TaskType.CLASSIFICATION``, or ``"classification"``.
        empirical: Take the data's labels instead of the expectation over the model's.
        device: The device to run on, by default that of the model.
        gradient: What is differentiated: ``"log-likelihood"``, or ``"logit"`` for mml-similarity's quantity.
        estimator: An estimator of :func:`t2v_fast.fisher`: ``"deflated"`` is for many classes. Only for
            ``gradient="log-likelihood"`` and ``empirical=False``.
        samples: The number of cotangents of other estimators.
        seed: The seed of random cotangents.
        unsupported: As for :class:`t2v_fast.FisherRecorder`.
        self_check: As for :func:`t2v_fast.fisher`.

    Returns:
        The mean over images, a tensor of the parameter's shape for each name, in the order of
        ``model.named_parameters()``.

    Raises:
        NotImplementedError: For another type of task, which mml-similarity refuses as well.
        TypeError: A batch or the model's output is no mapping.
        ValueError: A name is no parameter of the model, or a batch lacks a key, or another argument is unknown.

    Example:
        >>> class Model(nn.Linear):
        ...     def forward(self, x):
        ...         return {"task": super().forward(x)}
        >>> model = Model(3, 2)
        >>> batches = [{"image": torch.randn(4, 3), "class": torch.tensor([0, 1, 1, 0])}]
        >>> {name: tuple(t.shape) for name, t in fim_diag(model, batches, ["weight"], "classification").items()}
        {'weight': (2, 3)}
    """
    kind = str(getattr(task_type, "value", task_type))
    if kind != "classification":
        raise NotImplementedError(f"task_type is {kind}, expected classification, as in mml-similarity")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}, expected one of {', '.join(GRADIENTS)}")
    if device is not None:
        model.to(device)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Any, Tensor | None]]:
        for k, batch in enumerate(data_loader):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batch {k} is a {type(batch).__name__}, expected a mapping with {IMAGES!r}, as in mml")
            needed = [IMAGES, LABELS] if empirical else [IMAGES]
            if missing := [key for key in needed if key not in batch]:
                raise ValueError(f"batch {k} has {sorted(batch)}, expected {missing[0]!r} as well")
            yield batch[IMAGES], batch[LABELS] if empirical else None

    def directions(logits: Tensor, labels: Tensor | None) -> Tensor:
        if gradient == "log-likelihood":
            chosen = "empirical" if empirical else estimator
            return cotangents(logits, chosen, samples, "softmax", labels, generator)
        c = logits.shape[1]
        if labels is not None:
            return F.one_hot(class_indices(labels, len(logits), c), c).to(logits)
        return torch.eye(c).to(logits)[:, None, :] * logits.softmax(1).sqrt()  # [C, N, C]

    model.eval()
    sums, examples = summed_squares(
        model,
        batches(),
        directions,
        parameters=list(fim_params),
        device=device,
        forward=_first_head,
        unsupported=unsupported,
        self_check=self_check,
    )
    return {name: in_type_of(name, sums[name] / examples, p) for name, p in model.named_parameters() if name in sums}


def _first_head(model: nn.Module, images: Any) -> Tensor:
    outputs = model(images)
    if not isinstance(outputs, Mapping) or not outputs:
        raise TypeError(
            f"the model returned {type(outputs).__name__}, expected a mapping from heads to logits, as models of mml "
            "return: t2v_fast.adapters.fim.fim_diag takes models that return logits"
        )
    return next(iter(outputs.values()))
