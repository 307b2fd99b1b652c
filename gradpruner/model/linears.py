"""What counts as a linear layer."""

from __future__ import annotations

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` or transformers' transposed `Conv1D`."""
    # quantised linears derive from nn.Linear
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as (in, out), as GPT-2's `Conv1D` does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
