"""Backends for Laplace approximations with laplace-torch (Daxberger et al., 2021): exact diagonals in little memory.

A backend takes the place of laplace-torch's own in the one argument that chooses it::

    from laplace import Laplace
    from t2v_fast.adapters.laplace import T2VGGN

    la = Laplace(model, "classification", "all", "diag", backend=T2VGGN)

laplace-torch computes diagonals from the Jacobians of a batch, [N, C, P] for P parameters. The backends here compute
the same diagonals inside C - 1 backward passes, and hold [P]. Other structures than diagonals are those of
laplace-torch's Curvlinops backends, which these classes extend.

``T2VGGN`` and ``T2VEF`` are made when they are first asked for, because only then laplace-torch has to be installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.batches import forward_passes
from ..estimation.cotangents import ESTIMATORS, cotangents
from ..estimation.diagonal import check_finite
from ..gradients.recorder import FisherRecorder
from .squares import in_type_of


class _Diagonal(ABC):
    """What the two backends share: the diagonal as sums of squared gradients, in laplace-torch's order and scale."""

    # Set by laplace-torch's CurvatureInterface.
    model: Any
    likelihood: Any
    last_layer: bool
    subnetwork_indices: Tensor | None
    lossfunc: Any
    factor: float
    params: list[nn.Parameter]
    params_dict: dict[str, nn.Parameter]
    # Set by the subclasses.
    _unsupported: str
    _self_check: bool
    _checked = False  # whether a batch has passed the self-check

    @abstractmethod
    def _directions(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Return cotangents [K, N, C] of the outputs, and the factor of the sum of squares."""

    def diag(self, x: Tensor | MutableMapping[str, Any], y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute the diagonal of one batch.

        Args:
            x: Inputs of the batch: a tensor, or a mapping for a model that takes one.
            y: Labels [N], or targets [N, C] for a regression.
            kwargs: ``N``, the number of all examples, which a diagonal does not depend on.

        Returns:
            The loss of the batch, and the diagonal [P], summed over the batch. The order is that of the model's
            parameters, or of the subnetwork's indices.

        Raises:
            TypeError: For another keyword argument.
            ValueError: The outputs are not [N, C].
            UnsupportedError: A parameter has no exact per-example gradient.
        """
        if unknown := set(kwargs) - {"N"}:
            raise TypeError(f"diag() got {', '.join(sorted(unknown))}, expected N at most: these arguments are ASDL's")
        if isinstance(x, MutableMapping) and not isinstance(x, dict):
            x = dict(x)
        return self._of_last_layer(x, y) if self.last_layer else self._of_all_layers(x, y)

    def _of_all_layers(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        names, p = self._wanted(), self.params[0]
        recorder = FisherRecorder(self.model, names, "parameter", unsupported=self._unsupported)
        check = self._self_check and not self._checked
        with forward_passes(recorder, lambda model, inputs: model(inputs), p.device, self_check=check) as batches:
            (batch,) = _exactly_one(batches([(x, y)]))
            loss, u, factor = self._loss_and_directions(batch.logits.detach(), y)
            squares = recorder.backward(batch.logits, u)
        self._checked = True
        for name, found in squares.items():
            check_finite(name, found)
        parts = [
            in_type_of(name, squares[name], q).flatten() if name in squares else torch.zeros_like(q).flatten()
            for name, q in self.params_dict.items()
        ]
        diagonal = torch.cat(parts).mul_(factor).detach()
        return loss, diagonal if self.subnetwork_indices is None else diagonal[self.subnetwork_indices]

    def _wanted(self) -> list[str]:
        """Return the names of the parameters with an entry in the subnetwork; of all parameters without one."""
        if self.subnetwork_indices is None:
            return list(self.params_dict)
        ends = torch.tensor([p.numel() for p in self.params_dict.values()]).cumsum(0)
        touched = set(torch.searchsorted(ends, self.subnetwork_indices.cpu(), right=True).tolist())
        return [name for k, name in enumerate(self.params_dict) if k in touched]

    @torch.no_grad()
    def _of_last_layer(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and diagonal of a linear last layer, whose gradients are products of u and the features."""
        f, features = self.model.forward_with_features(x)
        if features.dim() != 2:
            raise ValueError(
                f"the last layer's features are {list(features.shape)}, expected [N, I]: pass feature_reduction=... to "
                "Laplace"
            )
        loss, u, factor = self._loss_and_directions(f, y)
        second = u.square().sum(0)  # [N, C]
        parts = [(second.T @ features.square()).flatten()]
        if self.model.last_layer.bias is not None:
            parts.append(second.sum(0))
        for name, part in zip(("weight", "bias"), parts, strict=False):
            check_finite(f"last_layer.{name}", part)
        return loss, torch.cat(parts).mul_(factor)

    def _loss_and_directions(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        if f.dim() != 2:
            raise ValueError(
                f"the model's outputs are {list(f.shape)}, expected [N, C]: the diagonal is that of a model with one "
                "label or target for each example"
            )
        u, factor = self._directions(f, y)
        return (self.factor * self.lossfunc(f, y)).detach(), u, factor


class DiagonalGGN(_Diagonal):
    """Compute the exact diagonal of the generalised Gauss-Newton matrix, which is the Fisher, for laplace-torch.

    ``T2VGGN`` is this class on top of laplace-torch's ``CurvlinopsGGN``.

    Args:
        model: Set by laplace-torch, like the next five arguments.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: Whether the model is a feature extractor, of whose last layer the diagonal is.
        subnetwork_indices: Entries of the parameter vector, or None for all.
        dict_key_x: The key of the inputs, for models that take mappings.
        dict_key_y: The key of the labels.
        stochastic: Draw ``num_samples`` labels from the model, as laplace-torch does and from the same random numbers,
            instead of the exact expectation over labels.
        num_samples: The number of labels, or of cotangents of another ``estimator``.
        estimator: ``"deflated"`` or ``"hutchinson"`` (see :func:`t2v_fast.fisher`) for an unbiased estimate from
            ``num_samples`` backward passes, with much less noise than drawn labels. For many classes.
        unsupported: As for :class:`t2v_fast.FisherRecorder`, without ``"skip"``.
        self_check: Compare some examples of the first batch with plain autograd, as :func:`t2v_fast.fisher` does.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        estimator: str | None = None,
        unsupported: str = "error",
        self_check: bool = True,
    ) -> None:
        base: Any = super()
        base.__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic)
        if estimator is not None and (stochastic or estimator not in ESTIMATORS or estimator == "empirical"):
            known = ", ".join(name for name in ESTIMATORS if name != "empirical")
            raise ValueError(
                f"estimator is {estimator!r}, stochastic is {stochastic}: expected one of {known}, or neither"
            )
        _check_unsupported(unsupported)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        self.stochastic, self.num_samples, self._estimator = stochastic, num_samples, estimator
        self._unsupported, self._self_check = unsupported, self_check

    def _directions(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        regression = self.likelihood == "regression"
        if not self.stochastic:
            likelihood = "gaussian" if regression else "softmax"
            return cotangents(f, self._estimator or "exact", self.num_samples, likelihood), 1.0
        if regression:
            scores = [-torch.randn(f.shape, device=f.device, dtype=f.dtype) for _ in range(self.num_samples)]
        else:
            p = f.softmax(-1)
            drawn = torch.distributions.Multinomial(logits=f)
            scores = [p - drawn.sample() for _ in range(self.num_samples)]
        return torch.stack(scores), 1 / self.num_samples


class DiagonalEF(_Diagonal):
    """Compute the diagonal of the empirical Fisher for laplace-torch.

    ``T2VEF`` is this class on top of laplace-torch's ``CurvlinopsEF``. The diagonal is the sum of squared gradients of
    laplace-torch's loss, times its factor: 1 for classification, and 1/2 for the squared error of a regression. The
    latter is twice the empirical Fisher of a Gaussian of unit variance, as in all of laplace-torch's backends.

    Args:
        model: Set by laplace-torch, like the next five arguments.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: Whether the model is a feature extractor, of whose last layer the diagonal is.
        subnetwork_indices: Entries of the parameter vector, or None for all.
        dict_key_x: The key of the inputs, for models that take mappings.
        dict_key_y: The key of the labels.
        unsupported: As for :class:`t2v_fast.FisherRecorder`, without ``"skip"``.
        self_check: Compare some examples of the first batch with plain autograd, as :func:`t2v_fast.fisher` does.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        unsupported: str = "error",
        self_check: bool = True,
    ) -> None:
        base: Any = super()
        base.__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        _check_unsupported(unsupported)
        self._unsupported, self._self_check = unsupported, self_check

    def _directions(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        with torch.enable_grad():
            z = f.detach().requires_grad_(True)
            (u,) = torch.autograd.grad(self.lossfunc(z, y), z)
        return u[None], self.factor


def _check_unsupported(unsupported: str) -> None:
    if unsupported not in ("error", "exact"):
        raise ValueError(f"unsupported is {unsupported!r}, expected 'error' or 'exact': Laplace needs every parameter")


def _exactly_one(batches: Iterator[Any]) -> list[Any]:
    """Return the batch in a list. Raise ValueError where the batch has no example."""
    found = list(batches)
    if not found:
        raise ValueError("the batch has no example")
    return found


def __getattr__(name: str) -> Any:
    """Make a backend class at its first use, on top of laplace-torch's Curvlinops backend."""
    mixins = {"T2VGGN": (DiagonalGGN, "CurvlinopsGGN"), "T2VEF": (DiagonalEF, "CurvlinopsEF")}
    if name not in mixins:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from laplace import curvature
    except ImportError as error:
        raise ImportError(f"{name} needs laplace-torch (pip install laplace-torch): {error}") from error
    mixin, base = mixins[name]
    made = type(name, (mixin, getattr(curvature, base)), {"__module__": __name__, "__doc__": mixin.__doc__})
    globals()[name] = made
    return made
