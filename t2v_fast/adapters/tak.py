"""The diagonals of Mammoth's TAK (``models/tak_utils/fisher_diag.py``), with the interfaces of its classes.

Mammoth hooks the layers of a vision transformer, and forms the gradient of each example and each direction with an
einsum. The classes here have the same constructors and the same method ``compute``::

    from t2v_fast.adapters.tak import LossDiagComputer

    ffT, count = LossDiagComputer(device, debug_mode=False).compute(net, head, names, dataset, use_head=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.cotangents import cotangents
from .fim import evaluating
from .squares import in_type_of, summed_squares

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
CLASS_EMBEDDING = "cls_token_layer.class_embedding"


class DiagComputer:
    """Sum the squared gradients of the normalised features, or of a head's outputs, over all of their entries.

    Args:
        device: The device of the images.
        debug_mode: Take the first two batches only.
        train_percent: The part of the batches to take. As in Mammoth, one more is taken.
        num_samples_expectation: If positive, the number of random normal directions in place of one direction for each
            entry. As in Mammoth, their squares are added up, and not divided by this number.
        fp_precision: ``"fp32"`` or ``"fp64"``, the dtype of the result. Mammoth also squares in this dtype; here,
            squares have the dtype of the parameters.
        unsupported: As for :class:`t2v_fast.FisherRecorder`.
        self_check: As for :func:`t2v_fast.fisher`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        device: str | torch.device,
        debug_mode: bool,
        train_percent: float = 1.0,
        num_samples_expectation: int = 0,
        fp_precision: str = "fp64",
        *,
        unsupported: str = "error",
        self_check: bool = True,
    ) -> None:
        if not 0 < train_percent <= 1 or fp_precision not in DTYPES:
            raise ValueError(
                f"train_percent is {train_percent} and fp_precision is {fp_precision!r}, expected a part of 1 and one "
                f"of {', '.join(DTYPES)}"
            )
        self.device, self.debug_mode, self.train_percent = device, debug_mode, train_percent
        self.num_samples_expectation, self.fp_precision = num_samples_expectation, fp_precision
        self._options: dict[str, Any] = {"unsupported": unsupported, "self_check": self_check}

    def directions(self, outputs: Tensor) -> Tensor:
        """Return the cotangents [K, N, C] of outputs [N, C]."""
        if self.num_samples_expectation > 0:
            return torch.stack([torch.randn_like(outputs) for _ in range(self.num_samples_expectation)])
        return torch.eye(outputs.shape[1]).to(outputs)[:, None, :].expand(-1, len(outputs), -1)

    def compute(
        self, net: Any, head: Callable[[Tensor], Tensor] | None, delta_w_names: Iterable[str], dataset: Any,
        use_head: bool = False,
    ) -> tuple[dict[str, Tensor], int]:  # fmt: skip
        """Compute the diagonal over the data set's ``train_loader``.

        Args:
            net: An object whose ``visual_encoder`` is a network from images to features [N, C].
            head: Maps normalised features to outputs.
            delta_w_names: Names of parameters of the encoder. As in Mammoth, those of linear layers, layer norms and
                the class embedding count, the others do not, and none of them requires a gradient afterwards.
            dataset: An object whose ``train_loader`` yields (images, ...).
            use_head: Whether to apply the head.

        Returns:
            The sums of squares by the name of a weight, and the number of examples. A linear layer has [O, I], or
            [O, I + 1] with the bias last if the bias is named. A layer norm has [C] or [C, 2].

        Raises:
            TypeError: The network has no ``visual_encoder``, or a batch is no tuple.
            ValueError: No named parameter counts, or there is no head to use.
            UnsupportedError: A parameter has no exact per-example gradient.
        """
        if use_head and head is None:
            raise ValueError("use_head is true, but head is None")
        encoder = getattr(net, "visual_encoder", None)
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"net is a {type(net).__name__} without a module visual_encoder, as Mammoth's networks have it"
            )
        names = list(delta_w_names)
        columns = dict(_columns(encoder, set(names)))
        if not columns:
            raise ValueError(
                f"none of {names[:3]} ... is the weight of a linear layer, a layer norm or {CLASS_EMBEDDING}"
            )
        batches = 2 if self.debug_mode else len(dataset.train_loader)
        batches = min(batches, int(self.train_percent * len(dataset.train_loader)) + 1)

        def forward(encoder: nn.Module, images: Tensor) -> Tensor:
            features = encoder(images)
            features = features / features.norm(dim=-1, keepdim=True)
            return head(features) if use_head and head is not None else features

        with evaluating(encoder):
            sums, examples = summed_squares(
                encoder,
                ((_images(batch), None) for batch in islice(dataset.train_loader, batches)),
                lambda outputs, labels: self.directions(outputs),
                parameters=[name for parts in columns.values() for name in parts],
                device=self.device,
                forward=forward,
                **self._options,
            )
        for name, p in encoder.named_parameters():
            if name in set(names):
                p.requires_grad_(False)
        like = torch.empty(0, dtype=DTYPES[self.fp_precision], device=self.device)
        found = {name: in_type_of(name, total, like) for name, total in sums.items()}
        return {name: _joined([found[part] for part in parts]) for name, parts in columns.items()}, examples


