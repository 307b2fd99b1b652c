"""Adapters taken off a model that was cut: discarded, or kept in the weights. Compared at the end, or undone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.checks import check_choice
from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, is_packed
from gradpruner.model.logits import MERGED, differ, logits_of
from gradpruner.model.rollback import restorer
from gradpruner.model.wrappers import altered_base, peft_of, root_of
from gradpruner.presets import ADAPTERS
from gradpruner.pruning.adapter_merge import check_mergeable, values_beside

logger = logging.getLogger(__name__)


def check_removable(decoder: Decoder, adapters: str) -> None:
    """Raises InvalidArgument or UnsupportedModel where the adapters cannot be taken off as `adapters` says."""
    check_choice("adapters", adapters, ADAPTERS)
    peft, base = peft_of(decoder.given), decoder.base
    if peft is None:
        if any(hasattr(module, "adapter_layer_names") for module in base.modules()):
            raise UnsupportedModel(
                "the model holds adapters without a PeftModel around it (add_adapter, inject_adapter_in_model, "
                "mixed=True), which would stay in it: make it with peft.get_peft_model, or unload them first"
            )
        return
    check_unaltered(decoder)
    if _is_in_layers(peft, base) and not hasattr(peft.base_model, "unload"):
        raise UnsupportedModel(f"adapters of {type(peft.base_model).__name__} cannot be taken off the base model")
    if adapters == "keep":
        check_mergeable(decoder, peft)


def check_unaltered(decoder: Decoder) -> None:
    """Raises UnsupportedModel where the adapters hold a part of the base weights, or are a part of them already."""
    altered = altered_base(decoder.given)
    if altered is not None:
        raise UnsupportedModel(
            f"{altered}: without the adapters the model would be damaged. Apply the plan and its igia to the model as "
            "it was before it got them"
        )


def take_off(decoder: Decoder, adapters: str, expected: Tensor | None, tokens: int) -> None:
    """Leave the base model without adapters, trainable, and with the logits `expected`; or leave all as it was.

    tokens: see `logits_of`. Raises UnsupportedModel.
    """
    peft: Any = peft_of(decoder.given)
    base = decoder.base
    if peft is None:
        return
    keep = adapters == "keep"
    restore = restorer(base, values_beside(base) if keep else ())
    try:
        _unload(peft, base, keep=keep)
        # peft's merge rounds each weight once more
        gap = _gap(decoder, expected, tokens, MERGED if keep else 1.0)
        if gap is not None:
            raise UnsupportedModel(
                f"the model without its adapters does not have the logits that it should have (by {gap:.3g}); nothing "
                "was changed"
            )
    except BaseException:
        restore()
        raise
    for parameter in base.parameters():
        if not is_packed(parameter):
            parameter.requires_grad_(True)


def _gap(decoder: Decoder, expected: Tensor | None, tokens: int, rounding: float) -> float | None:
    root = root_of(decoder.given)
    if root is not None:  # of FSDP2: gone with the adapters, or not to be asked without them
        return None
    actual, dtype = logits_of(decoder.base, tokens), next(decoder.base.parameters()).dtype
    return differ(expected, actual, dtype, rounding=rounding)


def _is_in_layers(peft: Any, base: nn.Module) -> bool:
    """Whether there is something to take out of the model; a prompt stands before it."""
    return peft.base_model is not base


def _unload(peft: Any, base: nn.Module, *, keep: bool) -> None:
    try:
        if keep:
            peft.base_model.merge_and_unload()
        # peft would leave the trained copies of modules_to_save in: not what was checked, and of tied weights only one
        wrappers = {n: m for n, m in base.named_modules() if "original_module" in m._modules}
        for name, wrapper in wrappers.items():
            base.set_submodule(name, wrapper.original_module)
        if _is_in_layers(peft, base) and not keep:
            peft.base_model.unload()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kind of adapter has its own
        what = "added to the weights" if keep else "taken off the base model"
        raise UnsupportedModel(f"the adapters cannot be {what}: {error!r}; nothing was changed") from error


def merged(model: Any) -> nn.Module:
    """The base model of a PeftModel with its active adapters added to the weights; a warning if its logits changed."""
    base = model.get_base_model()
    packed = any(map(is_packed, base.parameters()))
    expected = None if packed else logits_of(base)
    plain: nn.Module = model.merge_and_unload()
    if packed:
        logger.warning("the adapters were rounded to the quantised weights that they were added to: not compared")
    gap = differ(expected, None if packed else logits_of(plain), next(plain.parameters()).dtype, rounding=MERGED)
    if gap is not None:
        logger.warning(f"adding the adapters to the weights changed the model's logits (by {gap:.3g})")
    return plain
