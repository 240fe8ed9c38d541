"""Which parameters of a network to compute a Fisher of, and along which axis the filters of each lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from .quantised import is_quantised
from .wrappers import named_parameters, original_name

TRAINABLE = "trainable"
ParameterFilter = Iterable[str] | Callable[[str, nn.Parameter], bool] | None  # or TRAINABLE, which is a str
FilterAxis = Mapping[str, int] | Callable[[str, nn.Parameter], int] | None


def select_parameters(model: nn.Module, parameters: ParameterFilter = None) -> dict[str, nn.Parameter]:
    """Select parameters of a network by name.

    Args:
        model: The network.
        parameters: Names, or a function of name and parameter that is true for the wanted ones. ``"trainable"`` selects
            the floating-point parameters that require gradients now, such as adapters on a frozen network. None selects
            every floating-point parameter, frozen or not.

    Returns:
        The parameters by name, in the order of the given names, otherwise in the model's order. A parameter that
        several layers share appears once, under its first name. The names are those without wrappers such as
        torch.compile's; the given ones may be either.

    Raises:
        ValueError: The model has no floating-point parameter of a given name, or no parameter is left.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(select_parameters(network, lambda name, p: p.dim() > 1))
        ['0.weight', '2.weight']
        >>> _ = network[0].requires_grad_(False)
        >>> list(select_parameters(network, "trainable"))
        ['2.weight', '2.bias']
    """
    everything = {name: p for name, p in named_parameters(model) if p.is_floating_point() and not is_quantised(p)}
    if isinstance(parameters, str) and parameters != TRAINABLE:
        raise ValueError(
            f"parameters is the string {parameters!r}, expected a list of names, [{parameters!r}], or {TRAINABLE!r}"
        )
    if parameters == TRAINABLE:
        chosen = {name: p for name, p in everything.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "no parameter is trainable: all floating-point parameters have requires_grad=False. A PEFT adapter is "
                "frozen while it is not active (set_adapter), or where it was loaded without is_trainable=True"
            )
    elif parameters is None:
        chosen = everything
    elif callable(parameters):
        chosen = {name: p for name, p in everything.items() if parameters(name, p)}
    else:
        names = [name if name in everything else original_name(model, name) for name in parameters]
        unknown = [name for name in names if name not in everything]
        if unknown:
            raise ValueError(
                f"the model has no floating-point parameter {unknown[0]!r}; it has {', '.join(everything)}"
            )
        chosen = {name: everything[name] for name in names}
    if not chosen:
        raise ValueError("no parameter is left to compute a Fisher of: check the model and parameters=...")
    return chosen


def filter_axes_of(parameters: Mapping[str, nn.Parameter], filter_axis: FilterAxis) -> dict[str, int]:
    """Find the axis of each parameter along which its filters lie.

    Args:
        parameters: Parameters by name.
        filter_axis: Axes by parameter name, or a function of name and parameter; the first axis where a name is
            missing, and everywhere if None.

    Returns:
        One axis for each parameter, counted from 0.

    Raises:
        ValueError: A name or an axis does not exist.

    Example:
        >>> filter_axes_of(dict(nn.Linear(4, 3).named_parameters()), {"weight": 1})
        {'weight': 1, 'bias': 0}
    """
    if filter_axis is None:
        return dict.fromkeys(parameters, 0)
    if isinstance(filter_axis, Mapping):
        if unknown := [name for name in filter_axis if name not in parameters]:
            raise ValueError(f"filter_axis names {unknown[0]!r}, which is none of {', '.join(parameters)}")
        axes = {name: filter_axis.get(name, 0) for name in parameters}
    else:
        axes = {name: filter_axis(name, p) for name, p in parameters.items()}
    for name, axis in axes.items():
        if not isinstance(axis, int) or not 0 <= axis < max(1, parameters[name].dim()):
            raise ValueError(
                f"filter_axis is {axis} for {name!r} {list(parameters[name].shape)}, expected one of its axes from 0"
            )
    return axes
