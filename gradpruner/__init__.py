"""Cheaper LLM fine-tuning and serving: remove the decoder layers that a task does not need.

The method is GradPruner (ICLR 2026). `docs/method.md` has the mathematics.

Every name in `__all__` is loaded when it is first used (PEP 562). `import gradpruner` itself loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradpruner.version import __version__

if TYPE_CHECKING:
    from gradpruner.checkpoint.card import model_card
    from gradpruner.checkpoint.hub import push_to_hub
    from gradpruner.checkpoint.save import save
    from gradpruner.errors import (
        CheckpointError,
        GradPrunerError,
        InvalidArgument,
        ModelMismatch,
        ProbeError,
        UnsupportedModel,
    )
    from gradpruner.model.optimizers import rebuild_optimizer
    from gradpruner.ops import available_backends
    from gradpruner.plan import Plan
    from gradpruner.probe.igia import Igia
    from gradpruner.probe.probe import Probe
    from gradpruner.pruning.apply import apply
    from gradpruner.pruning.apply_folder import apply_folder
    from gradpruner.pruning.cut import cut
    from gradpruner.pruning.patch import fit_patches
    from gradpruner.run.oneshot import prune
    from gradpruner.training.attach import attach
    from gradpruner.training.attach_callback import AttachCallback
    from gradpruner.training.probe_callback import ProbeCallback

# Public name to the module that defines it. The block above says the same to type checkers.
_MODULES = {
    "AttachCallback": "gradpruner.training.attach_callback",
    "CheckpointError": "gradpruner.errors",
    "GradPrunerError": "gradpruner.errors",
    "Igia": "gradpruner.probe.igia",
    "InvalidArgument": "gradpruner.errors",
    "ModelMismatch": "gradpruner.errors",
    "Plan": "gradpruner.plan",
    "Probe": "gradpruner.probe.probe",
    "ProbeCallback": "gradpruner.training.probe_callback",
    "ProbeError": "gradpruner.errors",
    "UnsupportedModel": "gradpruner.errors",
    "apply": "gradpruner.pruning.apply",
    "apply_folder": "gradpruner.pruning.apply_folder",
    "attach": "gradpruner.training.attach",
    "available_backends": "gradpruner.ops",
    "cut": "gradpruner.pruning.cut",
    "fit_patches": "gradpruner.pruning.patch",
    "model_card": "gradpruner.checkpoint.card",
    "prune": "gradpruner.run.oneshot",
    "push_to_hub": "gradpruner.checkpoint.hub",
    "rebuild_optimizer": "gradpruner.model.optimizers",
    "save": "gradpruner.checkpoint.save",
}

# Public modules. `gradpruner.ops`, say, is there after `import gradpruner`.
_PUBLIC_MODULES = ("errors", "methods", "ops", "sparsity")

__all__ = [
    "AttachCallback",
    "CheckpointError",
    "GradPrunerError",
    "Igia",
    "InvalidArgument",
    "ModelMismatch",
    "Plan",
    "Probe",
    "ProbeCallback",
    "ProbeError",
    "UnsupportedModel",
    "__version__",
    "apply",
    "apply_folder",
    "attach",
    "available_backends",
    "cut",
    "fit_patches",
    "model_card",
    "prune",
    "push_to_hub",
    "rebuild_optimizer",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, and keep it."""
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not, beside what the module holds."""
    return sorted({*globals(), *__all__})
