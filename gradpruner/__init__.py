"""Cheaper LLM fine-tuning and serving: remove the decoder layers a task does not need (GradPruner, ICLR 2026)."""

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
from gradpruner.training.probe_callback import ProbeCallback
from gradpruner.version import __version__

__all__ = [
    "__version__",
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
