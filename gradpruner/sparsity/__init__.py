"""Pruning below the layer: single weights, by magnitude, activation or gradient (METHOD section 6)."""
