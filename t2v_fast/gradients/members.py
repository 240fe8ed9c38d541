"""The modules and parameters of a network, in a fraction of the time that torch's generators take.

A call of :func:`t2v_fast.fisher` looks at all modules a dozen times, for one property or another. Each of torch's
``modules()`` and ``parameters()`` goes through one generator for each level of the network, for each module.
"""

from __future__ import annotations

from torch import nn

# What torch's walks call. A network with methods of its own may hide members, or show more than it has.
WALKS = frozenset(("modules", "named_modules", "parameters", "named_parameters", "_named_members"))


def modules_of(network: nn.Module) -> list[nn.Module]:
    """Each module of a network once, in the order of ``network.modules()``.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> modules_of(network) == list(network.modules())
        True
    """
    modules = _walked(network)
    return list(network.modules()) if modules is None else modules


def name_of(network: nn.Module, module: nn.Module | None) -> str | None:
    """The name of a module in a network, for a message; None if the network does not have it.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> name_of(network, network[1])
        '1'
    """
    return next((name for name, found in network.named_modules() if found is module), None)


def parameters_of(network: nn.Module) -> list[nn.Parameter]:
    """Each parameter of a network once, in the order of ``network.parameters()``.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> [tuple(p.shape) for p in parameters_of(network)]
        [(3, 2), (3,)]
    """
    modules = _walked(network)
    if modules is None:
        return list(network.parameters())
    members = (p for module in modules for p in module._parameters.values())
    return list({id(p): p for p in members if p is not None}.values())


def _walked(network: nn.Module) -> list[nn.Module] | None:
    """Each module once, in the order of ``network.modules()``; None where that goes another way."""
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = [network]
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if children := module._modules:
                stack.extend(reversed(list(children.values())))
    modules = list(found.values())
    return modules if _have_usual_walks(modules) else None


def _have_usual_walks(modules: list[nn.Module]) -> bool:
    """Whether torch walks over these modules, the network first, without methods of their own or of their classes."""
    if not all(_is_usual(kind) for kind in {type(module) for module in modules}):
        return False
    return WALKS.isdisjoint(vars(modules[0])) and not any("named_modules" in vars(module) for module in modules)


def _is_usual(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, walk) is getattr(nn.Module, walk) for walk in WALKS)
