"""What stands in the way of a CUDA graph: operators that a replay would not repeat, and networks that change.

A replay of a CUDA graph launches the kernels of the captured pass again, with the same arguments: addresses, shapes,
numbers. It runs no code of the host. So a pass can be captured if all that changes from batch to batch lies in memory
of the device, at addresses that stay the same. :class:`Watch` looks at each operator of a pass, and
:class:`Snapshot` at the network itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..gradients.members import name_of

# Operators that make the host wait without a tag of torch's that says so.
_WAITING = frozenset(
    {"is_nonzero", "_linalg_eigh", "_linalg_svd", "linalg_inv_ex", "_linalg_solve_ex", "_linalg_eigvals"}
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")


class Watch(TorchDispatchMode):
    """Looks at the operators of a pass that runs in this context, and says why it cannot be captured.

    Four things stand in the way:

    - An operator makes the host wait for the device. CUDA refuses it in a capture. Control flow that depends on values
      of the device begins so.
    - An operator reads or writes memory of the host, beside memory of the device. A replay would use what was there at
      the capture, or memory that has been freed since.
    - An operator draws from a random generator of its own. (The states of the common generators are compared before
      and after the pass.)
    - An operator reads memory of the device that neither this pass has made nor ``fixed`` holds. Nobody would notice
      that such a tensor was replaced. Or the operator writes to ``fixed``, so that each pass would change the next.

    Args:
        device: The device.
        fixed: The tensors that have the same address in each replay: parameters, buffers, and static inputs.

    Attributes:
        obstacle: The first thing that was found; None if nothing was.

    Example:
        >>> x = torch.ones(3)
        >>> with Watch(x.device, [x]) as watch:
        ...     _ = x.exp().sum().item()
        >>> watch.obstacle
        'aten._local_scalar_dense.default (<doctest ...>:2) makes the host wait'
    """

    def __init__(self, device: torch.device, fixed: Iterable[Tensor]) -> None:
        super().__init__()
        self.device = device
        self.obstacle: str | None = None
        self._fixed = {_storage(t) for t in fixed if t.numel()}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if self.obstacle is None:
            why = self._obstacle(func, args, kwargs, found)
            self.obstacle = None if why is None else f"{func}{_caller()} {why}"
        return found

    def _obstacle(self, func: Any, args: tuple, kwargs: dict[str, Any], found: Any) -> str | None:
        leaves = tree_leaves((args, kwargs))
        name = _name(func)
        given = [t for t in leaves if isinstance(t, Tensor) and not _is_seed(name, t)]
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor) and not _is_seed(name, t)]
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            return "draws random numbers from a generator of its own"
        devices = {t.device for t in (*given, *made)}
        if self.device not in devices:
            return None  # what the host computes for itself, such as shapes
        if _waits(func, args):
            return "makes the host wait"
        if len(devices) > 1:
            return "reads or writes memory of the host"
        if any(t.layout != torch.strided for t in (*given, *made)):
            return "has a tensor that is not strided"
        for t in given:
            if t.numel() and (at := _storage(t)) not in self._made and at not in self._fixed:
                return (
                    f"reads a tensor {list(t.shape)} that is neither an input of the network, nor a parameter, nor a "
                    "buffer, so that nobody would notice if it was replaced"
                )
        for t in _written(func, args, kwargs):
            if t.numel() and _storage(t) in self._fixed:
                return f"writes to a tensor {list(t.shape)} of the network or of its inputs"
        self._made.update(_storage(t) for t in made if t.numel())
        return None


class HookWatch(TorchFunctionMode):
    """Notices hooks on tensors and on their autograd nodes that a forward pass registers in this context.

    Their code would run in each backward pass, and a replay runs none. What they compute could follow from numbers of
    the host, which a replay would keep as they were.

    Nodes have no list of their hooks. So reading the node of a tensor (``grad_fn``) counts, as torch's functions for
    hooks on several tensors do.

    Attributes:
        obstacle: The first thing that was found; None if nothing was.

    Example:
        >>> with HookWatch() as watch:
        ...     _ = torch.ones(3, requires_grad=True).exp().register_hook(lambda g: g)
        >>> watch.obstacle
        'Tensor.register_hook (<doctest ...>:2) adds a hook, which a replay would not run'
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.obstacle is None and func in _ADDING_HOOKS:
            name, does = _ADDING_HOOKS[func]
            self.obstacle = f"{name}{_caller()} {does}, which a replay would not run"
        return func(*args, **(kwargs or {}))


