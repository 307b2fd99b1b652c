"""The errors that this package raises on purpose. All derive from `GradPrunerError`."""

from __future__ import annotations


class GradPrunerError(Exception):
    """The base class: `except GradPrunerError` catches everything this package refuses."""


class InvalidArgument(GradPrunerError, ValueError):
    """A caller's argument is wrong. The message names it, what was given and what is accepted."""


class UnsupportedModel(GradPrunerError):
    """The model has no decoder layers, or layers that cannot be removed correctly."""


class ModelMismatch(GradPrunerError):
    """A plan, an igia or a checkpoint belongs to another model."""


class ProbeError(GradPrunerError):
    """The probe cannot read the gradients that it needs, or has seen no usable step."""


class CheckpointError(GradPrunerError):
    """A file is missing, damaged, or failed its verification. Nothing was written."""
