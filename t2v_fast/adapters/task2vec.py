"""The public Task2Vec code (aws-cv-task2vec and its forks): replaced, or given another Fisher in place.

``accelerate(task2vec)`` gives a loaded module's class ``Task2Vec`` another ``montecarlo_fisher``; everything else of
that code runs as before. Its own squares the mean gradient of batches of drawn labels with batch norm in training
mode; this one is the Fisher: squares of each example's gradient, evaluation mode, every image once.

:class:`Task2Vec`, :class:`ProbeNetwork` and :class:`Embedding` take the place of the module's own, with its argument
lists: ``mode="exact"`` as above, and ``mode="compat"`` for that code's numbers from the same seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler
from tqdm import tqdm

from .. import embedding as library
from ..estimation.estimator import fisher
from ..estimation.variational import variational_fisher
from ..tasks.data import balanced_weights
from ..tasks.head import fit_head
from .fim import evaluating
from .pickles import from_public, read_embedding, read_embeddings

__all__ = [
    "Embedding",
    "ProbeNetwork",
    "Task2Vec",
    "accelerate",
    "read_embedding",
    "read_embeddings",
    "restore",
]

_ORIGINAL = "_t2v_fast_original"
BATCH = 64  # of the public code, unless its loader_opts have another


class _From(nn.Module):
    """A probe network entered at a layer."""

    def __init__(self, probe: nn.Module, start: int) -> None:
        super().__init__()
        self.probe, self.start = probe, start

    def forward(self, x: Tensor) -> Tensor:
        return self.probe(x, start_from=self.start) if self.start else self.probe(x)


def accelerate(
    task2vec: ModuleType,
    *,
    estimator: str = "deflated",
    samples: int = 2,
    balanced: bool = True,
    batch_scale: bool = False,
    **options: Any,
) -> None:
    """Replace ``Task2Vec.montecarlo_fisher`` of the loaded module ``task2vec``; :func:`restore` undoes it.

    The replacement sets ``grad2_acc`` (the parameter's shape) and ``grad_counter`` (the number of examples) of every
    parameter above ``skip_layers``. ``estimator`` and ``samples`` as in :func:`t2v_fast.fisher`, to which ``options``
    go; ``epochs`` multiplies ``samples`` of a random estimator and changes nothing else. ``balanced`` weighs examples
    so that each class counts the same, as the public code's sampler does. ``batch_scale`` divides by the batch size:
    the squared mean gradient of a batch is about that much smaller than the mean square.

    The model runs in evaluation mode and is left in its own. Raises TypeError for a module without the class, and when
    called what :func:`t2v_fast.fisher` raises.
    """
    owner = getattr(task2vec, "Task2Vec", None)
    if not isinstance(owner, type) or not callable(getattr(owner, "montecarlo_fisher", None)):
        name = getattr(task2vec, "__name__", task2vec)
        raise TypeError(f"{name} has no class Task2Vec with montecarlo_fisher: pass the public code's module task2vec")

    def montecarlo_fisher(self: Any, dataset: Dataset, epochs: int = 1) -> None:
        _fisher_of(self, dataset, epochs, estimator, samples, balanced, batch_scale, options)

    if not hasattr(owner, _ORIGINAL):
        setattr(owner, _ORIGINAL, owner.montecarlo_fisher)
    owner.montecarlo_fisher = montecarlo_fisher


def restore(task2vec: ModuleType) -> None:
    """Undo :func:`accelerate`. Does nothing to a module that was not accelerated."""
    owner = getattr(task2vec, "Task2Vec", None)
    if hasattr(owner, _ORIGINAL):
        owner.montecarlo_fisher = getattr(owner, _ORIGINAL)
        delattr(owner, _ORIGINAL)


def _fisher_of(
    task2vec: Any,
    dataset: Dataset,
    epochs: int,
    estimator: str,
    samples: int,
    balanced: bool,
    batch_scale: bool,
    options: dict[str, Any],
) -> None:
    model, start = task2vec.model, task2vec.skip_layers
    dataset = _some(dataset, task2vec.max_samples)
    loader_options = dict(task2vec.loader_opts)
    batch = loader_options.get("batch_size", BATCH)
    loader = DataLoader(dataset, batch_size=batch, num_workers=loader_options.get("num_workers", 0))
    weights = None
    if balanced and not task2vec.bernoulli:
        _, codes = torch.unique(torch.as_tensor(_labels(dataset)), return_inverse=True)
        weights = balanced_weights(codes, int(codes.max()) + 1)
    entered = _From(model, start)
    inside = [model] if not start else [m for m in model.layers[start:] if isinstance(m, nn.Module)]
    wanted = [p for m in inside for p in m.parameters()]
    names = {name for name, p in entered.named_parameters() if any(p is w for w in wanted)}
    with evaluating(model):
        found = fisher(
            entered,
            loader,
            estimator,
            samples if estimator in ("exact", "empirical") else samples * epochs,
            "parameter",
            likelihood="sigmoid" if task2vec.bernoulli else "softmax",
            parameters=sorted(names),
            weights=weights,
            device=next(model.parameters()).device,
            **options,
        )
    for name, p in entered.named_parameters():
        p.grad_counter = 0
        if hasattr(p, "grad2_acc"):
            del p.grad2_acc  # of another task
        if name in found:
            p.grad2_acc = (found[name] / batch if batch_scale else found[name]).to(p)
            p.grad_counter = found.num_examples


def _some(dataset: Dataset, count: int | None) -> Dataset:
    """That many examples, drawn by a seed of their own, or all."""
    if count is None or count >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, sorted(order[:count].tolist()))


def _labels(dataset: Any) -> Any:
    """The labels, without loading an image where the data set keeps them apart, as the public code looks for them."""
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset)
        return [whole[i] for i in dataset.indices]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    if hasattr(dataset, "tensors"):
        return dataset.tensors[1].tolist()
    return [int(dataset[i][1]) for i in range(len(dataset))]


class Embedding:
    """What the public code calls an embedding: ``hessian`` and ``scale`` [D], and ``meta``, which may be None."""

    def __init__(self, hessian: Any, scale: Any, meta: Mapping[str, Any] | None = None) -> None:
        self.hessian, self.scale, self.meta = np.array(hessian), np.array(scale), meta

    def convert(self, task: str | None = None) -> library.Embedding:
        """As this library's distances, selection and banks take it; ``task`` is its name there."""
        return from_public(self.hessian, self.scale, self.meta, task)


class ProbeNetwork(nn.Module, ABC):
    """A network that can be entered at one of its ``layers``, the last of which is the linear ``classifier``.

    ``layers`` holds modules and functions, in the order in which :meth:`forward` applies them.
    """

    layers: Sequence[Callable[[Tensor], Tensor]]

    @property
    @abstractmethod
    def classifier(self) -> nn.Linear: ...

    def forward(self, x: Tensor, start_from: int = 0) -> Tensor:
        for layer in self.layers[start_from:]:
            x = layer(x)
        return x

    @staticmethod
    def of(model: nn.Module, num_classes: int | None = None, image_size: int = 64) -> ProbeNetwork:
        """A probe of a network that applies its children in order and ends in a linear layer, such as a ResNet.

        Features are flattened before that layer, which is replaced by one of ``num_classes`` outputs if given. The
        modules are the model's own. Raises ValueError for a network that does anything else, found by running it.
        """
        return _Children(model, num_classes, image_size)


class _Children(ProbeNetwork):
    def __init__(self, model: nn.Module, num_classes: int | None, image_size: int) -> None:
        super().__init__()
        names = [name for name, _ in model.named_children()]
        head = getattr(model, names[-1]) if names else None
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(model).__name__} does not end in a linear layer but in {type(head).__name__}")
        for name in names[:-1]:
            self.add_module(name, getattr(model, name))
        self.fc = head
        self.layers = [*(getattr(self, name) for name in names[:-1]), _flatten, head]
        with evaluating(model), torch.no_grad():
            self.train(False)
            x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
            x = x.to(next(model.parameters()))
            try:
                same = torch.allclose(self(x), model(x), rtol=1e-4, atol=1e-6)
            except RuntimeError:
                same = False
        self.train(model.training)
        if not same:
            raise ValueError(
                f"{type(model).__name__} is not its children one after the other: derive from ProbeNetwork and "
                "list its layers"
            )
        if num_classes is not None and num_classes != head.out_features:
            self.layers[-1] = self.fc = nn.Linear(head.in_features, num_classes).to(head.weight)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


