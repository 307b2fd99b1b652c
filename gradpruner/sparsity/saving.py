"""A sparse model as an ordinary checkpoint, with its masks beside it in the same folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.checkpoint import save
from gradpruner.sparsity.masks import Masks

MASKS = "gradpruner_masks.safetensors"


def save_sparse(
    model: nn.Module, masks: Masks, folder: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """`gradpruner.save`, and the masks in the folder; first that the model keeps to them.

    Raises ModelMismatch where a masked entry is not zero, InvalidArgument, CheckpointError; nothing is then written.
    """
    masks.check(model)
    return save(
        model, folder, tokenizer=tokenizer, overwrite=overwrite, beside=lambda inside: masks.save(inside / MASKS)
    )
