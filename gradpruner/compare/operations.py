"""Operations of a training step, the same number whichever kernels of attention and experts compute it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gradpruner.model.wrappers import is_peft

COUNTED = ("eager", "sdpa")  # attention of which every product is counted


def training_operations(model: Any, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of one forward and backward on `batch` (with labels), 2 per multiply-add.

    Counted are the products of matrices. Attention counts in full, masked half and padding included, with twice the
    forward for its backward; what a fused kernel computes anew is not counted. Other attention than eager and sdpa is
    replaced by sdpa for this step, and experts by a loop over them, whose products torch sees.
    """
    with _counted_implementations(model), FlopCounterMode(display=False, custom_mapping=_attention()) as counter:
        model(**batch).loss.backward()
    return int(counter.get_total_flops())


def _forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of shapes (rows, heads, tokens, size): the scores of all queries and keys, and their product with the values."""
    rows, heads, tokens, size = query
    return int(2 * rows * heads * tokens * key[-2] * (size + value[-1]))


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _forward(query, key, value)


def _attention() -> dict[Any, Any]:
    """A formula for every fused attention: torch has none for the CPU's, and counts a backward of others as 2.5."""
    formulas: dict[Any, Any] = {}
    for name in (
        "efficient_attention",
        "flash_attention",
        "cudnn_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    ):
        for ending, formula in (("", _forward), ("_backward", _backward)):
            operation = getattr(torch.ops.aten, f"_scaled_dot_product_{name}{ending}", None)
            if operation is not None:
                formulas[operation] = formula
    return formulas


@contextlib.contextmanager
def _counted_implementations(model: Any) -> Iterator[None]:
    """Inside, the transformers model computes attention and experts with products that are counted."""
    plain = model.get_base_model() if is_peft(model) else model
    attention = getattr(plain.config, "_attn_implementation", None)
    experts = getattr(plain.config, "_experts_implementation", None)
    if attention not in (*COUNTED, None):
        plain.set_attn_implementation("sdpa")
    if experts not in ("eager", None):
        plain.set_experts_implementation("eager")
    try:
        yield
    finally:
        if attention not in (*COUNTED, None):
            plain.set_attn_implementation(attention)
        if experts not in ("eager", None):
            plain.set_experts_implementation(experts)
