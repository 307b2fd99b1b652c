"""What could only fail at a cut or when saving, tried before the first training step."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpruner.checkpoint.generation_config import saved_as_far_as_possible
from gradpruner.checkpoint.save import quiet
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.full_precision import check_full_precision
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.selection import select
from gradpruner.pruning.surgery import prepare

if TYPE_CHECKING:
    pass


def check_plan(decoder: Decoder, **wanted: Any) -> None:
    """Raises InvalidArgument or UnsupportedModel where no such plan is possible, or no layer can be removed.

    wanted: ratio or count, of, merge, protect; see `select`.
    """
    count = len(decoder.layers)
    accepted = {**wanted, **count_parameters(decoder)}
    rising = [float(j) for j in range(count)]
    falling = [*rising[:0:-1], float(count)]  # but for the last: that no layer needs another number proves nothing
    early, late = (select(scores, **accepted).kept for scores in (rising, falling))
    try:
        prepare(decoder, early)
    except UnsupportedModel:
        with contextlib.suppress(UnsupportedModel):  # where a vision tower feeds the first layers, say
            prepare(decoder, late)
            return
        raise


def check_save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write config, generation config and tokenizer beside `folder`, and remove them; and look for room on the disk.

    Raises InvalidArgument (quantised weights, too little room for one checkpoint), CheckpointError.
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
    except Exception as error:  # the disk's, or of one of the three
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"could not write a checkpoint to {folder}: {reason}; nothing was written") from error
