"""Remove adapters from a cut model: discard what they learned, or add it to the weights."""

from __future__ import annotations

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


def check_removable(decoder: Decoder, adapters: str) -> None:
    """Check that adapters can be removed as asked. A model without adapters passes.

    Args:
        decoder: the model.
        adapters: "keep" what they learned by adding it to the weights, or "discard" it.

    Raises:
        InvalidArgument: `adapters` is neither of the two, or the adapters are not finite or switched off.
        UnsupportedModel: the adapters cannot be removed in this way.
    """
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
    """Refuse adapters that hold a part of the base weights, or are merged into them.

    Raises UnsupportedModel.
    """
    altered = altered_base(decoder.given)
    if altered is not None:
        raise UnsupportedModel(
            f"{altered}: without the adapters the model would be damaged. Apply the plan and its igia to the model as "
            "it was before it got them"
        )


def remove_adapters(decoder: Decoder, adapters: str, expected: Tensor | None, tokens: int) -> None:
    """Leave the base model without adapters and trainable, or leave everything as it was.

    Args:
        decoder: the model, already cut. Without adapters, nothing is done.
        adapters: "keep" adds what they learned to the weights, "discard" throws it away.
        expected: the logits that the base model must have afterwards, or None if it gives none.
        tokens: length of the longer input of these logits, see `logits_of`.

    Raises:
        UnsupportedModel: peft could not do it, or the logits differ.
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
        difference = _difference(decoder, expected, tokens, MERGED if keep else 1.0)
        if difference is not None:
            raise UnsupportedModel(
                "the model without its adapters does not have the logits that it should have (by "
                f"{difference:.3g}); nothing was changed"
            )
    except BaseException:
        restore()
        raise
    for parameter in base.parameters():
        if not is_packed(parameter):
            parameter.requires_grad_(True)


def _difference(decoder: Decoder, expected: Tensor | None, tokens: int, rounding: float) -> float | None:
    if root_of(decoder.given) is not None:  # FSDP2's root is gone with the adapters, or cannot be called without them
        return None
    actual, dtype = logits_of(decoder.base, tokens), next(decoder.base.parameters()).dtype
    return differ(expected, actual, dtype, rounding=rounding)


def _is_in_layers(peft: Any, base: nn.Module) -> bool:
    """Whether modules of the model hold the adapters. A learned prompt is outside of the model."""
    return peft.base_model is not base


def _unload(peft: Any, base: nn.Module, *, keep: bool) -> None:
    """Let peft merge and take out its modules."""
    try:
        if keep:
            peft.base_model.merge_and_unload()
        # peft would leave the trained copies of modules_to_save in. They were not checked, and of tied weights only
        # one of the two would be the copy.
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
