"""What is remembered about a network from call to call, and the signature that tells when the memory no longer holds.

A *signature* (:class:`Signature`) describes everything about a network that decides which code a forward pass runs: the
modules and their classes, modes, attributes, hooks and forward methods, and the shapes, dtypes and devices of
parameters and buffers. The values of weights are left out. Two equal signatures of one network mean that the same code
runs on tensors of the same shapes.

:func:`state_of` returns the memory of a network. The memory is kept beside the network, not in it: a copy of the
network, or one that was pickled, starts without. It holds no reference that keeps the network alive, and ends with it.

A signature cannot see everything. A global variable, the contents of a file, the values of a large tensor or the
attributes of an object that a class holds may decide what a forward pass does, too. Whoever remembers something by
signature says why this does no harm, or looks again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase

MAX_SIGNATURES = 16  # of one network: a network gets another head for each task
MAX_TOKENS = 200_000  # a network with more attributes has no signature
MAX_DEPTH = 6  # how deep objects within the attributes of modules are looked at
MAX_FLAGS = 8  # the values of a tensor of integers are looked at up to this number of entries

# Immutable values of these types stand for themselves.
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, frozenset})
# What torch.compile keeps in a module, and in one that it wraps around another. The network runs without it.
_COMPILED = frozenset({"_compiled_call_impl"})
_WRAPPER = _COMPILED | {"dynamo_ctx", "forward", "_forward", "_torchdynamo_orig_callable", "get_compiler_config"}
_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)


class Unreadable(Exception):
    """An attribute whose changes cannot be noticed, or too many attributes."""


class ByIdentity:
    """Stands for an object whose attributes never change, and are not looked at."""

    def __init__(self, of: object) -> None:
        self.of = of


class Signature:
    """A description of objects that compares by value, and the objects that it names by identity.

    An object that is no plain value is named by its address. The description holds as long as all these objects live,
    because only then no other object can have the address.
    """

    def __init__(self, tokens: Iterable[Any], objects: Iterable[weakref.ref]) -> None:
        self.tokens = tuple(tokens)
        self.objects = tuple(objects)
        self._hash = hash(self.tokens)

    def holds(self) -> bool:
        """Whether all objects that are named by their address still exist."""
        return all(of() is not None for of in self.objects)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._hash == other._hash and self.tokens == other.tokens


class NetworkState:
    """What is remembered about one network: a value for each of its latest signatures. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Signature, Any] = {}
        self._met: set[str] = set()

    def is_first(self, what: str) -> bool:
        """Whether something is met for the first time with this network."""
        with self._lock:
            first = what not in self._met
            self._met.add(what)
            return first

    def get(self, signature: Signature | None) -> Any:
        """The value that was kept for an equal signature; None if there is none."""
        if signature is None:
            return None
        with self._lock:
            before = next((kept for kept in self._kept if kept == signature), None)
            if before is None:
                return None
            value = self._kept.pop(before)
            if before.holds():
                self._kept[before] = value  # now the latest
                return value
            return None

    def put(self, signature: Signature | None, value: Any) -> None:
        """Keep a value. The signature that was unused for longest is forgotten where there are too many."""
        if signature is None:
            return
        with self._lock:
            self._kept.pop(signature, None)
            self._kept[signature] = value
            while len(self._kept) > MAX_SIGNATURES:
                del self._kept[next(iter(self._kept))]

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._kept.clear()


_lock = threading.RLock()  # a network may be freed, which removes its entry, while an entry is added
_states: dict[int, tuple[weakref.ref, NetworkState]] = {}  # by the network's id: a network may define its own equality


def state_of(network: nn.Module) -> NetworkState:
    """The memory of a network, which lasts as long as the network.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> state_of(network) is state_of(network)
        True
    """
    key = id(network)
    with _lock:
        found = _states.get(key)
        if found is not None and found[0]() is network:
            return found[1]
        state = NetworkState()

        def forget(ref: weakref.ref) -> None:
            with _lock:
                if key in _states and _states[key][0] is ref:
                    del _states[key]

        _states[key] = weakref.ref(network, forget), state
        return state


def signature_of(network: nn.Module, *more: Any) -> Signature | None:
    """The signature of a network, and of further objects such as a forward function.

    Functions are equal if they have the same code, defaults and closure, so that a lambda may be made anew for each
    call.

    Args:
        network: The network.
        *more: Values and objects that also decide what is computed.
        inputs: The inputs of a batch.

    Returns:
        The signature, or None where an attribute of the network cannot be described.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> before = signature_of(network)
        >>> _ = network[0].weight.data.zero_()
        >>> before == signature_of(network)
        True
        >>> network[0].stride = (2, 2)
        >>> before == signature_of(network)
        False
    """
    reader = _Reader()
    try:
        reader.network(network)
        for value in more:
            reader.value(value)
        reader.rest()
    except Exception:  # whatever an object raises when it is looked at
        return None
    return Signature(reader.tokens, reader.objects)


