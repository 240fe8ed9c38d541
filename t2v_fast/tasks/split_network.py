"""Run a network up to one of its modules, and later on from there, so that its first layers run once for each image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import write_atomically
from ..gradients.wrappers import named_modules, original_name


class _Reached(BaseException):
    """Leave a forward pass at the cut. A BaseException, so that no error handler in a network catches it."""


class Cut:
    """A place in a network: a module such that everything behind it depends on the module's output alone.

    ``layers`` is the module's name, or a number: the cut is then behind that many of the network's direct children,
    counted as they run. ``example`` is an input of the network with two images. It shows which modules are below the
    cut, and whether a pass from the cut gives the same output as a whole pass. Raises ValueError, which names the
    module, where the outputs differ.
    """

    def __init__(self, network: nn.Module, layers: int | str, example: Tensor) -> None:
        self._own: Callable | None = (
            None  # the network's forward method, while the network takes features instead of images
        )
        runs: list[tuple[str, Any]] = []  # every call of a module, in the order in which the calls ended
        handles = [
            module.register_forward_hook(lambda m, i, output, key=key: runs.append((key, output)))
            for key, module in named_modules(network).items()
            if key
        ]
        try:
            with torch.no_grad():
                whole = network(example)
        finally:
            for handle in handles:
                handle.remove()
        self.name = layers if isinstance(layers, str) else _child(runs, layers)
        ended = [key for key, _ in runs]
        if ended.count(self.name) != 1:
            raise ValueError(
                f"no cut at {self.name!r}: it is no module of the network that runs once; "
                f"those are {', '.join(key for key in ended if ended.count(key) == 1)}"
            )
        # The outputs of each module that ran before the cut and is not part of another such module.
        before = runs[: ended.index(self.name)]
        outputs: dict[str, list[Any]] = {}
        for key, output in before:
            inside = any(key.startswith(f"{other}.") for other, _ in before)
            if not inside and not key.startswith(f"{self.name}."):
                outputs.setdefault(key, []).append(output)
        for key, found in outputs.items():
            if not all(isinstance(o, Tensor) and o.shape[:1] == example.shape[:1] for o in found):
                raise ValueError(f"no cut at {self.name!r}: {key!r}, below it, gives no tensor with a row an example")
        self._shapes = {key: [(o.shape[1:], o.dtype) for o in found] for key, found in outputs.items()}
        self._input = example.shape[1:]
        below = {self.name, *outputs}
        self.below = frozenset(
            name
            for name in (original_name(network, key) for key, _ in network.named_parameters(remove_duplicate=False))
            if any(name.startswith(f"{key}.") for key in below)
        )
        with torch.no_grad():
            resumed = self.resume(network, self.features(network, example))
        apart = float((resumed - whole).abs().max())
        if not apart <= 100 * torch.finfo(whole.dtype).eps * float(whole.abs().max()):
            raise ValueError(
                f"no cut at {self.name!r}: a pass from there differs by {apart:.2g} from a whole one, so the output "
                "depends on more than what this module gives"
            )

    def features(self, network: nn.Module, images: Tensor) -> Tensor:
        """The module's output [N, ...]. Nothing behind the module is run."""

        def stop(module: nn.Module, inputs: Any, output: Tensor) -> None:
            raise _Reached(output)

        handle = network.get_submodule(self.name).register_forward_hook(stop)
        try:
            with torch.no_grad():
                (self._own or network)(images)
        except _Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise RuntimeError(f"the module {self.name!r} did not run, though it did when the cut was made")

    def resume(self, network: nn.Module, features: Tensor) -> Tensor:
        """The network's output, from the result of :meth:`features`. Modules below the cut are not run."""
        return self._resume(network, network, features)

    @contextmanager
    def first(self, network: nn.Module) -> Iterator[None]:
        """Within this context, the network takes results of :meth:`features` instead of images."""
        self._own = network.forward
        try:
            with _replaced(network, partial(self._resume, self._own, network)):
                yield
        finally:
            self._own = None

    def _resume(self, forward: Callable[[Tensor], Tensor], network: nn.Module, features: Tensor) -> Tensor:
        n = len(features)
        # A clone, because the next layer may work in place.
        answers: dict[str, list[Callable[[], Tensor]]] = {self.name: [features.clone]}
        for key, shapes in self._shapes.items():
            answers[key] = [
                partial(torch.zeros, (n, *shape), dtype=dtype, device=features.device) for shape, dtype in shapes
            ]
        with _answering(network, answers):
            return forward(torch.zeros((n, *self._input), device=features.device, dtype=features.dtype))


def _child(runs: list[tuple[str, Any]], count: int) -> str:
    children = list(dict.fromkeys(key for key, _ in runs if "." not in key))
    if not 1 <= count < len(children):
        raise ValueError(
            f"cannot skip {count} layers: the network's children run in the order {', '.join(children)}, of which 1 to "
            f"{len(children) - 1} can be skipped"
        )
    return children[count - 1]


@contextmanager
def _answering(network: nn.Module, answers: dict[str, list[Callable[[], Tensor]]]) -> Iterator[None]:
    """Within this context, the first calls of these modules return the given answers instead of running."""

    def instead(own: Callable, left: Iterator[Callable[[], Tensor]]) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            answer = next(left, None)
            return own(*args, **kwargs) if answer is None else answer()

        return forward

    with ExitStack() as stack:
        for key, answer in answers.items():
            module = network.get_submodule(key)
            stack.enter_context(_replaced(module, instead(module.forward, iter(answer))))
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = module.__dict__.get("forward")  # usually none: forward is a method of the class
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class FeatureCache:
    """Features at a cut, in a folder with one file for each batch.

    A file is found by a digest of the images and of ``key``, which stands for the network's weights and the cut. A
    damaged file counts as missing.
    """

    def __init__(self, folder: str | os.PathLike, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, images: Tensor) -> Path:
        """The file for the features of these images, whether it exists or not."""
        digest = hashlib.sha256(f"{self.key} {list(images.shape)} {images.dtype};".encode())
        digest.update(images.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def get(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The features of a batch: from its file, or computed and then kept."""
        path = self.path(images)
        try:
            return load_file(path)["features"].to(images.device)
        except (FileNotFoundError, SafetensorError, KeyError):
            features = compute(images)
        write_atomically(path, save({"features": features.cpu().contiguous()}))
        return features
