"""Networks that can be entered at any layer, as the public Task2Vec code uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .fim import evaluating


class FromLayer(nn.Module):
    """A probe network from the layer ``start`` on."""

    def __init__(self, probe: nn.Module, start: int) -> None:
        super().__init__()
        self.probe, self.start = probe, start

    def forward(self, x: Tensor) -> Tensor:
        return self.probe(x, start_from=self.start) if self.start else self.probe(x)


class ProbeNetwork(nn.Module, ABC):
    """A network that can be entered at one of its ``layers``, the last of which is the linear ``classifier``.

    A subclass defines both. ``layers`` holds modules and functions, in the order in which :meth:`forward` applies them.
    """

    layers: Sequence[Callable[[Tensor], Tensor]]

    @property
    @abstractmethod
    def classifier(self) -> nn.Linear:
        """The last layer."""

    def forward(self, x: Tensor, start_from: int = 0) -> Tensor:
        """Apply the layers from number ``start_from`` on to ``x``, which is what enters that layer."""
        for layer in self.layers[start_from:]:
            x = layer(x)
        return x

    @staticmethod
    def of(model: nn.Module, num_classes: int | None = None, image_size: int = 64) -> ProbeNetwork:
        """Make a probe of a network that applies its children in order and ends in a linear layer, such as a ResNet.

        Features are flattened before the last layer. The probe's modules are the model's own.

        Args:
            model: The network.
            num_classes: If given, a new last layer has that many outputs.
            image_size: The side of the images with which the probe is compared with the network.

        Raises:
            ValueError: If the probe's outputs differ from the network's.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
            >>> ProbeNetwork.of(model, num_classes=2, image_size=8).classifier
            Linear(in_features=4, out_features=2, bias=True)
        """
        return _Children(model, num_classes, image_size)


class _Children(ProbeNetwork):
    """The probe that :meth:`ProbeNetwork.of` makes."""

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
