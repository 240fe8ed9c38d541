"""Diagonals as linear operators of curvlinops: :func:`diagonal_operator` (Dangel et al., 2025)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.cotangents import cotangents
from .squares import in_type_of, summed_squares

# The likelihood of each loss, and the Hessian of its sum in units of the likelihood's Fisher.
LOSSES = {nn.CrossEntropyLoss: ("softmax", 1.0), nn.BCEWithLogitsLoss: ("sigmoid", 1.0), nn.MSELoss: ("gaussian", 2.0)}
ESTIMATORS = ("exact", "deflated", "hutchinson", "monte_carlo", "empirical")


def diagonal_operator(
    model_func: nn.Module,
    loss_func: nn.Module,
    params: Sequence[nn.Parameter],
    data: Iterable[tuple[Any, Tensor]],
    progressbar: bool = False,
    check_deterministic: bool = True,
    num_data: int | None = None,
    block_sizes: Sequence[int] | None = None,
    batch_size_fn: Callable[[Any], int] | None = None,
    *,
    estimator: str = "exact",
    samples: int = 2,
    seed: int = 0,
    unsupported: str = "error",
    self_check: bool = True,
) -> Any:
    """Return the diagonal of a curvature matrix as a linear operator of curvlinops.

    The arguments are those of ``GGNLinearOperator``, in their order and with their meaning. The diagonal is exact,
    where multiplying the operator onto unit vectors would take one pass over the data for each parameter entry. The
    model runs in its own mode, which must not couple examples.

    Args:
        model_func: The model, from inputs to outputs [N, C].
        loss_func: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss`` with ``reduction="mean"`` or ``"sum"``,
            without class weights and label smoothing.
        params: Parameters of the model, in the order that the operator has.
        data: Batches of (inputs, labels).
        progressbar: Show a progress bar.
        check_deterministic: Has no effect: the self-check finds a random network in the pass that is made anyway.
        num_data: The number of examples. It is counted, and a number that differs is refused.
        block_sizes: Has no effect: the blocks of a block diagonal have the same diagonal.
        batch_size_fn: Has no effect: the size of a batch is that of the outputs.
        estimator: ``"exact"`` for the diagonal of ``GGNLinearOperator``, which is the Fisher. ``"deflated"``,
            ``"hutchinson"`` and ``"monte_carlo"`` are unbiased estimates of it from ``samples`` cotangents for each
            example; ``FisherMCLinearOperator`` stands for the last. ``"empirical"`` gives the diagonal of
            ``EFLinearOperator``.
        samples: The number of cotangents of the estimates.
        seed: The seed of random cotangents.
        unsupported: ``"error"`` or ``"exact"``, as for :class:`t2v_fast.FisherRecorder`.
        self_check: As for :func:`t2v_fast.fisher`.

    Returns:
        A self-adjoint ``PyTorchLinearOperator`` of curvlinops, [P, P], whose attribute ``diagonal`` is a list of
        tensors in the shapes of ``params``. It can be multiplied, added to other operators and exported to SciPy.

    Raises:
        TypeError: ``model_func`` is no module.
        ValueError: A parameter is none of the model's, or the loss, the outputs or another argument does not fit.
        ImportError: curvlinops is not installed.
    """
    operator = _operator_class()
    if not isinstance(model_func, nn.Module):
        raise TypeError(f"model_func is {type(model_func).__name__}, expected a torch.nn.Module")
    likelihood, curvature = _likelihood_of(loss_func)
    if estimator not in ESTIMATORS or unsupported not in ("error", "exact"):
        raise ValueError(
            f"estimator is {estimator!r} and unsupported is {unsupported!r}, expected one of {', '.join(ESTIMATORS)}, "
            "and 'error' or 'exact'"
        )
    params = list(params)
    names = _names_of(model_func, params)
    generator = torch.Generator().manual_seed(seed)
    outputs = 0  # C

    def directions(f: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal outputs
        if f.dim() != 2:
            raise ValueError(f"the model's outputs are {list(f.shape)}, expected [N, C]")
        outputs = f.shape[1]
        ignored = getattr(loss_func, "ignore_index", None)
        if ignored is not None and labels is not None and bool((labels == ignored).any()):
            raise ValueError(f"a label is ignore_index ({ignored}): leave these examples out of the data")
        return cotangents(f, estimator, samples, likelihood, labels, generator)

    batches = _with_progress(data) if progressbar else data
    sums, examples = summed_squares(
        model_func, batches, directions, parameters=names, unsupported=unsupported, self_check=self_check
    )
    if num_data is not None and num_data != examples:
        raise ValueError(f"num_data is {num_data}, but the data has {examples} examples: leave num_data out")
    # The empirical Fisher squares gradients of the loss, which has twice the gradient of a Gaussian's likelihood.
    scale = curvature**2 if estimator == "empirical" else curvature
    if loss_func.reduction == "mean":
        scale /= examples if likelihood == "softmax" else examples * outputs
    return operator([in_type_of(name, sums[name].mul_(scale), p) for name, p in zip(names, params, strict=True)])


def _likelihood_of(loss: Any) -> tuple[str, float]:
    """Return the likelihood of a loss, and how many of its Fishers the loss's Hessian is. Raise ValueError if none."""
    found = LOSSES.get(type(loss))
    options = {name: getattr(loss, name, None) for name in ("weight", "pos_weight")}
    changed = any(value is not None for value in options.values()) or getattr(loss, "label_smoothing", None)
    if found is None or changed or loss.reduction not in ("mean", "sum"):
        known = ", ".join(kind.__name__ for kind in LOSSES)
        raise ValueError(
            f"loss_func is {loss}, expected {known} with reduction 'mean' or 'sum', without weights and label smoothing"
        )
    return found


def _names_of(model: nn.Module, params: Sequence[nn.Parameter]) -> list[str]:
    own = {id(p): name for name, p in model.named_parameters()}
    for k, p in enumerate(params):
        if id(p) not in own:
            raise ValueError(f"params[{k}] {list(p.shape)} is no parameter of the model: pass list(model.parameters())")
    names = [own[id(p)] for p in params]
    if len(set(names)) < len(names):
        raise ValueError("params has a parameter twice, expected each once")
    return names


def _with_progress(data: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(data, desc="DiagonalLinearOperator")


@functools.cache
def _operator_class() -> Callable[[list[Tensor]], Any]:
    try:
        from curvlinops._torch_base import PyTorchLinearOperator
    except ImportError as error:
        raise ImportError(
            f"diagonal_operator needs curvlinops 3 (pip install curvlinops-for-pytorch): {error}"
        ) from error

    class DiagonalLinearOperator(PyTorchLinearOperator):
        """A diagonal matrix in the space of some parameters."""

        SELF_ADJOINT = True

        def __init__(self, diagonal: list[Tensor]) -> None:
            shapes = [tuple(d.shape) for d in diagonal]
            super().__init__(shapes, shapes)
            self.diagonal = diagonal

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [d.unsqueeze(-1) * x for d, x in zip(self.diagonal, X, strict=True)]

        @property
        def device(self) -> torch.device:
            return self.diagonal[0].device

        @property
        def dtype(self) -> torch.dtype:
            return self.diagonal[0].dtype

    return DiagonalLinearOperator
