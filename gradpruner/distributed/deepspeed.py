"""Read gradients and weights that a DeepSpeed engine holds.

The engine holds gradients, and under ZeRO-3 weights too, in buffers of its own. DeepSpeed's own functions read them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument


def is_engine(module: Any) -> bool:
    """Whether a module is what `deepspeed.initialize` returns."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, getattr(deepspeed, "DeepSpeedEngine", ()))


def is_deepspeeds(parameter: Tensor) -> bool:
    """Whether an engine holds the gradient of a parameter, and steps it."""
    # ds_id: ZeRO-3. _hp_mapping: ZeRO 1 and 2, and the engine's own bfloat16 optimizer.
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Return the gradient that the optimizer is about to use.

    For a parameter that an engine holds, this is a collective. It returns the whole gradient, summed over the
    processes, but not yet unscaled or clipped. For a parameter that FSDP2 shards, it returns `parameter.grad`, which
    holds the shard of this process.
    """
    if not is_deepspeeds(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def factor_to_come(optimizer: Any, parameters: Iterable[Tensor]) -> Tensor:
    """Return the factor by which the engine's next step multiplies gradients.

    It unscales and clips them. This is a collective.

    Args:
        optimizer: the engine's optimizer.
        parameters: all parameters that train.

    Returns:
        The factor, float32 ().

    Raises:
        InvalidArgument: this is not the engine's optimizer.
    """
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(
            f"optimizer is a {type(optimizer).__name__}; expected the DeepSpeed engine's `engine.optimizer`"
        )
    factor = 1.0 / float(getattr(optimizer, "loss_scale", 1.0))
    limit = float(getattr(optimizer, "clip_grad", 0.0))
    if limit > 0:
        gradients = (gradient_of(parameter) for parameter in parameters)  # in memory one at a time
        lengths = [torch.linalg.vector_norm(g).double().cpu() for g in gradients if g is not None]
        total = factor * float(torch.linalg.vector_norm(torch.stack(lengths)))
        factor *= min(1.0, limit / (total + 1e-6))
    return torch.tensor(factor)


@contextlib.contextmanager
def unpartitioned(parameter: Any) -> Iterator[Tensor]:
    """Inside, a parameter has all its values.

    Under ZeRO-3 each process holds a part of the values, and this is a collective.
    """
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter
