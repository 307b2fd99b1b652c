"""Arithmetic on tensors that knows nothing of models.

Each op is a `torch.library` op `gradpruner::NAME`. The functions here are called like plain functions.
"""

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
from gradpruner.ops.weight_definitions import apply_mask_, prune_groups_, weight_importance, wgrad_abs_accumulate_

__all__ = [
    "BACKENDS",
    "apply_mask_",
    "available_backends",
    "factor_sign_merge_",
    "factor_threshold",
    "gram_norm",
    "outer_square_accumulate_",
    "prune_groups_",
    "sign_merge_",
    "square_accumulate_",
    "threshold",
    "weight_importance",
    "wgrad_abs_accumulate_",
    "wgrad_square_accumulate_",
]
