"""The public Task2Vec code (aws-cv-task2vec and its forks): a replacement for it, and a faster Fisher inside it.

The public code squares the mean gradient of batches, with drawn labels and batch norm in training mode. This library
computes the Fisher itself: it squares the gradient of each example, in evaluation mode, with every image once.

- :func:`accelerate` replaces the Monte Carlo Fisher of a loaded module. Everything else of the public code runs as
  before.
- :class:`Task2Vec`, :class:`ProbeNetwork` and :class:`Embedding` replace the public code's classes and have the same
  arguments. ``mode="exact"`` computes the Fisher, and ``mode="compat"`` the public code's numbers from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler
from tqdm import tqdm
from tqdm.auto import tqdm as public_tqdm  # mode="compat": it makes one more iterator of a loader, which draws a seed

from .. import embedding as library
from ..estimation.variational import WeightNoise, learn_variances
from ..tasks.data import balanced_weights
from ..tasks.head import fit_head
from .patching import BATCH, PUBLIC_WORKERS, Settings, accelerate, image_fisher, labels_of, restore, some
from .pickles import from_public, read_embedding, read_embeddings
from .probe_network import FromLayer, ProbeNetwork
from .public_noise import PublicNoise

__all__ = [
    "Embedding",
    "ProbeNetwork",
    "Task2Vec",
    "accelerate",
    "read_embedding",
    "read_embeddings",
    "restore",
]


class Embedding:
    """The embedding of the public code.

    Args:
        hessian: The Fisher values [D].
        scale: The scales [D].
        meta: Facts about the task, which may be None.
    """

    def __init__(self, hessian: Any, scale: Any, meta: Mapping[str, Any] | None = None) -> None:
        self.hessian, self.scale, self.meta = np.array(hessian), np.array(scale), meta

    def convert(self, task: str | None = None) -> library.Embedding:
        """Convert to the embedding that this library's distances, selection and banks take, under the name ``task``."""
        return from_public(self.hessian, self.scale, self.meta, task)


MODES = ("exact", "compat")