MODES = ("exact", "compat")


class Task2Vec:
    """The public code's class, argument for argument.

    ``mode="exact"``: the Fisher of each example in evaluation mode, each image once and each class with the same
    weight; the head is fitted to convergence, or as ``classifier_opts`` says where it says anything; ``batch_scale``
    and ``options`` (``estimator``, ``samples``, ...) as in :func:`accelerate`. ``mode="compat"``: that code's numbers
    from the same seed, to rounding: squares of the mean gradient of balanced batches that are drawn with replacement,
    batch norm in training mode, its rule for ``max_samples``. ``loader_opts``: ``batch_size`` (64), ``num_workers``
    (0), ``num_samples`` (10,000), ``drop_last`` (True), the last two for draws.
    """

    def __init__(
        self,
        model: ProbeNetwork,
        skip_layers: int = 0,
        max_samples: int | None = None,
        classifier_opts: Mapping[str, Any] | None = None,
        method: str = "montecarlo",
        method_opts: Mapping[str, Any] | None = None,
        loader_opts: Mapping[str, Any] | None = None,
        bernoulli: bool = False,
        *,
        mode: str = "exact",
        batch_scale: bool = False,
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        if method not in ("montecarlo", "variational"):
            raise ValueError(f"method is {method!r}, expected 'montecarlo' or 'variational'")
        if not 0 <= skip_layers < len(model.layers):
            raise ValueError(f"skip_layers is {skip_layers}, expected 0 to {len(model.layers) - 1}")
        if skip_layers and not isinstance(model.layers[skip_layers], nn.Module):
            raise ValueError(f"skip_layers is {skip_layers}, but that layer is a function: enter at a module")
        if mode == "compat" and (options or batch_scale):
            raise ValueError("batch_scale and options of the estimator are for mode='exact'")
        self.model, self.skip_layers, self.max_samples = model, skip_layers, max_samples
        self.classifier_opts, self.loader_opts = dict(classifier_opts or {}), dict(loader_opts or {})
        self.method, self.method_opts, self.bernoulli = method, dict(method_opts or {}), bernoulli
        self.mode, self.batch_scale, self.options = mode, batch_scale, options
        self.device = next(model.parameters()).device
        self.loss_fn = nn.BCEWithLogitsLoss() if bernoulli else nn.CrossEntropyLoss()

    def embed(self, dataset: Dataset) -> Embedding:
        """Fit the classifier on the data set of (image, label), compute the Fisher, and read the embedding from it."""
        if self.mode == "exact":
            dataset = _some(dataset, self.max_samples)
        inputs, features, targets = self._cache_features(dataset)
        self._fit_classifier(features, targets, **self.classifier_opts)
        if self.skip_layers:
            dataset = TensorDataset(inputs, targets)
        self.compute_fisher(dataset)
        return self.extract_embedding(self.model)

    def compute_fisher(self, dataset: Dataset) -> None:
        """By ``method`` with ``method_opts``; of a data set of what enters layer ``skip_layers``."""
        run = {"variational": self.variational_fisher, "montecarlo": self.montecarlo_fisher}[self.method]
        run(dataset, **self.method_opts)

    def montecarlo_fisher(self, dataset: Dataset, epochs: int = 1) -> None:
        """Sets ``grad2_acc`` and ``grad_counter`` of the parameters above ``skip_layers``."""
        self._forget()
        if self.mode == "exact":
            options = {"estimator": "deflated", "samples": 2, "balanced": True, **self.options}
            chosen = [options.pop(name) for name in ("estimator", "samples", "balanced")]
            _fisher_of(self, dataset, epochs, *chosen, self.batch_scale, options)
            return
        self.model.train()
        loader, parameters = self._draw(dataset), list(self.model.parameters())
        for p in parameters:
            p.grad2_acc, p.grad_counter = torch.zeros_like(p), 0
        for _ in range(epochs):
            for x, _ in tqdm(loader, desc="Fisher", leave=False):
                logits = self.model(x.to(self.device), start_from=self.skip_layers)
                if self.bernoulli:
                    drawn = torch.bernoulli(logits.detach().sigmoid())
                else:
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1).view(-1)
                self.model.zero_grad()
                self.loss_fn(logits, drawn).backward()
                for p in parameters:
                    if p.grad is not None:
                        p.grad2_acc += p.grad.square()
                        p.grad_counter += 1
        for p in parameters:
            if p.grad_counter:
                p.grad2_acc /= p.grad_counter
            else:
                del p.grad2_acc
        self.model.zero_grad()

    def variational_fisher(self, dataset: Dataset, epochs: int = 1, beta: float = 1e-7) -> None:
        """Set ``logvar0`` and ``loglambda2`` of the layers above ``skip_layers``, as in :mod:`.variational`."""
        self._forget()
        model, compat = self.model, self.mode == "compat"
        inside = {
            m for layer in model.layers[self.skip_layers : -1] if isinstance(layer, nn.Module) for m in layer.modules()
        }
        noisy = {
            f"probe.{name}.weight": m
            for name, m in model.named_modules()
            if m in inside and getattr(m, "weight", None) is not None and m.weight.dim() > 1
        }
        generator = None if compat else torch.Generator().manual_seed(0)
        loader = self._draw(dataset, generator)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in loader:
                yield x.to(self.device), y.to(self.device, torch.float32 if self.bernoulli else None)

        training = model.training
        model.train(compat)
        try:
            found = variational_fisher(
                _From(model, self.skip_layers),
                batches,
                list(noisy),
                head=model.classifier.parameters(),
                likelihood="sigmoid" if self.bernoulli else "softmax",
                epochs=epochs,
                beta=beta,
                generator=None if compat else torch.Generator(self.device).manual_seed(0),
                progress=True,
            )
        finally:
            model.train(training)
        for name, m in noisy.items():
            m.logvar0 = found.log_variance[name].view(-1, *[1] * (m.weight.dim() - 1))
            m.loglambda2 = found.log_prior[name]

    def extract_embedding(self, model: nn.Module) -> Embedding:
        """What the last Fisher left: an entry for each filter of each module but the classifier, no biases."""
        hessian, scale = [], []
        for m in model.modules():
            if m is model.classifier:
                continue
            weight = getattr(m, "weight", None)
            if hasattr(m, "logvar0"):
                hessian.append((-m.logvar0).exp().flatten())
                scale.append((-m.loglambda2).exp().expand_as(hessian[-1]))
            elif hasattr(weight, "grad2_acc"):
                hessian.append(weight.grad2_acc.flatten(1).mean(1) if weight.dim() > 1 else weight.grad2_acc)
                scale.append(torch.ones_like(hessian[-1]))
        if not hessian:
            raise ValueError("no Fisher was computed: call compute_fisher or embed")
        return Embedding(*(torch.cat(parts).detach().cpu().numpy() for parts in (hessian, scale)))

    def _forget(self) -> None:
        """What an earlier Fisher left."""
        for m in self.model.modules():
            for name in ("logvar0", "loglambda2"):
                if hasattr(m, name):
                    delattr(m, name)
        for p in self.model.parameters():
            if hasattr(p, "grad2_acc"):
                del p.grad2_acc

    def _cache_features(self, dataset: Dataset) -> tuple[Tensor | None, Tensor, Tensor]:
        """What enters layer ``skip_layers``, unless that is the first, what enters the classifier, and the labels."""
        size = self.loader_opts.get("batch_size", BATCH)
        loader = DataLoader(dataset, size, num_workers=self.loader_opts.get("num_workers", 0))
        batches = len(loader)
        if self.mode == "compat" and self.max_samples is not None:
            batches = min(self.max_samples // size - 1, batches)
            if batches < 1:
                raise ValueError(f"max_samples is {self.max_samples}, expected at least two batches of {size}")
        kept: dict[int, list[Tensor]] = {len(self.model.layers) - 1: []}
        if self.skip_layers:
            kept[self.skip_layers] = []
        hooks = [
            self.model.layers[k].register_forward_pre_hook(lambda _, x, to=to: to.append(x[0].detach().cpu().clone()))
            for k, to in kept.items()
        ]
        targets, training = [], self.model.training
        self.model.train(self.mode == "compat")
        try:
            with torch.no_grad():
                for x, y in tqdm(islice(loader, batches), total=batches, desc="features", leave=False):
                    targets.append(y)
                    self.model(x.to(self.device))
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        if not targets:
            raise ValueError("the data set has no example")
        labels = torch.cat(targets)
        if labels.dim() == 1 and labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype}, expected whole numbers from 0")
        inputs = torch.cat(kept[self.skip_layers]) if self.skip_layers else None
        return inputs, torch.cat(kept[len(self.model.layers) - 1]), labels

    def _fit_classifier(
        self,
        features: Tensor,
        targets: Tensor,
        optimizer: str = "",
        learning_rate: float = 4e-4,
        weight_decay: float = 1e-4,
        epochs: int = 10,
    ) -> None:
        classifier = self.model.classifier
        if self.mode == "exact" and not self.classifier_opts:
            softmax = not self.bernoulli or targets.dim() == 1
            weights = balanced_weights(targets, classifier.out_features) if targets.dim() == 1 else None
            fit = fit_head(
                features,
                targets,
                num_classes=classifier.out_features,
                weights=weights,
                likelihood="softmax" if softmax else "sigmoid",
            )
            classifier.load_state_dict(fit.linear.state_dict())
            return
        optimizers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        if (name := optimizer or "adam") not in optimizers:
            raise ValueError(f"optimizer is {name!r}, expected one of {', '.join(optimizers)}")
        steps = optimizers[name](classifier.parameters(), lr=learning_rate, weight_decay=weight_decay)
        generator = None if self.mode == "compat" else torch.Generator().manual_seed(0)
        loader = self._draw(TensorDataset(features, targets), generator)
        for _ in tqdm(range(epochs), desc="classifier", leave=False):
            for x, y in loader:
                steps.zero_grad()
                F.cross_entropy(classifier(x.to(self.device)), y.to(self.device)).backward()
                steps.step()

    def _draw(self, dataset: Dataset, generator: torch.Generator | None = None) -> DataLoader:
        """Batches drawn with replacement, each class as often as the others, by torch's own generator if None."""
        options = {"batch_size": BATCH, "num_workers": 0, "num_samples": 10_000, "drop_last": True, **self.loader_opts}
        if isinstance(dataset, TensorDataset):
            options["num_workers"] = 0
        labels = np.asarray(_labels(dataset))
        if labels.ndim != 1:
            raise ValueError(f"labels are {labels.shape}: balanced draws are for one label an example")
        if options["drop_last"] and options["num_samples"] < options["batch_size"]:
            raise ValueError(
                f"{options['num_samples']} draws fill no batch of {options['batch_size']}: change num_samples or "
                "batch_size, or pass drop_last=False"
            )
        counts = np.bincount(labels)
        chances = 1 / counts[labels] / len(counts)
        sampler = WeightedRandomSampler(chances / chances.sum(), options.pop("num_samples"), generator=generator)
        return DataLoader(dataset, sampler=sampler, generator=generator, **options)
