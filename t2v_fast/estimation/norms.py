"""Gradient norms of single examples: of the whole network and of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..gradients.recorder import FisherRecorder, ParameterFilter
from ..ops.asynchronous import to_device
from .batches import Batch, Forward, Mask, check_loader, default_forward, default_mask, forward_passes
from .cotangents import cotangents
from .likelihoods import Likelihood, get_likelihood
from .packing import Texts

Loss = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class GradientNorms(Mapping[str, Tensor]):
    """Euclidean norms of the gradients of single examples: a mapping from parameter names to float64 tensors [N].

    Args:
        entries: The norm of each example's gradient by each parameter, on the CPU.
        unused: Parameters that no output depends on. Their norms are zero.
        skipped: Parameters that ``unsupported="skip"`` left out. ``total`` is without them.

    Example:
        >>> norms = GradientNorms({"weight": torch.tensor([3.0, 0.0]), "bias": torch.tensor([4.0, 1.0])})
        >>> norms.total
        tensor([5., 1.])
        >>> norms.total.argsort(descending=True)  # the examples, the largest gradient first
        tensor([0, 1])
    """

    entries: dict[str, Tensor]
    unused: frozenset[str] = field(default_factory=frozenset)
    skipped: frozenset[str] = field(default_factory=frozenset)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def total(self) -> Tensor:
        """The norm [N] of each example's gradient by all parameters together."""
        return torch.stack([norm.square() for norm in self.entries.values()]).sum(0).sqrt()

    @classmethod
    def of(cls, recorder: FisherRecorder, squares: Mapping[str, Tensor]) -> GradientNorms:
        """Turn what :meth:`t2v_fast.FisherRecorder.backward` returned into norms.

        Args:
            recorder: A recorder of granularity ``"tensor"`` or ``"filter"``.
            squares: The result of its last backward pass. If this had several cotangents, the norms are roots of the
                sums of their squares.

        Returns:
            The norms of the batch.

        Raises:
            ValueError: The granularity is ``"parameter"``, which sums over the examples.

        Example:
            >>> network = nn.Linear(4, 3)
            >>> with FisherRecorder(network, granularity="tensor") as recorder:
            ...     logits = network(torch.randn(5, 4))
            ...     norms = GradientNorms.of(recorder, recorder.backward(logits, torch.randn(5, 3)))
            >>> {name: tuple(norm.shape) for name, norm in norms.items()}
            {'weight': (5,), 'bias': (5,)}
        """
        if recorder.granularity == "parameter":
            raise ValueError("the recorder's granularity is 'parameter', which sums over examples: expected 'tensor'")
        rows = []
        for name, q in squares.items():
            mean = q.double().flatten(1).mean(1) if q.dim() > 1 else q.double()
            rows.append(mean * recorder.parameters[name].numel())
        entries: dict[str, Tensor] = {}
        if rows:  # one copy to the CPU for all parameters, which may be on several devices
            norms = torch.stack([row.to(rows[0].device) for row in rows]).sqrt().cpu()
            entries = dict(zip(squares, norms, strict=True))
        return cls(entries, frozenset(recorder.unused), frozenset(recorder.skipped))