class LossDiagComputer(DiagComputer):
    """Compute the diagonal Fisher of a classifier: the expectation over its labels of squared scores, summed.

    Args:
        device: The device of the images.
        debug_mode: Take the first two batches only.
        train_percent: The part of the batches to take.
        fp_precision: ``"fp32"`` or ``"fp64"``, the dtype of the result.
        estimator: ``"exact"`` takes one backward pass for each class but one. ``"deflated"`` and ``"hutchinson"`` are
            unbiased estimates from ``samples`` passes, for many classes.
        samples: The number of passes of an estimate.
        options: ``unsupported`` and ``self_check``, as for :class:`DiagComputer`.
    """

    def __init__(
        self,
        device: str | torch.device,
        debug_mode: bool,
        train_percent: float = 1.0,
        fp_precision: str = "fp64",
        *,
        estimator: str = "exact",
        samples: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(device, debug_mode, train_percent, fp_precision=fp_precision, **options)
        self.estimator, self.samples = estimator, samples

    def directions(self, outputs: Tensor) -> Tensor:
        """Return the cotangents [K, N, C] of logits [N, C]."""
        return cotangents(outputs, self.estimator, self.samples)

    def compute(
        self, net: Any, head: Callable[[Tensor], Tensor] | None, delta_w_names: Iterable[str], dataset: Any,
        use_head: bool = False,
    ) -> tuple[dict[str, Tensor], int]:  # fmt: skip
        """Compute the diagonal as :meth:`DiagComputer.compute` does; ``use_head`` has to be true."""
        if not use_head:
            raise ValueError("use_head is false: the loss needs a head, from features to logits")
        return super().compute(net, head, delta_w_names, dataset, use_head)


def _images(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(f"train_loader gives batches that are a {type(batch).__name__}, expected (images, ...)")
    return batch[0]


def _columns(encoder: nn.Module, names: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each name of the result with the parameters that it holds: a weight, and the bias if it is named."""
    for name, module in encoder.named_modules():
        weight, bias = f"{name}.weight", f"{name}.bias"
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and weight in names:
            yield weight, [weight, bias] if bias in names else [weight]
        elif "cls_token" in name and CLASS_EMBEDDING in names:
            yield f"{name}.class_embedding", [f"{name}.class_embedding"]


def _joined(parts: list[Tensor]) -> Tensor:
    """Return a weight's squares, with those of the bias as the last column."""
    if len(parts) == 1:
        return parts[0]
    weight, bias = parts
    return torch.cat([weight.reshape(len(bias), -1), bias[:, None]], 1)
