"""Pruning below the layer: single weights, by magnitude, activation or gradient (docs/method.md, section 7)."""

from gradpruner.checkpoint.hold_sparsity import HoldSparsity
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.save_sparse import save_sparse
from gradpruner.sparsity.gradients import gradient_norms
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.semi_structured import to_semi_structured_
from gradpruner.sparsity.sparsify import sparsify

__all__ = ["HoldSparsity", "Masks", "Pattern", "gradient_norms", "save_sparse", "sparsify", "to_semi_structured_"]
