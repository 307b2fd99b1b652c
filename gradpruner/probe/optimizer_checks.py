"""Refuse optimizers whose steps a probe cannot watch, before the first step is taken."""

from __future__ import annotations

from typing import Any

import torch

from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder
from gradpruner.probe.estimators import Reader


def check_watchable(optimizer: Any, decoder: Decoder, *, by_deepspeed: bool) -> None:
    """Check that every step of an optimizer has one gradient that can be read before it.

    Args:
        optimizer: the optimizer itself, without wrappers.
        decoder: the model that it trains.
        by_deepspeed: whether a DeepSpeed engine trains the model.

    Raises:
        InvalidArgument: it has no hooks, steps inside the backward pass, or computes several gradients per step.
    """
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise InvalidArgument(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer (or call probe.record() "
            "before each step)"
        )
    if by_deepspeed:
        raise InvalidArgument(
            "optimizer: a DeepSpeed engine trains this model and steps it without a hook; call "
            "probe.record(engine.optimizer) between engine.backward(loss) and engine.step() instead"
        )
    if _steps_in_backward(optimizer, decoder):
        raise InvalidArgument(
            f"optimizer {type(optimizer).__name__} steps inside backward (LOMO, layer-wise GaLore): no gradient is "
            "left when its step is called, and none is clipped or accumulated; expected one that steps after it"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidArgument(
            "optimizer is LBFGS, which calls its closure several times per step: a step has no gradient of its own; "
            "expected an optimizer that uses one gradient per step"
        )


def check_holds(optimizer: Any, reader: Reader) -> None:
    """Check that an optimizer holds all parameters that train and are watched.

    It would not clear the gradients of the others, which would add up from step to step. Adapters whose B stays at
    zero would show no gradient at all.

    Args:
        optimizer: the optimizer.
        reader: what reads the gradients.

    Raises:
        InvalidArgument: it does not hold some of them. The message names their layers.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = sorted({layer for layer, parameter in reader.trained() if id(parameter) not in held})
    if layers:
        raise InvalidArgument(
            f"optimizer: it does not hold all the watched weights of layers {layers}; expected one that does. Freeze "
            "what is not meant to train (requires_grad_(False)), or, where another optimizer holds it, call "
            "probe.record() before the two step instead"
        )


def _steps_in_backward(optimizer: Any, decoder: Decoder) -> bool:
    """Whether the weights change, and their gradients are freed, during the backward pass."""
    fused = hasattr(optimizer, "fused_backward")  # lomo_optim's
    per_layer = getattr(optimizer, "optimizer_dict", None) is not None  # transformers' LayerWiseDummyOptimizer
    overlapped = any(hasattr(p, "_in_backward_optimizers") for p in decoder.layers.parameters())  # torch's own
    return fused or per_layer or overlapped
