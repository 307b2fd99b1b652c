"""A sparse model as an ordinary checkpoint, with its masks beside it in the same folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.save import save
from gradpruner.checkpoint.stored_model import StoredModel
from gradpruner.errors import ModelMismatch, UnsupportedModel
from gradpruner.plan import Plan

# the content is safetensors and the ending is not: servers take every *.safetensors, *.bin and *.pt for weights
MASKS = "gradpruner.masks"


def save_sparse(
    model: nn.Module,
    masks: Masks,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    plan: Plan | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a sparse model with `gradpruner.save`, its masks in the same folder.

    Args:
        model: a transformers model whose masked entries are zero.
        masks: which entries stay.
        folder: see `save`.
        tokenizer: see `save`.
        plan: see `save`.
        overwrite: see `save`.

    Returns:
        The folder.

    Raises:
        ModelMismatch: a masked entry is not zero. Nothing is written then.
        InvalidArgument: see `save`.
        CheckpointError: see `save`.
    """
    masks.check(model)
    return save(
        model,
        folder,
        tokenizer=tokenizer,
        plan=plan,
        overwrite=overwrite,
        beside=lambda inside: masks.save(inside / MASKS),
    )


def check_stored(stored: StoredModel, masks: Masks) -> None:
    """Check that a checkpoint folder keeps to its masks, with one weight in memory at a time.

    Args:
        stored: the folder.
        masks: which entries stay.

    Raises:
        ModelMismatch: a masked entry is not zero, or the masks are another model's.
        UnsupportedModel: a masked weight is stored in several tensors.
    """
    weights = {stored.decoder.path_of(weight): weight for weight in stored.decoder.weights}
    for name in masks.bits:
        if name not in weights:
            raise ModelMismatch(f"the model has no weight {name!r}; the masks are another model's")
        tensor = stored.one_to_one.get(stored.parameter_name(weights[name]))
        if tensor is None:
            raise UnsupportedModel(f"{name!r} has a mask, and is stored in another form than the model has it")
        masks.check_weight(name, tensor.read().t() if weights[name].transposed else tensor.read())
