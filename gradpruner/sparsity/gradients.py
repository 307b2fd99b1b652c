"""Norms over samples of the gradient of every linear weight, each sample's folded in inside its backward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, linear_modules
from gradpruner.model.fused_linear import fuse, is_replaced, unfuse
from gradpruner.model.modes import evaluating, keeping_grad_flags
from gradpruner.ops.linear import WeightSquares
from gradpruner.sparsity.checks import Batch, need_full, prunable


def gradient_norms(model: nn.Module, batches: Sequence[Batch], p: int = 2) -> dict[str, Tensor]:
    """norm_p over samples of abs(gradient) of the linears of all decoder layers, by name of the weight.

    model: plain. batches: with input_ids, and labels, or every token is one; each row is a sample. p: 1 or 2. The
    norms are float32 in the stored shape, on the weight's device. No gradient is stored, of any sample: 4 bytes an
    entry in all. A sample adds nothing to a weight whose gradient of it is not finite. Raises InvalidArgument, also
    where a loss is not finite or a weight got no gradient from any sample, UnsupportedModel, also where a linear runs
    more than once in a backward pass.
    Source: docs/method.md, section 7 (GBLM-Pruner).
    """
    if p not in (1, 2) or isinstance(p, bool):
        raise InvalidArgument(f"p = {p!r}; accepted are 1 and 2, the norm over samples")
    need_full(batches, "gradient_norms")
    decoder = Decoder(model)
    linears = {decoder.path_of(w): linear_modules(decoder, w.layer)[w.name] for w in prunable(decoder)}
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
    """Evaluation mode, and no parameter trains: the fused backward folds the gradients of weights that do not."""
    with keeping_grad_flags(model), evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        yield
