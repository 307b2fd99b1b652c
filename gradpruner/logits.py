"""A model's answer to a few fixed tokens: how two models are told to be the same, or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.decoder import wrappers
from gradpruner.distributed import is_fsdp, reshard

TOKENS = 12
ROUNDING = 5e-5  # of the largest logit: what float32 may leave between two forwards of the same weights
WANTING = ("input", "required", "have to specify")  # what models say that want more than token ids
CACHES = ("cache", "past_key_values", "cache_params", "state")  # what models call theirs


def logits_of(model: nn.Module) -> Tensor | None:
    """Logits (1, tokens, vocabulary) on fixed token ids, float32 in host memory, in evaluation mode.

    The last token's are computed with a cache of the others, as in generation, where the model can do that.
    None where they cannot be had: no vocabulary in the config, a model that wants more than token ids, no data.
    Of a model sharded by FSDP2, its root is wanted; every process calls this.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    first = next(model.parameters(), None)
    if not isinstance(vocabulary, int) or vocabulary < 2 or first is None or first.is_meta:
        return None
    ids = torch.randint(1, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(first.device)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    try:
        with evaluating(model), resharding(model):
            output = model(**inputs, use_cache=False)
            step = _cached_step(model, inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        if any(word in str(error) for word in WANTING):
            return None
        raise
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return None
    return torch.cat([part.float().cpu() for part in (logits, step) if part is not None], dim=1)


def _cached_step(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    """Logits of one more token with a cache of the others, None for a model that does not work so."""
    last = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    mask = torch.ones(1, TOKENS + 1, dtype=torch.long, device=inputs[last].device)
    before = mask[:, :TOKENS]  # without a mask some models use the positions of an earlier call
    try:
        output = model(**inputs, attention_mask=before, use_cache=True)
        name = next(name for name in CACHES if getattr(output, name, None) is not None)
        step = {**inputs, last: inputs[last][:, :1], "attention_mask": mask if last == "input_ids" else before}
        logits = getattr(model(**step, **{name: getattr(output, name)}, use_cache=True), "logits", None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # models refuse in many ways; one that fails only after the cut then lacks this step
        return None
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


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


@contextlib.contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """FSDP2's shards again outside: a forward without a backward leaves the root's parameters gathered."""
    try:
        yield
    finally:
        reshard(model)


def root_of(model: nn.Module) -> nn.Module | None:
    """The outermost part of a stack of wrappers that FSDP2 shards: torch wants forwards to begin there."""
    return next((wrapper for wrapper in wrappers(model) if is_fsdp(wrapper)), None)


def differ(expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype) -> float | None:
    """The largest difference if it is more than rounding in `dtype` explains, else None; None if none was expected.

    The same operations on the same weights need not agree to the bit: GPU kernels do not repeat themselves, and a CPU's
    choose by where a weight lies in memory (1.1e-5 of the largest logit was seen, and none in float64). The tolerance
    is no larger than it must be: in a random model, whole rules of attention hide in the fourth digit.
    """
    if expected is None:
        return None
    if actual is None:
        return float("inf")
    if torch.equal(expected, actual):
        return None
    if expected.shape != actual.shape or not torch.equal(expected.isfinite(), actual.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    gap = (expected[finite] - actual[finite]).abs()
    tolerance = (
        max(ROUNDING, float(torch.finfo(dtype).eps)) * float(expected[finite].abs().max()) if gap.numel() else 0.0
    )
    return float(gap.max()) if gap.numel() and float(gap.max()) > tolerance else None
