"""Watch the gradients of the first training steps, accumulate them, and score the layers."""
