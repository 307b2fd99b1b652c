"""The Triton backend: one launcher per op of `gradpruner.ops`, with the op's signature."""

from gradpruner.kernels.factor_sign_merge import factor_sign_merge_
from gradpruner.kernels.factor_threshold import factor_threshold
from gradpruner.kernels.gram_norm import gram_norm
from gradpruner.kernels.outer_square_accumulate import outer_square_accumulate_
from gradpruner.kernels.prune_groups import prune_groups_
from gradpruner.kernels.sign_merge import sign_merge_
from gradpruner.kernels.square_accumulate import square_accumulate_
from gradpruner.kernels.threshold import threshold
from gradpruner.kernels.weight_importance import weight_importance
from gradpruner.kernels.weight_mask import apply_mask_
from gradpruner.kernels.wgrad_abs_accumulate import wgrad_abs_accumulate_
from gradpruner.kernels.wgrad_square_accumulate import wgrad_square_accumulate_

__all__ = [
    "apply_mask_",
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
