"""DeepSpeed: its engine holds gradients, and under ZeRO-3 weights, in buffers of its own. Read by its own accessors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument


def is_engine(module: Any) -> bool:
    """Whether this is what `deepspeed.initialize` returns."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, getattr(deepspeed, "DeepSpeedEngine", ()))


def is_deepspeeds(parameter: Tensor) -> bool:
    """Whether an engine (ZeRO 1 to 3, or its own bfloat16 optimizer) holds this parameter's gradient, and steps it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient that the optimizer is about to use, whole or as this process's shard.

    Of an engine: reduced, not yet unscaled or clipped, and a collective.
    """
    if not is_deepspeeds(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def factor_to_come(optimizer: Any, parameters: Iterable[Tensor]) -> Tensor:
    """What the engine's step will multiply its gradients by: 1 / loss scale, and its clipping. A collective.

    parameters: all that train. Raises InvalidArgument if this is not the engine's optimizer.
    """
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(
            f"optimizer is a {type(optimizer).__name__}; expected the DeepSpeed engine's `engine.optimizer`"
        )
    factor = 1.0 / float(getattr(optimizer, "loss_scale", 1.0))
    limit = float(getattr(optimizer, "clip_grad", 0.0))
    if limit > 0:
        gradients = (gradient_of(parameter) for parameter in parameters)  # one at a time
        lengths = [torch.linalg.vector_norm(g).double().cpu() for g in gradients if g is not None]
        total = factor * float(torch.linalg.vector_norm(torch.stack(lengths)))
        factor *= min(1.0, limit / (total + 1e-6))
    return torch.tensor(factor)


@contextlib.contextmanager
def unpartitioned(parameter: Any) -> Iterator[Tensor]:
    """The parameter with its values, of which ZeRO-3 leaves each process a part: then a collective."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter
