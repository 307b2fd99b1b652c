"""The autograd path of the fused backward: a linear layer that squares its weight gradient as it computes it.

Unit: one backward call, that is the micro-batch, on one process, before clipping (docs/method.md, section 1,
estimator `exact`).
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
    """Where one weight's squares go.

    total: float64 (), gets sum(g ** 2) of every squared call. igia: float32, the weight's shape, gets g ** 2;
    None to keep only the sum. micro_batches: backward calls that make one gradient of a trainable weight; it is
    squared on the last of them. A frozen weight's gradient is squared on every call, and never stored. power: 1 adds
    abs(g) into igia in the place of g ** 2, for a frozen weight, and nothing into total. repeated: whether the weight
    ran more than once in one backward pass: each run gives a part of the gradient, and what was squared is wrong.
    """

    total: Tensor
    igia: Tensor | None = None
    micro_batches: int = 1
    calls: int = 0
    power: int = 2
    repeated: bool = False
    last_pass: int = -1


class _SquaredLinear(torch.autograd.Function):
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
        # backward runs outside of autocast: it gets what autocast would have saved
        entered, stored = _as_autocast_would(x), _as_autocast_would(weight)
        ctx.save_for_backward(entered, stored, weight)
        ctx.transposed, ctx.squares = transposed, squares
        # not -1 in a recomputation by reentrant checkpointing, whose own backward pass is a part of that one
        ctx.within = torch._C._current_graph_task_id()
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return functional.linear(
            entered, stored.t() if transposed else stored, None if bias is None else bias.to(stored.dtype)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        (dy,) = grads
        if torch.is_grad_enabled():
            raise InvalidArgument(
                "create_graph = True: a linear layer whose weight gradient is squared in its backward pass "
                "(estimator 'exact') has no second derivative; accepted is create_graph=False"
            )
        x, stored, weight = ctx.saved_tensors
        squares: WeightSquares = ctx.squares
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            matrix = stored.t() if ctx.transposed else stored
            dx = (dy.to(stored.dtype) @ matrix).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.dtypes[1])
        flat_dy = dy.reshape(-1, dy.shape[-1])
        flat_x = x.detach().reshape(-1, x.shape[-1]).to(dy.dtype)
        # a transposed weight has the gradient x^T dy: the same op with the two exchanged
        first, second = (flat_dy, flat_x) if ctx.transposed else (flat_x, flat_dy)
        squares.calls += 1
        this_pass = torch._C._current_graph_task_id() if ctx.within == -1 else ctx.within
        squares.repeated, squares.last_pass = squares.repeated or this_pass == squares.last_pass, this_pass
        if squares.power == 1 and squares.igia is not None:
            wgrad_abs_accumulate_(squares.igia, first, second)
            return dx, None, dbias, None, None, None
        if not weight.requires_grad:
            squares.total += wgrad_square_accumulate_(squares.igia, first, second, None)
            return dx, None, dbias, None, None, None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        last = squares.calls % squares.micro_batches == 0
        total = wgrad_square_accumulate_(squares.igia if last else None, first, second, weight.grad)
        if last:
            squares.total += total
        # the op has added into weight.grad: nothing is left for autograd to add
        return dx, None, dbias, None, None, None


def _as_autocast_would(tensor: Tensor) -> Tensor:
    """What autocast's linear computes with."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(kind))


def linear_square_accumulate(
    x: Tensor, weight: Tensor, bias: Tensor | None, squares: WeightSquares, *, transposed: bool = False
) -> Tensor:
    """`functional.linear` whose backward pass squares and accumulates the weight's gradient (source: D, `exact`).

    x: (..., in); weight: (out, in), or (in, out) if transposed; bias: (out,) or None. For a trainable weight the
    gradient goes straight into `weight.grad`: autograd hooks on the weight (DistributedDataParallel's) do not see it.
    Under autocast it computes in autocast's dtype, forwards and backwards. Its backward pass raises InvalidArgument
    under create_graph=True.
    """
    # behind frozen embeddings neither x nor the weight needs a gradient: the anchor brings backward here all the same
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    return _SquaredLinear.apply(x, weight, bias, anchor, transposed, squares)
