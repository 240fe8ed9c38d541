"""Importances for elastic weight consolidation (Kirkpatrick et al., 2017), in Avalanche and in Mammoth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from ..estimation.cotangents import class_indices
from ..estimation.graph_obstacles import hooked
from ..estimation.one_forward import graph_bytes
from .fim import evaluating, fim_diag
from .single_images import SingleImages, noting
from .squares import in_type_of, summed_squares

CRITERIA = {nn.CrossEntropyLoss: "classification", nn.BCEWithLogitsLoss: "multi-label"}
MODES = ("own", "eval")


def compute_importances(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    dataset: Dataset,
    device: str | torch.device,
    batch_size: int,
    num_workers: int = 0,
    *,
    labels: str = "true",
    batch_scale: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Compute importances with the argument list and the result of Avalanche's EWC plugin.

    The plugin squares the mean gradient of each batch. This function squares the gradient of each example, which is
    what the plugin computes at batch size 1. The model runs in evaluation mode and is left in its own mode.

    A criterion that is a mean leaves out labels that are its ``ignore_index``. Examples with such labels alone do not
    count here either: the result is the mean over the others. The plugin counts a batch of such examples alone, as this
    function does with ``batch_scale``.

    A data set's ``collate_fn`` makes the batches if there is one. If it pads examples, each example is padded as in the
    plugin's batches. A model with task labels (Avalanche's ``MultiTaskModule``) gets those of the batch.

    Args:
        model: The model, which is moved to ``device``.
        criterion: The loss: any function of outputs [n, ...] and targets that gives one number for one example.
        optimizer: Ignored.
        dataset: A data set of (input, label, ...), whose last entries are task labels for a model that takes them.
        device: The device to run on.
        batch_size: Examples in the batches of the loader. After the first one, batches of the same shape are joined if
            their inputs and activations take less memory than the gradients of all parameters, which the plugin has
            and this function has not. The result does not depend on this.
        num_workers: Processes that load data.
        labels: Whose labels the gradients are of. ``"true"`` takes the data's, as Avalanche does. For ``"all"``,
            ``"sample"`` and ``"pred"``, see :func:`~t2v_fast.adapters.fim.fim_diag`; they need cross-entropy, or binary
            cross-entropy with logits, without class weights and label smoothing.
        batch_scale: Divide by ``batch_size``, or by the examples of a batch that count. The expectation of the plugin's
            squared batch means is this, plus about the square of the mean gradient, which vanishes only where training
            has converged.
        options: ``unsupported`` and ``self_check`` of :func:`t2v_fast.fisher`. For other ``labels``, all arguments of
            :func:`~t2v_fast.adapters.fim.fim_diag`.

    Returns:
        The mean squared per-example gradient of each parameter, by name, in the order of ``model.named_parameters()``.
        Parameters that are frozen, or that no example uses, have zeros. Where Avalanche has been imported, each value
        is its ``ParamData``, which grows with a growing head; otherwise it is a tensor.

    Raises:
        ValueError: The criterion does not give one number for one example, or NaN, as a mean over labels of weight 0
            is; or it is no likelihood and ``labels`` needs one, or ``labels`` needs outputs [N, C] and the model gives
            others, or the data set is empty, or the criterion ignores every label.
        UnsupportedError: A parameter has no exact per-example gradient.
    """
    model.to(device)
    collate = getattr(dataset, "collate_fn", None)
    ignored = _ignored_label(criterion) if labels == "true" else None
    joined = _JoinedBatches(DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate), ignored)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def watch(outputs: Tensor) -> None:
        if not joined.most:
            joined.grow(graph_bytes(outputs), sum(p.numel() * p.element_size() for p in model.parameters()))

    if labels == "true":

        def gradients(outputs: Tensor, targets: Tensor | None) -> Tensor:
            assert targets is not None  # every joined batch has some
            return _gradients_of_single_losses(criterion, outputs, targets)

        with evaluating(model):
            found, _ = summed_squares(
                model,
                joined,
                gradients,
                parameters=names,
                device=device,
                forward=_avalanche_forward,
                watch=watch,
                **options,
            )
        counted = sum(joined.counted)
        if not counted:
            raise ValueError(f"every label is the criterion's ignore_index ({ignored}): no example has a gradient")
        for squares in found.values():  # in place: a pass over all parameters takes as long as that of a small batch
            squares.div_(counted)
    else:
        task_type = _likelihood_of(criterion)
        forward = _one_row_each if task_type == "classification" else _avalanche_forward
        options = {"parameters": names, "forward": forward, **options}
        found = fim_diag(model, joined, task_type, labels, device=device, **options)
    if batch_scale:  # the mean of 1 / size over the plugin's batches, some of which may be smaller, or have no gradient
        scale = sum(1 / size for size in joined.counted if size) / len(joined.counted)
        for squares in found.values():
            squares.mul_(scale)
    with torch.no_grad():
        values = {
            name: in_type_of(name, found[name], p) if name in found else torch.zeros_like(p)
            for name, p in model.named_parameters()
        }
    param_data = getattr(sys.modules.get("avalanche.training.utils"), "ParamData", None)
    if param_data is None:
        return values
    return {
        name: param_data(name, value.shape, init_tensor=value, device=value.device) for name, value in values.items()
    }


