"""Compare two models by their logits on a few fixed tokens.

`logits_of` computes the logits of one model, `differ` compares those of two.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.distributed.fsdp import resharding
from gradpruner.model.config import text_config
from gradpruner.model.modes import evaluating

logger = logging.getLogger(__name__)

TOKENS = 12
PADDING = 5  # masked positions on the left of the longer input
LONGEST = 1024  # tokens of the longest window that is checked
# Names of config fields that hold a number of tokens after which attention changes. Fields that hold counts or lists
# of layers are excluded.
WINDOWS = re.compile(r"window|chunk|block_size|local|radius|stride|index_topk|compress|floor_scale")
NO_WINDOWS = re.compile(r"layer|expert|pattern|ids$|ind(ic|ex)es$|theta|feed_forward|prob")
# Tolerances of `differ`.
ROUNDING = 5e-5  # of the largest logit: what float32 may differ between two forwards with the same weights
MERGED = 16.0  # times the rounding, where each weight was rounded once more (4.1 measured, 30 layers in bfloat16)
TF32 = 2.0**-10  # to which a GPU rounds the operands of float32 matrix products, where that is switched on
WANTING = ("input", "required", "have to specify")  # words in the errors of models that need more than token ids
CACHES = ("cache", "past_key_values", "cache_params", "state")  # what models call their caches


def logits_of(model: nn.Module, tokens: int | None = None) -> Tensor | None:
    """Compute a model's logits on fixed token ids, in evaluation mode.

    The result has up to three parts, one behind the other:

    1. the logits of `TOKENS` tokens,
    2. those of one more token, computed with a cache of the others as in generation, if the model can do that,
    3. those of the last tokens of a longer input that is padded on the left, if the config names windows or chunks
       of attention.

    A model without a head for tokens gives its first output, such as hidden states or scores of classes.
    Every process calls this for a model that is sharded by FSDP2.

    Args:
        model: the model. For one that is sharded by FSDP2, the root.
        tokens: how long the longer input is, 0 for none. Default: `longer_input(config)`. Removing layers may change
            the windows that a config names, so the smaller model must be given the number of the dense one.

    Returns:
        Logits (1, tokens, vocabulary), float32 in host memory. None if there are none to compare: the config has no
        vocabulary, the model needs more than token ids, or it has no values.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    first = next(model.parameters(), None)
    if not isinstance(vocabulary, int) or vocabulary < 2 or first is None or first.is_meta:
        return None
    inputs = _inputs(config, vocabulary, TOKENS, first.device)
    try:
        with evaluating(model), resharding(model):
            output = _answer(model(**inputs, use_cache=False))
            step = _cached_step(model, inputs)
            length = longer_input(config) if tokens is None else tokens
            longer = _past_the_windows(model, vocabulary, length, first.device) if length else None
    except (TypeError, ValueError, RuntimeError) as error:
        if any(word in str(error) for word in WANTING):
            return None
        raise
    if output is None:
        return None
    return torch.cat([part.float().cpu() for part in (output, step, longer) if part is not None], dim=1)


def _inputs(config: Any, vocabulary: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """The same token ids at every call, also as the decoder's where the model has an encoder."""
    ids = torch.randint(1, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}


def _answer(output: Any) -> Tensor | None:
    """The logits, or the first output of a model without logits."""
    answer = getattr(output, "logits", None)
    if answer is None and hasattr(output, "to_tuple"):
        answer = output.to_tuple()[0]
    return answer if isinstance(answer, Tensor) and answer.ndim > 1 else None


def windows_of(config: Any) -> dict[str, int]:
    """Find the numbers of tokens after which a decoder's attention changes.

    Returns:
        The largest number by the name of the config's field, e.g. {"sliding_window": 4096}. Windows that are as long
        as the longest input are left out.
    """
    text = text_config(config)
    if not hasattr(text, "to_dict"):
        return {}
    positions = getattr(text, "max_position_embeddings", None)
    windows = {}
    for name, value in text.to_dict().items():
        if WINDOWS.search(name) and not NO_WINDOWS.search(name):
            sizes = [size for size in _numbers(value) if size > 1]
            sizes = [size for size in sizes if not isinstance(positions, int) or size < positions]
            if sizes:
                windows[name] = max(sizes)
    return windows


def log_unchecked_windows(config: Any) -> None:
    """Log the windows that are too long for the comparison of logits."""
    longer = {name: size for name, size in windows_of(config).items() if size > LONGEST}
    if longer:
        logger.warning(
            f"the logits are compared on inputs of up to {LONGEST} tokens. The windows {longer} of the config are "
            "longer, so the behaviour past them is not compared"
        )


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a value, also in nested lists and dicts."""
    if type(value) is int:
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def longer_input(config: Any) -> int:
    """The tokens of an input that is longer than the windows of a config. 0 without windows."""
    sizes = [size for size in windows_of(config).values() if size <= LONGEST]
    if not sizes:
        return 0
    positions = getattr(text_config(config), "max_position_embeddings", None)
    tokens = max(sizes) + PADDING + TOKENS
    return min(tokens, positions) if isinstance(positions, int) else tokens


def _past_the_windows(model: nn.Module, vocabulary: int, tokens: int, device: torch.device) -> Tensor | None:
    """Logits of the last tokens of a longer input, which is padded on the left."""
    config: Any = model.config
    inputs = _inputs(config, vocabulary, tokens, device)
    mask = torch.ones(1, tokens, dtype=torch.long, device=device)
    mask[:, :PADDING] = 0
    pad = getattr(text_config(config), "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        inputs["input_ids"][:, :PADDING] = pad
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = TOKENS  # type: ignore[assignment]
    try:
        logits = _answer(model(**inputs, attention_mask=mask, use_cache=False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as in _cached_step
        logger.warning(f"no logits past the windows {windows_of(config)}, so they are not compared there: {error!r}")
        return None
    return logits[:, -TOKENS:] if logits is not None and logits.ndim == 3 else logits


def _cached_step(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    """Logits of one more token with a cache of the others. None for a model without a cache."""
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
    except Exception:
        # Models refuse in many ways. If a model fails only after the cut, its logits lack this step, and `differ`
        # reports that the shapes differ.
        return None
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def _rounds_products() -> bool:
    """Whether a GPU rounds the operands of float32 matrix products."""
    if not torch.cuda.is_available():
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch raises if old and new settings were mixed
        return True


def differ(
    expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype, *, rounding: float = 1.0
) -> float | None:
    """Compare the logits of two models.

    The same operations on the same weights need not agree to the bit. GPU kernels do not repeat themselves. On a CPU,
    the kernel depends on where a weight lies in memory: a difference of 1.1e-5 of the largest logit was measured in
    float32, and none in float64. The tolerance is as small as this allows, because in a random model whole rules of
    attention change only the fourth digit.

    Args:
        expected: logits of the reference, or None if it has none. Then nothing is compared.
        actual: logits of the other model.
        dtype: of the models' weights.
        rounding: how many times the usual rounding is allowed, e.g. `MERGED`.

    Returns:
        None if the difference is explained by rounding in `dtype`. Else the largest difference: infinite if shapes
        differ, if only one of the two is finite somewhere, or if `actual` is None.
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
    difference = (expected[finite] - actual[finite]).abs()
    if not difference.numel():
        return None
    allowed = rounding * max(ROUNDING, float(torch.finfo(dtype).eps))
    if rounding > 1 and dtype == torch.float32 and _rounds_products():  # merged weights are rounded in another way
        allowed = rounding * TF32
    largest = float(difference.max())
    return largest if largest > allowed * float(expected[finite].abs().max()) else None