_GRAD_FN: Any = Tensor.grad_fn  # the descriptor of the attribute
_ADDING_HOOKS = {
    Tensor.register_hook: ("Tensor.register_hook", "adds a hook"),
    _GRAD_FN.__get__: ("Tensor.grad_fn", "reads an autograd node, which may get hooks"),
}


def _caller() -> str:
    """The line that called an operator, of the network or of this library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return "" if frame is None else f" ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _storage(t: Tensor) -> int:
    """The address where the memory of a tensor begins."""
    return t.untyped_storage().data_ptr()


def _name(func: Any) -> str:
    return func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)


def _is_seed(name: str, t: Tensor) -> bool:
    """Whether this is where the dropout of an attention operator began to draw.

    Without dropout nothing reads it, and it is a number of the host, except in a capture. With dropout the state of the
    common generator changes, which is noticed.
    """
    return "_attention" in name and t.device.type == "cpu" and t.numel() <= 2 and not t.is_floating_point()


def _waits(func: Any, args: tuple) -> bool:
    name = _name(func)
    if name in _INDEXING:  # the result has as many entries as a mask says
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    tags = getattr(func, "tags", ())
    return name in _WAITING or torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator writes to."""
    schema = getattr(func, "_schema", None)
    for k, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


class Snapshot:
    """The objects that a network consists of, and the places of its tensors, which replays rely on.

    Objects are compared by identity: modules, parameters, and all attributes of modules, so that another mode, another
    number or another forward method is noticed. What changes within a list or another object is not. Whoever needs to
    know compares :func:`t2v_fast.gradients.network_state.signature_of`, which takes ten times as long.

    Args:
        model: The network.

    Attributes:
        tensors: The parameters, the buffers, and the tensors that modules have as attributes.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> snapshot = Snapshot(network)
        >>> network[0].weight.data.zero_() is not None, snapshot.holds()
        (True, True)
        >>> network[0].weight.data = torch.ones(3, 2)  # another place
        >>> snapshot.holds()
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._objects = list(_objects(model))  # references keep their addresses from being used again
        self._ids = [*map(id, self._objects), *_hook_counts(model)]
        tensors = {id(t): t for t in self._objects if isinstance(t, Tensor)}
        self.tensors = list(tensors.values())
        self._places = [_place(t) for t in self.tensors]

    def holds(self) -> bool:
        """Whether the network still consists of the same objects, with its tensors at the same places."""
        return self._ids == [*map(id, _objects(self._model)), *_hook_counts(self._model)] and self._places == [
            _place(t) for t in self.tensors
        ]


def _objects(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        attributes = vars(module)
        yield module
        yield from attributes.values()
        for table in _TABLES:
            yield from attributes[table].values()


def _hook_counts(model: nn.Module) -> list[int]:
    return [len(hooks) for _, _, hooks in _hooks(model)]


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, dict[Any, Any]]]:
    """The tables of hooks of all modules, with their names; the module is None for those that all modules share."""
    for module in model.modules():
        attributes = vars(module)
        for name in _HOOKS:
            yield module, name, attributes[name]
    for name in _HOOKS:
        yield None, name, getattr(torch_module, f"_global{name}")


def hooked(model: nn.Module) -> str | None:
    """Say which layer has a hook, whose code a replay would not run; None if none has.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3))
        >>> _ = network[0].register_forward_hook(lambda module, inputs, output: None)
        >>> hooked(network)
        "the layer '0' has a hook (_forward_hooks), which a replay would not run"
    """
    for module, table, hooks in _hooks(model):
        if hooks:
            where = f"the layer {name_of(model, module)!r}" if module is not None else "every module"
            return f"{where} has a hook ({table}), which a replay would not run"
    return None


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride() if t.layout == torch.strided else None, t.dtype, t.requires_grad
