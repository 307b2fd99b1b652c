"""Ops on tensors; they know nothing of models. Each is a `torch.library` op `gradpruner::NAME`."""

from gradpruner.ops.backends import BACKENDS, available_backends
from gradpruner.ops.definitions import (
    factor_sign_merge_,
    factor_threshold,
    gram_norm,
    outer_square_accumulate_,
    sign_merge_,
    square_accumulate_,
    threshold,
    wgrad_square_accumulate_,
)

__all__ = [
    "BACKENDS",
    "available_backends",
    "factor_sign_merge_",
    "factor_threshold",
    "gram_norm",
    "outer_square_accumulate_",
    "sign_merge_",
    "square_accumulate_",
    "threshold",
    "wgrad_square_accumulate_",
]
