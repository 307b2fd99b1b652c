"""Count the operations of a training step, the same number whichever kernels compute it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gradpruner.model.wrappers import is_peft

COUNTED = ("eager", "sdpa")  # attention of which every product is counted


def training_operations(model: Any, batch: Mapping[str, Any]) -> int:
    """Return the floating-point operations of a forward and backward pass.

    A multiply-add is 2 operations.

    Only products of matrices are counted. Attention counts in full, its masked half and padding included, and its
    backward as twice the forward. What a fused kernel computes a second time is not counted. Attention other than eager
    and sdpa is replaced by sdpa for this step, and experts by a loop over them, whose products torch sees.

    Args:
        model: a transformers model or a PEFT model. Its gradients are those of the batch afterwards.
        batch: keyword arguments of the model, with labels.
    """
    with _counted_implementations(model), FlopCounterMode(display=False, custom_mapping=_attention()) as counter:
        model(**batch).loss.backward()
    return int(counter.get_total_flops())


def _forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the operations of attention.

    They are the scores of all queries and keys, and their product with the values. The arguments are shapes,
    (rows, heads, tokens, size).
    """
    rows, heads, tokens, size = query
    return int(2 * rows * heads * tokens * key[-2] * (size + value[-1]))


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _forward(query, key, value)


def _attention() -> dict[Any, Any]:
    """Return a formula for every fused attention.

    torch has none for the CPU's, and counts the backward of the others as 2.5 forwards.
    """
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
    """Make the model use attention and experts whose products are counted, in the block."""
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
