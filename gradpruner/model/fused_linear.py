"""Make a linear of a model square its weight's gradient in the backward pass, and undo it."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from gradpruner.model.linears import is_transposed
from gradpruner.ops.linear import WeightSquares, linear_square_accumulate


def is_replaced(module: nn.Module) -> bool:
    """Whether the forward of this module was replaced. It can be replaced only once."""
    return "forward" in vars(module)


def fuse(module: nn.Module, squares: WeightSquares) -> None:
    """Replace the forward of a linear, so that its backward passes add into `squares`.

    Args:
        module: the linear.
        squares: where the squared gradients of its weight are added.
    """
    module.forward = functools.partial(_forward, module, squares)


def unfuse(module: nn.Module) -> None:
    """Give a linear its own forward back."""
    vars(module).pop("forward", None)


def _forward(module: nn.Module, squares: WeightSquares, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return linear_square_accumulate(x, weight, bias, squares, transposed=is_transposed(module))
