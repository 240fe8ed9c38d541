"""Other libraries, one file each, through their own public calls; ``prepare`` does what each needs to run at all."""

from __future__ import annotations

from torch import fx, nn


def owns_parameters(m: nn.Module) -> bool:
    """Whether the module itself has a parameter: where hooks have to sit."""
    return next(m.parameters(recurse=False), None) is not None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return super().is_leaf_module(m, name) or owns_parameters(m)


def without_inplace(model: nn.Module) -> nn.Module:
    """The model, with the same parameters, without in-place activations and residual sums.

    Full backward hooks raise where a hooked output is changed in place.
    """
    for m in model.modules():
        if getattr(m, "inplace", False):
            m.inplace = False
    try:
        graph = _Tracer().trace(model)
    except Exception:  # control flow that cannot be traced: the library under test says what it cannot do
        return model
    return fx.GraphModule(model, graph).eval()  # tracing itself turns `a += b` into `a = a + b`
