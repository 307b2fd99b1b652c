"""The folder of a probe: the gradients that it accumulated, and what its steps trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from gradpruner.checkpoint.save import save
from gradpruner.distributed.processes import first, is_first
from gradpruner.errors import CheckpointError
from gradpruner.model.adapter_targets import as_named
from gradpruner.model.wrappers import is_peft
from gradpruner.probe.igia import Igia
from gradpruner.storage.files import atomic_folder, write_json
from gradpruner.storage.provenance import RECORD

IGIA, ADAPTERS, MODEL = "igia.safetensors", "adapters", "model"


def save_probe(
    folder: str | os.PathLike[str], igia: Igia, model: nn.Module, *, made_from: Mapping[str, str] | None = None
) -> None:
    """Write igia.safetensors and what the probe trained, all or nothing.

    That is the adapters, or the whole model if all weights were trained. Of several processes, the first writes, and
    all of them call this function.

    Args:
        folder: the folder to write.
        igia: of the probe.
        model: the trained model, a PEFT model if adapters were trained.
        made_from: digests of what the probe was made from. They are recorded in the folder, see
            `gradpruner.storage.provenance`. Default: no record.
    """
    importance = {}
    for key in igia.importance:  # after a probe in several processes, each holds a part: all ask for every part
        part = igia.importance[key]
        if is_first():
            importance[key] = part
    whole = dataclasses.replace(igia, importance=importance)
    first(lambda: _write(folder, whole, model, made_from))


def _write(folder: str | os.PathLike[str], igia: Igia, model: nn.Module, made_from: Mapping[str, str] | None) -> None:
    with atomic_folder(folder) as inside:
        igia.save(inside / IGIA)
        if is_peft(model):
            model.save_pretrained(inside / ADAPTERS)  # type: ignore[operator]
        else:
            save(model, inside / MODEL)
        if made_from is not None:
            write_json(inside / RECORD, dict(made_from))


def load_probed_model(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Return the model as the probe left it.

    Args:
        model: the plain dense model that the probe started from.
        folder: what `save_probe` wrote.

    Returns:
        `model` inside the trained adapters, or the trained model in its place.

    Raises:
        CheckpointError: the folder holds neither adapters nor a model.
    """
    from peft import PeftModel  # slow to import

    place, base = Path(folder), cast(Any, model)
    if (place / ADAPTERS).is_dir():
        with as_named():
            return PeftModel.from_pretrained(base, str(place / ADAPTERS))
    if not (place / MODEL).is_dir():
        raise CheckpointError(f"{place} holds neither adapters nor a model of a probe")
    parameter = next(model.parameters())
    # of its own class: code that came with it is loaded already
    trained: nn.Module = type(base).from_pretrained(
        place / MODEL, dtype=parameter.dtype, attn_implementation=base.config._attn_implementation
    )
    return trained.to(parameter.device)
