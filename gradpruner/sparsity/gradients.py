"""Norms over samples of the gradient of every linear weight, without storing a gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, linear_modules
from gradpruner.model.fused_linear import fuse, is_replaced, unfuse
from gradpruner.model.hidden_states import Batch
from gradpruner.model.modes import evaluating, keeping_grad_flags
from gradpruner.ops.linear import WeightSquares
from gradpruner.sparsity.checks import check_batches, check_norm, prunable_weights


def gradient_norms(model: nn.Module, batches: Sequence[Batch], p: int = 2) -> dict[str, Tensor]:
    """Compute, for each entry of each linear, the norm over samples of its gradient.

    Each sample's gradient is added to the norm inside its backward pass, tile by tile, and never stored. This takes 4
    bytes per entry in all. Take the norms once, and pass them to several calls of `sparsify`.

    Args:
        model: a plain model. It is not changed.
        batches: input_ids int64 (rows, tokens) without padding, and what else the model takes. Each row is one sample.
            Without labels, every token is a label.
        p: the norm, 1 or 2: the sum over samples of |g|, or the root of the sum of g². Default 2.

    Returns:
        float32 norms by the path of the weight, in the shape and on the device in which the weight is stored. A sample
        whose gradient of a weight is not finite adds nothing to that weight.

    Raises:
        InvalidArgument: an argument is not accepted, a loss is not finite, or the gradient of a weight is zero or not
            finite in every sample.
        UnsupportedModel: a weight cannot be pruned (see `sparsify`), or a linear runs more than once for a sample.

    Source: docs/method.md, section 7 (GBLM-Pruner).
    """
    check_norm(p)
    check_batches(batches, "gradient_norms")
    decoder = Decoder(model)
    linears = {decoder.path_of(w): linear_modules(decoder, w.layer)[w.name] for w in prunable_weights(decoder)}
    device = next(decoder.base.parameters()).device
    totals = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in linears.items()}  # type: ignore[arg-type]
    with _folding(linears, totals, p) as folded, _frozen(decoder.base):
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                sample = {name: t[row : row + 1].to(device) for name, t in batch.items()}
                loss = decoder.base(**{"labels": sample["input_ids"], **sample}, use_cache=False).loss
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise InvalidArgument(f"batches: the loss of a sample is {value}; expected a finite one")
                loss.backward()
                _check_ran_once(folded)
    for name, total in totals.items():
        if not float(total.sum(dtype=torch.float64)) > 0:
            raise InvalidArgument(f"batches: the gradient of {name} is zero or not finite in every sample")
        if p == 2:
            total.sqrt_()
    return totals


def _check_ran_once(folded: Mapping[str, WeightSquares]) -> None:
    """Refuse a linear that ran twice, whose norms would not add up."""
    for name, squares in folded.items():
        if squares.repeated:
            raise UnsupportedModel(
                f"{name} runs more than once for one sample: the norm of a sample's gradient is not that of its parts; "
                "expected a model that runs every linear once, or a criterion without gradients"
            )


@contextlib.contextmanager
def _folding(
    linears: Mapping[str, nn.Module], totals: Mapping[str, Tensor], p: int
) -> Iterator[dict[str, WeightSquares]]:
    """Inside, backward passes add |gradient| ** p to the totals of each weight."""
    replaced = [name for name, module in linears.items() if is_replaced(module)]
    if replaced:
        raise InvalidArgument(f"something else has replaced the forward of {replaced[0]}; expected a plain model")
    folded: dict[str, WeightSquares] = {}
    try:
        for name, module in linears.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            folded[name] = WeightSquares(weight.new_zeros((), dtype=torch.float64), totals[name], power=p)
            fuse(module, folded[name])
        yield folded
    finally:
        for module in linears.values():
            unfuse(module)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and no parameter trains.

    The fused backward pass adds up gradients of frozen weights only.
    """
    with keeping_grad_flags(model), evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        yield