class Task2Vec:
    """The public code's class, with its arguments.

    ``mode="exact"`` computes the Fisher of each example in evaluation mode, with each image once and the same weight
    for each class, and fits the classifier to convergence. ``mode="compat"`` gives the public code's numbers from the
    same seed, to rounding: squares of the mean gradient of balanced batches that are drawn with replacement, batch norm
    in training mode, and its rule for ``max_samples``.

    Args:
        model: The probe.
        skip_layers: The layer of the probe at which the Fisher begins.
        max_samples: How many examples to use, by default all.
        classifier_opts: How to fit the classifier: ``optimizer``, ``learning_rate``, ``weight_decay`` and ``epochs``,
            as in the public code. With ``mode="exact"``, giving any of them replaces the fit to convergence.
        method: ``"montecarlo"`` or ``"variational"``.
        method_opts: Arguments of :meth:`montecarlo_fisher` or :meth:`variational_fisher`.
        loader_opts: ``batch_size`` (64), ``num_workers`` (0), and for draws ``num_samples`` (10,000) and ``drop_last``
            (True). With ``mode="compat"``, ``num_workers`` is 6, as in the public code.
        bernoulli: Whether the labels are independent zeros and ones.
        mode: ``"exact"`` or ``"compat"``.
        batch_scale: As in :func:`accelerate`; for ``mode="exact"``.
        options: ``estimator``, ``samples``, ``balanced`` and other arguments of :func:`accelerate`; for
            ``mode="exact"``.

    Raises:
        ValueError: For an unknown mode or method, and for options that do not fit.
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
        """Fit the classifier to a data set of (image, label), compute the Fisher, and return the embedding."""
        if self.mode == "exact":
            dataset = some(dataset, self.max_samples)
        inputs, features, targets = self._cache_features(dataset)
        self._fit_classifier(features, targets, **self.classifier_opts)
        if self.skip_layers:
            dataset = TensorDataset(inputs, targets)
        self.compute_fisher(dataset)
        return self.extract_embedding(self.model)

    def compute_fisher(self, dataset: Dataset) -> None:
        """Run ``method`` with ``method_opts`` on a data set of what enters layer ``skip_layers``."""
        run = {"variational": self.variational_fisher, "montecarlo": self.montecarlo_fisher}[self.method]
        run(dataset, **self.method_opts)

    def montecarlo_fisher(self, dataset: Dataset, epochs: int = 1) -> None:
        """Set ``grad2_acc`` and ``grad_counter`` of the parameters above ``skip_layers``."""
        self._forget()
        if self.mode == "exact":
            options = {"estimator": "deflated", "samples": 2, "balanced": True, **self.options}
            chosen = [options.pop(name) for name in ("estimator", "samples", "balanced")]
            image_fisher(self, dataset, epochs, Settings.of(*chosen, self.batch_scale, options), self.loader_opts)
            return
        self.model.train()
        loader, parameters = self._draw(dataset), list(self.model.parameters())
        for p in parameters:
            p.grad2_acc, p.grad_counter = torch.zeros_like(p), 0
        for _ in range(epochs):
            for x, _ in public_tqdm(loader, desc="Fisher", leave=False):
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
        """Set ``logvar0`` and ``loglambda2`` of the layers above ``skip_layers``.

        :mod:`t2v_fast.estimation.variational` describes the method and its ``beta``.
        """
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
            for x, y in public_tqdm(loader, desc="variances", leave=False) if compat else loader:
                yield x.to(self.device), y.to(self.device, torch.float32 if self.bernoulli else None)

        training = model.training
        model.train(compat)
        try:
            found = learn_variances(
                (PublicNoise if compat else WeightNoise)(
                    {name: m.weight for name, m in noisy.items()},
                    None if compat else torch.Generator(self.device).manual_seed(0),
                ),
                FromLayer(model, self.skip_layers),
                batches,
                list(model.classifier.parameters()),
                "sigmoid" if self.bernoulli else "softmax",
                epochs,
                beta,
                progress=not compat,
            )
        finally:
            model.train(training)
        for name, m in noisy.items():
            m.logvar0 = found.log_variance[name].view(-1, *[1] * (m.weight.dim() - 1))
            m.loglambda2 = found.log_prior[name]

    def extract_embedding(self, model: nn.Module) -> Embedding:
        """Read the embedding that the last Fisher left in ``model``.

        It has an entry for each filter of each module but the classifier, and none for biases.

        Raises:
            ValueError: If no Fisher was computed.
        """
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
        """Delete what an earlier Fisher left."""
        for m in self.model.modules():
            for name in ("logvar0", "loglambda2"):
                if hasattr(m, name):
                    delattr(m, name)
        for p in self.model.parameters():
            if hasattr(p, "grad2_acc"):
                del p.grad2_acc

    def _cache_features(self, dataset: Dataset) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return what enters layer ``skip_layers``, what enters the classifier, and the labels.

        The first of these is None if ``skip_layers`` is 0.
        """
        options, workers = self.loader_opts, 0
        if self.mode == "compat":  # the public code passes loader_opts on only if it skips layers
            options, workers = self.loader_opts if self.skip_layers else {}, PUBLIC_WORKERS
        if isinstance(dataset, TensorDataset):  # no worker could change its examples
            options = {**options, "num_workers": 0}
        size = options.get("batch_size", BATCH)
        loader = DataLoader(dataset, size, num_workers=options.get("num_workers", workers))
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
        """Return batches drawn with replacement, each class as often as the others.

        Without a generator, the draws come from torch's global one.
        """
        workers = PUBLIC_WORKERS if self.mode == "compat" else 0
        defaults = {"batch_size": BATCH, "num_workers": workers, "num_samples": 10_000, "drop_last": True}
        options = {**defaults, **self.loader_opts}
        if isinstance(dataset, TensorDataset):
            options["num_workers"] = 0
        labels = np.asarray(labels_of(dataset))
        if labels.ndim != 1:
            raise ValueError(f"labels are {labels.shape}: balanced draws are for one label an example")
        if options["drop_last"] and options["num_samples"] < options["batch_size"]:
            raise ValueError(
                f"{options['num_samples']} draws fill no batch of {options['batch_size']}: change num_samples or "
                "batch_size, or pass drop_last=False"
            )
        counts = np.bincount(labels, minlength=int(getattr(dataset, "num_classes", 0)))
        chances = 1 / counts[labels] / len(counts)
        sampler = WeightedRandomSampler(chances / chances.sum(), options.pop("num_samples"), generator=generator)
        return DataLoader(dataset, sampler=sampler, generator=generator, **options)
