"""Networks that torch.compile has compiled: their own layers run instead.

A compiled graph is one autograd node that hides its layers. Within the context ``eager``, whatever was compiled runs as
it is written: modules that ``torch.compile`` has wrapped, modules after their own ``compile()``, and functions. Nothing
about them changes, so they run compiled again afterwards.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .members import modules_of
from .network_state import state_of
from .process_wide import ProcessWide
from .wrappers import is_compiled

log = logging.getLogger(__name__)


def _stance() -> AbstractContextManager:
    # Without torch's compiler in the process, nothing is compiled. To import it takes more than a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


eager = ProcessWide(_stance)


def say_once(model: nn.Module, network: nn.Module) -> None:
    """Log that a model, or a part of it, was compiled, once for each network that it is a wrapper of."""
    compiled = any(is_compiled(m) or getattr(m, "_compiled_call_impl", None) is not None for m in modules_of(model))
    if compiled and state_of(network).is_first("compiled"):
        log.info(
            "%s was compiled with torch.compile, which hides its layers: they run without it for the Fisher",
            type(network).__name__,
        )
