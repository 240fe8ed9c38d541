"""Networks that FSDP2 (``torch.distributed.fsdp.fully_shard``) shards over processes.

Each process keeps a shard of every parameter, and FSDP2 gathers the parameters of one *group* at a time, when a forward
or a backward pass needs them. A gather is a collective: all processes must take part in it, at the same time and in the
same order. That holds in training, where all processes take equal steps. It does not hold for a Fisher, where one
process may have more batches than another, smaller ones, or examples that the self-check runs again.

So here a gather is a *request*. A process that needs a group tells all the others, and each process answers the
requests of all, one after the other. Between its own requests a process goes its own way. A process that has finished
answers until all have finished (:meth:`Sharding.meet`). An error of one process is the answer to the next requests of
the others, which raise it too. No order of batches, layers or checks can therefore mix up two gathers or make one wait
forever.

The autograd graph refers to the gathered parameters, whose memory FSDP2 frees and fills again.
:meth:`Sharding.leaves` maps names to them, and :meth:`Sharding.read` gathers what a node of the graph has saved of
them, if it is read while the memory is free.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .graph import UnsupportedError
from .members import modules_of

Value = TypeVar("Value")

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.14

# What a process announces in place of the number of a group that it needs.
_FINISHED, _FAILED = -1, -2

_lock = threading.Lock()
_open: dict[int, Sharding] = {}  # the sharding of each network whose context is open, by the id of its first group
_groups: dict[tuple[int, ...], Any] = {}  # groups of processes that exchange tensors on the CPU, by their ranks


class ProcessError(RuntimeError):
    """Raised on every process where another process of a sharded network failed; the message has the other's error.

    Example:
        >>> raise ProcessError("process 1: ValueError: batch 3 holds no tensor")
        Traceback (most recent call last):
            ...
        t2v_fast.gradients.sharding.ProcessError: process 1: ValueError: batch 3 holds no tensor
    """


def sharding_of(model: nn.Module) -> Sharding | None:
    """Find how FSDP2 shards a network; None where it does not.

    Args:
        model: The network. Its gathered parameters are freed.

    Returns:
        The open :class:`Sharding` of the network, or a new one.

    Raises:
        UnsupportedError: The parameters are sharded in a way that has no exact answer; the message names one of them.

    Example:
        >>> sharding_of(nn.Linear(2, 3)) is None
        True
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards a network has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return None
    modules = [module for module in modules_of(model) if isinstance(module, kind)]
    groups: dict[int, Any] = {}
    for module in modules:
        state = module._get_fsdp_state()
        of_state = getattr(state, "_fsdp_param_groups", None)
        if of_state is None:  # before torch 2.13 a module had one group
            of_state = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        groups.update((id(group), group) for group in of_state)
    if not groups:
        return None
    with _lock:
        found = _open.get(next(iter(groups)))
    return found or Sharding(model, modules, list(groups.values()))


