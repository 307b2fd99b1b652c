"""A model's answer to a few fixed tokens: how two models are told to be the same, or not."""

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
LONGEST = 1024  # tokens: windows longer than that are not passed
# What configurations call numbers of tokens after which attention changes; not the counts and lists of layers.
WINDOWS = re.compile(r"window|chunk|block_size|local|radius|stride|index_topk|compress|floor_scale")
NO_WINDOWS = re.compile(r"layer|expert|pattern|ids$|ind(ic|ex)es$|theta|feed_forward|prob")
MERGED = 16.0  # times the rounding: each weight is rounded once more (4.1 was seen, 30 layers in bfloat16)
TF32 = 2.0**-10  # to which a GPU rounds what float32 matrix products read, where that is switched on
ROUNDING = 5e-5  # of the largest logit: what float32 may leave between two forwards of the same weights
WANTING = ("input", "required", "have to specify")  # what models say that want more than token ids
CACHES = ("cache", "past_key_values", "cache_params", "state")  # what models call theirs


def logits_of(model: nn.Module, tokens: int | None = None) -> Tensor | None:
    """Logits (1, tokens, vocabulary) on fixed token ids, float32 in host memory, in evaluation mode.

    The last token's are computed with a cache of the others, as in generation, where the model can do that. Where the
    config names windows or chunks of attention, the last tokens' of a longer input, padded on the left, follow.
    tokens: of that longer input, 0 for none; default `longer_input(config)`. A cut may change the windows that a config
    names, and its model must be asked the same.
    Of a model without a head for tokens, its first output: hidden states, scores of classes.
    None where they cannot be had: no vocabulary in the config, a model that wants more than token ids, no data.
    Of a model sharded by FSDP2, its root is wanted; every process calls this.
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
            asked = longer_input(config) if tokens is None else tokens
            longer = _past_the_windows(model, vocabulary, asked, first.device) if asked else None
    except (TypeError, ValueError, RuntimeError) as error:
        if any(word in str(error) for word in WANTING):
            return None
        raise
    if output is None:
        return None
    return torch.cat([part.float().cpu() for part in (output, step, longer) if part is not None], dim=1)


def _inputs(config: Any, vocabulary: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(1, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}


def _answer(output: Any) -> Tensor | None:
    """The logits, or what a model without logits gives first."""
    answer = getattr(output, "logits", None)
    if answer is None and hasattr(output, "to_tuple"):
        answer = output.to_tuple()[0]
    return answer if isinstance(answer, Tensor) and answer.ndim > 1 else None


def windows_of(config: Any) -> dict[str, int]:
    """The numbers of tokens after which a decoder's attention changes, by the names that its config gives them."""
    text = text_config(config)
    if not hasattr(text, "to_dict"):
        return {}
    positions = getattr(text, "max_position_embeddings", None)
    found = {}
    for name, value in text.to_dict().items():
        if WINDOWS.search(name) and not NO_WINDOWS.search(name):
            sizes = [size for size in _numbers(value) if size > 1]
            sizes = [size for size in sizes if not isinstance(positions, int) or size < positions]
            if sizes:  # what is as long as the longest input is never passed
                found[name] = max(sizes)
    return found


def say_what_is_not_passed(config: Any) -> None:
    """Log the windows that are too long for a comparison of logits to tell anything about them."""
    longer = {name: size for name, size in windows_of(config).items() if size > LONGEST}
    if longer:
        logger.warning(
            f"the logits are compared on inputs of up to {LONGEST} tokens: how the layers behave past the windows "
            f"{longer} of the config is not seen there"
        )


def _numbers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def longer_input(config: Any) -> int:
    """The tokens of an input that is longer than the windows which the config names; 0 without any."""
    sizes = [size for size in windows_of(config).values() if size <= LONGEST]
    if not sizes:
        return 0
    positions = getattr(text_config(config), "max_position_embeddings", None)
    tokens = max(sizes) + PADDING + TOKENS
    return min(tokens, positions) if isinstance(positions, int) else tokens


def _past_the_windows(model: nn.Module, vocabulary: int, tokens: int, device: torch.device) -> Tensor | None:
    """Logits of the last tokens of an input of so many tokens, padded on the left."""
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
    except Exception as error:  # as with a cache: a model that fails only after the cut then lacks these
        logger.warning(f"no logits past the windows {windows_of(config)}, which are not compared there: {error!r}")
        return None
    return logits[:, -TOKENS:] if logits is not None and logits.ndim == 3 else logits


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


def _rounds_products() -> bool:
    """Whether float32 matrix products of a GPU are rounded; other weights of the same product then round otherwise."""
    if not torch.cuda.is_available():
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch does not tell where old and new settings were mixed
        return True


def differ(
    expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype, *, rounding: float = 1.0
) -> float | None:
    """The largest difference if it is more than rounding in `dtype` explains, else None; None if none was expected.

    rounding: how many times as much is allowed.

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
    allowed = rounding * max(ROUNDING, float(torch.finfo(dtype).eps))
    if rounding > 1 and dtype == torch.float32 and _rounds_products():
        allowed = rounding * TF32
    tolerance = allowed * float(expected[finite].abs().max()) if gap.numel() else 0.0
    return float(gap.max()) if gap.numel() and float(gap.max()) > tolerance else None
