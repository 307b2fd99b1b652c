"""Add adapters to the weights beside them, and check beforehand that it will work."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, base_name, is_packed
from gradpruner.model.logits import MERGED, differ, logits_of
from gradpruner.model.rollback import restorer
from gradpruner.model.wrappers import root_of

logger = logging.getLogger(__name__)

DISCARD = 'accepted: adapters="discard"'


def merged(model: Any) -> nn.Module:
    """Add the active adapters of a PeftModel to the weights, and return the base model.

    A warning is logged if the logits changed. They are not compared where the weights are quantised.
    """
    base = model.get_base_model()
    packed = any(map(is_packed, base.parameters()))
    expected = None if packed else logits_of(base)
    plain: nn.Module = model.merge_and_unload()
    if packed:
        logger.warning("the adapters were rounded to the quantised weights that they were added to: not compared")
    actual = None if packed else logits_of(plain)
    difference = differ(expected, actual, next(plain.parameters()).dtype, rounding=MERGED)
    if difference is not None:
        logger.warning(f"adding the adapters to the weights changed the model's logits (by {difference:.3g})")
    return plain


def check_mergeable(decoder: Decoder, peft: Any) -> None:
    """Check that peft can add every active adapter to the weights beside it.

    peft refuses some adapters only when it comes to them. So it merges each module once here, on its own, and the
    module is put back.

    Args:
        decoder: the model.
        peft: the PeftModel in it.

    Raises:
        UnsupportedModel: an adapter cannot be added.
        InvalidArgument: an adapter is not finite, or switched off.
    """
    base = decoder.base
    if not hasattr(peft.base_model, "merge_and_unload"):
        raise UnsupportedModel(f"adapters of {type(peft.base_model).__name__} cannot be added to the weights")
    if any("original_module" in module._modules for module in base.modules()):
        raise UnsupportedModel(
            f"modules_to_save, trainable_token_indices: what they trained beside a module cannot be kept yet; {DISCARD}"
        )
    if any(is_packed(decoder.parameter(weight)) for weight in decoder.weights) or root_of(decoder.given) is not None:
        raise UnsupportedModel(
            f"adapters of a quantised or sharded model cannot be added to its weights; {DISCARD}, "
            "or `cut`, which leaves them where they are"
        )
    for name, parameter in peft.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise InvalidArgument(f"{name} is not finite; expected adapters that can be added to the weights")
    _check_switched_on(base)
    _check_not_shared(base)
    for name, module in _adapted_modules(base):
        _try(name, module)
    active = {adapter for _, module in _adapted_modules(base) for adapter in module.active_adapters}
    idle = sorted(set(peft.peft_config) - active)
    if idle:
        logger.warning(f"the adapters {idle} are not active: what they learned is not kept")


def values_beside(base: nn.Module) -> list[nn.Parameter]:
    """List the parameters that merging adapters may change."""
    return [parameter for _, module in _adapted_modules(base) for parameter in module.parameters()]


def _adapted_modules(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every outermost adapter layer: those that peft merges."""
    outer: list[str] = []
    for name, module in base.named_modules():
        if hasattr(module, "adapter_layer_names") and not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
            yield name, module


def _check_switched_on(base: nn.Module) -> None:
    off = [name for name, module in _adapted_modules(base) if module.disable_adapters]
    if off:
        raise InvalidArgument(
            f'adapters = "keep"; the adapters are switched off, in {off[0]} and {len(off) - 1} other modules, and add '
            'nothing to what the model computes: switch them on (enable_adapter_layers), or use adapters="discard"'
        )


def _check_not_shared(base: nn.Module) -> None:
    """Refuse an adapter beside a weight of several modules: it would act in all of them."""
    adapted = {name for name, _ in _adapted_modules(base)}
    users: dict[int, dict[str, str]] = defaultdict(dict)  # by parameter: its modules, and its name in each
    replacing = set()
    for path, module in base.named_modules():
        parts = path.split(".")
        layer = next((p for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in adapted), None)
        for leaf, parameter in module._parameters.items():
            name = base_name(f"{path}.{leaf}")
            if parameter is not None and name is not None:
                users[id(parameter)][layer or path] = name
                if layer is not None and hasattr(base.get_submodule(layer), "trainable_tokens_delta"):
                    replacing.add(layer)
    for names in users.values():
        beside = sorted(adapted & names.keys())
        # peft gives new rows to every module with the weight, and the same ones: put in twice, they are right
        if len(names) > 1 and beside and not names.keys() <= replacing:
            raise UnsupportedModel(
                f"{' and '.join(sorted(names.values()))} are one weight, and an adapter of {beside[0]} stands beside "
                f"it: added to the weight, it would act in every module that uses it; {DISCARD}, or leave these "
                "modules out of target_modules"
            )


def _try(name: str, module: Any) -> None:
    """Merge one module by peft, and put it back."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UnsupportedModel(f"{name} is on the meta device or offloaded: adapters cannot be added to it; {DISCARD}")
    restore = restorer(module, module.parameters(), aside=None)  # one module at a time: its device has room for a copy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real merge shows them again
            module.merge(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kind of adapter has its own
        reason = str(error).rstrip(".") or f"peft cannot merge a {type(module).__name__} ({type(error).__name__})"
        raise UnsupportedModel(f"the adapter of {name} cannot be added to its weight: {reason}; {DISCARD}") from error
    finally:
        restore()