def gradient_norms(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    likelihood: str | Likelihood = "softmax",
    parameters: ParameterFilter = None,
    unsupported: str = "error",
    self_check: bool = True,
    device: str | torch.device | None = None,
    forward: Forward = default_forward,
    mask: Mask = default_mask,
    shift_labels: bool | None = None,
    packed: bool | None = None,
    channels_last: bool = True,
    progress: bool = False,
) -> GradientNorms:
    """Compute the norm of each example's gradient, by each parameter and in total.

    The norms are exact. One backward pass a batch gives them, and no gradient is stored. (Squares are summed in the
    network's own precision, so that a norm below 1e-19 is zero in a network of float32.) Every layer of
    :func:`t2v_fast.fisher` is supported: convolutions, norms, embeddings, attention, and parameters that are used
    several times, whose gradients are summed before the norm is taken.

    Args:
        model: A network that returns logits [N, C] or [N, T, C], or an object that has them as ``logits``.
        loader: Yields (inputs, labels, ...) with the examples along the first axis, or mappings with an entry
            "labels", as for :func:`t2v_fast.fisher`.
        loss: ``loss(logits, labels)`` returns the loss of each example, [N]. By default it is -log p(label), and
            the sum over its tokens for a sequence.
        likelihood: What p is by default, as for :func:`t2v_fast.fisher`.
        parameters: Names, or a function of name and parameter that says which to take; ``"trainable"`` takes those that
            require gradients; by default all, frozen or not.
        unsupported: ``"error"``, ``"exact"`` or ``"skip"``, as for :class:`t2v_fast.FisherRecorder`.
        self_check: Compare some examples with plain autograd and with forward passes of their own.
        device: Where inputs are moved to; by default where the first parameter is.
        forward: Runs the model: ``forward(model, inputs)`` returns the logits.
        mask: ``mask(inputs, labels)`` returns which tokens count by default, [N, T], or None for all.
        shift_labels: As for :func:`t2v_fast.fisher`. A ``loss`` of one's own gets the labels as they are, unless this
            is true.
        packed: As for :func:`t2v_fast.fisher`: true takes each sequence of a packed row as an example. It is for the
            default loss, as a ``loss`` of one's own returns a number for each row.
        channels_last: Convert images and convolution weights to this memory format, which is faster.
        progress: Show a progress bar.

    Returns:
        The norms, in the order of the loader.

    Raises:
        UnsupportedError: A parameter has no exact per-example gradient.
        SelfCheckError: The self-check failed.
        ValueError: An argument or a batch is not valid, or the loss of an example depends on other examples.

    Example:
        >>> import t2v_fast
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> norms = t2v_fast.gradient_norms(network, zip(x.split(3), y.split(3)))
        >>> norms.total.shape
        torch.Size([6])
        >>> g = torch.autograd.grad(nn.functional.cross_entropy(network(x[:1]), y[:1]), network[0].weight)
        >>> bool(torch.isclose(norms["0.weight"][0].float(), g[0].norm()))
        True
    """
    likelihood = get_likelihood(likelihood)
    if loss is not None and packed:
        raise ValueError("packed=True is for the default loss: a loss of one's own returns a number for each row")
    texts = Texts(False if loss is not None and shift_labels is None else shift_labels, packed)
    recorder = FisherRecorder(model, parameters, "tensor", unsupported=unsupported)
    check_loader(loader)
    if device is None:
        device = next(iter(recorder.parameters.values())).device
    parts: list[GradientNorms] = []
    with forward_passes(
        recorder, forward, device, mask, channels_last=channels_last, self_check=self_check, texts=texts
    ) as batches_of:
        for batch in batches_of(tqdm(loader, desc="norms", unit="batch", disable=not progress, leave=False)):
            u = _score(batch, likelihood) if loss is None else _of_loss(batch, loss)
            parts.append(GradientNorms.of(recorder, recorder.backward(batch.logits, u, segments=batch.segments)))
    if not parts:
        raise ValueError("the loader gave no example")
    skipped = frozenset().union(*(part.skipped for part in parts))
    names = [name for name in recorder.parameters if name not in skipped]
    if not names:
        raise ValueError("unsupported='skip' left no parameter: see why with unsupported='error'")
    unused = frozenset.intersection(*(part.unused for part in parts))
    return GradientNorms({name: torch.cat([part[name] for part in parts]) for name in names}, unused, skipped)


def _score(batch: Batch, likelihood: Likelihood) -> Tensor:
    """Return the gradient of each example's log-likelihood with respect to the logits, [1, N, ...]."""
    return cotangents(
        batch.logits,
        "empirical",
        1,
        likelihood,
        batch.labels,
        mask=batch.mask,
        level="sequence",
        checks=batch.checks,
    )


def _of_loss(batch: Batch, loss: Loss) -> Tensor:
    """Return the gradient of each example's loss with respect to the logits, [N, ...].

    Raises ValueError unless the losses are [N], and each depends on the logits of its own example alone.
    """
    z = batch.logits.detach().requires_grad_(True)
    labels = None if batch.labels is None else to_device(batch.labels, z.device)
    losses = loss(z, labels)
    if not isinstance(losses, Tensor) or list(losses.shape) != [batch.size]:
        what = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"the loss returned {what}, expected one number for each example, [{batch.size}]")
    (u,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
    # Where no loss depends on the logits of another example, a factor of each loss is a factor of its row.
    factors = torch.rand(batch.size, generator=torch.Generator().manual_seed(batch.size)).to(z) + 0.5
    (weighed,) = torch.autograd.grad((losses * factors).sum(), z)
    rows = u * factors.view(-1, *(1,) * (u.dim() - 1))
    allowed = torch.finfo(z.dtype).eps ** 0.5
    if not bool(((weighed - rows).abs() <= allowed * (rows.abs() + u.abs().max())).all()):
        raise ValueError(
            "the loss of an example depends on the logits of others, so that it has no gradient of its own"
        )
    return u
