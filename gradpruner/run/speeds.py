"""How fast finished models generate, measured in turns: what else the machine does meanwhile touches all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gradpruner.training.evaluate import generation_speed

TURNS = 5


def speeds_in_turns(
    folders: Mapping[str, Path], load: Callable[[str], tuple[Any, Any]], *, turns: int = TURNS
) -> dict[str, list[float]]:
    """Tokens per second of greedy generation of 64 tokens, one number per turn, of every model by its name.

    In each turn every model is loaded, warmed up and timed once, one after the other, so only one is in memory. The
    ratio of two models within a turn is then hardly touched by what slows the machine down for longer than a turn.
    folders: a checkpoint of each. load: makes (model, tokenizer) of a folder.
    """
    found: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(turns):
        for name, folder in folders.items():
            model, tokenizer = load(str(folder))
            if torch.accelerator.is_available():
                model.to(torch.accelerator.current_accelerator())
            found[name].append(generation_speed(model, tokenizer, runs=1))
            del model
            gc.collect()
    return found
