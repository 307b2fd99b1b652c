"""Zero single weights instead of removing layers (docs/sparsity.md).

`gradpruner.sparsity.criteria` holds the criteria that decide which weights are zeroed. Names are imported when they
are first used, so that `gradpruner.sparsity.names` can be read without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpruner.checkpoint.hold_sparsity import HoldSparsity
    from gradpruner.checkpoint.masks import Masks
    from gradpruner.checkpoint.save_sparse import save_sparse
    from gradpruner.sparsity.gradients import gradient_norms
    from gradpruner.sparsity.names import CRITERION_NAMES
    from gradpruner.sparsity.pattern import Pattern
    from gradpruner.sparsity.semi_structured import to_semi_structured_
    from gradpruner.sparsity.zero_weights import sparsify

__all__ = [
    "CRITERION_NAMES",
    "HoldSparsity",
    "Masks",
    "Pattern",
    "gradient_norms",
    "save_sparse",
    "sparsify",
    "to_semi_structured_",
]

_MODULES = {
    "CRITERION_NAMES": "gradpruner.sparsity.names",
    "HoldSparsity": "gradpruner.checkpoint.hold_sparsity",
    "Masks": "gradpruner.checkpoint.masks",
    "Pattern": "gradpruner.sparsity.pattern",
    "gradient_norms": "gradpruner.sparsity.gradients",
    "save_sparse": "gradpruner.checkpoint.save_sparse",
    "sparsify": "gradpruner.sparsity.zero_weights",
    "to_semi_structured_": "gradpruner.sparsity.semi_structured",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
