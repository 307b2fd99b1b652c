"""Which linears adapters go on, and that they do go there: PEFT rewrites some of their names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, is_linear, linear_modules


def adapted_weights(decoder: Decoder) -> list[Weight]:
    """The weights of every linear of every decoder layer, routers left out (C)."""
    linears = {
        (j, name) for j in range(len(decoder.layers)) for name, m in linear_modules(decoder, j).items() if is_linear(m)
    }
    return [weight for weight in decoder.weights if (weight.layer, weight.name) in linears]


@contextlib.contextmanager
def as_named() -> Iterator[None]:
    """Inside, PEFT puts adapters on the linears that `target_modules` names.

    In a model with fused experts it would take every `gate_proj`, `up_proj` and `down_proj`, of a dense layer and of a
    shared expert too, for the name that the experts' weights had before they were fused, and put adapters on these
    instead: that is meant for configurations made before transformers 5.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version without this conversion
        yield
        return
    module: Any = conversion
    known = module.convert_peft_config_for_transformers
    module.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        module.convert_peft_config_for_transformers = known


def check_adapted(model: nn.Module, targets: Iterable[str]) -> None:
    """Raises UnsupportedModel unless adapters are on these modules of the model inside, and on no others."""
    wanted = set(targets)
    found = {name for name, module in Decoder(model).base.named_modules() if hasattr(module, "lora_A")}
    if found != wanted:
        raise UnsupportedModel(
            f"PEFT put adapters on {sorted(found - wanted)[:3]}, where none are wanted, and none on "
            f"{sorted(wanted - found)[:3]}: train this model without adapters (rank 0)"
        )