def extended(signature: Signature | None, inputs: Any) -> Signature | None:
    """The same signature with inputs, described by their structure, shapes, strides, dtypes and devices."""
    if signature is None:
        return None
    reader = _Reader()
    try:
        reader.inputs(inputs)
    except Exception:
        return None
    return Signature((*signature.tokens, *reader.tokens), (*signature.objects, *reader.objects))


class _Methods:
    """The methods of a class that are named by their identity alone, which is most of them.

    Such a method has no closure and no default that could change in place. As long as the class has the same methods,
    with the same code and defaults, :func:`_methods_of` returns the same object, which stands for them as a token.
    """

    def __init__(self, of: type) -> None:
        self._plain: list[tuple[str, Callable[[], Any], types.CodeType, tuple | None]] = [
            (key, weakref.ref(value), value.__code__, value.__defaults__)
            for key, value in vars(of).items()
            if type(value) is types.FunctionType
            and not value.__closure__
            and not value.__kwdefaults__
            and all(type(default) in _PLAIN for default in value.__defaults__ or ())
        ]
        own = {key for key, *_ in self._plain}
        self.others = [key for key in vars(of) if key not in own]

    def hold(self, of: type) -> bool:
        """Whether the class still has these methods, and the others' names."""
        members = vars(of)
        if len(members) != len(self._plain) + len(self.others) or not all(key in members for key in self.others):
            return False
        for key, ref, code, defaults in self._plain:
            value = ref()
            if value is None or members.get(key) != value:  # functions are equal to themselves alone
                return False
            if value.__code__ is not code or value.__defaults__ is not defaults or value.__kwdefaults__:
                return False
        return True


_methods: weakref.WeakKeyDictionary[type, _Methods] = weakref.WeakKeyDictionary()


def _methods_of(of: type) -> _Methods:
    found = _methods.get(of)
    if found is None or not found.hold(of):
        found = _methods[of] = _Methods(of)
    return found


