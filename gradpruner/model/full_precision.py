"""Refuse quantised models where plain weights are needed: to merge, to patch, to save."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import is_packed

WANTED = (
    "a full-precision base is wanted (float32, bfloat16 or float16): the checkpoint that this one was quantised from. "
    "Quantised weights can be probed (gradpruner probe, gradpruner.ProbeCallback) and evaluated; the plan is then "
    "applied to that checkpoint"
)


def quantisation_of(config: Any) -> str | None:
    """Return how a config describes quantised weights, e.g. "4 bits (bitsandbytes)".

    The answer is None for a config without quantisation.
    """
    known = getattr(config, "quantization_config", None)
    if known is None:
        return None
    content = known if isinstance(known, dict) else known.to_dict()
    method = getattr(content.get("quant_method"), "value", content.get("quant_method")) or "an unknown method"
    if content.get("load_in_4bit") or content.get("_load_in_4bit"):
        bits = "4 bits"
    elif content.get("load_in_8bit") or content.get("_load_in_8bit"):
        bits = "8 bits"
    else:
        bits = f"{content['bits']} bits" if isinstance(content.get("bits"), int) else "quantised form"
    return f"{bits} ({method})"


def check_full_precision(model: nn.Module, name: str | None = None) -> None:
    """Raise InvalidArgument if the weights of a model are quantised.

    Args:
        model: the model.
        name: what the error calls it, e.g. its folder.
    """
    if not any(is_packed(p) or p.element_size() < 2 for p in model.parameters()):  # one byte: float8
        return
    how = quantisation_of(getattr(model, "config", None)) or "quantised form"
    raise InvalidArgument(f"model{'' if name is None else f' {name!r}'} is quantised, stored in {how}: {WANTED}")
