"""Watch gradients, accumulate them, score the layers."""
