"""A faster Fisher inside the public Task2Vec code and its forks: :func:`accelerate` replaces methods of its class.

The forks for text (beyond-scale-language-data-diversity and DataFlow) have a method of their own for language models,
``montecarlo_fisher_autoregressive``, which is replaced too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ..estimation.diagonal import FisherDiagonal
from ..estimation.estimator import fisher
from ..tasks.data import balanced_weights
from .fim import evaluating
from .probe_network import FromLayer

_ORIGINALS = "_t2v_fast_originals"
BATCH = 64  # the public code's batch size, unless loader_opts has another
TEXT_BATCH = 8  # the forks' batch size for texts
DRAWS = 10_000  # how many images the public code draws, unless loader_opts has another num_samples
PUBLIC_WORKERS = 6  # its num_workers likewise
# Examples in each of the first two batches, which the self-check runs several times. A text is many tokens.
CHECKED, TEXTS_CHECKED = 4, 2
# Where the public code's cosine and entropy divide by Fisher values, they add 1e-8. A value this far below counts
# there as zero, and the other distances, which divide by the value itself, stay finite.
FLOOR = 1e-12


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`accelerate`."""

    estimator: str
    samples: int
    balanced: bool
    batch_scale: bool
    text_estimator: str
    text_samples: int
    padding: bool
    floor: float
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, estimator: str, samples: int, balanced: bool, batch_scale: bool, options: Mapping[str, Any]
    ) -> Settings:
        """Separate the options of the replacement from those of :func:`t2v_fast.fisher`."""
        own = {"text_estimator": "hutchinson", "text_samples": 1, "padding": True, "floor": FLOOR}
        rest = {"granularity": "filter"} | {key: value for key, value in options.items() if key not in own}
        if rest["granularity"] not in ("filter", "parameter"):
            raise ValueError(f"granularity is {rest['granularity']!r}, expected 'filter' or 'parameter'")
        chosen = {key: options.get(key, value) for key, value in own.items()}
        if not chosen["floor"] >= 0:
            raise ValueError(f"floor is {chosen['floor']}, expected a number of at least 0")
        return cls(estimator, samples, balanced, batch_scale, options=rest, **chosen)


def accelerate(
    task2vec: ModuleType,
    *,
    estimator: str = "deflated",
    samples: int = 2,
    balanced: bool = True,
    batch_scale: bool = False,
    **options: Any,
) -> None:
    """Replace the Monte Carlo Fisher in the class ``Task2Vec`` of a loaded module; :func:`restore` undoes it.

    The new methods set ``grad2_acc`` (of the parameter's shape, in float64) and ``grad_counter`` (the number of
    examples) of every parameter that the frontend's own method would set: those above ``skip_layers`` that require a
    gradient. The model runs in evaluation mode and is left in its own mode. The methods raise what
    :func:`t2v_fast.fisher` raises.

    ``montecarlo_fisher`` visits each image once, and no more images than the frontend would draw (``num_samples``).
    ``montecarlo_fisher_autoregressive``, which forks for text have, visits each text once. It leaves out the output
    head ``lm_head`` unless the head is tied to the table of tokens, as the frontend's embedding leaves it out.
    ``variational_fisher`` stays as it is, and warns of that.

    Args:
        task2vec: The public code's module ``task2vec``, or that of a fork.
        estimator: The estimator for images, as in :func:`t2v_fast.fisher`.
        samples: Cotangents an image. The argument ``epochs`` of the method multiplies this number, except for
            ``"exact"`` and ``"empirical"``, and does nothing else.
        balanced: Weight the images so that each class counts the same, as the public code's sampler does.
        batch_scale: Divide by the number of examples (for text, of tokens) in a batch, because the squared mean
            gradient of a batch is about that much smaller than the mean square.
        options: More arguments of :func:`t2v_fast.fisher`, and these:

            - ``granularity`` (``"filter"``): all entries of a filter get the filter's mean, which is all that the
              frontend reads. ``"parameter"`` gives each entry its own value, and costs more.
            - ``floor`` (1e-12): the value of filters whose Fisher is zero up to rounding, such as those whose ReLU is
              never active, and the rows of tokens that no text has. Five of the frontend's distances divide by these
              values. The smallest other value is taken instead if it is below the floor. 0 gives zeros, and warns.
            - ``text_estimator`` (``"hutchinson"``) and ``text_samples`` (1): the estimator and the cotangents for text.
            - ``padding`` (True): for text, whether padding counts, as it does in the frontend.

    Raises:
        TypeError: For a module without such a class, or whose class has another Fisher that would stay as it is.
        ValueError: For an option that is not valid.
    """
    owner = getattr(task2vec, "Task2Vec", None)
    name = getattr(task2vec, "__name__", task2vec)
    if not isinstance(owner, type) or not callable(getattr(owner, "montecarlo_fisher", None)):
        raise TypeError(f"{name} has no class Task2Vec with montecarlo_fisher: pass the public code's module task2vec")
    settings = Settings.of(estimator, samples, balanced, batch_scale, options)

    def montecarlo_fisher(self: Any, dataset: Dataset, epochs: int = 1) -> None:
        loader_opts = {"num_workers": PUBLIC_WORKERS, "num_samples": DRAWS, **(self.loader_opts or {})}
        image_fisher(self, dataset, epochs, settings, loader_opts, loader_opts["num_samples"] * epochs)

    def montecarlo_fisher_autoregressive(self: Any, dataset: Dataset, epochs: int = 1) -> None:
        text_fisher(self, dataset, epochs, settings)

    def variational_fisher(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "accelerate leaves variational_fisher as it is: t2v_fast.adapters.task2vec.Task2Vec has a faster one",
            stacklevel=2,
        )
        return originals["variational_fisher"](self, *args, **kwargs)

    replacements: dict[str, Callable] = {
        f.__name__: f for f in (montecarlo_fisher, montecarlo_fisher_autoregressive, variational_fisher)
    }
    found = {key for key in dir(owner) if "fisher" in key.lower() and callable(getattr(owner, key))}
    if strangers := sorted(found - replacements.keys() - {"compute_fisher"}):
        raise TypeError(
            f"{name}.Task2Vec has the method {strangers[0]}, which accelerate does not know and which would stay as "
            f"slow as it is: known are {', '.join(replacements)}"
        )
    if _ORIGINALS not in vars(owner):
        setattr(owner, _ORIGINALS, {key: getattr(owner, key) for key in found & replacements.keys()})
    originals = vars(owner)[_ORIGINALS]
    for key in originals:
        setattr(owner, key, replacements[key])


