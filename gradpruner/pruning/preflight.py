"""Try before the first training step what would otherwise fail at the cut, or when saving."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gradpruner.checkpoint.generation_config import saved_as_far_as_possible
from gradpruner.checkpoint.save import quiet
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.full_precision import check_full_precision
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.selection import select
from gradpruner.pruning.surgery import prepare


def check_plan(decoder: Decoder, **selection: Any) -> None:
    """Check that a plan with these options is possible, and that layers can be removed at all.

    Args:
        decoder: the model.
        **selection: ratio or count, of, merge and protect, as `select` takes them.

    Raises:
        InvalidArgument: no plan with these options is possible.
        UnsupportedModel: neither early nor late layers can be removed.
    """
    layers = len(decoder.layers)
    arguments = {**selection, **count_parameters(decoder)}
    # With rising scores the first layers are removed. With falling ones the last are, except the very last: if only
    # that one is removed, no layer gets another index, and nothing is proved.
    rising = [float(layer) for layer in range(layers)]
    falling = [*rising[:0:-1], float(layers)]
    early, late = (select(scores, **arguments).kept for scores in (rising, falling))
    try:
        prepare(decoder, early)
    except UnsupportedModel:
        with contextlib.suppress(UnsupportedModel):  # where a vision tower feeds the first layers, say
            prepare(decoder, late)
            return
        raise


def check_save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Try to write config and tokenizer beside a folder, and check the room on the disk.

    Args:
        model: the model that will be saved.
        tokenizer: its tokenizer, or None.
        folder: where it will be saved. Nothing is left there.

    Raises:
        InvalidArgument: the weights are quantised, or one checkpoint does not fit on the disk.
        CheckpointError: something could not be written.
    """
    check_full_precision(model)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InvalidArgument(
            f"folder {str(folder)!r}: {free / 1e9:.2f} GB are free on its disk; expected {size / 1e9:.2f} GB or more, "
            "for one checkpoint of this model"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".gradpruner-trial-", dir=place) as trial, quiet():
            model.config.save_pretrained(trial)
            with saved_as_far_as_possible(model):
                if model.can_generate():
                    model.generation_config.save_pretrained(trial)
            if tokenizer is not None:
                tokenizer.save_pretrained(trial)
    except GradPrunerError:
        raise
    except Exception as error:  # of the disk, the config or the tokenizer
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"could not write a checkpoint to {folder}: {reason}; nothing was written") from error
