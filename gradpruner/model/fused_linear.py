"""A linear whose backward pass folds the weight's gradient in: its forward is replaced, and given back."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from gradpruner.model.decoder import is_transposed
from gradpruner.ops.linear import WeightSquares, linear_square_accumulate


def is_replaced(module: nn.Module) -> bool:
    """Whether something has put another forward into this module: there can be only one."""
    return "forward" in vars(module)


def fuse(module: nn.Module, squares: WeightSquares) -> None:
    """From now on a backward pass adds into `squares`."""
    module.forward = functools.partial(_forward, module, squares)


def unfuse(module: nn.Module) -> None:
    """Its own forward again."""
    vars(module).pop("forward", None)


def _forward(module: nn.Module, squares: WeightSquares, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return linear_square_accumulate(x, weight, bias, squares, transposed=is_transposed(module))