class Sharding:
    """The groups of parameters of a network that FSDP2 shards, and the processes that share them.

    Within the context, gathers are requests (see the module). The context ends on all processes together; if one of
    them leaves it with an error, all others raise :class:`ProcessError`. Contexts of one network may be nested: the
    outermost one counts.

    Args:
        model: The network.
        modules: The modules that ``fully_shard`` was applied to.
        groups: FSDP2's parameter groups of these modules.

    Attributes:
        rank: The number of this process among those with examples of their own.
        size: The number of these processes.
        device: Where the network computes.
    """

    def __init__(self, model: nn.Module, modules: Sequence[Any], groups: Sequence[Any]) -> None:
        self.modules, self._groups = modules, groups
        self.device = groups[0].device
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        for module in modules:  # outer ones first, as FSDP2 itself would do it in the first forward pass
            if module._get_fsdp_state()._is_root is None:
                module._get_fsdp_state()._lazy_init()
            module.reshard()
        self._params = {id(p.sharded_param): (p, k) for k, group in enumerate(groups) for p in group.fsdp_params}
        names |= {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        ranks = {tuple(group.mesh_info.mesh.mesh.flatten().tolist()) for group in groups}
        for p, k in self._params.values():
            name = names.get(id(p.sharded_param), p._module_info.param_name)
            _check_parameter(name, p, tuple(groups[k].mesh_info.mesh.mesh.flatten().tolist()), sorted(ranks)[0])
        self.ranks = sorted(ranks)[0]
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self._depth = 0
        self._over = False  # whether a process has failed
        self._changed: list[tuple[Any, str, Any]] = []  # attributes of FSDP2's groups before the context
        self._storages: dict[int, int] = {}  # the group of each gathered parameter's memory, by the memory's address
        self._unmet: set[int] = set()  # groups that were not gathered in this context yet
        self._extra: list[Any] = []  # groups that were gathered to read what a node has saved
        self._reading = 0
        self._hooks: Any = None

    def __enter__(self) -> Sharding:
        self._depth += 1
        if self._depth > 1:
            return self
        self._group = _cpu_group(self.ranks)
        for module in self.modules:
            module.reshard()
        described = [[list(p._orig_size) for p in group.fsdp_params] for group in self._groups]
        if any(other != described for other in self._exchange(described)):
            self._depth = 0
            raise UnsupportedError("the processes shard different networks, or the same network differently")
        for k, group in enumerate(self._groups):
            self._change(group, "_all_gather_comm", _Gather(self, k, group._all_gather_comm))
            if group._use_post_forward_mesh:  # fewer processes than all would share the parameters after a forward
                self._change(group, "post_forward_mesh_info", group.mesh_info)
            if getattr(group, "reduce_scatter_unused_params", False):
                self._change(group, "reduce_scatter_unused_params", False)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        self._over, self._unmet = False, set(range(len(self._groups)))
        with _lock:
            _open[id(self._groups[0])] = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            if error is None:
                self.meet()
            elif not self._over:
                self._over = True
                self._announce(_FAILED)
                self._exchange(f"{type(error).__name__}: {error}")
        finally:
            with _lock:
                _open.pop(id(self._groups[0]), None)
            self._hooks.__exit__(None, None, None)
            for group, attribute, value in self._changed:
                setattr(group, attribute, value)
            self._changed.clear()
            self._reset()

    def _reset(self) -> None:
        """Free the gathered parameters, also after an error in the middle of a pass."""
        for module in self.modules:
            state = module._get_fsdp_state()
            idle = type(state._training_state).IDLE
            state._training_state = idle
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            state._comm_ctx.post_forward_order.clear() if hasattr(state._comm_ctx, "post_forward_order") else None
        for group in self._groups:
            group._training_state = type(group._training_state).IDLE
            group._all_gather_result = None
            group._post_forward_indices.clear()
        for module in self.modules:
            module.reshard()
        self._storages.clear()
        self._extra.clear()

    def _change(self, group: Any, attribute: str, value: Any) -> None:
        self._changed.append((group, attribute, getattr(group, attribute)))
        setattr(group, attribute, value)

    # ---- requests

    def meet(self) -> None:
        """Wait for all processes to come here, and answer the requests of those that still work.

        Raises:
            ProcessError: Another process has failed.
        """
        while any(code != _FINISHED for code in self._announce(_FINISHED)):
            pass

    def exchange(self, value: Value) -> list[Value]:
        """Meet, and return the values of all processes in the order of their ranks."""
        self.meet()
        return self._exchange(value)

    def group_of_examples(self, group: Any = None) -> Any:
        """The group of the processes with examples of their own.

        Args:
            group: A group that a user gave, or None.

        Returns:
            The group. It can exchange tensors on the CPU.

        Raises:
            ValueError: The user's group has other processes.
        """
        if group is not None and tuple(sorted(dist.get_process_group_ranks(group))) != tuple(sorted(self.ranks)):
            ranks = dist.get_process_group_ranks(group)
            raise ValueError(f"the group has the processes {ranks}, but the network is sharded over {list(self.ranks)}")
        return _cpu_group(self.ranks)

    def sum_(self, t: Tensor) -> Tensor:
        """Sum a CPU tensor over all processes in place, where all have met."""
        dist.all_reduce(t, group=self._group)
        return t

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    def _announce(self, code: int, own: Callable[[], object] = lambda: None) -> list[int]:
        """Tell all processes what this one does, and take part in the gathers that any of them needs.

        ``own`` is this process's part in the gather of its own group.
        """
        if self._over and code != _FAILED:
            raise ProcessError("another process of the sharded network has failed")
        told = torch.empty(self.size, dtype=torch.int64)
        _all_gather(told, torch.tensor([code]), group=self._group)
        codes: list[int] = told.tolist()
        if _FAILED in codes and code != _FAILED:
            self._over = True
            texts = self._exchange(None)
            failed = "; ".join(f"process {self.ranks[k]}: {text}" for k, text in enumerate(texts) if text)
            raise ProcessError(failed)
        if _FAILED not in codes:
            self._over = True  # if a gather fails in the middle, the processes are apart, and nothing can be announced
            for k in sorted({code for code in codes if code >= 0}):
                near = dist.get_process_group_ranks(self._groups[k]._all_gather_process_group)
                if k == code:
                    own()
                elif any(codes[self.ranks.index(rank)] == k for rank in near):
                    self._serve(k)
            self._over = False
        return codes

    def _serve(self, k: int) -> None:
        """Take part in a gather that another process needs."""
        group = self._groups[k]
        mine = _flat_input(group)
        processes = group._all_gather_process_group
        whole = torch.empty(mine.numel() * processes.size(), dtype=mine.dtype, device=mine.device)
        _all_gather(whole, mine, group=processes)

    # ---- the graph

    def leaves(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the autograd graph has for some parameters.

        Args:
            parameters: Parameters of the network, by name.

        Returns:
            By name, the gathered parameter; a constant of its shape where it was never gathered and so has no part in
            any graph; and the parameter itself where FSDP2 does not shard it.
        """
        found = {}
        for name, p in parameters.items():
            sharded = self._params.get(id(p))
            if sharded is None:
                found[name] = p
            elif (gathered := getattr(sharded[0], "_unsharded_param", None)) is not None:
                found[name] = gathered
            else:
                found[name] = torch.zeros((), dtype=p.dtype, device=self.device).expand(p.shape).requires_grad_()
        return found

    def portions(self, parameters: Mapping[str, Tensor]) -> list[list[str]]:
        """Divide the names of parameters into those of each group, so that no more is held at a time."""
        parts: dict[int, list[str]] = {}
        for name, p in parameters.items():
            parts.setdefault(self._params.get(id(p), (None, -1))[1], []).append(name)
        return list(parts.values())

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """A context in which tensors that nodes have saved of gathered parameters are read as copies.

        A copy stays right when FSDP2 frees the parameter. What was gathered for the copies is freed at the end.
        """
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1
            if not self._reading:
                self.release()

    def release(self) -> None:
        """Free the groups that were gathered because a node read what it had saved of them."""
        for group in self._extra:
            group._to_sharded()
        self._extra.clear()

    def _pack(self, t: Tensor) -> Any:
        """Save a tensor in the graph; one of a gathered parameter with the parameter's group."""
        local = getattr(t, "_local_tensor", t)
        for k in [k for k in self._unmet if self._groups[k].is_unsharded]:
            memory = (t for p in self._groups[k].fsdp_params for t in p.all_gather_outputs)
            self._storages.update((t.untyped_storage()._cdata, k) for t in memory)
            self._unmet.remove(k)
        k = self._storages.get(local.untyped_storage()._cdata, -1)
        return t if k < 0 else _Saved(self, k, t)

    def _gathered(self, k: int, t: Tensor) -> Tensor:
        """A tensor that a node has saved of a group's gathered parameters."""
        group = self._groups[k]
        if not group.is_unsharded:
            group.unshard()
            group.wait_for_unshard()
            self._extra.append(group)
        return t.clone() if self._reading else t


class _Saved:
    """A tensor in the memory of a gathered parameter, as a node of the graph has saved it."""

    def __init__(self, sharding: Sharding, group: int, t: Tensor) -> None:
        self.sharding, self.group, self.t = sharding, group, t


def _unpack(saved: Any) -> Tensor:
    return saved.sharding._gathered(saved.group, saved.t) if isinstance(saved, _Saved) else saved


class _Gather:
    """FSDP2's gather of one group (its interface ``AllGather``) as a request to all processes."""

    def __init__(self, sharding: Sharding, group: int, usual: Any) -> None:
        self.sharding, self.group, self.usual = sharding, group, usual

    def allocate(self, *arguments: Any, **options: Any) -> Tensor:
        return self.usual.allocate(*arguments, **options)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        self.sharding._announce(self.group, lambda: _all_gather(output_tensor, input_tensor, group=group))


def _flat_input(group: Any) -> Tensor:
    """This process's shards of a group in one vector, as FSDP2 packs them for its gather.

    FSDP2 packs only what is not gathered. Its shards are there all the time, so this works in both states.
    """
    with torch.no_grad():
        shards = [(p._sharded_param_data, p.param_dtype) for p in group.fsdp_params]
        parts = [t.to(group.device, t.dtype if dtype is None else dtype) for t, dtype in shards]
    if len({t.dtype for t in parts}) > 1:
        parts = [t.view(torch.uint8) for t in parts]
    return torch.cat(parts)


def _check_parameter(name: str, p: Any, ranks: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise UnsupportedError where a parameter that FSDP2 shards has no exact answer."""
    if ranks != expected:
        raise UnsupportedError(
            f"the parameter {name!r} is sharded over the processes {list(ranks)} and others over {list(expected)}, so "
            "that it is not clear which processes have examples of their own: shard all parameters over one mesh"
        )
    if hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather"):
        raise UnsupportedError(
            f"the parameter {name!r} is a {type(p._sharded_local_tensor).__name__}, which FSDP2 gathers in a way of "
            "its own: leave quantisation out of the network"
        )
    gathered = getattr(p, "_unsharded_param", None)
    if p.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None):
        raise UnsupportedError(
            f"the parameter {name!r} has a gradient that FSDP2 has not reduced over the processes yet: finish the "
            "training step, or call zero_grad()"
        )


def _cpu_group(ranks: tuple[int, ...]) -> Any:
    """A group of processes that can exchange tensors on the CPU."""
    world = dist.group.WORLD
    if ranks == tuple(range(dist.get_world_size())) and "cpu" in str(dist.get_backend_config(world)):
        return world
    key = (id(world), *ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
    return _groups[key]
