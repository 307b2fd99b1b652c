"""Ways to choose and remove decoder layers, each in its own file and registered by name.

`gradpruner.methods.base` explains what a method is and how to add one. Names are imported when they are first used,
so that `gradpruner.methods.names` can be read without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpruner.methods.base import (
        METHODS,
        Clues,
        Dropping,
        Method,
        check_count,
        format_method,
        parse_method,
        plan_lowest,
        register,
    )
    from gradpruner.methods.block import Block
    from gradpruner.methods.drop_last import DropLast
    from gradpruner.methods.grad_pruner import GradPruner
    from gradpruner.methods.held_out_loss import HeldOutLoss
    from gradpruner.methods.laco import Laco
    from gradpruner.methods.magnitude import Magnitude
    from gradpruner.methods.names import METHOD_NAMES
    from gradpruner.methods.random_layers import RandomLayers
    from gradpruner.methods.short_gpt import ShortGpt
    from gradpruner.methods.sparse import Sparse
    from gradpruner.methods.taylor import Taylor

__all__ = [
    "METHODS",
    "METHOD_NAMES",
    "Block",
    "Clues",
    "DropLast",
    "Dropping",
    "GradPruner",
    "HeldOutLoss",
    "Laco",
    "Magnitude",
    "Method",
    "RandomLayers",
    "ShortGpt",
    "Sparse",
    "Taylor",
    "check_count",
    "format_method",
    "parse_method",
    "plan_lowest",
    "register",
]

_MODULES = {
    **dict.fromkeys(("METHODS", "Clues", "Dropping", "Method", "check_count"), "base"),
    **dict.fromkeys(("format_method", "parse_method", "plan_lowest", "register"), "base"),
    "METHOD_NAMES": "names",
    "Block": "block",
    "DropLast": "drop_last",
    "GradPruner": "grad_pruner",
    "HeldOutLoss": "held_out_loss",
    "Laco": "laco",
    "Magnitude": "magnitude",
    "RandomLayers": "random_layers",
    "ShortGpt": "short_gpt",
    "Sparse": "sparse",
    "Taylor": "taylor",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