def restore(task2vec: ModuleType) -> None:
    """Undo :func:`accelerate`. A module that was not accelerated stays as it is."""
    owner = getattr(task2vec, "Task2Vec", None)
    if owner is not None and _ORIGINALS in vars(owner):
        for key, method in vars(owner)[_ORIGINALS].items():
            setattr(owner, key, method)
        delattr(owner, _ORIGINALS)


def image_fisher(
    task2vec: Any,
    dataset: Dataset,
    epochs: int,
    settings: Settings,
    loader_opts: Mapping[str, Any],
    draws: int | None = None,
) -> None:
    """Do what ``montecarlo_fisher`` of an instance of the frontend's ``Task2Vec`` does, by :func:`t2v_fast.fisher`.

    No more than ``draws`` images are visited.
    """
    model, start = task2vec.model, task2vec.skip_layers
    weighted = settings.balanced and not task2vec.bernoulli
    dataset = some(dataset, task2vec.max_samples)
    if weighted:
        codes = _codes(dataset)
        chosen = _balanced(codes, draws)
        codes, dataset = codes[chosen], dataset if len(chosen) == len(codes) else Subset(dataset, chosen.tolist())
        _, codes = torch.unique(codes, return_inverse=True)
        weights = balanced_weights(codes, int(codes.max()) + 1)
    else:
        dataset, weights = some(dataset, draws), None
    batch = loader_opts.get("batch_size", BATCH)
    # No worker helps where everything is in memory already.
    workers = 0 if isinstance(dataset, TensorDataset) else loader_opts.get("num_workers", 0)
    loader = DataLoader(dataset, batch, num_workers=workers)
    # The self-check remembers a network that it meets again, and a wrapper would be another one in each call.
    entered = FromLayer(model, start) if start else model
    inside = [model] if not start else [m for m in model.layers[start:] if isinstance(m, nn.Module)]
    wanted = [p for m in inside for p in m.parameters() if p.requires_grad]
    many = settings.samples if settings.estimator in ("exact", "empirical") else settings.samples * epochs
    with evaluating(model):
        found = fisher(
            entered,
            _small_first(loader, CHECKED),
            settings.estimator,
            many,
            likelihood="sigmoid" if task2vec.bernoulli else "softmax",
            parameters=_names(entered, wanted),
            weights=weights,
            device=next(model.parameters()).device,
            **settings.options,
        )
    _store(entered, found, settings, batch)


def text_fisher(task2vec: Any, dataset: Dataset, epochs: int, settings: Settings) -> None:
    """Do what ``montecarlo_fisher_autoregressive`` of such an instance does, by :func:`t2v_fast.fisher`."""
    model, options = task2vec.model, task2vec.loader_opts or {}
    if task2vec.bernoulli:
        raise ValueError("bernoulli=True has no meaning for a language model: a token is one of the vocabulary")
    batch = options.get("batch_size", TEXT_BATCH)
    loader = DataLoader(dataset, batch_size=batch, num_workers=options.get("num_workers", 0))
    only = 1 if (task2vec.classifier_opts or {}).get("break_early", False) else None
    head = set(map(id, model.lm_head.parameters()))
    tables = {id(p) for m in model.modules() if m is not model.lm_head for p in m._parameters.values()}
    wanted = [p for p in model.parameters() if p.requires_grad and (id(p) in tables or id(p) not in head)]
    tokens: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for texts in islice(loader, only):
            ids, there = texts["input_ids"], texts["attention_mask"]
            if ids.shape[1] < 2:
                raise ValueError(f"a batch of {len(ids)} texts has no token that is followed by another")
            counted = torch.ones_like(ids) if settings.padding else there
            counts = counted.clone()  # the token at t is predicted at t - 1
            counts[:, :-1] *= counted[:, 1:]
            counts[:, -1] = 0
            tokens.append(int(counts.sum()))
            labels = ids.masked_fill(counts == 0, -100)
            yield {"input_ids": ids, "attention_mask": there, "labels": labels}

    estimator, many = settings.text_estimator, settings.text_samples
    with evaluating(model):
        found = fisher(
            model,
            _small_first(batches(), TEXTS_CHECKED),
            estimator,
            many if estimator in ("exact", "empirical") else many * epochs,
            parameters=_names(model, wanted),
            mask=lambda inputs, labels: None if labels is None else labels.cpu() != -100,
            shift_labels=False,
            device=next(model.parameters()).device,
            **settings.options,
        )
    _store(model, found, settings, sum(tokens) / len(tokens))


