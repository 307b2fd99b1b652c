"""Keep gradients flowing through weights that bitsandbytes holds in 4 bits.

In evaluation mode on a CPU with AVX512-BF16, bitsandbytes rearranges a weight for inference, for good. No gradient
passes through a rearranged weight, and no error says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from gradpruner.errors import InvalidArgument

SWITCH = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


def never_rearrange(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging the weights of a model for inference."""
    for module in _rearranging(model):
        setattr(module, SWITCH, False)


@contextlib.contextmanager
def not_rearranging(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes does not rearrange the weights of a model for inference."""
    modules = _rearranging(model)
    try:
        for module in modules:
            setattr(module, SWITCH, False)
        yield
    finally:
        for module in modules:
            setattr(module, SWITCH, True)


def check_gradients_pass(model: nn.Module) -> None:
    """Raise InvalidArgument if no gradient passes through a weight that was rearranged."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise InvalidArgument(
                f"{name} is in 4 bits, and was used in evaluation mode on a CPU: bitsandbytes has rearranged its "
                "weight for inference, and no gradient passes through it. Load the model again, and train before "
                f"anything is evaluated (or set {SWITCH} = False in every Linear4bit first)"
            )


def _rearranging(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, SWITCH, False)]