class _JoinedBatches:
    """The batches of a loader as ((inputs, task labels), labels), several of them joined into one after :meth:`grow`.

    Only batches of the same shape are joined, because a network may give an example another output if it is padded to
    another length.
    """

    def __init__(self, loader: Iterable[Any], ignored: int | None) -> None:
        self.loader, self.most = loader, 0  # the most examples of a joined batch
        self.ignored = ignored  # the label that the criterion leaves out, if any
        self.size = 0  # of the loader's first batch
        self.counted: list[int] = []  # the examples in each batch of the loader that have another label
        self._bytes = 0  # of the loader's last batch before :meth:`grow`

    def grow(self, activations: int, allowed: int) -> None:
        """Let later batches take the memory ``allowed`` in bytes, where the first one has ``activations``."""
        self.most = self.size * max(1, allowed // max(1, self._bytes + activations))

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        waiting: list[tuple[Any, Any]] = []
        shape: Any = None  # of the batches that wait
        examples = 0  # in them
        for batch in map(partial(_labelled, "dataset"), self.loader):
            found, size = ((batch[0], batch[-1]), batch[1]), len(batch[1])
            own = _shape_to_join(found, size)
            if waiting and (own is None or own != shape or examples + size > self.most):
                yield _joined(waiting)
                waiting, examples = [], 0
            self.size = self.size or size
            self.counted.append(int(_counting(found[1], self.ignored).sum()))
            if not self.most:
                self._bytes = sum(t.numel() * t.element_size() for t in tree_leaves(found) if isinstance(t, Tensor))
            waiting.append(found)
            shape, examples = own, examples + size
            if own is None or examples + size > self.most:
                yield _joined(waiting)
                waiting, examples = [], 0
        if waiting:
            yield _joined(waiting)


def _ignored_label(criterion: Any) -> int | None:
    """The label that a criterion leaves out of its mean; None if there is none."""
    known = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and criterion.reduction == "mean"
    return criterion.ignore_index if known else None


def _counting(labels: Any, ignored: int | None) -> Tensor:
    """Which examples have a label that is not ``ignored``, [N]. Floating-point labels are probabilities of classes."""
    if ignored is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return torch.ones(len(labels), dtype=torch.bool)
    counting = labels != ignored
    return counting if labels.dim() == 1 else counting.reshape(len(labels), -1).any(1)


def _shape_to_join(batch: Any, size: int) -> Any:
    """What batches have in common that can be joined along the first axis; None if this one cannot be joined."""
    leaves, structure = tree_flatten(batch)
    if not all(isinstance(t, Tensor) and t.layout == torch.strided and t.shape[:1] == (size,) for t in leaves):
        return None
    return structure, [(t.shape[1:], t.dtype, t.device) for t in leaves]


def _joined(batches: list[Any]) -> Any:
    return batches[0] if len(batches) == 1 else tree_map(lambda *parts: torch.cat(parts), *batches)


def accelerate_avalanche(plugin: Any, *, batch_scale: bool = True, **options: Any) -> Any:
    """Let an EWC plugin of Avalanche compute its importances with :func:`compute_importances`.

    Args:
        plugin: An ``EWCPlugin``, or another object that calls its ``compute_importances`` with the same arguments.
        batch_scale: As for :func:`compute_importances`. Here it is true by default: importances that are larger than
            the plugin's own can make training diverge with an ``ewc_lambda`` that was chosen for the latter.
        options: More arguments of :func:`compute_importances`.

    Returns:
        The plugin. ``del plugin.compute_importances`` undoes the change.

    Raises:
        TypeError: The object has no method ``compute_importances``.
    """
    if not callable(getattr(plugin, "compute_importances", None)) or isinstance(plugin, type):
        raise TypeError(
            f"plugin is {plugin!r}, expected an EWC plugin of Avalanche, that is an object with compute_importances()"
        )
    plugin.compute_importances = partial(compute_importances, batch_scale=batch_scale, **options)
    return plugin


def online_ewc_fisher(
    net: nn.Module,
    train_loader: Iterable,
    device: str | torch.device,
    batch_size: int | None = None,
    *,
    mode: str = "own",
    update_statistics: bool = False,
    **options: Any,
) -> Tensor:
    """Compute what Mammoth's online EWC accumulates over a task, in its layout.

    It is the sum over examples of p(label) times the squared gradient of log p(label), divided by a number of examples.

    Mammoth runs the network on one image after the other, in the network's own mode. A batch norm in training mode then
    normalises each image by the statistics of this image. This function does the same for all images of a batch at
    once. Mammoth's images also move the running statistics, one after the other. This function leaves these as they
    are, unless ``update_statistics`` is true.

    Args:
        net: The model, which is moved to ``device`` and left in its own mode.
        train_loader: Batches of (inputs, labels, ...).
        device: The device to run on.
        batch_size: If given, the divisor is this number times the number of batches, as in Mammoth; otherwise it is
            the number of examples.
        mode: ``"own"`` for Mammoth's numbers. ``"eval"`` runs the network in evaluation mode, in which batch norm uses
            its running statistics, as it does for predictions.
        update_statistics: Leave the running statistics of batch norms in training mode where Mammoth's loop leaves
            them. In evaluation mode, they never change.
        options: ``unsupported`` and ``self_check`` of :func:`t2v_fast.fisher`.

    Returns:
        One vector with all parameters, in the order of ``net.parameters()``. Frozen parameters have zeros.

    Raises:
        ValueError: There are no examples, the logits are not [N, C], or the mode is unknown. Or a batch norm in
            training mode sees one value for each channel of an image, or has a forward method of its own. Or the
            statistics are to be updated, and the network changes another buffer.
        UnsupportedError: A parameter has no exact per-example gradient.
        SelfCheckError: The network is random, as with dropout in training mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    net.to(device)
    batches = 0
    single = SingleImages(net) if mode == "own" else None
    moved = single is not None and update_statistics

    def directions(logits: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal batches
        batches += 1
        if single is not None and moved:
            single.take(logits)
        if labels is None:
            raise ValueError("train_loader yields no labels, expected (inputs, labels, ...)")
        if logits.dim() != 2:
            raise ValueError(f"the network gives logits {list(logits.shape)}, expected [N, C], one row for each image")
        labels = class_indices(labels, *logits.shape)
        p = logits.softmax(1)
        chance = p.gather(1, labels[:, None])
        return p.scatter_add(1, labels[:, None], -torch.ones_like(chance)) * chance.sqrt()

    wanted = {name: p for name, p in net.named_parameters() if p.requires_grad}
    pairs = ((batch[0], batch[1]) for batch in map(partial(_labelled, "train_loader"), train_loader))
    if moved:
        options["forward"] = noting
    with evaluating(net) if single is None else single:
        try:
            total, examples = summed_squares(net, pairs, directions, parameters=list(wanted), device=device, **options)
        except ValueError as error:
            if str(error) == "the loader gave no example":
                raise ValueError("train_loader has no examples") from None
            raise
    if single is not None and moved:
        single.store()
    count = examples if batch_size is None else batches * batch_size
    parts = [
        in_type_of(name, total[name] / count, p).flatten() if name in total else torch.zeros_like(p).flatten()
        for name, p in net.named_parameters()
    ]
    return torch.cat(parts)


def accelerate_mammoth(model: Any, *, update_statistics: bool = True, **options: Any) -> Any:
    """Let Mammoth's online EWC compute its Fisher with :func:`online_ewc_fisher`.

    The network ends a task in the state in which Mammoth leaves it, which includes the running statistics of its batch
    norms. Tasks that follow, and predictions, depend on these.

    Args:
        model: The class ``EwcOn``, or an object of it.
        update_statistics: False leaves the running statistics as training left them. Predictions then use the
            statistics of whole batches, and differ from those of Mammoth.
        options: More arguments of :func:`online_ewc_fisher`.

    Returns:
        The class or object, whose ``end_task`` is replaced.

    Raises:
        TypeError: The object has not the methods of ``EwcOn``.
    """
    if not all(callable(getattr(model, name, None)) for name in ("end_task", "get_penalty_grads")):
        raise TypeError(f"model is {model!r}, expected Mammoth's EwcOn, with end_task() and get_penalty_grads()")

    def end_task(self: Any, dataset: Any) -> None:
        found = online_ewc_fisher(
            self.net,
            dataset.train_loader,
            self.device,
            self.args.batch_size,
            update_statistics=update_statistics,
            **options,
        )
        self.fish = found if self.fish is None else self.args.gamma * self.fish + found
        self.checkpoint = self.net.get_params().data.clone()

    model.end_task = end_task if isinstance(model, type) else partial(end_task, model)
    return model


def _labelled(source: str, batch: Any) -> Any:
    """Return a batch of (inputs, labels, ...). Raise ValueError for another."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        what = f"{len(batch)} entry" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise ValueError(f"{source} gives batches of {what}, expected (inputs, labels, ...)")
    return batch


def _avalanche_forward(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model on (inputs, task labels), as Avalanche does: only a ``MultiTaskModule`` takes the labels."""
    x, task_labels = inputs
    their_forward = getattr(sys.modules.get("avalanche.models.utils"), "avalanche_forward", None)
    return model(x) if their_forward is None else their_forward(model, x, task_labels)


def _one_row_each(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model, whose outputs must be [N, C]. Cross-entropy reads others as [N, C, ...], a Fisher as [N, T, C]."""
    outputs = _avalanche_forward(model, inputs)
    if isinstance(outputs, Tensor) and outputs.dim() > 2:
        raise ValueError(
            f"the model gives outputs {list(outputs.shape)}, expected [N, C] for labels of the model: pass "
            "labels='true' for the squared gradients of the loss itself, or use t2v_fast.fisher, which takes [N, T, C]"
        )
    return outputs


def _likelihood_of(criterion: Any) -> str:
    """Return the task type of a criterion that is a log-likelihood. Raise ValueError for another."""
    task_type = next((kind for loss, kind in CRITERIA.items() if type(criterion) is loss), None)
    weighted = getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None
    if task_type is None or weighted or getattr(criterion, "label_smoothing", False):
        known = ", ".join(loss.__name__ for loss in CRITERIA)
        raise ValueError(
            f"criterion is {criterion}, expected one of {known} without weights and label smoothing: other losses have "
            "no labels of their own to draw. Pass labels='true' for the squared gradients of the loss itself"
        )
    return task_type


def _gradients_of_single_losses(criterion: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient [N, ...] of each example's loss, where the example is a batch of its own."""
    z = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        plain = type(criterion) is nn.CrossEntropyLoss and "forward" not in vars(criterion) and not hooked(criterion)
        if plain and criterion.weight is None and criterion.reduction != "none":
            if z.dim() == 2 and targets.shape != z.shape:  # no probabilities of classes
                ignored = targets == criterion.ignore_index
                targets = class_indices(targets.masked_fill(ignored, 0), *z.shape)
                targets = targets.masked_fill(ignored, criterion.ignore_index)
            each = F.cross_entropy(
                z,
                targets,
                ignore_index=criterion.ignore_index,
                reduction="none",
                label_smoothing=criterion.label_smoothing,
            )
            if each.dim() > 1 and criterion.reduction == "mean":  # over the positions of an example that count
                counted = torch.ones_like(each)
                if targets.shape == each.shape:  # no probabilities of classes
                    counted = counted.masked_fill(targets == criterion.ignore_index, 0)
                each = each.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
            loss = each.sum()
        else:
            losses = [criterion(z[n : n + 1], targets[n : n + 1]) for n in range(len(z))]
            if any(not isinstance(t, Tensor) or t.numel() != 1 for t in losses):
                raise ValueError(
                    f"criterion {criterion} gives {losses[0]!r} for one example, expected one number: set its "
                    "reduction to 'mean' or 'sum'"
                )
            each = torch.stack([t.reshape(()) for t in losses])
            gradients = torch.autograd.grad(each.sum(), z)[0]
            # A mean over no label is NaN. Its gradient may be zero, and then nothing would show in the result.
            defined = gradients.reshape(len(z), -1).isfinite().all(1) & ~each.isnan()
            undefined = ~defined & _counting(targets, _ignored_label(criterion)).to(z.device)
            if bool(undefined.any()):
                n = int(undefined.nonzero()[0])
                raise ValueError(
                    f"criterion {criterion} gives the loss {each[n].item()} for the label {targets[n].tolist()}, or a "
                    "gradient that is not finite: leave out examples whose labels have no weight (the ignore_index of "
                    "nn.CrossEntropyLoss and nn.NLLLoss is left out)"
                )
            return gradients
        return torch.autograd.grad(loss, z)[0]