def _names(model: nn.Module, wanted: Sequence[nn.Parameter]) -> list[str]:
    if not wanted:
        raise ValueError(
            "no parameter requires a gradient, so the frontend has no Fisher to compute: unfreeze the probe"
        )
    ids = set(map(id, wanted))
    return [name for name, p in model.named_parameters() if id(p) in ids]


def _store(model: nn.Module, found: FisherDiagonal, settings: Settings, batch: float) -> None:
    """Set ``grad2_acc`` and ``grad_counter`` of every parameter, and delete what an earlier task left."""
    means = {name: value.flatten(1).mean(1) if value.dim() > 1 else value for name, value in found.items()}
    every = torch.cat([value.flatten() for value in means.values()])
    # Rounding alone leaves about this much of a gradient that is zero, such as that of a bias before a softmax.
    rounding = torch.finfo(next(model.parameters()).dtype).eps ** 2 * float(every.mean())
    above = every[every > rounding]
    floor = min(settings.floor, float(above.min())) if len(above) else settings.floor
    if not floor and len(above) < len(every):
        warnings.warn(
            f"the Fisher of {len(every) - len(above)} of {len(every)} filters is zero, and floor=0 leaves it so: all "
            "of the frontend's distances but cosine and entropy are then infinite or not a number",
            stacklevel=4,
        )
    for name, p in model.named_parameters():
        p.grad_counter = 0
        if hasattr(p, "grad2_acc"):
            del p.grad2_acc
        if name not in found:
            continue
        value = found[name]
        dead = means[name] <= rounding
        value = torch.where(dead.view(-1, *[1] * (value.dim() - 1)) if value.dim() else dead, floor, value)
        if settings.batch_scale:
            value = value / batch
        if settings.options["granularity"] == "filter":
            value = value.view(-1, *[1] * (p.dim() - 1)) if p.dim() else value.reshape(())
        # In float64, because distances multiply squares of reciprocals, which overflow 32 bits for values below 1e-9.
        # The entries of a filter share one number in memory.
        p.grad2_acc = value.to(p.device).expand_as(p)
        p.grad_counter = found.num_examples


def _small_first(batches: Iterable[Any], checked: int) -> Iterator[Any]:
    """Divide the first batch, so that the self-check, which runs the first two batches several times, costs little.

    Each of the first two batches then has ``checked`` examples.
    """
    for index, batch in enumerate(batches):
        count = len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
        cuts = [0, checked, 2 * checked, count] if index == 0 else [0, count]
        for begin, end in pairwise(cuts):
            if begin < count:
                part = slice(begin, end)
                yield tree_map(lambda t, part=part: t[part] if isinstance(t, Tensor) and t.dim() else t, batch)


def some(dataset: Dataset, count: int | None) -> Dataset:
    """Return ``count`` examples drawn with a fixed seed, or all examples."""
    if count is None or count >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, sorted(order[:count].tolist()))


def _codes(dataset: Dataset) -> Tensor:
    """Return the labels as numbers of classes from 0 on."""
    codes = torch.as_tensor(np.asarray(labels_of(dataset)))
    if codes.dim() != 1:
        raise ValueError(f"labels are {list(codes.shape)}: classes are balanced for one label an example")
    return codes


def _balanced(codes: Tensor, count: int | None) -> Tensor:
    """Return which examples to take: all, or ``count`` without replacement, each class as likely as the others."""
    if count is None or count >= len(codes):
        return torch.arange(len(codes))
    _, inverse, sizes = torch.unique(codes, return_inverse=True, return_counts=True)
    chances = (1 / sizes.double())[inverse]
    drawn = np.random.default_rng(0).choice(len(codes), count, replace=False, p=(chances / chances.sum()).numpy())
    return torch.from_numpy(np.sort(drawn))


def labels_of(dataset: Any) -> Any:
    """Return the labels, without loading images if the public code knows where the data set keeps its labels."""
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return [whole[i] for i in dataset.indices]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    if hasattr(dataset, "tensors"):
        return dataset.tensors[1].tolist()
    return [int(dataset[i][1]) for i in range(len(dataset))]
