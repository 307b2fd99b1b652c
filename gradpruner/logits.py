"""A model's answer to a few fixed tokens: how two models are told to be the same, or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 12


def logits_of(model: nn.Module) -> Tensor | None:
    """Logits (1, tokens, vocabulary) on fixed token ids, float32 in host memory, in evaluation mode.

    None where they cannot be had: no vocabulary in the config, a model that wants more than token ids, no data.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    first = next(model.parameters(), None)
    if not isinstance(vocabulary, int) or vocabulary < 2 or first is None or first.is_meta:
        return None
    ids = torch.randint(1, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(first.device)
    try:
        with evaluating(model):
            output = model(input_ids=ids, use_cache=False)
    except (TypeError, ValueError) as error:
        if "input" in str(error):
            return None
        raise
    logits = getattr(output, "logits", None)
    return logits.float().cpu() if isinstance(logits, Tensor) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def differ(expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype) -> float | None:
    """The largest difference if it is more than rounding in `dtype` explains, else None; None if either is missing.

    The same operations on the same device agree to the bit; the tolerance is for GPU kernels that do not repeat
    themselves, and no larger than it must be: in a random model, whole rules of attention hide in the fourth digit.
    """
    if expected is None or actual is None or torch.equal(expected, actual):
        return None
    if expected.shape != actual.shape or not torch.equal(expected.isfinite(), actual.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    gap = (expected[finite] - actual[finite]).abs()
    tolerance = max(1e-5, float(torch.finfo(dtype).eps)) * float(expected[finite].abs().max()) if gap.numel() else 0.0
    return float(gap.max()) if gap.numel() and float(gap.max()) > tolerance else None
