"""Networks some of whose modules are checkpointed, with the names of their parameters unchanged."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, reentrant: bool, **options: Any) -> nn.Module:
    """Checkpoint the forward pass of a module, which stays the same object and may be copied."""
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        twice = len({id(arg) for arg in args}) < len(args)  # torch then recomputes other tensors, and says so
        if twice and not reentrant:
            return base.forward(self, *args, **kwargs)
        return checkpoint(partial(base.forward, self, **kwargs), *args, use_reentrant=reentrant, **options)

    module.__class__ = type(base.__name__, (base,), {"forward": forward})
    return module


def checkpoint_some(network: nn.Module, seed: int, share: float = 0.4) -> list[str]:
    """Checkpoint random modules of either kind, one within the other too. Return what was done."""
    rng = random.Random(seed)
    done = []
    for name, module in list(network.named_modules()):
        if rng.random() < share and type(module).forward is not nn.modules.module._forward_unimplemented:
            reentrant = rng.random() < 0.5
            checkpointed(module, reentrant)
            done.append(f"{name or 'all'} ({'reentrant' if reentrant else 'not reentrant'})")
    return done
