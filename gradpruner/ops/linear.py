"""A linear layer whose backward pass squares the gradient of the weight.

What is squared is the gradient of one backward call: of one micro-batch, on one process, before clipping.

Source: docs/method.md, section 1 (the estimator "exact").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradpruner.errors import InvalidArgument
from gradpruner.ops.definitions import wgrad_square_accumulate_
from gradpruner.ops.weight_definitions import wgrad_abs_accumulate_


@dataclass
class WeightSquares:
    """Where the squared gradients of one weight are added, and how.

    Args:
        total: the sum, float64 (). It gets sum(g ** 2) of every gradient that is squared.
        igia: the importance, float32, of the weight's shape. It gets g ** 2. None to keep only the sum.
        micro_batches: how many backward calls make one gradient of a weight that trains. The gradient is squared on
            the last of them. The gradient of a frozen weight is squared on every call, and never stored.
        calls: how many backward calls there were.
        power: 2 adds g ** 2. 1 adds abs(g) into `igia` and nothing into `total`; this is for frozen weights only.
        repeated: whether the weight was used more than once in one backward pass. Each use gives a part of the
            gradient then, and what was squared is wrong.
        last_pass: torch's number of the last backward pass, -1 before the first.
    """

    total: Tensor
    igia: Tensor | None = None
    micro_batches: int = 1
    calls: int = 0
    power: int = 2
    repeated: bool = False
    last_pass: int = -1


class _SquaredLinear(torch.autograd.Function):
    """The autograd function behind `linear_square_accumulate`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        transposed: bool,
        squares: WeightSquares,
    ) -> Tensor:
        # the backward pass runs outside of autocast, so save what autocast would have saved
        cast_x, cast_weight = _as_autocast_would(x), _as_autocast_would(weight)
        ctx.save_for_backward(cast_x, cast_weight, weight)
        ctx.transposed, ctx.squares = transposed, squares
        # Not -1 where reentrant checkpointing computes the forward again within a backward pass. The backward pass of
        # that recomputation is a part of the one that runs now.
        ctx.within = torch._C._current_graph_task_id()
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return functional.linear(
            cast_x,
            cast_weight.t() if transposed else cast_weight,
            None if bias is None else bias.to(cast_weight.dtype),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        (dy,) = grads
        if torch.is_grad_enabled():
            raise InvalidArgument(
                "create_graph = True: a linear layer whose weight gradient is squared in its backward pass "
                "(estimator 'exact') has no second derivative; accepted is create_graph=False"
            )
        x, cast_weight, weight = ctx.saved_tensors
        squares: WeightSquares = ctx.squares
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            matrix = cast_weight.t() if ctx.transposed else cast_weight
            dx = (dy.to(cast_weight.dtype) @ matrix).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.dtypes[1])
        flat_dy = dy.reshape(-1, dy.shape[-1])
        flat_x = x.detach().reshape(-1, x.shape[-1]).to(dy.dtype)
        # a transposed weight has the gradient x^T dy: the same op with the two exchanged
        first, second = (flat_dy, flat_x) if ctx.transposed else (flat_x, flat_dy)
        squares.calls += 1
        this_pass = torch._C._current_graph_task_id() if ctx.within == -1 else ctx.within
        squares.repeated, squares.last_pass = squares.repeated or this_pass == squares.last_pass, this_pass
        _accumulate(squares, weight, first, second)
        return dx, None, dbias, None, None, None


def _accumulate(squares: WeightSquares, weight: Tensor, x: Tensor, dy: Tensor) -> None:
    """Square the weight gradient of one backward call, dy^T x, and add it to the sums."""
    if squares.power == 1 and squares.igia is not None:
        wgrad_abs_accumulate_(squares.igia, x, dy)
    elif not weight.requires_grad:
        squares.total += wgrad_square_accumulate_(squares.igia, x, dy, None)
    else:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        last = squares.calls % squares.micro_batches == 0
        # the op adds into weight.grad, so that nothing is left for autograd to add
        total = wgrad_square_accumulate_(squares.igia if last else None, x, dy, weight.grad)
        if last:
            squares.total += total


def _as_autocast_would(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which autocast computes a linear."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(kind))


def linear_square_accumulate(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: WeightSquares, *, transposed: bool = False
) -> Tensor:
    """Compute `functional.linear`, and square the weight's gradient in its backward pass.

    The gradient of a weight that trains is added to `weight.grad` directly. Autograd hooks on the weight, such as those
    of DistributedDataParallel, do not see it. Under autocast, both passes compute in autocast's dtype. The backward
    pass raises InvalidArgument under create_graph=True.

    Args:
        x: inputs, (..., in).
        weight: (out, in), or (in, out) if `transposed`.
        bias: (out,) or None.
        squares: where the squared gradients are added.
        transposed: whether the weight is stored as (in, out).

    Returns:
        The outputs, (..., out).
    """
    # Behind frozen embeddings neither x nor the weight needs a gradient. The anchor makes autograd call the backward
    # pass all the same.
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    return _SquaredLinear.apply(x, weight, bias, anchor, transposed, squares)
