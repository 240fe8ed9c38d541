"""Networks that torch.compile has compiled: their own layers run instead, under their own names.

A compiled graph is one autograd node that hides its layers. Within the context ``eager``, whatever was compiled runs as
it is written: modules that ``torch.compile`` has wrapped, modules after their own ``compile()``, and functions. Nothing
about them changes, so they run compiled again afterwards.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .network_state import state_of
from .process_wide import ProcessWide

log = logging.getLogger(__name__)

WRAPPED = "_orig_mod"  # the name of a module within the one that torch.compile has wrapped around it


def _stance() -> AbstractContextManager:
    # Without torch's compiler in the process, nothing is compiled. To import it takes more than a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


eager = ProcessWide(_stance)


def is_wrapper(module: object) -> bool:
    """Whether ``torch.compile`` has returned this module, wrapped around another one."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def original(model: nn.Module) -> nn.Module:
    """The module that was compiled, or the module itself.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> original(torch.compile(model)) is model
        True
    """
    while is_wrapper(model):
        model = getattr(model, WRAPPED)
    return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that they have without torch.compile."""
    return {original_name(model, name): module for name, module in model.named_modules() if not is_wrapper(module)}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters, as ``model.named_parameters()`` has them without torch.compile."""
    for name, p in model.named_parameters():
        yield original_name(model, name), p


def original_name(model: nn.Module, name: str) -> str:
    """The name that a parameter, a buffer or a module has without torch.compile.

    Example:
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 3)))
        >>> [original_name(model, name) for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    if WRAPPED not in name:
        return name
    parts, module = [], model
    for part in name.split("."):
        if part != WRAPPED or not is_wrapper(module):
            parts.append(part)
        module = getattr(module, part, None)  # type: ignore[assignment]
    return ".".join(parts)


def say_once(model: nn.Module) -> None:
    """Log that a network was compiled, once for each network."""
    compiled = any(is_wrapper(m) or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled and state_of(original(model)).is_first("compiled"):
        log.info(
            "%s was compiled with torch.compile, which hides its layers: they run without it for the Fisher",
            type(original(model)).__name__,
        )
