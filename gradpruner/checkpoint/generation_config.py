"""Save what can be saved of generation configs that transformers refuses to write."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

logger = logging.getLogger(__name__)

# fields that the others depend on, tried first
SWITCHES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate", "penalty_alpha", "cache_implementation")


def savable(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return a config that transformers writes, and the names of the fields left out.

    Older chat models have, for example, a temperature or a top_p beside do_sample=False. Generation ignores such a
    field.
    """
    if _can_be_saved(config):
        return config, []
    names = sorted(config.to_diff_dict(), key=lambda name: (name not in SWITCHES, name))
    kept, dropped = type(config)(), list[str]()
    for name in names:
        before = getattr(kept, name, None)
        setattr(kept, name, getattr(config, name))
        if not _can_be_saved(kept):
            setattr(kept, name, before)
            dropped.append(name)
    return kept, dropped


@contextlib.contextmanager
def saved_as_far_as_possible(model: Any) -> Iterator[None]:
    """Give the model a config that can be saved, inside the block. What it lacks is logged."""
    own = getattr(model, "generation_config", None)
    if not isinstance(own, GenerationConfig):
        yield
        return
    model.generation_config, dropped = savable(own)
    _warn(dropped, own)
    try:
        yield
    finally:
        model.generation_config = own


def rewrite(folder: Path) -> None:
    """Make a folder's generation_config.json one that can be saved, if there is one."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return
    try:
        own = GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError):  # what transformers does not read is no worse off as a copy
        return
    kept, dropped = savable(own)
    if dropped:
        _warn(dropped, own)
        kept.save_pretrained(str(folder))


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def _warn(dropped: list[str], config: GenerationConfig) -> None:
    if dropped:
        fields = ", ".join(f"{name} = {getattr(config, name)!r}" for name in dropped)
        logger.warning(
            f"the generation config is saved without {fields}: transformers refuses to write it with the other fields, "
            "and generation ignores it"
        )
