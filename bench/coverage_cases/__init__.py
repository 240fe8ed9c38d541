"""The cases of the coverage study, and their judge."""

from __future__ import annotations

from collections.abc import Iterable

from .case import Case

KINDS = ("timm", "torchvision", "transformers", "peft", "layers")


def cases(kinds: Iterable[str] = KINDS) -> list[Case]:
    """All cases of some kinds. None is made yet, so that no library but torch is needed."""
    from . import layers_cases, peft_cases, timm_cases, torchvision_cases, transformers_cases

    modules = {
        "timm": timm_cases,
        "torchvision": torchvision_cases,
        "transformers": transformers_cases,
        "peft": peft_cases,
        "layers": layers_cases,
    }
    return [case for kind in kinds for case in modules[kind].CASES]
