"""Pruning below the layer: single weights, by magnitude, activation or gradient (METHOD section 6)."""

from gradpruner.sparsity.masks import HoldSparsity, Masks
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.pruning import sparsify
from gradpruner.sparsity.saving import save_sparse

__all__ = ["HoldSparsity", "Masks", "Pattern", "save_sparse", "sparsify"]
