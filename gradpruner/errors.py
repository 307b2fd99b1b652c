"""The errors this package raises on purpose. All of them derive from `GradPrunerError`."""

from __future__ import annotations


class GradPrunerError(Exception):
    """Base class: `except GradPrunerError` catches whatever this package refuses to do."""


class InvalidArgument(GradPrunerError, ValueError):
    """A caller's argument is wrong. The message names it, what was given and what is accepted."""


class UnsupportedModel(GradPrunerError):
    """The model has no decoder layers, or a layer cannot be removed without changing the others."""


class ModelMismatch(GradPrunerError):
    """A plan, an igia or a checkpoint belongs to another model than the one it is applied to."""


class ProbeError(GradPrunerError):
    """The probe cannot read the gradients it needs, or has seen no usable step."""


class CheckpointError(GradPrunerError):
    """A file is missing, corrupted, or failed its verification; nothing was written."""