class _Reader:
    """Collects the tokens of a signature."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self.objects: list[weakref.ref] = []
        self._places: dict[int, int] = {}  # by id: when an object was first met
        self._alive: list[Any] = []  # the objects met, so that their ids stay their own
        self._looked: set[int] = set()  # the ids of the modules and classes that were looked at
        self._found: list[nn.Module] = []  # modules in attributes, which may be no part of a network

    def network(self, network: nn.Module) -> None:
        """All modules, in order. Names come with ``_modules``, and modules that occur twice with their places."""
        self._modules(network)
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
            self.value(dict(hooks))
        self.rest()

    def rest(self) -> None:
        """The modules that were found in attributes, closures and lists only."""
        while self._found:
            self._modules(self._found.pop())

    def _modules(self, network: nn.Module) -> None:
        stack = [network]
        while stack:
            module = stack.pop()
            self._met(module)
            if id(module) in self._looked:
                continue
            self._looked.add(id(module))
            self._class(type(module))
            left_out = _WRAPPER if "dynamo_ctx" in vars(module) else _COMPILED
            tokens = self.tokens
            for key, value in vars(module).items():
                if key in left_out:
                    continue
                kind = type(value)
                if kind in _PLAIN:
                    tokens += (key, kind, value)
                elif kind in _CONTAINERS and not value:  # most are hooks that are not set
                    tokens += (key, 0)
                elif key in ("_parameters", "_buffers"):
                    for name, t in value.items():
                        tokens.append(name)
                        # How many batches a norm has seen in training decides its momentum at most, and no code.
                        if name == "num_batches_tracked" and isinstance(module, _NormBase) and t is not None:
                            self._tensor(t)
                        else:
                            self.value(t)
                elif key == "_modules":
                    tokens.extend(value)
                    stack.extend(child for child in value.values() if child is not None)
                else:
                    tokens.append(key)
                    self.value(value)

    def inputs(self, inputs: Any) -> None:
        """The structure of inputs, without the values of tensors."""
        if isinstance(inputs, Mapping):
            for key, value in inputs.items():
                self.tokens.append(str(key))
                self.inputs(value)
        elif isinstance(inputs, (list, tuple)):
            self.tokens.append(len(inputs))
            for value in inputs:
                self.inputs(value)
        elif isinstance(inputs, Tensor):
            self._tensor(inputs)
            self.tokens.append(inputs.stride() if inputs.layout == torch.strided else inputs.layout)
        else:
            self.value(inputs)

    def value(self, value: Any, depth: int = 0) -> None:
        """Any attribute."""
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value))):
            self.tokens += (kind, value)
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable
            return
        self.tokens.append(kind.__name__)
        if not self._met(value):
            self._content(value, kind, depth)

    def _content(self, value: Any, kind: type, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
            flags = not value.is_floating_point() and value.numel() <= MAX_FLAGS
            if (flags or (kind is Tensor and not value.dim())) and value.device.type == "cpu":
                self.tokens.append(str(value.tolist()) if kind in (Tensor, nn.Parameter) else None)
        elif isinstance(value, np.ndarray):
            self._same(value)
            self.tokens += (value.shape, value.dtype.str, str(value.tolist()) if value.size <= MAX_FLAGS else None)
        elif isinstance(value, nn.Module):
            self._same(value)
            self._found.append(value)  # the modules of the network are looked at on their own
        elif isinstance(value, (type, types.ModuleType)):
            self._same(value)
        elif isinstance(value, ByIdentity):
            self._same(value.of)
        elif isinstance(value, (list, tuple, set, frozenset, dict, deque)):
            self._deeper(depth)
            for entry in _entries(value):
                self.value(entry, depth + 1)
            if own := _attributes(value):  # of a class that extends a container
                self.value(own, depth + 1)
        elif isinstance(value, types.FunctionType) and _is_of_torch(value):
            self._same(value)
        elif isinstance(value, types.FunctionType):
            self._same(value.__code__)
            self.tokens.append(id(value.__globals__))
            self._deeper(depth)
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            for part in (value.__defaults__, value.__kwdefaults__, cells, vars(value)):
                self.value(part, depth + 1)
        elif isinstance(value, _METHODS):
            self.tokens.append(value.__name__)
            self._deeper(depth)
            self.value(value.__self__, depth + 1)
            if isinstance(value, types.MethodType):
                self.value(value.__func__, depth + 1)
        elif isinstance(value, functools.partial):
            self._deeper(depth)
            for of in (value.func, value.args, value.keywords):
                self.value(of, depth + 1)
        elif isinstance(value, weakref.ref):
            self._same(value())
        else:
            self._same(value)
            if own := _attributes(value):
                self._deeper(depth)
                self.value(own, depth + 1)

    def _met(self, value: Any) -> bool:
        """Whether an object was met before; the token is its place."""
        place = self._places.get(id(value))
        self.tokens.append(place)
        if place is not None:
            return True
        self._places[id(value)] = len(self.tokens)
        self._alive.append(value)
        return False

    def _deeper(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise Unreadable

    def _same(self, value: Any) -> None:
        """An object that is named by its address."""
        if value is None:
            return
        try:
            self.objects.append(weakref.ref(value))
        except TypeError:
            raise Unreadable from None
        self.tokens.append(id(value))

    def _tensor(self, t: Tensor) -> None:
        self.tokens += (type(t).__name__, t.shape, t.dtype, t.device, t.requires_grad)

    def _class(self, kind: type) -> None:
        """A class: its own address, and those of its methods and the values that it gives to all its objects."""
        self._met(kind)
        if id(kind) in self._looked:
            return
        for of in kind.__mro__[:-1]:
            self._met(of)
            if id(of) in self._looked:
                continue
            self._looked.add(id(of))
            self._same(of)
            methods = _methods_of(of)
            self.tokens.append(methods)
            members = vars(of)
            for key in methods.others:
                value = getattr(members[key], "__func__", members[key])  # a static method or a class method
                value = value.fget if isinstance(value, property) else value
                if isinstance(value, types.FunctionType):
                    self.tokens += (key, id(value.__code__))
                    self._same(value)
                    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
                    self._briefly((value.__defaults__, value.__kwdefaults__, cells))
                elif not (key.startswith("__") and key.endswith("__")):
                    self.tokens.append(key)
                    self._briefly(value)

    def _briefly(self, value: Any, depth: int = 0) -> None:
        """A value that belongs to a class: plain values and containers of them, other objects by identity alone."""
        kind = type(value)
        if kind in _PLAIN:
            self.tokens += (kind, value)
        elif kind in _CONTAINERS and depth < MAX_DEPTH:
            self.tokens.append(kind)
            for entry in _entries(value):
                self._briefly(entry, depth + 1)
        else:
            self.tokens.append(kind.__name__)
            with contextlib.suppress(Unreadable):
                self._same(value)


def _entries(value: Any) -> Iterator[Any]:
    """The entries of a container, with keys; sets of plain values in an order that depends on the values alone."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield entry
    elif isinstance(value, (set, frozenset)):
        yield len(value)
        yield from sorted(value, key=repr) if all(type(v) in _PLAIN for v in value) else value
    else:
        yield len(value)
        yield from value


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, also those that its class keeps in slots."""
    found = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _is_of_torch(function: types.FunctionType) -> bool:
    """Whether this is a function that a module of torch has by its name, and which captures nothing of the network."""
    module = function.__module__ or ""
    return module.startswith("torch.") and getattr(sys.modules.get(module), function.__name__, None) is function


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the variable has no value yet
        return False
    return True
