"""Choose the linears that get adapters, and check that PEFT puts adapters only there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, linear_modules
from gradpruner.model.linears import is_linear


def adapted_weights(decoder: Decoder, wanted: Sequence[str] | str | None = None) -> list[Weight]:
    """The weights of the linears of the decoder layers that get adapters, without routers.

    Args:
        decoder: the model.
        wanted: as PEFT's `target_modules`: names, of which each means every linear whose path ends with it, or one
            regular expression that whole paths match. Default: every linear.

    Raises:
        InvalidArgument: a name, or the regular expression, means no linear of a decoder layer.

    Source: docs/method.md, section 1, "Length and settings".
    """
    linears = {
        (j, name) for j in range(len(decoder.layers)) for name, m in linear_modules(decoder, j).items() if is_linear(m)
    }
    weights = [weight for weight in decoder.weights if (weight.layer, weight.name) in linears]
    if wanted is None:
        return weights
    paths = [decoder.path_of(weight).removesuffix(".weight") for weight in weights]
    if isinstance(wanted, str):
        try:
            chosen = {path for path in paths if re.fullmatch(wanted, path)}
        except re.error as error:
            raise InvalidArgument(f"target_modules = {wanted!r} is no regular expression: {error}") from None
        missing = [] if chosen else [wanted]
    else:
        found = {name: {path for path in paths if path == name or path.endswith(f".{name}")} for name in wanted}
        chosen, missing = set().union(*found.values()), [name for name in wanted if not found[name]]
    if missing:
        there = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
        raise InvalidArgument(
            f"target_modules: {', '.join(map(repr, missing))} means no linear of a decoder layer; there are {there}"
        )
    return [weight for weight, path in zip(weights, paths, strict=True) if path in chosen]


@contextlib.contextmanager
def as_named() -> Iterator[None]:
    """Inside, PEFT puts adapters on exactly the linears that `target_modules` names.

    PEFT rewrites the names of a configuration that was made before transformers 5. In a model with fused experts it
    takes every `gate_proj`, `up_proj` and `down_proj` for the old name of an expert's weight, and puts the adapters on
    the fused weights. It does so for dense layers and shared experts too, where this is wrong.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version of PEFT without this conversion
        yield
        return
    module: Any = conversion
    original = module.convert_peft_config_for_transformers
    module.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        module.convert_peft_config_for_transformers = original


def check_adapted(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise UnsupportedModel unless exactly these modules have adapters.

    Args:
        model: the PEFT model.
        targets: paths of modules in the base model.
    """
    expected = set(targets)
    actual = {name for name, module in Decoder(model).base.named_modules() if hasattr(module, "lora_A")}
    if actual != expected:
        raise UnsupportedModel(
            f"PEFT put adapters on {sorted(actual - expected)[:3]}, where none are wanted, and none on "
            f"{sorted(expected - actual)[:3]}: train this model without adapters (rank 0)"
        )
